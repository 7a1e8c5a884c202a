//! Devices that are away: switched off, stored in a cupboard, out of reach for months.
//!
//! No wave waits for them. One that is away when its wave starts changes places with one of a later
//! wave that is there, so that a wave keeps its size; where nobody is left to change with, it is set
//! aside, and told when it comes back or when all others are done.

use std::collections::{BTreeMap, VecDeque};

use slmops_api::rollout::{Outcome, RolloutPolicy, Stragglers, WavePer};

use super::super::create::group_of;
use super::{RolloutError, RolloutRecord, refuse};
use crate::words::seconds;
use crate::world::{FleetDevice, World};

/// The longest `stragglers.away_after_s`: a year.
const MAX_AWAY_AFTER_S: u32 = 366 * 24 * 3600;

/// Whether nothing was heard of the device for too long.
pub(in super::super) fn is_away(
    device: &FleetDevice,
    policy: &RolloutPolicy,
    world: &World<'_>,
) -> bool {
    let away_after_s = i64::from(policy.stragglers.away_after_s);
    away_after_s > 0 && world.now.as_second() - device.last_seen.as_second() > away_after_s
}

/// Lets devices that came back in, and sets those of the current wave that are away aside.
/// Whether anything changed.
pub(in super::super) fn rearrange(record: &mut RolloutRecord, world: &World<'_>) -> bool {
    let policy = record.rollout.asked.policy.clone();
    let wave = record.rollout.current_wave;
    let parts = &mut record.rollout.devices;
    let mut changed = false;
    for part in parts.iter_mut() {
        let set_aside = part.outcome == Outcome::Away && part.generation.is_none();
        if set_aside && world.device(&part.device).is_some_and(|it| !is_away(it, &policy, world)) {
            part.outcome = Outcome::Pending;
            part.finished_at = None;
            part.wave = part.wave.max(wave);
            changed = true;
        }
    }
    let mut away = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let untold =
            matches!(part.outcome, Outcome::Pending | Outcome::Away) && part.generation.is_none();
        if part.wave == wave
            && untold
            && world.device(&part.device).is_some_and(|it| is_away(it, &policy, world))
        {
            away.push(index);
        }
    }
    if !away.is_empty() {
        let mut spare = spares(record, world, wave, policy.per);
        let parts = &mut record.rollout.devices;
        for index in away {
            let group = world.device(&parts[index].device).and_then(|it| group_of(it, policy.per));
            match spare.get_mut(&group).and_then(VecDeque::pop_front) {
                Some(other) => {
                    parts[index].wave = parts[other].wave;
                    parts[index].outcome = Outcome::Pending;
                    parts[index].finished_at = None;
                    parts[other].wave = wave;
                }
                None if parts[index].outcome == Outcome::Away => continue,
                None => {
                    parts[index].outcome = Outcome::Away;
                    parts[index].finished_at = Some(world.now);
                }
            }
            changed = true;
        }
    }
    if changed {
        record.rollout.devices.sort_by_key(|part| part.wave);
    }
    changed
}

/// Devices of later waves that are there, by what the waves are counted within.
fn spares(
    record: &RolloutRecord,
    world: &World<'_>,
    wave: u32,
    per: WavePer,
) -> BTreeMap<Option<String>, VecDeque<usize>> {
    let policy = &record.rollout.asked.policy;
    let mut spares: BTreeMap<Option<String>, VecDeque<usize>> = BTreeMap::new();
    for (index, part) in record.rollout.devices.iter().enumerate() {
        if part.wave <= wave || part.outcome != Outcome::Pending {
            continue;
        }
        let Some(device) = world.device(&part.device) else { continue };
        if !is_away(device, policy, world) {
            spares.entry(group_of(device, per)).or_default().push_back(index);
        }
    }
    spares
}

pub(super) fn validate(stragglers: &Stragglers) -> Result<(), RolloutError> {
    if stragglers.away_after_s > MAX_AWAY_AFTER_S {
        return refuse(format!(
            "stragglers.away_after_s = {} is more than {}",
            stragglers.away_after_s,
            seconds(i64::from(MAX_AWAY_AFTER_S))
        ));
    }
    Ok(())
}
