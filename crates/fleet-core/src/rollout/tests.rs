mod operators;

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::SignedDuration;
use proptest::prelude::*;
use slmops_api::blueprint::Layer;
use slmops_api::device::{
    DeviceFacts, DeviceReport, Failure, InstalledModel, Phase, Rejection, Telemetry, WaitCause,
};
use slmops_api::evidence::{Evidence, EvidenceCounts, Replay};
use slmops_api::gate::{GatePolicy, Metric};
use slmops_api::probe::ProbeResult;
use slmops_api::rollout::{
    ApprovalStep, Freeze, Limits, NewRollout, Outcome, RolloutDevice, RolloutPolicy, Schedule,
    Stragglers, Unheard, WavePer, WaveSize,
};
use slmops_api::rules::{DeviceRules, Metered};
use slmops_api::runtime::RuntimeConfig;

use super::*;
use crate::blueprint::resolve;
use crate::class::classify;
use crate::testing;
use crate::world::{CompletedRollout, FleetDevice, Releases};

const MODEL: &str = "m";
const START: &str = "2026-01-01T00:00:00Z";

/// A fleet in memory: what the hub's store and devices would do, step by step.
struct Fleet {
    now: Timestamp,
    listening_since: Timestamp,
    devices: Vec<FleetDevice>,
    releases: Releases,
    quarantine: BTreeSet<(Digest, ClassName)>,
    completed: Vec<CompletedRollout>,
    rollouts: Vec<RolloutRecord>,
    deadline: Option<Timestamp>,
}

impl Fleet {
    fn new(budgets_mib: &[u64]) -> Self {
        let mut fleet = Self {
            now: START.parse().unwrap(),
            listening_since: START.parse().unwrap(),
            devices: vec![],
            releases: Releases::new(),
            quarantine: BTreeSet::new(),
            completed: vec![],
            rollouts: vec![],
            deadline: None,
        };
        for version in ["1.0.0", "1.1.0", "1.2.0"] {
            let release = testing::release(MODEL, version);
            fleet
                .releases
                .insert((release.model.clone(), release.version.clone()), Arc::new(release));
        }
        for budget in budgets_mib {
            fleet.join(*budget);
        }
        fleet
    }

    fn join(&mut self, budget_mib: u64) {
        let classes = [
            testing::class("large", 500),
            testing::class("medium", 300),
            testing::class("small", 0),
        ];
        let number = self.devices.len();
        let class = classify(&testing::facts(budget_mib), &Default::default(), &classes).class;
        let id: DeviceId = format!("d{number}").parse().unwrap();
        let labels = [
            ("id", id.to_string()),
            ("name", format!("dev-{number}")),
            ("class", class.to_string()),
        ];
        self.devices.push(FleetDevice {
            id,
            name: format!("dev-{number}"),
            class,
            labels: labels.into_iter().collect(),
            facts: Arc::new(testing::facts(budget_mib)),
            budget_bytes: budget_mib << 20,
            config: Arc::new(resolve(&[]).unwrap()),
            last_seen: self.now,
            desired: Arc::new(DesiredState {
                generation: 1,
                model: None,
                runtime: RuntimeConfig::default(),
                confirm_timeout_s: 900,
                reason: String::new(),
                rules: DeviceRules::default(),
            }),
            report: None,
            revoked: false,
            orders: None,
        });
    }

    fn world(&self) -> World<'_> {
        World {
            now: self.now,
            listening_since: self.listening_since,
            devices: &self.devices,
            releases: &self.releases,
            quarantine: &self.quarantine,
            completed: &self.completed,
        }
    }

    fn apply(&mut self, plan: Plan) {
        for record in plan.rollouts {
            let known = self.rollouts.iter_mut().find(|r| r.rollout.id == record.rollout.id);
            if record.rollout.state == RolloutState::Completed {
                let asked = record.rollout.asked.clone();
                let completed = CompletedRollout {
                    id: record.rollout.id.clone(),
                    model: asked.model,
                    version: asked.version,
                    selector: asked.policy.selector,
                    channel: asked.promotion.map(|promotion| promotion.channel),
                };
                self.completed.insert(0, completed);
            }
            match known {
                Some(known) => *known = record,
                None => self.rollouts.push(record),
            }
        }
        for assignment in plan.assignments {
            let device = self.devices.iter_mut().find(|d| d.id == assignment.device).unwrap();
            assert!(
                assignment.desired.generation > device.desired.generation,
                "the generation of {} fell from {} to {}",
                device.name,
                device.desired.generation,
                assignment.desired.generation
            );
            device.desired = assignment.desired;
        }
        self.quarantine.extend(plan.quarantined);
        self.deadline = plan.deadline;
    }

    fn tick(&mut self) {
        for round in 0..10 {
            let active: Vec<RolloutRecord> = self.active();
            let plan = plan(&self.world(), &active, Targets::new());
            self.check_replan(&active, &plan);
            let quiet = plan.rollouts.is_empty() && plan.assignments.is_empty();
            self.apply(plan);
            if quiet {
                return;
            }
            assert!(round < 9, "decisions do not settle");
        }
    }

    /// Looking at every device by name is the same as looking at everything.
    fn check_replan(&self, active: &[RolloutRecord], plan: &Plan) {
        let all: BTreeSet<DeviceId> = self.devices.iter().map(|device| device.id.clone()).collect();
        let mut records = active.to_vec();
        let mut moved = replan(&self.world(), &mut records, &all);
        moved.assignments.sort_by(|a, b| a.device.cmp(&b.device));
        let mut assignments = plan.assignments.clone();
        assignments.sort_by(|a, b| a.device.cmp(&b.device));
        assert_eq!(moved.assignments, assignments);
        assert_eq!(moved.quarantined, plan.quarantined);
        assert_eq!(moved.deadline, plan.deadline);
        let changed: Vec<&RolloutRecord> = moved.changed.iter().map(|i| &records[*i]).collect();
        assert_eq!(changed, plan.rollouts.iter().collect::<Vec<_>>());
    }

    fn active(&self) -> Vec<RolloutRecord> {
        self.rollouts.iter().filter(|r| !r.rollout.state.is_final()).cloned().collect()
    }

    fn start(&mut self, version: &str, policy: RolloutPolicy) -> Result<RolloutId, RolloutError> {
        self.start_asked(asked(version, policy))
    }

    fn start_asked(&mut self, asked: NewRollout) -> Result<RolloutId, RolloutError> {
        let id: RolloutId = format!("r{}", self.rollouts.len()).parse().unwrap();
        let created = create(id.clone(), asked, "token test", &self.world(), &self.active())?;
        for record in created.superseded {
            let known = self.rollouts.iter_mut().find(|r| r.rollout.id == record.rollout.id);
            *known.unwrap() = record;
        }
        self.rollouts.push(created.record);
        let plan = plan(&self.world(), &self.active(), created.targets);
        self.apply(plan);
        self.tick();
        Ok(id)
    }

    fn operate(&mut self, id: &RolloutId, with: Command) -> Result<(), RolloutError> {
        self.operate_as(id, with, "token test")
    }

    fn operate_as(&mut self, id: &RolloutId, with: Command, by: &str) -> Result<(), RolloutError> {
        let record = self.record(id).clone();
        let (changed, targets) = command(&record, with, by, &self.world())?;
        let known = self.rollouts.iter_mut().find(|r| r.rollout.id == *id).unwrap();
        *known = changed.clone();
        let mut records = self.active();
        if changed.rollout.state.is_final() {
            records.push(changed);
            if with == Command::Rollback {
                self.completed.retain(|completed| completed.id != *id);
            }
        }
        let plan = plan(&self.world(), &records, targets);
        self.apply(plan);
        self.tick();
        Ok(())
    }

    fn record(&self, id: &RolloutId) -> &RolloutRecord {
        self.rollouts.iter().find(|r| r.rollout.id == *id).unwrap()
    }

    fn rollout(&self, id: &RolloutId) -> &Rollout {
        &self.record(id).rollout
    }

    fn report(&mut self, device: usize, phase: Phase) {
        let device = &mut self.devices[device];
        let told = device.desired.model.as_ref().map(|model| InstalledModel {
            model: model.model.clone(),
            version: model.version.clone(),
            variant: model.variant.clone(),
            manifest: model.manifest,
            weights: model.weights,
        });
        let mut report = device.report.take().unwrap_or_else(|| DeviceReport {
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
            facts: testing::facts(100),
        });
        report.sequence += 1;
        report.generation = device.desired.generation;
        match &phase {
            Phase::Confirmed => report.running = told,
            Phase::RolledBack { failure } => {
                if let Some(told) = told {
                    report.rejected.push(Rejection {
                        manifest: told.manifest,
                        generation: device.desired.generation,
                        failure: failure.clone(),
                    });
                }
            }
            _ => {}
        }
        report.phase = phase;
        device.report = Some(report);
        device.last_seen = self.now;
    }

    fn confirm(&mut self, device: usize) {
        self.report(device, Phase::Confirmed);
        self.tick();
    }

    fn fail(&mut self, device: usize) {
        let result = |name: &str, value: f64, passed| ProbeResult {
            name: name.to_owned(),
            passed,
            value: Some(value),
            floor: -2.0,
            duration_ms: 5,
        };
        let results = vec![result("golden-00", -1.0, true), result("golden-01", -9.25, false)];
        self.report(device, Phase::RolledBack { failure: Failure::Probes { results } });
        self.tick();
    }

    fn pass_s(&mut self, seconds: i64) {
        self.now = self.now.checked_add(SignedDuration::from_secs(seconds)).unwrap();
        self.tick();
    }

    fn told(&self, device: usize) -> String {
        match &self.devices[device].desired.model {
            Some(model) => format!("{} {}", model.version, model.variant),
            None => "nothing".to_owned(),
        }
    }

    /// Gives a device an agent that obeys these rules.
    fn obeys(&mut self, device: usize, rules: &[&str]) {
        let obeys = rules.iter().map(|rule| (*rule).to_owned()).collect();
        self.devices[device].facts = Arc::new(DeviceFacts { obeys, ..testing::facts(600) });
    }

    /// Puts a device into a site.
    fn site(&mut self, device: usize, site: &str) {
        self.devices[device].labels.insert("site", site);
    }

    /// Numbers of the devices that are told this version.
    fn on(&self, version: &str) -> Vec<usize> {
        (0..self.devices.len()).filter(|device| self.told(*device).starts_with(version)).collect()
    }

    /// Lets devices be heard of, without news.
    fn hear(&mut self, devices: &[usize]) {
        for device in devices {
            self.devices[*device].last_seen = self.now;
        }
        self.tick();
    }

    fn at(&self, seconds: i64) -> Timestamp {
        self.now.checked_add(SignedDuration::from_secs(seconds)).unwrap()
    }

    /// Brings every device to 1.0.0.
    fn settle_on_1_0_0(&mut self) -> RolloutId {
        let id = self.start("1.0.0", all_at_once()).unwrap();
        for device in 0..self.devices.len() {
            if self.devices[device].desired.model.is_some() {
                self.confirm(device);
            }
        }
        assert_eq!(self.rollout(&id).state, RolloutState::Completed, "{}", why(self.rollout(&id)));
        id
    }
}

fn asked(version: &str, policy: RolloutPolicy) -> NewRollout {
    NewRollout {
        model: MODEL.parse().unwrap(),
        version: version.parse().unwrap(),
        policy,
        promotion: None,
    }
}

fn all_at_once() -> RolloutPolicy {
    RolloutPolicy { waves: vec![WaveSize::Rest], ..RolloutPolicy::default() }
}

#[test]
fn canary_first_then_the_rest() {
    let mut fleet = Fleet::new(&[600, 360, 600]);
    fleet.report(1, Phase::Idle);
    let id = fleet.start("1.0.0", RolloutPolicy::default()).unwrap();
    // dev-1 is the one that is known to be healthy.
    assert_eq!(fleet.rollout(&id).devices[0].name, "dev-1");
    assert_eq!(
        [fleet.told(0), fleet.told(1), fleet.told(2)],
        ["nothing", "1.0.0 q4_k_m", "nothing"]
    );
    assert!(fleet.rollout(&id).waiting_for.contains("dev-1 (has not asked yet)"));
    let text = why(fleet.rollout(&id));
    assert!(text.contains("speaks for medium alone; not covered by it: large"), "{text}");

    fleet.confirm(1);
    assert_eq!([fleet.told(0), fleet.told(2)], ["1.0.0 q8_0", "1.0.0 q8_0"]);
    fleet.confirm(0);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Running);
    fleet.confirm(2);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
    assert_eq!(fleet.rollout(&id).waiting_for, "");
}

#[test]
fn installed_is_not_working() {
    let mut fleet = Fleet::new(&[600, 600]);
    let id = fleet.start("1.0.0", RolloutPolicy::default()).unwrap();
    for phase in [Phase::Downloaded, Phase::Verified, Phase::Staged, Phase::Activated] {
        fleet.report(0, phase);
        fleet.tick();
        assert_eq!(fleet.rollout(&id).current_wave, 0);
    }
    // Confirmed, but with another digest running.
    fleet.report(0, Phase::Confirmed);
    let running = fleet.devices[0].report.as_mut().unwrap().running.as_mut().unwrap();
    running.manifest = Digest::of(b"something else");
    fleet.tick();
    assert_eq!(fleet.rollout(&id).current_wave, 0);
    // Confirmed, but for an older generation.
    fleet.report(0, Phase::Confirmed);
    fleet.devices[0].report.as_mut().unwrap().generation -= 1;
    fleet.tick();
    assert_eq!(fleet.rollout(&id).current_wave, 0);
    fleet.confirm(0);
    assert_eq!(fleet.rollout(&id).current_wave, 1);
}

#[test]
fn damaged_release_halts_and_goes_back() {
    let mut fleet = Fleet::new(&[600, 600, 360]);
    fleet.settle_on_1_0_0();
    let id = fleet.start("1.1.0", RolloutPolicy::default()).unwrap();
    assert_eq!(fleet.told(0), "1.1.0 q8_0");
    let generation = fleet.devices[0].desired.generation;
    fleet.fail(0);
    let rollout = fleet.rollout(&id);
    assert_eq!(rollout.state, RolloutState::Halted);
    let text = why(rollout);
    assert!(text.contains("halted in wave 1 of 2"), "{text}");
    assert!(text.contains("golden-01: -9.250, floor -2.000"), "{text}");
    assert!(text.contains("went back by itself and serves m 1.0.0 (q8_0)"), "{text}");
    assert!(text.contains("never told, so never downloaded it: dev-1, dev-2"), "{text}");
    assert!(text.contains("1 device failed, 0 allowed"), "{text}");
    // Going back is a new generation that names the old model.
    assert_eq!(fleet.told(0), "1.0.0 q8_0");
    assert_eq!(fleet.devices[0].desired.generation, generation + 1);
    assert_eq!(fleet.told(1), "1.0.0 q8_0");
    // The evidence stays when the device confirms the old one.
    fleet.confirm(0);
    assert!(matches!(fleet.rollout(&id).devices[0].outcome, Outcome::Failed { .. }));

    // Tried again, the same files are not offered to that class.
    let again = fleet.start("1.1.0", RolloutPolicy::default()).unwrap();
    assert_eq!(fleet.rollout(&id).state, RolloutState::Aborted, "superseded");
    assert_eq!(fleet.told(0), "1.0.0 q8_0");
    assert_eq!(fleet.told(1), "1.0.0 q8_0");
    assert_eq!(fleet.told(2), "1.1.0 q4_k_m", "{}", why(fleet.rollout(&again)));
    // A better version goes everywhere.
    fleet.operate(&again, Command::Abort).unwrap();
    let better = fleet.start("1.2.0", all_at_once()).unwrap();
    for device in 0..3 {
        fleet.confirm(device);
    }
    assert_eq!(fleet.rollout(&better).state, RolloutState::Completed);
}

#[test]
fn first_release_that_fails_leaves_nothing() {
    let mut fleet = Fleet::new(&[600]);
    let id = fleet.start("1.0.0", RolloutPolicy::default()).unwrap();
    fleet.fail(0);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Halted);
    assert_eq!(fleet.told(0), "nothing");
}

#[test]
fn straggler_counts_as_failed() {
    let mut fleet = Fleet::new(&[600, 600]);
    let policy = RolloutPolicy { confirm_timeout_s: 60, ..RolloutPolicy::default() };
    let id = fleet.start("1.0.0", policy).unwrap();
    let deadline = fleet.deadline.unwrap();
    assert_eq!(deadline.duration_since(fleet.now).as_secs(), 60);
    fleet.pass_s(59);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Running);
    fleet.pass_s(1);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Halted);
    let text = why(fleet.rollout(&id));
    assert!(text.contains("not confirmed in time") && text.contains("never reported"), "{text}");
    // When it comes back, it does not try after all.
    assert_eq!(fleet.told(0), "nothing");
    // Nobody's model is to blame.
    assert!(fleet.quarantine.is_empty());
}

#[test]
fn nobody_is_late_for_a_hub_that_was_down() {
    let mut fleet = Fleet::new(&[600, 600]);
    let policy = RolloutPolicy { confirm_timeout_s: 60, bake_s: 30, ..RolloutPolicy::default() };
    let id = fleet.start("1.0.0", policy).unwrap();
    // Down for an hour: the device may have confirmed long ago, and has its time to say so.
    fleet.now += SignedDuration::from_secs(3_600);
    fleet.listening_since = fleet.now;
    fleet.pass_s(59);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Running, "{}", why(fleet.rollout(&id)));
    fleet.confirm(0);
    // Down again, while the wave bakes: what went wrong meanwhile is heard before the next starts.
    fleet.now += SignedDuration::from_secs(3_600);
    fleet.listening_since = fleet.now;
    fleet.pass_s(29);
    assert_eq!(fleet.told(1), "nothing");
    fleet.pass_s(1);
    assert!(fleet.told(1).starts_with("1.0.0"), "{}", fleet.told(1));
    // A device that stays silent is late all the same.
    fleet.pass_s(60);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Halted);
}

#[test]
fn wave_bakes() {
    let mut fleet = Fleet::new(&[600, 600]);
    let policy = RolloutPolicy { bake_s: 600, ..RolloutPolicy::default() };
    let id = fleet.start("1.0.0", policy).unwrap();
    fleet.confirm(0);
    assert!(fleet.rollout(&id).waiting_for.contains("stay confirmed for 10 min"));
    fleet.pass_s(599);
    assert_eq!(fleet.told(1), "nothing");
    fleet.pass_s(1);
    assert_eq!(fleet.told(1), "1.0.0 q8_0");
}

#[test]
fn failure_while_baking_halts() {
    let mut fleet = Fleet::new(&[600, 600]);
    let policy = RolloutPolicy { bake_s: 600, ..RolloutPolicy::default() };
    let id = fleet.start("1.0.0", policy).unwrap();
    fleet.confirm(0);
    fleet.report(0, Phase::RolledBack { failure: Failure::Crash });
    fleet.tick();
    assert_eq!(fleet.rollout(&id).state, RolloutState::Halted);
}

#[test]
fn tolerated_failures_do_not_halt() {
    let mut fleet = Fleet::new(&[600, 600, 600]);
    let policy = RolloutPolicy { max_failures: 1, ..all_at_once() };
    let id = fleet.start("1.0.0", policy).unwrap();
    fleet.fail(0);
    fleet.confirm(1);
    fleet.confirm(2);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
}

#[test]
fn nobody_confirmed_is_not_completed() {
    let mut fleet = Fleet::new(&[600]);
    let policy = RolloutPolicy { max_failures: 5, ..all_at_once() };
    let id = fleet.start("1.0.0", policy).unwrap();
    fleet.fail(0);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Halted);
}

#[test]
fn too_small_device_is_named_and_skipped() {
    let mut fleet = Fleet::new(&[600, 96]);
    let id = fleet.start("1.0.0", RolloutPolicy::default()).unwrap();
    fleet.confirm(0);
    let rollout = fleet.rollout(&id);
    assert_eq!(rollout.state, RolloutState::Completed);
    let text = why(rollout);
    assert!(text.contains("no variant fits: smallest needs"), "{text}");
    assert!(text.contains("device offers 101 MB"), "{text}");
    assert_eq!(fleet.told(1), "nothing");
}

#[test]
fn pause_resume_abort_rollback() {
    let mut fleet = Fleet::new(&[600, 600]);
    let first = fleet.settle_on_1_0_0();
    let id = fleet.start("1.1.0", RolloutPolicy::default()).unwrap();
    fleet.operate(&id, Command::Pause).unwrap();
    fleet.operate(&id, Command::Pause).unwrap();
    fleet.confirm(0);
    assert_eq!(fleet.told(1), "1.0.0 q8_0", "a paused rollout tells nobody");
    assert!(fleet.rollout(&id).waiting_for.contains("resume"));
    fleet.operate(&id, Command::Resume).unwrap();
    assert_eq!(fleet.told(1), "1.1.0 q8_0");
    fleet.confirm(1);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
    assert!(matches!(
        fleet.operate(&id, Command::Pause),
        Err(RolloutError::State { state: "completed", wanted: "paused", .. })
    ));
    let generations: Vec<u64> = fleet.devices.iter().map(|d| d.desired.generation).collect();
    fleet.operate(&id, Command::Rollback).unwrap();
    assert_eq!([fleet.told(0), fleet.told(1)], ["1.0.0 q8_0", "1.0.0 q8_0"]);
    for (device, before) in fleet.devices.iter().zip(generations) {
        assert_eq!(device.desired.generation, before + 1);
    }
    // And further back, to nothing.
    fleet.operate(&first, Command::Rollback).unwrap();
    assert_eq!([fleet.told(0), fleet.told(1)], ["nothing", "nothing"]);
}

#[test]
fn rules_of_policy_and_blueprint_reach_devices_and_their_time_does_not_run_meanwhile() {
    let mut fleet = Fleet::new(&[600, 600]);
    fleet.settle_on_1_0_0();
    let layer =
        (Layer::Fleet, "policy.activate_in = \"sat\"\npolicy.metered = \"defer\"".to_owned());
    fleet.devices[1].config = Arc::new(resolve(&[layer]).unwrap());
    fleet.tick();
    assert!(fleet.devices[1].desired.rules.is_none(), "rules alone tell a settled device nothing");
    let at = fleet.at(100_000);
    let schedule = Schedule { activate_at: Some(at), ..Schedule::default() };
    let id = fleet.start("1.1.0", RolloutPolicy { schedule, ..all_at_once() }).unwrap();
    let told = |fleet: &Fleet, device: usize| fleet.devices[device].desired.rules.names().join(" ");
    assert_eq!(told(&fleet, 0), "activate_at");
    assert_eq!(told(&fleet, 1), "activate_at activate_in metered");
    // Another blueprint on the way is other rules.
    fleet.devices[1].config = Arc::new(resolve(&[]).unwrap());
    fleet.tick();
    assert_eq!(told(&fleet, 1), "activate_at");

    for device in [0, 1] {
        fleet.report(device, Phase::Prestaged { cause: WaitCause::NotBefore, until: Some(at) });
    }
    fleet.pass_s(5_000);
    let waits = fleet.rollout(&id).waiting_for.clone();
    assert!(waits.contains("has it and waits for its time"), "{waits}");
    assert!(waits.contains("fails at 2026-01-02 04:01:40 UTC"), "{waits}");
    assert!(why(fleet.rollout(&id)).contains("updating, waits for its time (activate_at)"));
    // The first goes on in time; the second is not heard of any more.
    fleet.pass_s(95_000);
    fleet.report(0, Phase::Staged);
    fleet.pass_s(899);
    fleet.confirm(0);
    fleet.pass_s(1);
    let outcomes = fleet.rollout(&id).devices.iter().map(|part| part.outcome.clone());
    let timeout = Outcome::Failed { failure: Failure::Timeout };
    assert_eq!(outcomes.collect::<Vec<_>>(), [Outcome::Confirmed, timeout]);
    assert!(fleet.devices[1].desired.rules.is_none(), "nothing holds up going back");
}

#[test]
fn a_device_that_a_rule_holds_up_is_not_waited_for_for_ever() {
    let mut fleet = Fleet::new(&[600, 600, 600]);
    fleet.settle_on_1_0_0();
    let policy = RolloutPolicy {
        waves: vec![WaveSize::Count(2), WaveSize::Rest],
        stragglers: Stragglers { held_after_s: 5_000, ..Stragglers::default() },
        ..RolloutPolicy::default()
    };
    let id = fleet.start("1.1.0", policy).unwrap();
    fleet.confirm(0);
    fleet.report(1, waiting(WaitCause::Metered, None));
    fleet.pass_s(4_999);
    assert_eq!(fleet.on("1.1.0"), [0, 1], "its wave waits for it");
    fleet.pass_s(1);
    assert_eq!(fleet.rollout(&id).devices[1].outcome, Outcome::Away);
    assert_eq!(fleet.on("1.1.0"), [0, 1, 2], "and then no longer");
    let why = why(fleet.rollout(&id));
    assert!(why.contains("waited for no longer, waits: its link is metered"), "{why}");
    // It is still told to, and counts when it does.
    fleet.confirm(1);
    fleet.tick();
    assert_eq!(fleet.rollout(&id).devices[1].outcome, Outcome::Confirmed);
    fleet.confirm(2);
    fleet.tick();
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
}

#[test]
fn a_sites_devices_fetch_in_turn_and_with_their_share() {
    let mut fleet = Fleet::new(&[600; 5]);
    for device in 0..4 {
        fleet.site(device, "berlin");
    }
    fleet.settle_on_1_0_0();
    let limits = Limits {
        device_bytes_per_s: Some(700_000),
        site_bytes_per_s: Some(1_000_000),
        site_downloads: Some(2),
        ..Limits::default()
    };
    let id = fleet.start("1.1.0", RolloutPolicy { limits, ..all_at_once() }).unwrap();
    // The sum of those that may fetch is never more than the site's.
    assert_eq!(fleet.on("1.1.0"), [0, 1, 4]);
    let rate = |fleet: &Fleet, device: usize| {
        let rules = &fleet.devices[device].desired.rules;
        rules.max_rate_bytes_per_s.unwrap()
    };
    assert_eq!([0, 1, 4].map(|device| rate(&fleet, device)), [500_000, 500_000, 700_000]);
    let waits = fleet.rollout(&id).waiting_for.clone();
    let expected = "2 devices wait for one of 2 devices of their site that may fetch at a time";
    assert!(waits.contains(expected), "{waits}");
    for phase in [Phase::Downloading { done_bytes: 1, total_bytes: 2 }, Phase::Downloaded] {
        fleet.report(0, phase);
        fleet.tick();
        assert_eq!(fleet.on("1.1.0"), [0, 1, 4]);
    }
    fleet.report(0, Phase::Verified);
    fleet.tick();
    assert_eq!(fleet.on("1.1.0"), [0, 1, 2, 4]);
    fleet.confirm(1);
    assert_eq!(fleet.on("1.1.0"), [0, 1, 2, 3, 4]);
    for (limits, expected) in [
        (r#"{"site_bytes_per_s": 9000, "site_downloads": 10}"#, "less than 1000 bytes per second"),
        (r#"{"device_bytes_per_s": 0}"#, "less than 1000 bytes per second"),
        (r#"{"site_downloads": 1}"#, "goes with limits.site_bytes_per_s"),
        (r#"{"site_bytes_per_s": 9000, "site_downloads": 0}"#, "site_downloads = 0"),
    ] {
        let limits = serde_json::from_str(limits).unwrap();
        let policy = RolloutPolicy { limits, ..RolloutPolicy::default() };
        let error = fleet.start("1.2.0", policy).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn an_agent_that_would_ignore_a_rule_is_left_out_and_named() {
    let mut fleet = Fleet::new(&[600, 600]);
    fleet.settle_on_1_0_0();
    fleet.obeys(1, &["hold"]);
    let limits = Limits { metered: Metered::Defer, ..Limits::default() };
    let id = fleet.start("1.1.0", RolloutPolicy { limits, ..all_at_once() }).unwrap();
    assert_eq!([fleet.told(0), fleet.told(1)], ["1.1.0 q8_0", "1.0.0 q8_0"]);
    let waits = fleet.rollout(&id).waiting_for.clone();
    let expected = "1 device waits for a newer agent: theirs is not known to obey metered";
    assert!(waits.contains(expected), "{waits}");
    fleet.obeys(1, &DeviceRules::ALL);
    fleet.tick();
    assert_eq!(fleet.told(1), "1.1.0 q8_0");
    // Outside of rollouts it is told what it ignores.
    fleet.confirm(0);
    fleet.confirm(1);
    fleet.obeys(1, &["hold"]);
    let layer = "runtime.parallel = 1\npolicy.download_in = \"sat\"".to_owned();
    fleet.devices[1].config = Arc::new(resolve(&[(Layer::Fleet, layer)]).unwrap());
    fleet.tick();
    let desired = &fleet.devices[1].desired;
    assert_eq!((desired.runtime.parallel, desired.rules.names()), (1, vec!["download_in"]));
    assert!(desired.reason.ends_with("its agent is too old to obey download_in"), "{desired:?}");
}

fn waiting(cause: WaitCause, until: Option<Timestamp>) -> Phase {
    Phase::Waiting { cause, until }
}

#[test]
fn a_pause_reaches_the_devices_that_were_told() {
    let mut fleet = Fleet::new(&[600, 600, 600]);
    fleet.settle_on_1_0_0();
    let id = fleet.start("1.1.0", all_at_once()).unwrap();
    fleet.confirm(0);
    // The agent of the last does not know the rule.
    fleet.obeys(2, &[]);
    fleet.report(2, Phase::Downloaded);
    let told: Vec<u64> = fleet.devices.iter().map(|d| d.desired.generation).collect();
    fleet.operate(&id, Command::Pause).unwrap();
    let now: Vec<u64> = fleet.devices.iter().map(|d| d.desired.generation).collect();
    assert_eq!(now, [told[0], told[1] + 1, told[2]]);
    assert!(fleet.devices[1].desired.rules.hold && fleet.told(1) == "1.1.0 q8_0");
    assert!(fleet.devices[1].desired.reason.contains("is paused"));
    let waits = fleet.rollout(&id).waiting_for.clone();
    assert!(waits.contains("1 device told before and held from their next poll"), "{waits}");
    assert!(waits.contains("dev-2 cannot be held"), "{waits}");
    // Time stands still: nobody is late, and on resuming it begins anew.
    fleet.report(1, waiting(WaitCause::Held, None));
    fleet.pass_s(100_000);
    assert_eq!(fleet.rollout(&id).devices[1].outcome, Outcome::Updating);
    assert!(why(fleet.rollout(&id)).contains("updating, waits: the rollout is held"));
    fleet.operate(&id, Command::Resume).unwrap();
    assert!(!fleet.devices[1].desired.rules.hold);
    assert_eq!(fleet.devices[1].desired.generation, told[1] + 2);
    fleet.pass_s(899);
    assert_eq!(fleet.rollout(&id).devices[1].outcome, Outcome::Updating);
    fleet.pass_s(1);
    let timeout = Outcome::Failed { failure: Failure::Timeout };
    assert_eq!(fleet.rollout(&id).devices[1].outcome, timeout);
}

#[test]
fn a_halt_holds_those_on_the_way_and_who_follows_recalls_them() {
    let mut fleet = Fleet::new(&[600, 600, 600]);
    fleet.settle_on_1_0_0();
    let id = fleet.start("1.1.0", all_at_once()).unwrap();
    fleet.fail(0);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Halted);
    assert_eq!(fleet.told(1), "1.1.0 q8_0");
    assert!(fleet.devices[1].desired.rules.hold && fleet.devices[2].desired.rules.hold);
    // Another release for one of them: the other goes back to what it had.
    let policy = RolloutPolicy { selector: "name=dev-1".parse().unwrap(), ..all_at_once() };
    fleet.start("1.2.0", policy).unwrap();
    assert_eq!([fleet.told(1), fleet.told(2)], ["1.2.0 q8_0", "1.0.0 q8_0"]);
    assert_eq!(fleet.rollout(&id).devices[2].outcome, Outcome::Recalled);
    assert!(fleet.devices.iter().all(|device| !device.desired.rules.hold));
    assert!(why(fleet.rollout(&id)).contains("told to keep what it had"));
}

#[test]
fn an_abort_leaves_those_who_confirmed_and_recalls_the_others() {
    let mut fleet = Fleet::new(&[600, 600]);
    fleet.settle_on_1_0_0();
    let id = fleet.start("1.1.0", all_at_once()).unwrap();
    fleet.confirm(0);
    fleet.operate(&id, Command::Pause).unwrap();
    fleet.operate(&id, Command::Abort).unwrap();
    assert_eq!([fleet.told(0), fleet.told(1)], ["1.1.0 q8_0", "1.0.0 q8_0"]);
    assert!(!fleet.devices[1].desired.rules.hold);
    let last = fleet.rollout(&id).decisions.last().unwrap();
    assert!(last.because[1].contains("1 device on the way told to keep"), "{last:?}");
}

#[test]
fn resume_after_a_halt_sets_the_failure_aside() {
    let mut fleet = Fleet::new(&[600, 360]);
    let id = fleet.start("1.0.0", RolloutPolicy::default()).unwrap();
    fleet.fail(0);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Halted);
    fleet.operate(&id, Command::Resume).unwrap();
    assert_eq!(fleet.told(1), "1.0.0 q4_k_m", "{}", why(fleet.rollout(&id)));
    fleet.confirm(1);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
}

#[test]
fn overlap_is_refused_by_name() {
    let mut fleet = Fleet::new(&[600, 360]);
    let id = fleet.start("1.0.0", RolloutPolicy::default()).unwrap();
    let error = fleet.start("1.1.0", RolloutPolicy::default()).unwrap_err();
    assert!(matches!(&error, RolloutError::Overlap { other, .. } if *other == id), "{error}");
    assert!(error.hint().contains(id.as_str()));
    // Other devices are free.
    fleet.operate(&id, Command::Abort).unwrap();
    let large = RolloutPolicy { selector: "class=large".parse().unwrap(), ..all_at_once() };
    let medium = RolloutPolicy { selector: "class=medium".parse().unwrap(), ..all_at_once() };
    fleet.start("1.0.0", large).unwrap();
    fleet.start("1.1.0", medium).unwrap();
    assert_eq!([fleet.told(0), fleet.told(1)], ["1.0.0 q8_0", "1.1.0 q4_k_m"]);
}

#[test]
fn policies_out_of_bounds() {
    let mut fleet = Fleet::new(&[600]);
    for (schedule, expected) in [
        (r#"{"time_zone": "Mars/Olympus"}"#, "is no time zone: write a name such as Europe/Berlin"),
        (
            r#"{"start_at": "2026-01-02T00:00:00Z", "activate_at": "2026-01-01T00:00:00Z"}"#,
            "activate_at is before schedule.start_at",
        ),
    ] {
        let schedule = serde_json::from_str(schedule).unwrap();
        let policy = RolloutPolicy { schedule, ..RolloutPolicy::default() };
        let error = fleet.start("1.0.0", policy).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    for waves in [
        vec![WaveSize::Count(0)],
        vec![WaveSize::Percent(0)],
        vec![WaveSize::Percent(101)],
        vec![WaveSize::Count(1); MAX_WAVES + 1],
    ] {
        let policy = RolloutPolicy { waves, ..RolloutPolicy::default() };
        assert!(matches!(fleet.start("1.0.0", policy), Err(RolloutError::Policy(_))));
    }
    let policy = RolloutPolicy { confirm_timeout_s: 0, ..RolloutPolicy::default() };
    assert!(matches!(fleet.start("1.0.0", policy), Err(RolloutError::Policy(_))));
    let error = fleet.start("9.9.9", RolloutPolicy::default()).unwrap_err();
    assert_eq!(error, RolloutError::NoRelease("m 9.9.9".to_owned()));
}

#[test]
fn who_joins_later_gets_the_completed_release() {
    let mut fleet = Fleet::new(&[600]);
    fleet.settle_on_1_0_0();
    fleet.join(360);
    fleet.tick();
    assert_eq!(fleet.told(1), "1.0.0 q4_k_m");
    fleet.confirm(1);
    // While a rollout runs, a newcomer joins its last wave and does not overtake the canary.
    let id = fleet.start("1.1.0", RolloutPolicy::default()).unwrap();
    fleet.join(600);
    fleet.tick();
    assert_eq!(fleet.told(2), "1.0.0 q8_0");
    assert_eq!(fleet.rollout(&id).devices.len(), 3);
    fleet.confirm(0);
    assert_eq!(fleet.told(2), "1.1.0 q8_0");
}

#[test]
fn facts_choose_devices_and_take_in_those_that_come_to_match() {
    let mut fleet = Fleet::new(&[600, 600]);
    let more_cores = |cores| Arc::new(DeviceFacts { cores, ..testing::facts(600) });
    fleet.devices[0].facts = more_cores(8);
    let selector = "fact.cores>=8,fact.arch=x86_64".parse().unwrap();
    let policy = RolloutPolicy { selector, ..RolloutPolicy::default() };
    let id = fleet.start("1.0.0", policy).unwrap();
    assert_eq!([fleet.told(0), fleet.told(1)], ["1.0.0 q8_0", "nothing"]);
    fleet.devices[1].facts = more_cores(16);
    fleet.tick();
    assert_eq!(fleet.rollout(&id).devices.len(), 2);
    assert_eq!(fleet.told(1), "nothing", "it waits for its wave");
    fleet.confirm(0);
    assert_eq!(fleet.told(1), "1.0.0 q8_0");
    fleet.confirm(1);
    // Who joins later with such facts gets the completed release, others do not.
    fleet.join(600);
    fleet.join(600);
    fleet.devices[2].facts = more_cores(8);
    fleet.tick();
    assert_eq!([fleet.told(2), fleet.told(3)], ["1.0.0 q8_0", "nothing"]);
}

#[test]
fn rollout_without_devices_waits_for_newcomers() {
    let mut fleet = Fleet::new(&[]);
    let id = fleet.start("1.0.0", RolloutPolicy::default()).unwrap();
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
    fleet.join(600);
    fleet.tick();
    assert_eq!(fleet.told(0), "1.0.0 q8_0");
}

#[test]
fn new_blueprint_is_a_new_generation_of_the_same_model() {
    let mut fleet = Fleet::new(&[600]);
    fleet.settle_on_1_0_0();
    let before = fleet.devices[0].desired.generation;
    let layers = [(slmops_api::blueprint::Layer::Fleet, "[runtime]\nparallel = 1".to_owned())];
    fleet.devices[0].config = Arc::new(resolve(&layers).unwrap());
    fleet.tick();
    assert_eq!(fleet.devices[0].desired.generation, before + 1);
    assert_eq!(fleet.devices[0].desired.runtime.parallel, 1);
    fleet.tick();
    assert_eq!(fleet.devices[0].desired.generation, before + 1, "and only one");
    // A configuration that fits nothing leaves the device alone.
    let layers =
        [(slmops_api::blueprint::Layer::Fleet, "[runtime]\ncontext_tokens = 131072".to_owned())];
    fleet.devices[0].config = Arc::new(resolve(&layers).unwrap());
    fleet.tick();
    assert_eq!(fleet.devices[0].desired.generation, before + 1);
}

#[test]
fn smaller_budget_gets_a_smaller_variant() {
    let mut fleet = Fleet::new(&[600]);
    fleet.settle_on_1_0_0();
    assert_eq!(fleet.told(0), "1.0.0 q8_0");
    fleet.devices[0].budget_bytes = 360 << 20;
    fleet.tick();
    assert_eq!(fleet.told(0), "1.0.0 q4_k_m");
}

#[test]
fn budget_change_in_a_wave_is_measured_by_the_new_variant() {
    let mut fleet = Fleet::new(&[600, 600]);
    let id = fleet.start("1.0.0", RolloutPolicy::default()).unwrap();
    fleet.devices[0].budget_bytes = 360 << 20;
    fleet.tick();
    assert_eq!(fleet.told(0), "1.0.0 q4_k_m");
    assert_eq!(fleet.rollout(&id).devices[0].variant.as_ref().unwrap().as_str(), "q4_k_m");
    fleet.confirm(0);
    assert_eq!(fleet.rollout(&id).current_wave, 1);
}

#[test]
fn frozen_devices_and_other_models_are_left_out() {
    let mut fleet = Fleet::new(&[600, 600, 600]);
    let fleet_layer = |toml: &str| [(slmops_api::blueprint::Layer::Fleet, toml.to_owned())];
    fleet.devices[0].config = Arc::new(resolve(&fleet_layer("[policy]\nfrozen = true")).unwrap());
    fleet.devices[1].config = Arc::new(resolve(&fleet_layer("model = \"other\"")).unwrap());
    let id = fleet.start("1.0.0", all_at_once()).unwrap();
    assert_eq!([fleet.told(0), fleet.told(1), fleet.told(2)], ["nothing", "nothing", "1.0.0 q8_0"]);
    let text = why(fleet.rollout(&id));
    assert!(text.contains("left out dev-0: its blueprint freezes it"), "{text}");
    assert!(text.contains("left out dev-1: its blueprint names model other"), "{text}");
}

#[test]
fn revoked_device_does_not_hold_a_wave() {
    let mut fleet = Fleet::new(&[600, 600]);
    let id = fleet.start("1.0.0", RolloutPolicy::default()).unwrap();
    fleet.devices[0].revoked = true;
    fleet.tick();
    assert_eq!(fleet.told(1), "1.0.0 q8_0");
    fleet.confirm(1);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
}

#[test]
fn device_ahead_of_a_restored_hub_is_heard() {
    let mut fleet = Fleet::new(&[600]);
    fleet.settle_on_1_0_0();
    fleet.devices[0].report.as_mut().unwrap().generation = 70;
    fleet.tick();
    assert_eq!(fleet.devices[0].desired.generation, 71);
    assert_eq!(fleet.told(0), "1.0.0 q8_0");
}

#[test]
fn the_first_wave_speaks_for_every_class() {
    let mut fleet = Fleet::new(&[600, 600, 600, 360, 360, 240]);
    let policy = RolloutPolicy { per: WavePer::Class, ..RolloutPolicy::default() };
    let id = fleet.start("1.0.0", policy).unwrap();
    assert_eq!(fleet.on("1.0.0"), [0, 3, 5]);
    assert!(!why(fleet.rollout(&id)).contains("not covered"));
    fleet.confirm(0);
    fleet.confirm(3);
    assert_eq!(fleet.on("1.0.0"), [0, 3, 5]);
    fleet.confirm(5);
    assert_eq!(fleet.on("1.0.0"), [0, 1, 2, 3, 4, 5]);
    assert_eq!(fleet.rollout(&id).waves, 2);
}

#[test]
fn shares_are_of_each_site() {
    let mut fleet = Fleet::new(&[600; 9]);
    for device in 0..4 {
        fleet.site(device, "berlin");
    }
    for device in 4..8 {
        fleet.site(device, "oslo");
    }
    // The last one has no site, and is a group of its own.
    let policy = RolloutPolicy {
        per: WavePer::Site,
        waves: vec![WaveSize::Percent(50)],
        ..RolloutPolicy::default()
    };
    fleet.start("1.0.0", policy).unwrap();
    assert_eq!(fleet.on("1.0.0"), [0, 1, 4, 5, 8]);
}

#[test]
fn it_starts_when_scheduled_and_rests_in_a_freeze() {
    let mut fleet = Fleet::new(&[600, 600]);
    let freeze =
        Freeze { from: fleet.at(7000), until: fleet.at(9000), reason: "Black Friday".to_owned() };
    let schedule =
        Schedule { start_at: Some(fleet.at(3600)), freezes: vec![freeze], ..Schedule::default() };
    let policy = RolloutPolicy { schedule, confirm_timeout_s: 9000, ..RolloutPolicy::default() };
    let id = fleet.start("1.0.0", policy).unwrap();
    assert_eq!(fleet.on("1.0.0"), [0_usize; 0]);
    let waits = fleet.rollout(&id).waiting_for.clone();
    assert_eq!(
        waits,
        "wave 1 of 2: 1 device waits for its start at 2026-01-01 01:00:00 UTC (schedule.start_at)"
    );
    assert_eq!(fleet.deadline, Some(fleet.at(3600)));
    fleet.pass_s(3600);
    assert_eq!(fleet.on("1.0.0"), [0]);
    // Told before the freeze, it goes on; the next wave waits.
    fleet.pass_s(3500);
    fleet.confirm(0);
    assert_eq!(fleet.on("1.0.0"), [0]);
    let waits = fleet.rollout(&id).waiting_for.clone();
    assert!(waits.contains("the end of a freeze (Black Friday) at 2026-01-01 02:30:00"), "{waits}");
    fleet.pass_s(1900);
    assert_eq!(fleet.on("1.0.0"), [0, 1]);
}

#[test]
fn a_wave_waits_for_who_must_agree() {
    let mut fleet = Fleet::new(&[600, 600, 600]);
    let step = |wave, by: &[&str]| ApprovalStep {
        wave,
        by: by.iter().map(|name| (*name).to_owned()).collect(),
    };
    let policy = RolloutPolicy {
        waves: vec![WaveSize::Count(1), WaveSize::Count(1)],
        approvals: vec![step(2, &[]), step(3, &["ann"])],
        ..RolloutPolicy::default()
    };
    let id = fleet.start("1.0.0", policy).unwrap();
    fleet.confirm(0);
    assert_eq!(fleet.on("1.0.0"), [0]);
    let waits = fleet.rollout(&id).waiting_for.clone();
    assert!(
        waits.contains("approval by anybody but token test: `slm rollout approve r0 --wave 2`")
    );
    // Not by who made it, not for a wave that needs none, not by who is not named.
    for (by, wave) in [("token test", 2), ("token ann", 1), ("token bob", 3), ("ann", 3)] {
        let error = fleet.operate_as(&id, Command::Approve { wave }, by).unwrap_err();
        assert!(matches!(error, RolloutError::Approval { .. }), "{error}");
    }
    // Ahead of time, and twice.
    for _ in 0..2 {
        fleet.operate_as(&id, Command::Approve { wave: 3 }, "token ann").unwrap();
    }
    assert_eq!(fleet.on("1.0.0"), [0]);
    fleet.operate_as(&id, Command::Approve { wave: 2 }, "token bob").unwrap();
    assert_eq!(fleet.on("1.0.0"), [0, 1]);
    fleet.confirm(1);
    assert_eq!(fleet.on("1.0.0"), [0, 1, 2]);
    assert_eq!(fleet.rollout(&id).approvals.len(), 2);
    let text = why(fleet.rollout(&id));
    assert!(text.contains("approved wave 2\n      - asked by token bob"), "{text}");
    fleet.confirm(2);
    assert!(matches!(
        fleet.operate_as(&id, Command::Approve { wave: 2 }, "token bob"),
        Err(RolloutError::State { wanted: "approved", .. })
    ));
}

#[test]
fn no_more_devices_update_at_once_than_may() {
    let mut fleet = Fleet::new(&[600; 7]);
    for device in 0..4 {
        fleet.site(device, "berlin");
    }
    let limits = Limits { updating: Some(4), updating_per_site: Some(2), ..Limits::default() };
    let policy = RolloutPolicy { limits, max_failures: 1, ..all_at_once() };
    let id = fleet.start("1.0.0", policy).unwrap();
    assert_eq!(fleet.on("1.0.0"), [0, 1, 4, 5]);
    let waits = fleet.rollout(&id).waiting_for.clone();
    assert!(
        waits.contains("3 devices wait for one of 4 devices that may update at once"),
        "{waits}"
    );
    fleet.confirm(4);
    assert_eq!(fleet.on("1.0.0"), [0, 1, 4, 5, 6]);
    fleet.confirm(5);
    let waits = fleet.rollout(&id).waiting_for.clone();
    assert!(waits.contains("2 devices wait for one of 2 devices of their site"), "{waits}");
    // A device that failed makes room, too.
    fleet.fail(0);
    assert!(fleet.told(2).starts_with("1.0.0"));
    fleet.confirm(1);
    assert!(fleet.told(3).starts_with("1.0.0"));
    for device in [2, 3, 6] {
        fleet.confirm(device);
    }
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
    // One decision for the wave, however long it was stretched.
    let started = |decision: &&Decision| decision.what.starts_with("started wave");
    let started: Vec<&Decision> = fleet.rollout(&id).decisions.iter().filter(started).collect();
    assert_eq!(started.len(), 1);
    assert_eq!(started[0].what, "started wave 1 of 1: 4 devices of 7");
}

const DAY_S: i64 = 24 * 3600;

#[test]
fn devices_that_are_away_hold_nobody_up_and_take_it_when_they_are_back() {
    let mut fleet = Fleet::new(&[600; 4]);
    fleet.settle_on_1_0_0();
    fleet.pass_s(60 * DAY_S);
    fleet.hear(&[2, 3]);
    // The one that is to be the canary falls silent before its wave starts.
    let schedule = Schedule { start_at: Some(fleet.at(10 * DAY_S)), ..Schedule::default() };
    let policy = RolloutPolicy { schedule, ..RolloutPolicy::default() };
    let id = fleet.start("1.1.0", policy).unwrap();
    assert_eq!(fleet.rollout(&id).devices[0].name, "dev-2");
    fleet.pass_s(9 * DAY_S);
    fleet.hear(&[3]);
    fleet.pass_s(DAY_S);
    assert_eq!(fleet.on("1.1.0"), [3], "another takes the place of the canary");
    fleet.confirm(3);
    let rollout = fleet.rollout(&id);
    assert_eq!(rollout.state, RolloutState::Completed, "{}", why(rollout));
    let text = why(rollout);
    assert!(text.contains("3 devices away: told, and take it when they come back"), "{text}");
    assert!(text.contains("dev-0  q8_0, generation 3: away"), "{text}");
    // What they find is the newest release, and going back is known.
    assert_eq!(fleet.on("1.1.0"), [0, 1, 2, 3]);
    fleet.pass_s(300 * DAY_S);
    fleet.confirm(0);
    assert_eq!(fleet.told(0), "1.1.0 q8_0");
    fleet.operate(&id, Command::Rollback).unwrap();
    assert_eq!(fleet.on("1.0.0"), [0, 1, 2, 3]);
}

#[test]
fn a_device_that_comes_back_joins_the_wave_that_is_out() {
    let mut fleet = Fleet::new(&[600; 3]);
    fleet.pass_s(30 * DAY_S);
    fleet.hear(&[0]);
    let policy = RolloutPolicy { confirm_timeout_s: 604_800, ..all_at_once() };
    let id = fleet.start("1.0.0", policy).unwrap();
    assert_eq!(fleet.on("1.0.0"), [0]);
    fleet.hear(&[2]);
    assert_eq!(fleet.on("1.0.0"), [0, 2]);
    fleet.confirm(0);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Running);
    fleet.confirm(2);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
}

#[test]
fn a_release_that_nobody_could_try_is_not_completed() {
    let mut fleet = Fleet::new(&[600; 2]);
    fleet.pass_s(30 * DAY_S);
    let id = fleet.start("1.0.0", RolloutPolicy::default()).unwrap();
    let rollout = fleet.rollout(&id);
    assert_eq!(rollout.state, RolloutState::Running);
    assert!(rollout.waiting_for.contains("a device that can try it"), "{}", rollout.waiting_for);
    fleet.hear(&[1]);
    assert_eq!(fleet.on("1.0.0"), [1]);
    fleet.confirm(1);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
}

#[test]
fn a_device_that_never_asked_can_be_left_behind() {
    let mut fleet = Fleet::new(&[600; 3]);
    let stragglers = Stragglers { unheard: Unheard::Leave, ..Stragglers::default() };
    let policy = RolloutPolicy { stragglers, confirm_timeout_s: 60, ..all_at_once() };
    let id = fleet.start("1.0.0", policy.clone()).unwrap();
    fleet.confirm(0);
    fleet.report(1, Phase::Staged);
    fleet.pass_s(59);
    fleet.confirm(1);
    fleet.pass_s(1);
    let rollout = fleet.rollout(&id);
    assert_eq!(rollout.state, RolloutState::Completed, "{}", why(rollout));
    assert_eq!(rollout.devices[2].outcome, Outcome::Away);
    // One that asked and did not confirm is a failure all the same.
    let id = fleet.start("1.1.0", policy).unwrap();
    fleet.report(1, Phase::Staged);
    fleet.pass_s(60);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Halted);
}

#[test]
fn rules_out_of_bounds() {
    let mut fleet = Fleet::new(&[600]);
    let mut check = |toml: &str, why: &str| {
        let policy: RolloutPolicy = toml::from_str(toml).unwrap();
        let error = fleet.start("1.0.0", policy).unwrap_err().to_string();
        assert!(error.contains(why), "{toml}: {error}");
    };
    check("limits.updating = 0", "would let no device update");
    check("limits.updating_per_site = 0", "would let no device update");
    check("stragglers.away_after_s = 40000000", "more than 8784 h");
    check("approvals = [{ wave = 0 }]", "waves are 1 to 100");
    check("approvals = [{ wave = 2 }, { wave = 2 }]", "two approvals before wave 2");
    check("approvals = [{ wave = 2, by = [''] }]", "names of tokens");
    let freeze = "from = '2026-01-02T00:00:00Z', until = '2026-01-01T00:00:00Z'";
    check(&format!("schedule.freezes = [{{ {freeze} }}]"), "ends before it begins");
}

/// What may happen to a fleet.
#[derive(Clone, Debug)]
enum Happening {
    Confirm(usize),
    Fail(usize),
    Phase(usize),
    Pass(i64),
    Join(u64),
    Budget(usize, u64),
    Revoke(usize),
    Command(usize),
    Start(usize),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        6 => (0..12_usize).prop_map(Happening::Confirm),
        1 => (0..12_usize).prop_map(Happening::Fail),
        2 => (0..12_usize).prop_map(Happening::Phase),
        2 => (1..400_i64).prop_map(Happening::Pass),
        1 => (80..900_u64).prop_map(Happening::Join),
        1 => (0..12_usize, 80..900_u64).prop_map(|(d, b)| Happening::Budget(d, b)),
        1 => (0..12_usize).prop_map(Happening::Revoke),
        1 => (0..4_usize).prop_map(Happening::Command),
        1 => (0..3_usize).prop_map(Happening::Start),
    ]
}

fn wave() -> impl Strategy<Value = WaveSize> {
    prop_oneof![
        (1..4_u32).prop_map(WaveSize::Count),
        (1..=100_u32).prop_map(WaveSize::Percent),
        Just(WaveSize::Rest),
    ]
}

/// Devices that each wave and those before it may have told, by the policy alone.
fn limit(policy: &RolloutPolicy, selected: usize, current_wave: u32) -> usize {
    let mut told = 0;
    for wave in 0..=current_wave as usize {
        told += match policy.waves.get(wave) {
            Some(WaveSize::Count(number)) => *number as usize,
            Some(WaveSize::Percent(share)) => (selected * *share as usize).div_ceil(100),
            Some(WaveSize::Rest) | None => return usize::MAX,
        };
    }
    told
}

fn check_invariants(fleet: &Fleet, halted_before: &BTreeSet<RolloutId>) {
    for record in &fleet.rollouts {
        let rollout = &record.rollout;
        let told = rollout.devices.iter().filter(|d| d.generation.is_some()).count();
        // A share is of the devices at the start, of which some may have been shut out since.
        let most = limit(&rollout.asked.policy, fleet.devices.len(), rollout.current_wave);
        // At most the three classes each count by themselves; who is away is told at the end.
        let most = match rollout.asked.policy.per {
            WavePer::Fleet => most,
            WavePer::Class | WavePer::Site => most.saturating_mul(3),
        };
        let most = if rollout.state.is_final() { usize::MAX } else { most };
        // A device whose budget changed gets another variant by that, not by the rollout.
        let updating =
            |d: &&RolloutDevice| d.outcome == Outcome::Updating && !d.fit.starts_with("release ");
        let updating = rollout.devices.iter().filter(updating).count();
        let at_once = rollout.asked.policy.limits.updating.unwrap_or(u32::MAX) as usize;
        assert!(updating <= at_once, "{updating} update at once:\n{}", why(rollout));
        assert!(told <= most, "{told} told, {most} allowed:\n{}", why(rollout));
        for device in &rollout.devices {
            assert!(
                device.generation.is_none()
                    || device.wave <= rollout.current_wave
                    || rollout.state.is_final(),
                "{} was told before its wave:\n{}",
                device.name,
                why(rollout)
            );
        }
        if rollout.state.is_final() {
            assert_eq!(rollout.waiting_for, "");
        } else {
            assert!(!rollout.waiting_for.is_empty(), "{} does not say why it waits", rollout.id);
        }
        if halted_before.contains(&rollout.id) && rollout.state == RolloutState::Halted {
            for device in &rollout.devices {
                assert!(
                    device.outcome != Outcome::Pending || device.generation.is_none(),
                    "a halted rollout told {}",
                    device.name
                );
            }
        }
        if rollout.state == RolloutState::Running {
            let allowed = rollout.asked.policy.max_failures as usize;
            for wave in 0..rollout.waves {
                let failed = rollout
                    .devices
                    .iter()
                    .filter(|d| d.wave == wave && matches!(d.outcome, Outcome::Failed { .. }))
                    .filter(|d| !record.forgiven.contains(&d.device))
                    .count();
                assert!(failed <= allowed, "runs on in spite of {failed} failures");
            }
        }
    }
    for device in fleet.devices.iter().filter(|device| !device.revoked) {
        let Some(model) = &device.desired.model else { continue };
        let active = fleet.rollouts.iter().filter(|r| !r.rollout.state.is_final());
        let in_active =
            active.filter(|r| r.rollout.devices.iter().any(|d| d.device == device.id)).count();
        assert!(in_active <= 1, "{} is in {in_active} rollouts", device.name);
        let known = fleet.releases.values().flat_map(|release| &release.variants);
        assert!(known.into_iter().any(|variant| variant.manifest == model.manifest));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold(
        budgets in prop::collection::vec(80..900_u64, 0..8),
        waves in prop::collection::vec(wave(), 0..4),
        max_failures in 0..2_u32,
        bake_s in prop_oneof![Just(0_u32), 1..300_u32],
        per in prop_oneof![Just(WavePer::Fleet), Just(WavePer::Class)],
        updating in prop::option::of(1..4_u32),
        away_after_s in prop_oneof![Just(0_u32), 300..2000_u32],
        leave in any::<bool>(),
        happenings in prop::collection::vec(happening(), 0..60),
    ) {
        let unheard = if leave { Unheard::Leave } else { Unheard::Fail };
        let policy = RolloutPolicy {
            waves,
            per,
            max_failures,
            bake_s,
            confirm_timeout_s: 300,
            limits: Limits { updating, ..Limits::default() },
            stragglers: Stragglers { away_after_s, unheard, ..Stragglers::default() },
            ..RolloutPolicy::default()
        };
        let mut fleet = Fleet::new(&budgets);
        let versions = ["1.0.0", "1.1.0", "1.2.0"];
        fleet.start("1.0.0", policy.clone()).unwrap();
        check_invariants(&fleet, &BTreeSet::new());
        for happening in happenings {
            let halted: BTreeSet<RolloutId> = fleet
                .rollouts
                .iter()
                .filter(|r| r.rollout.state == RolloutState::Halted)
                .map(|r| r.rollout.id.clone())
                .collect();
            let told: Vec<(RolloutId, usize)> = fleet
                .rollouts
                .iter()
                .map(|r| {
                    let told = r.rollout.devices.iter().filter(|d| d.generation.is_some());
                    (r.rollout.id.clone(), told.count())
                })
                .collect();
            let operated = matches!(happening, Happening::Command(_) | Happening::Start(_));
            let count = fleet.devices.len().max(1);
            match happening {
                _ if fleet.devices.is_empty() => fleet.join(360),
                Happening::Confirm(device) => fleet.confirm(device % count),
                Happening::Fail(device) => fleet.fail(device % count),
                Happening::Phase(device) => {
                    fleet.report(device % count, Phase::Staged);
                    fleet.tick();
                }
                Happening::Pass(seconds) => fleet.pass_s(seconds),
                Happening::Join(budget) => {
                    fleet.join(budget);
                    fleet.tick();
                }
                Happening::Budget(device, budget) => {
                    fleet.devices[device % count].budget_bytes = budget << 20;
                    fleet.tick();
                }
                Happening::Revoke(device) => {
                    fleet.devices[device % count].revoked = true;
                    fleet.tick();
                }
                Happening::Command(which) => {
                    let commands =
                        [Command::Pause, Command::Resume, Command::Abort, Command::Rollback];
                    let id = fleet.rollouts.last().unwrap().rollout.id.clone();
                    // A command that the state does not allow is refused; that is fine here.
                    let _ = fleet.operate(&id, commands[which]);
                }
                Happening::Start(which) => {
                    let _ = fleet.start(versions[which], policy.clone());
                }
            }
            check_invariants(&fleet, &halted);
            if !operated {
                for (id, before) in told.iter().filter(|(id, _)| halted.contains(id)) {
                    let devices = &fleet.rollout(id).devices;
                    let after = devices.iter().filter(|d| d.generation.is_some()).count();
                    prop_assert!(after <= *before, "a halted rollout told a device");
                }
            }
        }
        // Heal: everyone confirms what they are told, and time passes.
        for _ in 0..40 {
            for device in 0..fleet.devices.len() {
                if !fleet.devices[device].revoked {
                    fleet.report(device, Phase::Confirmed);
                }
            }
            fleet.pass_s(301);
        }
        for record in &fleet.rollouts {
            prop_assert!(
                record.rollout.state != RolloutState::Running,
                "does not end:\n{}", why(&record.rollout)
            );
        }
    }
}

/// Found by the simulator: told a release, not yet arrived at it, told the next one, and that fails.
#[test]
fn nobody_goes_back_to_what_was_quarantined_meanwhile() {
    let mut fleet = Fleet::new(&[1000, 1000]);
    let policy = RolloutPolicy { waves: vec![], ..RolloutPolicy::default() };
    let first = fleet.start("1.0.0", policy.clone()).unwrap();
    fleet.confirm(0);
    fleet.confirm(1);
    assert_eq!(fleet.rollout(&first).state, RolloutState::Completed);
    let second = fleet.start("1.1.0", policy.clone()).unwrap();
    fleet.fail(0);
    assert_eq!(fleet.rollout(&second).state, RolloutState::Halted);
    let version =
        |fleet: &Fleet| fleet.devices[1].desired.model.as_ref().map(|it| it.version.to_string());
    assert_eq!(version(&fleet).as_deref(), Some("1.1.0"));
    fleet.start("1.2.0", policy).unwrap();
    assert_eq!(version(&fleet).as_deref(), Some("1.2.0"));
    fleet.fail(1);
    assert_eq!(version(&fleet).as_deref(), Some("1.0.0"));
}

/// A fleet of 60 like devices on 1.0.0 and a gated rollout of 1.1.0 whose canaries have confirmed.
fn gated(gate: GatePolicy) -> (Fleet, RolloutId) {
    let mut fleet = Fleet::new(&[400; 60]);
    fleet.start("1.0.0", RolloutPolicy { waves: vec![], ..RolloutPolicy::default() }).unwrap();
    for device in 0..60 {
        fleet.report(device, Phase::Confirmed);
    }
    fleet.tick();
    fleet.serve(24.0, |_| (5.0, 0.02));
    let policy =
        RolloutPolicy { waves: vec![WaveSize::Count(15)], gate: Some(gate), ..Default::default() };
    let id = fleet.start("1.1.0", policy).unwrap();
    for device in fleet.canaries(&id) {
        fleet.report(device, Phase::Confirmed);
    }
    fleet.serve(0.0, |_| (0.0, 0.0));
    fleet.tick();
    (fleet, id)
}

impl Fleet {
    /// Indexes of the devices that are told the release of this rollout.
    fn canaries(&self, id: &RolloutId) -> Vec<usize> {
        let version = &self.rollout(id).asked.version;
        let told = |device: &FleetDevice| {
            device.desired.model.as_ref().is_some_and(|model| model.version == *version)
        };
        (0..self.devices.len()).filter(|index| told(&self.devices[*index])).collect()
    }

    /// Every device serves its running model for some hours: `(answers an hour, share of errors)`,
    /// given whether that is version 1.1.0.
    fn serve(&mut self, hours: f64, traffic: impl Fn(bool) -> (f64, f64)) {
        for device in &mut self.devices {
            let Some(report) = &mut device.report else { continue };
            let Some(running) = &report.running else { continue };
            let (requests, errors) = traffic(running.version == semver::Version::new(1, 1, 0));
            let requests = requests * hours;
            let answered = (requests * (1.0 - errors)).round() as u64;
            let more = EvidenceCounts {
                serving_s: hours * 3_600.0,
                answered,
                errors: (requests * errors).round() as u64,
                first_tokens: answered,
                first_token_ln_ms: answered as f64 * 4.0,
                decoded_tokens: answered * 20,
                decode_ms: answered as f64 * 400.0,
                peak_memory_bytes: 1 << 28,
                ..EvidenceCounts::default()
            };
            let ours = report.evidence.take().filter(|known| known.manifest == running.manifest);
            let (known, replay) = ours.map(|it| (it.counts, it.replay)).unwrap_or_default();
            let (manifest, counts) = (running.manifest, known.plus(more));
            report.evidence = Some(Evidence { manifest, counts, replay });
        }
        self.now += SignedDuration::from_secs((hours * 3_600.0) as i64);
        self.devices.iter_mut().for_each(|device| device.last_seen = self.now);
    }
}

#[test]
fn gate_holds_until_a_loss_is_excluded_and_then_promotes() {
    let (mut fleet, id) = gated(GatePolicy::default());
    assert_eq!(fleet.canaries(&id).len(), 15);
    let waits = fleet.rollout(&id).waiting_for.clone();
    assert!(
        waits.starts_with("the gate of wave 1: compares 15 devices with 45 devices"),
        "{waits}"
    );
    assert_eq!(fleet.deadline, Some(fleet.now + SignedDuration::from_secs(300)));
    // Too little is known yet: it says how much more it takes.
    fleet.serve(0.25, |_| (8.0, 0.0));
    fleet.tick();
    let waits = fleet.rollout(&id).waiting_for.clone();
    assert!(waits.contains("errors:") && waits.contains("more device-hours"), "{waits}");
    assert_eq!(fleet.rollout(&id).current_wave, 0);
    fleet.serve(48.0, |_| (20.0, 0.02));
    fleet.tick();
    assert_eq!(fleet.rollout(&id).current_wave, 1);
    assert_eq!(fleet.canaries(&id).len(), 60);
    let text = why(fleet.rollout(&id));
    assert!(text.contains("gate of wave 1 passed: a greater loss than allowed"), "{text}");
    assert!(text.contains("errors: 1.98 % against 1.98 %"), "{text}");
}

/// One canary of three devices: nothing that devices are compared in could ever tell.
#[test]
fn a_replay_settles_what_a_small_fleet_cannot_compare() {
    let start = || {
        let mut fleet = Fleet::new(&[400; 3]);
        fleet.start("1.0.0", RolloutPolicy { waves: vec![], ..RolloutPolicy::default() }).unwrap();
        (0..3).for_each(|device| fleet.report(device, Phase::Confirmed));
        fleet.tick();
        fleet.serve(24.0, |_| (5.0, 0.02));
        let allow = [(Metric::Replay, 100)].into();
        let gate = Some(GatePolicy { allow, ..GatePolicy::default() });
        let policy = RolloutPolicy { waves: vec![WaveSize::Count(1)], gate, ..Default::default() };
        let id = fleet.start("1.1.0", policy).unwrap();
        let [canary] = fleet.canaries(&id)[..] else { panic!("one canary") };
        fleet.report(canary, Phase::Confirmed);
        fleet.serve(0.0, |_| (0.0, 0.0));
        fleet.tick();
        (fleet, id, canary)
    };
    let replayed = |fleet: &mut Fleet, device: usize, losses_nats: Vec<f64>| {
        let evidence = fleet.devices[device].report.as_mut().unwrap().evidence.as_mut().unwrap();
        evidence.replay = Some(Replay { before: evidence.manifest, losses_nats });
        fleet.serve(0.1, |_| (5.0, 0.02));
        fleet.tick();
    };
    let (mut fleet, id, canary) = start();
    let waits = fleet.rollout(&id).waiting_for.clone();
    fleet.serve(0.1, |_| (5.0, 0.02));
    fleet.tick();
    let held = fleet.rollout(&id).waiting_for.clone();
    assert!(held.contains("replay: nothing counted to compare yet"), "{waits}; {held}");
    replayed(&mut fleet, canary, vec![0.4; 32]);
    let rollout = fleet.rollout(&id);
    assert_eq!(rollout.state, RolloutState::Halted, "{}", why(rollout));
    let text = why(rollout);
    assert!(text.contains("perplexity of the replayed answers ×1.492 of before"), "{text}");

    let (mut fleet, id, canary) = start();
    // As likely more as less.
    let noise = (0..32).map(|prompt| if prompt % 2 == 0 { 0.05 } else { -0.05 }).collect();
    replayed(&mut fleet, canary, noise);
    assert_eq!(fleet.rollout(&id).current_wave, 1, "{}", why(fleet.rollout(&id)));

    // What another device ran or lost says nothing of this wave.
    let (mut fleet, id, canary) = start();
    replayed(&mut fleet, (canary + 1) % 3, vec![0.4; 32]);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Running);
}

#[test]
fn gate_halts_a_release_with_more_errors_and_takes_it_back() {
    let (mut fleet, id) = gated(GatePolicy::default());
    let canaries = fleet.canaries(&id);
    fleet.serve(1.0, |new| (20.0, if new { 0.3 } else { 0.02 }));
    fleet.tick();
    let rollout = fleet.rollout(&id);
    assert_eq!(rollout.state, RolloutState::Halted, "{}", why(rollout));
    let failed = Outcome::Failed { failure: Failure::Worse { metric: Metric::Errors } };
    assert_eq!(rollout.devices.iter().filter(|part| part.outcome == failed).count(), 15);
    // Nobody is told it any more, and it is not offered again.
    assert_eq!(fleet.canaries(&id), [0_usize; 0]);
    for device in canaries {
        let told = fleet.devices[device].desired.model.as_ref().unwrap();
        assert_eq!(told.version, semver::Version::new(1, 0, 0));
    }
    assert_eq!(fleet.quarantine.len(), 1);
    assert!(why(fleet.rollout(&id)).contains("worse in errors"));
    fleet.operate(&id, Command::Resume).unwrap();
    assert_eq!(fleet.canaries(&id), [0_usize; 0]);
}

/// A canary that is switched off holds the weighing of the others up for no longer than it takes to
/// see that it does not ask; the controls that are off are left out alike.
#[test]
fn gate_weighs_what_is_there() {
    let mut fleet = Fleet::new(&[400; 60]);
    fleet.settle_on_1_0_0();
    fleet.serve(24.0, |_| (5.0, 0.02));
    let policy = RolloutPolicy {
        waves: vec![WaveSize::Count(15)],
        gate: Some(GatePolicy::default()),
        confirm_timeout_s: 7_200,
        ..Default::default()
    };
    let id = fleet.start("1.1.0", policy).unwrap();
    let canaries = fleet.canaries(&id);
    let off = [canaries[0], canaries[1], (0..60).find(|it| !canaries.contains(it)).unwrap()];
    for device in canaries.iter().filter(|device| !off.contains(device)) {
        fleet.report(*device, Phase::Confirmed);
    }
    let seen = fleet.now;
    let silent = seen - SignedDuration::from_secs(1);
    let serve = |fleet: &mut Fleet, hours: f64, of_new: f64| {
        fleet.serve(hours, |new| (20.0, if new { of_new } else { 0.02 }));
        off.iter().for_each(|device| fleet.devices[*device].last_seen = silent);
        fleet.tick();
    };
    serve(&mut fleet, 0.0, 0.0);
    assert!(fleet.rollout(&id).gate.is_none(), "they may yet ask");
    assert_eq!(fleet.deadline, Some(seen + SignedDuration::from_secs(300)));
    serve(&mut fleet, 0.1, 0.02);
    let rollout = fleet.rollout(&id);
    assert!(rollout.waiting_for.contains("to confirm; fails at"), "{}", rollout.waiting_for);
    assert!(
        rollout.waiting_for.contains("the gate of wave 1: compares 13 devices with 44 devices"),
        "{}",
        rollout.waiting_for
    );
    // It can halt, long before the silent ones count as failed.
    serve(&mut fleet, 1.0, 0.3);
    let rollout = fleet.rollout(&id);
    assert_eq!(rollout.state, RolloutState::Halted, "{}", why(rollout));
    assert!(why(rollout).contains("worse in errors"));
}

/// What is weighed together is what chance drew from: with waves of each site, the site's devices.
#[test]
fn gate_compares_within_what_waves_are_counted_in() {
    let mut fleet = Fleet::new(&[400; 60]);
    for device in 0..60 {
        fleet.site(device, if device < 20 { "out" } else { "well" });
    }
    fleet.settle_on_1_0_0();
    fleet.serve(24.0, |_| (20.0, 0.02));
    let policy = RolloutPolicy {
        waves: vec![WaveSize::Count(10)],
        per: WavePer::Site,
        gate: Some(GatePolicy::default()),
        ..Default::default()
    };
    let id = fleet.start("1.1.0", policy).unwrap();
    let canaries = fleet.canaries(&id);
    assert_eq!(canaries.iter().filter(|device| **device < 20).count(), 10);
    for device in canaries {
        fleet.report(device, Phase::Confirmed);
    }
    fleet.serve(0.0, |_| (0.0, 0.0));
    fleet.tick();
    // An outage of one site, whatever its devices run. Half the canaries are there, and a fifth of the
    // controls.
    let errors = |fleet: &mut Fleet| {
        for device in &mut fleet.devices[..20] {
            let evidence = device.report.as_mut().unwrap().evidence.as_mut().unwrap();
            evidence.counts.errors += 10;
        }
    };
    for _ in 0..5 {
        fleet.serve(1.0, |_| (20.0, 0.02));
        errors(&mut fleet);
        fleet.tick();
    }
    let rollout = fleet.rollout(&id);
    assert_eq!(rollout.state, RolloutState::Running, "{}", why(rollout));
    let errors = rollout.gate.as_ref().unwrap().metrics[0];
    assert!(errors.loss.abs() < 0.001 && errors.e_value < 1.0, "{errors:?}");
}

#[test]
fn gate_of_a_small_fleet_says_that_it_cannot_tell_and_patience_ends_it() {
    let policy = |patience_s| RolloutPolicy {
        waves: vec![WaveSize::Count(1)],
        gate: Some(GatePolicy { patience_s, ..GatePolicy::default() }),
        ..RolloutPolicy::default()
    };
    let mut fleet = Fleet::new(&[400; 3]);
    // The first release of all has nothing to be worse than.
    let first = fleet.start("1.0.0", policy(None)).unwrap();
    for _ in 0..2 {
        (0..3).for_each(|device| fleet.report(device, Phase::Confirmed));
        fleet.tick();
    }
    assert_eq!(fleet.rollout(&first).state, RolloutState::Completed);
    fleet.serve(24.0, |_| (20.0, 0.0));
    let id = fleet.start("1.1.0", policy(Some(7_200))).unwrap();
    for device in fleet.canaries(&id) {
        fleet.report(device, Phase::Confirmed);
    }
    fleet.serve(0.0, |_| (0.0, 0.0));
    fleet.tick();
    fleet.serve(1.0, |_| (20.0, 0.0));
    fleet.tick();
    let waits = fleet.rollout(&id).waiting_for.clone();
    assert!(waits.contains("too few devices to tell"), "{waits}");
    fleet.serve(1.5, |_| (20.0, 0.0));
    fleet.tick();
    assert_eq!(fleet.rollout(&id).current_wave, 1);
    assert!(why(fleet.rollout(&id)).contains("no harm was found in the time it had"));
}

#[test]
fn gate_out_of_bounds_is_refused() {
    let mut fleet = Fleet::new(&[400; 3]);
    for gate in [
        GatePolicy { alpha_per_mille: 0, ..GatePolicy::default() },
        GatePolicy { alpha_per_mille: 501, ..GatePolicy::default() },
        GatePolicy { allow: [(Metric::Errors, 0)].into(), ..GatePolicy::default() },
    ] {
        let policy = RolloutPolicy { gate: Some(gate), ..RolloutPolicy::default() };
        let refused = fleet.start("1.0.0", policy).unwrap_err();
        assert!(matches!(refused, RolloutError::Policy(_)), "{refused}");
    }
}

#[test]
fn a_large_wave_is_told_in_turns() {
    let most = step::MAX_TOLD_AT_ONCE;
    let mut fleet = Fleet::new(&vec![600; 2 * most + 5]);
    fleet.devices.sort_by(|a, b| a.id.cmp(&b.id));
    let policy = RolloutPolicy { waves: vec![WaveSize::Rest], ..RolloutPolicy::default() };
    let id: RolloutId = "r0".parse().unwrap();
    let created =
        create(id.clone(), asked("1.0.0", policy), "token test", &fleet.world(), &[]).unwrap();
    fleet.rollouts.push(created.record);
    let (mut targets, mut told) = (created.targets, Vec::new());
    loop {
        let active = fleet.active();
        let plan = plan(&fleet.world(), &active, std::mem::take(&mut targets));
        if plan.assignments.is_empty() {
            break;
        }
        told.push(plan.assignments.len());
        // Whoever is left is told at once, and what those before do is not weighed yet.
        let more = told.iter().sum::<usize>() < fleet.devices.len();
        assert_eq!(plan.deadline == Some(fleet.now), more, "{told:?}");
        let waits = plan.rollouts[0].rollout.waiting_for.clone();
        assert_eq!(waits.contains("their turn"), more, "{waits}");
        fleet.apply(plan);
    }
    assert_eq!(told, [most, most, 5]);
    let record = fleet.record(&id);
    assert!(record.rollout.devices.iter().all(|part| part.outcome == Outcome::Updating));
    let started = record.rollout.decisions.iter().filter(|it| it.what.starts_with("started wave"));
    assert_eq!(started.count(), 1, "a wave starts once");
}
