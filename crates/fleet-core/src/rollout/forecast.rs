//! What a rollout would do, by the very functions that would do it: nothing of it is kept.

use std::collections::{BTreeMap, BTreeSet};

use slmops_api::device::Phase;
use slmops_api::plan::{LeftOut, PlannedDevice, PlannedWave, RolloutPlan};
use slmops_api::rollout::{NewRollout, Outcome, Rollout, RolloutDevice, RolloutPolicy};
use slmops_api::{ClassName, DeviceId, RolloutId};

use super::create::{create, leave_out, selected};
use super::rules::{absence, approval};
use super::{RolloutError, RolloutRecord, Targets, plan};
use crate::room::{Room, room_on};
use crate::words::{clock, count, list, seconds};
use crate::world::{FleetDevice, World};

/// How many devices a note names.
const NAMED_DEVICES: usize = 3;

/// How fast devices took releases: seconds for a byte of the model, from told to confirmed.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    devices: BTreeMap<DeviceId, f64>,
    classes: BTreeMap<ClassName, f64>,
    fleet: Option<f64>,
}

impl Pace {
    /// Reads it out of rollouts, the newest first; the newest counts for a device, the median for
    /// a class and for the fleet.
    pub fn measure<'r>(world: &World<'_>, rollouts: impl IntoIterator<Item = &'r Rollout>) -> Self {
        let mut pace = Self::default();
        let mut classes: BTreeMap<ClassName, Vec<f64>> = BTreeMap::new();
        let mut all = Vec::new();
        for rollout in rollouts {
            let asked = &rollout.asked;
            let Some(release) = world.release(&asked.model, &asked.version) else { continue };
            for part in rollout.devices.iter().filter(|it| it.outcome == Outcome::Confirmed) {
                let (Some(manifest), Some(told), Some(confirmed)) =
                    (part.manifest, part.started_at, part.finished_at)
                else {
                    continue;
                };
                let Some(variant) = release.variants.iter().find(|v| v.manifest == manifest) else {
                    continue;
                };
                let took = confirmed.duration_since(told).as_secs_f64();
                // One that had it already confirmed at once, which shows nothing.
                if took <= 0.0 {
                    continue;
                }
                let rate = took / variant.size_bytes.max(1) as f64;
                let Some(device) = world.device(&part.device) else { continue };
                pace.devices.entry(device.id.clone()).or_insert(rate);
                classes.entry(device.class.clone()).or_default().push(rate);
                all.push(rate);
            }
        }
        pace.fleet = median(&mut all);
        for (class, mut rates) in classes {
            pace.classes.extend(median(&mut rates).map(|rate| (class, rate)));
        }
        pace
    }

    /// Seconds that a device takes for so many bytes, if anything is known.
    fn seconds(&self, device: &FleetDevice, size_bytes: u64) -> Option<u64> {
        let own = self.devices.get(&device.id).or_else(|| self.classes.get(&device.class));
        let rate = own.copied().or(self.fleet)?;
        Some((rate * size_bytes as f64).ceil() as u64)
    }
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// What [`create`] and [`plan`] would make of `asked`. `active` are all rollouts that are not final.
///
/// # Errors
/// As [`create`].
pub fn forecast(
    asked: NewRollout,
    by: &str,
    world: &World<'_>,
    active: &[RolloutRecord],
    pace: &Pace,
) -> Result<RolloutPlan, RolloutError> {
    let id: RolloutId = "forecast".parse().expect("a constant name is an id");
    let created = create(id.clone(), asked, by, world, active)?;
    let supersedes: BTreeSet<RolloutId> =
        created.superseded.iter().map(|record| record.rollout.id.clone()).collect();
    let mut records: Vec<RolloutRecord> =
        active.iter().filter(|record| !supersedes.contains(&record.rollout.id)).cloned().collect();
    records.extend(created.superseded);
    records.push(created.record);
    let mut told = told(&id, world, &records, created.targets, pace);
    told.rollout = None;
    told.waiting_for = String::new();
    told.supersedes = supersedes.into_iter().collect();
    let gate = told.asked.policy.gate.is_some();
    told.notes.extend(gate.then(|| {
        "chance decides who goes first, for the gate's sake: the draw will be another one"
            .to_owned()
    }));
    Ok(told)
}

/// What an active rollout of `active` will do from now on. None if it is not among them.
pub fn foresee(
    id: &RolloutId,
    world: &World<'_>,
    active: &[RolloutRecord],
    pace: &Pace,
) -> Option<RolloutPlan> {
    let exists = active.iter().any(|record| record.rollout.id == *id);
    exists.then(|| told(id, world, active, Targets::new(), pace))
}

/// The plan's words about the rollout `id` of `records`, after its next step.
fn told(
    id: &RolloutId,
    world: &World<'_>,
    records: &[RolloutRecord],
    targets: Targets,
    pace: &Pace,
) -> RolloutPlan {
    let changed = plan(world, records, targets).rollouts;
    let of =
        |records: &[RolloutRecord]| records.iter().find(|record| record.rollout.id == *id).cloned();
    let record = of(&changed).or_else(|| of(records)).expect("the caller put it among them");
    let rollout = &record.rollout;
    let policy = &rollout.asked.policy;
    let first = if rollout.state.is_final() { rollout.waves } else { rollout.current_wave };
    // A rollout whose devices all have the release is over at once, and still worth showing.
    let first = if first == rollout.waves { 0 } else { first };
    let waves: Vec<PlannedWave> =
        (first..rollout.waves).filter_map(|wave| planned(&record, wave, world, pace)).collect();
    let expected = |waves: &[PlannedWave]| waves.iter().map(|wave| wave.expected_s).sum();
    let coming = policy.schedule.freezes.iter().filter(|freeze| freeze.until > world.now);
    let mut notes: Vec<String> = coming
        .map(|freeze| {
            let (from, until) = (clock(freeze.from), clock(freeze.until));
            format!("no device is told from {from} to {until}")
        })
        .collect();
    let away = rollout
        .devices
        .iter()
        .filter(|part| is_open(part))
        .filter_map(|part| world.device(&part.device))
        .filter(|device| absence::is_away(device, policy, world))
        .count();
    if away > 0 {
        notes.push(format!(
            "{away} not heard of for {}: no wave waits for them",
            seconds(i64::from(policy.stragglers.away_after_s))
        ));
    }
    notes.extend(disks(&record, world));
    RolloutPlan {
        transfer_bytes: waves.iter().map(|wave| wave.transfer_bytes).sum(),
        expected_s: expected(&waves),
        waves,
        left_out: left_out(&record, records, world),
        supersedes: Vec::new(),
        waiting_for: rollout.waiting_for.clone(),
        notes,
        asked: rollout.asked.clone(),
        rollout: Some(id.clone()),
    }
}

/// Devices whose disks have no room for a second model, in words.
fn disks(record: &RolloutRecord, world: &World<'_>) -> Vec<String> {
    let asked = &record.rollout.asked;
    let Some(release) = world.release(&asked.model, &asked.version) else { return Vec::new() };
    let (mut replace, mut lack) = (Vec::new(), Vec::new());
    for part in record.rollout.devices.iter().filter(|part| is_open(part)) {
        let variant = release.variants.iter().find(|it| Some(it.manifest) == part.manifest);
        let (Some(device), Some(variant)) = (world.device(&part.device), variant) else { continue };
        let replaces = device.config.rules.replace;
        match room_on(device, world, variant.weights, variant.size_bytes, replaces) {
            Room::Enough => {}
            Room::Replaces => replace.push(device.name.as_str()),
            Room::Lacks { .. } => lack.push(device.name.as_str()),
        }
    }
    let mut notes = Vec::new();
    if !replace.is_empty() {
        notes.push(format!(
            "{} without room for two models ({}): each gives up the one that it has, and has none \
             until the new one is confirmed, or the old one is fetched again",
            count(replace.len(), "device"),
            list(&replace, NAMED_DEVICES)
        ));
    }
    if !lack.is_empty() {
        notes.push(format!(
            "{} without room for two models ({}): each waits for space, unless \
             policy.replace_in_place lets it give up the one that it has",
            count(lack.len(), "device"),
            list(&lack, NAMED_DEVICES)
        ));
    }
    notes
}

fn is_open(part: &RolloutDevice) -> bool {
    matches!(part.outcome, Outcome::Pending | Outcome::Updating | Outcome::Away)
}

fn gets_nothing(part: &RolloutDevice) -> bool {
    matches!(part.outcome, Outcome::NoFit { .. } | Outcome::Quarantined)
}

fn planned(
    record: &RolloutRecord,
    wave: u32,
    world: &World<'_>,
    pace: &Pace,
) -> Option<PlannedWave> {
    let policy = &record.rollout.asked.policy;
    let parts = record.rollout.devices.iter().filter(|part| part.wave == wave);
    let parts = parts.filter(|part| !gets_nothing(part));
    let devices: Vec<PlannedDevice> = parts
        .filter_map(|part| {
            Some(planned_device(record, part, world.device(&part.device)?, world, pace))
        })
        .collect();
    if devices.is_empty() {
        return None;
    }
    let mut waits: Vec<String> = approval::wanted(&record.rollout, wave + 1).into_iter().collect();
    if wave == record.rollout.current_wave {
        let start_at = policy.schedule.start_at.filter(|at| *at > world.now);
        waits.extend(start_at.map(|at| format!("its start at {}", clock(at))));
    }
    if let Some(gate) = policy.gate.as_ref().filter(|_| wave > 0) {
        let patience = gate.patience_s.map(|s| format!(", {} at most", seconds(i64::from(s))));
        waits.push(format!(
            "the gate of wave {wave}, as long as it takes{}",
            patience.unwrap_or_default()
        ));
    }
    let transfer_bytes = devices.iter().map(|device| device.transfer_bytes).sum();
    let expected_s = wave_seconds(&devices, policy).map(|s| s + u64::from(policy.bake_s));
    Some(PlannedWave { wave: wave + 1, devices, transfer_bytes, expected_s, waits })
}

fn planned_device(
    record: &RolloutRecord,
    part: &RolloutDevice,
    device: &FleetDevice,
    world: &World<'_>,
    pace: &Pace,
) -> PlannedDevice {
    let asked = &record.rollout.asked;
    let variant = world.release(&asked.model, &asked.version).and_then(|release| {
        release.variants.iter().find(|variant| Some(variant.manifest) == part.manifest)
    });
    let report = device.report.as_ref();
    let has = report.is_some_and(|report| {
        let models = [&report.running, &report.previous];
        let mut files = models.into_iter().flatten().map(|model| model.weights);
        variant.is_some_and(|variant| files.any(|file| file == variant.weights))
    });
    let adapter = variant.and_then(|variant| variant.adapter);
    let adapter_bytes = adapter.map_or(0, |adapter| adapter.size_bytes);
    let weights_bytes = variant.filter(|_| !has).map_or(0, |variant| variant.size_bytes);
    let size_bytes = weights_bytes.saturating_add(adapter_bytes);
    let transfer_bytes = match report.map(|report| &report.phase) {
        _ if !is_open(part) => 0,
        Some(
            Phase::Downloaded
            | Phase::Verified
            | Phase::Prestaged { .. }
            | Phase::Staged
            | Phase::Activated,
        ) if part.outcome == Outcome::Updating => 0,
        Some(Phase::Downloading { done_bytes, .. }) if part.outcome == Outcome::Updating => {
            size_bytes.saturating_sub(*done_bytes)
        }
        _ => size_bytes,
    };
    let expected_s = match part.outcome {
        // It takes the release whenever it returns; no wave waits for that.
        Outcome::Away => Some(0),
        _ if absence::is_away(device, &asked.policy, world) => Some(0),
        _ if transfer_bytes == 0 => Some(0),
        _ => pace.seconds(device, transfer_bytes),
    };
    PlannedDevice {
        device: device.id.clone(),
        name: device.name.clone(),
        class: device.class.clone(),
        site: device.labels.get("site").and_then(|site| site.parse().ok()),
        variant: part.variant.clone(),
        fit: part.fit.clone(),
        outcome: part.outcome.clone(),
        transfer_bytes,
        expected_s,
    }
}

/// Seconds of a wave: its slowest device, or as many rounds as the limits make of it.
fn wave_seconds(devices: &[PlannedDevice], policy: &RolloutPolicy) -> Option<u64> {
    let mut longest = 0;
    let mut sum = 0;
    let mut sites: BTreeMap<&str, u64> = BTreeMap::new();
    for device in devices {
        let seconds = device.expected_s?;
        longest = longest.max(seconds);
        sum += seconds;
        if let Some(site) = &device.site {
            *sites.entry(site.as_str()).or_default() += seconds;
        }
    }
    let rounds = |sum: u64, limit: Option<u32>| {
        limit.map_or(0, |at_once| sum.div_ceil(u64::from(at_once.max(1))))
    };
    let busiest = sites.values().copied().max().unwrap_or(0);
    let limits = &policy.limits;
    let limited = rounds(sum, limits.updating).max(rounds(busiest, limits.updating_per_site));
    Some(longest.max(limited))
}

/// Every selected device that gets nothing, and why.
fn left_out(record: &RolloutRecord, records: &[RolloutRecord], world: &World<'_>) -> Vec<LeftOut> {
    let rollout = &record.rollout;
    let mut members: BTreeMap<&DeviceId, &RolloutDevice> = BTreeMap::new();
    members.extend(rollout.devices.iter().map(|part| (&part.device, part)));
    let mut others: BTreeMap<&DeviceId, &RolloutId> = BTreeMap::new();
    let active = records.iter().map(|record| &record.rollout).filter(|it| !it.state.is_final());
    for other in active.filter(|other| other.id != rollout.id) {
        others.extend(other.devices.iter().map(|part| (&part.device, &other.id)));
    }
    let asked = &rollout.asked;
    let release = world.release(&asked.model, &asked.version);
    let mut left_out = Vec::new();
    for device in selected(world, &rollout.asked) {
        let why = match members.get(&device.id) {
            Some(part) if gets_nothing(part) => Some(part.fit.clone()),
            Some(_) => None,
            None => release
                .and_then(|release| leave_out(device, &rollout.asked, release))
                .or_else(|| others.get(&device.id).map(|id| format!("it is in rollout {id}"))),
        };
        left_out.extend(why.map(|why| LeftOut {
            device: device.id.clone(),
            name: device.name.clone(),
            why,
        }));
    }
    left_out
}
