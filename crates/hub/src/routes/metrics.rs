//! Numbers for Prometheus (text exposition format 0.0.4).

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use slmops_api::ClassName;
use slmops_api::device::{Phase, Telemetry};
use slmops_fleet_core::rollout::{RolloutRecord, state_name};
use slmops_fleet_core::world::World;

use super::{ApiError, AppState};
use crate::auth::AsViewer;
use crate::store::PageRequest;

/// Rollouts counted by state, newest first, at most.
const MAX_ROLLOUTS: u32 = 500;

/// Requests by method, route and status. Routes are templates, so that their number is bounded.
#[derive(Debug, Default)]
pub struct Metrics {
    routes: RwLock<HashMap<String, Counts>>,
}

/// By method and status.
type Counts = BTreeMap<(&'static str, u16), Arc<Count>>;

#[derive(Debug, Default)]
struct Count {
    requests: AtomicU64,
    microseconds: AtomicU64,
}

impl Metrics {
    /// The counter of a kind of request; what is there already is found without writing.
    fn counter(&self, route: &str, method: &'static str, status: u16) -> Arc<Count> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let known = routes.get(route).and_then(|counts| counts.get(&(method, status)).cloned());
        drop(routes);
        known.unwrap_or_else(|| {
            let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
            let counts = routes.entry(route.to_owned()).or_default();
            Arc::clone(counts.entry((method, status)).or_default())
        })
    }

    /// Every counter: its labels, requests and seconds.
    fn all(&self) -> Vec<(String, u64, f64)> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let mut all = Vec::new();
        for (route, counts) in routes.iter() {
            for ((method, status), count) in counts {
                let labels = format!("method=\"{method}\",route=\"{route}\",status=\"{status}\"");
                let seconds = count.microseconds.load(Ordering::Relaxed) as f64 / 1e6;
                all.push((labels, count.requests.load(Ordering::Relaxed), seconds));
            }
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

/// Counts a request.
pub async fn count(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let method = match *request.method() {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "(other)",
    };
    let started = Instant::now();
    let response = next.run(request).await;
    let route = route.as_ref().map_or("(none)", MatchedPath::as_str);
    let count = state.metrics.counter(route, method, response.status().as_u16());
    count.requests.fetch_add(1, Ordering::Relaxed);
    let elapsed = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    count.microseconds.fetch_add(elapsed, Ordering::Relaxed);
    response
}

fn phase_name(phase: Option<&Phase>) -> &'static str {
    match phase {
        None => "silent",
        Some(Phase::Idle) => "idle",
        Some(Phase::Downloading { .. }) => "downloading",
        Some(Phase::Downloaded) => "downloaded",
        Some(Phase::Verified) => "verified",
        Some(Phase::Prestaged { .. }) => "prestaged",
        Some(Phase::Staged) => "staged",
        Some(Phase::Activated) => "activated",
        Some(Phase::Confirmed) => "confirmed",
        Some(Phase::RolledBack { .. }) => "rolled_back",
        Some(Phase::Waiting { .. }) => "waiting",
    }
}

/// The fleet in numbers.
struct Census {
    devices: BTreeMap<(ClassName, &'static str), u64>,
    telemetry: Telemetry,
}

impl Census {
    fn take(world: &World<'_>, _: &[RolloutRecord]) -> Self {
        let mut census = Self { devices: BTreeMap::new(), telemetry: Telemetry::default() };
        for device in world.devices.iter().filter(|device| !device.revoked) {
            let phase = phase_name(device.report.as_ref().map(|report| &report.phase));
            *census.devices.entry((device.class.clone(), phase)).or_default() += 1;
            let Some(report) = &device.report else { continue };
            let (sum, one) = (&mut census.telemetry, &report.telemetry);
            sum.requests += one.requests;
            sum.errors += one.errors;
            sum.generated_tokens += one.generated_tokens;
            sum.worker_crashes += one.worker_crashes;
            sum.downloaded_bytes += one.downloaded_bytes;
        }
        census
    }
}

/// Metrics in Prometheus' text format. Needs a viewer's token.
#[utoipa::path(get, path = "/metrics", tag = "hub",
    responses((status = 200, content_type = "text/plain", body = String)))]
pub async fn show(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
) -> Result<Response, ApiError> {
    let Census { devices, telemetry } = state.engine.look(Census::take).await?;
    let page = PageRequest { cursor: None, limit: MAX_ROLLOUTS };
    let mut rollouts: BTreeMap<&str, u64> = BTreeMap::new();
    for record in state.store.rollouts(page).await?.items {
        *rollouts.entry(state_name(record.state)).or_default() += 1;
    }

    let mut text = String::new();
    let head = |text: &mut String, name: &str, kind: &str, help: &str| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    };
    head(&mut text, "slmops_devices", "gauge", "Devices by class and phase.");
    for ((class, phase), number) in &devices {
        let _ = writeln!(text, "slmops_devices{{class=\"{class}\",phase=\"{phase}\"}} {number}");
    }
    head(&mut text, "slmops_rollouts", "gauge", "Rollouts by state.");
    for (name, number) in &rollouts {
        let _ = writeln!(text, "slmops_rollouts{{state=\"{name}\"}} {number}");
    }
    let sums = [
        ("slmops_device_requests", "Requests that devices answered.", telemetry.requests),
        ("slmops_device_errors", "Requests that failed on devices by our fault.", telemetry.errors),
        (
            "slmops_device_generated_tokens",
            "Tokens that devices generated.",
            telemetry.generated_tokens,
        ),
        (
            "slmops_device_worker_crashes",
            "Workers that died unasked on devices.",
            telemetry.worker_crashes,
        ),
        (
            "slmops_device_downloaded_bytes",
            "Bytes that devices pulled.",
            telemetry.downloaded_bytes,
        ),
    ];
    for (name, help, value) in sums {
        head(&mut text, name, "gauge", help);
        let _ = writeln!(text, "{name} {value}");
    }
    let counts = state.metrics.all();
    let name = "slmops_http_requests_total";
    head(&mut text, name, "counter", "HTTP requests by method, route and status.");
    for (labels, requests, _) in &counts {
        let _ = writeln!(text, "{name}{{{labels}}} {requests}");
    }
    let name = "slmops_http_request_seconds_total";
    head(&mut text, name, "counter", "Seconds spent on HTTP requests.");
    for (labels, _, seconds) in &counts {
        let _ = writeln!(text, "{name}{{{labels}}} {seconds:.6}");
    }
    let media_type = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, media_type)], text).into_response())
}
