//! Devices whose disk holds one model: what is given up for the next one, and what comes of kills,
//! damage and bad releases meanwhile.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use slmops_agent::state::StateFolder;
use slmops_api::delta::{Delta, Fallback, Transfer};
use slmops_api::device::{DISK_RESERVE_BYTES, DeviceReport, Phase, WaitCause};
use slmops_api::rules::DeviceRules;
use slmops_artifact::Digest;

use crate::fake_hub::{FakeHub, Release};
use crate::kills::{JOIN, join_by};
use crate::site::neighbour;

/// How often the agent is killed; `SLM_DELTA_KILLS=500` for a night.
const KILLS: u32 = 24;
const SEED: u64 = 2028;

const REPLACE: DeviceRules = DeviceRules {
    hold: false,
    activate_at: None,
    activate_in: Vec::new(),
    download_in: Vec::new(),
    metered: slmops_api::rules::Metered::Allow,
    max_rate_bytes_per_s: None,
    share_bytes_per_s: None,
    replace: true,
};

/// A small disk that outlives the programs that use it: a mount in a name space of its own, held by
/// a process that sleeps.
struct Disk {
    holder: Child,
    folder: tempfile::TempDir,
}

impl Disk {
    fn of(bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let script =
            "mount -t tmpfs -o size=\"$1\" tmpfs \"$2\" && touch \"$2/ready\" && exec sleep 100000";
        let holder = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
            .arg(bytes.to_string())
            .arg(folder.path())
            .spawn()
            .unwrap();
        let disk = Self { holder, folder };
        let started = std::time::Instant::now();
        while !disk.seen().join("ready").exists() {
            assert!(started.elapsed() < Duration::from_secs(30), "the disk is not there");
            std::thread::sleep(Duration::from_millis(5));
        }
        disk
    }

    /// Where programs on the disk see it.
    fn path(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Where everyone else does.
    fn seen(&self) -> PathBuf {
        let inside = self.folder.path().strip_prefix("/").unwrap();
        PathBuf::from(format!("/proc/{}/root", self.holder.id())).join(inside)
    }

    fn state(&self) -> PathBuf {
        self.seen().join("state")
    }

    /// The agent, on the disk.
    fn agent(&self, verb: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--preserve-credentials", "--user", "--mount", "--target"]);
        command.arg(self.holder.id().to_string()).arg(env!("CARGO_BIN_EXE_slm-agent"));
        command.args(verb).arg("--state").arg(self.path()).env("SLM_AGENT_LOG", "warn");
        command.stdin(Stdio::null());
        command
    }

    fn start(&self) -> Agent {
        Agent(self.agent(&["run"]).spawn().unwrap())
    }

    fn blobs(&self) -> Vec<u64> {
        let files = std::fs::read_dir(self.state().join("blobs")).unwrap().flatten();
        let metadata = files.filter_map(|file| file.metadata().ok());
        metadata.filter(|it| it.is_file()).map(|it| it.len()).collect()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

struct Agent(Child);

impl Agent {
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A device that runs `release` on a disk with room for so many models of its size, and a half.
async fn device(hub: &FakeHub, release: &Release, models: u64) -> (Disk, Agent) {
    let size = release.weights.len() as u64;
    let disk = Disk::of(DISK_RESERVE_BYTES + models * size + size / 2);
    join_by(hub, disk.agent(JOIN));
    let agent = disk.start();
    let generation = hub.ship(release);
    hub.confirmed(generation).await;
    (disk, agent)
}

fn transfer(report: &DeviceReport) -> Transfer {
    report.telemetry.transfer.clone().expect("a model was fetched")
}

fn version(report: &DeviceReport) -> Option<String> {
    report.running.as_ref().map(|running| running.version.to_string())
}

async fn answers(disk: &Disk) {
    crate::until("it answers", || async { crate::ask(&disk.state()).await == 200 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_is_given_up_only_with_leave() {
    let hub = FakeHub::start().await;
    let (first, second) = (Release::good("1.0.0"), Release::drifted("2.0.0"));
    let size = first.weights.len() as u64;
    let (disk, mut agent) = device(&hub, &first, 1).await;
    let delta = hub.offer(&first, &second);
    hub.ship(&second);
    let waiting = Phase::Waiting { cause: WaitCause::DiskFull, until: None };
    let report = hub.report("it waits for room", |report| report.phase == waiting).await;
    assert_eq!(version(&report).as_deref(), Some("1.0.0"));
    answers(&disk).await;

    // With leave it changes the old file where it lies.
    let generation = hub.rules(REPLACE);
    let report = hub.confirmed(generation).await;
    assert_eq!((version(&report).as_deref(), &report.previous), (Some("2.0.0"), &None));
    let came = transfer(&report);
    assert_eq!((came.gave_up, came.fallback), (Some(delta.from), None));
    assert_eq!(came.whole_bytes, 0);
    // Each attempt reads the header again: some found no room.
    assert_eq!((came.delta_bytes - delta.bytes) % delta.header_bytes, 0);
    assert!(came.delta_bytes < delta.bytes + 20 * delta.header_bytes, "{came:?}");
    answers(&disk).await;
    let blob = std::fs::read(disk.state().join("blobs").join(delta.to.hex())).unwrap();
    assert!(blob == second.weights);
    assert!(!disk.state().join("blobs").join(delta.from.hex()).exists());
    let changing = std::fs::read_dir(disk.state().join("blobs/changing")).unwrap();
    assert_eq!(changing.count(), 0);

    // Without a delta, the old file goes before the new one comes.
    let third = Release::drifted("3.0.0");
    let generation = hub.ship_under(&third, REPLACE);
    let report = hub.confirmed(generation).await;
    let came = transfer(&report);
    assert_eq!((came.whole_bytes, came.delta_bytes), (size, 0));
    assert_eq!(came.gave_up, Some(Digest::of(&second.weights)));
    answers(&disk).await;

    // A delta that is damaged: the old file is half gone, and the new one comes whole.
    let fourth = Release::drifted("4.0.0");
    let delta = hub.offer(&third, &fourth);
    hub.flip(delta.blob, (delta.header_bytes + delta.bytes) / 2);
    let generation = hub.ship_under(&fourth, REPLACE);
    let came = transfer(&hub.confirmed(generation).await);
    assert_eq!((came.fallback, came.whole_bytes), (Some(Fallback::DamagedDelta), size));
    answers(&disk).await;
    agent.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_is_changed_by_comes_from_the_site() {
    let hub = FakeHub::start().await;
    let versions = ["1.0.0", "2.0.0", "3.0.0"];
    let [first, second, third] = versions.map(Release::drifted);
    let (disk, mut agent) = device(&hub, &first, 1).await;
    let rules = DeviceRules { share_bytes_per_s: Some(100_000_000), ..REPLACE };

    // The header, which has the hash of each frame, is the hub's; all else comes from nearby.
    let delta = hub.offer(&first, &second);
    let bytes = hub.lock().blob(delta.blob).to_vec();
    let peers = vec!["http://127.0.0.1:9".to_owned(), neighbour([(delta.blob, bytes)], 2).await];
    hub.lock().sources.get_mut(&delta.to).unwrap().peers = peers;
    let generation = hub.ship_under(&second, rules.clone());
    let came = transfer(&hub.confirmed(generation).await);
    assert_eq!((came.gave_up, came.fallback), (Some(delta.from), None));
    assert_eq!(came.peer_bytes, delta.bytes - delta.header_bytes);
    assert_eq!((came.delta_bytes % delta.header_bytes, came.whole_bytes), (0, 0));
    answers(&disk).await;

    // One that lies costs a frame, and the hub gives the rest.
    let delta = hub.offer(&second, &third);
    let mut bytes = hub.lock().blob(delta.blob).to_vec();
    let middle = (delta.header_bytes + delta.bytes) / 2;
    bytes[middle as usize] ^= 1;
    let peers = vec![neighbour([(delta.blob, bytes)], 0).await];
    hub.lock().sources.get_mut(&delta.to).unwrap().peers = peers;
    let generation = hub.ship_under(&third, rules);
    let came = transfer(&hub.confirmed(generation).await);
    assert_eq!((came.fallback, came.whole_bytes), (None, 0));
    assert!(came.peer_bytes > 0 && came.delta_bytes > delta.header_bytes, "{came:?}");
    let blob = std::fs::read(disk.state().join("blobs").join(delta.to.hex())).unwrap();
    assert!(blob == third.weights);
    answers(&disk).await;
    agent.kill();
}

/// Somebody else fills the disk while frames are applied: it waits, and goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_in_the_middle_of_a_delta_costs_nothing_twice() {
    let hub = FakeHub::start().await;
    let (first, second) = (Release::good("1.0.0"), Release::drifted("2.0.0"));
    let (disk, mut agent) = device(&hub, &first, 2).await;
    let delta = hub.offer(&first, &second);
    hub.lock().starts.clear();
    hub.lock().faults.slow = Some(16 << 10);
    let generation = hub.ship(&second);
    let partial = StateFolder::at(&disk.state()).partial(delta.to);
    let made = || std::fs::metadata(&partial).map_or(0, |file| file.len());
    // A frame has a MiB at most.
    crate::until("a frame is made", || async { made() > 1 << 20 }).await;
    let filler = disk.seen().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    let piece = vec![1_u8; 64 << 10];
    while std::io::Write::write_all(&mut file, &piece).is_ok() {}
    drop(file);
    let waiting = Phase::Waiting { cause: WaitCause::DiskFull, until: None };
    let report = hub.report("it waits for room", |report| report.phase == waiting).await;
    assert_eq!(version(&report).as_deref(), Some("1.0.0"));
    answers(&disk).await;
    let kept = made();
    assert!((1..second.weights.len() as u64).contains(&kept), "{kept}");

    std::fs::remove_file(&filler).unwrap();
    hub.lock().faults.slow = None;
    let came = transfer(&hub.confirmed(generation).await);
    assert_eq!((came.fallback, came.whole_bytes), (None, 0));
    // It read the header anew, and of the payloads those that were missing.
    let payloads = |(blob, at): &(Digest, u64)| {
        (*blob == delta.blob && *at >= delta.header_bytes).then_some(*at)
    };
    let starts: Vec<u64> = hub.lock().starts.iter().filter_map(payloads).collect();
    assert_eq!(starts[0], delta.header_bytes);
    assert!(starts[1..].iter().all(|start| *start > delta.header_bytes), "{starts:?}");
    let blob = std::fs::read(disk.state().join("blobs").join(delta.to.hex())).unwrap();
    assert!(blob == second.weights);
    answers(&disk).await;
    agent.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_before_goes_without_leave() {
    let hub = FakeHub::start().await;
    let releases = ["1.0.0", "2.0.0", "3.0.0"].map(Release::drifted);
    let (disk, mut agent) = device(&hub, &releases[0], 2).await;
    for release in &releases[1..] {
        let generation = hub.ship(release);
        let report = hub.confirmed(generation).await;
        assert_eq!(version(&report).as_deref(), Some(release.version));
        assert!(report.previous.is_some(), "what ran just before is kept");
        assert_eq!(transfer(&report).gave_up, None);
    }
    let size = releases[0].weights.len() as u64;
    assert_eq!(disk.blobs().iter().filter(|bytes| **bytes == size).count(), 2);
    answers(&disk).await;
    agent.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_fails_in_the_place_of_the_old_one_is_followed_by_the_old_one() {
    let hub = FakeHub::start().await;
    let first = Release::good("1.0.0");
    let (disk, mut agent) = device(&hub, &first, 1).await;
    let bad = Release { probes: Release::failing("2.0.0").probes, ..Release::drifted("2.0.0") };
    let delta = hub.offer(&first, &bad);
    hub.lock().faults.slow = Some(16 << 10);
    let generation = hub.ship_under(&bad, REPLACE);
    // It says so at once, and has no model then.
    let report = hub.rolled_back(generation).await;
    assert_eq!((version(&report), report.rejected.len()), (None, 1));
    assert!(hub.lock().blob_bytes[&delta.blob] >= delta.bytes, "in the place of the old one");
    // Then it fetches the old one again by itself.
    let back = |report: &DeviceReport| {
        report.generation == generation
            && matches!(report.phase, Phase::RolledBack { .. })
            && version(report).as_deref() == Some("1.0.0")
    };
    let report = hub.report("the old model again", back).await;
    assert_eq!(transfer(&report).whole_bytes, first.weights.len() as u64);
    answers(&disk).await;

    // Asked for the old one, it has it.
    let generation = hub.ship(&first);
    hub.confirmed(generation).await;
    agent.kill();
}

/// What of a model is there, under any name.
fn there(disk: &Disk, delta: &Delta) -> [bool; 3] {
    let state = StateFolder::at(&disk.state());
    let (changing, _) = state.changing(delta.to);
    [state.blob(delta.from), changing, state.blob(delta.to)].map(|path| path.exists())
}

/// SIGKILL while the only model is changed where it lies: it goes on, by the delta alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_while_the_only_model_changes_costs_a_frame_at_most() {
    let kills = std::env::var("SLM_DELTA_KILLS").ok().and_then(|kills| kills.parse().ok());
    let kills: u32 = kills.unwrap_or(KILLS);
    let hub = FakeHub::start().await;
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let versions = ["2.0.0", "3.0.0", "4.0.0"];
    let mut from = Release::good("1.0.0");
    let (disk, mut agent) = device(&hub, &from, 1).await;
    hub.lock().faults.slow = Some(32 << 10);
    let (mut killed, mut in_place, mut gone_on, mut round) = (0, 0, 0, 0);
    while killed < kills {
        let to = Release::drifted(versions[round % versions.len()]);
        round += 1;
        hub.lock().sources.clear();
        hub.lock().starts.clear();
        let delta = hub.offer(&from, &to);
        let generation = hub.ship_under(&to, REPLACE);
        let mut lives = 0_u32;
        let report = loop {
            let confirmed = |report: &DeviceReport| {
                report.generation == generation && report.phase == Phase::Confirmed
            };
            // Some lives end before anything is fetched, some once all is there.
            let life = Duration::from_millis(random.random_range(0..600));
            let done = killed >= kills || lives > 12;
            let limit = if done { Duration::from_secs(60) } else { life };
            let what = format!("generation {generation} confirmed, kill {killed}");
            match tokio::time::timeout(limit, hub.report(&what, confirmed)).await {
                Ok(report) => break report,
                Err(_) => {
                    agent.kill();
                    killed += 1;
                    lives += 1;
                    let [old, changing, new] = there(&disk, &delta);
                    in_place += u32::from(changing);
                    assert!(old || changing || new, "kill {killed}: no file is left");
                    let ledger = StateFolder::at(&disk.state()).load_ledger().unwrap();
                    assert!(ledger.current.is_some() || ledger.given_up.is_some());
                    agent = disk.start();
                }
            }
        };
        let came = transfer(&report);
        assert_eq!((came.fallback, came.whole_bytes), (None, 0), "round {round}");
        // Every payload comes in one answer, unless some of them were not needed any more.
        let later = |(blob, at): &&(Digest, u64)| *blob == delta.blob && *at > delta.header_bytes;
        gone_on += hub.lock().starts.iter().filter(later).count();
        let blob = disk.state().join("blobs").join(delta.to.hex());
        assert!(std::fs::read(blob).unwrap() == to.weights, "round {round}");
        answers(&disk).await;
        from = to;
    }
    println!(
        "{killed} kills in {round} updates, {in_place} of them while the file was being changed; \
         {gone_on} times it went on in the middle"
    );
    assert!(in_place > kills / 8, "only {in_place} of {kills} kills hit the change");
    assert!(gone_on > kills as usize / 16, "it went on in the middle only {gone_on} times");
    agent.kill();
}
