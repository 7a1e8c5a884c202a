//! The demo's child processes: each in a process group of its own, none of which outlives the demo.

use std::fs::File;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::error::{Context, Failure, Result};

/// How long a process may take to end by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// Lines of a log that an error shows.
const LOG_TAIL_LINES: usize = 15;
/// Times that one process is started again, at most.
const MAX_RESTARTS: u32 = 20;
/// A process that finds this variable set ends when its parent does.
pub const DIE_WITH_PARENT: &str = "SLM_DIE_WITH_PARENT";

/// A running process of the demo.
pub struct Process {
    /// For messages.
    pub name: String,
    child: Child,
    group: Pid,
    log: PathBuf,
    /// How to start it again when it was killed.
    again: Option<Box<dyn Fn() -> Command + Send>>,
    /// How often it was.
    restarts: u32,
}

impl Process {
    /// Starts `program`; its stderr goes to a log file, its stdout too unless `piped`.
    pub fn start(name: &str, command: &mut Command, log: &Path, piped: bool) -> Result<Self> {
        let create = File::options().create(true).append(true).open(log);
        let file = create.user(|| format!("create `{}`", log.display()))?;
        let (child, group) = Self::spawn(name, command, file, piped)?;
        let log = log.to_owned();
        Ok(Self { name: name.to_owned(), child, group, log, again: None, restarts: 0 })
    }

    /// Has it started again with `command` whenever somebody kills it, as a service manager would.
    #[must_use]
    pub fn restarting(mut self, command: impl Fn() -> Command + Send + 'static) -> Self {
        self.again = Some(Box::new(command));
        self
    }

    fn spawn(name: &str, command: &mut Command, file: File, piped: bool) -> Result<(Child, Pid)> {
        let what = || format!("start {name}");
        let stdout =
            if piped { Stdio::piped() } else { Stdio::from(file.try_clone().internal(what)?) };
        let child = command
            .env(DIE_WITH_PARENT, "1")
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(Stdio::from(file))
            // Ctrl-C on the terminal reaches the demo alone, which then ends the others in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .internal(what)?;
        let id = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let group = id.ok_or_else(|| Failure::internal(what()))?;
        Ok((child, group))
    }

    /// The process id.
    pub fn id(&self) -> i32 {
        self.group.as_raw_nonzero().get()
    }

    /// The lines of its stdout, if that is piped.
    pub fn lines(&mut self) -> Option<Lines<BufReader<ChildStdout>>> {
        self.child.stdout.take().map(|stdout| BufReader::new(stdout).lines())
    }

    /// How often it was started again.
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// Starts it again if it was killed, and says so; fails if it has ended otherwise.
    pub fn tend(&mut self) -> Result<Option<String>> {
        match self.child.try_wait() {
            Ok(None) => Ok(None),
            Ok(Some(status)) => match (&self.again, status.signal()) {
                (Some(again), Some(signal)) if self.restarts < MAX_RESTARTS => {
                    // What it left behind of its group is gone before the next one begins.
                    let _ = kill_process_group(self.group, Signal::KILL);
                    let create = File::options().create(true).append(true).open(&self.log);
                    let file = create.user(|| format!("open `{}`", self.log.display()))?;
                    (self.child, self.group) = Self::spawn(&self.name, &mut again(), file, false)?;
                    self.restarts += 1;
                    Ok(Some(format!(
                        "{} was killed (signal {signal}); it is started again as process {}",
                        self.name,
                        self.id()
                    )))
                }
                _ => Err(self.ended(status)),
            },
            Err(error) => Err(Failure::internal(format!("look after {}", self.name)).source(error)),
        }
    }

    fn ended(&self, status: ExitStatus) -> Failure {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n  ");
        Failure::internal(format!("{} ended ({status}); its last words:\n  {tail}", self.name))
    }

    /// Asks the whole group to end, waits a little, then makes it.
    pub async fn stop(mut self) {
        // A group that is gone already is what we want.
        let _ = kill_process_group(self.group, Signal::TERM);
        let ended = tokio::time::timeout(GRACE, self.child.wait()).await.is_ok();
        if !ended {
            tracing::warn!("{} does not end by itself: killing it", self.name);
        }
        let _ = kill_process_group(self.group, Signal::KILL);
        let _ = self.child.wait().await;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Reached only without `stop`, for example on a panic: then at once and wholly.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process_group(self.group, Signal::KILL);
        }
    }
}

/// Ends this process with its parent, if [`DIE_WITH_PARENT`] is set. Call it first in `main`.
pub fn die_with_parent_if_asked() {
    if std::env::var_os(DIE_WITH_PARENT).is_none() {
        return;
    }
    // Where the system cannot do it, the demo's own clean-up has to do.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::TERM));
    if rustix::process::getppid().is_none_or(|parent| parent.is_init()) {
        std::process::exit(0);
    }
}
