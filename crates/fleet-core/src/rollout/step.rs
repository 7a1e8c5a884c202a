//! One rollout's next step: read the evidence, halt or go on, start the devices of a wave.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use slmops_api::device::{DesiredModel, Failure, Phase, WaitCause};
use slmops_api::model::NewRelease;
use slmops_api::rollout::{
    Outcome, Rollout, RolloutDevice, RolloutPolicy, RolloutState, Stragglers, Unheard,
};
use slmops_api::rules::DeviceRules;
use slmops_api::{ClassName, DeviceId, RolloutId};
use slmops_artifact::Digest;

use super::create::{entry, is_selected, late_wave, leave_out, ordered_out, selected};
use super::gate::{self, Verdict};
use super::rules::{Hold, Rules, absence};
use super::words::{failure_evidence, failure_words, phase_words};
use super::{Look, RolloutRecord, Target, assign, decide, earlier};
use crate::fit::Fit;
use crate::words::{clock, count, list, seconds};
use crate::world::{FleetDevice, World};

/// A device that has not asked for so many seconds after it was told does not keep the gate from
/// weighing the others: devices that are there ask more often.
const SILENT_S: i64 = 300;
/// Devices that are told in one decision, at most: what a decision costs in memory, and for how long
/// it keeps the store from taking reports, does not grow with the wave.
pub(crate) const MAX_TOLD_AT_ONCE: usize = 10_000;
/// Names listed in one line, at most.
const NAMES_SHOWN: usize = 8;

#[derive(Default)]
pub(super) struct StepOutcome {
    pub targets: BTreeMap<DeviceId, Target>,
    pub quarantined: Vec<(Digest, ClassName)>,
    pub deadline: Option<Timestamp>,
    /// Whether the record is not what it was.
    pub changed: bool,
}

/// Moves `record` as far as the evidence allows. `members` says which rollout each device is in.
pub(super) fn step(
    record: &mut RolloutRecord,
    world: &World<'_>,
    look: Look<'_>,
    members: &mut BTreeMap<DeviceId, RolloutId>,
) -> StepOutcome {
    let mut outcome = StepOutcome::default();
    if record.rollout.state.is_final() {
        return outcome;
    }
    // Each other change of a record is noted where it is made, or comes with a decision.
    let before = (
        record.rollout.decisions.len(),
        record.rollout.current_wave,
        record.rollout.waiting_for.clone(),
    );
    drop_left_out(record, world, look);
    observe(record, world, look, &mut outcome);
    match record.rollout.state {
        RolloutState::Running => {
            admit(record, world, look, members);
            if !halt(record, world, &mut outcome) {
                advance(record, world, &mut outcome);
            }
        }
        RolloutState::Paused => {
            let id = &record.rollout.id;
            let waits = format!("an operator: `slm rollout resume {id}`{}", held(record, world));
            record.rollout.waiting_for = waits;
        }
        RolloutState::Halted => {
            let waits = format!("{}{}", halted_waits(&record.rollout.id), held(record, world));
            record.rollout.waiting_for = waits;
        }
        RolloutState::Completed | RolloutState::Aborted | RolloutState::RolledBack => {}
    }
    if record.rollout.state == RolloutState::Running {
        let updating = |part: &&RolloutDevice| part.outcome == Outcome::Updating;
        let updating = record.rollout.devices.iter().filter(updating);
        let straggles = first_straggles_at(&record.rollout.asked.policy, world, updating);
        outcome.deadline = earlier(outcome.deadline, straggles);
    }
    let rollout = &record.rollout;
    outcome.changed |= (rollout.decisions.len(), rollout.current_wave) != (before.0, before.1)
        || rollout.waiting_for != before.2;
    outcome
}

pub(super) fn halted_waits(id: &RolloutId) -> String {
    format!("an operator: `slm rollout rollback {id}`, or ship a better version")
}

/// What the devices of a rollout that does not run do meanwhile.
fn held(record: &RolloutRecord, world: &World<'_>) -> String {
    let (mut deaf, mut unheard, mut held) = (Vec::new(), 0, 0);
    for part in record.rollout.devices.iter().filter(|part| part.outcome == Outcome::Updating) {
        let Some(device) = world.device(&part.device) else { continue };
        let heard = device.report.as_ref().map_or(0, |report| report.generation);
        if !device.desired.rules.hold && !device.obeys(DeviceRules::HOLD) {
            deaf.push(part.name.as_str());
        } else if heard < device.desired.generation {
            unheard += 1;
        } else {
            held += 1;
        }
    }
    let mut text = String::new();
    if held > 0 {
        text += &format!("; {} told before and held", count(held, "device"));
    }
    if unheard > 0 {
        text +=
            &format!("; {} told before and held from their next poll", count(unheard, "device"));
    }
    if !deaf.is_empty() {
        let names = list(&deaf, NAMES_SHOWN);
        text += &format!("; {names} cannot be held: their agents do not know how");
    }
    text
}

/// When a device that is told has had its time to confirm, with a hub that listened.
fn due_at(part: &RolloutDevice, world: &World<'_>, timeout_s: u32) -> Option<Timestamp> {
    let due_at = match part.held.is_some() || part.due_at.is_some() {
        true => part.due_at,
        false => part.started_at.and_then(|at| after(at, timeout_s)),
    };
    due_at.and_then(|due| Some(due.max(after(world.listening_since, timeout_s)?)))
}

pub(super) fn after(at: Timestamp, seconds: u32) -> Option<Timestamp> {
    at.checked_add(SignedDuration::from_secs(i64::from(seconds))).ok()
}

/// When the first of these devices has had its time to confirm, or is waited for no longer.
fn first_straggles_at<'p>(
    policy: &RolloutPolicy,
    world: &World<'_>,
    parts: impl IntoIterator<Item = &'p RolloutDevice>,
) -> Option<Timestamp> {
    let due_at = |part| due_at(part, world, policy.confirm_timeout_s);
    let parts = parts.into_iter();
    parts.filter_map(|part| earlier(due_at(part), left_at(part, &policy.stragglers))).min()
}

/// What becomes of a device that was told and says nothing that decides; none while it has time.
fn given_up(
    part: &RolloutDevice,
    device: &FleetDevice,
    policy: &RolloutPolicy,
    world: &World<'_>,
) -> Option<Outcome> {
    let over = |at: Option<Timestamp>| at.is_some_and(|at| at <= world.now);
    let late = over(due_at(part, world, policy.confirm_timeout_s));
    let silent = policy.stragglers.unheard == Unheard::Leave && !has_asked(part, device);
    match over(left_at(part, &policy.stragglers)) || late && silent {
        true => Some(Outcome::Away),
        false => late.then_some(Outcome::Failed { failure: Failure::Timeout }),
    }
}

/// When a device that a rule holds up is waited for no longer.
fn left_at(part: &RolloutDevice, stragglers: &Stragglers) -> Option<Timestamp> {
    let held_after_s = Some(stragglers.held_after_s).filter(|seconds| *seconds > 0)?;
    part.held.and(part.started_at).and_then(|at| after(at, held_after_s))
}

/// Notes whether a rule holds the device up, as it says of what it is told now: its time to confirm
/// counts from when the rule lets go. Whether that is news.
fn follow_rules(
    part: &mut RolloutDevice,
    device: &FleetDevice,
    now: Timestamp,
    timeout_s: u32,
    runs: bool,
) -> bool {
    let report = device.report.as_ref();
    let Some(report) = report.filter(|it| it.generation >= device.desired.generation) else {
        return false;
    };
    let (held, due_at) = match report.phase.held() {
        // It goes on as soon as it hears of it.
        Some((WaitCause::Held, _)) if runs => return false,
        Some((cause, until)) => {
            let lets_go = until.map(|until| part.started_at.map_or(until, |at| at.max(until)));
            (Some(cause), lets_go.and_then(|at| after(at, timeout_s)))
        }
        None if part.held.is_some() => (None, after(now, timeout_s)),
        None => return false,
    };
    let news = (part.held, part.due_at) != (held, due_at);
    (part.held, part.due_at) = (held, due_at);
    news
}

/// A device that was shut out or removed is no part of the rollout any more, nor is one that an
/// operator took out of it before it was done, or pinned to another release.
fn drop_left_out(record: &mut RolloutRecord, world: &World<'_>, look: Look<'_>) {
    let asked = record.rollout.asked.clone();
    let why = |part: &RolloutDevice| match world.device(&part.device) {
        Some(device) if !device.revoked => {
            let open = matches!(part.outcome, Outcome::Pending | Outcome::Updating | Outcome::Away);
            let counts = open || part.outcome == Outcome::Confirmed && device.pin().is_some();
            ordered_out(device, &asked).filter(|_| counts)
        }
        _ => Some("shut out of the fleet".to_owned()),
    };
    if let Look::At(devices) = look {
        let may_go = |id: &DeviceId| {
            world.device(id).is_none_or(|device| device.revoked || device.orders.is_some())
        };
        if !devices.iter().any(may_go) {
            return;
        }
    }
    let mut gone: BTreeMap<String, Vec<String>> = BTreeMap::new();
    record.rollout.devices.retain(|part| {
        let why = Some(part).filter(|part| look.is_at(&part.device)).and_then(&why);
        match why {
            Some(why) => gone.entry(why).or_default().push(part.name.clone()),
            None => return true,
        }
        false
    });
    for (why, names) in gone {
        let what = format!("left out {}", list(&names, NAMES_SHOWN));
        decide(&mut record.rollout, world.now, what, vec![why]);
    }
}

/// Devices that came to match the selector while the rollout runs join its last wave.
fn admit(
    record: &mut RolloutRecord,
    world: &World<'_>,
    look: Look<'_>,
    members: &mut BTreeMap<DeviceId, RolloutId>,
) {
    let asked = record.rollout.asked.clone();
    let Some(release) = world.release(&asked.model, &asked.version) else { return };
    let mut joined = Vec::new();
    let candidates: Vec<&FleetDevice> = match look {
        Look::Everything => selected(world, &asked).collect(),
        Look::At(devices) => devices
            .iter()
            .filter_map(|id| world.device(id))
            .filter(|device| is_selected(device, &asked))
            .collect(),
    };
    for device in candidates {
        if members.contains_key(&device.id) || leave_out(device, &asked, release).is_some() {
            continue;
        }
        let mut part = entry(device, release, world);
        part.wave = match part.outcome {
            Outcome::Pending => late_wave(&asked.policy, record.rollout.waves),
            _ => record.rollout.waves - 1,
        };
        record.rollout.waves = record.rollout.waves.max(part.wave + 1);
        members.insert(device.id.clone(), record.rollout.id.clone());
        joined.push(format!("{} joins wave {}: {}", device.name, part.wave + 1, part.fit));
        record.rollout.devices.push(part);
    }
    if !joined.is_empty() {
        record.rollout.devices.sort_by_key(|device| device.wave);
        let what = format!("took in {}", count(joined.len(), "device"));
        joined.truncate(NAMES_SHOWN);
        decide(&mut record.rollout, world.now, what, joined);
    }
}

/// Reads the latest reports into outcomes.
fn observe(
    record: &mut RolloutRecord,
    world: &World<'_>,
    look: Look<'_>,
    outcome: &mut StepOutcome,
) {
    let now = world.now;
    let Rollout { devices, asked, state, .. } = &mut record.rollout;
    let (policy, runs) = (&asked.policy, *state == RolloutState::Running);
    let mut failed = Vec::new();
    for (index, part) in devices.iter_mut().enumerate() {
        let updating = part.outcome == Outcome::Updating;
        let told_and_away = part.outcome == Outcome::Away && part.generation.is_some();
        if !updating && !told_and_away && part.outcome != Outcome::Confirmed {
            continue;
        }
        let over = || first_straggles_at(policy, world, [&*part]).is_some_and(|at| at <= now);
        let is_due = look.is_at(&part.device) || runs && updating && over();
        if !is_due {
            continue;
        }
        let Some(device) = world.device(&part.device) else { continue };
        outcome.changed |= follow_refit(part, device, now);
        if part.outcome == Outcome::Updating {
            outcome.changed |= follow_rules(part, device, now, policy.confirm_timeout_s, runs);
        }
        let waits = runs && part.outcome == Outcome::Updating;
        let given_up = || waits.then(|| given_up(part, device, policy, world)).flatten();
        let became = verdict(part, device).or_else(given_up);
        let Some(became) = became.filter(|became| part.outcome != *became) else { continue };
        if let Outcome::Failed { .. } = became {
            failed.push(index);
        }
        part.outcome = became;
        part.finished_at = Some(now);
        outcome.changed = true;
    }
    for index in failed {
        take_back(record, world, index, outcome);
    }
}

/// Tells a device that failed to be what it was before.
pub(super) fn take_back(
    record: &RolloutRecord,
    world: &World<'_>,
    index: usize,
    outcome: &mut StepOutcome,
) {
    let part = &record.rollout.devices[index];
    // Told nothing new by this rollout (it ran this before): there is nothing to go back to.
    let Some(before) = record.before.get(&part.device).cloned() else { return };
    if keeps_by_pin(record, world.device(&part.device)) {
        return;
    }
    let before = match world.device(&part.device) {
        Some(device) => assign::way_back(world, device, before, part.manifest.as_ref()),
        None => before,
    };
    let back_to = words_of(before.as_ref());
    let Outcome::Failed { failure } = &part.outcome else { return };
    let reason = format!(
        "{} {} failed here ({}); back to {back_to}",
        record.rollout.asked.model,
        record.rollout.asked.version,
        failure_words(failure)
    );
    // Said by a new generation, so that a device that comes back late does not try it again.
    let target = Target::Before { model: before, reason };
    outcome.targets.insert(part.device.clone(), target);
}

/// Whether the device is pinned to this rollout's release, so that no rollout takes it back.
pub(super) fn keeps_by_pin(record: &RolloutRecord, device: Option<&FleetDevice>) -> bool {
    let asked = &record.rollout.asked;
    let pin = device.and_then(FleetDevice::pin);
    pin.is_some_and(|pin| pin.names(&asked.model, &asked.version))
}

fn words_of(model: Option<&DesiredModel>) -> String {
    match model {
        Some(model) => format!("{} {}", model.model, model.version),
        None => "no model".to_owned(),
    }
}

/// A device whose variant changed under way (its budget or blueprint did) is measured by the new one.
///
/// Whether that was the case.
fn follow_refit(part: &mut RolloutDevice, device: &FleetDevice, now: Timestamp) -> bool {
    let Some(told) = &device.desired.model else { return false };
    let told_newer = part.generation.is_some_and(|ours| device.desired.generation > ours);
    let refitted = told_newer && part.manifest != Some(told.manifest);
    if refitted {
        part.manifest = Some(told.manifest);
        part.variant = Some(told.variant.clone());
        part.generation = Some(device.desired.generation);
        part.started_at = Some(now);
        (part.held, part.due_at) = (None, None);
        part.finished_at = None;
        part.outcome = Outcome::Updating;
        part.fit = device.desired.reason.clone();
    }
    refitted
}

/// Whether the device has heard what it was told.
fn has_asked(part: &RolloutDevice, device: &FleetDevice) -> bool {
    let heard = device.report.as_ref().map_or(0, |report| report.generation);
    part.generation.is_some_and(|told| heard >= told)
        || part.started_at.is_some_and(|at| device.last_seen > at)
}

/// What the latest report proves about the manifest that this device was told. A report of an older
/// generation proves nothing; a confirmation counts only with the told manifest running.
fn verdict(part: &RolloutDevice, device: &FleetDevice) -> Option<Outcome> {
    let (Some(report), Some(manifest), Some(generation)) =
        (&device.report, part.manifest, part.generation)
    else {
        return None;
    };
    if report.generation < generation {
        return None;
    }
    let rejection = report
        .rejected
        .iter()
        .find(|rejection| rejection.manifest == manifest && rejection.generation >= generation);
    if let Some(rejection) = rejection {
        return Some(Outcome::Failed { failure: rejection.failure.clone() });
    }
    let told_this = device.desired.model.as_ref().is_some_and(|told| told.manifest == manifest);
    match &report.phase {
        Phase::RolledBack { failure } if told_this => {
            Some(Outcome::Failed { failure: failure.clone() })
        }
        Phase::Confirmed
            if report.running.as_ref().is_some_and(|running| running.manifest == manifest) =>
        {
            Some(Outcome::Confirmed)
        }
        _ => None,
    }
}

/// Halts if some wave has more failures than it may.
fn halt(record: &mut RolloutRecord, world: &World<'_>, outcome: &mut StepOutcome) -> bool {
    let allowed = record.rollout.asked.policy.max_failures as usize;
    let counted = |part: &&RolloutDevice| {
        matches!(part.outcome, Outcome::Failed { .. }) && !record.forgiven.contains(&part.device)
    };
    let mut failures = vec![0_usize; record.rollout.waves as usize];
    for part in record.rollout.devices.iter().filter(counted) {
        failures[part.wave as usize] += 1;
    }
    if let Some(wave) = failures.iter().position(|number| *number > allowed) {
        let wave = wave as u32;
        let failed: Vec<RolloutDevice> = record
            .rollout
            .devices
            .iter()
            .filter(|part| part.wave == wave)
            .filter(counted)
            .cloned()
            .collect();
        let mut because = vec![format!(
            "wave {} has {} failed, {allowed} allowed (max_failures)",
            wave + 1,
            count(failed.len(), "device")
        )];
        for part in &failed {
            because.extend(failure_evidence(part, world.device(&part.device)));
            let Outcome::Failed { failure } = &part.outcome else { continue };
            if let (true, Some(manifest), Some(device)) =
                (blames_model(failure), part.manifest, world.device(&part.device))
            {
                let quarantined = quarantine_words(part, device);
                if !because.contains(&quarantined) {
                    because.push(quarantined);
                }
                outcome.quarantined.push((manifest, device.class.clone()));
            }
        }
        let pending = record.rollout.devices.iter().filter(|p| p.outcome == Outcome::Pending);
        let pending: Vec<String> = pending.map(|part| part.name.clone()).collect();
        if !pending.is_empty() {
            let names = list(&pending, NAMES_SHOWN);
            because.push(format!("never told, so never downloaded it: {names}"));
        }
        record.rollout.state = RolloutState::Halted;
        record.rollout.waiting_for = halted_waits(&record.rollout.id);
        let what = format!("halted in wave {} of {}", wave + 1, record.rollout.waves);
        decide(&mut record.rollout, world.now, what, because);
        return true;
    }
    false
}

/// That what failed on a device is not offered to its class again.
pub(super) fn quarantine_words(part: &RolloutDevice, device: &FleetDevice) -> String {
    let variant = part.variant.as_ref().map_or("?", |variant| variant.as_str());
    let manifest = part.manifest.map_or_else(|| "?".to_owned(), |digest| digest.short());
    format!(
        "quarantined: {variant} ({manifest}) is not offered to class {} again, unless lifted \
         (`slm quarantine lift {manifest} --class {} --reason …`)",
        device.class, device.class
    )
}

/// Whether a failure speaks against the model and not against the network or the moment.
fn blames_model(failure: &Failure) -> bool {
    match failure {
        Failure::Probes { .. }
        | Failure::Load
        | Failure::Crash
        | Failure::Package
        | Failure::Signature
        | Failure::Memory { .. }
        | Failure::Worse { .. } => true,
        Failure::Digest | Failure::Configuration { .. } | Failure::Timeout => false,
    }
}

/// Starts the current wave, or the next ones while nothing holds them back.
fn advance(record: &mut RolloutRecord, world: &World<'_>, outcome: &mut StepOutcome) {
    loop {
        let holds = start(record, world, outcome);
        let wave = record.rollout.current_wave;
        let in_wave: Vec<&RolloutDevice> =
            record.rollout.devices.iter().filter(|part| part.wave == wave).collect();
        let updating: Vec<&RolloutDevice> =
            in_wave.iter().copied().filter(|part| part.outcome == Outcome::Updating).collect();
        if !updating.is_empty() || !holds.is_empty() {
            for (hold, _) in &holds {
                outcome.deadline = earlier(outcome.deadline, hold.until);
            }
            let mut waits = waits_for_devices(record, world, &updating, &holds);
            let weighs = holds.is_empty()
                && (gate::is_open(record) || others_have_settled(&in_wave, world, outcome));
            if weighs {
                match gate::weigh(record, world, outcome) {
                    Verdict::Halted => return,
                    Verdict::Held => waits = format!("{waits}; {}", record.rollout.waiting_for),
                    Verdict::Passed => {}
                }
            }
            record.rollout.waiting_for = waits;
            return;
        }
        if let Some(away) = nobody_there(record) {
            record.rollout.waiting_for = away;
            return;
        }
        let bake_s = record.rollout.asked.policy.bake_s;
        let settled_at = in_wave
            .iter()
            .filter(|part| part.outcome == Outcome::Confirmed)
            .filter_map(|part| part.finished_at)
            .max()
            // What went wrong while the hub did not listen, it hears of now.
            .map(|at| at.max(world.listening_since));
        let verdict = gate::weigh(record, world, outcome);
        if let Verdict::Halted = verdict {
            return;
        }
        if let Some(settled_at) = settled_at
            && let Ok(baked_at) =
                settled_at.checked_add(SignedDuration::from_secs(i64::from(bake_s)))
            && baked_at > world.now
        {
            outcome.deadline = earlier(outcome.deadline, Some(baked_at));
            record.rollout.waiting_for = format!(
                "wave {} of {} to stay confirmed for {}, until {}",
                wave + 1,
                record.rollout.waves,
                seconds(i64::from(bake_s)),
                clock(baked_at)
            );
            return;
        }
        if let Verdict::Held = verdict {
            return;
        }
        if wave + 1 < record.rollout.waves {
            record.rollout.current_wave += 1;
            continue;
        }
        finish(record, world, outcome);
        return;
    }
}

/// Whether all of a wave that heard of the release have an outcome, and some confirmed. Those that
/// did not hear of it say nothing about it, and nobody needs to wait for them to weigh the others.
fn others_have_settled(
    in_wave: &[&RolloutDevice],
    world: &World<'_>,
    outcome: &mut StepOutcome,
) -> bool {
    let (mut settled, mut confirmed) = (true, false);
    for part in in_wave {
        confirmed |= part.outcome == Outcome::Confirmed;
        if part.outcome != Outcome::Updating {
            continue;
        }
        let asked = world.device(&part.device).is_none_or(|device| has_asked(part, device));
        let silent_at = part
            .started_at
            .and_then(|at| at.checked_add(SignedDuration::from_secs(SILENT_S)).ok())
            .filter(|_| !asked);
        settled &= silent_at.is_some_and(|at| at <= world.now);
        outcome.deadline = earlier(outcome.deadline, silent_at.filter(|at| *at > world.now));
    }
    settled && confirmed
}

/// Nobody was there to try the release: without one that confirms it no other wave starts.
fn nobody_there(record: &RolloutRecord) -> Option<String> {
    let parts = || record.rollout.devices.iter();
    let tried =
        |part: &RolloutDevice| matches!(part.outcome, Outcome::Confirmed | Outcome::Failed { .. });
    if parts().any(tried) {
        return None;
    }
    let away: Vec<&str> = parts()
        .filter(|part| part.outcome == Outcome::Away)
        .map(|part| part.name.as_str())
        .collect();
    (!away.is_empty()).then(|| {
        format!("a device that can try it: {} away (stragglers)", list(&away, NAMES_SHOWN))
    })
}

fn waits_for_devices(
    record: &RolloutRecord,
    world: &World<'_>,
    updating: &[&RolloutDevice],
    holds: &[(Hold, usize)],
) -> String {
    let mut waits = Vec::new();
    if !updating.is_empty() {
        let names: Vec<String> =
            updating.iter().take(NAMES_SHOWN).map(|part| at_work(part, world)).collect();
        let first =
            first_straggles_at(&record.rollout.asked.policy, world, updating.iter().copied());
        let limit = first.map(|at| format!("; fails at {}", clock(at))).unwrap_or_default();
        let more = updating.len() - names.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        waits.push(format!("{}{more} to confirm{limit}", names.join(", ")));
    }
    for (hold, devices) in holds {
        let verb = if *devices == 1 { "waits" } else { "wait" };
        waits.push(format!("{} {verb} for {}", count(*devices, "device"), hold.why));
    }
    format!(
        "wave {} of {}: {}",
        record.rollout.current_wave + 1,
        record.rollout.waves,
        waits.join("; ")
    )
}

fn at_work(part: &RolloutDevice, world: &World<'_>) -> String {
    let phase = world.device(&part.device).map_or_else(
        || "unknown".to_owned(),
        |device| match (&device.report, part.generation) {
            (Some(report), Some(told)) if report.generation >= told => phase_words(&report.phase),
            _ => "has not asked yet".to_owned(),
        },
    );
    format!("{} ({phase})", part.name)
}

/// Tells the pending devices of the current wave, as far as the rules let it. Returns what holds the
/// others up, and how many devices each.
fn start(
    record: &mut RolloutRecord,
    world: &World<'_>,
    outcome: &mut StepOutcome,
) -> Vec<(Hold, usize)> {
    let asked = record.rollout.asked.clone();
    let wave = record.rollout.current_wave;
    let release = world.release(&asked.model, &asked.version);
    let Some(release) = release else { return Vec::new() };
    let pending = |part: &&RolloutDevice| part.wave == wave && part.outcome == Outcome::Pending;
    let waiting = record.rollout.devices.iter().filter(pending).count();
    let holds = Rules::hold_wave(record, world);
    if !holds.is_empty() {
        // Who comes back meanwhile waits, too.
        let held = if waiting > 0 { holds } else { Vec::new() };
        return held.into_iter().map(|hold| (hold, waiting)).collect();
    }
    outcome.changed |= absence::rearrange(record, world);
    gate::choose(record, world, outcome);
    let in_wave = |part: &RolloutDevice| part.wave == wave;
    let goes_on =
        record.rollout.devices.iter().any(|part| in_wave(part) && part.started_at.is_some());
    let mut rules = Rules::new(record, world);
    let mut held: Vec<(Hold, usize)> = Vec::new();
    let mut started = Vec::new();
    let mut before = std::mem::take(&mut record.before);
    let offer = Offer {
        world,
        release,
        confirm_timeout_s: asked.policy.confirm_timeout_s,
        reason: format!(
            "release {} by rollout {}, wave {}",
            asked.version,
            record.rollout.id,
            wave + 1
        ),
    };
    for part in record.rollout.devices.iter_mut().filter(|part| in_wave(part)) {
        if part.outcome != Outcome::Pending {
            continue;
        }
        let Some(device) = world.device(&part.device) else { continue };
        if let Some(hold) = turn(outcome, world).or_else(|| rules.hold(device)) {
            match held.iter_mut().find(|(known, _)| *known == hold) {
                Some((_, devices)) => *devices += 1,
                None => held.push((hold, 1)),
            }
            continue;
        }
        outcome.changed = true;
        if offer.tell(part, device, &mut before, outcome) {
            part.outcome = Outcome::Updating;
            rules.told(device);
            started.push(format!("{} gets {}", part.name, part.fit));
        }
    }
    record.before = before;
    if started.is_empty() {
        return held;
    }
    // A wave that limits stretch starts once; who was told when is with the devices.
    if !goes_on {
        let held: usize = held.iter().map(|(_, devices)| devices).sum();
        let of = if held > 0 { format!(" of {}", started.len() + held) } else { String::new() };
        let what = format!(
            "started wave {} of {}: {}{of}",
            wave + 1,
            record.rollout.waves,
            count(started.len(), "device")
        );
        let more = started.len().saturating_sub(NAMES_SHOWN);
        started.truncate(NAMES_SHOWN);
        if more > 0 {
            started.push(format!("and {more} more"));
        }
        let mut because = evidence_so_far(record, wave);
        because.extend(started);
        decide(&mut record.rollout, world.now, what, because);
    }
    // Confirmations that are known already count in this very step.
    for part in &mut record.rollout.devices {
        if part.outcome != Outcome::Updating || outcome.targets.contains_key(&part.device) {
            continue;
        }
        let Some(device) = world.device(&part.device) else { continue };
        if verdict(part, device) == Some(Outcome::Confirmed) {
            part.outcome = Outcome::Confirmed;
            part.finished_at = Some(world.now);
        }
    }
    held
}

/// What holds a device up whose turn comes with the next decision, which follows at once.
fn turn(outcome: &StepOutcome, world: &World<'_>) -> Option<Hold> {
    (outcome.targets.len() >= MAX_TOLD_AT_ONCE).then(|| Hold {
        why: format!("their turn: {} are told at a time", count(MAX_TOLD_AT_ONCE, "device")),
        until: Some(world.now),
    })
}

/// What a rollout's devices are told.
struct Offer<'a> {
    world: &'a World<'a>,
    release: &'a NewRelease,
    confirm_timeout_s: u32,
    reason: String,
}

impl Offer<'_> {
    /// Tells a device; its outcome is the caller's. False where there is nothing for it, which is its
    /// outcome then.
    fn tell(
        &self,
        part: &mut RolloutDevice,
        device: &FleetDevice,
        before: &mut BTreeMap<DeviceId, Option<DesiredModel>>,
        outcome: &mut StepOutcome,
    ) -> bool {
        // Its budget or blueprint may have changed since the rollout was made.
        let fresh = entry(device, self.release, self.world);
        part.variant = fresh.variant;
        part.manifest = fresh.manifest;
        part.fit = fresh.fit;
        let (fit, runtime) = assign::fit_device(device, self.release);
        let (Outcome::Pending, Fit::Fits { index, .. }) = (&fresh.outcome, fit) else {
            part.outcome = fresh.outcome;
            part.finished_at = Some(self.world.now);
            return false;
        };
        let model = assign::desired_model(self.release, &self.release.variants[index], &runtime);
        part.started_at = Some(self.world.now);
        (part.held, part.due_at) = (None, None);
        if assign::same(&device.desired, Some(&model), &runtime) && !device.is_ahead() {
            // It is told this already: what it reported counts.
            part.generation = Some(device.desired.generation);
            return true;
        }
        part.generation = Some(device.next_generation());
        let ran = assign::way_back(self.world, device, device.desired.model.clone(), None);
        if ran.as_ref().is_none_or(|ran| ran.manifest != model.manifest) {
            before.insert(device.id.clone(), ran);
        }
        let reason = format!("{}: {}", self.reason, part.fit);
        let confirm_timeout_s = self.confirm_timeout_s;
        let target = Target::Model { model, confirm_timeout_s, reason };
        outcome.targets.insert(device.id.clone(), target);
        true
    }
}

/// Tells the devices that are away, once all others are done: they take it when they come back.
/// Returns how many.
fn tell_away(record: &mut RolloutRecord, world: &World<'_>, outcome: &mut StepOutcome) -> usize {
    let asked = &record.rollout.asked;
    let Some(release) = world.release(&asked.model, &asked.version) else { return 0 };
    let offer = Offer {
        world,
        release,
        confirm_timeout_s: asked.policy.confirm_timeout_s,
        reason: format!(
            "release {} by rollout {}, while it was away",
            asked.version, record.rollout.id
        ),
    };
    let mut told = 0;
    for part in &mut record.rollout.devices {
        if part.outcome != Outcome::Away {
            continue;
        }
        let Some(device) = world.device(&part.device) else { continue };
        let tells =
            part.generation.is_none() && offer.tell(part, device, &mut record.before, outcome);
        told += usize::from(tells || part.generation.is_some());
    }
    told
}

fn evidence_so_far(record: &RolloutRecord, wave: u32) -> Vec<String> {
    if wave == 0 {
        return Vec::new();
    }
    let before = record.rollout.devices.iter().filter(|part| part.wave + 1 == wave);
    let names: Vec<&str> = before
        .filter(|part| part.outcome == Outcome::Confirmed)
        .map(|part| part.name.as_str())
        .collect();
    match names.is_empty() {
        true => vec![format!("wave {wave} is over; none of its devices confirmed")],
        false => {
            vec![format!("wave {wave} confirmed by its probes on {}", list(&names, NAMES_SHOWN))]
        }
    }
}

fn finish(record: &mut RolloutRecord, world: &World<'_>, outcome: &mut StepOutcome) {
    let number = |wanted: fn(&Outcome) -> bool| {
        record.rollout.devices.iter().filter(|part| wanted(&part.outcome)).count()
    };
    let confirmed = number(|outcome| matches!(outcome, Outcome::Confirmed));
    let failed = number(|outcome| matches!(outcome, Outcome::Failed { .. }));
    let no_fit = number(|outcome| matches!(outcome, Outcome::NoFit { .. }));
    let quarantined = number(|outcome| matches!(outcome, Outcome::Quarantined));
    let mut because = vec![format!("confirmed by its probes on {}", count(confirmed, "device"))];
    if failed > 0 {
        because.push(format!("{} failed, within max_failures", count(failed, "device")));
    }
    if no_fit > 0 {
        because.push(format!("no variant fits {}", count(no_fit, "device")));
    }
    if quarantined > 0 {
        because.push(format!("not offered again to {} (quarantine)", count(quarantined, "device")));
    }
    if record.rollout.devices.is_empty() {
        because =
            vec!["no device matches yet; those that join and match the selector get it".to_owned()];
    }
    // A release that nobody confirmed though somebody tried is not one to give to newcomers.
    let what = if confirmed == 0 && failed + quarantined > 0 {
        record.rollout.state = RolloutState::Halted;
        record.rollout.waiting_for = halted_waits(&record.rollout.id);
        "halted: no device confirmed it"
    } else {
        let away = tell_away(record, world, outcome);
        if away > 0 {
            because.push(format!(
                "{} away: told, and take it when they come back",
                count(away, "device")
            ));
        }
        record.rollout.state = RolloutState::Completed;
        record.rollout.waiting_for = String::new();
        "completed"
    };
    decide(&mut record.rollout, world.now, what.to_owned(), because);
}
