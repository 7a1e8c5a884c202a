//! Webhooks and their deliveries in SQL. The audit log is the queue: a webhook has a cursor over it,
//! and a row for each event that it is to be told, so that a crash loses nothing and no memory
//! grows. A row that is being delivered is leased: whoever took it may die.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::json;
use slmops_api::audit::AuditEntry;
use slmops_api::webhook::{
    Delivery, DeliveryState, MAX_WEBHOOKS, NewWebhook, TEST_ACTION, Webhook,
};
use slmops_api::{Page, WebhookId};

use super::sql::{
    append_audit, audit_of, below, collect, column, conflict, draft, first, from_json, limit_of,
    not_found, page, to_json,
};
use super::{By, PageRequest, StoreError};
use crate::auth::Secret;
use crate::db::{Row, Tx, params};

/// Deliveries of one webhook that wait, at most; beyond them its cursor waits.
pub const MAX_PENDING: u64 = 1000;
/// Deliveries of one webhook that are kept after they were delivered, and as many dead ones.
pub const MAX_KEPT: u32 = 1000;
/// Entries of the audit log that are looked at in one transaction, at most.
const MAX_LOOKED_AT: u32 = 500;

pub(super) const MIGRATION: &str = "
    CREATE TABLE webhooks (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        webhook TEXT NOT NULL,
        secret TEXT NOT NULL,
        cursor INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE webhook_deliveries (
        webhook TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        action TEXT NOT NULL,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        next_ms INTEGER NOT NULL,
        last TEXT NOT NULL,
        PRIMARY KEY (webhook, sequence)
    ) STRICT;
    CREATE INDEX webhook_deliveries_by_state ON webhook_deliveries (webhook, state, sequence);
";

/// The secret before the last change, and until when it signs.
pub(super) const SECOND_SECRET: &str = "
    ALTER TABLE webhooks ADD COLUMN previous_secret TEXT;
    ALTER TABLE webhooks ADD COLUMN previous_until TEXT;
";

/// A webhook with the keys of its signatures.
#[derive(Clone, Debug)]
pub struct WebhookRow {
    /// The webhook.
    pub webhook: Webhook,
    /// Its secret.
    pub secret: Secret,
    /// The one before; it signs until [`Webhook::previous_secret_until`].
    pub previous: Option<Secret>,
}

impl WebhookRow {
    /// The secrets that sign at `now`, the newest first.
    pub fn secrets(&self, now: Timestamp) -> impl Iterator<Item = &Secret> {
        let overlaps = self.webhook.previous_secret_until.is_some_and(|until| now < until);
        std::iter::once(&self.secret).chain(self.previous.as_ref().filter(move |_| overlaps))
    }
}

/// What is stored of a webhook as a document.
#[derive(Serialize, Deserialize)]
struct Stored {
    asked: NewWebhook,
    created_at: Timestamp,
    created_by: String,
}

/// An event that somebody took to deliver it.
#[derive(Clone, Debug, PartialEq)]
pub struct Leased {
    /// Attempts before this one.
    pub attempts: u32,
    /// What it tells.
    pub entry: AuditEntry,
}

/// What became of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempted {
    /// The entry of the audit log.
    pub sequence: u64,
    /// Attempts before it, so that a lease that ran out meanwhile changes nothing.
    pub attempts: u32,
    /// How it is now.
    pub state: DeliveryState,
    /// When it is tried next, if it waits.
    pub next_at: Timestamp,
    /// What became of it, in words.
    pub last: String,
}

/// The `webhook-id` of an event, the same in each attempt.
pub fn message_id(webhook: &WebhookId, sequence: u64) -> String {
    format!("msg_{webhook}_{sequence}")
}

fn head(tx: &Tx<'_>) -> Result<i64, StoreError> {
    let sql = "SELECT sequence FROM audit ORDER BY sequence DESC LIMIT 1";
    Ok(first(tx, sql, params![], |row| Ok(row.get::<i64>(0)?))?.unwrap_or(0))
}

fn count(tx: &Tx<'_>, id: &WebhookId, state: DeliveryState) -> Result<u64, StoreError> {
    let sql = "SELECT COUNT(*) FROM webhook_deliveries WHERE webhook = ?1 AND state = ?2";
    let found = first(tx, sql, params![id.as_str(), state.name()], |row| Ok(row.get::<i64>(0)?))?;
    Ok(found.unwrap_or(0) as u64)
}

/// The document of a webhook, and its cursor.
fn find(tx: &Tx<'_>, id: &WebhookId) -> Result<(Stored, u64), StoreError> {
    let sql = "SELECT webhook, cursor FROM webhooks WHERE id = ?1";
    let found = first(tx, sql, params![id.as_str()], |row| {
        Ok((from_json("webhooks", &row.get::<String>(0)?)?, row.get::<i64>(1)? as u64))
    })?;
    found.ok_or_else(|| not_found("webhook", id))
}

pub(super) fn add(
    tx: &Tx<'_>,
    by: &By,
    id: &WebhookId,
    asked: NewWebhook,
    secret: &Secret,
) -> Result<Webhook, StoreError> {
    let known =
        first(tx, "SELECT COUNT(*) FROM webhooks", params![], |row| Ok(row.get::<i64>(0)?))?;
    if known.unwrap_or(0) as usize >= MAX_WEBHOOKS {
        return Err(conflict(
            format!("there are {MAX_WEBHOOKS} webhooks already"),
            "remove one that nobody needs: `slm webhook remove ID`",
        ));
    }
    // The URL may hold a secret of the receiver's: the log has the host alone.
    let details = json!({ "host": host_of(&asked.url), "events": asked.events });
    append_audit(tx, by, draft("webhook.create", id, details))?;
    let stored = Stored { asked, created_at: by.at, created_by: by.actor.clone() };
    let cursor = head(tx)?;
    tx.execute(
        "INSERT INTO webhooks (id, webhook, secret, cursor) VALUES (?1, ?2, ?3, ?4)",
        params![id.as_str(), to_json(&stored), secret.expose(), cursor],
    )?;
    shown(tx, id.clone(), stored, cursor as u64, None)
}

/// Gives a webhook a new secret; the one of now signs as well until `until`.
pub(super) fn rotate(
    tx: &Tx<'_>,
    by: &By,
    id: &WebhookId,
    secret: &Secret,
    until: Timestamp,
) -> Result<Webhook, StoreError> {
    let (stored, cursor) = find(tx, id)?;
    tx.execute(
        "UPDATE webhooks SET previous_secret = secret, previous_until = ?3, secret = ?2
         WHERE id = ?1",
        params![id.as_str(), secret.expose(), until.to_string()],
    )?;
    let details = json!({ "host": host_of(&stored.asked.url), "previous_until": until });
    append_audit(tx, by, draft("webhook.rotate", id, details))?;
    shown(tx, id.clone(), stored, cursor, Some(until))
}

/// `https://user@host/path?key` → `host`.
fn host_of(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    authority.rsplit('@').next().unwrap_or_default().to_owned()
}

fn shown(
    tx: &Tx<'_>,
    id: WebhookId,
    stored: Stored,
    cursor: u64,
    previous_secret_until: Option<Timestamp>,
) -> Result<Webhook, StoreError> {
    Ok(Webhook {
        pending: count(tx, &id, DeliveryState::Pending)?,
        dead: count(tx, &id, DeliveryState::Dead)?,
        id,
        asked: stored.asked,
        created_at: stored.created_at,
        created_by: stored.created_by,
        cursor,
        previous_secret_until,
    })
}

pub(super) fn list(tx: &Tx<'_>) -> Result<Vec<WebhookRow>, StoreError> {
    let sql = "SELECT id, webhook, cursor, secret, previous_secret, previous_until FROM webhooks
               ORDER BY sequence";
    collect(tx, sql, params![], |row| {
        let until: Option<String> = row.get(5)?;
        let until = until.map(|until| column("webhooks", &until)).transpose()?;
        let stored = from_json("webhooks", &row.get::<String>(1)?)?;
        let id = column("webhooks", &row.get::<String>(0)?)?;
        Ok(WebhookRow {
            webhook: shown(tx, id, stored, row.get::<i64>(2)? as u64, until)?,
            secret: Secret::kept(row.get::<String>(3)?),
            previous: row.get::<Option<String>>(4)?.map(Secret::kept),
        })
    })
}

pub(super) fn remove(tx: &Tx<'_>, by: &By, id: &WebhookId) -> Result<(), StoreError> {
    let (stored, _) = find(tx, id)?;
    tx.execute("DELETE FROM webhook_deliveries WHERE webhook = ?1", params![id.as_str()])?;
    tx.execute("DELETE FROM webhooks WHERE id = ?1", params![id.as_str()])?;
    let details = json!({ "host": host_of(&stored.asked.url) });
    append_audit(tx, by, draft("webhook.remove", id, details))
}

pub(super) fn test(tx: &Tx<'_>, by: &By, id: &WebhookId) -> Result<(), StoreError> {
    find(tx, id)?;
    append_audit(tx, by, draft(TEST_ACTION, id, json!({})))
}

/// When there is something to do for a webhook: now, at the next attempt, or never by itself.
pub(super) fn work_at(
    tx: &Tx<'_>,
    id: &WebhookId,
    now: Timestamp,
) -> Result<Option<Timestamp>, StoreError> {
    let (_, cursor) = find(tx, id)?;
    if head(tx)? as u64 > cursor && count(tx, id, DeliveryState::Pending)? < MAX_PENDING {
        return Ok(Some(now));
    }
    let sql = "SELECT MIN(next_ms) FROM webhook_deliveries WHERE webhook = ?1 AND state = ?2";
    let state = DeliveryState::Pending.name();
    let next = first(tx, sql, params![id.as_str(), state], |row| Ok(row.get::<Option<i64>>(0)?))?;
    Ok(next.flatten().map(at_ms))
}

fn at_ms(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap_or(Timestamp::MAX)
}

/// Notes the events that came since the last time, and leases at most `limit` that are due until
/// `until`, the oldest first.
pub(super) fn lease(
    tx: &Tx<'_>,
    id: &WebhookId,
    now: Timestamp,
    until: Timestamp,
    limit: u32,
) -> Result<Vec<Leased>, StoreError> {
    let (stored, cursor) = find(tx, id)?;
    take_in(tx, id, &stored.asked, cursor, now)?;
    let due: Vec<(i64, u32)> = collect(
        tx,
        "SELECT sequence, attempts FROM webhook_deliveries
         WHERE webhook = ?1 AND state = ?2 AND next_ms <= ?3 ORDER BY sequence LIMIT ?4",
        params![id.as_str(), DeliveryState::Pending.name(), now.as_millisecond(), limit],
        |row| Ok((row.get::<i64>(0)?, row.get::<i64>(1)? as u32)),
    )?;
    let mut leased = Vec::with_capacity(due.len());
    for (sequence, attempts) in due {
        tx.execute(
            "UPDATE webhook_deliveries SET next_ms = ?3 WHERE webhook = ?1 AND sequence = ?2",
            params![id.as_str(), sequence, until.as_millisecond()],
        )?;
        let sql = format!("SELECT {} FROM audit WHERE sequence = ?1", super::sql::AUDIT_COLUMNS);
        let entry = first(tx, &sql, params![sequence], audit_of)?;
        leased.extend(entry.map(|entry| Leased { attempts, entry }));
    }
    Ok(leased)
}

fn take_in(
    tx: &Tx<'_>,
    id: &WebhookId,
    asked: &NewWebhook,
    cursor: u64,
    now: Timestamp,
) -> Result<(), StoreError> {
    let mut room = MAX_PENDING.saturating_sub(count(tx, id, DeliveryState::Pending)?);
    let sql = format!(
        "SELECT {} FROM audit WHERE sequence > ?1 ORDER BY sequence LIMIT ?2",
        super::sql::AUDIT_COLUMNS
    );
    let entries = collect(tx, &sql, params![cursor as i64, MAX_LOOKED_AT], audit_of)?;
    let mut looked_at = cursor;
    for entry in entries {
        if asked.wants(id, &entry) {
            if room == 0 {
                break;
            }
            room -= 1;
            tx.execute(
                "INSERT INTO webhook_deliveries
                     (webhook, sequence, action, state, attempts, next_ms, last)
                 VALUES (?1, ?2, ?3, ?4, 0, ?5, '') ON CONFLICT DO NOTHING",
                params![
                    id.as_str(),
                    entry.sequence as i64,
                    entry.action,
                    DeliveryState::Pending.name(),
                    now.as_millisecond(),
                ],
            )?;
        }
        looked_at = entry.sequence;
    }
    if looked_at > cursor {
        tx.execute(
            "UPDATE webhooks SET cursor = ?2 WHERE id = ?1",
            params![id.as_str(), looked_at as i64],
        )?;
    }
    Ok(())
}

pub(super) fn finish(
    tx: &Tx<'_>,
    id: &WebhookId,
    attempted: &[Attempted],
) -> Result<(), StoreError> {
    for one in attempted {
        tx.execute(
            "UPDATE webhook_deliveries
             SET state = ?4, attempts = ?8, next_ms = ?5, last = ?6
             WHERE webhook = ?1 AND sequence = ?2 AND attempts = ?3 AND state = ?7",
            params![
                id.as_str(),
                one.sequence as i64,
                one.attempts,
                one.state.name(),
                one.next_at.as_millisecond(),
                one.last,
                DeliveryState::Pending.name(),
                one.attempts + 1,
            ],
        )?;
    }
    for state in [DeliveryState::Delivered, DeliveryState::Dead] {
        if attempted.iter().any(|one| one.state == state) {
            tx.execute(
                "DELETE FROM webhook_deliveries WHERE webhook = ?1 AND state = ?2 AND sequence <= (
                     SELECT sequence FROM webhook_deliveries WHERE webhook = ?1 AND state = ?2
                     ORDER BY sequence DESC LIMIT 1 OFFSET ?3)",
                params![id.as_str(), state.name(), MAX_KEPT],
            )?;
        }
    }
    Ok(())
}

pub(super) fn redeliver(
    tx: &Tx<'_>,
    by: &By,
    id: &WebhookId,
    sequence: Option<u64>,
) -> Result<u64, StoreError> {
    find(tx, id)?;
    let (pending, dead) = (DeliveryState::Pending.name(), DeliveryState::Dead.name());
    let again = "UPDATE webhook_deliveries SET state = ?2, attempts = 0, next_ms = ?3
                 WHERE webhook = ?1";
    let at = by.at.as_millisecond();
    let changed = match sequence {
        Some(sequence) => tx.execute(
            &format!("{again} AND sequence = ?4"),
            params![id.as_str(), pending, at, sequence as i64],
        )?,
        None => {
            tx.execute(&format!("{again} AND state = ?4"), params![id.as_str(), pending, at, dead])?
        }
    };
    if let (0, Some(sequence)) = (changed, sequence) {
        return Err(not_found("delivery", format!("{sequence} of webhook {id}")));
    }
    let details = json!({ "sequence": sequence, "deliveries": changed });
    append_audit(tx, by, draft("webhook.redeliver", id, details))?;
    Ok(changed as u64)
}

pub(super) fn deliveries(
    tx: &Tx<'_>,
    id: &WebhookId,
    state: Option<DeliveryState>,
    request: &PageRequest,
) -> Result<Page<Delivery>, StoreError> {
    find(tx, id)?;
    let limit = limit_of(request);
    let wanted = state.map_or("", DeliveryState::name);
    let found = collect(
        tx,
        "SELECT sequence, action, state, attempts, next_ms, last FROM webhook_deliveries
         WHERE webhook = ?1 AND sequence < ?2 AND (?3 = '' OR state = ?3)
         ORDER BY sequence DESC LIMIT ?4",
        params![id.as_str(), below(request)?, wanted, limit + 1],
        |row| {
            let delivery = delivery_of(id, row)?;
            Ok((delivery.sequence.to_string(), delivery))
        },
    )?;
    Ok(page(found, limit))
}

fn delivery_of(id: &WebhookId, row: &Row<'_>) -> Result<Delivery, StoreError> {
    let sequence = row.get::<i64>(0)? as u64;
    let state: DeliveryState = super::sql::column("webhook_deliveries", &row.get::<String>(2)?)?;
    let next_at = at_ms(row.get::<i64>(4)?);
    Ok(Delivery {
        sequence,
        message: message_id(id, sequence),
        action: row.get(1)?,
        state,
        attempts: row.get::<i64>(3)? as u32,
        next_at: (state == DeliveryState::Pending).then_some(next_at),
        last: row.get(5)?,
    })
}
