//! Packages with a LoRA adapter: what is fetched, that it is applied, and what comes of bad ones.

use slmops_api::delta::Way;
use slmops_api::device::{Failure, Phase};
use slmops_artifact::Digest;

use crate::Device;
use crate::fake_hub::{FakeHub, Release};

/// What the device's endpoint says, greedily.
async fn answer(device: &Device) -> String {
    let endpoint = std::fs::read_to_string(device.path().join("endpoint")).unwrap();
    let body = serde_json::json!({ "prompt": "Alice was beginning to", "max_tokens": 24, "temperature": 0 });
    let client = reqwest::Client::new();
    let request = client.post(format!("{}/v1/completions", endpoint.trim())).json(&body);
    let answer: serde_json::Value = request.send().await.unwrap().json().await.unwrap();
    answer["choices"][0]["text"].as_str().expect("an answer").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_of_weights_that_are_here_comes_alone() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let base = Release::good("1.0.0");
    let adapted = Release::adapted(&base, "1.1.0");
    let (weights, size) = (Digest::of(&base.weights), base.weights.len() as u64);
    let adapter_bytes = adapted.adapter.as_ref().unwrap().len() as u64;
    hub.confirmed(hub.ship(&base)).await;
    let plain = answer(&device).await;

    // Nobody is waited for, and nothing of the weights comes again.
    hub.lock().sources.entry(weights).or_default().wait_s = Some(60);
    let report = hub.confirmed(hub.ship(&adapted)).await;
    let transfer = report.telemetry.transfer.expect("an adapter came");
    assert_eq!(transfer.way(), Way::Adapter);
    assert_eq!((transfer.adapter_bytes, transfer.wan_bytes()), (adapter_bytes, adapter_bytes));
    assert_eq!(hub.lock().blob_bytes[&weights], size, "once, for the first release");
    let status = device.status();
    assert!(status.contains("of an adapter for a model of"), "{status}");
    let changed = answer(&device).await;
    assert_ne!(changed, plain);

    // It outlives a restart, and going back is going back.
    device.stop().await;
    device.start();
    crate::until("it serves again", || async { device.ask().await == 200 }).await;
    assert_eq!(answer(&device).await, changed);
    hub.confirmed(hub.ship(&base)).await;
    assert_eq!(answer(&device).await, plain);
    assert_eq!(hub.lock().blob_bytes[&weights], size);
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_without_the_weights_gets_both() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let adapted = Release::adapted(&Release::good("1.0.0"), "1.1.0");
    let adapter_bytes = adapted.adapter.as_ref().unwrap().len() as u64;
    let report = hub.confirmed(hub.ship(&adapted)).await;
    let transfer = report.telemetry.transfer.expect("a model came");
    assert_eq!(transfer.way(), Way::Whole);
    assert_eq!(transfer.wan_bytes(), adapted.weights.len() as u64 + adapter_bytes);

    // New weights and their adapter: a delta and the adapter, which is the same one.
    let next = Release::adapted(&Release::good("2.0.0"), "2.0.0");
    let delta = hub.offer(&adapted, &next);
    let report = hub.confirmed(hub.ship(&next)).await;
    let transfer = report.telemetry.transfer.expect("a model came");
    assert_eq!((transfer.way(), transfer.wan_bytes()), (Way::Delta, delta.bytes));
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_that_were_lost_come_again_with_the_adapter() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let base = Release::good("1.0.0");
    let (weights, size) = (Digest::of(&base.weights), base.weights.len() as u64);
    hub.confirmed(hub.ship(&base)).await;
    std::fs::remove_file(device.path().join("blobs").join(weights.hex())).unwrap();
    let report = hub.confirmed(hub.ship(&Release::adapted(&base, "1.1.0"))).await;
    let transfer = report.telemetry.transfer.expect("a model came");
    assert_eq!((transfer.way(), transfer.whole_bytes), (Way::Whole, size));
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_adapter_is_taken_back() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let base = Release::good("1.0.0");
    hub.confirmed(hub.ship(&base)).await;
    let plain = answer(&device).await;
    let mut adapter = Release::adapted(&base, "1.1.0").adapter.unwrap();
    // A number that is none, where an engine would compute with it.
    let end = adapter.len();
    adapter[end - 2..].copy_from_slice(&0x7e00_u16.to_le_bytes());
    for (version, bytes) in [("1.1.0", adapter), ("1.2.0", base.weights.clone())] {
        let bad = Release { adapter: Some(bytes), ..Release::adapted(&base, version) };
        let report = hub.rolled_back(hub.ship(&bad)).await;
        assert_eq!(report.phase, Phase::RolledBack { failure: Failure::Load }, "{version}");
        assert_eq!(answer(&device).await, plain);
    }
    device.stop().await;
}
