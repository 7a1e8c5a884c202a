//! The job that measures speed and memory: one process that runs the model as a device does, in
//! a given runtime configuration, and nothing else, so that its peak memory is the model's.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::llama::{Batch, Context, ContextOptions, LoadOptions, Model, Token};

use crate::distributions;

/// The job's name.
pub const JOB: &str = "evaluate-runtime";
/// Tokens of the prompt behind the time to first token.
pub const FIRST_TOKEN_PROMPT_TOKENS: u32 = 128;
/// Tokens generated to measure the decode speed.
const DECODE_TOKENS: u32 = 48;
/// Tokens generated before measuring, to warm up caches and clocks.
const WARM_UP_TOKENS: u32 = 4;

/// What the job is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct Input {
    /// The model file.
    pub model: PathBuf,
    /// Text to make prompts from.
    pub text: String,
    /// The runtime configuration.
    pub runtime: RuntimeConfig,
}

/// What the job found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Runtime {
    /// Decode speed of one sequence, tokens per second.
    pub decode_tokens_per_s: f64,
    /// Prompt processing speed of a full batch, tokens per second.
    pub prompt_tokens_per_s: f64,
    /// Time to first token after a prompt of [`FIRST_TOKEN_PROMPT_TOKENS`], milliseconds; the best
    /// of two, since another program's work only ever adds to it.
    pub time_to_first_token_ms: f64,
    /// Peak resident memory of the process, bytes.
    pub peak_memory_bytes: u64,
    /// Resident memory at the end, bytes.
    pub resident_memory_bytes: u64,
}

/// Runs the job.
///
/// # Errors
/// The model does not load or run in this configuration, or the text is too short.
pub fn run(
    input: serde_json::Value,
    on_progress: &mut dyn FnMut(serde_json::Value),
) -> anyhow::Result<serde_json::Value> {
    let input: Input = serde_json::from_value(input).context("read the job's input")?;
    let model = Arc::new(Model::load(&input.model, &LoadOptions::default())?);
    let runtime = &input.runtime;
    let mut context = Context::new(
        &model,
        &ContextOptions {
            context_tokens: runtime.context_tokens,
            sequences: runtime.parallel,
            batch_tokens: runtime.batch_tokens,
            outputs: runtime.parallel,
            threads: runtime.threads,
            kv_type: runtime.kv_type,
            flash_attention: runtime.flash_attention,
            ..ContextOptions::default()
        },
    )?;
    let room = runtime.context_tokens.min(model.trained_context()).saturating_sub(1);
    let long = runtime.batch_tokens.min(room) as usize;
    let tokens = model.tokenise(&input.text, true, false)?;
    if tokens.is_empty() || long == 0 {
        bail!("the text is empty");
    }
    let prompt: Vec<Token> = tokens.iter().copied().cycle().take(long).collect();
    let mut report = |done: u64| {
        on_progress(serde_json::json!({ "done": done, "total": 4 }));
    };

    // The first pass touches every weight and buffer; the second is timed.
    let (_, _) = prefill(&mut context, &prompt)?;
    report(1);
    let (_, seconds) = prefill(&mut context, &prompt)?;
    let prompt_tokens_per_s = prompt.len() as f64 / seconds;
    report(2);

    let short = (FIRST_TOKEN_PROMPT_TOKENS as usize).min(prompt.len());
    let (_, one) = prefill(&mut context, &prompt[..short])?;
    let (mut next, two) = prefill(&mut context, &prompt[..short])?;
    report(3);

    let steps = (WARM_UP_TOKENS + DECODE_TOKENS).min(room + 1 - short as u32);
    let warm_up = WARM_UP_TOKENS.min(steps - 1);
    let mut started = Instant::now();
    for step in 0..steps {
        if step == warm_up {
            started = Instant::now();
        }
        let mut batch = Batch::new();
        batch.push(next, short as u32 + step, 0, true);
        context.decode(&mut batch)?;
        next =
            distributions::first(context.logits(0).context("the engine gave no logits")?) as Token;
    }
    let decode_tokens_per_s = f64::from(steps - warm_up) / started.elapsed().as_secs_f64();
    report(4);
    let (resident, peak) = memory_bytes().context("read /proc/self/status")?;
    Ok(serde_json::to_value(Runtime {
        decode_tokens_per_s,
        prompt_tokens_per_s,
        time_to_first_token_ms: one.min(two) * 1000.0,
        peak_memory_bytes: peak,
        resident_memory_bytes: resident,
    })?)
}

/// Computes a prompt from nothing; the token that follows, and the seconds until it was known.
fn prefill(context: &mut Context, prompt: &[Token]) -> anyhow::Result<(Token, f64)> {
    let started = Instant::now();
    context.clear();
    let mut batch = Batch::new();
    for (position, token) in prompt.iter().enumerate() {
        batch.push(*token, position as u32, 0, position + 1 == prompt.len());
    }
    context.decode(&mut batch)?;
    let logits = context.logits(prompt.len() - 1).context("the engine gave no logits")?;
    let next = distributions::first(logits) as Token;
    Ok((next, started.elapsed().as_secs_f64()))
}

/// Resident memory of this process now and at its peak, in bytes (proc(5), `VmRSS` and `VmHWM`).
fn memory_bytes() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let value = |key: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    };
    Some((value("VmRSS:")?, value("VmHWM:")?))
}
