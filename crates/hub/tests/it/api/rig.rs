//! A real hub on free ports, a client for it, packages to push, and devices in the test's hands.

use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use reqwest::{Client, Method, Response, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};
use slmops_api::delta::Sources;
use slmops_api::device::{
    DesiredModel, DesiredState, DeviceFacts, DeviceReport, InstalledModel, Phase, PublisherKey,
    Rejection, TOKEN_CONTEXT, Telemetry,
};
use slmops_artifact::Digest;
use slmops_artifact::package::{
    EMPTY_CONFIG, MANIFEST_MEDIA_TYPE, MODEL_FILE, ModelConfig, Package, PackageFile,
    signature_manifest,
};
use slmops_artifact::signing::{PrivateKey, sign};
use slmops_hub::backup::Place;
use slmops_hub::db::{DbError, Postgres};
use slmops_hub::{Hub, HubConfig, HubError, RunningHub};

/// How long a test waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it waits between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);

pub fn new_key() -> PrivateKey {
    PrivateKey::generate()
}

/// The policy that tests roll out with: one canary, then the rest.
pub fn policy() -> Value {
    json!({ "selector": "all", "waves": [{ "count": 1 }, "rest"], "confirm_timeout_s": 900 })
}

/// The variants of every test release: name, claimed size and KL divergence.
pub struct Variant;

impl Variant {
    pub fn all() -> [(&'static str, u64, f64); 3] {
        [("q8_0", 300 << 20, 0.001), ("q4_k_m", 150 << 20, 0.05), ("q2_k", 40 << 20, 0.5)]
    }
}

pub struct Rig {
    /// Absent where it is another process.
    hub: Option<RunningHub>,
    pub admin: String,
    client: Client,
    url: String,
    publisher: PrivateKey,
    /// What the weights of every release end with.
    pub filler: Vec<u8>,
    _folder: Option<tempfile::TempDir>,
}

/// A release that was pushed but not registered.
pub struct Pushed {
    pub release: Value,
}

impl Rig {
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut rig = Self::at(&folder.path().join("hub"), None).await;
        rig._folder = Some(folder);
        rig
    }

    /// A hub on a data folder that outlives it, with its tables there or at a URL.
    pub async fn at(data: &Path, database: Option<&str>) -> Self {
        let database = database.map(|url| Postgres::parse(url, None).unwrap());
        Self::of(&Place { data_dir: data.to_owned(), database, blobs: None }).await
    }

    pub async fn of(place: &Place) -> Self {
        let config = HubConfig {
            data_dir: place.data_dir.clone(),
            database: place.database.clone(),
            blobs: place.blobs.clone(),
            listen: Some("127.0.0.1:0".parse().unwrap()),
            http: Some("127.0.0.1:0".parse().unwrap()),
            names: vec![],
            public_url: None,
            keep: Default::default(),
            encode: slmops_hub::deltas::encode_on_thread,
        };
        let started = std::time::Instant::now();
        // One that was dropped just now may still be letting go of the folder.
        let hub = loop {
            match Hub::start(config.clone()).await {
                Err(HubError::Db(DbError::InUse { .. })) if started.elapsed() < PATIENCE => {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                started => break started.unwrap(),
            }
        };
        let url = format!("http://{}", hub.http.unwrap());
        let admin = hub.admin_token().unwrap();
        // Another test of this process may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().timeout(Duration::from_secs(60)).build().unwrap();
        Self {
            hub: Some(hub),
            admin,
            client,
            url,
            publisher: new_key(),
            filler: vec![],
            _folder: None,
        }
    }

    /// A hub in another process.
    pub fn remote(url: &str, admin: &str, publisher: &PrivateKey) -> Self {
        let client = Client::builder().timeout(Duration::from_secs(60)).build().unwrap();
        let (url, admin) = (url.to_owned(), admin.to_owned());
        Self {
            hub: None,
            admin,
            client,
            url,
            publisher: publisher.clone(),
            filler: vec![],
            _folder: None,
        }
    }

    pub fn hub(&self) -> &RunningHub {
        self.hub.as_ref().expect("the hub is in this process")
    }

    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Value,
        token: Option<&str>,
    ) -> Response {
        let mut request = self.client.request(method, format!("{}{path}", self.url));
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        if !body.is_null() {
            request = request.json(&body);
        }
        request.send().await.unwrap()
    }

    pub async fn status(
        &self,
        method: Method,
        path: &str,
        body: Value,
        token: Option<&str>,
    ) -> StatusCode {
        self.request(method, path, body, token).await.status()
    }

    pub async fn send(
        &self,
        method: Method,
        path: &str,
        body: Value,
        expected: StatusCode,
    ) -> Value {
        let response = self.request(method.clone(), path, body, Some(&self.admin)).await;
        let status = response.status();
        let text = response.text().await.unwrap();
        assert_eq!(status, expected, "{method} {path}: {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    pub async fn get(&self, path: &str) -> Value {
        self.send(Method::GET, path, Value::Null, StatusCode::OK).await
    }

    /// None while the hub or its database is away.
    pub async fn try_get(&self, path: &str) -> Option<Value> {
        let request = self.client.get(format!("{}{path}", self.url)).bearer_auth(&self.admin);
        let response = request.timeout(Duration::from_secs(5)).send().await.ok()?;
        response.error_for_status().ok()?.json().await.ok()
    }

    pub async fn text(&self, path: &str) -> String {
        let response = self.request(Method::GET, path, Value::Null, Some(&self.admin)).await;
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        response.text().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: Value) -> Value {
        let response = self.request(Method::POST, path, body, Some(&self.admin)).await;
        let status = response.status();
        let text = response.text().await.unwrap();
        assert!(status.is_success(), "POST {path}: {status} {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    pub async fn put_text(&self, path: &str, text: &str) -> (StatusCode, Value) {
        let request = self.client.put(format!("{}{path}", self.url)).bearer_auth(&self.admin);
        let response = request.body(text.to_owned()).send().await.unwrap();
        (response.status(), response.json().await.unwrap_or(Value::Null))
    }

    pub async fn add_publisher_key(&self) {
        let key = self.publisher.public();
        let body = json!({ "id": key.id(), "name": "test", "public_key": key.to_pem() });
        self.post("/v1/keys", body).await;
    }

    /// A publisher key that the rig's own vouches for.
    pub fn endorsed(&self, key: &PrivateKey, expires_at: Timestamp) -> Value {
        let key = key.public();
        let key = PublisherKey {
            id: key.id().parse().unwrap(),
            name: "next".to_owned(),
            public_key: key.to_pem().to_owned(),
            expires_at: Some(expires_at),
            endorsement: None,
        };
        serde_json::to_value(key.endorsed(&self.publisher)).unwrap()
    }

    pub async fn try_enrol(
        &self,
        invitation: &str,
        key: &PrivateKey,
        name: &str,
    ) -> (StatusCode, Value) {
        self.enrol(invitation, key, name, 600).await
    }

    async fn enrol(
        &self,
        invitation: &str,
        key: &PrivateKey,
        name: &str,
        budget_mib: u64,
    ) -> (StatusCode, Value) {
        let invitation = slmops_hub::auth::decode_invitation(invitation).unwrap();
        let body = json!({
            "invitation": invitation.id, "secret": invitation.secret,
            "public_key": key.public().to_pem(), "name": name, "facts": facts(budget_mib),
        });
        let response = self.request(Method::POST, "/v1/enrol", body, None).await;
        (response.status(), response.json().await.unwrap())
    }

    /// A device that joined and has its token.
    pub async fn join(&self, name: &str, budget_mib: u64) -> FakeDevice {
        let invitation = self.post("/v1/invitations", json!({})).await;
        let key = new_key();
        let text = invitation["text"].as_str().unwrap();
        let (status, enrolled) = self.enrol(text, &key, name, budget_mib).await;
        assert_eq!(status, StatusCode::OK, "{enrolled}");
        let mut device = FakeDevice {
            id: enrolled["device"].as_str().unwrap().to_owned(),
            token: String::new(),
            sequence: 0,
            running: None,
            confirmed: 0,
            rejected: vec![],
            facts: facts(budget_mib),
            desired: None,
            key,
            client: self.client.clone(),
            url: self.url.clone(),
        };
        let (status, token) = device.ask_token().await;
        assert_eq!(status, StatusCode::OK, "{token}");
        device.token = token["token"].as_str().unwrap().to_owned();
        device
    }

    /// Pushes and signs the variants of a version.
    pub async fn push(&self, version: &str) -> Pushed {
        self.push_signed(version, Some(&self.publisher)).await
    }

    pub async fn push_signed(&self, version: &str, key: Option<&PrivateKey>) -> Pushed {
        let mut variants = Vec::new();
        let original = Digest::of(b"original");
        for (name, claimed_bytes, kl) in Variant::all() {
            let mut weights = format!("weights of m {version} {name}").into_bytes();
            weights.extend_from_slice(&self.filler);
            let (manifest, digest) = self.push_package(version, name, &weights, key).await;
            let estimate = json!({ "mean": kl, "low": kl, "high": kl, "samples": 8 });
            variants.push(json!({
                "name": name, "classes": [], "quantisation": name.to_ascii_uppercase(),
                "manifest": manifest, "weights": digest, "size_bytes": weights.len(),
                // The files are small; what they would take in memory is claimed here.
                "repacked_bytes": claimed_bytes,
                "shape": { "architecture": "llama", "parameters": 135, "layers": 30,
                    "embedding": 576, "feed_forward": 1536, "heads": 9, "kv_heads": 3,
                    "key_width": 64, "value_width": 64, "vocabulary": 49152,
                    "trained_context": 8192 },
                "report": { "version": 1, "subject": digest, "reference": original,
                    "suite": Digest::of(b"suite"), "size_bytes": weights.len(),
                    "perplexity": 20.5, "kl_divergence": estimate, "kl_p99": kl,
                    "top1_agreement": estimate, "tasks": [], "decode_tokens_per_s": 10.0,
                    "prompt_tokens_per_s": 100.0, "time_to_first_token_ms": 5.0,
                    "peak_memory_bytes": 1, "machine": { "cpu": "test", "arch": "x86_64",
                        "cores": 1, "memory_bytes": 1, "kernel": "test", "measured": "real" },
                    "engine": "test", "finished_at": "2026-01-01T00:00:00Z",
                    "chunk_nll": [], "chunk_kl": [] },
            }));
        }
        let release = json!({
            "model": "m", "version": version, "original": original,
            "key": self.publisher.public().id(), "variants": variants,
        });
        Pushed { release }
    }

    async fn push_package(
        &self,
        version: &str,
        name: &str,
        weights: &[u8],
        key: Option<&PrivateKey>,
    ) -> (Digest, Digest) {
        let file = PackageFile::of_bytes(MODEL_FILE, weights);
        let digest = file.digest;
        let config = ModelConfig {
            name: "m".to_owned(),
            version: Some(version.parse().unwrap()),
            family: None,
            title: None,
            licenses: vec![],
            parameters: None,
            quantisation: Some(name.to_owned()),
            created_at: None,
        };
        let package = Package::new(vec![file], &config).unwrap();
        self.push_blob(weights).await;
        self.push_blob(package.config_bytes().unwrap()).await;
        let manifest = package.manifest_bytes();
        self.push_manifest(&manifest).await;
        if let Some(key) = key {
            let bundle = sign("m", &package.signed_files(), key).unwrap();
            self.push_blob(&bundle).await;
            self.push_blob(EMPTY_CONFIG).await;
            let subject = package.manifest_descriptor();
            let size = bundle.len() as u64;
            self.push_manifest(&signature_manifest(&subject, Digest::of(&bundle), size)).await;
        }
        (Digest::of(&manifest), digest)
    }

    async fn push_blob(&self, bytes: &[u8]) {
        let url = format!("{}/v2/m/blobs/uploads/?digest={}", self.url, Digest::of(bytes));
        let request = self.client.post(url).bearer_auth(&self.admin).body(bytes.to_vec());
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), StatusCode::CREATED);
    }

    async fn push_manifest(&self, bytes: &[u8]) {
        let url = format!("{}/v2/m/manifests/{}", self.url, Digest::of(bytes));
        let request = self.client.put(url).bearer_auth(&self.admin);
        let request = request.header("content-type", MANIFEST_MEDIA_TYPE).body(bytes.to_vec());
        let response = request.send().await.unwrap();
        let status = response.status();
        assert_eq!(status, StatusCode::CREATED, "{}", response.text().await.unwrap());
    }

    /// Pushes, signs and registers a version.
    pub async fn release(&self, version: &str) {
        let pushed = self.push(version).await;
        self.send(Method::POST, "/v1/releases", pushed.release, StatusCode::CREATED).await;
    }

    /// Starts a rollout with [`policy`], changed by `changes`.
    pub async fn rollout(&self, version: &str, changes: Value) -> Value {
        let mut policy = policy();
        for (key, value) in changes.as_object().unwrap() {
            policy[key] = value.clone();
        }
        let body = json!({ "model": "m", "version": version, "policy": policy });
        self.post("/v1/rollouts", body).await
    }

    pub async fn wait_for_state(&self, rollout: &str, state: &str) -> Value {
        let started = std::time::Instant::now();
        loop {
            let shown = self.get(&format!("/v1/rollouts/{rollout}")).await;
            if shown["state"] == state {
                return shown;
            }
            assert!(started.elapsed() < PATIENCE, "not {state}: {shown}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    pub async fn desired_of(&self, devices: &[FakeDevice]) -> Vec<DesiredState> {
        let mut states = Vec::new();
        for device in devices {
            states.push(device.desired().await);
        }
        states
    }

    pub async fn events(&self) -> Response {
        let response =
            self.request(Method::GET, "/v1/events", Value::Null, Some(&self.admin)).await;
        assert_eq!(response.status(), StatusCode::OK);
        response
    }
}

/// The next piece of an event stream.
pub async fn next_event(events: &mut Response) -> String {
    let piece = tokio::time::timeout(PATIENCE, events.chunk()).await.expect("an event in time");
    String::from_utf8(piece.unwrap().expect("the stream goes on").to_vec()).unwrap()
}

pub fn client_with_ca(ca_pem: &str) -> Client {
    let config = slmops_hub::tls::client_config(ca_pem).unwrap();
    Client::builder().use_preconfigured_tls(config).build().unwrap()
}

/// The certificate of an authority that has nothing to do with the hub.
pub fn other_ca() -> String {
    let folder = tempfile::tempdir().unwrap();
    slmops_hub::tls::Tls::open(folder.path(), &[]).unwrap().ca_pem().to_owned()
}

fn facts(budget_mib: u64) -> DeviceFacts {
    DeviceFacts {
        hostname: "test".to_owned(),
        arch: "x86_64".to_owned(),
        kernel: "Linux 6.1".to_owned(),
        cpu: "test".to_owned(),
        cpu_features: vec!["avx2".to_owned()],
        cores: 2,
        memory_bytes: 8 << 30,
        memory_budget_bytes: budget_mib << 20,
        disk_free_bytes: 8 << 30,
        agent_version: "0.1.0".to_owned(),
        engine: "test".to_owned(),
        endpoint: None,
        time_zone: None,
        metered: false,
        shares_at: None,
        obeys: slmops_api::rules::DeviceRules::ALL.map(str::to_owned).to_vec(),
    }
}

fn installed(model: &DesiredModel) -> InstalledModel {
    InstalledModel {
        model: model.model.clone(),
        version: model.version.clone(),
        variant: model.variant.clone(),
        manifest: model.manifest,
        weights: model.weights,
    }
}

/// A device that does what the test says.
pub struct FakeDevice {
    pub id: String,
    pub token: String,
    pub sequence: u64,
    running: Option<InstalledModel>,
    /// The generation that it last confirmed by [`FakeDevice::try_confirm`].
    confirmed: u64,
    rejected: Vec<Rejection>,
    facts: DeviceFacts,
    desired: Option<DesiredState>,
    key: PrivateKey,
    client: Client,
    url: String,
}

impl FakeDevice {
    async fn ask_token(&self) -> (StatusCode, Value) {
        let ask = |path: &str, body: Value| {
            self.client.post(format!("{}{path}", self.url)).json(&body).send()
        };
        let challenge: Value = ask("/v1/device/challenge", json!({ "device": self.id }))
            .await
            .unwrap()
            .json()
            .await
            .unwrap();
        let challenge = challenge["challenge"].as_str().unwrap();
        let message = format!("{TOKEN_CONTEXT}\n{}\n{challenge}", self.id);
        let signature = STANDARD.encode(self.key.sign(message.as_bytes()));
        let body = json!({ "device": self.id, "challenge": challenge, "signature": signature });
        let response = ask("/v1/device/token", body).await.unwrap();
        (response.status(), response.json().await.unwrap())
    }

    pub async fn try_token(&self) -> StatusCode {
        self.ask_token().await.0
    }

    pub async fn poll(&self, etag: Option<&str>, wait_s: u64) -> Response {
        let url = format!("{}/v1/device/desired?wait_s={wait_s}", self.url);
        let mut request = self.client.get(url).bearer_auth(&self.token);
        if let Some(etag) = etag {
            request = request.header("if-none-match", etag);
        }
        request.send().await.unwrap()
    }

    pub async fn desired(&self) -> DesiredState {
        let response = self.poll(None, 0).await;
        assert_eq!(response.status(), StatusCode::OK);
        response.json().await.unwrap()
    }

    pub async fn wait_for_generation(&self, generation: u64) -> DesiredState {
        let started = std::time::Instant::now();
        let mut desired = self.desired().await;
        while desired.generation < generation {
            assert!(started.elapsed() < PATIENCE, "still {desired:?}");
            let response = self.poll(Some(&format!("\"g{}\"", desired.generation)), 5).await;
            if response.status() == StatusCode::OK {
                desired = response.json().await.unwrap();
            }
        }
        desired
    }

    /// Speaks to another hub from now on.
    pub fn move_to(&mut self, rig: &Rig) {
        self.speak_to(&rig.url);
    }

    /// Speaks to the hub at this address from now on.
    pub fn speak_to(&mut self, url: &str) {
        url.clone_into(&mut self.url);
    }

    /// Learns what it should be, waiting for something newer for `wait_s`; whether the hub answered.
    pub async fn try_learn(&mut self, wait_s: u64) -> bool {
        let url = format!("{}/v1/device/desired?wait_s={wait_s}", self.url);
        // A hub that is frozen holds on to whoever asks.
        let patience = Duration::from_secs(wait_s + 3);
        let mut request = self.client.get(url).bearer_auth(&self.token).timeout(patience);
        if let Some(desired) = &self.desired {
            request = request.header("if-none-match", format!("\"g{}\"", desired.generation));
        }
        let Ok(response) = request.send().await else { return false };
        match response.status() {
            StatusCode::OK => match response.json().await {
                Ok(desired) => self.desired = Some(desired),
                Err(_) => return false,
            },
            status => return status == StatusCode::NOT_MODIFIED,
        }
        true
    }

    /// Becomes what it should be and reports so, unless it has; whether the hub knows now.
    pub async fn try_confirm(&mut self) -> bool {
        let Some(desired) = &self.desired else { return true };
        if self.confirmed == desired.generation {
            return true;
        }
        self.running = desired.model.as_ref().map(installed);
        let report = self.full_report(Phase::Confirmed);
        let url = format!("{}/v1/device/report", self.url);
        let request = self.client.post(url).bearer_auth(&self.token).json(&report);
        let sent = request.timeout(Duration::from_secs(5)).send().await;
        if !sent.is_ok_and(|response| response.status() == StatusCode::NO_CONTENT) {
            return false;
        }
        self.sequence += 1;
        self.confirmed = self.generation();
        true
    }

    /// Learns what it should be, and tells nobody.
    pub async fn learn(&mut self) {
        self.desired = Some(self.desired().await);
    }

    /// The generation that it learned last.
    pub fn generation(&self) -> u64 {
        self.desired.as_ref().map_or(1, |desired| desired.generation)
    }

    /// Whether it can have this blob.
    pub async fn pull(&self, blob: &Digest) -> StatusCode {
        let url = format!("{}/v2/m/blobs/{blob}", self.url);
        let response = self.client.get(url).bearer_auth(&self.token).send().await.unwrap();
        let status = response.status();
        if status == StatusCode::OK {
            assert_eq!(Digest::of(&response.bytes().await.unwrap()), *blob);
        }
        status
    }

    pub fn full_report(&self, phase: Phase) -> DeviceReport {
        DeviceReport {
            sequence: self.sequence + 1,
            generation: self.generation(),
            phase,
            running: self.running.clone(),
            previous: None,
            rejected: self.rejected.clone(),
            probes: vec![],
            effective: None,
            telemetry: Telemetry::default(),
            evidence: None,
            facts: self.facts.clone(),
        }
    }

    /// What there is to get a model file from.
    pub async fn sources(&self, weights: Digest) -> Sources {
        let url = format!("{}/v1/device/sources?weights={weights}", self.url);
        let response = self.client.get(url).bearer_auth(&self.token).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.json().await.unwrap()
    }

    pub async fn send(&self, report: &impl Serialize) -> StatusCode {
        let url = format!("{}/v1/device/report", self.url);
        let request = self.client.post(url).bearer_auth(&self.token).json(report);
        request.send().await.unwrap().status()
    }

    /// Learns what it should be, and reports that it is this far with it.
    pub async fn report(&mut self, phase: Phase) {
        let desired = self.desired().await;
        if let Some(model) = &desired.model {
            match &phase {
                Phase::Confirmed => {
                    self.running = Some(installed(model));
                }
                Phase::RolledBack { failure } => self.rejected.push(Rejection {
                    manifest: model.manifest,
                    generation: desired.generation,
                    failure: failure.clone(),
                }),
                _ => {}
            }
        }
        self.desired = Some(desired);
        let report = self.full_report(phase);
        assert_eq!(self.send(&report).await, StatusCode::NO_CONTENT);
        self.sequence += 1;
    }
}
