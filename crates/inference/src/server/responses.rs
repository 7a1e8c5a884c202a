//! `POST /v1/responses`: OpenAI's newer shape of the same answers, without a memory. Nothing is kept
//! from one response to the next: the client sends the whole conversation as `input`.

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Map, Value, json};

use super::adapters::asked;
use super::chat::{chat_prompts, hold_to_tools, text_of, token_logprobs};
use super::constrain::text_constraint;
use super::error::ApiError;
use super::fields::Fields;
use super::generate::{Chunks, Job, finish_all, sampling, stream_all, streaming, timings};
use super::tools::{Form, new_call_id, tool_use};
use super::{App, new_id, now_s, read_fields};
use crate::chat::ChatMessage;
use crate::tools::{Found, Reader, ToolCall};
use crate::worker::{Finish, FinishReason, GenerateRequest, Piece, Prompt, TokenLogprob};

/// What a response says again of what was asked.
const REPEATED: [&str; 9] = [
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
];
/// The part of an answer that asks for log-probabilities.
const LOGPROBS: &str = "message.output_text.logprobs";
/// What there is none of, so that asking for it does no harm.
const NOTHING: &str = "reasoning.encrypted_content";

/// Where it is.
pub(super) const PATH: &str = "/v1/responses";

pub(super) async fn respond(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    answer(&app, body).await.map_err(|error| error.of_prompt("input"))
}

async fn answer(app: &App, body: Body) -> Result<Response, ApiError> {
    let mut fields = read_fields(PATH, body).await?;
    let asked = asked(app, &mut fields).await?;
    let repeated = repeated(&fields);
    let messages = messages(&mut fields)?;
    let tool_use = tool_use(&mut fields, Form::Flat)?;
    let streaming = streaming(&mut fields)?;
    if streaming.usage {
        let message = "the last event has the usage always".to_owned();
        return Err(ApiError::parameter("stream_options", message));
    }
    let max_tokens = fields.count("max_output_tokens")?;
    if max_tokens == Some(0) {
        return Err(ApiError::parameter("max_output_tokens", "expected at least 1".to_owned()));
    }
    let mut template = GenerateRequest {
        prompt: Prompt::Tokens(Vec::new()),
        max_tokens,
        sampling: sampling(&mut fields)?,
        stop: fields.texts("stop")?,
        echo: false,
        logprobs: logprobs(&mut fields)?,
        constraint: text_constraint(&mut fields)?,
        ignore_end: fields.flag("ignore_eos")?.unwrap_or(false),
        fresh: !fields.flag("cache_prompt")?.unwrap_or(true),
        adapters: asked.adapters,
    };
    let metadata = fields.take("metadata");
    if metadata.is_some_and(|metadata| !metadata.is_object()) {
        return Err(ApiError::parameter("metadata", "expected an object".to_owned()));
    }
    fields.finish()?;
    let reader = hold_to_tools(app, tool_use.as_ref(), &mut template, 1).await?.pop();
    let prompts = chat_prompts(messages, tool_use, 1);
    let generations = Job { prompts, template, chat: true }.begin(app).await?;
    let id = new_id("resp_");
    app.host.metrics().remember_answer(&id);
    let mut events = Events::new(about(id, &asked.name, repeated), reader);
    if streaming.wanted {
        return stream_all(app, generations, events).await;
    }
    // The whole answer is what its last event says.
    for (piece, finish) in finish_all(generations).await? {
        events.piece(0, piece);
        events.end(0, &finish);
    }
    Ok(axum::Json(events.response).into_response())
}

/// What a response says of itself before it has begun.
fn about(id: String, model: &str, repeated: Map<String, Value>) -> Value {
    let mut response = json!({
        "id": id,
        "object": "response",
        "created_at": now_s(),
        "status": "in_progress",
        "background": false,
        "error": null,
        "incomplete_details": null,
        "model": model,
        "output": [],
        "previous_response_id": null,
        "reasoning": { "effort": null, "summary": null },
        "service_tier": "default",
        "store": false,
        "truncation": "disabled",
        "usage": null,
    });
    for (name, value) in repeated {
        response[name] = value;
    }
    response
}

/// What was asked, with the defaults of what was not.
fn repeated(fields: &Fields) -> Map<String, Value> {
    let entry = |name: &str| {
        let default = match name {
            "metadata" => json!({}),
            "parallel_tool_calls" => json!(true),
            "temperature" | "top_p" => json!(1.0),
            "text" => json!({ "format": { "type": "text" } }),
            "tool_choice" => json!("auto"),
            "tools" => json!([]),
            _ => Value::Null,
        };
        (name.to_owned(), fields.look(name).cloned().unwrap_or(default))
    };
    REPEATED.into_iter().map(entry).collect()
}

/// Takes `include` and `top_logprobs`.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let included = fields.texts("include")?;
    if let Some(other) = included.iter().find(|name| ![LOGPROBS, NOTHING].contains(&name.as_str()))
    {
        let other: String = other.chars().take(100).collect();
        let message = format!("this endpoint does not support `{other}`\nhint: leave it out");
        return Err(ApiError::unsupported("include", message));
    }
    let wanted = included.iter().any(|name| name == LOGPROBS);
    let top = fields.count("top_logprobs")?;
    if top.is_some_and(|top| top > 0) && !wanted {
        let message = format!("only with \"include\": [\"{LOGPROBS}\"]");
        return Err(ApiError::parameter("top_logprobs", message));
    }
    Ok(wanted.then(|| top.unwrap_or(0)))
}

/// Takes `instructions` and `input`: a text, or the items of a conversation.
fn messages(fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
    let instructions = fields.text("instructions")?;
    let mut messages: Vec<ChatMessage> =
        instructions.into_iter().map(|text| ChatMessage::new("system", text)).collect();
    let wrong = |message: &str| ApiError::parameter("input", message.to_owned());
    match fields.take("input") {
        Some(Value::String(text)) => messages.push(ChatMessage::user(text)),
        Some(Value::Array(items)) if !items.is_empty() => {
            for (index, value) in items.into_iter().enumerate() {
                item(&format!("input[{index}]"), value, &mut messages)?;
            }
        }
        Some(Value::Array(_)) => return Err(wrong("at least one item is needed")),
        Some(_) => return Err(wrong("expected a string or an array of items")),
        None => return Err(wrong("it is missing")),
    }
    Ok(messages)
}

/// Puts one item of the input to the messages of the chat that it becomes.
fn item(path: &str, value: Value, messages: &mut Vec<ChatMessage>) -> Result<(), ApiError> {
    let name = |field: &str| format!("{path}.{field}");
    let Value::Object(value) = value else {
        return Err(ApiError::parameter(path, "expected an object".to_owned()));
    };
    let mut fields = Fields::new(value);
    // By which our own answers name and describe their items.
    for field in ["id", "status", "phase"] {
        fields.text(field)?;
    }
    let kind = fields.text("type")?;
    let text = |fields: &mut Fields, field: &str| match fields.text(field)? {
        Some(text) => Ok(text),
        None => Err(ApiError::parameter(&name(field), "it is missing".to_owned())),
    };
    match kind.as_deref() {
        None | Some("message") => {
            let role = match fields.text("role")?.as_deref() {
                Some("system" | "developer") => "system",
                Some("user") => "user",
                Some("assistant") => "assistant",
                _ => {
                    let message = "expected system, developer, user or assistant".to_owned();
                    return Err(ApiError::parameter(&name("role"), message));
                }
            };
            let content = fields.take("content");
            let content = text_of(&name("content"), content, &["input_text", "output_text"])?;
            messages.push(ChatMessage::new(role, content));
        }
        Some("function_call") => {
            let id = text(&mut fields, "call_id")?;
            let (called, arguments) = (text(&mut fields, "name")?, text(&mut fields, "arguments")?);
            let call = ToolCall { id, name: called, arguments };
            // What an assistant said and called was one message.
            match messages.last_mut().filter(|last| last.role == "assistant") {
                Some(last) => last.tool_calls.push(call),
                None => {
                    let mut message = ChatMessage::new("assistant", "");
                    message.tool_calls.push(call);
                    messages.push(message);
                }
            }
        }
        Some("function_call_output") => {
            let id = text(&mut fields, "call_id")?;
            let output = fields.take("output");
            let output = text_of(&name("output"), output, &["input_text", "output_text"])?;
            let mut message = ChatMessage::new("tool", output);
            message.tool_call_id = Some(id);
            messages.push(message);
        }
        Some(kind) => {
            let kind: String = kind.chars().take(40).collect();
            let message = format!(
                "items of type `{kind}` are not supported\nhint: send messages, function_call and function_call_output"
            );
            return Err(ApiError::unsupported(&name("type"), message));
        }
    }
    fields.finish()
}

/// Makes the events of a response, and the response itself as it grows.
struct Events {
    response: Value,
    /// Events so far.
    sequence: u64,
    /// Where tools may be called.
    reader: Option<Reader>,
    open: Option<Open>,
    /// Log-probabilities of tokens whose text is not decided yet.
    unsent: Vec<TokenLogprob>,
}

/// The item of the output that grows.
enum Open {
    Message { id: String, text: String, logprobs: Vec<Value> },
    Call { id: String, call_id: String, name: String, arguments: String },
}

impl Open {
    fn id(&self) -> &str {
        match self {
            Self::Message { id, .. } | Self::Call { id, .. } => id,
        }
    }

    /// The text of a message as it is now.
    fn part(text: &str, logprobs: &[Value]) -> Value {
        json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": logprobs })
    }

    fn item(&self, status: &str) -> Value {
        match self {
            Self::Message { id, text, logprobs } => json!({
                "id": id,
                "type": "message",
                "status": status,
                "role": "assistant",
                "content": match status {
                    "in_progress" => json!([]),
                    _ => json!([Self::part(text, logprobs)]),
                },
            }),
            Self::Call { id, call_id, name, arguments } => json!({
                "id": id,
                "type": "function_call",
                "status": status,
                "call_id": call_id,
                "name": name,
                "arguments": arguments,
            }),
        }
    }
}

impl Events {
    fn new(response: Value, reader: Option<Reader>) -> Self {
        Self { response, sequence: 0, reader, open: None, unsent: Vec::new() }
    }

    fn event(&mut self, kind: &str, mut event: Value) -> Value {
        event["type"] = json!(format!("response.{kind}"));
        event["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        event
    }

    /// An event of the response as a whole.
    fn of_all(&mut self, kind: &str) -> Value {
        let response = self.response.clone();
        self.event(kind, json!({ "response": response }))
    }

    /// The place of the item that grows.
    fn place(&self) -> usize {
        self.response["output"].as_array().map_or(0, Vec::len)
    }

    /// An event of the item that grows.
    fn of_item(&mut self, kind: &str, mut event: Value) -> Value {
        event["output_index"] = json!(self.place());
        event["item_id"] = json!(self.open.as_ref().map(Open::id));
        self.event(kind, event)
    }

    /// An event of the text that grows.
    fn of_text(&mut self, kind: &str, mut event: Value) -> Value {
        event["content_index"] = json!(0);
        self.of_item(kind, event)
    }

    /// Begins an item, after the one before is complete.
    fn begin_item(&mut self, next: Open, events: &mut Vec<Value>) {
        self.end_item("completed", events);
        let added = json!({ "output_index": self.place(), "item": next.item("in_progress") });
        events.push(self.event("output_item.added", added));
        let text = matches!(next, Open::Message { .. });
        self.open = Some(next);
        if text {
            let part = Open::part("", &[]);
            events.push(self.of_text("content_part.added", json!({ "part": part })));
        }
    }

    fn begin_message(&mut self, events: &mut Vec<Value>) {
        let (text, logprobs) = (String::new(), Vec::new());
        self.begin_item(Open::Message { id: new_id("msg_"), text, logprobs }, events);
    }

    /// Ends the item that grows.
    fn end_item(&mut self, status: &str, events: &mut Vec<Value>) {
        match &self.open {
            None => return,
            Some(Open::Message { text, logprobs, .. }) => {
                let done = json!({ "text": text, "logprobs": logprobs });
                let part = json!({ "part": Open::part(text, logprobs) });
                events.push(self.of_text("output_text.done", done));
                events.push(self.of_text("content_part.done", part));
            }
            Some(Open::Call { arguments, name, .. }) => {
                let done = json!({ "arguments": arguments, "name": name });
                events.push(self.of_item("function_call_arguments.done", done));
            }
        }
        let place = self.place();
        let Some(item) = self.open.take().map(|open| open.item(status)) else { return };
        let done = json!({ "output_index": place, "item": &item });
        events.push(self.event("output_item.done", done));
        if let Some(output) = self.response["output"].as_array_mut() {
            output.push(item);
        }
    }

    /// Takes what a reader found.
    fn found(&mut self, found: Found, events: &mut Vec<Value>) {
        let entries = token_logprobs(&std::mem::take(&mut self.unsent));
        match found {
            Found::Text(new) => {
                if !matches!(self.open, Some(Open::Message { .. })) {
                    self.begin_message(events);
                }
                if let Some(Open::Message { text, logprobs, .. }) = &mut self.open {
                    text.push_str(&new);
                    logprobs.extend(entries.iter().cloned());
                }
                let delta = json!({ "delta": new, "logprobs": entries });
                events.push(self.of_text("output_text.delta", delta));
            }
            Found::Begin { name, .. } => {
                let (id, call_id) = (new_id("fc_"), new_call_id());
                let arguments = String::new();
                self.begin_item(Open::Call { id, call_id, name, arguments }, events);
            }
            Found::Arguments { text, .. } => {
                if let Some(Open::Call { arguments, .. }) = &mut self.open {
                    arguments.push_str(&text);
                }
                let delta = json!({ "delta": text });
                events.push(self.of_item("function_call_arguments.delta", delta));
            }
        }
    }
}

impl Chunks for Events {
    const NAMED: bool = true;

    fn begin(&mut self, _: usize) -> Vec<Value> {
        vec![self.of_all("created"), self.of_all("in_progress")]
    }

    fn piece(&mut self, _: usize, piece: Piece) -> Vec<Value> {
        let mut events = Vec::new();
        self.unsent.extend(piece.logprobs);
        let found = match &mut self.reader {
            Some(reader) => reader.push(&piece.text),
            None if piece.text.is_empty() => Vec::new(),
            None => vec![Found::Text(piece.text)],
        };
        for found in found {
            self.found(found, &mut events);
        }
        events
    }

    fn end(&mut self, _: usize, finish: &Finish) -> Vec<Value> {
        let mut events = Vec::new();
        if let Some(held) = self.reader.as_mut().and_then(Reader::finish) {
            self.found(held, &mut events);
        }
        // An empty answer is a message, too.
        if self.open.is_none() && self.place() == 0 {
            self.begin_message(&mut events);
        }
        let status = match finish.reason {
            FinishReason::Stop => "completed",
            FinishReason::Length => "incomplete",
        };
        self.end_item(status, &mut events);
        self.response["status"] = json!(status);
        if finish.reason == FinishReason::Length {
            self.response["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        self.response["usage"] = usage(finish);
        self.response["timings"] = timings(finish);
        events.push(self.of_all(status));
        events
    }

    fn usage(&mut self, _: &[Finish]) -> Option<Value> {
        None
    }

    fn failed(&mut self, error: &ApiError) -> Value {
        self.response["status"] = json!("failed");
        self.response["error"] = error.of_response();
        self.of_all("failed")
    }
}

fn usage(finish: &Finish) -> Value {
    let (input, output) = (finish.prompt_tokens, finish.completion_tokens);
    json!({
        "input_tokens": input,
        "input_tokens_details": {
            "cached_tokens": finish.cached_tokens,
            // What was computed stays in the cache.
            "cache_write_tokens": input.saturating_sub(finish.cached_tokens),
        },
        "output_tokens": output,
        "output_tokens_details": { "reasoning_tokens": 0 },
        "total_tokens": u64::from(input) + u64::from(output),
    })
}
