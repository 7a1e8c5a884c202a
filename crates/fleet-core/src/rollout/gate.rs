//! The gate between a wave and the next one: whom it compares, when it looks, what it decides.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use slmops_api::device::Failure;
use slmops_api::evidence::{Evidence, EvidenceCounts};
use slmops_api::gate::{GatePolicy, GateReading, Metric, MetricReading};
use slmops_api::rollout::{Outcome, RolloutDevice, RolloutState};
use slmops_api::{ClassName, DeviceId};

use super::create::group_of;
use super::step::{StepOutcome, halted_waits, keeps_by_pin, quarantine_words, take_back};
use super::{RolloutRecord, decide, earlier};
use crate::gate::{Compared, FIRST_LOOKS_S, Stratum, harm, look, next_look_in_s, replayed};
use crate::words::{self, clock, count};
use crate::world::{FleetDevice, World};

/// Devices of a wave that are compared, at most.
const MAX_CANARIES: usize = 200;
/// Devices that they are compared with, at most.
const MAX_CONTROLS: usize = 800;

/// The devices that the gate of one wave compares, chosen before the wave is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    wave: u32,
    devices: Vec<Chosen>,
    /// Whether the gate has let the next wave start, or halted.
    over: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Chosen {
    device: DeviceId,
    class: ClassName,
    /// The site or class that the sizes of waves count within, if they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    canary: bool,
    /// What it had counted of the model before when it was chosen.
    before: EvidenceCounts,
    /// What it had counted of the model that it ran when the comparison began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<Evidence>,
}

/// Devices among which chance alone decided who is a canary: of a class, and of what the sizes of
/// waves count within.
type StratumKey = (ClassName, Option<String>);

impl Chosen {
    fn stratum(&self) -> StratumKey {
        (self.class.clone(), self.group.clone())
    }
}

/// What the gate says.
pub(super) enum Verdict {
    /// The next wave may start.
    Passed,
    /// Not yet; what it waits for is in the record.
    Held,
    /// Halted.
    Halted,
}

/// Chooses whom the gate of the current wave will compare, if that is still to be done. Right before
/// the wave is told, so that who is away has changed places by then.
///
/// Canaries and controls are devices in the same order of chance (see `create.rs`), ready when the
/// rollout was made, of the same classes, that have counted something of the model before.
pub(super) fn choose(record: &mut RolloutRecord, world: &World<'_>, outcome: &mut StepOutcome) {
    let rollout = &record.rollout;
    let wave = rollout.current_wave;
    let chosen = record.comparison.as_ref().is_some_and(|comparison| comparison.wave == wave);
    if rollout.asked.policy.gate.is_none() || chosen || wave + 1 >= rollout.waves {
        return;
    }
    let mut canaries = Vec::new();
    let mut controls = Vec::new();
    for part in &rollout.devices {
        if part.wave < wave || part.outcome != Outcome::Pending || part.unready {
            continue;
        }
        let Some(device) = world.device(&part.device) else { continue };
        let Some(evidence) = evidence(device) else { continue };
        if Some(evidence.manifest) == part.manifest {
            continue;
        }
        let (arm, most) = match part.wave == wave {
            true => (&mut canaries, MAX_CANARIES),
            false => (&mut controls, MAX_CONTROLS),
        };
        if arm.len() < most {
            arm.push(Chosen {
                device: part.device.clone(),
                class: device.class.clone(),
                group: group_of(device, rollout.asked.policy.per),
                canary: part.wave == wave,
                before: evidence.counts,
                base: None,
            });
        }
    }
    let devices = canaries.into_iter().chain(controls).collect();
    record.comparison = Some(Comparison { wave, devices, over: false });
    record.rollout.gate = None;
    outcome.changed = true;
}

/// What a device that is heard of has counted of the model that it runs.
fn evidence(device: &FleetDevice) -> Option<&Evidence> {
    let report = device.report.as_ref().filter(|_| !device.revoked)?;
    let running = report.running.as_ref()?;
    report.evidence.as_ref().filter(|evidence| evidence.manifest == running.manifest)
}

/// Whether the current wave is being weighed.
pub(super) fn is_open(record: &RolloutRecord) -> bool {
    let wave = record.rollout.current_wave;
    record.rollout.gate.as_ref().is_some_and(|reading| reading.wave == wave)
}

/// Weighs the current wave, as far as it has settled, against the devices that are still to come.
pub(super) fn weigh(
    record: &mut RolloutRecord,
    world: &World<'_>,
    outcome: &mut StepOutcome,
) -> Verdict {
    let Some(policy) = record.rollout.asked.policy.gate.clone() else { return Verdict::Passed };
    let Some(mut comparison) = record.comparison.take() else { return Verdict::Passed };
    let verdict = match comparison.over || nothing_before(record) {
        true => Verdict::Passed,
        false => judge(record, &mut comparison, &policy, world, outcome),
    };
    if !comparison.over && !matches!(verdict, Verdict::Held) {
        comparison.over = true;
        comparison.devices.clear();
        outcome.changed = true;
    }
    record.comparison = Some(comparison);
    verdict
}

/// Whether no device of the wave ran anything before: then there is nothing to be worse than.
fn nothing_before(record: &RolloutRecord) -> bool {
    let wave = record.rollout.current_wave;
    let mut parts = record.rollout.devices.iter().filter(|part| part.wave == wave);
    !parts.any(|part| matches!(record.before.get(&part.device), Some(Some(_))))
}

fn judge(
    record: &mut RolloutRecord,
    comparison: &mut Comparison,
    policy: &GatePolicy,
    world: &World<'_>,
    outcome: &mut StepOutcome,
) -> Verdict {
    let mut reading = match record.rollout.gate.take() {
        Some(reading) => reading,
        None => {
            outcome.changed = true;
            open(record, comparison, policy, world)
        }
    };
    if world.now >= reading.next_look_at {
        outcome.changed = true;
        take_a_look(&mut reading, comparison, policy, &record.rollout.devices, world);
    }
    let lines = evidence_lines(&reading);
    let wave = reading.wave + 1;
    let worst = worst(&reading);
    let open_points = open_points(&reading, policy);
    let out_of_patience = policy.patience_s.map(|patience_s| after(reading.opened_at, patience_s));
    let next_look_at = reading.next_look_at;
    record.rollout.gate = Some(reading);
    if let Some(metric) = worst {
        halt(record, world, metric, lines, outcome);
        return Verdict::Halted;
    }
    if open_points.is_empty() {
        let what = format!("gate of wave {wave} passed: a greater loss than allowed is excluded");
        decide(&mut record.rollout, world.now, what, lines);
        return Verdict::Passed;
    }
    if out_of_patience.is_some_and(|at| at <= world.now) {
        let what = format!("gate of wave {wave} passed: no harm was found in the time it had");
        let because = lines.into_iter().chain(open_points).collect();
        decide(&mut record.rollout, world.now, what, because);
        return Verdict::Passed;
    }
    outcome.deadline = earlier(outcome.deadline, earlier(Some(next_look_at), out_of_patience));
    let patience =
        out_of_patience.map(|at| format!("; goes on at {}", clock(at))).unwrap_or_default();
    record.rollout.waiting_for = format!(
        "the gate of wave {wave}: {}; looks next at {}{patience}",
        open_points.join(", "),
        clock(next_look_at)
    );
    Verdict::Held
}

fn after(at: Timestamp, seconds: u32) -> Timestamp {
    at.checked_add(SignedDuration::from_secs(i64::from(seconds))).unwrap_or(Timestamp::MAX)
}

/// Notes where each device stands, and drops those that cannot be compared. Of both sides alike those
/// that were not heard of since the wave began: a canary that did not hear of the release cannot
/// have confirmed it, and the controls must not be held to less.
fn open(
    record: &RolloutRecord,
    comparison: &mut Comparison,
    policy: &GatePolicy,
    world: &World<'_>,
) -> GateReading {
    let parts: BTreeMap<&DeviceId, &RolloutDevice> =
        record.rollout.devices.iter().map(|part| (&part.device, part)).collect();
    let of_wave = record.rollout.devices.iter().filter(|part| part.wave == comparison.wave);
    let began_at = of_wave.filter_map(|part| part.started_at).min();
    comparison.devices.retain_mut(|chosen| {
        let part = parts.get(&chosen.device);
        let device = world.device(&chosen.device);
        let heard = device.filter(|device| began_at.is_none_or(|at| device.last_seen >= at));
        let (Some(part), Some(evidence)) = (part, heard.and_then(evidence)) else { return false };
        let has_release = Some(evidence.manifest) == part.manifest;
        let wanted = match chosen.canary {
            true => part.outcome == Outcome::Confirmed && has_release,
            false => part.outcome == Outcome::Pending && !has_release,
        };
        chosen.base = Some(evidence.clone());
        wanted
    });
    // A stratum with but one side compares nothing.
    let strata = |canary: bool| -> BTreeSet<StratumKey> {
        let side = comparison.devices.iter().filter(|chosen| chosen.canary == canary);
        side.map(Chosen::stratum).collect()
    };
    let both: BTreeSet<StratumKey> = strata(true).intersection(&strata(false)).cloned().collect();
    comparison.devices.retain(|chosen| both.contains(&chosen.stratum()));
    let number = |canary: bool| {
        comparison.devices.iter().filter(|chosen| chosen.canary == canary).count() as u32
    };
    // Each gate of the rollout has its share of the chance of error.
    let gates = f64::from(record.rollout.waves.saturating_sub(1).max(1));
    GateReading {
        wave: comparison.wave,
        opened_at: world.now,
        looks: 0,
        next_look_at: after(world.now, FIRST_LOOKS_S),
        canaries: number(true),
        controls: number(false),
        device_hours: 0.0,
        e_value: 0.0,
        halt_at: gates * 1_000.0 / f64::from(policy.alpha_per_mille),
        metrics: vec![],
    }
}

fn take_a_look(
    reading: &mut GateReading,
    comparison: &Comparison,
    policy: &GatePolicy,
    parts: &[RolloutDevice],
    world: &World<'_>,
) {
    let mut strata: BTreeMap<StratumKey, Stratum> = BTreeMap::new();
    for chosen in &comparison.devices {
        let now = world.device(&chosen.device).and_then(evidence);
        let (Some(base), Some(now)) = (&chosen.base, now) else { continue };
        if now.manifest != base.manifest {
            continue;
        }
        let after = now.counts.since(&base.counts);
        let stratum = strata.entry(chosen.stratum()).or_default();
        let arm = if chosen.canary { &mut stratum.canaries } else { &mut stratum.controls };
        arm.push(Compared { before: chosen.before, after });
    }
    let strata: Vec<Stratum> = strata.into_values().collect();
    let number = |of: fn(&Stratum) -> usize| strata.iter().map(of).sum::<usize>() as u32;
    reading.canaries = number(|stratum| stratum.canaries.len());
    reading.controls = number(|stratum| stratum.controls.len());
    reading.looks += 1;
    let served = strata.iter().flat_map(|stratum| &stratum.canaries);
    reading.device_hours = served.map(|device| device.after.serving_s / 3_600.0).sum();
    let replays = replays(parts, reading.wave, world);
    let replayed = replayed(policy, &replays, reading.looks, &reading.metrics);
    reading.metrics = look(policy, &strata, reading.looks, &reading.metrics);
    reading.metrics.extend(replayed);
    reading.e_value = harm(policy, &reading.metrics);
    let elapsed_s = world.now.as_second() - reading.opened_at.as_second();
    let wait_s = next_look_in_s(u32::try_from(elapsed_s.max(0)).unwrap_or(u32::MAX));
    reading.next_look_at = after(world.now, wait_s);
}

/// What each device of the wave found that runs the release, side by side with what it ran before. Of
/// all of them, whether there is a device to compare them with or not.
fn replays<'w>(parts: &[RolloutDevice], wave: u32, world: &'w World<'_>) -> Vec<&'w [f64]> {
    let confirmed = |part: &&RolloutDevice| part.wave == wave && part.outcome == Outcome::Confirmed;
    let replay = |part: &RolloutDevice| {
        let evidence = evidence(world.device(&part.device)?)?;
        let replay =
            evidence.replay.as_ref().filter(|_| Some(evidence.manifest) == part.manifest)?;
        Some(replay.losses_nats.as_slice())
    };
    parts.iter().filter(confirmed).filter_map(replay).take(MAX_CANARIES).collect()
}

/// The metric that speaks the most against the release, if the evidence is enough.
fn worst(reading: &GateReading) -> Option<Metric> {
    let harmful = reading.metrics.iter().filter(|metric| metric.loss > metric.allowed);
    let worst = harmful.max_by(|a, b| a.e_value.total_cmp(&b.e_value))?;
    (reading.e_value >= reading.halt_at).then_some(worst.metric)
}

/// What is still to be shown, in words, and how long that would take.
fn open_points(reading: &GateReading, policy: &GatePolicy) -> Vec<String> {
    if reading.looks == 0 {
        return vec![format!("compares {}", arms(reading))];
    }
    let open = |metric: &Metric| {
        let Some(found) = reading.metrics.iter().find(|found| found.metric == *metric) else {
            return Some(format!("{metric}: nothing counted to compare yet"));
        };
        let Some(at_most) = found.loss_at_most else {
            return Some(format!("{metric}: too few devices to tell ({})", arms(reading)));
        };
        if at_most <= found.allowed {
            return None;
        }
        let needed = match found.device_hours_needed {
            Some(hours) => format!("about {} more device-hours", hours.ceil().max(1.0)),
            None => "no amount of time would do as it looks".to_owned(),
        };
        Some(format!(
            "{metric}: {} lost at most, {} allowed ({needed})",
            loss(*metric, at_most),
            loss(*metric, found.allowed)
        ))
    };
    policy.allow.keys().filter_map(open).collect()
}

fn arms(reading: &GateReading) -> String {
    format!(
        "{} with {} of the same class",
        count(reading.canaries as usize, "device"),
        count(reading.controls as usize, "device")
    )
}

/// What was found, metric by metric.
pub(super) fn evidence_lines(reading: &GateReading) -> Vec<String> {
    let first = format!(
        "compared {} over {:.1} device-hours, {}; evidence for harm {:.3}, halts at {:.0}",
        arms(reading),
        reading.device_hours,
        count(reading.looks as usize, "look"),
        reading.e_value,
        reading.halt_at
    );
    std::iter::once(first).chain(reading.metrics.iter().map(metric_line)).collect()
}

fn metric_line(found: &MetricReading) -> String {
    let MetricReading { metric, canaries, controls, .. } = found;
    let sides = match metric {
        Metric::Crashes => format!("{canaries:.3}/h against {controls:.3}/h"),
        Metric::Replay => format!("perplexity of the replayed answers ×{canaries:.3} of before"),
        metric if metric.is_count() => {
            format!("{:.2} % against {:.2} %", canaries * 100.0, controls * 100.0)
        }
        _ => format!("×{canaries:.3} of before against ×{controls:.3}"),
    };
    let at_most = match found.loss_at_most {
        Some(at_most) => format!("at most {}", loss(*metric, at_most)),
        None => "too few devices for a bound".to_owned(),
    };
    format!(
        "{metric}: {sides}; loss {}, {at_most}, {} allowed; e-value {:.3}",
        loss(*metric, found.loss),
        loss(*metric, found.allowed),
        found.e_value
    )
}

fn loss(metric: Metric, loss: f64) -> String {
    match metric {
        Metric::Crashes => format!("{loss:.3}/h"),
        metric if metric.is_count() => format!("{:.2} points", loss * 100.0),
        _ => format!("{:.1} %", loss * 100.0),
    }
}

/// Halts, and takes back every device that has the release from this rollout.
fn halt(
    record: &mut RolloutRecord,
    world: &World<'_>,
    metric: Metric,
    mut because: Vec<String>,
    outcome: &mut StepOutcome,
) {
    for index in 0..record.rollout.devices.len() {
        let part = &mut record.rollout.devices[index];
        if part.outcome != Outcome::Confirmed || !record.before.contains_key(&part.device) {
            continue;
        }
        part.outcome = Outcome::Failed { failure: Failure::Worse { metric } };
        part.finished_at = Some(world.now);
        let part = &record.rollout.devices[index];
        if let (Some(manifest), Some(device)) = (part.manifest, world.device(&part.device)) {
            outcome.quarantined.push((manifest, device.class.clone()));
            let quarantined = quarantine_words(part, device);
            if !because.contains(&quarantined) {
                because.push(quarantined);
            }
            if let Some(pin) = device.pin().filter(|_| keeps_by_pin(record, Some(device))) {
                because.push(format!("not taken back: {} ({})", part.name, words::pin(pin)));
            }
        }
        take_back(record, world, index, outcome);
    }
    let wave = record.rollout.current_wave + 1;
    record.rollout.state = RolloutState::Halted;
    record.rollout.waiting_for = halted_waits(&record.rollout.id);
    let what = format!(
        "halted by the gate of wave {wave} of {}: worse in {metric}; its devices go back",
        record.rollout.waves
    );
    decide(&mut record.rollout, world.now, what, because);
}
