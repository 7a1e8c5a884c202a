//! Measures model files against a reference and prints the table:
//! `cargo run --release -p slmops-evaluate --example compare REFERENCE MODEL…`

use std::path::Path;

use slmops_evaluate::gate::{self, Against, Limits};
use slmops_evaluate::suite::Suite;
use slmops_evaluate::{Evaluation, render};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    slmops_inference::child::run_if_child(slmops_evaluate::JOBS);
    let paths: Vec<String> = std::env::args().skip(1).collect();
    let Some(reference) = paths.first() else {
        anyhow::bail!("name the reference and the models");
    };
    let evaluation =
        Evaluation::new(Suite::builtin(), std::env::temp_dir().join("slmops-compare-cache"));
    let mut reports = Vec::new();
    for path in &paths {
        let started = std::time::Instant::now();
        let report = evaluation.run(Path::new(path), Path::new(reference), |_| ()).await?;
        eprintln!("{path}: {:.1} s", started.elapsed().as_secs_f64());
        let name = Path::new(path).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        reports.push((name, report));
    }
    let rows: Vec<_> = reports.iter().map(|(name, report)| (name.as_str(), report)).collect();
    println!("{}", render::reports(&rows));
    for (name, report) in &rows[1..] {
        let limits = Limits::against_original(name);
        let decision = gate::decide(report, rows[0].1, &Against::Original, &limits)?;
        println!("{name}\n{}", render::gate(&decision));
    }
    Ok(())
}
