//! What a simulation has found.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use slmops_api::rollout::{Decision, Outcome, RolloutDevice, RolloutState};
use slmops_api::{ClassName, SiteName};
use slmops_fleet_core::rollout::{failure_words, state_name};

use crate::catalog::Catalog;
use crate::hub::{Hub, number_of};
use crate::spec::{FleetSpec, GroupSpec};
use crate::time::Time;

/// What a simulation has found. Every number in it is modelled, not measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The seed of the run.
    pub seed: u64,
    /// Devices.
    pub devices: u32,
    /// Virtual hours.
    pub hours: u32,
    /// The rollouts, in the order of the specification.
    pub rollouts: Vec<RolloutReport>,
    /// Bytes of models that devices pulled from the hub.
    pub bytes_moved: u64,
    /// Bytes that they got from each other.
    #[serde(default)]
    pub shared_bytes: u64,
    /// Invariants that did not hold. Anything here is a bug of ours.
    pub violations: Vec<Violation>,
    /// When the fleet had come to rest, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled_at: Option<Time>,
    /// Events that the run consisted of.
    pub events: u64,
    /// Plans that the hub made.
    pub plans: u64,
}

/// What became of one rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RolloutReport {
    /// The release.
    pub version: semver::Version,
    /// Its state; absent if it was never created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<RolloutState>,
    /// What it waits for, in words; empty when it is over.
    pub waiting_for: String,
    /// Why the hub refused to create it when it was last asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// Devices that it was for.
    pub devices: u32,
    /// How they stand at the end, by outcome in a word.
    pub outcomes: BTreeMap<String, u32>,
    /// Why devices failed, in words, and how many did for that reason.
    #[serde(default)]
    pub failures: BTreeMap<String, u32>,
    /// When it was completed, halted, aborted or taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Time>,
    /// Its waves, in order.
    #[serde(default)]
    pub waves: Vec<WaveReport>,
    /// How it went in each group of the specification.
    #[serde(default)]
    pub groups: Vec<GroupReport>,
    /// When the first device had confirmed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_confirmed_at: Option<Time>,
    /// When the last device so far had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_confirmed_at: Option<Time>,
    /// Bytes of it that devices pulled.
    pub bytes_moved: u64,
    /// Devices on which it is confirmed, over time.
    pub series: Vec<Point>,
    /// Every decision with its evidence, oldest first.
    pub decisions: Vec<Decision>,
}

/// How one wave went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaveReport {
    /// Devices in it.
    pub devices: u32,
    /// When its first device was told; absent if none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When its last device had an outcome; absent if one has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Time>,
}

/// How a rollout went in one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupReport {
    /// The class of its devices.
    pub class: ClassName,
    /// Their site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<SiteName>,
    /// Those that the rollout is for.
    pub devices: u32,
    /// How they stand at the end, by outcome in a word.
    pub outcomes: BTreeMap<String, u32>,
    /// When the hub knew that half of them had confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub half_confirmed_at: Option<Time>,
    /// When it knew of the last one so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_confirmed_at: Option<Time>,
    /// Bytes of the release that they pulled.
    pub bytes_moved: u64,
}

/// One point of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// When.
    pub at: Time,
    /// Devices on which the release is confirmed.
    pub confirmed: u32,
}

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// When.
    pub at: Time,
    /// Which, in words.
    pub what: String,
}

impl Report {
    /// Rollouts that were halted and stand so.
    pub fn halts(&self) -> impl Iterator<Item = &RolloutReport> {
        self.rollouts.iter().filter(|rollout| rollout.state == Some(RolloutState::Halted))
    }
}

impl RolloutReport {
    /// Its state in words.
    pub fn state_words(&self) -> &str {
        match (self.state, &self.refused) {
            (Some(state), _) => state_name(state),
            (None, Some(_)) => "refused",
            (None, None) => "not created",
        }
    }

    /// Devices on which it is confirmed at the end.
    pub fn confirmed(&self) -> u32 {
        self.series.last().map_or(0, |point| point.confirmed)
    }
}

/// What is gathered while a simulation runs.
pub(crate) struct Collected {
    rollouts: Vec<Gathered>,
    bytes_moved: u64,
    shared_bytes: u64,
    settled_at: Option<Time>,
}

#[derive(Clone)]
struct Gathered {
    confirmed: u32,
    first: Option<Time>,
    last: Option<Time>,
    /// By group.
    bytes_moved: Vec<u64>,
    series: Vec<Point>,
    refused: Option<String>,
}

impl Collected {
    pub(crate) fn new(rollouts: usize, groups: usize) -> Self {
        let gathered = Gathered {
            confirmed: 0,
            first: None,
            last: None,
            bytes_moved: vec![0; groups],
            series: Vec::new(),
            refused: None,
        };
        Self {
            rollouts: vec![gathered; rollouts],
            bytes_moved: 0,
            shared_bytes: 0,
            settled_at: None,
        }
    }

    pub(crate) fn sample(&mut self, at: Time) {
        for it in &mut self.rollouts {
            it.series.push(Point { at, confirmed: it.confirmed });
        }
    }

    /// A device that had one release confirmed now has another. Releases count from the one that
    /// was there before.
    pub(crate) fn confirmed(&mut self, at: Time, before: Option<usize>, after: Option<usize>) {
        if before == after {
            return;
        }
        let rollout = |release: Option<usize>| release?.checked_sub(1);
        if let Some(before) = rollout(before) {
            self.rollouts[before].confirmed -= 1;
        }
        if let Some(after) = rollout(after) {
            let it = &mut self.rollouts[after];
            it.confirmed += 1;
            it.first.get_or_insert(at);
            it.last = Some(at);
        }
    }

    pub(crate) fn moved(&mut self, release: usize, group: usize, bytes: u64) {
        self.bytes_moved += bytes;
        if let Some(rollout) = release.checked_sub(1) {
            self.rollouts[rollout].bytes_moved[group] += bytes;
        }
    }

    pub(crate) fn shared(&mut self, bytes: u64) {
        self.shared_bytes += bytes;
    }

    pub(crate) fn refused(&mut self, rollout: usize, why: Option<String>) {
        self.rollouts[rollout].refused = why;
    }

    pub(crate) fn settled(&mut self, at: Time) {
        self.settled_at = Some(at);
        self.sample(at);
    }

    pub(crate) fn report(
        self,
        spec: &FleetSpec,
        catalog: &Catalog,
        hub: &Hub,
        violations: Vec<Violation>,
        events: u64,
        plans: u64,
    ) -> Report {
        let rollouts = self.rollouts.into_iter().enumerate().map(|(index, gathered)| {
            let record = hub.rollout(index);
            let parts = record.map_or(&[][..], |record| &record.devices);
            let mut failures = BTreeMap::new();
            for part in parts {
                if let Outcome::Failed { failure } = &part.outcome {
                    *failures.entry(failure_words(failure)).or_insert(0) += 1;
                }
            }
            let over = |state| !matches!(state, RolloutState::Running | RolloutState::Paused);
            let last = record.filter(|it| over(it.state)).and_then(|it| it.decisions.last());
            RolloutReport {
                version: catalog.versions[index + 1].clone(),
                state: record.map(|record| record.state),
                waiting_for: record.map(|it| it.waiting_for.clone()).unwrap_or_default(),
                refused: gathered.refused,
                devices: parts.len() as u32,
                outcomes: tally(parts.iter()),
                failures,
                ended_at: last.map(|decision| Time::at(decision.at)),
                waves: waves(parts),
                groups: groups(spec, parts, &gathered.bytes_moved),
                first_confirmed_at: gathered.first,
                last_confirmed_at: gathered.last,
                bytes_moved: gathered.bytes_moved.iter().sum(),
                series: gathered.series,
                decisions: record.map(|it| it.decisions.clone()).unwrap_or_default(),
            }
        });
        Report {
            seed: spec.seed,
            devices: spec.devices(),
            hours: spec.hours,
            rollouts: rollouts.collect(),
            bytes_moved: self.bytes_moved,
            shared_bytes: self.shared_bytes,
            violations,
            settled_at: self.settled_at,
            events,
            plans,
        }
    }
}

fn tally<'a>(parts: impl Iterator<Item = &'a RolloutDevice>) -> BTreeMap<String, u32> {
    let mut outcomes = BTreeMap::new();
    for part in parts {
        *outcomes.entry(outcome_word(&part.outcome).to_owned()).or_insert(0) += 1;
    }
    outcomes
}

fn waves(parts: &[RolloutDevice]) -> Vec<WaveReport> {
    let last = parts.iter().map(|part| part.wave).max();
    let wave = |number: u32| {
        let of_wave = || parts.iter().filter(move |part| part.wave == number);
        let open =
            |part: &RolloutDevice| matches!(part.outcome, Outcome::Pending | Outcome::Updating);
        let ended_at = of_wave().filter_map(|part| part.finished_at).max();
        WaveReport {
            devices: of_wave().count() as u32,
            started_at: of_wave().filter_map(|part| part.started_at).min().map(Time::at),
            ended_at: ended_at.filter(|_| !of_wave().any(open)).map(Time::at),
        }
    };
    last.map_or_else(Vec::new, |last| (0..=last).map(wave).collect())
}

fn groups(spec: &FleetSpec, parts: &[RolloutDevice], bytes_moved: &[u64]) -> Vec<GroupReport> {
    let mut of_group: Vec<Vec<&RolloutDevice>> = vec![Vec::new(); spec.groups.len()];
    let ends: Vec<usize> = spec
        .groups
        .iter()
        .scan(0, |sum, group| {
            *sum += group.devices as usize;
            Some(*sum)
        })
        .collect();
    for part in parts {
        let number = number_of(&part.device);
        of_group[ends.partition_point(|end| *end <= number)].push(part);
    }
    let report = |((group, parts), bytes_moved): ((&GroupSpec, Vec<&RolloutDevice>), &u64)| {
        let confirmed = parts.iter().filter(|part| part.outcome == Outcome::Confirmed);
        let mut confirmed: Vec<_> = confirmed.filter_map(|part| part.finished_at).collect();
        confirmed.sort_unstable();
        let half = parts.len().div_ceil(2).checked_sub(1);
        GroupReport {
            class: group.class.clone(),
            site: group.site.clone(),
            devices: parts.len() as u32,
            outcomes: tally(parts.iter().copied()),
            half_confirmed_at: half.and_then(|half| confirmed.get(half)).copied().map(Time::at),
            last_confirmed_at: confirmed.last().copied().map(Time::at),
            bytes_moved: *bytes_moved,
        }
    };
    spec.groups.iter().zip(of_group).zip(bytes_moved).map(report).collect()
}

fn outcome_word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Pending => "pending",
        Outcome::Updating => "updating",
        Outcome::Confirmed => "confirmed",
        Outcome::Failed { .. } => "failed",
        Outcome::NoFit { .. } => "no fit",
        Outcome::Quarantined => "quarantined",
        Outcome::Away => "away",
        Outcome::Recalled => "recalled",
    }
}
