//! A release of an adapter: the model that devices have stays, the adapter alone travels.

use crate::fleet::{Fleet, answers, confirmed, model};

const DEVICES: [&str; 2] = ["till-1", "till-2"];

fn adapter() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/glasslm/adapter.gguf")
}

#[test]
fn an_adapter_is_shipped_alone() {
    let mut fleet = Fleet::start();
    fleet.suit_the_tiny_model();
    for name in DEVICES {
        fleet.join(name, "150MB");
    }
    fleet.wait_for_reports(DEVICES.len());
    let first = fleet.shipping("1.0.0", "Q8_0");
    let rollout = fleet.json(&[&first[..], &["--waves", "rest"]].concat());
    assert_eq!(rollout["state"], "completed", "{rollout}");

    // What is no adapter is refused before anything is done.
    let second = fleet.shipping("1.1.0", "Q8_0");
    let wrong = fleet.run(&[&second[..], &["--adapter", model()]].concat());
    let said = String::from_utf8_lossy(&wrong.stderr);
    assert!(wrong.status.code() == Some(1) && said.contains("is no LoRA adapter"), "{said}");
    assert!(said.contains("hint:"), "{said}");

    // The adapter is no fine-tuning: the gate is right to say that it is worse.
    let worse = ["--adapter", adapter(), "--override-gate", "a test"];
    let rollout = fleet.json(&[&second[..], &worse, &["--waves", "rest"]].concat());
    assert_eq!(rollout["state"], "completed", "{rollout}");
    let devices = fleet.wait_for("everyone to confirm, and to say so", |devices| {
        devices.iter().all(|device| confirmed(device, "1.1.0"))
    });
    let adapter_bytes = std::fs::metadata(adapter()).expect("the adapter").len();
    for device in &devices {
        let transfer = &device["report"]["telemetry"]["transfer"];
        assert_eq!(transfer["adapter_bytes"], adapter_bytes, "{transfer}");
        let others = ["whole_bytes", "delta_bytes", "peer_bytes"];
        assert!(others.iter().all(|part| transfer[part] == 0), "{transfer}");
        answers(device, "after the update");
    }
    let release = fleet.json(&["release", "show", "glass", "1.1.0"]);
    let variant = &release["variants"][0];
    assert_eq!(variant["adapter"]["size_bytes"], adapter_bytes, "{release}");
    assert_eq!(variant["report"]["adapter"], variant["adapter"]["digest"]);
    let shown = fleet.run(&["release", "show", "glass", "1.1.0"]);
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.contains("8.4 kB of an adapter"), "{shown}");

    // The same again is the same release, whose rollout is over.
    let again = fleet.json(&[&second[..], &worse, &["--until", "release"]].concat());
    assert_eq!(again["version"], "1.1.0", "{again}");
}
