//! How many devices update at once.

use std::collections::BTreeMap;

use slmops_api::rollout::{Limits, Outcome};

use super::{Hold, RolloutError, RolloutRecord, refuse};
use crate::words::count;
use crate::world::{FleetDevice, World};

/// Places that are taken by devices that update.
pub(super) struct Slots {
    limits: Limits,
    taken: u32,
    taken_by_site: BTreeMap<String, u32>,
}

impl Slots {
    /// Counts the places taken in `record`.
    pub fn count(record: &RolloutRecord, world: &World<'_>) -> Self {
        let limits = record.rollout.asked.policy.limits.clone();
        let mut slots = Self { limits, taken: 0, taken_by_site: BTreeMap::new() };
        if slots.limits == Limits::default() {
            return slots;
        }
        let updating =
            |part: &&slmops_api::rollout::RolloutDevice| part.outcome == Outcome::Updating;
        for part in record.rollout.devices.iter().filter(updating) {
            match world.device(&part.device) {
                Some(device) => slots.take(device),
                None => slots.taken += 1,
            }
        }
        slots
    }

    /// Takes a place.
    pub fn take(&mut self, device: &FleetDevice) {
        self.taken += 1;
        if self.limits.updating_per_site.is_some()
            && let Some(site) = device.labels.get("site")
        {
            *self.taken_by_site.entry(site.clone()).or_default() += 1;
        }
    }

    /// Which limit is reached, if one is.
    pub fn hold(&self, device: &FleetDevice) -> Option<Hold> {
        let reached = |limit: Option<u32>, taken: u32| limit.filter(|limit| taken >= *limit);
        if let Some(limit) = reached(self.limits.updating, self.taken) {
            let devices = count(limit as usize, "device");
            let why = format!("one of {devices} that may update at once (limits.updating)");
            return Some(Hold { why, until: None });
        }
        let site = device.labels.get("site")?;
        let taken = self.taken_by_site.get(site).copied().unwrap_or(0);
        let limit = reached(self.limits.updating_per_site, taken)?;
        let devices = count(limit as usize, "device");
        let why = format!(
            "one of {devices} of their site that may update at once (limits.updating_per_site)"
        );
        Some(Hold { why, until: None })
    }
}

pub(super) fn validate(limits: &Limits) -> Result<(), RolloutError> {
    let named = [("updating", limits.updating), ("updating_per_site", limits.updating_per_site)];
    match named.iter().find(|(_, limit)| *limit == Some(0)) {
        Some((name, _)) => refuse(format!("limits.{name} = 0 would let no device update")),
        None => Ok(()),
    }
}
