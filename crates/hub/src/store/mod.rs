//! What the hub remembers: whole transactions, behind a trait.
//!
//! Each method is one transaction; when it returns `Ok`, its change and the audit entries that
//! record it are durable together. The store never decides: decisions are made over devices and a
//! [`Frame`] kept in memory, and [`Store::transition`] persists them if nothing else has changed.
//! Start reading at [`Store`], then `sql.rs`; `conformance.rs` says what every store must do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use slmops_api::audit::{AuditEntry, AuditVerdict, Token};
use slmops_api::blueprint::StoredBlueprint;
use slmops_api::channel::Channel;
use slmops_api::delta::DeltaJob;
use slmops_api::device::{
    DesiredModel, DesiredState, Device, DeviceEvent, DeviceFacts, DeviceReport, InvitationInfo,
    PublisherKey,
};
use slmops_api::model::{DeviceClass, NewRelease, Release};
use slmops_api::orders::{Lift, NewPin, Orders};
use slmops_api::rollout::{Rollout, RolloutDevice};
use slmops_api::telemetry::{TelemetryQuery, TelemetrySeries};
use slmops_api::webhook::{Delivery, DeliveryState, NewWebhook, Webhook};
use slmops_api::{
    ChannelName, ClassName, DeviceId, InvitationId, ModelName, Page, RolloutId, SiteName, TokenId,
    WebhookId,
};
use slmops_artifact::Digest;
use slmops_fleet_core::blueprint::BlueprintError;
use slmops_fleet_core::class::{Classification, classify};
use slmops_fleet_core::deltas::Wanted;
use slmops_fleet_core::rollout::{Assignment, RolloutError, RolloutRecord};
use slmops_fleet_core::world::{CompletedRollout, Releases};

use crate::auth::{Secret, SecretHash};
use crate::db::DbError;
use crate::replicas::Fence;
use crate::telemetry::{Group, Keep};

mod audit;
#[cfg(test)]
pub(crate) mod conformance;
mod deltas;
#[cfg(test)]
mod migrations;
mod rollouts;
mod sql;
mod telemetry;
mod webhooks;

pub use audit::{CheckFrom, MAX_CHECKED, parse_cursor};
pub use deltas::{MAX_ATTEMPTS, Made};
pub use rollouts::SHOWN_DEVICES;
pub use sql::{SCHEMA, SqlStore, record_registry, record_restore};
pub use webhooks::{Attempted, Leased, WebhookRow, message_id};

/// The most entries of one page.
pub const MAX_PAGE: u32 = 500;
/// Lines of history kept for each device.
pub const MAX_EVENTS_PER_DEVICE: u32 = 1000;

/// Why the store did not do what was asked. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("{kind} `{name}` does not exist")]
    NotFound {
        /// Its kind.
        kind: &'static str,
        /// What was asked for.
        name: String,
    },
    /// The object exists already or is in another state.
    #[error("{detail}")]
    Conflict {
        /// Which object and why.
        detail: String,
        /// The next step.
        hint: String,
    },
    /// Another hub over the same database decides by now.
    #[error("another hub decides by now")]
    Superseded,
    /// What a decision was made on has changed meanwhile.
    #[error("the decision was made on what is no longer so")]
    Outdated,
    /// The caller may not.
    #[error("{detail}")]
    Forbidden {
        /// Why.
        detail: String,
        /// The next step.
        hint: String,
    },
    /// `fleet-core` refused a rollout or a command.
    #[error(transparent)]
    Rollout(#[from] RolloutError),
    /// `fleet-core` refused a blueprint.
    #[error(transparent)]
    Blueprint(#[from] BlueprintError),
    /// The database failed.
    #[error(transparent)]
    Db(#[from] DbError),
    /// A stored document cannot be read.
    #[error("read table {table}: a stored document is not what this program wrote")]
    Document {
        /// The table.
        table: &'static str,
        /// The cause.
        source: serde_json::Error,
    },
}

/// Who does something, and when; it goes into the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct By {
    /// `token NAME`, `device ID` or `hub`.
    pub actor: String,
    /// When.
    pub at: Timestamp,
}

impl By {
    /// The hub itself.
    pub fn hub(at: Timestamp) -> Self {
        Self { actor: "hub".to_owned(), at }
    }
}

/// An audit entry before it has its place in the chain.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditDraft {
    /// What was done, such as `rollout.create`.
    pub action: &'static str,
    /// Upon which object.
    pub object: String,
    /// Details, with no secret and no floating-point number among them: their text must come back
    /// from the database as it went in, or the chain breaks.
    pub details: serde_json::Value,
}

/// A device as it is stored; its class follows from facts, labels and classes.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredDevice {
    /// Its id.
    pub id: DeviceId,
    /// Its name.
    pub name: String,
    /// Its public key, SPKI PEM.
    pub public_key: String,
    /// Its site.
    pub site: Option<SiteName>,
    /// Labels that people gave it.
    pub labels: BTreeMap<String, String>,
    /// Its facts.
    pub facts: DeviceFacts,
    /// What it should be.
    pub desired: DesiredState,
    /// Its latest report.
    pub report: Option<DeviceReport>,
    /// When it enrolled.
    pub enrolled_at: Timestamp,
    /// When it was last heard of, as far as written.
    pub last_seen: Timestamp,
    /// Whether it is shut out.
    pub revoked: bool,
    /// What operators decided about it; few devices have any.
    pub orders: Option<Box<Orders>>,
}

impl StoredDevice {
    /// Its class and why.
    pub fn classify(&self, classes: &[DeviceClass]) -> Classification {
        classify(&self.facts, &self.labels, classes)
    }

    /// All its labels, with `class`, `site`, `name` and `id` among them.
    pub fn all_labels(&self, class: &ClassName) -> BTreeMap<String, String> {
        let mut labels = self.labels.clone();
        labels.insert("class".to_owned(), class.to_string());
        labels.insert("name".to_owned(), self.name.clone());
        labels.insert("id".to_owned(), self.id.to_string());
        match &self.site {
            Some(site) => labels.insert("site".to_owned(), site.to_string()),
            None => labels.remove("site"),
        };
        labels
    }

    /// The device as the API shows it.
    pub fn to_api(&self, classes: &[DeviceClass]) -> Device {
        let class = self.classify(classes).class;
        Device {
            id: self.id.clone(),
            name: self.name.clone(),
            labels: self.all_labels(&class),
            class,
            site: self.site.clone(),
            facts: self.facts.clone(),
            desired: self.desired.clone(),
            report: self.report.clone(),
            enrolled_at: self.enrolled_at,
            last_seen: self.last_seen,
            revoked: self.revoked,
            orders: self.orders.as_deref().cloned().unwrap_or_default(),
        }
    }
}

/// A device that wants to join.
#[derive(Clone)]
pub struct Enrolment {
    /// The id it gets if it is new.
    pub device: DeviceId,
    /// The invitation.
    pub invitation: InvitationId,
    /// SHA-256 of the secret that it showed.
    pub secret: SecretHash,
    /// Its public key, SPKI PEM, checked.
    pub public_key: String,
    /// The name it asks for, if any.
    pub name: Option<String>,
    /// Its facts.
    pub facts: DeviceFacts,
    /// When.
    pub at: Timestamp,
}

/// What became of an enrolment.
#[derive(Clone, Debug, PartialEq)]
pub struct Enrolled {
    /// The device.
    pub device: StoredDevice,
    /// Whether it is new; a repeated request gives the same device again.
    pub new: bool,
}

/// A new invitation.
#[derive(Clone)]
pub struct NewInvitationRow {
    /// What is shown of it.
    pub info: InvitationInfo,
    /// SHA-256 of its secret.
    pub secret: SecretHash,
}

/// Changes to a device by an operator; absent fields stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceChange {
    /// Labels to set; `None` takes one away.
    pub labels: BTreeMap<String, Option<String>>,
    /// The site; `Some(None)` takes it away.
    pub site: Option<Option<SiteName>>,
}

/// What an operator decides about one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrdersChange {
    /// Hold it to a release.
    Pin(NewPin),
    /// Hold it no longer, and why, if somebody says so.
    Unpin(Option<String>),
    /// Keep it out of rollouts, and why.
    Exclude(String),
    /// Let it take part again, and why, if somebody says so.
    Include(Option<String>),
}

/// A manifest that is not offered to a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuarantineRow {
    /// The manifest.
    pub manifest: Digest,
    /// The class.
    pub class: ClassName,
    /// Since when, if that was noted.
    pub since: Option<Timestamp>,
    /// The rollout in which it failed, if that was noted.
    pub rollout: Option<RolloutId>,
}

/// What became of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportOutcome {
    /// Older than what is known: ignored.
    Stale,
    /// Only numbers changed.
    Counters,
    /// Something that decisions depend on changed.
    News,
}

/// What became of a registration.
#[derive(Clone, Debug, PartialEq)]
pub enum Registered {
    /// New.
    New(Arc<Release>),
    /// The same release was registered before.
    Same(Arc<Release>),
}

/// What decisions depend on besides the devices.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// Grows with every change of what decisions depend on, but for what devices say themselves.
    pub revision: i64,
    /// All classes.
    pub classes: Vec<DeviceClass>,
    /// All blueprint layers.
    pub blueprints: Vec<StoredBlueprint>,
    /// Rollouts that are not final, oldest first, and those asked for by id.
    pub rollouts: Vec<RolloutRecord>,
    /// Completed rollouts, newest first.
    pub completed: Vec<CompletedRollout>,
    /// All releases.
    pub releases: Releases,
    /// Manifests that are not offered to a class any more.
    pub quarantine: BTreeSet<(Digest, ClassName)>,
}

/// A rollout, and what of it is new or changed.
#[derive(Clone, Debug, PartialEq)]
pub struct RolloutChange {
    /// The rollout without its devices and what they ran before.
    pub header: RolloutRecord,
    /// Devices that are new or changed.
    pub parts: Vec<RolloutPart>,
    /// Devices that are no part of it any more.
    pub gone: Vec<DeviceId>,
}

/// One device of a rollout.
#[derive(Clone, Debug, PartialEq)]
pub struct RolloutPart {
    /// Its place among the devices of its wave when it became part of the rollout.
    pub position: u32,
    /// Its part.
    pub part: RolloutDevice,
    /// What it ran before, if it was told.
    pub before: Option<Option<DesiredModel>>,
}

impl RolloutChange {
    /// All of a rollout.
    pub fn whole(record: &RolloutRecord) -> Self {
        let mut header = record.clone();
        header.rollout.recount();
        let devices = std::mem::take(&mut header.rollout.devices);
        let mut before = std::mem::take(&mut header.before);
        let part = |(position, part): (u32, RolloutDevice)| RolloutPart {
            position,
            before: before.remove(&part.device),
            part,
        };
        Self { header, parts: (0..).zip(devices).map(part).collect(), gone: vec![] }
    }
}

/// What a decision changes, all at once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transition {
    /// Rollouts, new or changed.
    pub rollouts: Vec<RolloutChange>,
    /// Desired states.
    pub assignments: Vec<Assignment>,
    /// Quarantined manifests.
    pub quarantined: Vec<(Digest, ClassName)>,
    /// What the audit log says, besides the rollouts' decisions and the assignments.
    pub audit: Vec<AuditDraft>,
    /// The right by which the hub decided by itself, where there may be several.
    pub fence: Option<Fence>,
}

impl Transition {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.rollouts.is_empty()
            && self.assignments.is_empty()
            && self.quarantined.is_empty()
            && self.audit.is_empty()
    }
}

/// A page of a listing: where it starts and how long it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Where the page before ended.
    pub cursor: Option<String>,
    /// Entries, at most; never more than [`MAX_PAGE`].
    pub limit: u32,
}

impl Default for PageRequest {
    fn default() -> Self {
        Self { cursor: None, limit: 100 }
    }
}

/// The answer of a store that is still at work.
pub type StoreFuture<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

/// Everything that the hub remembers. Every method is one transaction.
pub trait Store: Send + Sync + 'static {
    /// Adds an invitation.
    fn add_invitation(&self, by: By, invitation: NewInvitationRow) -> StoreFuture<'_, ()>;
    /// All invitations, newest first.
    fn invitations(&self) -> StoreFuture<'_, Vec<InvitationInfo>>;
    /// Withdraws an invitation that nobody used.
    fn withdraw_invitation(&self, by: By, id: InvitationId) -> StoreFuture<'_, ()>;
    /// Uses an invitation: one device for each, the same device for the same public key.
    fn enrol(&self, enrolment: Enrolment) -> StoreFuture<'_, Enrolled>;

    /// The device with this id or name.
    fn device(&self, id_or_name: String) -> StoreFuture<'_, StoredDevice>;
    /// Devices by name.
    fn devices(&self, page: PageRequest) -> StoreFuture<'_, Page<StoredDevice>>;
    /// Those of these devices that there are.
    fn devices_of(&self, ids: Vec<DeviceId>) -> StoreFuture<'_, Vec<StoredDevice>>;
    /// Changes labels or site.
    fn change_device(
        &self,
        by: By,
        id: DeviceId,
        change: DeviceChange,
    ) -> StoreFuture<'_, StoredDevice>;
    /// Shuts a device out. Doing it again changes nothing.
    fn revoke_device(&self, by: By, id: DeviceId) -> StoreFuture<'_, StoredDevice>;
    /// Pins, unpins, excludes or includes a device. Doing it again changes nothing.
    fn order_device(
        &self,
        by: By,
        id: DeviceId,
        change: OrdersChange,
    ) -> StoreFuture<'_, StoredDevice>;
    /// Takes in a report, unless a newer one is known, and adds what it counts to the hour and to
    /// the device's group.
    fn record_report(
        &self,
        at: Timestamp,
        id: DeviceId,
        group: Option<Group>,
        report: Arc<DeviceReport>,
    ) -> StoreFuture<'_, ReportOutcome>;
    /// Writes when devices were last heard of.
    fn record_seen(&self, seen: Vec<(DeviceId, Timestamp)>) -> StoreFuture<'_, ()>;
    /// What devices counted since then, by release.
    fn telemetry(
        &self,
        query: TelemetryQuery,
        since: Timestamp,
    ) -> StoreFuture<'_, Vec<TelemetrySeries>>;
    /// Adds hours that are old enough up to days, those of one day at a time, and removes old days.
    /// Whether there is more of it to do.
    fn fold_telemetry(&self, now: Timestamp, keep: Keep) -> StoreFuture<'_, bool>;
    /// A device's history, newest first.
    fn history(&self, id: DeviceId, page: PageRequest) -> StoreFuture<'_, Page<DeviceEvent>>;

    /// All classes by name.
    fn classes(&self) -> StoreFuture<'_, Vec<DeviceClass>>;
    /// Adds or changes a class.
    fn put_class(&self, by: By, class: DeviceClass) -> StoreFuture<'_, ()>;
    /// Removes a class.
    fn delete_class(&self, by: By, name: ClassName) -> StoreFuture<'_, ()>;

    /// All blueprint layers.
    fn blueprints(&self) -> StoreFuture<'_, Vec<StoredBlueprint>>;
    /// Adds or changes a blueprint layer, which the caller has checked.
    fn put_blueprint(&self, by: By, blueprint: StoredBlueprint) -> StoreFuture<'_, ()>;
    /// Removes a blueprint layer.
    fn delete_blueprint(&self, by: By, place: slmops_api::blueprint::Layer) -> StoreFuture<'_, ()>;

    /// All channels by name.
    fn channels(&self) -> StoreFuture<'_, Vec<Channel>>;
    /// Adds or changes a channel, which the caller has checked.
    fn put_channel(&self, by: By, channel: Channel) -> StoreFuture<'_, ()>;
    /// Removes a channel.
    fn delete_channel(&self, by: By, name: ChannelName) -> StoreFuture<'_, ()>;

    /// Registers a release, which the caller has checked. The same content again is no error; other
    /// content under the same version is.
    fn add_release(&self, by: By, release: NewRelease) -> StoreFuture<'_, Registered>;
    /// One release.
    fn release(&self, model: ModelName, version: semver::Version) -> StoreFuture<'_, Arc<Release>>;
    /// Releases, newest first.
    fn releases(&self, page: PageRequest) -> StoreFuture<'_, Page<Arc<Release>>>;

    /// All releases, for decisions.
    fn catalog(&self) -> StoreFuture<'_, Releases>;

    /// One rollout with the first [`SHOWN_DEVICES`] of its devices.
    fn rollout(&self, id: RolloutId) -> StoreFuture<'_, Rollout>;
    /// Rollouts without their devices, newest first.
    fn rollouts(&self, page: PageRequest) -> StoreFuture<'_, Page<Rollout>>;
    /// Devices of a rollout, in wave order.
    fn rollout_devices(
        &self,
        id: RolloutId,
        page: PageRequest,
    ) -> StoreFuture<'_, Page<RolloutDevice>>;
    /// The newest rollouts, each with the first [`SHOWN_DEVICES`] of its devices.
    fn samples(&self, limit: u32) -> StoreFuture<'_, Vec<RolloutRecord>>;
    /// So many devices by id, after this one.
    fn devices_after(&self, id: Option<DeviceId>, limit: u32)
    -> StoreFuture<'_, Vec<StoredDevice>>;
    /// What decisions depend on besides the devices. `also` names rollouts wanted even if they are final.
    fn frame(&self, also: Vec<RolloutId>) -> StoreFuture<'_, Frame>;
    /// Persists a decision that was made at revision `decided_at`; gives the new revision.
    /// [`StoreError::Outdated`] if the revision is another one by now.
    fn transition(
        &self,
        by: By,
        decided_at: i64,
        transition: Arc<Transition>,
    ) -> StoreFuture<'_, i64>;

    /// Everything that is quarantined, newest first.
    fn quarantine(&self) -> StoreFuture<'_, Vec<QuarantineRow>>;
    /// Lets a manifest be offered to a class again, and says why.
    fn lift(&self, by: By, lift: Lift) -> StoreFuture<'_, ()>;

    /// Adds a webhook; it is told of what comes from now on.
    fn add_webhook(
        &self,
        by: By,
        id: WebhookId,
        asked: NewWebhook,
        secret: Secret,
    ) -> StoreFuture<'_, Webhook>;
    /// All webhooks with their secrets.
    fn webhooks(&self) -> StoreFuture<'_, Vec<WebhookRow>>;
    /// Removes a webhook and its deliveries.
    fn remove_webhook(&self, by: By, id: WebhookId) -> StoreFuture<'_, ()>;
    /// Gives a webhook a new secret; the one before signs as well until `until`.
    fn rotate_webhook(
        &self,
        by: By,
        id: WebhookId,
        secret: Secret,
        until: Timestamp,
    ) -> StoreFuture<'_, Webhook>;
    /// Adds a test event for one webhook.
    fn test_webhook(&self, by: By, id: WebhookId) -> StoreFuture<'_, ()>;
    /// When there is something to do for a webhook; nothing until something changes if absent.
    fn webhook_work_at(&self, id: WebhookId, now: Timestamp) -> StoreFuture<'_, Option<Timestamp>>;
    /// Takes events that are due, the oldest first; until `until` nobody else gets them.
    fn lease_deliveries(
        &self,
        id: WebhookId,
        now: Timestamp,
        until: Timestamp,
        limit: u32,
    ) -> StoreFuture<'_, Vec<Leased>>;
    /// Notes what became of events that were taken.
    fn finish_deliveries(&self, id: WebhookId, attempted: Vec<Attempted>) -> StoreFuture<'_, ()>;
    /// Lets a delivery, or all dead ones, be tried again. Returns how many.
    fn redeliver(&self, by: By, id: WebhookId, sequence: Option<u64>) -> StoreFuture<'_, u64>;
    /// A webhook's deliveries, newest first.
    fn deliveries(
        &self,
        id: WebhookId,
        state: Option<DeliveryState>,
        page: PageRequest,
    ) -> StoreFuture<'_, Page<Delivery>>;

    /// Notes that devices could use deltas; how many of them are new.
    fn want_deltas(&self, at: Timestamp, wanted: Vec<Wanted>) -> StoreFuture<'_, u64>;
    /// Takes the delta that most devices wait for; until `until` nobody else gets it.
    fn lease_delta(&self, now: Timestamp, until: Timestamp) -> StoreFuture<'_, Option<DeltaJob>>;
    /// Keeps a delta that is being made until `until`; false if it is somebody else's by now.
    fn keep_delta(&self, job: DeltaJob, until: Timestamp) -> StoreFuture<'_, bool>;
    /// Notes what became of a delta that was taken, unless it is somebody else's by now. One that
    /// is for later is not taken again before `again_at`.
    fn finish_delta(&self, job: DeltaJob, made: Made, again_at: Timestamp) -> StoreFuture<'_, ()>;
    /// All deltas of a model line, those that most devices could use first.
    fn deltas(&self, model: ModelName) -> StoreFuture<'_, Vec<DeltaJob>>;

    /// Adds an operator token by the SHA-256 of its secret.
    fn add_token(&self, by: By, token: Token, hash: SecretHash) -> StoreFuture<'_, ()>;
    /// The token with this hash, whether or not it has expired.
    fn token(&self, hash: SecretHash) -> StoreFuture<'_, Option<Token>>;
    /// All tokens.
    fn tokens(&self) -> StoreFuture<'_, Vec<Token>>;
    /// Removes a token; the last admin's cannot be removed.
    fn delete_token(&self, by: By, id: TokenId) -> StoreFuture<'_, ()>;

    /// All publisher keys.
    fn keys(&self) -> StoreFuture<'_, Vec<PublisherKey>>;
    /// Adds a publisher key; the same key again is no error.
    fn add_key(&self, by: By, key: PublisherKey) -> StoreFuture<'_, ()>;

    /// Audit entries, newest first.
    fn audit(&self, page: PageRequest) -> StoreFuture<'_, Page<AuditEntry>>;
    /// Checks the audit chain, a bounded part of it, and keeps how far it holds.
    fn verify_audit(&self, from: CheckFrom) -> StoreFuture<'_, AuditVerdict>;
}
