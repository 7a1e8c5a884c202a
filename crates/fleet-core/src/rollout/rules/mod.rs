//! What may hold a rollout's devices up: one module per family of rules.
//!
//! [`Rules::hold`] is the one place that asks them. A rule answers with a [`Hold`] that says in
//! words what is waited for, and until when where that is known; it changes nothing.

pub(super) mod absence;
pub(super) mod approval;
mod device;
mod limits;
mod schedule;

use jiff::Timestamp;
use slmops_api::rollout::RolloutPolicy;
use slmops_api::rules::DeviceRules;

use super::assign::{policy_rules, site_rules};
use super::{RolloutError, RolloutRecord};
use crate::world::{FleetDevice, World};

/// Something that is waited for before a device is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hold {
    /// What, in words.
    pub why: String,
    /// When it is over by itself.
    pub until: Option<Timestamp>,
}

/// The rules of one rollout in one step, with what they count.
pub(super) struct Rules {
    slots: limits::Slots,
    of_devices: DeviceRules,
}

impl Rules {
    /// Counts what the rules count, once for a step.
    pub fn new(record: &RolloutRecord, world: &World<'_>) -> Self {
        Self {
            slots: limits::Slots::count(record, world),
            of_devices: policy_rules(&record.rollout.asked.policy)
                .and(&site_rules(&record.rollout.asked.policy.limits)),
        }
    }

    /// What holds every device of the current wave up, whichever it is.
    pub fn hold_wave(record: &RolloutRecord, world: &World<'_>) -> Vec<Hold> {
        let mut holds = schedule::hold(&record.rollout.asked.policy.schedule, world.now);
        holds.extend(approval::hold(&record.rollout));
        holds
    }

    /// What holds this device of the current wave up.
    pub fn hold(&self, device: &FleetDevice) -> Option<Hold> {
        device::hold(&self.of_devices, device).or_else(|| self.slots.hold(device))
    }

    /// Notes that a device is told.
    pub fn told(&mut self, device: &FleetDevice) {
        self.slots.take(device, true);
    }
}

/// Refuses rules that are out of bounds.
pub(super) fn validate(policy: &RolloutPolicy) -> Result<(), RolloutError> {
    schedule::validate(&policy.schedule)?;
    device::validate(policy)?;
    limits::validate(&policy.limits)?;
    approval::validate(&policy.approvals)?;
    absence::validate(&policy.stragglers)
}

fn refuse(why: impl Into<String>) -> Result<(), RolloutError> {
    Err(RolloutError::Policy(why.into()))
}
