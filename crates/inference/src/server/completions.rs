//! `POST /v1/completions`.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Map, Value, json};

use super::adapters::asked;
use super::constrain::constraint;
use super::error::ApiError;
use super::fields::Fields;
use super::generate::timings;
use super::generate::{
    Chunks, Job, MAX_CHOICES, PromptOf, choices, finish_all, reason, sampling, stream_all,
    streaming, usage,
};
use super::{App, new_id, now_s, read_fields};
use crate::llama::Token;
use crate::worker::protocol::MAX_TOP_LOGPROBS;
use crate::worker::{Finish, GenerateRequest, Piece, Prompt, TokenLogprob, Worker};

/// OpenAI's default of `max_tokens` at this endpoint.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// Where it is.
pub(super) const PATH: &str = "/v1/completions";

pub(super) async fn complete(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    answer(&app, body).await.map_err(|error| error.of_prompt("prompt"))
}

async fn answer(app: &App, body: Body) -> Result<Response, ApiError> {
    let mut fields = read_fields(PATH, body).await?;
    let asked = asked(app, &mut fields).await?;
    let given = prompts(&mut fields, "prompt")?;
    let count = choices(&mut fields)?;
    if given.len() * count > MAX_CHOICES {
        let message = format!("more than {MAX_CHOICES} answers in one request");
        return Err(ApiError::parameter("prompt", message));
    }
    let streaming = streaming(&mut fields)?;
    let top = fields.count("logprobs")?;
    if top.is_some_and(|top| top > MAX_TOP_LOGPROBS) {
        return Err(ApiError::parameter("logprobs", format!("at most {MAX_TOP_LOGPROBS}")));
    }
    let template = GenerateRequest {
        prompt: Prompt::Tokens(Vec::new()),
        max_tokens: Some(fields.count("max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS)),
        sampling: sampling(&mut fields)?,
        stop: fields.texts("stop")?,
        logprobs: top,
        echo: fields.flag("echo")?.unwrap_or(false),
        constraint: constraint(&mut fields)?,
        ignore_end: fields.flag("ignore_eos")?.unwrap_or(false),
        fresh: !fields.flag("cache_prompt")?.unwrap_or(true),
        adapters: asked.adapters,
    };
    fields.finish()?;
    let prompts = given
        .into_iter()
        .flat_map(|prompt| {
            let prompt = Arc::new(prompt);
            (0..count).map(move |_| {
                let prompt = Arc::clone(&prompt);
                Box::new(move |_: &Worker| Ok(Prompt::clone(&prompt))) as PromptOf
            })
        })
        .collect();
    let job = Job { prompts, template, chat: false };
    let generations = job.begin(app).await?;
    let (id, created) = (new_id("cmpl-"), now_s());
    app.host.metrics().remember_answer(&id);
    let wanted = top.is_some();
    if streaming.wanted {
        let offsets = vec![0; generations.len()];
        let usage = streaming.usage;
        let model = asked.name;
        let chunks = PlainChunks { id, created, model, usage, count, offsets };
        return stream_all(app, generations, chunks).await;
    }
    let answers = finish_all(generations).await?;
    let finishes: Vec<Finish> = answers.iter().map(|(_, finish)| *finish).collect();
    let choices: Vec<Value> = answers
        .into_iter()
        .enumerate()
        .map(|(index, (piece, finish))| {
            json!({
                "text": piece.text,
                "index": index,
                "logprobs": wanted.then(|| logprobs(&piece.logprobs, &mut 0)),
                "finish_reason": reason(&finish),
            })
        })
        .collect();
    Ok(axum::Json(json!({
        "id": id,
        "object": "text_completion",
        "created": created,
        "model": asked.name,
        "choices": choices,
        "usage": usage(&finishes, count),
        "timings": finishes.first().map(timings),
    }))
    .into_response())
}

/// Takes a text, some texts, some tokens, or some sequences of tokens.
pub(super) fn prompts(fields: &mut Fields, name: &str) -> Result<Vec<Prompt>, ApiError> {
    let wrong = || {
        let kinds = "a string, an array of tokens, or an array of strings and of arrays of tokens";
        ApiError::parameter(name, format!("expected {kinds}"))
    };
    let tokens = |value: &Value| -> Option<Vec<Token>> {
        let each = value.as_array()?.iter();
        each.map(|token| Token::try_from(token.as_i64()?).ok()).collect()
    };
    let value =
        fields.take(name).ok_or_else(|| ApiError::parameter(name, "it is missing".to_owned()))?;
    let prompts = match &value {
        Value::String(text) => vec![Prompt::Text(text.clone())],
        Value::Array(items) => match items.first() {
            Some(Value::Number(_)) => vec![Prompt::Tokens(tokens(&value).ok_or_else(wrong)?)],
            Some(Value::String(_) | Value::Array(_)) => items
                .iter()
                .map(|item| match item {
                    Value::String(text) => Some(Prompt::Text(text.clone())),
                    item => tokens(item).map(Prompt::Tokens),
                })
                .collect::<Option<_>>()
                .ok_or_else(wrong)?,
            _ => return Err(wrong()),
        },
        _ => return Err(wrong()),
    };
    Ok(prompts)
}

/// A token in a list of log-probabilities. Bytes that are not whole characters are written as OpenAI
/// writes them: tokens that differ must not look alike.
fn written(entry: &TokenLogprob) -> String {
    match std::str::from_utf8(&entry.bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => entry.bytes.iter().fold("bytes:".to_owned(), |mut text, byte| {
            let _ = write!(text, "\\x{byte:02x}");
            text
        }),
    }
}

/// Log-probabilities in the shape of this older endpoint. `offset` counts characters of the answer.
fn logprobs(entries: &[TokenLogprob], offset: &mut usize) -> Value {
    let mut offsets = Vec::new();
    let mut tops = Vec::new();
    for entry in entries {
        offsets.push(*offset);
        *offset += String::from_utf8_lossy(&entry.bytes).chars().count();
        let top = entry.top.iter().map(|entry| (written(entry), json!(entry.logprob)));
        tops.push(entry.logprob.map(|_| top.collect::<Map<_, _>>()));
    }
    json!({
        "tokens": entries.iter().map(written).collect::<Vec<_>>(),
        "token_logprobs": entries.iter().map(|entry| entry.logprob).collect::<Vec<_>>(),
        "top_logprobs": tops,
        "text_offset": offsets,
    })
}

struct PlainChunks {
    id: String,
    created: i64,
    model: String,
    usage: bool,
    count: usize,
    /// Characters given out of each answer.
    offsets: Vec<usize>,
}

impl PlainChunks {
    fn chunk(&self, choices: Value) -> Value {
        let mut chunk = json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if self.usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

impl Chunks for PlainChunks {
    fn begin(&mut self, _: usize) -> Vec<Value> {
        Vec::new()
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Value> {
        if piece.text.is_empty() && piece.logprobs.is_empty() {
            return Vec::new();
        }
        let entries = match piece.logprobs.is_empty() {
            true => Value::Null,
            false => logprobs(&piece.logprobs, &mut self.offsets[index]),
        };
        vec![self.chunk(json!([
            { "text": piece.text, "index": index, "logprobs": entries, "finish_reason": null }
        ]))]
    }

    fn end(&mut self, index: usize, finish: &Finish) -> Vec<Value> {
        let mut last = self.chunk(json!([
            { "text": "", "index": index, "logprobs": null, "finish_reason": reason(finish) }
        ]));
        last["timings"] = timings(finish);
        vec![last]
    }

    fn usage(&mut self, finishes: &[Finish]) -> Option<Value> {
        self.usage.then(|| {
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = usage(finishes, self.count);
            chunk
        })
    }
}
