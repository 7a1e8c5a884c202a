//! Runs `fleet-core` on every change and persists what it decides.
//!
//! A decision is one transaction: snapshot, pure function, result. Handlers run the operator's
//! commands through [`Engine::create_rollout`] and [`Engine::command`]; the task in [`Engine::run`]
//! does the rest whenever it is told that something changed, or a deadline comes. With several hubs
//! over one database, only that of the hub that leads ([`Lead`]) does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::json;
use slmops_api::blueprint::{Layer, StoredBlueprint};
use slmops_api::channel::{Channel, ChannelRelease, ChannelStatus, NewPromotion};
use slmops_api::model::{DeviceClass, NewRelease};
use slmops_api::orders::NewPin;
use slmops_api::plan::RolloutPlan;
use slmops_api::rollout::{NewRollout, Rollout, RolloutState};
use slmops_api::{ChannelName, DeviceId, ModelName, RolloutId};
use slmops_fleet_core::blueprint::{BlueprintError, Resolved, resolve};
use slmops_fleet_core::rollout::{self, Command, Pace, Plan, RolloutError, RolloutRecord, Targets};
use slmops_fleet_core::world::{FleetDevice, World};
use tokio::sync::Notify;
use tokio::sync::watch;

use crate::db::DbError;
use crate::events::{Board, Events};
use crate::listening::Listening;
use crate::replicas::Lead;
use crate::store::{
    AuditDraft, By, MAX_PAGE, PageRequest, Snapshot, Store, StoreError, StoredDevice, Transition,
};

/// How often the engine looks even if nothing happened.
const HEARTBEAT: Duration = Duration::from_secs(30);
/// How often "last seen" is written.
const WRITE_SEEN_EVERY: Duration = Duration::from_secs(10);
/// After a failed decision the engine waits this long.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Decisions in a row without a pause; more would mean that they do not settle.
const MAX_ROUNDS: u32 = 16;
/// Rollouts, the newest, from which it is read how fast devices take releases.
const PACE_ROLLOUTS: u32 = 20;

/// The hub's decisions. Clones share it.
#[derive(Clone)]
pub struct Engine {
    store: Arc<dyn Store>,
    board: Board,
    events: Events,
    wake: Arc<Notify>,
    listening: Arc<Listening>,
    lead: watch::Receiver<Lead>,
}

impl Engine {
    /// An engine over a store; [`Engine::run`] must run for devices to be told anything.
    pub fn new(
        store: Arc<dyn Store>,
        board: Board,
        events: Events,
        lead: watch::Receiver<Lead>,
    ) -> Self {
        let listening = Arc::new(Listening::begin(Timestamp::now(), Instant::now()));
        Self { store, board, events, wake: Arc::default(), listening, lead }
    }

    fn moment(&self, now: Timestamp) -> Moment {
        Moment { now, listening_since: self.listening.since(now, Instant::now()) }
    }

    /// Says that something changed. Returns at once; several calls may be one decision.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Decides until `stop` turns true.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut write_seen = tokio::time::interval(WRITE_SEEN_EVERY);
        write_seen.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut next = Duration::ZERO;
        let mut lead = self.lead.clone();
        loop {
            tokio::select! {
                Ok(()) = lead.changed() => {}
                () = self.wake.notified() => {}
                () = tokio::time::sleep(next) => {}
                _ = write_seen.tick() => {
                    self.write_seen().await;
                    continue;
                }
                () = stopped(&mut stop) => break,
            }
            next = match self.settle().await {
                Ok(deadline) => until(deadline),
                Err(error) => {
                    tracing::error!(%error, "cannot decide; trying again");
                    RETRY_AFTER
                }
            };
        }
        self.write_seen().await;
    }

    async fn write_seen(&self) {
        let seen = self.board.take_seen();
        if seen.is_empty() {
            return;
        }
        if let Err(error) = self.store.record_seen(seen).await {
            tracing::warn!(%error, "cannot write when devices were last seen");
        }
    }

    /// Decides until nothing changes any more, if this hub leads. Returns when to look again.
    ///
    /// # Errors
    /// What the store says; nothing of the failed decision was changed.
    pub async fn settle(&self) -> Result<Option<Timestamp>, StoreError> {
        for _ in 0..MAX_ROUNDS {
            let fence = match self.lead.borrow().clone() {
                Lead::Alone => None,
                Lead::Here(fence) => Some(fence),
                Lead::Elsewhere => return Ok(None),
            };
            // Most wakes change nothing: look over a read-only snapshot first.
            let now = Timestamp::now();
            let moment = self.moment(now);
            let snapshot = self.store.snapshot(vec![]).await?;
            let board = self.board.clone();
            let look = tick(&snapshot, &board, moment);
            if look.is_empty() {
                return Ok(look.deadline);
            }
            let board = self.board.clone();
            let decide = move |snapshot: &Snapshot| {
                Ok(Transition { fence: fence.clone(), ..tick(snapshot, &board, moment) })
            };
            let done = self.store.transition(By::hub(now), vec![], Box::new(decide)).await?;
            self.publish(&done);
        }
        tracing::error!("decisions do not settle; going on later");
        Ok(None)
    }

    fn publish(&self, transition: &Transition) {
        self.board.apply(transition);
        for record in &transition.rollouts {
            self.events.announce("rollout", &record.rollout.id);
        }
        for assignment in &transition.assignments {
            self.events.announce("device", &assignment.device);
        }
    }

    /// Makes a rollout and starts its first wave. Asking again for what is under way gives that.
    ///
    /// # Errors
    /// What `fleet-core` refuses, or what the store says.
    pub async fn create_rollout(
        &self,
        by: By,
        id: RolloutId,
        asked: NewRollout,
    ) -> Result<(Rollout, bool), StoreError> {
        let board = self.board.clone();
        let (moment, actor) = (self.moment(by.at), by.actor.clone());
        let (given, wanted) = (id.clone(), asked.clone());
        let decide = move |snapshot: &Snapshot| {
            if under_way(snapshot, &asked).is_some() {
                return Ok(Transition::default());
            }
            let devices = fleet_devices(snapshot, &board);
            let world = world(snapshot, &devices, moment);
            let created =
                rollout::create(id.clone(), asked.clone(), &actor, &world, &snapshot.rollouts)?;
            let mut records = snapshot.rollouts.clone();
            let mut forced = created.superseded;
            forced.push(created.record);
            replace(&mut records, &forced);
            let plan = rollout::plan(&world, &records, created.targets);
            let made = AuditDraft {
                action: "rollout.create",
                object: id.to_string(),
                details: json!({
                    "model": asked.model, "version": asked.version, "policy": asked.policy,
                }),
            };
            let promoted = asked.promotion.as_ref().map(|promotion| AuditDraft {
                action: "release.promote",
                object: format!("{} {}", asked.model, asked.version),
                details: json!({ "promotion": promotion, "rollout": id }),
            });
            Ok(transition(plan, forced, promoted.into_iter().chain([made]).collect()))
        };
        let done = self.store.transition(by, vec![], Box::new(decide)).await?;
        self.publish(&done);
        self.wake();
        let new = !done.is_empty();
        if !new {
            let snapshot = self.store.snapshot(vec![]).await?;
            if let Some(record) = under_way(&snapshot, &wanted) {
                return Ok((record.rollout.clone(), false));
            }
        }
        Ok((self.store.rollout(given).await?.rollout, new))
    }

    /// What a rollout would do. Nothing of it happens.
    ///
    /// # Errors
    /// What `fleet-core` refuses, or what the store says.
    pub async fn forecast(&self, by: By, asked: NewRollout) -> Result<RolloutPlan, StoreError> {
        self.look(move |world, active, pace| {
            Ok(rollout::forecast(asked, &by.actor, world, active, pace)?)
        })
        .await
    }

    /// What a rollout that is not over will do from now on.
    ///
    /// # Errors
    /// That it is over, or what the store says.
    pub async fn foresee(&self, id: RolloutId) -> Result<RolloutPlan, StoreError> {
        let state = self.store.rollout(id.clone()).await?.rollout.state;
        self.look(move |world, active, pace| {
            let plan = rollout::foresee(&id, world, active, pace);
            let state = rollout::state_name(state);
            let over = || RolloutError::State { id: id.clone(), state, wanted: "planned" };
            Ok(plan.ok_or_else(over)?)
        })
        .await
    }

    /// Whether a device can be pinned to a release.
    ///
    /// # Errors
    /// Why it cannot, or what the store says.
    pub async fn check_pin(&self, id: DeviceId, pin: NewPin) -> Result<(), StoreError> {
        self.look(move |world, _, _| {
            let gone = || StoreError::NotFound { kind: "device", name: id.to_string() };
            let device = world.device(&id).ok_or_else(gone)?;
            Ok(rollout::check_pin(world, device, &pin.model, &pin.version)?)
        })
        .await
    }

    /// The rollout that promotes a release to a channel.
    ///
    /// # Errors
    /// That it may not go there, or what the store says.
    pub async fn promotion(
        &self,
        release: &NewRelease,
        wanted: NewPromotion,
    ) -> Result<NewRollout, StoreError> {
        let channels = self.store.channels().await?;
        let channel = channels.into_iter().find(|channel| channel.name == wanted.to);
        let name = wanted.to.to_string();
        let channel = channel.ok_or(StoreError::NotFound { kind: "channel", name })?;
        let (model, version) = (release.model.clone(), release.version.clone());
        self.look(move |world, _, _| {
            Ok(rollout::promote(world, &model, &version, &channel, wanted.force)?)
        })
        .await
    }

    /// All channels in the order in which releases pass them, with what is on each.
    ///
    /// # Errors
    /// What the store says.
    pub async fn channels(&self) -> Result<Vec<ChannelStatus>, StoreError> {
        let channels = in_order(self.store.channels().await?);
        let newest = PageRequest { cursor: None, limit: MAX_PAGE };
        let rollouts = self.store.rollouts(newest).await?.items;
        self.look(move |world, _, _| {
            let following = |name: &ChannelName| {
                let follows = |it: &&FleetDevice| it.config.channel.as_ref() == Some(name);
                world.devices.iter().filter(|it| !it.revoked).filter(follows).count() as u64
            };
            let status = |channel: Channel| ChannelStatus {
                followers: following(&channel.name),
                releases: releases_on(&channel.name, &rollouts),
                channel,
            };
            Ok(channels.into_iter().map(status).collect())
        })
        .await
    }

    /// Asks a question about the fleet as it is, off the threads that answer requests.
    async fn look<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&World<'_>, &[RolloutRecord], &Pace) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let snapshot = self.store.snapshot(vec![]).await?;
        let recent = PageRequest { cursor: None, limit: PACE_ROLLOUTS };
        let recent = self.store.rollouts(recent).await?.items;
        let (board, moment) = (self.board.clone(), self.moment(Timestamp::now()));
        let asked = tokio::task::spawn_blocking(move || {
            let devices = fleet_devices(&snapshot, &board);
            let world = world(&snapshot, &devices, moment);
            ask(
                &world,
                &snapshot.rollouts,
                &Pace::measure(&world, recent.iter().map(|record| &record.rollout)),
            )
        });
        asked.await.map_err(|_| DbError::Panicked)?
    }

    /// Carries out an operator's command on a rollout.
    ///
    /// # Errors
    /// What `fleet-core` refuses, or what the store says.
    pub async fn command(
        &self,
        by: By,
        id: RolloutId,
        command: Command,
    ) -> Result<Rollout, StoreError> {
        let board = self.board.clone();
        let (moment, actor) = (self.moment(by.at), by.actor.clone());
        let wanted = id.clone();
        let decide = move |snapshot: &Snapshot| {
            let devices = fleet_devices(snapshot, &board);
            let world = world(snapshot, &devices, moment);
            let record = snapshot.rollouts.iter().find(|record| record.rollout.id == wanted);
            let record = record.ok_or_else(|| StoreError::NotFound {
                kind: "rollout",
                name: wanted.to_string(),
            })?;
            let (changed, targets) = rollout::command(record, command, &actor, &world)?;
            if changed == *record {
                return Ok(Transition::default());
            }
            let mut records = snapshot.rollouts.clone();
            let forced = vec![changed];
            replace(&mut records, &forced);
            let plan = rollout::plan(&world, &records, targets);
            let audit = AuditDraft {
                action: match command {
                    Command::Pause => "rollout.pause",
                    Command::Resume => "rollout.resume",
                    Command::Abort => "rollout.abort",
                    Command::Approve { .. } => "rollout.approve",
                    Command::Rollback => "rollout.rollback",
                },
                object: wanted.to_string(),
                details: match command {
                    Command::Approve { wave } => json!({ "wave": wave }),
                    _ => json!({}),
                },
            };
            Ok(transition(plan, forced, vec![audit]))
        };
        let done = self.store.transition(by, vec![id.clone()], Box::new(decide)).await?;
        self.publish(&done);
        self.wake();
        Ok(self.store.rollout(id).await?.rollout)
    }
}

/// When a decision is made, and since when the hub has heard everything.
#[derive(Clone, Copy)]
struct Moment {
    now: Timestamp,
    listening_since: Timestamp,
}

/// Channels with each after the one that it comes after.
fn in_order(mut left: Vec<Channel>) -> Vec<Channel> {
    let mut ordered: Vec<Channel> = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let waits =
            |channel: &Channel| left.iter().any(|it| Some(&it.name) == channel.after.as_ref());
        // No chain is a ring; should one be all the same, its channels are shown as they are.
        let next = left.iter().position(|channel| !waits(channel)).unwrap_or(0);
        ordered.push(left.remove(next));
    }
    ordered
}

/// The newest release of each model line that was promoted to a channel; `rollouts`, newest first.
fn releases_on(name: &ChannelName, rollouts: &[RolloutRecord]) -> Vec<ChannelRelease> {
    let mut releases: BTreeMap<ModelName, ChannelRelease> = BTreeMap::new();
    for Rollout { id, asked, state, created_by, created_at, .. } in
        rollouts.iter().map(|record| &record.rollout)
    {
        let here = asked.promotion.as_ref().is_some_and(|promotion| promotion.channel == *name);
        let gone = matches!(state, RolloutState::RolledBack | RolloutState::Aborted);
        if !here || gone {
            continue;
        }
        releases.entry(asked.model.clone()).or_insert_with(|| ChannelRelease {
            model: asked.model.clone(),
            version: asked.version.clone(),
            rollout: id.clone(),
            state: *state,
            by: created_by.clone(),
            at: *created_at,
        });
    }
    releases.into_values().collect()
}

/// Waits until the hub stops, or nobody is left who could say so.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

fn until(deadline: Option<Timestamp>) -> Duration {
    let Some(deadline) = deadline else { return HEARTBEAT };
    let left = deadline.duration_since(Timestamp::now());
    let left = Duration::try_from(left).unwrap_or(Duration::ZERO);
    left.clamp(Duration::from_millis(10), HEARTBEAT)
}

fn under_way<'s>(snapshot: &'s Snapshot, asked: &NewRollout) -> Option<&'s RolloutRecord> {
    let active = |record: &&RolloutRecord| {
        matches!(record.rollout.state, RolloutState::Running | RolloutState::Paused)
    };
    snapshot.rollouts.iter().filter(active).find(|record| record.rollout.asked == *asked)
}

/// One decision of the hub by itself.
fn tick(snapshot: &Snapshot, board: &Board, moment: Moment) -> Transition {
    let devices = fleet_devices(snapshot, board);
    let world = world(snapshot, &devices, moment);
    let plan = rollout::plan(&world, &snapshot.rollouts, Targets::new());
    let known = |pair: &_| snapshot.quarantine.contains(pair);
    let plan = Plan {
        quarantined: plan.quarantined.into_iter().filter(|pair| !known(pair)).collect(),
        ..plan
    };
    transition(plan, vec![], vec![])
}

fn replace(records: &mut Vec<RolloutRecord>, changed: &[RolloutRecord]) {
    for record in changed {
        match records.iter_mut().find(|known| known.rollout.id == record.rollout.id) {
            Some(known) => *known = record.clone(),
            None => records.push(record.clone()),
        }
    }
}

/// A plan as what to persist; `forced` are records to write even if the plan left them alone.
fn transition(plan: Plan, mut forced: Vec<RolloutRecord>, audit: Vec<AuditDraft>) -> Transition {
    replace(&mut forced, &plan.rollouts);
    Transition {
        rollouts: forced,
        assignments: plan.assignments,
        quarantined: plan.quarantined,
        audit,
        fence: None,
        deadline: plan.deadline,
    }
}

fn world<'a>(snapshot: &'a Snapshot, devices: &'a [FleetDevice], moment: Moment) -> World<'a> {
    World {
        now: moment.now,
        listening_since: moment.listening_since,
        devices,
        releases: &snapshot.releases,
        quarantine: &snapshot.quarantine,
        completed: &snapshot.completed,
    }
}

/// The devices as decisions see them.
fn fleet_devices(snapshot: &Snapshot, board: &Board) -> Vec<FleetDevice> {
    let mut resolved: BTreeMap<Vec<Layer>, Result<Arc<Resolved>, BlueprintError>> = BTreeMap::new();
    let mut devices = Vec::with_capacity(snapshot.devices.len());
    for device in &snapshot.devices {
        let layers = layers_of(device, &snapshot.classes, &snapshot.blueprints);
        let places: Vec<Layer> = layers.iter().map(|(place, _)| place.clone()).collect();
        let config = resolved
            .entry(places)
            .or_insert_with(|| resolve(&layers).map(Arc::new))
            .clone()
            // Layers are checked when they are put; should they contradict each other all the same
            // (a device moved to another class), the device stays as it is until they are mended.
            .unwrap_or_else(|_| Arc::new(as_it_is(device)));
        let class = device.classify(&snapshot.classes).class;
        devices.push(FleetDevice {
            id: device.id.clone(),
            name: device.name.clone(),
            labels: device.all_labels(&class),
            class,
            facts: Arc::new(device.facts.clone()),
            budget_bytes: device.facts.memory_budget_bytes,
            config,
            last_seen: board
                .last_seen(&device.id)
                .unwrap_or(device.last_seen)
                .max(device.last_seen),
            desired: device.desired.clone(),
            report: device.report.clone(),
            revoked: device.revoked,
            orders: device.orders.clone(),
        });
    }
    // Decisions find a device by its id.
    devices.sort_by(|a, b| a.id.cmp(&b.id));
    devices
}

fn as_it_is(device: &StoredDevice) -> Resolved {
    Resolved {
        model: None,
        channel: None,
        runtime: device.desired.runtime.clone(),
        context_set: true,
        confirm_timeout_s: device.desired.confirm_timeout_s,
        frozen: true,
        rules: device.desired.rules.clone(),
        values: vec![],
        conflicts: vec![],
    }
}

/// The blueprint layers that apply to a device.
pub fn layers_of(
    device: &StoredDevice,
    classes: &[DeviceClass],
    blueprints: &[StoredBlueprint],
) -> Vec<(Layer, String)> {
    let class = device.classify(classes).class;
    let applies = |place: &Layer| match place {
        Layer::Fleet => true,
        Layer::Class(name) => *name == class,
        Layer::Site(name) => device.site.as_ref() == Some(name),
        Layer::Device(id) => *id == device.id,
    };
    blueprints
        .iter()
        .filter(|blueprint| applies(&blueprint.place))
        .map(|blueprint| (blueprint.place.clone(), blueprint.toml.clone()))
        .collect()
}
