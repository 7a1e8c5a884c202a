//! The hub under load: a child process over a folder of its own, and what the system says of it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use slmops_inference::worker::memory_of;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::wire::Target;
use crate::client::Hub;
use crate::demo::process::DIE_WITH_PARENT;
use crate::error::{Context as _, Failure, Result};
use crate::home::Access;

/// How long a hub may take to be ready or to stop.
const PATIENCE: Duration = Duration::from_secs(120);
/// Clock ticks per second in /proc; the kernel's USER_HZ, which is 100 on every architecture of ours.
const TICKS_PER_S: f64 = 100.0;

/// A running hub.
pub struct Server {
    child: Child,
    /// Its API, as an operator.
    pub api: Hub,
    /// Where devices reach it.
    pub target: Target,
    /// How long it took from its start until it answered.
    pub ready_after: Duration,
    pid: u32,
}

/// What the hub's process has used so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// User and system time, in seconds.
    pub cpu_s: f64,
    /// Resident memory now, in bytes.
    pub memory_bytes: u64,
    /// Resident memory at its peak, in bytes.
    pub peak_bytes: u64,
}

#[derive(Deserialize)]
struct Ready {
    url: String,
    ca: PathBuf,
}

impl Server {
    /// Starts `slm up` over `folder`, which another hub may have used before.
    pub async fn start(folder: &Path) -> Result<Self> {
        let begun = Instant::now();
        let what = || "start the hub".to_owned();
        let program = std::env::current_exe().internal(what)?;
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(folder.join("hub.log"))
            .internal(what)?;
        let mut child = Command::new(program)
            .args(["up", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--output", "json"])
            .arg("--data")
            .arg(folder.join("hub"))
            .env("SLM_HOME", folder.join("home"))
            .env("SLM_LOG", "warn")
            .env(DIE_WITH_PARENT, "1")
            .env_remove("SLM_DATABASE")
            .env_remove("SLM_PUBLIC_URL")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .internal(what)?;
        let failed = || {
            let log = std::fs::read_to_string(folder.join("hub.log")).unwrap_or_default();
            Failure::internal(format!("the hub did not start:\n{log}"))
        };
        let stdout = child.stdout.take().ok_or_else(failed)?;
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await;
        let line = line.ok().and_then(Result::ok).flatten().ok_or_else(failed)?;
        let ready: Ready = serde_json::from_str(&line).internal(what)?;
        let pid = child.id().ok_or_else(failed)?;
        let ca_pem = std::fs::read(&ready.ca).internal(what)?;
        let address = ready.url.trim_start_matches("https://").parse().internal(what)?;
        let target = Target::new(address, &ca_pem)?;
        let token =
            std::fs::read_to_string(folder.join("hub").join(slmops_hub::server::ADMIN_TOKEN_FILE))
                .internal(what)?;
        let api = Hub::new(Access {
            hub: ready.url,
            ca_pem: Some(ca_pem),
            token: token.trim().to_owned(),
        })?;
        Ok(Self { child, api, target, ready_after: begun.elapsed(), pid })
    }

    /// What it has used so far.
    pub fn usage(&self) -> Result<Usage> {
        let path = format!("/proc/{}/stat", self.pid);
        let stat = std::fs::read_to_string(&path).internal(|| format!("read {path}"))?;
        // The second field is the program's name in parentheses; fields 14 and 15 are the times
        // (proc_pid_stat(5)).
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let field = |index: usize| {
            after_name.split_whitespace().nth(index - 3).and_then(|text| text.parse::<f64>().ok())
        };
        let ticks = field(14).zip(field(15)).map(|(user, system)| user + system);
        let memory = memory_of(self.pid);
        Ok(Usage {
            cpu_s: ticks.unwrap_or(0.0) / TICKS_PER_S,
            memory_bytes: memory.resident_bytes,
            peak_bytes: memory.peak_bytes,
        })
    }

    /// Ends it as a power cut would.
    pub async fn kill(mut self) -> Result<()> {
        self.child.kill().await.internal(|| "kill the hub".to_owned())
    }

    /// Asks it to end, and waits until it has.
    pub async fn stop(mut self) -> Result<()> {
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            // If it is gone already, that is what we want.
            let _ = kill_process(pid, Signal::TERM);
        }
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        ended
            .map_err(|_| Failure::internal("the hub does not stop"))?
            .internal(|| "wait for the hub".to_owned())
            .map(|_| ())
    }
}

/// Bytes of the hub's database with its log.
pub fn database_bytes(folder: &Path) -> u64 {
    let size = |name: &str| {
        let path = folder.join("hub").join(name);
        std::fs::metadata(path).map_or(0, |found| found.len())
    };
    let name = slmops_hub::db::DATABASE_FILE;
    size(name) + size(&format!("{name}-wal"))
}
