//! Replays a saved run: `cargo run --release -p slmops-sim --example replay FILE`.

use slmops_sim::Scenario;

fn main() {
    let path = std::env::args().nth(1).expect("usage: replay FILE");
    let text = std::fs::read_to_string(&path).expect("a file");
    let scenario: Scenario = text.parse().expect("a scenario");
    let report = scenario.run().expect("a specification within bounds");
    for rollout in &report.rollouts {
        println!("{} {}: {:?}", rollout.version, rollout.state_words(), rollout.outcomes);
        for decision in &rollout.decisions {
            println!("  {} {}", decision.at, decision.what);
            decision.because.iter().for_each(|line| println!("      - {line}"));
        }
    }
    for violation in &report.violations {
        println!("violation at {}: {}", violation.at, violation.what);
    }
}
