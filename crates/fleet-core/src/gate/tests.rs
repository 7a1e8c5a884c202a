use super::*;

/// A seeded stream of numbers (SplitMix64).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.next()).ln()).sqrt() * (std::f64::consts::TAU * self.next()).cos()
    }

    /// Knuth 1969, 3.4.1; fit for small means.
    fn poisson(&mut self, mean: f64) -> u64 {
        let (mut events, mut product, limit) = (0, self.next(), (-mean).exp());
        while product > limit {
            events += 1;
            product *= self.next();
        }
        events
    }
}

/// How a fleet behaves, whatever it runs.
#[derive(Clone, Copy, Debug)]
enum World {
    Identical,
    Heterogeneous,
    FleetWideShift,
    Drifting,
    Sparse,
}

/// What a release changes on the devices that run it.
#[derive(Clone, Copy, Debug)]
struct Effect {
    errors: f64,
    slowdown: f64,
}

const NONE: Effect = Effect { errors: 1.0, slowdown: 1.0 };
/// Requests of a device in a quarter of an hour, and the share of them that fails.
const REQUESTS: f64 = 2.0;
const ERROR_RATE: f64 = 0.02;

struct Device {
    traffic: f64,
    error_rate: f64,
    slow: f64,
    drift: f64,
    compared: Compared,
}

struct Fleet {
    world: World,
    devices: Vec<Device>,
    canaries: usize,
    effect: Effect,
    random: Random,
}

impl Fleet {
    /// The first `canaries` have the release; devices are alike but for chance, so that none needs
    /// to be shuffled. Each has counted two days of the model before.
    fn new(world: World, devices: usize, canaries: usize, effect: Effect, seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let device = |random: &mut Random| {
            let spread = if matches!(world, World::Identical) { 0.0 } else { 1.0 };
            Device {
                traffic: REQUESTS * if matches!(world, World::Sparse) { 0.05 } else { 1.0 },
                error_rate: (ERROR_RATE * (spread * random.normal()).exp()).min(0.5),
                slow: spread * 0.5 * random.normal(),
                drift: 0.0,
                compared: Compared::default(),
            }
        };
        let devices = (0..devices).map(|_| device(&mut random)).collect();
        let mut fleet = Self { world, devices, canaries, effect, random };
        for device in &mut fleet.devices {
            device.compared.before = pass(device, 192.0, NONE, 1.0, &mut fleet.random);
        }
        fleet
    }

    fn pass(&mut self, minutes: f64) {
        let shift = if matches!(self.world, World::FleetWideShift) { 4.0 } else { 1.0 };
        for (index, device) in self.devices.iter_mut().enumerate() {
            if matches!(self.world, World::Drifting) {
                device.drift += 0.3 * self.random.normal() * (minutes / 15.0).sqrt();
            }
            let effect = if index < self.canaries { self.effect } else { NONE };
            let more = pass(device, minutes / 15.0, effect, shift, &mut self.random);
            device.compared.after = device.compared.after.plus(more);
        }
    }

    fn stratum(&self) -> Stratum {
        let all: Vec<Compared> = self.devices.iter().map(|device| device.compared).collect();
        let (canaries, controls) = all.split_at(self.canaries);
        Stratum { canaries: canaries.to_vec(), controls: controls.to_vec() }
    }
}

/// What a device counts in some quarters of an hour.
fn pass(
    device: &Device,
    quarters: f64,
    effect: Effect,
    shift: f64,
    random: &mut Random,
) -> EvidenceCounts {
    let requests = random.poisson(device.traffic * quarters.min(48.0));
    let rate = (device.error_rate * shift * effect.errors * device.drift.exp()).min(0.9);
    let errors = (0..requests).filter(|_| random.next() < rate).count() as u64;
    let answered = requests - errors;
    let slow = device.slow + device.drift * 0.3 + shift.ln() * 0.2 + effect.slowdown.ln();
    let noise = 0.3 * random.normal() / (answered.max(1) as f64).sqrt();
    let json = (0..answered).filter(|_| random.next() < 0.3).count() as u64;
    let thumbs = (0..answered).filter(|_| random.next() < 0.1).count() as u64;
    let thumbs_down = (0..thumbs).filter(|_| random.next() < 0.2 + rate).count() as u64;
    EvidenceCounts {
        serving_s: quarters * 900.0,
        answered,
        errors,
        crashes: random.poisson(0.001 * quarters),
        empty: (0..answered).filter(|_| random.next() < rate / 4.0).count() as u64,
        truncated: (0..answered).filter(|_| random.next() < 0.1).count() as u64,
        repetitive: (0..answered).filter(|_| random.next() < rate / 2.0).count() as u64,
        refusals: (0..answered).filter(|_| random.next() < rate).count() as u64,
        json,
        invalid_json: (0..json).filter(|_| random.next() < rate).count() as u64,
        thumbs_up: thumbs - thumbs_down,
        thumbs_down,
        entropy_tokens: answered * 3,
        entropy_nats: answered as f64 * 3.0 * 1.5 * (slow * 0.1 + noise).exp(),
        first_tokens: answered,
        first_token_ln_ms: answered as f64 * (5.0 + slow + noise),
        decoded_tokens: answered * 20,
        decode_ms: answered as f64 * 20.0 * 50.0 * (slow + noise).exp(),
        peak_memory_bytes: (2e8 * (0.02 * random.normal()).exp()) as u64,
    }
}

/// Minutes until harm passed `halt_at`, as the hub would look; none within `hours`.
fn halted_after(mut fleet: Fleet, halt_at: f64, hours: u32) -> Option<u32> {
    let policy = GatePolicy::default();
    let (mut readings, mut elapsed_s) = (Vec::new(), 0);
    for number in 1.. {
        let wait_s = next_look_in_s(elapsed_s);
        elapsed_s += wait_s;
        if elapsed_s > hours * 3_600 {
            break;
        }
        fleet.pass(f64::from(wait_s) / 60.0);
        readings = look(&policy, &[fleet.stratum()], number, &readings);
        if harm(&GatePolicy::default(), &readings) >= halt_at {
            return Some(elapsed_s / 60);
        }
    }
    None
}

/// The claim itself, without the mercy of the allowed loss: whatever the world, at most 1 % of
/// releases that change nothing ever have an e-value of 100 or more.
fn false_alarms(world: World, runs: u64, devices: usize, canaries: usize) -> u64 {
    let policy = GatePolicy::default();
    let alarm = |seed: u64| {
        let mut fleet = Fleet::new(world, devices, canaries, NONE, seed + 1);
        let (mut readings, mut elapsed_s) = (Vec::new(), 0);
        for number in 1..=10 {
            let wait_s = next_look_in_s(elapsed_s);
            elapsed_s += wait_s;
            fleet.pass(f64::from(wait_s) / 60.0);
            readings = look(&policy, &[fleet.stratum()], number, &readings);
        }
        // They only grow: the last is the greatest. Whatever the loss looks like, all count.
        for reading in &mut readings {
            reading.loss = f64::INFINITY;
        }
        harm(&policy, &readings) >= 100.0
    };
    (0..runs).filter(|seed| alarm(*seed)).count() as u64
}

/// 10,000 releases that change nothing, looked at ten times; each world is a test of its own, so
/// that they run beside each other.
fn check_false_alarms(world: World) {
    let runs = 10_000;
    let alarms = false_alarms(world, runs, 30, 6);
    println!("{world:?}: {alarms} false alarms in {runs}");
    assert!(alarms <= runs / 100, "{world:?}: {alarms} false alarms in {runs}");
}

#[test]
fn no_false_alarms_where_devices_are_alike() {
    check_false_alarms(World::Identical);
}

#[test]
fn no_false_alarms_where_devices_differ() {
    check_false_alarms(World::Heterogeneous);
}

#[test]
fn no_false_alarms_where_the_whole_fleet_shifts() {
    check_false_alarms(World::FleetWideShift);
}

#[test]
fn no_false_alarms_where_devices_drift() {
    check_false_alarms(World::Drifting);
}

#[test]
fn no_false_alarms_where_little_happens() {
    check_false_alarms(World::Sparse);
}

#[test]
fn five_times_the_errors_are_seen_within_half_an_hour() {
    let effect = Effect { errors: 5.0, slowdown: 1.0 };
    let runs = 40;
    let within = |seed: u64| {
        let fleet = Fleet::new(World::Heterogeneous, 1_000, 50, effect, seed + 1);
        halted_after(fleet, 100.0, 1).is_some_and(|minutes| minutes <= 30)
    };
    let seen = (0..runs).filter(|seed| within(*seed)).count();
    assert!(seen as u64 * 10 >= runs * 8, "{seen} of {runs}");
}

/// The chance to be drawn is all the evidence there is: one canary of three can never tell.
#[test]
fn a_small_fleet_cannot_tell() {
    let effect = Effect { errors: 40.0, slowdown: 20.0 };
    let fleet = Fleet::new(World::Identical, 3, 1, effect, 1);
    assert_eq!(halted_after(fleet, 100.0, 24), None);
}

#[test]
fn a_release_that_is_no_worse_is_shown_to_be() {
    let policy = GatePolicy::default();
    let mut fleet = Fleet::new(World::Identical, 400, 100, NONE, 7);
    fleet.pass(5.0);
    let first = look(&policy, &[fleet.stratum()], 1, &[]);
    let errors = |readings: &[MetricReading]| {
        *readings.iter().find(|reading| reading.metric == Metric::Errors).unwrap()
    };
    assert!(errors(&first).loss_at_most.unwrap() > errors(&first).allowed);
    let needed = errors(&first).device_hours_needed.unwrap();
    assert!(needed > 1.0, "{needed}");
    fleet.pass(600.0);
    let second = look(&policy, &[fleet.stratum()], 2, &first);
    for metric in [Metric::Errors, Metric::FirstToken, Metric::TokenTime] {
        let reading = second.iter().find(|reading| reading.metric == metric).unwrap();
        assert!(reading.loss_at_most.unwrap() < reading.allowed, "{reading:?}");
        assert_eq!(reading.device_hours_needed, None);
    }
    assert_eq!(harm(&policy, &second), 0.0);
}

/// The number of device-hours that it says it takes is about what it takes.
#[test]
fn a_gate_that_holds_knows_how_long() {
    let policy = GatePolicy::default();
    let mut ratios = Vec::new();
    for seed in 1..=60 {
        let mut fleet = Fleet::new(World::Heterogeneous, 300, 60, NONE, seed);
        let (mut readings, mut elapsed_s, mut said) = (Vec::new(), 0, None);
        for number in 1..=40 {
            let wait_s = next_look_in_s(elapsed_s);
            elapsed_s += wait_s;
            fleet.pass(f64::from(wait_s) / 60.0);
            readings = look(&policy, &[fleet.stratum()], number, &readings);
            let errors = readings.iter().find(|reading| reading.metric == Metric::Errors);
            let Some(errors) = errors else { continue };
            let hours = f64::from(elapsed_s) / 3_600.0 * 60.0;
            // After some looks, so that there is something to go by.
            if number == 8 {
                said = errors.device_hours_needed.map(|needed| hours + needed);
            }
            if errors.loss_at_most.is_some_and(|at_most| at_most <= errors.allowed) {
                ratios.extend(said.map(|said| said / hours));
                break;
            }
        }
    }
    assert!(ratios.len() >= 40, "{} of 60 had to wait and passed", ratios.len());
    ratios.sort_by(f64::total_cmp);
    let [low, median, high] = [1, 2, 3].map(|quarter| ratios[ratios.len() * quarter / 4]);
    assert!((0.6..=1.6).contains(&median), "median {median}");
    assert!(low >= 0.25 && high <= 4.0, "quartiles {low} and {high}");
}

/// A loss just beyond what is allowed is let through in one of twenty rollouts, at most.
#[test]
fn a_greater_loss_is_rarely_let_through() {
    let policy = GatePolicy::default();
    let runs = 300;
    let passes = |seed: u64| {
        // The log-normal mean is e^½ times its median: 3.3 % of requests, and as many more.
        let effect = Effect { errors: 2.0, slowdown: 1.0 };
        let mut fleet = Fleet::new(World::Heterogeneous, 100, 30, effect, seed);
        let (mut readings, mut elapsed_s) = (Vec::new(), 0);
        (1..=20).any(|number| {
            let wait_s = next_look_in_s(elapsed_s);
            elapsed_s += wait_s;
            fleet.pass(f64::from(wait_s) / 60.0);
            readings = look(&policy, &[fleet.stratum()], number, &readings);
            let errors = readings.iter().find(|reading| reading.metric == Metric::Errors);
            errors.and_then(|it| it.loss_at_most).is_some_and(|at_most| at_most <= 0.02)
        })
    };
    let passed = (1..=runs).filter(|seed| passes(*seed)).count() as u64;
    assert!(passed * 20 <= runs, "{passed} of {runs}");
}

/// Two sites, one of which has an outage, and canaries unevenly spread over them: strata must be those
/// within which chance decided.
#[test]
fn what_befalls_a_site_is_not_blamed_on_the_release() {
    let policy = GatePolicy::default();
    let site = |devices: usize, canaries: usize, shift: f64, random: &mut Random| {
        let mut all: Vec<Compared> = Vec::new();
        for _ in 0..devices {
            let device = Device {
                traffic: REQUESTS,
                error_rate: ERROR_RATE,
                slow: 0.0,
                drift: 0.0,
                compared: Compared::default(),
            };
            let before = pass(&device, 192.0, NONE, 1.0, random);
            let after = pass(&device, 48.0, NONE, shift, random);
            all.push(Compared { before, after });
        }
        let controls = all.split_off(canaries);
        Stratum { canaries: all, controls }
    };
    let alarm = |seed: u64, apart: bool| {
        let mut random = Random(seed);
        let out = site(40, 20, 10.0, &mut random);
        let well = site(400, 20, 1.0, &mut random);
        let strata = match apart {
            true => vec![out, well],
            false => vec![Stratum {
                canaries: [out.canaries, well.canaries].concat(),
                controls: [out.controls, well.controls].concat(),
            }],
        };
        harm(&policy, &look(&policy, &strata, 1, &[])) >= 100.0
    };
    assert_eq!((1..=100).filter(|seed| alarm(*seed, true)).count(), 0);
    // Thrown together they would be.
    assert!((1..=100).filter(|seed| alarm(*seed, false)).count() > 50);
}

#[test]
fn a_slower_release_is_found_and_a_little_slower_one_is_let_be() {
    let found = |slowdown| {
        let effect = Effect { errors: 1.0, slowdown };
        halted_after(Fleet::new(World::Heterogeneous, 200, 30, effect, 3), 100.0, 6)
    };
    assert!(found(1.6).is_some());
    assert_eq!(found(1.1), None);
}

#[test]
fn nothing_counted_is_nothing_found() {
    let policy = GatePolicy::default();
    let idle =
        Stratum { canaries: vec![Compared::default(); 6], controls: vec![Compared::default(); 6] };
    assert_eq!(look(&policy, &[idle], 1, &[]), []);
    assert_eq!(look(&policy, &[], 1, &[]), []);
    // Numbers that no honest device sends.
    let mut odd = Compared::default();
    odd.after.first_tokens = 1;
    odd.after.first_token_ln_ms = f64::NAN;
    odd.before = odd.after;
    odd.after.errors = u64::MAX / 2;
    let stratum = Stratum { canaries: vec![odd; 6], controls: vec![Compared::default(); 6] };
    for reading in look(&policy, &[stratum], 1, &[]) {
        assert!(reading.e_value.is_finite(), "{reading:?}");
    }
}

/// The rules that the gate is compared with, at the same looks.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// This gate.
    Gate,
    /// Twice the controls' share of errors, and five errors.
    Threshold,
    /// A one-sided Mann-Whitney test of the devices' shares of errors, at 1 % at each look.
    MannWhitney,
}

impl Rule {
    fn halts(self, stratum: &Stratum, readings: &[MetricReading]) -> bool {
        let share = |device: &Compared| {
            let requests = device.after.answered + device.after.errors;
            device.after.errors as f64 / requests.max(1) as f64
        };
        let errors = |arm: &[Compared]| arm.iter().map(|d| d.after.errors).sum::<u64>() as f64;
        let answered = |arm: &[Compared]| arm.iter().map(|d| d.after.answered).sum::<u64>() as f64;
        let Stratum { canaries, controls } = stratum;
        match self {
            Self::Gate => harm(&GatePolicy::default(), readings) >= 100.0,
            Self::Threshold => {
                let rate = |arm| errors(arm) / (errors(arm) + answered(arm)).max(1.0);
                errors(canaries) >= 5.0 && rate(canaries) > 2.0 * rate(controls)
            }
            Self::MannWhitney => {
                let theirs: Vec<f64> = controls.iter().map(share).collect();
                let ours: Vec<f64> = canaries.iter().map(share).collect();
                mann_whitney_z(&ours, &theirs) > 2.326
            }
        }
    }
}

/// The normal approximation, with its correction for ties (Lehmann 1975, 1.2 and 1.4).
fn mann_whitney_z(ours: &[f64], theirs: &[f64]) -> f64 {
    let mut all: Vec<f64> = ours.iter().chain(theirs).copied().collect();
    all.sort_by(f64::total_cmp);
    let (m, n, total) = (ours.len() as f64, theirs.len() as f64, all.len() as f64);
    let below = |x: f64| all.partition_point(|y| *y < x) as f64;
    let upto = |x: f64| all.partition_point(|y| *y <= x) as f64;
    let ranks: f64 = ours.iter().map(|x| f64::midpoint(below(*x) + 1.0, upto(*x))).sum();
    let ties: f64 =
        all.chunk_by(|a, b| a == b).map(|t| (t.len() as f64).powi(3) - t.len() as f64).sum();
    let variance = m * n / 12.0 * (total + 1.0 - ties / (total * (total - 1.0)));
    if variance <= 0.0 { 0.0 } else { (ranks - m * (total + 1.0) / 2.0) / variance.sqrt() }
}

/// Prints the tables of docs/gates.md:
/// `make gate-curves`.
#[test]
#[ignore = "minutes of CPU: make gate-curves"]
fn detection_curves() {
    let rules = [Rule::Gate, Rule::Threshold, Rule::MannWhitney];
    let worlds = [World::Identical, World::Heterogeneous];
    for (devices, canaries) in [(10, 3), (50, 10), (200, 20), (1_000, 50)] {
        for factor in [1.0, 2.0, 5.0, 10.0] {
            for world in worlds {
                let runs = if devices == 1_000 { 40 } else { 100 };
                let mut found = rules.map(|_| Vec::new());
                for seed in 1..=runs {
                    let effect = Effect { errors: factor, slowdown: 1.0 };
                    let mut fleet = Fleet::new(world, devices, canaries, effect, seed);
                    let (mut readings, mut elapsed_s) = (Vec::new(), 0);
                    let mut halted = rules.map(|_| None);
                    for number in 1..=16 {
                        let wait_s = next_look_in_s(elapsed_s);
                        elapsed_s += wait_s;
                        fleet.pass(f64::from(wait_s) / 60.0);
                        let stratum = fleet.stratum();
                        readings = look(
                            &GatePolicy::default(),
                            std::slice::from_ref(&stratum),
                            number,
                            &readings,
                        );
                        for (rule, halted) in rules.iter().zip(&mut halted) {
                            if halted.is_none() && rule.halts(&stratum, &readings) {
                                *halted = Some(elapsed_s / 60);
                            }
                        }
                        if halted.iter().all(Option::is_some) {
                            break;
                        }
                    }
                    for (found, halted) in found.iter_mut().zip(halted) {
                        found.push(halted.unwrap_or(u32::MAX));
                    }
                }
                let shown = found.map(|mut minutes| {
                    minutes.sort_unstable();
                    let median = minutes[minutes.len() / 2];
                    let share =
                        minutes.iter().filter(|m| **m < u32::MAX).count() * 100 / minutes.len();
                    let median =
                        if median == u32::MAX { "-".to_owned() } else { median.to_string() };
                    format!("{share} % / {median}")
                });
                println!(
                    "| {canaries} of {devices} | ×{factor} | {world:?} | {} |",
                    shown.join(" | ")
                );
            }
        }
    }
}
