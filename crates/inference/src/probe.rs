//! Running golden probes: the examination that a package carries.

use std::time::Instant;

use slmops_api::probe::{Expectation, Probe, ProbeResult, ProbeSet};

use crate::chat::ChatMessage;
use crate::worker::{GenerateRequest, Prompt, ScoreRequest, Worker, WorkerError};

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
    let prompt = prompt(worker, probe)?;
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

/// The prompt of a probe for the model of this worker.
///
/// # Errors
/// The chat template refuses it.
pub fn prompt(worker: &Worker, probe: &Probe) -> Result<Prompt, WorkerError> {
    if probe.raw {
        return Ok(Prompt::Text(probe.prompt.clone()));
    }
    worker.chat_prompt(&[ChatMessage::user(probe.prompt.clone())])
}
