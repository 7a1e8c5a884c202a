//! What comes from outside, checked once at the boundary, with problem details for what is wrong.

use std::collections::BTreeMap;
use std::str::FromStr;

use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use bytes::Bytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use slmops_api::device::{DeviceFacts, DeviceReport, Failure, Phase};
use slmops_api::id::MAX_NAME_BYTES;
use slmops_api::probe::{MAX_PROBES, MAX_REPLAY, ProbeResult};
use slmops_api::selector::FACT_PREFIX;

use super::ApiError;
use crate::store::{MAX_PAGE, PageRequest};

/// The most labels of a device.
pub const MAX_LABELS: usize = 64;
/// The longest text among a device's facts, in bytes.
const MAX_FACT_BYTES: usize = 256;
/// The most names in one list of a device's facts.
const MAX_FEATURES: usize = 64;
/// The most rejections in a report.
const MAX_REJECTIONS: usize = 64;
/// The most settings in one failure.
const MAX_SETTINGS: usize = 32;
/// The largest counter that the store can hold.
const MAX_COUNTER: u64 = i64::MAX as u64 / 2;

/// A JSON body.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(too_large)?;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| {
            let detail = format!("the body is not the JSON that this call takes: {error}");
            ApiError::bad_request(detail, "GET /openapi.json describes every body")
        })
    }
}

/// A text body.
pub struct Text(pub String);

impl<S: Send + Sync> FromRequest<S> for Text {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(too_large)?;
        let text = String::from_utf8(bytes.into());
        text.map(Self).map_err(|_| ApiError::bad_request("the body is not UTF-8", "send text"))
    }
}

fn too_large(error: BytesRejection) -> ApiError {
    use axum::response::IntoResponse as _;
    let text = error.body_text();
    let status = error.into_response().status();
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        let hint = Some("send less".to_owned());
        return ApiError::new(status, "too-large", "The body is too large", text, hint);
    }
    ApiError::bad_request(text, "send the whole body")
}

/// Path parameters.
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let found = axum::extract::Path::<T>::from_request_parts(parts, state).await;
        found.map(|axum::extract::Path(value)| Self(value)).map_err(|error: PathRejection| {
            ApiError::bad_request(error.body_text(), "check the names in the path")
        })
    }
}

/// Query parameters.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let found = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        found.map(|axum::extract::Query(value)| Self(value)).map_err(|error: QueryRejection| {
            ApiError::bad_request(error.body_text(), "check what follows the `?`")
        })
    }
}

/// `?cursor=…&limit=…`.
#[derive(Deserialize)]
pub struct PageQuery {
    cursor: Option<String>,
    limit: Option<u32>,
}

impl From<PageQuery> for PageRequest {
    fn from(query: PageQuery) -> Self {
        let limit = query.limit.unwrap_or(PageRequest::default().limit).clamp(1, MAX_PAGE);
        Self { cursor: query.cursor, limit }
    }
}

/// Whether a device may have so many labels.
pub fn check_label_count(count: usize) -> Result<(), ApiError> {
    if count > MAX_LABELS {
        let detail = format!("{count} labels are more than {MAX_LABELS}");
        return Err(ApiError::bad_request(detail, "use fewer labels"));
    }
    Ok(())
}

/// Checks labels: few, and short enough to be named by a selector.
pub fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), ApiError> {
    check_label_count(labels.len())?;
    for (key, value) in labels {
        let reserved =
            ["id", "name", "site"].contains(&key.as_str()) || key.starts_with(FACT_PREFIX);
        if reserved {
            return Err(ApiError::bad_request(
                format!("label `{key}` is given by the hub"),
                "choose another key; the site has a field of its own",
            ));
        }
        let good = |text: &str| {
            (1..=MAX_NAME_BYTES).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte))
        };
        if !good(key) || !good(value) {
            let shown: String = format!("{key}={value}").chars().take(100).collect();
            return Err(ApiError::bad_request(
                format!("`{shown}` is no label"),
                "keys and values are letters, digits, '.', '_', '-' and '/'",
            ));
        }
    }
    Ok(())
}

/// Parses a name out of a body.
pub fn parse_name<T: FromStr>(text: &str) -> Result<T, ApiError>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| {
        ApiError::bad_request(error.to_string(), "choose a name like `pi-kitchen-2`")
    })
}

fn bounded(what: &str, text: &str) -> Result<(), ApiError> {
    if text.len() <= MAX_FACT_BYTES && !text.chars().any(char::is_control) {
        return Ok(());
    }
    let detail = format!("{what} is longer than {MAX_FACT_BYTES} bytes or no plain text");
    Err(ApiError::bad_request(detail, "update the agent"))
}

/// Checks a device's facts.
pub fn check_facts(facts: &DeviceFacts) -> Result<(), ApiError> {
    let texts = [
        ("hostname", facts.hostname.as_str()),
        ("arch", &facts.arch),
        ("kernel", &facts.kernel),
        ("cpu", &facts.cpu),
        ("agent_version", &facts.agent_version),
        ("engine", &facts.engine),
        ("endpoint", facts.endpoint.as_deref().unwrap_or("")),
        ("time_zone", facts.time_zone.as_deref().unwrap_or("")),
        ("shares_at", facts.shares_at.as_deref().unwrap_or("")),
    ];
    for (what, text) in texts {
        bounded(what, text)?;
    }
    for (what, names) in [("cpu_features", &facts.cpu_features), ("obeys", &facts.obeys)] {
        if names.len() > MAX_FEATURES {
            let detail = format!("more than {MAX_FEATURES} {what}");
            return Err(ApiError::bad_request(detail, "update the agent"));
        }
        names.iter().try_for_each(|name| bounded(what, name))?;
    }
    let sizes = [facts.memory_bytes, facts.memory_budget_bytes, facts.disk_free_bytes];
    if sizes.iter().any(|size| *size > MAX_COUNTER) {
        return Err(ApiError::bad_request("a size is beyond all reason", "update the agent"));
    }
    Ok(())
}

fn check_probes(results: &[ProbeResult]) -> Result<(), ApiError> {
    if results.len() > MAX_PROBES {
        let detail = format!("more than {MAX_PROBES} probe results");
        return Err(ApiError::bad_request(detail, "update the agent"));
    }
    results.iter().try_for_each(|result| bounded("a probe's name", &result.name))
}

fn check_failure(failure: &Failure) -> Result<(), ApiError> {
    match failure {
        Failure::Probes { results } => check_probes(results),
        Failure::Configuration { settings } if settings.len() > MAX_SETTINGS => Err(
            ApiError::bad_request(format!("more than {MAX_SETTINGS} settings"), "update the agent"),
        ),
        Failure::Configuration { settings } => {
            settings.iter().try_for_each(|setting| bounded("a setting", setting))
        }
        _ => Ok(()),
    }
}

/// Checks a device's report: bounded in every direction.
pub fn check_report(report: &DeviceReport) -> Result<(), ApiError> {
    if report.sequence > MAX_COUNTER || report.generation > MAX_COUNTER {
        return Err(ApiError::bad_request("a counter is beyond all reason", "update the agent"));
    }
    check_facts(&report.facts)?;
    check_probes(&report.probes)?;
    if let Phase::RolledBack { failure } = &report.phase {
        check_failure(failure)?;
    }
    if report.rejected.len() > MAX_REJECTIONS {
        let detail = format!("more than {MAX_REJECTIONS} rejections");
        return Err(ApiError::bad_request(detail, "update the agent"));
    }
    report.rejected.iter().try_for_each(|rejection| check_failure(&rejection.failure))?;
    let replay = report.evidence.as_ref().and_then(|evidence| evidence.replay.as_ref());
    if replay.is_some_and(|replay| replay.losses_nats.len() > MAX_REPLAY) {
        let detail = format!("more than {MAX_REPLAY} replayed prompts");
        return Err(ApiError::bad_request(detail, "update the agent"));
    }
    if let Some(effective) = &report.effective {
        bounded("the engine's version", &effective.engine)?;
    }
    Ok(())
}
