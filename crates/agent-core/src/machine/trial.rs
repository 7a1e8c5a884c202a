//! Trying a model on the device: staging, probes, the switch, probes again.

use rand::Rng;
use slmops_api::device::Failure;
use slmops_api::probe::{MAX_PROBES, ProbeResult};

use super::step::{Resume, Step, Target, Worker};
use super::{Core, Serving};
use crate::{
    Candidate, Death, Deployment, Effect, EffectId, Loaded, Millis, Outcome, ProbeError, Probed,
    ReplayOrder, Scope, StageError,
};

impl<R: Rng> Core<R> {
    /// Notes in the ledger that staging begins, so that a model which takes the whole device down
    /// is not tried for ever.
    pub(super) fn mark(&mut self, target: Target) {
        let deployment = target.deployment();
        let before = self.ledger.candidate.as_ref();
        let same = before.filter(|candidate| {
            candidate.deployment == deployment && candidate.generation == target.generation
        });
        let attempts = same.map_or(0, |candidate| candidate.attempts) + 1;
        if attempts > self.config.attempt_limit {
            return self.reject(&target, Failure::Crash, Scope::Generation);
        }
        let generation = target.generation;
        self.change(|ledger| {
            ledger.candidate = Some(Candidate { deployment, generation, attempts, probed: false });
        });
        self.step = Step::Mark { target };
    }

    pub(super) fn staged(
        &mut self,
        now: Millis,
        id: EffectId,
        result: Result<Loaded, StageError>,
        effects: &mut Vec<Effect>,
    ) {
        if let Step::Restore(_) = self.step {
            return self.restore_staged(now, id, result, effects);
        }
        if !matches!(self.step, Step::Stage { .. }) {
            return;
        }
        let Some(Step::Stage { target, .. }) = self.take_step(id) else { return };
        let loaded = match result {
            Ok(loaded) => loaded,
            Err(error) => return self.stage_failed(now, target, error),
        };
        let differences = loaded.effective.differences(&target.runtime);
        let failure = if differences.is_empty() {
            self.over_budget(loaded.memory_bytes)
        } else {
            let settings = differences.into_iter().map(|(name, _, _)| name.to_owned()).collect();
            Some(Failure::Configuration { settings })
        };
        if let Some(failure) = failure {
            effects.push(Effect::Cancel { id });
            return self.fail(&target, failure);
        }
        let worker = Worker { id, effective: loaded.effective, probes: Vec::new() };
        let id = self.id();
        let package = target.package();
        let replay = self.replay_order(&target);
        effects.push(Effect::Probe { id, worker: worker.id, package, live: false, replay });
        let until = now + target.confirm_ms;
        self.step = Step::Probe { target, worker, id, until };
    }

    /// What serves beside a new version is what that is compared with.
    fn replay_order(&self, target: &Target) -> Option<ReplayOrder> {
        let serving = self.serving.as_ref().filter(|serving| serving.up)?;
        let before = serving.deployment.package.manifest;
        let limit_ms = self.config.replay_limit_ms.min(target.confirm_ms / 4);
        (before != target.model.manifest).then_some(ReplayOrder { before, limit_ms })
    }

    pub(super) fn stage_failed(&mut self, now: Millis, mut target: Target, error: StageError) {
        match error {
            StageError::Load => self.fail(&target, Failure::Load),
            StageError::Configuration { settings } => {
                self.fail(&target, Failure::Configuration { settings });
            }
            StageError::Died(Death::Fault) => self.fail(&target, Failure::Crash),
            StageError::Died(Death::Killed) => self.pause(now, target, None, Resume::Mark),
            StageError::Damaged => {
                target.package = None;
                self.pause(now, target, None, Resume::Fetch);
            }
            StageError::Obstacle(obstacle) => {
                self.forgive();
                self.pause(now, target, Some(obstacle), Resume::Mark);
            }
        }
    }

    /// Takes back the attempt: what stopped it says nothing about the model.
    pub(super) fn forgive(&mut self) {
        self.change(|ledger| {
            if let Some(candidate) = &mut ledger.candidate {
                candidate.attempts = candidate.attempts.saturating_sub(1);
            }
        });
    }

    pub(super) fn over_budget(&self, measured_bytes: u64) -> Option<Failure> {
        let budget_bytes = self.config.memory_budget_bytes;
        (measured_bytes > budget_bytes).then_some(Failure::Memory { measured_bytes, budget_bytes })
    }

    pub(super) fn probed(
        &mut self,
        now: Millis,
        id: EffectId,
        result: Result<Probed, ProbeError>,
        effects: &mut Vec<Effect>,
    ) {
        let result = result.map(tidy);
        if matches!(self.step, Step::ProbeLive { .. }) {
            return self.probed_live(now, id, result, effects);
        }
        if !matches!(self.step, Step::Probe { .. }) {
            return;
        }
        let Some(Step::Probe { mut target, mut worker, .. }) = self.take_step(id) else { return };
        let failure = match result {
            Ok(probed) => {
                match verdict(&probed).or_else(|| self.over_budget(probed.memory_bytes)) {
                    None => {
                        worker.probes = probed.results;
                        self.change(|ledger| {
                            if let Some(candidate) = &mut ledger.candidate {
                                candidate.probed = true;
                            }
                        });
                        self.step = Step::Commit { target, worker };
                        return;
                    }
                    Some(failure) => failure,
                }
            }
            Err(ProbeError::Package) => Failure::Package,
            Err(ProbeError::Died(Death::Fault)) => Failure::Crash,
            Err(ProbeError::Died(Death::Killed)) => {
                effects.push(Effect::Cancel { id: worker.id });
                return self.pause(now, target, None, Resume::Mark);
            }
            Err(ProbeError::Damaged) => {
                effects.push(Effect::Cancel { id: worker.id });
                target.package = None;
                return self.pause(now, target, None, Resume::Fetch);
            }
        };
        effects.push(Effect::Cancel { id: worker.id });
        self.fail(&target, failure);
    }

    // --- switching

    pub(super) fn activated(
        &mut self,
        now: Millis,
        id: EffectId,
        result: Result<(), StageError>,
        effects: &mut Vec<Effect>,
    ) {
        if let Step::Restore(_) = self.step {
            return self.restore_activated(now, id, result, effects);
        }
        if !matches!(self.step, Step::Activate { .. }) {
            return;
        }
        let Some(Step::Activate { target, worker, .. }) = self.take_step(id) else { return };
        if let Err(error) = result {
            // The one before still serves.
            effects.push(Effect::Cancel { id: worker.id });
            return self.stage_failed(now, target, error);
        }
        self.serving = Some(Serving {
            worker: worker.id,
            deployment: target.deployment(),
            effective: worker.effective,
            probes: worker.probes,
            up: true,
            watch_until: now + self.config.watch_ms,
            crashes: 0,
            fresh: true,
        });
        self.restore_failure = None;
        self.probe_live(now, target, effects);
    }

    pub(super) fn probe_live(&mut self, now: Millis, target: Target, effects: &mut Vec<Effect>) {
        let Some(serving) = &self.serving else { return };
        let (worker, package) = (serving.worker, target.package());
        let id = self.id();
        effects.push(Effect::Probe { id, worker, package, live: true, replay: None });
        let until = now + target.confirm_ms;
        self.step = Step::ProbeLive { target, id, until };
    }

    pub(super) fn probed_live(
        &mut self,
        now: Millis,
        id: EffectId,
        result: Result<Probed, ProbeError>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(Step::ProbeLive { mut target, .. }) = self.take_step(id) else { return };
        let failure = match result {
            Ok(probed) => {
                match verdict(&probed).or_else(|| self.over_budget(probed.memory_bytes)) {
                    None => return self.confirm(target, probed.results),
                    Some(failure) => failure,
                }
            }
            Err(ProbeError::Died(Death::Killed))
                if target.interruptions < self.config.attempt_limit =>
            {
                target.interruptions += 1;
                return self.pause(now, target, None, Resume::ProbeLive);
            }
            Err(ProbeError::Died(_) | ProbeError::Damaged) => Failure::Crash,
            Err(ProbeError::Package) => Failure::Package,
        };
        self.fail(&target, failure);
        self.restore(now, effects);
    }

    pub(super) fn confirm(&mut self, target: Target, probes: Vec<ProbeResult>) {
        let deployment = target.deployment();
        if let Some(serving) = &mut self.serving {
            serving.probes.clone_from(&probes);
        }
        self.change(|ledger| {
            let back = |it: &mut Deployment| it.model.manifest == target.model.manifest;
            ledger.given_up.take_if(back);
            let before = ledger.current.replace(deployment);
            // Fetching a damaged model again must not make it its own predecessor.
            if let Some(before) = before.filter(|before| ledger.current.as_ref() != Some(before)) {
                ledger.previous = Some(before);
                ledger.given_up = None;
            }
            ledger.probes = probes;
            ledger.candidate = None;
            if ledger.generation == target.generation {
                ledger.outcome = Some(Outcome::Confirmed);
            }
        });
        self.damaged = false;
        self.restore_at = None;
        self.work_backoff.reset();
        self.step = Step::Confirm;
    }
}

/// The failure that the probe results amount to. No probes prove nothing.
fn verdict(probed: &Probed) -> Option<Failure> {
    let results = &probed.results;
    if results.is_empty() {
        return Some(Failure::Package);
    }
    let passed = results.iter().all(|result| result.passed);
    (!passed).then(|| Failure::Probes { results: results.clone() })
}

/// Bounds the results and takes out what JSON cannot carry.
fn tidy(mut probed: Probed) -> Probed {
    probed.results.truncate(MAX_PROBES);
    for result in &mut probed.results {
        result.value = result.value.filter(|value| value.is_finite());
        if !result.floor.is_finite() {
            result.floor = f64::MIN;
        }
    }
    probed
}
