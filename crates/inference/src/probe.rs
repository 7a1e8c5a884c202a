//! Running golden probes: the examination that a package carries.

use std::time::{Duration, Instant};

use slmops_api::probe::{Expectation, Probe, ProbeResult, ProbeSet, ReplayPrompt};

use crate::chat::ChatMessage;
use crate::worker::{GenerateRequest, Prompt, Score, ScoreRequest, Worker, WorkerError};

/// Runs all probes, in order; a probe whose run fails counts as not passed, without a value.
pub async fn run(worker: &Worker, probes: &ProbeSet) -> Vec<ProbeResult> {
    let mut results = Vec::with_capacity(probes.probes.len());
    for probe in &probes.probes {
        results.push(run_one(worker, probe).await);
    }
    results
}

/// Runs one probe.
pub async fn run_one(worker: &Worker, probe: &Probe) -> ProbeResult {
    let started = Instant::now();
    let value = match measure(worker, probe).await {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(probe = probe.name, "the probe did not run: {error}");
            None
        }
    };
    let floor = floor(probe);
    ProbeResult {
        name: probe.name.clone(),
        // NaN passes nothing.
        passed: value.is_some_and(|value| value >= floor),
        value: value.filter(|value| value.is_finite()),
        floor,
        duration_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

/// The least value that passes a probe.
pub fn floor(probe: &Probe) -> f64 {
    match &probe.expect {
        Expectation::LogProbability { floor, .. } => *floor,
        Expectation::Contains { .. } => 1.0,
        Expectation::Choice { .. } => 0.0,
    }
}

/// Measures one probe: the mean log-probability in nats per token; 1 or 0 for `contains`; for
/// `choice` the margin of the right answer over the best other, in nats per token.
///
/// # Errors
/// The prompt does not fit, or the worker fails.
pub async fn measure(worker: &Worker, probe: &Probe) -> Result<f64, WorkerError> {
    let prompt = prompt(worker, &probe.prompt, probe.raw)?;
    match &probe.expect {
        Expectation::LogProbability { continuation, .. } => {
            let request = ScoreRequest { prompt, continuation: continuation.clone() };
            Ok(worker.score(request).await?.mean())
        }
        Expectation::Contains { text, max_tokens } => {
            let request = GenerateRequest::greedy(prompt, *max_tokens);
            let (answer, _) = worker.generate(request)?.finish().await?;
            let found = answer.text.to_ascii_lowercase().contains(&text.to_ascii_lowercase());
            Ok(f64::from(u8::from(found)))
        }
        Expectation::Choice { choices, answer } => {
            let mut right = f64::NAN;
            let mut best_other = f64::NEG_INFINITY;
            for (index, choice) in choices.iter().enumerate() {
                let request = ScoreRequest { prompt: prompt.clone(), continuation: choice.clone() };
                let mean = worker.score(request).await?.mean();
                if index == *answer {
                    right = mean;
                } else {
                    best_other = best_other.max(mean);
                }
            }
            Ok(right - best_other)
        }
    }
}

/// A prompt for the model of this worker: as it stands if it is `raw`, else as a user's message.
///
/// # Errors
/// The chat template refuses it.
pub fn prompt(worker: &Worker, text: &str, raw: bool) -> Result<Prompt, WorkerError> {
    if raw {
        return Ok(Prompt::Text(text.to_owned()));
    }
    worker.chat_prompt(&[ChatMessage::user(text.to_owned())])
}

/// Replays prompts on two workers, pair by pair, for at most `limit`: how much less probable each
/// answer is to the second one, in nats per token (of its own). A pair that the time cuts in two is
/// left out, and so is what either could not score.
pub async fn replay(
    before: &Worker,
    after: &Worker,
    prompts: &[ReplayPrompt],
    limit: Duration,
) -> Vec<f64> {
    let mut losses = Vec::with_capacity(prompts.len());
    let all = async {
        for replayed in prompts {
            let (Ok(before), Ok(after)) =
                (score(before, replayed).await, score(after, replayed).await)
            else {
                continue;
            };
            // Another tokenizer has other tokens for the same text: what counts is the text.
            let total = |score: &Score| score.logprobs.iter().sum::<f64>();
            let loss = (total(&before) - total(&after)) / after.logprobs.len().max(1) as f64;
            losses.extend(Some(loss).filter(|loss| loss.is_finite()));
        }
    };
    if tokio::time::timeout(limit, all).await.is_err() {
        tracing::info!("replayed {} of {} prompts in the time", losses.len(), prompts.len());
    }
    losses
}

async fn score(worker: &Worker, replayed: &ReplayPrompt) -> Result<Score, WorkerError> {
    let prompt = prompt(worker, &replayed.prompt, replayed.raw)?;
    worker.score(ScoreRequest { prompt, continuation: replayed.answer.clone() }).await
}
