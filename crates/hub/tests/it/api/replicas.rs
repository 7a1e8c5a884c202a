//! Several hubs over one PostgreSQL database and one S3 bucket, each a process of its own: devices
//! spread over them, the one that decides killed, stopped or cut off in the middle of a rollout, and
//! the database killed too.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use slmops_hub::blobs::S3;
use slmops_hub::db::Postgres;
use slmops_hub::{Hub, HubConfig};

use super::backup::{postgres::Server, s3::S3Server};
use super::rig::{FakeDevice, Rig};

/// The data folder, and the database, of the hub that a child process runs.
const DATA_VARIABLE: &str = "SLMOPS_TEST_REPLICA_DATA";
const DATABASE_VARIABLE: &str = "SLMOPS_TEST_REPLICA_DATABASE";
const HUBS: usize = 3;
const DEVICES: usize = 9;
/// How long anything may take: a lease of 6 s among it, on a machine that has other work.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Not a test by itself: the process that is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hub_process() {
    let Some(data_dir) = std::env::var_os(DATA_VARIABLE) else { return };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let database = std::env::var(DATABASE_VARIABLE).unwrap();
    let config = HubConfig {
        data_dir: data_dir.into(),
        database: Some(Postgres::parse(&database, None).unwrap()),
        blobs: Some(S3::parse("s3://fleet/models", std::env::vars(), None).unwrap()),
        listen: None,
        http: Some("127.0.0.1:0".parse().unwrap()),
        names: vec![],
        public_url: None,
        keep: Default::default(),
        encode: slmops_hub::deltas::encode_on_thread,
    };
    let mut hub = Hub::start(config).await.unwrap();
    println!("\nhub {} {}", hub.replica.as_ref().unwrap(), hub.http.unwrap());
    hub.wait().await.unwrap();
}

/// A hub of its own process.
struct Replica {
    child: Child,
    id: String,
    url: String,
}

impl Replica {
    fn spawn(data: &Path, database: &str, bucket: &S3Server) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "api::replicas::hub_process", "--nocapture"])
            .env(DATA_VARIABLE, data)
            .env(DATABASE_VARIABLE, database)
            .envs(bucket.settings())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn ready(mut child: Child) -> Self {
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.find_map(|line| line.unwrap().strip_prefix("hub ").map(str::to_owned));
        let ready = ready.expect("the hub starts");
        // What the test runner says in that process is read, or it would end of it.
        std::thread::spawn(move || lines.count());
        let (id, address) = ready.split_once(' ').unwrap();
        Self { child, id: id.to_owned(), url: format!("http://{address}") }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Does what it is told, by whichever hub answers; asks another when one does not. The generations
/// that it was told, in order.
async fn obey(mut device: FakeDevice, hubs: Vec<String>, stop: Arc<AtomicBool>) -> Vec<u64> {
    let mut told = vec![1];
    let mut at = 0;
    while !stop.load(Ordering::Relaxed) {
        if !(device.try_learn(2).await && device.try_confirm().await) {
            // That hub is gone, or has no database at the moment.
            at = (at + 1) % hubs.len();
            device.speak_to(&hubs[at]);
            tokio::time::sleep(LOOK_EVERY).await;
        }
        if *told.last().unwrap() != device.generation() {
            told.push(device.generation());
        }
    }
    told
}

/// Devices that have confirmed a rollout.
fn confirmed(rollout: &Value) -> usize {
    let devices = rollout["devices"].as_array().unwrap().iter();
    devices.filter(|device| device["outcome"] == "confirmed").count()
}

struct Fleet {
    server: Server,
    replicas: Vec<Replica>,
    rigs: Vec<Rig>,
}

impl Fleet {
    fn query(&self, sql: &str) -> String {
        self.server.query("fleet", sql).trim().to_owned()
    }

    /// The hub that decides, waited for.
    async fn leader(&self, but: Option<&str>) -> usize {
        let started = Instant::now();
        loop {
            let holder = self.query(
                "SELECT holder FROM planners WHERE until_ms > extract(epoch FROM now()) * 1000
                 ORDER BY token DESC LIMIT 1",
            );
            let found = self.replicas.iter().position(|replica| replica.id == holder);
            if let Some(found) = found.filter(|_| but != Some(holder.as_str())) {
                return found;
            }
            assert!(started.elapsed() < PATIENCE, "nobody decides");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Starts a rollout through one hub, and waits until some devices have confirmed it.
    async fn begin(&self, version: &str, by: usize) -> String {
        self.rigs[by].release(version).await;
        // Each wave rests for a while, so that what follows happens in the middle.
        let waves = json!({ "waves": [{ "count": 1 }, { "count": 2 }, "rest"], "bake_s": 3 });
        let rollout = self.rigs[(by + 1) % HUBS].rollout(version, waves).await;
        let id = rollout["id"].as_str().unwrap().to_owned();
        let begun = |shown: &Value| confirmed(shown) >= 1;
        self.wait(by, &id, begun).await;
        id
    }

    async fn wait(&self, by: usize, rollout: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let shown = self.rigs[by].try_get(&format!("/v1/rollouts/{rollout}")).await;
            if let Some(shown) = shown.as_ref().filter(|shown| holds(shown)) {
                return shown.clone();
            }
            assert!(started.elapsed() < PATIENCE, "{shown:?}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn complete(&self, by: usize, rollout: &str) {
        let shown = self.wait(by, rollout, |shown| shown["state"] == "completed").await;
        assert_eq!(confirmed(&shown), DEVICES, "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_hub_answers_and_one_decides_kills_whoever_is_killed() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (server, bucket) = (Server::start(), S3Server::start());
    let database = server.database("fleet");
    let folder = tempfile::tempdir().unwrap();
    let data = |number: usize| folder.path().join(format!("hub-{number}"));
    // All at once, over a database in which there is nothing yet.
    let children = (0..HUBS).map(|number| Replica::spawn(&data(number), &database, &bucket));
    let children: Vec<Child> = children.collect();
    let replicas: Vec<Replica> = children.into_iter().map(Replica::ready).collect();
    let tokens: BTreeSet<String> = (0..HUBS)
        .map(|number| std::fs::read_to_string(data(number).join("admin.token")).unwrap())
        .collect();
    assert_eq!(tokens.len(), 1, "they have the same secrets");
    let admin = tokens.first().unwrap().trim().to_owned();
    let publisher = super::rig::new_key();
    let rigs = replicas.iter().map(|hub| Rig::remote(&hub.url, &admin, &publisher)).collect();
    let mut fleet = Fleet { server, replicas, rigs };
    fleet.rigs[0].add_publisher_key().await;

    // A device that joined by one hub is known to all.
    let urls: Vec<String> = fleet.replicas.iter().map(|hub| hub.url.clone()).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let mut devices = Vec::new();
    for number in 0..DEVICES {
        let mut device = fleet.rigs[number % HUBS].join(&format!("d{number}"), 600).await;
        device.speak_to(&urls[(number + 1) % HUBS]);
        assert_eq!(device.poll(None, 0).await.status(), StatusCode::OK, "d{number}");
        devices.push(tokio::spawn(obey(device, urls.clone(), Arc::clone(&stop))));
    }

    // The one that decides is killed in the middle of a rollout.
    let rollout = fleet.begin("1.0.0", 0).await;
    let leader = fleet.leader(None).await;
    let killed = fleet.replicas[leader].id.clone();
    fleet.replicas[leader].kill();
    let other = (leader + 1) % HUBS;
    fleet.complete(other, &rollout).await;
    assert_ne!(fleet.replicas[fleet.leader(None).await].id, killed);
    // It comes back under another address, which its devices do not know: they stay elsewhere.
    let child = Replica::spawn(&data(leader), &database, &bucket);
    fleet.replicas[leader] = Replica::ready(child);
    fleet.rigs[leader] = Rig::remote(&fleet.replicas[leader].url, &admin, &publisher);

    // It is stopped, and believes for a while that it still decides when it goes on.
    let rollout = fleet.begin("1.1.0", leader).await;
    let frozen = fleet.leader(None).await;
    let asleep = fleet.replicas[frozen].id.clone();
    fleet.replicas[frozen].signal(Signal::STOP);
    let next = fleet.leader(Some(&asleep)).await;
    fleet.complete(next, &rollout).await;
    fleet.replicas[frozen].signal(Signal::CONT);

    // The database dies, and comes back.
    let rollout = fleet.begin("1.2.0", next).await;
    fleet.server.kill();
    tokio::time::sleep(Duration::from_secs(1)).await;
    fleet.server.resume();
    fleet.complete(next, &rollout).await;
    fleet.complete(frozen, &rollout).await;

    stop.store(true, Ordering::Relaxed);
    for device in devices {
        let told = device.await.unwrap();
        assert!(told.is_sorted() && told.len() >= 4, "{told:?}");
    }
    // Every hub says the same, and every decision was made under one planner's number.
    for rig in &fleet.rigs {
        let verdict = rig.get("/v1/audit/verify").await;
        assert!(verdict.get("broken").is_none(), "{verdict}");
        for version in ["1.0.0", "1.1.0", "1.2.0"] {
            assert_eq!(rig.get(&format!("/v1/releases/m/{version}")).await["version"], version);
        }
    }
    let assigned = fleet.query(
        "SELECT count(*), count(DISTINCT (object, details::json ->> 'generation'))
         FROM audit WHERE action = 'device.assign'",
    );
    let (all, distinct) = assigned.split_once('|').unwrap();
    assert_eq!(all, distinct, "no device was told two things by one generation");
    let planners = fleet.query("SELECT count(*) FROM planners WHERE decisions > 0");
    assert!(planners.parse::<u32>().unwrap() >= 3, "{planners} planners decided");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_whose_blobs_are_elsewhere_is_refused() {
    let server = Server::start();
    let url = server.database("fleet");
    let folder = tempfile::tempdir().unwrap();
    let first = Rig::at(&folder.path().join("one"), Some(&url)).await;
    let config = HubConfig {
        data_dir: folder.path().join("two"),
        database: Some(Postgres::parse(&url, None).unwrap()),
        blobs: None,
        listen: None,
        http: Some("127.0.0.1:0".parse().unwrap()),
        names: vec![],
        public_url: None,
        keep: Default::default(),
        encode: slmops_hub::deltas::encode_on_thread,
    };
    let error = Hub::start(config).await.err().expect("refused").to_string();
    assert!(error.contains("--blobs s3://") && error.contains("hint: "), "{error}");
    assert!(!folder.path().join("two/hub.secret").exists());
    drop(first);
}
