//! A failing run made small: the fewest operations, rollouts and devices that still fail.

use slmops_api::rollout::{Limits, RolloutPolicy, Schedule, Stragglers, WavePer};
use slmops_api::rules::Metered;
use slmops_api::window::Windows;

use crate::operation::Action;
use crate::report::Violation;
use crate::run::Manner;
use crate::scenario::Scenario;
use crate::spec::{Health, LinkSpec};

/// Runs that shrinking may take.
const MAX_RUNS: usize = 2_000;

/// The smallest scenario that still breaks the same invariant, and how it does. None when `scenario`
/// breaks none.
pub fn shrink(scenario: &Scenario) -> Option<(Scenario, Violation)> {
    shrink_as(scenario, Manner::default())
}

/// The smallest scenario that delta debugging finds (Zeller and Hildebrandt, "Simplifying and
/// isolating failure-inducing input", 2002), with the same kind of violation; and that violation.
/// None when `scenario` does not fail.
pub fn shrink_as(scenario: &Scenario, manner: Manner) -> Option<(Scenario, Violation)> {
    let manner = Manner { stop_at_violation: true, ..manner };
    let mut violation = fails(scenario, manner)?;
    let kind = kind(&violation);
    let mut runs = 0;
    let mut still = |candidate: &Scenario| {
        runs += 1;
        let found = (runs <= MAX_RUNS).then(|| fails(candidate, manner)).flatten();
        found.filter(|found| self::kind(found) == kind)
    };
    let mut best = scenario.clone();
    // Operations: halves, quarters, and so on to single ones.
    let mut parts = 2;
    while !best.operations.is_empty() {
        let size = best.operations.len().div_ceil(parts);
        let smaller = (0..best.operations.len()).step_by(size).find_map(|from| {
            let mut candidate = best.clone();
            candidate.operations.drain(from..(from + size).min(best.operations.len()));
            still(&candidate).map(|found| (candidate, found))
        });
        match smaller {
            Some((candidate, found)) => {
                (best, violation) = (candidate, found);
                parts = parts.saturating_sub(1).max(2);
            }
            None if size == 1 => break,
            None => parts = (parts * 2).min(best.operations.len()),
        }
    }
    for candidate in simpler(&best) {
        let candidate = candidate(&best);
        if candidate != best
            && let Some(found) = still(&candidate)
        {
            (best, violation) = (candidate, found);
        }
    }
    Some((best, violation))
}

fn fails(scenario: &Scenario, manner: Manner) -> Option<Violation> {
    scenario.run_as(manner).ok()?.violations.into_iter().next()
}

/// The violation without its numbers.
fn kind(violation: &Violation) -> String {
    let plain = |word: &&str| !word.contains(|letter: char| letter.is_ascii_digit());
    violation.what.split_whitespace().filter(plain).take(5).collect::<Vec<_>>().join(" ")
}

type Simpler = Box<dyn Fn(&Scenario) -> Scenario>;

/// Ways to make the rest simpler, each tried once.
fn simpler(scenario: &Scenario) -> Vec<Simpler> {
    let mut ways: Vec<Simpler> = Vec::new();
    let mut way = |change: fn(&mut Scenario, usize), index: usize| {
        ways.push(Box::new(move |scenario: &Scenario| {
            let mut changed = scenario.clone();
            change(&mut changed, index);
            changed
        }));
    };
    for index in (0..scenario.spec.rollouts.len()).rev() {
        way(
            |it, index| {
                if it.spec.rollouts.len() > index {
                    it.spec.rollouts.remove(index);
                }
            },
            index,
        );
        way(
            |it, index| {
                if let Some(rollout) = it.spec.rollouts.get_mut(index) {
                    rollout.health = Health::Good;
                }
            },
            index,
        );
    }
    for index in 0..scenario.spec.rollouts.len() {
        let rules: [fn(&mut RolloutPolicy); 11] = [
            |policy| policy.gate = None,
            |policy| policy.schedule = Schedule::default(),
            |policy| policy.schedule.time_zone = None,
            |policy| policy.schedule.activate_in = Windows::default(),
            |policy| policy.schedule.download_in = Windows::default(),
            |policy| policy.limits = Limits::default(),
            |policy| policy.limits.metered = Metered::Allow,
            |policy| policy.approvals.clear(),
            |policy| policy.stragglers = Stragglers::default(),
            |policy| policy.per = WavePer::Fleet,
            |policy| policy.bake_s = 0,
        ];
        for rule in rules {
            ways.push(Box::new(move |scenario: &Scenario| {
                let mut changed = scenario.clone();
                if let Some(rollout) = changed.spec.rollouts.get_mut(index) {
                    rule(&mut rollout.policy);
                }
                changed
            }));
        }
    }
    let mut way = |change: fn(&mut Scenario, usize), index: usize| {
        ways.push(Box::new(move |scenario: &Scenario| {
            let mut changed = scenario.clone();
            change(&mut changed, index);
            changed
        }));
    };
    way(|it, _| it.spec.hub_bits_per_s = None, 0);
    for index in 0..scenario.spec.groups.len() {
        way(|it, index| it.spec.groups[index].link.loss = 0.0, index);
        way(|it, index| it.spec.groups[index].link.offline.clear(), index);
        way(|it, index| it.spec.groups[index].link.metered = false, index);
        way(|it, index| it.spec.groups[index].time_zone = None, index);
        way(|it, index| it.spec.groups[index].link = LinkSpec::default(), index);
    }
    // Devices at the end that nothing happens to; their numbers are nobody else's.
    for _ in 0..scenario.spec.devices() {
        way(
            |it, _| {
                let highest = it.operations.iter().filter_map(device_of).max();
                let count = it.spec.devices();
                let free = highest.is_none_or(|highest| highest + 1 < count);
                let last = it.spec.groups.iter_mut().rfind(|group| group.devices > 0);
                if let (Some(last), true, true) = (last, free, count > 1) {
                    last.devices -= 1;
                }
            },
            0,
        );
    }
    ways
}

fn device_of(operation: &crate::operation::Operation) -> Option<u32> {
    match operation.action {
        Action::Crash { device }
        | Action::CrashAt { device, .. }
        | Action::LoseRequest { device }
        | Action::LoseReply { device }
        | Action::Cut { device, .. }
        | Action::TearLedger { device }
        | Action::FillDisk { device, .. }
        | Action::FlipBit { device }
        | Action::BreakEngine { device, .. }
        | Action::KillWorker { device }
        | Action::CrashWorker { device }
        | Action::JumpClock { device, .. }
        | Action::DriftClock { device, .. } => Some(device),
        Action::CutGroup { .. }
        | Action::MeterGroup { .. }
        | Action::CrashHub { .. }
        | Action::CrashHubAt { .. }
        | Action::Operate(_) => None,
    }
}
