//! What owners and operators say of the local endpoint: a model that sleeps while nobody asks, a collector of
//! metrics.

use std::path::Path;
use std::time::Duration;

use slmops_api::runtime::RuntimeConfig;

use crate::fake_hub::{FakeHub, Release, runtime};
use crate::kills::{Running, agent, join};
use crate::{ask, until};

/// What the local endpoint of the agent on this folder says.
async fn get(folder: &Path, path: &str) -> String {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let endpoint = std::fs::read_to_string(folder.join("endpoint")).expect("an endpoint");
    let answer = reqwest::get(format!("{}{path}", endpoint.trim())).await.expect("an answer");
    answer.text().await.expect("text")
}

async fn counts(folder: &Path, line: &str) -> bool {
    get(folder, "/metrics").await.lines().any(|it| it == line)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_lets_its_model_sleep_as_its_configuration_says() {
    let mut hub = FakeHub::start().await;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    join(&hub, folder);
    let _running = Running::start(folder);
    let model = hub.publish(&Release::good("1.0.0"));
    let sleepy = RuntimeConfig { idle_after_s: 1, ..runtime() };
    let generation = hub.want(Some(model.clone()), sleepy.clone());
    let report = hub.confirmed(generation).await;
    assert_eq!(report.effective.expect("a configuration").idle_after_s, 1);

    until("it sleeps", || counts(folder, "slmops_model_asleep 1")).await;
    let wakes = get(folder, "/metrics").await;
    let wakes = wakes.lines().find(|line| line.starts_with("slmops_wakes_total")).unwrap();
    let wakes = wakes.to_owned();
    // Neither does who looks after it wake it, nor what the hub asks and is told.
    for path in ["/health", "/v1/models", "/props"] {
        assert!(!get(folder, path).await.contains("\"error\""), "{path}");
    }
    let status = agent(folder, &["status"]).output().unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains("confirmed glass 1.0.0"), "{status}");
    hub.vanish().await;
    hub.come_back().await;
    let seen = hub.lock().reports.len();
    let report = {
        let mut left = seen;
        hub.report("it sleeps", |_| left.checked_sub(1).map(|less| left = less).is_none()).await
    };
    assert_eq!(report.running.map(|model| model.manifest), Some(model.manifest));
    for line in ["slmops_model_asleep 1", &wakes, "slmops_worker_crashes_total 0"] {
        assert!(counts(folder, line).await, "{line}");
    }

    // Who asks wakes it.
    assert_eq!(ask(folder).await, 200);
    assert!(!counts(folder, &wakes).await);
    // And what goes on without sleep keeps it.
    let generation = hub.want(Some(model), RuntimeConfig { idle_after_s: 0, ..sleepy });
    let report = hub.confirmed(generation).await;
    assert_eq!(report.effective.expect("a configuration").idle_after_s, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_collector_is_told_is_in_the_outbox() {
    let (told, mut pushes) = tokio::sync::mpsc::unbounded_channel();
    let take = async move |body: axum::body::Bytes| {
        let _ = told.send(body);
    };
    let router = axum::Router::new().route("/v1/metrics", axum::routing::post(take));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });

    let hub = FakeHub::start().await;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    join(&hub, folder);
    let refused = agent(folder, &["run", "--otlp", "collector"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("push metrics: `collector` is no URL") && said.contains("hint:"),
        "{said}"
    );

    let mut running = agent(folder, &["run", "--otlp", &url]);
    let running = running.env("OTEL_METRIC_EXPORT_INTERVAL", "100").spawn().unwrap();
    let mut running = Running::of(running);
    let generation = hub.ship(&Release::good("1.0.0"));
    hub.confirmed(generation).await;
    assert_eq!(ask(folder).await, 200);
    let name = b"gen_ai.client.token.usage";
    loop {
        let push = tokio::time::timeout(Duration::from_secs(60), pushes.recv()).await;
        let push = push.expect("a push comes").expect("it listens");
        assert!(!push.windows(5).any(|part| part == b"Alice"), "the prompt left");
        if push.windows(name.len()).any(|part| part == name) {
            break;
        }
    }
    running.kill();
    let outbox = String::from_utf8(agent(folder, &["outbox"]).output().unwrap().stdout).unwrap();
    let place = format!("POST {url}/v1/metrics: ");
    let first = outbox.lines().find(|line| line.contains(&place)).expect("the first push");
    assert!(first.contains("service.instance.id=device-1"), "{first}");
    assert!(first.contains("slmops.model_ready="), "{first}");
    assert!(outbox.contains("gen_ai.client.token.usage["), "{outbox}");

    // It is remembered, and can be ended.
    let kept = std::fs::read_to_string(folder.join("device.json")).unwrap();
    assert!(kept.contains(&url), "{kept}");
    let ended = agent(folder, &["run", "--otlp", "none", "--listen", &hub.address.to_string()]);
    let _ = { ended }.output().unwrap();
    let kept = std::fs::read_to_string(folder.join("device.json")).unwrap();
    assert!(!kept.contains("otlp"), "{kept}");
}
