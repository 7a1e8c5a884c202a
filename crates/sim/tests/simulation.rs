//! Fixed seeds, random ones, saved runs, and proof that the simulator notices what it should.

use std::path::PathBuf;

use slmops_api::gate::{GatePolicy, Metric};
use slmops_api::rollout::{ApprovalStep, RolloutState, WaveSize};
use slmops_sim::{
    Action, Ailment, FaultSpec, FleetSpec, Health, Manner, Operation, Report, Sabotage, Scenario,
    Time, shrink_as, simulate,
};

/// Seeds of each test run.
const FIXED_SEEDS: u64 = 150;

fn strict() -> Manner {
    Manner { compare_plans: true, stop_at_violation: true, sabotage: None }
}

fn reproductions() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("reproductions")
}

/// Runs a scenario; one that fails is shrunk and saved before the test says so.
fn check(name: &str, scenario: &Scenario) {
    let report = scenario.run_as(strict()).expect("a scenario within bounds");
    let Some(first) = report.violations.first() else { return };
    let (small, violation) = shrink_as(scenario, strict()).expect("a failing run fails again");
    let path = reproductions().join(format!("{name}.txt"));
    let text = format!("# at {}: {}\n{small}", violation.at, violation.what);
    std::fs::write(&path, &text).expect("the failing run is saved");
    panic!("{name}: at {}: {}\nsaved as {}\n{text}", first.at, first.what, path.display());
}

fn check_seeds(first: u64, count: u64) {
    for seed in first..first + count {
        check(&format!("seed-{seed}"), &Scenario::random(seed));
    }
}

#[test]
fn invariants_hold_and_fleets_come_to_rest() {
    check_seeds(0, FIXED_SEEDS);
}

/// The nightly lane: `SLM_SIM_SEEDS=2000 SLM_SIM_FIRST_SEED=$(date +%s) cargo test --release -p
/// slmops-sim --test simulation random_seeds`. Without the variable it has nothing to do.
#[test]
fn random_seeds() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>());
    let Some(count) = number("SLM_SIM_SEEDS") else { return };
    let first = number("SLM_SIM_FIRST_SEED").unwrap_or(Ok(1_000_000));
    check_seeds(first.expect("a number"), count.expect("a number"));
}

/// Runs that failed once. Each file is replayed; none may fail again.
#[test]
fn saved_runs_hold() {
    for entry in std::fs::read_dir(reproductions()).expect("the folder of saved runs") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "txt") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a saved run");
        let scenario: Scenario = text.parse().expect("a scenario");
        let report = scenario.run_as(strict()).expect("a scenario within bounds");
        assert_eq!(report.violations, [], "{}", path.display());
    }
}

#[test]
fn scenarios_survive_being_written() {
    for seed in 0..50 {
        let scenario = Scenario::random(seed);
        let again: Scenario = scenario.to_string().parse().expect("what was written can be read");
        assert_eq!(again, scenario);
    }
    assert!("{}\n".parse::<Scenario>().is_err());
    assert!("at 00:00:01 frobnicate device 3".parse::<Operation>().is_err());
    assert!("at 00:61:00 crash device 3".parse::<Operation>().is_err());
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let scenario = Scenario::random(11);
    assert_eq!(scenario.run().unwrap(), scenario.run().unwrap());
}

fn report_of(spec: &FleetSpec) -> Report {
    let report = simulate(spec).expect("a specification within bounds");
    assert_eq!(report.violations, []);
    report
}

#[test]
fn a_good_release_reaches_everyone() {
    let report = report_of(&FleetSpec::new(90, 8, 3));
    assert!(report.svg().contains("</svg>"));
    let rollout = &report.rollouts[0];
    assert_eq!(rollout.state, Some(RolloutState::Completed));
    assert_eq!(rollout.confirmed(), 90);
    // Ten, a tenth, the rest: one after the other.
    let waves: Vec<u32> = rollout.waves.iter().map(|wave| wave.devices).collect();
    assert_eq!(waves, [10, 9, 71]);
    assert!(rollout.waves.windows(2).all(|pair| pair[0].ended_at <= pair[1].started_at));
    assert!(rollout.waves[2].ended_at <= rollout.ended_at && rollout.ended_at.is_some());
    for group in &rollout.groups {
        assert_eq!(group.outcomes["confirmed"], group.devices);
        assert!(group.half_confirmed_at <= group.last_confirmed_at);
    }
    let moved: u64 = rollout.groups.iter().map(|group| group.bytes_moved).sum();
    assert_eq!(moved, rollout.bytes_moved);
    assert!(rollout.first_confirmed_at < rollout.last_confirmed_at);
    // Each device pulls one of the two variants, and nothing twice.
    assert_eq!(rollout.bytes_moved, 60 * 105_454_144 + 30 * 144_811_072 + 90 * 20_000);
    assert!(rollout.chart().contains('█'));
}

#[test]
fn a_bad_release_stays_in_its_canary() {
    for ailment in Ailment::ALL {
        let mut spec = FleetSpec::new(60, 8, 5);
        spec.rollouts[0].health = Health::Bad { ailment, share: 1.0 };
        let rollout = report_of(&spec).rollouts.remove(0);
        assert_eq!(rollout.state, Some(RolloutState::Halted), "{ailment:?}");
        assert_eq!(rollout.outcomes["pending"], 50, "{ailment:?}: {:?}", rollout.outcomes);
        let failed: u32 = rollout.failures.values().sum();
        assert_eq!(failed, rollout.outcomes["failed"], "{ailment:?}: {:?}", rollout.failures);
        assert!(rollout.confirmed() == 0 || ailment == Ailment::CrashLoops, "{ailment:?}");
    }
}

#[test]
fn slow_links_and_offline_hours_take_their_time() {
    let mut spec = FleetSpec::new(9, 24, 3);
    let fast = report_of(&spec).rollouts.remove(0).last_confirmed_at.unwrap();
    for group in &mut spec.groups {
        group.link.bits_per_s = 1_000_000;
    }
    spec.rollouts[0].policy.confirm_timeout_s = 40_000;
    let slow = report_of(&spec).rollouts.remove(0).last_confirmed_at.unwrap();
    // 105 MB at 1 Mbit/s are 844 s, at 8 Mbit/s 105 s.
    assert!(slow.0 > fast.0 + 700_000, "{fast} and {slow}");
    for group in &mut spec.groups {
        let offline = slmops_sim::OfflineHours { from_hour: 0.1, to_hour: 6.0 };
        group.link.offline = vec![offline];
    }
    let offline = report_of(&spec).rollouts.remove(0).last_confirmed_at.unwrap();
    assert!(offline.0 > 6 * 3_600_000, "{offline}");
    assert!(offline.0 < 8 * 3_600_000, "{offline}");
}

#[test]
fn faults_of_every_kind_do_no_lasting_harm() {
    let mut spec = FleetSpec::new(60, 24, 9);
    spec.settle = true;
    spec.rollouts[0].policy.max_failures = 30;
    spec.faults = FaultSpec { broken_engines: 0.1, crashed_workers: 0.5, ..FaultSpec::every(2.0) };
    let report = report_of(&spec);
    assert!(report.settled_at.is_some());
    let confirmed = report.rollouts[0].confirmed();
    assert!(confirmed > 40, "{confirmed}: {:?}", report.rollouts[0].outcomes);
}

/// A shell broken on purpose: each is noticed, shrunk and can be read.
#[test]
fn sabotage_is_noticed() {
    let bad = |seed| {
        let mut spec = FleetSpec::new(30, 6, seed);
        let ailment = Ailment::FailsProbes;
        spec.rollouts[0].health = Health::Bad { ailment, share: 1.0 };
        Scenario::of(&spec).expect("a specification within bounds")
    };
    let zoned = |seed| {
        let mut spec = FleetSpec::new(30, 6, seed);
        spec.groups.iter_mut().for_each(|it| it.time_zone = Some("Asia/Kathmandu".to_owned()));
        spec.rollouts[0].policy.schedule.download_in = "01:00-03:00".parse().unwrap();
        Scenario::of(&spec).expect("a specification within bounds")
    };
    let noticed = |sabotage, scenario: &dyn Fn(u64) -> Scenario, words: &str| {
        let manner = Manner { sabotage: Some(sabotage), ..strict() };
        let found = (0..100).find_map(|seed| {
            let scenario = scenario(seed);
            let report = scenario.run_as(manner).expect("a scenario within bounds");
            let first = report.violations.first()?;
            first.what.contains(words).then_some(scenario)
        });
        let scenario = found.unwrap_or_else(|| panic!("{sabotage:?} goes unnoticed"));
        let (small, violation) = shrink_as(&scenario, manner).expect("a failing run fails again");
        assert!(violation.what.contains(words), "{sabotage:?}: {}", violation.what);
        assert!(small.operations.len() <= 6, "{sabotage:?}:\n{small}");
        let again: Scenario = small.to_string().parse().expect("what was written can be read");
        assert!(!again.run_as(manner).unwrap().violations.is_empty());
        assert!(again.run_as(strict()).unwrap().violations.is_empty());
    };
    noticed(Sabotage::NeverHashes, &Scenario::random, "activates unverified bytes");
    noticed(Sabotage::ThanksBeforeStoring, &Scenario::random, "was acknowledged");
    noticed(Sabotage::TellsEveryone, &Scenario::random, "is told");
    noticed(Sabotage::RepeatsGenerations, &Scenario::random, "is followed by");
    noticed(Sabotage::CallsEveryLinkFree, &Scenario::random, "over a metered link");
    noticed(Sabotage::ForgetsItsTimeZone, &zoned, "outside of its hours");
    noticed(Sabotage::PassesEveryProbe, &bad, "past its first wave");
}

#[test]
fn a_specification_out_of_bounds_is_refused() {
    let refused = |change: fn(&mut FleetSpec)| {
        let mut spec = FleetSpec::new(3, 1, 1);
        change(&mut spec);
        simulate(&spec).unwrap_err().to_string()
    };
    assert!(refused(|spec| spec.groups.clear()).contains("0 devices"));
    assert!(refused(|spec| spec.hours = 0).contains("0 hours"));
    assert!(refused(|spec| spec.faults.power_cuts = f64::NAN).contains("a day"));
    assert!(refused(|spec| spec.rollouts.push(spec.rollouts[0].clone())).contains("1.1.0"));
    assert!(refused(|spec| spec.groups[0].link.loss = 2.0).contains("loss"));
    let nowhere = |spec: &mut FleetSpec| spec.groups[0].time_zone = Some("Mars/Olympus".to_owned());
    assert!(refused(nowhere).contains("no time zone"));
    assert!(refused(|spec| spec.traffic.error_rate = 2.0).contains("error_rate"));
    assert!(refused(|spec| spec.traffic.requests_per_hour = 1e9).contains("requests"));
    assert!(
        refused(|spec| {
            let metric = Metric::Crashes;
            spec.rollouts[0].health = Health::WorseInUse { metric, factor: 5.0 };
        })
        .contains("crash_loops")
    );
}

#[test]
fn an_operator_who_goes_on_meets_the_quarantine() {
    let mut spec = FleetSpec::new(60, 4, 5);
    let ailment = Ailment::FailsProbes;
    spec.rollouts[0].health = Health::Bad { ailment, share: 1.0 };
    let mut scenario = Scenario::of(&spec).unwrap();
    scenario.operations.push("at 01:00:00 operator resume".parse().unwrap());
    let report = scenario.run_as(strict()).unwrap();
    assert_eq!(report.violations, []);
    // All of the canaries are small; the others of their class are spared.
    assert!(report.rollouts[0].outcomes["quarantined"] >= 5, "{:?}", report.rollouts[0].outcomes);
}

/// A run by hand: the power goes while the ledger is written, right after the switch.
#[test]
fn a_crash_at_an_effect_is_where_it_says() {
    let mut scenario = Scenario::of(&FleetSpec::new(3, 4, 1)).unwrap();
    let action: Action = "at 00:10:00 crash device 0 before effect Activate"
        .parse::<Operation>()
        .map(|operation| operation.action)
        .unwrap();
    scenario.operations.push(Operation { at: Time(600_000), action });
    let report = scenario.run_as(strict()).unwrap();
    assert_eq!(report.violations, []);
    assert_eq!(report.rollouts[0].confirmed(), 3);
    let plain = simulate(&FleetSpec::new(3, 4, 1)).unwrap();
    assert!(report.rollouts[0].last_confirmed_at > plain.rollouts[0].last_confirmed_at);
}

/// A fleet with a gate after its canary of 60 devices.
fn gated(seed: u64, health: Health) -> FleetSpec {
    let mut spec = FleetSpec::new(300, 12, seed);
    let rollout = &mut spec.rollouts[0];
    rollout.policy.waves = vec![WaveSize::Count(60), WaveSize::Rest];
    rollout.policy.bake_s = 0;
    rollout.policy.gate = Some(GatePolicy::default());
    rollout.health = health;
    spec
}

/// The whole way: users, counters, reports, planner. At most a wave in ten may slip through the gate
/// (its bound is one of 95 %), and none does.
#[test]
fn a_release_that_is_five_times_worse_in_use_stays_in_its_canary() {
    for (metric, factor) in [(Metric::Errors, 5.0), (Metric::FirstToken, 2.0)] {
        for seed in 0..10 {
            let rollout =
                report_of(&gated(seed, Health::WorseInUse { metric, factor })).rollouts.remove(0);
            assert_eq!(rollout.state, Some(RolloutState::Halted), "{metric}, seed {seed}");
            assert_eq!(rollout.outcomes["pending"], 240, "{metric}, seed {seed}");
            let why = rollout.failures.keys().next().expect("devices failed");
            assert!(why.contains(metric.name()), "{why}");
            assert_eq!(rollout.confirmed(), 0, "taken back");
        }
    }
}

/// One canary of five devices: nobody to compare it with is like enough, and the replay needs nobody.
#[test]
fn a_small_fleet_sees_a_worse_release_in_its_replay() {
    let run = |seed, health| {
        let mut spec = gated(seed, health);
        spec.groups.truncate(1);
        spec.groups[0].devices = 5;
        let policy = &mut spec.rollouts[0].policy;
        policy.waves = vec![WaveSize::Count(1), WaveSize::Rest];
        policy.gate.as_mut().unwrap().allow = [(Metric::Replay, 100)].into();
        report_of(&spec).rollouts.remove(0)
    };
    for seed in 0..10 {
        let worse = Health::WorseInUse { metric: Metric::Replay, factor: 1.6 };
        let rollout = run(seed, worse);
        assert_eq!(rollout.state, Some(RolloutState::Halted), "{}", rollout.waiting_for);
        assert_eq!(rollout.outcomes["pending"], 4);
        let rollout = run(seed, Health::Good);
        assert_eq!(rollout.state, Some(RolloutState::Completed), "{}", rollout.waiting_for);
    }
}

/// At α = 1 %: of 40 releases that change nothing, two would be too many to be chance.
#[test]
fn a_release_that_is_the_same_in_use_is_not_halted() {
    let halted = (0..40).filter(|seed| {
        let rollout = report_of(&gated(*seed, Health::Good)).rollouts.remove(0);
        rollout.state == Some(RolloutState::Halted)
    });
    assert!(halted.count() <= 1);
}

/// What is shown to be no worse goes on; without users nothing can be shown, and patience ends it.
#[test]
fn a_gate_passes_what_it_has_seen_enough_of() {
    let mut spec = gated(1, Health::Good);
    spec.traffic.requests_per_hour = 120.0;
    spec.hours = 24;
    let rollout = report_of(&spec).rollouts.remove(0);
    assert_eq!(rollout.state, Some(RolloutState::Completed), "{}", rollout.waiting_for);
    let passed = |what: &str| rollout.decisions.iter().any(|it| it.what.contains(what));
    assert!(passed("a greater loss than allowed is excluded"));

    spec.traffic.requests_per_hour = 0.0;
    let rollout = report_of(&spec).rollouts.remove(0);
    assert_eq!(rollout.state, Some(RolloutState::Running));
    assert!(rollout.waiting_for.contains("nothing counted"), "{}", rollout.waiting_for);

    spec.rollouts[0].policy.gate.as_mut().unwrap().patience_s = Some(3_600);
    let rollout = report_of(&spec).rollouts.remove(0);
    assert_eq!(rollout.state, Some(RolloutState::Completed), "{}", rollout.waiting_for);
}

#[test]
fn approvals_are_given_when_they_are_asked_for() {
    let mut spec = FleetSpec::new(30, 12, 1);
    let step = |wave, by: &[&str]| ApprovalStep {
        wave,
        by: by.iter().map(|name| (*name).to_owned()).collect(),
    };
    spec.rollouts[0].policy.approvals = vec![step(1, &[]), step(2, &["ann"])];
    spec.approve_after = Time(2 * 3_600_000);
    let rollout = report_of(&spec).rollouts.remove(0);
    assert_eq!(rollout.state, Some(RolloutState::Completed), "{}", rollout.waiting_for);
    assert!(rollout.waves[0].started_at > Some(Time(2 * 3_600_000)));
    assert!(rollout.waves[1].started_at > Some(Time(4 * 3_600_000)));
}
