//! The store over SQL, for every database that [`Database`] has a driver for.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use slmops_api::audit::{AuditEntry, AuditVerdict, Role, Token};
use slmops_api::blueprint::{Layer, StoredBlueprint};
use slmops_api::channel::Channel;
use slmops_api::delta::DeltaJob;
use slmops_api::device::{
    DesiredState, DeviceEvent, DeviceReport, InvitationInfo, Phase, PublisherKey,
};
use slmops_api::model::{DeviceClass, NewRelease, Release};
use slmops_api::orders::{Exclusion, Lift, NewPin, Orders, Pin};
use slmops_api::rollout::{Outcome, Rollout, RolloutDevice, RolloutState};
use slmops_api::rules::DeviceRules;
use slmops_api::runtime::RuntimeConfig;
use slmops_api::telemetry::{TelemetryQuery, TelemetrySeries};
use slmops_api::webhook::{Delivery, DeliveryState, NewWebhook, Webhook};
use slmops_api::{
    ChannelName, ClassName, DeviceId, InvitationId, ModelName, Page, RolloutId, TokenId, WebhookId,
};
use slmops_artifact::Digest;
use slmops_fleet_core::blueprint::DEFAULT_CONFIRM_TIMEOUT_S;
use slmops_fleet_core::deltas::Wanted;
use slmops_fleet_core::rollout::{RolloutRecord, failure_words, phase_words};
use slmops_fleet_core::words;
use slmops_fleet_core::world::{CompletedRollout, Releases};

use super::{
    Attempted, AuditDraft, By, CheckFrom, DeviceChange, Enrolled, Enrolment, Frame, Leased,
    MAX_EVENTS_PER_DEVICE, MAX_PAGE, Made, NewInvitationRow, OrdersChange, PageRequest,
    QuarantineRow, Registered, ReportOutcome, Store, StoreError, StoreFuture, StoredDevice,
    Transition, WebhookRow, audit, deltas, rollouts, telemetry, webhooks,
};
use crate::auth::{Secret, SecretHash};
use crate::db::{Database, Row, Schema, Tx, Value, params};
use crate::registry;
use crate::telemetry::{Group, Keep};

/// The store's tables. Documents are JSON of the API's own types; columns beside them are what
/// queries need.
pub const SCHEMA: Schema = Schema {
    component: "store",
    migrations: &[
        "
    CREATE TABLE devices (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        public_key TEXT NOT NULL UNIQUE,
        site TEXT,
        labels TEXT NOT NULL,
        facts TEXT NOT NULL,
        desired TEXT NOT NULL,
        report TEXT,
        report_sequence INTEGER NOT NULL DEFAULT 0,
        enrolled_at TEXT NOT NULL,
        last_seen TEXT NOT NULL,
        revoked INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE device_events (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL REFERENCES devices (id),
        at TEXT NOT NULL,
        generation INTEGER NOT NULL,
        what TEXT NOT NULL
    ) STRICT;
    CREATE INDEX device_events_by_device ON device_events (device, sequence);
    CREATE TABLE invitations (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        secret TEXT NOT NULL,
        info TEXT NOT NULL,
        used_by TEXT REFERENCES devices (id)
    ) STRICT;
    CREATE TABLE classes (name TEXT PRIMARY KEY, class TEXT NOT NULL) STRICT;
    CREATE TABLE blueprints (
        layer TEXT NOT NULL, name TEXT NOT NULL, toml TEXT NOT NULL, PRIMARY KEY (layer, name)
    ) STRICT;
    CREATE TABLE releases (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        model TEXT NOT NULL,
        version TEXT NOT NULL,
        release TEXT NOT NULL,
        UNIQUE (model, version)
    ) STRICT;
    CREATE TABLE rollouts (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL,
        final INTEGER NOT NULL,
        completed_sequence INTEGER,
        rollout TEXT NOT NULL
    ) STRICT;
    CREATE INDEX rollouts_active ON rollouts (final, sequence);
    CREATE TABLE quarantine (
        manifest TEXT NOT NULL, class TEXT NOT NULL, PRIMARY KEY (manifest, class)
    ) STRICT;
    CREATE TABLE tokens (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        hash TEXT NOT NULL UNIQUE,
        token TEXT NOT NULL
    ) STRICT;
    CREATE TABLE publisher_keys (id TEXT PRIMARY KEY, key TEXT NOT NULL) STRICT;
    CREATE TABLE audit (
        sequence INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        actor TEXT NOT NULL,
        action TEXT NOT NULL,
        object TEXT NOT NULL,
        details TEXT NOT NULL,
        previous TEXT NOT NULL,
        hash TEXT NOT NULL
    ) STRICT;
    ",
        "
    ALTER TABLE devices ADD COLUMN orders TEXT;
    ALTER TABLE quarantine ADD COLUMN since TEXT;
    ALTER TABLE quarantine ADD COLUMN rollout TEXT;
    ",
        "CREATE TABLE channels (name TEXT PRIMARY KEY, channel TEXT NOT NULL) STRICT;",
        webhooks::MIGRATION,
        rollouts::TABLES,
        telemetry::TABLE,
        audit::TABLE,
        webhooks::SECOND_SECRET,
        deltas::MIGRATION,
    ],
    moves: &[(5, rollouts::split_documents)],
};

/// Device names tried when a host name is taken: `pi`, `pi-2`, … `pi-1000`.
const MAX_NAME_SUFFIX: u32 = 1000;

/// The store over SQL.
#[derive(Clone)]
pub struct SqlStore {
    db: Database,
    /// Releases are immutable, and large with their reports: each is read once.
    releases: Arc<Mutex<ReleaseCache>>,
}

type ReleaseCache = BTreeMap<(ModelName, semver::Version), (Arc<Release>, Arc<NewRelease>)>;

impl SqlStore {
    /// A store over an open database that was migrated with [`SCHEMA`].
    pub fn new(db: Database) -> Self {
        Self { db, releases: Arc::default() }
    }

    #[cfg(test)]
    pub(super) fn database(&self) -> &Database {
        &self.db
    }

    fn write<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Tx<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> StoreFuture<'_, T> {
        Box::pin(self.db.write(change))
    }

    fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Tx<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> StoreFuture<'_, T> {
        Box::pin(self.db.read(query))
    }
}

pub(super) fn not_found(kind: &'static str, name: impl ToString) -> StoreError {
    StoreError::NotFound { kind, name: name.to_string() }
}

pub(super) fn conflict(detail: impl Into<String>, hint: impl Into<String>) -> StoreError {
    StoreError::Conflict { detail: detail.into(), hint: hint.into() }
}

pub(super) fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("the API's types always serialise")
}

pub(super) fn from_json<T: DeserializeOwned>(
    table: &'static str,
    text: &str,
) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|source| StoreError::Document { table, source })
}

/// Parses a column that this program wrote by `Display`.
pub(super) fn column<T: FromStr>(table: &'static str, text: &str) -> Result<T, StoreError>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| StoreError::Document {
        table,
        source: serde::de::Error::custom(format_args!("`{text}`: {error}")),
    })
}

/// Every row of a query.
pub(super) fn collect<T>(
    tx: &Tx<'_>,
    sql: &str,
    params: &[Value<'_>],
    read: impl FnMut(&Row<'_>) -> Result<T, StoreError>,
) -> Result<Vec<T>, StoreError> {
    tx.query(sql, params, read)
}

/// The first row of a query.
pub(super) fn first<T>(
    tx: &Tx<'_>,
    sql: &str,
    params: &[Value<'_>],
    read: impl FnMut(&Row<'_>) -> Result<T, StoreError>,
) -> Result<Option<T>, StoreError> {
    tx.first(sql, params, read)
}

/// Turns one entry more than asked for into a cursor.
pub(super) fn page<T>(mut found: Vec<(String, T)>, limit: u32) -> Page<T> {
    let limit = limit as usize;
    let more = found.len() > limit;
    found.truncate(limit);
    let cursor = if more { found.last().map(|(cursor, _)| cursor.clone()) } else { None };
    Page { items: found.into_iter().map(|(_, item)| item).collect(), cursor }
}

pub(super) fn limit_of(request: &PageRequest) -> u32 {
    request.limit.clamp(1, MAX_PAGE)
}

/// The sequence number below which a newest-first page starts.
pub(super) fn below(request: &PageRequest) -> Result<i64, StoreError> {
    match &request.cursor {
        None => Ok(i64::MAX),
        Some(cursor) => cursor.parse().map_err(|_| no_cursor(cursor)),
    }
}

pub(super) fn no_cursor(given: &str) -> StoreError {
    conflict(
        format!("`{}` is no cursor", given.chars().take(40).collect::<String>()),
        "use the `cursor` of the page before, unchanged",
    )
}

const DEVICE_COLUMNS: &str = "id, name, public_key, site, labels, facts, desired, report, \
                              enrolled_at, last_seen, revoked, orders";

fn device_of(row: &Row<'_>) -> Result<StoredDevice, StoreError> {
    let text = |index: usize| row.get::<String>(index);
    let site: Option<String> = row.get(3)?;
    let report: Option<String> = row.get(7)?;
    let orders: Option<String> = row.get(11)?;
    Ok(StoredDevice {
        id: column("devices", &text(0)?)?,
        name: text(1)?,
        public_key: text(2)?,
        site: site.map(|site| column("devices", &site)).transpose()?,
        labels: from_json("devices", &text(4)?)?,
        facts: from_json("devices", &text(5)?)?,
        desired: from_json("devices", &text(6)?)?,
        report: report.map(|report| from_json("devices", &report)).transpose()?,
        enrolled_at: column("devices", &text(8)?)?,
        last_seen: column("devices", &text(9)?)?,
        revoked: row.get(10)?,
        orders: orders.map(|orders| from_json("devices", &orders)).transpose()?,
    })
}

fn find_device(tx: &Tx<'_>, id_or_name: &str) -> Result<StoredDevice, StoreError> {
    for key in ["id", "name"] {
        let sql = format!("SELECT {DEVICE_COLUMNS} FROM devices WHERE {key} = ?1");
        if let Some(device) = first(tx, &sql, params![id_or_name], device_of)? {
            return Ok(device);
        }
    }
    let shown: String = id_or_name.chars().take(100).collect();
    Err(not_found("device", shown))
}

fn add_event(
    tx: &Tx<'_>,
    device: &DeviceId,
    at: Timestamp,
    generation: u64,
    what: &str,
) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO device_events (device, at, generation, what) VALUES (?1, ?2, ?3, ?4)",
        params![device.as_str(), at.to_string(), generation as i64, what],
    )?;
    tx.execute(
        "DELETE FROM device_events WHERE device = ?1 AND sequence <= (
             SELECT sequence FROM device_events WHERE device = ?1
             ORDER BY sequence DESC LIMIT 1 OFFSET ?2)",
        params![device.as_str(), MAX_EVENTS_PER_DEVICE],
    )?;
    Ok(())
}

/// Adds an entry to the audit chain, inside the transaction that it records.
pub(super) fn append_audit(tx: &Tx<'_>, by: &By, draft: AuditDraft) -> Result<(), StoreError> {
    Chain::read(tx)?.append(tx, by, draft)
}

/// The end of the audit chain within one transaction.
pub(super) struct Chain {
    sequence: u64,
    head: Digest,
}

impl Chain {
    pub(super) fn read(tx: &Tx<'_>) -> Result<Self, StoreError> {
        let last = first(
            tx,
            "SELECT sequence, hash FROM audit ORDER BY sequence DESC LIMIT 1",
            params![],
            |row| Ok((row.get::<i64>(0)?, row.get::<String>(1)?)),
        )?;
        Ok(match last {
            Some((sequence, hash)) => {
                Self { sequence: sequence as u64, head: column("audit", &hash)? }
            }
            None => Self { sequence: 0, head: Digest::from([0; 32]) },
        })
    }

    pub(super) fn append(
        &mut self,
        tx: &Tx<'_>,
        by: &By,
        draft: AuditDraft,
    ) -> Result<(), StoreError> {
        let mut entry = AuditEntry {
            sequence: self.sequence + 1,
            at: by.at,
            actor: by.actor.clone(),
            action: draft.action.to_owned(),
            object: draft.object,
            details: draft.details,
            previous: self.head,
            hash: self.head,
        };
        entry.hash = entry.computed_hash();
        tx.execute(
            "INSERT INTO audit (sequence, at, actor, action, object, details, previous, hash)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                entry.sequence as i64,
                entry.at.to_string(),
                entry.actor,
                entry.action,
                entry.object,
                entry.details.to_string(),
                entry.previous.to_string(),
                entry.hash.to_string(),
            ],
        )?;
        (self.sequence, self.head) = (entry.sequence, entry.hash);
        // `device.assign` is a change of a device.
        let kind = entry.action.split('.').next().unwrap_or_default();
        Ok(tx.announce(kind, &entry.object)?)
    }
}

/// Adds an entry for a change of the registry, inside the transaction that makes the change, and
/// forgets the deltas that go with what is deleted.
///
/// # Errors
/// If that cannot be done; the change must then not be made either.
pub fn record_registry(tx: &Tx<'_>, change: &registry::Change) -> Result<(), StoreError> {
    let by = By { actor: change.actor.clone(), at: Timestamp::now() };
    let details = json!({ "digest": change.digest });
    if let ("registry.delete", Some(digest)) = (change.action, &change.digest) {
        deltas::forget(tx, digest)?;
    }
    append_audit(tx, &by, draft(change.action, &change.object, details))
}

/// Makes restored tables fit to go on: raises each device's generation to the time in seconds since
/// 1970, above whatever it was told since the backup (and by earlier restores), and records it all.
///
/// # Errors
/// What the database says, or a stored document that cannot be read.
pub fn record_restore(tx: &Tx<'_>, at: Timestamp, made_at: Timestamp) -> Result<(), StoreError> {
    let floor = at.as_second().cast_unsigned();
    let devices: Vec<(String, String)> =
        collect(tx, "SELECT id, desired FROM devices", params![], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    for (id, desired) in &devices {
        let mut desired: DesiredState = from_json("devices", desired)?;
        desired.generation = floor.max(desired.generation.saturating_add(1));
        let sql = "UPDATE devices SET desired = ?2 WHERE id = ?1";
        tx.execute(sql, params![id, to_json(&desired)])?;
    }
    let details = json!({ "backup_made_at": made_at, "generations_from": floor });
    bump(tx)?;
    append_audit(tx, &By::hub(at), draft("hub.restore", "hub", details))
}

pub(super) fn draft(
    action: &'static str,
    object: impl ToString,
    details: serde_json::Value,
) -> AuditDraft {
    AuditDraft { action, object: object.to_string(), details }
}

pub(super) fn audit_of(row: &Row<'_>) -> Result<AuditEntry, StoreError> {
    let text = |index: usize| row.get::<String>(index);
    Ok(AuditEntry {
        sequence: row.get::<i64>(0)? as u64,
        at: column("audit", &text(1)?)?,
        actor: text(2)?,
        action: text(3)?,
        object: text(4)?,
        details: from_json("audit", &text(5)?)?,
        previous: column("audit", &text(6)?)?,
        hash: column("audit", &text(7)?)?,
    })
}

pub(super) const AUDIT_COLUMNS: &str =
    "sequence, at, actor, action, object, details, previous, hash";

fn layer_key(layer: &Layer) -> (&'static str, &str) {
    match layer {
        Layer::Fleet => ("fleet", "-"),
        Layer::Class(name) => ("class", name.as_str()),
        Layer::Site(name) => ("site", name.as_str()),
        Layer::Device(name) => ("device", name.as_str()),
    }
}

fn layer_of(kind: &str, name: &str) -> Result<Layer, StoreError> {
    Ok(match kind {
        "class" => Layer::Class(column("blueprints", name)?),
        "site" => Layer::Site(column("blueprints", name)?),
        "device" => Layer::Device(column("blueprints", name)?),
        _ => Layer::Fleet,
    })
}

fn load_classes(tx: &Tx<'_>) -> Result<Vec<DeviceClass>, StoreError> {
    collect(tx, "SELECT class FROM classes ORDER BY name", params![], |row| {
        from_json("classes", &row.get::<String>(0)?)
    })
}

fn load_blueprints(tx: &Tx<'_>) -> Result<Vec<StoredBlueprint>, StoreError> {
    collect(tx, "SELECT layer, name, toml FROM blueprints ORDER BY layer, name", params![], |row| {
        let place = layer_of(&row.get::<String>(0)?, &row.get::<String>(1)?)?;
        Ok(StoredBlueprint { place, toml: row.get(2)? })
    })
}

fn load_releases(tx: &Tx<'_>, cache: &Mutex<ReleaseCache>) -> Result<Releases, StoreError> {
    let keys: Vec<(ModelName, semver::Version)> =
        collect(tx, "SELECT model, version FROM releases", params![], |row| {
            let model = column("releases", &row.get::<String>(0)?)?;
            Ok((model, column("releases", &row.get::<String>(1)?)?))
        })?;
    let mut releases = BTreeMap::new();
    for (model, version) in keys {
        let (_, release) = load_release(tx, cache, &model, &version)?;
        releases.insert((model, version), release);
    }
    Ok(releases)
}

fn load_frame(
    tx: &Tx<'_>,
    cache: &Mutex<ReleaseCache>,
    also: &[RolloutId],
) -> Result<Frame, StoreError> {
    let completed = collect(
        tx,
        "SELECT rollout FROM rollouts WHERE state = 'completed' ORDER BY completed_sequence DESC",
        params![],
        |row| {
            let record: RolloutRecord = from_json("rollouts", &row.get::<String>(0)?)?;
            Ok(CompletedRollout::from(&record.rollout))
        },
    )?;
    let quarantine = collect(tx, "SELECT manifest, class FROM quarantine", params![], |row| {
        let manifest = column("quarantine", &row.get::<String>(0)?)?;
        Ok((manifest, column("quarantine", &row.get::<String>(1)?)?))
    })?;
    Ok(Frame {
        revision: revision(tx)?,
        classes: load_classes(tx)?,
        blueprints: load_blueprints(tx)?,
        rollouts: rollouts::active(tx, also)?,
        completed,
        releases: load_releases(tx, cache)?,
        quarantine: quarantine.into_iter().collect(),
    })
}

fn revision(tx: &Tx<'_>) -> Result<i64, StoreError> {
    let sql = "SELECT revision FROM planning WHERE id = 1";
    Ok(first(tx, sql, params![], |row| Ok(row.get(0)?))?.unwrap_or(0))
}

/// Notes that something changed that decisions depend on, other than what devices say themselves.
fn bump(tx: &Tx<'_>) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO planning (id, revision) VALUES (1, 1)
         ON CONFLICT (id) DO UPDATE SET revision = planning.revision + 1",
        params![],
    )?;
    Ok(())
}

fn load_release(
    tx: &Tx<'_>,
    cache: &Mutex<ReleaseCache>,
    model: &ModelName,
    version: &semver::Version,
) -> Result<(Arc<Release>, Arc<NewRelease>), StoreError> {
    let key = (model.clone(), version.clone());
    if let Some(found) = cache.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
        return Ok(found.clone());
    }
    let text: Option<String> = first(
        tx,
        "SELECT release FROM releases WHERE model = ?1 AND version = ?2",
        params![model.as_str(), version.to_string()],
        |row| Ok(row.get(0)?),
    )?;
    let text = text.ok_or_else(|| not_found("release", format!("{model} {version}")))?;
    let release: Release = from_json("releases", &text)?;
    let inner = Arc::new(release.release.clone());
    let both = (Arc::new(release), inner);
    cache.lock().unwrap_or_else(PoisonError::into_inner).insert(key, both.clone());
    Ok(both)
}

/// Whether what decisions and people look at differs, beyond counters.
fn is_news(before: Option<&DeviceReport>, report: &DeviceReport) -> bool {
    let Some(before) = before else { return true };
    let quiet = |phase: &Phase| match phase {
        Phase::Downloading { total_bytes, .. } => {
            Phase::Downloading { done_bytes: 0, total_bytes: *total_bytes }
        }
        other => other.clone(),
    };
    before.generation != report.generation
        || quiet(&before.phase) != quiet(&report.phase)
        || before.running != report.running
        || before.previous != report.previous
        || before.rejected != report.rejected
        || before.effective != report.effective
        || before.facts.memory_budget_bytes != report.facts.memory_budget_bytes
        || before.facts.memory_bytes != report.facts.memory_bytes
        || before.facts.cores != report.facts.cores
        || before.facts.arch != report.facts.arch
        || before.facts.cpu_features != report.facts.cpu_features
        || before.facts.agent_version != report.facts.agent_version
        || before.facts.obeys != report.facts.obeys
        || before.facts.metered != report.facts.metered
        || before.facts.time_zone != report.facts.time_zone
        || before.facts.engine != report.facts.engine
        || before.facts.endpoint != report.facts.endpoint
}

/// What a change of report says in a device's history.
fn report_events(before: Option<&DeviceReport>, report: &DeviceReport) -> Vec<String> {
    let mut events = Vec::new();
    let kind = |phase: &Phase| std::mem::discriminant(phase);
    let fresh = before.is_none_or(|before| {
        kind(&before.phase) != kind(&report.phase) || before.generation != report.generation
    });
    let running = match &report.running {
        Some(model) => format!("{} {} ({})", model.model, model.version, model.variant),
        None => "no model".to_owned(),
    };
    if fresh {
        events.push(match &report.phase {
            Phase::RolledBack { failure } => {
                format!("went back: {}; runs {running}", failure_words(failure))
            }
            Phase::Confirmed => format!("confirmed: runs {running}"),
            phase => phase_words(phase),
        });
    }
    if let Some(before) = before {
        let crashes = report.telemetry.worker_crashes;
        if crashes > before.telemetry.worker_crashes {
            events.push(format!("its worker died unasked ({crashes} in all)"));
        }
        if before.facts.memory_budget_bytes != report.facts.memory_budget_bytes {
            events.push(format!(
                "memory budget is now {}",
                slmops_fleet_core::words::bytes(report.facts.memory_budget_bytes)
            ));
        }
        if before.running != report.running && !fresh {
            events.push(format!("runs {running}"));
        }
    }
    for rejection in &report.rejected {
        let known = before.is_some_and(|before| {
            before.rejected.iter().any(|known| known.manifest == rejection.manifest)
        });
        if !known {
            events.push(format!(
                "rejected {}: {}",
                rejection.manifest.short(),
                failure_words(&rejection.failure)
            ));
        }
    }
    events
}

fn persist_transition(tx: &Tx<'_>, by: &By, transition: &Transition) -> Result<(), StoreError> {
    if let Some(fence) = &transition.fence {
        fence.pass(tx)?;
    }
    let mut chain = Chain::read(tx)?;
    for entry in &transition.audit {
        chain.append(tx, by, entry.clone())?;
    }
    let hub = By::hub(by.at);
    for change in &transition.rollouts {
        rollouts::persist(tx, &mut chain, by.at, change)?;
    }
    let generation = tx.json_integer("desired", "generation");
    let assign = format!("UPDATE devices SET desired = ?2 WHERE id = ?1 AND {generation} < ?3");
    for assignment in &transition.assignments {
        let desired = &*assignment.desired;
        let changed = tx.execute(
            &assign,
            params![assignment.device.as_str(), to_json(desired), desired.generation as i64],
        )?;
        if changed == 0 {
            return Err(conflict(
                format!(
                    "device {} has generation {} or a later one already",
                    assignment.device, desired.generation
                ),
                "generations never go down; this is a defect of the hub",
            ));
        }
        let model = match &desired.model {
            Some(model) => format!("{} {} ({})", model.model, model.version, model.variant),
            None => "no model".to_owned(),
        };
        let what = format!("told to be {model}: {}", desired.reason);
        add_event(tx, &assignment.device, by.at, desired.generation, &what)?;
        let details = json!({
            "generation": desired.generation,
            "model": desired.model.as_ref().map(|m| format!("{} {}", m.model, m.version)),
            "variant": desired.model.as_ref().map(|m| m.variant.to_string()),
            "manifest": desired.model.as_ref().map(|m| m.manifest.to_string()),
            "reason": desired.reason,
        });
        chain.append(tx, &hub, draft("device.assign", &assignment.device, details))?;
    }
    for (manifest, class) in &transition.quarantined {
        let failed_in = transition.rollouts.iter().find(|change| {
            let failed = |part: &RolloutDevice| {
                part.manifest == Some(*manifest) && matches!(part.outcome, Outcome::Failed { .. })
            };
            let halted = change.header.rollout.state == RolloutState::Halted;
            halted && change.parts.iter().any(|part| failed(&part.part))
        });
        let rollout = failed_in.map(|change| &change.header.rollout.id);
        tx.execute(
            "INSERT INTO quarantine (manifest, class, since, rollout) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT DO NOTHING",
            params![
                manifest.to_string(),
                class.to_string(),
                by.at.to_string(),
                rollout.map(|id| id.as_str()),
            ],
        )?;
        let details = json!({ "class": class, "rollout": rollout });
        chain.append(tx, &hub, draft("manifest.quarantine", manifest, details))?;
    }
    Ok(())
}

/// What a device's orders become, and how audit log and history tell of it.
fn ordered(
    known: &Orders,
    change: OrdersChange,
    by: &By,
) -> (Orders, &'static str, serde_json::Value, String) {
    let mut orders = known.clone();
    let (made_by, at) = (by.actor.clone(), by.at);
    match change {
        OrdersChange::Pin(NewPin { model, version, reason }) => {
            let same = known
                .pin
                .as_ref()
                .is_some_and(|pin| pin.names(&model, &version) && pin.reason == reason);
            let details = json!({ "model": model, "version": version, "reason": reason });
            let pin = Pin { model, version, reason, by: made_by, at };
            let what = words::pin(&pin);
            if !same {
                orders.pin = Some(pin);
            }
            (orders, "device.pin", details, what)
        }
        OrdersChange::Unpin(reason) => {
            orders.pin = None;
            let (details, because) = ended(reason);
            (orders, "device.unpin", details, format!("unpinned by {made_by}{because}"))
        }
        OrdersChange::Exclude(reason) => {
            let same = known.exclusion.as_ref().is_some_and(|known| known.reason == reason);
            let details = json!({ "reason": reason });
            let exclusion = Exclusion { reason, by: made_by, at };
            let what = words::exclusion(&exclusion);
            if !same {
                orders.exclusion = Some(exclusion);
            }
            (orders, "device.exclude", details, what)
        }
        OrdersChange::Include(reason) => {
            orders.exclusion = None;
            let (details, because) = ended(reason);
            (orders, "device.include", details, format!("included by {made_by}{because}"))
        }
    }
}

/// Why an order ended, for the audit log and in the device's history.
fn ended(reason: Option<String>) -> (serde_json::Value, String) {
    match reason {
        Some(reason) => (json!({ "reason": reason }), format!(": {reason}")),
        None => (json!({}), String::new()),
    }
}

fn free_name(tx: &Tx<'_>, enrolment: &Enrolment) -> Result<String, StoreError> {
    let taken = |name: &str| tx.exists("SELECT 1 FROM devices WHERE name = ?1", params![name]);
    if let Some(name) = &enrolment.name {
        if taken(name)? {
            return Err(conflict(
                format!("a device named `{name}` is in the fleet already"),
                "choose another name with --name",
            ));
        }
        return Ok(name.clone());
    }
    let base = plain_name(&enrolment.facts.hostname);
    for suffix in 1..=MAX_NAME_SUFFIX {
        let name = if suffix == 1 { base.clone() } else { format!("{base}-{suffix}") };
        if !taken(&name)? {
            return Ok(name);
        }
    }
    Err(conflict(format!("every name from `{base}` on is taken"), "choose a name with --name"))
}

/// A host name as a device name: lower case, and with `-` between its words if it is none so.
fn plain_name(hostname: &str) -> String {
    let name: String = hostname.chars().take(60).map(|c| c.to_ascii_lowercase()).collect();
    if name.parse::<slmops_api::SiteName>().is_ok() {
        return name;
    }
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let name = words.collect::<Vec<_>>().join("-");
    if name.is_empty() { "device".to_owned() } else { name }
}

impl Store for SqlStore {
    fn add_invitation(&self, by: By, invitation: NewInvitationRow) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            let NewInvitationRow { info, secret } = invitation;
            tx.execute(
                "INSERT INTO invitations (id, secret, info) VALUES (?1, ?2, ?3)",
                params![info.id.as_str(), &secret.to_string(), &to_json(&info)],
            )?;
            let details = json!({
                "labels": info.labels, "site": info.site, "expires_at": info.expires_at,
            });
            append_audit(tx, &by, draft("invitation.create", &info.id, details))
        })
    }

    fn invitations(&self) -> StoreFuture<'_, Vec<InvitationInfo>> {
        self.read(|tx| {
            let sql = "SELECT info, used_by FROM invitations ORDER BY sequence DESC LIMIT 500";
            collect(tx, sql, params![], |row| {
                let mut info: InvitationInfo = from_json("invitations", &row.get::<String>(0)?)?;
                let used_by: Option<String> = row.get(1)?;
                info.used_by = used_by.map(|id| column("invitations", &id)).transpose()?;
                Ok(info)
            })
        })
    }

    fn withdraw_invitation(&self, by: By, id: InvitationId) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            let used_by: Option<Option<String>> = first(
                tx,
                "SELECT used_by FROM invitations WHERE id = ?1",
                params![id.as_str()],
                |row| Ok(row.get(0)?),
            )?;
            match used_by {
                None => return Err(not_found("invitation", &id)),
                Some(Some(device)) => {
                    return Err(conflict(
                        format!("invitation {id} was used by device {device}"),
                        format!("to shut the device out: `slm device revoke {device}`"),
                    ));
                }
                Some(None) => {}
            }
            tx.execute("DELETE FROM invitations WHERE id = ?1", params![id.as_str()])?;
            append_audit(tx, &by, draft("invitation.withdraw", &id, json!({})))
        })
    }

    fn enrol(&self, enrolment: Enrolment) -> StoreFuture<'_, Enrolled> {
        self.write(move |tx| {
            let refused = |detail: String| StoreError::Forbidden {
                detail,
                hint: "ask an operator for a new one: `slm device invite`".to_owned(),
            };
            let id = &enrolment.invitation;
            let row: Option<(String, String, Option<String>)> = first(
                tx,
                "SELECT secret, info, used_by FROM invitations WHERE id = ?1",
                params![id.as_str()],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
            )?;
            // An unknown invitation and a wrong secret look the same from outside.
            let unknown =
                || refused(format!("invitation {id} is not known or its secret is wrong"));
            let (secret, info, used_by) = row.ok_or_else(unknown)?;
            if secret.parse() != Ok(enrolment.secret) {
                return Err(unknown());
            }
            let info: InvitationInfo = from_json("invitations", &info)?;
            if let Some(used_by) = used_by {
                let device = find_device(tx, &used_by)?;
                if device.public_key == enrolment.public_key && !device.revoked {
                    return Ok(Enrolled { device, new: false });
                }
                return Err(refused(format!("invitation {id} was used before, by another device")));
            }
            if info.expires_at <= enrolment.at {
                return Err(refused(format!("invitation {id} expired at {}", info.expires_at)));
            }
            let sql = "SELECT 1 FROM devices WHERE public_key = ?1";
            if tx.exists(sql, params![enrolment.public_key])? {
                return Err(conflict(
                    "this device key is in the fleet already",
                    "the device needs no new invitation; to start afresh, use another state folder",
                ));
            }
            let device = StoredDevice {
                id: enrolment.device.clone(),
                name: free_name(tx, &enrolment)?,
                public_key: enrolment.public_key.clone(),
                site: info.site.clone(),
                labels: info.labels.clone(),
                facts: enrolment.facts.clone(),
                desired: DesiredState {
                    generation: 1,
                    model: None,
                    runtime: RuntimeConfig::default(),
                    confirm_timeout_s: DEFAULT_CONFIRM_TIMEOUT_S,
                    reason: "no release is meant for this device yet".to_owned(),
                    rules: DeviceRules::default(),
                },
                report: None,
                enrolled_at: enrolment.at,
                last_seen: enrolment.at,
                revoked: false,
                orders: None,
            };
            tx.execute(
                "INSERT INTO devices (id, name, public_key, site, labels, facts, desired,
                     enrolled_at, last_seen) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8)",
                params![
                    device.id.as_str(),
                    device.name,
                    device.public_key,
                    device.site.as_ref().map(|site| site.as_str()),
                    to_json(&device.labels),
                    to_json(&device.facts),
                    to_json(&device.desired),
                    device.enrolled_at.to_string(),
                ],
            )?;
            tx.execute(
                "UPDATE invitations SET used_by = ?2 WHERE id = ?1",
                params![id.as_str(), device.id.as_str()],
            )?;
            add_event(tx, &device.id, enrolment.at, 1, &format!("joined by invitation {id}"))?;
            let by = By { actor: format!("device {}", device.id), at: enrolment.at };
            let details = json!({ "name": device.name, "invitation": id });
            append_audit(tx, &by, draft("device.enrol", &device.id, details))?;
            Ok(Enrolled { device, new: true })
        })
    }

    fn device(&self, id_or_name: String) -> StoreFuture<'_, StoredDevice> {
        self.read(move |tx| find_device(tx, &id_or_name))
    }

    fn devices(&self, request: PageRequest) -> StoreFuture<'_, Page<StoredDevice>> {
        self.read(move |tx| {
            let limit = limit_of(&request);
            let sql = format!(
                "SELECT {DEVICE_COLUMNS} FROM devices WHERE name > ?1 ORDER BY name LIMIT ?2"
            );
            let after = request.cursor.unwrap_or_default();
            let found = collect(tx, &sql, params![after, limit + 1], |row| {
                let device = device_of(row)?;
                Ok((device.name.clone(), device))
            })?;
            Ok(page(found, limit))
        })
    }

    fn devices_of(&self, ids: Vec<DeviceId>) -> StoreFuture<'_, Vec<StoredDevice>> {
        self.read(move |tx| {
            let sql = format!("SELECT {DEVICE_COLUMNS} FROM devices WHERE id = ?1");
            let found = ids.iter().map(|id| first(tx, &sql, params![id.as_str()], device_of));
            found.filter_map(Result::transpose).collect()
        })
    }

    fn change_device(
        &self,
        by: By,
        id: DeviceId,
        change: DeviceChange,
    ) -> StoreFuture<'_, StoredDevice> {
        self.write(move |tx| {
            let mut device = find_device(tx, id.as_str())?;
            for (key, value) in change.labels {
                match value {
                    Some(value) => device.labels.insert(key, value),
                    None => device.labels.remove(&key),
                };
            }
            if let Some(site) = change.site {
                device.site = site;
            }
            tx.execute(
                "UPDATE devices SET labels = ?2, site = ?3 WHERE id = ?1",
                params![
                    id.as_str(),
                    to_json(&device.labels),
                    device.site.as_ref().map(|site| site.as_str())
                ],
            )?;
            let details = json!({ "labels": device.labels, "site": device.site });
            append_audit(tx, &by, draft("device.update", &id, details))?;
            Ok(device)
        })
    }

    fn revoke_device(&self, by: By, id: DeviceId) -> StoreFuture<'_, StoredDevice> {
        self.write(move |tx| {
            let mut device = find_device(tx, id.as_str())?;
            if !device.revoked {
                device.revoked = true;
                tx.execute("UPDATE devices SET revoked = 1 WHERE id = ?1", params![id.as_str()])?;
                let generation = device.desired.generation;
                add_event(tx, &id, by.at, generation, "shut out of the fleet")?;
                let details = json!({ "name": device.name });
                append_audit(tx, &by, draft("device.revoke", &id, details))?;
            }
            Ok(device)
        })
    }

    fn order_device(
        &self,
        by: By,
        id: DeviceId,
        change: OrdersChange,
    ) -> StoreFuture<'_, StoredDevice> {
        self.write(move |tx| {
            let mut device = find_device(tx, id.as_str())?;
            let known = device.orders.as_deref().cloned().unwrap_or_default();
            let (orders, action, details, what) = ordered(&known, change, &by);
            if orders == known {
                return Ok(device);
            }
            device.orders = Some(Box::new(orders)).filter(|orders| !orders.is_none());
            tx.execute(
                "UPDATE devices SET orders = ?2 WHERE id = ?1",
                params![id.as_str(), device.orders.as_ref().map(to_json)],
            )?;
            add_event(tx, &id, by.at, device.desired.generation, &what)?;
            append_audit(tx, &by, draft(action, &id, details))?;
            Ok(device)
        })
    }

    fn record_report(
        &self,
        at: Timestamp,
        id: DeviceId,
        group: Option<Group>,
        report: Arc<DeviceReport>,
    ) -> StoreFuture<'_, ReportOutcome> {
        self.write(move |tx| {
            let found: Option<(i64, Option<String>)> = first(
                tx,
                "SELECT report_sequence, report FROM devices WHERE id = ?1",
                params![id.as_str()],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )?;
            let (known, before) = found.ok_or_else(|| not_found("device", &id))?;
            if report.sequence <= known as u64 {
                return Ok(ReportOutcome::Stale);
            }
            let before: Option<DeviceReport> =
                before.map(|text| from_json("devices", &text)).transpose()?;
            for what in report_events(before.as_ref(), &report) {
                add_event(tx, &id, at, report.generation, &what)?;
            }
            telemetry::add(tx, at, group.as_ref(), before.as_ref(), &report)?;
            let news = is_news(before.as_ref(), &report);
            tx.announce(if news { "news" } else { "report" }, id.as_str())?;
            tx.execute(
                "UPDATE devices SET report = ?2, report_sequence = ?3, facts = ?4, last_seen = ?5
                 WHERE id = ?1",
                params![
                    id.as_str(),
                    to_json(&*report),
                    report.sequence as i64,
                    to_json(&report.facts),
                    at.to_string()
                ],
            )?;
            Ok(if news { ReportOutcome::News } else { ReportOutcome::Counters })
        })
    }

    fn record_seen(&self, seen: Vec<(DeviceId, Timestamp)>) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            for (id, at) in seen {
                tx.execute(
                    "UPDATE devices SET last_seen = ?2 WHERE id = ?1 AND last_seen < ?2",
                    params![id.as_str(), at.to_string()],
                )?;
            }
            Ok(())
        })
    }

    fn telemetry(
        &self,
        query: TelemetryQuery,
        since: Timestamp,
    ) -> StoreFuture<'_, Vec<TelemetrySeries>> {
        self.read(move |tx| telemetry::series(tx, &query, since))
    }

    fn fold_telemetry(&self, now: Timestamp, keep: Keep) -> StoreFuture<'_, bool> {
        self.write(move |tx| telemetry::fold(tx, now, keep))
    }

    fn history(&self, id: DeviceId, request: PageRequest) -> StoreFuture<'_, Page<DeviceEvent>> {
        self.read(move |tx| {
            let limit = limit_of(&request);
            let found = collect(
                tx,
                "SELECT sequence, at, generation, what FROM device_events
                 WHERE device = ?1 AND sequence < ?2 ORDER BY sequence DESC LIMIT ?3",
                params![id.as_str(), below(&request)?, limit + 1],
                |row| {
                    let event = DeviceEvent {
                        at: column("device_events", &row.get::<String>(1)?)?,
                        generation: row.get::<i64>(2)? as u64,
                        what: row.get(3)?,
                    };
                    Ok((row.get::<i64>(0)?.to_string(), event))
                },
            )?;
            Ok(page(found, limit))
        })
    }

    fn classes(&self) -> StoreFuture<'_, Vec<DeviceClass>> {
        self.read(load_classes)
    }

    fn put_class(&self, by: By, class: DeviceClass) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            tx.execute(
                "INSERT INTO classes (name, class) VALUES (?1, ?2)
                 ON CONFLICT (name) DO UPDATE SET class = excluded.class",
                params![class.name.as_str(), &to_json(&class)],
            )?;
            let details = json!({
                "min_memory_bytes": class.min_memory_bytes, "quantisation": class.quantisation,
            });
            bump(tx)?;
            append_audit(tx, &by, draft("class.put", &class.name, details))
        })
    }

    fn delete_class(&self, by: By, name: ClassName) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            if tx.execute("DELETE FROM classes WHERE name = ?1", params![name.as_str()])? == 0 {
                return Err(not_found("class", &name));
            }
            bump(tx)?;
            append_audit(tx, &by, draft("class.delete", &name, json!({})))
        })
    }

    fn blueprints(&self) -> StoreFuture<'_, Vec<StoredBlueprint>> {
        self.read(load_blueprints)
    }

    fn put_blueprint(&self, by: By, blueprint: StoredBlueprint) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            let (layer, name) = layer_key(&blueprint.place);
            tx.execute(
                "INSERT INTO blueprints (layer, name, toml) VALUES (?1, ?2, ?3)
                 ON CONFLICT (layer, name) DO UPDATE SET toml = excluded.toml",
                params![layer, name, &blueprint.toml],
            )?;
            let details = json!({ "toml": blueprint.toml });
            bump(tx)?;
            append_audit(tx, &by, draft("blueprint.put", format!("{layer}/{name}"), details))
        })
    }

    fn delete_blueprint(&self, by: By, place: Layer) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            let (layer, name) = layer_key(&place);
            let gone = tx.execute(
                "DELETE FROM blueprints WHERE layer = ?1 AND name = ?2",
                params![layer, name],
            )?;
            if gone == 0 {
                return Err(not_found("blueprint", format!("{layer}/{name}")));
            }
            bump(tx)?;
            append_audit(tx, &by, draft("blueprint.delete", format!("{layer}/{name}"), json!({})))
        })
    }

    fn channels(&self) -> StoreFuture<'_, Vec<Channel>> {
        self.read(|tx| {
            let sql = "SELECT channel FROM channels ORDER BY name";
            collect(tx, sql, params![], |row| from_json("channels", &row.get::<String>(0)?))
        })
    }

    fn put_channel(&self, by: By, channel: Channel) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            tx.execute(
                "INSERT INTO channels (name, channel) VALUES (?1, ?2)
                 ON CONFLICT (name) DO UPDATE SET channel = excluded.channel",
                params![channel.name.as_str(), &to_json(&channel)],
            )?;
            let details = json!({ "after": channel.after, "policy": channel.policy });
            append_audit(tx, &by, draft("channel.put", &channel.name, details))
        })
    }

    fn delete_channel(&self, by: By, name: ChannelName) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            if tx.execute("DELETE FROM channels WHERE name = ?1", params![name.as_str()])? == 0 {
                return Err(not_found("channel", &name));
            }
            append_audit(tx, &by, draft("channel.delete", &name, json!({})))
        })
    }

    fn add_release(&self, by: By, release: NewRelease) -> StoreFuture<'_, Registered> {
        let cache = Arc::clone(&self.releases);
        self.write(move |tx| {
            let title = format!("{} {}", release.model, release.version);
            match load_release(tx, &cache, &release.model, &release.version) {
                // Compared as JSON: what was stored has been through it.
                Ok((known, inner)) if to_json(&*inner) == to_json(&release) => {
                    return Ok(Registered::Same(known));
                }
                Ok(_) => {
                    return Err(conflict(
                        format!("two releases of the same version: {title} is registered with other content"),
                        "releases never change; choose a new version with --version",
                    ));
                }
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
            let manifests: Vec<String> =
                release.variants.iter().map(|v| format!("{} {}", v.name, v.manifest)).collect();
            let mut details = json!({ "variants": manifests, "key": release.key });
            if let Some(reason) = &release.gate_override {
                details["gate_override"] = json!(reason.reason);
            }
            let stored =
                Release { release, created_at: by.at, created_by: by.actor.clone() };
            tx.execute(
                "INSERT INTO releases (model, version, release) VALUES (?1, ?2, ?3)",
                params![
                    stored.release.model.as_str(),
                    &stored.release.version.to_string(),
                    &to_json(&stored),
                ],
            )?;
            bump(tx)?;
            append_audit(tx, &by, draft("release.create", title, details))?;
            Ok(Registered::New(Arc::new(stored)))
        })
    }

    fn release(&self, model: ModelName, version: semver::Version) -> StoreFuture<'_, Arc<Release>> {
        let cache = Arc::clone(&self.releases);
        self.read(move |tx| load_release(tx, &cache, &model, &version).map(|(release, _)| release))
    }

    fn releases(&self, request: PageRequest) -> StoreFuture<'_, Page<Arc<Release>>> {
        let cache = Arc::clone(&self.releases);
        self.read(move |tx| {
            let limit = limit_of(&request);
            let found = collect(
                tx,
                "SELECT sequence, model, version FROM releases WHERE sequence < ?1
                 ORDER BY sequence DESC LIMIT ?2",
                params![below(&request)?, limit + 1],
                |row| {
                    let model = column("releases", &row.get::<String>(1)?)?;
                    let version = column("releases", &row.get::<String>(2)?)?;
                    let (release, _) = load_release(tx, &cache, &model, &version)?;
                    Ok((row.get::<i64>(0)?.to_string(), release))
                },
            )?;
            Ok(page(found, limit))
        })
    }

    fn rollout(&self, id: RolloutId) -> StoreFuture<'_, Rollout> {
        self.read(move |tx| rollouts::shown(tx, &id))
    }

    fn rollouts(&self, request: PageRequest) -> StoreFuture<'_, Page<Rollout>> {
        self.read(move |tx| rollouts::list(tx, below(&request)?, &request))
    }

    fn rollout_devices(
        &self,
        id: RolloutId,
        request: PageRequest,
    ) -> StoreFuture<'_, Page<RolloutDevice>> {
        self.read(move |tx| {
            rollouts::exists(tx, &id)?;
            rollouts::devices(tx, &id, &request)
        })
    }

    fn samples(&self, limit: u32) -> StoreFuture<'_, Vec<RolloutRecord>> {
        self.read(move |tx| rollouts::samples(tx, limit))
    }

    fn catalog(&self) -> StoreFuture<'_, Releases> {
        let cache = Arc::clone(&self.releases);
        self.read(move |tx| load_releases(tx, &cache))
    }

    fn frame(&self, also: Vec<RolloutId>) -> StoreFuture<'_, Frame> {
        let cache = Arc::clone(&self.releases);
        self.read(move |tx| load_frame(tx, &cache, &also))
    }

    fn devices_after(
        &self,
        id: Option<DeviceId>,
        limit: u32,
    ) -> StoreFuture<'_, Vec<StoredDevice>> {
        self.read(move |tx| {
            let after = id.as_ref().map_or("", |id| id.as_str());
            let sql =
                format!("SELECT {DEVICE_COLUMNS} FROM devices WHERE id > ?1 ORDER BY id LIMIT ?2");
            collect(tx, &sql, params![after, limit], device_of)
        })
    }

    fn transition(
        &self,
        by: By,
        decided_at: i64,
        transition: Arc<Transition>,
    ) -> StoreFuture<'_, i64> {
        self.write(move |tx| {
            let revision = revision(tx)?;
            if revision != decided_at {
                return Err(StoreError::Outdated);
            }
            persist_transition(tx, &by, &transition)?;
            bump(tx)?;
            Ok(revision + 1)
        })
    }

    fn quarantine(&self) -> StoreFuture<'_, Vec<QuarantineRow>> {
        self.read(|tx| {
            let sql = "SELECT manifest, class, since, rollout FROM quarantine
                       ORDER BY COALESCE(since, '') DESC, manifest, class";
            collect(tx, sql, params![], |row| {
                let since: Option<String> = row.get(2)?;
                let rollout: Option<String> = row.get(3)?;
                Ok(QuarantineRow {
                    manifest: column("quarantine", &row.get::<String>(0)?)?,
                    class: column("quarantine", &row.get::<String>(1)?)?,
                    since: since.map(|at| column("quarantine", &at)).transpose()?,
                    rollout: rollout.map(|id| column("quarantine", &id)).transpose()?,
                })
            })
        })
    }

    fn lift(&self, by: By, lift: Lift) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            let Lift { manifest, class, reason } = lift;
            let gone = tx.execute(
                "DELETE FROM quarantine WHERE manifest = ?1 AND class = ?2",
                params![manifest.to_string(), class.as_str()],
            )?;
            if gone == 0 {
                let name = format!("{} for class {class}", manifest.short());
                return Err(not_found("quarantine", name));
            }
            let details = json!({ "class": class, "reason": reason });
            bump(tx)?;
            append_audit(tx, &by, draft("manifest.lift", manifest, details))
        })
    }

    fn add_webhook(
        &self,
        by: By,
        id: WebhookId,
        asked: NewWebhook,
        secret: Secret,
    ) -> StoreFuture<'_, Webhook> {
        self.write(move |tx| webhooks::add(tx, &by, &id, asked, &secret))
    }

    fn webhooks(&self) -> StoreFuture<'_, Vec<WebhookRow>> {
        self.read(webhooks::list)
    }

    fn remove_webhook(&self, by: By, id: WebhookId) -> StoreFuture<'_, ()> {
        self.write(move |tx| webhooks::remove(tx, &by, &id))
    }

    fn rotate_webhook(
        &self,
        by: By,
        id: WebhookId,
        secret: Secret,
        until: Timestamp,
    ) -> StoreFuture<'_, Webhook> {
        self.write(move |tx| webhooks::rotate(tx, &by, &id, &secret, until))
    }

    fn test_webhook(&self, by: By, id: WebhookId) -> StoreFuture<'_, ()> {
        self.write(move |tx| webhooks::test(tx, &by, &id))
    }

    fn webhook_work_at(&self, id: WebhookId, now: Timestamp) -> StoreFuture<'_, Option<Timestamp>> {
        self.read(move |tx| webhooks::work_at(tx, &id, now))
    }

    fn lease_deliveries(
        &self,
        id: WebhookId,
        now: Timestamp,
        until: Timestamp,
        limit: u32,
    ) -> StoreFuture<'_, Vec<Leased>> {
        self.write(move |tx| webhooks::lease(tx, &id, now, until, limit))
    }

    fn finish_deliveries(&self, id: WebhookId, attempted: Vec<Attempted>) -> StoreFuture<'_, ()> {
        self.write(move |tx| webhooks::finish(tx, &id, &attempted))
    }

    fn redeliver(&self, by: By, id: WebhookId, sequence: Option<u64>) -> StoreFuture<'_, u64> {
        self.write(move |tx| webhooks::redeliver(tx, &by, &id, sequence))
    }

    fn deliveries(
        &self,
        id: WebhookId,
        state: Option<DeliveryState>,
        page: PageRequest,
    ) -> StoreFuture<'_, Page<Delivery>> {
        self.read(move |tx| webhooks::deliveries(tx, &id, state, &page))
    }

    fn want_deltas(&self, at: Timestamp, wanted: Vec<Wanted>) -> StoreFuture<'_, u64> {
        self.write(move |tx| deltas::want(tx, at, &wanted))
    }

    fn lease_delta(&self, now: Timestamp, until: Timestamp) -> StoreFuture<'_, Option<DeltaJob>> {
        self.write(move |tx| deltas::lease(tx, now, until))
    }

    fn keep_delta(&self, job: DeltaJob, until: Timestamp) -> StoreFuture<'_, bool> {
        self.write(move |tx| deltas::keep(tx, &job, until))
    }

    fn finish_delta(&self, job: DeltaJob, made: Made, again_at: Timestamp) -> StoreFuture<'_, ()> {
        self.write(move |tx| deltas::finish(tx, &job, &made, again_at))
    }

    fn deltas(&self, model: ModelName) -> StoreFuture<'_, Vec<DeltaJob>> {
        self.read(move |tx| deltas::list(tx, &model))
    }

    fn add_token(&self, by: By, token: Token, hash: SecretHash) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            tx.execute(
                "INSERT INTO tokens (id, hash, token) VALUES (?1, ?2, ?3)",
                params![token.id.as_str(), &hash.to_string(), &to_json(&token)],
            )?;
            let details = json!({
                "name": token.name, "role": token.role, "expires_at": token.expires_at,
            });
            append_audit(tx, &by, draft("token.create", &token.id, details))
        })
    }

    fn token(&self, hash: SecretHash) -> StoreFuture<'_, Option<Token>> {
        self.read(move |tx| {
            let sql = "SELECT token FROM tokens WHERE hash = ?1";
            let text: Option<String> =
                first(tx, sql, params![hash.to_string()], |row| Ok(row.get(0)?))?;
            text.map(|text| from_json("tokens", &text)).transpose()
        })
    }

    fn tokens(&self) -> StoreFuture<'_, Vec<Token>> {
        self.read(|tx| {
            collect(tx, "SELECT token FROM tokens ORDER BY sequence", params![], |row| {
                from_json("tokens", &row.get::<String>(0)?)
            })
        })
    }

    fn delete_token(&self, by: By, id: TokenId) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            let tokens: Vec<Token> = collect(tx, "SELECT token FROM tokens", params![], |row| {
                from_json("tokens", &row.get::<String>(0)?)
            })?;
            let token = tokens.iter().find(|token| token.id == id);
            let token = token.ok_or_else(|| not_found("token", &id))?;
            let lasting_admin =
                |token: &&Token| token.role == Role::Admin && token.expires_at.is_none();
            if lasting_admin(&token) && tokens.iter().filter(lasting_admin).count() == 1 {
                return Err(conflict(
                    format!("token {id} is the last one that an administrator has"),
                    "make another first: `slm token create --role admin`",
                ));
            }
            tx.execute("DELETE FROM tokens WHERE id = ?1", params![id.as_str()])?;
            append_audit(tx, &by, draft("token.delete", &id, json!({ "name": token.name })))
        })
    }

    fn keys(&self) -> StoreFuture<'_, Vec<PublisherKey>> {
        self.read(|tx| {
            collect(tx, "SELECT key FROM publisher_keys ORDER BY id", params![], |row| {
                from_json("publisher_keys", &row.get::<String>(0)?)
            })
        })
    }

    fn add_key(&self, by: By, key: PublisherKey) -> StoreFuture<'_, ()> {
        self.write(move |tx| {
            let added = tx.execute(
                "INSERT INTO publisher_keys (id, key) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                params![key.id.as_str(), &to_json(&key)],
            )?;
            if added == 0 {
                return Ok(());
            }
            append_audit(tx, &by, draft("key.add", &key.id, json!({ "name": key.name })))
        })
    }

    fn audit(&self, request: PageRequest) -> StoreFuture<'_, Page<AuditEntry>> {
        self.read(move |tx| {
            let limit = limit_of(&request);
            let sql = format!(
                "SELECT {AUDIT_COLUMNS} FROM audit WHERE sequence < ?1
                 ORDER BY sequence DESC LIMIT ?2"
            );
            let found = collect(tx, &sql, params![below(&request)?, limit + 1], |row| {
                let entry = audit_of(row)?;
                Ok((entry.sequence.to_string(), entry))
            })?;
            Ok(page(found, limit))
        })
    }

    fn verify_audit(&self, from: CheckFrom) -> StoreFuture<'_, AuditVerdict> {
        Box::pin(async move {
            let verdict = self.read(move |tx| audit::verify(tx, from)).await?;
            // One that continues what a caller checked says nothing of what was before.
            if from == CheckFrom::Checkpoint && audit::is_to_keep(&verdict) {
                let checked = verdict.clone();
                self.write(move |tx| audit::keep(tx, Timestamp::now(), &checked)).await?;
            }
            Ok(verdict)
        })
    }
}
