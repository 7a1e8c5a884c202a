//! What comes back for one request.

use tokio::sync::mpsc;

use super::keeper::Order;
use super::protocol::{Command, Event, Finish, Piece};
use super::{Worker, WorkerError, unexpected};

/// What a generation puts out.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// The request got a sequence; its prompt is being processed.
    Started,
    /// The prompt, as it was asked for; before the first piece.
    Echo(Piece),
    /// More of the answer.
    Piece(Piece),
    /// The end; nothing follows.
    Finished(Finish),
}

/// An answer under way. Dropping it cancels the request and frees its sequence.
pub struct Generation {
    answer: Answer,
}

impl Generation {
    pub(super) fn of(answer: Answer) -> Self {
        Self { answer }
    }

    /// The next output. After [`Output::Finished`] or an error there is none. Cancellation-safe.
    ///
    /// # Errors
    /// The request was refused, or the worker failed or died.
    pub async fn next(&mut self) -> Result<Output, WorkerError> {
        match self.answer.next().await? {
            Event::Started { .. } => Ok(Output::Started),
            Event::Echo { piece, .. } => Ok(Output::Echo(piece)),
            Event::Piece { piece, .. } => Ok(Output::Piece(piece)),
            Event::Finished { finish, .. } => Ok(Output::Finished(finish)),
            other => Err(unexpected(&other)),
        }
    }

    /// The whole answer.
    ///
    /// # Errors
    /// The request was refused, or the worker failed or died.
    pub async fn finish(mut self) -> Result<(Piece, Finish), WorkerError> {
        let mut whole = Piece::default();
        loop {
            match self.next().await? {
                Output::Started => {}
                Output::Echo(piece) | Output::Piece(piece) => whole.append(piece),
                Output::Finished(finish) => return Ok((whole, finish)),
            }
        }
    }
}

/// What comes back for one request.
pub(super) struct Answer {
    id: u64,
    events: mpsc::UnboundedReceiver<Result<Event, WorkerError>>,
    worker: Worker,
}

impl Answer {
    pub(super) fn new(
        id: u64,
        events: mpsc::UnboundedReceiver<Result<Event, WorkerError>>,
        worker: Worker,
    ) -> Self {
        Self { id, events, worker }
    }

    async fn next(&mut self) -> Result<Event, WorkerError> {
        match self.events.recv().await {
            Some(Ok(Event::Failed { error, .. })) => Err(error.into()),
            Some(event) => event,
            None => Err(WorkerError::Died { how: "it gave no answer".to_owned() }),
        }
    }

    pub(super) async fn result(mut self) -> Result<Event, WorkerError> {
        loop {
            match self.next().await? {
                Event::Started { .. } => {}
                event => return Ok(event),
            }
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let shared = &self.worker.shared;
        if shared.requests.remove(self.id) {
            let _ = shared.orders.send(Order::Send(Box::new(Command::Cancel { id: self.id })));
        }
    }
}
