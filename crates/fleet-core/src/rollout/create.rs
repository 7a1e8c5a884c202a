//! Making a rollout: which devices, in which waves.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use slmops_api::channel::{Channel, Promotion};
use slmops_api::model::NewRelease;
use slmops_api::orders::Pin;
use slmops_api::rollout::{
    NewRollout, Outcome, Rollout, RolloutDevice, RolloutPolicy, RolloutState, WavePer, WaveSize,
};
use slmops_api::{ChannelName, DeviceId, ModelName, RolloutId};
use slmops_artifact::Digest;

use super::{RolloutError, RolloutRecord, Targets, assign, decide, operate, rules, state_name};
use crate::blueprint::CONFIRM_TIMEOUT_S;
use crate::fit::{Fit, unmet};
use crate::words::{self, count, list};
use crate::world::{FleetDevice, World};

/// The most waves of one rollout.
pub const MAX_WAVES: usize = 100;
/// The longest bake, in seconds: 30 days.
pub const MAX_BAKE_S: u32 = 30 * 24 * 3600;
/// The chances, in thousandths, that a gate may halt without cause.
const GATE_ALPHA_PER_MILLE: std::ops::RangeInclusive<u32> = 1..=500;
/// The losses, in thousandths, that a gate may allow.
const GATE_LOSS: std::ops::RangeInclusive<u32> = 1..=10_000;
/// A device heard of within this many seconds makes a good canary.
const RECENT_S: i64 = 120;
/// Names listed in one line of evidence, at most.
const NAMES_SHOWN: usize = 8;

/// A new rollout, and the halted ones it takes the place of.
#[derive(Clone, Debug, PartialEq)]
pub struct Created {
    /// The new one; no device has been told yet.
    pub record: RolloutRecord,
    /// Halted rollouts of the same devices, now aborted.
    pub superseded: Vec<RolloutRecord>,
    /// Their devices that were on the way, told to keep what they had; for [`super::plan`].
    pub targets: Targets,
}

/// Makes a rollout. `active` are all rollouts that are not final.
///
/// # Errors
/// [`RolloutError`]: a policy out of bounds, an unknown release, or another rollout that is running
/// or paused on some of the same devices.
pub fn create(
    id: RolloutId,
    asked: NewRollout,
    created_by: &str,
    world: &World<'_>,
    active: &[RolloutRecord],
) -> Result<Created, RolloutError> {
    validate(&asked.policy)?;
    let title = format!("{} {}", asked.model, asked.version);
    let release = world
        .release(&asked.model, &asked.version)
        .ok_or_else(|| RolloutError::NoRelease(title.clone()))?;

    let mut left_out = Vec::new();
    let mut chosen: Vec<&FleetDevice> = Vec::new();
    for device in selected(world, &asked) {
        match leave_out(device, &asked, release) {
            Some(why) => left_out.push(format!("left out {}: {why}", device.name)),
            None => chosen.push(device),
        }
    }
    let (superseded, targets) = supersede(&id, &asked, &chosen, active, world)?;

    // With a gate, chance decides between devices alike: its evidence is that it was chance.
    let lot = |device: &FleetDevice| match asked.policy.gate {
        Some(_) => Digest::of(format!("{id} {}", device.id).as_bytes()).to_string(),
        None => device.name.clone(),
    };
    chosen.sort_by_cached_key(|device| (readiness(device, world.now), lot(device)));
    let mut devices: Vec<RolloutDevice> = Vec::with_capacity(chosen.len());
    for device in &chosen {
        let mut part = entry(device, release, world);
        part.unready = readiness(device, world.now) != (false, false);
        devices.push(part);
    }
    // Devices that get nothing take no place in a wave.
    let (mut going, mut staying): (Vec<_>, Vec<_>) =
        devices.into_iter().partition(|device| device.outcome == Outcome::Pending);
    let waves = number_waves(&mut going, &asked.policy, world);
    for device in &mut staying {
        device.wave = waves - 1;
    }

    let mut because: Vec<String> = asked.promotion.iter().map(promoted).collect();
    because.push(format!(
        "selector {} means {}; {} can get it",
        asked.policy.selector,
        count(chosen.len(), "device"),
        going.len()
    ));
    for wave in 0..waves {
        let names: Vec<String> = going
            .iter()
            .filter(|device| device.wave == wave)
            .map(|device| match &device.variant {
                Some(variant) => format!("{} ({variant})", device.name),
                None => device.name.clone(),
            })
            .collect();
        if !names.is_empty() {
            because.push(format!("wave {}: {}", wave + 1, list(&names, NAMES_SHOWN)));
        }
    }
    because.extend(uncovered(world, &going));
    for device in staying.iter().take(NAMES_SHOWN) {
        because.push(format!("{} keeps what it has: {}", device.name, device.fit));
    }
    left_out.truncate(NAMES_SHOWN);
    because.extend(left_out);

    let mut rollout = Rollout {
        id,
        asked,
        state: RolloutState::Running,
        current_wave: 0,
        waves,
        devices: going.into_iter().chain(staying).collect(),
        counts: vec![],
        decisions: vec![],
        waiting_for: "the first wave to start".to_owned(),
        gate: None,
        approvals: vec![],
        created_at: world.now,
        created_by: created_by.to_owned(),
        updated_at: world.now,
    };
    for other in &superseded {
        because.push(format!("takes the place of the halted rollout {}", other.rollout.id));
    }
    let what = format!("created for {title}, {}", count(waves as usize, "wave"));
    decide(&mut rollout, world.now, what, because);
    let record = RolloutRecord {
        rollout,
        before: BTreeMap::new(),
        forgiven: BTreeSet::new(),
        comparison: None,
    };
    Ok(Created { record, superseded, targets })
}

/// Checks a policy's bounds.
///
/// # Errors
/// [`RolloutError::Policy`].
pub fn validate(policy: &RolloutPolicy) -> Result<(), RolloutError> {
    let refuse = |text: String| Err(RolloutError::Policy(text));
    if policy.waves.len() > MAX_WAVES {
        return refuse(format!("{} waves are more than {MAX_WAVES}", policy.waves.len()));
    }
    for (index, wave) in policy.waves.iter().enumerate() {
        let good = match wave {
            WaveSize::Count(number) => *number >= 1,
            WaveSize::Percent(share) => (1..=100).contains(share),
            WaveSize::Rest => true,
        };
        if !good {
            return refuse(format!(
                "wave {} is {wave:?}: a count starts at 1, a percentage is 1 to 100",
                index + 1
            ));
        }
    }
    let (least, most) = CONFIRM_TIMEOUT_S;
    if !(least..=most).contains(&policy.confirm_timeout_s) {
        return refuse(format!(
            "confirm_timeout_s = {} is not within {least} to {most}",
            policy.confirm_timeout_s
        ));
    }
    if policy.bake_s > MAX_BAKE_S {
        return refuse(format!("bake_s = {} is more than {MAX_BAKE_S}", policy.bake_s));
    }
    if let Some(gate) = &policy.gate {
        if !GATE_ALPHA_PER_MILLE.contains(&gate.alpha_per_mille) {
            return refuse(format!(
                "alpha_per_mille = {} is not within 1 to 500",
                gate.alpha_per_mille
            ));
        }
        if let Some((metric, loss)) = gate.allow.iter().find(|(_, loss)| !GATE_LOSS.contains(*loss))
        {
            return refuse(format!("allowed loss {metric} = {loss} is not within 1 to 10000"));
        }
    }
    rules::validate(policy)
}

/// How the release came here, in words.
fn promoted(promotion: &Promotion) -> String {
    let Promotion { channel, from, forced } = promotion;
    match (from, forced) {
        (Some(from), None) => format!("promoted to channel {channel}: confirmed on {from}"),
        (Some(from), Some(reason)) => {
            format!("promoted to channel {channel} though not confirmed on {from}: {reason}")
        }
        (None, _) => format!("promoted to channel {channel}, the first"),
    }
}

/// Whether a release may come to a channel: it was confirmed on the one before, or `force` says why
/// it goes on all the same.
///
/// # Errors
/// [`RolloutError::NoRelease`] or [`RolloutError::Promotion`].
pub fn promote(
    world: &World<'_>,
    model: &ModelName,
    version: &semver::Version,
    channel: &Channel,
    force: Option<String>,
) -> Result<NewRollout, RolloutError> {
    let title = format!("{model} {version}");
    if world.release(model, version).is_none() {
        return Err(RolloutError::NoRelease(title));
    }
    let confirmed = |on: &ChannelName| {
        world.completed.iter().any(|rollout| {
            rollout.channel.as_ref() == Some(on)
                && rollout.model == *model
                && rollout.version == *version
        })
    };
    let forced = match &channel.after {
        Some(before) if !confirmed(before) => match force {
            Some(reason) => Some(reason),
            None => {
                return Err(RolloutError::Promotion {
                    release: title,
                    channel: channel.name.clone(),
                    before: before.clone(),
                });
            }
        },
        _ => None,
    };
    let promotion =
        Promotion { channel: channel.name.clone(), from: channel.after.clone(), forced };
    Ok(NewRollout {
        model: model.clone(),
        version: version.clone(),
        policy: channel.policy.clone(),
        promotion: Some(promotion),
    })
}

/// The devices that the selector means.
pub(super) fn selected<'w>(
    world: &World<'w>,
    asked: &NewRollout,
) -> impl Iterator<Item = &'w FleetDevice> {
    let asked = asked.clone();
    world.devices.iter().filter(move |device| is_selected(device, &asked))
}

/// Whether the selector means this device.
pub(super) fn is_selected(device: &FleetDevice, asked: &NewRollout) -> bool {
    let channel = asked.promotion.as_ref().map(|promotion| &promotion.channel);
    let follows = channel.is_none() || device.config.channel.as_ref() == channel;
    !device.revoked && follows && device.is_meant_by(&asked.policy.selector)
}

/// Why a selected device takes no part, if it does not.
pub(super) fn leave_out(
    device: &FleetDevice,
    asked: &NewRollout,
    release: &NewRelease,
) -> Option<String> {
    if let Some(why) = ordered_out(device, asked) {
        return Some(why);
    }
    if device.config.frozen {
        return Some("its blueprint freezes it (policy.frozen = true)".to_owned());
    }
    if let (Some(channel), None) = (&device.config.channel, &asked.promotion) {
        return Some(format!("it follows channel {channel} (`slm release promote`)"));
    }
    match &device.config.model {
        Some(model) if *model != asked.model => Some(format!("its blueprint names model {model}")),
        _ => unmet(release, &device.facts),
    }
}

/// What an operator decided about the device that keeps it out of this rollout.
pub(super) fn ordered_out(device: &FleetDevice, asked: &NewRollout) -> Option<String> {
    let elsewhere = |pin: &&Pin| !pin.names(&asked.model, &asked.version);
    let pinned = device.pin().filter(elsewhere).map(words::pin);
    pinned.or_else(|| device.exclusion().map(words::exclusion))
}

fn supersede(
    id: &RolloutId,
    asked: &NewRollout,
    chosen: &[&FleetDevice],
    active: &[RolloutRecord],
    world: &World<'_>,
) -> Result<(Vec<RolloutRecord>, Targets), RolloutError> {
    let (mut superseded, mut targets) = (Vec::new(), Targets::new());
    for other in active.iter().filter(|other| !other.rollout.state.is_final()) {
        let ours: BTreeSet<&DeviceId> = chosen.iter().map(|device| &device.id).collect();
        let shared: Vec<&str> = other
            .rollout
            .devices
            .iter()
            .filter(|device| ours.contains(&device.device))
            .map(|device| device.name.as_str())
            .collect();
        if shared.is_empty() {
            continue;
        }
        if other.rollout.state != RolloutState::Halted {
            return Err(RolloutError::Overlap {
                other: other.rollout.id.clone(),
                release: format!("{} {}", other.rollout.asked.model, other.rollout.asked.version),
                state: state_name(other.rollout.state),
                devices: list(&shared, NAMES_SHOWN),
            });
        }
        let mut other = other.clone();
        other.rollout.state = RolloutState::Aborted;
        other.rollout.waiting_for = String::new();
        other.rollout.updated_at = world.now;
        let because = vec![format!("rollout {id} is for {} too", list(&shared, NAMES_SHOWN))];
        decide(&mut other.rollout, world.now, format!("superseded by rollout {id}"), because);
        let before = (&other.rollout.asked.model, &other.rollout.asked.version);
        let again = before == (&asked.model, &asked.version);
        let mut recalled = operate::recall(&mut other, world);
        // Who is asked for the same release again is on its way already.
        recalled.retain(|device, _| !again || !ours.contains(device));
        targets.extend(recalled);
        superseded.push(other);
    }
    Ok((superseded, targets))
}

/// Healthy devices heard of lately come first, so that the canary can answer.
fn readiness(device: &FleetDevice, now: Timestamp) -> (bool, bool) {
    let silent_s = now.as_second() - device.last_seen.as_second();
    let healthy = device.report.as_ref().is_some_and(|report| {
        use slmops_api::device::Phase;
        matches!(report.phase, Phase::Confirmed | Phase::Idle)
            && report.generation >= device.desired.generation
    });
    (silent_s > RECENT_S, !healthy)
}

/// A device's part before it is told: pending, or why it gets nothing.
pub(super) fn entry(
    device: &FleetDevice,
    release: &NewRelease,
    world: &World<'_>,
) -> RolloutDevice {
    let (fit, _) = assign::fit_device(device, release);
    let mut entry = RolloutDevice {
        device: device.id.clone(),
        name: device.name.clone(),
        wave: 0,
        variant: None,
        manifest: None,
        generation: None,
        started_at: None,
        held: None,
        due_at: None,
        finished_at: None,
        outcome: Outcome::Pending,
        fit: fit.why().to_owned(),
        unready: false,
    };
    match fit {
        Fit::NoFit { smallest_bytes, budget_bytes, .. } => {
            entry.outcome = Outcome::NoFit { smallest_bytes, budget_bytes };
            entry.finished_at = Some(world.now);
        }
        Fit::Fits { variant, manifest, .. } => {
            if world.quarantined(device, &manifest) {
                entry.outcome = Outcome::Quarantined;
                entry.finished_at = Some(world.now);
                entry.fit = format!(
                    "{variant} ({}) failed {} before, so it is not offered again",
                    manifest.short(),
                    match device.rejected(&manifest) {
                        true => "on this device".to_owned(),
                        false => format!("in class {}", device.class),
                    }
                );
            }
            entry.variant = Some(variant);
            entry.manifest = Some(manifest);
        }
    }
    entry
}

/// What a device's wave is counted within; none is the whole fleet, or no site.
pub(super) fn group_of(device: &FleetDevice, per: WavePer) -> Option<String> {
    match per {
        WavePer::Fleet => None,
        WavePer::Class => Some(device.class.to_string()),
        WavePer::Site => device.labels.get("site").map(str::to_owned),
    }
}

/// Gives each device its wave, in the order of `going`, and sorts them by it. Returns how many waves
/// there are, which is at least one.
fn number_waves(going: &mut [RolloutDevice], policy: &RolloutPolicy, world: &World<'_>) -> u32 {
    let mut groups: BTreeMap<Option<String>, Vec<usize>> = BTreeMap::new();
    for (index, part) in going.iter().enumerate() {
        let group = world.device(&part.device).and_then(|device| group_of(device, policy.per));
        groups.entry(group).or_default().push(index);
    }
    let mut waves = 1;
    for members in groups.values() {
        let sizes = wave_sizes(&policy.waves, members.len());
        waves = waves.max(sizes.len() as u32);
        let numbers = sizes.iter().enumerate().flat_map(|(wave, size)| vec![wave as u32; *size]);
        for (index, wave) in members.iter().zip(numbers) {
            going[*index].wave = wave;
        }
    }
    going.sort_by_key(|part| part.wave);
    waves
}

/// How many devices each wave takes; none is empty, and what is left forms one more.
fn wave_sizes(waves: &[WaveSize], devices: usize) -> Vec<usize> {
    let mut sizes = Vec::new();
    let mut left = devices;
    for wave in waves.iter().chain([&WaveSize::Rest]) {
        let size = match wave {
            WaveSize::Count(number) => *number as usize,
            WaveSize::Percent(share) => (devices * *share as usize).div_ceil(100),
            WaveSize::Rest => left,
        };
        let size = size.min(left);
        if size > 0 {
            sizes.push(size);
        }
        left -= size;
    }
    sizes
}

/// The wave for a device that joins while the rollout runs: the last one if it takes whatever is
/// left, else one more after it.
pub(super) fn late_wave(policy: &RolloutPolicy, waves: u32) -> u32 {
    match policy.waves.get(waves.saturating_sub(1) as usize) {
        Some(WaveSize::Rest) | None => waves.saturating_sub(1),
        Some(_) => waves,
    }
}

/// Says which classes the canary wave does not speak for.
fn uncovered(world: &World<'_>, going: &[RolloutDevice]) -> Option<String> {
    let class_of = |device: &RolloutDevice| {
        world.device(&device.device).map(|device| device.class.as_str().to_owned())
    };
    let canary: BTreeSet<String> =
        going.iter().filter(|device| device.wave == 0).filter_map(class_of).collect();
    let others: BTreeSet<String> = going.iter().filter_map(class_of).collect();
    let missing: Vec<&String> = others.difference(&canary).collect();
    if missing.is_empty() || canary.is_empty() {
        return None;
    }
    Some(format!(
        "the first wave speaks for {} alone; not covered by it: {}",
        list(&canary.iter().collect::<Vec<_>>(), NAMES_SHOWN),
        list(&missing, NAMES_SHOWN)
    ))
}
