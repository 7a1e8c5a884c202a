//! Blueprints: desired configuration in layers, fleet < class < site < device.

use serde::{Deserialize, Serialize};

use crate::runtime::KvType;
use crate::{ClassName, DeviceId, ModelName, SiteName};

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
    /// The runtime configuration.
    #[serde(default)]
    pub runtime: RuntimeLayer,
    /// Rules of rollouts and of the device.
    #[serde(default)]
    pub policy: PolicyLayer,
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
