//! Jobs in child processes: what an engine abort may kill is a child, never the program itself.
//!
//! Each binary calls [`run_if_child`] first in `main`; [`call`] then starts the same binary as
//! `PROGRAM internal NAME`, writes the input as JSON to its stdin, and reads JSON lines from its
//! stdout: any number of `{"progress":…}`, then one `{"result":…}` or `{"error":"…"}`.
//! A child dies with its parent.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStderr, Command};

/// The first argument of a program started as a child.
pub const CHILD_ARGUMENT: &str = "internal";
/// Environment variable that names the program to start as a child instead of the running one.
pub const CHILD_EXE_VARIABLE: &str = "SLMOPS_CHILD_EXE";
/// Environment variable that carries the parent's process id to a child.
pub(crate) const PARENT_VARIABLE: &str = "SLMOPS_PARENT_PID";
/// The most bytes of JSON that a job reads as its input.
pub const MAX_INPUT_BYTES: u64 = 256 << 20;
/// The most bytes of one line that a parent accepts from a job.
const MAX_LINE_BYTES: usize = 256 << 20;
/// The lines of a child's stderr that an error message keeps.
const STDERR_TAIL_LINES: usize = 12;
/// The bytes of one line of stderr that an error message keeps.
const STDERR_LINE_BYTES: usize = 400;

/// Something that a child process can do.
#[derive(Clone, Copy)]
pub struct Job {
    /// Its name, the second argument of the child.
    pub name: &'static str,
    /// Does it: input, where progress goes, result.
    pub run: fn(Value, &mut dyn FnMut(Value)) -> anyhow::Result<Value>,
}

/// Why a job gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// The child could not be started.
    #[error("start the child process for `{job}` from {program}: {source}")]
    Spawn {
        /// The job.
        job: String,
        /// The program.
        program: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The job itself says that it failed.
    #[error("{job}: {message}")]
    Failed {
        /// The job.
        job: String,
        /// Its own words.
        message: String,
    },
    /// A signal ended the child: an abort of the engine, or the system short of memory.
    #[error(
        "{job}: its process was ended by signal {signal} ({})\n{stderr}\nhint: {}",
        signal_name(*signal),
        signal_hint(*signal)
    )]
    Crashed {
        /// The job.
        job: String,
        /// The signal.
        signal: i32,
        /// The last lines of its stderr.
        stderr: String,
    },
    /// The child ended without a result.
    #[error("{job}: its process ended with exit code {code} and no result\n{stderr}")]
    Exited {
        /// The job.
        job: String,
        /// The exit code.
        code: i32,
        /// The last lines of its stderr.
        stderr: String,
    },
    /// Talking to the child failed.
    #[error("{job}: talk to its process: {source}")]
    Io {
        /// The job.
        job: String,
        /// The cause.
        source: std::io::Error,
    },
}

/// A signal's name, such as `SIGABRT`.
pub fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGILL => "SIGILL",
        libc::SIGINT => "SIGINT",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGTERM => "SIGTERM",
        _ => "a signal",
    }
}

fn signal_hint(signal: i32) -> &'static str {
    match signal {
        libc::SIGKILL => "the system may be short of memory; see `dmesg`",
        libc::SIGILL => "this build of the engine needs a newer processor",
        libc::SIGINT | libc::SIGTERM => "someone stopped it; start it again",
        _ => "the model file may be damaged; check it with `slm model show`",
    }
}

/// Runs the job named on the command line and exits, if this process was started as a child;
/// returns at once otherwise. Call it first in `main`.
pub fn run_if_child(jobs: &[Job]) {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next() != Some(OsString::from(CHILD_ARGUMENT)) {
        return;
    }
    let name = arguments.next().unwrap_or_default().to_string_lossy().into_owned();
    die_with_parent();
    crate::llama::log_to_stderr();
    if name == crate::worker::JOB {
        std::process::exit(crate::worker::run());
    }
    let own = Job { name: crate::constraint::JOB, run: crate::constraint::check_job };
    let Some(job) = jobs.iter().chain([&own]).find(|job| job.name == name) else {
        eprintln!("no job is named `{name}`; `{CHILD_ARGUMENT}` is not for people");
        std::process::exit(1);
    };
    std::process::exit(run_job(job));
}

fn run_job(job: &Job) -> i32 {
    let mut input = Vec::new();
    let outcome = std::io::stdin()
        .lock()
        .take(MAX_INPUT_BYTES)
        .read_to_end(&mut input)
        .map_err(anyhow::Error::from)
        .and_then(|_| Ok(serde_json::from_slice(&input)?))
        .and_then(|input| {
            (job.run)(input, &mut |progress| print_line(&json!({ "progress": progress })))
        });
    match outcome {
        Ok(result) => {
            print_line(&json!({ "result": result }));
            0
        }
        Err(error) => {
            print_line(&json!({ "error": format!("{error:#}") }));
            1
        }
    }
}

/// A line for the parent.
pub(crate) fn print_line(line: &impl serde::Serialize) {
    let mut lines = Vec::new();
    push_line(&mut lines, line);
    write_lines(&lines);
}

/// Puts a line at the end of others.
pub(crate) fn push_line(lines: &mut Vec<u8>, line: &impl serde::Serialize) {
    serde_json::to_writer(&mut *lines, line).expect("plain data is always JSON");
    lines.push(b'\n');
}

/// Lines for the parent. A parent that no longer listens is gone: so is the child's purpose.
pub(crate) fn write_lines(lines: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(lines).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(1);
    }
}

/// Asks the kernel to kill this process when its parent dies, leaves no core files, and exits
/// where the parent is already gone.
fn die_with_parent() {
    use rustix::process::{Resource, Rlimit, Signal};
    let _ =
        rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().to_string());
    if let Ok(expected) = std::env::var(PARENT_VARIABLE)
        && parent.as_deref() != Some(&expected)
    {
        std::process::exit(1);
    }
}

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Names the program started as a child from now on; the first call in a process counts. For
/// tests, whose own binary is no program of ours.
pub fn set_program(path: impl Into<PathBuf>) {
    let _ = PROGRAM.set(path.into());
}

/// The program started as a child.
fn program() -> std::io::Result<PathBuf> {
    if let Some(path) = PROGRAM.get() {
        return Ok(path.clone());
    }
    if let Some(path) = std::env::var_os(CHILD_EXE_VARIABLE) {
        return Ok(path.into());
    }
    // The file that this process was started from, even when it was since replaced on disk: an
    // updated program must not start children that speak another protocol.
    let own = Path::new("/proc/self/exe");
    if own.exists() { Ok(own.to_owned()) } else { std::env::current_exe() }
}

/// Starts a child with stdin, stdout and stderr piped.
///
/// The kernel ties a child to the *thread* that started it (prctl(2), `PR_SET_PDEATHSIG`), so all
/// children are started from one thread that lives as long as the process.
pub(crate) async fn spawn(job: &str) -> Result<Child, ChildError> {
    type Request = (Command, tokio::runtime::Handle, Reply);
    type Reply = tokio::sync::oneshot::Sender<std::io::Result<Child>>;
    static SPAWNER: OnceLock<std::sync::mpsc::Sender<Request>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, receiver) = std::sync::mpsc::channel::<Request>();
        std::thread::Builder::new()
            .name("spawner".to_owned())
            .spawn(move || {
                for (mut command, runtime, reply) in receiver {
                    let _inside = runtime.enter();
                    let _ = reply.send(command.spawn());
                }
            })
            .expect("a thread can be started");
        sender
    });

    let shown = |path: &Path| {
        std::fs::read_link(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
    };
    let failed =
        |program: String, source| ChildError::Spawn { job: job.to_owned(), program, source };
    let path = program().map_err(|source| failed("this program".to_owned(), source))?;
    let mut command = Command::new(&path);
    command
        .arg(CHILD_ARGUMENT)
        .arg(job)
        .env(PARENT_VARIABLE, std::process::id().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if job == crate::worker::JOB {
        // Ctrl-C is for its parent, which lets it leave when its requests are done.
        command.process_group(0);
    }
    let (reply, answer) = tokio::sync::oneshot::channel();
    spawner
        .send((command, tokio::runtime::Handle::current(), reply))
        .expect("the spawner thread lives as long as the process");
    let child = answer.await.expect("the spawner thread answers");
    child.map_err(|source| failed(shown(&path), source))
}

/// The last lines of a child's stderr, kept while it runs.
#[derive(Clone, Default)]
pub(crate) struct StderrTail(Arc<Mutex<VecDeque<String>>>);

impl StderrTail {
    /// Reads `stderr` to its end, keeping the last lines and tracing each.
    pub(crate) async fn follow(self, job: String, stderr: ChildStderr) {
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        loop {
            line.clear();
            match reader.read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            line.truncate(STDERR_LINE_BYTES);
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if text.is_empty() {
                continue;
            }
            tracing::debug!(target: "slmops::child", job, "{text}");
            let mut kept = self.0.lock().expect("no holder panics");
            if kept.len() == STDERR_TAIL_LINES {
                kept.pop_front();
            }
            kept.push_back(text);
        }
    }

    /// The lines kept so far, each indented.
    pub(crate) fn text(&self) -> String {
        let kept = self.0.lock().expect("no holder panics");
        kept.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
    }
}

/// How a child ended, as an error.
pub(crate) fn ended(job: &str, status: ExitStatus, stderr: String) -> ChildError {
    let job = job.to_owned();
    match status.signal() {
        Some(signal) => ChildError::Crashed { job, signal, stderr },
        None => ChildError::Exited { job, code: status.code().unwrap_or(-1), stderr },
    }
}

/// Runs a job in a child process; `on_progress` gets what it reports on the way.
/// Dropping the future kills the child.
///
/// # Errors
/// The job's own failure, or that its process could not start, crashed or ended early.
pub async fn call(
    job: &str,
    input: Value,
    mut on_progress: impl FnMut(Value),
) -> Result<Value, ChildError> {
    let mut child = spawn(job).await?;
    let io = |source| ChildError::Io { job: job.to_owned(), source };
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let stdout = child.stdout.take().expect("stdout is piped");
    let tail = StderrTail::default();
    let follower = tail.clone().follow(job.to_owned(), child.stderr.take().expect("piped"));
    let follower = tokio::spawn(follower);

    // A child that dies early closes the pipe; how it died says more than the broken pipe.
    let text = input.to_string();
    let write = async move {
        let _ = stdin.write_all(text.as_bytes()).await;
        drop(stdin);
    };
    let read = async {
        let mut reader = BufReader::new(stdout);
        let mut outcome = None;
        let mut line = Vec::new();
        while read_line(&mut reader, &mut line, MAX_LINE_BYTES).await.map_err(io)? {
            let Ok(Value::Object(mut message)) = serde_json::from_slice(&line) else { continue };
            if let Some(progress) = message.remove("progress") {
                on_progress(progress);
            } else if let Some(result) = message.remove("result") {
                outcome = Some(Ok(result));
            } else if let Some(Value::String(message)) = message.remove("error") {
                outcome = Some(Err(ChildError::Failed { job: job.to_owned(), message }));
            }
        }
        Ok(outcome)
    };
    let ((), outcome) = tokio::join!(write, read);
    let outcome = outcome?;
    let status = child.wait().await.map_err(io)?;
    let _ = follower.await;
    outcome.unwrap_or_else(|| Err(ended(job, status, tail.text())))
}

/// Reads one line into `line`, without its end; false at the end of the stream.
pub(crate) async fn read_line(
    reader: &mut (impl tokio::io::AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
    limit_bytes: usize,
) -> std::io::Result<bool> {
    line.clear();
    loop {
        let available = reader.fill_buf().await?;
        if available.is_empty() {
            return Ok(!line.is_empty());
        }
        let end = available.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(available.len());
        if line.len() + taken > limit_bytes {
            let message = format!("a line is longer than {limit_bytes} bytes");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, message));
        }
        line.extend_from_slice(&available[..taken]);
        let consumed = taken + usize::from(end.is_some());
        reader.consume(consumed);
        if end.is_some() {
            return Ok(true);
        }
    }
}
