//! Releases: named versions of a model, each with the variants made for device classes.

use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;
pub use slmops_artifact::shape::ModelShape;

use crate::report::{EvaluationReport, GateDecision};
use crate::{ClassName, KeyId, ModelName, VariantName};

/// What [`crate::device::DeviceFacts::obeys`] names where an agent applies the adapters of packages:
/// one that does not would run the weights alone and call them the release.
pub const ADAPTERS: &str = "adapters";

/// A LoRA adapter (GGUF) beside a model file: what a release changes of weights that stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Adapter {
    /// Digest of its file.
    #[schema(value_type = String)]
    pub digest: Digest,
    /// Size of its file in bytes.
    pub size_bytes: u64,
}

/// A model file made for some device classes, and how it was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Variant {
    /// Its name, unique in the release, such as `q4_k_m`.
    pub name: VariantName,
    /// The classes whose recipe it is; any device whose memory it fits may get it.
    pub classes: Vec<ClassName>,
    /// The GGUF file type, such as `Q4_K_M`.
    pub quantisation: String,
    /// Digest of the OCI manifest in the hub's registry.
    #[schema(value_type = String)]
    pub manifest: Digest,
    /// Digest of the model file.
    #[schema(value_type = String)]
    pub weights: Digest,
    /// Size of the model file in bytes.
    pub size_bytes: u64,
    /// The adapter that is applied to it, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Adapter>,
    /// Bytes of tensors the CPU engine holds a second time in a faster layout; 0 where none.
    #[serde(default)]
    pub repacked_bytes: u64,
    /// The dimensions behind the memory prediction.
    pub shape: ModelShape,
    /// What was measured of it.
    pub report: EvaluationReport,
    /// What the gate said of it; absent for a first release without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<GateDecision>,
}

/// An operator's signed-off decision to release in spite of a gate. Recorded in the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GateOverride {
    /// Why, in the operator's words.
    pub reason: String,
}

/// What a device must have for a release. Versions are compared number by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Requirements {
    /// The least version of the inference engine, such as `0.0.7100`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// The least version of the agent, such as `0.2.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
}

impl Requirements {
    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        self.engine.is_none() && self.agent.is_none()
    }
}

/// What a publisher registers: a version and its variants, all pushed and signed before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NewRelease {
    /// The model line.
    pub model: ModelName,
    /// Semantic version; unique in the line.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// The digest of the original that the variants were made from.
    #[schema(value_type = String)]
    pub original: Digest,
    /// The publisher key that signed the manifests.
    pub key: KeyId,
    /// The variants.
    pub variants: Vec<Variant>,
    /// Present when a gate said no and the operator ships all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate_override: Option<GateOverride>,
    /// What devices must have to get it; others are left out.
    #[serde(default, skip_serializing_if = "Requirements::is_none")]
    pub requires: Requirements,
}

/// A registered release. Immutable.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Release {
    /// What was registered.
    #[serde(flatten)]
    pub release: NewRelease,
    /// When.
    pub created_at: jiff::Timestamp,
    /// By whom (the token's name).
    pub created_by: String,
}

/// A device class: which devices belong to it and how variants are made for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceClass {
    /// Its name.
    pub name: ClassName,
    /// For people.
    #[serde(default)]
    pub description: String,
    /// A device belongs to the class with the greatest `min_memory_bytes` that its memory budget
    /// reaches (unless its label `class` names one).
    pub min_memory_bytes: u64,
    /// The GGUF file type made for this class, such as `Q4_K_M`.
    pub quantisation: String,
}
