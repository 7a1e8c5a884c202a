//! What a device and the hub say to each other.
//!
//! `POST /v1/enrol` once; then a short-lived bearer token by signing a challenge with the
//! device's own key; then, for ever: `GET /v1/device/desired` (long poll, `ETag`) and
//! `POST /v1/device/report`. Every call may be lost or repeated without harm.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;
use slmops_artifact::signing::{PrivateKey, PublicKey};

use crate::delta::Transfer;
use crate::evidence::Evidence;
use crate::gate::Metric;
use crate::orders::Orders;
use crate::probe::ProbeResult;
use crate::rules::DeviceRules;
use crate::runtime::{EffectiveConfig, RuntimeConfig};
use crate::{ClassName, DeviceId, InvitationId, KeyId, ModelName, SiteName, VariantName};

/// Bytes that stay free where models are kept, for the device's own notes and for everyone else.
pub const DISK_RESERVE_BYTES: u64 = 16 << 20;

/// Text that a device signs for a token is this, a newline, its id, a newline and the challenge.
pub const TOKEN_CONTEXT: &str = "slmops device token v1";

/// What an operator asks for when inviting devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NewInvitation {
    /// Labels that a device which joins with it gets.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The site that it gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<SiteName>,
    /// Seconds until the invitation expires; one day if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_s: Option<u64>,
}

/// An invitation as the hub hands it out, once. `text` is the secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Invitation {
    /// Its id, for listing and withdrawing.
    pub id: InvitationId,
    /// What the device is given: `slmi1.` and base64url of a JSON [`InvitationText`].
    pub text: String,
    /// When it expires.
    #[schema(value_type = String, format = DateTime)]
    pub expires_at: jiff::Timestamp,
}

/// An invitation as listings show it, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct InvitationInfo {
    /// Its id.
    pub id: InvitationId,
    /// Labels that the device which joins with it gets.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The site that it gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<SiteName>,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: jiff::Timestamp,
    /// When it expires.
    #[schema(value_type = String, format = DateTime)]
    pub expires_at: jiff::Timestamp,
    /// The device that used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<DeviceId>,
}

/// Changes to a device by an operator (`PATCH /v1/devices/{id}`); absent fields stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DevicePatch {
    /// Labels to set, each by itself; `null` takes one away (RFC 7386), others stay as they are.
    /// `class` puts the device into a class by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, Option<String>>>,
    /// The site; an empty text takes it away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
}

/// What an invitation's text holds.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InvitationText {
    /// The hub's URL, `https://host:port`.
    pub url: String,
    /// SHA-256 of the DER of the hub's CA certificate, which the device pins.
    pub ca: Digest,
    /// The invitation.
    pub id: InvitationId,
    /// 32 random bytes, hex.
    pub secret: String,
}

/// A device's request to join.
#[derive(Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct EnrolRequest {
    /// The invitation.
    pub invitation: InvitationId,
    /// Its secret.
    pub secret: String,
    /// The device's P-256 public key, SPKI PEM. Its private key never leaves it. Enrolling the same
    /// key again with the same invitation gives the same device (a lost reply changes nothing).
    pub public_key: String,
    /// A name for people; the host name if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What the device is.
    pub facts: DeviceFacts,
}

/// The hub's answer to a device that joins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct EnrolResponse {
    /// The device's id from now on.
    pub device: DeviceId,
    /// The publisher keys whose signatures the device accepts.
    pub publisher_keys: Vec<PublisherKey>,
}

/// Text by which a publisher key vouches for its successor is this, a newline, the successor's id,
/// a newline, when that expires (RFC 3339, or `never`), a newline and the vouching key's id.
const ENDORSEMENT_CONTEXT: &str = "slmops publisher key v1";

/// A publisher's public key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PublisherKey {
    /// Its id.
    pub id: KeyId,
    /// A name for people.
    pub name: String,
    /// P-256 public key, SPKI PEM.
    pub public_key: String,
    /// From when on hub and devices refuse what it signed; never if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<jiff::Timestamp>,
    /// An earlier key's word for this one. A device that has joined already takes a new key only
    /// on the word of a key it trusts: the hub alone cannot give it one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endorsement: Option<KeyEndorsement>,
}

/// One publisher key's word for another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct KeyEndorsement {
    /// The key that vouches.
    pub by: KeyId,
    /// ECDSA P-256 SHA-256 in DER, base64.
    pub signature: String,
}

impl PublisherKey {
    /// Whether its time is over at `now`.
    pub fn is_expired(&self, now: jiff::Timestamp) -> bool {
        self.expires_at.is_some_and(|expires_at| expires_at <= now)
    }

    /// Vouches for this key, and for when it expires, with the private key `by`.
    ///
    /// # Panics
    /// Never: the id of a key is a key id.
    #[must_use]
    pub fn endorsed(mut self, by: &PrivateKey) -> Self {
        let by_id: KeyId = by.public().id().parse().expect("16 hex digits are a key id");
        let signature = STANDARD.encode(by.sign(self.endorsed_text(&by_id).as_bytes()));
        self.endorsement = Some(KeyEndorsement { by: by_id, signature });
        self
    }

    /// Whether `by` really vouches for this key as it is.
    pub fn is_endorsed_by(&self, by: &Self) -> bool {
        let Some(endorsement) = &self.endorsement else { return false };
        let (Ok(key), Ok(signature)) =
            (PublicKey::from_pem(&by.public_key), STANDARD.decode(&endorsement.signature))
        else {
            return false;
        };
        endorsement.by == by.id
            && key.id() == by.id.as_str()
            && PublicKey::from_pem(&self.public_key).is_ok_and(|own| own.id() == self.id.as_str())
            && key.accepts(self.endorsed_text(&by.id).as_bytes(), &signature)
    }

    fn endorsed_text(&self, by: &KeyId) -> String {
        let expires = self.expires_at.map_or_else(|| "never".to_owned(), |at| at.to_string());
        format!("{ENDORSEMENT_CONTEXT}\n{}\n{expires}\n{by}", self.id)
    }
}

/// What a device is. Facts, never text about its users.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceFacts {
    /// Host name.
    pub hostname: String,
    /// Architecture, such as `aarch64`.
    pub arch: String,
    /// Operating system and kernel release.
    pub kernel: String,
    /// Processor model.
    pub cpu: String,
    /// Instruction-set extensions that matter to inference, such as `avx2`.
    pub cpu_features: Vec<String>,
    /// Cores the agent may use.
    pub cores: u32,
    /// Total memory in bytes.
    pub memory_bytes: u64,
    /// Memory that models may use in bytes; the owner's limit.
    pub memory_budget_bytes: u64,
    /// Free bytes where models are kept.
    pub disk_free_bytes: u64,
    /// The agent's version.
    pub agent_version: String,
    /// Engine and version.
    pub engine: String,
    /// Where the local endpoint answers, such as `http://127.0.0.1:8480`; known after start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Its time zone's IANA name; absent where it has none, which is UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// Whether every byte over its link costs, as its owner or its system says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub metered: bool,
    /// Where it shares its models with devices of its site: `http://ADDRESS:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares_at: Option<String>,
    /// The rules that the agent obeys, by name: what it does not know it would ignore, so the hub
    /// asks it of no device that does not name it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub obeys: Vec<String>,
}

/// `POST /v1/device/challenge`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ChallengeRequest {
    /// Who asks.
    pub device: DeviceId,
}

/// A challenge to sign; valid for a minute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Challenge {
    /// Opaque text.
    pub challenge: String,
}

/// `POST /v1/device/token`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceTokenRequest {
    /// Who asks.
    pub device: DeviceId,
    /// The challenge as received.
    pub challenge: String,
    /// ECDSA P-256 SHA-256 over [`TOKEN_CONTEXT`] `\n` device `\n` challenge; DER, base64.
    pub signature: String,
}

/// A bearer token for device calls and for pulling from the registry.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceToken {
    /// The token.
    pub token: String,
    /// Seconds for which it is valid.
    pub expires_in_s: u64,
}

/// What a device should be. Generations never go down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DesiredState {
    /// Grows by one with every change for this device.
    pub generation: u64,
    /// The model to run; absent when there is none for it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<DesiredModel>,
    /// How to run it.
    pub runtime: RuntimeConfig,
    /// How long the device has to confirm before it counts as failed, in seconds.
    pub confirm_timeout_s: u32,
    /// Why this and not another, in words, for the device's own `status`.
    pub reason: String,
    /// When and how it may be carried out; at once if absent.
    #[serde(default, skip_serializing_if = "DeviceRules::is_none")]
    pub rules: DeviceRules,
}

/// One variant, by digest, and where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DesiredModel {
    /// The model line; also the OCI repository in the hub's registry.
    pub model: ModelName,
    /// The release's version.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// The variant.
    pub variant: VariantName,
    /// Digest of its OCI manifest: what the device pulls and verifies.
    #[schema(value_type = String)]
    pub manifest: Digest,
    /// Digest of the model file.
    #[schema(value_type = String)]
    pub weights: Digest,
    /// Size of the model file in bytes.
    pub size_bytes: u64,
    /// Predicted memory at this runtime configuration in bytes.
    pub predicted_memory_bytes: u64,
}

/// How far a device is with its desired model. Installed is not working: only
/// [`Phase::Confirmed`] counts as evidence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// Nothing is desired, or nothing new.
    Idle,
    /// Bytes are coming in.
    Downloading {
        /// Bytes so far.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// All bytes are here; digests and signature are being checked.
    Downloaded,
    /// Digests and signature are good.
    Verified,
    /// Fetched, verified and kept on the disk: a rule says that it is not its time yet. The model
    /// before serves on.
    Prestaged {
        /// Which rule.
        cause: WaitCause,
        /// When it lets go by itself, if that is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(value_type = Option<String>, format = DateTime)]
        until: Option<jiff::Timestamp>,
    },
    /// A worker has loaded the model beside the one that serves, and its configuration was read
    /// back; its probes are running. It gets no traffic yet.
    Staged,
    /// Its probes passed and the new worker answers; the old one drains. A last probe runs through
    /// the live endpoint.
    Activated,
    /// All probes passed with this digest running.
    Confirmed,
    /// The model failed here and the device went back to the previous one (or to none).
    RolledBack {
        /// Why.
        failure: Failure,
    },
    /// Something outside the model's control is in the way; the device goes on by itself.
    Waiting {
        /// What.
        cause: WaitCause,
        /// When it lets go, if that is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(value_type = Option<String>, format = DateTime)]
        until: Option<jiff::Timestamp>,
    },
}

impl Phase {
    /// The rule that the device waits for, and until when, if it waits for one.
    pub fn held(&self) -> Option<(WaitCause, Option<jiff::Timestamp>)> {
        match self {
            Self::Prestaged { cause, until } => Some((*cause, *until)),
            Self::Waiting { cause, until } if cause.is_rule() => Some((*cause, *until)),
            _ => None,
        }
    }
}

/// Why a model failed on a device. Closed: no free text leaves a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "failure", rename_all = "snake_case")]
pub enum Failure {
    /// Probes ran and at least one did not pass.
    Probes {
        /// All results, in order.
        results: Vec<ProbeResult>,
    },
    /// The engine could not load the file.
    Load,
    /// The worker died while loading, probing or in its first minutes.
    Crash,
    /// Signature missing, wrong, or by a key this device does not trust.
    Signature,
    /// The manifest or a blob is not what its digest says, at the source.
    Digest,
    /// The manifest is not a package that this agent understands.
    Package,
    /// The effective configuration differs from what was asked.
    Configuration {
        /// The settings that differ.
        settings: Vec<String>,
    },
    /// Measured memory is beyond the owner's budget.
    Memory {
        /// Measured bytes.
        measured_bytes: u64,
        /// The budget.
        budget_bytes: u64,
    },
    /// Not confirmed in time.
    Timeout,
    /// It worked here, and the rollout's gate found it worse than what was before.
    Worse {
        /// In this.
        metric: Metric,
    },
}

/// What a device waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WaitCause {
    /// The network or the hub does not answer.
    Network,
    /// The disk is full.
    DiskFull,
    /// The state folder cannot be written.
    Storage,
    /// The rollout was paused, or it halted ([`DeviceRules::hold`]).
    Held,
    /// It is not to be switched to yet ([`DeviceRules::activate_at`]).
    NotBefore,
    /// It is outside of the hours for this ([`DeviceRules::activate_in`], `download_in`).
    Hours,
    /// A rule is about time, and the device cannot be sure what time it is: it asks its hub.
    Clock,
    /// The link is metered ([`DeviceRules::metered`]).
    Metered,
}

impl WaitCause {
    /// Whether it is a rule that the hub gave, and not something in the way.
    pub fn is_rule(self) -> bool {
        match self {
            Self::Network | Self::DiskFull | Self::Storage => false,
            Self::Held | Self::NotBefore | Self::Hours | Self::Clock | Self::Metered => true,
        }
    }
}

/// A model on the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct InstalledModel {
    /// The model line.
    pub model: ModelName,
    /// Version.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// Variant.
    pub variant: VariantName,
    /// Manifest digest.
    #[schema(value_type = String)]
    pub manifest: Digest,
    /// Digest of the model file.
    #[schema(value_type = String)]
    pub weights: Digest,
}

/// A manifest that failed here and is not tried again until told otherwise by a new digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Rejection {
    /// The manifest.
    #[schema(value_type = String)]
    pub manifest: Digest,
    /// Generation that named it.
    pub generation: u64,
    /// Why it failed.
    pub failure: Failure,
}

/// A device's full report; the latest one replaces all before it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceReport {
    /// Grows with every report of this device, over restarts too; an older one is ignored.
    pub sequence: u64,
    /// The newest generation the device has seen.
    pub generation: u64,
    /// How far it is with it.
    #[serde(flatten)]
    pub phase: Phase,
    /// The model that answers right now, if one does: its digest is that of the file the running
    /// worker loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<InstalledModel>,
    /// The model kept for going back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<InstalledModel>,
    /// What failed here.
    #[serde(default)]
    pub rejected: Vec<Rejection>,
    /// The latest probe results of the running model.
    #[serde(default)]
    pub probes: Vec<ProbeResult>,
    /// Read back from the running engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective: Option<EffectiveConfig>,
    /// Aggregates; see [`Telemetry`].
    pub telemetry: Telemetry,
    /// What was counted of the running model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
    /// The device's facts, as they are now.
    pub facts: DeviceFacts,
}

/// All that a device tells about its use: numbers only. Counters run from the device's enrolment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Telemetry {
    /// Requests answered.
    pub requests: u64,
    /// Requests that failed by our fault.
    pub errors: u64,
    /// Prompt tokens processed.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Worker processes that ended unasked.
    pub worker_crashes: u64,
    /// Bytes pulled from the hub.
    pub downloaded_bytes: u64,
    /// How the model file that was got last came here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// Generated tokens per second over the last minute; 0 when idle.
    pub tokens_per_s: f64,
    /// Median time to first token of the last 100 requests, milliseconds; 0 when there were none.
    pub time_to_first_token_ms: f64,
    /// Resident bytes of the worker now.
    pub worker_memory_bytes: u64,
    /// Resident bytes of the worker at its peak.
    pub worker_peak_memory_bytes: u64,
}

/// A device as the hub shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Device {
    /// Its id.
    pub id: DeviceId,
    /// A name for people, unique in the fleet.
    pub name: String,
    /// Its class.
    pub class: ClassName,
    /// Its site, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<SiteName>,
    /// Labels, with `class`, `site`, `name` and `id` among them.
    pub labels: BTreeMap<String, String>,
    /// Its facts.
    pub facts: DeviceFacts,
    /// What it should be.
    pub desired: DesiredState,
    /// Its latest report, if it ever sent one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<DeviceReport>,
    /// When it enrolled.
    #[schema(value_type = String, format = DateTime)]
    pub enrolled_at: jiff::Timestamp,
    /// When it was last heard of.
    #[schema(value_type = String, format = DateTime)]
    pub last_seen: jiff::Timestamp,
    /// Whether an operator shut it out.
    pub revoked: bool,
    /// What operators decided about it.
    #[serde(default, skip_serializing_if = "Orders::is_none")]
    pub orders: Orders,
}

/// One line of a device's history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceEvent {
    /// When the hub learnt of it.
    #[schema(value_type = String, format = DateTime)]
    pub at: jiff::Timestamp,
    /// The generation it belongs to.
    pub generation: u64,
    /// What happened, in words made by the hub from closed types.
    pub what: String,
}
