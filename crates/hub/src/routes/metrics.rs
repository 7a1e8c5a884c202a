//! Numbers for Prometheus (text exposition format 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use slmops_api::device::Phase;
use slmops_fleet_core::rollout::state_name;

use super::{ApiError, AppState};
use crate::auth::AsViewer;
use crate::store::PageRequest;

/// Rollouts counted by state, newest first, at most.
const MAX_ROLLOUTS: u32 = 500;

/// Requests by method, route and status. Routes are templates, so that their number is bounded.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(String, String, u16), Count>>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Count {
    requests: u64,
    seconds: f64,
}

/// Counts a request.
pub async fn count(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "(none)".to_owned(), |path| path.as_str().to_owned());
    let method = match request.method().as_str() {
        known @ ("GET" | "POST" | "PUT" | "PATCH" | "DELETE" | "HEAD" | "OPTIONS") => known,
        _ => "(other)",
    }
    .to_owned();
    let started = Instant::now();
    let response = next.run(request).await;
    let key = (method, route, response.status().as_u16());
    let mut counts = state.metrics.requests.lock().unwrap_or_else(PoisonError::into_inner);
    let count = counts.entry(key).or_default();
    count.requests += 1;
    count.seconds += started.elapsed().as_secs_f64();
    drop(counts);
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

/// Metrics in Prometheus' text format. Needs a viewer's token.
#[utoipa::path(get, path = "/metrics", tag = "hub",
    responses((status = 200, content_type = "text/plain", body = String)))]
pub async fn show(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
) -> Result<Response, ApiError> {
    let snapshot = state.store.snapshot(vec![]).await?;
    let mut devices: BTreeMap<(String, &str), u64> = BTreeMap::new();
    let (mut requests, mut tokens, mut errors, mut crashes, mut bytes) = (0, 0, 0, 0, 0);
    for device in snapshot.devices.iter().filter(|device| !device.revoked) {
        let class = device.classify(&snapshot.classes).class.to_string();
        let phase = phase_name(device.report.as_ref().map(|report| &report.phase));
        *devices.entry((class, phase)).or_default() += 1;
        if let Some(report) = &device.report {
            requests += report.telemetry.requests;
            tokens += report.telemetry.generated_tokens;
            errors += report.telemetry.errors;
            crashes += report.telemetry.worker_crashes;
            bytes += report.telemetry.downloaded_bytes;
        }
    }
    let page = PageRequest { cursor: None, limit: MAX_ROLLOUTS };
    let mut rollouts: BTreeMap<&str, u64> = BTreeMap::new();
    for record in state.store.rollouts(page).await?.items {
        *rollouts.entry(state_name(record.rollout.state)).or_default() += 1;
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
        ("slmops_device_requests", "Requests that devices answered.", requests),
        ("slmops_device_errors", "Requests that failed on devices by our fault.", errors),
        ("slmops_device_generated_tokens", "Tokens that devices generated.", tokens),
        ("slmops_device_worker_crashes", "Workers that died unasked on devices.", crashes),
        ("slmops_device_downloaded_bytes", "Bytes that devices pulled.", bytes),
    ];
    for (name, help, value) in sums {
        head(&mut text, name, "gauge", help);
        let _ = writeln!(text, "{name} {value}");
    }
    let counts = state.metrics.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let name = "slmops_http_requests_total";
    head(&mut text, name, "counter", "HTTP requests by method, route and status.");
    for ((method, route, status), count) in &counts {
        let labels = format!("method=\"{method}\",route=\"{route}\",status=\"{status}\"");
        let _ = writeln!(text, "{name}{{{labels}}} {}", count.requests);
    }
    let name = "slmops_http_request_seconds_total";
    head(&mut text, name, "counter", "Seconds spent on HTTP requests.");
    for ((method, route, status), count) in &counts {
        let labels = format!("method=\"{method}\",route=\"{route}\",status=\"{status}\"");
        let _ = writeln!(text, "{name}{{{labels}}} {:.6}", count.seconds);
    }
    let media_type = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, media_type)], text).into_response())
}
