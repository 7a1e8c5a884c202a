//! Evaluation reports: what was measured of one model file, where, and against what.

use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;

/// Where a number was measured. Numbers of different places are never compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MeasuredWhere {
    /// On real hardware of the kind it speaks of.
    Real,
    /// On real hardware under stated limits (cgroups).
    Constrained,
    /// In an emulator.
    Emulated,
    /// Computed, not measured.
    Modelled,
}

/// The machine on which a report was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MachineFacts {
    /// Processor model.
    pub cpu: String,
    /// Architecture, such as `x86_64`.
    pub arch: String,
    /// Cores that the measurement could use.
    pub cores: u32,
    /// Total memory in bytes.
    pub memory_bytes: u64,
    /// Kernel release.
    pub kernel: String,
    /// How real this machine is.
    pub measured: MeasuredWhere,
}

/// A mean with its uncertainty.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Lower end of the 95 % confidence interval.
    pub low: f64,
    /// Upper end of the 95 % confidence interval.
    pub high: f64,
    /// How many independent samples.
    pub samples: u32,
}

/// Everything measured of one model file, bound to its digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct EvaluationReport {
    /// Format version: 1.
    pub version: u32,
    /// Digest of the model file.
    #[schema(value_type = String)]
    pub subject: Digest,
    /// Digest of the LoRA adapter that was applied to it, if there was one; to the reference, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub adapter: Option<Digest>,
    /// Digest of the reference model file.
    #[schema(value_type = String)]
    pub reference: Digest,
    /// Digest of the suite (tasks and text).
    #[schema(value_type = String)]
    pub suite: Digest,
    /// Size of the model file in bytes.
    pub size_bytes: u64,
    /// Perplexity on the suite's held-out text.
    pub perplexity: f64,
    /// Kullback-Leibler divergence from the reference, nats per token, over text chunks.
    pub kl_divergence: Estimate,
    /// 99th percentile of the per-token divergence, nats.
    pub kl_p99: f64,
    /// Share of positions in which the most probable token is the reference's.
    pub top1_agreement: Estimate,
    /// The task suite, task by task.
    pub tasks: Vec<TaskResult>,
    /// Decode speed of one sequence, tokens per second.
    pub decode_tokens_per_s: f64,
    /// Prompt processing speed, tokens per second.
    pub prompt_tokens_per_s: f64,
    /// Time to first token after a 128-token prompt, milliseconds.
    pub time_to_first_token_ms: f64,
    /// Peak resident memory of the process that ran the model in the default runtime configuration, bytes.
    pub peak_memory_bytes: u64,
    /// Where it was measured.
    pub machine: MachineFacts,
    /// Engine and version.
    pub engine: String,
    /// When it was finished.
    pub finished_at: jiff::Timestamp,
    /// Per-chunk mean negative log-likelihood (nats per token), for paired comparison.
    pub chunk_nll: Vec<f64>,
    /// Per-chunk mean KL divergence (nats per token), for paired comparison.
    pub chunk_kl: Vec<f64>,
}

/// One task's score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TaskResult {
    /// The task's name.
    pub name: String,
    /// Items right, of all items.
    pub accuracy: Estimate,
    /// Whether each item was right, in suite order, for paired comparison.
    pub items: Vec<bool>,
}

/// What a gate says of one metric. Never one scalar for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The confidence interval excludes more than the allowed loss.
    NoWorse,
    /// The confidence interval lies wholly beyond the allowed loss.
    Worse,
    /// The interval spans the limit: more samples are needed to tell.
    TooFewSamples,
}

/// One row of a gate's decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GateRow {
    /// Metric or `task:NAME`.
    pub metric: String,
    /// What it is compared with: `original` or the previous release's version.
    pub against: String,
    /// Paired loss (positive is worse), in the metric's unit.
    pub loss: Estimate,
    /// The loss that is allowed.
    pub allowed: f64,
    /// The verdict of this row.
    pub verdict: Verdict,
}

/// A gate's decision on one variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GateDecision {
    /// `worse` if any row is; else `too_few_samples` if any row is; else `no_worse`.
    pub verdict: Verdict,
    /// All rows, in a fixed order.
    pub rows: Vec<GateRow>,
}
