//! Disks that fill up and clocks that jump, of devices and of the hub, during real rollouts. They may
//! cost time; they cost no model, blame no release, and lose nothing that the hub acknowledged.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::fleet::{Fleet, Place, Process, answers, confirmed};

const SEED: u64 = 19_700_101;

/// Fills a disk until it takes nothing more; returns the file that does.
fn fill(process: &Process, folder: &Path) -> PathBuf {
    let path = process.sees(&folder.join("filler"));
    let mut file = std::fs::File::create(&path).expect("a file on the small disk");
    for size in [1 << 16, 1 << 10, 1] {
        let piece = vec![7; size];
        while file.write_all(&piece).is_ok() {}
    }
    path
}

#[test]
fn a_full_disk_of_a_device_costs_time_alone() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut fleet = Fleet::start();
    fleet.suit_the_tiny_model();
    fleet.join_in("till", "150MB", Place::SmallDisk(24 << 20), None);
    fleet.wait_for_reports(1);
    fleet.ship("1.0.0", "Q4_0");
    let released = |version| {
        let shipping = fleet.shipping(version, "Q8_0");
        fleet.json(&[&shipping[..], &["--until", "release"]].concat());
    };
    released("2.0.0");

    let filler = fill(&fleet.devices[0].agent, &fleet.path("till"));
    let rollout = fleet.json(&["rollout", "start", "glass", "2.0.0"]);
    let devices = fleet.wait_for("a device that waits for space", |devices| {
        devices[0]["report"]["phase"] == "waiting"
    });
    let report = &devices[0]["report"];
    assert_eq!(report["cause"], "disk_full", "{report:#}");
    assert_eq!((&report["running"]["version"], &report["rejected"]), (&json!("1.0.0"), &json!([])));
    answers(&devices[0], "with a full disk");

    std::fs::remove_file(filler).expect("the filler can be removed");
    let devices = fleet.wait_for("the new version", |devices| confirmed(&devices[0], "2.0.0"));
    answers(&devices[0], "with space again");
    let ended = fleet.wait_for_end(rollout["id"].as_str().expect("an id"));
    assert_eq!(ended["state"], "completed", "{ended:#}");
}

#[test]
fn a_full_disk_of_the_hub_refuses_and_loses_nothing() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut fleet = Fleet::start_in(Place::SmallDisk(32 << 20), Vec::new());
    fleet.suit_the_tiny_model();
    fleet.join("till", "150MB");
    fleet.wait_for_reports(1);
    fleet.ship("1.0.0", "Q4_0");

    let shipping = fleet.shipping("2.0.0", "Q8_0");
    let filler = fill(fleet.hub(), &fleet.path("hub"));
    let refused = fleet.run(&shipping);
    let errors = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success(), "a full disk takes a release");
    assert!(errors.contains(" is full\nhint: free some space"), "{errors}");
    // What is only read goes on, and so does the device.
    let devices = fleet.json(&["device", "list"]);
    assert!(confirmed(&devices[0], "1.0.0"), "{devices:#}");
    answers(&devices[0], "of a hub with a full disk");

    std::fs::remove_file(filler).expect("the filler can be removed");
    let rollout = fleet.json(&shipping);
    assert_eq!(rollout["state"], "completed", "{rollout:#}");
    let devices = fleet.wait_for("the new version", |devices| confirmed(&devices[0], "2.0.0"));
    answers(&devices[0], "of a hub with space again");
    let verdict = fleet.json(&["audit", "verify"]);
    assert!(verdict.get("broken").is_none(), "{verdict}");
}

#[test]
fn clocks_that_jump_blame_nobody() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let clocks = tempfile::tempdir().expect("a temporary folder");
    let clock = |name: &str| clocks.path().join(name);
    let set = |name: &str, wrong_by: &str| {
        // Read while it is written, half a line would be another time.
        let new = clock("new");
        std::fs::write(&new, wrong_by).expect("a file");
        std::fs::rename(new, clock(name)).expect("a file can be renamed");
    };
    let names = ["till", "kiosk"];
    for name in ["hub", "till", "kiosk"] {
        set(name, "+0");
    }
    let mut fleet = Fleet::start_in(Place::Clock(clock("hub")), Vec::new());
    fleet.suit_the_tiny_model();
    for name in names {
        fleet.join_in(name, "150MB", Place::Clock(clock(name)), None);
    }
    fleet.wait_for_reports(names.len());
    let versions = [("1.0.0", "Q4_0"), ("2.0.0", "Q8_0"), ("3.0.0", "Q5_0")];
    for (version, quantisation) in versions {
        fleet.ship(version, quantisation);
    }

    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    // An hour to and fro, a day, beyond every certificate, before the first one, and right again.
    let jumps = ["+3600", "-3600", "+2d", "-2d", "+9000d", "-20000d", "+0"];
    // The hub's own certificates are made for years, not for decades.
    let hub_jumps = ["+0", "+3600", "-3600", "+2d", "-2d", "+30d", "+0"];
    for (number, (jump, hub_jump)) in jumps.iter().zip(hub_jumps).enumerate() {
        let version = versions[number % versions.len()].0;
        let rollout = fleet.json(&["rollout", "start", "glass", version]);
        std::thread::sleep(Duration::from_millis(random.random_range(0..1_000)));
        set("till", jump);
        set("hub", hub_jump);
        std::thread::sleep(Duration::from_millis(random.random_range(0..1_000)));
        set("kiosk", jump);
        if number % 2 == 0 {
            fleet.kill_agent(number / 2 % names.len());
        }
        let context = format!("{version}: devices {jump}, hub {hub_jump}");
        fleet.wait_for(&context, |devices| devices.iter().all(|device| confirmed(device, version)));
        let ended = fleet.wait_for_end(rollout["id"].as_str().expect("an id"));
        assert_eq!(ended["state"], "completed", "{context}: {ended:#}");
        for device in fleet.json(&["device", "list"]).as_array().expect("a list") {
            assert_eq!(device["report"]["rejected"], json!([]), "{context}: {device:#}");
            answers(device, &context);
        }
    }
    let verdict = fleet.json(&["audit", "verify"]);
    assert!(verdict.get("broken").is_none(), "{verdict}");
}
