//! A real hub, driven by the real program, with a real (tiny) model and a real device.

use crate::fleet::{Fleet, model};

#[test]
fn a_hub_answers_every_noun() {
    let fleet = Fleet::start();
    let classes = fleet.json(&["class", "list"]);
    assert!(classes.as_array().is_some_and(|classes| !classes.is_empty()), "{classes}");
    fleet.json(&["class", "set", "tiny", "--min-memory", "1MB", "--quantisation", "q2_k"]);
    let classes = fleet.json(&["class", "list"]).to_string();
    assert!(classes.contains("Q2_K"), "{classes}");
    fleet.json(&["class", "delete", "tiny"]);

    let secret = fleet.json(&["token", "create", "ci", "--role", "viewer"]);
    let secret = secret["secret"].as_str().expect("a secret").to_owned();
    let mut viewer =
        fleet.slm(&["class", "set", "x", "--min-memory", "1", "--quantisation", "Q8_0"]);
    let refused = viewer.env("SLM_TOKEN", &secret).output().expect("slm runs");
    assert_eq!(refused.status.code(), Some(1), "a viewer must not change classes");
    let mut viewer = fleet.slm(&["class", "list"]);
    let allowed = viewer.env("SLM_TOKEN", secret).output().expect("slm runs");
    assert!(allowed.status.success(), "a viewer may look");

    let toml = fleet.path("fleet.toml");
    std::fs::write(&toml, "[runtime]\ncontext_tokens = 128\n").expect("a file");
    fleet.json(&["blueprint", "set", "fleet", &toml.to_string_lossy()]);
    let shown = fleet.run(&["blueprint", "show", "fleet"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("context_tokens = 128"));
    std::fs::write(&toml, "[runtime]\nkontext = 128\n").expect("a file");
    fleet.refused(1, &["blueprint", "set", "fleet", &toml.to_string_lossy()]);
    fleet.refused(1, &["blueprint", "show", "class/small"]);

    fleet.json(&["key", "create", "second"]);
    let keys = fleet.json(&["key", "list"]);
    assert_eq!(keys.as_array().map(Vec::len), Some(2), "{keys}");
    fleet.refused(1, &["key", "create", "second"]);

    assert!(fleet.run(&["device", "invite"]).stdout.starts_with(b"slmi1."));
    fleet.refused(1, &["device", "show", "nobody"]);
    fleet.refused(1, &["rollout", "why"]);
    assert_eq!(fleet.json(&["release", "list"]), serde_json::json!([]));

    fleet.refused(1, &["rollout", "plan", "nobody", "1.0.0"]);
    fleet.refused(1, &["quarantine", "lift", "9f86d0", "--class", "small", "--reason", "x"]);
    assert_eq!(fleet.json(&["quarantine", "list"]), serde_json::json!([]));
    fleet.json(&["channel", "set", "edge"]);
    fleet.json(&["channel", "set", "beta", "--after", "edge", "--waves", "1,rest"]);
    let channels = fleet.json(&["channel", "list"]);
    assert_eq!((&channels[0]["name"], &channels[1]["after"]), (&"edge".into(), &"edge".into()));
    fleet.refused(1, &["channel", "remove", "edge"]);
    fleet.refused(1, &["release", "promote", "nobody@1.0.0", "--to", "edge"]);
    fleet.refused(1, &["release", "promote", "nobody", "--to", "edge"]);
    let added =
        fleet.json(&["webhook", "add", "http://127.0.0.1:9/hook", "--events", "class.*,x.y"]);
    assert!(added["secret"].as_str().is_some_and(|secret| secret.starts_with("whsec_")));
    let id = added["webhook"]["id"].as_str().expect("an id").to_owned();
    fleet.json(&["webhook", "test", &id]);
    fleet.json(&["webhook", "deliveries", &id, "--state", "dead"]);
    fleet.json(&["webhook", "redeliver", &id]);
    fleet.json(&["webhook", "remove", &id]);
    fleet.refused(1, &["webhook", "add", "ftp://example.com", "--events", "*"]);

    let verdict = fleet.json(&["audit", "verify"]);
    assert!(verdict["entries"].as_u64().is_some_and(|entries| entries > 4), "{verdict}");
    assert!(verdict.get("broken").is_none(), "{verdict}");
}

#[test]
fn a_second_hub_on_the_same_folder_is_refused() {
    let fleet = Fleet::start();
    let data = fleet.path("hub").to_string_lossy().into_owned();
    let listen = ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    fleet.refused(1, &[&["up", "--data", &data], &listen[..]].concat());
    let other = fleet.path("other").to_string_lossy().into_owned();
    fleet.refused(1, &["up", "--data", &other, "--listen", "127.0.0.1:0", "--http", "0.0.0.0:0"]);
}

#[test]
fn a_model_travels_from_a_file_to_a_confirmed_device() {
    let mut fleet = Fleet::start();
    fleet.suit_the_tiny_model();
    fleet.join("till", "150MB");
    fleet.wait_for("the device", |devices| devices.len() == 1);

    let ship = ["ship", model(), "--name", "glass", "--yes"];
    let rollout = fleet.json(&ship);
    assert_eq!(rollout["state"], "completed", "{rollout}");
    let devices =
        fleet.wait_for("a confirmed model", |devices| devices[0]["report"]["phase"] == "confirmed");
    assert_eq!(devices[0]["report"]["running"]["version"], "1.0.0");

    // The same again: nothing is made, measured or sent anew, and nothing new is released.
    let again = fleet.run(&[&ship[..], &["--until", "release"]].concat());
    assert!(again.status.success());
    let releases = fleet.json(&["release", "list"]);
    assert_eq!(releases.as_array().map(Vec::len), Some(1), "{releases}");

    let why = fleet.run(&["rollout", "why"]);
    assert!(String::from_utf8_lossy(&why.stdout).contains("completed"));

    // What an operator decides about it, and what a rollout of the same would do.
    fleet.json(&["device", "exclude", "till", "--reason", "at the workshop"]);
    let pin = ["device", "pin", "till", "--model", "glass", "--version", "1.0.0"];
    fleet.json(&[&pin[..], &["--reason", "certified"]].concat());
    let shown = fleet.run(&["device", "show", "till"]);
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.contains("at the workshop") && shown.contains("certified"), "{shown}");
    let plan = fleet.run(&["rollout", "plan", "glass", "1.0.0", "--to", "fact.cores>=1"]);
    let plan = String::from_utf8_lossy(&plan.stdout);
    assert!(plan.contains("0 get it, 1 left out") && plan.contains("at the workshop"), "{plan}");
    fleet.json(&["device", "include", "till"]);
    fleet.json(&["device", "unpin", "till"]);
    let plan = fleet.json(&["rollout", "plan", "glass", "1.0.0"]);
    assert_eq!(plan["waves"][0]["devices"][0]["transfer_bytes"], 0, "it has it: {plan}");
    fleet.refused(1, &[&pin[..6], &["9.0.0", "--reason", "x"]].concat());
    assert_eq!(fleet.json(&["device", "list", "--to", "fact.cores<1"]), serde_json::json!([]));
    assert!(fleet.json(&["audit", "verify"]).get("broken").is_none());
}
