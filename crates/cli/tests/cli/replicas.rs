//! Three `slm up` over one PostgreSQL and one S3, real agents at them: each hub dies in the middle of
//! rollouts, the one that leads among them, and the two that are left bring every rollout to its end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::fleet::{Fleet, Place, Process, address, answers, confirmed};
use crate::kills::created;
use crate::link::Link;
use crate::{postgres, s3};

const HUBS: usize = 3;
/// Every hub dies twice.
const KILLS: usize = 2 * HUBS;
/// The longest time from the start of a rollout to a kill, in milliseconds.
const LATEST_MS: u64 = 1_000;
const SEED: u64 = 77;
const DEVICES: [&str; 2] = ["till", "kiosk"];
const VERSIONS: [&str; 2] = ["1.0.0", "2.0.0"];

struct Replica {
    data: PathBuf,
    address: SocketAddr,
    process: Process,
}

#[test]
fn rollouts_outlive_each_of_three_hubs() {
    // Another test of this process may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = postgres::Server::start();
    let bucket = s3::S3Server::start();
    let mut settings = bucket.settings();
    settings.push(("SLM_DATABASE".to_owned(), server.database("fleet")));
    settings.push(("SLM_BLOBS".to_owned(), "s3://fleet/models".to_owned()));
    let mut fleet = Fleet::with(settings);
    let start = |fleet: &Fleet, data: PathBuf, listen: &str| {
        let (process, ready) = fleet.another_hub(&data, listen);
        Replica { data, address: address(&ready), process }
    };
    let first = (fleet.data.clone(), fleet.address());
    let mut others: Vec<Replica> =
        (1..HUBS).map(|n| start(&fleet, fleet.path(&format!("hub-{n}")), "127.0.0.1:0")).collect();

    // The operator and each device keep to a hub for as long as it lives.
    let hubs = [&[first.1], &others.iter().map(|hub| hub.address).collect::<Vec<_>>()[..]].concat();
    let links: Vec<Link> =
        (0..=DEVICES.len() as u64).map(|n| Link::to_any(hubs.clone(), SEED + n)).collect();
    let token = std::fs::read_to_string(first.0.join("admin.token")).expect("a token");
    for (name, value) in [
        ("SLM_HUB", format!("https://{}", links[DEVICES.len()].address)),
        ("SLM_CA", first.0.join("tls/ca.pem").display().to_string()),
        ("SLM_TOKEN", token.trim().to_owned()),
    ] {
        fleet.settings.push((name.to_owned(), value));
    }
    fleet.suit_the_tiny_model();
    for (name, link) in DEVICES.iter().zip(&links) {
        fleet.join_in(name, "150MB", Place::Plain, Some(link.address));
    }
    fleet.wait_for_reports(DEVICES.len());
    for (version, quantisation) in VERSIONS.iter().zip(["Q4_0", "Q8_0"]) {
        fleet.ship(version, quantisation);
    }

    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let mut slowest = Duration::ZERO;
    for kill in 0..KILLS {
        let version = VERSIONS[kill % VERSIONS.len()];
        let rollout = fleet.json(&["rollout", "start", "glass", version]);
        let rollout = rollout["id"].as_str().expect("an id").to_owned();
        std::thread::sleep(Duration::from_millis(random.random_range(0..LATEST_MS)));
        let victim = kill % HUBS;
        match victim.checked_sub(1) {
            None => fleet.end_hub(),
            Some(other) => others[other].process.kill(),
        }
        // The two that are left do it.
        let started = Instant::now();
        let context = format!("the death of hub {victim} in rollout {rollout} to {version}");
        let devices = fleet.wait_for(&format!("convergence after {context}"), |devices| {
            devices.iter().all(|device| confirmed(device, version))
        });
        let ended = fleet.wait_for_end(&rollout);
        assert_eq!(ended["state"], "completed", "{context}: {ended:#}");
        slowest = slowest.max(started.elapsed());
        for device in &devices {
            answers(device, &context);
        }
        match victim.checked_sub(1) {
            None => fleet.kill_hub(),
            Some(other) => {
                let Replica { data, address, .. } = &others[other];
                others[other] = start(&fleet, data.clone(), &address.to_string());
            }
        }
    }
    eprintln!("{KILLS} hubs killed; the slowest rollout then took {} ms", slowest.as_millis());

    let verdict = fleet.json(&["audit", "verify"]);
    assert!(verdict.get("broken").is_none(), "{verdict}");
    assert_eq!(
        created(&fleet),
        VERSIONS.len() + KILLS,
        "an acknowledged rollout is not in the log"
    );
}
