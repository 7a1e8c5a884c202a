//! Rollouts: which devices get a release, in which waves, and what was seen on the way.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;

use crate::channel::Promotion;
use crate::device::{Failure, WaitCause};
use crate::gate::{GatePolicy, GateReading};
use crate::rules::Metered;
use crate::selector::Selector;
use crate::window::Windows;
use crate::{DeviceId, ModelName, RolloutId, VariantName};

/// How many devices a wave takes, of those that the rollout selects. Written as `3`, `25%` or
/// `rest` where people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", from = "WrittenWave")]
pub enum WaveSize {
    /// This many devices.
    Count(u32),
    /// This share of all selected devices, rounded up.
    Percent(u32),
    /// All that are left.
    Rest,
}

/// A wave as JSON has it, or as people write it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a wave is a number of devices, a share such as 25%, or rest")]
enum WrittenWave {
    Text(Text),
    Tagged(Tagged),
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Tagged {
    Count(u32),
    Percent(u32),
}

struct Text(WaveSize);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

impl From<WrittenWave> for WaveSize {
    fn from(written: WrittenWave) -> Self {
        match written {
            WrittenWave::Text(Text(size)) => size,
            WrittenWave::Tagged(Tagged::Count(number)) => Self::Count(number),
            WrittenWave::Tagged(Tagged::Percent(share)) => Self::Percent(share),
        }
    }
}

/// Why a string is not a [`WaveSize`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is no wave: write a number of devices, a share such as 25%, or `rest`")]
pub struct ParseWaveError {
    given: String,
}

impl FromStr for WaveSize {
    type Err = ParseWaveError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let size = match given.trim() {
            "rest" => Some(Self::Rest),
            text => match text.strip_suffix('%') {
                Some(share) => share.parse().ok().map(Self::Percent),
                None => text.parse().ok().map(Self::Count),
            },
        };
        let good = |size: &Self| match size {
            Self::Count(number) => *number > 0,
            Self::Percent(share) => (1..=100).contains(share),
            Self::Rest => true,
        };
        let error = || ParseWaveError { given: given.chars().take(200).collect() };
        size.filter(good).ok_or_else(error)
    }
}

impl fmt::Display for WaveSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(number) => write!(f, "{number}"),
            Self::Percent(share) => write!(f, "{share}%"),
            Self::Rest => f.write_str("rest"),
        }
    }
}

/// Within what a [`WaveSize`] counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WavePer {
    /// Within all selected devices.
    #[default]
    Fleet,
    /// Within each class, so that the first wave speaks for every class.
    Class,
    /// Within each site, so that the first wave speaks for every site. Devices without a site
    /// count together.
    Site,
}

/// What an operator wants of a rollout. Written as TOML in a policy file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RolloutPolicy {
    /// Which devices.
    #[schema(value_type = String)]
    pub selector: Selector,
    /// The waves in order; devices left over after the last form one more.
    pub waves: Vec<WaveSize>,
    /// Within what the sizes of the waves count.
    pub per: WavePer,
    /// Failed devices that a wave tolerates; one more halts the rollout.
    pub max_failures: u32,
    /// Seconds that a wave must stay confirmed before the next one starts.
    pub bake_s: u32,
    /// Seconds that a device has to confirm, counted from its desired state, or from when the last
    /// rule that held it up let go; then it is a straggler and counts as failed.
    pub confirm_timeout_s: u32,
    /// When devices may be told.
    pub schedule: Schedule,
    /// How many devices update at once.
    pub limits: Limits,
    /// Who must agree, before which wave.
    pub approvals: Vec<ApprovalStep>,
    /// What becomes of devices that are not heard of, or that rules hold up for long.
    pub stragglers: Stragglers,
    /// What must be shown of a wave before the next one starts, besides its confirmation; nothing
    /// if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<GatePolicy>,
}

impl Default for RolloutPolicy {
    fn default() -> Self {
        Self {
            selector: Selector::all(),
            waves: vec![WaveSize::Count(1), WaveSize::Rest],
            per: WavePer::Fleet,
            max_failures: 0,
            bake_s: 0,
            confirm_timeout_s: 900,
            gate: None,
            schedule: Schedule::default(),
            limits: Limits::default(),
            approvals: Vec::new(),
            stragglers: Stragglers::default(),
        }
    }
}

/// When the devices of a rollout may be told, and when those that were told may do what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// No device is told before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub start_at: Option<jiff::Timestamp>,
    /// No device is told meanwhile.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub freezes: Vec<Freeze>,
    /// Devices fetch at once and switch not before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub activate_at: Option<jiff::Timestamp>,
    /// Devices switch in these hours alone, such as `sat-sun 02:00-05:00`.
    #[serde(skip_serializing_if = "Windows::is_always")]
    #[schema(value_type = String)]
    pub activate_in: Windows,
    /// Devices fetch in these hours alone.
    #[serde(skip_serializing_if = "Windows::is_always")]
    #[schema(value_type = String)]
    pub download_in: Windows,
    /// The time zone of those hours, such as `Europe/Berlin`; each device's own if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
}

/// A time in which no device is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Freeze {
    /// From when on.
    #[schema(value_type = String, format = DateTime)]
    pub from: jiff::Timestamp,
    /// Until when.
    #[schema(value_type = String, format = DateTime)]
    pub until: jiff::Timestamp,
    /// Why, in the operator's words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// How many devices update at once: told, and neither confirmed nor failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// In the whole rollout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updating: Option<u32>,
    /// In each site; devices without a site are not limited by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updating_per_site: Option<u32>,
    /// What devices may fetch over a link on which every byte costs: `allow`, `defer`, or
    /// `small-only BYTES`.
    #[schema(value_type = String)]
    pub metered: Metered,
    /// Bytes a second with which one device fetches, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_bytes_per_s: Option<u64>,
    /// Bytes a second with which all devices of one site fetch together, at most: so many of them
    /// as `site_downloads` says fetch at a time, each with its share. Devices without a site are
    /// not limited by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site_bytes_per_s: Option<u64>,
    /// Devices of one site that fetch at a time, where `site_bytes_per_s` is given; one if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site_downloads: Option<u32>,
}

/// Somebody must agree before a wave starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ApprovalStep {
    /// Before which wave, from 1.
    pub wave: u32,
    /// Names of the tokens that may approve; any operator's but the one who created the rollout
    /// if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub by: Vec<String>,
}

/// An approval that was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Approval {
    /// For which wave, from 1.
    pub wave: u32,
    /// Who: `token NAME`.
    pub by: String,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: jiff::Timestamp,
}

/// `POST /v1/rollouts/{id}/approve`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewApproval {
    /// The wave that may start, from 1.
    pub wave: u32,
}

/// What becomes of devices that are not heard of, or that rules hold up for long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Stragglers {
    /// A device that was not heard of for so many seconds is away: no wave waits for it. It is told
    /// when it comes back, or when all others are done. 0: no device is ever away.
    pub away_after_s: u32,
    /// What becomes of a device that was told and did not ask within `confirm_timeout_s`.
    pub unheard: Unheard,
    /// A device that a rule of its own or of the rollout (hours, a metered link) still holds up so
    /// many seconds after it was told is away. 0: its wave waits for as long as the rule holds.
    #[serde(skip_serializing_if = "is_zero")]
    pub held_after_s: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Default for Stragglers {
    fn default() -> Self {
        Self { away_after_s: 7 * 24 * 3600, unheard: Unheard::Fail, held_after_s: 0 }
    }
}

/// What becomes of a device that was told and never asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unheard {
    /// It counts as failed.
    #[default]
    Fail,
    /// It is away: its wave no longer waits for it, and it takes what it was told when it is back.
    Leave,
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
    /// The promotion that it carries out; absent for one that was started by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promotion: Option<Promotion>,
}

/// The state of a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RolloutState {
    /// Waves are going out.
    Running,
    /// An operator holds it: no device is told, and those that were told begin nothing new.
    Paused,
    /// A gate stopped it. Devices that are on it stay unless they went back by themselves; those
    /// that were told and did not switch yet begin nothing new.
    Halted,
    /// Every selected device is confirmed (or has no variant that fits).
    Completed,
    /// An operator ended it where it stood: devices that have confirmed stay on it, those on their
    /// way were told to be what they were before.
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
    /// Not heard of for long: no wave waits for it. It takes the release when it comes back.
    Away,
    /// The rollout was aborted before it confirmed: it was told to be what it was before.
    Recalled,
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
    /// The rule that it waits for, as it last said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<WaitCause>,
    /// When it fails unless it has confirmed by then; absent where no rule has moved that, and
    /// while one holds it up with no known end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub due_at: Option<jiff::Timestamp>,
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

/// How many devices of a wave are where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct OutcomeCounts {
    /// Not told yet.
    pub pending: u64,
    /// Told; on their way.
    pub updating: u64,
    /// Confirmed by their probes.
    pub confirmed: u64,
    /// Failed and went back.
    pub failed: u64,
    /// No variant fits.
    pub no_fit: u64,
    /// Failed this very manifest before.
    pub quarantined: u64,
    /// Not heard of for long.
    pub away: u64,
    /// On their way when the rollout ended, and told to keep what they had.
    pub recalled: u64,
}

impl OutcomeCounts {
    /// All devices.
    pub fn devices(&self) -> u64 {
        let Self { pending, updating, confirmed, failed, no_fit, quarantined, away, recalled } =
            self;
        pending + updating + confirmed + failed + no_fit + quarantined + away + recalled
    }

    /// Counts one more device.
    pub fn count(&mut self, outcome: &Outcome) {
        *match outcome {
            Outcome::Pending => &mut self.pending,
            Outcome::Updating => &mut self.updating,
            Outcome::Confirmed => &mut self.confirmed,
            Outcome::Failed { .. } => &mut self.failed,
            Outcome::NoFit { .. } => &mut self.no_fit,
            Outcome::Quarantined => &mut self.quarantined,
            Outcome::Away => &mut self.away,
            Outcome::Recalled => &mut self.recalled,
        } += 1;
    }
}

impl std::iter::Sum for OutcomeCounts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |a, b| Self {
            pending: a.pending + b.pending,
            updating: a.updating + b.updating,
            confirmed: a.confirmed + b.confirmed,
            failed: a.failed + b.failed,
            no_fit: a.no_fit + b.no_fit,
            quarantined: a.quarantined + b.quarantined,
            away: a.away + b.away,
            recalled: a.recalled + b.recalled,
        })
    }
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
    /// The selected devices, in wave order; of a large rollout the first ones, and none in a list
    /// of rollouts: `GET /v1/rollouts/{id}/devices` pages through all of them.
    pub devices: Vec<RolloutDevice>,
    /// How many devices are where, for each wave.
    #[serde(default)]
    pub counts: Vec<OutcomeCounts>,
    /// Every decision so far, oldest first.
    pub decisions: Vec<Decision>,
    /// What it waits for, in words; empty when it is over.
    pub waiting_for: String,
    /// Approvals that were given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approvals: Vec<Approval>,
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

impl Rollout {
    /// Counts [`Rollout::devices`] anew; right where they are all there.
    pub fn recount(&mut self) {
        self.counts = vec![OutcomeCounts::default(); self.waves as usize];
        for part in &self.devices {
            if let Some(wave) = self.counts.get_mut(part.wave as usize) {
                wave.count(&part.outcome);
            }
        }
    }

    /// All waves' counts together.
    pub fn total(&self) -> OutcomeCounts {
        self.counts.iter().copied().sum()
    }
}
