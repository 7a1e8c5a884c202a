//! The IO around the core: performs its effects, brings back what came of them, keeps the time.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rustls::time_provider::TimeProvider;
use slmops_agent_core::{
    Around, Config, Core, Counted, Effect, EffectId, Event, Ledger, Millis, Obstacle, Snapshot,
};
use slmops_api::device::{DeviceFacts, DeviceReport, Phase, Telemetry};
use slmops_api::evidence::EvidenceCounts;
use slmops_inference::otlp::Collector;
use slmops_inference::server::{Keys, at_once};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::clock::Clock;
use crate::download::{self, Downloads, Sources};
use crate::engine::Engine;
use crate::error::AgentError;
use crate::hub::{DeviceHub, Hub, HubError};
use crate::identity::{self, DeviceKey, Identity, MeteredLink};
use crate::outbox::Outbox;
use crate::peers::Sharing;
use crate::state::{ENDPOINT_KEYS_FILE, Sequence, StateFolder, StateLock, wait_cause};
use crate::status::StatusFile;
use crate::tls::PinnedAuthority;
use crate::trust::Trust;
use crate::{facts, words};

/// Events that wait for the core, at most; who has more waits.
const QUEUED_EVENTS: usize = 256;
/// Milliseconds between two messages on the progress of a download.
const PROGRESS_INTERVAL_MS: u64 = 2_000;
/// The least time between two progress events of one download, in milliseconds.
const PROGRESS_EVENT_MS: u64 = 100;
/// Milliseconds that requests under way get to finish when the agent is told to stop.
const DRAIN_TIMEOUT_MS: u64 = 10_000;
/// Seconds between two looks at the hub's publisher keys: a successor must have come everywhere
/// before the key that vouches for it expires.
const KEYS_INTERVAL_S: u64 = 12 * 3600;
/// Seconds until the next look when the hub did not answer.
const KEYS_RETRY_S: u64 = 300;
/// Where the bound address of the local endpoint is written.
const ENDPOINT_FILE: &str = "endpoint";

/// A joined device, ready to run.
pub struct Agent {
    /// Its folder.
    pub state: StateFolder,
    /// Who it is.
    pub identity: Identity,
    /// How patient it is; the memory budget is taken from the identity.
    pub config: Config,
    /// The system's time of day, for certificates alone.
    pub clock: Arc<dyn TimeProvider>,
}

impl Agent {
    /// Runs until `stop` is done, then lets requests finish and ends.
    ///
    /// # Errors
    /// What keeps it from starting: a locked or damaged folder, an address in use. Once it runs,
    /// nothing ends it but `stop`.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), AgentError> {
        let lock = self.state.lock()?;
        let mut running = Running::start(self, lock).await?;
        running.until(stop).await;
        running.stop().await;
        Ok(())
    }
}

struct Running {
    _lock: StateLock,
    state: StateFolder,
    identity: Identity,
    time: Arc<Clock>,
    trust: Arc<Trust>,
    keys_task: tokio::task::JoinHandle<()>,
    core: Core<ChaCha8Rng>,
    started: Instant,
    hub: Arc<DeviceHub>,
    authority: Arc<PinnedAuthority>,
    downloads: Arc<Downloads>,
    sharing: Sharing,
    engine: Arc<Engine>,
    server: tokio::task::JoinHandle<()>,
    stop_server: Arc<tokio::sync::Notify>,
    /// Pushes metrics where somebody is told; ends with its sender.
    pushed: Option<(tokio::task::JoinHandle<()>, oneshot::Sender<()>)>,
    facts: DeviceFacts,
    sequence: Sequence,
    earlier: Telemetry,
    counted: Counted,
    events: mpsc::Sender<Event>,
    received: mpsc::Receiver<Event>,
    saves: std::sync::mpsc::Sender<(EffectId, Box<Ledger>)>,
    tasks: HashMap<EffectId, AbortHandle>,
    voice: Voice,
    complaints: Arc<Complaints>,
    ca_saved: bool,
}

impl Running {
    async fn start(agent: Agent, lock: StateLock) -> Result<Self, AgentError> {
        let Agent { state, identity, mut config, clock } = agent;
        let time = Arc::new(Clock::open(state.root()));
        let trust = Arc::new(Trust::new(state.clone(), identity.clone(), Arc::clone(&time))?);
        let ledger = state.load_ledger()?;
        let key = DeviceKey::open(state.root())?;
        let stored = identity::load_ca(state.root())?;
        let ca_saved = stored.is_some();
        let authority = PinnedAuthority::new(identity.ca, stored);
        let outbox = Arc::new(Outbox::open(state.root()));
        let hub = Hub::new(identity.url.clone(), &authority, clock, Arc::clone(&outbox))?;
        let hub = Arc::new(DeviceHub::new(hub, identity.device.clone(), key, Arc::clone(&time)));
        let keys_task = tokio::spawn(keep_trust_fresh(Arc::clone(&hub), Arc::clone(&trust)));

        let (events, received) = mpsc::channel(QUEUED_EVENTS);
        let engine = Engine::new(state.clone(), events.clone());
        let pushed = collector(&identity)?.map(|collector| {
            tracing::info!("metrics go to {}", collector.url());
            let (going, gone) = oneshot::channel::<()>();
            let (engine, outbox) = (Arc::clone(&engine), Arc::clone(&outbox));
            let place = format!("POST {}", collector.url());
            let push = async move {
                let stop = async {
                    let _ = gone.await;
                };
                engine.push(collector, stop, |all| outbox.sent(&place, all)).await;
            };
            (tokio::spawn(push), going)
        });
        let listener = listen(&state, identity.settings.listen).await?;
        let address = listener
            .local_addr()
            .map_err(|source| AgentError::Listen { address: identity.settings.listen, source })?;
        let endpoint = format!("http://{address}");
        remember_endpoint(&state, &endpoint);
        let stop_server = Arc::new(tokio::sync::Notify::new());
        let stopping = Arc::clone(&stop_server);
        let keys = endpoint_keys(&state)?;
        if keys.is_some() {
            tracing::info!("the local endpoint answers who has a key of {ENDPOINT_KEYS_FILE}");
        }
        let router = engine.router(&endpoint, keys);
        let server = tokio::spawn(async move {
            let served = axum::serve(at_once(listener), router)
                .with_graceful_shutdown(async move { stopping.notified().await });
            if let Err(error) = served.await {
                tracing::error!("the local endpoint ended: {error}");
            }
        });

        config.memory_budget_bytes = identity.settings.memory_budget_bytes;
        let facts = facts::read(
            config.memory_budget_bytes,
            state.free_bytes(),
            &Engine::version(),
            Some(endpoint.clone()),
        );
        tracing::info!("device {} of {}", identity.device, identity.url);
        tracing::info!("the local endpoint is {endpoint}/v1");
        Ok(Self {
            _lock: lock,
            core: Core::new(ledger, config, ChaCha8Rng::from_os_rng()),
            started: Instant::now(),
            sharing: Sharing::new(state.clone(), identity.url.clone(), outbox),
            downloads: Arc::new(Downloads::new(state.clone(), Arc::clone(&hub))),
            sequence: state.sequence(),
            earlier: state.load_telemetry(),
            counted: Counted::from(state.load_evidence()),
            saves: save_in_order(state.clone(), events.clone()),
            state,
            identity,
            time,
            trust,
            keys_task,
            hub,
            authority,
            engine,
            server,
            stop_server,
            pushed,
            facts,
            events,
            received,
            tasks: HashMap::new(),
            voice: Voice::default(),
            complaints: Arc::default(),
            ca_saved,
        })
    }

    fn now(&self) -> Millis {
        Millis(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    async fn until(&mut self, stop: impl Future<Output = ()>) {
        let mut stop = std::pin::pin!(stop);
        self.look_around();
        self.handle(Event::Tick);
        loop {
            let wait =
                self.core.deadline().map(|at| Duration::from_millis(at.0 - self.now().0.min(at.0)));
            let tick = async {
                match wait {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = &mut stop => return,
                event = self.received.recv() => {
                    // The sender lives as long as `self`.
                    if let Some(event) = event {
                        self.handle(event);
                    }
                }
                () = tick => self.handle(Event::Tick),
            }
        }
    }

    /// Tells the core what time it is and what the link is like, as far as that is known now.
    fn look_around(&mut self) {
        self.facts.time_zone = facts::time_zone();
        self.facts.metered = match self.identity.settings.metered {
            MeteredLink::Yes => true,
            MeteredLink::No => false,
            MeteredLink::Auto => facts::is_metered(),
        };
        self.handle(Event::Around(Around {
            time: self.time.sure(),
            time_zone: self.facts.time_zone.clone(),
            metered: self.facts.metered,
        }));
    }

    fn handle(&mut self, event: Event) {
        // Each poll brings the hub's time, and comes often enough to follow the link.
        if let Event::Polled { .. } = event {
            self.look_around();
        }
        let mut effects = Vec::new();
        self.core.handle(self.now(), event, &mut effects);
        for effect in effects {
            self.perform(effect);
        }
        self.facts.shares_at = self.sharing.keep_to(self.core.sharing());
        if self.facts.shares_at.is_some() {
            self.sharing.announce(&self.core.durable_ledger().blobs());
        }
        self.tasks.retain(|_, task| !task.is_finished());
        let status = self.core.status();
        self.voice.tell(&status);
        let now = self.now();
        let file = StatusFile::new(&self.identity, &self.facts, &status, self.telemetry(), now);
        self.voice.write(&self.state, file);
        self.keep_authority();
    }

    /// Keeps the CA's certificate once the first connection has brought it.
    fn keep_authority(&mut self) {
        if let (false, Some(der)) = (self.ca_saved, self.authority.certificate()) {
            match identity::save_ca(self.state.root(), der) {
                Ok(()) => self.ca_saved = true,
                Err(error) => tracing::debug!("{error}"),
            }
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Poll { id, known, wait_s } => {
                let (hub, complaints) = (Arc::clone(&self.hub), Arc::clone(&self.complaints));
                self.spawn(id, async move {
                    let result = hub.desired(known, wait_s).await;
                    let result = result.map_err(|error| complaints.about("ask the hub", &error));
                    Event::Polled { id, result }
                });
            }
            Effect::FetchPackage { id, model } => {
                let (hub, trust) = (Arc::clone(&self.hub), Arc::clone(&self.trust));
                self.spawn(id, async move {
                    let result = hub.offer(&model, &trust).await;
                    Event::PackageFetched { id, result }
                });
            }
            Effect::Download {
                id,
                model,
                package,
                has_weights,
                route,
                peers,
                gives_up,
                hands_on,
                max_rate_bytes_per_s,
            } => {
                let (downloads, events) = (Arc::clone(&self.downloads), self.events.clone());
                let peers = self.sharing.who_has(package.weights.digest, peers);
                let engine = Arc::clone(&self.engine);
                self.spawn(id, async move {
                    if gives_up.is_some() {
                        engine.stopped().await;
                    }
                    let mut last = None::<Instant>;
                    let sources =
                        Sources { has_weights, route: &route, peers: &peers, gives_up, hands_on };
                    let rate = max_rate_bytes_per_s;
                    let result = downloads
                        .package(
                            &model.model,
                            &package,
                            sources,
                            rate,
                            |done_bytes, total_bytes| {
                                let soon = Duration::from_millis(PROGRESS_EVENT_MS);
                                if last.is_none_or(|at| at.elapsed() >= soon) {
                                    last = Some(Instant::now());
                                    // A full queue has newer things to tell.
                                    let _ = events.try_send(Event::Progress {
                                        id,
                                        done_bytes,
                                        total_bytes,
                                    });
                                }
                            },
                        )
                        .await;
                    Event::Downloaded { id, result }
                });
            }
            Effect::Verify { id, package } => {
                let state = self.state.clone();
                self.spawn_blocking(id, move || Event::FilesVerified {
                    id,
                    result: download::verify(&state, &package),
                });
            }
            Effect::Stage { id, deployment } => {
                let engine = Arc::clone(&self.engine);
                self.spawn(id, async move {
                    Event::Staged { id, result: engine.stage(id, &deployment).await }
                });
            }
            Effect::Probe { id, worker, package, live, replay } => {
                let engine = Arc::clone(&self.engine);
                self.spawn(id, async move {
                    let result = engine.probe(worker, &package, live, replay).await;
                    Event::Probed { id, result }
                });
            }
            Effect::Activate { id, worker } => {
                let engine = Arc::clone(&self.engine);
                self.spawn(id, async move {
                    Event::Activated { id, result: engine.activate(worker).await }
                });
            }
            Effect::SaveLedger { id, ledger } => {
                // The thread lives as long as the sender.
                let _ = self.saves.send((id, ledger));
            }
            Effect::Report { id, snapshot } => {
                let report = self.report(Arc::unwrap_or_clone(snapshot));
                let (hub, complaints) = (Arc::clone(&self.hub), Arc::clone(&self.complaints));
                self.spawn(id, async move {
                    let result = hub.report(&report).await;
                    let result =
                        result.map_err(|error| complaints.about("report to the hub", &error));
                    Event::Reported { id, result }
                });
            }
            Effect::Collect { keep } => {
                let freed_bytes = self.state.collect(&keep);
                if freed_bytes > 0 {
                    tracing::info!(
                        "deleted models no longer needed: {}",
                        crate::units::size(freed_bytes)
                    );
                }
            }
            Effect::Cancel { id } => {
                if let Some(task) = self.tasks.remove(&id) {
                    task.abort();
                }
                self.engine.cancel(id);
            }
            Effect::StopServing => self.engine.stop_serving(),
        }
    }

    fn spawn(&mut self, id: EffectId, work: impl Future<Output = Event> + Send + 'static) {
        let events = self.events.clone();
        let task = tokio::spawn(async move {
            let event = work.await;
            // Nobody listens once the agent stops.
            let _ = events.send(event).await;
        });
        self.tasks.insert(id, task.abort_handle());
    }

    fn spawn_blocking(&mut self, id: EffectId, work: impl FnOnce() -> Event + Send + 'static) {
        let work = tokio::task::spawn_blocking(work);
        self.spawn(id, async move { work.await.expect("file work does not panic") });
    }

    fn telemetry(&self) -> Telemetry {
        let now = self.engine.telemetry();
        Telemetry {
            requests: self.earlier.requests + now.requests,
            errors: self.earlier.errors + now.errors,
            prompt_tokens: self.earlier.prompt_tokens + now.prompt_tokens,
            generated_tokens: self.earlier.generated_tokens + now.generated_tokens,
            worker_crashes: self.earlier.worker_crashes + now.worker_crashes,
            downloaded_bytes: self.earlier.downloaded_bytes + self.downloads.received_bytes(),
            transfer: self.downloads.transfer(),
            ..now
        }
    }

    fn report(&mut self, snapshot: Snapshot) -> DeviceReport {
        let telemetry = self.telemetry();
        self.state.save_telemetry(&telemetry);
        let counters = EvidenceCounts {
            serving_s: self.started.elapsed().as_secs_f64(),
            ..self.engine.evidence()
        };
        let running = snapshot.running.as_ref().map(|running| running.manifest);
        if let Some((manifest, replay)) = self.engine.take_replayed() {
            self.counted.replayed(manifest, replay);
        }
        let evidence = self.counted.update(running, counters).cloned();
        if let Some(evidence) = &evidence {
            self.state.save_evidence(evidence);
        }
        self.facts.disk_free_bytes = self.state.free_bytes();
        if let Some(effective) = &snapshot.effective {
            self.facts.engine.clone_from(&effective.engine);
        }
        DeviceReport {
            sequence: self.sequence.next_number(),
            generation: snapshot.generation,
            phase: snapshot.phase,
            running: snapshot.running,
            previous: snapshot.previous,
            rejected: snapshot.rejected,
            probes: snapshot.probes,
            effective: snapshot.effective,
            telemetry,
            evidence,
            facts: self.facts.clone(),
        }
    }

    async fn stop(self) {
        tracing::info!("stopping: no new requests, letting those under way finish");
        self.keys_task.abort();
        for task in self.tasks.values() {
            task.abort();
        }
        self.stop_server.notify_one();
        let mut server = self.server;
        let drained =
            tokio::time::timeout(Duration::from_millis(DRAIN_TIMEOUT_MS), &mut server).await;
        if drained.is_err() {
            tracing::warn!("requests were still under way after {} s", DRAIN_TIMEOUT_MS / 1_000);
            server.abort();
        }
        if let Some((push, going)) = self.pushed {
            drop(going);
            let _ = push.await;
        }
        self.engine.shut_down().await;
        tracing::info!("stopped");
    }
}

/// Whom the owner wants told what the local endpoint counts.
///
/// # Errors
/// The address or OpenTelemetry's environment variables cannot be followed.
pub fn collector(identity: &Identity) -> Result<Option<Collector>, AgentError> {
    let Some(url) = &identity.settings.otlp else { return Ok(None) };
    let instance = identity.device.to_string();
    Ok(Some(Collector::new(url, "slm-agent", &instance, |name| std::env::var(name).ok())?))
}

/// Looks for new publisher keys now and then, so that none is missed between two releases.
async fn keep_trust_fresh(hub: Arc<DeviceHub>, trust: Arc<Trust>) {
    loop {
        let wait_s = match hub.refresh(&trust).await {
            Ok(()) => KEYS_INTERVAL_S,
            Err(error) => {
                tracing::debug!("ask for publisher keys: {error}");
                KEYS_RETRY_S
            }
        };
        tokio::time::sleep(Duration::from_secs(wait_s)).await;
    }
}

/// Writes ledgers one after the other on a thread of its own.
fn save_in_order(
    state: StateFolder,
    events: mpsc::Sender<Event>,
) -> std::sync::mpsc::Sender<(EffectId, Box<Ledger>)> {
    let (saves, received) = std::sync::mpsc::channel::<(EffectId, Box<Ledger>)>();
    std::thread::spawn(move || {
        for (id, ledger) in received {
            let result = state.save_ledger(&ledger).map_err(|error| {
                tracing::warn!("cannot write the ledger: {error}; nothing is switched until it is");
                Obstacle::new(wait_cause(&error))
            });
            if events.blocking_send(Event::LedgerSaved { id, result }).is_err() {
                return;
            }
        }
    });
    saves
}

/// Who may use the endpoint; anybody who reaches it if there is no file.
fn endpoint_keys(state: &StateFolder) -> Result<Option<Arc<Keys>>, AgentError> {
    let path = state.root().join(ENDPOINT_KEYS_FILE);
    match path.exists() {
        true => Ok(Some(Arc::new(Keys::open(&path)?))),
        false => Ok(None),
    }
}

/// Listens where the owner said; with port 0 where it listened last time, if that is still free.
async fn listen(state: &StateFolder, address: SocketAddr) -> Result<TcpListener, AgentError> {
    if address.port() == 0
        && let Some(last) = last_endpoint(state).filter(|last| last.ip() == address.ip())
        && let Ok(listener) = TcpListener::bind(last).await
    {
        return Ok(listener);
    }
    let failed = |source: io::Error| AgentError::Listen { address, source };
    TcpListener::bind(address).await.map_err(failed)
}

fn last_endpoint(state: &StateFolder) -> Option<SocketAddr> {
    let bytes = crate::durable::read(&state.root().join(ENDPOINT_FILE), 200).ok()??;
    let text = String::from_utf8(bytes).ok()?;
    text.trim().strip_prefix("http://")?.parse().ok()
}

fn remember_endpoint(state: &StateFolder, endpoint: &str) {
    let path = state.root().join(ENDPOINT_FILE);
    if let Err(error) = std::fs::write(&path, format!("{endpoint}\n")) {
        tracing::warn!("write {}: {error}", path.display());
    }
}

/// Tells people of failed calls, but not of each one when they all fail alike.
#[derive(Default)]
struct Complaints {
    last: Mutex<String>,
}

impl Complaints {
    /// The core's view of a failed call.
    fn about(&self, call: &str, error: &HubError) -> Obstacle {
        let text = format!("{call}: {error}");
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if *last != text {
            tracing::warn!("{text}");
            *last = text;
        }
        error.obstacle()
    }
}

/// Says on stderr, and in the status file, what is new.
#[derive(Default)]
struct Voice {
    phase: Option<String>,
    hub_answers: Option<bool>,
    progress: Option<Progress>,
    file: Option<StatusFile>,
}

struct Progress {
    from: Instant,
    from_bytes: u64,
    told: Instant,
}

impl Voice {
    fn tell(&mut self, status: &slmops_agent_core::Status) {
        if self.hub_answers != status.hub_answers {
            match status.hub_answers {
                Some(true) => tracing::info!("connected to the hub"),
                Some(false) => tracing::warn!(
                    "the hub does not answer; serving does not need it, trying again by itself"
                ),
                None => {}
            }
            self.hub_answers = status.hub_answers;
        }
        let Some(snapshot) = &status.snapshot else { return };
        let wanted = status.wanted.as_ref();
        if let Phase::Downloading { done_bytes, total_bytes } = snapshot.phase {
            let now = Instant::now();
            let progress = self.progress.get_or_insert(Progress {
                from: now,
                from_bytes: done_bytes,
                told: now,
            });
            let interval = Duration::from_millis(PROGRESS_INTERVAL_MS);
            let first = self.phase.as_deref() != Some("downloading");
            if first || progress.told.elapsed() >= interval {
                progress.told = now;
                let here = done_bytes.saturating_sub(progress.from_bytes);
                let left = (here > 0).then(|| {
                    let missing = total_bytes.saturating_sub(done_bytes) as f64;
                    progress.from.elapsed().mul_f64((missing / here as f64).min(1e6))
                });
                tracing::info!("{}", words::phase(&snapshot.phase, wanted, left));
            }
            self.phase = Some("downloading".to_owned());
            return;
        }
        self.progress = None;
        let line = words::phase(&snapshot.phase, wanted, None);
        if self.phase.as_ref() == Some(&line) {
            return;
        }
        match snapshot.phase {
            Phase::Waiting { cause, .. } if cause.is_rule() => tracing::info!("{line}"),
            Phase::RolledBack { .. } | Phase::Waiting { .. } => tracing::warn!("{line}"),
            _ => tracing::info!("{line}"),
        }
        if let (Phase::RolledBack { .. }, running) = (&snapshot.phase, &snapshot.running) {
            match running {
                Some(running) => tracing::info!("{} keeps answering", words::model(running)),
                None => tracing::warn!("no model answers"),
            }
        }
        self.phase = Some(line);
    }

    fn write(&mut self, state: &StateFolder, file: StatusFile) {
        if self.file.as_ref() != Some(&file) {
            state.write_status(&serde_json::to_vec_pretty(&file).unwrap_or_default());
            self.file = Some(file);
        }
    }
}
