//! What devices count in use, added up.

use axum::Json;
use axum::extract::State;
use jiff::{SignedDuration, Timestamp};
use slmops_api::Page;
use slmops_api::problem::Problem;
use slmops_api::telemetry::{Span, TelemetryQuery, TelemetrySeries};

use super::input::Query;
use super::{ApiError, AppState};
use crate::auth::AsViewer;

/// From when on hours are told unless asked otherwise.
const DEFAULT_HOURS: SignedDuration = SignedDuration::from_hours(48);
/// From when on days are told unless asked otherwise.
const DEFAULT_DAYS: SignedDuration = SignedDuration::from_hours(60 * 24);
/// The longest time that is told by hour.
const MAX_HOURS: SignedDuration = SignedDuration::from_hours(14 * 24);
/// The longest time that is told by day.
const MAX_DAYS: SignedDuration = SignedDuration::from_hours(800 * 24);

/// What the devices that run a release count in use, by hour or day: requests, errors, speed, time to
/// first token, memory.
#[utoipa::path(get, path = "/v1/telemetry", tag = "fleet", params(TelemetryQuery),
    responses((status = 200, body = Page<TelemetrySeries>), (status = 400, body = Problem)))]
pub async fn series(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Query(query): Query<TelemetryQuery>,
) -> Result<Json<Page<TelemetrySeries>>, ApiError> {
    let now = Timestamp::now();
    let (default, most) = match query.span.unwrap_or(Span::Hour) {
        Span::Hour => (DEFAULT_HOURS, MAX_HOURS),
        Span::Day => (DEFAULT_DAYS, MAX_DAYS),
    };
    let since = query.since.unwrap_or(now - default);
    // A minute for the way here.
    if now.duration_since(since) > most + SignedDuration::from_mins(1) {
        let detail = format!("`since` is longer ago than {} days", most.as_hours() / 24);
        return Err(ApiError::bad_request(detail, "ask for a shorter time, or by day: `span=day`"));
    }
    Ok(Json(Page { items: state.store.telemetry(query, since).await?, cursor: None }))
}
