//! What all endpoints that generate have in common.

use axum::body::Bytes;
use axum::response::Response;
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt as _};
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::{App, event_stream};
use crate::host::MeteredGeneration;
use crate::metrics::Operation;
use crate::worker::{
    Finish, FinishReason, GenerateRequest, Output, Piece, Prompt, Sampling, Worker, WorkerError,
};

/// The most answers of one request.
pub(super) const MAX_CHOICES: usize = 16;
/// What a stream gets while nothing else comes.
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// Takes the parameters of sampling.
pub(super) fn sampling(fields: &mut Fields) -> Result<Sampling, ApiError> {
    let default = Sampling::default();
    let repeat_penalty = fields.either(["repeat_penalty", "repetition_penalty"], Fields::number)?;
    let mut logit_bias = Vec::new();
    if let Some(value) = fields.take("logit_bias") {
        let wrong = || {
            let message = "expected an object of token ids and numbers".to_owned();
            ApiError::parameter("logit_bias", message)
        };
        for (token, bias) in value.as_object().ok_or_else(wrong)? {
            let token = token.parse().map_err(|_| wrong())?;
            logit_bias.push((token, bias.as_f64().ok_or_else(wrong)? as f32));
        }
    }
    Ok(Sampling {
        temperature: fields.number("temperature")?.unwrap_or(default.temperature),
        top_k: fields.count("top_k")?.unwrap_or(default.top_k),
        top_p: fields.number("top_p")?.unwrap_or(default.top_p),
        min_p: fields.number("min_p")?.unwrap_or(default.min_p),
        repeat_penalty: repeat_penalty.unwrap_or(default.repeat_penalty),
        repeat_last_n: fields.count("repeat_last_n")?.unwrap_or(default.repeat_last_n),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(default.frequency_penalty),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(default.presence_penalty),
        seed: fields.seed("seed")?,
        logit_bias,
    })
}

/// Whether and how an answer is streamed.
#[derive(Clone, Copy)]
pub(super) struct Streaming {
    pub(super) wanted: bool,
    pub(super) usage: bool,
}

/// Takes `stream` and `stream_options`.
pub(super) fn streaming(fields: &mut Fields) -> Result<Streaming, ApiError> {
    let wanted = fields.flag("stream")?.unwrap_or(false);
    let Some(options) = fields.take("stream_options") else {
        return Ok(Streaming { wanted, usage: false });
    };
    let wrong = |message: &str| ApiError::parameter("stream_options", message.to_owned());
    let Value::Object(options) = options else { return Err(wrong("expected an object")) };
    if !wanted {
        return Err(wrong("only with \"stream\": true"));
    }
    let mut options = Fields::new(options);
    let usage = options.flag("include_usage")?.unwrap_or(false);
    // Padding against the guessing of lengths on the wire has no use on the same machine.
    let _ = options.flag("include_obfuscation")?;
    options.finish()?;
    Ok(Streaming { wanted, usage })
}

/// Takes `n`.
pub(super) fn choices(fields: &mut Fields) -> Result<usize, ApiError> {
    let count = fields.count("n")?.unwrap_or(1) as usize;
    if (1..=MAX_CHOICES).contains(&count) {
        return Ok(count);
    }
    Err(ApiError::parameter("n", format!("expected 1 to {MAX_CHOICES}")))
}

/// Where the prompt of an answer comes from.
pub(super) type PromptOf = Box<dyn Fn(&Worker) -> Result<Prompt, WorkerError> + Send + Sync>;

/// A request for several answers, ready to be sent to the worker.
pub(super) struct Job {
    /// One for each answer.
    pub(super) prompts: Vec<PromptOf>,
    pub(super) template: GenerateRequest,
    /// Stop strings of the chat template apply.
    pub(super) chat: bool,
}

impl Job {
    /// Begins all answers.
    pub(super) async fn begin(&self, app: &App) -> Result<Vec<MeteredGeneration>, ApiError> {
        if let Some(constraint) = &self.template.constraint {
            let checked = app.checked.check(constraint).await;
            checked.map_err(|error| ApiError::constraint(&constraint.parameter, &error))?;
        }
        let operation = match self.chat {
            true => Operation::Chat,
            false => Operation::TextCompletion,
        };
        let mut generations = Vec::with_capacity(self.prompts.len());
        for (index, prompt) in self.prompts.iter().enumerate() {
            let begun = app.host.generate(operation, |worker| {
                let mut request = self.template.clone();
                request.prompt = prompt(worker)?;
                // Each answer of a repeatable request is repeatable, and they differ.
                let seed = &mut request.sampling.seed;
                *seed = seed.map(|seed| seed.wrapping_add(index as u64));
                if self.chat {
                    let stops = worker.template().stops();
                    request.stop.extend(stops.iter().map(|stop| (*stop).to_owned()));
                }
                Ok(request)
            });
            generations.push(begun.await?);
        }
        Ok(generations)
    }
}

/// Waits for all answers.
pub(super) async fn finish_all(
    generations: Vec<MeteredGeneration>,
) -> Result<Vec<(Piece, Finish)>, ApiError> {
    let finished = join_all(generations.into_iter().map(MeteredGeneration::finish)).await;
    Ok(finished.into_iter().collect::<Result<_, _>>()?)
}

/// The sum of what some answers cost, as OpenAI's `usage`. A prompt shared by several answers
/// counts once.
pub(super) fn usage(finishes: &[Finish], answers_per_prompt: usize) -> Value {
    let firsts = || finishes.iter().step_by(answers_per_prompt.max(1));
    let prompt: u64 = firsts().map(|finish| u64::from(finish.prompt_tokens)).sum();
    let cached: u64 = firsts().map(|finish| u64::from(finish.cached_tokens)).sum();
    let completion: u64 = finishes.iter().map(|f| u64::from(f.completion_tokens)).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": { "cached_tokens": cached },
    })
}

/// How long an answer took, as llama.cpp's server says it; of several answers, the first.
pub(super) fn timings(finish: &Finish) -> Value {
    let computed = finish.prompt_tokens.saturating_sub(finish.cached_tokens);
    // The first token comes with the prompt.
    let decoded = finish.completion_tokens.saturating_sub(1);
    let rate = |tokens: u32, ms: f64| if ms > 0.0 { f64::from(tokens) * 1e3 / ms } else { 0.0 };
    json!({
        "cache_n": finish.cached_tokens,
        "restored_n": finish.restored_tokens,
        "prompt_n": computed,
        "prompt_ms": finish.prompt_ms,
        "prompt_per_second": rate(computed, finish.prompt_ms),
        "predicted_n": finish.completion_tokens,
        "predicted_ms": finish.decode_ms,
        "predicted_per_second": rate(decoded, finish.decode_ms),
        "queue_ms": finish.queue_ms,
        "draft_n": finish.drafted_tokens,
        "draft_n_accepted": finish.accepted_tokens,
        "context_shifts": finish.context_shifts,
    })
}

pub(super) fn reason(finish: &Finish) -> &'static str {
    match finish.reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// What a stream's chunks are made by.
pub(super) trait Chunks: Send + 'static {
    /// Whether each chunk is an event of the name that its `type` says, and the last chunk is the
    /// end; otherwise they have no names, and `[DONE]` is the end.
    const NAMED: bool = false;

    /// The chunks before any text of answer `index`.
    fn begin(&mut self, index: usize) -> Vec<Value>;
    /// The chunks of what a piece shows.
    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Value>;
    /// The chunks that end an answer.
    fn end(&mut self, index: usize, finish: &Finish) -> Vec<Value>;
    /// The chunk after all answers, with what they cost.
    fn usage(&mut self, finishes: &[Finish]) -> Option<Value>;
    /// The chunk that says why there is no more.
    fn failed(&mut self, error: &ApiError) -> Value {
        error.body()
    }
}

/// Streams several answers at once. The response begins when the first of them got a sequence, so
/// that a refusal is still an HTTP error; a later failure is an event. While nothing comes, such as
/// in the queue or during a long prompt, comments keep the connection alive.
pub(super) async fn stream_all<C: Chunks>(
    app: &App,
    generations: Vec<MeteredGeneration>,
    mut chunks: C,
) -> Result<Response, ApiError> {
    let count = generations.len();
    let outputs = generations.into_iter().enumerate().map(|(index, generation)| {
        Box::pin(stream::unfold(Some(generation), move |state| async move {
            let mut generation = state?;
            let output = generation.next().await;
            let over = matches!(output, Ok(Output::Finished(_)) | Err(_));
            Some(((index, output), (!over).then_some(generation)))
        }))
    });
    let keep_alive = app.options.keep_alive;
    let mut outputs = stream::select_all(outputs);
    let first = match tokio::time::timeout(keep_alive, outputs.next()).await {
        Ok(Some((_, Err(error)))) => return Err(error.into()),
        Ok(first) => first,
        // It waits in the queue: the client hears of it by a comment.
        Err(_) => None,
    };
    let queued = first.is_none().then(|| Bytes::from_static(KEEP_ALIVE));
    let mut finishes: Vec<Option<Finish>> = vec![None; count];
    let outputs = stream::iter(first).chain(outputs).map(Some).chain(stream::iter([None]));
    let lines = outputs.map(move |item| match item {
        Some((index, Ok(Output::Started))) => Lines::Some(chunks.begin(index)),
        Some((index, Ok(Output::Echo(piece) | Output::Piece(piece)))) => {
            Lines::Some(chunks.piece(index, piece))
        }
        Some((index, Ok(Output::Finished(finish)))) => {
            finishes[index] = Some(finish);
            Lines::Some(chunks.end(index, &finish))
        }
        Some((_, Err(error))) => Lines::Failed(chunks.failed(&ApiError::from(error))),
        None => {
            let finishes: Vec<Finish> = finishes.iter().flatten().copied().collect();
            Lines::Done(chunks.usage(&finishes))
        }
    });
    // An error is the last event; the other answers are cancelled with the stream.
    let event = if C::NAMED { named_event } else { event };
    let events = stream::unfold(Some(Box::pin(lines)), move |state| async move {
        let mut lines = state?;
        let Ok(line) = tokio::time::timeout(keep_alive, lines.next()).await else {
            return Some((Some(Bytes::from_static(KEEP_ALIVE)), Some(lines)));
        };
        match line? {
            Lines::Some(values) => {
                let events: Vec<u8> = values.iter().flat_map(event).collect();
                let shown = (!events.is_empty()).then(|| Bytes::from(events));
                Some((shown, Some(lines)))
            }
            Lines::Failed(error) => Some((Some(event(&error)), None)),
            Lines::Done(usage) => {
                let mut last = usage.as_ref().map(event).unwrap_or_default().to_vec();
                if !C::NAMED {
                    last.extend_from_slice(b"data: [DONE]\n\n");
                }
                Some((Some(Bytes::from(last)), None))
            }
        }
    });
    let events = stream::iter([queued]).chain(events);
    Ok(event_stream(events.filter_map(async |event| event)))
}

/// One server-sent event.
fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

/// The same under the name that is its `type`.
fn named_event(value: &Value) -> Bytes {
    let name = value["type"].as_str().unwrap_or("message");
    Bytes::from(format!("event: {name}\ndata: {value}\n\n"))
}

/// What one output of the worker becomes.
enum Lines {
    Some(Vec<Value>),
    Failed(Value),
    Done(Option<Value>),
}
