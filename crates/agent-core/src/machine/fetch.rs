//! Getting a package: manifest and signature, files, digests.

use jiff::Timestamp;
use rand::Rng;
use slmops_api::device::{DesiredModel, Failure, WaitCause};
use slmops_artifact::Digest;

use super::Core;
use super::step::{Resume, Step, Target};
use crate::{
    Effect, EffectId, FetchError, HandedOn, Millis, Obstacle, Offer, Package, VerifyError, cheapest,
};

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
        result: Result<Offer, FetchError>,
        effects: &mut Vec<Effect>,
    ) {
        if !matches!(self.step, Step::Fetch { .. }) {
            return;
        }
        let Some(Step::Fetch { mut target, .. }) = self.take_step(id) else { return };
        match result {
            Ok(Offer { package, sources }) if fits(&package, &target.model) => {
                target.missing = 0;
                let bases = self.bases();
                target.has_weights = bases.contains(&package.weights.digest);
                let wait_s = sources.wait_s.filter(|_| !target.has_weights);
                let wait_ms = wait_s.map(|wait_s| u64::from(wait_s).max(1) * 1_000);
                if let Some(wait_ms) = wait_ms
                    && target.waited_ms.saturating_add(wait_ms) <= self.config.source_wait_ms
                {
                    target.waited_ms += wait_ms;
                    let (until, resume) = (now + wait_ms, Resume::Fetch);
                    self.step = Step::Pause { target, cause: None, until, resume };
                    return;
                }
                target.route = cheapest(&sources.deltas, &bases, package.weights);
                target.package = Some(package);
                target.peers = sources.peers;
                self.proceed(now, target, Resume::Download, effects);
            }
            // A good signature over something else than what the hub announced.
            Ok(_) => self.fail(&target, Failure::Package),
            Err(error) => self.fetch_failed(now, target, error, Resume::Fetch),
        }
    }

    /// Model files that are here and whole, as far as is known.
    fn bases(&self) -> Vec<Digest> {
        let current = self.ledger.current.as_ref().filter(|_| !self.damaged);
        let named = current.into_iter().chain(&self.ledger.previous).chain(self.ledger.without());
        named.map(|named| named.package.weights.digest).collect()
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
            FetchError::NoRoom { .. } => {
                let full = Obstacle::new(WaitCause::DiskFull);
                self.pause(now, target, Some(full), resume);
            }
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
            FetchError::Deltas => self.pause(now, target, None, resume),
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
        keep.extend(target.route.iter().flat_map(|delta| [delta.to, delta.blob]));
        effects.push(Effect::Collect { keep });
        let id = self.id();
        let rules = self.ledger.desired.as_ref().map(|desired| &desired.rules);
        let max_rate_bytes_per_s = rules.and_then(|rules| rules.max_rate_bytes_per_s);
        let model = Box::new(target.model.clone());
        let route = target.route.clone();
        let peers = target.peers.clone();
        let given_up = self.ledger.without().map(|it| it.package.weights.digest);
        let gives_up = given_up.filter(|weights| *weights != package.weights.digest);
        if gives_up.is_some() {
            self.stop_serving(effects);
        }
        effects.push(Effect::Download {
            id,
            model,
            package,
            has_weights: target.has_weights,
            route,
            peers,
            gives_up,
            hands_on: self.ledger.share_bytes_per_s().is_some(),
            max_rate_bytes_per_s,
        });
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
                if !target.route.is_empty() && self.ledger.share_bytes_per_s().is_some() {
                    let deltas = target.route.iter().map(|delta| delta.blob).collect();
                    let handed_on = HandedOn { to: target.model.weights, deltas };
                    self.change(|ledger| ledger.handed_on = Some(handed_on));
                }
                self.verify(now, target, effects);
            }
            // The whole file takes more bytes: what the rules say of them is asked anew.
            Err(FetchError::Deltas) if target.has_weights || !target.route.is_empty() => {
                let target = Target { has_weights: false, route: Vec::new(), ..target };
                self.proceed(now, target, Resume::Download, effects);
            }
            Err(FetchError::NoRoom { short_bytes }) => {
                self.make_room(now, target, short_bytes, effects);
            }
            Err(error) => self.fetch_failed(now, target, error, Resume::Download),
        }
    }

    /// Gives up what may be given up for `target`, if that is enough; otherwise waits for room.
    fn make_room(
        &mut self,
        now: Millis,
        target: Target,
        short_bytes: u64,
        effects: &mut Vec<Effect>,
    ) {
        let [candidate_bytes, previous_bytes, current_bytes] = self.room_in(&target);
        let spare_bytes = candidate_bytes.saturating_add(previous_bytes);
        if spare_bytes > 0 && spare_bytes >= short_bytes {
            // Nothing that is still wanted; the previous one would go once this one is confirmed.
            self.change(|ledger| {
                ledger.candidate = None;
                ledger.previous.take_if(|_| candidate_bytes < short_bytes);
            });
            self.step = Step::Room { target };
            return;
        }
        let desired = self.ledger.desired.as_ref();
        let is_wanted = target.generation == self.ledger.generation;
        let may = desired.is_some_and(|desired| desired.rules.replace && is_wanted);
        let enough = spare_bytes.saturating_add(current_bytes) >= short_bytes;
        if may && current_bytes > 0 && enough {
            return self.proceed(now, target, Resume::Replace, effects);
        }
        let full = Obstacle::new(WaitCause::DiskFull);
        self.pause(now, target, Some(full), Resume::Download);
    }

    /// Bytes that the disk gets back with the files of a candidate for something else, of the previous
    /// and of the current model.
    fn room_in(&self, target: &Target) -> [u64; 3] {
        let serving = self.serving.as_ref().map(|serving| &serving.deployment);
        let candidate = self.ledger.candidate.as_ref().map(|candidate| &candidate.deployment);
        let previous = self.ledger.previous.as_ref().filter(|it| serving != Some(it));
        let named = [candidate, previous, self.ledger.current.as_ref()];
        let blobs = named.map(|named| named.map(|named| named.package.weights));
        // A file that two of them have goes with the last one.
        std::array::from_fn(|index| {
            let blob = blobs[index].filter(|blob| blob.digest != target.model.weights);
            let blob = blob.filter(|blob| !blobs[index + 1..].contains(&Some(*blob)));
            blob.map_or(0, |blob| blob.size_bytes)
        })
    }

    /// Gives up the model that serves: from here on there is none until `target` is confirmed.
    pub(super) fn replace(&mut self, target: Target) {
        self.change(|ledger| {
            ledger.given_up = ledger.current.take();
            ledger.previous = None;
            ledger.candidate = None;
            ledger.probes.clear();
        });
        self.step = Step::Room { target };
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
