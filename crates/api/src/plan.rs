//! What a rollout would do to whom, before it does: `POST /v1/rollouts/plan`.

use serde::{Deserialize, Serialize};

use crate::rollout::{NewRollout, Outcome};
use crate::{ClassName, DeviceId, RolloutId, SiteName, VariantName};

/// What a rollout would do from now on. Nothing of it has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RolloutPlan {
    /// What was asked.
    #[serde(flatten)]
    pub asked: NewRollout,
    /// The rollout, if it is one that exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutId>,
    /// Its waves that are not over, in order.
    pub waves: Vec<PlannedWave>,
    /// Selected devices that would get nothing.
    pub left_out: Vec<LeftOut>,
    /// Halted rollouts whose place it would take.
    pub supersedes: Vec<RolloutId>,
    /// What it waits for now, in words; empty if for nothing, or if it does not exist.
    pub waiting_for: String,
    /// What else to know, in words.
    pub notes: Vec<String>,
    /// Model bytes over the network, at most: devices may fetch less by deltas or resuming.
    pub transfer_bytes: u64,
    /// Seconds until its last wave is over if all goes well, without what [`PlannedWave::waits`]
    /// for; absent where nothing is known of how fast devices took releases before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_s: Option<u64>,
}

/// One wave of a [`RolloutPlan`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PlannedWave {
    /// From 1.
    pub wave: u32,
    /// Its devices.
    pub devices: Vec<PlannedDevice>,
    /// Model bytes over the network, at most.
    pub transfer_bytes: u64,
    /// Seconds until all its devices confirmed and it has baked, if all goes well; absent where
    /// that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_s: Option<u64>,
    /// What must happen before its devices are told, besides the wave before, in words.
    pub waits: Vec<String>,
}

/// One device of a [`PlannedWave`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PlannedDevice {
    /// The device.
    pub device: DeviceId,
    /// Its name.
    pub name: String,
    /// Its class.
    pub class: ClassName,
    /// Its site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<SiteName>,
    /// The variant that it would get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<VariantName>,
    /// Why this variant.
    pub fit: String,
    /// How it goes after the first step: `updating` for those that would be told at once.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Model bytes that it would fetch, at most; 0 if it has them.
    pub transfer_bytes: u64,
    /// Seconds until it confirms, by how fast it (or else its class, or else the fleet) took
    /// releases before; absent where nothing is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_s: Option<u64>,
}

/// A selected device that would get nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LeftOut {
    /// The device.
    pub device: DeviceId,
    /// Its name.
    pub name: String,
    /// Why, in words.
    pub why: String,
}
