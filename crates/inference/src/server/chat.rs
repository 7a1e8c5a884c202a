//! `POST /v1/chat/completions`.

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::constrain::constraint;
use super::error::ApiError;
use super::fields::Fields;
use super::generate::{
    Chunks, Job, PromptOf, choices, finish_all, reason, sampling, stream_all, streaming, usage,
};
use super::{App, check_model, new_id, now_s, object, read_fields};
use crate::chat::ChatMessage;
use crate::worker::{Finish, GenerateRequest, Piece, Prompt, TokenLogprob};

pub(super) async fn complete(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    answer(&app, body).await.map_err(|error| error.of_prompt("messages"))
}

async fn answer(app: &App, body: Body) -> Result<Response, ApiError> {
    let mut fields = read_fields(body).await?;
    let spec = check_model(app, &mut fields).await?;
    let messages = messages(&mut fields)?;
    let count = choices(&mut fields)?;
    let streaming = streaming(&mut fields)?;
    let max_tokens = match fields.count("max_completion_tokens")? {
        Some(max) => {
            let _ = fields.count("max_tokens")?;
            Some(max)
        }
        None => fields.count("max_tokens")?,
    };
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs")?;
    if top.is_some_and(|top| top > 0) && !wanted {
        let message = "only with \"logprobs\": true".to_owned();
        return Err(ApiError::parameter("top_logprobs", message));
    }
    let template = GenerateRequest {
        prompt: Prompt::Tokens(Vec::new()),
        max_tokens,
        sampling: sampling(&mut fields)?,
        stop: fields.texts("stop")?,
        echo: false,
        logprobs: wanted.then(|| top.unwrap_or(0)),
        constraint: constraint(&mut fields)?,
    };
    fields.finish()?;
    let prompts = (0..count)
        .map(|_| {
            let messages = messages.clone();
            Box::new(move |worker: &crate::worker::Worker| worker.chat_prompt(&messages))
                as PromptOf
        })
        .collect();
    let job = Job { prompts, template, chat: true };
    let generations = job.begin(app).await?;
    let (id, created) = (new_id("chatcmpl"), now_s());
    app.host.metrics().remember_answer(&id);
    if streaming.wanted {
        let usage = streaming.usage;
        let chunks = ChatChunks { id, created, model: spec.id.clone(), usage, count };
        return stream_all(generations, chunks).await;
    }
    let answers = finish_all(generations).await?;
    let finishes: Vec<Finish> = answers.iter().map(|(_, finish)| *finish).collect();
    let choices: Vec<Value> = answers
        .into_iter()
        .enumerate()
        .map(|(index, (piece, finish))| {
            json!({
                "index": index,
                "message": { "role": "assistant", "content": piece.text, "refusal": null },
                "logprobs": logprobs(&piece.logprobs, wanted),
                "finish_reason": reason(&finish),
            })
        })
        .collect();
    Ok(axum::Json(json!({
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": spec.id,
        "choices": choices,
        "usage": usage(&finishes, count),
        "system_fingerprint": null,
    }))
    .into_response())
}

/// Takes `messages`.
pub(super) fn messages(fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
    let wrong = |message: &str| ApiError::parameter("messages", message.to_owned());
    let messages = match fields.take("messages") {
        Some(Value::Array(messages)) if !messages.is_empty() => messages,
        Some(Value::Array(_)) => return Err(wrong("at least one message is needed")),
        Some(_) => return Err(wrong("expected an array of messages")),
        None => return Err(wrong("it is missing")),
    };
    messages.into_iter().enumerate().map(|(index, value)| message(index, value)).collect()
}

fn message(index: usize, value: Value) -> Result<ChatMessage, ApiError> {
    let name = |field: &str| format!("messages[{index}].{field}");
    let Value::Object(value) = value else {
        let message = "expected an object".to_owned();
        return Err(ApiError::parameter(&format!("messages[{index}]"), message));
    };
    let mut fields = Fields::new(value);
    let role = match fields.text("role")?.as_deref() {
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool" | "function") => {
            let message = "this endpoint does not support tools".to_owned();
            return Err(ApiError::unsupported(&name("role"), message));
        }
        _ => {
            let message = "expected system, developer, user or assistant".to_owned();
            return Err(ApiError::parameter(&name("role"), message));
        }
    };
    let content = match fields.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let mut content = String::new();
            for part in parts {
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(text)) => content.push_str(text),
                    (Some("text"), None) | (None, _) => {
                        let message = "expected parts with a type and a text".to_owned();
                        return Err(ApiError::parameter(&name("content"), message));
                    }
                    (Some(kind), _) => {
                        let kind: String = kind.chars().take(40).collect();
                        let message =
                            format!("parts of type `{kind}` are not supported, only text");
                        return Err(ApiError::unsupported(&name("content"), message));
                    }
                }
            }
            content
        }
        None if role == "assistant" => String::new(),
        _ => {
            let message = "expected a string or an array of parts".to_owned();
            return Err(ApiError::parameter(&name("content"), message));
        }
    };
    // What OpenAI's own answers carry is accepted when it is sent back empty.
    for field in ["tool_calls", "annotations"] {
        match fields.take(field) {
            None => {}
            Some(Value::Array(items)) if items.is_empty() => {}
            Some(_) => {
                let message = "this endpoint does not support it".to_owned();
                return Err(ApiError::unsupported(&name(field), message));
            }
        }
    }
    for field in ["name", "refusal", "audio", "function_call", "tool_call_id"] {
        if fields.take(field).is_some() {
            let message = "this endpoint does not support it".to_owned();
            return Err(ApiError::unsupported(&name(field), message));
        }
    }
    fields.finish()?;
    Ok(ChatMessage { role: role.to_owned(), content })
}

fn logprobs(entries: &[TokenLogprob], wanted: bool) -> Value {
    if !wanted {
        return Value::Null;
    }
    let plain = |entry: &TokenLogprob| {
        object([
            ("token", json!(String::from_utf8_lossy(&entry.bytes))),
            ("logprob", json!(entry.logprob)),
            ("bytes", json!(entry.bytes)),
        ])
    };
    let content: Vec<Value> = entries
        .iter()
        .map(|entry| {
            let mut shown = plain(entry);
            shown["top_logprobs"] = entry.top.iter().map(plain).collect();
            shown
        })
        .collect();
    json!({ "content": content, "refusal": null })
}

struct ChatChunks {
    id: String,
    created: i64,
    model: String,
    usage: bool,
    count: usize,
}

impl ChatChunks {
    fn chunk(&self, choices: Value) -> Value {
        let mut chunk = json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": null,
            "choices": choices,
        });
        if self.usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn choice(&self, index: usize, delta: Value, logprobs: Value, reason: Option<&str>) -> Value {
        self.chunk(json!([
            { "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason }
        ]))
    }
}

impl Chunks for ChatChunks {
    fn begin(&mut self, index: usize) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "", "refusal": null });
        Some(self.choice(index, delta, Value::Null, None))
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Option<Value> {
        if piece.text.is_empty() && piece.logprobs.is_empty() {
            return None;
        }
        let entries = logprobs(&piece.logprobs, !piece.logprobs.is_empty());
        Some(self.choice(index, json!({ "content": piece.text }), entries, None))
    }

    fn end(&mut self, index: usize, finish: &Finish) -> Value {
        self.choice(index, json!({}), Value::Null, Some(reason(finish)))
    }

    fn usage(&mut self, finishes: &[Finish]) -> Option<Value> {
        self.usage.then(|| {
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = usage(finishes, self.count);
            chunk
        })
    }
}
