//! A real hub with devices that are played by the test: they join, sign challenges, ask what they
//! should be and report, over HTTP as real ones do. Only their models are a few bytes long.

use reqwest::{Client, Method};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use slmops_api::device::{
    Challenge, DesiredState, DeviceFacts, DeviceReport, DeviceToken, EnrolResponse, Failure,
    InstalledModel, Invitation, InvitationText, Phase, Rejection, TOKEN_CONTEXT, Telemetry,
};
use slmops_api::model::{NewRelease, Release};
use slmops_api::probe::ProbeResult;
use slmops_api::rollout::Rollout;
use slmops_api::runtime::EffectiveConfig;
use slmops_artifact::Digest;
use slmops_artifact::package::{
    self, Descriptor, EMPTY_CONFIG, MANIFEST_MEDIA_TYPE, MODEL_FILE, ModelConfig, Package,
    PackageFile,
};
use slmops_artifact::signing::{self, PrivateKey};
use slmops_hub::{Hub, HubConfig, RunningHub};

/// A hub on a folder of its own, and a client with its administrator's token.
pub struct RealHub {
    pub url: String,
    pub token: String,
    client: Client,
    publisher: PrivateKey,
    hub: RunningHub,
    _folder: tempfile::TempDir,
}

/// A device that the test plays.
pub struct Played {
    pub name: &'static str,
    facts: DeviceFacts,
    token: String,
    sequence: u64,
    running: Option<InstalledModel>,
    rejected: Vec<Rejection>,
}

impl RealHub {
    /// Starts a hub with a registered publisher key.
    pub async fn start() -> Self {
        // The process-wide default may be set already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().expect("a folder");
        let config = HubConfig {
            database: None,
            blobs: None,
            data_dir: folder.path().join("hub"),
            listen: None,
            http: Some("127.0.0.1:0".parse().expect("an address")),
            names: Vec::new(),
            public_url: None,
            keep: Default::default(),
            encode: slmops_hub::deltas::encode_on_thread,
        };
        let hub = Hub::start(config).await.expect("the hub starts");
        let url = format!("http://{}", hub.http.expect("plain HTTP on loopback"));
        let token = hub.admin_token().expect("the administrator's token");
        let client = Client::builder().build().expect("a client");
        let publisher = PrivateKey::generate();
        let it = Self { url, token, client, publisher, hub, _folder: folder };
        let public = it.publisher.public();
        let key =
            json!({ "id": public.id(), "name": "browser test", "public_key": public.to_pem() });
        it.post::<Value>("/v1/keys", &key).await;
        it
    }

    /// Stops the hub and waits until it has.
    pub async fn stop(self) {
        self.hub.stop().await;
    }

    async fn call(&self, method: Method, path: &str, token: &str, body: Option<Value>) -> Value {
        let request = self.client.request(method, format!("{}{path}", self.url)).bearer_auth(token);
        let request = match body {
            Some(body) => request.json(&body),
            None => request,
        };
        let response = request.send().await.expect("the hub answers");
        let (status, text) = (response.status(), response.text().await.expect("text"));
        assert!(status.is_success(), "{path}: {status}: {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    /// `POST path` as the administrator.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> T {
        let body = serde_json::to_value(body).expect("JSON");
        let answer = self.call(Method::POST, path, &self.token, Some(body)).await;
        serde_json::from_value(answer).expect("the wire type")
    }

    /// `GET path` as the administrator.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        let answer = self.call(Method::GET, path, &self.token, None).await;
        serde_json::from_value(answer).expect("the wire type")
    }

    /// Invites and enrols a device with this memory budget.
    pub async fn join(&self, name: &'static str, budget_bytes: u64) -> Played {
        let invitation: Invitation =
            self.post("/v1/invitations", &json!({ "site": "berlin-3" })).await;
        let encoded = invitation.text.strip_prefix("slmi1.").expect("an invitation");
        let text = base64::Engine::decode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, encoded);
        let text: InvitationText = serde_json::from_slice(&text.expect("base64")).expect("JSON");
        let key = PrivateKey::generate();
        let facts = DeviceFacts {
            hostname: name.to_owned(),
            arch: "x86_64".to_owned(),
            kernel: "Linux 6.1".to_owned(),
            cpu: "Test CPU".to_owned(),
            cpu_features: vec!["avx2".to_owned()],
            cores: 4,
            memory_bytes: 8_000_000_000,
            memory_budget_bytes: budget_bytes,
            disk_free_bytes: 10_000_000_000,
            agent_version: "0.1.0".to_owned(),
            engine: "llama.cpp test".to_owned(),
            endpoint: None,
            time_zone: None,
            metered: false,
            shares_at: None,
            obeys: slmops_api::rules::DeviceRules::ALL.map(str::to_owned).to_vec(),
        };
        let enrolled: EnrolResponse = self
            .post(
                "/v1/enrol",
                &json!({
                    "invitation": text.id, "secret": text.secret, "name": name, "facts": facts,
                    "public_key": key.public().to_pem(),
                }),
            )
            .await;
        let id = enrolled.device;
        let Challenge { challenge } =
            self.post("/v1/device/challenge", &json!({ "device": id })).await;
        let signature = key.sign(format!("{TOKEN_CONTEXT}\n{id}\n{challenge}").as_bytes());
        let signature = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, signature);
        let proof = json!({ "device": id, "challenge": challenge, "signature": signature });
        let DeviceToken { token, .. } = self.post("/v1/device/token", &proof).await;
        Played { name, facts, token, sequence: 0, running: None, rejected: Vec::new() }
    }

    /// Pushes, signs and registers a release whose one variant looks like that of `like`.
    pub async fn release(&self, like: &Release) -> Release {
        let NewRelease { model, version, .. } = &like.release;
        let mut release = like.release.clone();
        release.key = self.publisher.public().id().parse().expect("a key id");
        release.variants.truncate(1);
        for variant in &mut release.variants {
            let weights = format!("the weights of {model} {version} {}", variant.name);
            let file = PackageFile::of_bytes(MODEL_FILE, weights.as_bytes());
            let config = ModelConfig {
                name: model.to_string(),
                version: Some(version.clone()),
                ..ModelConfig::default()
            };
            let package = Package::new(vec![file], &config).expect("a package");
            let manifest = package.manifest_bytes();
            self.push_blob(model.as_str(), weights.as_bytes()).await;
            self.push_blob(model.as_str(), package.config_bytes().expect("a config")).await;
            self.push_manifest(model.as_str(), &manifest).await;
            let bundle = signing::sign(model.as_str(), &package.signed_files(), &self.publisher);
            let bundle = bundle.expect("a signature");
            self.push_blob(model.as_str(), EMPTY_CONFIG).await;
            self.push_blob(model.as_str(), &bundle).await;
            let subject = Descriptor::of_bytes(MANIFEST_MEDIA_TYPE, &manifest);
            let signature =
                package::signature_manifest(&subject, Digest::of(&bundle), bundle.len() as u64);
            self.push_manifest(model.as_str(), &signature).await;
            variant.manifest = Digest::of(&manifest);
            variant.weights = package.weights().digest;
            variant.size_bytes = package.weights().size_bytes;
            variant.report.subject = variant.weights;
            variant.report.reference = release.original;
        }
        self.post("/v1/releases", &release).await
    }

    async fn push_blob(&self, repository: &str, bytes: &[u8]) {
        let (url, digest) = (&self.url, Digest::of(bytes));
        let begun = self
            .client
            .post(format!("{url}/v2/{repository}/blobs/uploads/"))
            .bearer_auth(&self.token)
            .send()
            .await
            .expect("the registry answers");
        let place = begun.headers()["location"].to_str().expect("a place").to_owned();
        let place = if place.starts_with('/') { format!("{url}{place}") } else { place };
        let joint = if place.contains('?') { '&' } else { '?' };
        self.put(&format!("{place}{joint}digest={digest}"), "application/octet-stream", bytes)
            .await;
    }

    async fn push_manifest(&self, repository: &str, bytes: &[u8]) {
        let digest = Digest::of(bytes);
        let place = format!("{}/v2/{repository}/manifests/{digest}", self.url);
        self.put(&place, MANIFEST_MEDIA_TYPE, bytes).await;
    }

    async fn put(&self, url: &str, media_type: &str, bytes: &[u8]) {
        let request = self.client.put(url).bearer_auth(&self.token);
        let request = request.header("content-type", media_type).body(bytes.to_vec());
        let response = request.send().await.expect("the registry answers");
        let (status, text) = (response.status(), response.text().await.unwrap_or_default());
        assert!(status.is_success(), "PUT {url}: {status}: {text}");
    }

    /// Starts a rollout of a release to all devices, one canary first.
    pub async fn roll_out(&self, release: &Release) -> Rollout {
        let NewRelease { model, version, .. } = &release.release;
        let policy = json!({
            "selector": "all", "waves": [{ "count": 1 }, "rest"], "confirm_timeout_s": 900,
        });
        let asked = json!({ "model": model, "version": version, "policy": policy });
        self.post("/v1/rollouts", &asked).await
    }

    /// What a device should be now.
    pub async fn desired(&self, device: &Played) -> DesiredState {
        let path = "/v1/device/desired";
        let answer = self.call(Method::GET, path, &device.token, None).await;
        serde_json::from_value(answer).expect("the wire type")
    }

    /// A device's report that it is this far with what it should be.
    pub async fn report(&self, device: &mut Played, desired: &DesiredState, phase: Phase) {
        let model = desired.model.as_ref().map(|it| InstalledModel {
            model: it.model.clone(),
            version: it.version.clone(),
            variant: it.variant.clone(),
            manifest: it.manifest,
            weights: it.weights,
        });
        if phase == Phase::Confirmed {
            device.running = model.clone();
        }
        if let (Phase::RolledBack { failure }, Some(model)) = (&phase, &model) {
            device.rejected.push(Rejection {
                manifest: model.manifest,
                generation: desired.generation,
                failure: failure.clone(),
            });
        }
        device.sequence += 1;
        let runtime = &desired.runtime;
        let report = DeviceReport {
            sequence: device.sequence,
            generation: desired.generation,
            phase,
            running: device.running.clone(),
            previous: None,
            rejected: device.rejected.clone(),
            probes: if device.running.is_some() { probes(true) } else { Vec::new() },
            effective: device.running.as_ref().map(|_| EffectiveConfig {
                context_tokens: runtime.context_tokens,
                parallel: runtime.parallel,
                threads: if runtime.threads == 0 { 4 } else { runtime.threads },
                batch_tokens: runtime.batch_tokens,
                kv_type: runtime.kv_type,
                flash_attention: runtime.flash_attention,
                queue_limit: runtime.queue_limit,
                idle_after_s: runtime.idle_after_s,
                engine: "llama.cpp test".to_owned(),
            }),
            telemetry: Telemetry { tokens_per_s: 31.5, requests: 7, ..Telemetry::default() },
            evidence: None,
            facts: device.facts.clone(),
        };
        let body = serde_json::to_value(&report).expect("JSON");
        self.call(Method::POST, "/v1/device/report", &device.token, Some(body)).await;
    }
}

/// Probe results as a healthy or a damaged model gives them.
pub fn probes(healthy: bool) -> Vec<ProbeResult> {
    (1..=4)
        .map(|number| ProbeResult {
            name: format!("golden-{number:02}"),
            passed: healthy || number == 2,
            value: Some(if healthy || number == 2 { -0.31 } else { -7.25 }),
            floor: -0.62,
            duration_ms: 40,
        })
        .collect()
}

/// The failure of a damaged model.
pub fn damaged() -> Phase {
    Phase::RolledBack { failure: Failure::Probes { results: probes(false) } }
}
