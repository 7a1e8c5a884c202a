//! Metrics are pushed to collectors: what a push says, and what becomes of those that do not arrive.
//! `scripts/interop-otlp.sh` installs OpenTelemetry's own decoder.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsPartialSuccess, ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as Number;
use prost::Message as _;
use serde_json::{Value, json};
use slmops_inference::otlp::Collector;
use slmops_inference::server::ServerOptions;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::sync::mpsc;

use crate::server::{Endpoint, completion, named, with};
use crate::support::{glass, runtime, set_up, testdata};

/// Milliseconds between pushes.
const EVERY_MS: &str = "50";

/// A collector that answers as `answers` say, then well.
struct Fake {
    url: String,
    pushes: mpsc::UnboundedReceiver<Push>,
}

struct Push {
    headers: HeaderMap,
    body: Bytes,
}

type Answer = (StatusCode, HeaderMap, Vec<u8>);

fn answer(status: u16) -> Answer {
    let after = HeaderMap::from_iter([("retry-after".parse().unwrap(), "0".parse().unwrap())]);
    (StatusCode::from_u16(status).unwrap(), after, Vec::new())
}

impl Fake {
    async fn new(answers: Vec<Answer>) -> Self {
        let (told, pushes) = mpsc::unbounded_channel();
        let answers = Arc::new(std::sync::Mutex::new(answers.into_iter()));
        let take = async move |State(told): State<mpsc::UnboundedSender<Push>>,
                               headers: HeaderMap,
                               body: Bytes| {
            let _ = told.send(Push { headers, body });
            answers.lock().unwrap().next().unwrap_or_else(|| answer(200)).into_response()
        };
        let router = axum::Router::new().route("/v1/metrics", axum::routing::post(take));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let server = axum::serve(listener, router.with_state(told));
        tokio::spawn(async move { server.await.expect("it serves") });
        Self { url, pushes }
    }

    async fn next(&mut self) -> Push {
        let push = tokio::time::timeout(Duration::from_secs(60), self.pushes.recv()).await;
        push.expect("a push comes").expect("the collector runs")
    }

    /// The first push of which something is so.
    async fn until(&mut self, so: impl Fn(&Push) -> bool) -> Push {
        loop {
            let push = self.next().await;
            if so(&push) {
                return push;
            }
        }
    }
}

fn text(attributes: &[KeyValue], name: &str) -> Option<String> {
    let attribute = attributes.iter().find(|attribute| attribute.key == name)?;
    match attribute.value.as_ref()?.value.as_ref()? {
        Any::StringValue(text) => Some(text.clone()),
        other => panic!("{name} is {other:?}"),
    }
}

fn matches(attributes: &[KeyValue], wanted: &[(&str, &str)]) -> bool {
    wanted.iter().all(|(name, value)| text(attributes, name).as_deref() == Some(*value))
}

impl Push {
    fn request(&self) -> ExportMetricsServiceRequest {
        ExportMetricsServiceRequest::decode(self.body.as_ref()).expect("a message")
    }

    fn data(&self, name: &str) -> Option<Data> {
        let request = self.request();
        let mut metrics = request.resource_metrics[0].scope_metrics[0].metrics.iter();
        metrics.find(|metric| metric.name == name)?.data.clone()
    }

    /// Count, sum and buckets of a histogram's point.
    fn histogram(&self, name: &str, wanted: &[(&str, &str)]) -> Option<(u64, f64, Vec<u64>)> {
        let Data::Histogram(histogram) = self.data(name)? else { panic!("{name}") };
        assert_eq!(histogram.aggregation_temporality, 2, "cumulative");
        let mut points = histogram.data_points.into_iter();
        let point = points.find(|point| matches(&point.attributes, wanted))?;
        assert_eq!(point.bucket_counts.len(), point.explicit_bounds.len() + 1);
        assert!(
            0 < point.start_time_unix_nano && point.start_time_unix_nano < point.time_unix_nano
        );
        Some((point.count, point.sum?, point.bucket_counts))
    }

    fn number(&self, name: &str, wanted: &[(&str, &str)]) -> Option<i64> {
        let points = match self.data(name)? {
            Data::Sum(sum) => {
                assert!(sum.is_monotonic && sum.aggregation_temporality == 2, "{name}");
                sum.data_points
            }
            Data::Gauge(gauge) => gauge.data_points,
            other => panic!("{name} is {other:?}"),
        };
        let point = points.into_iter().find(|point| matches(&point.attributes, wanted))?;
        match point.value? {
            Number::AsInt(value) => Some(value),
            Number::AsDouble(value) => panic!("{name} is {value}"),
        }
    }
}

/// The settings of these tests, and `more`.
fn variables(more: &'static [(&str, &str)]) -> impl Fn(&str) -> Option<String> {
    move |name| {
        let all = [("OTEL_METRIC_EXPORT_INTERVAL", EVERY_MS)];
        let mut all = more.iter().chain(&all);
        all.find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    }
}

fn collector(url: &str, more: &'static [(&str, &str)]) -> Collector {
    Collector::new(url, "test", "one", variables(more)).expect("a collector")
}

async fn endpoint(collector: Collector) -> Endpoint {
    let options = ServerOptions { otlp: Some(collector), ..ServerOptions::default() };
    let endpoint = Endpoint::with_options(options).await;
    endpoint.load(named("glass", glass(), runtime())).await;
    endpoint
}

const OF_GLASS: [(&str, &str); 4] = [
    ("gen_ai.operation.name", "text_completion"),
    ("gen_ai.provider.name", "slmops"),
    ("gen_ai.system", "slmops"),
    ("gen_ai.request.model", "glass"),
];

fn of_glass(name: &'static str, value: &'static str) -> Vec<(&'static str, &'static str)> {
    OF_GLASS.into_iter().chain([(name, value)]).collect()
}

#[tokio::test]
async fn a_collector_is_told_what_the_conventions_name_and_no_text() {
    let mut fake = Fake::new(Vec::new()).await;
    let settings = &[
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret, x-site=7"),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=till%2C7"),
    ];
    let endpoint = endpoint(collector(&format!("{}/", fake.url), settings)).await;
    let body = with(completion(8), "prompt", json!("Confidential Zanzibar"));
    let (status, answered) = endpoint.post("/v1/completions", body).await;
    assert_eq!(status, 200, "{answered}");
    let input = answered["usage"]["prompt_tokens"].as_u64().unwrap();
    let long = with(completion(8), "prompt", json!("Confidential ".repeat(300)));
    assert_eq!(endpoint.post("/v1/completions", long).await.0, 400);
    let embed = json!({ "model": "glass", "input": ["Confidential"] });
    assert_eq!(endpoint.post("/v1/embeddings", embed).await.0, 200);

    let duration = "gen_ai.server.request.duration";
    let embeddings = [("gen_ai.operation.name", "embeddings")];
    let push = fake.until(|push| push.histogram(duration, &embeddings).is_some()).await;
    let (count, seconds, _) = push.histogram(duration, &OF_GLASS).expect("answered");
    assert!(count == 1 && seconds > 0.0, "{count} {seconds}");
    let failed = of_glass("error.type", "context_length_exceeded");
    assert_eq!(push.histogram(duration, &failed).expect("refused").0, 1);
    let first = push.histogram("gen_ai.server.time_to_first_token", &OF_GLASS).expect("a first");
    assert!(first.0 == 1 && 0.0 < first.1 && first.1 <= seconds, "{first:?}");
    let next = push.histogram("gen_ai.server.time_per_output_token", &OF_GLASS).expect("others");
    assert!((1..=7).contains(&next.0) && next.1 <= seconds, "{next:?}");
    let usage = |kind| {
        let wanted = of_glass("gen_ai.token.type", kind);
        push.histogram("gen_ai.client.token.usage", &wanted).expect("tokens").1
    };
    assert_eq!((usage("input"), usage("output")), (input as f64, 8.0));
    assert_eq!(push.number("slmops.requests", &[("outcome", "refused")]), Some(1));
    assert_eq!(push.number("slmops.requests", &[("outcome", "answered")]), Some(2));
    assert_eq!(push.number("slmops.generated_tokens", &[]), Some(8));
    assert_eq!(push.number("slmops.model_ready", &[]), Some(1));
    assert!(push.number("slmops.worker_memory", &[]).is_some_and(|bytes| bytes > 1_000_000));

    assert_eq!(push.headers["content-type"], "application/x-protobuf");
    assert_eq!(push.headers["authorization"], "Bearer secret");
    assert_eq!(push.headers["x-site"], "7");
    let request = push.request();
    let resource = &request.resource_metrics[0].resource.as_ref().expect("a resource").attributes;
    let wanted = [
        ("service.name", "test"),
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("service.instance.id", "one"),
        ("deployment.environment.name", "till,7"),
    ];
    assert!(matches(resource, &wanted), "{resource:?}");

    // What was counted after the last push is told at the end.
    while fake.pushes.try_recv().is_ok() {}
    let body = completion(1);
    assert_eq!(endpoint.post("/v1/completions", body).await.0, 200);
    endpoint.stop().await;
    let mut last = fake.next().await;
    while let Ok(push) = fake.pushes.try_recv() {
        last = push;
    }
    assert_eq!(last.histogram(duration, &OF_GLASS).expect("answered").0, 2);
    let words = answered["choices"][0]["text"].as_str().unwrap();
    for secret in ["onfidential", "Zanzibar", words.trim()] {
        let said = last.body.windows(secret.len()).any(|part| part == secret.as_bytes());
        assert!(!said, "{secret} left");
    }
}

#[tokio::test]
async fn what_a_collector_misses_is_in_the_next_push() {
    let rejected = ExportMetricsServiceResponse {
        partial_success: Some(ExportMetricsPartialSuccess {
            rejected_data_points: 3,
            error_message: "too old".to_owned(),
        }),
    };
    let rejected = (StatusCode::OK, HeaderMap::new(), rejected.encode_to_vec());
    let mut fake =
        Fake::new(vec![answer(503), answer(429), answer(401), rejected, answer(200)]).await;
    let endpoint = endpoint(collector(&fake.url, &[])).await;
    let (status, answered) = endpoint.post("/v1/completions", completion(8)).await;
    assert_eq!(status, 200, "{answered}");
    let taken = [("outcome", "taken")];
    let push = fake
        .until(|push| push.number("slmops.otlp_pushes", &taken).is_some_and(|taken| taken > 0))
        .await;
    assert_eq!(push.number("slmops.otlp_pushes", &[("outcome", "failed")]), Some(4));
    fake.until(|push| push.number("slmops.generated_tokens", &[]) == Some(8)).await;
    let (_, metrics) = endpoint.get("/metrics").await;
    assert!(metrics.contains("slmops_otlp_pushes_total{outcome=\"failed\"} 4\n"), "{metrics}");
    endpoint.stop().await;
}

#[tokio::test]
async fn a_collector_that_is_away_disturbs_nobody() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let nobody = format!("http://{}", listener.local_addr().expect("an address"));
    drop(listener);
    let endpoint = endpoint(collector(&nobody, &[])).await;
    let (status, answered) = endpoint.post("/v1/completions", completion(8)).await;
    assert_eq!(status, 200, "{answered}");
    let (_, metrics) = endpoint.get("/metrics").await;
    assert!(metrics.contains("slmops_otlp_pushes_total{outcome=\"taken\"} 0\n"), "{metrics}");
    endpoint.stop().await;
}

#[test]
fn settings_are_followed_or_refused() {
    set_up();
    let refused = |url: &str, more: &'static [(&str, &str)]| {
        Collector::new(url, "test", "one", variables(more)).expect_err(url).to_string()
    };
    let url = "http://collector:4318";
    for (url, settings, said) in [
        ("collector:4318", &[][..], "`collector:4318` is neither http nor https"),
        ("grpc://collector", &[], "is neither http nor https"),
        ("http://me:secret@collector", &[], "OTEL_EXPORTER_OTLP_HEADERS"),
        ("http://collector/?key=secret", &[], "has a query"),
        (url, &[("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")], "only http/protobuf"),
        (url, &[("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "gzip")], "only none"),
        (url, &[("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta")], "only cumulative"),
        (url, &[("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")], "is no number of milliseconds"),
        (url, &[("OTEL_METRIC_EXPORT_INTERVAL", "0")], "is no number of milliseconds"),
        (url, &[("OTEL_EXPORTER_OTLP_HEADERS", "secret")], "is no list of pairs"),
        (url, &[("OTEL_EXPORTER_OTLP_HEADERS", "a b=secret")], "holds what is no HTTP header"),
        ("https://collector", &[("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem")], "fails: "),
    ] {
        let error = refused(url, settings);
        assert!(error.contains(said) && error.contains("\nhint: "), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
    let of_metrics = &[
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf"),
    ];
    let collector = Collector::new(url, "test", "one", variables(of_metrics)).expect("supported");
    assert_eq!(collector.url(), "http://collector:4318/v1/metrics");
    let below = Collector::new("https://hub.example/otlp/", "test", "one", variables(&[]));
    assert_eq!(below.expect("a collector").url(), "https://hub.example/otlp/v1/metrics");
}

/// OpenTelemetry's own decoder understands all of a push.
#[tokio::test]
async fn opentelemetrys_own_messages_decode_a_push() {
    let folder = match std::env::var_os("SLMOPS_OTLP_VENV") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME").expect("a home")).join(".cache/slmops/otlp"),
    };
    if !folder.join("installed").exists() {
        eprintln!("skipped: run scripts/interop-otlp.sh to install opentelemetry-proto");
        return;
    }
    let mut child = tokio::process::Command::new(folder.join("bin/python"))
        .arg(testdata("endpoint/otlp_collector.py"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("Python");
    let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    let mut line = async || {
        let line = tokio::time::timeout(Duration::from_secs(60), lines.next_line()).await;
        line.expect("a line comes").expect("text").expect("a line")
    };
    let url = format!("http://127.0.0.1:{}", line().await);
    let endpoint = endpoint(collector(&url, &[])).await;
    let (status, answered) = endpoint.post("/v1/completions", completion(8)).await;
    assert_eq!(status, 200, "{answered}");
    let metrics = loop {
        let push: Value = serde_json::from_str(&line().await).expect("JSON");
        assert_eq!((&push["path"], &push["whole"]), (&json!("/v1/metrics"), &json!(true)));
        let scope = push["request"]["resourceMetrics"][0]["scopeMetrics"][0].clone();
        assert_eq!(scope["scope"]["name"], "slmops");
        let metrics = scope["metrics"].as_array().expect("metrics").clone();
        if metrics.iter().any(|metric| metric["name"] == "gen_ai.client.token.usage") {
            break metrics;
        }
    };
    let metric = |name: &str| metrics.iter().find(|metric| metric["name"] == name).expect("it");
    let usage = metric("gen_ai.client.token.usage");
    assert_eq!(usage["unit"], "{token}");
    let points = &usage["histogram"]["dataPoints"];
    assert_eq!((&points[0]["sum"], &points[1]["sum"]), (&json!(5.0), &json!(8.0)));
    let temporality = "AGGREGATION_TEMPORALITY_CUMULATIVE";
    assert_eq!(usage["histogram"]["aggregationTemporality"], temporality);
    assert_eq!(metric("gen_ai.server.request.duration")["unit"], "s");
    let tokens = &metric("slmops.generated_tokens")["sum"];
    assert_eq!(tokens["dataPoints"][0]["asInt"], "8");
    assert_eq!(tokens["isMonotonic"], true);
    endpoint.stop().await;
}
