//! A hub and devices as real processes, driven by the real program.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The longest wait for anything.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// A child process that does not outlive its test.
pub struct Process(Child);

impl Process {
    /// SIGKILL, and wait until it is gone.
    pub fn kill(&mut self) {
        self.0.kill().expect("a process of ours can be killed");
        self.0.wait().expect("a killed process ends");
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
    /// The devices' names and agents, in the order in which they joined.
    pub devices: Vec<(String, Process)>,
}

impl Fleet {
    /// A hub on free ports.
    pub fn start() -> Self {
        Self::with(Vec::new())
    }

    /// A hub on free ports with these environment variables.
    pub fn with(settings: Vec<(String, String)>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let data = folder.path().join("hub");
        let (ready, hub, devices) = (Value::Null, None, Vec::new());
        let mut fleet = Self { folder, settings, data, ready, hub, devices };
        fleet.start_hub("127.0.0.1:0");
        fleet
    }

    fn start_hub(&mut self, listen: &str) {
        let mut command = self.slm(&["up", "--output", "json", "--http", "127.0.0.1:0"]);
        command.arg("--data").arg(&self.data).args(["--listen", listen]);
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("slm up starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("its stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("slm up prints a line");
        self.hub = Some(Process(child));
        self.ready = serde_json::from_str(&line).expect("the line is JSON");
    }

    /// Kills the hub and starts it again where it was.
    pub fn kill_hub(&mut self) {
        if let Some(mut hub) = self.hub.take() {
            hub.kill();
        }
        let url = self.ready["url"].as_str().expect("an address").to_owned();
        self.start_hub(url.trim_start_matches("https://"));
    }

    /// Kills a device's agent, and with it its worker, and starts it again.
    pub fn kill_agent(&mut self, index: usize) {
        self.devices[index].1.kill();
        let name = self.devices[index].0.clone();
        self.devices[index].1 = self.agent(&name, &["run"]);
    }

    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command of the operator, not started yet.
    pub fn slm(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slm"));
        command.env("SLM_HOME", self.path("home")).args(arguments).stdin(Stdio::null());
        for variable in ["SLM_HUB", "SLM_TOKEN", "SLM_CA", "SLM_OUTPUT"] {
            command.env_remove(variable);
        }
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        command
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
        let invitation = self.run(&["device", "invite"]);
        let file = self.path(&format!("{name}.txt"));
        std::fs::write(&file, invitation.stdout).expect("the invitation is written");
        let file = file.to_string_lossy().into_owned();
        let settings = ["--name", name, "--memory-budget", memory, "--listen", "127.0.0.1:0"];
        let agent = self.agent(name, &[&["join", &file], &settings[..]].concat());
        self.devices.push((name.to_owned(), agent));
    }

    fn agent(&self, name: &str, arguments: &[&str]) -> Process {
        let agent = Path::new(env!("CARGO_BIN_EXE_slm")).with_file_name("slm-agent");
        assert!(agent.exists(), "build it first: cargo build --release -p slmops-agent");
        let log = self.path(&format!("{name}.log"));
        let log = File::options().create(true).append(true).open(log).expect("a log file");
        let child = Command::new(agent)
            .args(arguments)
            .arg("--state")
            .arg(self.path(name))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .expect("slm-agent starts");
        Process(child)
    }

    /// Sets the fleet's runtime to what the tiny model was trained for, and its classes.
    pub fn suit_the_tiny_model(&self) {
        let toml = self.path("fleet.toml");
        let settings = "[runtime]\ncontext_tokens = 128\nparallel = 1\nbatch_tokens = 64\n";
        std::fs::write(&toml, settings).expect("a file");
        self.json(&["blueprint", "set", "fleet", &toml.to_string_lossy()]);
        let classes =
            [("large", "256MiB", "Q8_0"), ("medium", "192MiB", "Q4_0"), ("small", "0", "Q4_0")];
        for (class, memory, quantisation) in classes {
            let settings = ["--min-memory", memory, "--quantisation", quantisation];
            self.json(&[&["class", "set", class], &settings[..]].concat());
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
            assert!(Instant::now() < deadline, "waited for {what}: {devices:#?}");
            std::thread::yield_now();
        }
    }
}

/// The tiny model.
pub fn model() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/glasslm/glass-f32.gguf").to_owned()
}
