//! One device: the shipping state machine, and a shell whose disk, engine and clock are simulated.

use std::sync::Arc;

use jiff::Timestamp;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use slmops_agent_core::{
    Blob, Config, Core, Death, Deployment, Effect, EffectId, Event, FetchError, Ledger, Loaded,
    Millis, Obstacle, Outcome, Package, ProbeError, Probed, Snapshot, StageError, VerifyError,
};
use slmops_api::delta::Delta;
use slmops_api::device::WaitCause;
use slmops_api::evidence::Evidence;
use slmops_api::probe::ProbeResult;
use slmops_api::rules::DeviceRules;
use slmops_api::runtime::EffectiveConfig;
use slmops_artifact::Digest;

use crate::catalog::{Catalog, mix};
use crate::operation::{EffectKind, Moment};
use crate::run::Sabotage;
use crate::spec::{Ailment, GroupSpec};
use crate::time::{SECOND, Time};
use crate::traffic::Traffic;

/// Bytes of a file that are hashed or loaded in a second.
const DISK_BYTES_PER_S: u64 = 200_000_000;
/// Milliseconds that a worker takes to start, beside reading its file.
const START_MS: u64 = 2 * SECOND;
/// Milliseconds that the golden probes take.
const PROBE_MS: u64 = 5 * SECOND;
/// Milliseconds that one write of the ledger takes.
const SAVE_MS: u64 = 5;
/// Milliseconds that turning the traffic takes.
const SWITCH_MS: u64 = 10;

/// Something that will happen to a device.
pub(crate) struct Pending {
    pub at: Time,
    pub id: EffectId,
    pub work: Work,
}

/// A piece of a download.
pub(crate) struct Piece {
    pub package: Package,
    pub source: Source,
    /// Deltas that stay on the disk once the download is over.
    pub kept: Vec<Blob>,
    /// Bytes that went over the link.
    pub wire_bytes: u64,
    /// Bytes of the package's files that they give.
    pub bytes: u64,
    /// Bytes a second that the agent asked for at most.
    pub max_rate_bytes_per_s: Option<u64>,
}

/// Where a download comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The hub, whole.
    Hub,
    /// The hub, as deltas of so many bytes.
    Deltas { bytes: u64 },
    /// Another device of the group.
    Peer,
    /// The same, as deltas of so many bytes.
    PeerDeltas { bytes: u64 },
}

impl Source {
    /// Whether it is another device of the group.
    pub(crate) fn is_near(self) -> bool {
        matches!(self, Self::Peer | Self::PeerDeltas { .. })
    }

    /// Bytes that go over the link for `left` bytes of a package.
    pub(crate) fn wire_bytes(self, package: &Package, left: u64) -> u64 {
        match self {
            Self::Hub | Self::Peer => left,
            Self::Deltas { bytes } | Self::PeerDeltas { bytes } => {
                let wire = u128::from(bytes + package.probes.size_bytes);
                let scaled = (u128::from(left) * wire).div_ceil(u128::from(package.total_bytes()));
                u64::try_from(scaled).unwrap_or(left).min(left)
            }
        }
    }
}

pub(crate) enum Work {
    /// An effect on the device itself takes place.
    Local(Box<Effect>),
    /// The hub holds a poll; then it says that nothing has changed.
    Held,
    /// Something is heard.
    Hear(Box<Event>),
    /// A report gets to the hub.
    Arrives { snapshot: Arc<Snapshot>, evidence: Option<Box<Evidence>>, sequence: u64, reply: bool },
    /// The hub's thanks for a report get to the device; in which life of the hub it was stored.
    Thanks { sequence: u64, epoch: u64 },
    /// A piece of a download.
    Piece(Box<Piece>),
    /// The worker that died is started again.
    Restart,
    /// The worker dies by itself.
    Fault,
}

/// What is to happen at the next such moment.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Armed {
    Crash(Moment, EffectKind),
    LoseRequest,
    LoseReply,
    TearLedger,
}

/// A file on the device's disk.
pub(crate) struct File {
    pub digest: Digest,
    pub have_bytes: u64,
    pub size_bytes: u64,
    pub intact: bool,
    /// The file that becomes this one where it lies.
    pub made_of: Option<Digest>,
}

pub(crate) struct Worker {
    pub id: EffectId,
    pub deployment: Deployment,
    /// Whether the bytes that it loaded are those that the signed manifest names.
    pub genuine: bool,
    pub probed: bool,
    /// Whether it answers.
    pub up: bool,
}

/// What the ledger on disk says, for checks.
#[derive(Clone, Default)]
pub(crate) struct Durable {
    pub generation: u64,
    pub confirmed: bool,
    pub current: Option<Digest>,
    pub previous: Option<Digest>,
    /// What was given up for the next one, which is not confirmed yet.
    pub without: Option<Digest>,
    /// The candidate, and whether it passed its probes.
    pub candidate: Option<(Digest, bool)>,
    /// What is wanted, and under which rules.
    pub wanted: Option<(Digest, DeviceRules)>,
}

impl Durable {
    pub(crate) fn of(ledger: &Ledger) -> Self {
        let manifest = |it: &Deployment| it.package.manifest;
        Self {
            generation: ledger.generation,
            confirmed: ledger.outcome == Some(Outcome::Confirmed),
            current: ledger.current.as_ref().map(manifest),
            previous: ledger.previous.as_ref().map(manifest),
            without: ledger.without().map(manifest),
            candidate: ledger.candidate.as_ref().map(|c| (manifest(&c.deployment), c.probed)),
            wanted: ledger.desired.as_ref().and_then(|desired| {
                Some((desired.model.as_ref()?.manifest, desired.rules.clone()))
            }),
        }
    }
}

/// The device's own clock: how far it is, and how fast it goes.
#[derive(Clone, Copy)]
struct Clock {
    real: u64,
    local: u64,
    ppm: i64,
    /// Whether it went wrong since it was last set.
    wrong: bool,
}

impl Clock {
    const MILLION: i128 = 1_000_000;

    fn local(self, now: Time) -> u64 {
        let passed = now.0 - self.real;
        if self.ppm == 0 {
            return self.local + passed;
        }
        let rate = Self::MILLION + i128::from(self.ppm);
        self.local + (i128::from(passed) * rate / Self::MILLION) as u64
    }

    /// When it shows `local`, at the earliest.
    fn real(self, local: u64) -> Time {
        let ahead = local.saturating_sub(self.local);
        if self.ppm == 0 {
            return Time(self.real.saturating_add(ahead));
        }
        let rate = Self::MILLION + i128::from(self.ppm);
        let passed = (i128::from(ahead) * Self::MILLION + rate - 1) / rate;
        Time(self.real.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX)))
    }
}

/// One device.
pub(crate) struct Device {
    /// Absent while it is without power.
    pub core: Option<Core<ChaCha8Rng>>,
    pub pending: Vec<Pending>,
    /// When it is next looked at, and by which entry of the schedule.
    pub scheduled: (Time, u64),
    clock: Clock,
    /// Whether the agent that runs knows what time it is.
    knows_time: bool,
    pub number: u32,
    pub group: usize,
    seed: u64,
    boots: u64,
    pub budget_bytes: u64,
    /// Room for models.
    pub disk_bytes: u64,
    /// What the agent finds when it starts for the first time: `ledger`, read already.
    pub first: Option<Ledger>,
    // --- what survives a power cut
    pub ledger: Vec<u8>,
    pub durable: Durable,
    pub files: Vec<File>,
    pub sequence: u64,
    /// Its users and what is counted of them, where somebody wants to know.
    pub traffic: Option<Box<Traffic>>,
    /// Manifests whose signature was good.
    pub signed: Vec<Digest>,
    // --- what does not
    pub workers: Vec<Worker>,
    pub live: Option<EffectId>,
    // --- what is wrong with it
    pub armed: Vec<Armed>,
    pub cut_until: Time,
    pub full_until: Time,
    pub broken_until: Time,
    /// When the power comes back.
    pub power_at: Time,
}

impl Device {
    pub(crate) fn new(number: u32, group: usize, seed: u64, spec: &GroupSpec) -> Self {
        Self {
            core: None,
            pending: Vec::new(),
            scheduled: (Time(u64::MAX), 0),
            clock: Clock { real: 0, local: 0, ppm: 0, wrong: false },
            knows_time: false,
            number,
            group,
            seed: mix(seed ^ u64::from(number)),
            boots: 0,
            budget_bytes: spec.memory_budget_bytes,
            disk_bytes: spec.disk_bytes.unwrap_or(u64::MAX),
            first: None,
            ledger: Ledger::default().to_bytes(),
            durable: Durable::default(),
            files: Vec::new(),
            sequence: 0,
            traffic: None,
            signed: Vec::new(),
            workers: Vec::new(),
            live: None,
            armed: Vec::new(),
            cut_until: Time(0),
            full_until: Time(0),
            broken_until: Time(0),
            power_at: Time(0),
        }
    }

    /// Starts the agent with what is on the disk.
    pub(crate) fn boot(&mut self, now: Time) {
        let first = self.first.take();
        let ledger = first.or_else(|| Ledger::parse(&self.ledger).ok()).unwrap_or_default();
        let config = Config { memory_budget_bytes: self.budget_bytes, ..Config::default() };
        self.boots += 1;
        let rng = ChaCha8Rng::seed_from_u64(mix(self.seed ^ (self.boots << 40)));
        self.clock = Clock { real: now.0, local: 0, wrong: self.clock.ppm != 0, ..self.clock };
        self.core = Some(Core::new(ledger, config, rng));
        if let Some(traffic) = &mut self.traffic {
            traffic.restart(now);
        }
    }

    pub(crate) fn power_off(&mut self, until: Time) {
        self.core = None;
        self.pending.clear();
        self.workers.clear();
        self.live = None;
        self.power_at = until;
    }

    pub(crate) fn now(&self, now: Time) -> Millis {
        Millis(self.clock.local(now))
    }

    pub(crate) fn jump(&mut self, now: Time, by: Time) {
        let local = self.clock.local(now) + by.0;
        self.clock = Clock { real: now.0, local, wrong: true, ..self.clock };
    }

    pub(crate) fn drift(&mut self, now: Time, ppm: i32) {
        let local = if self.core.is_some() { self.clock.local(now) } else { 0 };
        self.clock = Clock { real: now.0, local, ppm: i64::from(ppm), wrong: true };
    }

    /// The time of day as the agent finds it: the hub's word if it just spoke, else a clock of its
    /// own, which one device in four does not have.
    pub(crate) fn time_of_day(&mut self, now: Time, hub_spoke: bool) -> Option<Timestamp> {
        let knows = hub_spoke || self.number % 4 != 3;
        self.clock.wrong &= !hub_spoke || self.clock.ppm != 0;
        self.knows_time = knows;
        knows.then(|| now.timestamp())
    }

    /// Whether an answer of the hub tells it the time anew.
    pub(crate) fn needs_time(&self) -> bool {
        !self.knows_time || self.clock.wrong
    }

    /// Whether its clock may be ahead.
    pub(crate) fn is_clock_wrong(&self) -> bool {
        self.clock.wrong
    }

    /// Counts what its users asked until now.
    pub(crate) fn count(&mut self, now: Time, catalog: &Catalog) {
        let Some(mut traffic) = self.traffic.take() else { return };
        let serving = self.live_worker().filter(|worker| worker.up).map(|worker| {
            let package = &worker.deployment.package;
            (catalog.change(&package.manifest), package.weights.size_bytes)
        });
        traffic.serve(now, serving);
        self.traffic = Some(traffic);
    }

    /// What a report says of the model that runs.
    pub(crate) fn evidence(
        &mut self,
        now: Time,
        running: Option<Digest>,
        catalog: &Catalog,
    ) -> Option<Evidence> {
        if !self.traffic.as_ref()?.is_fresh(now) {
            self.count(now, catalog);
        }
        self.traffic.as_mut()?.evidence(running)
    }

    /// When it must next be looked at.
    pub(crate) fn next(&self) -> Time {
        let Some(core) = &self.core else { return self.power_at };
        let pending = self.pending.iter().map(|pending| pending.at).min();
        let deadline = core.deadline().map(|at| self.clock.real(at.0));
        [pending, deadline].into_iter().flatten().min().unwrap_or(Time(u64::MAX))
    }

    /// The earliest thing that is due.
    pub(crate) fn take_due(&mut self, now: Time) -> Option<Pending> {
        let (index, _) = self
            .pending
            .iter()
            .enumerate()
            .filter(|(_, pending)| pending.at <= now)
            .min_by_key(|(_, pending)| pending.at)?;
        Some(self.pending.swap_remove(index))
    }

    pub(crate) fn take_armed(&mut self, wanted: Armed) -> bool {
        let found = self.armed.iter().position(|armed| *armed == wanted);
        found.map(|index| self.armed.remove(index)).is_some()
    }

    pub(crate) fn worker(&self, id: EffectId) -> Option<&Worker> {
        self.workers.iter().find(|worker| worker.id == id)
    }

    pub(crate) fn live_worker(&self) -> Option<&Worker> {
        self.worker(self.live?)
    }

    pub(crate) fn file(&mut self, digest: Digest, size_bytes: u64) -> &mut File {
        let found = self.files.iter().position(|file| file.digest == digest);
        let index = found.unwrap_or_else(|| {
            let made_of = None;
            self.files.push(File { digest, have_bytes: 0, size_bytes, intact: true, made_of });
            self.files.len() - 1
        });
        &mut self.files[index]
    }

    /// Bytes of a package that are still to be pulled.
    pub(crate) fn missing_bytes(&self, package: &Package) -> u64 {
        let have = |digest: Digest| {
            self.files.iter().find(|file| file.digest == digest).map_or(0, |file| file.have_bytes)
        };
        package.blobs().map(|blob| blob.size_bytes - have(blob.digest)).sum()
    }

    /// Adds bytes of a package, small files first.
    pub(crate) fn receive(&mut self, package: &Package, mut bytes: u64) {
        for blob in package.blobs() {
            let file = self.file(blob.digest, blob.size_bytes);
            let taken = bytes.min(file.size_bytes - file.have_bytes);
            file.have_bytes += taken;
            bytes -= taken;
        }
    }

    /// Gives up the file `base` for `target`: where deltas lead there it becomes that, otherwise
    /// both are gone. Whether they do.
    pub(crate) fn give_up(&mut self, base: Digest, target: Blob, route: &[Delta]) -> bool {
        let begun = self.file(target.digest, target.size_bytes).made_of == Some(base);
        let leads = route.first().is_some_and(|delta| delta.from == base);
        let leads = leads && (begun || self.has(&base));
        self.files.retain(|file| file.digest != base);
        let file = self.file(target.digest, target.size_bytes);
        if leads != begun {
            (file.have_bytes, file.made_of) = (0, leads.then_some(base));
        }
        leads
    }

    /// Bytes that may still be written.
    pub(crate) fn free_bytes(&self) -> u64 {
        let used: u64 = self.files.iter().map(|file| file.have_bytes).sum();
        self.disk_bytes.saturating_sub(used)
    }

    /// Whether a file is here, and as it should be.
    pub(crate) fn has(&self, digest: &Digest) -> bool {
        let file = self.files.iter().find(|file| file.digest == *digest);
        file.is_some_and(|file| file.have_bytes == file.size_bytes && file.intact)
    }

    fn is_whole(&self, package: &Package) -> bool {
        package.blobs().all(|blob| self.has(&blob.digest))
    }

    /// Hashes a package's files; damaged ones are deleted.
    fn verify(&mut self, package: &Package, sabotage: Option<Sabotage>) -> Result<(), VerifyError> {
        if sabotage == Some(Sabotage::NeverHashes) || self.is_whole(package) {
            return Ok(());
        }
        let named: Vec<Digest> = package.blobs().map(|blob| blob.digest).collect();
        self.files.retain(|file| {
            let whole = file.have_bytes == file.size_bytes && file.intact;
            whole || !named.contains(&file.digest)
        });
        Err(VerifyError::Damaged)
    }

    /// How long an effect on the device itself takes.
    pub(crate) fn duration_ms(effect: &Effect) -> u64 {
        let read = |package: &Package| package.total_bytes() * SECOND / DISK_BYTES_PER_S;
        match effect {
            Effect::Verify { package, .. } => read(package),
            Effect::Stage { deployment, .. } => START_MS + 2 * read(&deployment.package),
            Effect::Probe { .. } => PROBE_MS,
            Effect::Activate { .. } => SWITCH_MS,
            _ => SAVE_MS,
        }
    }

    /// Lets an effect on the device itself take place, and says what the core hears of it.
    pub(crate) fn perform(
        &mut self,
        now: Time,
        effect: Effect,
        catalog: &Catalog,
        sabotage: Option<Sabotage>,
    ) -> Option<Event> {
        Some(match effect {
            Effect::Verify { id, package } => {
                Event::FilesVerified { id, result: self.verify(&package, sabotage) }
            }
            Effect::Stage { id, deployment } => {
                let result = self.stage(now, &deployment, catalog, sabotage);
                if result.is_ok() {
                    let genuine = self.is_whole(&deployment.package);
                    self.workers.push(Worker {
                        id,
                        deployment: *deployment,
                        genuine,
                        probed: false,
                        up: true,
                    });
                }
                Event::Staged { id, result }
            }
            Effect::Probe { id, worker, package, live, replay } => {
                let result = self.probe(worker, live, catalog, sabotage);
                let passed = |probed: &Probed| probed.results.iter().all(|result| result.passed);
                if let (Some(order), Some(traffic)) = (replay, &mut self.traffic)
                    && result.as_ref().is_ok_and(passed)
                {
                    let manifest = package.manifest;
                    let seed = catalog.known(&manifest).release as u64;
                    traffic.replayed(manifest, order.before, catalog.change(&manifest), seed);
                }
                Event::Probed { id, result }
            }
            Effect::Activate { id, worker } => {
                let result = match self.worker(worker) {
                    Some(_) => {
                        let old = self.live.replace(worker).filter(|old| *old != worker);
                        self.workers.retain(|worker| Some(worker.id) != old);
                        Ok(())
                    }
                    None => Err(StageError::Died(Death::Killed)),
                };
                Event::Activated { id, result }
            }
            Effect::SaveLedger { id, ledger } => {
                let result = match now < self.full_until {
                    true => Err(Obstacle::new(WaitCause::DiskFull)),
                    false => {
                        self.durable = Durable::of(&ledger);
                        self.ledger = ledger.to_bytes();
                        Ok(())
                    }
                };
                Event::LedgerSaved { id, result }
            }
            _ => return None,
        })
    }

    fn stage(
        &mut self,
        now: Time,
        deployment: &Deployment,
        catalog: &Catalog,
        sabotage: Option<Sabotage>,
    ) -> Result<Loaded, StageError> {
        self.verify(&deployment.package, sabotage).map_err(|error| match error {
            VerifyError::Damaged => StageError::Damaged,
            VerifyError::Obstacle(obstacle) => StageError::Obstacle(obstacle),
        })?;
        if now < self.broken_until {
            return Err(StageError::Died(Death::Fault));
        }
        let asked = &deployment.runtime;
        let mut effective = EffectiveConfig {
            context_tokens: asked.context_tokens,
            parallel: asked.parallel,
            threads: asked.threads.max(1),
            batch_tokens: asked.batch_tokens,
            kv_type: asked.kv_type,
            flash_attention: asked.flash_attention,
            queue_limit: asked.queue_limit,
            idle_after_s: asked.idle_after_s,
            engine: String::new(),
        };
        let mut memory_bytes = deployment.package.weights.size_bytes;
        match catalog.ailment(&deployment.package.manifest, self.number) {
            Some(Ailment::DoesNotLoad) => return Err(StageError::Load),
            Some(Ailment::CrashesOnLoad) => return Err(StageError::Died(Death::Fault)),
            Some(Ailment::IgnoresConfiguration) => effective.context_tokens /= 2,
            Some(Ailment::TooLarge) => memory_bytes = self.budget_bytes.saturating_add(1),
            _ => {}
        }
        Ok(Loaded { effective, memory_bytes })
    }

    fn probe(
        &mut self,
        id: EffectId,
        live: bool,
        catalog: &Catalog,
        sabotage: Option<Sabotage>,
    ) -> Result<Probed, ProbeError> {
        let number = self.number;
        let worker = self.workers.iter_mut().find(|worker| worker.id == id && worker.up);
        let worker = worker.ok_or(ProbeError::Died(Death::Killed))?;
        let ailment = catalog.ailment(&worker.deployment.package.manifest, number);
        let passed = match ailment {
            Some(Ailment::FailsProbes) => sabotage == Some(Sabotage::PassesEveryProbe),
            Some(Ailment::FailsLiveProbe) => !live,
            _ => true,
        };
        worker.probed |= passed;
        let result = ProbeResult {
            name: "golden-01".to_owned(),
            passed,
            value: Some(if passed { -1.0 } else { -9.0 }),
            floor: -2.0,
            duration_ms: PROBE_MS,
        };
        let memory_bytes = worker.deployment.package.weights.size_bytes;
        Ok(Probed { results: vec![result], memory_bytes })
    }

    /// The source's answer to a request for a manifest.
    pub(crate) fn fetch(
        &mut self,
        manifest: Digest,
        catalog: &Catalog,
    ) -> Result<Package, FetchError> {
        if catalog.ailment(&manifest, self.number) == Some(Ailment::BadSignature) {
            return Err(FetchError::Signature);
        }
        if !self.signed.contains(&manifest) {
            self.signed.push(manifest);
        }
        Ok(catalog.known(&manifest).package)
    }
}
