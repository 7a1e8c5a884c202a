//! What operators decided about single devices and failed packages, each with its reason.

use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;

use crate::{ClassName, ModelName, RolloutId, VariantName};

/// The longest reason, in bytes.
pub const MAX_REASON_BYTES: usize = 1000;

/// What operators decided about one device, over all rollouts and blueprints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Orders {
    /// The release that it keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Pin>,
    /// Why it takes no part in rollouts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclusion: Option<Exclusion>,
}

impl Orders {
    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        self.pin.is_none() && self.exclusion.is_none()
    }
}

/// A device runs this release, whatever rollouts say, until it is unpinned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Pin {
    /// The model line.
    pub model: ModelName,
    /// The release.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// Why, in the operator's words.
    pub reason: String,
    /// Who: `token NAME`.
    pub by: String,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: jiff::Timestamp,
}

impl Pin {
    /// Whether it is to this release.
    pub fn names(&self, model: &ModelName, version: &semver::Version) -> bool {
        self.model == *model && self.version == *version
    }
}

/// A device takes no part in rollouts and keeps what it has, until it is included again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Exclusion {
    /// Why, in the operator's words.
    pub reason: String,
    /// Who: `token NAME`.
    pub by: String,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: jiff::Timestamp,
}

/// `PUT /v1/devices/{id}/pin`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPin {
    /// The model line.
    pub model: ModelName,
    /// The release.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// Why; it is shown wherever the pin is, and kept in the audit log.
    pub reason: String,
}

/// A decision and why: `PUT /v1/devices/{id}/exclusion`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Reason {
    /// Why; it is shown wherever the decision is, and kept in the audit log.
    pub reason: String,
}

/// A package that failed in a class and is not offered to it any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Quarantined {
    /// Digest of its manifest.
    #[schema(value_type = String)]
    pub manifest: Digest,
    /// The class.
    pub class: ClassName,
    /// The releases and variants that it is.
    pub packages: Vec<QuarantinedPackage>,
    /// Since when; absent where an older hub did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub since: Option<jiff::Timestamp>,
    /// The rollout in which it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutId>,
    /// Names of devices on which it failed. They refuse it for themselves, whatever is lifted.
    pub rejected_by: Vec<String>,
}

/// A variant of a release that is quarantined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct QuarantinedPackage {
    /// The model line.
    pub model: ModelName,
    /// The release.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// The variant.
    pub variant: VariantName,
}

/// `POST /v1/quarantine/lift`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Lift {
    /// Digest of the manifest.
    #[schema(value_type = String)]
    pub manifest: Digest,
    /// The class that may be offered it again.
    pub class: ClassName,
    /// Why; it is kept in the audit log.
    pub reason: String,
}
