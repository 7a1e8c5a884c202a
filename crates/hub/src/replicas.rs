//! Several hubs over one PostgreSQL database: which of them decides, what the others must hear of
//! it, and the secrets with which any of them answers any device.
//! It never decides anything about the fleet itself: it says who may.
//! Start reading at [`Replica::join`], then [`Replica::keep`] and [`follow`].
//!
//! Every change is a transaction, and transactions of all hubs take turns ([`crate::db`]), so any
//! hub may make any. Decisions of the hub by itself are made by one of them: the planner. It holds a
//! lease with a number that grows with each planner; a decision is persisted only under the newest
//! number, checked in its own transaction. So a hub that was away for too long, and does not know it
//! yet, changes nothing.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use slmops_api::DeviceId;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::db::{Database, DbError, Feed, Schema, Tx, params};
use crate::durable;
use crate::engine::Engine;
use crate::events::{Board, Events};
use crate::server::{HubError, SECRET_FILES};
use crate::store::{Store, StoreError};

#[cfg(test)]
mod tests;

/// How long a planner may decide after it last said that it is there.
const LEASE: Duration = Duration::from_secs(6);
/// How often it says so, and the others ask whether it still does.
const RENEW_EVERY: Duration = Duration::from_secs(2);
/// How often changes of other hubs are looked for where the server does not tell of them.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A hub that has said nothing for so long is taken for dead.
const DEAD_AFTER: Duration = Duration::from_secs(10);
/// Devices that are read again at once.
const READ_AT_ONCE: usize = 500;
/// The longest secret, in bytes.
const MAX_SECRET_BYTES: u64 = 64 << 10;
/// Between two looks: the notes of many changes are read together.
const LOOK_NO_SOONER: Duration = Duration::from_millis(20);
/// The database's clock, in milliseconds since 1970: the hubs' own may differ.
const NOW_MS: &str = "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)";

/// The tables that hubs share besides the fleet's.
pub const SCHEMA: Schema = Schema {
    component: "replicas",
    moves: &[],
    migrations: &["
    CREATE TABLE replicas (
        id TEXT PRIMARY KEY,
        blobs TEXT NOT NULL,
        seen_ms INTEGER NOT NULL
    ) STRICT;
    -- The newest is the one that may decide, until its time is over.
    CREATE TABLE planners (
        token INTEGER PRIMARY KEY,
        holder TEXT NOT NULL,
        until_ms INTEGER NOT NULL,
        decisions INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE secrets (name TEXT PRIMARY KEY, content BLOB NOT NULL) STRICT;
    "],
};

/// Who decides for the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lead {
    /// This hub, since there is no other.
    Alone,
    /// This hub, under this fence.
    Here(Fence),
    /// Another hub, or none at the moment.
    Elsewhere,
}

/// The right to decide: it holds as long as no newer one was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    token: i64,
    holder: String,
}

impl Fence {
    /// Counts a decision under this fence, in the transaction that persists it.
    ///
    /// # Errors
    /// [`StoreError::Superseded`] if another hub decides by now.
    pub fn pass(&self, tx: &Tx<'_>) -> Result<(), StoreError> {
        let counted = tx.execute(
            "UPDATE planners SET decisions = decisions + 1
             WHERE token = ?1 AND holder = ?2 AND token = (SELECT max(token) FROM planners)",
            params![self.token, self.holder],
        )?;
        if counted == 0 { Err(StoreError::Superseded) } else { Ok(()) }
    }
}

/// One hub among several.
pub struct Replica {
    db: Database,
    id: String,
    blobs: String,
    lead: watch::Sender<Lead>,
}

impl Replica {
    /// Joins the hubs over `db`, whose blobs are at `blobs`; gives the data folder the secrets that
    /// they share. The first hub of all gives them those of its folder, where `make` makes what is
    /// missing.
    ///
    /// # Errors
    /// Other hubs have their blobs elsewhere, or other secrets; a database or folder that fails.
    pub async fn join(
        db: &Database,
        feed: &Feed,
        blobs: String,
        folder: &Path,
        make: impl FnOnce(&Tx<'_>) -> Result<(), HubError> + Send + 'static,
    ) -> Result<Self, HubError> {
        let (lead, _) = watch::channel(Lead::Elsewhere);
        let replica = Self { db: db.clone(), id: feed.origin().to_owned(), blobs, lead };
        if let Some(there) = replica.say_hello().await? {
            return Err(HubError::OtherBlobs { here: replica.blobs, there });
        }
        share_secrets(db, folder, make).await?;
        Ok(replica)
    }

    /// What this hub is called among the others; another name at each start.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Who decides, as it changes.
    pub fn lead(&self) -> watch::Receiver<Lead> {
        self.lead.subscribe()
    }

    /// Says that this hub is there; where another one that is there keeps its blobs, if elsewhere.
    async fn say_hello(&self) -> Result<Option<String>, DbError> {
        let (id, blobs) = (self.id.clone(), self.blobs.clone());
        let dead_ms = DEAD_AFTER.as_millis() as i64;
        let hello = move |tx: &Tx<'_>| {
            let gone = format!("DELETE FROM replicas WHERE seen_ms < {NOW_MS} - ?1");
            tx.execute(&gone, params![dead_ms])?;
            let other = tx.first(
                "SELECT blobs FROM replicas WHERE blobs <> ?1 LIMIT 1",
                params![blobs],
                |row| row.get::<String>(0),
            )?;
            if other.is_none() {
                let here = format!(
                    "INSERT INTO replicas (id, blobs, seen_ms) VALUES (?1, ?2, {NOW_MS})
                     ON CONFLICT (id) DO UPDATE SET seen_ms = excluded.seen_ms"
                );
                tx.execute(&here, params![id, blobs])?;
            }
            Ok(other)
        };
        self.db.write(hello).await
    }

    /// Keeps or asks for the lease until `stop` turns true, and then gives it back.
    pub async fn keep(self, mut stop: watch::Receiver<bool>) {
        let mut renew = tokio::time::interval(RENEW_EVERY);
        renew.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut held_until = Instant::now();
        loop {
            tokio::select! {
                () = stopped(&mut stop) => break,
                _ = renew.tick() => {}
            }
            let asked = Instant::now();
            // A database that is away for long must not keep this hub from noticing.
            let answer = tokio::time::timeout(LEASE, self.renew()).await;
            let lead = match answer {
                Ok(Ok(lead)) => {
                    held_until = asked + LEASE;
                    lead
                }
                Ok(Err(error)) => {
                    tracing::warn!(%error, "cannot ask who decides");
                    self.as_before(held_until)
                }
                Err(_) => self.as_before(held_until),
            };
            self.lead.send_if_modified(|known| {
                let changed = *known != lead;
                if changed {
                    tracing::info!(?lead, "who decides has changed");
                    *known = lead;
                }
                changed
            });
        }
        self.lead.send_replace(Lead::Elsewhere);
        let id = self.id.clone();
        let resigned = self.db.write(move |tx| {
            tx.execute("UPDATE planners SET until_ms = 0 WHERE holder = ?1", params![id])?;
            tx.execute("DELETE FROM replicas WHERE id = ?1", params![id])
        });
        if let Err(error) = resigned.await {
            tracing::warn!(%error, "cannot hand over to another hub; it will wait a little");
        }
    }

    fn as_before(&self, held_until: Instant) -> Lead {
        match Instant::now() < held_until {
            true => self.lead.borrow().clone(),
            false => Lead::Elsewhere,
        }
    }

    async fn renew(&self) -> Result<Lead, DbError> {
        self.say_hello().await?;
        Feed::forget(&self.db).await?;
        let id = self.id.clone();
        let lease_ms = LEASE.as_millis() as i64;
        let renew = move |tx: &Tx<'_>| {
            let newest = format!(
                "SELECT token, holder, until_ms < {NOW_MS} FROM planners ORDER BY token DESC LIMIT 1"
            );
            let newest = tx.first(&newest, params![], |row| {
                Ok::<(i64, String, bool), DbError>((row.get(0)?, row.get(1)?, row.get(2)?))
            })?;
            let token = match newest {
                Some((token, holder, _)) if holder == id => {
                    let longer =
                        format!("UPDATE planners SET until_ms = {NOW_MS} + ?2 WHERE token = ?1");
                    tx.execute(&longer, params![token, lease_ms])?;
                    token
                }
                Some((_, _, false)) => return Ok(Lead::Elsewhere),
                over => {
                    let token = over.map_or(1, |(token, ..)| token + 1);
                    let taken = format!(
                        "INSERT INTO planners (token, holder, until_ms, decisions)
                         VALUES (?1, ?2, {NOW_MS} + ?3, 0)"
                    );
                    tx.execute(&taken, params![token, id, lease_ms])?;
                    token
                }
            };
            Ok(Lead::Here(Fence { token, holder: id }))
        };
        self.db.write(renew).await
    }
}

/// Hands on what other hubs change, until `stop` turns true.
pub async fn follow(
    mut feed: Feed,
    store: Arc<dyn Store>,
    engine: Engine,
    board: Board,
    events: Events,
    mut stop: watch::Receiver<bool>,
) {
    // Devices whose state must be read from the store, those of a failed attempt among them.
    let mut changed: BTreeSet<DeviceId> = BTreeSet::new();
    let mut everything = false;
    loop {
        tokio::select! {
            () = stopped(&mut stop) => return,
            () = feed.told() => {}
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        match feed.read().await {
            Ok(Some(notes)) => {
                for note in notes {
                    match (note.kind.as_str(), note.object.parse::<DeviceId>()) {
                        ("device", Ok(id)) => {
                            changed.insert(id);
                        }
                        ("news", Ok(id)) => engine.device_changed(id),
                        ("report", Ok(id)) => engine.device_counted(id),
                        ("invitation" | "token" | "key" | "channel" | "webhook", _) => {}
                        _ => engine.frame_changed(),
                    }
                    if let Some(kind) = shown(&note.kind) {
                        events.announce(kind, &note.object);
                    }
                }
            }
            // More was forgotten than was heard.
            Ok(None) => everything = true,
            Err(error) => {
                tracing::warn!(%error, "cannot hear what other hubs change; trying again");
                continue;
            }
        }
        match read_again(&*store, &board, &engine, &mut changed, &mut everything).await {
            Ok(()) => feed.acted_on(),
            Err(error) => {
                tracing::warn!(%error, "cannot read what other hubs changed; trying again");
            }
        }
        tokio::time::sleep(LOOK_NO_SOONER).await;
    }
}

/// Shows on the board what other hubs told devices; what was read is taken from `changed`.
async fn read_again(
    store: &dyn Store,
    board: &Board,
    engine: &Engine,
    changed: &mut BTreeSet<DeviceId>,
    everything: &mut bool,
) -> Result<(), StoreError> {
    if *everything {
        // Whoever reads the fleet anew shows it on the board.
        engine.all_changed();
        *everything = false;
        changed.clear();
    }
    while !changed.is_empty() {
        let ids: Vec<DeviceId> = changed.iter().take(READ_AT_ONCE).cloned().collect();
        for device in store.devices_of(ids.clone()).await? {
            board.put(&device);
        }
        for id in ids {
            changed.remove(&id);
            engine.device_changed(id);
        }
    }
    Ok(())
}

/// What pages that follow along call it.
fn shown(kind: &str) -> Option<&'static str> {
    let kinds = [
        "device",
        "rollout",
        "release",
        "class",
        "blueprint",
        "invitation",
        "token",
        "key",
        "channel",
        "webhook",
    ];
    match kind {
        "news" | "report" => Some("device"),
        kind => kinds.into_iter().find(|known| *known == kind),
    }
}

/// Waits until the hub stops, or nobody is left who could say so.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Makes the secrets in `folder` and those in the database the same.
async fn share_secrets(
    db: &Database,
    folder: &Path,
    make: impl FnOnce(&Tx<'_>) -> Result<(), HubError> + Send + 'static,
) -> Result<(), HubError> {
    let folder = folder.to_owned();
    // In one transaction: the first hub of all makes them, and no other one.
    let share = move |tx: &Tx<'_>| {
        if !tx.exists("SELECT 1 FROM secrets", params![])? {
            make(tx)?;
        }
        for name in SECRET_FILES {
            let path = folder.join(name);
            let failed = |source| HubError::File { path: path.clone(), source };
            let shared =
                tx.first("SELECT content FROM secrets WHERE name = ?1", params![name], |row| {
                    row.get::<Vec<u8>>(0)
                })?;
            let here = match path.exists() {
                true => Some(durable::read_secret(&path, MAX_SECRET_BYTES).map_err(failed)?),
                false => None,
            };
            match (shared, here) {
                (Some(shared), Some(here)) if shared != here => {
                    return Err(HubError::OtherSecrets { path: path.clone() });
                }
                (Some(shared), None) => {
                    let above = path.parent().expect("a secret lies in a folder");
                    durable::create_private_folder(above).map_err(failed)?;
                    durable::write_secret(&path, &shared).map_err(failed)?;
                }
                (None, Some(here)) => {
                    let sql = "INSERT INTO secrets (name, content) VALUES (?1, ?2)";
                    tx.execute(sql, params![name, here])?;
                }
                _ => {}
            }
        }
        Ok(())
    };
    db.write(share).await
}
