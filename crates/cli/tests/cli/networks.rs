//! Rollouts over bad networks: each device behind a link that delays, loses, throttles, breaks and
//! cuts. A bad network may cost time; it never costs a device its model, and never blames a release.

use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::fleet::{Fleet, Place, answers, confirmed};
use crate::link::{Cut, Link, Toxics};

const DEVICES: [&str; 2] = ["till", "kiosk"];
/// The agent keeps two models: with three, each rollout has something to download.
const RELEASES: [(&str, &str); 3] = [("1.0.0", "Q4_0"), ("2.0.0", "Q8_0"), ("3.0.0", "Q5_0")];
const SEED: u64 = 30_200;
/// The least that a device pulls for one of the releases, in bytes: a delta between their types.
const MIN_PULLED_BYTES: u64 = 10_000;
/// The most, for a whole file: a broken download goes on where it stopped.
const MAX_PULLED_BYTES: u64 = 2_500_000;

/// A kind of bad network.
struct World {
    name: &'static str,
    toxics: Toxics,
    /// Cuts that come and go while the rollout is under way.
    flaps: Option<Cut>,
}

fn worlds() -> Vec<World> {
    let world = |name, toxics| World { name, toxics, flaps: None };
    let good = Toxics::default();
    vec![
        world("good link", good),
        world("200 ms latency", Toxics { latency_ms: 200, ..good }),
        world("30 % loss", Toxics { loss: 0.3, ..good }),
        world("200 ms and 30 % loss", Toxics { latency_ms: 200, loss: 0.3, ..good }),
        world("1 Mbit/s", Toxics { bits_per_s: Some(1_000_000), ..good }),
        world("connections break", Toxics { breaks_after_bytes: Some(120_000), ..good }),
        World { name: "cuts, refused", toxics: good, flaps: Some(Cut::Refused) },
        World { name: "cuts, silent", toxics: good, flaps: Some(Cut::Silent) },
    ]
}

/// `SLM_NETWORK_ROUNDS=20` is the nightly lane: every world so often.
#[test]
fn rollouts_converge_over_bad_networks() {
    let rounds =
        std::env::var("SLM_NETWORK_ROUNDS").map_or(1, |text| text.parse().expect("a number"));
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut fleet = Fleet::start();
    fleet.suit_the_tiny_model();
    let hub = fleet.address();
    let links: Vec<Link> = (0..).zip(DEVICES).map(|(n, _)| Link::to(hub, SEED + n)).collect();
    for (name, link) in DEVICES.iter().zip(&links) {
        fleet.join_in(name, "150MB", Place::Plain, Some(link.address));
    }
    fleet.wait_for_reports(DEVICES.len());
    for (version, quantisation) in RELEASES {
        fleet.ship(version, quantisation);
    }

    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let versions = RELEASES.iter().map(|(version, _)| *version).cycle();
    for (world, version) in (0..rounds).flat_map(|_| worlds()).zip(versions) {
        let before: Vec<u64> = links.iter().map(Link::carried).collect();
        links.iter().for_each(|link| link.set(world.toxics));
        let started = Instant::now();
        let rollout = fleet.json(&["rollout", "start", "glass", version, "--waves", "rest"]);
        if let Some(cut) = world.flaps {
            for _ in 0..6 {
                links.iter().for_each(|link| link.set(Toxics { cut: Some(cut), ..world.toxics }));
                std::thread::sleep(Duration::from_millis(random.random_range(50..800)));
                links.iter().for_each(|link| link.set(world.toxics));
                std::thread::sleep(Duration::from_millis(random.random_range(10..300)));
            }
        }
        let name = world.name;
        fleet.wait_for(&format!("{version} over {name}"), |devices| {
            devices.iter().all(|device| confirmed(device, version))
        });
        let took = started.elapsed();
        let ended = fleet.wait_for_end(rollout["id"].as_str().expect("an id"));
        assert_eq!(ended["state"], "completed", "{name}: {ended:#}");
        for device in fleet.json(&["device", "list"]).as_array().expect("a list") {
            assert_eq!(device["report"]["rejected"], serde_json::json!([]), "{name}: {device:#}");
            answers(device, name);
        }
        let pulled: Vec<u64> =
            links.iter().zip(before).map(|(it, was)| it.carried() - was).collect();
        for bytes in &pulled {
            let expected = MIN_PULLED_BYTES..=MAX_PULLED_BYTES;
            assert!(expected.contains(bytes), "{name}: {bytes} bytes were pulled");
        }
        eprintln!("{name}: confirmed after {} ms, pulled {pulled:?} bytes", took.as_millis());
        links.iter().for_each(|link| link.set(Toxics::default()));
    }
    let verdict = fleet.json(&["audit", "verify"]);
    assert!(verdict.get("broken").is_none(), "{verdict}");
}
