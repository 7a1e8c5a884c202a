//! How fast the simulator is: `cargo run --release -p slmops-sim --example speed [DEVICES [HOURS [RUN]]]`.

use std::time::Instant;

use slmops_sim::{Ailment, FaultSpec, FleetSpec, Health, simulate};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number =
        |default| arguments.next().map_or(default, |text| text.parse().expect("a number"));
    let (devices, hours) = (number(10_000), number(24));
    let only = arguments.next();
    let good = FleetSpec::new(devices, hours, 1);
    let mut bad = good.clone();
    bad.rollouts[0].health = Health::Bad { ailment: Ailment::FailsProbes, share: 1.0 };
    let mut faulty = good.clone();
    faulty.faults = FaultSpec::every(0.5);
    faulty.rollouts[0].policy.max_failures = devices;
    for (name, spec) in [("good", good), ("bad", bad), ("faulty", faulty)] {
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let started = Instant::now();
        let report = simulate(&spec).expect("a specification within bounds");
        let took = started.elapsed().as_secs_f64();
        let rollout = &report.rollouts[0];
        println!(
            "{name}: {devices} devices, {hours} h in {took:.1} s; {} events, {} plans; {}, {} confirmed, {:?}; {} violations",
            report.events,
            report.plans,
            rollout.state_words(),
            rollout.confirmed(),
            rollout.outcomes,
            report.violations.len()
        );
        println!("{}", rollout.chart());
    }
}
