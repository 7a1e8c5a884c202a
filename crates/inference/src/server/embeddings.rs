//! `POST /v1/embeddings`: the mean of the last layer's output over a text's tokens, of length 1.

use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use futures_util::stream::{self, StreamExt as _};
use serde_json::{Value, json};

use super::adapters::asked;
use super::completions::prompts;
use super::error::ApiError;
use super::{App, read_fields};

/// The most texts of one request.
const MAX_TEXTS: usize = 256;
/// Texts of one request in the worker at the same time: one request must not fill the queue.
const TEXTS_AT_ONCE: usize = 4;

/// Where it is.
pub(super) const PATH: &str = "/v1/embeddings";

pub(super) async fn embed(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    answer(&app, body).await.map_err(|error| error.of_prompt("input"))
}

async fn answer(app: &App, body: Body) -> Result<Response, ApiError> {
    let mut fields = read_fields(PATH, body).await?;
    let asked = asked(app, &mut fields).await?;
    let texts = prompts(&mut fields, "input")?;
    if texts.len() > MAX_TEXTS {
        let message = format!("more than {MAX_TEXTS} texts in one request");
        return Err(ApiError::parameter("input", message));
    }
    let base64 = match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            let message = "expected float or base64".to_owned();
            return Err(ApiError::parameter("encoding_format", message));
        }
    };
    fields.finish()?;
    let (host, adapters) = (&app.host, &asked.adapters);
    let embedded: Vec<_> = stream::iter(texts)
        .map(|text| async move {
            let started = Instant::now();
            let embedded = host.with_worker(|_, worker| {
                let text = text.clone();
                async move { worker.embed(text, adapters).await }
            });
            (embedded.await, started.elapsed())
        })
        .buffered(TEXTS_AT_ONCE)
        .collect()
        .await;
    let mut data = Vec::with_capacity(embedded.len());
    let mut prompt_tokens = 0;
    for (index, (outcome, took)) in embedded.into_iter().enumerate() {
        let tokens = outcome.as_ref().map(|embedding| embedding.prompt_tokens);
        host.metrics().count_embedding(&asked.spec.id, took, tokens);
        let embedding = outcome?;
        prompt_tokens += u64::from(embedding.prompt_tokens);
        let values: Value = if base64 {
            let bytes: Vec<u8> =
                embedding.values.iter().flat_map(|value| value.to_le_bytes()).collect();
            base64::engine::general_purpose::STANDARD.encode(bytes).into()
        } else {
            embedding.values.into()
        };
        data.push(json!({ "object": "embedding", "index": index, "embedding": values }));
    }
    Ok(axum::Json(json!({
        "object": "list",
        "data": data,
        "model": asked.name,
        "usage": { "prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens },
    }))
    .into_response())
}
