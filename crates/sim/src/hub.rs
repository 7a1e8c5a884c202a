//! The hub: the shipping planner over a store of transactions, and what it forgets when it crashes.

use std::collections::BTreeSet;
use std::sync::Arc;

use slmops_agent_core::Snapshot;
use slmops_api::device::{DesiredState, DeviceFacts, DeviceReport, Phase, Telemetry};
use slmops_api::evidence::Evidence;
use slmops_api::model::ADAPTERS;
use slmops_api::rollout::{NewRollout, Outcome, Rollout, RolloutDevice, RolloutState};
use slmops_api::rules::DeviceRules;
use slmops_api::runtime::RuntimeConfig;
use slmops_api::selector::Selector;
use slmops_api::{ClassName, DeviceId, RolloutId};
use slmops_artifact::Digest;
use slmops_fleet_core::blueprint::{Resolved, resolve};
use slmops_fleet_core::labels::Labels;
use slmops_fleet_core::rollout::{self, Command, Moved, RolloutRecord, Targets};
use slmops_fleet_core::world::{CompletedRollout, FleetDevice, World};

use crate::catalog::Catalog;
use crate::operation::{HubWork, Moment};
use crate::run::Sabotage;
use crate::spec::{BEFORE, FleetSpec, GroupSpec, SpecError};
use crate::time::{SECOND, Time};
use crate::watch::Watch;

/// The hub decides this long after it heard news, so that much news is one decision.
const DECIDE_AFTER_MS: u64 = SECOND;
/// Decisions in a row; more would mean that they do not settle.
const MAX_ROUNDS: u32 = 16;
/// How often it looks although it heard nothing, where it waits for devices that are away.
const HEARTBEAT_MS: u64 = 30 * SECOND;
/// Who asks for rollouts.
const OPERATOR: &str = "operator";
/// Who approves what anybody else may.
const APPROVER: &str = "approver";

/// The hub.
pub(crate) struct Hub {
    // --- what is stored
    /// In the order of their ids, which is that of their numbers.
    pub devices: Vec<FleetDevice>,
    pub heard: Vec<Heard>,
    pub active: Vec<RolloutRecord>,
    pub ended: Vec<RolloutRecord>,
    quarantine: BTreeSet<(Digest, ClassName)>,
    completed: Vec<CompletedRollout>,
    // --- what a crash takes
    changed: BTreeSet<DeviceId>,
    everything: bool,
    decide_at: Option<Time>,
    deadline: Option<Time>,
    unstored: Vec<(usize, Arc<Snapshot>, Option<Evidence>, u64)>,
    // --- what is wrong with it
    pub is_up: bool,
    pub up_at: Time,
    /// Counts its lives.
    pub epoch: u64,
    pub armed: Vec<(Moment, HubWork, Time)>,
    pub decisions: u64,
    compare_plans: bool,
    /// Whether somebody wants to know what devices count.
    weighs_evidence: bool,
    sabotage: Option<Sabotage>,
}

/// What every poll and every report asks about a device, side by side: a large fleet is in no cache, and
/// each other place costs as much as all that is done with it.
#[derive(Clone, Default)]
pub(crate) struct Heard {
    /// The newest report's number.
    pub sequence: u64,
    /// The generation that it is told.
    pub generation: u64,
    last_seen: Time,
    /// What it said last; a crash takes this.
    snapshot: Option<Arc<Snapshot>>,
}

/// What became of something that the hub did.
pub(crate) enum Done {
    /// These devices are told something new.
    Told(Vec<usize>),
    /// It crashed for this long.
    Crashed(Time),
}

/// The number of a device with this id.
pub(crate) fn number_of(id: &DeviceId) -> usize {
    id.as_str()[1..].parse().expect("the simulation gives every id")
}

pub(crate) fn rollout_id(rollout: usize) -> RolloutId {
    format!("r{rollout}").parse().expect("a letter and a number are an id")
}

fn number_of_rollout(id: &RolloutId) -> usize {
    id.as_str()[1..].parse().expect("the simulation gives every id")
}

impl Hub {
    pub(crate) fn new(
        spec: &FleetSpec,
        compare_plans: bool,
        sabotage: Option<Sabotage>,
    ) -> Result<Self, SpecError> {
        let config = Arc::new(resolve(&[]).map_err(|error| SpecError(error.to_string()))?);
        let mut devices = Vec::new();
        for group in &spec.groups {
            let config = Arc::new(config_of(group, &config));
            let facts_of_group = Arc::new(facts(group.memory_budget_bytes));
            for _ in 0..group.devices {
                let number = devices.len();
                let id: DeviceId =
                    format!("d{number:07}").parse().expect("a letter and a number are an id");
                let name = format!("device-{number}");
                let own = [("id", id.as_str()), ("name", &name), ("class", group.class.as_str())];
                let mut labels: Labels = own.into_iter().collect();
                if let Some(site) = &group.site {
                    labels.insert("site", site.as_str());
                }
                devices.push(FleetDevice {
                    id,
                    name,
                    class: group.class.clone(),
                    labels,
                    facts: Arc::clone(&facts_of_group),
                    budget_bytes: group.memory_budget_bytes,
                    config: Arc::clone(&config),
                    last_seen: Time(0).timestamp(),
                    desired: Arc::new(DesiredState {
                        generation: 0,
                        model: None,
                        runtime: RuntimeConfig::default(),
                        confirm_timeout_s: config.confirm_timeout_s,
                        reason: String::new(),
                        rules: DeviceRules::default(),
                    }),
                    report: None,
                    revoked: false,
                    orders: None,
                });
            }
        }
        let count = devices.len();
        let before = CompletedRollout {
            channel: None,
            id: "before".parse().expect("a constant id is an id"),
            model: spec.model.clone(),
            version: BEFORE,
            selector: Selector::all(),
        };
        Ok(Self {
            devices,
            heard: vec![Heard::default(); count],
            active: Vec::new(),
            ended: Vec::new(),
            quarantine: BTreeSet::new(),
            completed: vec![before],
            changed: BTreeSet::new(),
            everything: true,
            decide_at: None,
            deadline: None,
            unstored: Vec::new(),
            is_up: true,
            up_at: Time(0),
            epoch: 0,
            armed: Vec::new(),
            decisions: 0,
            compare_plans,
            weighs_evidence: spec.rollouts.iter().any(|rollout| rollout.policy.gate.is_some()),
            sabotage,
        })
    }

    fn world<'a>(&'a self, now: Time, catalog: &'a Catalog) -> World<'a> {
        World {
            now: now.timestamp(),
            listening_since: self.up_at.timestamp(),
            devices: &self.devices,
            releases: &catalog.releases,
            quarantine: &self.quarantine,
            completed: &self.completed,
        }
    }

    /// When it must next be looked at.
    pub(crate) fn next(&self) -> Time {
        let due = [self.decide_at, self.deadline].into_iter().flatten().min();
        match self.is_up {
            true => due.unwrap_or(Time(u64::MAX)),
            false => self.up_at,
        }
    }

    fn wake(&mut self, now: Time) {
        self.decide_at.get_or_insert(Time((now.0 / DECIDE_AFTER_MS + 1) * DECIDE_AFTER_MS));
    }

    fn take_armed(&mut self, moment: Moment, work: HubWork) -> Option<Time> {
        let found = self.armed.iter().position(|armed| (armed.0, armed.1) == (moment, work))?;
        Some(self.armed.remove(found).2)
    }

    // --- crashing

    pub(crate) fn crash(&mut self, until: Time) {
        self.is_up = false;
        self.up_at = until.max(self.up_at);
        self.epoch += 1;
        self.heard.iter_mut().for_each(|heard| heard.snapshot = None);
        self.changed.clear();
        self.unstored.clear();
        (self.decide_at, self.deadline) = (None, None);
    }

    pub(crate) fn start(&mut self, now: Time) {
        self.is_up = true;
        self.everything = true;
        self.wake(now);
    }

    // --- reports

    /// Whether a report says what is known, so that storing it is of no interest to anyone.
    pub(crate) fn knows(&self, device: usize, snapshot: &Arc<Snapshot>) -> bool {
        let known = self.heard[device].snapshot.as_ref();
        self.armed.is_empty()
            && self.sabotage.is_none()
            && known.is_some_and(|known| Arc::ptr_eq(known, snapshot) || known == snapshot)
    }

    /// A report that says what is known: its number and its time are noted.
    pub(crate) fn touch(
        &mut self,
        now: Time,
        device: usize,
        sequence: u64,
        evidence: Option<Evidence>,
    ) {
        let heard = &mut self.heard[device];
        heard.sequence = heard.sequence.max(sequence);
        heard.last_seen = now;
        if self.weighs_evidence
            && let Some(report) = &mut self.devices[device].report
        {
            report.evidence = evidence;
        }
    }

    /// Whether it has thanked for reports that it has yet to store, as it never should.
    pub(crate) fn is_waiting_to_store(&self) -> bool {
        !self.unstored.is_empty()
    }

    pub(crate) fn seen(&mut self, now: Time, device: usize) {
        self.heard[device].last_seen = now;
    }

    /// Takes in a report. True: it is stored, or was before. Otherwise the hub crashed for so long,
    /// having stored it or not.
    pub(crate) fn record(
        &mut self,
        now: Time,
        device: usize,
        snapshot: Arc<Snapshot>,
        evidence: Option<Evidence>,
        sequence: u64,
    ) -> Result<(), Time> {
        if let Some(lasts) = self.take_armed(Moment::Before, HubWork::Report) {
            return Err(lasts);
        }
        if self.sabotage == Some(Sabotage::ThanksBeforeStoring) {
            self.unstored.push((device, snapshot, evidence, sequence));
            self.wake(now);
            return Ok(());
        }
        self.store(now, device, snapshot, evidence, sequence);
        match self.take_armed(Moment::After, HubWork::Report) {
            Some(lasts) => Err(lasts),
            None => Ok(()),
        }
    }

    fn store(
        &mut self,
        now: Time,
        device: usize,
        snapshot: Arc<Snapshot>,
        evidence: Option<Evidence>,
        sequence: u64,
    ) {
        let (place, heard) = (&mut self.devices[device], &mut self.heard[device]);
        heard.last_seen = now;
        if sequence <= heard.sequence {
            return;
        }
        heard.sequence = sequence;
        let downloading = |phase: &Phase| matches!(phase, Phase::Downloading { .. });
        let news = place.report.as_ref().is_none_or(|before| {
            before.generation != snapshot.generation
                || (before.phase != snapshot.phase
                    && !(downloading(&before.phase) && downloading(&snapshot.phase)))
                || before.running != snapshot.running
                || before.previous != snapshot.previous
                || before.rejected != snapshot.rejected
                || before.effective != snapshot.effective
        });
        let report = place.report.get_or_insert_with(|| DeviceReport {
            sequence: 0,
            generation: 0,
            phase: Phase::Idle,
            running: None,
            previous: None,
            rejected: vec![],
            probes: vec![],
            effective: None,
            telemetry: Telemetry::default(),
            evidence: None,
            facts: facts(place.budget_bytes),
        });
        report.sequence = sequence;
        report.evidence = evidence;
        report.phase.clone_from(&snapshot.phase);
        if news {
            report.generation = snapshot.generation;
            report.running.clone_from(&snapshot.running);
            report.previous.clone_from(&snapshot.previous);
            report.rejected.clone_from(&snapshot.rejected);
            report.probes.clone_from(&snapshot.probes);
            report.effective.clone_from(&snapshot.effective);
            self.changed.insert(place.id.clone());
            self.wake(now);
        }
        self.heard[device].snapshot = Some(snapshot);
    }

    // --- deciding

    /// Tells decisions when devices were last heard of.
    fn catch_up(&mut self) {
        for (device, heard) in self.devices.iter_mut().zip(&self.heard) {
            device.last_seen = heard.last_seen.timestamp();
        }
    }

    /// Decides until nothing changes any more, each time in one transaction.
    pub(crate) fn decide(&mut self, now: Time, catalog: &Catalog, watch: &mut Watch) -> Done {
        self.decide_at = None;
        for (device, snapshot, evidence, sequence) in std::mem::take(&mut self.unstored) {
            self.store(now, device, snapshot, evidence, sequence);
        }
        self.catch_up();
        let mut told = Vec::new();
        for _ in 0..MAX_ROUNDS {
            self.decisions += 1;
            let guarded = self
                .armed
                .iter()
                .any(|armed| (armed.0, armed.1) == (Moment::Before, HubWork::Decision));
            let before = guarded.then(|| self.active.clone());
            let changed = std::mem::take(&mut self.changed);
            let moved = self.plan(now, catalog, &changed, watch);
            let quiet = moved.changed.is_empty()
                && moved.assignments.is_empty()
                && moved.quarantined.is_empty();
            self.deadline = moved.deadline.map(Time::at);
            if quiet {
                self.listen_for_the_away(now);
                return Done::Told(told);
            }
            if let Some(before) = before {
                self.active = before;
                let lasts = self.take_armed(Moment::Before, HubWork::Decision);
                return Done::Crashed(lasts.unwrap_or_default());
            }
            self.commit(now, moved, catalog, watch, &mut told);
            if let Some(lasts) = self.take_armed(Moment::After, HubWork::Decision) {
                return Done::Crashed(lasts);
            }
        }
        watch.violation(now, "the hub's decisions do not settle".to_owned());
        Done::Told(told)
    }

    /// That a device is back is no news, so that the hub looks for it now and then.
    fn listen_for_the_away(&mut self, now: Time) {
        let away = |part: &RolloutDevice| part.outcome == Outcome::Away;
        let waits = |record: &RolloutRecord| {
            record.rollout.state == RolloutState::Running && record.rollout.devices.iter().any(away)
        };
        if self.active.iter().any(waits) {
            let next = Time(now.0 + HEARTBEAT_MS);
            self.deadline = Some(self.deadline.map_or(next, |deadline| deadline.min(next)));
        }
    }

    fn plan(
        &mut self,
        now: Time,
        catalog: &Catalog,
        changed: &BTreeSet<DeviceId>,
        watch: &mut Watch,
    ) -> Moved {
        let mut active = std::mem::take(&mut self.active);
        let world = self.world(now, catalog);
        let full = (self.everything || self.compare_plans)
            .then(|| rollout::plan(&world, &active, Targets::new()));
        let moved = if let (Some(full), true) = (&full, self.everything) {
            let mut indexes = Vec::new();
            for record in &full.rollouts {
                let index = active.iter().position(|known| known.rollout.id == record.rollout.id);
                let index = index.expect("a plan is about the rollouts it was given");
                active[index] = record.clone();
                indexes.push(index);
            }
            Moved {
                changed: indexes,
                assignments: full.assignments.clone(),
                quarantined: full.quarantined.clone(),
                deadline: full.deadline,
            }
        } else {
            let moved = rollout::replan(&world, &mut active, changed);
            if let Some(full) = full {
                let same = moved.assignments == full.assignments
                    && moved.quarantined == full.quarantined
                    && moved.deadline == full.deadline
                    && moved.changed.iter().map(|index| &active[*index]).eq(&full.rollouts);
                if !same {
                    let what = "a plan of what has changed differs from a plan of everything";
                    watch.violation(now, what.to_owned());
                }
            }
            moved
        };
        self.everything = false;
        self.active = active;
        moved
    }

    fn commit(
        &mut self,
        now: Time,
        moved: Moved,
        catalog: &Catalog,
        watch: &mut Watch,
        told: &mut Vec<usize>,
    ) {
        for index in moved.changed {
            let record = &self.active[index];
            watch.rollout(now, &record.rollout, &self.devices);
            if record.rollout.state != RolloutState::Running {
                // It may be where newcomers find their model from now on, or no longer hold others.
                self.everything = true;
            }
        }
        for pair in moved.quarantined {
            self.everything |= self.quarantine.insert(pair);
        }
        let (ended, active) = std::mem::take(&mut self.active)
            .into_iter()
            .partition(|record| record.rollout.state.is_final());
        self.active = active;
        for record in ended {
            self.end(record);
        }
        let mut assignments = moved.assignments;
        if self.sabotage == Some(Sabotage::TellsEveryone)
            && let Some(first) = assignments.first().cloned()
            && let Some(other) = self.devices.last()
        {
            let generation = other.next_generation();
            let desired = DesiredState { generation, ..DesiredState::clone(&first.desired) };
            let desired = Arc::new(desired);
            assignments.push(rollout::Assignment { device: other.id.clone(), desired });
        }
        for mut assignment in assignments {
            if self.sabotage == Some(Sabotage::RepeatsGenerations) {
                Arc::make_mut(&mut assignment.desired).generation -= 1;
            }
            let number = number_of(&assignment.device);
            watch.assignment(now, number, &assignment, self, catalog);
            self.heard[number].generation = assignment.desired.generation;
            self.devices[number].desired = assignment.desired;
            self.changed.insert(assignment.device);
            told.push(number);
        }
    }

    fn end(&mut self, record: RolloutRecord) {
        let asked = &record.rollout.asked;
        let id = record.rollout.id.clone();
        self.completed.retain(|completed| completed.id != id);
        if record.rollout.state == RolloutState::Completed {
            self.completed.insert(
                0,
                CompletedRollout {
                    channel: None,
                    id,
                    model: asked.model.clone(),
                    version: asked.version.clone(),
                    selector: asked.policy.selector.clone(),
                },
            );
        }
        self.ended.retain(|known| known.rollout.id != record.rollout.id);
        self.ended.push(record);
    }

    pub(crate) fn is_quarantined(&self, device: usize, manifest: &Digest) -> bool {
        let device = &self.devices[device];
        device.rejected(manifest) || self.quarantine.contains(&(*manifest, device.class.clone()))
    }

    /// A rollout by its place in the specification, once it was created.
    pub(crate) fn rollout(&self, rollout: usize) -> Option<&Rollout> {
        let id = rollout_id(rollout);
        let mut all = self.active.iter().chain(&self.ended).map(|record| &record.rollout);
        all.find(|known| known.id == id)
    }

    // --- operators

    /// Makes a rollout, or says why not. Says which devices are told something new.
    pub(crate) fn create(
        &mut self,
        now: Time,
        rollout: usize,
        asked: NewRollout,
        catalog: &Catalog,
        watch: &mut Watch,
    ) -> Result<Vec<usize>, String> {
        self.catch_up();
        let world = self.world(now, catalog);
        let created = rollout::create(rollout_id(rollout), asked, OPERATOR, &world, &self.active)
            .map_err(|error| error.to_string())?;
        for record in created.superseded {
            self.active.retain(|known| known.rollout.id != record.rollout.id);
            self.end(record);
        }
        watch.created(rollout, &created.record.rollout, &self.devices);
        let mut records = self.active.clone();
        records.push(created.record);
        Ok(self.settle(now, records, created.targets, catalog, watch))
    }

    /// Waves, from 1, that wait for somebody's approval, by the rollout's place in the specification.
    pub(crate) fn unapproved(&self) -> Vec<(usize, u32)> {
        let waits = |record: &RolloutRecord| {
            let rollout = &record.rollout;
            let wave = rollout.current_wave + 1;
            let needed = rollout.asked.policy.approvals.iter().any(|step| step.wave == wave);
            let given = rollout.approvals.iter().any(|approval| approval.wave == wave);
            (needed && !given).then(|| (number_of_rollout(&rollout.id), wave))
        };
        self.active.iter().filter_map(waits).collect()
    }

    /// Somebody who may approves a wave. Says which devices are told something new.
    pub(crate) fn approve(
        &mut self,
        now: Time,
        rollout: usize,
        wave: u32,
        catalog: &Catalog,
        watch: &mut Watch,
    ) -> Vec<usize> {
        let id = rollout_id(rollout);
        let Some(record) = self.active.iter().find(|record| record.rollout.id == id).cloned()
        else {
            return Vec::new();
        };
        let mut steps = record.rollout.asked.policy.approvals.iter();
        let named = steps.find(|step| step.wave == wave).and_then(|step| step.by.first());
        let by = named.map_or_else(|| APPROVER.to_owned(), |name| format!("token {name}"));
        self.carry_out(now, &record, Command::Approve { wave }, &by, catalog, watch)
    }

    /// Carries out a command on the newest rollout. Says which devices are told something new.
    pub(crate) fn operate(
        &mut self,
        now: Time,
        command: Command,
        catalog: &Catalog,
        watch: &mut Watch,
    ) -> Vec<usize> {
        let newest = |record: &&RolloutRecord| record.rollout.created_at;
        let all = self.active.iter().chain(&self.ended);
        let Some(record) = all.max_by_key(newest).cloned() else { return Vec::new() };
        self.carry_out(now, &record, command, OPERATOR, catalog, watch)
    }

    fn carry_out(
        &mut self,
        now: Time,
        record: &RolloutRecord,
        command: Command,
        by: &str,
        catalog: &Catalog,
        watch: &mut Watch,
    ) -> Vec<usize> {
        self.catch_up();
        let world = self.world(now, catalog);
        let Ok((changed, targets)) = rollout::command(record, command, by, &world) else {
            return Vec::new();
        };
        if changed == *record {
            return Vec::new();
        }
        if command == Command::Resume {
            watch.resumed(&changed.rollout.id);
        }
        let id = changed.rollout.id.clone();
        let mut records = self.active.clone();
        records.retain(|known| known.rollout.id != id);
        records.push(changed);
        self.ended.retain(|known| known.rollout.id != id);
        self.settle(now, records, targets, catalog, watch)
    }

    /// Plans with what an operator changed, in the same transaction.
    fn settle(
        &mut self,
        now: Time,
        mut records: Vec<RolloutRecord>,
        targets: Targets,
        catalog: &Catalog,
        watch: &mut Watch,
    ) -> Vec<usize> {
        let plan = rollout::plan(&self.world(now, catalog), &records, targets);
        for record in plan.rollouts {
            let place = records.iter().position(|known| known.rollout.id == record.rollout.id);
            records[place.expect("a plan is about the rollouts it was given")] = record;
        }
        let changed = (0..records.len()).collect();
        self.active = records;
        let moved = Moved {
            changed,
            assignments: plan.assignments,
            quarantined: plan.quarantined,
            deadline: plan.deadline,
        };
        let mut told = Vec::new();
        self.commit(now, moved, catalog, watch, &mut told);
        self.everything = true;
        self.wake(now);
        told
    }
}

/// What a group's devices are told besides what a rollout asks.
fn config_of(group: &GroupSpec, config: &Resolved) -> Resolved {
    let rules = DeviceRules {
        share_bytes_per_s: group.link.lan_bits_per_s.map(|bits| bits / 8),
        replace: group.replace_in_place,
        ..config.rules.clone()
    };
    Resolved { rules, ..config.clone() }
}

fn facts(memory_budget_bytes: u64) -> DeviceFacts {
    DeviceFacts {
        hostname: String::new(),
        arch: String::new(),
        kernel: String::new(),
        cpu: String::new(),
        cpu_features: vec![],
        cores: 4,
        memory_bytes: memory_budget_bytes,
        memory_budget_bytes,
        disk_free_bytes: 0,
        agent_version: String::new(),
        engine: String::new(),
        endpoint: None,
        time_zone: None,
        metered: false,
        shares_at: None,
        obeys: DeviceRules::ALL.into_iter().chain([ADAPTERS]).map(str::to_owned).collect(),
    }
}
