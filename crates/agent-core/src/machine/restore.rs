//! Loading what the ledger names: at boot, after a candidate failed, after a crash loop.
//! Needs no network. The current model comes first, then the one before.

use std::collections::VecDeque;

use rand::Rng;
use slmops_api::device::{Failure, WaitCause};

use super::step::{Step, Worker};
use super::{Core, Serving};
use crate::{Death, Deployment, Effect, EffectId, Loaded, Millis, Obstacle, StageError};

/// A round through what the ledger names.
pub(super) struct Restore {
    /// What is tried now.
    deployment: Deployment,
    /// What is left to try.
    queue: VecDeque<Deployment>,
    /// Why the current model did not come up.
    problem: Option<StageError>,
    action: Action,
    until: Millis,
}

enum Action {
    Stage { id: EffectId },
    Activate { id: EffectId, worker: Worker },
}

impl Restore {
    pub(super) fn until(&self) -> Millis {
        self.until
    }
}

impl<R: Rng> Core<R> {
    /// Begins a round. True: something has changed.
    pub(super) fn restore(&mut self, now: Millis, effects: &mut Vec<Effect>) -> bool {
        self.restore_at = None;
        self.booted = true;
        // What was given up may be whole still.
        let without = self.ledger.without().cloned();
        let named = [self.ledger.current.clone(), self.ledger.previous.clone(), without];
        let queue: VecDeque<_> = named.into_iter().flatten().collect();
        if queue.is_empty() {
            self.stop_serving(effects);
            self.step = Step::Settled;
            return true;
        }
        self.restore_next(now, queue, None, effects);
        true
    }

    fn restore_next(
        &mut self,
        now: Millis,
        mut queue: VecDeque<Deployment>,
        problem: Option<StageError>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(deployment) = queue.pop_front() else {
            return self.restore_failed(now, problem, effects);
        };
        if self.serving.as_ref().is_some_and(|serving| serving.deployment == deployment) {
            return self.restored(now, &deployment, problem);
        }
        let id = self.id();
        effects.push(Effect::Stage { id, deployment: Box::new(deployment.clone()) });
        let until = now + self.config.restore_timeout_ms;
        let action = Action::Stage { id };
        self.step = Step::Restore(Restore { deployment, queue, problem, action, until });
    }

    pub(super) fn restore_staged(
        &mut self,
        now: Millis,
        id: EffectId,
        result: Result<Loaded, StageError>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(mut restore) = self.take_restore(id) else { return };
        match result {
            Ok(loaded) => {
                let worker = Worker { id, effective: loaded.effective, probes: Vec::new() };
                let id = self.id();
                effects.push(Effect::Activate { id, worker: worker.id });
                restore.action = Action::Activate { id, worker };
                restore.until = now + self.config.restore_timeout_ms;
                self.step = Step::Restore(restore);
            }
            Err(error) => self.restore_problem(now, restore, error, effects),
        }
    }

    pub(super) fn restore_activated(
        &mut self,
        now: Millis,
        id: EffectId,
        result: Result<(), StageError>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(restore) = self.take_restore(id) else { return };
        let Action::Activate { worker, .. } = &restore.action else {
            self.step = Step::Restore(restore);
            return;
        };
        if let Err(error) = result {
            effects.push(Effect::Cancel { id: worker.id });
            return self.restore_problem(now, restore, error, effects);
        }
        let is_current = self.ledger.current.as_ref() == Some(&restore.deployment);
        self.serving = Some(Serving {
            worker: worker.id,
            deployment: restore.deployment.clone(),
            effective: worker.effective.clone(),
            probes: if is_current { self.ledger.probes.clone() } else { Vec::new() },
            up: true,
            watch_until: now + self.config.watch_ms,
            crashes: 0,
            fresh: false,
        });
        self.restored(now, &restore.deployment, restore.problem);
    }

    pub(super) fn restore_expired(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let step = std::mem::replace(&mut self.step, Step::Settled);
        let Step::Restore(restore) = step else {
            self.step = step;
            return;
        };
        match &restore.action {
            Action::Stage { id } => effects.push(Effect::Cancel { id: *id }),
            Action::Activate { id, worker } => {
                effects.push(Effect::Cancel { id: *id });
                effects.push(Effect::Cancel { id: worker.id });
            }
        }
        let slow = StageError::Obstacle(Obstacle::new(WaitCause::Storage));
        self.restore_problem(now, restore, slow, effects);
    }

    fn take_restore(&mut self, completed: EffectId) -> Option<Restore> {
        match std::mem::replace(&mut self.step, Step::Settled) {
            Step::Restore(restore)
                if matches!(
                    &restore.action,
                    Action::Stage { id } | Action::Activate { id, .. } if *id == completed
                ) =>
            {
                Some(restore)
            }
            other => {
                self.step = other;
                None
            }
        }
    }

    fn restore_problem(
        &mut self,
        now: Millis,
        restore: Restore,
        error: StageError,
        effects: &mut Vec<Effect>,
    ) {
        let is_current = self.ledger.current.as_ref() == Some(&restore.deployment);
        let problem = if is_current { Some(error) } else { restore.problem };
        self.restore_next(now, restore.queue, problem, effects);
    }

    /// Something that the ledger names serves.
    fn restored(&mut self, now: Millis, deployment: &Deployment, problem: Option<StageError>) {
        self.step = Step::Settled;
        self.restore_failure = None;
        if self.ledger.current.as_ref() == Some(deployment) {
            self.damaged = false;
            self.restore_backoff.reset();
            return;
        }
        if self.ledger.without() == Some(deployment) {
            // The next look takes it back, unless its place is taken by then.
            return;
        }
        match problem {
            Some(StageError::Load) => self.take_back_current(Failure::Load),
            Some(StageError::Configuration { settings }) => {
                self.take_back_current(Failure::Configuration { settings });
            }
            Some(StageError::Died(Death::Fault)) => self.take_back_current(Failure::Crash),
            Some(StageError::Damaged) => self.damaged = true,
            Some(StageError::Died(Death::Killed) | StageError::Obstacle(_)) | None => {
                self.restore_later(now);
            }
        }
    }

    /// Nothing that the ledger names came up. It keeps its place there: with nothing to go back
    /// to, trying again is better than giving up.
    fn restore_failed(
        &mut self,
        now: Millis,
        problem: Option<StageError>,
        effects: &mut Vec<Effect>,
    ) {
        self.step = Step::Settled;
        self.stop_serving(effects);
        self.damaged |= problem == Some(StageError::Damaged);
        self.restore_failure = match problem {
            Some(StageError::Load) => Some(Failure::Load),
            Some(StageError::Configuration { settings }) => {
                Some(Failure::Configuration { settings })
            }
            Some(StageError::Died(_)) => Some(Failure::Crash),
            Some(StageError::Damaged | StageError::Obstacle(_)) | None => None,
        };
        // What was given up is not waited for: it is fetched again, or something else is.
        if self.ledger.current.is_some() {
            self.restore_later(now);
        }
    }

    fn restore_later(&mut self, now: Millis) {
        let limits = self.backoff_limits();
        self.restore_at = Some(self.restore_backoff.fail(now, limits, None, &mut self.rng));
    }

    pub(super) fn stop_serving(&mut self, effects: &mut Vec<Effect>) {
        if self.serving.take().is_some() {
            effects.push(Effect::StopServing);
        }
    }
}
