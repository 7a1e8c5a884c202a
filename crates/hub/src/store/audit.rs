//! Checking the audit chain in SQL, in pieces: from the last checkpoint on, or all of it.
//!
//! A checkpoint says up to which entry the chain was found to hold, and its hash. An entry that was
//! changed before it is found by checking all of the chain; a chain that was made anew from there is
//! found by the next look, since the checkpoint's own entry then has another hash.

use jiff::Timestamp;
use slmops_api::audit::{AuditEntry, AuditVerdict};
use slmops_artifact::Digest;

use super::StoreError;
use super::sql::{AUDIT_COLUMNS, audit_of, column, first};
use crate::db::{Tx, params};

/// Entries that are checked at once, at most.
pub const MAX_CHECKED: u32 = 10_000;
/// A checkpoint is moved when so many entries were checked after it.
const MOVED_AFTER: u64 = 1000;
/// Entries that are read with one statement, and in memory at the same time.
const READ_AT_ONCE: u32 = 500;

pub(super) const TABLE: &str = "
    CREATE TABLE audit_checkpoint (
        id INTEGER PRIMARY KEY,
        sequence INTEGER NOT NULL,
        hash TEXT NOT NULL,
        at TEXT NOT NULL
    ) STRICT;
";

/// Where to begin checking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckFrom {
    /// After the checkpoint.
    Checkpoint,
    /// After this entry, which has this hash; 0 and zeros for all of the chain.
    After(u64, Digest),
}

impl CheckFrom {
    /// The whole chain.
    pub fn start() -> Self {
        Self::After(0, Digest::from([0; 32]))
    }
}

/// Checks entries, [`MAX_CHECKED`] of them at most.
pub(super) fn verify(tx: &Tx<'_>, from: CheckFrom) -> Result<AuditVerdict, StoreError> {
    let (entries, head) = match from {
        CheckFrom::After(entries, head) => (entries, head),
        CheckFrom::Checkpoint => checkpoint(tx)?,
    };
    let mut verdict = AuditVerdict { entries, head, from: entries, broken: None, cursor: None };
    verdict.broken = still_there(tx, &verdict)?;
    let most = entries + u64::from(MAX_CHECKED);
    let sql =
        format!("SELECT {AUDIT_COLUMNS} FROM audit WHERE sequence > ?1 ORDER BY sequence LIMIT ?2");
    while verdict.broken.is_none() {
        let checked = verdict.entries;
        if checked >= most {
            verdict.cursor = Some(format!("{checked}.{}", verdict.head));
            break;
        }
        // From the very first: entry 1 may have been given another number.
        let after = if checked == 0 { i64::MIN } else { checked as i64 };
        tx.each(&sql, params![after, READ_AT_ONCE], |row| {
            verdict.broken = check(audit_of(row), &mut verdict);
            Ok::<_, StoreError>(verdict.broken.is_none())
        })?;
        if verdict.entries == checked {
            break;
        }
    }
    Ok(verdict)
}

/// Where a page of the chain's check ended.
pub fn parse_cursor(cursor: &str) -> Option<CheckFrom> {
    let (sequence, head) = cursor.split_once('.')?;
    // As the database keeps it.
    let sequence = u64::try_from(sequence.parse::<i64>().ok()?).ok()?;
    Some(CheckFrom::After(sequence, head.parse().ok()?))
}

fn checkpoint(tx: &Tx<'_>) -> Result<(u64, Digest), StoreError> {
    let sql = "SELECT sequence, hash FROM audit_checkpoint WHERE id = 1";
    let found = first(tx, sql, params![], |row| {
        Ok((row.get::<i64>(0)? as u64, column("audit_checkpoint", &row.get::<String>(1)?)?))
    })?;
    Ok(found.unwrap_or((0, Digest::from([0; 32]))))
}

/// What is wrong with the entry after which checking begins, if anything.
fn still_there(tx: &Tx<'_>, verdict: &AuditVerdict) -> Result<Option<String>, StoreError> {
    let (from, head) = (verdict.from, verdict.head);
    if from == 0 {
        return Ok(None);
    }
    let sql = "SELECT hash FROM audit WHERE sequence = ?1";
    let found = first(tx, sql, params![from as i64], |row| Ok(row.get::<String>(0)?))?;
    Ok(match found {
        None => Some(format!("entry {from}, which was checked before, is gone")),
        Some(hash) if hash == head.to_string() => None,
        Some(hash) => Some(format!(
            "entry {from} has another hash than when it was checked before: {}, not {}",
            hash.trim_start_matches("sha256:").chars().take(12).collect::<String>(),
            head.short()
        )),
    })
}

/// Whether a verdict says enough that is new to keep it.
pub(super) fn is_to_keep(verdict: &AuditVerdict) -> bool {
    verdict.broken.is_none() && verdict.entries - verdict.from >= MOVED_AFTER
}

/// Moves the checkpoint to where a check ended, unless it is further on.
pub(super) fn keep(tx: &Tx<'_>, at: Timestamp, verdict: &AuditVerdict) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO audit_checkpoint (id, sequence, hash, at) VALUES (1, ?1, ?2, ?3)
         ON CONFLICT (id) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash,
             at = excluded.at
         WHERE audit_checkpoint.sequence < excluded.sequence",
        params![verdict.entries as i64, verdict.head.to_string(), at.to_string()],
    )?;
    Ok(())
}

/// Checks the next entry of the chain; what is wrong with it, or it is counted.
fn check(read: Result<AuditEntry, StoreError>, verdict: &mut AuditVerdict) -> Option<String> {
    let (entries, head) = (verdict.entries, verdict.head);
    let expected = entries + 1;
    let entry = match read {
        Ok(entry) => entry,
        Err(error) => return Some(format!("entry {expected} cannot be read: {error}")),
    };
    let computed = entry.computed_hash();
    if entry.sequence != expected {
        return Some(format!("entry {expected} is missing: {} follows {entries}", entry.sequence));
    }
    if entry.previous != head {
        return Some(format!(
            "entry {expected} does not follow the one before: it names {}, not {}",
            entry.previous.short(),
            head.short()
        ));
    }
    if entry.hash != computed {
        return Some(format!(
            "entry {expected} was changed: its hash is {}, its content gives {}",
            entry.hash.short(),
            computed.short()
        ));
    }
    (verdict.head, verdict.entries) = (entry.hash, expected);
    None
}
