//! The one writer: changes that wait while another is written go into one transaction, so that many
//! share one flush to the disk. Each still fails alone.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use super::{Connection, DbError, Inner, Tx, transact};

/// Changes in one transaction, at most: what one of them waits for the others is bounded.
const MAX_BATCH: usize = 256;
/// Goes back to where a change began.
const UNDO: &str = "ROLLBACK TO SAVEPOINT change; RELEASE SAVEPOINT change";

/// Where changes wait for the connection that writes.
pub(super) struct Writer {
    queue: Mutex<Queue>,
}

struct Queue {
    waiting: VecDeque<Box<dyn Change>>,
    /// Empty when a connection was lost, and while a thread is at work.
    connection: Option<Connection>,
    at_work: bool,
}

/// A change on its way: run once, then told how its transaction ended.
pub(super) trait Change: Send {
    /// Makes the change; whether it is to be kept.
    fn run(&mut self, tx: &Tx<'_>) -> bool;
    /// Answers whoever waits.
    fn end(self: Box<Self>, outcome: Result<(), DbError>);
}

/// A change with whoever waits for its result.
pub(super) struct Waiting<F, T, E> {
    change: Option<F>,
    result: Option<Result<T, E>>,
    answer: oneshot::Sender<Result<T, E>>,
}

impl<F, T, E> Waiting<F, T, E>
where
    F: FnOnce(&Tx<'_>) -> Result<T, E> + Send + 'static,
    T: Send + 'static,
    E: From<DbError> + Send + 'static,
{
    /// A change, and where its result will be.
    pub(super) fn of(change: F) -> (Box<dyn Change>, oneshot::Receiver<Result<T, E>>) {
        let (answer, answered) = oneshot::channel();
        (Box::new(Self { change: Some(change), result: None, answer }), answered)
    }
}

impl<F, T, E> Change for Waiting<F, T, E>
where
    F: FnOnce(&Tx<'_>) -> Result<T, E> + Send,
    T: Send,
    E: From<DbError> + Send,
{
    fn run(&mut self, tx: &Tx<'_>) -> bool {
        let Some(change) = self.change.take() else { return false };
        // Nothing that it broke is seen by others: all it did is undone.
        let result = catch_unwind(AssertUnwindSafe(|| change(tx)));
        let result = result.unwrap_or_else(|_| Err(DbError::Panicked.into()));
        let keep = result.is_ok();
        self.result = Some(result);
        keep
    }

    fn end(self: Box<Self>, outcome: Result<(), DbError>) {
        let result = match (self.result, outcome) {
            (Some(Err(own)), _) => Err(own),
            (_, Err(error)) => Err(error.into()),
            (Some(result), Ok(())) => result,
            (None, Ok(())) => Err(DbError::ShuttingDown.into()),
        };
        // Whoever went away needs no answer.
        let _ = self.answer.send(result);
    }
}

impl Writer {
    /// A writer over an open connection.
    pub(super) fn new(connection: Connection) -> Self {
        let queue =
            Queue { waiting: VecDeque::new(), connection: Some(connection), at_work: false };
        Self { queue: Mutex::new(queue) }
    }

    /// Puts a change at the end; says whether the caller must see to it that [`work`] runs.
    pub(super) fn push(&self, change: Box<dyn Change>) -> bool {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.waiting.push_back(change);
        !std::mem::replace(&mut queue.at_work, true)
    }

    /// The changes of the next transaction, and the connection if it was not at hand.
    fn next(&self, connection: &mut Option<Connection>) -> Vec<Box<dyn Change>> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(idle) = queue.connection.take() {
            *connection = Some(idle);
        }
        let count = queue.waiting.len().min(MAX_BATCH);
        queue.waiting.drain(..count).collect()
    }

    /// Whether more waits; if not, the work is over and the connection is given back.
    fn more(&self, connection: &mut Option<Connection>) -> bool {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.waiting.is_empty() {
            queue.at_work = false;
            queue.connection = connection.take();
        }
        queue.at_work
    }
}

/// Writes what waits until nothing does. Blocking; one thread at a time.
pub(super) fn work(inner: Arc<Inner>) {
    let mut connection = None;
    loop {
        let mut changes = inner.writer.next(&mut connection);
        let outcome = inner.source.ready(connection.take(), true).and_then(|mut ready| {
            let outcome = write(&mut ready, &mut changes);
            let lost = matches!(&ready, Connection::Postgres(open) if open.is_closed());
            connection = (!lost).then_some(ready);
            outcome
        });
        if !inner.writer.more(&mut connection) {
            // Whoever is answered may open the database anew: it must not be held here any more.
            drop(inner);
            return end_all(changes, outcome);
        }
        end_all(changes, outcome);
    }
}

fn write(connection: &mut Connection, changes: &mut [Box<dyn Change>]) -> Result<(), DbError> {
    transact(connection, true, |tx| {
        for change in changes {
            tx.batch("SAVEPOINT change")?;
            let keep = change.run(tx);
            // What failed may have ended the whole transaction (a full disk); this says so.
            tx.batch(if keep { "RELEASE SAVEPOINT change" } else { UNDO })?;
        }
        Ok::<_, DbError>(())
    })
}

fn end_all(mut changes: Vec<Box<dyn Change>>, outcome: Result<(), DbError>) {
    let Err(error) = outcome else {
        return changes.into_iter().for_each(|change| change.end(Ok(())));
    };
    // Whoever was alone gets the error itself.
    if changes.len() == 1 {
        return changes.remove(0).end(Err(error));
    }
    let error = Arc::new(error);
    for change in changes {
        change.end(Err(DbError::Shared(Arc::clone(&error))));
    }
}
