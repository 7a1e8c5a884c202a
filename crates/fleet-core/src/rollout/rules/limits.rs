//! How many devices update at once.

use std::collections::BTreeMap;

use slmops_api::device::Phase;
use slmops_api::rollout::{Limits, Outcome, RolloutDevice};

use super::super::assign::site_rules;
use super::{Hold, RolloutError, RolloutRecord, refuse};
use crate::words::count;
use crate::world::{FleetDevice, World};

/// The least rate that a device may be given: a slower one would look like a stalled download.
const MIN_RATE_BYTES_PER_S: u64 = 1_000;

/// Places that are taken by devices that update.
pub(super) struct Slots {
    limits: Limits,
    taken: u32,
    taken_by_site: BTreeMap<String, u32>,
    fetching_by_site: BTreeMap<String, u32>,
}

impl Slots {
    /// Counts the places taken in `record`.
    pub fn count(record: &RolloutRecord, world: &World<'_>) -> Self {
        let limits = record.rollout.asked.policy.limits.clone();
        let mut slots = Self {
            limits,
            taken: 0,
            taken_by_site: BTreeMap::new(),
            fetching_by_site: BTreeMap::new(),
        };
        if slots.limits == Limits::default() {
            return slots;
        }
        let updating =
            |part: &&slmops_api::rollout::RolloutDevice| part.outcome == Outcome::Updating;
        for part in record.rollout.devices.iter().filter(updating) {
            match world.device(&part.device) {
                Some(device) => slots.take(device, !has_fetched(part, device)),
                None => slots.taken += 1,
            }
        }
        slots
    }

    /// Takes a place; one of those that fetch as well, while it does.
    pub fn take(&mut self, device: &FleetDevice, fetches: bool) {
        self.taken += 1;
        let Some(site) = device.labels.get("site") else { return };
        if self.limits.updating_per_site.is_some() {
            *self.taken_by_site.entry(site.to_owned()).or_default() += 1;
        }
        if fetches && self.limits.site_bytes_per_s.is_some() {
            *self.fetching_by_site.entry(site.to_owned()).or_default() += 1;
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
        let fetching = self.fetching_by_site.get(site).copied().unwrap_or(0);
        let at_a_time =
            self.limits.site_bytes_per_s.map(|_| self.limits.site_downloads.unwrap_or(1));
        if let Some(limit) = reached(at_a_time, fetching) {
            let devices = count(limit as usize, "device");
            let why = format!(
                "one of {devices} of their site that may fetch at a time (limits.site_bytes_per_s)"
            );
            return Some(Hold { why, until: None });
        }
        let taken = self.taken_by_site.get(site).copied().unwrap_or(0);
        let limit = reached(self.limits.updating_per_site, taken)?;
        let devices = count(limit as usize, "device");
        let why = format!(
            "one of {devices} of their site that may update at once (limits.updating_per_site)"
        );
        Some(Hold { why, until: None })
    }
}

/// Whether the device says that it has all of what it is told on its disk.
fn has_fetched(part: &RolloutDevice, device: &FleetDevice) -> bool {
    let told = part.generation.unwrap_or(u64::MAX);
    let report = device.report.as_ref().filter(|report| report.generation >= told);
    report.is_some_and(|report| match &report.phase {
        Phase::Idle | Phase::Downloading { .. } | Phase::Downloaded | Phase::Waiting { .. } => {
            false
        }
        Phase::Verified
        | Phase::Prestaged { .. }
        | Phase::Staged
        | Phase::Activated
        | Phase::Confirmed
        | Phase::RolledBack { .. } => true,
    })
}

pub(super) fn validate(limits: &Limits) -> Result<(), RolloutError> {
    let share = site_rules(limits).max_rate_bytes_per_s;
    let rates = [("device_bytes_per_s", limits.device_bytes_per_s), ("site_bytes_per_s", share)];
    if let Some((name, _)) =
        rates.iter().find(|(_, rate)| rate.is_some_and(|it| it < MIN_RATE_BYTES_PER_S))
    {
        return refuse(format!(
            "limits.{name} gives a device less than {MIN_RATE_BYTES_PER_S} bytes per second"
        ));
    }
    if limits.site_downloads.is_some() && limits.site_bytes_per_s.is_none() {
        return refuse("limits.site_downloads goes with limits.site_bytes_per_s");
    }
    let named = [
        ("updating", limits.updating),
        ("updating_per_site", limits.updating_per_site),
        ("site_downloads", limits.site_downloads),
    ];
    match named.iter().find(|(_, limit)| *limit == Some(0)) {
        Some((name, _)) => refuse(format!("limits.{name} = 0 would let no device update")),
        None => Ok(()),
    }
}
