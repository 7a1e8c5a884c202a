//! The rules that the hub gave with what is wanted: what they hold up, and how it waits.

use jiff::Timestamp;
use rand::Rng;
use slmops_api::device::WaitCause;
use slmops_api::rules::{DeviceRules, Hours};
use slmops_api::window::Opening;

use super::Core;
use super::step::{Resume, Step, Target};
use crate::{Candidate, Effect, Millis};

/// A rule that holds something up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hold {
    pub(super) cause: WaitCause,
    /// When it lets go by itself, if that is known.
    pub(super) until: Option<Timestamp>,
}

/// What the rules say now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ruling {
    /// It may go on, up to this moment if there is one.
    Free {
        until: Option<Timestamp>,
    },
    Held(Hold),
}

impl Ruling {
    const FREE: Self = Self::Free { until: None };

    fn held(cause: WaitCause, until: Option<Timestamp>) -> Self {
        Self::Held(Hold { cause, until })
    }
}

impl<R: Rng> Core<R> {
    /// What the rules say of `target` at `resume`. Getting a confirmed model again, whose file was
    /// damaged, is held up by none.
    fn ruling(&self, now: Millis, target: &Target, resume: Resume) -> Ruling {
        let rules = match &self.ledger.desired {
            Some(desired) if target.generation == self.ledger.generation => &desired.rules,
            _ => return Ruling::FREE,
        };
        match resume {
            Resume::Fetch | Resume::Download | Resume::Replace | Resume::Mark if rules.hold => {
                Ruling::held(WaitCause::Held, None)
            }
            // How many bytes it takes is known once it was asked what there is to get it from.
            Resume::Fetch => self.may_fetch(now, rules, 0),
            Resume::Download => self.may_fetch(now, rules, target.fetched_bytes()),
            // Giving up the model that serves is a switch, and begins a download.
            Resume::Replace => match self.may_switch(now, rules) {
                Ruling::Free { .. } => self.may_fetch(now, rules, target.fetched_bytes()),
                held => held,
            },
            // Nothing serves that a switch could disturb.
            Resume::Mark if self.ledger.without().is_some() => Ruling::FREE,
            Resume::Mark => self.may_switch(now, rules),
            Resume::Verify | Resume::ProbeLive => Ruling::FREE,
        }
    }

    fn may_fetch(&self, now: Millis, rules: &DeviceRules, bytes: u64) -> Ruling {
        if self.around.1.metered && !rules.metered.allows(bytes) {
            return Ruling::held(WaitCause::Metered, None);
        }
        self.within(now, &rules.download_in)
    }

    fn may_switch(&self, now: Millis, rules: &DeviceRules) -> Ruling {
        match (rules.activate_at, self.time(now)) {
            (Some(at), None) => Ruling::held(WaitCause::Clock, Some(at)),
            (Some(at), Some(time)) if time < at => Ruling::held(WaitCause::NotBefore, Some(at)),
            _ => self.within(now, &rules.activate_in),
        }
    }

    fn within(&self, now: Millis, hours: &[Hours]) -> Ruling {
        if hours.is_empty() {
            return Ruling::FREE;
        }
        let Some(time) = self.time(now) else { return Ruling::held(WaitCause::Clock, None) };
        match Hours::opening(hours, time, self.around.1.time_zone.as_deref()) {
            Opening::Open { until } => Ruling::Free { until },
            Opening::Shut { until } => Ruling::held(WaitCause::Hours, until),
        }
    }

    /// The time of day, if the device can be sure that it is not earlier.
    fn time(&self, now: Millis) -> Option<Timestamp> {
        let (since, around) = &self.around;
        let passed_ms = i64::try_from(now.0.saturating_sub(since.0)).ok()?;
        around.time?.checked_add(jiff::SignedDuration::from_millis(passed_ms)).ok()
    }

    /// When the core's own time has come to `at`.
    fn moment(&self, at: Timestamp) -> Option<Millis> {
        let (since, around) = &self.around;
        let ahead_ns = u128::try_from(at.duration_since(around.time?).as_nanos()).unwrap_or(0);
        Some(*since + u64::try_from(ahead_ns.div_ceil(1_000_000)).ok()?)
    }

    /// Whether a rule keeps `target` from going on at `resume`.
    pub(super) fn is_held(&self, now: Millis, target: &Target, resume: Resume) -> bool {
        matches!(self.ruling(now, target, resume), Ruling::Held(_))
    }

    /// When what the rules say changes by itself, while that matters.
    pub(super) fn rules_timer(&self) -> Option<Millis> {
        match &self.step {
            Step::Held { hold, .. } => self.moment(hold.until?),
            Step::Download { free_until, .. } => self.moment((*free_until)?),
            _ => None,
        }
    }

    /// Goes on with `target` at `resume`, now or when the rules let it.
    pub(super) fn proceed(
        &mut self,
        now: Millis,
        target: Target,
        resume: Resume,
        effects: &mut Vec<Effect>,
    ) {
        let free_until = match self.ruling(now, &target, resume) {
            Ruling::Free { until } => until,
            Ruling::Held(hold) => {
                if let Resume::Mark = resume {
                    self.keep(&target);
                }
                self.step = Step::Held { target, hold, resume };
                return;
            }
        };
        match resume {
            Resume::Fetch => self.fetch(now, target, effects),
            Resume::Download => self.download(now, target, free_until, effects),
            Resume::Replace => self.replace(target),
            Resume::Verify => self.verify(now, target, effects),
            Resume::Mark => self.mark(target),
            Resume::ProbeLive => self.probe_live(now, target, effects),
        }
    }

    /// Notes in the ledger what was fetched and verified, so that it outlives a restart.
    fn keep(&mut self, target: &Target) {
        let (deployment, generation) = (target.deployment(), target.generation);
        let kept = |candidate: &Candidate| {
            candidate.deployment == deployment && candidate.generation == generation
        };
        if !self.ledger.candidate.as_ref().is_some_and(kept) {
            let candidate = Candidate { deployment, generation, attempts: 0, probed: false };
            self.change(|ledger| ledger.candidate = Some(candidate));
        }
    }

    /// One look at a download: its time may pass while it comes in. True when that is so.
    pub(super) fn look_at_download(
        &mut self,
        now: Millis,
        mut step: Step,
        effects: &mut Vec<Effect>,
    ) -> bool {
        if let Step::Download { target, id, free_until, .. } = &mut step {
            match self.ruling(now, target, Resume::Download) {
                Ruling::Free { until } => *free_until = until,
                Ruling::Held(_) => {
                    effects.push(Effect::Cancel { id: *id });
                    let target = target.clone();
                    self.proceed(now, target, Resume::Download, effects);
                    return true;
                }
            }
        }
        self.step = step;
        false
    }

    /// One look at something that a rule holds up. True when it goes on, or something else does
    /// meanwhile.
    pub(super) fn look_at_held(
        &mut self,
        now: Millis,
        target: Target,
        resume: Resume,
        effects: &mut Vec<Effect>,
    ) -> bool {
        // The model that serves is brought back meanwhile; then what is held is aimed at again.
        let restore_due = self.restore_at.is_some_and(|at| at <= now);
        if self.mend(now, restore_due, effects) {
            return true;
        }
        match self.ruling(now, &target, resume) {
            Ruling::Held(hold) => {
                self.step = Step::Held { target, hold, resume };
                false
            }
            Ruling::Free { .. } => {
                self.proceed(now, target, resume, effects);
                true
            }
        }
    }
}
