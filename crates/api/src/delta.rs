//! How a device may get a model for less than its bytes: deltas that the hub made from models that
//! devices run, and who nearby has the bytes.

use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;

use crate::ModelName;

/// The artifact type of a delta's manifest, and the media type of its one layer. The manifest's
/// subject is the manifest of the new variant.
pub const DELTA_MEDIA_TYPE: &str = "application/vnd.slmops.delta.v1";
/// The annotation with the digest of the model file that a delta changes.
pub const FROM_ANNOTATION: &str = "io.slmops.delta.from";
/// The annotation with the digest of the model file that it gives.
pub const TO_ANNOTATION: &str = "io.slmops.delta.to";
/// The annotation with the delta's size in bytes.
pub const BYTES_ANNOTATION: &str = "io.slmops.delta.bytes";
/// The most deltas that are applied one after the other to get from one model to another.
pub const MAX_CHAIN: usize = 3;
/// The most deltas that a device is offered at once.
pub const MAX_OFFERED: usize = 32;
/// The most devices of its site that a device is told to get a model from.
pub const MAX_PEERS: usize = 3;

/// A delta that is in the registry: it turns one model file into another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Delta {
    /// Digest of the model file that it changes.
    #[schema(value_type = String)]
    pub from: Digest,
    /// Digest of the model file that it gives.
    #[schema(value_type = String)]
    pub to: Digest,
    /// Size of that file in bytes.
    pub to_bytes: u64,
    /// Digest of the delta itself: a blob in the model's repository.
    #[schema(value_type = String)]
    pub blob: Digest,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its first bytes that are its header; the payloads of its frames follow.
    pub header_bytes: u64,
}

/// What there is to get a model file from, besides its own blob (`GET /v1/device/sources`). It may
/// change at any time; whoever can use none of it gets the whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Sources {
    /// Deltas that end at it, by themselves or one after the other.
    #[serde(default)]
    pub deltas: Vec<Delta>,
    /// Devices of the same site that have the file, as `http://ADDRESS:PORT`, and give it by its
    /// digest at `/blobs/{digest}`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<String>,
    /// A delta from what the device runs is being made, or another device of its site is getting
    /// the file: ask again after so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_s: Option<u32>,
}

/// How far a delta is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeltaState {
    /// Waits for its turn.
    Queued,
    /// Is being made.
    Making,
    /// Is in the registry and offered to devices.
    Ready,
    /// Would save too little to be worth it: devices get the whole file.
    Useless,
    /// Cannot be made.
    Failed,
}

impl DeltaState {
    /// Every state.
    pub const ALL: [Self; 5] =
        [Self::Queued, Self::Making, Self::Ready, Self::Useless, Self::Failed];

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Making => "making",
            Self::Ready => "ready",
            Self::Useless => "useless",
            Self::Failed => "failed",
        }
    }
}

/// A pair of model files that devices go from and to, and the delta between them
/// (`GET /v1/releases/{model}/{version}/deltas`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeltaJob {
    /// The model line.
    pub model: ModelName,
    /// Digest of the model file that devices run.
    #[schema(value_type = String)]
    pub from: Digest,
    /// Digest of the model file that they are to run.
    #[schema(value_type = String)]
    pub to: Digest,
    /// Digest of the new variant's manifest, which the delta's own manifest refers to.
    #[schema(value_type = String)]
    pub manifest: Digest,
    /// Devices that were on this way when it was last counted.
    pub devices: u64,
    /// How far it is.
    pub state: DeltaState,
    /// Times that somebody began to make it.
    pub attempts: u32,
    /// Since when it is wanted.
    #[schema(value_type = String, format = DateTime)]
    pub wanted_at: jiff::Timestamp,
    /// The delta, once it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta: Option<Delta>,
    /// Why it is as it is, in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
}

/// How the bytes of a model file came to a device: numbers alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Transfer {
    /// Digest of the model file.
    #[schema(value_type = String)]
    pub weights: Digest,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Digest of the adapter that is applied to it, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub adapter: Option<Digest>,
    /// Bytes of that adapter that were fetched.
    #[serde(default)]
    pub adapter_bytes: u64,
    /// Bytes of deltas that were fetched.
    #[serde(default)]
    pub delta_bytes: u64,
    /// Bytes of the file itself that were fetched.
    #[serde(default)]
    pub whole_bytes: u64,
    /// Bytes that came from other devices of the site.
    #[serde(default)]
    pub peer_bytes: u64,
    /// Why a delta was not used, or not for all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
    /// Digest of the model file that was given up to make room for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub gave_up: Option<Digest>,
}

/// By which way a model came to a device.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// All of it over the line to the hub.
    Whole,
    /// As deltas, as far as they did.
    Delta,
    /// As an adapter alone: the model file was there.
    Adapter,
    /// From devices of the same site, as far as they did.
    Site,
}

/// Devices of a rollout that got their model by one way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WayTaken {
    /// Which.
    pub way: Way,
    /// How many.
    pub devices: u64,
    /// Bytes of their models together.
    pub model_bytes: u64,
    /// Bytes that came over the line to the hub.
    pub wan_bytes: u64,
    /// Bytes that came from devices of the same site.
    pub site_bytes: u64,
    /// Seconds from being told until half of them had confirmed.
    pub half_confirmed_s: u64,
    /// Seconds from being told until the slowest one had.
    pub last_confirmed_s: u64,
}

/// How the model of a rollout came to its devices, of those that the rollout shows
/// (`GET /v1/rollouts/{id}/transfers`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Transfers {
    /// Confirmed devices that said how; others are not counted.
    pub devices: u64,
    /// By way.
    pub ways: Vec<WayTaken>,
}

impl Transfer {
    /// A transfer of a model file, with the adapter that belongs to it, of which nothing has come yet.
    pub fn new(weights: Digest, size_bytes: u64, adapter: Option<Digest>) -> Self {
        Self {
            weights,
            size_bytes,
            adapter,
            adapter_bytes: 0,
            delta_bytes: 0,
            whole_bytes: 0,
            peer_bytes: 0,
            fallback: None,
            gave_up: None,
        }
    }

    /// The way that it took.
    pub fn way(&self) -> Way {
        match (self.peer_bytes, self.delta_bytes, self.whole_bytes) {
            (0, 0, 0) if self.adapter_bytes > 0 => Way::Adapter,
            (0, 0, _) => Way::Whole,
            (0, _, _) => Way::Delta,
            (_, _, _) => Way::Site,
        }
    }

    /// Bytes that came over the line to the hub.
    pub fn wan_bytes(&self) -> u64 {
        let parts = [self.adapter_bytes, self.delta_bytes, self.whole_bytes];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// Why a delta did not do. Closed: no free text leaves a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fallback {
    /// The hub does not have it any more.
    Missing,
    /// It is no delta that this agent can read, or one about other files.
    Unreadable,
    /// The file that it changes is not on the device, or not of the right length.
    NoBase,
    /// The file that it changes is damaged: some frames came out wrong.
    DamagedBase,
    /// The delta itself is damaged: some frames came out wrong.
    DamagedDelta,
    /// Every frame was right, and the whole is not what was signed.
    WrongResult,
    /// The file that it changes had to be changed where it lies, and that takes too much room or
    /// memory, or was begun with another delta.
    NotInPlace,
}
