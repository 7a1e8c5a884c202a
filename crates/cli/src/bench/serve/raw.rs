//! What the engine itself does in a loop of its own, without scheduler, process boundary or HTTP: the
//! ceiling of what the endpoint can do. It runs in a process of its own, so that its memory is its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::child::Job;
use slmops_inference::llama::{Batch, Context, ContextOptions, LoadOptions, Model, Token};
use slmops_inference::worker::memory_of;

/// The job's name.
pub const JOB: &str = "bench-raw-loop";
/// The loop as a child process.
pub const RAW_LOOP: Job = Job { name: JOB, run: |input, _| run(input) };

/// What is to be measured.
#[derive(Serialize, Deserialize)]
pub struct Work {
    /// The model file.
    pub model: PathBuf,
    /// As the endpoint is configured.
    pub runtime: RuntimeConfig,
    /// What the endpoint is asked in the same round.
    pub prompts: Prompts,
    /// Tokens that each sequence generates.
    pub decode_tokens: usize,
}

/// The prompts of a round. None begins as another one: an endpoint keeps what it computed.
#[derive(Clone, Serialize, Deserialize)]
pub struct Prompts {
    /// A long one, whose processing is timed.
    pub long: String,
    /// Short ones, whose first tokens are timed.
    pub short: Vec<String>,
    /// One that is continued alone.
    pub alone: String,
    /// Those that are continued side by side.
    pub together: Vec<String>,
}

/// What was measured.
#[derive(Serialize, Deserialize)]
pub struct Figures {
    /// Tokens of the long prompt.
    pub prompt_tokens: usize,
    /// Prompt processing, tokens per second.
    pub prompt_per_s: f64,
    /// Decoding of one sequence, tokens per second.
    pub decode_per_s: f64,
    /// Decoding of all sequences together, tokens per second.
    pub streams_per_s: f64,
    /// From a short prompt to its first token, in milliseconds.
    pub first_token_ms: Vec<f64>,
    /// The same where all of it but its last token is known.
    pub cached_first_token_ms: Vec<f64>,
    /// Resident memory in the end, in bytes.
    pub resident_bytes: u64,
}

fn run(input: Value) -> anyhow::Result<Value> {
    let work: Work = serde_json::from_value(input)?;
    let options = LoadOptions { check_tensors: true, ..LoadOptions::default() };
    let model = Arc::new(Model::load(&work.model, &options)?);
    let sequences = u32::try_from(work.prompts.together.len())?;
    let options = ContextOptions {
        context_tokens: work.runtime.context_tokens,
        sequences,
        batch_tokens: work.runtime.batch_tokens,
        outputs: sequences,
        threads: work.runtime.threads,
        kv_type: work.runtime.kv_type,
        flash_attention: work.runtime.flash_attention,
        embeddings: false,
        abort: None,
    };
    let mut engine = Loop { context: Context::new(&model, &options)?, batch: Batch::new() };
    let tokens = |text: &String| model.tokenise(text, true, false);
    let prompts = &work.prompts;

    // The first one touches every weight and buffer.
    let long = tokens(&prompts.long)?;
    engine.prompt(0, &long)?;
    let started = Instant::now();
    engine.prompt(0, &long)?;
    let prompt_per_s = long.len() as f64 / started.elapsed().as_secs_f64();
    let (mut first_token_ms, mut cached_first_token_ms) = (Vec::new(), Vec::new());
    for short in &prompts.short {
        let started = Instant::now();
        engine.prompt(0, &tokens(short)?)?;
        first_token_ms.push(started.elapsed().as_secs_f64() * 1e3);
        let started = Instant::now();
        let known = tokens(short)?;
        engine.prompt_from(known.len() - 1, 0, &known)?;
        cached_first_token_ms.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let decode_per_s = engine.decode(&[tokens(&prompts.alone)?], work.decode_tokens)?;
    let together: Vec<_> = prompts.together.iter().map(tokens).collect::<Result<_, _>>()?;
    let streams_per_s = engine.decode(&together, work.decode_tokens)?;
    let figures = Figures {
        prompt_tokens: long.len(),
        prompt_per_s,
        decode_per_s,
        streams_per_s,
        first_token_ms,
        cached_first_token_ms,
        resident_bytes: memory_of(std::process::id()).resident_bytes,
    };
    Ok(serde_json::to_value(figures)?)
}

struct Loop {
    context: Context,
    batch: Batch,
}

impl Loop {
    /// Computes a prompt from nothing; gives the most probable next token.
    fn prompt(&mut self, sequence: u32, tokens: &[Token]) -> anyhow::Result<Token> {
        self.prompt_from(0, sequence, tokens)
    }

    /// The same from where `known` tokens of it are computed already.
    fn prompt_from(
        &mut self,
        known: usize,
        sequence: u32,
        tokens: &[Token],
    ) -> anyhow::Result<Token> {
        self.context.truncate(sequence, u32::try_from(known)?);
        let (mut place, last) = (known, tokens.len() - 1);
        let mut next = None;
        for piece in tokens[known..].chunks(self.context.batch_tokens() as usize) {
            self.batch.clear();
            for token in piece {
                let at = self.batch.push(*token, u32::try_from(place)?, sequence, place == last);
                if place == last {
                    next = Some(at);
                }
                place += 1;
            }
            self.context.decode(&mut self.batch)?;
        }
        next.and_then(|at| most_probable(self.context.logits(at)?)).context("no logits came")
    }

    /// Generates `count` tokens after each prompt, all of them side by side; tokens per second.
    fn decode(&mut self, prompts: &[Vec<Token>], count: usize) -> anyhow::Result<f64> {
        let mut next = Vec::new();
        for (sequence, prompt) in (0..).zip(prompts) {
            next.push(self.prompt(sequence, prompt)?);
        }
        let started = Instant::now();
        for step in 0..count {
            self.batch.clear();
            for (sequence, token) in next.iter().enumerate() {
                let place = u32::try_from(prompts[sequence].len() + step)?;
                self.batch.push(*token, place, u32::try_from(sequence)?, true);
            }
            self.context.decode(&mut self.batch)?;
            for (at, token) in next.iter_mut().enumerate() {
                let chosen = self.context.logits(at).and_then(most_probable);
                *token = chosen.context("no logits came")?;
            }
        }
        Ok((count * prompts.len()) as f64 / started.elapsed().as_secs_f64())
    }
}

fn most_probable(logits: &[f32]) -> Option<Token> {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
    Token::try_from(best.0).ok()
}
