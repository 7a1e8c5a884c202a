//! The servers that are measured: processes that say at which URL they answer, and end with this one.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use slmops_api::runtime::RuntimeConfig;
use slmops_inference::worker::memory_of;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};

use super::client::Endpoint;
use crate::demo::process::DIE_WITH_PARENT;
use crate::error::{Context as _, Failure, Result};

/// How long an endpoint may take to load its model.
const PATIENCE: Duration = Duration::from_secs(300);

/// A server in a process of its own.
pub struct Server {
    /// For people.
    pub name: String,
    /// Where it answers.
    pub endpoint: Endpoint,
    process: Option<Process>,
}

struct Process {
    child: Child,
    /// Peers end when it is closed.
    _stdin: Option<ChildStdin>,
}

impl Server {
    /// `slm serve`, configured so.
    pub async fn ours(model: &Path, runtime: &RuntimeConfig) -> Result<Self> {
        let what = || "start `slm serve`".to_owned();
        let mut command = Command::new(std::env::current_exe().internal(what)?);
        command.args(["serve", "--listen", "127.0.0.1:0", "--output", "json"]);
        command.args(["--queue", &runtime.queue_limit.to_string()]);
        Self::start("slm serve", command, model, runtime).await
    }

    /// A peer's program, which takes the same options.
    pub async fn peer(program: &Path, model: &Path, runtime: &RuntimeConfig) -> Result<Self> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self::start(&name, Command::new(program), model, runtime).await
    }

    /// One that runs already.
    pub fn at(url: &str) -> Result<Self> {
        Ok(Self { name: url.to_owned(), endpoint: Endpoint::new(url)?, process: None })
    }

    async fn start(
        name: &str,
        mut command: Command,
        model: &Path,
        runtime: &RuntimeConfig,
    ) -> Result<Self> {
        let what = || format!("start `{name}`");
        let mut child = command
            .args(["--context", &runtime.context_tokens.to_string()])
            .args(["--parallel", &runtime.parallel.to_string()])
            .args(["--threads", &runtime.threads.to_string()])
            .args(["--batch", &runtime.batch_tokens.to_string()])
            .arg(model)
            .env(DIE_WITH_PARENT, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .user(what)?;
        let output = child.stdout.take().ok_or_else(|| Failure::internal(what()))?;
        let mut complaints = child.stderr.take().ok_or_else(|| Failure::internal(what()))?;
        // Whatever it says later, it shall not wait until somebody reads it.
        let complaints = tokio::spawn(async move {
            let mut last = Vec::new();
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) =
                tokio::io::AsyncReadExt::read(&mut complaints, &mut piece).await
            {
                last.extend_from_slice(&piece[..count]);
                last.drain(..last.len().saturating_sub(2_000));
            }
            String::from_utf8_lossy(&last).into_owned()
        });
        let mut lines = BufReader::new(output).lines();
        let read = async {
            let mut text = String::new();
            while let Ok(Some(line)) = lines.next_line().await {
                text.push_str(&line);
                if line.starts_with("http://") {
                    return Some(line);
                }
                if let Ok(ready) = serde_json::from_str::<serde_json::Value>(&text) {
                    return ready["url"].as_str().map(str::to_owned);
                }
            }
            None
        };
        let Some(url) = tokio::time::timeout(PATIENCE, read).await.ok().flatten() else {
            let _ = child.kill().await;
            let said = complaints.await.unwrap_or_default();
            let said = said.trim();
            return Err(Failure::user(format!("`{name}` did not start: {said}"))
                .hint("start it by hand to see why; it must print its URL once it answers"));
        };
        // Nothing else is read of what it prints.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let stdin = child.stdin.take();
        Ok(Self {
            name: name.to_owned(),
            endpoint: Endpoint::new(&url)?,
            process: Some(Process { child, _stdin: stdin }),
        })
    }

    /// Of its process and its children; absent where those are not known.
    pub fn resident_bytes(&self) -> Option<u64> {
        let pid = self.process.as_ref()?.child.id()?;
        let children = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
        let children = children
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        let children: Vec<u32> = children
            .flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|pid| pid.parse().ok())
            .collect();
        let own = std::iter::once(pid).chain(children);
        Some(own.map(|pid| memory_of(pid).resident_bytes).sum())
    }
}

/// The programs of peers in a folder, by name; none where there is no such folder.
pub fn programs(folder: &Path) -> Vec<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut programs: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            path.metadata().is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
        })
        .collect();
    programs.sort();
    programs
}
