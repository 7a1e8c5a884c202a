//! What the core says of itself: to the hub, and to people on the device.

use rand::Rng;
use slmops_api::device::{DesiredModel, InstalledModel, Phase, Rejection, WaitCause};
use slmops_api::probe::ProbeResult;
use slmops_api::runtime::EffectiveConfig;

use super::rules::Hold;
use super::step::{Resume, Step};
use super::{Core, Serving};
use crate::{Deployment, Ledger, Millis, Outcome, Scope};

/// The core's part of a [`slmops_api::device::DeviceReport`].
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// The newest durable generation.
    pub generation: u64,
    /// How far the device is with it.
    pub phase: Phase,
    /// The model that answers.
    pub running: Option<InstalledModel>,
    /// The model to go back to.
    pub previous: Option<InstalledModel>,
    /// Manifests that failed here, in any configuration.
    pub rejected: Vec<Rejection>,
    /// The latest probe results of the running model.
    pub probes: Vec<ProbeResult>,
    /// Read back from the running engine.
    pub effective: Option<EffectiveConfig>,
}

/// A [`Snapshot`] that is only looked at: most of them say what the one before said.
pub(super) struct View<'a> {
    generation: u64,
    phase: Phase,
    saved: &'a Ledger,
    up: Option<&'a Serving>,
}

/// How one snapshot differs from another.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    None,
    /// In the progress of a download alone.
    Progress,
    Substance,
}

impl View<'_> {
    fn rejected(&self) -> impl Iterator<Item = &Rejection> {
        let rejected = self.saved.rejected.iter();
        rejected.filter(|rejected| rejected.scope == Scope::Manifest).map(|r| &r.rejection)
    }

    pub(super) fn news(&self, last: &Snapshot) -> News {
        let downloading = |phase: &Phase| matches!(phase, Phase::Downloading { .. });
        let same = self.generation == last.generation
            && (self.phase == last.phase || (downloading(&self.phase) && downloading(&last.phase)))
            && self.up.map(|up| &up.deployment.model) == last.running.as_ref()
            && self.saved.previous.as_ref().map(|it| &it.model) == last.previous.as_ref()
            && self.rejected().eq(&last.rejected)
            && self.up.map(|up| up.probes.as_slice()).unwrap_or_default() == last.probes
            && self.up.map(|up| &up.effective) == last.effective.as_ref();
        match same {
            true if self.phase == last.phase => News::None,
            true => News::Progress,
            false => News::Substance,
        }
    }

    pub(super) fn to_snapshot(&self) -> Snapshot {
        Snapshot {
            generation: self.generation,
            phase: self.phase.clone(),
            running: self.up.map(|up| up.deployment.model.clone()),
            previous: self.saved.previous.as_ref().map(|previous| previous.model.clone()),
            rejected: self.rejected().cloned().collect(),
            probes: self.up.map(|up| up.probes.clone()).unwrap_or_default(),
            effective: self.up.map(|up| up.effective.clone()),
        }
    }
}

/// What a person on the device may ask.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// As reported to the hub; absent while the ledger's model is being loaded.
    pub snapshot: Option<Snapshot>,
    /// What the hub wants.
    pub wanted: Option<DesiredModel>,
    /// The hub's reason for what it wants, in words.
    pub reason: Option<String>,
    /// The model that was given up to make room for what is wanted: none answers until that is here.
    pub given_up: Option<InstalledModel>,
    /// Whether the latest poll was answered; absent before the first one.
    pub hub_answers: Option<bool>,
    /// When what is in the way is tried again.
    pub retry_at: Option<Millis>,
}

impl<R: Rng> Core<R> {
    /// The state for people.
    pub fn status(&self) -> Status {
        Status {
            snapshot: self.snapshot(),
            wanted: self.ledger.desired.as_ref().and_then(|desired| desired.model.clone()),
            reason: self.ledger.desired.as_ref().map(|desired| desired.reason.clone()),
            given_up: self.ledger.without().map(|given_up| given_up.model.clone()),
            hub_answers: self.hub_answers,
            retry_at: match &self.step {
                Step::Pause { until, .. } => Some(*until),
                Step::Settled => self.restore_at,
                _ => None,
            },
        }
    }

    /// Bytes a second with which models are to be shared with the site; not at all if absent.
    pub fn sharing(&self) -> Option<u64> {
        self.ledger.share_bytes_per_s()
    }

    /// The deployment that answers requests, if one does.
    pub fn serving(&self) -> Option<&Deployment> {
        self.serving.as_ref().map(|serving| &serving.deployment)
    }

    /// None while it is not yet known what serves.
    pub(super) fn view(&self) -> Option<View<'_>> {
        Some(View {
            generation: self.saved.generation,
            phase: self.phase()?,
            saved: &self.saved,
            up: self.serving.as_ref().filter(|serving| serving.up),
        })
    }

    fn snapshot(&self) -> Option<Snapshot> {
        self.view().map(|view| view.to_snapshot())
    }

    fn phase(&self) -> Option<Phase> {
        let waits_for_ledger = matches!(
            self.step,
            Step::Settled
                | Step::Room { .. }
                | Step::Mark { .. }
                | Step::Commit { .. }
                | Step::Confirm
        );
        if let Some(cause) = self.save.failed
            && waits_for_ledger
            && self.dirty()
        {
            return Some(Phase::Waiting { cause, until: None });
        }
        // Getting the model before again is no news of the one that failed.
        if let Some(Outcome::RolledBack { failure }) = &self.saved.outcome
            && self.step.target().is_some_and(|it| it.generation != self.saved.generation)
        {
            return Some(Phase::RolledBack { failure: failure.clone() });
        }
        Some(match &self.step {
            Step::Restore(_) => return None,
            Step::Settled => return self.settled_phase(),
            Step::Pause { cause: Some(cause), .. } => Phase::Waiting { cause: *cause, until: None },
            Step::Held { hold: Hold { cause, until }, resume: Resume::Mark, .. } => {
                Phase::Prestaged { cause: *cause, until: *until }
            }
            Step::Held { hold: Hold { cause, until }, .. } => {
                Phase::Waiting { cause: *cause, until: *until }
            }
            Step::Pause { resume: Resume::ProbeLive, .. } => Phase::Activated,
            Step::Pause {
                resume: Resume::Fetch | Resume::Download | Resume::Replace,
                target,
                ..
            }
            | Step::Fetch { target, .. }
            | Step::Room { target } => {
                Phase::Downloading { done_bytes: 0, total_bytes: target.total_bytes() }
            }
            Step::Download { done_bytes, total_bytes, .. } => {
                Phase::Downloading { done_bytes: *done_bytes, total_bytes: *total_bytes }
            }
            Step::Pause { resume: Resume::Verify, .. } | Step::Verify { .. } => Phase::Downloaded,
            Step::Pause { resume: Resume::Mark, .. } | Step::Mark { .. } | Step::Stage { .. } => {
                Phase::Verified
            }
            Step::Probe { .. } | Step::Commit { .. } | Step::Activate { .. } => Phase::Staged,
            Step::ProbeLive { .. } | Step::Confirm => Phase::Activated,
        })
    }

    fn settled_phase(&self) -> Option<Phase> {
        if !self.booted {
            return None;
        }
        if self.serving.is_none()
            && let Some(failure) = &self.restore_failure
        {
            return Some(Phase::RolledBack { failure: failure.clone() });
        }
        // It takes back what it was to give up, once that is durable.
        let serving = self.serving.as_ref().map(|serving| &serving.deployment);
        if serving.is_some() && serving == self.saved.without() {
            return None;
        }
        let serves_current =
            self.serving.as_ref().map(|serving| &serving.deployment) == self.saved.current.as_ref();
        Some(match &self.saved.outcome {
            _ if !serves_current => Phase::Waiting { cause: WaitCause::Storage, until: None },
            None => Phase::Idle,
            Some(Outcome::Confirmed) => Phase::Confirmed,
            Some(Outcome::RolledBack { failure }) => Phase::RolledBack { failure: failure.clone() },
        })
    }
}
