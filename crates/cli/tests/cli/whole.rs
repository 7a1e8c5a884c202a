//! A real hub, driven by the real program, with a real (tiny) model and a real device.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const TIMEOUT: Duration = Duration::from_secs(60);

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Fleet {
    folder: tempfile::TempDir,
    hub: Option<Process>,
    devices: Vec<Process>,
}

impl Fleet {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut fleet = Self { folder, hub: None, devices: Vec::new() };
        fleet.start_hub("127.0.0.1:0");
        fleet
    }

    fn start_hub(&mut self, listen: &str) -> Value {
        let mut command = self.slm(&["up", "--output", "json", "--http", "127.0.0.1:0"]);
        let data = self.path("hub");
        command.arg("--data").arg(data).args(["--listen", listen]);
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("slm up starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("its stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("slm up prints a line");
        self.hub = Some(Process(child));
        serde_json::from_str(&line).expect("the line is JSON")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn slm(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slm"));
        command.env("SLM_HOME", self.path("home")).args(arguments).stdin(Stdio::null());
        for variable in ["SLM_HUB", "SLM_TOKEN", "SLM_CA", "SLM_OUTPUT"] {
            command.env_remove(variable);
        }
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.slm(arguments).output().expect("slm runs")
    }

    /// Runs a command that must succeed and returns its JSON.
    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--output", "json"]].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "slm {arguments:?}: {errors}");
        serde_json::from_slice(&output.stdout).expect("JSON on stdout")
    }

    /// Runs a command that must fail with this exit code; returns its stderr.
    fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "slm {arguments:?}: {errors}");
        assert!(errors.contains("hint: "), "slm {arguments:?} gives no hint: {errors}");
        errors
    }

    fn join(&mut self, name: &str, memory: &str) {
        let agent = Path::new(env!("CARGO_BIN_EXE_slm")).with_file_name("slm-agent");
        assert!(agent.exists(), "build it first: cargo build --release -p slmops-agent");
        let invitation = self.run(&["device", "invite"]);
        let file = self.path(&format!("{name}.txt"));
        std::fs::write(&file, invitation.stdout).expect("the invitation is written");
        let log = std::fs::File::create(self.path(&format!("{name}.log"))).expect("a log file");
        let child = Command::new(agent)
            .arg("join")
            .arg(&file)
            .arg("--state")
            .arg(self.path(name))
            .args(["--name", name, "--memory-budget", memory, "--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .expect("slm-agent starts");
        self.devices.push(Process(child));
    }

    /// Waits until the devices are as wanted.
    fn wait_for(&self, what: &str, holds: impl Fn(&[Value]) -> bool) -> Vec<Value> {
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

fn model() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/glasslm/glass-f32.gguf").to_owned()
}

#[test]
fn a_hub_answers_every_noun() {
    let fleet = Fleet::start();
    let classes = fleet.json(&["class", "list"]);
    assert!(classes.as_array().is_some_and(|classes| !classes.is_empty()), "{classes}");
    fleet.json(&["class", "set", "tiny", "--min-memory", "1MB", "--quantisation", "q2_k"]);
    let classes = fleet.json(&["class", "list"]).to_string();
    assert!(classes.contains("Q2_K"), "{classes}");
    fleet.json(&["class", "delete", "tiny"]);

    let secret = fleet.json(&["token", "create", "ci", "--role", "viewer"]);
    let secret = secret["secret"].as_str().expect("a secret").to_owned();
    let mut viewer =
        fleet.slm(&["class", "set", "x", "--min-memory", "1", "--quantisation", "Q8_0"]);
    let refused = viewer.env("SLM_TOKEN", &secret).output().expect("slm runs");
    assert_eq!(refused.status.code(), Some(1), "a viewer must not change classes");
    let mut viewer = fleet.slm(&["class", "list"]);
    let allowed = viewer.env("SLM_TOKEN", secret).output().expect("slm runs");
    assert!(allowed.status.success(), "a viewer may look");

    let toml = fleet.path("fleet.toml");
    std::fs::write(&toml, "[runtime]\ncontext_tokens = 128\n").expect("a file");
    fleet.json(&["blueprint", "set", "fleet", &toml.to_string_lossy()]);
    let shown = fleet.run(&["blueprint", "show", "fleet"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("context_tokens = 128"));
    std::fs::write(&toml, "[runtime]\nkontext = 128\n").expect("a file");
    fleet.refused(1, &["blueprint", "set", "fleet", &toml.to_string_lossy()]);
    fleet.refused(1, &["blueprint", "show", "class/small"]);

    fleet.json(&["key", "create", "second"]);
    let keys = fleet.json(&["key", "list"]);
    assert_eq!(keys.as_array().map(Vec::len), Some(2), "{keys}");
    fleet.refused(1, &["key", "create", "second"]);

    assert!(fleet.run(&["device", "invite"]).stdout.starts_with(b"slmi1."));
    fleet.refused(1, &["device", "show", "nobody"]);
    fleet.refused(1, &["rollout", "why"]);
    assert_eq!(fleet.json(&["release", "list"]), serde_json::json!([]));

    let verdict = fleet.json(&["audit", "verify"]);
    assert!(verdict["entries"].as_u64().is_some_and(|entries| entries > 4), "{verdict}");
    assert!(verdict.get("broken").is_none(), "{verdict}");
}

#[test]
fn a_second_hub_on_the_same_folder_is_refused() {
    let fleet = Fleet::start();
    let data = fleet.path("hub").to_string_lossy().into_owned();
    let listen = ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    fleet.refused(1, &[&["up", "--data", &data], &listen[..]].concat());
    let other = fleet.path("other").to_string_lossy().into_owned();
    fleet.refused(1, &["up", "--data", &other, "--listen", "127.0.0.1:0", "--http", "0.0.0.0:0"]);
}

#[test]
fn a_model_travels_from_a_file_to_a_confirmed_device() {
    let mut fleet = Fleet::start();
    let toml = fleet.path("fleet.toml");
    // The tiny model was trained with a context of 128 tokens.
    let settings = "[runtime]\ncontext_tokens = 128\nparallel = 1\nbatch_tokens = 64\n";
    std::fs::write(&toml, settings).expect("a file");
    fleet.json(&["blueprint", "set", "fleet", &toml.to_string_lossy()]);
    for class in ["large", "medium", "small"] {
        let quantisation = if class == "large" { "Q8_0" } else { "Q4_0" };
        let bound = match class {
            "large" => "256MiB",
            "medium" => "192MiB",
            _ => "0",
        };
        fleet.json(&["class", "set", class, "--min-memory", bound, "--quantisation", quantisation]);
    }
    fleet.join("till", "150MB");
    fleet.wait_for("the device", |devices| devices.len() == 1);

    let ship = ["ship", &model(), "--name", "glass", "--yes"];
    let rollout = fleet.json(&ship);
    assert_eq!(rollout["state"], "completed", "{rollout}");
    let devices =
        fleet.wait_for("a confirmed model", |devices| devices[0]["report"]["phase"] == "confirmed");
    assert_eq!(devices[0]["report"]["running"]["version"], "1.0.0");

    // The same again: nothing is made, measured or sent anew, and nothing new is released.
    let again = fleet.run(&[&ship[..], &["--until", "release"]].concat());
    assert!(again.status.success());
    let releases = fleet.json(&["release", "list"]);
    assert_eq!(releases.as_array().map(Vec::len), Some(1), "{releases}");

    let why = fleet.run(&["rollout", "why"]);
    assert!(String::from_utf8_lossy(&why.stdout).contains("completed"));
    assert!(fleet.json(&["audit", "verify"]).get("broken").is_none());
}
