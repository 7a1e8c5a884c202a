//! Golden probes: the small signed examination that a package carries and a device must pass
//! before the model counts as *confirmed* there.

use serde::{Deserialize, Serialize};

/// The file name of a [`ProbeSet`] in a model package.
pub const PROBES_FILE: &str = "probes.json";
/// The most probes in one set.
pub const MAX_PROBES: usize = 64;
/// The most prompts of one set that are replayed.
pub const MAX_REPLAY: usize = 64;

/// The probes of a package, in the order in which they are run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ProbeSet {
    /// Format version: 1.
    pub version: u32,
    /// The probes; at most [`MAX_PROBES`].
    pub probes: Vec<Probe>,
    /// Prompts that are replayed side by side on the version that serves and on this one; at most
    /// [`MAX_REPLAY`]. They decide nothing on the device: the gate between waves compares. None in
    /// packages of older publishers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replay: Vec<ReplayPrompt>,
}

/// A prompt with the reference's own answer, to be scored by two versions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ReplayPrompt {
    /// The user's message, as in [`Probe::prompt`].
    pub prompt: String,
    /// As in [`Probe::raw`].
    #[serde(default)]
    pub raw: bool,
    /// What is scored.
    pub answer: String,
}

/// One question with the answer that a healthy model gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Probe {
    /// A name, unique in its set, that verdicts refer to, such as `golden-03`.
    pub name: String,
    /// The user's message; the model's own chat template is applied on the device,
    /// unless `raw` is set.
    pub prompt: String,
    /// Whether `prompt` is continued as it stands, without a chat template.
    #[serde(default)]
    pub raw: bool,
    /// What must hold.
    pub expect: Expectation,
}

/// What a probe asks of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Expectation {
    /// The mean log-probability (nats per token) of `continuation`, teacher-forced after the
    /// prompt, is at least `floor`.
    LogProbability {
        /// The reference model's own greedy continuation.
        continuation: String,
        /// What this variant scored where it was packed, in nats per token.
        measured: f64,
        /// The least that passes, in nats per token.
        floor: f64,
    },
    /// The greedy answer contains this text (ASCII case ignored).
    Contains {
        /// The text.
        text: String,
        /// Tokens to generate, at most.
        max_tokens: u32,
    },
    /// Of the choices, `answer` has the highest mean log-probability.
    Choice {
        /// The continuations to rank.
        choices: Vec<String>,
        /// Index of the right one.
        answer: usize,
    },
}

/// How one probe went on a device. Carries numbers only, never generated text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ProbeResult {
    /// The probe's name.
    pub name: String,
    /// Whether it passed.
    pub passed: bool,
    /// The measured value: mean log-probability in nats per token; 1 or 0 for `contains`; for
    /// `choice` the margin of the right answer over the best other in nats per token. Absent when
    /// the engine failed before there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// The least value that passes.
    pub floor: f64,
    /// Wall time of this probe in milliseconds.
    pub duration_ms: u64,
}
