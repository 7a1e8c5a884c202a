//! What operators decide about single devices and failed packages.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use slmops_api::device::Device;
use slmops_api::orders::{Lift, MAX_REASON_BYTES, NewPin, Quarantined, QuarantinedPackage, Reason};
use slmops_api::problem::Problem;
use slmops_api::{DeviceId, Page};

use super::fleet::shown;
use super::input::{Body, Path, Query};
use super::{ApiError, AppState, by};
use crate::auth::{AsOperator, AsViewer, Operator};
use crate::store::OrdersChange;

/// Checks a reason: one short line of plain text.
pub fn check_reason(reason: &str) -> Result<(), ApiError> {
    let plain = !reason.chars().any(char::is_control);
    if reason.trim().is_empty() || reason.len() > MAX_REASON_BYTES || !plain {
        return Err(ApiError::bad_request(
            format!("`reason` is not one line of at most {MAX_REASON_BYTES} bytes"),
            "say why in a few words; it is kept in the audit log",
        ));
    }
    Ok(())
}

async fn order(
    state: &AppState,
    operator: &Operator,
    id: DeviceId,
    change: OrdersChange,
) -> Result<Json<Device>, ApiError> {
    let device = state.store.order_device(by(operator), id, change).await?;
    state.events.announce("device", &device.id);
    state.engine.device_changed(device.id.clone());
    Ok(Json(shown(state, &device, &state.store.classes().await?)))
}

/// Hold a device to a release, whatever rollouts say.
#[utoipa::path(put, path = "/v1/devices/{id}/pin", tag = "fleet", params(("id" = String, Path)),
    request_body = NewPin,
    responses((status = 200, body = Device), (status = 404, body = Problem),
        (status = 422, body = Problem)))]
pub async fn pin(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<String>,
    Body(wanted): Body<NewPin>,
) -> Result<Json<Device>, ApiError> {
    check_reason(&wanted.reason)?;
    let id = state.store.device(id).await?.id;
    state.engine.check_pin(id.clone(), wanted.clone()).await?;
    order(&state, &operator, id, OrdersChange::Pin(wanted)).await
}

/// Why an order ends.
#[derive(Deserialize)]
pub struct ReasonQuery {
    reason: Option<String>,
}

impl ReasonQuery {
    fn checked(self) -> Result<Option<String>, ApiError> {
        self.reason.as_deref().map_or(Ok(()), check_reason)?;
        Ok(self.reason)
    }
}

/// Hold a device to no release any more; it keeps what it has until a rollout means it.
#[utoipa::path(delete, path = "/v1/devices/{id}/pin", tag = "fleet",
    params(("id" = String, Path),
        ("reason" = Option<String>, Query, description = "Why, for the audit log")),
    responses((status = 200, body = Device), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub async fn unpin(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<String>,
    Query(reason): Query<ReasonQuery>,
) -> Result<Json<Device>, ApiError> {
    let change = OrdersChange::Unpin(reason.checked()?);
    let id = state.store.device(id).await?.id;
    order(&state, &operator, id, change).await
}

/// Keep a device out of rollouts; it keeps what it has.
#[utoipa::path(put, path = "/v1/devices/{id}/exclusion", tag = "fleet",
    params(("id" = String, Path)), request_body = Reason,
    responses((status = 200, body = Device), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub async fn exclude(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<String>,
    Body(Reason { reason }): Body<Reason>,
) -> Result<Json<Device>, ApiError> {
    check_reason(&reason)?;
    let id = state.store.device(id).await?.id;
    order(&state, &operator, id, OrdersChange::Exclude(reason)).await
}

/// Let a device take part in rollouts again.
#[utoipa::path(delete, path = "/v1/devices/{id}/exclusion", tag = "fleet",
    params(("id" = String, Path),
        ("reason" = Option<String>, Query, description = "Why, for the audit log")),
    responses((status = 200, body = Device), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub async fn include(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<String>,
    Query(reason): Query<ReasonQuery>,
) -> Result<Json<Device>, ApiError> {
    let change = OrdersChange::Include(reason.checked()?);
    let id = state.store.device(id).await?.id;
    order(&state, &operator, id, change).await
}

/// Devices named with a quarantined manifest, at most.
const MAX_REJECTED_BY: usize = 100;

/// What failed in a class and is not offered to it any more, newest first.
#[utoipa::path(get, path = "/v1/quarantine", tag = "rollouts",
    responses((status = 200, body = Page<Quarantined>)))]
pub async fn quarantine(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
) -> Result<Json<Page<Quarantined>>, ApiError> {
    let rows = state.store.quarantine().await?;
    let items = state.engine.look(move |world, _| {
        let explained = rows.into_iter().map(|row| {
            let releases = world.releases.values();
            let packages = releases.flat_map(|release| {
                let same = release.variants.iter().filter(|it| it.manifest == row.manifest);
                same.map(|variant| QuarantinedPackage {
                    model: release.model.clone(),
                    version: release.version.clone(),
                    variant: variant.name.clone(),
                })
            });
            let of_class = world.devices.iter().filter(|device| device.class == row.class);
            let rejected = of_class.filter(|device| device.rejected(&row.manifest));
            Quarantined {
                packages: packages.collect(),
                rejected_by: rejected
                    .take(MAX_REJECTED_BY)
                    .map(|device| device.name.clone())
                    .collect(),
                manifest: row.manifest,
                class: row.class,
                since: row.since,
                rollout: row.rollout,
            }
        });
        explained.collect::<Vec<_>>()
    });
    Ok(Json(Page { items: items.await?, cursor: None }))
}

/// Let a failed package be offered to a class again. Devices on which it failed refuse it all the
/// same.
#[utoipa::path(post, path = "/v1/quarantine/lift", tag = "rollouts", request_body = Lift,
    responses((status = 204), (status = 400, body = Problem), (status = 404, body = Problem)))]
pub async fn lift(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Body(wanted): Body<Lift>,
) -> Result<StatusCode, ApiError> {
    check_reason(&wanted.reason)?;
    let manifest = wanted.manifest;
    state.store.lift(by(&operator), wanted).await?;
    state.events.announce("quarantine", manifest);
    state.engine.frame_changed();
    Ok(StatusCode::NO_CONTENT)
}
