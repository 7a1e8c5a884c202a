//! The model that serves on this device: staging, probing and switching through the model host.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use slmops_agent_core::{
    Death, Deployment, EffectId, Event, Loaded, Obstacle, Package, ProbeError, Probed, ReplayOrder,
    StageError, VerifyError,
};
use slmops_api::device::{Telemetry, WaitCause};
use slmops_api::evidence::{EvidenceCounts, Replay};
use slmops_api::probe::{MAX_PROBES, MAX_REPLAY, ProbeResult, ProbeSet};
use slmops_artifact::Digest;
use slmops_inference::child::ChildError;
use slmops_inference::host::{HostEvent, ModelHost, ModelSpec, Staged};
use slmops_inference::otlp::{self, Collector};
use slmops_inference::probe;
use slmops_inference::server::{Keys, ServerOptions};
use slmops_inference::worker::{Worker, WorkerError, WorkerSpec};
use tokio::sync::{broadcast, mpsc};

use crate::download;
use crate::durable;
use crate::hub::MAX_PROBES_BYTES;
use crate::state::StateFolder;

/// Milliseconds that requests under way get when the worker is taken out of service at the end.
const SHUT_DOWN_MS: u64 = 5_000;
/// Times that live probes are repeated when the worker was too busy to answer some.
const LIVE_ATTEMPTS: u32 = 3;
/// Milliseconds between these.
const LIVE_PAUSE_MS: u64 = 500;
/// Milliseconds for the one request through the device's own endpoint.
const ENDPOINT_TIMEOUT_MS: u64 = 30_000;
/// The name of the result of that request.
const ENDPOINT_PROBE: &str = "endpoint";

/// The host, with the workers that wait for their activation.
pub struct Engine {
    state: StateFolder,
    host: Arc<ModelHost>,
    workers: Mutex<Workers>,
    /// Where it answers, and whom; for the last probe.
    endpoint: OnceLock<(String, Option<Arc<Keys>>)>,
}

#[derive(Default)]
struct Workers {
    staged: HashMap<EffectId, Staged>,
    active: Option<EffectId>,
    /// Waits for the worker that was taken out of service.
    leaving: Option<tokio::task::JoinHandle<()>>,
    /// Of which manifest the prompts were replayed last, and what came of it.
    replayed: Option<(Digest, Replay)>,
}

impl Engine {
    /// An engine that serves nothing yet; what happens to its workers goes to `events`.
    pub fn new(state: StateFolder, events: mpsc::Sender<Event>) -> Arc<Self> {
        // The HTTP client wants one even for plain HTTP; whoever came first may have set it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let host = ModelHost::new();
        let heard = host.events();
        let engine =
            Arc::new(Self { state, host, workers: Mutex::default(), endpoint: OnceLock::new() });
        tokio::spawn(watch(Arc::downgrade(&engine), heard, events));
        engine
    }

    /// The engine's name and version.
    pub fn version() -> String {
        slmops_inference::llama::engine_version()
    }

    /// The OpenAI-compatible endpoint, which will answer at `url`; with `keys` only who has one.
    pub fn router(&self, url: &str, keys: Option<Arc<Keys>>) -> axum::Router {
        let options = ServerOptions { keys: keys.clone(), ..ServerOptions::default() };
        let _ = self.endpoint.set((url.to_owned(), keys));
        slmops_inference::server::router(Arc::clone(&self.host), options)
    }

    /// Tells `collector` what is counted until `stop` is done; `sent` hears all that leaves.
    pub async fn push(
        self: Arc<Self>,
        collector: Collector,
        stop: impl Future<Output = ()>,
        sent: impl Fn(&serde_json::Value),
    ) {
        otlp::push(collector, Arc::clone(&self.host), stop, sent).await;
    }

    /// Loads a model beside the one that serves, from files whose digests are checked.
    ///
    /// # Errors
    /// As [`StageError`] says.
    pub async fn stage(&self, id: EffectId, wanted: &Deployment) -> Result<Loaded, StageError> {
        let (state, package) = (self.state.clone(), wanted.package);
        let verified = tokio::task::spawn_blocking(move || download::verify(&state, &package));
        verified.await.expect("file work does not panic").map_err(|error| match error {
            VerifyError::Damaged => StageError::Damaged,
            VerifyError::Obstacle(obstacle) => StageError::Obstacle(obstacle),
        })?;
        let staged = self.host.stage(self.spec(wanted)).await.map_err(|error| {
            tracing::warn!("{} {}: {error}", wanted.model.model, wanted.model.version);
            stage_error(&error)
        })?;
        let worker = staged.worker();
        let loaded = Loaded {
            effective: worker.effective().clone(),
            memory_bytes: worker.memory().resident_bytes,
        };
        self.lock().staged.insert(id, staged);
        Ok(loaded)
    }

    /// Runs the golden probes of a package on a worker; for the one that serves also one request
    /// through the device's own endpoint. Where it is ordered and they pass, the package's prompts are
    /// replayed: see [`Engine::take_replayed`].
    ///
    /// # Errors
    /// As [`ProbeError`] says.
    pub async fn probe(
        &self,
        id: EffectId,
        package: &Package,
        live: bool,
        replay: Option<ReplayOrder>,
    ) -> Result<Probed, ProbeError> {
        let probes = self.probes(package)?;
        let worker = match live {
            true => self.host.worker().await.map(|(_, worker)| worker).ok(),
            false => self.lock().staged.get(&id).map(|staged| staged.worker().clone()),
        };
        let worker = worker.ok_or(ProbeError::Died(Death::Killed))?;
        let mut results = probe::run(&worker, &probes).await;
        if live {
            // The worker serves others, too: a full queue says nothing about the model.
            for _ in 1..LIVE_ATTEMPTS {
                if results.iter().all(|result| result.value.is_some()) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(LIVE_PAUSE_MS)).await;
                results = probe::run(&worker, &probes).await;
            }
        }
        if live && let Some((endpoint, keys)) = self.endpoint.get() {
            let prompt = probes.probes.first().map_or("", |probe| &probe.prompt);
            let answer = ask(endpoint, keys.as_deref(), prompt).await;
            if !answer.passed {
                // A worker that died under the question is soon known to have.
                tokio::time::sleep(Duration::from_millis(LIVE_PAUSE_MS)).await;
            }
            results.truncate(MAX_PROBES - 1);
            results.push(answer);
        }
        if let Some(order) = replay.filter(|_| results.iter().all(|result| result.passed)) {
            self.replay(&worker, package, &probes, order).await;
        }
        if let Some(ending) = worker.ending() {
            return Err(ProbeError::Died(death(&ending.how)));
        }
        Ok(Probed { results, memory_bytes: worker.memory().resident_bytes })
    }

    async fn replay(
        &self,
        worker: &Worker,
        package: &Package,
        probes: &ProbeSet,
        order: ReplayOrder,
    ) {
        if probes.replay.is_empty() {
            return;
        }
        let limit = Duration::from_millis(order.limit_ms);
        let serving = tokio::time::timeout(limit, self.host.worker()).await;
        let Ok(Ok((_, serving))) = serving else { return };
        let losses = probe::replay(&serving, worker, &probes.replay, limit).await;
        // Four decimals are far below what any prompt is sure of.
        let losses_nats = losses.into_iter().map(|loss| (loss * 1e4).round() / 1e4).collect();
        let replay = Replay { before: order.before, losses_nats };
        self.lock().replayed = Some((package.manifest, replay));
    }

    /// What came of the last replay, and the manifest whose prompts they were; said once.
    pub fn take_replayed(&self) -> Option<(Digest, Replay)> {
        self.lock().replayed.take()
    }

    /// Turns new requests to a staged worker.
    ///
    /// # Errors
    /// [`StageError::Died`] if it is gone.
    pub async fn activate(&self, id: EffectId) -> Result<(), StageError> {
        let mut workers = self.lock();
        let staged = workers.staged.remove(&id).ok_or(StageError::Died(Death::Killed))?;
        if let Some(ending) = staged.worker().ending() {
            return Err(StageError::Died(death(&ending.how)));
        }
        // The one before drains by itself.
        drop(self.host.activate(staged));
        workers.active = Some(id);
        Ok(())
    }

    /// Ends a worker, whatever it does.
    pub fn cancel(&self, id: EffectId) {
        let mut workers = self.lock();
        drop(workers.staged.remove(&id));
        if workers.active == Some(id) {
            workers.active = None;
            drop(self.host.deactivate());
        }
    }

    /// Ends the worker that serves.
    pub fn stop_serving(&self) {
        let mut workers = self.lock();
        workers.active = None;
        workers.leaving = Some(self.host.evict(Duration::from_millis(SHUT_DOWN_MS)));
    }

    /// Waits until the worker that was stopped has let go of its file.
    pub async fn stopped(&self) {
        let leaving = self.lock().leaving.take();
        if let Some(leaving) = leaving {
            // It is bounded, and gone with the runtime at worst.
            let _ = leaving.await;
        }
    }

    /// Lets requests finish and ends every worker.
    pub async fn shut_down(&self) {
        self.lock().staged.clear();
        self.host.shut_down(Duration::from_millis(SHUT_DOWN_MS)).await;
    }

    /// Aggregates since the agent started.
    pub fn telemetry(&self) -> Telemetry {
        self.host.telemetry()
    }

    /// What a gate wants to know, since the agent started; how long it has served is not its business
    /// and stays 0.
    pub fn evidence(&self) -> EvidenceCounts {
        self.host.evidence()
    }

    fn spec(&self, wanted: &Deployment) -> ModelSpec {
        let model = &wanted.model;
        let weights = self.state.blob(wanted.package.weights.digest);
        let mut worker = WorkerSpec::new(weights, wanted.runtime.clone());
        if let Some(adapter) = wanted.package.adapter {
            let name = model.version.to_string();
            worker = worker.adapted(&name, self.state.blob(adapter.digest));
        }
        ModelSpec {
            id: model.model.to_string(),
            aliases: vec![
                format!("{}:{}", model.model, model.version),
                format!("{}:{}-{}", model.model, model.version, model.variant),
            ],
            worker,
        }
    }

    fn probes(&self, package: &Package) -> Result<ProbeSet, ProbeError> {
        let path = self.state.blob(package.probes.digest);
        let bytes = durable::read(&path, MAX_PROBES_BYTES).ok().flatten();
        let bytes = bytes.filter(|bytes| Digest::of(bytes) == package.probes.digest);
        parse_probes(&bytes.ok_or(ProbeError::Damaged)?)
    }

    fn lock(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse_probes(bytes: &[u8]) -> Result<ProbeSet, ProbeError> {
    let probes: ProbeSet = serde_json::from_slice(bytes).map_err(|_| ProbeError::Package)?;
    let count = probes.probes.len();
    let bounded = (1..=MAX_PROBES).contains(&count) && probes.replay.len() <= MAX_REPLAY;
    match probes.version == 1 && bounded {
        true => Ok(probes),
        false => Err(ProbeError::Package),
    }
}

/// Asks the device's own endpoint for one token, as any program on the device would.
async fn ask(endpoint: &str, keys: Option<&Keys>, prompt: &str) -> ProbeResult {
    let started = std::time::Instant::now();
    let request = async {
        let client = reqwest::Client::builder().no_proxy().build().ok()?;
        let body = serde_json::json!({ "prompt": prompt, "max_tokens": 1, "temperature": 0 });
        let url = format!("{endpoint}/v1/completions");
        let mut request = client.post(url).json(&body);
        if let Some(keys) = keys {
            request = request.bearer_auth(keys.own());
        }
        let response = request.send().await.ok()?;
        // A queue full of other people's requests is a working endpoint.
        (response.status().is_success() || response.status().as_u16() == 429).then_some(())
    };
    let answer = tokio::time::timeout(Duration::from_millis(ENDPOINT_TIMEOUT_MS), request).await;
    let passed = matches!(answer, Ok(Some(())));
    ProbeResult {
        name: ENDPOINT_PROBE.to_owned(),
        passed,
        value: Some(f64::from(u8::from(passed))),
        floor: 1.0,
        duration_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

async fn watch(
    engine: std::sync::Weak<Engine>,
    mut heard: broadcast::Receiver<HostEvent>,
    events: mpsc::Sender<Event>,
) {
    // A model that sleeps serves, unless it does not wake up.
    let (mut asleep, mut lost) = (false, false);
    loop {
        let event = match heard.recv().await {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(_)) => continue,
            Err(broadcast::error::RecvError::Closed) => return,
        };
        let Some(worker) = engine.upgrade().map(|engine| engine.lock().active) else { return };
        let Some(worker) = worker else { continue };
        let event = match event {
            HostEvent::Crashed { ending, .. } => {
                Event::WorkerDied { worker, death: death(&ending.how) }
            }
            HostEvent::Restarted { .. } => Event::WorkerRestarted { worker },
            HostEvent::Asleep { .. } => {
                (asleep, lost) = (true, false);
                continue;
            }
            // It was loaded from these very bytes before: what it lacks now is no fault of the model.
            HostEvent::RestartFailed { .. } if asleep && !lost => {
                lost = true;
                Event::WorkerDied { worker, death: Death::Killed }
            }
            HostEvent::Awake { .. } => {
                asleep = false;
                match std::mem::take(&mut lost) {
                    true => Event::WorkerRestarted { worker },
                    false => continue,
                }
            }
            HostEvent::Activated { .. } => {
                (asleep, lost) = (false, false);
                continue;
            }
            HostEvent::Drained { .. } | HostEvent::RestartFailed { .. } => continue,
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// Somebody's signal is not the model's fault; everything else is.
fn death(how: &str) -> Death {
    let killed = ["signal 9,", "signal 15,", "signal 2,"];
    match killed.iter().any(|signal| how.starts_with(signal)) {
        true => Death::Killed,
        false => Death::Fault,
    }
}

fn stage_error(error: &WorkerError) -> StageError {
    match error {
        WorkerError::Start(_) | WorkerError::Draining => {
            StageError::Obstacle(Obstacle::new(WaitCause::Storage))
        }
        WorkerError::TrainedContext { .. } => {
            StageError::Configuration { settings: vec!["context_tokens".to_owned()] }
        }
        WorkerError::Settings { settings, .. } => {
            let settings = settings.iter().map(|(name, _, _)| name.clone()).collect();
            StageError::Configuration { settings }
        }
        WorkerError::CrashedLoading { cause, .. } => match **cause {
            ChildError::Crashed { signal: 9 | 15 | 2, .. } => StageError::Died(Death::Killed),
            _ => StageError::Died(Death::Fault),
        },
        WorkerError::Died { how } => StageError::Died(death(how)),
        WorkerError::Load { .. }
        | WorkerError::Adapter { .. }
        | WorkerError::Request(_)
        | WorkerError::PromptCache { .. }
        | WorkerError::Draft { .. }
        | WorkerError::Template(_) => StageError::Load,
    }
}

/// Runs the golden probes of a deployment in a worker of its own, for `slm-agent probe`.
///
/// # Errors
/// The worker does not come up.
pub async fn probe_once(
    state: &StateFolder,
    deployment: &Deployment,
) -> Result<Vec<ProbeResult>, WorkerError> {
    let (events, _) = mpsc::channel(1);
    let engine = Engine::new(state.clone(), events);
    let probes = engine.probes(&deployment.package).unwrap_or(ProbeSet {
        version: 1,
        probes: Vec::new(),
        replay: Vec::new(),
    });
    let worker = Worker::spawn(engine.spec(deployment).worker).await?;
    Ok(probe::run(&worker, &probes).await)
}

/// Probe results as a table for people.
pub fn table(results: &[ProbeResult]) -> String {
    let mut text = String::new();
    for result in results {
        let verdict = if result.passed { "passed" } else { "FAILED" };
        let value = result.value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
        let _ = writeln!(
            text,
            "{verdict}  {:<16} value {value:>8}  floor {:>8.3}  {} ms",
            result.name, result.floor, result.duration_ms
        );
    }
    text
}
