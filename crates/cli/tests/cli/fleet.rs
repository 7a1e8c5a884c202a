//! A hub and devices as real processes, driven by the real program.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

/// The longest wait for anything.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// How often a condition is looked at that nobody announces.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Where a program of the fleet runs.
#[derive(Clone, Debug)]
pub enum Place {
    /// Here.
    Plain,
    /// With its data on a disk of so many bytes, which is lost with the program.
    SmallDisk(u64),
    /// With a clock that is wrong by what the file says, such as `-2d` or `+3600` (see `Clock`).
    Clock(PathBuf),
}

impl Place {
    /// `program`, whose data are at `data`, in this place.
    fn command(&self, program: &Path, data: &Path) -> Command {
        match self {
            Self::Plain => Command::new(program),
            Self::SmallDisk(bytes) => {
                // A mount that only this process sees needs no rights in a user namespace.
                let mut command = Command::new("unshare");
                command.args(["--user", "--map-root-user", "--mount", "sh", "-c"]);
                command.arg(
                    "mkdir -p \"$1\" && mount -t tmpfs -o size=\"$2\" tmpfs \"$1\" \
                     && shift 2 && exec \"$@\"",
                );
                command.arg("sh").arg(data).arg(bytes.to_string()).arg(program);
                command
            }
            Self::Clock(file) => {
                let mut command = Command::new(program);
                command
                    .env("LD_PRELOAD", libfaketime())
                    .env("FAKETIME_TIMESTAMP_FILE", file)
                    .env("FAKETIME_CACHE_DURATION", "1")
                    // Only the time of day jumps; what measures durations does not.
                    .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
                    .env("DONT_FAKE_MONOTONIC", "1")
                    .env("NO_FAKE_STAT", "1");
                command
            }
        }
    }
}

fn libfaketime() -> PathBuf {
    let libraries = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = libraries.map(|entry| entry.path()).collect();
    folders.extend(["/usr/lib".into(), "/usr/lib64".into()]);
    let found = folders.iter().map(|folder| folder.join("faketime/libfaketime.so.1"));
    found.into_iter().find(|path| path.exists()).expect("libfaketime: run `make setup`")
}

/// A child process that does not outlive its test.
pub struct Process(Child);

impl Process {
    /// SIGKILL, and wait until it is gone.
    pub fn kill(&mut self) {
        self.0.kill().expect("a process of ours can be killed");
        self.0.wait().expect("a killed process ends");
    }

    /// A path as it sees it.
    pub fn sees(&self, path: &Path) -> PathBuf {
        let path = path.strip_prefix("/").expect("an absolute path");
        PathBuf::from(format!("/proc/{}/root", self.0.id())).join(path)
    }

    /// Its newest child process: the worker of an agent.
    pub fn child(&self) -> Option<i32> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).ok()?;
        let children = tasks.flatten().filter_map(|task| {
            let children = std::fs::read_to_string(task.path().join("children")).ok()?;
            children.split_whitespace().filter_map(|pid| pid.parse().ok()).max()
        });
        children.max()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A hub and its devices in one temporary folder.
pub struct Fleet {
    folder: tempfile::TempDir,
    /// Environment variables of the hub and of the operator's commands.
    pub settings: Vec<(String, String)>,
    /// The hub's data folder.
    pub data: PathBuf,
    /// What `slm up` said when it was ready.
    pub ready: Value,
    hub: Option<Process>,
    hub_place: Place,
    /// The devices, in the order in which they joined.
    pub devices: Vec<Member>,
}

/// A device of a fleet.
pub struct Member {
    name: String,
    place: Place,
    /// Its agent.
    pub agent: Process,
}

impl Fleet {
    /// A hub on free ports.
    pub fn start() -> Self {
        Self::with(Vec::new())
    }

    /// A hub on free ports with these environment variables.
    pub fn with(settings: Vec<(String, String)>) -> Self {
        Self::start_in(Place::Plain, settings)
    }

    /// A hub on free ports in some place, with these environment variables.
    pub fn start_in(hub_place: Place, settings: Vec<(String, String)>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let data = folder.path().join("hub");
        let (ready, hub, devices) = (Value::Null, None, Vec::new());
        let mut fleet = Self { folder, settings, data, ready, hub, hub_place, devices };
        fleet.start_hub("127.0.0.1:0");
        fleet
    }

    fn start_hub(&mut self, listen: &str) {
        let (hub, ready) = self.another_hub(&self.data, listen);
        (self.hub, self.ready) = (Some(hub), ready);
    }

    /// A hub with its data in that folder, and what it said when it was ready.
    pub fn another_hub(&self, data: &Path, listen: &str) -> (Process, Value) {
        let mut command = self.hub_place.command(Path::new(env!("CARGO_BIN_EXE_slm")), data);
        self.as_operator(&mut command);
        command.args(["up", "--output", "json", "--http", "127.0.0.1:0"]);
        command.arg("--data").arg(data).args(["--listen", listen]);
        let mut child =
            command.stdout(Stdio::piped()).stderr(self.log("hub")).spawn().expect("slm up starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("its stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("slm up prints a line");
        (Process(child), serde_json::from_str(&line).expect("the line is JSON"))
    }

    /// Kills the hub.
    pub fn end_hub(&mut self) {
        if let Some(mut hub) = self.hub.take() {
            hub.kill();
        }
    }

    /// Kills the hub and starts it again where it was.
    pub fn kill_hub(&mut self) {
        self.end_hub();
        let address = self.address().to_string();
        self.start_hub(&address);
    }

    /// Kills a device's agent, and with it its worker, and starts it again.
    pub fn kill_agent(&mut self, index: usize) {
        self.devices[index].agent.kill();
        let Member { name, place, .. } = &self.devices[index];
        self.devices[index].agent = self.agent(name, place, &["run"]);
    }

    /// The hub.
    pub fn hub(&self) -> &Process {
        self.hub.as_ref().expect("a hub that was started")
    }

    /// Where HTTPS answers.
    pub fn address(&self) -> SocketAddr {
        address(&self.ready)
    }

    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command of the operator, not started yet.
    pub fn slm(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slm"));
        self.as_operator(&mut command);
        command.args(arguments);
        command
    }

    fn as_operator(&self, command: &mut Command) {
        command.env("SLM_HOME", self.path("home")).stdin(Stdio::null());
        for variable in ["SLM_HUB", "SLM_TOKEN", "SLM_CA", "SLM_OUTPUT"] {
            command.env_remove(variable);
        }
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        if let (Place::SmallDisk(_), Some(hub)) = (&self.hub_place, &self.hub) {
            // The context names files of that disk, which only the hub sees where they are.
            let token = std::fs::read_to_string(hub.sees(&self.path("hub/admin.token")));
            let url = self.ready["url"].as_str().expect("an address");
            command.env("SLM_CA", hub.sees(&self.path("hub/tls/ca.pem")));
            command.env("SLM_TOKEN", token.expect("a token").trim()).env("SLM_HUB", url);
        }
    }

    /// Runs a command of the operator.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.slm(arguments).output().expect("slm runs")
    }

    /// Runs a command that must succeed and returns its JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--output", "json"]].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "slm {arguments:?}: {errors}");
        serde_json::from_slice(&output.stdout).expect("JSON on stdout")
    }

    /// Runs a command that must fail with this exit code; returns its stderr.
    pub fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "slm {arguments:?}: {errors}");
        assert!(errors.contains("hint: "), "slm {arguments:?} gives no hint: {errors}");
        errors
    }

    /// Invites a device and starts its agent.
    pub fn join(&mut self, name: &str, memory: &str) {
        self.join_in(name, memory, Place::Plain, None);
    }

    /// Invites a device in some place; with a link, it knows the hub by the link's address.
    pub fn join_in(&mut self, name: &str, memory: &str, place: Place, link: Option<SocketAddr>) {
        let invitation = self.run(&["device", "invite"]);
        let mut invitation = String::from_utf8(invitation.stdout).expect("an invitation is text");
        if let Some(link) = link {
            invitation = readdressed(invitation.trim(), link);
        }
        let file = self.path(&format!("{name}.txt"));
        std::fs::write(&file, invitation).expect("the invitation is written");
        let file = file.to_string_lossy().into_owned();
        let settings = ["--name", name, "--memory-budget", memory, "--listen", "127.0.0.1:0"];
        let agent = self.agent(name, &place, &[&["join", &file], &settings[..]].concat());
        self.devices.push(Member { name: name.to_owned(), place, agent });
    }

    fn agent(&self, name: &str, place: &Place, arguments: &[&str]) -> Process {
        let agent = Path::new(env!("CARGO_BIN_EXE_slm")).with_file_name("slm-agent");
        assert!(agent.exists(), "build it first: cargo build --release -p slmops-agent");
        let log = self.log(name);
        let state = self.path(name);
        let child = place
            .command(&agent, &state)
            .args(arguments)
            .arg("--state")
            .arg(state)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .expect("slm-agent starts");
        Process(child)
    }

    fn log(&self, name: &str) -> File {
        let path = self.path(&format!("{name}.log"));
        File::options().create(true).append(true).open(path).expect("a log file")
    }

    /// What hub and devices logged.
    fn logs(&self) -> String {
        let devices = self.devices.iter().map(|device| device.name.as_str());
        let names = std::iter::once("hub").chain(devices);
        let paths = names.map(|name| self.path(&format!("{name}.log")));
        let logs = paths.map(|path| std::fs::read_to_string(path).unwrap_or_default());
        logs.collect::<Vec<_>>().join("\n")
    }

    /// Sets the fleet's runtime to what the tiny model was trained for, and its classes.
    pub fn suit_the_tiny_model(&self) {
        let toml = self.path("fleet.toml");
        let settings = "[runtime]\ncontext_tokens = 128\nparallel = 1\nbatch_tokens = 64\n";
        std::fs::write(&toml, settings).expect("a file");
        self.json(&["blueprint", "set", "fleet", &toml.to_string_lossy()]);
        self.quantise_to(["Q8_0", "Q4_0", "Q4_0"]);
    }

    /// Sets what releases hold for large, medium and small devices.
    fn quantise_to(&self, quantisations: [&str; 3]) {
        let classes = [("large", "256MiB"), ("medium", "192MiB"), ("small", "0")];
        for ((class, memory), quantisation) in classes.into_iter().zip(quantisations) {
            let settings = ["--min-memory", memory, "--quantisation", quantisation];
            self.json(&[&["class", "set", class], &settings[..]].concat());
        }
    }

    /// Makes and rolls out a release of the tiny model, in one quantisation for all devices: a
    /// device gets the best that fits, so releases in two quantisations are two downloads.
    pub fn ship(&self, version: &str, quantisation: &str) {
        let rollout = self.json(&self.shipping(version, quantisation));
        assert_eq!(rollout["state"], "completed", "{rollout}");
    }

    /// The command that makes and rolls out such a release.
    pub fn shipping<'a>(&self, version: &'a str, quantisation: &str) -> [&'a str; 7] {
        self.quantise_to([quantisation; 3]);
        ["ship", model(), "--name", "glass", "--yes", "--version", version]
    }

    /// Waits until so many devices have reported.
    pub fn wait_for_reports(&self, count: usize) {
        self.wait_for("the devices", |devices| {
            devices.len() == count && devices.iter().all(|device| !device["report"].is_null())
        });
    }

    /// Waits until a rollout runs no more; says how it ended.
    pub fn wait_for_end(&self, rollout: &str) -> Value {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let status = self.json(&["rollout", "status", rollout]);
            if status["state"] != "running" {
                return status;
            }
            assert!(Instant::now() < deadline, "the rollout does not end: {status:#}");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits until the devices are as wanted.
    pub fn wait_for(&self, what: &str, holds: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let devices = self.json(&["device", "list"]);
            let devices = devices.as_array().expect("a list").clone();
            if holds(&devices) {
                return devices;
            }
            if Instant::now() >= deadline {
                let why = self.run(&["rollout", "why"]);
                let why = String::from_utf8_lossy(&why.stdout);
                let logs = self.logs();
                panic!("waited for {what}\n{why}\n{devices:#?}\n{logs}");
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// Whether a device runs and has confirmed a version, and is told to.
pub fn confirmed(device: &Value, version: &str) -> bool {
    let report = &device["report"];
    report["phase"] == "confirmed"
        && report["generation"] == device["desired"]["generation"]
        && report["running"]["version"] == version
        && report["running"]["manifest"] == device["desired"]["model"]["manifest"]
        && device["desired"]["model"]["version"] == version
}

/// The device's own endpoint answers a question. It may just be starting its worker again, which it
/// says with a 503.
pub fn answers(device: &Value, context: &str) {
    let endpoint = device["report"]["facts"]["endpoint"].as_str().expect("an endpoint");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        let body = json!({ "prompt": "Alice was beginning to", "max_tokens": 4 });
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let request = client.post(format!("{endpoint}/v1/completions")).json(&body);
            let status = request.send().await.map(|response| response.status().as_u16());
            match status {
                Ok(200) => return,
                Ok(503) | Err(_) if Instant::now() < deadline => tokio::task::yield_now().await,
                other => panic!("{context}: {} at {endpoint} answers {other:?}", device["name"]),
            }
        }
    });
}

/// Where a hub that said this when it was ready answers HTTPS.
pub fn address(ready: &Value) -> SocketAddr {
    let url = ready["url"].as_str().expect("an address");
    url.trim_start_matches("https://").parse().expect("an address and a port")
}

/// An invitation that names another way to the same hub.
fn readdressed(invitation: &str, link: SocketAddr) -> String {
    let (version, text) = invitation.split_once('.').expect("a version and a text");
    let text = URL_SAFE_NO_PAD.decode(text).expect("base64url");
    let mut text: Value = serde_json::from_slice(&text).expect("JSON");
    text["url"] = format!("https://{link}").into();
    format!("{version}.{}", URL_SAFE_NO_PAD.encode(text.to_string()))
}

/// The tiny model.
pub fn model() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/glasslm/glass-f32.gguf")
}
