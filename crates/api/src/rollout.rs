//! Rollouts: which devices get a release, in which waves, and what was seen on the way.

use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;

use crate::device::Failure;
use crate::gate::{GatePolicy, GateReading};
use crate::selector::Selector;
use crate::{DeviceId, ModelName, RolloutId, VariantName};

/// How many devices a wave takes, of those that the rollout selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WaveSize {
    /// This many devices.
    Count(u32),
    /// This share of all selected devices, rounded up.
    Percent(u32),
    /// All that are left.
    Rest,
}

/// What an operator wants of a rollout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RolloutPolicy {
    /// Which devices.
    #[schema(value_type = String)]
    pub selector: Selector,
    /// The waves in order; devices left over after the last form one more.
    pub waves: Vec<WaveSize>,
    /// Failed devices that a wave tolerates; one more halts the rollout.
    #[serde(default)]
    pub max_failures: u32,
    /// Seconds that a wave must stay confirmed before the next one starts.
    #[serde(default)]
    pub bake_s: u32,
    /// Seconds that a device has to confirm, counted from its desired state; then it is a straggler
    /// and counts as failed.
    pub confirm_timeout_s: u32,
    /// What must be shown of a wave before the next one starts, besides its confirmation; nothing
    /// if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<GatePolicy>,
}

impl Default for RolloutPolicy {
    fn default() -> Self {
        Self {
            selector: Selector::all(),
            waves: vec![WaveSize::Count(1), WaveSize::Rest],
            max_failures: 0,
            bake_s: 0,
            confirm_timeout_s: 900,
            gate: None,
        }
    }
}

/// `POST /v1/rollouts`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NewRollout {
    /// The model line.
    pub model: ModelName,
    /// The release to roll out.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// How.
    pub policy: RolloutPolicy,
}

/// The state of a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RolloutState {
    /// Waves are going out.
    Running,
    /// An operator holds it; devices that have started go on.
    Paused,
    /// A gate stopped it. Devices that are on it stay unless they went back by themselves.
    Halted,
    /// Every selected device is confirmed (or has no variant that fits).
    Completed,
    /// An operator ended it where it stood.
    Aborted,
    /// An operator took it back: its devices got a new generation naming their model before.
    RolledBack,
}

impl RolloutState {
    /// Whether it will never change by itself again.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Aborted | Self::RolledBack)
    }
}

/// What a device did with what it was given in a rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Not told yet: its wave has not started.
    Pending,
    /// Told; on its way.
    Updating,
    /// Confirmed by its probes.
    Confirmed,
    /// Failed here and went back by itself.
    Failed {
        /// Why.
        failure: Failure,
    },
    /// No variant of the release fits it; it keeps what it has.
    NoFit {
        /// The smallest prediction in bytes.
        smallest_bytes: u64,
        /// What the device offers in bytes.
        budget_bytes: u64,
    },
    /// It failed this very manifest before, so it is not offered it again.
    Quarantined,
}

/// One device's part in a rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RolloutDevice {
    /// The device.
    pub device: DeviceId,
    /// Its name.
    pub name: String,
    /// Its wave, from 0.
    pub wave: u32,
    /// The variant that fits it best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<VariantName>,
    /// That variant's manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub manifest: Option<Digest>,
    /// The generation in which it was told; absent while pending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// When it was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<jiff::Timestamp>,
    /// When its outcome became final.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub finished_at: Option<jiff::Timestamp>,
    /// How it goes.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Why this variant: the fit in words.
    pub fit: String,
    /// Whether it was silent or not well when it became part of the rollout; such devices come
    /// last.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unready: bool,
}

/// A decision of the rollout engine, with its evidence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Decision {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: jiff::Timestamp,
    /// What was decided, in words, such as `halted in wave 1`.
    pub what: String,
    /// Why, in words with the numbers, one line for each piece of evidence.
    pub because: Vec<String>,
}

/// A rollout as the hub shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Rollout {
    /// Its id.
    pub id: RolloutId,
    /// What was asked.
    #[serde(flatten)]
    pub asked: NewRollout,
    /// Its state.
    pub state: RolloutState,
    /// The wave that is going out, from 0.
    pub current_wave: u32,
    /// All waves' number.
    pub waves: u32,
    /// Every selected device, in wave order.
    pub devices: Vec<RolloutDevice>,
    /// Every decision so far, oldest first.
    pub decisions: Vec<Decision>,
    /// What it waits for, in words; empty when it is over.
    pub waiting_for: String,
    /// What the gate has found of the current wave; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<GateReading>,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: jiff::Timestamp,
    /// By whom.
    pub created_by: String,
    /// When it last changed.
    #[schema(value_type = String, format = DateTime)]
    pub updated_at: jiff::Timestamp,
}
