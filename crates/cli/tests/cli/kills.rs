//! SIGKILL of hub, agents and workers at random moments of real rollouts. After every one the fleet
//! converges: each device runs and has confirmed what its rollout named, each endpoint answers, and
//! what the hub acknowledged is in its audit log.

use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::fleet::{Fleet, answers, confirmed};

/// Kills in one run; together with those of the hub's and the agent's own tests more than 200.
const KILLS: u32 = 160;
/// The longest time from the start of a rollout to a kill, in milliseconds: about as long as the
/// tiny model takes to be confirmed by both devices.
const LATEST_MS: u64 = 1_500;
const SEED: u64 = 1_873;
const DEVICES: [&str; 2] = ["till", "kiosk"];
const VERSIONS: [&str; 2] = ["1.0.0", "2.0.0"];

#[derive(Clone, Copy, Debug)]
enum Victim {
    Hub,
    Agent(usize),
    Worker(usize),
}

#[test]
fn the_fleet_converges_after_every_kill() {
    // Another test of this process may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut fleet = Fleet::start();
    fleet.suit_the_tiny_model();
    for name in DEVICES {
        fleet.join(name, "150MB");
    }
    fleet.wait_for_reports(DEVICES.len());
    // Another file for the second version, so that there is something to download.
    for (version, quantisation) in VERSIONS.iter().zip(["Q4_0", "Q8_0"]) {
        fleet.ship(version, quantisation);
    }

    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let mut acknowledged = 2;
    let mut kills = 0;
    let mut slowest = Duration::ZERO;
    while kills < KILLS {
        let version = VERSIONS[acknowledged % VERSIONS.len()];
        let rollout = fleet.json(&["rollout", "start", "glass", version]);
        let rollout = rollout["id"].as_str().expect("an id").to_owned();
        acknowledged += 1;
        let mut history = Vec::new();
        for _ in 0..random.random_range(1..=2) {
            let wait = Duration::from_millis(random.random_range(0..LATEST_MS));
            std::thread::sleep(wait);
            let victim = match random.random_range(0..3) {
                0 => Victim::Hub,
                1 => Victim::Agent(random.random_range(0..DEVICES.len())),
                _ => Victim::Worker(random.random_range(0..DEVICES.len())),
            };
            kills += u32::from(kill(&mut fleet, victim));
            history.push((wait, victim));
        }
        let started = Instant::now();
        let context = format!("kill {kills}, rollout {rollout} to {version}, {history:?}");
        fleet.wait_for(&format!("convergence after {context}"), |devices| {
            devices.iter().all(|device| confirmed(device, version))
        });
        let ended = fleet.wait_for_end(&rollout);
        assert_eq!(ended["state"], "completed", "{context}: {ended:#}");
        for device in fleet.json(&["device", "list"]).as_array().expect("a list") {
            answers(device, &context);
        }
        slowest = slowest.max(started.elapsed());
    }
    eprintln!("{kills} kills; the slowest convergence took {} ms", slowest.as_millis());

    let verdict = fleet.json(&["audit", "verify"]);
    assert!(verdict.get("broken").is_none(), "{verdict}");
    assert_eq!(created(&fleet), acknowledged, "an acknowledged rollout is not in the audit log");
}

/// Whether somebody was killed: a worker may be gone already when its agent has just started.
fn kill(fleet: &mut Fleet, victim: Victim) -> bool {
    match victim {
        Victim::Hub => fleet.kill_hub(),
        Victim::Agent(index) => fleet.kill_agent(index),
        Victim::Worker(index) => {
            let worker =
                fleet.devices[index].agent.child().and_then(rustix::process::Pid::from_raw);
            let Some(worker) = worker else { return false };
            return rustix::process::kill_process(worker, rustix::process::Signal::KILL).is_ok();
        }
    }
    true
}

/// Rollouts that were created, after the audit log.
pub fn created(fleet: &Fleet) -> usize {
    let entries = fleet.json(&["audit", "list"]);
    let entries = entries.as_array().expect("a list");
    entries.iter().filter(|entry| entry["action"] == "rollout.create").count()
}
