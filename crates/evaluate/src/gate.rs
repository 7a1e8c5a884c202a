//! The gate: whether a variant is no worse than the original and than the release before it.
//!
//! One row a metric and one a task, each with a paired confidence interval and a verdict of its
//! own; there is no overall score. A row is `worse` when its whole interval lies beyond the allowed
//! loss, `no_worse` when none of it does, and `too_few_samples` in between. What blocks a release:
//! any `worse` row always does; `too_few_samples` is shown but does not block, because an interval
//! that spans the limit says that the measurement is too coarse and not that the model is bad (see
//! [`blocks`] for the strict reading).
//!
//! Speed and memory are reported and are not gated here: they are single measurements of a shared
//! machine, with no pairs to judge by; memory decides later, when a variant is fitted to a device.

use slmops_api::report::{Estimate, EvaluationReport, GateDecision, GateRow, TaskResult, Verdict};
use slmops_artifact::Digest;

use crate::statistics;

/// The losses that are allowed, one for each metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Rise of the mean negative log-likelihood of the held-out text, nats per token. Perplexity
    /// is its exponential: 0.05 is a rise of 5 %.
    pub log_likelihood: f64,
    /// KL divergence from the original (or its rise against a release), nats per token.
    pub kl_divergence: f64,
    /// Share of positions where the original's most probable token is no longer the first.
    pub top1_disagreement: f64,
    /// Drop of a task's accuracy, as a share of its items.
    pub accuracy: f64,
}

impl Limits {
    /// What a variant may lose against its original: what its number format is chosen to cost.
    ///
    /// An operator who asks for three bits a weight accepts more than one who asks for eight, so
    /// the limit follows the nominal bits in the type's name (`Q4_K_M`: 4). The values are about
    /// one and a half times what healthy variants of SmolLM2-135M lose, of the most fragile kind:
    /// small, and with rows that K types do not divide (`docs/measurements.md`). Larger models lose
    /// less. A task's limit leaves room for two or three changed answers of 24.
    pub fn against_original(quantisation: &str) -> Self {
        let limits = |log_likelihood, kl_divergence, top1_disagreement, accuracy| Self {
            log_likelihood,
            kl_divergence,
            top1_disagreement,
            accuracy,
        };
        match nominal_bits(quantisation) {
            8.. => limits(0.02, 0.02, 0.08, 0.15),
            5..=7 => limits(0.15, 0.12, 0.22, 0.20),
            4 => limits(0.30, 0.45, 0.38, 0.22),
            3 => limits(0.35, 0.50, 0.40, 0.25),
            _ => limits(0.60, 0.70, 0.50, 0.30),
        }
    }

    /// What a variant may lose against the same class's variant of the release before: little,
    /// since a new version is meant to be better.
    pub fn against_release() -> Self {
        Self { log_likelihood: 0.03, kl_divergence: 0.03, top1_disagreement: 0.05, accuracy: 0.15 }
    }
}

/// What a candidate is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Against {
    /// The original (reference) that the candidate was made from.
    Original,
    /// The same class's variant of an earlier release.
    Release(semver::Version),
}

impl std::fmt::Display for Against {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Original => f.write_str("original"),
            Self::Release(version) => write!(f, "{version}"),
        }
    }
}

/// Why two reports cannot be compared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// They were measured with different suites.
    #[error(
        "compare {candidate} with {against}: measured with suite {theirs}, the candidate with {ours}\nhint: evaluate both with the same suite",
        candidate = candidate.short(), theirs = theirs.short(), ours = ours.short()
    )]
    Suite {
        /// The candidate's model file.
        candidate: Digest,
        /// What it was compared with.
        against: Box<Against>,
        /// The candidate's suite.
        ours: Digest,
        /// The baseline's suite.
        theirs: Digest,
    },
    /// The baseline given as the original is not the candidate's reference.
    #[error(
        "compare {candidate} with its original: its reference is {wanted}, not {given}\nhint: pass the report of the reference itself",
        candidate = candidate.short(), wanted = wanted.short(), given = given.short()
    )]
    Reference {
        /// The candidate's model file.
        candidate: Digest,
        /// Its reference.
        wanted: Digest,
        /// The baseline's model file.
        given: Digest,
    },
    /// The reports disagree on what was scored: they are of models with different tokenizers or
    /// contexts, or one of them was altered.
    #[error(
        "compare {candidate} with {against}: {what} differ in number\nhint: models of different tokenizers are only comparable task by task; start a new model line",
        candidate = candidate.short()
    )]
    Samples {
        /// The candidate's model file.
        candidate: Digest,
        /// What it was compared with.
        against: Against,
        /// Which samples.
        what: String,
    },
}

/// Compares a candidate with one baseline.
///
/// # Errors
/// When the two reports are not of the same suite, samples or reference.
pub fn decide(
    candidate: &EvaluationReport,
    baseline: &EvaluationReport,
    against: &Against,
    limits: &Limits,
) -> Result<GateDecision, GateError> {
    check_comparable(candidate, baseline, against)?;
    let mut rows = Vec::new();
    let mut row = |metric: &str, loss: Estimate, allowed: f64| {
        let verdict = verdict(&loss, allowed);
        let metric = metric.to_owned();
        rows.push(GateRow { metric, against: against.to_string(), loss, allowed, verdict });
    };
    let likelihood = statistics::paired_mean(&candidate.chunk_nll, &baseline.chunk_nll);
    row("log_likelihood", likelihood, limits.log_likelihood);
    if (candidate.reference, candidate.adapter) == (baseline.reference, baseline.adapter) {
        // The original's own divergence is zero, so against it this is the divergence itself.
        let divergence = statistics::paired_mean(&candidate.chunk_kl, &baseline.chunk_kl);
        row("kl_divergence", divergence, limits.kl_divergence);
    }
    if *against == Against::Original {
        let agreement = candidate.top1_agreement;
        let disagreement = Estimate {
            mean: 1.0 - agreement.mean,
            low: 1.0 - agreement.high,
            high: 1.0 - agreement.low,
            samples: agreement.samples,
        };
        row("top1_disagreement", disagreement, limits.top1_disagreement);
    }
    for task in &candidate.tasks {
        let theirs = items_of(baseline, &task.name);
        let loss = statistics::paired_proportions(theirs, &task.items);
        row(&format!("task:{}", task.name), loss, limits.accuracy);
    }
    Ok(GateDecision { verdict: overall(&rows), rows })
}

/// One decision from several, such as against the original and against the release before.
pub fn combine(decisions: impl IntoIterator<Item = GateDecision>) -> GateDecision {
    let rows: Vec<GateRow> = decisions.into_iter().flat_map(|decision| decision.rows).collect();
    GateDecision { verdict: overall(&rows), rows }
}

/// Whether a release must not go out by itself: when any row is `worse`, and if `strict`, also
/// when any row has too few samples.
pub fn blocks(decision: &GateDecision, strict: bool) -> bool {
    match decision.verdict {
        Verdict::Worse => true,
        Verdict::TooFewSamples => strict,
        Verdict::NoWorse => false,
    }
}

/// The nominal bits a weight in a GGUF file type's name; 4 where it names none.
pub fn nominal_bits(quantisation: &str) -> u32 {
    let digits = quantisation.trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().unwrap_or(4)
}

fn check_comparable(
    candidate: &EvaluationReport,
    baseline: &EvaluationReport,
    against: &Against,
) -> Result<(), GateError> {
    let subject = candidate.subject;
    if candidate.suite != baseline.suite {
        return Err(GateError::Suite {
            candidate: subject,
            against: Box::new(against.clone()),
            ours: candidate.suite,
            theirs: baseline.suite,
        });
    }
    let original = (candidate.reference, candidate.adapter);
    if *against == Against::Original && original != (baseline.subject, baseline.adapter) {
        return Err(GateError::Reference {
            candidate: subject,
            wanted: candidate.reference,
            given: baseline.subject,
        });
    }
    let samples =
        |what: String| GateError::Samples { candidate: subject, against: against.clone(), what };
    let chunks = candidate.chunk_nll.len();
    if [baseline.chunk_nll.len(), candidate.chunk_kl.len(), baseline.chunk_kl.len()] != [chunks; 3]
    {
        return Err(samples("chunks of text".into()));
    }
    for task in &candidate.tasks {
        if items_of(baseline, &task.name).len() != task.items.len() {
            return Err(samples(format!("items of task {}", task.name)));
        }
    }
    Ok(())
}

fn items_of<'a>(report: &'a EvaluationReport, task: &str) -> &'a [bool] {
    let found = report.tasks.iter().find(|result: &&TaskResult| result.name == task);
    found.map_or(&[], |result| &result.items)
}

fn verdict(loss: &Estimate, allowed: f64) -> Verdict {
    let is_number = [loss.mean, loss.low, loss.high].iter().all(|value| value.is_finite());
    if !is_number || loss.low > allowed {
        Verdict::Worse
    } else if loss.high <= allowed {
        Verdict::NoWorse
    } else {
        Verdict::TooFewSamples
    }
}

fn overall(rows: &[GateRow]) -> Verdict {
    let any = |verdict| rows.iter().any(|row| row.verdict == verdict);
    if any(Verdict::Worse) {
        Verdict::Worse
    } else if any(Verdict::TooFewSamples) {
        Verdict::TooFewSamples
    } else {
        Verdict::NoWorse
    }
}

#[cfg(test)]
mod tests;
