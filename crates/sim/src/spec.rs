//! What is simulated: a fleet, its links, what is rolled out to it, and what goes wrong.

use serde::{Deserialize, Serialize};
use slmops_api::gate::Metric;
use slmops_api::model::ModelShape;
use slmops_api::rollout::{RolloutPolicy, WaveSize};
use slmops_api::window;
use slmops_api::{ClassName, ModelName, SiteName, VariantName};

use crate::time::{HOUR, MINUTE, Time};
use crate::traffic::MAX_REQUESTS_PER_HOUR;

/// The most devices that one simulation holds.
pub const MAX_DEVICES: u32 = 1_000_000;
/// The version of the release that is there before any rollout.
pub(crate) const BEFORE: semver::Version = semver::Version::new(0, 0, 0);
/// The longest simulation, in hours: one year.
pub const MAX_HOURS: u32 = 24 * 366;

/// A fleet, what is rolled out to it, and what goes wrong meanwhile. The same specification gives
/// the same run, event by event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetSpec {
    /// Where all chance comes from.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// Virtual hours.
    #[serde(default = "default_hours")]
    pub hours: u32,
    /// Whether, when the hours are over, every fault ends and the run goes on until the fleet has
    /// come to rest. A device that is then not what it should be is a violation.
    #[serde(default)]
    pub settle: bool,
    /// The devices, by kind.
    pub groups: Vec<GroupSpec>,
    /// The model line of every release.
    #[serde(default = "model_name")]
    pub model: ModelName,
    /// The variants that every release has.
    #[serde(default = "default_variants")]
    pub variants: Vec<VariantSpec>,
    /// What is rolled out, and when. Before, every device runs an earlier release that fits it.
    #[serde(default)]
    pub rollouts: Vec<RolloutSpec>,
    /// What all devices together may pull from the hub, in bits per second; no limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub_bits_per_s: Option<u64>,
    /// What users ask of every device. Counted where a rollout has a gate between its waves, which is
    /// who wants to know.
    #[serde(default)]
    pub traffic: TrafficSpec,
    /// How long it takes an operator to approve a wave that waits for that.
    #[serde(default)]
    pub approve_after: Time,
    /// What goes wrong.
    #[serde(default)]
    pub faults: FaultSpec,
}

/// Requests of users, and how the devices differ.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrafficSpec {
    /// Requests of a typical device in an hour.
    pub requests_per_hour: f64,
    /// The share of them that fails on a typical device before any release, from 0 to 1.
    pub error_rate: f64,
    /// How much devices differ in both, and half as much in their speed: the standard deviation of
    /// the logarithm.
    pub spread: f64,
    /// How much more there is of both at the busiest time of the day than on average, from 0 to 1.
    pub daily_swing: f64,
}

/// Devices of one kind behind links of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSpec {
    /// How many.
    pub devices: u32,
    /// Their class.
    pub class: ClassName,
    /// Their site: a label for selectors, and what shares [`LinkSpec::site_bits_per_s`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<SiteName>,
    /// Memory that models may use on each, in bytes.
    pub memory_budget_bytes: u64,
    /// The IANA name of their time zone; UTC if absent. The simulation begins at midnight UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// Room for models on each one's disk, in bytes; no limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Whether a device without room for a second model gives up the one that serves.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replace_in_place: bool,
    /// Their way to the hub.
    #[serde(default)]
    pub link: LinkSpec,
}

/// The way from a device to the hub.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkSpec {
    /// What one device can pull, in bits per second.
    pub bits_per_s: u64,
    /// What all devices of the group can pull together, in bits per second; no limit if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site_bits_per_s: Option<u64>,
    /// What the devices of the group carry between themselves, in bits per second: then they get
    /// models from each other. Not at all if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lan_bits_per_s: Option<u64>,
    /// Milliseconds from the device to the hub, one way.
    pub latency_ms: u32,
    /// The share of requests or replies that are lost, from 0 to 1.
    pub loss: f64,
    /// Daily hours in which there is no connection; the simulation begins at midnight.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub offline: Vec<OfflineHours>,
    /// Whether every byte over it costs.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub metered: bool,
}

/// A part of each day. Where `from_hour` is not before `to_hour`, it spans midnight.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfflineHours {
    /// From this hour, 0 to 24, with fractions.
    pub from_hour: f64,
    /// To this hour, 0 to 24, with fractions.
    pub to_hour: f64,
}

/// One variant of each release.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VariantSpec {
    /// Its name, such as `q4_k_m`.
    pub name: VariantName,
    /// The size of its file in bytes.
    pub size_bytes: u64,
    /// The size in bytes of a delta to it from the same variant of the release before; none is made
    /// if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta_bytes: Option<u64>,
    /// The size in bytes of an adapter: then each later release is one, on the first one's file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_bytes: Option<u64>,
    /// Its loss of quality: KL divergence from the reference, nats per token.
    #[serde(default)]
    pub kl_divergence: f64,
    /// What its memory is predicted from; SmolLM2-135M's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<ModelShape>,
}

/// A release and its rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutSpec {
    /// When it is created.
    pub at: Time,
    /// The release's version; none is named twice, and none is 0.0.0, which is there before.
    pub version: semver::Version,
    /// How.
    pub policy: RolloutPolicy,
    /// How the release does on the devices.
    #[serde(default)]
    pub health: Health,
}

/// How a release does on the devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Health {
    /// It works.
    #[default]
    Good,
    /// It does not work on some.
    Bad {
        /// What is wrong with it.
        ailment: Ailment,
        /// The share of devices on which it does not work, from 0 to 1.
        share: f64,
    },
    /// It works, passes its probes, and is worse in use, everywhere.
    WorseInUse {
        /// In what.
        metric: Metric,
        /// How many times as much of it.
        factor: f64,
    },
}

/// What may be wrong with a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ailment {
    /// A golden probe does not pass.
    FailsProbes,
    /// The golden probes pass, and the last one through the live endpoint does not.
    FailsLiveProbe,
    /// The engine refuses the file.
    DoesNotLoad,
    /// The worker dies while it loads.
    CrashesOnLoad,
    /// The worker is confirmed, and then dies every few minutes.
    CrashLoops,
    /// It takes more memory than the owner allows.
    TooLarge,
    /// The engine does not follow its configuration.
    IgnoresConfiguration,
    /// It is signed by a key that nobody trusts.
    BadSignature,
    /// The source's bytes are not what their digest says.
    WrongBytes,
}

impl Ailment {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::FailsProbes,
        Self::FailsLiveProbe,
        Self::DoesNotLoad,
        Self::CrashesOnLoad,
        Self::CrashLoops,
        Self::TooLarge,
        Self::IgnoresConfiguration,
        Self::BadSignature,
        Self::WrongBytes,
    ];

    /// Whether a device finds out before it confirms.
    pub fn shows_before_confirmation(self) -> bool {
        self != Self::CrashLoops
    }
}

/// How often something goes wrong: events for each device and day (for the hub: each day), spread
/// evenly over the hours.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FaultSpec {
    /// Power cuts at an arbitrary moment.
    pub power_cuts: f64,
    /// Power cuts right before or right after an effect of the agent.
    pub crashes_at_effects: f64,
    /// Requests that never reach the hub.
    pub lost_requests: f64,
    /// Replies that never reach the device.
    pub lost_replies: f64,
    /// Times without a connection, up to an hour.
    pub partitions: f64,
    /// Ledgers of which only a part is written, with the power cut that does it.
    pub torn_writes: f64,
    /// Times with a full disk, up to an hour.
    pub full_disks: f64,
    /// Bits that flip in the model's file.
    pub flipped_bits: f64,
    /// Times in which no model loads, up to 20 minutes.
    pub broken_engines: f64,
    /// Workers that the system kills.
    pub killed_workers: f64,
    /// Workers that die by themselves.
    pub crashed_workers: f64,
    /// Clocks that jump by up to an hour, or run fast or slow by up to 5 %.
    pub skewed_clocks: f64,
    /// Crashes of the hub, each for up to 10 minutes, some in the middle of a transaction or before
    /// its reply.
    pub hub_crashes: f64,
}

/// Why a specification cannot be simulated.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("simulation: {0}")]
pub struct SpecError(pub(crate) String);

impl FleetSpec {
    /// A fleet of `devices` for `hours`: two in three small ones on 8 Mbit/s at three sites, the
    /// rest larger ones on 50 Mbit/s; one good release, rolled out to a canary of ten, a tenth, and
    /// the rest. What differs from that is set in its fields.
    pub fn new(devices: u32, hours: u32, seed: u64) -> Self {
        let small = devices - devices / 3;
        let shares = [small - 2 * (small / 3), small / 3, small / 3];
        let mut groups: Vec<GroupSpec> = shares
            .into_iter()
            .enumerate()
            .map(|(index, devices)| GroupSpec {
                devices,
                class: constant("small"),
                site: Some(constant(["north", "south", "west"][index])),
                memory_budget_bytes: 260_000_000,
                time_zone: None,
                disk_bytes: None,
                replace_in_place: false,
                link: LinkSpec::default(),
            })
            .collect();
        groups.push(GroupSpec {
            devices: devices / 3,
            class: constant("large"),
            site: Some(constant("head-office")),
            memory_budget_bytes: 1_000_000_000,
            time_zone: None,
            disk_bytes: None,
            replace_in_place: false,
            link: LinkSpec { bits_per_s: 50_000_000, latency_ms: 10, ..LinkSpec::default() },
        });
        groups.retain(|group| group.devices > 0);
        let policy = RolloutPolicy {
            waves: vec![WaveSize::Count(10), WaveSize::Percent(10), WaveSize::Rest],
            bake_s: 1_800,
            confirm_timeout_s: 6 * 3_600,
            ..RolloutPolicy::default()
        };
        Self {
            seed,
            hours,
            settle: false,
            groups,
            model: model_name(),
            variants: default_variants(),
            rollouts: vec![RolloutSpec {
                at: Time(10 * MINUTE),
                version: semver::Version::new(1, 1, 0),
                policy,
                health: Health::Good,
            }],
            hub_bits_per_s: Some(1_000_000_000),
            traffic: TrafficSpec::default(),
            approve_after: Time(0),
            faults: FaultSpec::default(),
        }
    }

    /// Devices of all groups.
    pub fn devices(&self) -> u32 {
        self.groups.iter().fold(0, |sum, group| sum.saturating_add(group.devices))
    }

    /// The end of the faults.
    pub fn end(&self) -> Time {
        Time(u64::from(self.hours) * HOUR)
    }

    /// # Errors
    /// [`SpecError`] with what is out of bounds.
    pub(crate) fn check(&self) -> Result<(), SpecError> {
        let refuse = |text: String| Err(SpecError(text));
        let devices = self.devices();
        if !(1..=MAX_DEVICES).contains(&devices) {
            return refuse(format!("{devices} devices are not within 1 to {MAX_DEVICES}"));
        }
        if !(1..=MAX_HOURS).contains(&self.hours) {
            return refuse(format!("{} hours are not within 1 to {MAX_HOURS}", self.hours));
        }
        if self.variants.is_empty() {
            return refuse("a release needs a variant".to_owned());
        }
        for group in &self.groups {
            let link = &group.link;
            let shared = [link.site_bits_per_s, link.lan_bits_per_s];
            if link.bits_per_s == 0 || shared.contains(&Some(0)) {
                return refuse("a link of 0 bits per second carries nothing".to_owned());
            }
            if !(0.0..=1.0).contains(&link.loss) {
                return refuse(format!("a loss of {} is not within 0 to 1", link.loss));
            }
            let hours = |at: f64| (0.0..=24.0).contains(&at);
            if link.offline.iter().any(|o| !hours(o.from_hour) || !hours(o.to_hour)) {
                return refuse("hours of the day are from 0 to 24".to_owned());
            }
            if let Some(name) = &group.time_zone
                && window::time_zone(name).is_none()
            {
                return refuse(format!("`{name}` is no time zone: write such as Europe/Berlin"));
            }
        }
        if self.hub_bits_per_s == Some(0) {
            return refuse("a hub of 0 bits per second answers nothing".to_owned());
        }
        let TrafficSpec { requests_per_hour, error_rate, spread, daily_swing } = self.traffic;
        if !(0.0..=MAX_REQUESTS_PER_HOUR).contains(&requests_per_hour) {
            return refuse(format!(
                "{requests_per_hour} requests an hour are not within 0 to {MAX_REQUESTS_PER_HOUR}"
            ));
        }
        for (name, share) in [("error_rate", error_rate), ("daily_swing", daily_swing)] {
            if !(0.0..=1.0).contains(&share) {
                return refuse(format!("traffic.{name} = {share} is not within 0 to 1"));
            }
        }
        if !(0.0..=3.0).contains(&spread) {
            return refuse(format!("traffic.spread = {spread} is not within 0 to 3"));
        }
        let rates = self.faults.rates();
        if rates.iter().any(|rate| !(0.0..=1_000.0).contains(rate)) {
            return refuse("a fault comes 0 to 1000 times a day".to_owned());
        }
        let mut versions = vec![BEFORE];
        for rollout in &self.rollouts {
            if versions.contains(&rollout.version) {
                return refuse(format!("release {} is there already", rollout.version));
            }
            if let Health::Bad { share, .. } = rollout.health
                && !(0.0..=1.0).contains(&share)
            {
                return refuse(format!("a share of {share} is not within 0 to 1"));
            }
            if let Health::WorseInUse { metric, factor } = rollout.health {
                if !(0.0..=1_000.0).contains(&factor) {
                    return refuse(format!("{factor} times the {metric} is not within 0 to 1000"));
                }
                if metric == Metric::Crashes {
                    return refuse(
                        "crashes in use are the ailment `crash_loops`, or faults".to_owned(),
                    );
                }
            }
            versions.push(rollout.version.clone());
        }
        Ok(())
    }
}

impl Default for TrafficSpec {
    fn default() -> Self {
        Self { requests_per_hour: 8.0, error_rate: 0.02, spread: 0.7, daily_swing: 0.5 }
    }
}

impl Default for LinkSpec {
    fn default() -> Self {
        Self {
            bits_per_s: 8_000_000,
            site_bits_per_s: None,
            lan_bits_per_s: None,
            latency_ms: 40,
            loss: 0.0,
            offline: Vec::new(),
            metered: false,
        }
    }
}

impl FaultSpec {
    /// Every kind of fault, `rate` times for each device and day; the hub crashes as often.
    pub fn every(rate: f64) -> Self {
        Self {
            power_cuts: rate,
            crashes_at_effects: rate,
            lost_requests: rate,
            lost_replies: rate,
            partitions: rate,
            torn_writes: rate,
            full_disks: rate,
            flipped_bits: rate,
            broken_engines: rate,
            killed_workers: rate,
            crashed_workers: rate,
            skewed_clocks: rate,
            hub_crashes: rate,
        }
    }

    pub(crate) fn rates(&self) -> [f64; 13] {
        [
            self.power_cuts,
            self.crashes_at_effects,
            self.lost_requests,
            self.lost_replies,
            self.partitions,
            self.torn_writes,
            self.full_disks,
            self.flipped_bits,
            self.broken_engines,
            self.killed_workers,
            self.crashed_workers,
            self.skewed_clocks,
            self.hub_crashes,
        ]
    }
}

fn constant<T: std::str::FromStr>(name: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    name.parse().expect("a constant name is a name")
}

fn default_seed() -> u64 {
    1
}

fn default_hours() -> u32 {
    24
}

fn model_name() -> ModelName {
    constant("model")
}

/// SmolLM2-135M as Q4_K_M and Q8_0.
fn default_variants() -> Vec<VariantSpec> {
    let variant = |name, size_bytes, kl_divergence| VariantSpec {
        name: constant(name),
        size_bytes,
        delta_bytes: None,
        adapter_bytes: None,
        kl_divergence,
        shape: None,
    };
    vec![variant("q4_k_m", 105_454_144, 0.05), variant("q8_0", 144_811_072, 0.001)]
}
