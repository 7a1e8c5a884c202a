//! Deltas to what rollouts bring: made by the hub, kept with the release, offered to devices.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use slmops_api::delta::{DELTA_MEDIA_TYPE, Sources};
use slmops_api::device::Phase;
use slmops_artifact::Digest;

use super::rig::{FakeDevice, Rig};

/// Bytes that no compression makes smaller.
fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes / 32).flat_map(|block: usize| *Digest::of(&block.to_le_bytes()).as_bytes()).collect()
}

/// Waits for the hub to have made what the device needs.
async fn made(device: &FakeDevice, weights: Digest) -> Sources {
    for _ in 0..500 {
        let sources = device.sources(weights).await;
        if sources.wait_s.is_none() {
            return sources;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("no delta was made");
}

#[tokio::test]
async fn a_rollout_brings_deltas_from_what_devices_run() {
    let mut rig = Rig::start().await;
    rig.filler = noise(200_000);
    rig.add_publisher_key().await;
    let mut devices = vec![rig.join("one", 600).await, rig.join("two", 600).await];
    rig.release("1.0.0").await;
    rig.rollout("1.0.0", json!({ "waves": ["rest"] })).await;
    for device in &mut devices {
        device.wait_for_generation(2).await;
        device.report(Phase::Confirmed).await;
    }
    rig.release("1.1.0").await;
    let rollout = rig.rollout("1.1.0", json!({})).await;
    let (told, waits) = {
        let states = rig.desired_of(&devices).await;
        let is_told = |state: &slmops_api::device::DesiredState| {
            state.model.as_ref().unwrap().version.to_string() == "1.1.0"
        };
        let canary = states.iter().position(is_told).expect("one canary is told");
        (canary, 1 - canary)
    };
    let wanted = devices[told].desired().await.model.unwrap();
    let sources = made(&devices[told], wanted.weights).await;
    let [delta] = &sources.deltas[..] else { panic!("{sources:?}") };
    assert_eq!(delta.to, wanted.weights);
    assert_eq!(delta.to_bytes, wanted.size_bytes);
    assert!(delta.bytes < 2_000, "{delta:?}");
    assert_eq!(devices[told].pull(&delta.blob).await, StatusCode::OK);
    // One that is not told is offered nothing yet.
    assert_eq!(devices[waits].sources(wanted.weights).await, Sources::default());

    // People see it, and so does any OCI client.
    let shown = rig.get("/v1/releases/m/1.1.0/deltas").await;
    let job = &shown["items"][0];
    assert_eq!((&job["state"], &job["devices"]), (&json!("ready"), &json!(2)), "{shown}");
    let path = format!("/v2/m/referrers/{}?artifactType={DELTA_MEDIA_TYPE}", wanted.manifest);
    let referrers = rig.get(&path).await;
    let referrer = &referrers["manifests"][0];
    let annotations = &referrer["annotations"];
    assert_eq!(annotations["io.slmops.delta.from"], json!(delta.from), "{referrers}");
    assert_eq!(annotations["io.slmops.delta.bytes"], json!(delta.bytes.to_string()));
    assert_eq!(rig.get("/v1/releases/m/1.0.0/deltas").await["items"], json!([]));

    // The last wave finds it there.
    devices[told].report(Phase::Confirmed).await;
    let generation = devices[waits].desired().await.generation;
    devices[waits].wait_for_generation(generation + 1).await;
    assert_eq!(devices[waits].sources(wanted.weights).await, sources);
    devices[waits].report(Phase::Confirmed).await;
    rig.wait_for_state(rollout["id"].as_str().unwrap(), "completed").await;

    // It goes with the manifest that it was made for.
    let manifest = format!("/v2/m/manifests/{}", wanted.manifest);
    rig.send(Method::DELETE, &manifest, Value::Null, StatusCode::ACCEPTED).await;
    assert_eq!(rig.get("/v1/releases/m/1.1.0/deltas").await["items"], json!([]));
    assert_eq!(devices[told].pull(&delta.blob).await, StatusCode::NOT_FOUND);
    assert_eq!(rig.get(&path).await["manifests"], json!([]));
    assert_eq!(devices[told].sources(wanted.weights).await, Sources::default());
}

#[tokio::test]
async fn a_delta_that_saves_nothing_is_not_offered() {
    let rig = Rig::start().await;
    rig.add_publisher_key().await;
    let mut device = rig.join("one", 600).await;
    for version in ["1.0.0", "1.1.0"] {
        // A few bytes each: no delta is smaller.
        rig.release(version).await;
        rig.rollout(version, json!({ "waves": ["rest"] })).await;
        let generation = device.desired().await.generation;
        if version == "1.0.0" {
            device.report(Phase::Confirmed).await;
        }
        assert!(generation > 1);
    }
    let wanted = device.desired().await.model.unwrap();
    assert_eq!(made(&device, wanted.weights).await, Sources::default());
    let shown = rig.get("/v1/releases/m/1.1.0/deltas").await;
    assert_eq!(shown["items"][0]["state"], "useless", "{shown}");
}
