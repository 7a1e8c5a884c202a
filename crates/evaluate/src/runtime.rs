//! Speed and memory, measured on the very worker process that serves a model on a device.

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use slmops_api::runtime::RuntimeConfig;
use slmops_artifact::gguf;
use slmops_inference::llama::Token;
use slmops_inference::worker::{
    GenerateRequest, Output, Prompt, ScoreRequest, Worker, WorkerError, WorkerSpec,
};

/// Tokens of the prompt behind the time to first token.
pub const FIRST_TOKEN_PROMPT_TOKENS: usize = 128;
/// Tokens generated to measure the decode speed, in all.
const DECODE_TOKENS: u32 = 48;
/// Answers at most that are generated to get them: a model may end each one early.
const MAX_ANSWERS: usize = 6;
/// Bytes of text that prompts are cut from.
const TEXT_BYTES: usize = 24 << 10;
/// Bytes of text that are scored before memory is read.
const SCORED_BYTES: usize = 160;
/// Steps that progress counts.
const STEPS: u32 = 5;

/// Speed and memory of a model in one runtime configuration.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Runtime {
    /// Decode speed of one sequence, tokens per second.
    pub decode_tokens_per_s: f64,
    /// Prompt processing speed of a full batch, tokens per second.
    pub prompt_tokens_per_s: f64,
    /// From sending a prompt of [`FIRST_TOKEN_PROMPT_TOKENS`] to its first token, milliseconds; the
    /// best of two, since another program's work only ever adds to it.
    pub time_to_first_token_ms: f64,
    /// Peak resident memory of the worker process, bytes.
    pub peak_memory_bytes: u64,
    /// Resident memory of the worker process in the end, bytes.
    pub resident_memory_bytes: u64,
}

/// `runtime` as far as `model` can follow it: no more context than it was trained for, and no more
/// tokens in a batch than that.
pub fn fitting(model: &Path, runtime: &RuntimeConfig) -> RuntimeConfig {
    let shape = gguf::check_file(model).and_then(|header| gguf::shape(&header));
    // A file that cannot be read fails where it is loaded, with its cause.
    let trained = shape.map_or(u32::MAX, |shape| shape.trained_context);
    let context_tokens = runtime.context_tokens.min(trained);
    RuntimeConfig {
        context_tokens,
        batch_tokens: runtime.batch_tokens.min(context_tokens),
        ..runtime.clone()
    }
}

/// The worker of a model, with an adapter if there is one.
pub fn worker(model: &Path, adapter: Option<&Path>, runtime: RuntimeConfig) -> WorkerSpec {
    let spec = WorkerSpec::new(model.to_owned(), runtime);
    match adapter {
        Some(path) => spec.adapted("adapter", path.to_owned()),
        None => spec,
    }
}

/// Runs a model in a worker of its own and measures it; `on_step` gets the share that is done.
///
/// # Errors
/// The model does not run in this configuration.
pub async fn measure(
    spec: WorkerSpec,
    text: &str,
    mut on_step: impl FnMut(f64),
) -> Result<Runtime, WorkerError> {
    let runtime = spec.runtime.clone();
    let worker = Worker::spawn(spec).await?;
    let mut done = 0;
    let mut step = || {
        done += 1;
        on_step(f64::from(done) / f64::from(STEPS));
    };
    step();

    let tokens = worker.tokenise(head(text, TEXT_BYTES).to_owned(), false, false).await?;
    let room = runtime.context_tokens as usize;
    let long = (runtime.batch_tokens as usize).min(room.saturating_sub(1)).max(1);
    let short = FIRST_TOKEN_PROMPT_TOKENS.min(room.saturating_sub(1)).max(1);
    // Each prompt starts elsewhere: a worker keeps what it has computed, and would skip a prompt
    // that begins as one before.
    let mut offset = 0;
    let mut prompt = |length: usize| -> Vec<Token> {
        offset += 1;
        tokens.iter().copied().cycle().skip(offset * 7).take(length).collect()
    };

    // The first answer touches every weight and buffer; the second is timed.
    answer(&worker, prompt(long), 1).await?;
    let prefill = answer(&worker, prompt(long), 1).await?;
    step();
    let one = answer(&worker, prompt(short), 1).await?;
    let two = answer(&worker, prompt(short), 1).await?;
    step();

    let (mut decoded, mut decode_ms) = (0, 0.0);
    let half = (room / 2).clamp(1, 32);
    let wanted = DECODE_TOKENS.min(room.saturating_sub(half + 1).max(2) as u32);
    for _ in 0..MAX_ANSWERS {
        let answer = answer(&worker, prompt(half), wanted).await?;
        decoded += answer.tokens.saturating_sub(1);
        decode_ms += answer.decode_ms;
        if decoded + 1 >= wanted {
            break;
        }
    }
    step();
    // As its probes do on a device: scoring fills the logits buffer, which answers alone do not.
    let continuation = head(text, SCORED_BYTES).to_owned();
    let start = prompt(1);
    worker.score(ScoreRequest { prompt: Prompt::Tokens(start), continuation }).await?;
    let memory = worker.memory();
    worker.drain().await;
    step();
    Ok(Runtime {
        decode_tokens_per_s: f64::from(decoded) / (decode_ms / 1000.0).max(1e-6),
        prompt_tokens_per_s: long as f64 / (prefill.prompt_ms / 1000.0).max(1e-6),
        time_to_first_token_ms: one.first_token_ms.min(two.first_token_ms),
        peak_memory_bytes: memory.peak_bytes,
        resident_memory_bytes: memory.resident_bytes,
    })
}

struct Answer {
    /// As its reader sees it.
    first_token_ms: f64,
    /// As the worker sees it, without waiting.
    prompt_ms: f64,
    decode_ms: f64,
    tokens: u32,
}

async fn answer(
    worker: &Worker,
    prompt: Vec<Token>,
    max_tokens: u32,
) -> Result<Answer, WorkerError> {
    let started = Instant::now();
    let mut generation =
        worker.generate(GenerateRequest::greedy(Prompt::Tokens(prompt), max_tokens))?;
    let mut first_token_ms = None;
    loop {
        match generation.next().await? {
            Output::Started | Output::Echo(_) => {}
            Output::Piece(_) => {
                first_token_ms.get_or_insert(started.elapsed().as_secs_f64() * 1000.0);
            }
            Output::Finished(finish) => {
                let whole_ms = started.elapsed().as_secs_f64() * 1000.0;
                return Ok(Answer {
                    // An answer that ends at once is that end.
                    first_token_ms: first_token_ms.unwrap_or(whole_ms),
                    prompt_ms: finish.prompt_ms,
                    decode_ms: finish.decode_ms,
                    tokens: finish.completion_tokens,
                });
            }
        }
    }
}

fn head(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
