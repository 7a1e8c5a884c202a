//! Rollouts as a pure function of what is known.
//!
//! [`create`] makes one, [`command`] is an operator's hand, and [`plan`] moves every active rollout
//! as far as the evidence allows and says what each device should be. Each of them takes the world
//! and the time and returns what to persist; calling [`plan`] again with its own result changes
//! nothing. Start reading at [`plan`], then `step.rs`.

mod assign;
mod create;
mod forecast;
mod gate;
mod operate;
mod rules;
mod step;
mod words;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use slmops_api::device::{DesiredModel, DesiredState};
use slmops_api::rollout::{Decision, Rollout, RolloutState};
use slmops_api::{ChannelName, ClassName, DeviceId, RolloutId};
use slmops_artifact::Digest;

pub use assign::check_pin;
pub use create::{Created, MAX_WAVES, create, promote, validate};
pub use forecast::{Pace, forecast, foresee};
pub use gate::Comparison;
pub use operate::{Command, command};
pub use words::{failure_words, phase_words, why};

use crate::world::World;

/// A rollout and what is remembered for taking it back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RolloutRecord {
    /// The rollout as everyone sees it.
    pub rollout: Rollout,
    /// What each device that was told ran before.
    #[serde(default)]
    pub before: BTreeMap<DeviceId, Option<DesiredModel>>,
    /// Devices whose failure an operator has seen and set aside by resuming.
    #[serde(default)]
    pub forgiven: BTreeSet<DeviceId>,
    /// Whom the gate of the current wave compares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comparison: Option<Comparison>,
}

/// A device and what it should be from now on.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// Which device.
    pub device: DeviceId,
    /// Its new desired state; its generation is greater than the one before.
    pub desired: Arc<DesiredState>,
}

/// Everything that changes at once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Rollouts that changed.
    pub rollouts: Vec<RolloutRecord>,
    /// Devices that are told something new.
    pub assignments: Vec<Assignment>,
    /// Manifests that are no longer offered to a class.
    pub quarantined: Vec<(Digest, ClassName)>,
    /// When to look again even if nothing is heard before.
    pub deadline: Option<Timestamp>,
}

/// What a device is to be because of a rollout, before it is compared with what it is told now.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Target {
    /// This variant of a release.
    Model {
        /// The variant.
        model: DesiredModel,
        /// Seconds to confirm.
        confirm_timeout_s: u32,
        /// Why.
        reason: String,
    },
    /// What it was before; nothing if it was nothing.
    Before {
        /// The model.
        model: Option<DesiredModel>,
        /// Why.
        reason: String,
    },
}

/// Targets by device.
pub type Targets = BTreeMap<DeviceId, TargetState>;

/// A target made by [`command`] for [`plan`] to carry out.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetState(pub(crate) Target);

/// Why a rollout cannot be made or changed as asked.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum RolloutError {
    /// The policy is out of bounds.
    #[error("rollout policy: {0}")]
    Policy(String),
    /// The release is not registered.
    #[error("release {0} is not registered")]
    NoRelease(String),
    /// Another rollout is under way on some of the same devices.
    #[error("rollout {other} of {release} is {state} on {devices}")]
    Overlap {
        /// The other rollout.
        other: RolloutId,
        /// Its release.
        release: String,
        /// Its state.
        state: &'static str,
        /// The devices they share.
        devices: String,
    },
    /// An approval that is not needed, or not by this operator.
    #[error("rollout {id}: {why}")]
    Approval {
        /// The rollout.
        id: RolloutId,
        /// Why it is refused.
        why: String,
    },
    /// A release was not confirmed on the channel before.
    #[error("{release} was not confirmed on channel {before}, so it cannot come to {channel}")]
    Promotion {
        /// The release.
        release: String,
        /// The channel it was to come to.
        channel: ChannelName,
        /// The channel before.
        before: ChannelName,
    },
    /// A device cannot be held to a release.
    #[error("{device} cannot be pinned to {release}: {why}")]
    Pin {
        /// The device's name.
        device: String,
        /// The release.
        release: String,
        /// Why.
        why: String,
        /// The next step.
        hint: String,
    },
    /// The rollout's state does not allow it.
    #[error("rollout {id} is {state}: it cannot be {wanted}")]
    State {
        /// The rollout.
        id: RolloutId,
        /// Its state.
        state: &'static str,
        /// What was asked, such as `paused`.
        wanted: &'static str,
    },
}

impl RolloutError {
    /// The next step.
    pub fn hint(&self) -> String {
        match self {
            Self::Policy(_) => "see `slm rollout start --help`".to_owned(),
            Self::NoRelease(_) => "`slm release list` shows what is registered".to_owned(),
            Self::Overlap { other, .. } => format!(
                "wait for it (`slm rollout watch {other}`), end it (`slm rollout abort {other}`), or choose other devices"
            ),
            Self::Approval { id, .. } => {
                format!("`slm rollout status {id}` shows what it waits for")
            }
            Self::Promotion { before, .. } => format!(
                "promote it to {before} first and let that rollout complete, or say why not: `--force --reason …`"
            ),
            Self::Pin { hint, .. } => hint.clone(),
            Self::State { id, .. } => format!("`slm rollout why {id}` tells how it came to that"),
        }
    }
}

/// A state in words.
pub fn state_name(state: RolloutState) -> &'static str {
    match state {
        RolloutState::Running => "running",
        RolloutState::Paused => "paused",
        RolloutState::Halted => "halted",
        RolloutState::Completed => "completed",
        RolloutState::Aborted => "aborted",
        RolloutState::RolledBack => "rolled back",
    }
}

/// Moves every rollout in `records` as far as the evidence allows, and says what each device should
/// be. `records` are those that are not final and those that [`create`] or [`command`] just made;
/// `targets` comes from [`command`].
pub fn plan(world: &World<'_>, records: &[RolloutRecord], targets: Targets) -> Plan {
    let mut after = records.to_vec();
    let moved = advance(world, &mut after, targets, Look::Everything);
    let mut rollouts = Vec::new();
    for (index, (mut record, before)) in after.into_iter().zip(records).enumerate() {
        record.rollout.updated_at = before.rollout.updated_at;
        if record != *before {
            debug_assert!(moved.changed.contains(&index), "a change went unnoticed");
            record.rollout.updated_at = world.now;
            rollouts.push(record);
        }
    }
    Plan {
        rollouts,
        assignments: moved.assignments,
        quarantined: moved.quarantined,
        deadline: moved.deadline,
    }
}

/// What [`replan`] or [`plan_in_place`] decided; the rollouts themselves were changed where they are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moved {
    /// Indexes of the rollouts that changed.
    pub changed: Vec<usize>,
    /// Devices that are told something new.
    pub assignments: Vec<Assignment>,
    /// Manifests that are no longer offered to a class.
    pub quarantined: Vec<(Digest, ClassName)>,
    /// When to look again even if nothing is heard before.
    pub deadline: Option<Timestamp>,
}

/// [`plan`] that changes `records` where they are instead of copying them.
pub fn plan_in_place(world: &World<'_>, records: &mut [RolloutRecord], targets: Targets) -> Moved {
    advance(world, records, targets, Look::Everything)
}

/// [`plan`] for a large fleet of which little has changed: it looks at the devices in `changed`
/// alone, and changes `records` in place instead of copying them.
///
/// The records must be as an earlier plan left them, and since then nothing else may have changed
/// than the reports, facts and labels of the devices in `changed` (new and removed ones included)
/// and the time. After anything else (a new release, class or blueprint, a quarantine, a rollout
/// that ended) [`plan`] is needed once.
pub fn replan(
    world: &World<'_>,
    records: &mut [RolloutRecord],
    changed: &BTreeSet<DeviceId>,
) -> Moved {
    advance(world, records, Targets::new(), Look::At(changed))
}

/// Which devices may have changed since the plan before.
#[derive(Clone, Copy)]
pub(crate) enum Look<'a> {
    Everything,
    At(&'a BTreeSet<DeviceId>),
}

impl Look<'_> {
    fn is_at(self, device: &DeviceId) -> bool {
        match self {
            Self::Everything => true,
            Self::At(devices) => devices.contains(device),
        }
    }
}

fn advance(
    world: &World<'_>,
    records: &mut [RolloutRecord],
    mut targets: Targets,
    look: Look<'_>,
) -> Moved {
    let mut moved = Moved::default();
    // Which rollout each device is in; of the devices that are looked at.
    let mut members: BTreeMap<DeviceId, RolloutId> = BTreeMap::new();
    for record in records.iter().filter(|record| !record.rollout.state.is_final()) {
        for part in record.rollout.devices.iter().filter(|part| look.is_at(&part.device)) {
            members.entry(part.device.clone()).or_insert_with(|| record.rollout.id.clone());
        }
    }
    for (index, record) in records.iter_mut().enumerate() {
        let outcome = step::step(record, world, look, &mut members);
        targets.extend(outcome.targets.into_iter().map(|(id, target)| (id, TargetState(target))));
        for pair in outcome.quarantined {
            if !moved.quarantined.contains(&pair) {
                moved.quarantined.push(pair);
            }
        }
        moved.deadline = earlier(moved.deadline, outcome.deadline);
        if outcome.changed {
            record.rollout.updated_at = world.now;
            moved.changed.push(index);
        }
    }
    moved.assignments = assign::assign(world, records, &targets, look);
    moved
}

fn earlier(a: Option<Timestamp>, b: Option<Timestamp>) -> Option<Timestamp> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}

pub(crate) fn decide(record: &mut Rollout, at: Timestamp, what: String, because: Vec<String>) {
    record.decisions.push(Decision { at, what, because });
}
