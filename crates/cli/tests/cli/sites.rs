//! Updates that fetch what has changed, and sites that fetch it once: a real hub, real agents.

use serde_json::Value;

use crate::fleet::{Fleet, answers, confirmed, model};

const DEVICES: [&str; 4] = ["till-1", "till-2", "till-3", "till-4"];

/// The tiny model after a little more training: every weight has moved, but not far.
fn drifted() -> Vec<u8> {
    let mut bytes = std::fs::read(model()).expect("the tiny model");
    let weights = bytes.len() / 10;
    let mut state = 1_u32;
    for weight in bytes[weights..].chunks_exact_mut(4) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        weight[1] ^= (state >> 29) as u8;
    }
    bytes
}

/// Bytes of a model by the way they came: whole, by deltas, from the site; and its size.
fn came(device: &Value) -> [u64; 4] {
    let transfer = &device["report"]["telemetry"]["transfer"];
    assert_eq!(transfer["weights"], device["report"]["running"]["weights"], "{device:#}");
    assert!(transfer["fallback"].is_null(), "{transfer}");
    ["whole_bytes", "delta_bytes", "peer_bytes", "size_bytes"]
        .map(|key| transfer[key].as_u64().expect("a number"))
}

fn told(fleet: &Fleet, version: &str) -> Vec<[u64; 4]> {
    let devices = fleet.wait_for("everyone to confirm, and to say so", |devices| {
        devices.iter().all(|device| confirmed(device, version))
    });
    devices.iter().map(came).collect()
}

#[test]
fn a_site_pulls_an_update_over_its_line_once() {
    let mut fleet = Fleet::start();
    fleet.suit_the_tiny_model();
    let toml = fleet.path("fleet.toml");
    let settings = "[runtime]\ncontext_tokens = 128\nparallel = 1\nbatch_tokens = 64\n\
                    [policy]\nshare_bytes_per_s = 50000000\n";
    std::fs::write(&toml, settings).expect("a file");
    fleet.json(&["blueprint", "set", "fleet", &toml.to_string_lossy()]);
    for name in DEVICES {
        fleet.join(name, "150MB");
    }
    fleet.wait_for_reports(DEVICES.len());
    for name in DEVICES {
        fleet.json(&["device", "label", name, "--site", "shop"]);
    }

    // All at once: one gets it from the hub, the others from that one.
    let ship = fleet.shipping("1.0.0", "Q8_0");
    let rollout = fleet.json(&[&ship[..], &["--waves", "rest"]].concat());
    assert_eq!(rollout["state"], "completed", "{rollout}");
    let ways = told(&fleet, "1.0.0");
    let size = ways[0][3];
    let whole = ways.iter().filter(|way| **way == [size, 0, 0, size]).count();
    let shared = ways.iter().filter(|way| **way == [0, 0, size, size]).count();
    assert_eq!((whole, shared), (1, DEVICES.len() - 1), "{ways:?}");

    // The next version: the first one gets a delta over the line, the others from that one.
    let file = fleet.path("drifted.gguf");
    std::fs::write(&file, drifted()).expect("a file");
    let file = file.to_string_lossy().into_owned();
    let mut ship = fleet.shipping("1.1.0", "Q8_0");
    ship[1] = &file;
    let rollout = fleet.json(&[&ship[..], &["--waves", "rest"]].concat());
    assert_eq!(rollout["state"], "completed", "{rollout}");
    let ways = told(&fleet, "1.1.0");
    let delta = ways.iter().map(|way| way[1]).max().expect("there are devices");
    assert!(delta < size * 8 / 10, "{ways:?}");
    let by_delta = ways.iter().filter(|way| **way == [0, delta, 0, size]).count();
    let shared = ways.iter().filter(|way| **way == [0, 0, delta, size]).count();
    assert_eq!((by_delta, shared), (1, DEVICES.len() - 1), "{ways:?}");

    let shown = fleet.run(&["release", "show", "glass", "1.1.0"]);
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.contains("Deltas from what devices run:") && shown.contains("ready"), "{shown}");
    for device in fleet.json(&["device", "list"]).as_array().expect("a list") {
        answers(device, "after the update");
    }
}
