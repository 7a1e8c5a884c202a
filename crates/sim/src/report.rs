//! What a simulation has found.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use slmops_api::rollout::{Decision, Outcome, RolloutState};
use slmops_fleet_core::rollout::state_name;

use crate::catalog::Catalog;
use crate::hub::Hub;
use crate::spec::FleetSpec;
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
    /// Bytes of models that devices pulled.
    pub bytes_moved: u64,
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
    settled_at: Option<Time>,
}

#[derive(Clone, Default)]
struct Gathered {
    confirmed: u32,
    first: Option<Time>,
    last: Option<Time>,
    bytes_moved: u64,
    series: Vec<Point>,
    refused: Option<String>,
}

impl Collected {
    pub(crate) fn new(rollouts: usize) -> Self {
        Self { rollouts: vec![Gathered::default(); rollouts], bytes_moved: 0, settled_at: None }
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

    pub(crate) fn moved(&mut self, release: usize, bytes: u64) {
        self.bytes_moved += bytes;
        if let Some(rollout) = release.checked_sub(1) {
            self.rollouts[rollout].bytes_moved += bytes;
        }
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
            let mut outcomes = BTreeMap::new();
            for part in record.iter().flat_map(|record| &record.devices) {
                *outcomes.entry(outcome_word(&part.outcome).to_owned()).or_insert(0) += 1;
            }
            RolloutReport {
                version: catalog.versions[index + 1].clone(),
                state: record.map(|record| record.state),
                waiting_for: record.map(|it| it.waiting_for.clone()).unwrap_or_default(),
                refused: gathered.refused,
                devices: record.map_or(0, |record| record.devices.len() as u32),
                outcomes,
                first_confirmed_at: gathered.first,
                last_confirmed_at: gathered.last,
                bytes_moved: gathered.bytes_moved,
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
            violations,
            settled_at: self.settled_at,
            events,
            plans,
        }
    }
}

fn outcome_word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Pending => "pending",
        Outcome::Updating => "updating",
        Outcome::Confirmed => "confirmed",
        Outcome::Failed { .. } => "failed",
        Outcome::NoFit { .. } => "no fit",
        Outcome::Quarantined => "quarantined",
    }
}
