//! What other hubs over the same PostgreSQL database change: each change that concerns them is noted
//! in a table by the transaction that makes it, and the server tells of it (`LISTEN`, `NOTIFY`).
//! Transactions that write take turns, so the notes' numbers are in the order of commits.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::poll_fn;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio_postgres::{AsyncMessage, NoTls};

use super::postgres::Postgres;
use super::{Database, DbError, Schema, Source, Tx, TxOf, params};

/// Notes that are read at once.
const NOTES_AT_ONCE: u32 = 1000;
/// How long notes are kept. Who has heard nothing for longer reads everything again.
const KEEP_NOTES: Duration = Duration::from_secs(600);
/// Between two attempts to listen.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// The table of notes, in every PostgreSQL database.
pub(super) const SCHEMA: Schema = Schema {
    component: "changes",
    moves: &[],
    migrations: &["
    CREATE TABLE changes (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        object TEXT NOT NULL,
        origin TEXT NOT NULL,
        at_ms INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX changes_by_time ON changes (at_ms);
    "],
};

/// A note of what a hub changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// What kind of thing, such as `device`.
    pub kind: String,
    /// Which one.
    pub object: String,
}

/// Notes of other hubs, from the moment at which it was made.
pub struct Feed {
    db: Database,
    origin: String,
    told: Arc<Notify>,
    listening: AbortHandle,
    after: i64,
    acted_on: watch::Sender<i64>,
}

/// Tells when a hub has acted on what others changed. Clones share it.
#[derive(Clone)]
pub struct Heard {
    db: Database,
    told: Arc<Notify>,
    acted_on: watch::Receiver<i64>,
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl Database {
    /// What other hubs change from now on; none for a SQLite database, which has one hub.
    ///
    /// # Errors
    /// What the database says.
    pub async fn feed(&self) -> Result<Option<Feed>, DbError> {
        let Source::Postgres { server, .. } = &self.inner.source else { return Ok(None) };
        let told = Arc::new(Notify::new());
        let listening = tokio::spawn(listen(Postgres::clone(server), Arc::clone(&told)));
        let listening = listening.abort_handle();
        let after = self.read(newest).await?;
        let (db, origin) = (self.clone(), server.origin().to_owned());
        let (acted_on, _) = watch::channel(after);
        Ok(Some(Feed { db, origin, told, listening, after, acted_on }))
    }
}

impl Tx<'_> {
    /// Notes a change for other hubs over the same database, if there may be any.
    ///
    /// # Errors
    /// What the database says.
    pub fn announce(&self, kind: &str, object: &str) -> Result<(), DbError> {
        if let TxOf::Postgres(_) = &self.0 {
            self.execute(
                "WITH noted AS (
                     INSERT INTO changes (kind, object, origin, at_ms)
                     VALUES (?1, ?2, current_setting('slm.origin'),
                         CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT))
                     RETURNING 1)
                 SELECT pg_notify('slm_changes', '') FROM noted",
                params![kind, object],
            )?;
        }
        Ok(())
    }
}

impl Feed {
    /// Who this hub is to the others.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Waits until the server tells of a change, by this hub or another. May return without one.
    pub async fn told(&self) {
        self.told.notified().await;
    }

    /// The next notes of other hubs; none if some were forgotten before they were read here.
    ///
    /// # Errors
    /// What the database says; the same notes come the next time.
    pub async fn read(&mut self) -> Result<Option<Vec<Note>>, DbError> {
        let after = self.after;
        let read = move |tx: &Tx<'_>| {
            let oldest = tx.first("SELECT min(sequence) FROM changes", params![], |row| {
                row.get::<Option<i64>>(0)
            })?;
            let notes = tx.query(
                "SELECT sequence, origin, kind, object FROM changes
                 WHERE sequence > ?1 ORDER BY sequence LIMIT ?2",
                params![after, NOTES_AT_ONCE],
                |row| {
                    let note = Note { kind: row.get(2)?, object: row.get(3)? };
                    Ok::<(i64, String, Note), DbError>((row.get(0)?, row.get(1)?, note))
                },
            )?;
            Ok::<_, DbError>((oldest.flatten(), notes, newest(tx)?))
        };
        let (oldest, notes, newest): (Option<i64>, _, i64) = self.db.read(read).await?;
        if oldest.is_some_and(|oldest| oldest > after + 1) && !notes.is_empty() {
            self.after = newest;
            return Ok(None);
        }
        if notes.len() == NOTES_AT_ONCE as usize {
            self.told.notify_one();
        }
        self.after = notes.last().map_or(after, |(sequence, ..)| *sequence);
        let others = notes.into_iter().filter(|(_, origin, _)| *origin != self.origin);
        Ok(Some(others.map(|(.., note)| note).collect()))
    }

    /// Says that this hub has acted on all that was read.
    pub fn acted_on(&self) {
        self.acted_on.send_replace(self.after);
    }

    /// What tells when this hub has acted on what others changed.
    pub fn heard(&self) -> Heard {
        let (db, told) = (self.db.clone(), Arc::clone(&self.told));
        Heard { db, told, acted_on: self.acted_on.subscribe() }
    }

    /// Removes old notes.
    ///
    /// # Errors
    /// What the database says.
    pub async fn forget(db: &Database) -> Result<(), DbError> {
        let keep_ms = KEEP_NOTES.as_millis() as i64;
        // The newest stays: whoever finds it far from where it was knows that it missed something.
        let forget = "DELETE FROM changes WHERE sequence < (SELECT max(sequence) FROM changes)
             AND at_ms < CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT) - ?1";
        db.write(move |tx| tx.execute(forget, params![keep_ms])).await.map(drop)
    }
}

impl Heard {
    /// Waits until this hub has acted on every change that any hub had committed before this call:
    /// who was told of a change by one hub may count on it at every other.
    ///
    /// # Errors
    /// What the database says; [`DbError::ShuttingDown`] if the feed is gone.
    pub async fn up_to_date(&self) -> Result<(), DbError> {
        let newest = self.db.read(newest).await?;
        let mut acted_on = self.acted_on.clone();
        if *acted_on.borrow() < newest {
            self.told.notify_one();
        }
        let there = acted_on.wait_for(|sequence| *sequence >= newest).await;
        there.map(drop).map_err(|_| DbError::ShuttingDown)
    }
}

/// The number of the newest note.
fn newest(tx: &Tx<'_>) -> Result<i64, DbError> {
    let newest = "SELECT COALESCE(max(sequence), 0) FROM changes";
    Ok(tx.first(newest, params![], |row| row.get::<i64>(0))?.unwrap_or_default())
}

/// Listens for as long as it runs, through losses of the connection.
async fn listen(server: Postgres, told: Arc<Notify>) {
    loop {
        if let Err(error) = server.listen(&told).await {
            tracing::debug!(%error, "the server does not tell of changes; looking every now and then");
        }
        tokio::time::sleep(LISTEN_AGAIN).await;
    }
}

impl Postgres {
    /// Listens until the connection is lost.
    async fn listen(&self, told: &Notify) -> Result<(), tokio_postgres::Error> {
        match self.tls() {
            None => {
                let (client, connection) = self.config().connect(NoTls).await?;
                hear(client, connection, told).await
            }
            Some(tls) => {
                let (client, connection) = self.config().connect(tls.clone()).await?;
                hear(client, connection, told).await
            }
        }
    }
}

async fn hear<S, T>(
    client: tokio_postgres::Client,
    mut connection: tokio_postgres::Connection<S, T>,
    told: &Notify,
) -> Result<(), tokio_postgres::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    let hear = async {
        while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(_) = message? {
                told.notify_one();
            }
        }
        Ok(())
    };
    let ask = async {
        client.batch_execute("LISTEN slm_changes").await?;
        // What was noted before this may have been missed.
        told.notify_one();
        std::future::pending::<Result<(), tokio_postgres::Error>>().await
    };
    tokio::select! {
        ended = hear => ended,
        failed = ask => failed,
    }
}
