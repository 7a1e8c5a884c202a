//! A hub for one device, in this process, that can misbehave on purpose.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use slmops_api::delta::{Delta, Sources};
use slmops_api::device::{
    Challenge, ChallengeRequest, DesiredModel, DesiredState, DeviceReport, DeviceToken,
    DeviceTokenRequest, EnrolRequest, EnrolResponse, InvitationText, Phase, PublisherKey,
    TOKEN_CONTEXT,
};
use slmops_api::probe::{Expectation, PROBES_FILE, Probe, ProbeSet};
use slmops_api::rules::DeviceRules;
use slmops_api::runtime::RuntimeConfig;
use slmops_artifact::Digest;
use slmops_artifact::package::{
    ADAPTER_FILE, Descriptor, EMPTY_CONFIG, MANIFEST_MEDIA_TYPE, MODEL_FILE, ModelConfig, Package,
    PackageFile, signature_manifest,
};
use slmops_artifact::signing::{self, BUNDLE_MEDIA_TYPE, PrivateKey, PublicKey};
use tokio::sync::watch;

pub const DEVICE: &str = "device-1";
const SECRET: &str = "0123456789abcdef";

/// How the hub misbehaves.
#[derive(Default)]
pub struct Faults {
    /// Every call is answered 503 with this `Retry-After`.
    pub unavailable: Option<u64>,
    /// So many blob answers end after this many bytes.
    pub cut: Vec<usize>,
    /// So many blob answers carry a flipped bit.
    pub flips: u32,
    /// Blobs that it claims not to have.
    pub missing: BTreeSet<Digest>,
    /// So many calls are answered 401 although the token is good.
    pub unauthorised: u32,
    /// Range requests are answered as if there were none.
    pub ignore_ranges: bool,
    /// Bytes of blobs per piece, with a pause of a millisecond between two.
    pub slow: Option<usize>,
}

pub struct World {
    pub desired: DesiredState,
    pub reports: Vec<DeviceReport>,
    pub faults: Faults,
    pub enrolled: Option<PublicKey>,
    pub trusted: Vec<PublisherKey>,
    /// What there is to get a model from, by the digest of its weights.
    pub sources: BTreeMap<Digest, Sources>,
    /// Where answers with blobs began, in order.
    pub starts: Vec<(Digest, u64)>,
    /// Bytes of blob answers by digest.
    pub blob_bytes: BTreeMap<Digest, u64>,
    /// Bytes of blob answers, per request: `(offset, sent)`.
    pub blob_requests: Vec<(u64, u64)>,
    documents: BTreeMap<String, Bytes>,
    blobs: BTreeMap<Digest, Bytes>,
    tokens: BTreeSet<String>,
    counter: u64,
}

impl World {
    /// The bytes of a blob.
    pub fn blob(&self, digest: Digest) -> Bytes {
        self.blobs[&digest].clone()
    }
}

pub struct FakeHub {
    pub world: Arc<Mutex<World>>,
    pub changed: watch::Sender<u64>,
    pub address: SocketAddr,
    pub publisher: PrivateKey,
    server: tokio::task::JoinHandle<()>,
}

#[derive(Clone)]
struct App {
    world: Arc<Mutex<World>>,
    changed: watch::Sender<u64>,
}

pub fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap()
}

/// What a hub knows of a publisher's key that nobody vouches for.
pub fn public(key: &PrivateKey) -> PublisherKey {
    PublisherKey {
        id: key.public().id().parse().unwrap(),
        name: "publisher".to_owned(),
        public_key: key.public().to_pem().to_owned(),
        expires_at: None,
        endorsement: None,
    }
}

pub fn runtime() -> RuntimeConfig {
    RuntimeConfig {
        context_tokens: 128,
        parallel: 1,
        threads: 1,
        batch_tokens: 128,
        ..RuntimeConfig::default()
    }
}

impl FakeHub {
    pub async fn start() -> Self {
        let publisher = PrivateKey::generate();
        let trusted = vec![public(&publisher)];
        let world = World {
            desired: DesiredState {
                generation: 1,
                model: None,
                runtime: runtime(),
                confirm_timeout_s: 60,
                reason: "nothing is released yet".to_owned(),
                rules: DeviceRules::default(),
            },
            reports: Vec::new(),
            faults: Faults::default(),
            enrolled: None,
            trusted,
            sources: BTreeMap::new(),
            starts: Vec::new(),
            blob_bytes: BTreeMap::new(),
            blob_requests: Vec::new(),
            documents: BTreeMap::new(),
            blobs: BTreeMap::new(),
            tokens: BTreeSet::new(),
            counter: 0,
        };
        let world = Arc::new(Mutex::new(world));
        let changed = watch::Sender::new(0);
        let (server, address) = serve(&world, &changed, "127.0.0.1:0".parse().unwrap()).await;
        Self { world, changed, address, publisher, server }
    }

    /// The hub is gone: nothing listens.
    pub async fn vanish(&mut self) {
        self.server.abort();
        let _ = (&mut self.server).await;
        // Ends answers that are held open.
        self.changed.send_modify(|count| *count += 1);
    }

    /// It comes back where it was.
    pub async fn come_back(&mut self) {
        (self.server, _) = serve(&self.world, &self.changed, self.address).await;
    }

    pub fn lock(&self) -> MutexGuard<'_, World> {
        lock(&self.world)
    }

    pub fn invitation(&self) -> String {
        let text = InvitationText {
            url: format!("http://{}", self.address),
            ca: Digest::of(b"no TLS here"),
            id: "inv-1".parse().unwrap(),
            secret: SECRET.to_owned(),
        };
        format!("slmi1.{}", URL_SAFE_NO_PAD.encode(serde_json::to_vec(&text).unwrap()))
    }

    /// Puts a signed package into the registry.
    pub fn publish(&self, release: &Release) -> DesiredModel {
        let probes = serde_json::to_vec(&release.probes).unwrap();
        let size_bytes = release.claimed_bytes.unwrap_or(release.weights.len() as u64);
        let model = PackageFile::new(MODEL_FILE, Digest::of(&release.weights), size_bytes);
        let weights = model.digest;
        let mut files = vec![model, PackageFile::of_bytes(PROBES_FILE, &probes)];
        let adapter = release.adapter.as_deref();
        files.extend(adapter.map(|bytes| PackageFile::of_bytes(ADAPTER_FILE, bytes)));
        let version = release.version.parse().unwrap();
        let config = ModelConfig {
            name: "glass".to_owned(),
            version: Some(version),
            ..ModelConfig::default()
        };
        let package = Package::new(files, &config).unwrap();
        let manifest = package.manifest_bytes();
        let subject = Descriptor::of_bytes(MANIFEST_MEDIA_TYPE, &manifest);
        let stranger = PrivateKey::generate();
        let key = if release.stranger { &stranger } else { &self.publisher };
        let mut signed = package.signed_files();
        if release.tampered {
            signed[0].1 = Digest::of(b"what was really signed");
        }
        let bundle = signing::sign("glass", &signed, key).unwrap();
        let signature = signature_manifest(&subject, Digest::of(&bundle), bundle.len() as u64);
        let signature_digest = Digest::of(&signature);
        let referrers = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": if release.unsigned { vec![] } else { vec![serde_json::json!({
                "mediaType": MANIFEST_MEDIA_TYPE,
                "digest": signature_digest,
                "size": signature.len(),
                "artifactType": BUNDLE_MEDIA_TYPE,
            })] },
        });
        let mut world = self.lock();
        let blobs = [release.weights.clone(), probes, bundle, EMPTY_CONFIG.to_vec()];
        for bytes in blobs.into_iter().chain(release.adapter.clone()) {
            world.blobs.insert(Digest::of(&bytes), bytes.into());
        }
        let documents = [
            (format!("manifests/{}", subject.digest), manifest),
            (format!("manifests/{signature_digest}"), signature),
            (format!("referrers/{}", subject.digest), serde_json::to_vec(&referrers).unwrap()),
        ];
        let documents = documents.map(|(path, bytes)| (path, Bytes::from(bytes)));
        world.documents.extend(documents);
        DesiredModel {
            model: "glass".parse().unwrap(),
            version: release.version.parse().unwrap(),
            variant: "f32".parse().unwrap(),
            manifest: subject.digest,
            weights,
            size_bytes,
            predicted_memory_bytes: 50_000_000,
        }
    }

    /// Puts a delta between two releases into the registry and offers it.
    pub fn offer(&self, from: &Release, to: &Release) -> Delta {
        let bytes = slmops_delta::encode(&from.weights, &to.weights, 1, &|_| {}).bytes;
        let header = slmops_delta::Header::parse(&bytes).unwrap();
        let delta = Delta {
            from: header.from,
            to: header.to,
            to_bytes: header.to_bytes,
            blob: Digest::of(&bytes),
            bytes: bytes.len() as u64,
            header_bytes: header.header_bytes(),
        };
        let mut world = self.lock();
        world.blobs.insert(delta.blob, bytes.into());
        world.sources.entry(delta.to).or_default().deltas.push(delta.clone());
        delta
    }

    /// Flips a bit of a blob where it is kept.
    pub fn flip(&self, blob: Digest, at: u64) {
        let mut world = self.lock();
        let mut bytes = world.blobs[&blob].to_vec();
        bytes[at as usize] ^= 1;
        world.blobs.insert(blob, bytes.into());
    }

    /// Publishes a release and makes it the desired state.
    pub fn ship(&self, release: &Release) -> u64 {
        let model = self.publish(release);
        self.want(Some(model), runtime())
    }

    /// The same under rules.
    pub fn ship_under(&self, release: &Release, rules: DeviceRules) -> u64 {
        let model = self.publish(release);
        self.want_under(Some(model), runtime(), rules)
    }

    pub fn want(&self, model: Option<DesiredModel>, runtime: RuntimeConfig) -> u64 {
        self.want_under(model, runtime, DeviceRules::default())
    }

    fn want_under(
        &self,
        model: Option<DesiredModel>,
        runtime: RuntimeConfig,
        rules: DeviceRules,
    ) -> u64 {
        let generation = {
            let mut world = self.lock();
            let generation = world.desired.generation + 1;
            world.desired = DesiredState {
                generation,
                model,
                runtime,
                confirm_timeout_s: 60,
                reason: "the release fits".to_owned(),
                rules,
            };
            generation
        };
        self.changed.send_modify(|count| *count += 1);
        generation
    }

    /// Says the same under other rules.
    pub fn rules(&self, rules: DeviceRules) -> u64 {
        let generation = {
            let mut world = self.lock();
            world.desired.generation += 1;
            world.desired.rules = rules;
            world.desired.generation
        };
        self.changed.send_modify(|count| *count += 1);
        generation
    }

    /// Waits for a report that satisfies `wanted`.
    pub async fn report(
        &self,
        what: &str,
        mut wanted: impl FnMut(&DeviceReport) -> bool,
    ) -> DeviceReport {
        let mut changed = self.changed.subscribe();
        let mut seen = 0;
        let wait = async {
            loop {
                {
                    let world = self.lock();
                    if let Some(found) = world.reports[seen..].iter().find(|r| wanted(r)) {
                        return found.clone();
                    }
                    seen = world.reports.len();
                }
                changed.changed().await.unwrap();
            }
        };
        match tokio::time::timeout(Duration::from_secs(60), wait).await {
            Ok(report) => report,
            Err(_) => {
                let world = self.lock();
                let last: Vec<_> = world.reports.iter().rev().take(5).collect();
                panic!("no report with {what}; the last ones: {last:#?}");
            }
        }
    }

    pub async fn confirmed(&self, generation: u64) -> DeviceReport {
        self.report(&format!("generation {generation} confirmed"), |report| {
            report.generation == generation && report.phase == Phase::Confirmed
        })
        .await
    }

    pub async fn rolled_back(&self, generation: u64) -> DeviceReport {
        self.report(&format!("generation {generation} rolled back"), |report| {
            report.generation == generation && matches!(report.phase, Phase::RolledBack { .. })
        })
        .await
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// A package in the making.
pub struct Release {
    pub version: &'static str,
    pub weights: Vec<u8>,
    /// A LoRA adapter of the weights.
    pub adapter: Option<Vec<u8>>,
    pub probes: ProbeSet,
    /// Signed by a key that nobody trusts.
    pub stranger: bool,
    /// The signature is over other files.
    pub tampered: bool,
    pub unsigned: bool,
    /// The size that the manifest gives the weights, where it lies.
    pub claimed_bytes: Option<u64>,
}

impl Release {
    /// The tiny real model, healthy.
    pub fn good(version: &'static str) -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/glasslm/glass-f32.gguf");
        let mut weights = std::fs::read(path).unwrap();
        // The lowest bits of the last weights: other bytes, the same model to any probe.
        let end = weights.len();
        for (index, digit) in version.bytes().enumerate() {
            weights[end - 4 * (index + 1)] = digit;
        }
        let probe = Probe {
            name: "golden-01".to_owned(),
            prompt: "Alice was beginning to".to_owned(),
            raw: true,
            expect: Expectation::LogProbability {
                continuation: " get very tired".to_owned(),
                measured: -1.0,
                floor: -20.0,
            },
        };
        Self {
            version,
            weights,
            adapter: None,
            probes: ProbeSet { version: 1, probes: vec![probe], replay: vec![] },
            stranger: false,
            tampered: false,
            unsigned: false,
            claimed_bytes: None,
        }
    }

    /// The weights of another release with an adapter on them.
    pub fn adapted(base: &Self, version: &'static str) -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/glasslm/adapter.gguf");
        let (weights, adapter) = (base.weights.clone(), Some(std::fs::read(path).unwrap()));
        Self { weights, adapter, ..Self::good(version) }
    }

    /// As after training a little more: every weight has moved, but not far.
    pub fn drifted(version: &'static str) -> Self {
        let mut release = Self::good(version);
        let data = release.weights.len() / 10;
        let mut state = Digest::of(version.as_bytes()).as_bytes()[0] as u32;
        for weight in release.weights[data..].chunks_exact_mut(4) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            weight[0] ^= (state >> 24) as u8;
        }
        release
    }

    /// Loads and talks, but asks more of itself than it can.
    pub fn failing(version: &'static str) -> Self {
        let mut release = Self::good(version);
        if let Expectation::LogProbability { floor, .. } = &mut release.probes.probes[0].expect {
            *floor = 1.0;
        }
        release
    }

    pub fn truncated(version: &'static str) -> Self {
        let mut release = Self::good(version);
        release.weights.truncate(release.weights.len() / 2);
        release
    }
}

async fn serve(
    world: &Arc<Mutex<World>>,
    changed: &watch::Sender<u64>,
    address: SocketAddr,
) -> (tokio::task::JoinHandle<()>, SocketAddr) {
    let app = App { world: Arc::clone(world), changed: changed.clone() };
    let router = Router::new()
        .route("/v1/enrol", post(enrol))
        .route("/v1/keys", get(keys))
        .route("/v1/device/challenge", post(challenge))
        .route("/v1/device/token", post(token))
        .route("/v1/device/desired", get(desired))
        .route("/v1/device/report", post(report))
        .route("/v1/device/sources", get(sources))
        .route("/v2/{name}/manifests/{reference}", get(manifest))
        .route("/v2/{name}/referrers/{reference}", get(referrers))
        .route("/v2/{name}/blobs/{digest}", get(blob))
        .layer(axum::middleware::from_fn_with_state(app.clone(), misbehave))
        .with_state(app);
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    let listener = socket.listen(64).unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (server, address)
}

async fn misbehave(
    State(app): State<App>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let unavailable = lock(&app.world).faults.unavailable;
    if let Some(seconds) = unavailable {
        let headers = [(header::RETRY_AFTER, seconds.to_string())];
        return (StatusCode::SERVICE_UNAVAILABLE, headers).into_response();
    }
    let path = request.uri().path();
    let open = ["/v1/enrol", "/v1/device/challenge", "/v1/device/token"];
    if !open.contains(&path) {
        let bearer = request.headers().get(header::AUTHORIZATION);
        let token = bearer.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let mut world = lock(&app.world);
        let known = token.is_some_and(|token| world.tokens.contains(token));
        if !known || world.faults.unauthorised > 0 {
            world.faults.unauthorised = world.faults.unauthorised.saturating_sub(1);
            world.tokens.clear();
            return StatusCode::UNAUTHORIZED.into_response();
        }
    }
    next.run(request).await
}

async fn keys(State(app): State<App>) -> Response {
    Json(serde_json::json!({ "items": lock(&app.world).trusted })).into_response()
}

async fn enrol(State(app): State<App>, Json(asked): Json<EnrolRequest>) -> Response {
    let mut world = lock(&app.world);
    let key = PublicKey::from_pem(&asked.public_key).unwrap();
    let same = world.enrolled.as_ref().is_none_or(|known| known.to_pem() == key.to_pem());
    if asked.secret != SECRET || !same {
        let problem = serde_json::json!({
            "type": "urn:slmops:invitation-used", "title": "invitation used", "status": 403,
            "detail": "invitation inv-1 was used already", "hint": "ask for a new invitation",
        });
        return (StatusCode::FORBIDDEN, Json(problem)).into_response();
    }
    world.enrolled = Some(key);
    let publisher_keys = world.trusted.clone();
    Json(EnrolResponse { device: DEVICE.parse().unwrap(), publisher_keys }).into_response()
}

async fn challenge(State(app): State<App>, Json(_): Json<ChallengeRequest>) -> Json<Challenge> {
    let mut world = lock(&app.world);
    world.counter += 1;
    Json(Challenge { challenge: format!("challenge-{}", world.counter) })
}

async fn token(State(app): State<App>, Json(asked): Json<DeviceTokenRequest>) -> Response {
    let mut world = lock(&app.world);
    let text = format!("{TOKEN_CONTEXT}\n{}\n{}", asked.device, asked.challenge);
    let signature = STANDARD.decode(&asked.signature).unwrap();
    let good = asked.challenge == format!("challenge-{}", world.counter)
        && world.enrolled.as_ref().is_some_and(|key| key.accepts(text.as_bytes(), &signature));
    if !good {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let token = format!("token-{}", world.counter);
    world.tokens.insert(token.clone());
    Json(DeviceToken { token, expires_in_s: 600 }).into_response()
}

async fn desired(
    State(app): State<App>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    let wait_s: u64 = query.get("wait_s").and_then(|wait| wait.parse().ok()).unwrap_or(0);
    let mut changed = app.changed.subscribe();
    let now = || {
        let world = lock(&app.world);
        (world.desired.clone(), format!("\"{}\"", world.desired.generation))
    };
    let (mut desired, mut etag) = now();
    let news = async {
        while known == Some(etag.as_str()) {
            if changed.changed().await.is_err() {
                return;
            }
            (desired, etag) = now();
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(wait_s), news).await;
    if known == Some(etag.as_str()) {
        return StatusCode::NOT_MODIFIED.into_response();
    }
    ([(header::ETAG, etag)], Json(desired)).into_response()
}

async fn report(State(app): State<App>, Json(report): Json<DeviceReport>) -> StatusCode {
    lock(&app.world).reports.push(report);
    app.changed.send_modify(|count| *count += 1);
    StatusCode::NO_CONTENT
}

async fn sources(
    State(app): State<App>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Json<Sources> {
    let mut world = lock(&app.world);
    let weights: Digest = query["weights"].parse().unwrap();
    let sources = world.sources.entry(weights).or_default();
    let answer = sources.clone();
    // Whoever was told to wait gets it the next time.
    sources.wait_s = None;
    Json(answer)
}

async fn manifest(
    State(app): State<App>,
    Path((_, reference)): Path<(String, String)>,
) -> Response {
    document(&app, &format!("manifests/{reference}"))
}

async fn referrers(
    State(app): State<App>,
    Path((_, reference)): Path<(String, String)>,
) -> Response {
    document(&app, &format!("referrers/{reference}"))
}

fn document(app: &App, path: &str) -> Response {
    match lock(&app.world).documents.get(path) {
        Some(bytes) => bytes.clone().into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn blob(
    State(app): State<App>,
    Path((_, digest)): Path<(String, Digest)>,
    headers: HeaderMap,
) -> Response {
    let mut world = lock(&app.world);
    let Some(mut bytes) =
        world.blobs.get(&digest).filter(|_| !world.faults.missing.contains(&digest)).cloned()
    else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let whole = bytes.len();
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    let start = range
        .filter(|_| !world.faults.ignore_ranges)
        .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let last = start.and_then(|(_, last)| last.parse::<usize>().ok());
    let start = start.and_then(|(start, _)| start.parse().ok());
    if let Some(start) = start {
        if start >= whole {
            return StatusCode::RANGE_NOT_SATISFIABLE.into_response();
        }
        bytes = bytes.slice(start..last.map_or(whole, |last| whole.min(last + 1)));
    }
    if world.faults.flips > 0 {
        world.faults.flips -= 1;
        let mut flipped = bytes.to_vec();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        bytes = flipped.into();
    }
    let length = bytes.len();
    let cut = (bytes.len() > 10_000).then(|| world.faults.cut.pop()).flatten();
    let sent = cut.map_or(length, |cut| cut.min(length));
    world.blob_requests.push((start.unwrap_or(0) as u64, sent as u64));
    world.starts.push((digest, start.unwrap_or(0) as u64));
    *world.blob_bytes.entry(digest).or_default() += sent as u64;
    let piece = world.faults.slow.unwrap_or(256 << 10);
    let slow = world.faults.slow.is_some();
    drop(world);
    let pieces: Vec<Bytes> =
        bytes.slice(..sent).chunks(piece).map(Bytes::copy_from_slice).collect();
    let ends: Vec<Result<Bytes, std::io::Error>> =
        if sent < length { vec![Err(std::io::Error::other("cut"))] } else { Vec::new() };
    let stream = futures_util::StreamExt::then(
        futures_util::stream::iter(pieces.into_iter().map(Ok).chain(ends)),
        move |piece| async move {
            if slow {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            piece
        },
    );
    let mut response = Response::builder().header(header::CONTENT_LENGTH, length);
    if let Some(start) = start {
        response = response
            .status(StatusCode::PARTIAL_CONTENT)
            .header(header::CONTENT_RANGE, format!("bytes {start}-{}/{whole}", start + length - 1));
    }
    response.body(Body::from_stream(stream)).unwrap()
}
