//! From a wish to a confirmed model, step by step; and what a failure in each step means.

use rand::Rng;
use slmops_api::device::{
    DesiredModel, DesiredState, Failure, InstalledModel, Rejection, WaitCause,
};
use slmops_api::probe::{MAX_PROBES, ProbeResult};
use slmops_api::runtime::{EffectiveConfig, RuntimeConfig};

use super::restore::Restore;
use super::{Core, Serving};
use crate::{
    Candidate, Death, Deployment, Effect, EffectId, FetchError, Loaded, Millis, Obstacle, Outcome,
    Package, ProbeError, Probed, Scope, StageError, VerifyError,
};

/// The least time that a device gets to confirm, whatever the hub says, in milliseconds.
const MIN_CONFIRM_MS: u64 = 10_000;
/// The time to confirm a model that is fetched again because its file was damaged.
const MEND_CONFIRM_MS: u64 = 900_000;

/// What is under way. Each variant waits for one completion, one moment, or the ledger.
pub(super) enum Step {
    /// Nothing; look at what is desired.
    Settled,
    /// Loading what the ledger names, at boot or when going back.
    Restore(Restore),
    /// Waiting to try again.
    Pause { target: Target, cause: Option<WaitCause>, until: Millis, resume: Resume },
    /// Manifest and signature are coming.
    Fetch { target: Target, id: EffectId, until: Millis },
    /// Files are coming.
    Download { target: Target, id: EffectId, until: Millis, done_bytes: u64, total_bytes: u64 },
    /// Files are being hashed.
    Verify { target: Target, id: EffectId, until: Millis },
    /// Waits until the candidate is in the durable ledger.
    Mark { target: Target },
    /// A worker loads it.
    Stage { target: Target, id: EffectId, until: Millis },
    /// Its probes run, without traffic.
    Probe { target: Target, worker: Worker, id: EffectId, until: Millis },
    /// Waits until the durable ledger says that the probes passed.
    Commit { target: Target, worker: Worker },
    /// Traffic is being turned to it.
    Activate { target: Target, worker: Worker, id: EffectId, until: Millis },
    /// Its probes run through the live endpoint.
    ProbeLive { target: Target, id: EffectId, until: Millis },
    /// Waits until the durable ledger says that it is confirmed.
    Confirm,
}

/// Where a pause goes on.
#[derive(Clone, Copy)]
pub(super) enum Resume {
    Fetch,
    Download,
    Verify,
    Mark,
    ProbeLive,
}

/// What is wanted, and what is known of it so far.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) generation: u64,
    model: DesiredModel,
    runtime: RuntimeConfig,
    confirm_ms: u64,
    package: Option<Package>,
    /// Times that the source did not have a file.
    missing: u32,
    /// Times that the serving worker was killed while its probes ran.
    interruptions: u32,
}

impl Target {
    /// What the hub asks for, if it asks for a model.
    fn of(desired: &DesiredState) -> Option<Self> {
        Some(Self {
            generation: desired.generation,
            model: desired.model.clone()?,
            runtime: desired.runtime.clone(),
            confirm_ms: (u64::from(desired.confirm_timeout_s) * 1_000).max(MIN_CONFIRM_MS),
            package: None,
            missing: 0,
            interruptions: 0,
        })
    }

    /// A confirmed deployment whose file is damaged. It belongs to no generation.
    fn again(current: &Deployment) -> Self {
        let InstalledModel { model, version, variant, manifest, weights } = current.model.clone();
        Self {
            generation: 0,
            model: DesiredModel {
                model,
                version,
                variant,
                manifest,
                weights,
                size_bytes: current.package.weights.size_bytes,
                predicted_memory_bytes: 0,
            },
            runtime: current.runtime.clone(),
            confirm_ms: MEND_CONFIRM_MS,
            package: None,
            missing: 0,
            interruptions: 0,
        }
    }

    fn package(&self) -> Package {
        self.package.expect("a target has its package once it is fetched")
    }

    pub(super) fn deployment(&self) -> Deployment {
        let model = &self.model;
        Deployment {
            model: InstalledModel {
                model: model.model.clone(),
                version: model.version.clone(),
                variant: model.variant.clone(),
                manifest: model.manifest,
                weights: model.weights,
            },
            package: self.package(),
            runtime: self.runtime.clone(),
        }
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.package.map_or(self.model.size_bytes, |package| package.total_bytes())
    }
}

/// A staged worker.
#[derive(Clone)]
pub(super) struct Worker {
    pub(super) id: EffectId,
    pub(super) effective: EffectiveConfig,
    pub(super) probes: Vec<ProbeResult>,
}

impl Step {
    pub(super) fn timer(&self) -> Option<Millis> {
        match self {
            Self::Settled | Self::Mark { .. } | Self::Commit { .. } | Self::Confirm => None,
            Self::Restore(restore) => Some(restore.until()),
            Self::Pause { until, .. }
            | Self::Fetch { until, .. }
            | Self::Download { until, .. }
            | Self::Verify { until, .. }
            | Self::Stage { until, .. }
            | Self::Probe { until, .. }
            | Self::Activate { until, .. }
            | Self::ProbeLive { until, .. } => Some(*until),
        }
    }

    /// The effect whose completion is awaited.
    fn awaits(&self) -> Option<EffectId> {
        match self {
            Self::Fetch { id, .. }
            | Self::Download { id, .. }
            | Self::Verify { id, .. }
            | Self::Stage { id, .. }
            | Self::Probe { id, .. }
            | Self::Activate { id, .. }
            | Self::ProbeLive { id, .. } => Some(*id),
            _ => None,
        }
    }

    /// The staged worker that has no traffic yet.
    fn idle_worker(&self) -> Option<EffectId> {
        match self {
            Self::Probe { worker, .. } | Self::Commit { worker, .. } => Some(worker.id),
            _ => None,
        }
    }

    /// Whether the step may be dropped: no traffic depends on it.
    fn may_be_dropped(&self) -> bool {
        match self {
            Self::Restore(_)
            | Self::Activate { .. }
            | Self::ProbeLive { .. }
            | Self::Confirm
            | Self::Pause { resume: Resume::ProbeLive, .. } => false,
            Self::Settled
            | Self::Pause { .. }
            | Self::Fetch { .. }
            | Self::Download { .. }
            | Self::Verify { .. }
            | Self::Mark { .. }
            | Self::Stage { .. }
            | Self::Probe { .. }
            | Self::Commit { .. } => true,
        }
    }
}

impl<R: Rng> Core<R> {
    /// Takes the step out if it waits for this effect; leaves [`Step::Settled`] in its place.
    fn take_step(&mut self, id: EffectId) -> Option<Step> {
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
        match std::mem::replace(&mut self.step, Step::Settled) {
            Step::Settled => self.aim(now, effects),
            Step::Pause { target, until, resume, .. } if until <= now => {
                match resume {
                    Resume::Fetch => self.fetch(now, target, effects),
                    Resume::Download => self.download(now, target, effects),
                    Resume::Verify => self.verify(now, target, effects),
                    Resume::Mark => self.mark(target),
                    Resume::ProbeLive => self.probe_live(now, target, effects),
                }
                true
            }
            Step::Mark { target } if !self.dirty() => {
                let id = self.id();
                effects.push(Effect::Stage { id, deployment: target.deployment() });
                let until = now + target.confirm_ms;
                self.step = Step::Stage { target, id, until };
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
    fn aim(&mut self, now: Millis, effects: &mut Vec<Effect>) -> bool {
        let current = self.ledger.current.as_ref();
        let serves_current = self.serving.as_ref().map(|serving| &serving.deployment) == current;
        let restore_due = self.restore_at.is_some_and(|at| at <= now);
        let Some(target) = self.desired.as_ref().and_then(Target::of) else {
            return self.mend(now, restore_due, effects);
        };
        if current.is_some_and(|current| current.is(&target.model, &target.runtime)) {
            if serves_current {
                return self.note_outcome(Outcome::Confirmed);
            }
            return self.mend(now, restore_due, effects);
        }
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
            _ => self.fetch(now, target, effects),
        }
        true
    }

    /// Brings the ledger's model back to service where it is not: by loading it, or when its file
    /// is damaged by getting it again. True when it started something.
    fn mend(&mut self, now: Millis, restore_due: bool, effects: &mut Vec<Effect>) -> bool {
        if restore_due {
            return self.restore(now, effects);
        }
        let serving = self.serving.as_ref().map(|serving| &serving.deployment);
        match self.ledger.current.as_ref() {
            Some(current) if self.damaged && serving != Some(current) && !self.dirty() => {
                let target = Target::again(current);
                self.fetch(now, target, effects);
                true
            }
            _ => false,
        }
    }

    fn note_outcome(&mut self, outcome: Outcome) -> bool {
        if self.ledger.outcome.as_ref() == Some(&outcome) && self.ledger.candidate.is_none() {
            return false;
        }
        self.change(|ledger| {
            ledger.outcome = Some(outcome);
            ledger.candidate = None;
        });
        true
    }

    fn pause(&mut self, now: Millis, target: Target, obstacle: Option<Obstacle>, resume: Resume) {
        let retry_after = obstacle.and_then(|obstacle| obstacle.retry_after_ms);
        let limits = self.backoff_limits();
        let until = self.work_backoff.fail(now, limits, retry_after, &mut self.rng);
        let cause = obstacle.map(|obstacle| obstacle.cause);
        self.step = Step::Pause { target, cause, until, resume };
    }

    // --- fetching

    fn fetch(&mut self, now: Millis, target: Target, effects: &mut Vec<Effect>) {
        let id = self.id();
        effects.push(Effect::FetchPackage { id, model: target.model.clone() });
        let until = now + self.config.answer_timeout_ms;
        self.step = Step::Fetch { target, id, until };
    }

    pub(super) fn package_fetched(
        &mut self,
        now: Millis,
        id: EffectId,
        result: Result<Package, FetchError>,
        effects: &mut Vec<Effect>,
    ) {
        if !matches!(self.step, Step::Fetch { .. }) {
            return;
        }
        let Some(Step::Fetch { mut target, .. }) = self.take_step(id) else { return };
        match result {
            Ok(package) if fits(&package, &target.model) => {
                target.package = Some(package);
                target.missing = 0;
                self.download(now, target, effects);
            }
            // A good signature over something else than what the hub announced.
            Ok(_) => self.fail(&target, Failure::Package),
            Err(error) => self.fetch_failed(now, target, error, Resume::Fetch),
        }
    }

    fn fetch_failed(&mut self, now: Millis, mut target: Target, error: FetchError, resume: Resume) {
        match error {
            FetchError::Obstacle(obstacle) => self.pause(now, target, Some(obstacle), resume),
            FetchError::Missing => {
                target.missing += 1;
                if target.missing >= self.config.missing_limit {
                    return self.fail(&target, Failure::Digest);
                }
                self.pause(now, target, Some(Obstacle::new(WaitCause::Network)), resume);
            }
            FetchError::Signature => self.fail(&target, Failure::Signature),
            FetchError::Digest => self.fail(&target, Failure::Digest),
            FetchError::Package => self.fail(&target, Failure::Package),
        }
    }

    fn download(&mut self, now: Millis, target: Target, effects: &mut Vec<Effect>) {
        let package = target.package();
        let mut keep = self.ledger.blobs();
        keep.extend(self.saved.blobs());
        keep.extend(package.blobs().map(|blob| blob.digest));
        effects.push(Effect::Collect { keep });
        let id = self.id();
        effects.push(Effect::Download { id, model: target.model.clone(), package });
        let until = now + self.config.stall_timeout_ms;
        let total_bytes = package.total_bytes();
        self.step = Step::Download { target, id, until, done_bytes: 0, total_bytes };
    }

    pub(super) fn progress(&mut self, now: Millis, progress: EffectId, done: u64, total: u64) {
        let Step::Download { id, until, done_bytes, total_bytes, .. } = &mut self.step else {
            return;
        };
        if *id == progress && (done > *done_bytes || total != *total_bytes) {
            (*done_bytes, *total_bytes) = (done, total);
            *until = now + self.config.stall_timeout_ms;
            self.work_backoff.reset();
        }
    }

    pub(super) fn downloaded(
        &mut self,
        now: Millis,
        id: EffectId,
        result: Result<(), FetchError>,
        effects: &mut Vec<Effect>,
    ) {
        if !matches!(self.step, Step::Download { .. }) {
            return;
        }
        let Some(Step::Download { target, .. }) = self.take_step(id) else { return };
        match result {
            Ok(()) => {
                self.work_backoff.reset();
                self.verify(now, target, effects);
            }
            Err(error) => self.fetch_failed(now, target, error, Resume::Download),
        }
    }

    fn verify(&mut self, now: Millis, target: Target, effects: &mut Vec<Effect>) {
        let id = self.id();
        effects.push(Effect::Verify { id, package: target.package() });
        let until = now + self.config.verify_timeout_ms;
        self.step = Step::Verify { target, id, until };
    }

    pub(super) fn files_verified(
        &mut self,
        now: Millis,
        id: EffectId,
        result: Result<(), VerifyError>,
    ) {
        if !matches!(self.step, Step::Verify { .. }) {
            return;
        }
        let Some(Step::Verify { mut target, .. }) = self.take_step(id) else { return };
        match result {
            Ok(()) => self.mark(target),
            Err(VerifyError::Damaged) => {
                // The source proved its bytes by their digest; these were lost here.
                target.package = None;
                self.pause(now, target, None, Resume::Fetch);
            }
            Err(VerifyError::Obstacle(obstacle)) => {
                self.pause(now, target, Some(obstacle), Resume::Verify);
            }
        }
    }

    // --- trying

    /// Notes in the ledger that staging begins, so that a model which takes the whole device down
    /// is not tried for ever.
    fn mark(&mut self, target: Target) {
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
        effects.push(Effect::Probe { id, worker: worker.id, package, live: false });
        let until = now + target.confirm_ms;
        self.step = Step::Probe { target, worker, id, until };
    }

    fn stage_failed(&mut self, now: Millis, mut target: Target, error: StageError) {
        match error {
            StageError::Load => self.fail(&target, Failure::Load),
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
    fn forgive(&mut self) {
        self.change(|ledger| {
            if let Some(candidate) = &mut ledger.candidate {
                candidate.attempts = candidate.attempts.saturating_sub(1);
            }
        });
    }

    fn over_budget(&self, measured_bytes: u64) -> Option<Failure> {
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

    fn probe_live(&mut self, now: Millis, target: Target, effects: &mut Vec<Effect>) {
        let Some(serving) = &self.serving else { return };
        let (worker, package) = (serving.worker, target.package());
        let id = self.id();
        effects.push(Effect::Probe { id, worker, package, live: true });
        let until = now + target.confirm_ms;
        self.step = Step::ProbeLive { target, id, until };
    }

    fn probed_live(
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

    fn confirm(&mut self, target: Target, probes: Vec<ProbeResult>) {
        let deployment = target.deployment();
        if let Some(serving) = &mut self.serving {
            serving.probes.clone_from(&probes);
        }
        self.change(|ledger| {
            let before = ledger.current.replace(deployment);
            // Fetching a damaged model again must not make it its own predecessor.
            if let Some(before) = before.filter(|before| ledger.current.as_ref() != Some(before)) {
                ledger.previous = Some(before);
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
    fn fail(&mut self, target: &Target, failure: Failure) {
        // What is confirmed here in another configuration is not to blame as a whole.
        let same = |known: &Deployment| known.model.manifest == target.model.manifest;
        let ledger = &self.ledger;
        let confirmed =
            ledger.current.as_ref().is_some_and(same) || ledger.previous.as_ref().is_some_and(same);
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

    fn reject(&mut self, target: &Target, failure: Failure, scope: Scope) {
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
        self.change(|ledger| {
            ledger.reject(rejection, scope);
            ledger.candidate = None;
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

/// Whether a package is what the hub announced.
fn fits(package: &Package, model: &DesiredModel) -> bool {
    package.manifest == model.manifest
        && package.weights.digest == model.weights
        && package.weights.size_bytes == model.size_bytes
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
