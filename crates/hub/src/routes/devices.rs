//! What devices call: enrol, ask for a token, learn what to be, report.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::Deserialize;
use slmops_api::delta::Sources;
use slmops_api::device::{
    Challenge, ChallengeRequest, DesiredState, DeviceReport, DeviceToken, DeviceTokenRequest,
    EnrolRequest, EnrolResponse, Phase,
};
use slmops_api::problem::Problem;
use slmops_api::{DeviceId, SiteName};
use slmops_artifact::Digest;
use slmops_fleet_core::deltas::{self, Wanted};

use super::input::{Body, Query, check_facts, check_report, parse_name};
use super::{ApiError, AppState, new_id};
use crate::auth::{AuthError, DeviceIdentity, DeviceKey, Peer, SecretHash};
use crate::neighbours::Advice;
use crate::store::{Enrolment, ReportOutcome, StoreError};

/// Seconds until a device asks again that waits for another one of its site.
const SEED_WAIT_S: u32 = 3;
/// The longest wait of a poll, in seconds.
pub const MAX_WAIT_S: u64 = 60;

/// Join the fleet with an invitation. The same key with the same invitation gives the same device.
#[utoipa::path(post, path = "/v1/enrol", tag = "device", security(()), request_body = EnrolRequest,
    responses((status = 200, body = EnrolResponse), (status = 403, body = Problem),
        (status = 429, body = Problem)))]
pub async fn enrol(
    State(state): State<AppState>,
    peer: Peer,
    Body(request): Body<EnrolRequest>,
) -> Result<Json<EnrolResponse>, ApiError> {
    state.auth.check_rate(peer)?;
    check_facts(&request.facts)?;
    let public_key = DeviceKey::from_pem(&request.public_key)?.to_pem();
    if let Some(name) = &request.name {
        // A device's name has the form of every other name.
        parse_name::<SiteName>(name)?;
    }
    let enrolment = Enrolment {
        device: new_id("d"),
        invitation: request.invitation,
        secret: SecretHash::of(&request.secret),
        public_key,
        name: request.name,
        facts: request.facts,
        at: Timestamp::now(),
    };
    let enrolled = state.store.enrol(enrolment).await.inspect_err(|error| {
        if let StoreError::Forbidden { .. } = error {
            state.auth.record_failure(peer);
        }
    })?;
    state.board.put(&enrolled.device);
    if enrolled.new {
        state.events.announce("device", &enrolled.device.id);
        state.events.announce("invitation", "");
        state.engine.device_changed(enrolled.device.id.clone());
    }
    let publisher_keys = state.store.keys().await?;
    Ok(Json(EnrolResponse { device: enrolled.device.id, publisher_keys }))
}

/// Ask for a challenge to sign.
#[utoipa::path(post, path = "/v1/device/challenge", tag = "device", security(()),
    request_body = ChallengeRequest,
    responses((status = 200, body = Challenge), (status = 429, body = Problem)))]
pub async fn challenge(
    State(state): State<AppState>,
    Body(request): Body<ChallengeRequest>,
) -> Json<Challenge> {
    Json(state.auth.challenge(&request.device))
}

/// Trade a signed challenge for a short-lived bearer token.
#[utoipa::path(post, path = "/v1/device/token", tag = "device", security(()),
    request_body = DeviceTokenRequest,
    responses((status = 200, body = DeviceToken), (status = 401, body = Problem),
        (status = 429, body = Problem)))]
pub async fn token(
    State(state): State<AppState>,
    peer: Peer,
    Body(request): Body<DeviceTokenRequest>,
) -> Result<Json<DeviceToken>, ApiError> {
    state.auth.check_rate(peer)?;
    let mut place = state.board.place(&request.device);
    if place.is_none() {
        // It may have joined by another hub a moment ago.
        let found = state.store.devices_of(vec![request.device.clone()]).await?;
        place = found.first().map(|device| state.board.put(device));
    }
    let place = place.filter(|place| place.is_active());
    let Some(public_key) = place.as_ref().and_then(|place| place.public_key()) else {
        state.auth.record_failure(peer);
        return Err(AuthError::Invalid.into());
    };
    let key = DeviceKey::from_pem(public_key)?;
    Ok(Json(state.auth.device_token(peer, &request, &key)?))
}

/// How long a poll waits.
#[derive(Deserialize)]
pub struct WaitQuery {
    wait_s: Option<u64>,
}

/// What the device should be. With `If-None-Match` and `wait_s`, waits for a change.
#[utoipa::path(get, path = "/v1/device/desired", tag = "device",
    params(("wait_s" = Option<u64>, Query, description = "Seconds to wait for a change; at most 60"),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of the state at hand")),
    responses((status = 200, body = DesiredState), (status = 304, description = "No change")))]
pub async fn desired(
    device: DeviceIdentity,
    Query(query): Query<WaitQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let DeviceIdentity { place, .. } = device;
    place.seen(Timestamp::now());
    let held = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    let changed = |desired: &Arc<DesiredState>| held != Some(etag(desired).as_str());
    let wait = Duration::from_secs(query.wait_s.unwrap_or(0).min(MAX_WAIT_S));
    let mut current = Some(place.desired()).filter(changed);
    if current.is_none() && !wait.is_zero() {
        let mut watch = place.watch();
        let found = tokio::time::timeout(wait, watch.wait_for(changed)).await;
        // Cloned at once: a watch's guard must not be held over an await.
        current = found.ok().and_then(Result::ok).map(|desired| Arc::clone(&desired));
        place.seen(Timestamp::now());
    }
    if !place.is_active() {
        return Err(ApiError::Auth(AuthError::Invalid));
    }
    Ok(match current {
        Some(desired) => {
            ([(header::ETAG, etag(&desired))], Json((*desired).clone())).into_response()
        }
        None => {
            let tag = held.unwrap_or_default().to_owned();
            (StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response()
        }
    })
}

fn etag(desired: &DesiredState) -> String {
    format!("\"g{}\"", desired.generation)
}

/// Take in a device's report. One that is older than the newest known is ignored.
#[utoipa::path(post, path = "/v1/device/report", tag = "device", request_body = DeviceReport,
    responses((status = 204, description = "Taken in, or older than what is known"),
        (status = 400, body = Problem), (status = 429, body = Problem)))]
pub async fn report(
    State(state): State<AppState>,
    device: DeviceIdentity,
    Body(report): Body<DeviceReport>,
) -> Result<StatusCode, ApiError> {
    check_report(&report)?;
    let now = Timestamp::now();
    device.place.seen(now);
    let report = Arc::new(report);
    let (id, group) = (device.id.clone(), device.place.group());
    let outcome = state.store.record_report(now, id, group, Arc::clone(&report)).await?;
    if outcome != ReportOutcome::Stale {
        note_neighbour(&state, &device.id, &report, now).await?;
        state.events.announce("device", &device.id);
        state.engine.reported(device.id, report, outcome == ReportOutcome::News);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Remembers what a device shares with its site.
async fn note_neighbour(
    state: &AppState,
    device: &DeviceId,
    report: &DeviceReport,
    now: Timestamp,
) -> Result<(), ApiError> {
    let Some(address) = &report.facts.shares_at else { return Ok(()) };
    let Some(site) = state.store.device(device.to_string()).await?.site else { return Ok(()) };
    if let Phase::RolledBack { .. } = report.phase {
        state.neighbours.gave_up(&site, device);
    }
    if let Some(running) = &report.running {
        let (device, address) = (device.clone(), address.clone());
        state.neighbours.has(site, running.weights, device, address, now);
    }
    Ok(())
}

/// Which model file a device asks about.
#[derive(Deserialize)]
pub struct SourcesQuery {
    weights: Digest,
}

/// What there is to get a model file from, for a device that runs what it last reported. Asking for
/// what the device should be also has a delta made, where there is none yet.
#[utoipa::path(get, path = "/v1/device/sources", tag = "device",
    params(("weights" = String, Query, description = "Digest of the model file")),
    responses((status = 200, body = Sources)))]
pub async fn sources(
    State(state): State<AppState>,
    device: DeviceIdentity,
    Query(query): Query<SourcesQuery>,
) -> Result<Json<Sources>, ApiError> {
    let now = Timestamp::now();
    device.place.seen(now);
    let desired = device.place.desired();
    let Some(wanted) = desired.model.as_ref().filter(|it| it.weights == query.weights) else {
        return Ok(Json(Sources::default()));
    };
    let stored = state.store.device(device.id.to_string()).await?;
    let report = stored.report.as_ref();
    let installed = report.map(|report| [report.running.as_ref(), report.previous.as_ref()]);
    let bases: Vec<Digest> = installed
        .into_iter()
        .flatten()
        .flatten()
        .filter(|base| base.model == wanted.model && base.weights != wanted.weights)
        .map(|base| base.weights)
        .collect();
    let mut known = state.store.deltas(wanted.model.clone()).await?;
    let runs = report.and_then(|report| report.running.as_ref()).map(|running| running.weights);
    let base = runs.filter(|runs| bases.contains(runs));
    let is_known =
        |base: &Digest| known.iter().any(|job| job.from == *base && job.to == wanted.weights);
    if let Some(from) = base.filter(|base| !is_known(base)) {
        let (model, to) = (wanted.model.clone(), wanted.weights);
        let way = Wanted { model, from, to, manifest: wanted.manifest, devices: 1 };
        state.store.want_deltas(now, vec![way]).await?;
        known = state.store.deltas(wanted.model.clone()).await?;
    }
    // Also for one that was noted a moment ago by a rollout.
    state.delta_wanted.notify_one();
    let mut sources = deltas::sources(&known, wanted.weights, &bases, now);
    if let (Some(site), Some(_)) = (stored.site, desired.rules.share_bytes_per_s) {
        let last_seen = |device: &DeviceId| state.board.last_seen(device);
        match state.neighbours.advise(site, wanted.weights, &device.id, now, last_seen) {
            Advice::Hub => {}
            Advice::Wait => sources.wait_s = Some(sources.wait_s.unwrap_or(SEED_WAIT_S)),
            Advice::Peers(peers) => {
                // No delta is worth waiting for then.
                (sources.peers, sources.wait_s) = (peers, None);
            }
        }
    }
    Ok(Json(sources))
}
