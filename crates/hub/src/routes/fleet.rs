//! Invitations, devices, classes, blueprints and change notices.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::stream::{self, Stream, StreamExt as _};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use slmops_api::blueprint::{Explanation, Layer, StoredBlueprint};
use slmops_api::device::{
    Device, DeviceEvent, DevicePatch, Invitation, InvitationInfo, InvitationText, NewInvitation,
};
use slmops_api::fleet::{DeviceFilter, FleetSummary, MAX_SEARCH_BYTES};
use slmops_api::id::MAX_NAME_BYTES;
use slmops_api::model::DeviceClass;
use slmops_api::problem::Problem;
use slmops_api::{ClassName, InvitationId, Page};
use slmops_fleet_core::{blueprint, fit, room, survey, words};
use tokio_stream::wrappers::BroadcastStream;

use super::input::{
    Body, PageQuery, Path, Query, Text, check_label_count, check_labels, parse_name,
};
use super::{ApiError, AppState, by, new_id};
use crate::auth::{self, AsAdmin, AsOperator, AsViewer};
use crate::engine::layers_of;
use crate::store::{DeviceChange, NewInvitationRow, PageRequest, StoredDevice};

/// How long an invitation is valid unless asked otherwise, in seconds.
const DEFAULT_INVITATION_S: u64 = 24 * 3600;
/// The longest validity of an invitation, in seconds: 30 days.
const MAX_INVITATION_S: u64 = 30 * 24 * 3600;
/// The longest text of a class, in bytes.
const MAX_CLASS_TEXT_BYTES: usize = 500;
/// Silence on an event stream, at most.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Make an invitation; its text is shown once.
#[utoipa::path(post, path = "/v1/invitations", tag = "fleet", request_body = NewInvitation,
    responses((status = 201, body = Invitation)))]
pub async fn invite(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Body(wanted): Body<NewInvitation>,
) -> Result<(StatusCode, Json<Invitation>), ApiError> {
    check_labels(&wanted.labels)?;
    let valid_s = wanted.valid_s.unwrap_or(DEFAULT_INVITATION_S).clamp(1, MAX_INVITATION_S);
    let by = by(&operator);
    let expires_at = by
        .at
        .checked_add(SignedDuration::from_secs(valid_s as i64))
        .map_err(|error| ApiError::bad_request(error.to_string(), "ask for a shorter time"))?;
    let secret = auth::new_invitation_secret();
    let id: InvitationId = new_id("i");
    let text = auth::encode_invitation(&InvitationText {
        url: state.url.get().cloned().unwrap_or_default(),
        ca: state.ca,
        id: id.clone(),
        secret: secret.expose().to_owned(),
    });
    let info = InvitationInfo {
        id: id.clone(),
        labels: wanted.labels,
        site: wanted.site,
        created_at: by.at,
        expires_at,
        used_by: None,
    };
    state.store.add_invitation(by, NewInvitationRow { info, secret: secret.hash() }).await?;
    state.events.announce("invitation", &id);
    let invitation = Invitation { id, text: text.expose().to_owned(), expires_at };
    Ok((StatusCode::CREATED, Json(invitation)))
}

/// All invitations, newest first, without their secrets.
#[utoipa::path(get, path = "/v1/invitations", tag = "fleet",
    responses((status = 200, body = Page<InvitationInfo>)))]
pub async fn invitations(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
) -> Result<Json<Page<InvitationInfo>>, ApiError> {
    Ok(Json(Page { items: state.store.invitations().await?, cursor: None }))
}

/// Withdraw an invitation that nobody used.
#[utoipa::path(delete, path = "/v1/invitations/{id}", tag = "fleet",
    params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub async fn withdraw_invitation(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<InvitationId>,
) -> Result<StatusCode, ApiError> {
    state.store.withdraw_invitation(by(&operator), id.clone()).await?;
    state.events.announce("invitation", &id);
    Ok(StatusCode::NO_CONTENT)
}

pub(super) fn shown(state: &AppState, device: &StoredDevice, classes: &[DeviceClass]) -> Device {
    let mut shown = device.to_api(classes);
    let heard = state.board.last_seen(&device.id);
    shown.last_seen = heard.map_or(shown.last_seen, |heard| heard.max(shown.last_seen));
    shown
}

/// Devices by name: all of them, or those that a filter means.
#[utoipa::path(get, path = "/v1/devices", tag = "fleet",
    params(DeviceFilter, ("cursor" = Option<String>, Query), ("limit" = Option<u32>, Query)),
    responses((status = 200, body = Page<Device>), (status = 400, body = Problem)))]
pub async fn devices(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Query(filter): Query<DeviceFilter>,
    Query(query): Query<PageQuery>,
) -> Result<Json<Page<Device>>, ApiError> {
    check_filter(&filter)?;
    let request = PageRequest::from(query);
    let page = match filter.is_all() {
        true => state.store.devices(request).await?,
        false => found(&state, filter, request).await?,
    };
    let classes = state.store.classes().await?;
    let items = page.items.iter().map(|device| shown(&state, device, &classes)).collect();
    Ok(Json(Page { items, cursor: page.cursor }))
}

/// Finds devices in the fleet in memory, and reads those of the page from the store.
async fn found(
    state: &AppState,
    filter: DeviceFilter,
    request: PageRequest,
) -> Result<Page<StoredDevice>, ApiError> {
    let PageRequest { cursor, limit } = request;
    let limit = limit as usize;
    let found = state.engine.look(move |world, _| {
        let after = cursor.unwrap_or_default();
        let found = survey::page(world, &filter, &after, limit + 1);
        found.into_iter().map(|device| (device.id.clone(), device.name.clone())).collect::<Vec<_>>()
    });
    let mut found = found.await?;
    let more = found.len() > limit;
    found.truncate(limit);
    let cursor = found.last().filter(|_| more).map(|(_, name)| name.clone());
    let ids = found.into_iter().map(|(id, _)| id).collect();
    Ok(Page { items: state.store.devices_of(ids).await?, cursor })
}

fn check_filter(filter: &DeviceFilter) -> Result<(), ApiError> {
    if filter.search.as_ref().is_some_and(|text| text.len() > MAX_SEARCH_BYTES) {
        let detail = format!("`search` is longer than {MAX_SEARCH_BYTES} bytes");
        return Err(ApiError::bad_request(detail, "search for less"));
    }
    Ok(())
}

/// By which label a summary groups devices.
#[derive(Deserialize)]
pub struct ByQuery {
    by: Option<String>,
}

/// The devices that a filter means, counted: by state, class and release, a label's values, and when
/// they were last heard of.
#[utoipa::path(get, path = "/v1/fleet/summary", tag = "fleet",
    params(DeviceFilter,
        ("by" = Option<String>, Query, description = "The label of `groups`; `site` if absent")),
    responses((status = 200, body = FleetSummary), (status = 400, body = Problem)))]
pub async fn summary(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Query(filter): Query<DeviceFilter>,
    Query(ByQuery { by }): Query<ByQuery>,
) -> Result<Json<FleetSummary>, ApiError> {
    check_filter(&filter)?;
    let by = by.unwrap_or_else(|| "site".to_owned());
    if !(1..=MAX_NAME_BYTES).contains(&by.len()) {
        return Err(ApiError::bad_request("`by` is no label", "use a label's key, such as `site`"));
    }
    let summary = state.engine.look(move |world, _| survey::summarise(world, &filter, &by));
    Ok(Json(summary.await?))
}

/// One device, by id or name.
#[utoipa::path(get, path = "/v1/devices/{id}", tag = "fleet", params(("id" = String, Path)),
    responses((status = 200, body = Device), (status = 404, body = Problem)))]
pub async fn device(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Path(id): Path<String>,
) -> Result<Json<Device>, ApiError> {
    let device = state.store.device(id).await?;
    Ok(Json(shown(&state, &device, &state.store.classes().await?)))
}

/// Change a device's labels or site.
#[utoipa::path(patch, path = "/v1/devices/{id}", tag = "fleet", params(("id" = String, Path)),
    request_body = DevicePatch,
    responses((status = 200, body = Device), (status = 404, body = Problem)))]
pub async fn change_device(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<String>,
    Body(wanted): Body<DevicePatch>,
) -> Result<Json<Device>, ApiError> {
    let labels = wanted.labels.unwrap_or_default();
    let set = labels.iter().filter_map(|(key, value)| Some((key.clone(), value.clone()?)));
    check_labels(&set.collect())?;
    let site = match wanted.site.as_deref() {
        None => None,
        Some("") => Some(None),
        Some(site) => Some(Some(parse_name(site)?)),
    };
    let device = state.store.device(id).await?;
    let removed = |key: &String| matches!(labels.get(key), Some(None));
    let kept = device.labels.keys().filter(|key| !removed(key));
    let all: BTreeSet<&String> = kept
        .chain(labels.iter().filter(|(_, value)| value.is_some()).map(|(key, _)| key))
        .collect();
    check_label_count(all.len())?;
    let change = DeviceChange { labels, site };
    let id = device.id;
    let device = state.store.change_device(by(&operator), id, change).await?;
    state.events.announce("device", &device.id);
    state.engine.device_changed(device.id.clone());
    Ok(Json(shown(&state, &device, &state.store.classes().await?)))
}

/// Shut a device out: its tokens stop working at once.
#[utoipa::path(delete, path = "/v1/devices/{id}", tag = "fleet", params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = Problem)))]
pub async fn revoke_device(
    State(state): State<AppState>,
    AsAdmin(operator): AsAdmin,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let id = state.store.device(id).await?.id;
    let device = state.store.revoke_device(by(&operator), id).await?;
    state.board.put(&device);
    state.events.announce("device", &device.id);
    state.engine.device_changed(device.id);
    Ok(StatusCode::NO_CONTENT)
}

/// Every effective value of a device with the layer it came from, and how each variant fits.
#[utoipa::path(get, path = "/v1/devices/{id}/explain", tag = "fleet",
    params(("id" = String, Path)),
    responses((status = 200, body = Explanation), (status = 404, body = Problem)))]
pub async fn explain(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Path(id): Path<String>,
) -> Result<Json<Explanation>, ApiError> {
    let device = state.store.device(id).await?;
    let classes = state.store.classes().await?;
    let releases = state.store.catalog().await?;
    let class = device.classify(&classes);
    let layers = layers_of(&device, &classes, &state.store.blueprints().await?);
    let resolved = blueprint::resolve(&layers).map_err(crate::store::StoreError::from)?;
    let mut lines = vec![format!("class {}: {}", class.class, class.why)];
    let model =
        resolved.model.as_ref().or_else(|| device.desired.model.as_ref().map(|model| &model.model));
    let newest = releases
        .iter()
        .filter(|((name, _), _)| model.is_none_or(|model| model == name))
        .max_by(|(a, _), (b, _)| a.1.cmp(&b.1));
    if let Some(((name, version), release)) = newest {
        let trained = release.variants.first().map_or(0, |v| v.shape.trained_context);
        let runtime = resolved.runtime_for(trained);
        lines.push(format!(
            "{name} {version} at {} tokens of context, {} in parallel:",
            runtime.context_tokens, runtime.parallel
        ));
        let budget = device.facts.memory_budget_bytes;
        lines.extend(fit::unmet(release, &device.facts).map(|why| format!("left out: {why}")));
        lines.extend(fit::explain(&release.variants, budget, &runtime));
        if let Ok((chosen, _)) = fit::best(&release.variants, budget, &runtime) {
            let chosen = &release.variants[chosen];
            let file = (chosen.weights, chosen.size_bytes);
            let report = device.report.as_ref();
            let replaces = resolved.rules.replace;
            let room = room::room_for(&device.facts, report, &releases, file, replaces);
            lines.extend(room.words().map(|words| format!("disk: {words}")));
        }
    }
    let orders = device.orders.as_deref().map(words::orders).unwrap_or_default();
    Ok(Json(Explanation { values: resolved.values, orders, fit: lines }))
}

/// A device's history, newest first.
#[utoipa::path(get, path = "/v1/devices/{id}/history", tag = "fleet",
    params(("id" = String, Path), ("cursor" = Option<String>, Query), ("limit" = Option<u32>, Query)),
    responses((status = 200, body = Page<DeviceEvent>), (status = 404, body = Problem)))]
pub async fn history(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Path(id): Path<String>,
    Query(query): Query<PageQuery>,
) -> Result<Json<Page<DeviceEvent>>, ApiError> {
    let id = state.store.device(id).await?.id;
    Ok(Json(state.store.history(id, query.into()).await?))
}

/// All device classes.
#[utoipa::path(get, path = "/v1/classes", tag = "fleet",
    responses((status = 200, body = Page<DeviceClass>)))]
pub async fn classes(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
) -> Result<Json<Page<DeviceClass>>, ApiError> {
    Ok(Json(Page { items: state.store.classes().await?, cursor: None }))
}

/// Add or change a device class.
#[utoipa::path(put, path = "/v1/classes/{name}", tag = "fleet", params(("name" = String, Path)),
    request_body = DeviceClass,
    responses((status = 200, body = DeviceClass), (status = 400, body = Problem)))]
pub async fn put_class(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(name): Path<ClassName>,
    Body(class): Body<DeviceClass>,
) -> Result<Json<DeviceClass>, ApiError> {
    if class.name != name {
        let detail = format!("the path says class {name}, the body {}", class.name);
        return Err(ApiError::bad_request(detail, "send the same name in both"));
    }
    let plain = |text: &str| !text.chars().any(char::is_control);
    let good_type = (1..=32).contains(&class.quantisation.len())
        && class.quantisation.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if class.description.len() > MAX_CLASS_TEXT_BYTES || !plain(&class.description) || !good_type {
        return Err(ApiError::bad_request(
            format!("class {name}: its description or quantisation cannot be used"),
            "a quantisation is a GGUF file type such as Q4_K_M; a description is one short line",
        ));
    }
    if class.min_memory_bytes > i64::MAX as u64 {
        return Err(ApiError::bad_request("min_memory_bytes is beyond all reason", "use bytes"));
    }
    state.store.put_class(by(&operator), class.clone()).await?;
    state.events.announce("class", &name);
    state.engine.frame_changed();
    Ok(Json(class))
}

/// Remove a device class; its devices fall to the classes that are left.
#[utoipa::path(delete, path = "/v1/classes/{name}", tag = "fleet", params(("name" = String, Path)),
    responses((status = 204), (status = 404, body = Problem)))]
pub async fn delete_class(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(name): Path<ClassName>,
) -> Result<StatusCode, ApiError> {
    state.store.delete_class(by(&operator), name.clone()).await?;
    state.events.announce("class", &name);
    state.engine.frame_changed();
    Ok(StatusCode::NO_CONTENT)
}

/// All blueprint layers.
#[utoipa::path(get, path = "/v1/blueprints", tag = "fleet",
    responses((status = 200, body = Page<StoredBlueprint>)))]
pub async fn blueprints(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
) -> Result<Json<Page<StoredBlueprint>>, ApiError> {
    Ok(Json(Page { items: state.store.blueprints().await?, cursor: None }))
}

async fn place(state: &AppState, layer: &str, name: &str) -> Result<Layer, ApiError> {
    Ok(match layer {
        "fleet" if name == "-" => Layer::Fleet,
        "class" => Layer::Class(parse_name(name)?),
        "site" => Layer::Site(parse_name(name)?),
        "device" => Layer::Device(state.store.device(name.to_owned()).await?.id),
        _ => {
            return Err(ApiError::bad_request(
                "there is no such blueprint layer",
                "layers are fleet/-, class/NAME, site/NAME and device/NAME",
            ));
        }
    })
}

/// Add or change a blueprint layer, as TOML. Refused if any device would get values that contradict
/// each other, or if a site or device then sets what it may not override.
#[utoipa::path(put, path = "/v1/blueprints/{layer}/{name}", tag = "fleet",
    params(("layer" = String, Path, description = "fleet, class, site or device"),
        ("name" = String, Path, description = "`-` for the fleet")),
    request_body(content = String, content_type = "application/toml"),
    responses((status = 200, body = StoredBlueprint), (status = 422, body = Problem)))]
pub async fn put_blueprint(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path((layer, name)): Path<(String, String)>,
    Text(toml): Text,
) -> Result<Json<StoredBlueprint>, ApiError> {
    let place = place(&state, &layer, &name).await?;
    blueprint::parse(&place, &toml).map_err(crate::store::StoreError::from)?;
    let stored = StoredBlueprint { place, toml };
    if let Some(found) = state.engine.contradiction(stored.clone()).await? {
        let detail = format!("for device {}: {}", found.device, found.what);
        return Err(ApiError::unacceptable("blueprint", detail, found.hint));
    }
    state.store.put_blueprint(by(&operator), stored.clone()).await?;
    state.events.announce("blueprint", format!("{layer}/{name}"));
    state.engine.frame_changed();
    Ok(Json(stored))
}

/// Remove a blueprint layer.
#[utoipa::path(delete, path = "/v1/blueprints/{layer}/{name}", tag = "fleet",
    params(("layer" = String, Path), ("name" = String, Path)),
    responses((status = 204), (status = 404, body = Problem)))]
pub async fn delete_blueprint(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path((layer, name)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let place = place(&state, &layer, &name).await?;
    state.store.delete_blueprint(by(&operator), place).await?;
    state.events.announce("blueprint", format!("{layer}/{name}"));
    state.engine.frame_changed();
    Ok(StatusCode::NO_CONTENT)
}

/// Change notices as server-sent events named `changed`; `reload` says that some were missed.
#[utoipa::path(get, path = "/v1/events", tag = "fleet",
    responses((status = 200, content_type = "text/event-stream", body = crate::events::Change)))]
pub async fn events(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let hello = Event::default().event("hello").data(Timestamp::now().to_string());
    let changes = BroadcastStream::new(state.events.subscribe()).map(|change| match change {
        Ok(change) => Event::default()
            .event("changed")
            .json_data(change)
            .unwrap_or_else(|_| Event::default().event("reload").data("")),
        Err(_) => Event::default().event("reload").data(""),
    });
    let all = stream::iter([hello]).chain(changes).map(Ok);
    Sse::new(all).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}
