//! The process of a worker, as its parent sees it: fed, heard, and seen to end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::{mpsc, watch};

use super::protocol::{Command, Event, MAX_LINE_BYTES};
use super::{JOB, WorkerError};
use crate::child::{self, ChildError, StderrTail};

/// The longest that a worker whose stdin closed may take to leave before it is killed: it may have a prompt
/// cache to write to a slow disk.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(30);

/// How a worker's process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Whether it was asked to.
    pub expected: bool,
    /// In words: an exit code, or a signal.
    pub how: String,
    /// The last lines of its stderr.
    pub stderr: String,
}

/// What the keeper of a worker is told.
pub(super) enum Order {
    Send(Box<Command>),
    /// Close its stdin and let it leave.
    Leave,
    Kill,
}

/// The requests under way.
#[derive(Default)]
pub(super) struct Requests {
    state: Mutex<RequestState>,
    /// Counts every change of their number.
    pub(super) changed: watch::Sender<u64>,
}

#[derive(Default)]
pub(super) struct RequestState {
    pub(super) pending: HashMap<u64, mpsc::UnboundedSender<Result<Event, WorkerError>>>,
    pub(super) draining: bool,
    pub(super) ended: Option<Ending>,
}

impl Requests {
    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, RequestState> {
        self.state.lock().expect("no holder panics")
    }

    pub(super) fn remove(&self, id: u64) -> bool {
        let known = self.lock().pending.remove(&id).is_some();
        if known {
            self.changed.send_modify(|count| *count += 1);
        }
        known
    }

    fn deliver(&self, event: Event) {
        let Some(id) = event.id() else { return };
        let last = event.is_last();
        if let Some(sender) = self.lock().pending.get(&id) {
            // A receiver that is gone has sent its cancellation.
            let _ = sender.send(Ok(event));
        }
        if last {
            self.remove(id);
        }
    }

    fn end(&self, ending: Ending) {
        let mut state = self.lock();
        for (_, sender) in state.pending.drain() {
            let _ = sender.send(Err(WorkerError::Died { how: ending.how.clone() }));
        }
        state.ended = Some(ending);
        drop(state);
        self.changed.send_modify(|count| *count += 1);
    }
}

pub(super) async fn send_line(stdin: &mut ChildStdin, mut line: Vec<u8>) -> std::io::Result<()> {
    line.push(b'\n');
    stdin.write_all(&line).await?;
    stdin.flush().await
}

/// The next event; absent when the process closed its stdout. What is no event is skipped.
pub(super) async fn next_event(stdout: &mut BufReader<ChildStdout>) -> Option<Event> {
    let mut line = Vec::new();
    loop {
        match child::read_line(stdout, &mut line, MAX_LINE_BYTES).await {
            Ok(true) => {}
            Ok(false) | Err(_) => return None,
        }
        match serde_json::from_slice(&line) {
            Ok(event) => return Some(event),
            Err(error) => tracing::warn!("a worker's line is not understood: {error}"),
        }
    }
}

/// Owns a worker's process: feeds it, hears it, and sees it end.
pub(super) struct Keeper {
    pub(super) child: Child,
    pub(super) tail: StderrTail,
    pub(super) follower: tokio::task::JoinHandle<()>,
    pub(super) requests: Arc<Requests>,
    pub(super) ended: watch::Sender<Option<Ending>>,
}

impl Keeper {
    pub(super) async fn run(
        mut self,
        stdin: ChildStdin,
        mut stdout: BufReader<ChildStdout>,
        mut orders: mpsc::UnboundedReceiver<Order>,
    ) {
        let requests = Arc::clone(&self.requests);
        let hear = async {
            while let Some(event) = next_event(&mut stdout).await {
                requests.deliver(event);
            }
        };
        let feed = async {
            let mut stdin = stdin;
            loop {
                match orders.recv().await {
                    Some(Order::Send(command)) => {
                        let line = serde_json::to_vec(&command).expect("commands are plain data");
                        if send_line(&mut stdin, line).await.is_err() {
                            // It is dying: `hear` ends next.
                            std::future::pending::<()>().await;
                        }
                    }
                    Some(Order::Leave) => {
                        drop(stdin);
                        tokio::time::sleep(LEAVE_TIMEOUT).await;
                        return;
                    }
                    // All handles are gone.
                    Some(Order::Kill) | None => return,
                }
            }
        };
        let mut asked = false;
        tokio::select! {
            () = hear => {}
            () = feed => asked = true,
        }
        asked |= self.requests.lock().draining;
        // Where it still runs it has closed its stdout, or was asked to leave: it is of no more use.
        let _ = self.child.start_kill();
        let status = self.child.wait().await.unwrap_or_default();
        let _ = self.follower.await;
        let how = match child::ended(JOB, status, String::new()) {
            ChildError::Crashed { signal, .. } => {
                format!("signal {signal}, {}", child::signal_name(signal))
            }
            _ => format!("exit code {}", status.code().unwrap_or(-1)),
        };
        let ending = Ending { expected: asked, how, stderr: self.tail.text() };
        self.requests.end(ending.clone());
        self.ended.send_replace(Some(ending));
    }
}
