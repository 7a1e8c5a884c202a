//! What a device has counted of the model that it runs: the evidence of the gates. Numbers only.

use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;

/// What a device has counted of one manifest since it first served it, over restarts too. The
/// latest report replaces all before it; a window is the difference of two. Starts anew when
/// another manifest takes over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Evidence {
    /// The manifest that all numbers are about.
    #[schema(value_type = String)]
    pub manifest: Digest,
    /// The numbers.
    #[serde(flatten)]
    pub counts: EvidenceCounts,
    /// What the version before and this one made of the same prompts, right before the switch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
}

/// The replay prompts of a package, scored by two versions on the same device. Numbers only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Replay {
    /// The manifest of the version that served then.
    #[schema(value_type = String)]
    pub before: Digest,
    /// Of each prompt that both scored in time, in the package's order: what its answer lost of its
    /// log-probability, in nats per token. Below 0 it gained. At most
    /// [`MAX_REPLAY`](crate::probe::MAX_REPLAY).
    pub losses_nats: Vec<f64>,
}

/// The numbers of [`Evidence`]; all but the memory's peak only grow. Those that an older agent does not
/// count stay 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct EvidenceCounts {
    /// Seconds for which it has been the running model.
    pub serving_s: f64,
    /// Requests that it answered.
    pub answered: u64,
    /// Requests that failed by our fault.
    pub errors: u64,
    /// Times that its worker ended unasked.
    pub crashes: u64,
    /// Answers without a token.
    pub empty: u64,
    /// Answers that ended because they had reached their limit of tokens.
    pub truncated: u64,
    /// Answers that ended in circles: the same few tokens again and again.
    pub repetitive: u64,
    /// Answers that began with a refusal, as far as English phrases tell.
    pub refusals: u64,
    /// Answers that began like JSON.
    pub json: u64,
    /// Of these, answers that were none.
    pub invalid_json: u64,
    /// Answers that somebody called good.
    pub thumbs_up: u64,
    /// Answers that somebody called bad.
    pub thumbs_down: u64,
    /// Tokens whose entropy is in `entropy_nats`: some of all.
    pub entropy_tokens: u64,
    /// Sum of the entropies, in nats, of what the model thought of as the next token.
    pub entropy_nats: f64,
    /// Requests whose time to first token is in `first_token_ln_ms`.
    pub first_tokens: u64,
    /// Sum of the natural logarithms of times to first token in milliseconds.
    pub first_token_ln_ms: f64,
    /// Tokens generated after the first of each answer.
    pub decoded_tokens: u64,
    /// Milliseconds that these took.
    pub decode_ms: f64,
    /// The worker's peak of resident memory in bytes.
    pub peak_memory_bytes: u64,
}

impl EvidenceCounts {
    /// Both together; of the peaks, the greater.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            serving_s: self.serving_s + other.serving_s,
            answered: self.answered + other.answered,
            errors: self.errors + other.errors,
            crashes: self.crashes + other.crashes,
            empty: self.empty + other.empty,
            truncated: self.truncated + other.truncated,
            repetitive: self.repetitive + other.repetitive,
            refusals: self.refusals + other.refusals,
            json: self.json + other.json,
            invalid_json: self.invalid_json + other.invalid_json,
            thumbs_up: self.thumbs_up + other.thumbs_up,
            thumbs_down: self.thumbs_down + other.thumbs_down,
            entropy_tokens: self.entropy_tokens + other.entropy_tokens,
            entropy_nats: self.entropy_nats + other.entropy_nats,
            first_tokens: self.first_tokens + other.first_tokens,
            first_token_ln_ms: self.first_token_ln_ms + other.first_token_ln_ms,
            decoded_tokens: self.decoded_tokens + other.decoded_tokens,
            decode_ms: self.decode_ms + other.decode_ms,
            peak_memory_bytes: self.peak_memory_bytes.max(other.peak_memory_bytes),
        }
    }

    /// What came since `earlier`; the peak is that of now.
    #[must_use]
    pub fn since(self, earlier: &Self) -> Self {
        Self {
            serving_s: (self.serving_s - earlier.serving_s).max(0.0),
            answered: self.answered.saturating_sub(earlier.answered),
            errors: self.errors.saturating_sub(earlier.errors),
            crashes: self.crashes.saturating_sub(earlier.crashes),
            empty: self.empty.saturating_sub(earlier.empty),
            truncated: self.truncated.saturating_sub(earlier.truncated),
            repetitive: self.repetitive.saturating_sub(earlier.repetitive),
            refusals: self.refusals.saturating_sub(earlier.refusals),
            json: self.json.saturating_sub(earlier.json),
            invalid_json: self.invalid_json.saturating_sub(earlier.invalid_json),
            thumbs_up: self.thumbs_up.saturating_sub(earlier.thumbs_up),
            thumbs_down: self.thumbs_down.saturating_sub(earlier.thumbs_down),
            entropy_tokens: self.entropy_tokens.saturating_sub(earlier.entropy_tokens),
            entropy_nats: (self.entropy_nats - earlier.entropy_nats).max(0.0),
            first_tokens: self.first_tokens.saturating_sub(earlier.first_tokens),
            first_token_ln_ms: self.first_token_ln_ms - earlier.first_token_ln_ms,
            decoded_tokens: self.decoded_tokens.saturating_sub(earlier.decoded_tokens),
            decode_ms: (self.decode_ms - earlier.decode_ms).max(0.0),
            peak_memory_bytes: self.peak_memory_bytes,
        }
    }
}
