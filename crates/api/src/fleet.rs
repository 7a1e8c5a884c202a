//! The fleet as a whole: which devices a question is about, and what they do, counted.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::selector::Selector;
use crate::{ClassName, ModelName};

/// A device that was not heard of for longer than this, in seconds, is silent.
pub const SILENT_AFTER_S: u64 = 180;
/// Bounds of the bands in which devices were last heard of, in seconds.
pub const SEEN_BANDS_S: [u64; 4] = [SILENT_AFTER_S, 3600, 24 * 3600, 7 * 24 * 3600];
/// The most values of a label that a summary tells apart.
pub const MAX_GROUPS: usize = 200;
/// The longest text that is searched for, in bytes.
pub const MAX_SEARCH_BYTES: usize = 200;

/// A device in one word.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum DeviceState {
    /// What it should run answers on it.
    Confirmed,
    /// It is on its way to what it should run.
    Updating,
    /// What it should run failed on it.
    Failed,
    /// Something is in its way, or a rule holds it up.
    Waiting,
    /// It was not heard of for [`SILENT_AFTER_S`].
    Silent,
    /// It should run nothing, and does not.
    Idle,
    /// It joined and has reported nothing yet.
    Joined,
    /// An operator shut it out.
    Revoked,
}

impl DeviceState {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Confirmed,
        Self::Updating,
        Self::Failed,
        Self::Waiting,
        Self::Silent,
        Self::Idle,
        Self::Joined,
        Self::Revoked,
    ];

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::Updating => "updating",
            Self::Failed => "failed",
            Self::Waiting => "waiting",
            Self::Silent => "silent",
            Self::Idle => "idle",
            Self::Joined => "joined",
            Self::Revoked => "revoked",
        }
    }
}

/// An order that an operator gave about a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OrderKind {
    /// It is held to a release.
    Pinned,
    /// It takes no part in rollouts.
    Excluded,
}

/// Which devices a question is about, as query parameters; all of it must hold.
#[derive(
    Clone,
    Debug,
    Default,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
    utoipa::IntoParams,
)]
#[into_params(parameter_in = Query)]
pub struct DeviceFilter {
    /// Words, each of which stands in the device's name, id or class, in a label as `key=value`, or
    /// in what answers on it. Large and small letters are the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<String>,
    /// A selector, as rollouts take it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    #[schema(value_type = Option<String>)]
    pub selector: Option<Selector>,
    /// Its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(inline)]
    pub state: Option<DeviceState>,
    /// The model line that answers on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub model: Option<ModelName>,
    /// The version that answers on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    #[schema(value_type = Option<String>)]
    pub version: Option<semver::Version>,
    /// What an operator ordered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(inline)]
    pub orders: Option<OrderKind>,
}

impl DeviceFilter {
    /// Whether it means every device.
    pub fn is_all(&self) -> bool {
        *self == Self::default()
    }
}

/// Devices of the fleet, counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FleetSummary {
    /// All that were asked for.
    pub devices: u64,
    /// By state; what none is in is absent.
    #[schema(value_type = std::collections::HashMap<String, u64>)]
    pub states: BTreeMap<DeviceState, u64>,
    /// By when they were last heard of, the most recent first; without those that are shut out.
    pub last_seen: Vec<SeenBand>,
    /// By class and release, by the class's name; without those that are shut out.
    pub classes: Vec<ClassSummary>,
    /// The label whose values [`FleetSummary::groups`] are.
    pub by: String,
    /// By a label's value, the largest groups first.
    pub groups: Vec<GroupSummary>,
    /// Values beyond [`MAX_GROUPS`], which are left out.
    pub more_groups: u64,
    /// Devices that are held to a release.
    pub pinned: u64,
    /// Devices that take no part in rollouts.
    pub excluded: u64,
    /// Packages that are not offered to a class any more, in the whole fleet.
    pub quarantined: u64,
    /// Tokens per second that they generate, as last reported.
    pub tokens_per_s: f64,
    /// Requests that they have answered since they joined.
    pub requests: u64,
    /// Requests that failed by our fault.
    pub errors: u64,
    /// Bytes that they have pulled since they joined.
    pub downloaded_bytes: u64,
}

/// Devices last heard of within a time, and not within that of the band before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SeenBand {
    /// The time in seconds; absent for the rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within_s: Option<u64>,
    /// How many.
    pub devices: u64,
}

/// The devices of a class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ClassSummary {
    /// Its name.
    pub class: ClassName,
    /// How many.
    pub devices: u64,
    /// Those on which nothing answers and which are on their way to nothing.
    pub without: u64,
    /// Releases that they have to do with, the newest of each model line first.
    pub releases: Vec<ReleaseTally>,
}

/// What a class's devices have to do with a release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ReleaseTally {
    /// The model line.
    pub model: ModelName,
    /// The release.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// Devices on which it answers.
    pub running: u64,
    /// Devices on their way to it.
    pub updating: u64,
    /// Devices that refuse it, since it failed there.
    pub failed: u64,
}

/// The devices that have one value of a label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GroupSummary {
    /// The value; absent for devices without the label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// How many.
    pub devices: u64,
    /// By state.
    #[schema(value_type = std::collections::HashMap<String, u64>)]
    pub states: BTreeMap<DeviceState, u64>,
}
