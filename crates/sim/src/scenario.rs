//! A run as a text that can be read, kept and run again.

use std::fmt;
use std::str::FromStr;

use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use slmops_api::gate::{GatePolicy, Metric};
use slmops_api::rollout::{
    ApprovalStep, Freeze, Limits, RolloutPolicy, Schedule, Stragglers, Unheard, WavePer, WaveSize,
};
use slmops_api::rules::Metered;
use slmops_api::window::Windows;

use crate::catalog::mix;
use crate::faults;
use crate::operation::{Action, Operation, OperatorCommand, ParseOperationError};
use crate::report::Report;
use crate::run::{Manner, run};
use crate::spec::{
    Ailment, FaultSpec, FleetSpec, GroupSpec, Health, LinkSpec, RolloutSpec, SpecError,
};
use crate::time::{HOUR, MINUTE, Time};

/// Between the specification and the operations.
const SEPARATOR: &str = "---";

/// A fleet and everything that happens to it, with each fault at its moment.
///
/// As text: comments (`# …`), the specification as JSON, a line `---`, then one operation a line.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// The fleet. Its [`FaultSpec`] has been drawn already and counts no more.
    pub spec: FleetSpec,
    /// What happens, in order.
    pub operations: Vec<Operation>,
}

/// Why some text is not a [`Scenario`].
#[derive(Debug, thiserror::Error)]
pub enum ParseScenarioError {
    /// There is no line between the specification and the operations.
    #[error("read scenario: no line `{SEPARATOR}`")]
    Separator,
    /// The specification is not one.
    #[error("read scenario: specification")]
    Spec(#[source] serde_json::Error),
    /// An operation is not one.
    #[error("read scenario: line {line}")]
    Operation {
        /// The line's number, from 1.
        line: usize,
        /// Why.
        #[source]
        source: ParseOperationError,
    },
}

impl Scenario {
    /// The scenario of a specification: its faults are drawn from its seed.
    ///
    /// # Errors
    /// [`SpecError`] when the specification is out of bounds.
    pub fn of(spec: &FleetSpec) -> Result<Self, SpecError> {
        spec.check()?;
        let operations = faults::draw(spec);
        let spec = FleetSpec { faults: FaultSpec::default(), ..spec.clone() };
        Ok(Self { spec, operations })
    }

    /// Runs it.
    ///
    /// # Errors
    /// [`SpecError`] when the specification is out of bounds.
    pub fn run(&self) -> Result<Report, SpecError> {
        run(self, Manner::default())
    }

    /// Runs it with checks that a user does not pay for.
    ///
    /// # Errors
    /// As [`Scenario::run`].
    #[doc(hidden)]
    pub fn run_as(&self, manner: Manner) -> Result<Report, SpecError> {
        run(self, manner)
    }

    /// A small fleet in which nearly anything may happen; the same one for the same seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(mix(seed));
        let rng = &mut rng;
        let hours = rng.random_range(2..=8);
        let groups: Vec<GroupSpec> =
            (0..rng.random_range(1..=3)).map(|index| random_group(rng, index)).collect();
        let rollouts = (1..=rng.random_range(1..=3)).map(|minor| random_rollout(rng, minor, hours));
        let mut rollouts: Vec<RolloutSpec> = rollouts.collect();
        // What gives up its model fetches in the hours in which it may switch; where those and the
        // hours of downloads have no moment in common, it waits for ever.
        if groups.iter().any(|group| group.replace_in_place) {
            for rollout in &mut rollouts {
                rollout.policy.schedule.download_in = Windows::default();
            }
        }
        let mut rate = || match rng.random_bool(0.5) {
            true => rng.random_range(0.0..4.0),
            false => 0.0,
        };
        let faults = FaultSpec {
            power_cuts: rate(),
            crashes_at_effects: 2.0 * rate(),
            lost_requests: rate(),
            lost_replies: rate(),
            partitions: rate(),
            torn_writes: rate(),
            full_disks: rate(),
            flipped_bits: rate(),
            broken_engines: rate() / 4.0,
            killed_workers: rate(),
            crashed_workers: rate(),
            skewed_clocks: rate(),
            hub_crashes: 10.0 * rate(),
        };
        let approve_after = Time(rng.random_range(0..2 * HOUR));
        let mut variants = FleetSpec::new(1, hours, seed).variants;
        match rng.random_range(0..4) {
            0 | 1 => variants.iter_mut().for_each(|variant| {
                variant.delta_bytes = Some(variant.size_bytes / rng.random_range(2..200));
            }),
            2 => variants.iter_mut().for_each(|variant| {
                variant.adapter_bytes = Some(rng.random_range(100_000..5_000_000));
            }),
            _ => {}
        }
        let hub_bits_per_s = rng.random_bool(0.3).then(|| rng.random_range(5_000_000..100_000_000));
        let base = FleetSpec::new(1, hours, seed);
        let spec = FleetSpec {
            settle: true,
            groups,
            rollouts,
            variants,
            hub_bits_per_s,
            approve_after,
            faults,
            ..base
        };
        let mut scenario = Self::of(&spec).expect("a random specification is within bounds");
        for _ in 0..rng.random_range(0..=3) {
            use OperatorCommand::{Abort, Pause, Resume, Rollback};
            let command = [Pause, Resume, Resume, Abort, Rollback][rng.random_range(0..5)];
            let at = Time(rng.random_range(0..spec.end().0));
            scenario.operations.push(Operation { at, action: Action::Operate(command) });
        }
        if rng.random_bool(0.3) {
            let lasts = Time(rng.random_range(1..=60) * MINUTE);
            let at = Time(rng.random_range(0..spec.end().0));
            scenario
                .operations
                .push(Operation { at, action: Action::CutGroup { group: 0, lasts } });
        }
        if rng.random_bool(0.4) {
            let lasts = Time(rng.random_range(1..=180) * MINUTE);
            let at = Time(rng.random_range(0..spec.end().0));
            scenario
                .operations
                .push(Operation { at, action: Action::MeterGroup { group: 0, lasts } });
        }
        scenario.operations.sort_by_key(|operation| operation.at);
        scenario
    }
}

fn random_group(rng: &mut ChaCha8Rng, index: usize) -> GroupSpec {
    let base = FleetSpec::new(9, 1, 0);
    let offline = match rng.random_bool(0.2) {
        true => vec![crate::spec::OfflineHours {
            from_hour: f64::from(rng.random_range(0_u32..=3)),
            to_hour: f64::from(rng.random_range(4_u32..=7)),
        }],
        false => vec![],
    };
    let largest = base.variants.iter().map(|variant| variant.size_bytes).max().unwrap_or(0);
    // Room for one model where that may go for the next one, for two, for any number.
    let (disk_bytes, replace_in_place) = match rng.random_range(0..5) {
        0 => (Some(largest * 5 / 4), true),
        1 => (Some(largest * 9 / 4), rng.random_bool(0.5)),
        _ => (None, false),
    };
    GroupSpec {
        disk_bytes,
        replace_in_place,
        devices: rng.random_range(1..=8),
        // Too little for any variant, enough for one, enough for both.
        memory_budget_bytes: [50, 260, 260, 1_000][rng.random_range(0..4)] * 1_000_000,
        link: LinkSpec {
            bits_per_s: rng.random_range(500_000..50_000_000),
            site_bits_per_s: rng.random_bool(0.3).then_some(4_000_000),
            lan_bits_per_s: rng.random_bool(0.3).then(|| rng.random_range(5_000_000..100_000_000)),
            latency_ms: rng.random_range(1..500),
            loss: if rng.random_bool(0.2) { 0.05 } else { 0.0 },
            offline,
            metered: rng.random_bool(0.2),
        },
        time_zone: random_time_zone(rng),
        ..base.groups[index].clone()
    }
}

fn random_rollout(rng: &mut ChaCha8Rng, minor: u64, hours: u32) -> RolloutSpec {
    let waves = (0..rng.random_range(0..4))
        .map(|_| match rng.random_range(0..3) {
            0 => WaveSize::Count(rng.random_range(1..4)),
            1 => WaveSize::Percent(rng.random_range(1..60)),
            _ => WaveSize::Rest,
        })
        .collect();
    let selector = match rng.random_range(0..4) {
        0 => "class=small",
        1 => "site!=north",
        _ => "all",
    };
    let ailment = Ailment::ALL[rng.random_range(0..Ailment::ALL.len())];
    RolloutSpec {
        at: Time(rng.random_range(0..u64::from(hours) * HOUR)),
        version: semver::Version::new(1, minor, 0),
        policy: RolloutPolicy {
            selector: selector.parse().expect("a constant selector is one"),
            waves,
            max_failures: rng.random_range(0..2),
            bake_s: [0, 60, 1_800][rng.random_range(0..3)],
            confirm_timeout_s: rng.random_range(300..10_000),
            per: [WavePer::Fleet, WavePer::Class, WavePer::Site][rng.random_range(0..3)],
            schedule: random_schedule(rng, hours),
            limits: Limits {
                updating: rng.random_bool(0.2).then(|| rng.random_range(1..5)),
                updating_per_site: rng.random_bool(0.2).then(|| rng.random_range(1..3)),
                metered: random_metered(rng),
                device_bytes_per_s: rng
                    .random_bool(0.2)
                    .then(|| rng.random_range(200_000..5_000_000)),
                ..random_share_of_sites(rng)
            },
            approvals: random_approvals(rng),
            stragglers: Stragglers {
                away_after_s: match rng.random_bool(0.5) {
                    true => rng.random_range(300..7_200),
                    false => 0,
                },
                unheard: if rng.random_bool(0.5) { Unheard::Fail } else { Unheard::Leave },
                ..Stragglers::default()
            },
            gate: rng.random_bool(0.4).then(|| GatePolicy {
                patience_s: Some(rng.random_range(60..7_200)),
                ..GatePolicy::default()
            }),
        },
        health: match rng.random_range(0..5) {
            0 | 1 => Health::Good,
            4 => Health::WorseInUse {
                metric: [Metric::Errors, Metric::Replay][rng.random_range(0..2)],
                factor: f64::from(rng.random_range(2_u32..20)),
            },
            2 => Health::Bad { ailment, share: 1.0 },
            _ => Health::Bad { ailment, share: f64::from(rng.random_range(0_u32..=100)) / 100.0 },
        },
    }
}

fn random_schedule(rng: &mut ChaCha8Rng, hours: u32) -> Schedule {
    let mut moment = || Time(rng.random_range(0..u64::from(hours) * HOUR)).timestamp();
    let (start_at, from, activate_at) = (moment(), moment(), moment());
    let until = from + jiff::SignedDuration::from_mins(rng.random_range(1..300));
    let start_at = rng.random_bool(0.2).then_some(start_at);
    let mut windows = || match rng.random_bool(0.1) {
        true => {
            let from = rng.random_range(0..24);
            let to = (from + rng.random_range(1..12)) % 24;
            format!("{from:02}:00-{to:02}:30").parse().expect("hours of the day")
        }
        false => Windows::default(),
    };
    let (activate_in, download_in) = (windows(), windows());
    let time_zone = random_time_zone(rng);
    Schedule {
        start_at,
        activate_at: rng
            .random_bool(0.2)
            .then_some(start_at.unwrap_or(activate_at).max(activate_at)),
        activate_in,
        download_in,
        time_zone,
        freezes: match rng.random_bool(0.2) {
            true => vec![Freeze { from, until, reason: String::new() }],
            false => vec![],
        },
    }
}

/// Few of whole hours, and as far from UTC as there are.
fn random_time_zone(rng: &mut ChaCha8Rng) -> Option<String> {
    let zones = ["America/St_Johns", "Asia/Kathmandu", "Europe/Berlin", "Pacific/Kiritimati"];
    rng.random_bool(0.4).then(|| zones[rng.random_range(0..zones.len())].to_owned())
}

fn random_metered(rng: &mut ChaCha8Rng) -> Metered {
    match rng.random_range(0..6) {
        0 => Metered::Defer,
        // More than the one variant and less than the other.
        1 => Metered::SmallOnly { max_bytes: 120_000_000 },
        _ => Metered::Allow,
    }
}

fn random_share_of_sites(rng: &mut ChaCha8Rng) -> Limits {
    match rng.random_bool(0.15) {
        true => Limits {
            site_bytes_per_s: Some(rng.random_range(500_000..5_000_000)),
            site_downloads: rng.random_bool(0.5).then(|| rng.random_range(1..3)),
            ..Limits::default()
        },
        false => Limits::default(),
    }
}

fn random_approvals(rng: &mut ChaCha8Rng) -> Vec<ApprovalStep> {
    let by = |named| if named { vec!["ann".to_owned(), "bob".to_owned()] } else { vec![] };
    let step = |wave| rng.random_bool(0.2).then(|| ApprovalStep { wave, by: by(rng.random()) });
    (1..=3).filter_map(step).collect()
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spec = serde_json::to_string_pretty(&self.spec).map_err(|_| fmt::Error)?;
        writeln!(f, "{spec}\n{SEPARATOR}")?;
        self.operations.iter().try_for_each(|operation| writeln!(f, "{operation}"))
    }
}

impl FromStr for Scenario {
    type Err = ParseScenarioError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut spec = String::new();
        let mut operations = Vec::new();
        let mut separated = false;
        for (index, line) in text.lines().enumerate() {
            let line = line.trim_end();
            if line.trim_start().starts_with('#') || (separated && line.is_empty()) {
                continue;
            }
            match separated {
                false if line == SEPARATOR => separated = true,
                false => {
                    spec.push_str(line);
                    spec.push('\n');
                }
                true => {
                    operations.push(line.parse().map_err(|source| {
                        ParseScenarioError::Operation { line: index + 1, source }
                    })?)
                }
            }
        }
        if !separated {
            return Err(ParseScenarioError::Separator);
        }
        let spec = serde_json::from_str(&spec).map_err(ParseScenarioError::Spec)?;
        Ok(Self { spec, operations })
    }
}
