//! The measurement of a hub under a fleet, with a fleet small enough for a test.

use std::process::Command;

use serde_json::Value;

#[test]
fn a_small_fleet_is_measured_and_targets_are_held_against_it() {
    let bench = |more: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_slm"))
            .args(["bench", "fleet", "--devices", "200", "--seconds", "2s", "--interval", "2s"])
            .args(["--quiet", "--output", "json"])
            .args(more)
            .output()
            .expect("slm runs")
    };
    let done = bench(&["--check", "rollout-end,memory"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let measured: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    let fleet = &measured["fleets"][0];
    assert_eq!(fleet["rollout"]["confirmed"], 200, "{fleet}");
    for line in fleet["calls"].as_array().expect("lines") {
        assert_eq!(line["failed"], 0, "{line}");
        assert!(line["answers"].as_u64().is_some_and(|answers| answers > 0), "{line}");
    }
    let reconnects = fleet["calls"].as_array().and_then(|lines| lines.last());
    assert_eq!(reconnects.expect("a line")["name"], "reconnects");
    assert!(fleet["database_bytes"].as_u64().is_some_and(|bytes| bytes > 100_000), "{fleet}");
    assert_eq!(fleet["checks"].as_array().map(Vec::len), Some(7), "{fleet}");
}
