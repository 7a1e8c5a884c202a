//! Rollouts.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use slmops_api::delta::Transfers;
use slmops_api::plan::RolloutPlan;
use slmops_api::problem::Problem;
use slmops_api::rollout::{NewApproval, NewRollout, Outcome, Rollout, RolloutDevice};
use slmops_api::{Page, RolloutId};
use slmops_fleet_core::deltas;
use slmops_fleet_core::rollout::Command;

use super::input::{Body, PageQuery, Path, Query};
use super::releases::publisher_key;
use super::{ApiError, AppState, by, new_id};
use crate::auth::{AsOperator, AsViewer, Operator};

/// Start a rollout. Asking again for one that is under way gives that one.
#[utoipa::path(post, path = "/v1/rollouts", tag = "rollouts", request_body = NewRollout,
    responses((status = 201, body = Rollout), (status = 200, body = Rollout),
        (status = 404, body = Problem), (status = 409, body = Problem),
        (status = 422, body = Problem)))]
pub async fn create(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Body(asked): Body<NewRollout>,
) -> Result<(StatusCode, Json<Rollout>), ApiError> {
    if asked.promotion.is_some() {
        let detail = "`promotion` is set by promoting a release";
        return Err(ApiError::bad_request(detail, "`slm release promote` makes such a rollout"));
    }
    // A release that is not there is the engine's to refuse.
    if let Ok(release) = state.store.release(asked.model.clone(), asked.version.clone()).await {
        publisher_key(&state, &release.release).await?;
    }
    let (rollout, new) = state.engine.create_rollout(by(&operator), new_id("r"), asked).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(rollout)))
}

/// What a rollout would do to whom, wave by wave. Nothing of it happens.
#[utoipa::path(post, path = "/v1/rollouts/plan", tag = "rollouts", request_body = NewRollout,
    responses((status = 200, body = RolloutPlan), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 422, body = Problem)))]
pub async fn forecast(
    State(state): State<AppState>,
    AsViewer(viewer): AsViewer,
    Body(asked): Body<NewRollout>,
) -> Result<Json<RolloutPlan>, ApiError> {
    Ok(Json(state.engine.forecast(by(&viewer), asked).await?))
}

/// What a rollout that is not over will do from now on.
#[utoipa::path(get, path = "/v1/rollouts/{id}/plan", tag = "rollouts",
    params(("id" = String, Path)),
    responses((status = 200, body = RolloutPlan), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub async fn foresee(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Path(id): Path<RolloutId>,
) -> Result<Json<RolloutPlan>, ApiError> {
    Ok(Json(state.engine.foresee(id).await?))
}

/// Rollouts without their devices, newest first.
#[utoipa::path(get, path = "/v1/rollouts", tag = "rollouts",
    params(("cursor" = Option<String>, Query), ("limit" = Option<u32>, Query)),
    responses((status = 200, body = Page<Rollout>)))]
pub async fn list(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Query(query): Query<PageQuery>,
) -> Result<Json<Page<Rollout>>, ApiError> {
    Ok(Json(state.store.rollouts(query.into()).await?))
}

/// Every device of a rollout, in wave order.
#[utoipa::path(get, path = "/v1/rollouts/{id}/devices", tag = "rollouts",
    params(("id" = String, Path), ("cursor" = Option<String>, Query),
        ("limit" = Option<u32>, Query)),
    responses((status = 200, body = Page<RolloutDevice>), (status = 404, body = Problem)))]
pub async fn devices(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Path(id): Path<RolloutId>,
    Query(query): Query<PageQuery>,
) -> Result<Json<Page<RolloutDevice>>, ApiError> {
    Ok(Json(state.store.rollout_devices(id, query.into()).await?))
}

/// One rollout, with the first 500 of its devices.
#[utoipa::path(get, path = "/v1/rollouts/{id}", tag = "rollouts", params(("id" = String, Path)),
    responses((status = 200, body = Rollout), (status = 404, body = Problem)))]
pub async fn get(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Path(id): Path<RolloutId>,
) -> Result<Json<Rollout>, ApiError> {
    Ok(Json(state.store.rollout(id).await?))
}

/// Why a rollout is where it is: every decision with its evidence, as text.
#[utoipa::path(get, path = "/v1/rollouts/{id}/why", tag = "rollouts", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/plain", body = String),
        (status = 404, body = Problem)))]
pub async fn why(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Path(id): Path<RolloutId>,
) -> Result<String, ApiError> {
    Ok(slmops_fleet_core::rollout::why(&state.store.rollout(id).await?))
}

async fn command(
    state: &AppState,
    operator: &Operator,
    id: RolloutId,
    command: Command,
) -> Result<Json<Rollout>, ApiError> {
    Ok(Json(state.engine.command(by(operator), id, command).await?))
}

/// Hold a rollout: devices that were told go on, no other is told.
#[utoipa::path(post, path = "/v1/rollouts/{id}/pause", tag = "rollouts",
    params(("id" = String, Path)),
    responses((status = 200, body = Rollout), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub async fn pause(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<RolloutId>,
) -> Result<Json<Rollout>, ApiError> {
    command(&state, &operator, id, Command::Pause).await
}

/// Go on after a pause, or after a halt in spite of its failures.
#[utoipa::path(post, path = "/v1/rollouts/{id}/resume", tag = "rollouts",
    params(("id" = String, Path)),
    responses((status = 200, body = Rollout), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub async fn resume(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<RolloutId>,
) -> Result<Json<Rollout>, ApiError> {
    command(&state, &operator, id, Command::Resume).await
}

/// Agree that a wave starts. Agreeing again changes nothing.
#[utoipa::path(post, path = "/v1/rollouts/{id}/approve", tag = "rollouts",
    params(("id" = String, Path)), request_body = NewApproval,
    responses((status = 200, body = Rollout), (status = 403, body = Problem),
        (status = 404, body = Problem), (status = 409, body = Problem)))]
pub async fn approve(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<RolloutId>,
    Body(NewApproval { wave }): Body<NewApproval>,
) -> Result<Json<Rollout>, ApiError> {
    command(&state, &operator, id, Command::Approve { wave }).await
}

/// End a rollout where it stands.
#[utoipa::path(post, path = "/v1/rollouts/{id}/abort", tag = "rollouts",
    params(("id" = String, Path)),
    responses((status = 200, body = Rollout), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub async fn abort(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<RolloutId>,
) -> Result<Json<Rollout>, ApiError> {
    command(&state, &operator, id, Command::Abort).await
}

/// Take a rollout back: its devices get a new generation that names what they ran before.
#[utoipa::path(post, path = "/v1/rollouts/{id}/rollback", tag = "rollouts",
    params(("id" = String, Path)),
    responses((status = 200, body = Rollout), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub async fn rollback(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<RolloutId>,
) -> Result<Json<Rollout>, ApiError> {
    command(&state, &operator, id, Command::Rollback).await
}

/// How the model came to the devices that the rollout shows: whole, by deltas, from their sites.
#[utoipa::path(get, path = "/v1/rollouts/{id}/transfers", tag = "rollouts",
    params(("id" = String, Path)),
    responses((status = 200, body = Transfers), (status = 404, body = Problem)))]
pub async fn transfers(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Path(id): Path<RolloutId>,
) -> Result<Json<Transfers>, ApiError> {
    let parts = state.store.rollout(id).await?.devices;
    let confirmed = parts.iter().filter(|part| part.outcome == Outcome::Confirmed);
    let devices = state.store.devices_of(confirmed.map(|it| it.device.clone()).collect()).await?;
    let told: Vec<_> = devices
        .into_iter()
        .filter_map(|device| {
            let part = parts.iter().find(|part| part.device == device.id)?;
            let report = device.report?;
            let running = report.running.filter(|it| Some(it.manifest) == part.manifest)?;
            let transfer = report.telemetry.transfer.filter(|it| it.weights == running.weights)?;
            let took = part.finished_at?.duration_since(part.started_at?).as_secs();
            Some((transfer, u64::try_from(took).unwrap_or(0)))
        })
        .collect();
    Ok(Json(deltas::transfers(&told)))
}
