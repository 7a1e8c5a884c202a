//! Talking to the hub: enrolling, tokens, the desired state, reports, and the registry.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use jiff::Timestamp;
use reqwest::header::{ACCEPT, DATE, ETAG, HeaderMap, IF_NONE_MATCH, RANGE, RETRY_AFTER};
use reqwest::{RequestBuilder, Response, StatusCode};
use rustls::time_provider::TimeProvider;
use serde::de::DeserializeOwned;
use slmops_agent_core::{FetchError, MAX_RETRY_AFTER_MS, Obstacle, Offer, Package, Polled};
use slmops_api::delta::{MAX_OFFERED, MAX_PEERS, Sources};
use slmops_api::device::{
    Challenge, ChallengeRequest, DesiredModel, DesiredState, DeviceReport, DeviceToken,
    DeviceTokenRequest, EnrolRequest, EnrolResponse, PublisherKey, WaitCause,
};
use slmops_api::probe::PROBES_FILE;
use slmops_api::problem::Problem;
use slmops_api::{DeviceId, ModelName, Page};
use slmops_artifact::Digest;
use slmops_artifact::package::{
    self, ADAPTER_FILE, MANIFEST_MEDIA_TYPE, MAX_MANIFEST_BYTES, MODEL_FILE,
};
use slmops_artifact::signing::{BUNDLE_MEDIA_TYPE, MAX_BUNDLE_BYTES};

use crate::clock::Clock;
use crate::error::AgentError;
use crate::identity::{DeviceKey, HubUrl};
use crate::outbox::Outbox;
use crate::tls::PinnedAuthority;
use crate::trust::Trust;

/// The longest JSON answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// The longest list of signatures that is read, in bytes.
const MAX_REFERRERS_BYTES: usize = 1 << 20;
/// The most signatures of one package that are looked at.
const MAX_SIGNATURES: usize = 8;
/// The largest `probes.json`, in bytes.
pub const MAX_PROBES_BYTES: u64 = 1 << 20;
/// The longest reason of a desired state that is kept, in bytes.
const MAX_REASON_BYTES: usize = 4 << 10;
/// Milliseconds to connect.
const CONNECT_TIMEOUT_MS: u64 = 10_000;
/// Milliseconds that an answer may pause between two pieces.
const READ_TIMEOUT_MS: u64 = 30_000;

/// Why the hub gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No connection, or it broke.
    #[error("{}", innermost(.0))]
    Connection(#[source] reqwest::Error),
    /// An answer that says no.
    #[error("{status}{}", if detail.is_empty() { String::new() } else { format!(": {detail}") })]
    Status {
        /// The status code.
        status: StatusCode,
        /// The problem's own words.
        detail: String,
        /// The problem's hint.
        hint: Option<String>,
        /// `Retry-After` in milliseconds.
        retry_after_ms: Option<u64>,
    },
    /// An answer that cannot be understood.
    #[error("the answer {0}")]
    Answer(&'static str),
}

/// The last error of the chain says what really happened.
fn innermost(error: &reqwest::Error) -> String {
    let mut inner: &dyn std::error::Error = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

impl HubError {
    /// The core's view: the network is in the way.
    pub fn obstacle(&self) -> Obstacle {
        let retry_after_ms = match self {
            Self::Status { retry_after_ms, .. } => *retry_after_ms,
            _ => None,
        };
        Obstacle { cause: WaitCause::Network, retry_after_ms }
    }

    /// Whether the answer is this status.
    pub fn is(&self, expected: StatusCode) -> bool {
        matches!(self, Self::Status { status, .. } if *status == expected)
    }

    fn fetch(&self) -> FetchError {
        match self.is(StatusCode::NOT_FOUND) {
            true => FetchError::Missing,
            false => FetchError::Obstacle(self.obstacle()),
        }
    }

    /// For a person at the terminal.
    pub fn explain(self, operation: &'static str, url: &HubUrl) -> AgentError {
        let url = url.to_string();
        match self {
            Self::Connection(error) => {
                let cause = innermost(&error);
                let untrusted = cause.contains("certificate") || cause.contains("UnknownIssuer");
                let hint = if untrusted {
                    "the server is not the hub that this device was invited by, or the hub has a new identity; ask for a new invitation"
                } else {
                    "check that the hub runs and that this device can reach its address"
                };
                AgentError::Unreachable { operation, url, cause, hint }
            }
            Self::Status { status, detail, hint, .. } => {
                let detail = if detail.is_empty() { status.to_string() } else { detail };
                let hint = hint.unwrap_or_else(|| "look at the hub's log".to_owned());
                AgentError::Refused { operation, url, detail, hint }
            }
            Self::Answer(what) => AgentError::Refused {
                operation,
                url,
                detail: format!("its answer {what}"),
                hint: "check that hub and agent are of the same version".to_owned(),
            },
        }
    }
}

impl From<reqwest::Error> for HubError {
    fn from(error: reqwest::Error) -> Self {
        Self::Connection(error)
    }
}

/// A connection to the hub, before the device has a name there.
pub struct Hub {
    http: reqwest::Client,
    url: HubUrl,
    outbox: Arc<Outbox>,
}

impl Hub {
    /// A client that trusts the pinned authority alone.
    ///
    /// # Errors
    /// Only if TLS or HTTP cannot be set up at all.
    pub fn new(
        url: HubUrl,
        authority: &Arc<PinnedAuthority>,
        time: Arc<dyn TimeProvider>,
        outbox: Arc<Outbox>,
    ) -> Result<Self, AgentError> {
        let http = reqwest::Client::builder()
            .use_preconfigured_tls(authority.client_config(time)?)
            .user_agent(concat!("slm-agent/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_millis(CONNECT_TIMEOUT_MS))
            .redirect(reqwest::redirect::Policy::none())
            .https_only(url.is_tls())
            .no_proxy()
            .build()
            .map_err(AgentError::Http)?;
        Ok(Self { http, url, outbox })
    }

    /// The hub's address.
    pub fn url(&self) -> &HubUrl {
        &self.url
    }

    /// Joins the fleet.
    ///
    /// # Errors
    /// [`HubError`].
    pub async fn enrol(&self, request: &EnrolRequest) -> Result<EnrolResponse, HubError> {
        // The owner's record shows what was sent, not the secret itself.
        let mut shown = serde_json::to_value(request).unwrap_or_default();
        shown["secret"] = "(hidden)".into();
        self.outbox.sent("POST /v1/enrol", &shown);
        let response = self.http.post(self.url.join("/v1/enrol")).json(request);
        json(send(response, READ_TIMEOUT_MS).await?).await
    }
}

/// A connection to the hub as this device. Tokens are got and renewed by themselves.
pub struct DeviceHub {
    hub: Hub,
    device: DeviceId,
    key: DeviceKey,
    clock: Arc<Clock>,
    token: Mutex<Option<Arc<str>>>,
    /// Held while a token is being got, so that calls at the same moment get one together.
    renewing: tokio::sync::Mutex<()>,
    etag: Mutex<Option<(u64, String)>>,
}

impl DeviceHub {
    /// The hub as `device` sees it.
    pub fn new(hub: Hub, device: DeviceId, key: DeviceKey, clock: Arc<Clock>) -> Self {
        let renewing = tokio::sync::Mutex::default();
        Self { hub, device, key, clock, token: Mutex::new(None), renewing, etag: Mutex::new(None) }
    }

    /// What the device should be. Waits at the hub for at most `wait_s` seconds when the answer is
    /// still generation `known`.
    ///
    /// # Errors
    /// [`HubError`].
    pub async fn desired(&self, known: Option<u64>, wait_s: u32) -> Result<Polled, HubError> {
        let etag = lock(&self.etag).clone();
        let etag = etag.filter(|(generation, _)| Some(*generation) == known).map(|(_, etag)| etag);
        let mut url = self.hub.url.join("/v1/device/desired");
        if wait_s > 0 {
            url.query_pairs_mut().append_pair("wait_s", &wait_s.to_string());
        }
        self.hub.outbox.sent("GET /v1/device/desired", &serde_json::Value::Null);
        let timeout_ms = u64::from(wait_s) * 1_000 + READ_TIMEOUT_MS;
        let request = || {
            let request = self.hub.http.get(url.clone());
            match &etag {
                Some(etag) => request.header(IF_NONE_MATCH, etag),
                None => request,
            }
        };
        let response = match self.authorised(request, timeout_ms).await {
            Err(error) if error.is(StatusCode::NOT_MODIFIED) => return Ok(Polled::NotModified),
            other => other?,
        };
        let etag = header(response.headers(), ETAG.as_str());
        let mut desired: DesiredState = json(response).await?;
        if desired.reason.len() > MAX_REASON_BYTES {
            desired.reason = desired.reason.chars().take(MAX_REASON_BYTES / 4).collect();
        }
        *lock(&self.etag) = etag.map(|etag| (desired.generation, etag));
        Ok(Polled::Desired(Box::new(desired)))
    }

    /// Sends a report.
    ///
    /// # Errors
    /// [`HubError`].
    pub async fn report(&self, report: &DeviceReport) -> Result<(), HubError> {
        let shown = serde_json::to_value(report).unwrap_or_default();
        self.hub.outbox.sent("POST /v1/device/report", &shown);
        let url = self.hub.url.join("/v1/device/report");
        self.authorised(|| self.hub.http.post(url.clone()).json(report), READ_TIMEOUT_MS).await?;
        Ok(())
    }

    /// Asks for the hub's publisher keys, and takes what `trust` allows.
    ///
    /// # Errors
    /// [`HubError`].
    pub async fn refresh(&self, trust: &Trust) -> Result<(), HubError> {
        let url = self.hub.url.join("/v1/keys");
        self.hub.outbox.sent("GET /v1/keys", &serde_json::Value::Null);
        let response = self.authorised(|| self.hub.http.get(url.clone()), READ_TIMEOUT_MS).await?;
        let keys: Page<PublisherKey> = json(response).await?;
        for key in trust.learn(&keys.items) {
            let by = key.endorsement.as_ref().map_or("", |endorsement| endorsement.by.as_str());
            tracing::info!("trusts publisher key {} ({}) on the word of {by}", key.name, key.id);
        }
        Ok(())
    }

    /// Gets a manifest and its signature, checks both with the keys that count now, and asks what
    /// there is to get the model from.
    ///
    /// # Errors
    /// As [`FetchError`] says.
    pub async fn offer(&self, model: &DesiredModel, trust: &Trust) -> Result<Offer, FetchError> {
        let package = self.package(model, trust).await?;
        Ok(Offer { package, sources: self.sources(model.weights).await })
    }

    /// Gets a manifest and its signature and checks both, with the keys that count now.
    ///
    /// # Errors
    /// As [`FetchError`] says.
    async fn package(&self, model: &DesiredModel, trust: &Trust) -> Result<Package, FetchError> {
        // The release may be signed by a key that is newer than this device's list. Without an
        // answer the keys it has will do.
        if let Err(error) = self.refresh(trust).await {
            tracing::debug!("ask for publisher keys: {error}");
        }
        let keys = trust.keys();
        let name = &model.model;
        let path = format!("/v2/{name}/manifests/{}", model.manifest);
        let manifest = self.document(&path, model.manifest, MAX_MANIFEST_BYTES).await?;
        let subject = package::Descriptor::of_bytes(MANIFEST_MEDIA_TYPE, &manifest);
        let signatures = self.signatures(name, model.manifest).await?;
        let mut refusal = None;
        for signature in signatures.into_iter().take(MAX_SIGNATURES) {
            let path = format!("/v2/{name}/manifests/{signature}");
            let bytes = self.document(&path, signature, MAX_MANIFEST_BYTES).await?;
            let Ok(signature) = package::parse_signature_manifest(&bytes) else { continue };
            if signature.subject.digest != subject.digest {
                continue;
            }
            let path = format!("/v2/{name}/blobs/{}", signature.bundle.digest);
            let bundle = self.document(&path, signature.bundle.digest, MAX_BUNDLE_BYTES).await?;
            match package::verify(&manifest, &bundle, &keys) {
                Ok(package) => return narrow(model.manifest, &package),
                Err(error) => refusal = Some(error),
            }
        }
        match refusal {
            Some(error) => tracing::warn!(
                "{name} {}: no signature of a publisher that this device trusts: {error}",
                model.version
            ),
            None => tracing::warn!("{name} {} is not signed", model.version),
        }
        for (key, expired_at) in trust.expired() {
            tracing::warn!("publisher key {key} counts no more: it expired at {expired_at}");
        }
        Err(FetchError::Signature)
    }

    /// Starts the download of a part of a blob, which is not empty.
    ///
    /// # Errors
    /// [`HubError`].
    pub async fn blob(
        &self,
        name: &ModelName,
        digest: Digest,
        range: Range<u64>,
    ) -> Result<Response, HubError> {
        let url = self.hub.url.join(&format!("/v2/{name}/blobs/{digest}"));
        let (start, last) = (range.start, range.end.saturating_sub(1));
        let request =
            || self.hub.http.get(url.clone()).header(RANGE, format!("bytes={start}-{last}"));
        self.authorised(request, READ_TIMEOUT_MS).await
    }

    /// What there is to get a model file from, besides itself. A hub that does not know is no
    /// obstacle: then it is got whole.
    pub async fn sources(&self, weights: Digest) -> Sources {
        let mut url = self.hub.url.join("/v1/device/sources");
        url.query_pairs_mut().append_pair("weights", &weights.to_string());
        self.hub.outbox.sent("GET /v1/device/sources", &serde_json::json!({ "weights": weights }));
        let answer = async {
            let request = || self.hub.http.get(url.clone());
            json(self.authorised(request, READ_TIMEOUT_MS).await?).await
        };
        let mut sources: Sources = match answer.await {
            Ok(sources) => sources,
            Err(error) => {
                tracing::debug!("ask for deltas: {error}");
                return Sources::default();
            }
        };
        sources.deltas.truncate(MAX_OFFERED);
        sources.peers.truncate(MAX_PEERS);
        sources
    }

    /// The digests of the signature manifests that refer to a manifest: by the referrers API, or
    /// where the registry has none by the tag in its place (OCI distribution 1.1, "Listing
    /// Referrers" and "Unavailable Referrers API").
    async fn signatures(
        &self,
        name: &ModelName,
        manifest: Digest,
    ) -> Result<Vec<Digest>, FetchError> {
        #[derive(serde::Deserialize)]
        struct Index {
            #[serde(default)]
            manifests: Vec<Referrer>,
        }
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Referrer {
            digest: String,
            #[serde(default)]
            artifact_type: Option<String>,
        }
        let paths = [
            format!("/v2/{name}/referrers/{manifest}"),
            format!("/v2/{name}/manifests/sha256-{}", manifest.hex()),
        ];
        for path in paths {
            let url = self.hub.url.join(&path);
            let request = || self.hub.http.get(url.clone());
            let response = match self.authorised(request, READ_TIMEOUT_MS).await {
                Err(error) if error.is(StatusCode::NOT_FOUND) => continue,
                Err(error) => return Err(error.fetch()),
                Ok(response) => response,
            };
            let bytes = match body(response, MAX_REFERRERS_BYTES).await {
                Err(HubError::Answer(_)) => return Err(FetchError::Package),
                other => other.map_err(|error| error.fetch())?,
            };
            let index: Index = serde_json::from_slice(&bytes).map_err(|_| FetchError::Package)?;
            let bundles = index.manifests.into_iter().filter(|referrer| {
                referrer.artifact_type.as_deref().is_none_or(|kind| kind == BUNDLE_MEDIA_TYPE)
            });
            return Ok(bundles.filter_map(|referrer| referrer.digest.parse().ok()).collect());
        }
        Ok(Vec::new())
    }

    /// A small document by digest, asked for twice when its bytes are not what the digest says.
    async fn document(
        &self,
        path: &str,
        digest: Digest,
        limit_bytes: usize,
    ) -> Result<Vec<u8>, FetchError> {
        let url = self.hub.url.join(path);
        for _ in 0..2 {
            let request = || self.hub.http.get(url.clone()).header(ACCEPT, MANIFEST_MEDIA_TYPE);
            let response =
                self.authorised(request, READ_TIMEOUT_MS).await.map_err(|error| error.fetch())?;
            match body(response, limit_bytes).await {
                Ok(bytes) if Digest::of(&bytes) == digest => return Ok(bytes),
                Ok(_) | Err(HubError::Answer(_)) => {}
                Err(error) => return Err(error.fetch()),
            }
        }
        Err(FetchError::Digest)
    }

    /// Sends with a token; with a new one if the hub does not know it any more.
    async fn authorised(
        &self,
        request: impl Fn() -> RequestBuilder,
        timeout_ms: u64,
    ) -> Result<Response, HubError> {
        let known = lock(&self.token).clone();
        if let Some(token) = &known {
            match self.send(request().bearer_auth(token), timeout_ms).await {
                Err(error) if error.is(StatusCode::UNAUTHORIZED) => {}
                other => return other,
            }
        }
        let token = self.renew(known).await?;
        self.send(request().bearer_auth(&token), timeout_ms).await
    }

    /// Sends, and hears from any answer what time it is at the hub (RFC 9110, section 6.6.1).
    async fn send(&self, request: RequestBuilder, timeout_ms: u64) -> Result<Response, HubError> {
        let response = receive(request, timeout_ms).await?;
        let date = header(response.headers(), DATE.as_str());
        if let Some(date) = date.and_then(|date| jiff::fmt::rfc2822::parse(&date).ok()) {
            self.clock.hear(Timestamp::from(date));
        }
        good(response).await
    }

    /// A new token in the place of `refused`; one that another call got meanwhile will do.
    async fn renew(&self, refused: Option<Arc<str>>) -> Result<Arc<str>, HubError> {
        let _renewing = self.renewing.lock().await;
        let known = lock(&self.token).clone();
        if let Some(token) = known.filter(|token| Some(token) != refused.as_ref()) {
            return Ok(token);
        }
        *lock(&self.token) = None;
        let device = self.device.clone();
        let asked = ChallengeRequest { device: device.clone() };
        let shown = serde_json::json!({ "device": device });
        self.hub.outbox.sent("POST /v1/device/challenge", &shown);
        let url = self.hub.url.join("/v1/device/challenge");
        let challenge: Challenge =
            json(send(self.hub.http.post(url).json(&asked), READ_TIMEOUT_MS).await?).await?;
        let signature = self.key.answer(&device, &challenge.challenge);
        let shown = serde_json::json!({
            "device": device, "challenge": "(the hub's)", "signature": "(of the challenge)"
        });
        self.hub.outbox.sent("POST /v1/device/token", &shown);
        let asked = DeviceTokenRequest { device, challenge: challenge.challenge, signature };
        let url = self.hub.url.join("/v1/device/token");
        let token: DeviceToken =
            json(send(self.hub.http.post(url).json(&asked), READ_TIMEOUT_MS).await?).await?;
        let token: Arc<str> = token.token.into();
        *lock(&self.token) = Some(Arc::clone(&token));
        Ok(token)
    }
}

/// The files that a device needs of a package.
fn narrow(manifest: Digest, package: &package::Package) -> Result<Package, FetchError> {
    let blob = |title| {
        let file = package.file(title)?;
        Some(slmops_agent_core::Blob { digest: file.digest, size_bytes: file.size_bytes })
    };
    match (blob(MODEL_FILE), blob(PROBES_FILE)) {
        (Some(weights), Some(probes)) if probes.size_bytes <= MAX_PROBES_BYTES => {
            Ok(Package { manifest, weights, probes, adapter: blob(ADAPTER_FILE) })
        }
        _ => {
            tracing::warn!(
                "the package lacks {MODEL_FILE} or {PROBES_FILE}, or they are too large"
            );
            Err(FetchError::Package)
        }
    }
}

async fn send(request: RequestBuilder, timeout_ms: u64) -> Result<Response, HubError> {
    good(receive(request, timeout_ms).await?).await
}

async fn receive(request: RequestBuilder, timeout_ms: u64) -> Result<Response, HubError> {
    let sent = tokio::time::timeout(Duration::from_millis(timeout_ms), request.send());
    Ok(sent.await.map_err(|_| HubError::Answer("did not come in time"))??)
}

/// An answer that says yes, or why it says no.
async fn good(response: Response) -> Result<Response, HubError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let retry_after_ms = header(response.headers(), RETRY_AFTER.as_str())
        .and_then(|value| value.trim().parse::<u64>().ok())
        .map(|seconds| seconds.saturating_mul(1_000).min(MAX_RETRY_AFTER_MS));
    let problem = match status {
        StatusCode::NOT_MODIFIED => None,
        _ => body(response, MAX_ANSWER_BYTES).await.ok(),
    };
    let problem: Option<Problem> = problem.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let (detail, hint) = problem.map_or((String::new(), None), |problem| {
        let detail = if problem.detail.is_empty() { problem.title } else { problem.detail };
        (detail, problem.hint)
    });
    Err(HubError::Status { status, detail, hint, retry_after_ms })
}

async fn json<T: DeserializeOwned>(response: Response) -> Result<T, HubError> {
    let bytes = body(response, MAX_ANSWER_BYTES).await?;
    serde_json::from_slice(&bytes).map_err(|_| HubError::Answer("is not what was asked for"))
}

async fn body(response: Response, limit_bytes: usize) -> Result<Vec<u8>, HubError> {
    let mut bytes = Vec::new();
    let mut pieces = response.bytes_stream();
    loop {
        let next = tokio::time::timeout(Duration::from_millis(READ_TIMEOUT_MS), pieces.next());
        match next.await {
            Err(_) => return Err(HubError::Answer("stopped in the middle")),
            Ok(None) => return Ok(bytes),
            Ok(Some(piece)) => {
                let piece = piece?;
                if bytes.len() + piece.len() > limit_bytes {
                    return Err(HubError::Answer("is too long"));
                }
                bytes.extend_from_slice(&piece);
            }
        }
    }
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
