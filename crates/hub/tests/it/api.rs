//! The hub through real HTTP, with devices that behave as the test says.

mod backup;
mod crash;
mod deltas;
mod operators;
mod replicas;
mod rig;
mod webhooks;

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use reqwest::{Method, StatusCode};
use rig::{Pushed, Rig};
use serde_json::{Value, json};
use slmops_api::device::{Failure, Phase, WaitCause};
use slmops_api::probe::ProbeResult;
use slmops_hub::{Hub, HubConfig, HubError};

fn probe_failure() -> Failure {
    let results = vec![ProbeResult {
        name: "golden-01".to_owned(),
        passed: false,
        value: Some(-9.5),
        floor: -2.25,
        duration_ms: 12,
    }];
    Failure::Probes { results }
}

#[tokio::test]
async fn release_goes_out_in_waves_and_a_damaged_one_is_stopped() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut devices = Vec::new();
    for (name, budget_mib) in [("one", 600), ("two", 360), ("three", 220)] {
        devices.push(rig.join(name, budget_mib).await);
    }
    assert_eq!(rig.get("/v1/devices/two").await["class"], "large");
    rig.release("1.0.0").await;
    let rollout = rig.rollout("1.0.0", json!({})).await;
    let id = rollout["id"].as_str().unwrap().to_owned();
    // One canary; the others know nothing of it.
    let states = rig.desired_of(&devices).await;
    let told: Vec<bool> = states.iter().map(|state| state.model.is_some()).collect();
    assert_eq!(told.iter().filter(|told| **told).count(), 1, "{rollout}");
    let canary = told.iter().position(|told| *told).unwrap();
    devices[canary].report(Phase::Confirmed).await;
    for (index, device) in devices.iter_mut().enumerate() {
        if index != canary {
            let desired = device.wait_for_generation(2).await;
            assert!(desired.model.is_some(), "{}", desired.reason);
            device.report(Phase::Confirmed).await;
        }
    }
    rig.wait_for_state(&id, "completed").await;
    let variants: Vec<String> = rig
        .desired_of(&devices)
        .await
        .into_iter()
        .map(|state| state.model.unwrap().variant.to_string())
        .collect();
    assert_eq!(variants, ["q8_0", "q4_k_m", "q2_k"]);

    // 1.1.0 fails on the canary: it goes back, the others never hear of it.
    rig.release("1.1.0").await;
    let id = rig.rollout("1.1.0", json!({})).await["id"].as_str().unwrap().to_owned();
    let states = rig.desired_of(&devices).await;
    let version = |state: &slmops_api::device::DesiredState| {
        state.model.as_ref().unwrap().version.to_string()
    };
    let canary = states.iter().position(|state| version(state) == "1.1.0").unwrap();
    let generation = states[canary].generation;
    devices[canary].report(Phase::RolledBack { failure: probe_failure() }).await;
    let halted = rig.wait_for_state(&id, "halted").await;
    assert!(halted["waiting_for"].as_str().unwrap().contains("slm rollout rollback"));
    let back = devices[canary].wait_for_generation(generation + 1).await;
    assert_eq!(version(&back), "1.0.0");
    for state in rig.desired_of(&devices).await {
        assert_eq!(version(&state), "1.0.0");
    }
    let why = rig.text(&format!("/v1/rollouts/{id}/why")).await;
    assert!(why.contains("golden-01: -9.500, floor -2.250"), "{why}");
    assert!(why.contains("went back by itself and serves m 1.0.0"), "{why}");
    assert!(why.contains("never told, so never downloaded it"), "{why}");

    let taken_back = rig.post(&format!("/v1/rollouts/{id}/rollback"), json!({})).await;
    assert_eq!(taken_back["state"], "rolled_back");
    // Every step is in the audit log, and the log is whole.
    let verdict = rig.get("/v1/audit/verify").await;
    assert!(verdict.get("broken").is_none(), "{verdict}");
    let audit = rig.get("/v1/audit?limit=500").await.to_string();
    for action in ["device.enrol", "release.create", "rollout.decide", "manifest.quarantine"] {
        assert!(audit.contains(action), "{action} is not in the audit log");
    }
}

#[tokio::test]
async fn facts_choose_devices_and_nonsense_is_refused() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let devices = [rig.join("one", 600).await, rig.join("two", 360).await];
    rig.release("1.0.0").await;
    rig.rollout("1.0.0", json!({ "selector": "fact.budget>=500MiB,fact.cpu=avx2" })).await;
    let states = rig.desired_of(&devices).await;
    assert!(states[0].model.is_some() && states[1].model.is_none());
    for (selector, why) in [
        ("fact.mmeory>=4GB", "there is no fact `mmeory`; facts are memory, budget"),
        ("fact.memory>=much", "`much` is no value of `fact.memory`"),
        ("class>=small", "`class` is a label"),
    ] {
        let mut body = json!({ "model": "m", "version": "1.0.0", "policy": rig::policy() });
        body["policy"]["selector"] = json!(selector);
        let problem = rig.send(Method::POST, "/v1/rollouts", body, StatusCode::BAD_REQUEST).await;
        assert!(problem["detail"].as_str().unwrap().contains(why), "{problem}");
    }
}

#[tokio::test]
async fn a_wave_waits_for_an_approval_that_is_audited() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut devices = [rig.join("one", 600).await, rig.join("two", 600).await];
    rig.release("1.0.0").await;
    let token = async |name: &str| {
        let made = rig.post("/v1/tokens", json!({ "name": name, "role": "operator" })).await;
        made["secret"].as_str().unwrap().to_owned()
    };
    let (ann, bob) = (token("ann").await, token("bob").await);
    let rollout =
        rig.rollout("1.0.0", json!({ "approvals": [{ "wave": 2, "by": ["ann"] }] })).await;
    let id = rollout["id"].as_str().unwrap().to_owned();
    devices[0].wait_for_generation(2).await;
    devices[0].report(Phase::Confirmed).await;
    let path = format!("/v1/rollouts/{id}/approve");
    let approve = async |wave: u32, token: &str| {
        rig.status(Method::POST, &path, json!({ "wave": wave }), Some(token)).await.as_u16()
    };
    assert_eq!(approve(2, &bob).await, 403);
    assert_eq!(approve(1, &ann).await, 403);
    assert_eq!(rig.status(Method::POST, &path, json!({}), Some(&ann)).await.as_u16(), 400);
    assert!(devices[1].desired().await.model.is_none());
    assert_eq!(approve(2, &ann).await, 200);
    assert_eq!(approve(2, &ann).await, 200);
    assert!(devices[1].wait_for_generation(2).await.model.is_some());
    devices[1].report(Phase::Confirmed).await;
    let done = rig.wait_for_state(&id, "completed").await;
    assert_eq!(done["approvals"][0]["by"], "token ann");
    let audit = rig.get("/v1/audit?limit=500").await;
    let approved = |entry: &&Value| entry["action"] == "rollout.approve";
    let approved: Vec<&Value> =
        audit["items"].as_array().unwrap().iter().filter(approved).collect();
    assert_eq!(approved.len(), 1, "{audit}");
    assert_eq!(approved[0]["details"], json!({ "wave": 2 }));
    assert_eq!(approve(2, &ann).await, 409);

    // Rules out of bounds are refused with the reason.
    let policy = json!({ "limits": { "updating": 0 } });
    let body = json!({ "model": "m", "version": "1.0.0", "policy": policy });
    let refused =
        rig.send(Method::POST, "/v1/rollouts", body, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(refused["detail"].as_str().unwrap().contains("limits.updating = 0"), "{refused}");
}

#[tokio::test]
async fn long_poll_wakes_for_a_change_and_only_for_one() {
    let rig = Rig::start().await;
    let device = rig.join("one", 600).await;
    let first = device.poll(None, 0).await;
    assert_eq!(first.status(), StatusCode::OK);
    let tag = first.headers()["etag"].to_str().unwrap().to_owned();
    assert_eq!(tag, "\"g1\"");
    let unchanged = device.poll(Some(&tag), 0).await;
    assert_eq!(unchanged.status(), StatusCode::NOT_MODIFIED);
    assert_eq!(unchanged.headers()["etag"], tag.as_str());

    rig.add_publisher_key().await;
    rig.release("1.0.0").await;
    let waiting = tokio::spawn(async move {
        let response = device.poll(Some("\"g1\""), 30).await;
        (response.status(), response.text().await.unwrap())
    });
    rig.rollout("1.0.0", json!({})).await;
    let (status, body) =
        tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
    assert_eq!(status, StatusCode::OK);
    assert!(body.contains("\"generation\":2"), "{body}");
}

#[tokio::test]
async fn reports_are_bounded_and_ordered() {
    let rig = Rig::start().await;
    let mut device = rig.join("one", 600).await;
    device.report(Phase::Staged).await;
    let newest = device.sequence;
    device.sequence = 0;
    device.report(Phase::Idle).await;
    let shown = rig.get("/v1/devices/one").await;
    assert_eq!(shown["report"]["phase"], "staged", "an older report changes nothing");
    device.sequence = newest;

    let mut report = device.full_report(Phase::Idle);
    report.facts.hostname = "x".repeat(1000);
    assert_eq!(device.send(&report).await, StatusCode::BAD_REQUEST);
    let mut report = device.full_report(Phase::Idle);
    report.generation = u64::MAX;
    assert_eq!(device.send(&report).await, StatusCode::BAD_REQUEST);
    let mut report = serde_json::to_value(device.full_report(Phase::Idle)).unwrap();
    report["probes"] = json!(vec![json!({}); 1000]);
    assert_eq!(device.send(&report).await, StatusCode::BAD_REQUEST);
    let large = json!({ "x": "y".repeat(2 << 20) });
    assert_eq!(device.send(&large).await, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn device_that_is_shut_out_stays_out() {
    let rig = Rig::start().await;
    let device = rig.join("one", 600).await;
    rig.send(Method::DELETE, "/v1/devices/one", Value::Null, StatusCode::NO_CONTENT).await;
    assert_eq!(device.poll(None, 0).await.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(device.try_token().await, StatusCode::UNAUTHORIZED);
    assert_eq!(rig.get("/v1/devices/one").await["revoked"], true);
}

#[tokio::test]
async fn invitation_is_good_once() {
    let rig = Rig::start().await;
    let invitation = rig.post("/v1/invitations", json!({})).await;
    let text = invitation["text"].as_str().unwrap();
    assert!(text.starts_with("slmi1."));
    let key = rig::new_key();
    let (status, first) = rig.try_enrol(text, &key, "one").await;
    assert_eq!(status, StatusCode::OK, "{first}");
    let (status, again) = rig.try_enrol(text, &key, "one").await;
    assert_eq!((status, &again["device"]), (StatusCode::OK, &first["device"]));
    let (status, problem) = rig.try_enrol(text, &rig::new_key(), "two").await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(problem["detail"].as_str().unwrap().contains("used before"), "{problem}");
    assert!(problem["hint"].as_str().unwrap().contains("slm device invite"), "{problem}");
    // Its secret is nowhere in what the hub shows.
    let listed = rig.get("/v1/invitations").await.to_string();
    let audit = rig.get("/v1/audit").await.to_string();
    let secret = slmops_hub::auth::decode_invitation(text).unwrap().secret;
    assert!(!listed.contains(&secret) && !audit.contains(&secret));
}

#[tokio::test]
async fn release_is_checked_before_it_is_taken_in() {
    let rig = Rig::start().await;
    let pushed = rig.push("1.0.0").await;
    let release = pushed.release.clone();
    let refused = async |release: &Value, expected: &str| {
        let problem = rig
            .send(Method::POST, "/v1/releases", release.clone(), StatusCode::UNPROCESSABLE_ENTITY)
            .await;
        let detail = problem["detail"].as_str().unwrap_or_default();
        assert!(detail.contains(expected), "{problem} lacks {expected:?}");
        assert!(problem["hint"].is_string(), "{problem}");
    };
    refused(&release, "publisher key").await;
    rig.add_publisher_key().await;

    let digest = format!("sha256:{}", "0".repeat(64));
    let mut changed = release.clone();
    changed["variants"][0]["manifest"] = json!(digest);
    refused(&changed, "has no such manifest").await;
    let mut changed = release.clone();
    changed["variants"][0]["weights"] = json!(digest);
    changed["variants"][0]["report"]["subject"] = json!(digest);
    refused(&changed, "its weights are").await;
    let mut changed = release.clone();
    changed["variants"][0]["report"]["subject"] = json!(digest);
    refused(&changed, "its report is about").await;
    let mut changed = release.clone();
    changed["variants"] = json!([]);
    refused(&changed, "0 variants").await;
    let mut changed = release.clone();
    changed["variants"][1] = changed["variants"][0].clone();
    refused(&changed, "there twice").await;

    // A gate that says no, and the override that is written down.
    let estimate = json!({ "mean": 0.5, "low": 0.4, "high": 0.6, "samples": 20 });
    let mut gated = release.clone();
    gated["variants"][0]["gate"] = json!({
        "verdict": "worse",
        "rows": [{ "metric": "kl_divergence", "against": "original", "loss": estimate,
            "allowed": 0.1, "verdict": "worse" }],
    });
    refused(&gated, "kl_divergence against original: loss 0.5000").await;
    gated["gate_override"] = json!({ "reason": " " });
    refused(&gated, "needs a reason").await;
    gated["gate_override"] = json!({ "reason": "the demo needs it" });
    rig.send(Method::POST, "/v1/releases", gated, StatusCode::CREATED).await;
    assert!(rig.get("/v1/audit").await.to_string().contains("the demo needs it"));

    // Unsigned, and signed by a key that nobody registered.
    for (version, sign, expected) in
        [("2.0.0", None, "has no signature"), ("2.1.0", Some(rig::new_key()), "variant")]
    {
        let Pushed { release, .. } = rig.push_signed(version, sign.as_ref()).await;
        refused(&release, expected).await;
    }

    // The same again is the same; other content is not.
    let same = rig.push("3.0.0").await.release;
    rig.send(Method::POST, "/v1/releases", same.clone(), StatusCode::CREATED).await;
    rig.send(Method::POST, "/v1/releases", same.clone(), StatusCode::OK).await;
    let mut other = same;
    other["variants"][0]["report"]["perplexity"] = json!(1.0);
    let problem = rig.send(Method::POST, "/v1/releases", other, StatusCode::CONFLICT).await;
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("two releases of the same version"), "{problem}");
}

#[tokio::test]
async fn publisher_keys_vouch_for_their_successors_and_expire() {
    let rig = Rig::start().await;
    let key = rig::new_key();
    let soon = Timestamp::now() + SignedDuration::from_secs(3);
    let good = rig.endorsed(&key, soon);
    let post = |body: Value, expected| rig.send(Method::POST, "/v1/keys", body, expected);
    let refused = StatusCode::BAD_REQUEST;
    // Nobody knows the key that vouches yet.
    let problem = post(good.clone(), refused).await;
    assert!(problem["detail"].as_str().unwrap().contains("does not vouch"), "{problem}");
    rig.add_publisher_key().await;
    // Its word is for this key and this end alone.
    let mut longer = good.clone();
    longer["expires_at"] = json!("2999-01-01T00:00:00Z");
    post(longer, refused).await;
    let hour_ago = Timestamp::now() - SignedDuration::from_hours(1);
    let problem = post(rig.endorsed(&key, hour_ago), refused).await;
    assert!(problem["detail"].as_str().unwrap().contains("expired already"), "{problem}");
    post(good, StatusCode::CREATED).await;

    let mut release = rig.push_signed("1.0.0", Some(&key)).await.release;
    release["key"] = json!(key.public().id());
    rig.send(Method::POST, "/v1/releases", release, StatusCode::CREATED).await;
    let mut late = rig.push_signed("1.1.0", Some(&key)).await.release;
    late["key"] = json!(key.public().id());
    tokio::time::sleep(soon.duration_since(Timestamp::now()).unsigned_abs()).await;
    // What it signed is neither registered nor rolled out any more.
    let problem =
        rig.send(Method::POST, "/v1/releases", late, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(problem["detail"].as_str().unwrap().contains("expired at"), "{problem}");
    let body = json!({ "model": "m", "version": "1.0.0", "policy": rig::policy() });
    let problem =
        rig.send(Method::POST, "/v1/rollouts", body, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(problem["hint"].as_str().unwrap().contains("slm key create"), "{problem}");
}

#[tokio::test]
async fn device_too_small_for_every_variant_is_told_why() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let device = rig.join("tiny", 30).await;
    rig.release("1.0.0").await;
    let rollout = rig.rollout("1.0.0", json!({})).await;
    assert_eq!(rollout["state"], "completed");
    assert_eq!(rollout["devices"][0]["outcome"], "no_fit");
    let fit = rollout["devices"][0]["fit"].as_str().unwrap();
    assert!(fit.starts_with("no variant fits: smallest needs"), "{fit}");
    assert!(fit.ends_with("device offers 31 MB"), "{fit}");
    assert!(device.desired().await.model.is_none());
    let explained = rig.get("/v1/devices/tiny/explain").await.to_string();
    assert!(explained.contains("no variant fits"), "{explained}");
}

#[tokio::test]
async fn blueprint_reaches_the_device_and_explains_itself() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut device = rig.join("one", 600).await;
    rig.release("1.0.0").await;
    rig.rollout("1.0.0", json!({})).await;
    device.report(Phase::Confirmed).await;
    let put = |path: &'static str, toml: &'static str| rig.put_text(path, toml);
    let (status, _) = put("/v1/blueprints/fleet/-", "[runtime]\nparallel = 1\n").await;
    assert_eq!(status, StatusCode::OK);
    let desired = device.wait_for_generation(3).await;
    assert_eq!(desired.runtime.parallel, 1);
    let (status, _) = put("/v1/blueprints/device/one", "[runtime]\nparallel = 3\n").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(device.wait_for_generation(4).await.runtime.parallel, 3);
    let explained = rig.get("/v1/devices/one/explain").await;
    let values = explained["values"].as_array().unwrap();
    let parallel = values.iter().find(|value| value["key"] == "runtime.parallel").unwrap();
    assert_eq!(parallel["value"], "3");
    assert_eq!(parallel["overrides"], json!(["default: 2", "fleet: 1"]));

    for (path, toml, expected) in [
        ("/v1/blueprints/fleet/-", "[runtime]\nparalel = 1", "line 2: unknown field"),
        ("/v1/blueprints/fleet/-", "[runtime]\nparallel = 0", "not within 1 to 64"),
        ("/v1/blueprints/fleet/-", "[runtime]\nkv_type = \"q8_0\"\nflash_attention = false", "one"),
    ] {
        let (status, problem) = put(path, toml).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
        assert!(problem["detail"].as_str().unwrap().contains(expected), "{problem}");
    }
    // What the device may override: its layer is in the way of a list without its key.
    let (status, problem) = put("/v1/blueprints/fleet/-", "overridable = []").await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let detail = problem["detail"].as_str().unwrap();
    let expected = "device one: device ";
    assert!(detail.contains(expected) && detail.contains("runtime.parallel = 3"), "{detail}");
    assert!(problem["hint"].as_str().unwrap().contains("add it to `overridable`"), "{problem}");
    let fleet = "overridable = [\"runtime.parallel\"]\n[runtime]\nparallel = 1\n";
    let (status, _) = put("/v1/blueprints/fleet/-", fleet).await;
    assert_eq!(status, StatusCode::OK);
    let (status, problem) = put("/v1/blueprints/device/one", "runtime.threads = 3").await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{problem}");
    // A class that the device comes into later lets it override nothing: then it is explained.
    let (status, _) = put("/v1/blueprints/class/kiosk", "overridable = []").await;
    assert_eq!(status, StatusCode::OK);
    let class = json!({
        "name": "kiosk", "description": "", "min_memory_bytes": 1_u64 << 50, "quantisation": "Q4_K_M",
    });
    rig.send(Method::PUT, "/v1/classes/kiosk", class, StatusCode::OK).await;
    let moved = json!({ "labels": { "class": "kiosk" } });
    rig.send(Method::PATCH, "/v1/devices/one", moved, StatusCode::OK).await;
    let explained = rig.get("/v1/devices/one/explain").await;
    let values = explained["values"].as_array().unwrap();
    let parallel = values.iter().find(|value| value["key"] == "runtime.parallel").unwrap();
    assert_eq!(parallel["value"], "1");
    assert!(parallel["refused"][0].as_str().unwrap().ends_with(": 3"), "{parallel}");
    let back = json!({ "labels": { "class": null } });
    rig.send(Method::PATCH, "/v1/devices/one", back, StatusCode::OK).await;

    let (status, _) = put("/v1/blueprints/planet/-", "").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    // It is no conflict any more.
    let again = rig.get("/v1/devices/one/explain").await["values"].to_string();
    assert!(!again.contains("refused"), "{again}");
    rig.send(Method::DELETE, "/v1/blueprints/device/one", Value::Null, StatusCode::NO_CONTENT)
        .await;
    let started = std::time::Instant::now();
    while device.desired().await.runtime.parallel != 1 {
        assert!(started.elapsed() < Duration::from_secs(20), "the device keeps its own value");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn rules_reach_the_device_and_what_it_waits_for_is_shown() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut device = rig.join("one", 600).await;
    device.report(Phase::Idle).await;
    rig.release("1.0.0").await;
    let toml = "[policy]\nmetered = \"defer\"\nmax_rate_bytes_per_s = 9000\n";
    let (status, _) = rig.put_text("/v1/blueprints/fleet/-", toml).await;
    assert_eq!(status, StatusCode::OK);
    let at = "2030-01-05T02:00:00Z";
    let policy = json!({ "schedule": { "activate_at": at, "download_in": "sat 02:00-05:00",
        "time_zone": "Europe/Berlin" } });
    let rollout = rig.rollout("1.0.0", policy).await;
    let rules = device.wait_for_generation(2).await.rules;
    assert_eq!(
        rules.to_string(),
        "switches not before 2030-01-05 02:00:00 UTC; fetches in sat 02:00-05:00 (Europe/Berlin); \
         metered links: defer; fetches at most 9000 bytes/s"
    );
    let until = Some(at.parse().unwrap());
    device.report(Phase::Prestaged { cause: WaitCause::NotBefore, until }).await;
    let id = rollout["id"].as_str().unwrap();
    let started = std::time::Instant::now();
    loop {
        let waits = rig.get(&format!("/v1/rollouts/{id}")).await["waiting_for"].to_string();
        if waits
            .contains("has it and waits for its time (activate_at), until 2030-01-05 02:00:00 UTC")
        {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{waits}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for (policy, status, expected) in [
        (json!({ "schedule": { "activate_in": "caturday" } }), 400, "are no hours"),
        (json!({ "limits": { "metered": "perhaps" } }), 400, "none of `allow`"),
        (json!({ "schedule": { "time_zone": "Mars" } }), 422, "no time zone"),
        (json!({ "limits": { "site_downloads": 3 } }), 422, "site_bytes_per_s"),
    ] {
        let body = json!({ "model": "m", "version": "1.0.0", "policy": policy });
        let status = StatusCode::from_u16(status).unwrap();
        let problem = rig.send(Method::POST, "/v1/rollouts", body, status).await;
        assert!(problem["detail"].as_str().unwrap().contains(expected), "{problem}");
    }
}

#[tokio::test]
async fn roles_are_kept() {
    let rig = Rig::start().await;
    let device = rig.join("one", 600).await;
    let token = async |role: &str| {
        let made = rig.post("/v1/tokens", json!({ "name": role, "role": role })).await;
        made["secret"].as_str().unwrap().to_owned()
    };
    let (viewer, operator) = (token("viewer").await, token("operator").await);
    let class = json!({ "name": "huge", "min_memory_bytes": 1, "quantisation": "Q8_0" });
    for (method, path, body, by_viewer, by_operator) in [
        (Method::GET, "/v1/devices", Value::Null, 200, 200),
        (Method::GET, "/v1/audit", Value::Null, 200, 200),
        (Method::GET, "/metrics", Value::Null, 200, 200),
        (Method::PUT, "/v1/classes/huge", class, 403, 200),
        (Method::POST, "/v1/invitations", json!({}), 403, 201),
        (Method::PATCH, "/v1/devices/one", json!({ "site": "berlin" }), 403, 200),
        (Method::PUT, "/v1/devices/one/exclusion", json!({ "reason": "x" }), 403, 200),
        (Method::DELETE, "/v1/devices/one/exclusion", Value::Null, 403, 200),
        (Method::GET, "/v1/quarantine", Value::Null, 200, 200),
        (Method::GET, "/v1/tokens", Value::Null, 403, 403),
        (Method::POST, "/v1/tokens", json!({ "name": "x", "role": "admin" }), 403, 403),
        (Method::DELETE, "/v1/devices/one", Value::Null, 403, 403),
    ] {
        for (token, expected) in [(&viewer, by_viewer), (&operator, by_operator)] {
            let status = rig.status(method.clone(), path, body.clone(), Some(token)).await;
            assert_eq!(status.as_u16(), expected, "{method} {path}");
        }
        let status = rig.status(method.clone(), path, body.clone(), None).await;
        assert_eq!(status.as_u16(), 401, "{method} {path} without a token");
        let status = rig.status(method.clone(), path, body, Some(&device.token)).await;
        assert_eq!(status.as_u16(), 403, "{method} {path} by a device");
    }
    let status = rig.status(Method::GET, "/v1/device/desired", Value::Null, Some(&viewer)).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    // A removed token stops at once; the last admin's cannot be removed.
    let tokens = rig.get("/v1/tokens").await;
    for (index, expected) in [(0, 409), (1, 204)] {
        let path = format!("/v1/tokens/{}", tokens["items"][index]["id"].as_str().unwrap());
        let admin = rig.admin.clone();
        let status = rig.status(Method::DELETE, &path, Value::Null, Some(&admin)).await;
        assert_eq!(status.as_u16(), expected);
    }
    let status = rig.status(Method::GET, "/v1/devices", Value::Null, Some(&viewer)).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert!(!rig.get("/v1/audit").await.to_string().contains(&operator));
}

#[tokio::test]
async fn errors_are_problems_with_hints() {
    let rig = Rig::start().await;
    let admin = rig.admin.clone();
    for (method, path, body, status) in [
        (Method::GET, "/v1/devices/nobody", Value::Null, 404),
        (Method::GET, "/v1/rollouts/r0", Value::Null, 404),
        (Method::GET, "/v1/rollouts/%20", Value::Null, 400),
        (Method::GET, "/v1/releases/m/one", Value::Null, 400),
        (Method::GET, "/v1/releases/m/1.0.0", Value::Null, 404),
        (Method::GET, "/v1/devices?limit=many", Value::Null, 400),
        (Method::GET, "/v1/audit?cursor=x", Value::Null, 409),
        (Method::GET, "/v1/nothing", Value::Null, 404),
        (Method::POST, "/v1/rollouts", json!({ "model": "m" }), 400),
        (Method::POST, "/v1/tokens", json!({ "name": "", "role": "viewer" }), 400),
        (Method::POST, "/v1/invitations", json!({ "labels": { "a b": "c" } }), 400),
        (Method::POST, "/v1/invitations", json!({ "labels": { "id": "c" } }), 400),
        (Method::POST, "/v1/invitations", json!({ "labels": { "fact.arch": "c" } }), 400),
        (
            Method::POST,
            "/v1/keys",
            json!({ "id": "0123456789abcdef", "name": "x", "public_key": "none" }),
            400,
        ),
    ] {
        let response = rig.request(method.clone(), path, body, Some(&admin)).await;
        assert_eq!(response.status().as_u16(), status, "{method} {path}");
        let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
        assert_eq!(kind, "application/problem+json", "{method} {path}");
        let problem: Value = response.json().await.unwrap();
        assert_eq!(problem["status"], status);
        assert!(problem["type"].as_str().unwrap().starts_with("urn:slmops:"), "{problem}");
        assert!(problem["detail"].is_string(), "{problem}");
    }
}

#[tokio::test]
async fn overlapping_rollouts_are_refused() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    rig.join("one", 600).await;
    rig.release("1.0.0").await;
    rig.release("1.1.0").await;
    let first = rig.rollout("1.0.0", json!({})).await;
    // Asked again for the same, the same.
    let asked = json!({ "model": "m", "version": "1.0.0", "policy": rig::policy() });
    let again = rig.send(Method::POST, "/v1/rollouts", asked, StatusCode::OK).await;
    assert_eq!(again["id"], first["id"]);
    let other = json!({ "model": "m", "version": "1.1.0", "policy": rig::policy() });
    let problem = rig.send(Method::POST, "/v1/rollouts", other, StatusCode::CONFLICT).await;
    assert!(problem["detail"].as_str().unwrap().contains("running on one"), "{problem}");
    let id = first["id"].as_str().unwrap();
    for (verb, state) in [("pause", "paused"), ("resume", "running"), ("abort", "aborted")] {
        let rollout = rig.post(&format!("/v1/rollouts/{id}/{verb}"), json!({})).await;
        assert_eq!(rollout["state"], state);
    }
    let path = format!("/v1/rollouts/{id}/resume");
    rig.send(Method::POST, &path, Value::Null, StatusCode::CONFLICT).await;
    let missing = json!({ "model": "m", "version": "9.0.0", "policy": rig::policy() });
    rig.send(Method::POST, "/v1/rollouts", missing, StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn a_pause_is_a_new_generation_for_devices_on_the_way() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut device = rig.join("one", 600).await;
    device.report(Phase::Idle).await;
    rig.release("1.0.0").await;
    let rollout = rig.rollout("1.0.0", json!({})).await;
    let id = rollout["id"].as_str().unwrap();
    let told = device.wait_for_generation(2).await;
    assert!(told.rules.is_none() && told.model.is_some());
    rig.post(&format!("/v1/rollouts/{id}/pause"), json!({})).await;
    let held = device.wait_for_generation(3).await;
    assert!(held.rules.hold && held.model == told.model, "{held:?}");
    let waits = rig.get(&format!("/v1/rollouts/{id}")).await["waiting_for"].to_string();
    assert!(waits.contains("held from their next poll"), "{waits}");
    device.report(Phase::Prestaged { cause: WaitCause::Held, until: None }).await;
    let shown = rig.get(&format!("/v1/devices/{}", device.id)).await;
    assert_eq!(shown["report"]["phase"], "prestaged");
    assert_eq!(shown["report"]["cause"], "held");
    let metrics = rig.text("/metrics").await;
    assert!(metrics.contains("prestaged"), "{metrics}");
    rig.post(&format!("/v1/rollouts/{id}/resume"), json!({})).await;
    assert!(device.wait_for_generation(4).await.rules.is_none());
    // An abort tells it to be what it was: nothing.
    rig.post(&format!("/v1/rollouts/{id}/abort"), json!({})).await;
    assert_eq!(device.wait_for_generation(5).await.model, None);
    let why = rig.text(&format!("/v1/rollouts/{id}/why")).await;
    assert!(why.contains("told to keep what it had"), "{why}");
}

#[tokio::test]
async fn events_tell_of_changes() {
    let rig = Rig::start().await;
    let mut events = rig.events().await;
    let hello = rig::next_event(&mut events).await;
    assert!(hello.contains("event: hello"), "{hello}");
    rig.join("one", 600).await;
    loop {
        let event = rig::next_event(&mut events).await;
        if event.contains("event: changed") && event.contains("\"kind\":\"device\"") {
            break;
        }
    }
}

#[tokio::test]
async fn metrics_and_openapi_and_health() {
    let rig = Rig::start().await;
    rig.join("one", 600).await;
    let metrics = rig.text("/metrics").await;
    assert!(metrics.contains("slmops_devices{class=\"large\",phase=\"silent\"} 1"), "{metrics}");
    assert!(metrics.contains("route=\"/v1/enrol\",status=\"200\"} 1"), "{metrics}");
    assert_eq!(rig.text("/health").await, "ok\n");
    // Every described path is served: none is answered as an unknown path or method.
    let document = rig.get("/openapi.json").await;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let method: Method = method.to_ascii_uppercase().parse().unwrap();
            let path = path.replace(['{', '}'], "");
            let response = rig.request(method.clone(), &path, Value::Null, None).await;
            assert_ne!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
            let body = response.text().await.unwrap_or_default();
            assert!(!body.contains("no-such-path"), "{method} {path}");
        }
    }
}

/// The document in `docs/openapi.json` is the one that the hub serves. To mend it:
/// `UPDATE_OPENAPI=1 cargo nextest run --release -p slmops-hub openapi_document_is_checked_in`.
#[test]
fn openapi_document_is_checked_in() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
    let document = slmops_hub::routes::openapi_document();
    let text = document.to_pretty_json().unwrap() + "\n";
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let checked_in = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        checked_in == text,
        "docs/openapi.json is out of date; run `UPDATE_OPENAPI=1 cargo nextest run --release \
         -p slmops-hub openapi_document_is_checked_in`"
    );
}

#[tokio::test]
async fn hub_refuses_what_would_not_work() {
    let folder = tempfile::tempdir().unwrap();
    let config = |http: Option<&str>, listen: Option<&str>| HubConfig {
        database: None,
        blobs: None,
        data_dir: folder.path().join("hub"),
        listen: listen.map(|address| address.parse().unwrap()),
        http: http.map(|address| address.parse().unwrap()),
        names: vec![],
        public_url: None,
        keep: Default::default(),
        encode: slmops_hub::deltas::encode_on_thread,
    };
    let refused = async |config| match Hub::start(config).await {
        Ok(_) => panic!("the hub started"),
        Err(error) => error,
    };
    let error = refused(config(Some("0.0.0.0:0"), None)).await;
    assert!(matches!(error, HubError::PlainHttp(_)), "{error}");
    assert!(error.to_string().contains("hint: "));
    assert!(matches!(refused(config(None, None)).await, HubError::NoAddress));

    let running = Hub::start(config(Some("127.0.0.1:0"), Some("127.0.0.1:0"))).await.unwrap();
    assert!(running.first_start);
    assert!(running.url.starts_with("https://127.0.0.1:"));
    let token = running.admin_token().unwrap();
    let mode = std::fs::metadata(&running.admin_token_file).unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    // A second hub on the same folder, and one on the same port.
    let error = refused(config(Some("127.0.0.1:0"), None)).await;
    assert!(error.to_string().contains("in use by another hub"), "{error}");
    let taken = running.http.unwrap().to_string();
    let elsewhere =
        HubConfig { data_dir: folder.path().join("other"), ..config(Some(&taken), None) };
    let error = refused(elsewhere).await;
    assert!(error.to_string().contains(&taken), "{error}");
    assert!(error.to_string().contains("hint: another program may use the port"), "{error}");
    running.stop().await;

    // Started again, it is the same hub.
    let again = Hub::start(config(Some("127.0.0.1:0"), None)).await.unwrap();
    assert!(!again.first_start);
    assert_eq!(again.admin_token().unwrap(), token);
    again.stop().await;
}

#[tokio::test]
async fn tls_is_pinned_by_the_hubs_own_authority() {
    let rig = Rig::start().await;
    let url = format!("https://{}/health", rig.hub().https.unwrap());
    let ca = std::fs::read_to_string(&rig.hub().ca_file).unwrap();
    let trusting = rig::client_with_ca(&ca);
    assert_eq!(trusting.get(&url).send().await.unwrap().status(), StatusCode::OK);
    let stranger = rig::client_with_ca(&rig::other_ca());
    assert!(stranger.get(&url).send().await.is_err(), "a stranger's CA was enough");
}

#[tokio::test]
async fn late_device_gets_the_completed_release() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut first = rig.join("one", 600).await;
    rig.release("1.0.0").await;
    let id = rig.rollout("1.0.0", json!({})).await["id"].as_str().unwrap().to_owned();
    first.report(Phase::Confirmed).await;
    rig.wait_for_state(&id, "completed").await;
    let late = rig.join("late", 220).await;
    let desired = late.wait_for_generation(2).await;
    assert_eq!(desired.model.unwrap().variant.as_str(), "q2_k");
    assert!(desired.reason.contains("newest one completed"), "{}", desired.reason);
    let history = rig.get("/v1/devices/late/history").await.to_string();
    assert!(history.contains("told to be m 1.0.0 (q2_k)"), "{history}");
}
