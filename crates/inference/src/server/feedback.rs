//! `POST /v1/feedback`: whether an answer was any good, as a number and nothing else.

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::error::ApiError;
use super::{App, read_fields};

/// Where it is.
pub(super) const PATH: &str = "/v1/feedback";

/// Takes `{"response_id": "chatcmpl-…", "value": 1 or -1}`. It is counted, once for each recent answer of
/// the model that serves; nothing is kept of it. `counted` says whether it was.
pub(super) async fn take(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    let mut fields = read_fields(PATH, body).await?;
    let missing = |name: &str| ApiError::parameter(name, "it is missing".to_owned());
    let id = fields.text("response_id")?.ok_or_else(|| missing("response_id"))?;
    let good = match fields.take("value").ok_or_else(|| missing("value"))? {
        Value::Number(value) if value.as_i64() == Some(1) => true,
        Value::Number(value) if value.as_i64() == Some(-1) => false,
        _ => return Err(ApiError::parameter("value", "expected 1 or -1".to_owned())),
    };
    fields.finish()?;
    let counted = app.host.metrics().count_thumb(&id, good);
    Ok(axum::Json(json!({ "counted": counted })).into_response())
}
