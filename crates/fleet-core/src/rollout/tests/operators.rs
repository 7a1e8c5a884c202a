//! What operators decide about devices, and what they are shown before a rollout.

use slmops_api::blueprint::Layer;
use slmops_api::channel::Channel;
use slmops_api::model::Requirements;
use slmops_api::orders::{Exclusion, NewPin, Orders, Pin};
use slmops_api::plan::RolloutPlan;

use super::*;

fn pin(version: &str) -> Option<Box<Orders>> {
    let pin = Pin {
        model: MODEL.parse().unwrap(),
        version: version.parse().unwrap(),
        reason: "certified".to_owned(),
        by: "token ann".to_owned(),
        at: Timestamp::UNIX_EPOCH,
    };
    Some(Box::new(Orders { pin: Some(pin), exclusion: None }))
}

fn exclusion() -> Option<Box<Orders>> {
    let exclusion = Exclusion {
        reason: "at the workshop".to_owned(),
        by: "token ann".to_owned(),
        at: Timestamp::UNIX_EPOCH,
    };
    Some(Box::new(Orders { pin: None, exclusion: Some(exclusion) }))
}

impl Fleet {
    fn order(&mut self, device: usize, orders: Option<Box<Orders>>) {
        self.devices[device].orders = orders;
        self.tick();
    }

    fn forecast(&self, version: &str, policy: RolloutPolicy) -> Result<RolloutPlan, RolloutError> {
        let world = self.world();
        let rollouts = self.rollouts.iter().rev().map(|record| &record.rollout);
        let pace = Pace::measure(&world, rollouts);
        forecast(asked(version, policy), "token test", &world, &self.active(), &pace)
    }

    fn check_pin(&self, device: usize, version: &str) -> String {
        let NewPin { model, version, .. } = NewPin {
            model: MODEL.parse().unwrap(),
            version: version.parse().unwrap(),
            reason: String::new(),
        };
        match check_pin(&self.world(), &self.devices[device], &model, &version) {
            Ok(()) => "good".to_owned(),
            Err(error) => format!("{error} ({})", error.hint()),
        }
    }
}

/// What a plan and a device are told of a disk that has no room for a second model.
#[test]
fn a_disk_without_room_is_told_before() {
    let mut fleet = Fleet::new(&[600, 600]);
    fleet.settle_on_1_0_0();
    let obeys = DeviceRules::ALL.map(str::to_owned).to_vec();
    let facts = DeviceFacts { disk_free_bytes: 20 << 20, obeys, ..testing::facts(600) };
    fleet.devices[0].facts = Arc::new(facts);
    let note = |fleet: &Fleet| fleet.forecast("1.1.0", all_at_once()).unwrap().notes.join("; ");
    let notes = note(&fleet);
    assert!(
        notes.starts_with("1 device without room for two models (dev-0): each waits"),
        "{notes}"
    );
    let layer = "[policy]\nreplace_in_place = true\n".to_owned();
    fleet.devices[0].config = Arc::new(resolve(&[(Layer::Fleet, layer)]).unwrap());
    let notes = note(&fleet);
    assert!(notes.contains("(dev-0): each gives up the one that it has"), "{notes}");

    fleet.start("1.1.0", all_at_once()).unwrap();
    let reason = |device: usize| fleet.devices[device].desired.reason.as_str();
    assert!(reason(0).contains("it gives up the one that runs"), "{}", reason(0));
    assert!(!reason(1).contains("gives up"), "{}", reason(1));
    assert!(fleet.devices[0].desired.rules.replace && !fleet.devices[1].desired.rules.replace);
}

#[test]
fn a_pinned_device_is_left_out_and_keeps_its_release() {
    let mut fleet = Fleet::new(&[600, 600, 600]);
    fleet.settle_on_1_0_0();
    fleet.order(1, pin("1.0.0"));
    let id = fleet.start("1.1.0", all_at_once()).unwrap();
    assert_eq!(fleet.on("1.1.0"), [0, 2]);
    let text = why(fleet.rollout(&id));
    assert!(text.contains("left out dev-1: pinned to m 1.0.0 by token ann: certified"), "{text}");
    fleet.confirm(0);
    fleet.confirm(2);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
    // Pinned forwards it is told so without any rollout, and unpinned it keeps that.
    fleet.order(1, pin("1.2.0"));
    assert_eq!(fleet.told(1), "1.2.0 q8_0");
    assert!(fleet.devices[1].desired.reason.starts_with("pinned to m 1.2.0 by token ann"));
    fleet.order(1, None);
    assert_eq!(fleet.told(1), "1.2.0 q8_0");
}

#[test]
fn a_pin_takes_a_device_out_of_a_rollout_under_way() {
    let mut fleet = Fleet::new(&[600, 600, 600]);
    fleet.settle_on_1_0_0();
    let policy = RolloutPolicy { max_failures: 0, ..RolloutPolicy::default() };
    let id = fleet.start("1.1.0", policy).unwrap();
    fleet.confirm(0);
    assert_eq!(fleet.on("1.1.0"), [0, 1, 2]);
    fleet.order(0, pin("1.0.0"));
    fleet.order(1, exclusion());
    assert_eq!([fleet.told(0), fleet.told(1)], ["1.0.0 q8_0", "1.1.0 q8_0"]);
    let left: Vec<&str> = fleet.rollout(&id).devices.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(left, ["dev-2"], "{}", why(fleet.rollout(&id)));
    // What they do now is no evidence about the rollout's release.
    fleet.fail(0);
    fleet.fail(1);
    fleet.confirm(2);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed, "{}", why(fleet.rollout(&id)));
}

#[test]
fn rollbacks_leave_pinned_devices_alone_and_say_so() {
    let mut fleet = Fleet::new(&[600, 600]);
    fleet.settle_on_1_0_0();
    let id = fleet.start("1.1.0", all_at_once()).unwrap();
    fleet.confirm(0);
    fleet.confirm(1);
    fleet.order(0, pin("1.1.0"));
    fleet.order(1, exclusion());
    fleet.operate(&id, Command::Rollback).unwrap();
    // The excluded one got the release from this rollout, so it gives it back.
    assert_eq!([fleet.told(0), fleet.told(1)], ["1.1.0 q8_0", "1.0.0 q8_0"]);
    let text = why(fleet.rollout(&id));
    let line = "not taken back: dev-0 (pinned to m 1.1.0 by token ann: certified)";
    assert!(text.contains(line), "{text}");
    assert!(text.contains("1 device told to go back"), "{text}");
}

#[test]
fn a_device_that_fails_what_it_is_pinned_to_is_not_told_back_and_forth() {
    let mut fleet = Fleet::new(&[600]);
    fleet.settle_on_1_0_0();
    fleet.order(0, pin("1.1.0"));
    fleet.fail(0);
    let generation = fleet.devices[0].desired.generation;
    fleet.pass_s(60);
    fleet.tick();
    assert_eq!(fleet.devices[0].desired.generation, generation);
    assert_eq!(fleet.told(0), "1.1.0 q8_0");
}

#[test]
fn pins_that_cannot_hold_are_refused_with_the_reason() {
    let mut fleet = Fleet::new(&[600, 600, 30]);
    fleet.settle_on_1_0_0();
    assert_eq!(fleet.check_pin(0, "1.1.0"), "good");
    assert!(fleet.check_pin(0, "9.0.0").starts_with("release m 9.0.0 is not registered"));
    let small = fleet.check_pin(2, "1.1.0");
    assert!(small.contains("dev-2 cannot be pinned to m 1.1.0: no variant fits"), "{small}");
    fleet.start("1.1.0", RolloutPolicy::default()).unwrap();
    fleet.fail(0);
    let own = fleet.check_pin(0, "1.1.0");
    assert!(own.contains("failed on this very device"), "{own}");
    let class = fleet.check_pin(1, "1.1.0");
    assert!(class.contains("is quarantined for class large"), "{class}");
    assert!(class.contains("slm quarantine lift"), "{class}");
    // What was quarantined after the pin is not told either.
    fleet.order(1, pin("1.1.0"));
    assert_eq!(fleet.told(1), "1.0.0 q8_0");
    fleet.quarantine.clear();
    fleet.tick();
    assert_eq!(fleet.told(1), "1.1.0 q8_0");
}

#[test]
fn a_halt_says_what_is_quarantined_and_how_to_lift_it() {
    let mut fleet = Fleet::new(&[600, 600]);
    fleet.settle_on_1_0_0();
    let id = fleet.start("1.1.0", RolloutPolicy::default()).unwrap();
    fleet.fail(0);
    let text = why(fleet.rollout(&id));
    assert!(text.contains("is not offered to class large again, unless lifted"), "{text}");
    let manifest = testing::variant(MODEL, "1.1.0", "q8_0", 300, 0.001).manifest.short();
    assert!(text.contains(&format!("slm quarantine lift {manifest} --class large")), "{text}");
}

#[test]
fn a_forecast_is_what_happens_then() {
    let mut fleet = Fleet::new(&[600, 360, 600, 600, 30, 600]);
    for (device, site) in [(0, "berlin"), (1, "berlin"), (2, "paris"), (3, "paris")] {
        fleet.site(device, site);
    }
    let policy = RolloutPolicy {
        waves: vec![WaveSize::Count(1), WaveSize::Rest],
        per: WavePer::Site,
        approvals: vec![ApprovalStep { wave: 2, by: vec!["ann".to_owned()] }],
        ..RolloutPolicy::default()
    };
    fleet.order(5, exclusion());
    let plan = fleet.forecast("1.0.0", policy.clone()).unwrap();
    assert!(fleet.rollouts.is_empty(), "a forecast keeps nothing");
    assert_eq!((plan.expected_s, plan.waves.len()), (None, 2), "nothing is known of the links");
    let out: Vec<(&str, &str)> =
        plan.left_out.iter().map(|it| (it.name.as_str(), &it.why[..16])).collect();
    assert_eq!(out, [("dev-4", "no variant fits:"), ("dev-5", "excluded by toke")]);
    assert_eq!(plan.waves[1].waits, ["approval by ann"]);
    let large = testing::variant(MODEL, "1.0.0", "q8_0", 300, 0.001).size_bytes;
    let medium = testing::variant(MODEL, "1.0.0", "q4_k_m", 150, 0.05).size_bytes;
    assert_eq!(plan.transfer_bytes, 3 * large + medium);

    let id = fleet.start("1.0.0", policy).unwrap();
    let real: Vec<(u32, &str, Option<&str>)> = fleet
        .rollout(&id)
        .devices
        .iter()
        .filter(|part| part.outcome != Outcome::NoFit { smallest_bytes: 0, budget_bytes: 0 })
        .filter(|part| !matches!(part.outcome, Outcome::NoFit { .. }))
        .map(|it| (it.wave + 1, it.name.as_str(), it.variant.as_ref().map(|v| v.as_str())))
        .collect();
    let foretold: Vec<(u32, &str, Option<&str>)> = plan
        .waves
        .iter()
        .flat_map(|wave| wave.devices.iter().map(|device| (wave.wave, device)))
        .map(|(wave, it)| (wave, it.name.as_str(), it.variant.as_ref().map(|v| v.as_str())))
        .collect();
    assert_eq!(foretold, real);
    let at_once = |it: &slmops_api::plan::PlannedDevice| it.outcome == Outcome::Updating;
    assert!(plan.waves[0].devices.iter().all(at_once));
    assert!(!plan.waves[1].devices.iter().any(at_once));
    let refused = fleet.forecast("1.1.0", all_at_once()).unwrap_err().to_string();
    assert!(refused.starts_with("rollout r0 of m 1.0.0 is running on dev-"), "{refused}");

    // What a running one will do: less, as it goes on.
    let world = fleet.world();
    let pace = Pace::default();
    let ahead = foresee(&id, &world, &fleet.active(), &pace).unwrap();
    assert_eq!(ahead.waves.len(), 2);
    assert!(ahead.waiting_for.starts_with("wave 1 of 2"), "{}", ahead.waiting_for);
}

#[test]
fn expected_time_is_what_releases_took_before() {
    let mut fleet = Fleet::new(&[600, 600, 600, 600]);
    fleet.start("1.0.0", all_at_once()).unwrap();
    for (device, took_s) in [(0, 100), (1, 100), (2, 200)] {
        fleet.now = fleet.at(took_s);
        fleet.confirm(device);
    }
    fleet.confirm(3);
    // 100, 200, 400 and 400 seconds; the same size again.
    let time = |policy: RolloutPolicy| fleet.forecast("1.1.0", policy).unwrap().expected_s;
    assert_eq!(time(all_at_once()), Some(400));
    let waves = vec![WaveSize::Count(2), WaveSize::Rest];
    assert_eq!(time(RolloutPolicy { waves, bake_s: 50, ..RolloutPolicy::default() }), Some(700));
    let limits = Limits { updating: Some(2), ..Limits::default() };
    assert_eq!(time(RolloutPolicy { limits, ..all_at_once() }), Some(550));
    // A device that never took one is judged by its class.
    fleet.join(600);
    assert_eq!(fleet.forecast("1.1.0", all_at_once()).unwrap().expected_s, Some(400));
    // What it has already costs nothing.
    let again = fleet.forecast("1.0.0", all_at_once()).unwrap();
    let devices = &again.waves[0].devices;
    let fetching: Vec<&str> =
        devices.iter().filter(|it| it.transfer_bytes > 0).map(|it| it.name.as_str()).collect();
    assert_eq!(fetching, ["dev-4"]);
}

fn channel(name: &str, after: Option<&str>) -> Channel {
    Channel {
        name: name.parse().unwrap(),
        after: after.map(|after| after.parse().unwrap()),
        policy: all_at_once(),
    }
}

impl Fleet {
    fn follow(&mut self, device: usize, channel: &str) {
        let layer = (Layer::Fleet, format!("channel = \"{channel}\""));
        self.devices[device].config = Arc::new(resolve(&[layer]).unwrap());
        self.tick();
    }

    fn promote(
        &mut self,
        version: &str,
        channel: &Channel,
        force: Option<&str>,
    ) -> Result<RolloutId, RolloutError> {
        let (model, version) = (MODEL.parse().unwrap(), version.parse().unwrap());
        let force = force.map(str::to_owned);
        let asked = promote(&self.world(), &model, &version, channel, force)?;
        self.start_asked(asked)
    }
}

#[test]
fn releases_pass_the_channels_one_after_the_other() {
    let mut fleet = Fleet::new(&[600, 600, 600]);
    let (edge, beta) = (channel("edge", None), channel("beta", Some("edge")));
    fleet.follow(0, "edge");
    fleet.follow(1, "beta");
    let refused = fleet.promote("1.0.0", &beta, None).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "m 1.0.0 was not confirmed on channel edge, so it cannot come to beta"
    );
    assert!(refused.hint().contains("--force --reason"), "{}", refused.hint());
    let first = fleet.promote("1.0.0", &edge, None).unwrap();
    assert_eq!(fleet.on("1.0.0"), [0]);
    // Under way is not confirmed yet.
    assert!(fleet.promote("1.0.0", &beta, None).is_err());
    fleet.confirm(0);
    assert_eq!(fleet.rollout(&first).state, RolloutState::Completed);
    let second = fleet.promote("1.0.0", &beta, None).unwrap();
    assert_eq!(fleet.on("1.0.0"), [0, 1]);
    let text = why(fleet.rollout(&second));
    assert!(text.contains("promoted to channel beta: confirmed on edge"), "{text}");
    fleet.confirm(1);

    // In spite of the order, with a reason that `why` keeps.
    let forced = fleet.promote("1.1.0", &beta, Some("the customer asked")).unwrap();
    let text = why(fleet.rollout(&forced));
    let line = "promoted to channel beta though not confirmed on edge: the customer asked";
    assert!(text.contains(line), "{text}");
    assert_eq!(fleet.on("1.1.0"), [1]);
    assert!(fleet.promote("9.0.0", &edge, None).is_err());
}

#[test]
fn who_follows_a_channel_takes_its_releases_alone() {
    let mut fleet = Fleet::new(&[600, 600]);
    let edge = channel("edge", None);
    fleet.follow(0, "edge");
    let id = fleet.start("1.0.0", all_at_once()).unwrap();
    assert_eq!(fleet.on("1.0.0"), [1]);
    let text = why(fleet.rollout(&id));
    assert!(text.contains("left out dev-0: it follows channel edge"), "{text}");
    fleet.confirm(1);
    fleet.tick();
    assert_eq!(fleet.told(0), "nothing", "not by a completed rollout either");
    fleet.promote("1.1.0", &edge, None).unwrap();
    fleet.confirm(0);
    // Each newcomer takes what was completed for its like.
    fleet.join(600);
    fleet.follow(2, "edge");
    fleet.join(600);
    fleet.follow(3, "beta");
    assert_eq!([fleet.told(2), fleet.told(3)], ["1.1.0 q8_0", "nothing"]);
    // One that comes to follow a channel later keeps what it has until the next promotion.
    fleet.follow(1, "edge");
    assert_eq!(fleet.told(1), "1.0.0 q8_0");
    let next = fleet.promote("1.2.0", &edge, None).unwrap();
    assert_eq!(fleet.on("1.2.0"), [0, 1, 2]);
    // Taken back, they have what they had on the channel, newcomers too.
    for device in [0, 1, 2] {
        fleet.confirm(device);
    }
    fleet.join(600);
    fleet.follow(4, "edge");
    assert_eq!(fleet.told(4), "1.2.0 q8_0");
    fleet.operate(&next, Command::Rollback).unwrap();
    assert_eq!(fleet.on("1.2.0"), Vec::<usize>::new());
    assert_eq!(fleet.on("1.1.0"), [0, 2, 4]);
}

#[test]
fn devices_that_lack_what_a_release_requires_are_left_out_until_they_have_it() {
    let mut fleet = Fleet::new(&[600, 600, 600]);
    fleet.settle_on_1_0_0();
    let key = (MODEL.parse().unwrap(), "1.1.0".parse().unwrap());
    let mut release = testing::release(MODEL, "1.1.0");
    release.requires =
        Requirements { engine: Some("0.0.7100".to_owned()), agent: Some("0.2.0".to_owned()) };
    fleet.releases.insert(key, Arc::new(release));
    let has = |engine: &str, agent: &str| {
        let (engine, agent_version) = (engine.to_owned(), agent.to_owned());
        Arc::new(DeviceFacts { engine, agent_version, ..testing::facts(600) })
    };
    fleet.devices[0].facts = has("llama.cpp 0.0.7100 (AVX2)", "0.10.1");
    fleet.devices[1].facts = has("llama.cpp 0.0.7099 (AVX2)", "0.2.0");
    fleet.devices[2].facts = has("llama.cpp 0.0.8000", "0.1.9");
    let id = fleet.start("1.1.0", all_at_once()).unwrap();
    assert_eq!(fleet.on("1.1.0"), [0]);
    let text = why(fleet.rollout(&id));
    for line in [
        "left out dev-1: it needs the engine 0.0.7100 or later, and this device has llama.cpp 0.0.7099",
        "left out dev-2: it needs agent 0.2.0 or later, and this device has 0.1.9",
    ] {
        assert!(text.contains(line), "{text}");
    }
    let pin = fleet.check_pin(1, "1.1.0");
    assert!(pin.contains("it needs the engine 0.0.7100"), "{pin}");
    // One that is updated meanwhile joins, one that is updated later takes the completed release.
    fleet.devices[1].facts = has("llama.cpp 0.0.7100", "0.2.0");
    fleet.tick();
    assert_eq!(fleet.on("1.1.0"), [0, 1]);
    fleet.confirm(0);
    fleet.confirm(1);
    assert_eq!(fleet.rollout(&id).state, RolloutState::Completed);
    fleet.join(600);
    fleet.tick();
    assert_eq!(fleet.told(3), "1.0.0 q8_0", "the newest one whose requirements it meets");
    Arc::make_mut(&mut fleet.devices[2].desired).model = None;
    fleet.devices[2].facts = has("llama.cpp 0.0.8000", "0.2.0");
    fleet.tick();
    assert_eq!(fleet.told(2), "1.1.0 q8_0");
}
