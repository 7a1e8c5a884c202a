//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::adapters::asked;
use super::constrain::constraint;
use super::error::ApiError;
use super::fields::Fields;
use super::generate::timings;
use super::generate::{
    Chunks, Job, PromptOf, choices, finish_all, reason, sampling, stream_all, streaming, usage,
};
use super::tools::{Form, ToolUse, new_call_id, past_calls, read_whole, tool_use, written};
use super::{App, new_id, now_s, object, read_fields};
use crate::chat::ChatMessage;
use crate::tools::{Choice, Found, Reader};
use crate::worker::{Finish, FinishReason, GenerateRequest, Piece, Prompt, TokenLogprob, Worker};

/// Where it is.
pub(super) const PATH: &str = "/v1/chat/completions";

pub(super) async fn complete(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    answer(&app, body).await.map_err(|error| error.of_prompt("messages"))
}

async fn answer(app: &App, body: Body) -> Result<Response, ApiError> {
    let mut fields = read_fields(PATH, body).await?;
    let asked = asked(app, &mut fields).await?;
    let messages = messages(&mut fields)?;
    let tool_use = tool_use(&mut fields, Form::Nested)?;
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
    let mut template = GenerateRequest {
        prompt: Prompt::Tokens(Vec::new()),
        max_tokens,
        sampling: sampling(&mut fields)?,
        stop: fields.texts("stop")?,
        echo: false,
        logprobs: wanted.then(|| top.unwrap_or(0)),
        constraint: constraint(&mut fields)?,
        ignore_end: fields.flag("ignore_eos")?.unwrap_or(false),
        fresh: !fields.flag("cache_prompt")?.unwrap_or(true),
        adapters: asked.adapters,
    };
    fields.finish()?;
    let readers = hold_to_tools(app, tool_use.as_ref(), &mut template, count).await?;
    let prompts = chat_prompts(messages, tool_use, count);
    let job = Job { prompts, template, chat: true };
    let generations = job.begin(app).await?;
    let (id, created) = (new_id("chatcmpl-"), now_s());
    app.host.metrics().remember_answer(&id);
    if streaming.wanted {
        let usage = streaming.usage;
        let model = asked.name;
        let unsent = vec![Vec::new(); count];
        let chunks = ChatChunks { id, created, model, usage, count, readers, unsent };
        return stream_all(app, generations, chunks).await;
    }
    let answers = finish_all(generations).await?;
    let finishes: Vec<Finish> = answers.iter().map(|(_, finish)| *finish).collect();
    let mut readers = readers.into_iter();
    let choices: Vec<Value> = answers
        .into_iter()
        .enumerate()
        .map(|(index, (piece, finish))| {
            let (content, calls) = match readers.next() {
                Some(reader) => read_whole(reader, &piece.text),
                None => (piece.text, Vec::new()),
            };
            let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
            if !calls.is_empty() {
                message["tool_calls"] = written(&calls);
                if content.is_empty() {
                    message["content"] = Value::Null;
                }
            }
            json!({
                "index": index,
                "message": message,
                "logprobs": logprobs(&piece.logprobs, wanted),
                "finish_reason": chat_reason(&finish, calls.len()),
            })
        })
        .collect();
    Ok(axum::Json(json!({
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": asked.name,
        "choices": choices,
        "usage": usage(&finishes, count),
        "timings": finishes.first().map(timings),
        "system_fingerprint": null,
    }))
    .into_response())
}

/// Holds an answer to the use of tools, where there is one; readers of what comes then.
pub(super) async fn hold_to_tools(
    app: &App,
    tool_use: Option<&ToolUse>,
    template: &mut GenerateRequest,
    count: usize,
) -> Result<Vec<Reader>, ApiError> {
    let Some(tool_use) = tool_use else { return Ok(Vec::new()) };
    let (_, worker) = app.host.worker().await?;
    let syntax = worker.template().tool_syntax();
    let text = template.constraint.take();
    if let Some(text) = text.as_ref().filter(|_| tool_use.choice != Choice::Auto) {
        let message = "the answer is a call, whose arguments have a shape of their own".to_owned();
        return Err(ApiError::parameter(&text.parameter, message));
    }
    template.constraint = Some(tool_use.constraint(syntax, text.as_ref())?);
    // JSON that was asked for is no call, whatever it looks like.
    let unannounced = if text.is_some() { &[] } else { &tool_use.tools[..] };
    Ok((0..count).map(|_| Reader::new(syntax, unannounced)).collect())
}

/// The prompts of `count` answers to the same chat.
pub(super) fn chat_prompts(
    messages: Vec<ChatMessage>,
    tool_use: Option<ToolUse>,
    count: usize,
) -> Vec<PromptOf> {
    let definitions = tool_use.as_ref().map(ToolUse::definitions).unwrap_or_default();
    let choice = tool_use.map_or(Choice::Auto, |tool_use| tool_use.choice);
    let chat: Arc<(Vec<ChatMessage>, Vec<Value>, Choice)> =
        Arc::new((messages, definitions, choice));
    let prompt = || {
        let chat = Arc::clone(&chat);
        Box::new(move |worker: &Worker| {
            let (messages, definitions, choice) = &*chat;
            worker.chat_prompt_with_tools(messages, definitions, choice)
        }) as PromptOf
    };
    (0..count).map(|_| prompt()).collect()
}

/// Why a chat's answer ended.
fn chat_reason(finish: &Finish, calls: usize) -> &'static str {
    match finish.reason {
        FinishReason::Stop if calls > 0 => "tool_calls",
        _ => reason(finish),
    }
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
        Some("tool") => "tool",
        Some("function") => {
            let message = "functions are called by `tools`".to_owned();
            return Err(ApiError::unsupported(&name("role"), message));
        }
        _ => {
            let message = "expected system, developer, user, assistant or tool".to_owned();
            return Err(ApiError::parameter(&name("role"), message));
        }
    };
    let content = match fields.take("content") {
        None if role == "assistant" => String::new(),
        content => text_of(&name("content"), content, &["text"])?,
    };
    let tool_calls = match role {
        "assistant" => past_calls(&name("tool_calls"), &mut fields)?,
        _ => Vec::new(),
    };
    let tool_call_id = match role {
        "tool" => {
            // The call says which tool it was.
            let _ = fields.text("name")?;
            fields.text("tool_call_id")?
        }
        _ => None,
    };
    if role == "tool" && tool_call_id.is_none() {
        return Err(ApiError::parameter(&name("tool_call_id"), "it is missing".to_owned()));
    }
    // What OpenAI's own answers carry is accepted when it is sent back empty.
    match fields.take("annotations") {
        None => {}
        Some(Value::Array(items)) if items.is_empty() => {}
        Some(_) => {
            let message = "this endpoint does not support it".to_owned();
            return Err(ApiError::unsupported(&name("annotations"), message));
        }
    }
    for field in ["name", "refusal", "audio", "function_call", "tool_calls", "tool_call_id"] {
        if fields.take(field).is_some() {
            let message = "this endpoint does not support it".to_owned();
            return Err(ApiError::unsupported(&name(field), message));
        }
    }
    fields.finish()?;
    Ok(ChatMessage { role: role.to_owned(), content, tool_calls, tool_call_id })
}

/// The text of a message: a string, or parts of these kinds.
pub(super) fn text_of(
    path: &str,
    content: Option<Value>,
    kinds: &[&str],
) -> Result<String, ApiError> {
    let parts = match content {
        Some(Value::String(text)) => return Ok(text),
        Some(Value::Array(parts)) => parts,
        _ => {
            let message = "expected a string or an array of parts".to_owned();
            return Err(ApiError::parameter(path, message));
        }
    };
    let mut content = String::new();
    for part in parts {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some(kind), Some(text)) if kinds.contains(&kind) => content.push_str(text),
            (Some(kind), _) if !kinds.contains(&kind) => {
                let kind: String = kind.chars().take(40).collect();
                let message = format!("parts of type `{kind}` are not supported, only text");
                return Err(ApiError::unsupported(path, message));
            }
            _ => {
                let message = "expected parts with a type and a text".to_owned();
                return Err(ApiError::parameter(path, message));
            }
        }
    }
    Ok(content)
}

fn logprobs(entries: &[TokenLogprob], wanted: bool) -> Value {
    if !wanted {
        return Value::Null;
    }
    json!({ "content": token_logprobs(entries), "refusal": null })
}

/// Tokens with their log-probabilities and those of their alternatives.
pub(super) fn token_logprobs(entries: &[TokenLogprob]) -> Vec<Value> {
    let plain = |entry: &TokenLogprob| {
        object([
            ("token", json!(String::from_utf8_lossy(&entry.bytes))),
            ("logprob", json!(entry.logprob)),
            ("bytes", json!(entry.bytes)),
        ])
    };
    entries
        .iter()
        .map(|entry| {
            let mut shown = plain(entry);
            shown["top_logprobs"] = entry.top.iter().map(plain).collect();
            shown
        })
        .collect()
}

struct ChatChunks {
    id: String,
    created: i64,
    model: String,
    usage: bool,
    count: usize,
    /// One for each answer that may call tools.
    readers: Vec<Reader>,
    /// Log-probabilities of each answer's tokens whose text is not decided yet.
    unsent: Vec<Vec<TokenLogprob>>,
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

impl ChatChunks {
    /// The chunk of what a reader found.
    fn found(&mut self, index: usize, found: Found) -> Value {
        let call = |call: usize, rest: Value| {
            let mut call = json!({ "index": call });
            for (name, value) in rest.as_object().into_iter().flatten() {
                call[name] = value.clone();
            }
            json!({ "tool_calls": [call] })
        };
        let delta = match found {
            Found::Text(text) => json!({ "content": text }),
            Found::Begin { index, name } => call(
                index,
                json!({
                    "id": new_call_id(),
                    "type": "function",
                    "function": { "name": name, "arguments": "" },
                }),
            ),
            Found::Arguments { index, text } => {
                call(index, json!({ "function": { "arguments": text } }))
            }
        };
        let entries = std::mem::take(&mut self.unsent[index]);
        let entries = logprobs(&entries, !entries.is_empty());
        self.choice(index, delta, entries, None)
    }
}

impl Chunks for ChatChunks {
    fn begin(&mut self, index: usize) -> Vec<Value> {
        let delta = json!({ "role": "assistant", "content": null, "refusal": null });
        vec![self.choice(index, delta, Value::Null, None)]
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Value> {
        if piece.text.is_empty() && piece.logprobs.is_empty() {
            return Vec::new();
        }
        let Some(reader) = self.readers.get_mut(index) else {
            let entries = logprobs(&piece.logprobs, !piece.logprobs.is_empty());
            return vec![self.choice(index, json!({ "content": piece.text }), entries, None)];
        };
        self.unsent[index].extend(piece.logprobs);
        let found = reader.push(&piece.text);
        found.into_iter().map(|found| self.found(index, found)).collect()
    }

    fn end(&mut self, index: usize, finish: &Finish) -> Vec<Value> {
        let (held, calls) = match self.readers.get_mut(index) {
            Some(reader) => (reader.finish(), reader.calls()),
            None => (None, 0),
        };
        let mut chunks: Vec<Value> =
            held.into_iter().map(|found| self.found(index, found)).collect();
        let reason = Some(chat_reason(finish, calls));
        let entries = std::mem::take(&mut self.unsent[index]);
        let entries = logprobs(&entries, !entries.is_empty());
        let mut last = self.choice(index, json!({}), entries, reason);
        last["timings"] = timings(finish);
        chunks.push(last);
        chunks
    }

    fn usage(&mut self, finishes: &[Finish]) -> Option<Value> {
        self.usage.then(|| {
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = usage(finishes, self.count);
            chunk
        })
    }
}
