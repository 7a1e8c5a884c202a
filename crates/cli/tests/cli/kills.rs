//! SIGKILL of hub, agents and workers at random moments of real rollouts. After every one the fleet
//! converges: each device runs and has confirmed what its rollout named, each endpoint answers, and
//! what the hub acknowledged is in its audit log.

use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::fleet::{Fleet, TIMEOUT, model};

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
    fleet.wait_for("the devices", |devices| {
        devices.len() == DEVICES.len() && devices.iter().all(|device| !device["report"].is_null())
    });
    let ship = |fleet: &Fleet, version: &str| {
        let arguments = ["ship", &model(), "--name", "glass", "--yes", "--version", version];
        let rollout = fleet.json(&arguments);
        assert_eq!(rollout["state"], "completed", "{rollout}");
    };
    ship(&fleet, VERSIONS[0]);
    // Another file for the second version, so that there is something to download.
    fleet.json(&["class", "set", "small", "--min-memory", "0", "--quantisation", "Q8_0"]);
    ship(&fleet, VERSIONS[1]);

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
        let ended = wait_for_end(&fleet, &rollout);
        assert_eq!(ended["state"], "completed", "{context}: {ended:#}");
        for device in fleet.json(&["device", "list"]).as_array().expect("a list") {
            answers(device, &context);
        }
        slowest = slowest.max(started.elapsed());
    }
    eprintln!("{kills} kills; the slowest convergence took {} ms", slowest.as_millis());

    let verdict = fleet.json(&["audit", "verify"]);
    assert!(verdict.get("broken").is_none(), "{verdict}");
    let entries = audit_entries(&fleet);
    let created = entries.iter().filter(|entry| entry["action"] == "rollout.create").count();
    assert_eq!(created, acknowledged, "an acknowledged rollout is not in the audit log");
}

/// Whether somebody was killed: a worker may be gone already when its agent has just started.
fn kill(fleet: &mut Fleet, victim: Victim) -> bool {
    match victim {
        Victim::Hub => fleet.kill_hub(),
        Victim::Agent(index) => fleet.kill_agent(index),
        Victim::Worker(index) => {
            let worker = fleet.devices[index].1.child().and_then(rustix::process::Pid::from_raw);
            let Some(worker) = worker else { return false };
            return rustix::process::kill_process(worker, rustix::process::Signal::KILL).is_ok();
        }
    }
    true
}

fn confirmed(device: &Value, version: &str) -> bool {
    let report = &device["report"];
    report["phase"] == "confirmed"
        && report["generation"] == device["desired"]["generation"]
        && report["running"]["version"] == version
        && report["running"]["manifest"] == device["desired"]["model"]["manifest"]
        && device["desired"]["model"]["version"] == version
}

fn wait_for_end(fleet: &Fleet, rollout: &str) -> Value {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let status = fleet.json(&["rollout", "status", rollout]);
        if status["state"] != "running" {
            return status;
        }
        assert!(Instant::now() < deadline, "the rollout does not end: {status:#}");
    }
}

/// The device's own endpoint answers a question. It may just be starting its worker again, which it
/// says with a 503.
fn answers(device: &Value, context: &str) {
    let endpoint = device["report"]["facts"]["endpoint"].as_str().expect("an endpoint");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        let body = json!({ "prompt": "Alice was beginning to", "max_tokens": 4 });
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let request = client.post(format!("{endpoint}/v1/completions")).json(&body);
            let status = request.send().await.map(|response| response.status().as_u16());
            match status {
                Ok(200) => return,
                Ok(503) | Err(_) if Instant::now() < deadline => tokio::task::yield_now().await,
                other => panic!("{context}: {} at {endpoint} answers {other:?}", device["name"]),
            }
        }
    });
}

fn audit_entries(fleet: &Fleet) -> Vec<Value> {
    let entries = fleet.json(&["audit", "list"]);
    entries.as_array().expect("a list").clone()
}
