//! The run: one queue of (time, sequence), devices and hub, until the hours are over.

use std::collections::{BTreeMap, BTreeSet};

use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use slmops_agent_core::{Around, Blob, Deployment, Effect, Event, Ledger, Outcome, Polled};
use slmops_api::device::{DesiredState, InstalledModel};
use slmops_api::rollout::{Limits, NewRollout, Rollout, RolloutState, Schedule};
use slmops_artifact::Digest;

use crate::catalog::{Catalog, mix};
use crate::device::{Device, Durable, Pending, Work};
use crate::hub::{Done, Hub};
use crate::link::{Link, Pipe};
use crate::operation::Operation;
use crate::queue::{EventQueue, Who};
use crate::report::{Collected, Report};
use crate::scenario::Scenario;
use crate::spec::{Ailment, SpecError};
use crate::time::{DAY, MINUTE, SECOND, Time};
use crate::traffic::Traffic;
use crate::watch::{Place, Watch, unsettled};

/// All devices start within this time.
const STARTS_WITHIN_MS: u64 = MINUTE;
/// A worker that crashes again and again does so this often.
const CRASH_LOOP_MS: u64 = 2 * MINUTE;
/// How often a healing fleet is looked at.
const LOOK_EVERY_MS: u64 = 10 * MINUTE;
/// How long a fleet may take to come to rest, beside what its rollouts may take.
const REST_WITHIN_MS: u64 = 2 * DAY;
/// An operator whose rollout was refused tries again after this time.
const ASK_AGAIN_MS: u64 = 10 * MINUTE;
/// The points of a report's series.
const SAMPLES: u64 = 96;

/// A shell that does on purpose what it must not, to see that the simulator notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(hidden)]
pub enum Sabotage {
    /// The device loads files without hashing them.
    NeverHashes,
    /// Each golden probe passes before the switch and after it.
    PassesEveryProbe,
    /// The hub thanks for a report and stores it later.
    ThanksBeforeStoring,
    /// The hub tells a device whose wave has not come.
    TellsEveryone,
    /// The hub gives a new desired state the old generation.
    RepeatsGenerations,
    /// The device believes that no link costs anything.
    CallsEveryLinkFree,
    /// The device believes that it is in UTC.
    ForgetsItsTimeZone,
}

/// How to run, beside what.
#[derive(Clone, Copy, Debug, Default)]
#[doc(hidden)]
pub struct Manner {
    /// Whether each plan of what has changed is compared with a plan of everything.
    pub compare_plans: bool,
    /// Whether the first violation ends the run.
    pub stop_at_violation: bool,
    /// What is broken on purpose.
    pub sabotage: Option<Sabotage>,
}

/// What comes at a given time by itself.
#[derive(Clone, Copy)]
enum Item {
    Sample,
    Create(usize),
    /// An operator agrees to a wave, from 1, of a rollout.
    Approve(usize, u32),
    /// Bytes over a group's link may cost no more.
    Unmeter(usize),
    Operation(Operation),
}

pub(crate) struct Simulation<'a> {
    pub scenario: &'a Scenario,
    pub manner: Manner,
    pub now: Time,
    pub catalog: Catalog,
    pub devices: Vec<Device>,
    pub links: Vec<Link>,
    pub group_cut_until: Vec<Time>,
    pub hub_pipe: Option<Pipe>,
    /// Where the devices of each group begin.
    pub group_starts: Vec<usize>,
    /// Which device of a group gets a manifest's files first.
    pub seeds: BTreeMap<(usize, Digest), usize>,
    pub hub: Hub,
    pub watch: Watch,
    pub collected: Collected,
    pub rng: ChaCha8Rng,
    queue: EventQueue,
    hub_entry: (Time, u64),
    agenda: Vec<(Time, Item)>,
    agenda_next: usize,
    asked_to_approve: BTreeSet<(usize, u32)>,
    effects: Vec<Effect>,
    events: u64,
}

/// Runs a scenario to its end.
pub(crate) fn run(scenario: &Scenario, manner: Manner) -> Result<Report, SpecError> {
    scenario.spec.check()?;
    let mut simulation = Simulation::new(scenario, manner)?;
    let end = scenario.spec.end();
    simulation.until(end);
    simulation.now = simulation.now.max(end);
    if scenario.spec.settle && !simulation.is_over() {
        simulation.settle();
    }
    Ok(simulation.report())
}

impl<'a> Simulation<'a> {
    fn new(scenario: &'a Scenario, manner: Manner) -> Result<Self, SpecError> {
        let spec = &scenario.spec;
        let catalog = Catalog::new(spec);
        let hub = Hub::new(spec, manner.compare_plans, manner.sabotage)?;
        let count = spec.devices() as usize;
        let mut devices = Vec::with_capacity(count);
        for (group, of) in spec.groups.iter().enumerate() {
            for _ in 0..of.devices {
                let number = devices.len() as u32;
                devices.push(Device::new(number, group, spec.seed, of));
            }
        }
        let mut group_starts = vec![0; spec.groups.len()];
        for device in devices.iter().rev() {
            group_starts[device.group] = device.number as usize;
        }
        let links = spec.groups.iter().map(|group| Link::new(&group.link)).collect();
        let mut simulation = Self {
            scenario,
            manner,
            now: Time(0),
            catalog,
            devices,
            links,
            group_cut_until: vec![Time(0); spec.groups.len()],
            hub_pipe: spec.hub_bits_per_s.map(Pipe::new),
            group_starts,
            seeds: BTreeMap::new(),
            hub,
            watch: Watch::new(count, spec.rollouts.len()),
            collected: Collected::new(spec.rollouts.len(), spec.groups.len()),
            rng: ChaCha8Rng::seed_from_u64(mix(spec.seed)),
            queue: EventQueue::new(),
            hub_entry: (Time(u64::MAX), 0),
            agenda: Vec::new(),
            agenda_next: 0,
            asked_to_approve: BTreeSet::new(),
            effects: Vec::new(),
            events: 0,
        };
        simulation.install();
        simulation.plan_ahead();
        Ok(simulation)
    }

    /// Gives each device the release that is there before, as if it had confirmed it.
    fn install(&mut self) {
        let rollouts = &self.scenario.spec.rollouts;
        let has_gate = rollouts.iter().any(|rollout| rollout.policy.gate.is_some());
        let Done::Told(_) = self.hub.decide(self.now, &self.catalog, &mut self.watch) else {
            unreachable!("nothing is armed yet")
        };
        for number in 0..self.devices.len() {
            let device = &mut self.devices[number];
            let desired = &self.hub.devices[number].desired;
            if let Some(model) = &desired.model {
                let package = self.catalog.known(&model.manifest).package;
                let deployment = Deployment {
                    model: InstalledModel {
                        model: model.model.clone(),
                        version: model.version.clone(),
                        variant: model.variant.clone(),
                        manifest: model.manifest,
                        weights: model.weights,
                    },
                    package,
                    runtime: desired.runtime.clone(),
                };
                let ledger = Ledger {
                    generation: desired.generation,
                    desired: Some(DesiredState::clone(desired)),
                    outcome: Some(Outcome::Confirmed),
                    current: Some(deployment),
                    ..Ledger::default()
                };
                device.ledger = ledger.to_bytes();
                device.durable = Durable::of(&ledger);
                device.first = Some(ledger);
                device.signed.push(model.manifest);
                for Blob { digest, size_bytes } in package.blobs() {
                    device.file(digest, size_bytes).have_bytes = size_bytes;
                }
            }
            if has_gate {
                let spec = &self.scenario.spec;
                let installed = desired.model.as_ref().map(|it| (it.manifest, it.size_bytes));
                let traffic = Traffic::new(&spec.traffic, spec.seed, number as u32, installed);
                device.traffic = Some(Box::new(traffic));
            }
            device.power_at = Time(self.rng.random_range(0..STARTS_WITHIN_MS));
            self.reschedule(number);
        }
    }

    fn plan_ahead(&mut self) {
        let spec = &self.scenario.spec;
        let end = spec.end();
        let mut agenda: Vec<(Time, Item)> =
            (0..=SAMPLES).map(|sample| (Time(end.0 * sample / SAMPLES), Item::Sample)).collect();
        agenda.extend(
            spec.rollouts.iter().enumerate().map(|(index, it)| (it.at, Item::Create(index))),
        );
        let operations = self.scenario.operations.iter();
        agenda.extend(operations.map(|operation| (operation.at, Item::Operation(*operation))));
        agenda.retain(|(at, _)| *at <= end);
        agenda.sort_by_key(|(at, _)| *at);
        self.agenda = agenda;
        self.schedule_agenda();
    }

    // --- the schedule

    fn push(&mut self, at: Time, who: Who) -> (Time, u64) {
        (at, self.queue.push(at, who))
    }

    fn schedule_agenda(&mut self) {
        if let Some((at, _)) = self.agenda.get(self.agenda_next) {
            let at = *at;
            self.push(at.max(self.now), Who::Agenda);
        }
    }

    /// Makes sure that a device is looked at when it must be. An entry that comes too early does
    /// no harm, and is left where it is.
    pub(crate) fn reschedule(&mut self, number: usize) {
        let next = self.devices[number].next().max(self.now);
        if next < self.devices[number].scheduled.0 {
            self.devices[number].scheduled = self.push(next, Who::Device(number as u32));
        }
    }

    pub(crate) fn reschedule_hub(&mut self) {
        let next = self.hub.next().max(self.now);
        if next < self.hub_entry.0 {
            self.hub_entry = self.push(next, Who::Hub);
        }
    }

    fn is_over(&self) -> bool {
        self.manner.stop_at_violation && !self.watch.violations.is_empty()
    }

    fn until(&mut self, end: Time) {
        while !self.is_over()
            && let Some((at, sequence, who)) = self.queue.pop(end)
        {
            self.now = at;
            match who {
                Who::Agenda => {
                    // Another entry may have been here before.
                    if let Some((due, item)) = self.agenda.get(self.agenda_next)
                        && *due <= at
                    {
                        let item = *item;
                        self.agenda_next += 1;
                        self.events += 1;
                        self.item(item);
                        self.schedule_agenda();
                    }
                }
                Who::Hub if self.hub_entry.1 == sequence => {
                    self.hub_entry = (Time(u64::MAX), 0);
                    self.look_at_hub();
                }
                Who::Device(number) if self.devices[number as usize].scheduled.1 == sequence => {
                    self.devices[number as usize].scheduled = (Time(u64::MAX), 0);
                    self.look_at_device(number as usize);
                }
                Who::Hub | Who::Device(_) => {}
            }
        }
    }

    fn item(&mut self, item: Item) {
        match item {
            Item::Sample => self.collected.sample(self.now),
            Item::Create(rollout) => self.create(rollout),
            Item::Approve(rollout, wave) => self.approve(rollout, wave),
            Item::Unmeter(group) => self.meter_changes(group),
            Item::Operation(operation) => self.apply(operation.action),
        }
    }

    fn create(&mut self, rollout: usize) {
        let again = match self.hub.is_up {
            false => Some("the hub is down".to_owned()),
            true => {
                let spec = &self.scenario.spec.rollouts[rollout];
                let asked = NewRollout {
                    promotion: None,
                    model: self.scenario.spec.model.clone(),
                    version: spec.version.clone(),
                    policy: spec.policy.clone(),
                };
                let (catalog, watch) = (&self.catalog, &mut self.watch);
                match self.hub.create(self.now, rollout, asked, catalog, watch) {
                    Ok(told) => {
                        self.tell(told);
                        None
                    }
                    Err(why) => Some(why),
                }
            }
        };
        self.collected.refused(rollout, again.clone());
        let at = Time(self.now.0 + ASK_AGAIN_MS);
        if again.is_some() && at <= self.scenario.spec.end() {
            self.add_to_agenda(at, Item::Create(rollout));
        }
        self.reschedule_hub();
    }

    fn add_to_agenda(&mut self, at: Time, item: Item) {
        let place = self.agenda.partition_point(|(other, _)| *other <= at);
        self.agenda.insert(place.max(self.agenda_next), (at, item));
        self.schedule_agenda();
    }

    /// Whoever must approve a wave hears of it when it waits for that, and takes a while.
    fn ask_for_approvals(&mut self) {
        for (rollout, wave) in self.hub.unapproved() {
            if self.asked_to_approve.insert((rollout, wave)) {
                let at = Time(self.now.0 + self.scenario.spec.approve_after.0);
                self.add_to_agenda(at, Item::Approve(rollout, wave));
            }
        }
    }

    fn approve(&mut self, rollout: usize, wave: u32) {
        match self.hub.is_up {
            true => {
                let (catalog, watch) = (&self.catalog, &mut self.watch);
                let told = self.hub.approve(self.now, rollout, wave, catalog, watch);
                self.tell(told);
                self.reschedule_hub();
            }
            false => {
                let at = Time(self.now.0 + ASK_AGAIN_MS);
                self.add_to_agenda(at, Item::Approve(rollout, wave));
            }
        }
    }

    fn look_at_hub(&mut self) {
        if self.hub.next() <= self.now {
            self.events += 1;
            if self.hub.is_up {
                match self.hub.decide(self.now, &self.catalog, &mut self.watch) {
                    Done::Told(devices) => {
                        self.tell(devices);
                        self.ask_for_approvals();
                    }
                    Done::Crashed(lasts) => self.crash_hub(lasts),
                }
            } else {
                self.hub.start(self.now);
                self.watch.recovered(self.now, &self.hub);
            }
        }
        self.reschedule_hub();
    }

    fn look_at_device(&mut self, number: usize) {
        let now = self.now;
        let device = &mut self.devices[number];
        if device.core.is_none() {
            if device.power_at <= now {
                device.boot(now);
                self.watch.booted(device);
                self.look_around(number, false);
                self.events += 1;
                self.hear(number, Event::Tick);
            }
        } else if let Some(pending) = device.take_due(now) {
            self.events += 1;
            self.due(number, pending);
        } else if device.next() <= now {
            self.events += 1;
            self.hear(number, Event::Tick);
        }
        self.reschedule(number);
    }

    /// A device's agent looks at what surrounds it, when it starts and when that changes.
    fn look_around(&mut self, number: usize, hub_spoke: bool) {
        let device = &mut self.devices[number];
        let time = device.time_of_day(self.now, hub_spoke);
        let sabotage = self.manner.sabotage;
        let time_zone = self.scenario.spec.groups[device.group].time_zone.clone();
        let time_zone = time_zone.filter(|_| sabotage != Some(Sabotage::ForgetsItsTimeZone));
        let metered = self.links[device.group].is_metered(self.now)
            && sabotage != Some(Sabotage::CallsEveryLinkFree);
        self.hear(number, Event::Around(Around { time, time_zone, metered }));
    }

    /// The bytes over a group's link cost now, or no more, which its devices notice.
    pub(crate) fn meter_changes(&mut self, group: usize) {
        for number in 0..self.devices.len() {
            if self.devices[number].group == group && self.devices[number].core.is_some() {
                self.look_around(number, false);
                self.reschedule(number);
            }
        }
    }

    pub(crate) fn unmeter_later(&mut self, group: usize, at: Time) {
        self.add_to_agenda(at, Item::Unmeter(group));
    }

    /// A device's core takes an event, and what it asks for is begun.
    pub(crate) fn hear(&mut self, number: usize, event: Event) {
        if let Event::Polled { result: Ok(polled), .. } = &event
            && self.devices[number].core.is_some()
        {
            if let Polled::Desired(desired) = polled {
                self.watch.told(number, desired);
            }
            // The hub's answers bring its time.
            if self.devices[number].needs_time() {
                self.look_around(number, true);
            }
        }
        let device = &mut self.devices[number];
        let now = device.now(self.now);
        let Some(core) = &mut device.core else { return };
        let mut effects = std::mem::take(&mut self.effects);
        core.handle(now, event, &mut effects);
        for effect in effects.drain(..) {
            if self.devices[number].core.is_none() {
                // The power went at the effect before.
                continue;
            }
            let device = &self.devices[number];
            let place = Place::of(device, self.scenario, &self.links);
            self.watch.effect(self.now, device, place, &effect);
            self.begin(number, effect);
        }
        self.effects = effects;
    }

    /// Something that was under way on a device is due.
    fn due(&mut self, number: usize, pending: Pending) {
        let Pending { id, work, .. } = pending;
        match work {
            Work::Hear(event) => self.hear(number, *event),
            Work::Local(effect) => self.perform(number, *effect),
            Work::Restart => self.restart_worker(number, id),
            Work::Fault => self.end_worker(number, slmops_agent_core::Death::Fault),
            Work::Held => {
                if self.is_connected(number) {
                    self.hub.seen(self.now, number);
                    self.hear(number, Event::Polled { id, result: Ok(Polled::NotModified) });
                }
            }
            Work::Arrives { snapshot, evidence, sequence, reply } => {
                let evidence = evidence.map(|evidence| *evidence);
                self.report_arrives(number, id, snapshot, evidence, sequence, reply);
            }
            Work::Thanks { sequence, epoch } => {
                if self.is_connected(number) && self.hub.epoch == epoch {
                    self.watch.thanked(self.now, number, sequence, &self.hub);
                    self.hear(number, Event::Reported { id, result: Ok(()) });
                }
            }
            Work::Piece(piece) => self.piece_arrives(number, id, *piece),
        }
    }

    /// A worker that crash-loops does it again in a while.
    pub(crate) fn plan_crash(&mut self, number: usize) {
        let device = &self.devices[number];
        let Some(live) = device.live_worker() else { return };
        let manifest = live.deployment.package.manifest;
        let id = live.id;
        if self.catalog.ailment(&manifest, device.number) == Some(Ailment::CrashLoops) {
            let at = Time(self.now.0 + CRASH_LOOP_MS);
            self.devices[number].pending.push(Pending { at, id, work: Work::Fault });
        }
    }

    // --- coming to rest

    /// Every fault ends; then the fleet must come to rest.
    fn settle(&mut self) {
        self.heal();
        let rollouts = self.scenario.spec.rollouts.iter();
        let longest: u64 = rollouts
            .clone()
            .map(|it| {
                let policy = &it.policy;
                let waves = policy.waves.len() as u64 + 1;
                // Limits make a wave take turns.
                let turns = match policy.limits == Limits::default() {
                    true => 1,
                    false => u64::from(self.scenario.spec.devices()),
                };
                let patience_s = policy.gate.as_ref().and_then(|gate| gate.patience_s).unwrap_or(0);
                let wave_s = turns * u64::from(policy.confirm_timeout_s)
                    + u64::from(policy.bake_s)
                    + u64::from(patience_s);
                let Schedule { activate_in, download_in, .. } = &policy.schedule;
                let days = [activate_in, download_in].map(|hours| u64::from(!hours.is_always()));
                // Hours come once a day: a turn may need one to fetch and one to switch.
                let days = turns * 2 * (days[0] + days[1]);
                waves * (wave_s * SECOND + days * DAY + self.scenario.spec.approve_after.0)
            })
            .sum();
        let freezes = rollouts.clone().flat_map(|it| &it.policy.schedule.freezes);
        let starts = rollouts.filter_map(|it| it.policy.schedule.start_at);
        let last = freezes.map(|freeze| freeze.until).chain(starts).map(Time::at).max();
        let end = Time(self.now.max(last.unwrap_or_default()).0 + REST_WITHIN_MS + longest);
        let problem = loop {
            let next = Time(self.now.0 + LOOK_EVERY_MS);
            self.until(next);
            self.now = self.now.max(next);
            if self.is_over() {
                return;
            }
            match self.restless() {
                None => return self.collected.settled(self.now),
                Some(problem) if self.now >= end => break problem,
                Some(_) => {}
            }
        };
        self.watch.violation(self.now, format!("does not come to rest: {problem}"));
    }

    fn restless(&self) -> Option<String> {
        if self.hub.next() < Time(self.now.0 + LOOK_EVERY_MS) {
            return Some("the hub has something to decide".to_owned());
        }
        let running = self.hub.active.iter().map(|record| &record.rollout);
        // A gate without patience may wait for ever, and says so.
        let waits_for_good = |rollout: &&Rollout| {
            let gate = rollout.asked.policy.gate.as_ref();
            rollout.gate.is_some() && gate.is_some_and(|gate| gate.patience_s.is_none())
        };
        let mut running =
            running.filter(|r| r.state == RolloutState::Running && !waits_for_good(r));
        if let Some(rollout) = running.next() {
            let waits = &rollout.waiting_for;
            return Some(format!("rollout {} waits for {waits}", rollout.id));
        }
        self.devices.iter().find_map(|device| unsettled(device, &self.hub))
    }

    fn report(self) -> Report {
        let Self { scenario, hub, watch, collected, events, catalog, .. } = self;
        let decisions = hub.decisions;
        collected.report(&scenario.spec, &catalog, &hub, watch.violations, events, decisions)
    }
}
