//! Channels, and releases that are promoted between them.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use slmops_api::channel::{Channel, ChannelStatus, MAX_CHANNELS, NewPromotion};
use slmops_api::plan::RolloutPlan;
use slmops_api::problem::Problem;
use slmops_api::rollout::Rollout;
use slmops_api::{ChannelName, ModelName, Page};
use slmops_fleet_core::rollout;

use super::input::{Body, Path};
use super::orders::check_reason;
use super::releases::{parse_version, publisher_key};
use super::{ApiError, AppState, by, new_id};
use crate::auth::{AsOperator, AsViewer};
use crate::store::StoreError;

/// All channels, in the order in which releases pass them, with what is on each.
#[utoipa::path(get, path = "/v1/channels", tag = "rollouts",
    responses((status = 200, body = Page<ChannelStatus>)))]
pub async fn list(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
) -> Result<Json<Page<ChannelStatus>>, ApiError> {
    Ok(Json(Page { items: state.engine.channels().await?, cursor: None }))
}

/// Add or change a channel. Rollouts of earlier promotions go on as they were.
#[utoipa::path(put, path = "/v1/channels/{name}", tag = "rollouts",
    params(("name" = String, Path)), request_body = Channel,
    responses((status = 200, body = Channel), (status = 400, body = Problem),
        (status = 422, body = Problem)))]
pub async fn put(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(name): Path<ChannelName>,
    Body(channel): Body<Channel>,
) -> Result<Json<Channel>, ApiError> {
    if channel.name != name {
        let detail = format!("the path says channel {name}, the body {}", channel.name);
        return Err(ApiError::bad_request(detail, "send the same name in both"));
    }
    rollout::validate(&channel.policy).map_err(StoreError::from)?;
    let known = state.store.channels().await?;
    if known.len() >= MAX_CHANNELS && !known.iter().any(|known| known.name == name) {
        let detail = format!("there are {MAX_CHANNELS} channels already");
        return Err(ApiError::bad_request(detail, "remove one that nobody needs"));
    }
    // Up the chain to its first channel, which must not be this one again.
    let mut before = channel.after.clone();
    for _ in 0..=known.len() {
        let Some(earlier) = before else { break };
        if earlier == name {
            let detail = format!("channel {name} would come after itself");
            return Err(ApiError::bad_request(detail, "`slm channel list` shows their order"));
        }
        let found = known.iter().find(|known| known.name == earlier).ok_or_else(|| {
            let detail = format!("channel {name} is to come after {earlier}, which does not exist");
            ApiError::bad_request(detail, format!("make it first: `slm channel set {earlier}`"))
        })?;
        before = found.after.clone();
    }
    state.store.put_channel(by(&operator), channel.clone()).await?;
    state.events.announce("channel", &name);
    Ok(Json(channel))
}

/// Remove a channel that nothing follows.
#[utoipa::path(delete, path = "/v1/channels/{name}", tag = "rollouts",
    params(("name" = String, Path)),
    responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub async fn delete(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(name): Path<ChannelName>,
) -> Result<StatusCode, ApiError> {
    let channels = state.engine.channels().await?;
    let conflict = |detail: String, hint: &str| {
        ApiError::from(StoreError::Conflict { detail, hint: hint.to_owned() })
    };
    let next = channels.iter().find(|other| other.channel.after.as_ref() == Some(&name));
    if let Some(next) = next {
        let detail = format!("channel {} comes after {name}", next.channel.name);
        return Err(conflict(detail, "let it come after another one: `slm channel set --after`"));
    }
    let followers = channels.iter().find(|known| known.channel.name == name);
    if let Some(followers) = followers.map(|known| known.followers).filter(|number| *number > 0) {
        let detail = format!("{followers} devices follow channel {name}");
        return Err(conflict(detail, "change their blueprints first: `slm blueprint list`"));
    }
    state.store.delete_channel(by(&operator), name.clone()).await?;
    state.events.announce("channel", &name);
    Ok(StatusCode::NO_CONTENT)
}

/// Bring a release to a channel: a rollout to the devices that follow it, by the channel's policy.
/// Refused if the release was not confirmed on the channel before, unless `force` says why.
#[utoipa::path(post, path = "/v1/releases/{model}/{version}/promote", tag = "rollouts",
    params(("model" = String, Path), ("version" = String, Path)), request_body = NewPromotion,
    responses((status = 201, body = Rollout), (status = 200, body = Rollout),
        (status = 404, body = Problem), (status = 409, body = Problem)))]
pub async fn promote(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path((model, version)): Path<(ModelName, String)>,
    Body(wanted): Body<NewPromotion>,
) -> Result<(StatusCode, Json<Rollout>), ApiError> {
    if let Some(reason) = &wanted.force {
        check_reason(reason)?;
    }
    let release = state.store.release(model, parse_version(&version)?).await?;
    publisher_key(&state, &release.release).await?;
    let asked = state.engine.promotion(&release.release, wanted).await?;
    let (rollout, new) = state.engine.create_rollout(by(&operator), new_id("r"), asked).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(rollout)))
}

/// What bringing a release to a channel would do to whom, wave by wave. Nothing of it happens.
#[utoipa::path(post, path = "/v1/releases/{model}/{version}/promote/plan", tag = "rollouts",
    params(("model" = String, Path), ("version" = String, Path)), request_body = NewPromotion,
    responses((status = 200, body = RolloutPlan), (status = 404, body = Problem),
        (status = 409, body = Problem)))]
pub async fn forecast(
    State(state): State<AppState>,
    AsViewer(viewer): AsViewer,
    Path((model, version)): Path<(ModelName, String)>,
    Body(wanted): Body<NewPromotion>,
) -> Result<Json<RolloutPlan>, ApiError> {
    let release = state.store.release(model, parse_version(&version)?).await?;
    let asked = state.engine.promotion(&release.release, wanted).await?;
    Ok(Json(state.engine.forecast(by(&viewer), asked).await?))
}
