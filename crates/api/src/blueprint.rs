//! Blueprints: desired configuration in layers, fleet < class < site < device.

use serde::{Deserialize, Serialize};

use crate::rules::Metered;
use crate::runtime::KvType;
use crate::window::Windows;
use crate::{ChannelName, ClassName, DeviceId, ModelName, SiteName};

/// One layer's place; later kinds win over earlier ones.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(tag = "layer", content = "name", rename_all = "snake_case")]
pub enum Layer {
    /// Every device.
    Fleet,
    /// The devices of a class.
    Class(ClassName),
    /// The devices of a site.
    Site(SiteName),
    /// One device.
    Device(DeviceId),
}

/// What one layer sets; absent values come from the layer below. Written as TOML.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Blueprint {
    /// The model line that the devices run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    /// The channel that the devices follow: they take the releases that are promoted to it, and no
    /// other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<ChannelName>,
    /// The runtime configuration.
    #[serde(default)]
    pub runtime: RuntimeLayer,
    /// Rules of rollouts and of the device.
    #[serde(default)]
    pub policy: PolicyLayer,
    /// The keys that sites and devices may override, such as `runtime.threads`; all of them if no
    /// layer names any. Written for the fleet or a class; the class's list goes before the fleet's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overridable: Option<Vec<String>>,
}

/// The runtime settings of one layer; see [`crate::runtime::RuntimeConfig`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct RuntimeLayer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallel: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_tokens: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_type: Option<KvType>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flash_attention: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_limit: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_after_s: Option<u32>,
}

/// The policy settings of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyLayer {
    /// Seconds that a device has to confirm a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_timeout_s: Option<u32>,
    /// Whether the device takes part in rollouts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<bool>,
    /// Devices switch models in these hours alone, such as `sat-sun 02:00-05:00`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub activate_in: Option<Windows>,
    /// Devices fetch models in these hours alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub download_in: Option<Windows>,
    /// The time zone of those hours, such as `Europe/Berlin`, or `device` for each device's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// What devices may fetch over metered links: `allow`, `defer`, or `small-only BYTES`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub metered: Option<Metered>,
    /// Bytes a second with which a device fetches models, at most; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rate_bytes_per_s: Option<u32>,
    /// Bytes a second with which a device shares its models with its site; 0: it does not.
    #[serde(default)]
    pub share_bytes_per_s: Option<u32>,
    /// Whether a device whose disk has no room for a second model gives up the one that serves, and
    /// has none until the new one is confirmed. Without it, such a device waits for room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replace_in_place: Option<bool>,
}

/// A stored layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StoredBlueprint {
    /// Its place.
    #[serde(flatten)]
    pub place: Layer,
    /// The TOML as the operator wrote it.
    pub toml: String,
}

/// One effective value and where it came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExplainedValue {
    /// Dotted key, such as `runtime.context_tokens`.
    pub key: String,
    /// The effective value as TOML.
    pub value: String,
    /// The layer that set it: `default`, `fleet`, `class small`, `site berlin` or `device …`.
    pub layer: String,
    /// Values of lower layers that it overrides, as `layer: value`.
    pub overrides: Vec<String>,
    /// Values of sites and devices that count for nothing, since its blueprint does not let them
    /// override it, as `layer: value`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<String>,
}

/// `GET /v1/devices/{id}/explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Explanation {
    /// Every effective value.
    pub values: Vec<ExplainedValue>,
    /// What operators decided about it, in words.
    #[serde(default)]
    pub orders: Vec<String>,
    /// The variant fit of the newest release of the device's model, in words, one line a variant.
    pub fit: Vec<String>,
}
