//! Pushes what an endpoint counts to an OpenTelemetry collector: the protocol's form over HTTP, in
//! protobuf, with the settings that OpenTelemetry's specification names.
//! It never sends text of prompts or answers, and nothing at all unless a collector was named. Nothing
//! is kept for later: every push says all counts since the beginning, so that the next one that arrives
//! makes up for those that did not.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use prost::Message as _;
use rand::Rng as _;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT};
use reqwest::{Client, StatusCode, Url, redirect};
use serde_json::{Map, Value, json};

use crate::host::ModelHost;
use crate::metrics::family::{Family, Reading};
use crate::metrics::otlp::message;

/// Milliseconds between pushes, and those that one may take, by OpenTelemetry's defaults.
const INTERVAL_MS: u64 = 60_000;
const TIMEOUT_MS: u64 = 10_000;
/// Times that a push is tried before it is left to the next one.
const ATTEMPTS: u32 = 5;
/// The pause after the first failed attempt; each one is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause that a collector may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// What the last push may take while the program ends.
const FAREWELL: Duration = Duration::from_secs(2);
/// The most bytes of a collector's answer that are read.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// The most bytes of a collector's own words that are logged.
const MAX_WORDS: usize = 300;
/// Settings of OpenTelemetry's of which one value is supported.
const ONE_VALUE: [(&str, &str); 3] = [
    ("PROTOCOL", "http/protobuf"),
    ("COMPRESSION", "none"),
    ("TEMPORALITY_PREFERENCE", "cumulative"),
];

/// Why metrics cannot be pushed as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object} {why}\nhint: {hint}")]
pub struct OtlpError {
    object: String,
    why: String,
    hint: &'static str,
}

/// A collector, and how it is told.
#[derive(Clone)]
pub struct Collector {
    url: Url,
    headers: HeaderMap,
    every: Duration,
    timeout: Duration,
    /// Attributes of who is counted.
    resource: Vec<(String, String)>,
    client: Client,
}

impl std::fmt::Debug for Collector {
    /// Headers may be secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collector").field("url", &self.url.as_str()).finish_non_exhaustive()
    }
}

impl Collector {
    /// The collector at `base`, such as `http://localhost:4318`, which is told of the program `service`
    /// and of this `instance` of it. `variable` reads the environment: `OTEL_EXPORTER_OTLP_HEADERS`,
    /// `…_TIMEOUT` and `…_CERTIFICATE` (or `OTEL_EXPORTER_OTLP_METRICS_…`),
    /// `OTEL_METRIC_EXPORT_INTERVAL`, `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`.
    ///
    /// # Errors
    /// The address or a setting is not one, or asks for what is not supported.
    pub fn new(
        base: &str,
        service: &str,
        instance: &str,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, OtlpError> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        // What is said of metrics alone wins over what is said of all signals.
        let setting = |name: &str| {
            let names = ["OTEL_EXPORTER_OTLP_METRICS_", "OTEL_EXPORTER_OTLP_"];
            let mut names = names.map(|prefix| format!("{prefix}{name}")).into_iter();
            names.find_map(|name| Some((variable(&name)?, name)))
        };
        for (name, only) in ONE_VALUE {
            if let Some((value, name)) = setting(name).filter(|(value, _)| value != only) {
                return Err(OtlpError {
                    object: format!("{name}={value}"),
                    why: format!("is not supported, only {only}"),
                    hint: "set OTEL_EXPORTER_OTLP_METRICS_… where other programs need another value",
                });
            }
        }
        let milliseconds = |given: Option<(String, String)>, default: u64| match given {
            None => Ok(Duration::from_millis(default)),
            Some((value, name)) => match value.parse() {
                Ok(value) if value > 0 => Ok(Duration::from_millis(value)),
                _ => Err(OtlpError {
                    object: format!("{name}={value}"),
                    why: "is no number of milliseconds".to_owned(),
                    hint: "give a whole number above 0",
                }),
            },
        };
        let interval = "OTEL_METRIC_EXPORT_INTERVAL";
        let interval = variable(interval).map(|value| (value, interval.to_owned()));
        let mut headers = HeaderMap::new();
        if let Some((given, name)) = setting("HEADERS") {
            for (header, value) in pairs(&name, &given)? {
                let header = HeaderName::try_from(header).ok();
                let value = HeaderValue::try_from(value).ok();
                let (Some(header), Some(mut value)) = (header, value) else {
                    return Err(OtlpError {
                        object: name,
                        why: "holds what is no HTTP header".to_owned(),
                        hint: "write it as name=value,name=value with values percent-encoded",
                    });
                };
                value.set_sensitive(true);
                headers.insert(header, value);
            }
        }
        let name = "OTEL_RESOURCE_ATTRIBUTES";
        let given = variable(name).map(|given| pairs(name, &given)).transpose()?;
        let mut resource = given.unwrap_or_default();
        if let Some(name) = variable("OTEL_SERVICE_NAME") {
            resource.retain(|(known, _)| known != "service.name");
            resource.push(("service.name".to_owned(), name));
        }
        for (name, value) in [
            ("service.name", service),
            ("service.version", env!("CARGO_PKG_VERSION")),
            ("service.instance.id", instance),
        ] {
            if !resource.iter().any(|(known, _)| known == name) {
                resource.push((name.to_owned(), value.to_owned()));
            }
        }
        let url = address(base)?;
        let client = client(&url, setting("CERTIFICATE"))?;
        Ok(Self {
            headers,
            every: milliseconds(interval, INTERVAL_MS)?,
            timeout: milliseconds(setting("TIMEOUT"), TIMEOUT_MS)?,
            resource,
            url,
            client,
        })
    }

    /// Where metrics are pushed to.
    pub fn url(&self) -> &str {
        self.url.as_str()
    }
}

/// Where metrics are taken below a collector's address.
fn address(base: &str) -> Result<Url, OtlpError> {
    let public = base.split('?').next().unwrap_or_default();
    let shown = public.rsplit('@').next().unwrap_or_default();
    let refused = |why: &str| OtlpError {
        object: format!("`{shown}`"),
        why: why.to_owned(),
        hint: "name the collector as http://collector:4318",
    };
    let mut url = Url::parse(base).map_err(|_| refused("is no URL"))?;
    if !["http", "https"].contains(&url.scheme()) {
        return Err(refused("is neither http nor https"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refused("comes with a password, which belongs in OTEL_EXPORTER_OTLP_HEADERS"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(refused("has a query or a fragment"));
    }
    // OTLP exporter configuration, "Endpoint URLs for OTLP/HTTP".
    let path = format!("{}/v1/metrics", url.path().trim_end_matches('/'));
    url.set_path(&path);
    Ok(url)
}

/// `name=value,name=value`, values percent-encoded, as in W3C Baggage.
fn pairs(variable: &str, given: &str) -> Result<Vec<(String, String)>, OtlpError> {
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let value = percent_encoding::percent_decode_str(value.trim()).decode_utf8().ok()?;
        Some((name.trim().to_owned(), value.into_owned())).filter(|(name, _)| !name.is_empty())
    };
    let entries = given.split(',').filter(|entry| !entry.trim().is_empty());
    entries.map(pair).collect::<Option<Vec<_>>>().ok_or_else(|| OtlpError {
        object: variable.to_owned(),
        why: "is no list of pairs".to_owned(),
        hint: "write it as name=value,name=value with values percent-encoded",
    })
}

/// What speaks HTTP to the collector, trusting the system's certificates or those in a file.
fn client(url: &Url, authorities: Option<(String, String)>) -> Result<Client, OtlpError> {
    let failed = |object: String, why: String| OtlpError {
        object,
        why,
        hint: "OTEL_EXPORTER_OTLP_CERTIFICATE names a PEM file of the certificates to trust",
    };
    // The HTTP client wants one even for plain HTTP; whoever came first may have set it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // Headers may be secrets of this collector, and of nobody whom it names.
    let mut builder = Client::builder().no_proxy().redirect(redirect::Policy::none());
    if url.scheme() == "https" {
        let certificates = match authorities {
            Some((path, name)) => std::fs::read(&path)
                .map_err(|error| error.to_string())
                .and_then(|pem| {
                    reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| error.to_string())
                })
                .map_err(|error| failed(format!("{name}={path}"), format!("fails: {error}")))?,
            None => {
                let found = rustls_native_certs::load_native_certs().certs;
                let read = |der: &rustls_pki_types::CertificateDer<'_>| {
                    reqwest::Certificate::from_der(der).ok()
                };
                found.iter().filter_map(read).collect()
            }
        };
        for certificate in certificates {
            builder = builder.add_root_certificate(certificate);
        }
    }
    builder.build().map_err(|error| failed(format!("`{url}`"), format!("fails: {error}")))
}

/// Pushes what `host` counts until `stop` is done, and a last time then. `sent` hears, before each
/// attempt, all that leaves.
pub async fn push(
    collector: Collector,
    host: Arc<ModelHost>,
    stop: impl Future<Output = ()>,
    sent: impl Fn(&Value),
) {
    let mut stop = pin!(stop);
    let (mut wait, mut attempts, mut well) = (Duration::ZERO, 0, true);
    loop {
        let attempt = async {
            tokio::time::sleep(wait).await;
            collector.send(&host, collector.timeout, &sent).await
        };
        let outcome = tokio::select! {
            () = &mut stop => {
                // Nobody is left who would try again.
                let _ = collector.send(&host, FAREWELL.min(collector.timeout), &sent).await;
                return;
            }
            outcome = attempt => outcome,
        };
        let failed = outcome.as_ref().err();
        host.metrics().count_push(failed.is_none());
        match (failed, well) {
            (Some(failure), true) => {
                tracing::warn!("metrics do not reach {}: {}", collector.url, failure.why);
            }
            (None, false) => tracing::info!("metrics reach {} again", collector.url),
            _ => {}
        }
        well = failed.is_none();
        let again = failed.and_then(|failure| failure.again).filter(|_| attempts + 1 < ATTEMPTS);
        wait = match again {
            Some(asked) => {
                // Many who lost the same collector shall not come back together.
                let share = rand::rng().random_range(0.5..1.0);
                let pause = (FIRST_PAUSE * 2_u32.pow(attempts)).mul_f64(share);
                attempts += 1;
                pause.min(collector.every).max(asked)
            }
            None => {
                attempts = 0;
                collector.every
            }
        };
    }
}

/// Why a push did not arrive.
struct Missed {
    why: String,
    /// After how long at least it may be tried again; absent where that would be in vain.
    again: Option<Duration>,
}

impl Collector {
    async fn send(
        &self,
        host: &ModelHost,
        limit: Duration,
        sent: &impl Fn(&Value),
    ) -> Result<(), Missed> {
        let families = host.metrics().families(&host.status());
        sent(&shown(&families, &self.resource));
        let body = message(families, &self.resource);
        match tokio::time::timeout(limit, self.post(body)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let why = format!("no answer within {} ms", limit.as_millis());
                Err(Missed { why, again: Some(Duration::ZERO) })
            }
        }
    }

    async fn post(&self, body: ExportMetricsServiceRequest) -> Result<(), Missed> {
        let request = self
            .client
            .post(self.url.clone())
            .header(CONTENT_TYPE, "application/x-protobuf")
            .header(USER_AGENT, concat!("slmops/", env!("CARGO_PKG_VERSION")))
            .headers(self.headers.clone())
            .body(body.encode_to_vec());
        let lost = |error: reqwest::Error| Missed {
            why: causes(&error.without_url()),
            again: Some(Duration::ZERO),
        };
        let mut response = request.send().await.map_err(lost)?;
        let status = response.status();
        if !status.is_success() {
            let after =
                response.headers().get(RETRY_AFTER).and_then(|value| pause(value.to_str().ok()?));
            // OTLP/HTTP, "Retryable response codes".
            let retryable = matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS
                    | StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT
            );
            let again = retryable.then(|| after.unwrap_or_default());
            return Err(Missed { why: format!("it answers {status}"), again });
        }
        let mut answer = Vec::new();
        while let Ok(Some(piece)) = response.chunk().await {
            answer.extend_from_slice(&piece);
            if answer.len() > MAX_ANSWER_BYTES {
                return Ok(());
            }
        }
        let answer = ExportMetricsServiceResponse::decode(answer.as_slice()).unwrap_or_default();
        if let Some(partial) = answer.partial_success.filter(|it| it.rejected_data_points > 0) {
            let words: String = partial.error_message.chars().take(MAX_WORDS).collect();
            let why = format!("it rejects {} points: {words:?}", partial.rejected_data_points);
            return Err(Missed { why, again: None });
        }
        Ok(())
    }
}

/// Seconds or a date of `Retry-After`.
fn pause(given: &str) -> Option<Duration> {
    let asked = match given.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = jiff::fmt::rfc2822::parse(given.trim()).ok()?;
            SystemTime::from(at.timestamp()).duration_since(SystemTime::now()).unwrap_or_default()
        }
    };
    Some(asked.min(LONGEST_PAUSE))
}

/// An error with what caused it.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Everything that a push says, for the record of what leaves.
fn shown(families: &[Family], resource: &[(String, String)]) -> Value {
    let mut all = Map::new();
    for (name, value) in resource {
        all.insert(name.clone(), json!(value));
    }
    for family in families {
        for point in &family.points {
            let by: Vec<&str> = point.attributes.iter().map(|(_, value)| value.as_str()).collect();
            let name = match by.is_empty() {
                true => family.name.to_owned(),
                false => format!("{}[{}]", family.name, by.join(",")),
            };
            let value = match &point.value {
                Reading::Number(value) => json!(value),
                Reading::Histogram(it) => json!({ "sum": it.sum, "buckets": it.counts }),
            };
            all.insert(name, value);
        }
    }
    Value::Object(all)
}
