//! What to do next, what to give up, and what a failure means.

use rand::Rng;
use slmops_api::device::{Failure, Rejection, WaitCause};

use super::Core;
use super::fetch::fits;
use super::step::{Resume, Step, Target};
use crate::{Deployment, Effect, EffectId, Millis, Obstacle, Outcome, Scope};

impl<R: Rng> Core<R> {
    /// Takes the step out if it waits for this effect; leaves [`Step::Settled`] in its place.
    pub(super) fn take_step(&mut self, id: EffectId) -> Option<Step> {
        (self.step.awaits() == Some(id)).then(|| std::mem::replace(&mut self.step, Step::Settled))
    }

    /// Drops what is under way if no traffic depends on it yet; otherwise it is finished first.
    pub(super) fn abandon(&mut self, effects: &mut Vec<Effect>) {
        if !self.step.may_be_dropped() {
            return;
        }
        let step = std::mem::replace(&mut self.step, Step::Settled);
        let ids = [step.awaits(), step.idle_worker()];
        effects.extend(ids.into_iter().flatten().map(|id| Effect::Cancel { id }));
    }

    /// Makes one step that needs no completion. False when there is none to make.
    pub(super) fn forward(&mut self, now: Millis, effects: &mut Vec<Effect>) -> bool {
        if self.crash_loops() && self.step.may_be_dropped() {
            self.abandon(effects);
            self.take_back_current(Failure::Crash);
            self.restore(now, effects);
            return true;
        }
        let rest = self.rest();
        if rest.is_some() && rest == self.idle {
            return false;
        }
        match std::mem::replace(&mut self.step, Step::Settled) {
            Step::Settled => {
                let aimed = self.aim(now, effects);
                self.idle = if aimed { None } else { rest };
                aimed
            }
            Step::Pause { target, until, resume, .. } if until <= now => {
                self.proceed(now, target, resume, effects);
                true
            }
            Step::Held { target, resume, .. } => self.look_at_held(now, target, resume, effects),
            Step::Room { mut target } if !self.dirty() => {
                // What it was to be made from may be gone.
                target.package = None;
                self.proceed(now, target, Resume::Fetch, effects);
                true
            }
            Step::Mark { target } if !self.dirty() => {
                let id = self.id();
                effects.push(Effect::Stage { id, deployment: Box::new(target.deployment()) });
                let until = now + target.confirm_ms;
                self.step = Step::Stage { target, id, until };
                true
            }
            step @ Step::Download { .. } => self.look_at_download(now, step, effects),
            // Its time may have passed while it was being tried.
            Step::Commit { target, worker } if self.is_held(now, &target, Resume::Mark) => {
                effects.push(Effect::Cancel { id: worker.id });
                self.forgive();
                self.proceed(now, target, Resume::Mark, effects);
                true
            }
            Step::Commit { target, worker } if !self.dirty() => {
                let id = self.id();
                effects.push(Effect::Activate { id, worker: worker.id });
                let until = now + target.confirm_ms;
                self.step = Step::Activate { target, worker, id, until };
                true
            }
            // The ledger is durable: settled.
            Step::Confirm if !self.dirty() => true,
            other => {
                self.step = other;
                false
            }
        }
    }

    /// Compares what is with what should be. True when it started or noted something.
    pub(super) fn aim(&mut self, now: Millis, effects: &mut Vec<Effect>) -> bool {
        if self.keeps_given_up() {
            return true;
        }
        let current = self.ledger.current.as_ref();
        let serves_current = self.serving.as_ref().map(|serving| &serving.deployment) == current;
        let restore_due = self.restore_at.is_some_and(|at| at <= now);
        let desired = self.ledger.desired.as_ref();
        let wanted = desired.and_then(|desired| Some((desired.model.as_ref()?, &desired.runtime)));
        let Some((model, runtime)) = wanted else {
            return self.mend(now, restore_due, effects);
        };
        if current.is_some_and(|current| current.is(model, runtime)) {
            if serves_current {
                return self.note_outcome(Outcome::Confirmed);
            }
            return self.mend(now, restore_due, effects);
        }
        let Some(target) = desired.and_then(Target::of) else { return false };
        // What the ledger names comes before what is new.
        if restore_due {
            return self.restore(now, effects);
        }
        let refusal =
            self.ledger.refuses(target.model.manifest, &target.runtime, target.generation);
        if let Some(refusal) = refusal {
            let failure = refusal.rejection.failure.clone();
            return self.note_outcome(Outcome::RolledBack { failure })
                || self.mend(now, restore_due, effects);
        }
        if self.dirty() {
            return false;
        }
        match self.ledger.package(target.model.manifest) {
            Some(package) if fits(&package, &target.model) => {
                self.verify(now, Target { package: Some(package), ..target }, effects);
            }
            _ => self.proceed(now, target, Resume::Fetch, effects),
        }
        true
    }

    /// Brings the ledger's model back to service where it is not: by loading it, or when its file
    /// is damaged by getting it again. True when it started something.
    pub(super) fn mend(
        &mut self,
        now: Millis,
        restore_due: bool,
        effects: &mut Vec<Effect>,
    ) -> bool {
        if restore_due {
            return self.restore(now, effects);
        }
        let serving = self.serving.as_ref().map(|serving| &serving.deployment);
        let current = self.ledger.current.as_ref();
        match current.filter(|_| self.damaged).or(self.ledger.without()) {
            Some(lost) if serving != Some(lost) && !self.dirty() => {
                let target = Target::again(lost);
                self.fetch(now, target, effects);
                true
            }
            _ => false,
        }
    }

    /// What was to be given up and still serves, since something else is wanted by now, stays.
    fn keeps_given_up(&mut self) -> bool {
        let serving = self.serving.as_ref().map(|serving| &serving.deployment);
        let keeps = self.ledger.without().is_some_and(|it| serving == Some(it));
        if keeps {
            let probes = self.serving.as_ref().map(|it| it.probes.clone()).unwrap_or_default();
            self.change(|ledger| {
                ledger.current = ledger.given_up.take();
                ledger.probes = probes;
            });
        }
        keeps
    }

    pub(super) fn note_outcome(&mut self, outcome: Outcome) -> bool {
        if self.ledger.outcome.as_ref() == Some(&outcome) && self.ledger.candidate.is_none() {
            return false;
        }
        self.change(|ledger| {
            ledger.outcome = Some(outcome);
            ledger.candidate = None;
        });
        true
    }

    pub(super) fn pause(
        &mut self,
        now: Millis,
        target: Target,
        obstacle: Option<Obstacle>,
        resume: Resume,
    ) {
        let retry_after = obstacle.and_then(|obstacle| obstacle.retry_after_ms);
        let limits = self.backoff_limits();
        let until = self.work_backoff.fail(now, limits, retry_after, &mut self.rng);
        let cause = obstacle.map(|obstacle| obstacle.cause);
        self.step = Step::Pause { target, cause, until, resume };
    }

    // --- failing

    /// The activated candidate crashed: it is rejected, and the ledger's model comes back.
    pub(super) fn crashed_live(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        match std::mem::replace(&mut self.step, Step::Settled) {
            Step::ProbeLive { target, id, .. } => {
                effects.push(Effect::Cancel { id });
                self.fail(&target, Failure::Crash);
                self.restore(now, effects);
            }
            Step::Pause { target, resume: Resume::ProbeLive, .. } => {
                self.fail(&target, Failure::Crash);
                self.restore(now, effects);
            }
            other => self.step = other,
        }
    }

    /// Rejects what failed, as far as the failure says something about it.
    pub(super) fn fail(&mut self, target: &Target, failure: Failure) {
        // What is confirmed here in another configuration is not to blame as a whole.
        let same = |known: &Deployment| known.model.manifest == target.model.manifest;
        let ledger = &self.ledger;
        let confirmed = [&ledger.current, &ledger.previous, &ledger.given_up];
        let confirmed = confirmed.into_iter().flatten().any(same);
        let scope = match failure {
            Failure::Timeout => Scope::Generation,
            Failure::Configuration { .. } | Failure::Memory { .. } => {
                Scope::Runtime { runtime: target.runtime.clone() }
            }
            _ if confirmed => Scope::Runtime { runtime: target.runtime.clone() },
            _ => Scope::Manifest,
        };
        self.reject(target, failure, scope);
    }

    pub(super) fn reject(&mut self, target: &Target, failure: Failure, scope: Scope) {
        let current = self.ledger.current.as_ref();
        if current.is_some_and(|current| current.is(&target.model, &target.runtime)) {
            // Its file was damaged here, and getting it again did not help.
            self.work_backoff.reset();
            self.damaged = false;
            self.restore_at = Some(Millis(0));
            return self.take_back_current(failure);
        }
        let rejection = Rejection {
            manifest: target.model.manifest,
            generation: target.generation,
            failure: failure.clone(),
        };
        let without = self.ledger.without();
        let lost = without.is_some_and(|without| without.is(&target.model, &target.runtime));
        self.change(|ledger| {
            ledger.reject(rejection, scope);
            ledger.candidate = None;
            // Fetching it again did not help either.
            ledger.given_up.take_if(|_| lost);
            if ledger.generation == target.generation {
                ledger.outcome = Some(Outcome::RolledBack { failure });
            }
        });
        self.work_backoff.reset();
    }

    /// Rejects the confirmed model, which stopped working, and puts the one before in its place.
    pub(super) fn take_back_current(&mut self, failure: Failure) {
        let Some(current) = self.ledger.current.clone() else { return };
        let same = |other: &Deployment| other.model.manifest == current.model.manifest;
        let scope = if self.ledger.previous.as_ref().is_some_and(same) {
            Scope::Runtime { runtime: current.runtime.clone() }
        } else {
            Scope::Manifest
        };
        self.change(|ledger| {
            let rejection = Rejection {
                manifest: current.model.manifest,
                generation: ledger.generation,
                failure: failure.clone(),
            };
            ledger.reject(rejection, scope);
            ledger.current = ledger.previous.take();
            ledger.probes.clear();
            ledger.candidate = None;
            if ledger.outcome == Some(Outcome::Confirmed) {
                ledger.outcome = Some(Outcome::RolledBack { failure });
            }
        });
    }

    pub(super) fn expire_step(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if self.step.timer().is_none_or(|until| now < until) {
            return;
        }
        if let Step::Restore(_) = self.step {
            return self.restore_expired(now, effects);
        }
        if matches!(self.step, Step::Pause { .. }) {
            return;
        }
        let step = std::mem::replace(&mut self.step, Step::Settled);
        let ids = [step.awaits(), step.idle_worker()];
        effects.extend(ids.into_iter().flatten().map(|id| Effect::Cancel { id }));
        let network = Some(Obstacle::new(WaitCause::Network));
        match step {
            Step::Fetch { target, .. } => self.pause(now, target, network, Resume::Fetch),
            Step::Download { target, .. } => self.pause(now, target, network, Resume::Download),
            Step::Verify { target, .. } => {
                let storage = Some(Obstacle::new(WaitCause::Storage));
                self.pause(now, target, storage, Resume::Verify);
            }
            Step::Stage { target, .. } | Step::Probe { target, .. } => {
                self.fail(&target, Failure::Timeout);
            }
            // It may serve or not: make sure of what the ledger says.
            Step::Activate { target, worker, .. } => {
                effects.push(Effect::Cancel { id: worker.id });
                self.serving = None;
                self.fail(&target, Failure::Timeout);
                self.restore(now, effects);
            }
            Step::ProbeLive { target, .. } => {
                self.fail(&target, Failure::Timeout);
                self.restore(now, effects);
            }
            other => self.step = other,
        }
    }
}
