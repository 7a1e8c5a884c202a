//! What was measured, and the targets that it is held against.

use std::collections::BTreeMap;
use std::time::Duration;

use hyper::StatusCode;
use serde::Serialize;

use super::hub::Usage;

/// How calls of one kind went.
#[derive(Debug, Default)]
pub struct Tally {
    latencies_us: Vec<u32>,
    statuses: BTreeMap<u16, u64>,
    /// Calls that ended without an answer.
    broken: u64,
}

impl Tally {
    /// Counts an answer.
    pub fn answered(&mut self, status: StatusCode, took: Duration) {
        *self.statuses.entry(status.as_u16()).or_default() += 1;
        self.latencies_us.push(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
    }

    /// Counts a call without an answer.
    pub fn broke(&mut self) {
        self.broken += 1;
    }

    /// Adds what another has counted.
    pub fn add(&mut self, other: Self) {
        self.latencies_us.extend(other.latencies_us);
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self.broken += other.broken;
    }

    /// Answers.
    pub fn count(&self) -> u64 {
        self.latencies_us.len() as u64
    }
}

/// One line of the result.
#[derive(Debug, Serialize)]
pub struct Line {
    /// What was done.
    pub name: &'static str,
    /// Answers.
    pub answers: u64,
    /// Seconds that it took.
    pub seconds: f64,
    /// Answers per second.
    pub rate_per_s: f64,
    /// Half of the answers took no longer, in milliseconds.
    pub p50_ms: f64,
    /// Of a hundred answers 99 took no longer, in milliseconds.
    pub p99_ms: f64,
    /// The slowest answer, in milliseconds.
    pub max_ms: f64,
    /// Seconds of CPU that the hub used meanwhile, for whatever it did.
    pub hub_cpu_s: f64,
    /// Microseconds of the hub's CPU for each answer.
    pub hub_cpu_us_per_answer: f64,
    /// Answers turned away with 429.
    pub turned_away: u64,
    /// Answers 5xx, other 4xx than 429, and calls without an answer.
    pub failed: u64,
}

impl Line {
    /// A line of what `tally` counted in `took`, in which the hub's usage grew as given.
    pub fn of(name: &'static str, tally: &Tally, took: Duration, usage: (Usage, Usage)) -> Self {
        let mut sorted = tally.latencies_us.clone();
        sorted.sort_unstable();
        let at = |share: f64| {
            let index = (sorted.len() as f64 * share).ceil() as usize;
            let found = sorted.get(index.saturating_sub(1)).copied().unwrap_or(0);
            f64::from(found) / 1e3
        };
        let answers = tally.count();
        let hub_cpu_s = usage.1.cpu_s - usage.0.cpu_s;
        let turned_away = tally.statuses.get(&429).copied().unwrap_or(0);
        let bad = tally.statuses.iter().filter(|(status, _)| **status >= 400 && **status != 429);
        Self {
            name,
            answers,
            seconds: took.as_secs_f64(),
            rate_per_s: answers as f64 / took.as_secs_f64(),
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            max_ms: at(1.0),
            hub_cpu_s,
            hub_cpu_us_per_answer: hub_cpu_s * 1e6 / answers.max(1) as f64,
            turned_away,
            failed: bad.map(|(_, count)| count).sum::<u64>() + tally.broken,
        }
    }
}

/// What a rollout took.
#[derive(Debug, Serialize)]
pub struct RolloutTimes {
    /// Until `POST /v1/rollouts` was answered, in seconds.
    pub created_s: f64,
    /// From then until it was completed, in seconds.
    pub completed_s: f64,
    /// Devices that confirmed.
    pub confirmed: u64,
}

/// Everything that was measured of one fleet.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Devices.
    pub devices: u32,
    /// What the devices' calls cost.
    pub calls: Vec<Line>,
    /// The rollout over all of them.
    pub rollout: RolloutTimes,
    /// From the start of a killed hub until it answered again, in seconds.
    pub restart_s: f64,
    /// What dashboards and lists ask for: path, and the slowest of several answers.
    pub pages: Vec<Page>,
    /// The hub's resident memory at its peak until all devices had polled, in bytes.
    pub hub_polling_peak_bytes: u64,
    /// The same with a rollout to all of them, in bytes.
    pub hub_peak_bytes: u64,
    /// The same when nothing was going on, in bytes.
    pub hub_idle_bytes: u64,
    /// Bytes of the database.
    pub database_bytes: u64,
}

/// One thing that is read.
#[derive(Debug, Serialize)]
pub struct Page {
    /// Its path.
    pub path: String,
    /// The median, in milliseconds.
    pub p50_ms: f64,
    /// The slowest, in milliseconds.
    pub max_ms: f64,
    /// Bytes of the answer.
    pub bytes: u64,
}

/// What can be demanded of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Polls at their pace: p99 at most 50 ms
    PollLatency,
    /// 10,000 unchanged polls for each second of the hub's CPU
    PollCost,
    /// The hub never above 512 MiB while devices poll
    Memory,
    /// A rollout created in less than 2 s
    RolloutCreate,
    /// Every device confirmed
    RolloutEnd,
    /// No reconnecting device gets a 5xx or no answer, all are in within 60 s and a little
    Reconnect,
    /// No page above 200 ms
    Pages,
}

/// A target and what was found.
#[derive(Debug, Serialize)]
pub struct Check {
    /// Which.
    pub target: Target,
    /// What is wanted, in words.
    pub wanted: &'static str,
    /// What was found, in words.
    pub found: String,
    /// Whether it is met.
    pub met: bool,
}

/// The name of the line of polls at their pace.
pub const POLLS: &str = "polls at their pace";
/// The name of the line of polls without a pause.
pub const FASTEST: &str = "polls without a pause";
/// The name of the line of reconnecting devices.
pub const RECONNECTS: &str = "reconnects";
/// Seconds over which devices reconnect.
pub const STORM_S: u64 = 60;
/// The longest `Retry-After` that the hub gives, in seconds: who is turned away last comes then.
const LAST_RETRY_S: u64 = 30;

impl Figures {
    /// Every target with what was found.
    pub fn checks(&self) -> Vec<Check> {
        let line = |name: &str| self.calls.iter().find(|line| line.name == name);
        let of = |name: &str, value: fn(&Line) -> f64| line(name).map_or(f64::NAN, value);
        let mut checks = Vec::new();
        let mut check = |target, wanted, found: String, met| {
            checks.push(Check { target, wanted, found, met });
        };
        let p99 = of(POLLS, |line| line.p99_ms);
        check(Target::PollLatency, "p99 ≤ 50 ms", format!("{p99:.1} ms"), p99 <= 50.0);
        let cost = of(FASTEST, |line| line.hub_cpu_us_per_answer);
        let rate = 1e6 / cost;
        let found = format!("{rate:.0} per second and core ({cost:.0} µs each)");
        check(Target::PollCost, "≥ 10,000 per second and core", found, rate >= 10_000.0);
        let mib = self.hub_polling_peak_bytes as f64 / f64::from(1 << 20);
        check(Target::Memory, "< 512 MiB", format!("{mib:.0} MiB"), mib < 512.0);
        let RolloutTimes { created_s, completed_s, confirmed } = self.rollout;
        let found = format!("{created_s:.2} s");
        check(Target::RolloutCreate, "< 2 s", found, created_s < 2.0);
        let found = format!("{confirmed} of {} in {completed_s:.0} s", self.devices);
        check(Target::RolloutEnd, "all confirmed", found, confirmed == u64::from(self.devices));
        let failed = line(RECONNECTS).map_or(u64::MAX, |line| line.failed);
        let seconds = of(RECONNECTS, |line| line.seconds);
        let away = line(RECONNECTS).map_or(0, |line| line.turned_away);
        let found = format!("{failed} failed, {away} turned away, all in after {seconds:.0} s");
        let in_time = seconds <= (STORM_S + LAST_RETRY_S) as f64;
        check(Target::Reconnect, "no 5xx, all in", found, failed == 0 && in_time);
        let slowest = self.pages.iter().max_by(|a, b| a.max_ms.total_cmp(&b.max_ms));
        let found = slowest
            .map_or_else(String::new, |page| format!("{:.0} ms ({})", page.max_ms, page.path));
        let met = slowest.is_some_and(|page| page.max_ms <= 200.0);
        check(Target::Pages, "≤ 200 ms", found, met);
        checks
    }
}
