//! The gate between two waves: what is compared, how much loss is allowed, and what was found.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What the gate compares between the devices of a wave and those that still run what was before.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Failed requests, per request.
    Errors,
    /// Workers that ended unasked, per hour.
    Crashes,
    /// Empty answers, per answer.
    Empty,
    /// Answers cut off at their limit of tokens, per answer.
    Truncated,
    /// Answers that end in circles, per answer.
    Repetition,
    /// Answers that begin with a refusal, per answer.
    Refusals,
    /// Answers that begin like JSON and are none, of those that do.
    InvalidJson,
    /// Answers that were called bad, of those that were called good or bad.
    ThumbsDown,
    /// Time to first token.
    FirstToken,
    /// Time per generated token.
    TokenTime,
    /// Peak memory of the worker.
    Memory,
    /// Entropy of the next token: how unsure the model is.
    Entropy,
    /// Perplexity of the package's replay prompts, against the version before on the same device.
    Replay,
}

impl Metric {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Errors,
        Self::Crashes,
        Self::Empty,
        Self::Truncated,
        Self::Repetition,
        Self::Refusals,
        Self::InvalidJson,
        Self::ThumbsDown,
        Self::FirstToken,
        Self::TokenTime,
        Self::Memory,
        Self::Entropy,
        Self::Replay,
    ];

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Errors => "errors",
            Self::Crashes => "crashes",
            Self::Empty => "empty",
            Self::Truncated => "truncated",
            Self::Repetition => "repetition",
            Self::Refusals => "refusals",
            Self::InvalidJson => "invalid_json",
            Self::ThumbsDown => "thumbs_down",
            Self::FirstToken => "first_token",
            Self::TokenTime => "token_time",
            Self::Memory => "memory",
            Self::Entropy => "entropy",
            Self::Replay => "replay",
        }
    }

    /// Whether it counts events; the others are compared as ratios to before.
    pub fn is_count(self) -> bool {
        !matches!(
            self,
            Self::FirstToken | Self::TokenTime | Self::Memory | Self::Entropy | Self::Replay
        )
    }

    /// The loss in thousandths up to which a difference is let be where the policy does not say.
    /// Of counts: in points of all requests or answers (or crashes an hour); of the others: as a
    /// share of what it was before.
    pub fn usual_allowance(self) -> u32 {
        match self {
            Self::Errors | Self::Empty | Self::Repetition => 20,
            Self::Crashes | Self::Truncated | Self::Refusals => 50,
            Self::InvalidJson | Self::ThumbsDown => 100,
            Self::Memory | Self::Replay => 100,
            Self::FirstToken | Self::TokenTime | Self::Entropy => 250,
        }
    }
}

impl std::str::FromStr for Metric {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|metric| metric.name() == given).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|metric| metric.name()).collect();
            format!("`{given}` is no metric: there are {}", known.join(", "))
        })
    }
}

impl std::fmt::Display for Metric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What must be shown of a wave before the next one starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GatePolicy {
    /// The chance, in thousandths, that a release which is no different is halted all the same,
    /// over the whole rollout and however often one looks.
    pub alpha_per_mille: u32,
    /// The loss that is allowed, in thousandths (see [`Metric::usual_allowance`]). The next wave
    /// starts only when a greater loss is excluded for each metric named here. The others can halt,
    /// and hold nobody up.
    pub allow: BTreeMap<Metric, u32>,
    /// Seconds after which the next wave starts although a loss could not be excluded, if no harm
    /// was found; never if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience_s: Option<u32>,
}

impl GatePolicy {
    /// The allowed loss, whole: 0.02 is two points, or 2 %.
    pub fn allowed(&self, metric: Metric) -> f64 {
        let per_mille = self.allow.get(&metric).copied();
        f64::from(per_mille.unwrap_or_else(|| metric.usual_allowance())) / 1_000.0
    }
}

impl Default for GatePolicy {
    fn default() -> Self {
        let named = [Metric::Errors, Metric::FirstToken, Metric::TokenTime];
        Self {
            alpha_per_mille: 10,
            allow: named.map(|metric| (metric, metric.usual_allowance())).into(),
            patience_s: None,
        }
    }
}

/// What the gate has found of a wave so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GateReading {
    /// The wave, from 0.
    pub wave: u32,
    /// When the comparison began: the wave had settled by then.
    #[schema(value_type = String, format = DateTime)]
    pub opened_at: jiff::Timestamp,
    /// How often it was looked at.
    pub looks: u32,
    /// When it is looked at next.
    #[schema(value_type = String, format = DateTime)]
    pub next_look_at: jiff::Timestamp,
    /// Devices with the release that are compared.
    pub canaries: u32,
    /// Devices without it that they are compared with.
    pub controls: u32,
    /// Hours of service of the former since it began.
    pub device_hours: f64,
    /// The evidence for harm, over all metrics whose loss looks greater than is allowed: an e-value.
    pub e_value: f64,
    /// Harm is taken for real from this e-value on.
    pub halt_at: f64,
    /// Metric by metric; those without any data are left out.
    pub metrics: Vec<MetricReading>,
}

/// What the gate has found of one metric.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MetricReading {
    /// Which.
    pub metric: Metric,
    /// The evidence that the release is worse at all: an e-value, summed over the looks.
    pub e_value: f64,
    /// The canaries' rate of events, or their geometric mean of the ratios to before.
    pub canaries: f64,
    /// The same of the controls.
    pub controls: f64,
    /// The loss as it looks, in the unit of the allowance but whole: 0.02 is two points, or 2 %.
    /// Negative where the release is better.
    pub loss: f64,
    /// The most that the loss is, with 95 % confidence at all looks together; absent where there
    /// are too few devices to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_at_most: Option<f64>,
    /// The loss that is allowed.
    pub allowed: f64,
    /// Hours of service that it will still take to exclude a greater loss, as things look; absent
    /// where that is done, or no amount would do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_hours_needed: Option<f64>,
}
