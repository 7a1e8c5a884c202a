//! What the core asks of its shell, and what the shell tells it. Both are closed.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use slmops_api::delta::{Delta, Sources};
use slmops_api::device::{DesiredModel, DesiredState, WaitCause};
use slmops_api::probe::ProbeResult;
use slmops_api::runtime::EffectiveConfig;
use slmops_artifact::Digest;

use crate::{Deployment, Ledger, Package, Snapshot};

/// One effect of this process. A completion with an id that nobody waits for is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EffectId(pub u64);

/// What must happen. Everything with an `id` ends with one event of that id, unless cancelled.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Ask the hub what this device should be.
    Poll {
        /// Answered by [`Event::Polled`].
        id: EffectId,
        /// The generation the core knows: the hub may answer "not modified", after `wait_s`.
        known: Option<u64>,
        /// Seconds that the hub may hold the question.
        wait_s: u32,
    },
    /// Get a manifest and its signature, and check both: the manifest against its digest, the
    /// signature against the trusted keys and the manifest's files. Ask what there is to get it
    /// from.
    FetchPackage {
        /// Answered by [`Event::PackageFetched`].
        id: EffectId,
        /// Whose.
        model: Box<DesiredModel>,
    },
    /// Get the package's files, continuing what an earlier attempt left.
    Download {
        /// Answered by [`Event::Downloaded`], with [`Event::Progress`] before.
        id: EffectId,
        /// Whose.
        model: Box<DesiredModel>,
        /// Which files.
        package: Package,
        /// Whether its weights are thought to be here; where they are not, it ends with
        /// [`FetchError::Deltas`].
        has_weights: bool,
        /// Deltas that give its weights, one after the other, the first one from a file that is
        /// here; where they do not, it ends with [`FetchError::Deltas`]. Without any the weights are
        /// got whole.
        route: Vec<Delta>,
        /// Devices of the same site that have the weights. They come before everything else.
        peers: Vec<String>,
        /// A model file that was given up to make room for the weights, and is in use by nobody: the
        /// route changes it where it lies; what does not come that way comes once it is deleted.
        gives_up: Option<Digest>,
        /// Whether deltas are kept for devices of the same site, where there is room for them.
        hands_on: bool,
        /// Bytes a second, at most.
        max_rate_bytes_per_s: Option<u64>,
    },
    /// Hash the package's files on disk.
    Verify {
        /// Answered by [`Event::FilesVerified`].
        id: EffectId,
        /// Which files.
        package: Package,
    },
    /// Load a model in a worker of its own, which gets no traffic. The worker is known by this id.
    Stage {
        /// Answered by [`Event::Staged`].
        id: EffectId,
        /// What and how.
        deployment: Box<Deployment>,
    },
    /// Run the golden probes: on a staged worker, or through the live endpoint.
    Probe {
        /// Answered by [`Event::Probed`].
        id: EffectId,
        /// The worker.
        worker: EffectId,
        /// The package that carries the probes.
        package: Package,
        /// Whether the worker is the one that serves now, asked as a user would ask.
        live: bool,
        /// Once all have passed, the package's replay prompts are scored by the worker that serves
        /// and by this one, as far as the time goes. What comes of it is evidence for the hub.
        replay: Option<ReplayOrder>,
    },
    /// Let new requests go to a staged worker; the one before finishes its own and ends.
    Activate {
        /// Answered by [`Event::Activated`].
        id: EffectId,
        /// The worker.
        worker: EffectId,
    },
    /// Make the ledger durable: complete on disk or untouched, whatever happens.
    SaveLedger {
        /// Answered by [`Event::LedgerSaved`].
        id: EffectId,
        /// The ledger.
        ledger: Box<Ledger>,
    },
    /// Tell the hub.
    Report {
        /// Answered by [`Event::Reported`].
        id: EffectId,
        /// What; the shell adds telemetry, facts and the sequence number.
        snapshot: Arc<Snapshot>,
    },
    /// Delete every file that is not one of these. Has no answer.
    Collect {
        /// What stays.
        keep: BTreeSet<Digest>,
    },
    /// Forget an effect: stop it if it runs, end the worker that it staged. Has no answer.
    Cancel {
        /// Which.
        id: EffectId,
    },
    /// End the serving worker: there is no model to go back to. Has no answer.
    StopServing,
}

/// What to replay a package's prompts against, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayOrder {
    /// The manifest that serves.
    pub before: Digest,
    /// Milliseconds that it may take.
    pub limit_ms: u64,
}

/// Something in the way that is not the model's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// What.
    pub cause: WaitCause,
    /// The server's `Retry-After`, in milliseconds.
    pub retry_after_ms: Option<u64>,
}

impl Obstacle {
    /// An obstacle without a time to wait.
    pub fn new(cause: WaitCause) -> Self {
        Self { cause, retry_after_ms: None }
    }
}

/// The hub's answer to a poll.
#[derive(Clone, Debug, PartialEq)]
pub enum Polled {
    /// What the device should be.
    Desired(Box<DesiredState>),
    /// Still what it was.
    NotModified,
}

/// A package, and what there is to get it from.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// The package.
    pub package: Package,
    /// How its weights can be had for less than their bytes.
    pub sources: Sources,
}

impl From<Package> for Offer {
    fn from(package: Package) -> Self {
        Self { package, sources: Sources::default() }
    }
}

/// Why a package or a file did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchError {
    /// Nobody's fault: try again.
    Obstacle(Obstacle),
    /// The disk has no room for it.
    NoRoom {
        /// How many bytes more would have to be free.
        short_bytes: u64,
    },
    /// The source does not have it.
    Missing,
    /// The signature is missing, wrong, or by a key that this device does not trust.
    Signature,
    /// The source's bytes are not what their digest says, twice.
    Digest,
    /// Not a package that this agent understands.
    Package,
    /// The deltas of the route do not give it, or the weights that were thought to be here are not:
    /// it takes the whole file. What is there of it stays.
    Deltas,
}

/// Why local files cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerifyError {
    /// A file is missing, short or changed.
    Damaged,
    /// They cannot be read just now.
    Obstacle(Obstacle),
}

/// Why a worker ended unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// By itself: an assertion, a fault, an error.
    Fault,
    /// Somebody killed it.
    Killed,
}

/// Why a model did not come up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StageError {
    /// The engine refused the file.
    Load,
    /// The engine would not run it as configured.
    Configuration {
        /// The settings that it does not follow.
        settings: Vec<String>,
    },
    /// The worker died.
    Died(Death),
    /// The file is not what its digest says any more.
    Damaged,
    /// The worker could not be started at all, for a reason outside the model.
    Obstacle(Obstacle),
}

/// A worker that has loaded its model.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// Read back from the engine.
    pub effective: EffectiveConfig,
    /// Resident bytes.
    pub memory_bytes: u64,
}

/// How the probes went.
#[derive(Clone, Debug, PartialEq)]
pub struct Probed {
    /// In the package's order.
    pub results: Vec<ProbeResult>,
    /// The worker's resident bytes afterwards.
    pub memory_bytes: u64,
}

/// Why there is no verdict of the probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeError {
    /// The worker died of them.
    Died(Death),
    /// The package's probes cannot be understood.
    Package,
    /// The file that holds them is not what its digest says any more.
    Damaged,
}

/// What a device is surrounded by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Around {
    /// The time of day, if the device can be sure that it is not earlier. From here on the core's
    /// own time counts.
    pub time: Option<Timestamp>,
    /// The IANA name of the device's time zone; UTC if absent.
    pub time_zone: Option<String>,
    /// Whether every byte over the link costs.
    pub metered: bool,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The process has started, or [`crate::Core::deadline`] has come.
    Tick,
    /// What the device is surrounded by; what was known of it before counts no more.
    Around(Around),
    /// Answers [`Effect::Poll`].
    Polled {
        /// Of which effect.
        id: EffectId,
        /// How it went.
        result: Result<Polled, Obstacle>,
    },
    /// Answers [`Effect::FetchPackage`].
    PackageFetched {
        /// Of which effect.
        id: EffectId,
        /// The package, its signature checked, and what there is to get it from.
        result: Result<Offer, FetchError>,
    },
    /// A download moves.
    Progress {
        /// Of which effect.
        id: EffectId,
        /// Bytes so far, of all files.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// Answers [`Effect::Download`].
    Downloaded {
        /// Of which effect.
        id: EffectId,
        /// How it went.
        result: Result<(), FetchError>,
    },
    /// Answers [`Effect::Verify`].
    FilesVerified {
        /// Of which effect.
        id: EffectId,
        /// How it went.
        result: Result<(), VerifyError>,
    },
    /// Answers [`Effect::Stage`].
    Staged {
        /// Of which effect.
        id: EffectId,
        /// How it went.
        result: Result<Loaded, StageError>,
    },
    /// Answers [`Effect::Probe`].
    Probed {
        /// Of which effect.
        id: EffectId,
        /// How it went.
        result: Result<Probed, ProbeError>,
    },
    /// Answers [`Effect::Activate`].
    Activated {
        /// Of which effect.
        id: EffectId,
        /// How it went.
        result: Result<(), StageError>,
    },
    /// Answers [`Effect::SaveLedger`].
    LedgerSaved {
        /// Of which effect.
        id: EffectId,
        /// How it went.
        result: Result<(), Obstacle>,
    },
    /// Answers [`Effect::Report`].
    Reported {
        /// Of which effect.
        id: EffectId,
        /// How it went.
        result: Result<(), Obstacle>,
    },
    /// An activated worker ended unasked; the shell restarts it by itself.
    WorkerDied {
        /// The worker.
        worker: EffectId,
        /// Why.
        death: Death,
    },
    /// It answers again.
    WorkerRestarted {
        /// The worker.
        worker: EffectId,
    },
}
