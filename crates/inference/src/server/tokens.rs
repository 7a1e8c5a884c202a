//! The tokenizer and the chat template by themselves: `/tokenize`, `/detokenize`, `/tokenizer_info`
//! and `/apply-template`.
//!
//! Both families of clients are served: llama.cpp's (`content`, `add_special`) and vLLM's (`prompt`,
//! `add_special_tokens`), which evaluation harnesses speak.

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::json;

use super::chat::messages;
use super::completions::prompts;
use super::error::ApiError;
use super::fields::Fields;
use super::{App, check_model, read_fields};
use crate::worker::{Prompt, WorkerError};

/// Where a text becomes tokens.
pub(super) const TOKENISE: &str = "/tokenize";
/// Where tokens become a text.
pub(super) const DETOKENISE: &str = "/detokenize";
/// Where a chat becomes a prompt.
pub(super) const APPLY_TEMPLATE: &str = "/apply-template";

/// Takes `content` or `prompt`, `add_special` or `add_special_tokens` (false if absent) and
/// `parse_special` (true if absent).
pub(super) async fn tokenise(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    let mut fields = read_fields(TOKENISE, body).await?;
    check_model(&app, &mut fields).await?;
    let content = fields.either(["content", "prompt"], Fields::text)?;
    let content =
        content.ok_or_else(|| ApiError::parameter("content", "it is missing".to_owned()))?;
    let add_special = fields.either(["add_special", "add_special_tokens"], Fields::flag)?;
    let add_special = add_special.unwrap_or(false);
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
    let mut fields = read_fields(DETOKENISE, body).await?;
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
    let text = String::from_utf8_lossy(&bytes);
    Ok(axum::Json(json!({ "content": text, "prompt": text })).into_response())
}

/// What a client needs to count tokens and to write prompts as the model was trained on them.
pub(super) async fn information(State(app): State<App>) -> Result<Response, ApiError> {
    let (_, worker) = app.host.worker().await?;
    let info = worker.model_info();
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    Ok(axum::Json(json!({
        "tokenizer_class": "llama.cpp",
        "vocab_size": info.shape.vocabulary,
        "bos_token": text(&info.beginning_text),
        "eos_token": text(&info.end_text),
        "pad_token": null,
        "add_bos_token": info.adds_beginning,
        "chat_template": info.chat_template,
    }))
    .into_response())
}

/// Takes `messages` as a chat does; gives the prompt that they become.
pub(super) async fn apply_template(
    State(app): State<App>,
    body: Body,
) -> Result<Response, ApiError> {
    let mut fields = read_fields(APPLY_TEMPLATE, body).await?;
    check_model(&app, &mut fields).await?;
    let messages = messages(&mut fields)?;
    fields.finish()?;
    let (_, worker) = app.host.worker().await?;
    let prompt = worker
        .template()
        .render(&messages)
        .map_err(|error| ApiError::from(WorkerError::from(error)).of_prompt("messages"))?;
    Ok(axum::Json(json!({ "prompt": prompt })).into_response())
}
