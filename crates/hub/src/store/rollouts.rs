//! Rollouts as rows: one for the rollout, one for each device of it, so that a change of few devices
//! writes few rows however many there are.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde_json::json;
use slmops_api::rollout::{Outcome, Rollout, RolloutDevice, RolloutState};
use slmops_api::{Page, RolloutId};
use slmops_fleet_core::rollout::{RolloutRecord, state_name};

use super::sql::{
    Chain, collect, draft, first, from_json, limit_of, no_cursor, not_found, page, to_json,
};
use super::{By, PageRequest, RolloutChange, RolloutPart, StoreError};
use crate::db::{DbError, Row, Tx, params};

/// Devices that a rollout is shown with; the others are on pages of their own.
pub const SHOWN_DEVICES: u32 = 500;
/// Failed devices beyond those that it is shown with as well.
const SHOWN_FAILED: u32 = 100;

/// The tables of migration 5.
pub(super) const TABLES: &str = "
    ALTER TABLE rollouts ADD COLUMN decisions INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE rollout_devices (
        rollout TEXT NOT NULL,
        device TEXT NOT NULL,
        wave INTEGER NOT NULL,
        position INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        part TEXT NOT NULL,
        before TEXT,
        PRIMARY KEY (rollout, device)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX rollout_devices_in_order ON rollout_devices (rollout, wave, position, device);
    CREATE INDEX rollout_devices_failed ON rollout_devices (rollout, wave, position, device)
        WHERE failed = 1;
    CREATE TABLE planning (id INTEGER PRIMARY KEY, revision INTEGER NOT NULL) STRICT;
";

/// Migration 5: until then a rollout was one document with all its devices.
pub(super) fn split_documents(tx: &Tx<'_>) -> Result<(), DbError> {
    let ids: Vec<String> =
        tx.query("SELECT id FROM rollouts", params![], |row| row.get::<String>(0))?;
    for id in ids {
        let sql = "SELECT rollout FROM rollouts WHERE id = ?1";
        let text = tx.first(sql, params![id], |row| row.get::<String>(0))?.unwrap_or_default();
        let record: RolloutRecord = serde_json::from_str(&text)
            .map_err(|source| DbError::Column { index: 0, source: source.into() })?;
        write(tx, &RolloutChange::whole(&record))?;
    }
    Ok(())
}

fn write(tx: &Tx<'_>, change: &RolloutChange) -> Result<(), DbError> {
    let rollout = &change.header.rollout;
    tx.execute(
        "INSERT INTO rollouts (id, state, final, completed_sequence, decisions, rollout)
         VALUES (?1, ?2, ?3, CASE WHEN ?4 = 1 THEN
             (SELECT COALESCE(MAX(completed_sequence), 0) + 1 FROM rollouts) END, ?5, ?6)
         ON CONFLICT (id) DO UPDATE SET state = excluded.state, final = excluded.final,
             completed_sequence =
                 COALESCE(rollouts.completed_sequence, excluded.completed_sequence),
             decisions = excluded.decisions, rollout = excluded.rollout",
        params![
            rollout.id.as_str(),
            state_name(rollout.state),
            rollout.state.is_final(),
            rollout.state == RolloutState::Completed,
            rollout.decisions.len() as i64,
            to_json(&change.header),
        ],
    )?;
    for RolloutPart { position, part, before } in &change.parts {
        tx.execute(
            "INSERT INTO rollout_devices (rollout, device, wave, position, failed, part, before)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
             ON CONFLICT (rollout, device) DO UPDATE SET wave = excluded.wave,
                 failed = excluded.failed, part = excluded.part, before = excluded.before",
            params![
                rollout.id.as_str(),
                part.device.as_str(),
                part.wave,
                *position,
                matches!(part.outcome, Outcome::Failed { .. }),
                to_json(part),
                before.as_ref().map(to_json),
            ],
        )?;
    }
    for device in &change.gone {
        tx.execute(
            "DELETE FROM rollout_devices WHERE rollout = ?1 AND device = ?2",
            params![rollout.id.as_str(), device.as_str()],
        )?;
    }
    Ok(())
}

/// Writes a change, and what was newly decided into the audit log.
pub(super) fn persist(
    tx: &Tx<'_>,
    chain: &mut Chain,
    at: Timestamp,
    change: &RolloutChange,
) -> Result<(), StoreError> {
    let rollout = &change.header.rollout;
    let sql = "SELECT decisions FROM rollouts WHERE id = ?1";
    let known = first(tx, sql, params![rollout.id.as_str()], |row| Ok(row.get::<i64>(0)?))?;
    let hub = By::hub(at);
    for decision in rollout.decisions.iter().skip(known.unwrap_or(0) as usize) {
        let details = json!({
            "what": decision.what, "because": decision.because,
            "state": state_name(rollout.state),
        });
        chain.append(tx, &hub, draft("rollout.decide", &rollout.id, details))?;
    }
    Ok(write(tx, change)?)
}

fn header_of(row: &Row<'_>) -> Result<RolloutRecord, StoreError> {
    from_json("rollouts", &row.get::<String>(0)?)
}

fn header(tx: &Tx<'_>, id: &RolloutId) -> Result<RolloutRecord, StoreError> {
    let sql = "SELECT rollout FROM rollouts WHERE id = ?1";
    let found = first(tx, sql, params![id.as_str()], header_of)?;
    found.ok_or_else(|| not_found("rollout", id))
}

/// Says so if there is no such rollout.
pub(super) fn exists(tx: &Tx<'_>, id: &RolloutId) -> Result<(), StoreError> {
    let sql = "SELECT 1 FROM rollouts WHERE id = ?1";
    match tx.exists(sql, params![id.as_str()])? {
        true => Ok(()),
        false => Err(not_found("rollout", id)),
    }
}

fn complete(
    tx: &Tx<'_>,
    mut record: RolloutRecord,
    limit: i64,
) -> Result<RolloutRecord, StoreError> {
    let (mut devices, mut before) = (Vec::new(), BTreeMap::new());
    let sql = "SELECT part, before FROM rollout_devices WHERE rollout = ?1
               ORDER BY wave, position, device LIMIT ?2";
    tx.each(sql, params![record.rollout.id.as_str(), limit], |row| {
        let part: RolloutDevice = from_json("rollout_devices", &row.get::<String>(0)?)?;
        if let Some(ran) = row.get::<Option<String>>(1)? {
            before.insert(part.device.clone(), from_json("rollout_devices", &ran)?);
        }
        devices.push(part);
        Ok::<_, StoreError>(true)
    })?;
    (record.rollout.devices, record.before) = (devices, before);
    Ok(record)
}

/// Rollouts that are not final, oldest first, and then those of `also`.
pub(super) fn active(tx: &Tx<'_>, also: &[RolloutId]) -> Result<Vec<RolloutRecord>, StoreError> {
    let sql = "SELECT rollout FROM rollouts WHERE final = 0 ORDER BY sequence";
    let mut found = collect(tx, sql, params![], header_of)?;
    let known: BTreeSet<RolloutId> = found.iter().map(|record| record.rollout.id.clone()).collect();
    for id in also.iter().filter(|id| !known.contains(id)) {
        found.push(header(tx, id)?);
    }
    found.into_iter().map(|record| complete(tx, record, i64::MAX)).collect()
}

/// The newest rollouts, each with the first of its devices.
pub(super) fn samples(tx: &Tx<'_>, limit: u32) -> Result<Vec<RolloutRecord>, StoreError> {
    let sql = "SELECT rollout FROM rollouts ORDER BY sequence DESC LIMIT ?1";
    let found = collect(tx, sql, params![limit], header_of)?;
    found.into_iter().map(|record| complete(tx, record, i64::from(SHOWN_DEVICES))).collect()
}

/// A rollout as it is shown: with the first of its devices.
pub(super) fn shown(tx: &Tx<'_>, id: &RolloutId) -> Result<Rollout, StoreError> {
    let mut rollout = header(tx, id)?.rollout;
    let first = PageRequest { cursor: None, limit: SHOWN_DEVICES };
    let Page { items, cursor } = devices(tx, id, &first)?;
    rollout.devices = items;
    if let Some(cursor) = cursor {
        let after = Place::parse(&cursor)?;
        let limit = SHOWN_FAILED;
        rollout
            .devices
            .extend(parts(tx, id, "failed = 1", &after, limit)?.into_iter().map(|p| p.1));
    }
    Ok(rollout)
}

/// Rollouts without their devices, newest first.
pub(super) fn list(
    tx: &Tx<'_>,
    below: i64,
    request: &PageRequest,
) -> Result<Page<Rollout>, StoreError> {
    let limit = limit_of(request);
    let found = collect(
        tx,
        "SELECT rollout, sequence FROM rollouts WHERE sequence < ?1
         ORDER BY sequence DESC LIMIT ?2",
        params![below, limit + 1],
        |row| Ok((row.get::<i64>(1)?.to_string(), header_of(row)?.rollout)),
    )?;
    Ok(page(found, limit))
}

/// Devices of a rollout in wave order.
pub(super) fn devices(
    tx: &Tx<'_>,
    id: &RolloutId,
    request: &PageRequest,
) -> Result<Page<RolloutDevice>, StoreError> {
    let limit = limit_of(request);
    let after = request.cursor.as_deref().map_or(Ok(Place::BEFORE_ALL), Place::parse)?;
    Ok(page(parts(tx, id, "1 = 1", &after, limit + 1)?, limit))
}

/// Where a device stands in its rollout.
struct Place(i64, i64, String);

impl Place {
    const BEFORE_ALL: Self = Self(-1, -1, String::new());

    fn parse(cursor: &str) -> Result<Self, StoreError> {
        let parsed = || {
            let (wave, rest) = cursor.split_once('.')?;
            let (position, device) = rest.split_once('.')?;
            Some(Self(wave.parse().ok()?, position.parse().ok()?, device.to_owned()))
        };
        parsed().ok_or_else(|| no_cursor(cursor))
    }
}

/// Devices after `after`, in wave order, with their cursors.
fn parts(
    tx: &Tx<'_>,
    id: &RolloutId,
    which: &str,
    Place(wave, position, device): &Place,
    limit: u32,
) -> Result<Vec<(String, RolloutDevice)>, StoreError> {
    let sql = format!(
        "SELECT wave, position, part FROM rollout_devices
         WHERE rollout = ?1 AND {which} AND (wave, position, device) > (?2, ?3, ?4)
         ORDER BY wave, position, device LIMIT ?5"
    );
    collect(tx, &sql, params![id.as_str(), *wave, *position, device, limit], |row| {
        let (wave, position) = (row.get::<i64>(0)?, row.get::<i64>(1)?);
        let part: RolloutDevice = from_json("rollout_devices", &row.get::<String>(2)?)?;
        Ok((format!("{wave}.{position}.{}", part.device), part))
    })
}
