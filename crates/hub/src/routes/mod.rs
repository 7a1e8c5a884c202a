//! The HTTP interface: `/v1/…` for operators and devices, `/health`, `/metrics`, `/openapi.json`.
//! Handlers check, ask the store or the engine, and answer; they never decide.
//! Start reading at [`router`].

mod channels;
mod devices;
mod error;
mod fleet;
mod input;
mod metrics;
mod openapi;
mod operators;
mod orders;
mod packages;
mod releases;
mod rollouts;
mod telemetry;
#[cfg(test)]
mod tests;
mod webhooks;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRef, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, patch, post, put};
use jiff::Timestamp;
use rand::RngCore as _;
use slmops_artifact::Digest;
use tokio::sync::{Notify, Semaphore};
use tower_http::timeout::TimeoutLayer;

use crate::auth::{Auth, Operator};
use crate::engine::Engine;
use crate::events::{Board, Events};
use crate::neighbours::Neighbours;
use crate::store::{By, Store};

pub use error::ApiError;
pub use metrics::Metrics;
pub use openapi::document as openapi_document;
pub use packages::Packages;

/// The longest body of most calls, in bytes.
const MAX_BODY_BYTES: usize = 1 << 20;
/// The longest release, in bytes: it carries every variant's report.
const MAX_RELEASE_BYTES: usize = 32 << 20;
/// Calls of devices answered at the same time, long polls and downloads apart; more are turned away.
const MAX_DEVICE_CALLS: usize = 1024;
/// How long a call may take, long polls and the registry's transfers apart.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// What handlers share.
#[derive(Clone)]
pub struct AppState {
    inner: Arc<Shared>,
}

/// The parts of [`AppState`].
pub struct Shared {
    /// What the hub remembers.
    pub store: Arc<dyn Store>,
    /// Who calls.
    pub auth: Auth,
    /// What devices should be, in memory.
    pub board: Board,
    /// Change notices.
    pub events: Events,
    /// Decisions.
    pub engine: Engine,
    /// The registry, as release checks see it.
    pub packages: Arc<dyn Packages>,
    /// Counters.
    pub metrics: Metrics,
    /// The digest of the CA that invitations pin.
    pub ca: Digest,
    /// The URL that invitations name; known once the hub listens.
    pub url: OnceLock<String>,
    /// Who at a site has what.
    pub neighbours: Neighbours,
    /// Told when a device could use a delta that nobody wanted before.
    pub delta_wanted: Arc<Notify>,
}

impl AppState {
    /// A state over its parts.
    pub fn new(shared: Shared) -> Self {
        Self { inner: Arc::new(shared) }
    }
}

impl std::ops::Deref for AppState {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.inner
    }
}

impl FromRef<AppState> for Auth {
    fn from_ref(state: &AppState) -> Self {
        state.auth.clone()
    }
}

/// The operator as the audit log names them, now.
fn by(operator: &Operator) -> By {
    By { actor: operator.actor(), at: Timestamp::now() }
}

/// A new id: `prefix` and 64 random bits in hex.
fn new_id<T: std::str::FromStr>(prefix: &str) -> T {
    let id = format!("{prefix}{:016x}", rand::rng().next_u64());
    id.parse().ok().expect("a prefix and hex digits are an id")
}

/// Takes a device's call on, unless as many are under way already. Turning one away at once costs
/// little; letting it wait for its turn until it times out costs a connection and an answer.
async fn admit(State(calls): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    match calls.try_acquire() {
        Ok(_permit) => next.run(request).await,
        Err(_) => ApiError::Busy.into_response(),
    }
}

/// Every route but the registry's and the dashboard's.
pub fn router(state: AppState) -> Router {
    let slow = Router::new()
        .route("/v1/device/desired", get(devices::desired))
        .route("/v1/events", get(fleet::events));
    let releases = Router::new()
        .route("/v1/releases", get(releases::list).post(releases::create))
        .layer(DefaultBodyLimit::max(MAX_RELEASE_BYTES))
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, REQUEST_TIMEOUT));
    let calls = Arc::new(Semaphore::new(MAX_DEVICE_CALLS));
    let devices = Router::new()
        .route("/v1/enrol", post(devices::enrol))
        .route("/v1/device/challenge", post(devices::challenge))
        .route("/v1/device/token", post(devices::token))
        .route("/v1/device/report", post(devices::report))
        .route("/v1/device/sources", get(devices::sources))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, REQUEST_TIMEOUT))
        .layer(middleware::from_fn_with_state(calls, admit));
    let quick = Router::new()
        .route("/v1/invitations", get(fleet::invitations).post(fleet::invite))
        .route("/v1/invitations/{id}", delete(fleet::withdraw_invitation))
        .route("/v1/fleet/summary", get(fleet::summary))
        .route("/v1/telemetry", get(telemetry::series))
        .route("/v1/devices", get(fleet::devices))
        .route(
            "/v1/devices/{id}",
            patch(fleet::change_device).get(fleet::device).delete(fleet::revoke_device),
        )
        .route("/v1/devices/{id}/pin", put(orders::pin).delete(orders::unpin))
        .route("/v1/devices/{id}/exclusion", put(orders::exclude).delete(orders::include))
        .route("/v1/devices/{id}/explain", get(fleet::explain))
        .route("/v1/devices/{id}/history", get(fleet::history))
        .route("/v1/classes", get(fleet::classes))
        .route("/v1/classes/{name}", put(fleet::put_class).delete(fleet::delete_class))
        .route("/v1/blueprints", get(fleet::blueprints))
        .route(
            "/v1/blueprints/{layer}/{name}",
            put(fleet::put_blueprint).delete(fleet::delete_blueprint),
        )
        .route("/v1/releases/{model}/{version}", get(releases::get))
        .route("/v1/releases/{model}/{version}/deltas", get(releases::deltas))
        .route("/v1/releases/{model}/{version}/promote", post(channels::promote))
        .route("/v1/releases/{model}/{version}/promote/plan", post(channels::forecast))
        .route("/v1/channels", get(channels::list))
        .route("/v1/channels/{name}", put(channels::put).delete(channels::delete))
        .route("/v1/rollouts", get(rollouts::list).post(rollouts::create))
        .route("/v1/rollouts/plan", post(rollouts::forecast))
        .route("/v1/rollouts/{id}", get(rollouts::get))
        .route("/v1/rollouts/{id}/plan", get(rollouts::foresee))
        .route("/v1/rollouts/{id}/devices", get(rollouts::devices))
        .route("/v1/rollouts/{id}/pause", post(rollouts::pause))
        .route("/v1/rollouts/{id}/resume", post(rollouts::resume))
        .route("/v1/rollouts/{id}/approve", post(rollouts::approve))
        .route("/v1/rollouts/{id}/abort", post(rollouts::abort))
        .route("/v1/rollouts/{id}/rollback", post(rollouts::rollback))
        .route("/v1/rollouts/{id}/why", get(rollouts::why))
        .route("/v1/rollouts/{id}/transfers", get(rollouts::transfers))
        .route("/v1/quarantine", get(orders::quarantine))
        .route("/v1/quarantine/lift", post(orders::lift))
        .route("/v1/webhooks", get(webhooks::list).post(webhooks::create))
        .route("/v1/webhooks/{id}", delete(webhooks::remove))
        .route("/v1/webhooks/{id}/rotate", post(webhooks::rotate))
        .route("/v1/webhooks/{id}/test", post(webhooks::test))
        .route("/v1/webhooks/{id}/deliveries", get(webhooks::deliveries))
        .route("/v1/webhooks/{id}/redeliver", post(webhooks::redeliver))
        .route("/v1/whoami", get(operators::whoami))
        .route("/v1/audit", get(operators::audit))
        .route("/v1/audit/verify", get(operators::verify_audit))
        .route("/v1/tokens", get(operators::tokens).post(operators::create_token))
        .route("/v1/tokens/{id}", delete(operators::delete_token))
        .route("/v1/keys", get(operators::keys).post(operators::add_key))
        .route("/health", get(operators::health))
        .route("/metrics", get(metrics::show))
        .route("/openapi.json", get(openapi::show))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, REQUEST_TIMEOUT));
    slow.merge(releases)
        .merge(devices)
        .merge(quick)
        .route("/v1/{*rest}", axum::routing::any(error::no_such_path))
        .layer(middleware::from_fn_with_state(state.clone(), metrics::count))
        .with_state(state)
}
