//! Webhooks through real HTTP, to a receiver that fails, is slow, and comes back.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::IntoResponse as _;
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac as _};
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use sha2::Sha256;
use slmops_hub::tls::Tls;

use super::crash;
use super::rig::Rig;

/// How long a test waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Takes,
    Fails,
    /// Never answers.
    Hangs,
}

#[derive(Clone)]
struct Received {
    id: String,
    timestamp: String,
    signature: String,
    media_type: String,
    body: Vec<u8>,
}

impl Received {
    fn event(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn sequence(&self) -> u64 {
        self.event()["data"]["sequence"].as_u64().unwrap()
    }

    fn is_signed_with(&self, secret: &str) -> bool {
        let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
        mac.update(format!("{}.{}.", self.id, self.timestamp).as_bytes());
        mac.update(&self.body);
        self.signature == format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }
}

/// A receiver in the test's hands.
#[derive(Clone)]
struct Receiver {
    mood: Arc<Mutex<Mood>>,
    /// What it took, and what it refused.
    taken: Arc<Mutex<Vec<Received>>>,
    refused: Arc<Mutex<Vec<Received>>>,
}

impl Receiver {
    fn new() -> Self {
        let mood = Arc::new(Mutex::new(Mood::Takes));
        Self { mood, taken: Arc::default(), refused: Arc::default() }
    }

    fn router(&self) -> Router {
        async fn take(
            State(receiver): State<Receiver>,
            headers: HeaderMap,
            body: Bytes,
        ) -> axum::response::Response {
            let text = |name: &str| headers[name].to_str().unwrap().to_owned();
            let received = Received {
                id: text("webhook-id"),
                timestamp: text("webhook-timestamp"),
                signature: text("webhook-signature"),
                media_type: text("content-type"),
                body: body.to_vec(),
            };
            let mood = *receiver.mood.lock().unwrap();
            match mood {
                Mood::Takes => {
                    receiver.taken.lock().unwrap().push(received);
                    StatusCode::NO_CONTENT.into_response()
                }
                Mood::Fails => {
                    receiver.refused.lock().unwrap().push(received);
                    StatusCode::SERVICE_UNAVAILABLE.into_response()
                }
                Mood::Hangs => std::future::pending().await,
            }
        }
        Router::new().route("/hook", post(take)).with_state(self.clone())
    }

    /// Listens on a free port for as long as the test runs.
    async fn listen(&self) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = self.router();
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn taken(&self) -> Vec<(String, u64)> {
        let taken = self.taken.lock().unwrap();
        taken.iter().map(|one| (one.id.clone(), one.sequence())).collect()
    }

    fn types(&self) -> Vec<String> {
        let taken = self.taken.lock().unwrap();
        taken.iter().map(|one| one.event()["type"].as_str().unwrap().to_owned()).collect()
    }
}

async fn wait_for<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn impatient(attempts: u32) -> Value {
    json!({ "attempts": attempts, "first_delay_ms": 10, "max_delay_ms": 40, "timeout_ms": 200 })
}

async fn add(rig: &Rig, url: &str, events: Value, retry: Value) -> (String, String) {
    let body = json!({ "url": url, "events": events, "retry": retry });
    let made = rig.send(Method::POST, "/v1/webhooks", body, StatusCode::CREATED).await;
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (text(&made["webhook"]["id"]), text(&made["secret"]))
}

async fn deliveries(rig: &Rig, id: &str, state: &str) -> Vec<Value> {
    let page = rig.get(&format!("/v1/webhooks/{id}/deliveries?state={state}")).await;
    page["items"].as_array().unwrap().clone()
}

#[tokio::test]
async fn events_are_signed_cloud_events_of_the_wanted_kinds() {
    let rig = Rig::start().await;
    let receiver = Receiver::new();
    let url = format!("http://{}/hook?key=hidden", receiver.listen().await);
    let (id, secret) = add(&rig, &url, json!(["device.*", "class.put"]), impatient(3)).await;
    rig.join("one", 600).await;
    let class = json!({ "name": "huge", "min_memory_bytes": 1, "quantisation": "Q8_0" });
    rig.send(Method::PUT, "/v1/classes/huge", class, StatusCode::OK).await;
    rig.send(Method::DELETE, "/v1/classes/huge", Value::Null, StatusCode::NO_CONTENT).await;
    rig.send(Method::DELETE, "/v1/devices/one", Value::Null, StatusCode::NO_CONTENT).await;
    let wanted = ["slmops.class.put", "slmops.device.enrol", "slmops.device.revoke"];
    wait_for("every event", async || {
        let mut types = receiver.types();
        types.sort();
        (types == wanted).then_some(())
    })
    .await;
    for received in receiver.taken.lock().unwrap().iter() {
        assert!(received.is_signed_with(&secret), "{}", received.signature);
        assert!(!received.is_signed_with("whsec_AAAA"));
        assert!(received.media_type.starts_with("application/cloudevents+json"));
        let event = received.event();
        assert_eq!(event["specversion"], "1.0");
        assert!(event["source"].as_str().unwrap().starts_with("https://"), "{event}");
        assert!(event["id"].as_str().unwrap().starts_with("sha256:"), "{event}");
        assert_eq!(event["subject"], event["data"]["object"]);
        assert_eq!(received.id, format!("msg_{id}_{}", received.sequence()));
    }
    // A test goes to its webhook whatever that wants.
    rig.post(&format!("/v1/webhooks/{id}/test"), Value::Null).await;
    wait_for("the test", async || {
        receiver.types().contains(&"slmops.webhook.test".into()).then_some(())
    })
    .await;
    let taken = receiver.taken().len();
    let done = wait_for("the last note", async || {
        Some(deliveries(&rig, &id, "delivered").await).filter(|done| done.len() == taken)
    })
    .await;
    assert_eq!((&done[0]["last"], &done[0]["attempts"]), (&json!("204"), &json!(1)));
    let sequence = done[0]["sequence"].clone();
    let path = format!("/v1/webhooks/{id}/redeliver");
    let again = rig.post(&path, json!({ "sequence": sequence })).await;
    assert_eq!(again["deliveries"], 1);
    wait_for("it again", async || (receiver.taken().len() == taken + 1).then_some(())).await;

    // Neither the secret nor what the URL hides is told where others read.
    let audit = rig.get("/v1/audit?limit=500").await.to_string();
    let listed = rig.get("/v1/webhooks").await.to_string();
    assert!(!audit.contains("hidden") && !audit.contains(&secret) && !listed.contains(&secret));
    let path = format!("/v1/webhooks/{id}");
    rig.send(Method::DELETE, &path, Value::Null, StatusCode::NO_CONTENT).await;
    let gone = rig.send(Method::DELETE, &path, Value::Null, StatusCode::NOT_FOUND).await;
    assert!(gone["hint"].as_str().unwrap().contains("slm webhook list"), "{gone}");
}

#[tokio::test]
async fn a_receiver_that_fails_gets_dead_letters_again_when_asked() {
    let rig = Rig::start().await;
    let receiver = Receiver::new();
    receiver.set(Mood::Fails);
    let url = format!("http://{}/hook", receiver.listen().await);
    let (id, _) = add(&rig, &url, json!(["device.enrol"]), impatient(3)).await;
    rig.join("one", 600).await;
    rig.join("two", 600).await;
    let dead = wait_for("giving up", async || {
        Some(deliveries(&rig, &id, "dead").await).filter(|dead| dead.len() == 2)
    })
    .await;
    assert_eq!((&dead[0]["last"], &dead[0]["attempts"]), (&json!("503"), &json!(3)));
    let tried: Vec<String> =
        receiver.refused.lock().unwrap().iter().map(|one| one.id.clone()).collect();
    assert_eq!((tried.len(), tried.iter().collect::<BTreeSet<_>>().len()), (6, 2));
    assert_eq!(rig.get("/v1/webhooks").await["items"][0]["dead"], 2);

    // Nothing answers in time: that is told apart, and tried again by itself.
    receiver.set(Mood::Hangs);
    rig.post(&format!("/v1/webhooks/{id}/redeliver"), json!({})).await;
    wait_for("an attempt without an answer", async || {
        let pending = deliveries(&rig, &id, "pending").await;
        pending.iter().any(|one| one["last"] == "no answer in time").then_some(())
    })
    .await;
    receiver.set(Mood::Takes);
    wait_for("both", async || (receiver.taken().len() >= 2).then_some(())).await;
    wait_for("nobody waiting", async || {
        deliveries(&rig, &id, "pending").await.is_empty().then_some(())
    })
    .await;
    assert_eq!(deliveries(&rig, &id, "delivered").await.len(), 2);
}

#[tokio::test]
async fn https_receivers_are_known_by_their_ca_alone() {
    let rig = Rig::start().await;
    let receiver = Receiver::new();
    let folder = tempfile::tempdir().unwrap();
    let tls = Tls::open(folder.path(), &[]).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/hook", listener.local_addr().unwrap());
    let config = axum_server::tls_rustls::RustlsConfig::from_config(tls.server_config().unwrap());
    let server = axum_server::from_tcp_rustls(listener, config).unwrap();
    tokio::spawn(server.serve(receiver.router().into_make_service()));
    let body = |ca: Option<&str>| {
        let ca_pem = ca.map(str::to_owned);
        json!({ "url": url, "events": ["*"], "ca_pem": ca_pem, "retry": impatient(2) })
    };
    let system = rig.post("/v1/webhooks", body(None)).await["webhook"]["id"].clone();
    let given = rig.post("/v1/webhooks", body(Some(tls.ca_pem()))).await["webhook"]["id"].clone();
    for id in [&system, &given] {
        rig.post(&format!("/v1/webhooks/{}/test", id.as_str().unwrap()), Value::Null).await;
    }
    wait_for("the test", async || {
        receiver.types().contains(&"slmops.webhook.test".into()).then_some(())
    })
    .await;
    wait_for("giving up", async || {
        let dead = deliveries(&rig, system.as_str().unwrap(), "dead").await;
        dead.iter().any(|one| one["last"] == "no connection").then_some(())
    })
    .await;
    assert!(deliveries(&rig, system.as_str().unwrap(), "delivered").await.is_empty());
    let nonsense = body(Some("no certificate"));
    rig.send(Method::POST, "/v1/webhooks", nonsense, StatusCode::BAD_REQUEST).await;
}

#[tokio::test]
async fn webhooks_that_make_no_sense_are_refused() {
    let rig = Rig::start().await;
    let good = json!({ "url": "https://example.com/hook", "events": ["rollout.*"] });
    for (change, why) in [
        (json!({ "url": "ftp://example.com" }), "neither https nor http"),
        (json!({ "url": "file:///etc/passwd" }), "neither https nor http"),
        (json!({ "url": "http://169.254.169.254/latest" }), "such an address"),
        (json!({ "url": "https://example.com/".to_owned() + &"x".repeat(2000) }), "longer than"),
        (json!({ "events": [] }), "`events`"),
        (json!({ "events": ["roll out"] }), "`events`"),
        (json!({ "events": ["ro*llout"] }), "`events`"),
        (json!({ "retry": { "attempts": 0 } }), "retry.attempts = 0"),
        (json!({ "retry": { "timeout_ms": 3_600_000 } }), "retry.timeout_ms"),
        (json!({ "secret": "mine" }), "unknown field"),
    ] {
        let mut body = good.clone();
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        let problem = rig.send(Method::POST, "/v1/webhooks", body, StatusCode::BAD_REQUEST).await;
        assert!(problem["detail"].as_str().unwrap().contains(why), "{problem} lacks {why}");
    }
    for (method, path, body) in [
        (Method::DELETE, "/v1/webhooks/w0", Value::Null),
        (Method::POST, "/v1/webhooks/w0/test", Value::Null),
        (Method::POST, "/v1/webhooks/w0/redeliver", json!({})),
        (Method::GET, "/v1/webhooks/w0/deliveries", Value::Null),
    ] {
        rig.send(method, path, body, StatusCode::NOT_FOUND).await;
    }
    // Who may only look does not see where events go, and an operator makes no webhook.
    for (role, expected) in [("viewer", [403, 403]), ("operator", [200, 403])] {
        let made = rig.post("/v1/tokens", json!({ "name": role, "role": role })).await;
        let token = made["secret"].as_str().unwrap().to_owned();
        let list = rig.status(Method::GET, "/v1/webhooks", Value::Null, Some(&token)).await;
        let add = rig.status(Method::POST, "/v1/webhooks", good.clone(), Some(&token)).await;
        assert_eq!([list.as_u16(), add.as_u16()], expected, "{role}");
    }
}

/// The hub is killed in whatever it is doing, with a receiver that is down, silent or well: in the end
/// every event has arrived, and each repetition under its first name.
#[tokio::test]
async fn no_event_is_lost_when_the_hub_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("hub");
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder().timeout(Duration::from_secs(20)).build().unwrap();
    let receiver = Receiver::new();
    let address = receiver.listen().await;
    let token = || std::fs::read_to_string(data.join("admin.token")).unwrap().trim().to_owned();
    let mut first = 0;
    let moods = [Mood::Takes, Mood::Fails, Mood::Takes, Mood::Hangs, Mood::Takes, Mood::Takes];
    for (round, mood) in moods.into_iter().enumerate() {
        receiver.set(mood);
        let (mut child, url) = crash::spawn(&data);
        if round == 0 {
            let body = json!({
                "url": format!("http://{address}/hook"), "events": ["class.*"],
                "retry": impatient(100),
            });
            let request = client.post(format!("{url}/v1/webhooks")).bearer_auth(token());
            let made: Value = request.json(&body).send().await.unwrap().json().await.unwrap();
            first = made["webhook"]["cursor"].as_u64().unwrap();
        }
        for change in 0..20 {
            let name = format!("k{round}-{change}");
            let body = json!({ "name": name, "min_memory_bytes": 1, "quantisation": "Q8_0" });
            let request = client.put(format!("{url}/v1/classes/{name}")).bearer_auth(token());
            assert_eq!(request.json(&body).send().await.unwrap().status(), StatusCode::OK);
        }
        if round + 1 < moods.len() {
            child.kill().unwrap();
            child.wait().unwrap();
            continue;
        }
        let url = format!("{url}/v1/audit?limit=500");
        let audit: Value = crash::get(&client, &url, &token()).await;
        let entries = audit["items"].as_array().unwrap();
        let sequence = |entry: &Value| entry["sequence"].as_u64().unwrap();
        let puts = entries.iter().filter(|entry| entry["action"] == "class.put").map(sequence);
        let wanted: BTreeSet<u64> = puts.filter(|sequence| *sequence > first).collect();
        assert_eq!(wanted.len(), moods.len() * 20);
        wait_for("every event", async || {
            let found: BTreeSet<u64> = receiver.taken().into_iter().map(|(_, it)| it).collect();
            assert!(found.is_subset(&wanted));
            (found == wanted).then_some(())
        })
        .await;
        let names: BTreeSet<(String, u64)> = receiver.taken().into_iter().collect();
        assert_eq!(names.len(), wanted.len(), "a repetition has another name");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[tokio::test]
async fn a_new_secret_and_the_one_before_sign_for_a_while() {
    let rig = Rig::start().await;
    let receiver = Receiver::new();
    let url = format!("http://{}/hook", receiver.listen().await);
    let (id, first) = add(&rig, &url, json!(["class.*"]), impatient(3)).await;
    let rotate = async |overlap_s: u64| {
        let path = format!("/v1/webhooks/{id}/rotate");
        let made = rig.post(&path, json!({ "overlap_s": overlap_s })).await;
        assert_eq!(made["webhook"]["id"], json!(id));
        made["secret"].as_str().unwrap().to_owned()
    };
    // By which of the secrets, in this order, the next event is signed.
    let signed_by = async |event: usize, secrets: [&str; 3]| -> Vec<usize> {
        let class = json!({ "name": "c", "min_memory_bytes": event, "quantisation": "Q4_K_M",
            "description": "" });
        rig.send(Method::PUT, "/v1/classes/c", class, StatusCode::OK).await;
        wait_for("the event", async || (receiver.taken().len() == event).then_some(())).await;
        let taken = receiver.taken.lock().unwrap();
        let found = taken.last().unwrap();
        let signs = |signature: &str| {
            let alone = Received { signature: signature.to_owned(), ..found.clone() };
            let by = secrets.iter().position(|secret| alone.is_signed_with(secret));
            by.expect("a signature is by one of the secrets")
        };
        found.signature.split(' ').map(signs).collect()
    };
    let second = rotate(3600).await;
    assert_ne!(second, first);
    assert_eq!(signed_by(1, [&first, &second, &first]).await, [1, 0], "the newest first");
    let until = rig.get("/v1/webhooks").await["items"][0]["previous_secret_until"].clone();
    assert!(until.is_string(), "{until}");
    // Only the last two ever sign, and the one before no longer than it was asked.
    let third = rotate(3600).await;
    assert_eq!(signed_by(2, [&first, &second, &third]).await, [2, 1]);
    let fourth = rotate(0).await;
    assert_eq!(signed_by(3, [&second, &third, &fourth]).await, [2]);

    let audit = rig.get("/v1/audit?limit=500").await.to_string();
    assert!(audit.contains("webhook.rotate"), "{audit}");
    for secret in [&first, &second, &third, &fourth] {
        assert!(!audit.contains(secret.as_str()), "a secret is in the audit log");
    }
    let path = format!("/v1/webhooks/{id}/rotate");
    let long = json!({ "overlap_s": 31 * 24 * 3600 });
    rig.send(Method::POST, &path, long, StatusCode::BAD_REQUEST).await;
    let nobody = "/v1/webhooks/w0/rotate";
    rig.send(Method::POST, nobody, json!({}), StatusCode::NOT_FOUND).await;
}
