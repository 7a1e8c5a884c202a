//! Getting a package: manifest and signature, files, digests.

use jiff::Timestamp;
use rand::Rng;
use slmops_api::device::{DesiredModel, Failure, WaitCause};

use super::Core;
use super::step::{Resume, Step, Target};
use crate::{Effect, EffectId, FetchError, Millis, Obstacle, Package, VerifyError};

impl<R: Rng> Core<R> {
    pub(super) fn fetch(&mut self, now: Millis, target: Target, effects: &mut Vec<Effect>) {
        let id = self.id();
        effects.push(Effect::FetchPackage { id, model: Box::new(target.model.clone()) });
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
                self.proceed(now, target, Resume::Download, effects);
            }
            // A good signature over something else than what the hub announced.
            Ok(_) => self.fail(&target, Failure::Package),
            Err(error) => self.fetch_failed(now, target, error, Resume::Fetch),
        }
    }

    pub(super) fn fetch_failed(
        &mut self,
        now: Millis,
        mut target: Target,
        error: FetchError,
        resume: Resume,
    ) {
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

    pub(super) fn download(
        &mut self,
        now: Millis,
        target: Target,
        free_until: Option<Timestamp>,
        effects: &mut Vec<Effect>,
    ) {
        let package = target.package();
        let mut keep = self.ledger.blobs();
        keep.extend(self.saved.blobs());
        keep.extend(package.blobs().map(|blob| blob.digest));
        effects.push(Effect::Collect { keep });
        let id = self.id();
        let rules = self.ledger.desired.as_ref().map(|desired| &desired.rules);
        let max_rate_bytes_per_s = rules.and_then(|rules| rules.max_rate_bytes_per_s);
        let model = Box::new(target.model.clone());
        effects.push(Effect::Download { id, model, package, max_rate_bytes_per_s });
        let until = now + self.config.stall_timeout_ms;
        let total_bytes = package.total_bytes();
        self.step = Step::Download { target, id, until, done_bytes: 0, total_bytes, free_until };
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

    pub(super) fn verify(&mut self, now: Millis, target: Target, effects: &mut Vec<Effect>) {
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
        effects: &mut Vec<Effect>,
    ) {
        if !matches!(self.step, Step::Verify { .. }) {
            return;
        }
        let Some(Step::Verify { mut target, .. }) = self.take_step(id) else { return };
        match result {
            Ok(()) => self.proceed(now, target, Resume::Mark, effects),
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
}

/// Whether a package is what the hub announced.
pub(super) fn fits(package: &Package, model: &DesiredModel) -> bool {
    package.manifest == model.manifest
        && package.weights.digest == model.weights
        && package.weights.size_bytes == model.size_bytes
}
