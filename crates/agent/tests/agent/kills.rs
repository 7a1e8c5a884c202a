//! SIGKILL at random moments: each time the device comes back to what it should be.

use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use slmops_agent::state::StateFolder;
use slmops_api::device::Phase;

use crate::fake_hub::{FakeHub, Release};

const KILLS: u32 = 40;
/// The longest time from a start to the kill, in milliseconds. Loading, probing, switching and
/// confirming the tiny model takes about as long.
const LONGEST_LIFE_MS: u64 = 900;
const SEED: u64 = 2026;

/// A real agent process on `folder`.
pub fn agent(folder: &Path, verb: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_slm-agent"));
    command.args(verb).arg("--state").arg(folder).env("SLM_AGENT_LOG", "warn");
    command.stdin(Stdio::null());
    command
}

pub fn join(hub: &FakeHub, folder: &Path) {
    join_by(hub, agent(folder, JOIN));
}

/// The verb of an agent that joins.
pub const JOIN: &[&str] = &["join", "-", "--no-run", "--listen", "127.0.0.1:0"];

/// Joins by this command of [`JOIN`].
pub fn join_by(hub: &FakeHub, mut join: Command) {
    let mut join = join
        .args(["--name", "kiosk", "--memory-budget", "2GB"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    join.stdin.take().unwrap().write_all(hub.invitation().as_bytes()).unwrap();
    assert!(join.wait().unwrap().success());
}

pub struct Running(Child);

impl Running {
    pub fn start(folder: &Path) -> Self {
        Self(agent(folder, &["run"]).spawn().unwrap())
    }

    pub fn of(child: Child) -> Self {
        Self(child)
    }

    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_each_kill_the_device_converges() {
    let hub = FakeHub::start().await;
    // A download takes a while, so that kills hit it, too.
    hub.lock().faults.slow = Some(32 << 10);
    let folder = tempfile::tempdir().unwrap();
    join(&hub, folder.path());
    let good = [Release::good("1.0.0"), Release::good("2.0.0")];
    let bad = Release::failing("3.0.0");
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let mut agent = Running::start(folder.path());
    let generation = hub.ship(&good[0]);
    hub.confirmed(generation).await;

    for kill in 0..KILLS {
        // Each round asks for something else, and kills the agent somewhere on the way to it.
        let (release, healthy) = match kill % 4 {
            3 => (&bad, false),
            other => (&good[(other % 2) as usize], true),
        };
        let generation = hub.ship(release);
        let life = Duration::from_millis(random.random_range(0..LONGEST_LIFE_MS));
        tokio::time::sleep(life).await;
        agent.kill();
        // The ledger is whole, whatever happened.
        let ledger = StateFolder::at(folder.path()).load_ledger().unwrap();
        assert!(ledger.generation <= generation);
        assert!(ledger.current.is_some(), "kill {kill}: the confirmed model is forgotten");

        let before = hub.lock().reports.last().map_or(0, |report| report.sequence);
        agent = Running::start(folder.path());
        let report = hub
            .report(&format!("an outcome after kill {kill} at {life:?}"), |report| {
                report.sequence > before
                    && report.generation == generation
                    && matches!(report.phase, Phase::Confirmed | Phase::RolledBack { .. })
            })
            .await;
        assert_eq!(report.phase == Phase::Confirmed, healthy, "kill {kill} at {life:?}");
        let running = report.running.unwrap();
        assert_ne!(running.version.to_string(), "3.0.0", "kill {kill}");
        if healthy {
            assert_eq!(running.version.to_string(), release.version);
        }
        assert_eq!(crate::ask(folder.path()).await, 200, "kill {kill}");
    }
    agent.kill();
}

/// The worker is a process of its own: its death is an event, and the model is not to blame for a
/// kill from outside.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_is_back_at_once() {
    let hub = FakeHub::start().await;
    let folder = tempfile::tempdir().unwrap();
    join(&hub, folder.path());
    let mut agent = Running::start(folder.path());
    let generation = hub.ship(&Release::good("1.0.0"));
    hub.confirmed(generation).await;
    for round in 1..=5_u64 {
        let worker = worker_of(agent.0.id()).expect("a worker runs");
        let killed = Command::new("kill").args(["-9", &worker.to_string()]).status().unwrap();
        assert!(killed.success());
        crate::until("another worker answers", || async {
            worker_of(agent.0.id()).is_some_and(|other| other != worker)
                && crate::ask(folder.path()).await == 200
        })
        .await;
        let report = hub
            .report("the crash counted", |report| report.telemetry.worker_crashes >= round)
            .await;
        assert_eq!(report.rejected, []);
        assert_eq!(report.phase, Phase::Confirmed);
    }
    agent.kill();
}

/// The newest child process.
fn worker_of(parent: u32) -> Option<u32> {
    let path = format!("/proc/{parent}/task");
    let tasks = std::fs::read_dir(path).ok()?;
    let children = tasks.flatten().filter_map(|task| {
        let children = std::fs::read_to_string(task.path().join("children")).ok()?;
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).max()
    });
    children.max()
}
