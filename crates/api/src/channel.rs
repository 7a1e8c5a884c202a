//! Channels: the steps of a release on its way through the fleet, such as `edge`, `beta`, `stable`.

use serde::{Deserialize, Serialize};

use crate::rollout::{RolloutPolicy, RolloutState};
use crate::{ChannelName, ModelName, RolloutId};

/// The most channels of one hub.
pub const MAX_CHANNELS: usize = 32;

/// A channel. Devices follow it by their blueprint (`channel = "beta"`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Channel {
    /// Its name.
    pub name: ChannelName,
    /// The channel on which a release must have been confirmed before it comes here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<ChannelName>,
    /// How releases that are promoted to it are rolled out.
    #[serde(default)]
    pub policy: RolloutPolicy,
}

/// A channel as the hub shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ChannelStatus {
    /// The channel.
    #[serde(flatten)]
    pub channel: Channel,
    /// Devices that follow it.
    pub followers: u64,
    /// The newest release of each model line that was promoted to it.
    pub releases: Vec<ChannelRelease>,
}

/// A release on a channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ChannelRelease {
    /// The model line.
    pub model: ModelName,
    /// The release.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// The rollout that brings it.
    pub rollout: RolloutId,
    /// How far that is.
    pub state: RolloutState,
    /// Who promoted it.
    pub by: String,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: jiff::Timestamp,
}

/// How a release came to a channel: what a promotion's rollout carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Promotion {
    /// The channel that it goes to.
    pub channel: ChannelName,
    /// The channel that it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<ChannelName>,
    /// Why it was promoted though it was not confirmed there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forced: Option<String>,
}

/// `POST /v1/releases/{model}/{version}/promote`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPromotion {
    /// The channel that it goes to.
    pub to: ChannelName,
    /// Promote it even if it was not confirmed on the channel before, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<String>,
}
