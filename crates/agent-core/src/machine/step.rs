//! The steps from a wish to a confirmed model, and what is known in each.

use jiff::Timestamp;
use slmops_api::delta::Delta;
use slmops_api::device::{DesiredModel, DesiredState, InstalledModel, WaitCause};
use slmops_api::probe::ProbeResult;
use slmops_api::runtime::{EffectiveConfig, RuntimeConfig};

use super::restore::Restore;
use super::rules::Hold;
use crate::{Deployment, EffectId, Millis, Package};

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
    /// A rule holds it up.
    Held { target: Target, hold: Hold, resume: Resume },
    /// Manifest and signature are coming.
    Fetch { target: Target, id: EffectId, until: Millis },
    /// Files are coming.
    Download {
        target: Target,
        id: EffectId,
        until: Millis,
        done_bytes: u64,
        total_bytes: u64,
        /// Until when the rules let it, if that ends.
        free_until: Option<Timestamp>,
    },
    /// Waits until the durable ledger says what was given up for it.
    Room { target: Target },
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
    /// By giving up the model that serves.
    Replace,
    Verify,
    Mark,
    ProbeLive,
}

/// What is wanted, and what is known of it so far.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) generation: u64,
    pub(super) model: DesiredModel,
    pub(super) runtime: RuntimeConfig,
    pub(super) confirm_ms: u64,
    pub(super) package: Option<Package>,
    /// Whether its weights are here, as far as is known: another deployment has them.
    pub(super) has_weights: bool,
    /// Deltas by which its weights are got; none for the whole.
    pub(super) route: Vec<Delta>,
    /// Devices of the same site that have its weights.
    pub(super) peers: Vec<String>,
    /// How long a better source was waited for.
    pub(super) waited_ms: u64,
    /// Times that the source did not have a file.
    pub(super) missing: u32,
    /// Times that the serving worker was killed while its probes ran.
    pub(super) interruptions: u32,
}

impl Target {
    /// What the hub asks for, if it asks for a model.
    pub(super) fn of(desired: &DesiredState) -> Option<Self> {
        Some(Self {
            generation: desired.generation,
            model: desired.model.clone()?,
            runtime: desired.runtime.clone(),
            confirm_ms: (u64::from(desired.confirm_timeout_s) * 1_000).max(MIN_CONFIRM_MS),
            package: None,
            has_weights: false,
            route: Vec::new(),
            peers: Vec::new(),
            waited_ms: 0,
            missing: 0,
            interruptions: 0,
        })
    }

    /// A confirmed deployment whose file is damaged or was given up. It belongs to no generation.
    pub(super) fn again(current: &Deployment) -> Self {
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
            has_weights: false,
            route: Vec::new(),
            peers: Vec::new(),
            waited_ms: 0,
            missing: 0,
            interruptions: 0,
        }
    }

    pub(super) fn package(&self) -> Package {
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

    /// Bytes that getting it takes, as far as that is known.
    pub(super) fn fetched_bytes(&self) -> u64 {
        match (self.package, self.route.as_slice()) {
            (Some(package), []) if self.has_weights => package.small_bytes(),
            (Some(package), [_, ..]) => {
                let deltas = self.route.iter().map(|delta| delta.bytes);
                deltas.fold(package.small_bytes(), u64::saturating_add)
            }
            _ => self.total_bytes(),
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
            Self::Settled
            | Self::Held { .. }
            | Self::Room { .. }
            | Self::Mark { .. }
            | Self::Commit { .. }
            | Self::Confirm => None,
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

    /// What it is about.
    pub(super) fn target(&self) -> Option<&Target> {
        match self {
            Self::Settled | Self::Restore(_) | Self::Confirm => None,
            Self::Pause { target, .. }
            | Self::Held { target, .. }
            | Self::Fetch { target, .. }
            | Self::Download { target, .. }
            | Self::Room { target }
            | Self::Verify { target, .. }
            | Self::Mark { target }
            | Self::Stage { target, .. }
            | Self::Probe { target, .. }
            | Self::Commit { target, .. }
            | Self::Activate { target, .. }
            | Self::ProbeLive { target, .. } => Some(target),
        }
    }

    /// The effect whose completion is awaited.
    pub(super) fn awaits(&self) -> Option<EffectId> {
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
    pub(super) fn idle_worker(&self) -> Option<EffectId> {
        match self {
            Self::Probe { worker, .. } | Self::Commit { worker, .. } => Some(worker.id),
            _ => None,
        }
    }

    /// Whether the step may be dropped: no traffic depends on it.
    pub(super) fn may_be_dropped(&self) -> bool {
        match self {
            Self::Restore(_)
            | Self::Activate { .. }
            | Self::ProbeLive { .. }
            | Self::Confirm
            | Self::Pause { resume: Resume::ProbeLive, .. } => false,
            Self::Settled
            | Self::Pause { .. }
            | Self::Held { .. }
            | Self::Fetch { .. }
            | Self::Download { .. }
            | Self::Room { .. }
            | Self::Verify { .. }
            | Self::Mark { .. }
            | Self::Stage { .. }
            | Self::Probe { .. }
            | Self::Commit { .. } => true,
        }
    }
}
