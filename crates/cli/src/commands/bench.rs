//! `slm bench`.

use std::path::PathBuf;

use clap::Subcommand;
use serde::Serialize;

use super::Session;
use crate::bench::measure::{Check, Figures, Target};
use crate::bench::{self, Plan};
use crate::error::{Context as _, Failure, Result};
use crate::output::{fields, table};
use crate::units;

/// Measure how much something can take.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Measure a hub under a large fleet
    #[command(
        long_about = "Start a hub in a process and a folder of its own, over SQLite, and let simulated \
                      devices speak the real protocol to it over HTTPS from this machine: sign in, \
                      poll, take a rollout, reconnect after the hub was killed. No model runs. The \
                      load shares the machine's cores with the hub, so the hub's CPU time is the \
                      figure to compare.",
        after_help = "Examples:\n  $ slm bench fleet\n  $ slm bench fleet --devices 1000,10000,100000 --check poll-cost,memory\n\nExit codes: 0 done; 1 a target of --check is missed."
    )]
    Fleet(Fleet),
    /// Measure deltas between versions of a model, next to other tools
    #[command(
        long_about = "Make versions of a model (a float master, which is the dequantised model with noise \
                      inside each weight's bin, moved as a fine-tuning moves it and quantised again), and \
                      deltas between them: by this program, and by bsdiff, zstd, xdelta3 and FastCDC where \
                      they are installed. Each tool runs with one thread in a process of its own. Every run \
                      makes the same files.",
        after_help = "Examples:\n  $ slm bench delta smollm2.gguf --weights 24000000\n  $ slm bench delta smollm2.gguf --case light,strong --type own,Q4_K --tool slm,zstd"
    )]
    Delta(super::bench_delta::DeltaBench),
    /// Measure an endpoint beside the engine's own loop
    #[command(
        long_about = "Run `slm serve` and, in turns with it, the engine in a bare loop of its own, with the \
                      same model, threads and configuration: prompt processing, decoding of one and of \
                      eight streams, time to the first token, memory. Then 200 clients at once. Nothing \
                      else should run on the machine meanwhile.",
        after_help = "Examples:\n  $ slm bench serve smollm2.gguf\n  $ slm bench serve smollm2.gguf --rounds 9 --peer http://127.0.0.1:8000"
    )]
    Serve(super::bench_serve::ServeBench),
}

/// `slm bench fleet`.
#[derive(Debug, clap::Args)]
pub struct Fleet {
    /// Devices; several numbers are measured one after another
    #[arg(
        long,
        value_name = "COUNT,…",
        default_value = "10000",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    devices: Vec<u32>,
    /// For how long polls are measured
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::parse_seconds)]
    seconds: u64,
    /// From one poll of a device to its next
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::parse_seconds)]
    interval: u64,
    /// Fail if this target is missed; may be repeated
    #[arg(long, value_name = "TARGET,…", value_enum, value_delimiter = ',')]
    check: Vec<Target>,
    /// Where the hub's folder is made, and removed at the end [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// All that was measured, and where.
#[derive(Serialize)]
struct Measured {
    #[serde(flatten)]
    taken: Taken,
    fleets: Vec<Fleetwise>,
}

/// With what a measurement was taken, when, and where.
#[derive(Serialize)]
pub(super) struct Taken {
    version: &'static str,
    #[serde(serialize_with = "as_text")]
    at: jiff::Timestamp,
    machine: Machine,
}

#[derive(Serialize)]
struct Machine {
    cpu: String,
    cores: usize,
    memory_bytes: u64,
    /// Processes that wanted to run when the measurement began, on average over a minute.
    load: f64,
}

#[derive(Serialize)]
struct Fleetwise {
    #[serde(flatten)]
    figures: Figures,
    checks: Vec<Check>,
}

fn as_text<S: serde::Serializer>(at: &jiff::Timestamp, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(at)
}

impl Bench {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        match self {
            Self::Fleet(fleet) => fleet.run(session).await,
            Self::Delta(delta) => delta.run(session).await,
            Self::Serve(serve) => serve.run(session).await,
        }
    }
}

impl Fleet {
    async fn run(self, session: &Session) -> Result<()> {
        let mut measured = Measured { taken: Taken::here(), fleets: Vec::new() };
        for devices in &self.devices {
            let what = || "make a folder for the hub".to_owned();
            let folder = match &self.folder {
                Some(parent) => tempfile::tempdir_in(parent).user(what)?,
                None => tempfile::tempdir().internal(what)?,
            };
            let plan = Plan {
                devices: *devices,
                seconds: self.seconds.max(1),
                interval_s: self.interval.max(1),
            };
            let figures = bench::run(plan, folder.path(), &session.progress).await?;
            let checks = figures.checks();
            measured.fleets.push(Fleetwise { figures, checks });
        }
        session.out.show(&measured, || text(&measured))?;
        let mut missed = Vec::new();
        for fleet in &measured.fleets {
            let asked = |check: &&Check| self.check.contains(&check.target) && !check.met;
            for check in fleet.checks.iter().filter(asked) {
                missed.push(format!(
                    "{}: {} is not {} with {} devices",
                    super::word(&check.target),
                    check.found,
                    check.wanted,
                    fleet.figures.devices
                ));
            }
        }
        if missed.is_empty() {
            return Ok(());
        }
        Err(Failure::user(format!("missed {}", missed.join("; ")))
            .hint("is the machine busy with something else? Its load is in the result"))
    }
}

impl Taken {
    /// Now, on this machine.
    pub(super) fn here() -> Self {
        let (version, at) = (env!("CARGO_PKG_VERSION"), jiff::Timestamp::now());
        Self { version, at, machine: Machine::here() }
    }

    /// Its lines in a text for people.
    pub(super) fn lines(&self) -> [(&'static str, String); 4] {
        let Machine { cpu, cores, memory_bytes, load } = &self.machine;
        [
            ("machine", format!("{cpu}, {cores} cores, {}", units::bytes(*memory_bytes))),
            ("load at the start", format!("{load:.1}")),
            ("version", self.version.to_owned()),
            ("measured", super::time(self.at)),
        ]
    }
}

impl Machine {
    fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = read("/proc/meminfo");
        let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = memory.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
        let load = read("/proc/loadavg");
        Self {
            cpu: cpu.map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib.unwrap_or(0) << 10,
            load: load.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0.0),
        }
    }
}

fn text(measured: &Measured) -> String {
    let mut text = fields(&measured.taken.lines());
    for Fleetwise { figures, checks } in &measured.fleets {
        let per_device = |bytes: u64| units::bytes(bytes / u64::from(figures.devices));
        text.push_str(&format!("\n\n{} devices\n\n", figures.devices));
        let rows = figures.calls.iter().map(|line| {
            vec![
                line.name.to_owned(),
                line.answers.to_string(),
                format!("{:.0}", line.rate_per_s),
                format!("{:.1}", line.p50_ms),
                format!("{:.1}", line.p99_ms),
                format!("{:.1}", line.max_ms),
                format!("{:.2}", line.hub_cpu_s),
                format!("{:.0}", line.hub_cpu_us_per_answer),
                line.turned_away.to_string(),
                line.failed.to_string(),
            ]
        });
        let head = [
            "calls",
            ">answers",
            ">per s",
            ">p50 ms",
            ">p99 ms",
            ">max ms",
            ">hub cpu s",
            ">cpu µs each",
            ">429",
            ">failed",
        ];
        text.push_str(&table(&head, rows));
        text.push_str("\n\n");
        let rows = figures.pages.iter().map(|page| {
            vec![
                page.path.clone(),
                format!("{:.1}", page.p50_ms),
                format!("{:.1}", page.max_ms),
                units::bytes(page.bytes),
            ]
        });
        text.push_str(&table(&["page", ">p50 ms", ">max ms", ">size"], rows));
        text.push_str("\n\n");
        text.push_str(&fields(&[
            ("memory at peak, polling", units::bytes(figures.hub_polling_peak_bytes)),
            ("memory at peak, rollout", units::bytes(figures.hub_peak_bytes)),
            (
                "memory at rest",
                format!(
                    "{} ({} for each device)",
                    units::bytes(figures.hub_idle_bytes),
                    per_device(figures.hub_idle_bytes)
                ),
            ),
            (
                "database",
                format!(
                    "{} ({} for each device)",
                    units::bytes(figures.database_bytes),
                    per_device(figures.database_bytes)
                ),
            ),
            ("ready after kill -9", format!("{:.1} s", figures.restart_s)),
        ]));
        text.push_str("\n\n");
        let rows = checks.iter().map(|check| {
            vec![
                super::word(&check.target).replace('-', " "),
                check.wanted.to_owned(),
                check.found.clone(),
                if check.met { "yes" } else { "NO" }.to_owned(),
            ]
        });
        text.push_str(&table(&["target", "wanted", "found", "met"], rows));
    }
    text
}
