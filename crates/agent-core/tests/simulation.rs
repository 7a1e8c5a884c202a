//! The core against a simulated shell: any order of events, lost and repeated completions, power
//! cuts at each effect, a network and a disk that come and go. After each event the invariants
//! hold; after the faults end, the device is what it should be or says why not.
//!
//! A failing run is shrunk and printed as a list of operations.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use slmops_agent_core::{
    Around, Blob, Config, Core, Death, Deployment, Effect, EffectId, Event, FetchError, Ledger,
    Loaded, Millis, Obstacle, Offer, Outcome, Package, Polled, ProbeError, Probed, StageError,
    VerifyError,
};
use slmops_api::device::{DesiredModel, DesiredState, Phase, WaitCause};
use slmops_api::probe::ProbeResult;
use slmops_api::rules::DeviceRules;
use slmops_api::runtime::{EffectiveConfig, RuntimeConfig};
use slmops_artifact::Digest;

const BUDGET_BYTES: u64 = 1_000;

/// How a model behaves on this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Model {
    GoodA,
    GoodB,
    /// Good: an adapter on the weights of A.
    AdaptedA,
    /// Good, but only in the first runtime configuration.
    Picky,
    BadSignature,
    MissingAtSource,
    WrongAtSource,
    DoesNotLoad,
    DiesLoading,
    AlwaysKilledLoading,
    FailsProbes,
    FailsLiveProbes,
    DiesLive,
    CrashLoops,
    IgnoresConfiguration,
    TooBig,
}

const MODELS: [Model; 16] = [
    Model::GoodA,
    Model::GoodB,
    Model::AdaptedA,
    Model::Picky,
    Model::BadSignature,
    Model::MissingAtSource,
    Model::WrongAtSource,
    Model::DoesNotLoad,
    Model::DiesLoading,
    Model::AlwaysKilledLoading,
    Model::FailsProbes,
    Model::FailsLiveProbes,
    Model::DiesLive,
    Model::CrashLoops,
    Model::IgnoresConfiguration,
    Model::TooBig,
];

#[derive(Clone, Copy, Debug)]
enum Op {
    /// The hub asks for something new.
    Publish(Model, bool),
    /// The hub asks for nothing.
    Withdraw,
    /// The hub holds what it asks for, or lets it go on.
    Hold(bool),
    /// The hub lets it give up the model that serves to make room, or not.
    Replace(bool),
    /// So many models fit on the disk; 0: any number.
    Room(u8),
    /// The hub answers the poll with what it asked for before.
    OldAnswer,
    /// A pending effect happens, and the core hears of it.
    Finish(u8),
    /// It happens, but its completion is lost.
    Unheard(u8),
    /// It never happens, and no completion comes.
    Lost(u8),
    /// A completion of this process comes again.
    Repeat(u8),
    /// Some bytes arrive.
    Progress,
    /// The power goes.
    Cut,
    /// A pending effect happens, and then the power goes.
    CutAfter(u8),
    Network(bool),
    Disk(bool),
    /// The serving worker ends.
    WorkerDies(Death),
    WorkerRestarts,
    /// A bit of the current model's file flips.
    Flip,
    Pass(u16),
}

fn op() -> impl Strategy<Value = Op> {
    let model = prop_oneof![
        3 => Just(Model::GoodA),
        3 => Just(Model::GoodB),
        2 => Just(Model::AdaptedA),
        2 => Just(Model::Picky),
        7 => proptest::sample::select(&MODELS[4..]),
    ];
    let death = prop_oneof![Just(Death::Fault), Just(Death::Killed)];
    prop_oneof![
        6 => (model, any::<bool>()).prop_map(|(model, wide)| Op::Publish(model, wide)),
        1 => Just(Op::Withdraw),
        3 => any::<bool>().prop_map(Op::Hold),
        2 => any::<bool>().prop_map(Op::Replace),
        3 => (0_u8..4).prop_map(Op::Room),
        1 => Just(Op::OldAnswer),
        60 => any::<u8>().prop_map(Op::Finish),
        3 => any::<u8>().prop_map(Op::Unheard),
        3 => any::<u8>().prop_map(Op::Lost),
        4 => any::<u8>().prop_map(Op::Repeat),
        2 => Just(Op::Progress),
        2 => Just(Op::Cut),
        3 => any::<u8>().prop_map(Op::CutAfter),
        3 => any::<bool>().prop_map(Op::Network),
        3 => any::<bool>().prop_map(Op::Disk),
        2 => death.prop_map(Op::WorkerDies),
        2 => Just(Op::WorkerRestarts),
        1 => Just(Op::Flip),
        12 => (0_u16..3_000).prop_map(Op::Pass),
        2 => any::<u16>().prop_map(Op::Pass),
    ]
}

fn runtime(wide: bool) -> RuntimeConfig {
    RuntimeConfig { context_tokens: if wide { 256 } else { 128 }, ..RuntimeConfig::default() }
}

fn desired(generation: u64, wish: Option<(Model, bool)>, rules: DeviceRules) -> DesiredState {
    DesiredState {
        generation,
        model: wish.map(|(model, _)| desired_model(model)),
        runtime: runtime(wish.is_some_and(|(_, wide)| wide)),
        confirm_timeout_s: 60,
        reason: "because".to_owned(),
        rules,
    }
}

fn desired_model(model: Model) -> DesiredModel {
    let weights = if model == Model::AdaptedA { Model::GoodA } else { model };
    DesiredModel {
        model: "glass".parse().unwrap(),
        version: semver::Version::new(1, 0, model as u64),
        variant: "f32".parse().unwrap(),
        manifest: Digest::of(&[b'm', model as u8]),
        weights: Digest::of(&[b'w', weights as u8]),
        size_bytes: 100,
        predicted_memory_bytes: 500,
    }
}

fn adapter() -> Blob {
    Blob { digest: Digest::of(b"adapter"), size_bytes: 10 }
}

fn package(model: &DesiredModel) -> Package {
    let is_adapted = behaviour(model.manifest) == Model::AdaptedA;
    Package {
        manifest: model.manifest,
        weights: Blob { digest: model.weights, size_bytes: model.size_bytes },
        probes: Blob { digest: Digest::of(b"probes"), size_bytes: 10 },
        adapter: is_adapted.then(adapter),
    }
}

fn behaviour(manifest: Digest) -> Model {
    let found = MODELS.into_iter().find(|model| Digest::of(&[b'm', *model as u8]) == manifest);
    found.expect("only known models are asked for")
}

struct World {
    core: Core<ChaCha8Rng>,
    now: Millis,
    seed: u64,
    // The hub.
    generation: u64,
    wish: Option<(Model, bool)>,
    old_wish: Option<(Model, bool)>,
    rules: DeviceRules,
    // The world around.
    network: bool,
    disk: bool,
    /// Models that fit on the disk; 0: any number.
    room: u8,
    // What survives on the device.
    ledger: Vec<u8>,
    files: BTreeMap<Digest, bool>,
    // What dies with the process.
    pending: Vec<Effect>,
    heard: Vec<Event>,
    workers: BTreeMap<EffectId, Deployment>,
    live: Option<EffectId>,
    // What the invariants need.
    signed: BTreeSet<Digest>,
    probed: BTreeSet<EffectId>,
    reported_generation: u64,
    /// The newest that this process has heard, or found in its ledger.
    told: Option<DesiredState>,
    /// Whether it was ever allowed to give up the model that serves.
    may_replace: bool,
    /// Whether a worker seemed to crash by itself.
    faulted: bool,
    problems: Vec<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        let ledger = Ledger::default();
        let mut world = Self {
            core: Self::core(&ledger, seed),
            now: Millis(0),
            seed,
            generation: 0,
            wish: None,
            old_wish: None,
            rules: DeviceRules::default(),
            network: true,
            disk: true,
            room: 0,
            ledger: ledger.to_bytes(),
            files: BTreeMap::new(),
            pending: Vec::new(),
            heard: Vec::new(),
            workers: BTreeMap::new(),
            live: None,
            signed: BTreeSet::new(),
            probed: BTreeSet::new(),
            reported_generation: 0,
            told: None,
            may_replace: false,
            faulted: false,
            problems: Vec::new(),
        };
        world.hear(Event::Tick);
        world
    }

    fn core(ledger: &Ledger, seed: u64) -> Core<ChaCha8Rng> {
        let config = Config {
            memory_budget_bytes: BUDGET_BYTES,
            backoff_cap_ms: 8_000,
            ..Config::default()
        };
        Core::new(ledger.clone(), config, ChaCha8Rng::seed_from_u64(seed))
    }

    fn durable(&self) -> Ledger {
        Ledger::parse(&self.ledger).expect("the ledger on disk is always whole")
    }

    fn hear(&mut self, event: Event) {
        if let Event::Polled { result: Ok(Polled::Desired(desired)), .. } = &event
            && self.told.as_ref().is_none_or(|told| told.generation < desired.generation)
        {
            self.told = Some((**desired).clone());
        }
        let mut effects = Vec::new();
        self.core.handle(self.now, event, &mut effects);
        for effect in effects {
            self.check(&effect);
            match effect {
                Effect::Cancel { id } => {
                    self.pending.retain(|pending| id_of(pending) != Some(id));
                    self.workers.remove(&id);
                    if self.live == Some(id) {
                        self.live = None;
                    }
                }
                Effect::Collect { keep } => self.files.retain(|digest, _| keep.contains(digest)),
                Effect::StopServing => {
                    if let Some(live) = self.live.take() {
                        self.workers.remove(&live);
                    }
                }
                effect => self.pending.push(effect),
            }
        }
        if self.pending.len() > 8 {
            self.problems.push(format!("{} effects in flight", self.pending.len()));
        }
    }

    /// The invariants.
    fn check(&mut self, effect: &Effect) {
        let durable = self.durable();
        // What was given up stays the device's own until it is overwritten.
        let kept = [durable.current.as_ref(), durable.previous.as_ref(), durable.without()];
        let new = |manifest| !kept.iter().flatten().any(|kept| kept.model.manifest == manifest);
        let held = self.told.as_ref().is_some_and(|told| told.rules.hold);
        match effect {
            Effect::Download { package, .. } if held && new(package.manifest) => {
                self.problems.push("fetches what is held".into());
            }
            Effect::Download { gives_up: Some(weights), .. } => {
                let uses = |it: &Deployment| it.package.weights.digest == *weights;
                if !self.may_replace || !durable.without().is_some_and(uses) {
                    self.problems.push("gives up what it may not".into());
                }
                if self.workers.values().any(uses) {
                    self.problems.push("gives up what is in use".into());
                }
            }
            Effect::Stage { deployment, .. } if held && new(deployment.model.manifest) => {
                self.problems.push("tries what is held".into());
            }
            Effect::Activate { worker, .. } => {
                if held && self.workers.get(worker).is_some_and(|it| new(it.model.manifest)) {
                    self.problems.push("switches to what is held".into());
                }
                let Some(deployment) = self.workers.get(worker) else { return };
                let candidate = durable.candidate.as_ref().is_some_and(|candidate| {
                    candidate.deployment == *deployment
                        && candidate.probed
                        && self.probed.contains(worker)
                });
                let confirmed = kept.contains(&Some(deployment));
                if !candidate && !confirmed {
                    self.problems.push("activates what the durable ledger does not allow".into());
                }
                let manifest = deployment.package.manifest;
                let generation = durable.candidate.as_ref().map_or(u64::MAX, |c| c.generation);
                if durable.refuses(manifest, &deployment.runtime, generation).is_some() {
                    self.problems.push("activates what was rejected".into());
                }
                if !self.signed.contains(&manifest) {
                    self.problems.push("activates what nobody signed".into());
                }
            }
            Effect::Stage { deployment, .. }
                if !self.signed.contains(&deployment.package.manifest) =>
            {
                self.problems.push("stages what nobody signed".into());
            }
            Effect::SaveLedger { ledger, .. } => {
                if ledger.generation < durable.generation {
                    self.problems.push("the ledger's generation falls".into());
                }
                if ledger.previous.is_some() && ledger.current.is_none() {
                    self.problems.push("a ledger with a previous model and no current one".into());
                }
            }
            Effect::Report { snapshot, .. } => {
                if snapshot.generation < self.reported_generation {
                    self.problems.push("the reported generation falls".into());
                }
                self.reported_generation = snapshot.generation;
                if snapshot.phase == Phase::Confirmed
                    && durable.generation == snapshot.generation
                    && durable.outcome != Some(Outcome::Confirmed)
                {
                    self.problems.push("reports what is not durable".into());
                }
            }
            Effect::StopServing if !self.faulted => {
                let healthy = durable.current.as_ref().is_some_and(|current| {
                    let model = behaviour(current.package.manifest);
                    self.intact(&current.package) && model <= Model::AdaptedA
                });
                // A healthy model may have been too slow to load; then it is tried again.
                if healthy && self.core.status().retry_at.is_none() {
                    self.problems.push("stops serving with a healthy model at hand".into());
                }
            }
            _ => {}
        }
    }

    /// Lets an effect happen and says what the core would hear of it.
    fn happen(&mut self, effect: Effect) -> Option<Event> {
        let network = Obstacle::new(WaitCause::Network);
        let storage = Obstacle::new(WaitCause::DiskFull);
        Some(match effect {
            Effect::Poll { id, known, .. } => {
                let result = if !self.network {
                    Err(Obstacle { retry_after_ms: Some(2_000), ..network })
                } else if known == Some(self.generation) {
                    Ok(Polled::NotModified)
                } else {
                    let rules = self.rules.clone();
                    Ok(Polled::Desired(Box::new(desired(self.generation, self.wish, rules))))
                };
                Event::Polled { id, result }
            }
            Effect::FetchPackage { id, model } => {
                let result = if !self.network {
                    Err(FetchError::Obstacle(network))
                } else if behaviour(model.manifest) == Model::BadSignature {
                    Err(FetchError::Signature)
                } else {
                    self.signed.insert(model.manifest);
                    Ok(Offer::from(package(&model)))
                };
                Event::PackageFetched { id, result }
            }
            Effect::Download { id, package, has_weights, gives_up, .. } => {
                if let Some(weights) = gives_up {
                    // Changed where it lay, or deleted.
                    self.files.remove(&weights);
                }
                let short_bytes = self.short_bytes(&package);
                let result = match behaviour(package.manifest) {
                    _ if !self.network => Err(FetchError::Obstacle(network)),
                    _ if !self.disk => Err(FetchError::Obstacle(storage)),
                    _ if has_weights && self.files.get(&package.weights.digest) != Some(&true) => {
                        Err(FetchError::Deltas)
                    }
                    _ if short_bytes > 0 => Err(FetchError::NoRoom { short_bytes }),
                    Model::MissingAtSource => Err(FetchError::Missing),
                    Model::WrongAtSource => Err(FetchError::Digest),
                    _ => {
                        self.files.extend(package.blobs().map(|blob| (blob.digest, true)));
                        Ok(())
                    }
                };
                Event::Downloaded { id, result }
            }
            Effect::Verify { id, package } => {
                let result = if self.intact(&package) { Ok(()) } else { Err(VerifyError::Damaged) };
                Event::FilesVerified { id, result }
            }
            Effect::Stage { id, deployment } => {
                let result = self.load(&deployment);
                if result.is_ok() {
                    self.workers.insert(id, *deployment);
                }
                Event::Staged { id, result }
            }
            Effect::Probe { id, worker, live, .. } => {
                Event::Probed { id, result: self.probe(worker, live) }
            }
            Effect::Activate { id, worker } => {
                let result = if self.workers.contains_key(&worker) {
                    if let Some(old) = self.live.replace(worker).filter(|old| *old != worker) {
                        self.workers.remove(&old);
                    }
                    Ok(())
                } else {
                    Err(StageError::Died(Death::Killed))
                };
                Event::Activated { id, result }
            }
            Effect::SaveLedger { id, ledger } => {
                let result = if self.disk {
                    self.ledger = ledger.to_bytes();
                    Ok(())
                } else {
                    Err(storage)
                };
                Event::LedgerSaved { id, result }
            }
            Effect::Report { id, .. } => {
                Event::Reported { id, result: if self.network { Ok(()) } else { Err(network) } }
            }
            Effect::Collect { .. } | Effect::Cancel { .. } | Effect::StopServing => return None,
        })
    }

    /// Bytes that the disk lacks for the weights of a package.
    fn short_bytes(&self, package: &Package) -> u64 {
        let small = package.small().chain([adapter()]).map(|blob| blob.digest);
        let named: Vec<Digest> = small.chain([package.weights.digest]).collect();
        let others = self.files.keys().filter(|file| !named.contains(file)).count();
        match self.room {
            0 => 0,
            room => (others as u64 + 1).saturating_sub(room.into()) * package.weights.size_bytes,
        }
    }

    fn intact(&self, package: &Package) -> bool {
        package.blobs().all(|blob| self.files.get(&blob.digest) == Some(&true))
    }

    fn load(&self, deployment: &Deployment) -> Result<Loaded, StageError> {
        if !self.intact(&deployment.package) {
            return Err(StageError::Damaged);
        }
        let asked = &deployment.runtime;
        let mut effective = EffectiveConfig {
            context_tokens: asked.context_tokens,
            parallel: asked.parallel,
            threads: 2,
            batch_tokens: asked.batch_tokens,
            kv_type: asked.kv_type,
            flash_attention: asked.flash_attention,
            queue_limit: asked.queue_limit,
            idle_after_s: asked.idle_after_s,
            engine: "simulated".to_owned(),
        };
        let mut memory_bytes = 500;
        match behaviour(deployment.package.manifest) {
            Model::DoesNotLoad => return Err(StageError::Load),
            Model::Picky if asked.context_tokens > 128 => return Err(StageError::Load),
            Model::DiesLoading => return Err(StageError::Died(Death::Fault)),
            Model::AlwaysKilledLoading => return Err(StageError::Died(Death::Killed)),
            Model::IgnoresConfiguration => effective.context_tokens -= 1,
            Model::TooBig => memory_bytes = BUDGET_BYTES + 1,
            _ => {}
        }
        Ok(Loaded { effective, memory_bytes })
    }

    fn probe(&mut self, worker: EffectId, live: bool) -> Result<Probed, ProbeError> {
        let Some(deployment) = self.workers.get(&worker) else {
            return Err(ProbeError::Died(Death::Killed));
        };
        let model = behaviour(deployment.package.manifest);
        if live && model == Model::DiesLive {
            return Err(ProbeError::Died(Death::Fault));
        }
        let passed = model != Model::FailsProbes && !(live && model == Model::FailsLiveProbes);
        if passed {
            self.probed.insert(worker);
        }
        let result = ProbeResult {
            name: "golden-01".to_owned(),
            passed,
            value: Some(f64::NAN),
            floor: f64::NEG_INFINITY,
            duration_ms: 1,
        };
        Ok(Probed { results: vec![result], memory_bytes: 600 })
    }

    fn cut_power(&mut self) {
        self.seed += 1;
        self.now = Millis(0);
        self.pending.clear();
        self.heard.clear();
        self.workers.clear();
        self.probed.clear();
        self.live = None;
        self.core = Self::core(&self.durable(), self.seed);
        self.told = self.durable().desired;
        self.hear(Event::Tick);
    }

    fn take(&mut self, index: u8) -> Option<Effect> {
        if self.pending.is_empty() {
            return None;
        }
        let mut index = usize::from(index) % self.pending.len();
        // The shell writes the ledger in the order in which it was asked to.
        let saves = |effect: &Effect| matches!(effect, Effect::SaveLedger { .. });
        if saves(&self.pending[index]) {
            index = self.pending.iter().position(saves)?;
        }
        Some(self.pending.remove(index))
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Publish(model, wide) => {
                self.generation += 1;
                self.old_wish = self.wish.replace((model, wide));
            }
            Op::Withdraw => {
                self.generation += 1;
                self.old_wish = self.wish.take();
            }
            Op::Hold(hold) => {
                self.generation += 1;
                self.rules.hold = hold;
            }
            Op::Replace(replace) => {
                self.generation += 1;
                self.rules.replace = replace;
                self.may_replace |= replace;
            }
            Op::Room(room) => self.room = room,
            Op::OldAnswer => {
                let poll = self.pending.iter().position(|e| matches!(e, Effect::Poll { .. }));
                if let Some(Effect::Poll { id, .. }) = poll.map(|index| self.pending.remove(index))
                {
                    let generation = self.generation.saturating_sub(1);
                    let old = desired(generation, self.old_wish, DeviceRules::default());
                    self.hear(Event::Polled { id, result: Ok(Polled::Desired(Box::new(old))) });
                }
            }
            Op::Finish(index) => {
                if let Some(event) = self.take(index).and_then(|effect| self.happen(effect)) {
                    self.heard.push(event.clone());
                    self.hear(event);
                }
            }
            Op::Unheard(index) => {
                let _ = self.take(index).and_then(|effect| self.happen(effect));
            }
            Op::Lost(index) => drop(self.take(index)),
            Op::Repeat(index) => {
                if !self.heard.is_empty() {
                    let index = usize::from(index) % self.heard.len();
                    self.hear(self.heard[index].clone());
                }
            }
            Op::Progress => {
                let download = self.pending.iter().find_map(|effect| match effect {
                    Effect::Download { id, .. } => Some(*id),
                    _ => None,
                });
                if let Some(id) = download {
                    self.hear(Event::Progress { id, done_bytes: 50, total_bytes: 110 });
                }
            }
            Op::Cut => self.cut_power(),
            Op::CutAfter(index) => {
                let _ = self.take(index).and_then(|effect| self.happen(effect));
                self.cut_power();
            }
            Op::Network(up) => self.network = up,
            Op::Disk(free) => self.disk = free,
            Op::WorkerDies(death) => {
                if let Some(worker) = self.live {
                    self.faulted |= death == Death::Fault;
                    self.hear(Event::WorkerDied { worker, death });
                }
            }
            Op::WorkerRestarts => {
                if let Some(worker) = self.live {
                    self.hear(Event::WorkerRestarted { worker });
                }
            }
            Op::Flip => {
                if let Some(current) = self.durable().current {
                    self.files.insert(current.package.weights.digest, false);
                }
            }
            Op::Pass(ms) => self.pass(u64::from(ms)),
        }
    }

    /// Lets time pass, with every deadline kept.
    fn pass(&mut self, ms: u64) {
        let end = self.now + ms;
        for _ in 0..1_000 {
            match self.core.deadline() {
                Some(at) if at <= end => {
                    self.now = self.now.max(at);
                    self.hear(Event::Tick);
                }
                _ => break,
            }
        }
        self.now = end;
    }

    /// Faults end: everything that is asked for happens, in order, until nothing changes.
    fn heal(&mut self) {
        (self.network, self.disk) = (true, true);
        // Without leave to give up a model it would wait; so would one that mends its newest model
        // while the one before serves.
        if !self.rules.replace || self.durable().previous.is_some() {
            self.room = 0;
        }
        for _ in 0..600 {
            let held = |effect: &Effect, generation| matches!(effect, Effect::Poll { known: Some(known), .. } if *known == generation);
            let next = self.pending.iter().position(|effect| !held(effect, self.generation));
            if let Some(index) = next {
                let effect = self.pending.remove(index);
                if let Some(event) = self.happen(effect) {
                    self.hear(event);
                }
                continue;
            }
            if let Some(worker) = self.live {
                self.hear(Event::WorkerRestarted { worker });
                if behaviour(self.workers[&worker].package.manifest) == Model::CrashLoops {
                    self.hear(Event::WorkerDied { worker, death: Death::Fault });
                    self.hear(Event::WorkerRestarted { worker });
                }
            }
            if let Some(at) = self.core.deadline() {
                let at = at.max(self.now + 1);
                self.pass(at.0 - self.now.0);
            }
        }
    }

    /// Whether the device says that it waits for a rule.
    fn holds(&self) -> bool {
        self.core.status().snapshot.is_some_and(|snapshot| snapshot.phase.held().is_some())
    }

    /// Whether the device is what it should be, or has said why not.
    fn converged(&self) -> Result<Option<Outcome>, String> {
        let ledger = self.durable();
        if ledger.generation != self.generation {
            return Err(format!("knows generation {}, not {}", ledger.generation, self.generation));
        }
        let live = self.live.and_then(|live| self.workers.get(&live));
        if live != ledger.current.as_ref() {
            return Err("does not serve what the ledger names".into());
        }
        if ledger.without().is_some() && !self.holds() {
            return Err("gave up its model, and gets none".into());
        }
        let Some((model, wide)) = self.wish else { return Ok(None) };
        let wanted = desired(self.generation, self.wish, self.rules.clone());
        let wanted = wanted.model.expect("a wish has a model");
        match &ledger.outcome {
            Some(Outcome::Confirmed) => {
                if !live.is_some_and(|live| live.is(&wanted, &runtime(wide))) {
                    return Err(format!("confirmed, but does not serve {model:?}"));
                }
            }
            Some(Outcome::RolledBack { .. }) => {
                if ledger.refuses(wanted.manifest, &runtime(wide), self.generation).is_none() {
                    return Err(format!("went back, but did not reject {model:?}"));
                }
            }
            None if self.rules.hold && self.holds() => {}
            None => return Err(format!("no outcome for {model:?}: {:?}", self.core.status())),
        }
        Ok(ledger.outcome)
    }
}

fn id_of(effect: &Effect) -> Option<EffectId> {
    match effect {
        Effect::Poll { id, .. }
        | Effect::FetchPackage { id, .. }
        | Effect::Download { id, .. }
        | Effect::Verify { id, .. }
        | Effect::Stage { id, .. }
        | Effect::Probe { id, .. }
        | Effect::Activate { id, .. }
        | Effect::SaveLedger { id, .. }
        | Effect::Report { id, .. } => Some(*id),
        Effect::Collect { .. } | Effect::Cancel { .. } | Effect::StopServing => None,
    }
}

/// Runs the operations, heals, and returns what is wrong.
fn run(seed: u64, ops: &[Op]) -> Result<(World, Option<Outcome>), String> {
    let mut world = World::new(seed);
    for (index, op) in ops.iter().enumerate() {
        world.apply(*op);
        if let Some(problem) = world.problems.first() {
            return Err(format!("{problem}\n{}", listing(&ops[..=index])));
        }
    }
    world.heal();
    if let Some(problem) = world.problems.first() {
        return Err(format!("{problem} while healing\n{}", listing(ops)));
    }
    let mut outcome = world.converged();
    if world.rules.hold && outcome.is_ok() {
        world.apply(Op::Hold(false));
        world.heal();
        outcome = world.converged();
    }
    let outcome = outcome.map_err(|problem| format!("{problem}\n{}", listing(ops)))?;
    Ok((world, outcome))
}

fn listing(ops: &[Op]) -> String {
    ops.iter().enumerate().map(|(index, op)| format!("{index:4}  {op:?}\n")).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_run_keeps_the_invariants_and_converges(
        seed in any::<u64>(),
        ops in proptest::collection::vec(op(), 1..160),
    ) {
        let (world, outcome) = run(seed, &ops).map_err(TestCaseError::fail)?;
        let confirmed = outcome == Some(Outcome::Confirmed);
        match world.wish {
            Some((Model::GoodA | Model::GoodB | Model::AdaptedA, _) | (Model::Picky, false)) => {
                // Only these can blame a good model: its worker seemed to crash by itself, a
                // completion never came, or the power went again and again.
                let excused = ops.iter().any(|op| matches!(
                    op,
                    Op::WorkerDies(Death::Fault) | Op::Lost(_) | Op::Unheard(_)
                        | Op::Cut | Op::CutAfter(_)
                ));
                prop_assert!(confirmed || excused, "a good model was refused\n{}", listing(&ops));
            }
            // After a power cut nothing tells that it is new, and there is nothing to go back to.
            Some((Model::CrashLoops, _)) if world.durable().previous.is_none() => {}
            Some(_) => prop_assert!(!confirmed, "a bad model was confirmed\n{}", listing(&ops)),
            None => {}
        }
    }
}

/// Publishes, heals, and says how it ended.
fn verdict_on(model: Model) -> (World, Option<Outcome>) {
    run(7, &[Op::Publish(model, false)]).unwrap_or_else(|problem| panic!("{model:?}: {problem}"))
}

#[test]
fn each_model_gets_its_verdict() {
    let verdicts: Vec<String> = MODELS
        .into_iter()
        .map(|model| {
            let (world, outcome) = verdict_on(model);
            let serves = if world.live.is_some() { "serves" } else { "does not serve" };
            let outcome = match outcome {
                Some(Outcome::RolledBack { failure }) => {
                    serde_json::to_value(&failure).unwrap()["failure"].as_str().unwrap().to_owned()
                }
                Some(Outcome::Confirmed) => "confirmed".to_owned(),
                None => "none".to_owned(),
            };
            format!("{model:?}: {outcome}, {serves}")
        })
        .collect();
    let expected = [
        "GoodA: confirmed, serves",
        "GoodB: confirmed, serves",
        "AdaptedA: confirmed, serves",
        "Picky: confirmed, serves",
        "BadSignature: signature, does not serve",
        "MissingAtSource: digest, does not serve",
        "WrongAtSource: digest, does not serve",
        "DoesNotLoad: load, does not serve",
        "DiesLoading: crash, does not serve",
        "AlwaysKilledLoading: crash, does not serve",
        "FailsProbes: probes, does not serve",
        "FailsLiveProbes: probes, does not serve",
        "DiesLive: crash, does not serve",
        "CrashLoops: crash, does not serve",
        "IgnoresConfiguration: configuration, does not serve",
        "TooBig: memory, does not serve",
    ];
    assert_eq!(verdicts, expected);
}

/// A good model is confirmed; then each bad one is tried and the good one keeps serving.
#[test]
fn after_each_failure_the_previous_model_serves() {
    for model in &MODELS[4..] {
        let (mut world, outcome) = verdict_on(Model::GoodA);
        assert_eq!(outcome, Some(Outcome::Confirmed));
        world.apply(Op::Publish(*model, false));
        world.heal();
        let outcome = world.converged().unwrap();
        assert!(matches!(outcome, Some(Outcome::RolledBack { .. })), "{model:?}: {outcome:?}");
        let live = &world.workers[&world.live.unwrap()];
        assert_eq!(behaviour(live.package.manifest), Model::GoodA, "{model:?}");
        assert_eq!(world.problems, Vec::<String>::new());
    }
}

/// The power goes after a model was given up and before its file was touched: it serves again.
#[test]
fn what_was_given_up_serves_until_it_is_overwritten() {
    let mut ops = vec![
        Op::Publish(Model::GoodA, false),
        Op::Replace(false),
        Op::Repeat(0),
        Op::OldAnswer,
        Op::Finish(0),
        Op::Unheard(19),
        Op::Publish(Model::CrashLoops, false),
        Op::Pass(1000),
        Op::Hold(false),
        Op::OldAnswer,
        Op::Finish(0),
        Op::Finish(0),
        Op::Pass(1000),
        Op::Finish(126),
        Op::Unheard(0),
    ];
    ops.extend([Op::Finish(0); 6]);
    ops.extend([Op::Pass(14048), Op::Publish(Model::GoodB, false)]);
    ops.extend([Op::Finish(0); 3]);
    ops.extend([Op::Room(1), Op::Replace(true), Op::Pass(44733), Op::Finish(0)]);
    ops.extend([Op::Pass(26876), Op::Finish(0), Op::Unheard(5), Op::Finish(0), Op::Pass(0)]);
    ops.extend([Op::Finish(0); 3]);
    ops.extend([Op::Cut, Op::Publish(Model::GoodA, false), Op::Publish(Model::GoodA, false)]);
    let (world, outcome) =
        run(4821625908214854775, &ops).unwrap_or_else(|problem| panic!("{problem}"));
    assert_eq!(outcome, Some(Outcome::Confirmed));
    assert!(world.durable().given_up.is_none());
}

#[test]
fn boots_and_serves_without_a_hub() {
    let (mut world, _) = verdict_on(Model::GoodB);
    world.network = false;
    world.cut_power();
    for _ in 0..20 {
        world.apply(Op::Finish(0));
    }
    let live = world.live.map(|live| behaviour(world.workers[&live].package.manifest));
    assert_eq!(live, Some(Model::GoodB));
    let status = world.core.status();
    assert_eq!(status.snapshot.unwrap().phase, Phase::Confirmed);
    assert_eq!(status.hub_answers, Some(false));
}

impl World {
    /// Lets everything happen in order until this kind of effect is asked for.
    fn until(&mut self, wanted: fn(&Effect) -> bool) {
        for _ in 0..100 {
            if self.pending.iter().any(wanted) {
                return;
            }
            self.apply(Op::Finish(0));
            self.apply(Op::Pass(100));
        }
        panic!("never asked for: {:?}", self.pending);
    }

    /// The hub answers before anything else happens.
    fn poll(&mut self) {
        let asked = |effect: &Effect| matches!(effect, Effect::Poll { .. });
        for _ in 0..100 {
            if let Some(poll) = self.pending.iter().position(asked) {
                let effect = self.pending.remove(poll);
                let event = self.happen(effect).expect("a poll has an answer");
                return self.hear(event);
            }
            self.pass(500);
        }
        panic!("never asks");
    }

    fn phase(&self) -> Phase {
        self.core.status().snapshot.expect("it has loaded what serves").phase
    }

    fn serves(&self) -> Option<Model> {
        self.live.map(|live| behaviour(self.workers[&live].package.manifest))
    }
}

#[test]
fn what_is_held_is_kept_as_far_as_it_came_over_restarts_and_without_the_hub() {
    let held = (WaitCause::Held, None);
    let fetching: fn(&Effect) -> bool = |effect| matches!(effect, Effect::Download { .. });
    let trying: fn(&Effect) -> bool = |effect| matches!(effect, Effect::Stage { .. });
    let probed: fn(&Effect) -> bool = |effect| matches!(effect, Effect::Activate { .. });
    for (at, has_it) in [(fetching, false), (trying, true), (probed, true)] {
        let (mut world, _) = verdict_on(Model::GoodA);
        world.apply(Op::Publish(Model::GoodB, false));
        world.until(at);
        if world.pending.iter().any(probed) {
            // It is being switched to: that is finished, and what is held is what comes then.
            world.heal();
            assert_eq!(world.serves(), Some(Model::GoodB));
            continue;
        }
        world.apply(Op::Hold(true));
        world.poll();
        world.heal();
        let phase = match has_it {
            false => Phase::Waiting { cause: held.0, until: held.1 },
            true => Phase::Prestaged { cause: held.0, until: held.1 },
        };
        assert_eq!((world.phase(), world.serves()), (phase.clone(), Some(Model::GoodA)));
        world.network = false;
        world.cut_power();
        for _ in 0..50 {
            world.apply(Op::Finish(0));
            world.apply(Op::Pass(1_000));
        }
        assert_eq!((world.phase(), world.serves()), (phase, Some(Model::GoodA)));
        assert_eq!(world.intact(&package(&desired_model(Model::GoodB))), has_it);
        world.apply(Op::Hold(false));
        world.heal();
        assert_eq!(world.converged().unwrap(), Some(Outcome::Confirmed));
        assert_eq!(world.serves(), Some(Model::GoodB));
        assert_eq!(world.problems, Vec::<String>::new());
    }
}

impl World {
    /// What the shell finds around the device.
    fn around(&mut self, time: Option<&str>, metered: bool) {
        let time = time.map(|time| time.parse().unwrap());
        let time_zone = Some("Europe/Berlin".to_owned());
        self.hear(Event::Around(Around { time, time_zone, metered }));
    }

    /// Everything that is asked for happens, for a while.
    fn work(&mut self) {
        for _ in 0..60 {
            self.apply(Op::Finish(0));
            self.apply(Op::Pass(1_000));
        }
    }

    /// A device that serves A and is told B under these rules.
    fn told(rules: &str, time: Option<&str>, metered: bool) -> Self {
        let (mut world, _) = verdict_on(Model::GoodA);
        world.around(time, metered);
        world.rules = serde_json::from_str(rules).unwrap();
        world.apply(Op::Publish(Model::GoodB, false));
        world.work();
        assert_eq!(world.problems, Vec::<String>::new());
        world
    }
}

fn at(text: &str) -> Option<jiff::Timestamp> {
    Some(text.parse().unwrap())
}

#[test]
fn what_was_fetched_before_is_switched_to_in_time_though_the_hub_is_gone() {
    let rules = r#"{"activate_at": "2026-02-07T02:00:00Z"}"#;
    let mut world = World::told(rules, Some("2026-02-02T20:00:00Z"), false);
    let waits = |cause| Phase::Prestaged { cause, until: at("2026-02-07T02:00:00Z") };
    assert_eq!((world.phase(), world.serves()), (waits(WaitCause::NotBefore), Some(Model::GoodA)));
    world.network = false;
    world.cut_power();
    world.work();
    // Booted without a clock: it may be earlier than it seems.
    assert_eq!((world.phase(), world.serves()), (waits(WaitCause::Clock), Some(Model::GoodA)));
    world.around(Some("2026-02-07T01:59:00Z"), false);
    assert_eq!((world.phase(), world.serves()), (waits(WaitCause::NotBefore), Some(Model::GoodA)));
    // It wakes up for it by itself.
    let due = world.core.deadline().unwrap();
    assert!(due <= world.now + 60_000, "{due:?}");
    world.pass(59_999);
    world.work();
    assert_eq!((world.phase(), world.serves()), (Phase::Confirmed, Some(Model::GoodB)));
    assert_eq!(world.core.status().hub_answers, Some(false));
}

#[test]
fn a_download_stops_when_its_hours_end_and_goes_on_in_the_next() {
    // 2026-02-02 is a Monday. Berlin is an hour ahead of UTC.
    let rules = r#"{"download_in": [{"windows": "02:00-04:00"}]}"#;
    let (mut world, _) = verdict_on(Model::GoodA);
    world.around(Some("2026-02-02T02:59:00Z"), false);
    world.rules = serde_json::from_str(rules).unwrap();
    world.apply(Op::Publish(Model::GoodB, false));
    let fetching: fn(&Effect) -> bool = |effect| matches!(effect, Effect::Download { .. });
    world.until(fetching);
    world.pass(60_000);
    assert!(!world.pending.iter().any(fetching), "it goes on after its hours");
    let until = at("2026-02-03T01:00:00Z");
    assert_eq!(world.phase(), Phase::Waiting { cause: WaitCause::Hours, until });
    world.around(Some("2026-02-03T00:59:59Z"), false);
    world.pass(1_000);
    world.until(fetching);
    world.work();
    assert_eq!((world.phase(), world.serves()), (Phase::Confirmed, Some(Model::GoodB)));
}

#[test]
fn hours_to_switch_in_end_while_the_model_is_tried() {
    let rules = r#"{"activate_in": [{"windows": "sat 02:00-05:00", "time_zone": "UTC"}]}"#;
    let mut world = World::told(rules, None, false);
    assert_eq!(world.phase(), Phase::Prestaged { cause: WaitCause::Clock, until: None });
    world.around(Some("2026-02-07T04:59:58Z"), false);
    let probing: fn(&Effect) -> bool = |effect| matches!(effect, Effect::Probe { .. });
    world.until(probing);
    world.pass(2_000);
    world.work();
    let until = at("2026-02-14T02:00:00Z");
    let waits = Phase::Prestaged { cause: WaitCause::Hours, until };
    assert_eq!((world.phase(), world.serves()), (waits, Some(Model::GoodA)));
    assert!(world.workers.len() == 1, "what was tried holds no memory meanwhile");
    world.around(Some("2026-02-14T02:00:00Z"), false);
    world.work();
    assert_eq!(world.serves(), Some(Model::GoodB));
}

#[test]
fn a_metered_link_carries_an_adapter_of_weights_that_are_here() {
    // 10 bytes of probes and 10 of the adapter; the weights are 100 more.
    for (rules, lost, waiting) in [
        (r#"{"metered": "small-only 20"}"#, false, false),
        (r#"{"metered": "small-only 19"}"#, false, true),
        (r#"{"metered": "small-only 20"}"#, true, true),
    ] {
        let (mut world, _) = verdict_on(Model::GoodA);
        world.around(None, true);
        world.rules = serde_json::from_str(rules).unwrap();
        if lost {
            world.files.remove(&desired_model(Model::GoodA).weights);
        }
        world.apply(Op::Publish(Model::AdaptedA, false));
        world.work();
        let waits = Phase::Waiting { cause: WaitCause::Metered, until: None };
        let phase = if waiting { waits } else { Phase::Confirmed };
        assert_eq!(world.phase(), phase, "{rules} {lost}");
        world.around(None, false);
        world.work();
        assert_eq!((world.phase(), world.serves()), (Phase::Confirmed, Some(Model::AdaptedA)));
    }
}

#[test]
fn a_metered_link_carries_what_it_may() {
    let waits = Phase::Waiting { cause: WaitCause::Metered, until: None };
    for (rules, metered, waiting) in [
        (r#"{"metered": "defer"}"#, true, true),
        (r#"{"metered": "defer"}"#, false, false),
        (r#"{"metered": "small-only 99"}"#, true, true),
        (r#"{"metered": "small-only 110"}"#, true, false),
    ] {
        let mut world = World::told(rules, None, metered);
        let phase = if waiting { waits.clone() } else { Phase::Confirmed };
        assert_eq!(world.phase(), phase, "{rules}");
        world.around(None, false);
        world.work();
        assert_eq!((world.phase(), world.serves()), (Phase::Confirmed, Some(Model::GoodB)));
    }
}

#[test]
fn going_back_waits_for_nothing() {
    // The hub gives no rules with it; and what failed live is taken back whatever the rules say.
    let rules = r#"{"activate_in": [{"windows": "sat 02:00-05:00", "time_zone": "UTC"}]}"#;
    let (mut world, _) = verdict_on(Model::GoodA);
    world.around(Some("2026-02-07T04:59:40Z"), false);
    world.rules = serde_json::from_str(rules).unwrap();
    world.apply(Op::Publish(Model::FailsLiveProbes, false));
    world.until(|effect| matches!(effect, Effect::Probe { live: true, .. }));
    world.pass(20_000);
    world.work();
    assert!(matches!(world.phase(), Phase::RolledBack { .. }), "{:?}", world.phase());
    assert_eq!(world.serves(), Some(Model::GoodA));
}

#[test]
fn a_ledger_without_the_hubs_words_is_read() {
    let (world, _) = verdict_on(Model::GoodA);
    let mut ledger: serde_json::Value = serde_json::from_slice(&world.ledger).unwrap();
    ledger.as_object_mut().unwrap().remove("desired");
    let old = Ledger::parse(ledger.to_string().as_bytes()).unwrap();
    assert_eq!((old.desired, old.generation), (None, 1));
}

#[test]
fn a_runtime_that_fails_does_not_condemn_the_model() {
    let (mut world, _) = verdict_on(Model::Picky);
    world.apply(Op::Publish(Model::Picky, true));
    world.heal();
    assert!(matches!(world.converged().unwrap(), Some(Outcome::RolledBack { .. })));
    assert!(world.live.is_some());
    world.apply(Op::Publish(Model::Picky, false));
    world.heal();
    assert_eq!(world.converged().unwrap(), Some(Outcome::Confirmed));
}

#[test]
fn a_full_disk_keeps_the_old_model_and_says_so() {
    let (mut world, _) = verdict_on(Model::GoodA);
    world.disk = false;
    world.apply(Op::Publish(Model::GoodB, false));
    for _ in 0..40 {
        world.apply(Op::Finish(0));
        world.apply(Op::Pass(500));
    }
    let snapshot = world.core.status().snapshot.unwrap();
    assert_eq!(snapshot.phase, Phase::Waiting { cause: WaitCause::DiskFull, until: None });
    assert_eq!(behaviour(snapshot.running.unwrap().manifest), Model::GoodA);
    assert!(world.durable().rejected.is_empty());
    world.heal();
    assert_eq!(world.converged().unwrap(), Some(Outcome::Confirmed));
}

#[test]
fn damaged_ledgers_are_errors_and_never_panics() {
    let (world, _) = verdict_on(Model::FailsProbes);
    let whole = world.ledger;
    assert!(Ledger::parse(&whole).is_ok());
    for cut in 0..whole.len() - 2 {
        assert!(Ledger::parse(&whole[..cut]).is_err(), "cut at {cut}");
    }
    let newer = String::from_utf8(whole).unwrap().replace("\"version\": 1", "\"version\": 9");
    assert!(Ledger::parse(newer.as_bytes()).unwrap_err().to_string().contains("hint:"));
    assert!(Ledger::parse(&vec![b' '; slmops_agent_core::MAX_LEDGER_BYTES + 1]).is_err());
}
