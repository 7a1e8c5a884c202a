//! Deltas between model files in SQL: which are wanted, which are being made, which there are. A row
//! that is being made is leased: whoever took it may die.

use jiff::Timestamp;
use slmops_api::ModelName;
use slmops_api::delta::{Delta, DeltaJob, DeltaState};
use slmops_artifact::Digest;
use slmops_fleet_core::deltas::Wanted;

use super::StoreError;
use super::sql::{collect, column, first, from_json, to_json};
use crate::db::{Row, Tx, params};

/// Times that a delta is begun. One that takes its maker down is not begun for ever.
pub const MAX_ATTEMPTS: u32 = 3;
/// Deltas that are kept in the table for one model line, at most; more are not wanted.
const MAX_ROWS: u64 = 1000;

pub(super) const MIGRATION: &str = "
    CREATE TABLE deltas (
        model TEXT NOT NULL,
        from_weights TEXT NOT NULL,
        to_weights TEXT NOT NULL,
        manifest TEXT NOT NULL,
        devices INTEGER NOT NULL,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        wanted_ms INTEGER NOT NULL,
        leased_until_ms INTEGER NOT NULL,
        delta TEXT,
        why TEXT NOT NULL,
        PRIMARY KEY (model, from_weights, to_weights)
    ) STRICT;
    CREATE INDEX deltas_by_state ON deltas (state, devices);
";

/// What became of a delta that was begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Made {
    /// It is in the registry.
    Ready(Delta),
    /// It would save too little, and why.
    Useless(String),
    /// It cannot be made, and why.
    Failed(String),
    /// Something was in the way that may pass, and what.
    Later(String),
}

const COLUMNS: &str = "model, from_weights, to_weights, manifest, devices, state, attempts, \
                       wanted_ms, delta, why";

fn job_of(row: &Row<'_>) -> Result<DeltaJob, StoreError> {
    let text = |index: usize| row.get::<String>(index);
    let state = text(5)?;
    let known = DeltaState::ALL.into_iter().find(|known| known.name() == state);
    let delta: Option<String> = row.get(8)?;
    Ok(DeltaJob {
        model: column("deltas", &text(0)?)?,
        from: column("deltas", &text(1)?)?,
        to: column("deltas", &text(2)?)?,
        manifest: column("deltas", &text(3)?)?,
        devices: row.get::<i64>(4)?.cast_unsigned(),
        state: known.unwrap_or(DeltaState::Failed),
        attempts: row.get::<i64>(6)? as u32,
        wanted_at: Timestamp::from_millisecond(row.get(7)?).unwrap_or(Timestamp::MAX),
        delta: delta.map(|delta| from_json("deltas", &delta)).transpose()?,
        why: text(9)?,
    })
}

/// Notes that devices could use deltas; how many of them are new.
pub(super) fn want(tx: &Tx<'_>, at: Timestamp, wanted: &[Wanted]) -> Result<u64, StoreError> {
    let mut new = 0;
    for Wanted { model, from, to, manifest, devices } in wanted {
        let sql = "SELECT COUNT(*) FROM deltas WHERE model = ?1";
        let known = first(tx, sql, params![model.as_str()], |row| Ok(row.get::<i64>(0)?))?;
        let (from, to) = (from.to_string(), to.to_string());
        let devices = devices.cast_signed();
        let changed = tx.execute(
            "UPDATE deltas SET devices = ?4 WHERE model = ?1 AND from_weights = ?2
             AND to_weights = ?3",
            params![model.as_str(), from, to, devices],
        )?;
        if changed > 0 || known.unwrap_or(0).cast_unsigned() >= MAX_ROWS {
            continue;
        }
        tx.execute(
            "INSERT INTO deltas (model, from_weights, to_weights, manifest, devices, state,
                 attempts, wanted_ms, leased_until_ms, why)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0, ?7, 0, '')",
            params![
                model.as_str(),
                from,
                to,
                manifest.to_string(),
                devices,
                DeltaState::Queued.name(),
                at.as_millisecond(),
            ],
        )?;
        new += 1;
    }
    Ok(new)
}

/// Takes the delta that most devices wait for; until `until` nobody else gets it.
pub(super) fn lease(
    tx: &Tx<'_>,
    now: Timestamp,
    until: Timestamp,
) -> Result<Option<DeltaJob>, StoreError> {
    let (queued, making) = (DeltaState::Queued.name(), DeltaState::Making.name());
    // Whoever had these to the last attempt died of them.
    tx.execute(
        "UPDATE deltas SET state = ?4, why = 'it was begun and never finished'
         WHERE state IN (?1, ?2) AND leased_until_ms <= ?3 AND attempts >= ?5",
        params![queued, making, now.as_millisecond(), DeltaState::Failed.name(), MAX_ATTEMPTS],
    )?;
    let sql = format!(
        "SELECT {COLUMNS} FROM deltas WHERE state IN (?1, ?2) AND leased_until_ms <= ?3
         ORDER BY devices DESC, wanted_ms, from_weights LIMIT 1"
    );
    let now = now.as_millisecond();
    let asked = params![queued, making, now];
    let Some(mut job) = first(tx, &sql, asked, job_of)? else { return Ok(None) };
    job.attempts += 1;
    job.state = DeltaState::Making;
    tx.execute(
        "UPDATE deltas SET state = ?4, attempts = ?5, leased_until_ms = ?6
         WHERE model = ?1 AND from_weights = ?2 AND to_weights = ?3",
        params![
            job.model.as_str(),
            job.from.to_string(),
            job.to.to_string(),
            making,
            job.attempts,
            until.as_millisecond(),
        ],
    )?;
    Ok(Some(job))
}

/// Keeps a delta that is being made until `until`; false if it is somebody else's by now.
pub(super) fn keep(tx: &Tx<'_>, job: &DeltaJob, until: Timestamp) -> Result<bool, StoreError> {
    let kept = tx.execute(
        "UPDATE deltas SET leased_until_ms = ?5 WHERE model = ?1 AND from_weights = ?2
         AND to_weights = ?3 AND attempts = ?4 AND state = ?6",
        params![
            job.model.as_str(),
            job.from.to_string(),
            job.to.to_string(),
            job.attempts,
            until.as_millisecond(),
            DeltaState::Making.name(),
        ],
    )?;
    Ok(kept > 0)
}

/// Notes what became of a delta, unless it is somebody else's by now.
pub(super) fn finish(
    tx: &Tx<'_>,
    job: &DeltaJob,
    made: &Made,
    again_at: Timestamp,
) -> Result<(), StoreError> {
    let (state, delta, why) = match made {
        Made::Ready(delta) => (DeltaState::Ready, Some(to_json(delta)), ""),
        Made::Useless(why) => (DeltaState::Useless, None, why.as_str()),
        Made::Failed(why) => (DeltaState::Failed, None, why.as_str()),
        Made::Later(why) => (DeltaState::Queued, None, why.as_str()),
    };
    tx.execute(
        "UPDATE deltas SET state = ?6, delta = ?7, why = ?8, leased_until_ms = ?9
         WHERE model = ?1 AND from_weights = ?2 AND to_weights = ?3 AND attempts = ?4
         AND state = ?5",
        params![
            job.model.as_str(),
            job.from.to_string(),
            job.to.to_string(),
            job.attempts,
            DeltaState::Making.name(),
            state.name(),
            delta,
            why,
            again_at.as_millisecond(),
        ],
    )?;
    Ok(())
}

/// All deltas of a model line, those that most devices could use first.
pub(super) fn list(tx: &Tx<'_>, model: &ModelName) -> Result<Vec<DeltaJob>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS} FROM deltas WHERE model = ?1
         ORDER BY devices DESC, wanted_ms, from_weights, to_weights"
    );
    collect(tx, &sql, params![model.as_str()], job_of)
}

/// Forgets the deltas that the registry loses with `digest`: those made for a manifest, or the one whose
/// bytes it is.
pub(super) fn forget(tx: &Tx<'_>, digest: &Digest) -> Result<(), StoreError> {
    tx.execute(
        "DELETE FROM deltas WHERE manifest = ?1 OR delta LIKE ?2",
        params![digest.to_string(), format!("%\"blob\":\"{digest}\"%")],
    )?;
    Ok(())
}
