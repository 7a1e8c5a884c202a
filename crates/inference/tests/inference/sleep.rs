//! A model without requests gives its memory back, and comes again with the next one.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::host::{HostEvent, HostState, ModelHost, ModelSpec};
use slmops_inference::server::ServerOptions;
use slmops_inference::worker::{GenerateRequest, Prompt, WorkerSpec};

use crate::server::Endpoint;
use crate::support::{GREEDY, PROMPT, glass, one_thread, set_up};

/// A model that sleeps after a second.
fn model() -> ModelSpec {
    let runtime = RuntimeConfig { idle_after_s: 1, ..one_thread() };
    let worker = WorkerSpec::new(glass(), runtime);
    ModelSpec { id: "glass".to_owned(), aliases: Vec::new(), worker }
}

async fn next(events: &mut tokio::sync::broadcast::Receiver<HostEvent>) -> HostEvent {
    let event = tokio::time::timeout(Duration::from_secs(60), events.recv()).await;
    event.expect("something happens").expect("an event")
}

#[tokio::test]
async fn an_idle_model_sleeps_until_a_request_comes() {
    let host = ModelHost::new();
    let endpoint = Endpoint::of(Arc::clone(&host), ServerOptions::default()).await;
    let mut events = host.events();
    endpoint.load(model()).await;
    let name = || "glass".to_owned();
    let first = host.current().expect("a worker").1;
    assert_eq!(next(&mut events).await, HostEvent::Activated { model: name() });
    assert_eq!(next(&mut events).await, HostEvent::Asleep { model: name() });
    assert!(first.ending().is_some_and(|ending| ending.expected));

    // Who looks after it does not wake it.
    let (status, health) = endpoint.get("/health").await;
    let health: Value = serde_json::from_str(&health).expect("JSON");
    assert_eq!((status, health), (200, json!({ "status": "sleeping", "model": "glass" })));
    for path in ["/v1/models", "/v1/models/glass", "/props", "/lora-adapters"] {
        assert_eq!(endpoint.get(path).await.0, 200, "{path}");
    }
    let (_, metrics) = endpoint.get("/metrics").await;
    for line in ["slmops_model_asleep 1", "slmops_sleeps_total 1", "slmops_wakes_total 0"] {
        assert!(metrics.lines().any(|it| it == line), "{line} is not in: {metrics}");
    }
    assert_eq!((host.status().state, host.status().memory.resident_bytes), (HostState::Asleep, 0));

    // All that come while it wakes up are answered.
    let body = || json!({ "prompt": PROMPT, "max_tokens": 8, "temperature": 0 });
    let asked = (0..8).map(|_| endpoint.post("/v1/completions", body()));
    for (status, answer) in futures_util::future::join_all(asked).await {
        assert_eq!(status, 200, "{answer}");
    }
    assert_eq!(next(&mut events).await, HostEvent::Awake { model: name() });
    assert_eq!(next(&mut events).await, HostEvent::Asleep { model: name() });
    let (_, metrics) = endpoint.get("/metrics").await;
    assert!(metrics.contains("slmops_wakes_total 1\n"), "{metrics}");
    assert!(metrics.contains("slmops_worker_crashes_total 0\n"), "{metrics}");
    endpoint.stop().await;
}

#[tokio::test]
async fn a_model_that_answers_is_not_idle() {
    set_up();
    let host = ModelHost::new();
    let mut events = host.events();
    let staged = host.stage(model()).await.expect("it loads");
    assert_eq!(staged.worker().effective().idle_after_s, 1);
    let worker = staged.worker().clone();
    let pid = Pid::from_raw(worker.pid().cast_signed()).expect("a process");
    kill_process(pid, Signal::STOP).expect("it pauses");
    let mut answers = Vec::new();
    for _ in 0..4 {
        let request = GenerateRequest::greedy(Prompt::Text(PROMPT.to_owned()), 20);
        answers.push(worker.generate(request).expect("taken"));
    }
    host.activate(staged);
    assert!(matches!(next(&mut events).await, HostEvent::Activated { .. }));
    let slept = tokio::time::timeout(Duration::from_millis(2_500), events.recv()).await;
    assert!(slept.is_err(), "{slept:?}");
    kill_process(pid, Signal::CONT).expect("it goes on");
    for answer in answers {
        assert_eq!(answer.finish().await.expect("an answer").0.tokens, GREEDY);
    }
    host.shut_down(Duration::from_secs(10)).await;
}
