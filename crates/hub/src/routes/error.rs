//! Every error as RFC 9457 problem details with a hint.

use std::ops::RangeInclusive;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use rand::Rng as _;
use slmops_api::problem::{PROBLEM_MEDIA_TYPE, Problem};
use slmops_fleet_core::rollout::RolloutError;

use crate::auth::AuthError;
use crate::db::DbError;
use crate::store::StoreError;

/// What a handler answers when it cannot do what was asked.
#[derive(Debug)]
pub enum ApiError {
    /// Problem details.
    Problem(Box<Problem>),
    /// The caller is not let in.
    Auth(AuthError),
    /// More devices call at this moment than the hub takes on.
    Busy,
}

/// Seconds after which a device that was turned away calls again. Each gets another number, or all
/// of them would come back at once.
const RETRY_AFTER_S: RangeInclusive<u64> = 2..=30;

impl ApiError {
    /// A problem of this kind (`urn:slmops:KIND`).
    pub fn new(
        status: StatusCode,
        kind: &str,
        title: &str,
        detail: impl Into<String>,
        hint: Option<String>,
    ) -> Self {
        Self::Problem(Box::new(Problem {
            kind: format!("urn:slmops:{kind}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            hint,
        }))
    }

    /// The request itself is wrong.
    pub fn bad_request(detail: impl Into<String>, hint: impl Into<String>) -> Self {
        let title = "The request is not valid";
        Self::new(StatusCode::BAD_REQUEST, "bad-request", title, detail, Some(hint.into()))
    }

    /// The request is well-formed, but what it says does not hold.
    pub fn unacceptable(kind: &str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        let title = "What was sent does not hold";
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, kind, title, detail, Some(hint.into()))
    }

    /// There is no such object.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", "No such object", detail, None)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let problem = match self {
            Self::Auth(error) => return error.into_response(),
            Self::Busy => return busy(),
            Self::Problem(problem) => problem,
        };
        let status =
            StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(problem)).into_response();
        let media_type = HeaderValue::from_static(PROBLEM_MEDIA_TYPE);
        response.headers_mut().insert(header::CONTENT_TYPE, media_type);
        response
    }
}

fn busy() -> Response {
    let retry_after_s = rand::rng().random_range(RETRY_AFTER_S);
    let problem = ApiError::new(
        StatusCode::TOO_MANY_REQUESTS,
        "busy",
        "The hub is busy",
        "more devices call at this moment than the hub takes on",
        Some(format!("call again in {retry_after_s} s; an agent does so by itself")),
    );
    let mut response = problem.into_response();
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(retry_after_s));
    response
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        Self::Auth(error)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { kind, .. } => {
                let hint = match kind {
                    "device" | "rollout" | "release" | "class" | "token" | "invitation"
                    | "channel" | "webhook" => Some(format!(
                        "`slm {} list` shows what there is",
                        match kind {
                            "invitation" => "device",
                            other => other,
                        }
                    )),
                    "quarantine" => Some("`slm quarantine list` shows what there is".to_owned()),
                    _ => None,
                };
                let detail = error.to_string();
                Self::new(StatusCode::NOT_FOUND, "not-found", "No such object", detail, hint)
            }
            StoreError::Conflict { detail, hint } => {
                let title = "The request is at odds with what there is";
                Self::new(StatusCode::CONFLICT, "conflict", title, detail, Some(hint))
            }
            StoreError::Outdated => {
                let title = "Others change the fleet faster than this could be done";
                let (detail, hint) = (error.to_string(), Some("try again".to_owned()));
                Self::new(StatusCode::CONFLICT, "conflict", title, detail, hint)
            }
            StoreError::Forbidden { detail, hint } => {
                Self::new(StatusCode::FORBIDDEN, "forbidden", "Not allowed", detail, Some(hint))
            }
            StoreError::Rollout(error) => {
                let (status, kind) = match &error {
                    RolloutError::Policy(_) => (StatusCode::UNPROCESSABLE_ENTITY, "rollout-policy"),
                    RolloutError::NoRelease(_) => (StatusCode::NOT_FOUND, "not-found"),
                    RolloutError::Overlap { .. } => (StatusCode::CONFLICT, "rollout-overlap"),
                    RolloutError::Approval { .. } => (StatusCode::FORBIDDEN, "rollout-approval"),
                    RolloutError::Promotion { .. } => (StatusCode::CONFLICT, "promotion"),
                    RolloutError::Pin { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "pin"),
                    RolloutError::State { .. } => (StatusCode::CONFLICT, "rollout-state"),
                };
                let title = "The rollout cannot be made or changed like this";
                Self::new(status, kind, title, error.to_string(), Some(error.hint()))
            }
            StoreError::Blueprint(error) => {
                Self::unacceptable("blueprint", error.to_string(), error.hint())
            }
            StoreError::Db(error) => {
                tracing::error!(%error, "database");
                let (status, kind) = match error.cause() {
                    DbError::DiskFull => (StatusCode::INSUFFICIENT_STORAGE, "disk-full"),
                    DbError::ZeroByte => (StatusCode::BAD_REQUEST, "bad-request"),
                    DbError::Busy
                    | DbError::ShuttingDown
                    | DbError::ReadOnly
                    | DbError::Unreachable(_)
                    | DbError::Silent { .. } => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
                    _ => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
                };
                let text = error.to_string();
                let (detail, hint) = match text.split_once("\nhint: ") {
                    Some((detail, hint)) => (detail.to_owned(), Some(hint.to_owned())),
                    None => (text, None),
                };
                Self::new(status, kind, "The hub's database failed", detail, hint)
            }
            StoreError::Superseded => {
                let hint = Some("try again".to_owned());
                let status = StatusCode::SERVICE_UNAVAILABLE;
                let title = "The hub cannot do this now";
                Self::new(status, "unavailable", title, error.to_string(), hint)
            }
            StoreError::Document { .. } => {
                tracing::error!(%error, "stored document");
                let status = StatusCode::INTERNAL_SERVER_ERROR;
                let hint = Some("restore the data folder from a backup".to_owned());
                Self::new(status, "internal", "The hub's data is damaged", error.to_string(), hint)
            }
        }
    }
}

/// What any path under `/v1/` that is none answers.
pub async fn no_such_path(uri: axum::http::Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    let hint = Some("GET /openapi.json lists every path".to_owned());
    let detail = format!("the hub has no {path}");
    ApiError::new(StatusCode::NOT_FOUND, "no-such-path", "No such path", detail, hint)
}
