//! What operators can do and see around rollouts: plans, pins, exclusions, quarantine.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use slmops_api::device::Phase;

use super::probe_failure;
use super::rig::{self, Rig};

fn names(items: &Value) -> Vec<&str> {
    items.as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_plan_shows_what_would_happen_and_changes_nothing() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    for (name, budget_mib) in [("one", 600), ("two", 360), ("tiny", 30)] {
        rig.join(name, budget_mib).await;
    }
    rig.release("1.0.0").await;
    let body = json!({ "model": "m", "version": "1.0.0", "policy": rig::policy() });
    let audited = rig.get("/v1/audit/verify").await["entries"].clone();
    let plan = rig.post("/v1/rollouts/plan", body.clone()).await;
    assert_eq!(names(&plan["waves"][0]["devices"]), ["one"], "{plan}");
    assert_eq!(names(&plan["waves"][1]["devices"]), ["two"], "{plan}");
    assert_eq!(plan["waves"][0]["devices"][0]["outcome"], "updating");
    assert_eq!(plan["waves"][1]["devices"][0]["variant"], "q4_k_m");
    assert_eq!(names(&plan["left_out"]), ["tiny"]);
    assert!(plan["transfer_bytes"].as_u64().unwrap() > 0, "{plan}");
    assert!(plan.get("expected_s").is_none(), "nobody took a release yet: {plan}");
    assert_eq!(rig.get("/v1/audit/verify").await["entries"], audited);
    assert_eq!(rig.get("/v1/rollouts").await["items"], json!([]));

    // One under way, and one that is over.
    let id = rig.rollout("1.0.0", json!({})).await["id"].as_str().unwrap().to_owned();
    let ahead = rig.get(&format!("/v1/rollouts/{id}/plan")).await;
    assert_eq!(ahead["rollout"], json!(id));
    assert!(ahead["waiting_for"].as_str().unwrap().starts_with("wave 1 of 2: one"), "{ahead}");
    rig.post(&format!("/v1/rollouts/{id}/abort"), json!({})).await;
    let path = format!("/v1/rollouts/{id}/plan");
    let over = rig.send(Method::GET, &path, Value::Null, StatusCode::CONFLICT).await;
    assert!(over["detail"].as_str().unwrap().contains("cannot be planned"), "{over}");

    // What cannot be started cannot be planned, for the same reason.
    for (change, status, why) in [
        (json!({ "version": "9.0.0" }), 404, "is not registered"),
        (json!({ "policy": { "limits": { "updating": 0 } } }), 422, "limits.updating = 0"),
        (json!({ "policy": { "waves": ["0"] } }), 400, "a wave is a number"),
    ] {
        let mut body = body.clone();
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        let status = StatusCode::from_u16(status).unwrap();
        let problem = rig.send(Method::POST, "/v1/rollouts/plan", body, status).await;
        assert!(problem["detail"].as_str().unwrap().contains(why), "{problem}");
    }
}

#[tokio::test]
async fn pins_and_exclusions_are_kept_shown_and_audited() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut devices = [rig.join("one", 600).await, rig.join("two", 600).await];
    rig.release("1.0.0").await;
    rig.release("1.1.0").await;
    rig.rollout("1.0.0", json!({ "waves": ["rest"] })).await;
    for device in &mut devices {
        device.wait_for_generation(2).await;
        device.report(Phase::Confirmed).await;
    }
    let put = async |path: &str, body: Value, status: StatusCode| {
        rig.send(Method::PUT, path, body, status).await
    };
    let pin = |version: &str| json!({ "model": "m", "version": version, "reason": "certified" });
    put("/v1/devices/one/pin", pin("1.0.0"), StatusCode::OK).await;
    put("/v1/devices/one/pin", pin("1.0.0"), StatusCode::OK).await;
    let reason = json!({ "reason": "at the workshop" });
    put("/v1/devices/two/exclusion", reason, StatusCode::OK).await;
    let shown = rig.get("/v1/devices/one").await;
    assert_eq!(shown["orders"]["pin"]["reason"], "certified");
    assert!(shown["orders"]["pin"]["by"].as_str().unwrap().starts_with("token "), "{shown}");
    let explained = rig.get("/v1/devices/two/explain").await;
    assert!(explained["orders"][0].as_str().unwrap().contains("at the workshop"), "{explained}");

    let rollout = rig.rollout("1.1.0", json!({})).await;
    assert_eq!(rollout["devices"], json!([]));
    let why = rig.text(&format!("/v1/rollouts/{}/why", rollout["id"].as_str().unwrap())).await;
    assert!(why.contains("left out one: pinned to m 1.0.0 by token"), "{why}");
    assert!(why.contains("left out two: excluded by token"), "{why}");

    // A pin to another release is told at once.
    let generation = devices[0].desired().await.generation;
    put("/v1/devices/one/pin", pin("1.1.0"), StatusCode::OK).await;
    let told = devices[0].wait_for_generation(generation + 1).await;
    assert_eq!(told.model.unwrap().version.to_string(), "1.1.0");
    let path = "/v1/devices/one/pin?reason=%20";
    rig.send(Method::DELETE, path, Value::Null, StatusCode::BAD_REQUEST).await;
    for path in ["/v1/devices/one/pin?reason=certified+anew", "/v1/devices/two/exclusion"] {
        for _ in 0..2 {
            rig.send(Method::DELETE, path, Value::Null, StatusCode::OK).await;
        }
    }
    let history = rig.get("/v1/devices/one/history").await.to_string();
    assert!(history.contains(": certified anew"), "{history}");
    assert!(rig.get("/v1/devices/one").await.get("orders").is_none());

    let problem = put("/v1/devices/one/pin", pin("9.0.0"), StatusCode::NOT_FOUND).await;
    assert!(problem["hint"].as_str().unwrap().contains("slm release list"), "{problem}");
    rig.join("tiny", 30).await;
    let path = "/v1/devices/tiny/pin";
    let problem = put(path, pin("1.0.0"), StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(problem["detail"].as_str().unwrap().contains("no variant fits"), "{problem}");
    for reason in ["", "  ", "two\nlines", &"x".repeat(1001)] {
        let body = json!({ "reason": reason });
        put("/v1/devices/one/exclusion", body, StatusCode::BAD_REQUEST).await;
    }
    put("/v1/devices/nobody/exclusion", json!({ "reason": "x" }), StatusCode::NOT_FOUND).await;

    let audit = rig.get("/v1/audit?limit=500").await;
    let actions: Vec<&str> = audit["items"]
        .as_array()
        .unwrap()
        .iter()
        .rev()
        .map(|entry| entry["action"].as_str().unwrap())
        .filter(|action| ["pin", "clude"].iter().any(|part| action.contains(part)))
        .collect();
    // Doing it again changes nothing, so it is no entry.
    assert_eq!(
        actions,
        ["device.pin", "device.exclude", "device.pin", "device.unpin", "device.include"]
    );
}

#[tokio::test]
async fn a_quarantine_is_listed_and_lifted() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut devices = [rig.join("one", 600).await, rig.join("two", 600).await];
    rig.release("1.0.0").await;
    let id = rig.rollout("1.0.0", json!({})).await["id"].as_str().unwrap().to_owned();
    devices[0].wait_for_generation(2).await;
    devices[0].report(Phase::RolledBack { failure: probe_failure() }).await;
    rig.wait_for_state(&id, "halted").await;
    let listed = rig.get("/v1/quarantine").await["items"].clone();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    let one = &listed[0];
    assert_eq!((&one["class"], &one["rollout"]), (&json!("large"), &json!(id)));
    assert_eq!(one["packages"][0]["variant"], "q8_0");
    assert_eq!(one["rejected_by"], json!(["one"]));
    let why = rig.text(&format!("/v1/rollouts/{id}/why")).await;
    assert!(why.contains("slm quarantine lift") && why.contains("--class large"), "{why}");

    // Quarantined, it is offered to nobody of the class; lifted, to those where it did not fail.
    let again = rig.rollout("1.0.0", json!({ "bake_s": 1 })).await;
    assert_eq!(again["state"], "halted", "{again}");
    let lift = json!({
        "manifest": one["manifest"], "class": "large", "reason": "the kernel was at fault",
    });
    let path = "/v1/quarantine/lift";
    rig.send(Method::POST, path, lift.clone(), StatusCode::NO_CONTENT).await;
    let gone = rig.send(Method::POST, path, lift.clone(), StatusCode::NOT_FOUND).await;
    assert!(gone["hint"].as_str().unwrap().contains("slm quarantine list"), "{gone}");
    let mut silent = lift.clone();
    silent["reason"] = json!("");
    rig.send(Method::POST, path, silent, StatusCode::BAD_REQUEST).await;
    rig.rollout("1.0.0", json!({ "bake_s": 2 })).await;
    assert!(devices[1].wait_for_generation(2).await.model.is_some());
    assert!(devices[0].desired().await.model.is_none());
    let audit = rig.get("/v1/audit?limit=500").await.to_string();
    assert!(audit.contains("manifest.lift") && audit.contains("the kernel was at fault"));
}

#[tokio::test]
async fn releases_are_promoted_from_channel_to_channel() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut devices = [rig.join("one", 600).await, rig.join("two", 600).await];
    rig.release("1.0.0").await;
    let put = async |name: &str, after: Option<&str>, status: u16| {
        let body = json!({ "name": name, "after": after, "policy": { "waves": ["rest"] } });
        let status = StatusCode::from_u16(status).unwrap();
        rig.send(Method::PUT, &format!("/v1/channels/{name}"), body, status).await
    };
    put("edge", None, 200).await;
    put("beta", Some("edge"), 200).await;
    let ring = put("edge", Some("beta"), 400).await;
    assert!(ring["detail"].as_str().unwrap().contains("after itself"), "{ring}");
    let missing = put("stable", Some("gamma"), 400).await;
    assert!(missing["hint"].as_str().unwrap().contains("slm channel set gamma"), "{missing}");
    for (device, channel) in [("one", "edge"), ("two", "beta")] {
        let toml = format!("channel = \"{channel}\"");
        let (status, _) = rig.put_text(&format!("/v1/blueprints/device/{device}"), &toml).await;
        assert_eq!(status, StatusCode::OK);
    }

    let path = "/v1/releases/m/1.0.0/promote";
    let early = rig.send(Method::POST, path, json!({ "to": "beta" }), StatusCode::CONFLICT).await;
    assert!(early["detail"].as_str().unwrap().contains("not confirmed on channel edge"), "{early}");
    assert!(early["hint"].as_str().unwrap().contains("--force --reason"), "{early}");
    // A plan says the same, and nothing of it happens.
    let (ahead, body) = (format!("{path}/plan"), json!({ "to": "beta" }));
    rig.send(Method::POST, &ahead, body, StatusCode::CONFLICT).await;
    let plan = rig.send(Method::POST, &ahead, json!({ "to": "edge" }), StatusCode::OK).await;
    assert_eq!(names(&plan["waves"][0]["devices"]), ["one"], "{plan}");
    assert_eq!(rig.get("/v1/rollouts").await["items"], json!([]));
    let rollout = rig.send(Method::POST, path, json!({ "to": "edge" }), StatusCode::CREATED).await;
    let id = rollout["id"].as_str().unwrap().to_owned();
    let again = rig.send(Method::POST, path, json!({ "to": "edge" }), StatusCode::OK).await;
    assert_eq!(again["id"], rollout["id"]);
    assert_eq!(names(&rollout["devices"]), ["one"], "{rollout}");
    devices[0].wait_for_generation(2).await;
    devices[0].report(Phase::Confirmed).await;
    rig.wait_for_state(&id, "completed").await;
    let next = rig.send(Method::POST, path, json!({ "to": "beta" }), StatusCode::CREATED).await;
    assert_eq!(next["promotion"], json!({ "channel": "beta", "from": "edge" }));
    assert_eq!(names(&next["devices"]), ["two"], "{next}");

    let listed = rig.get("/v1/channels").await["items"].clone();
    assert_eq!(names(&listed), ["edge", "beta"], "{listed}");
    assert_eq!((&listed[0]["followers"], &listed[1]["followers"]), (&json!(1), &json!(1)));
    assert_eq!(listed[0]["releases"][0]["state"], "completed");
    assert_eq!(listed[1]["releases"][0]["version"], "1.0.0");

    // What is not to be: a promotion by hand, an unknown channel, a channel that is in use.
    let mut body = json!({ "model": "m", "version": "1.0.0", "policy": rig::policy() });
    body["promotion"] = json!({ "channel": "beta" });
    rig.send(Method::POST, "/v1/rollouts", body, StatusCode::BAD_REQUEST).await;
    rig.send(Method::POST, path, json!({ "to": "gamma" }), StatusCode::NOT_FOUND).await;
    let silent = json!({ "to": "beta", "force": "" });
    rig.send(Method::POST, path, silent, StatusCode::BAD_REQUEST).await;
    for (name, why) in [("edge", "comes after edge"), ("beta", "follow channel beta")] {
        let path = format!("/v1/channels/{name}");
        let used = rig.send(Method::DELETE, &path, Value::Null, StatusCode::CONFLICT).await;
        assert!(used["detail"].as_str().unwrap().contains(why), "{used}");
    }
    let audit = rig.get("/v1/audit?limit=500").await.to_string();
    assert!(audit.contains("release.promote") && audit.contains("channel.put"));
}

#[tokio::test]
async fn the_fleet_is_counted_and_searched() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut devices =
        [rig.join("one", 600).await, rig.join("two", 600).await, rig.join("three", 100).await];
    rig.send(Method::PATCH, "/v1/devices/two", json!({ "site": "rome" }), StatusCode::OK).await;
    let summary = rig.get("/v1/fleet/summary").await;
    assert_eq!(summary["states"], json!({ "joined": 3 }), "{summary}");
    rig.release("1.0.0").await;
    rig.rollout("1.0.0", json!({ "waves": ["rest"] })).await;
    for device in &mut devices[..2] {
        device.wait_for_generation(2).await;
        device.report(Phase::Confirmed).await;
    }
    // What was acknowledged is counted.
    let summary = rig.get("/v1/fleet/summary").await;
    assert_eq!(summary["states"], json!({ "confirmed": 2, "joined": 1 }), "{summary}");
    assert_eq!(summary["devices"], 3);
    let rome = rig.get("/v1/fleet/summary?selector=site%3Drome&by=name").await;
    assert_eq!((&rome["devices"], &rome["groups"][0]["value"]), (&json!(1), &json!("two")));

    for (filter, expected) in [
        ("", "one three two"),
        ("search=w", "two"),
        ("search=T+site%3Drome", "two"),
        ("state=confirmed", "one two"),
        ("state=confirmed&selector=site!%3Drome", "one"),
        ("model=m&version=1.0.0", "one two"),
        ("model=m&version=1.0.1", ""),
        ("selector=fact.budget%3E%3D500MiB", "one two"),
        ("orders=pinned", ""),
    ] {
        // Page by page, the same.
        for limit in [1, 2, 500] {
            let mut found = Vec::new();
            let mut cursor = String::new();
            loop {
                let path = format!("/v1/devices?{filter}&limit={limit}{cursor}");
                let page = rig.get(&path).await;
                found.extend(names(&page["items"]).into_iter().map(str::to_owned));
                let Some(next) = page["cursor"].as_str() else { break };
                cursor = format!("&cursor={next}");
            }
            assert_eq!(found.join(" "), expected, "{filter}, {limit} at a time");
        }
        let counted = rig.get(&format!("/v1/fleet/summary?{filter}")).await["devices"].clone();
        assert_eq!(counted, json!(expected.split_whitespace().count()), "{filter}");
    }
    let long = format!("search={}", "x".repeat(201));
    let bad = ["state=broken", "selector=nonsense", "version=one", "orders=none", "model=M", &long];
    for filter in bad {
        for path in ["/v1/devices", "/v1/fleet/summary"] {
            let path = format!("{path}?{filter}");
            rig.send(Method::GET, &path, Value::Null, StatusCode::BAD_REQUEST).await;
        }
    }
    let path = "/v1/fleet/summary?by=";
    rig.send(Method::GET, path, Value::Null, StatusCode::BAD_REQUEST).await;
}
