//! `POST /tokenize` and `POST /detokenize`.

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::json;

use super::completions::prompts;
use super::error::ApiError;
use super::{App, check_model, read_fields};
use crate::worker::Prompt;

/// Takes `content`, `add_special` (false if absent) and `parse_special` (true if absent).
pub(super) async fn tokenise(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    let mut fields = read_fields(body).await?;
    check_model(&app, &mut fields).await?;
    let content = fields.text("content")?;
    let content =
        content.ok_or_else(|| ApiError::parameter("content", "it is missing".to_owned()))?;
    let add_special = fields.flag("add_special")?.unwrap_or(false);
    let parse_special = fields.flag("parse_special")?.unwrap_or(true);
    fields.finish()?;
    let tokens = app
        .host
        .with_worker(|_, worker| {
            let content = content.clone();
            async move { worker.tokenise(content, add_special, parse_special).await }
        })
        .await?;
    Ok(axum::Json(json!({ "count": tokens.len(), "tokens": tokens })).into_response())
}

/// Takes `tokens`.
pub(super) async fn detokenise(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    let mut fields = read_fields(body).await?;
    check_model(&app, &mut fields).await?;
    let given = prompts(&mut fields, "tokens")?;
    fields.finish()?;
    let [Prompt::Tokens(tokens)] = given.as_slice() else {
        return Err(ApiError::parameter("tokens", "expected an array of tokens".to_owned()));
    };
    let bytes = app
        .host
        .with_worker(|_, worker| {
            let tokens = tokens.clone();
            async move { worker.detokenise(tokens).await }
        })
        .await?;
    Ok(axum::Json(json!({ "content": String::from_utf8_lossy(&bytes) })).into_response())
}
