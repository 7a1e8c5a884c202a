//! What serves: the worker of the current model, kept alive, and replaced without a gap.
//!
//! [`ModelHost::stage`] loads a model beside the one that serves; [`ModelHost::activate`] gives it
//! the new requests while the old one finishes its own and leaves. A worker that dies is started
//! again at once, later with growing pauses; its requests get an error, those that come meanwhile
//! wait a little. One that has had nothing to do for long may be let go: the next request starts
//! another.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use slmops_api::device::Telemetry;
use slmops_api::evidence::EvidenceCounts;
use slmops_api::runtime::EffectiveConfig;
use tokio::sync::{broadcast, watch};

use crate::memory;
use crate::metrics::{GenerationMeter, Metrics, Operation};
use crate::worker::{
    Ending, Finish, GenerateRequest, Generation, Memory, Output, Piece, Worker, WorkerError,
    WorkerSpec,
};

/// The longest that a request waits for a worker that is being restarted.
const WORKER_WAIT: Duration = Duration::from_secs(5);
/// The longest that a request waits for a model that slept.
const WAKE_WAIT: Duration = Duration::from_secs(120);
/// The most requests that wait for a worker that is being restarted.
const MAX_WAITING: usize = 256;
/// Pauses before a worker is started again: the first is none, the last repeats.
const RESTART_PAUSES_MS: [u64; 8] = [0, 250, 500, 1_000, 2_000, 5_000, 15_000, 30_000];
/// A worker that lived this long died by accident: the pauses begin anew.
const STABLE: Duration = Duration::from_secs(60);
/// Events kept for a slow subscriber.
const EVENT_CAPACITY: usize = 64;

/// A model to serve.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The name by which clients ask for it.
    pub id: String,
    /// Other names that are accepted.
    pub aliases: Vec<String>,
    /// What runs, and how.
    pub worker: WorkerSpec,
}

impl ModelSpec {
    /// Whether a client that asks for `name` means this model.
    pub fn answers_to(&self, name: &str) -> bool {
        self.id == name || self.aliases.iter().any(|alias| alias == name)
    }
}

/// Why there is no worker for a request.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HostError {
    /// Nothing was activated yet.
    #[error("no model is loaded yet\nhint: try again once /health answers 200")]
    NoModel,
    /// The worker died, and its successor is not ready yet.
    #[error("the model is being restarted\nhint: try again in a moment")]
    Restarting,
    /// The worker refused or failed the request.
    #[error("{0}")]
    Worker(#[from] WorkerError),
}

/// What happens to the host's workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// A model serves now.
    Activated {
        /// Its name.
        model: String,
    },
    /// A replaced worker has finished its requests and left.
    Drained {
        /// Its model's name.
        model: String,
    },
    /// The serving worker ended unasked.
    Crashed {
        /// Its model's name.
        model: String,
        /// How.
        ending: Ending,
        /// How long it had run.
        uptime: Duration,
    },
    /// It serves again.
    Restarted {
        /// Its model's name.
        model: String,
    },
    /// It had nothing to do for long, and its memory is free.
    Asleep {
        /// Its model's name.
        model: String,
    },
    /// A request came, and it serves again.
    Awake {
        /// Its model's name.
        model: String,
    },
    /// Starting it again failed; it is tried again later.
    RestartFailed {
        /// Its model's name.
        model: String,
        /// Why.
        error: String,
    },
}

/// How the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// No model was activated.
    Empty,
    /// A worker answers.
    Ready,
    /// The worker died and is being started again.
    Restarting,
    /// The model's memory is free; a request loads it again.
    Asleep,
}

/// The host at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct HostStatus {
    /// How it is.
    pub state: HostState,
    /// The model that serves.
    pub model: Option<String>,
    /// Its configuration, read back from the engine.
    pub effective: Option<EffectiveConfig>,
    /// Its worker's memory.
    pub memory: Memory,
    /// Requests under way or waiting in its worker.
    pub requests: usize,
    /// Workers that ended unasked since the host began.
    pub worker_crashes: u64,
}

/// A loaded model that does not serve yet. Dropping it unloads it.
pub struct Staged {
    spec: Arc<ModelSpec>,
    worker: Worker,
}

impl Staged {
    /// Its worker, for probes.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// What was staged.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }
}

/// Serves one model at a time and never has a gap.
pub struct ModelHost {
    state: Mutex<State>,
    /// Counts changes of `state`.
    changed: watch::Sender<u64>,
    events: broadcast::Sender<HostEvent>,
    metrics: Metrics,
    waiting: AtomicUsize,
}

#[derive(Default)]
struct State {
    current: Option<Current>,
    /// Grows with every activation: a supervisor of an older one retires.
    activation: u64,
    closed: bool,
}

struct Current {
    spec: Arc<ModelSpec>,
    /// The last worker, which may have ended.
    worker: Worker,
    /// Whether it was let go and its successor does not answer yet.
    asleep: bool,
    /// Whether somebody waits for that one.
    wanted: bool,
}

impl Current {
    fn new(spec: &Arc<ModelSpec>, worker: Worker) -> Self {
        Self { spec: Arc::clone(spec), worker, asleep: false, wanted: false }
    }
}

impl Default for ModelHost {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            changed: watch::Sender::default(),
            events: broadcast::channel(EVENT_CAPACITY).0,
            metrics: Metrics::default(),
            waiting: AtomicUsize::new(0),
        }
    }
}

impl ModelHost {
    /// A host without a model.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    fn change(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Loads a model beside the one that serves.
    ///
    /// # Errors
    /// It cannot be loaded with exactly its configuration.
    pub async fn stage(&self, spec: ModelSpec) -> Result<Staged, WorkerError> {
        let worker = Worker::spawn(spec.worker.clone()).await?;
        Ok(Staged { spec: Arc::new(spec), worker })
    }

    /// Gives the new requests to a staged model. The one that served finishes what it has and
    /// leaves; the handle that is returned waits for that, and may be dropped.
    pub fn activate(self: &Arc<Self>, staged: Staged) -> tokio::task::JoinHandle<()> {
        let Staged { spec, worker } = staged;
        let watch = self.watch(&worker);
        let model = spec.id.clone();
        let (old, activation) = {
            let mut state = self.lock();
            state.activation += 1;
            let current = Current::new(&spec, worker);
            (state.current.replace(current), state.activation)
        };
        self.metrics.forget_answers();
        memory::give_back();
        self.change();
        let _ = self.events.send(HostEvent::Activated { model });
        tokio::spawn(supervise(Arc::downgrade(self), spec, activation, watch));
        self.retire(old)
    }

    /// Takes the model out of service; what runs is finished.
    pub fn deactivate(&self) -> tokio::task::JoinHandle<()> {
        let old = {
            let mut state = self.lock();
            state.activation += 1;
            state.current.take()
        };
        self.change();
        self.retire(old)
    }

    fn retire(&self, old: Option<Current>) -> tokio::task::JoinHandle<()> {
        let events = self.events.clone();
        tokio::spawn(async move {
            if let Some(Current { spec, worker, .. }) = old {
                worker.drain().await;
                let _ = events.send(HostEvent::Drained { model: spec.id.clone() });
            }
        })
    }

    /// Takes the model out of service and lets go of its file: what runs is finished, but not for
    /// longer than `limit`. The handle waits until the worker's process has ended.
    pub fn evict(&self, limit: Duration) -> tokio::task::JoinHandle<()> {
        let worker = self.lock().current.as_ref().map(|current| current.worker.clone());
        let leaving = self.deactivate();
        tokio::spawn(async move {
            let left = tokio::time::timeout(limit, leaving).await;
            if let (Err(_), Some(worker)) = (left, worker) {
                worker.kill();
                worker.ended().await;
            }
        })
    }

    /// Takes no more requests, and waits until those under way are done, at most for `limit`.
    pub async fn shut_down(&self, limit: Duration) {
        self.lock().closed = true;
        // What is not done by then is killed with its last handle.
        let _ = tokio::time::timeout(limit, self.deactivate()).await;
    }

    /// The worker that serves and its model's names; waits for one that is being restarted.
    ///
    /// # Errors
    /// There is none, or it takes too long.
    pub async fn worker(&self) -> Result<(Arc<ModelSpec>, Worker), HostError> {
        let mut changed = self.changed.subscribe();
        let find = || -> Result<Option<(Arc<ModelSpec>, Worker)>, HostError> {
            let mut state = self.lock();
            let current = state.current.as_mut().ok_or(HostError::NoModel)?;
            if current.asleep {
                if !std::mem::replace(&mut current.wanted, true) {
                    self.change();
                }
                return Ok(None);
            }
            let serves = current.worker.ending().is_none();
            Ok(serves.then(|| (Arc::clone(&current.spec), current.worker.clone())))
        };
        if let Some(found) = find()? {
            return Ok(found);
        }
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= MAX_WAITING {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(HostError::Restarting);
        }
        let wait = async {
            loop {
                if let Some(found) = find()? {
                    return Ok(found);
                }
                if changed.changed().await.is_err() {
                    return Err(HostError::Restarting);
                }
            }
        };
        let sleeps = self.lock().current.as_ref().is_some_and(|current| current.asleep);
        let limit = if sleeps { WAKE_WAIT } else { WORKER_WAIT };
        let found = tokio::time::timeout(limit, wait).await;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        found.unwrap_or(Err(HostError::Restarting))
    }

    /// Does something with the worker that serves; where it is just being replaced, with the next.
    ///
    /// # Errors
    /// There is no worker, or `act` failed otherwise.
    pub async fn with_worker<T, F>(
        &self,
        act: impl Fn(Arc<ModelSpec>, Worker) -> F,
    ) -> Result<T, HostError>
    where
        F: Future<Output = Result<T, WorkerError>>,
    {
        loop {
            let (spec, worker) = self.worker().await?;
            match act(spec, worker).await {
                Err(WorkerError::Draining) => tokio::task::yield_now().await,
                Err(error) => return Err(error.into()),
                Ok(outcome) => return Ok(outcome),
            }
        }
    }

    /// Begins an answer, counted under `operation`. `request` is made from the worker, whose chat template may matter.
    ///
    /// # Errors
    /// There is no worker, or the request cannot be made.
    pub(crate) async fn generate(
        &self,
        operation: Operation,
        request: impl Fn(&Worker) -> Result<GenerateRequest, WorkerError>,
    ) -> Result<MeteredGeneration, HostError> {
        let model = self.current().map(|(spec, _)| spec.id.clone()).unwrap_or_default();
        let mut meter = self.metrics.begin(operation, model);
        let begun = loop {
            let (_, worker) = self.worker().await?;
            match request(&worker).and_then(|request| worker.generate(request)) {
                Err(WorkerError::Draining) => {}
                // It died a moment ago, before it took the request.
                Err(WorkerError::Died { .. }) if worker.ending().is_none() => {}
                other => break other,
            }
            tokio::task::yield_now().await;
        };
        match begun {
            Ok(generation) => Ok(MeteredGeneration { generation, meter }),
            Err(error) => {
                meter.fail(&error);
                Err(error.into())
            }
        }
    }

    /// How the host is now.
    pub fn status(&self) -> HostStatus {
        let state = self.lock();
        let current = state.current.as_ref();
        let awake = |current: &&Current| !current.asleep && current.worker.ending().is_none();
        let alive = current.filter(awake);
        HostStatus {
            state: match (current, alive) {
                (None, _) => HostState::Empty,
                (Some(_), Some(_)) => HostState::Ready,
                (Some(current), None) if current.asleep => HostState::Asleep,
                (Some(_), None) => HostState::Restarting,
            },
            model: current.map(|current| current.spec.id.clone()),
            effective: current.map(|current| current.worker.effective().clone()),
            memory: alive.map(|current| current.worker.memory()).unwrap_or_default(),
            requests: alive.map_or(0, |current| current.worker.requests()),
            worker_crashes: self.metrics.worker_crashes(),
        }
    }

    /// The current model and its last worker (which may have ended), without waiting.
    pub fn current(&self) -> Option<(Arc<ModelSpec>, Worker)> {
        let state = self.lock();
        state.current.as_ref().map(|current| (Arc::clone(&current.spec), current.worker.clone()))
    }

    /// Aggregates since the host began; `downloaded_bytes` is not its business and stays 0.
    pub fn telemetry(&self) -> Telemetry {
        let memory = self.status().memory;
        Telemetry {
            worker_memory_bytes: memory.resident_bytes,
            worker_peak_memory_bytes: memory.peak_bytes,
            ..self.metrics.telemetry()
        }
    }

    /// What a gate wants to know, since the host began; `serving_s` is not its business and stays 0.
    pub fn evidence(&self) -> EvidenceCounts {
        EvidenceCounts {
            peak_memory_bytes: self.status().memory.peak_bytes,
            ..self.metrics.evidence()
        }
    }

    /// What is counted.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// What happens from now on.
    pub fn events(&self) -> broadcast::Receiver<HostEvent> {
        self.events.subscribe()
    }
}

/// What is heard of a worker that serves.
struct Watch {
    ended: Pin<Box<dyn Future<Output = Ending> + Send>>,
    idle: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl ModelHost {
    fn watch(&self, worker: &Worker) -> Watch {
        Watch { ended: Box::pin(worker.ended()), idle: self.idle(worker) }
    }

    /// Waits until a worker had no request for as long as its configuration says.
    fn idle(&self, worker: &Worker) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        match worker.effective().idle_after_s {
            0 => Box::pin(std::future::pending()),
            limit_s => Box::pin(worker.idle(Duration::from_secs(limit_s.into()))),
        }
    }

    /// Lets an idle worker go; absent where a request came at the last moment.
    fn fall_asleep(&self) -> Option<Worker> {
        let mut state = self.lock();
        let current = state.current.as_mut()?;
        current.asleep = current.worker.refuse_if_idle();
        current.asleep.then(|| current.worker.clone())
    }

    /// The worker of `spec` as it was: with the adapters that were loaded meanwhile.
    fn successor(&self, spec: &ModelSpec) -> WorkerSpec {
        let adapters = self.current().map(|(_, worker)| worker.adapters()).unwrap_or_default();
        WorkerSpec { adapters, ..spec.worker.clone() }
    }
}

/// Starts the worker of one activation again whenever it ends, and lets it sleep while it is idle,
/// until another model takes over.
async fn supervise(host: Weak<ModelHost>, spec: Arc<ModelSpec>, activation: u64, mut watch: Watch) {
    let model = spec.id.clone();
    let serves = |host: &ModelHost| {
        let state = host.lock();
        state.activation == activation && !state.closed
    };
    let mut attempts = 0;
    loop {
        let started = Instant::now();
        let ending = tokio::select! {
            ending = &mut watch.ended => Some(ending),
            () = &mut watch.idle => None,
        };
        let Some(alive) = host.upgrade().filter(|host| serves(host)) else { return };
        let slept = ending.is_none();
        match ending {
            Some(ending) => {
                let uptime = started.elapsed();
                if uptime >= STABLE {
                    attempts = 0;
                }
                alive.metrics.count_crash();
                alive.change();
                let how = &ending.how;
                tracing::warn!(model, how, "the worker ended unasked:\n{}", ending.stderr);
                let crashed = HostEvent::Crashed { model: model.clone(), ending, uptime };
                let _ = alive.events.send(crashed);
                drop(alive);
            }
            None => {
                let Some(worker) = alive.fall_asleep() else {
                    if let Some((_, worker)) = alive.current() {
                        watch.idle = alive.idle(&worker);
                    }
                    continue;
                };
                worker.drain().await;
                alive.metrics.count_sleep();
                let _ = alive.events.send(HostEvent::Asleep { model: model.clone() });
                let mut changed = alive.changed.subscribe();
                drop(alive);
                loop {
                    let Some(alive) = host.upgrade().filter(|host| serves(host)) else { return };
                    if alive.lock().current.as_ref().is_some_and(|current| current.wanted) {
                        break;
                    }
                    drop(alive);
                    if changed.changed().await.is_err() {
                        return;
                    }
                }
                attempts = 0;
            }
        }
        let waking = Instant::now();
        watch = loop {
            let pause = RESTART_PAUSES_MS[attempts.min(RESTART_PAUSES_MS.len() - 1)];
            attempts += 1;
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let Some(alive) = host.upgrade().filter(|host| serves(host)) else { return };
            let successor = alive.successor(&spec);
            drop(alive);
            let outcome = Worker::spawn(successor).await;
            let Some(alive) = host.upgrade().filter(|host| serves(host)) else { return };
            let worker = match outcome {
                Ok(worker) => worker,
                Err(error) => {
                    tracing::warn!(model, "the worker does not start again: {error}");
                    let error = error.to_string();
                    // Nobody shall wait long for a model that does not come.
                    if let Some(current) = &mut alive.lock().current {
                        current.asleep = false;
                    }
                    alive.change();
                    let failed = HostEvent::RestartFailed { model: model.clone(), error };
                    let _ = alive.events.send(failed);
                    continue;
                }
            };
            let next = alive.watch(&worker);
            {
                let mut state = alive.lock();
                if state.activation != activation || state.closed {
                    return;
                }
                state.current = Some(Current::new(&spec, worker));
            }
            alive.change();
            let event = match slept {
                true => {
                    alive.metrics.count_wake(waking.elapsed());
                    HostEvent::Awake { model: model.clone() }
                }
                false => HostEvent::Restarted { model: model.clone() },
            };
            let _ = alive.events.send(event);
            break next;
        };
    }
}

/// An answer under way that is counted. Dropping it cancels the request.
pub struct MeteredGeneration {
    generation: Generation,
    meter: GenerationMeter,
}

impl MeteredGeneration {
    /// The next output; see [`Generation::next`].
    ///
    /// # Errors
    /// The request was refused, or the worker failed or died.
    pub async fn next(&mut self) -> Result<Output, WorkerError> {
        let output = self.generation.next().await;
        match &output {
            Ok(Output::Started) => self.meter.started(),
            Ok(Output::Echo(_)) => {}
            Ok(Output::Piece(piece)) => self.meter.piece(piece),
            Ok(Output::Finished(finish)) => self.meter.finished(finish),
            Err(error) => self.meter.fail(error),
        }
        output
    }

    /// The whole answer.
    ///
    /// # Errors
    /// The request was refused, or the worker failed or died.
    pub async fn finish(mut self) -> Result<(Piece, Finish), WorkerError> {
        let mut whole = Piece::default();
        loop {
            match self.next().await? {
                Output::Started => {}
                Output::Echo(piece) | Output::Piece(piece) => whole.append(piece),
                Output::Finished(finish) => return Ok((whole, finish)),
            }
        }
    }
}
