//! Runs `fleet-core` on every change and persists what it decides.
//!
//! One task, [`Planner::run`], owns the [`Fleet`] in memory and makes every decision, one at a time:
//! bring the fleet up to date, decide, persist. A decision is persisted only if what it was made on
//! is unchanged in the store; else the fleet is read again. Handlers ask through [`Engine`], and tell
//! it what changed. With several hubs over one database, only that of the hub that leads ([`Lead`])
//! decides by itself; the others keep their fleets up to date, and carry out what they are asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use slmops_api::blueprint::{Layer, StoredBlueprint};
use slmops_api::channel::{Channel, ChannelRelease, ChannelStatus, NewPromotion};
use slmops_api::device::DeviceReport;
use slmops_api::model::{DeviceClass, NewRelease};
use slmops_api::orders::NewPin;
use slmops_api::plan::RolloutPlan;
use slmops_api::rollout::{NewRollout, Rollout, RolloutState};
use slmops_api::{ChannelName, DeviceId, ModelName, RolloutId};
use slmops_fleet_core::rollout::{self, Command, Pace, RolloutError, RolloutRecord};
use slmops_fleet_core::world::{FleetDevice, World};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::db::{DbError, Heard};
use crate::events::{Board, Events};
use crate::fleet::{Changes, Contradiction, Decided, Fleet};
use crate::listening::Listening;
use crate::replicas::Lead;
use crate::store::{By, MAX_PAGE, PageRequest, Store, StoreError, StoredDevice, Transition};

/// How often the engine looks even if nothing happened.
const HEARTBEAT: Duration = Duration::from_secs(30);
/// How often it is looked whose "last seen" is to be written.
const WRITE_SEEN_EVERY: Duration = Duration::from_secs(10);
/// What is stored of when a device was last heard of is no older than this, and a little.
const SEEN_RESOLUTION: Duration = Duration::from_secs(120);
/// Devices whose "last seen" is written in one transaction.
const SEEN_AT_ONCE: usize = 1000;
/// After a failed decision the engine waits this long.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Decisions in a row without a pause; more would mean that they do not settle.
const MAX_ROUNDS: u32 = 16;
/// Times that a decision is made anew because what it was made on had changed.
const MAX_TRIES: u32 = 8;
/// Between decisions of its own the engine rests so many times as long as the last ones took, so
/// that a large fleet's news is decided on together.
const REST: u32 = 3;
/// Rollouts, the newest, from which it is read how fast devices take releases.
const PACE_ROLLOUTS: u32 = 20;
/// Devices that are read from the store at once.
const LOADED_AT_ONCE: u32 = 2000;
/// Questions that may wait.
const MAX_ASKS: usize = 256;

/// What is asked of the planner, with where the answer goes.
type Ask = Box<dyn FnOnce(&mut Planner) -> BoxFuture<'_, ()> + Send>;

/// The hub's decisions, as handlers see them. Clones share it.
#[derive(Clone)]
pub struct Engine {
    asks: mpsc::Sender<Ask>,
    changes: Arc<Mutex<Changes>>,
    wake: Arc<Notify>,
    store: Arc<dyn Store>,
    heard: Option<Heard>,
}

/// The one that decides.
pub struct Planner {
    store: Arc<dyn Store>,
    board: Board,
    events: Events,
    asks: mpsc::Receiver<Ask>,
    changes: Arc<Mutex<Changes>>,
    wake: Arc<Notify>,
    listening: Arc<Listening>,
    lead: watch::Receiver<Lead>,
    /// Absent until it is needed, and after a failure.
    fleet: Option<Box<Fleet>>,
}

impl Engine {
    /// An engine over a store, and its planner, which must run for devices to be told anything.
    /// With other hubs over the same store, `heard` tells when their changes are known to this one.
    pub fn new(
        store: Arc<dyn Store>,
        board: Board,
        events: Events,
        lead: watch::Receiver<Lead>,
        heard: Option<Heard>,
    ) -> (Self, Planner) {
        let (sender, asks) = mpsc::channel(MAX_ASKS);
        let (changes, wake): (Arc<Mutex<Changes>>, Arc<Notify>) = Default::default();
        let planner = Planner {
            store: Arc::clone(&store),
            board,
            events,
            asks,
            changes: Arc::clone(&changes),
            wake: Arc::clone(&wake),
            listening: Arc::new(Listening::begin(Timestamp::now(), std::time::Instant::now())),
            lead,
            fleet: None,
        };
        (Self { asks: sender, changes, wake, store, heard }, planner)
    }

    /// Says that a device is new, or that an operator changed it.
    pub fn device_changed(&self, id: DeviceId) {
        self.changed(|changes| {
            changes.devices.insert(id);
        });
        self.wake.notify_one();
    }

    /// Says that something other than a device changed.
    pub fn frame_changed(&self) {
        self.changed(|changes| changes.frame = true);
        self.wake.notify_one();
    }

    /// Says that what changed is not known.
    pub fn all_changed(&self) {
        self.changed(|changes| changes.all = true);
        self.wake.notify_one();
    }

    /// Says that a device counted on, at another hub. There is no hurry.
    pub fn device_counted(&self, id: DeviceId) {
        self.changed(|changes| {
            changes.devices.insert(id);
        });
    }

    /// Hands on a report that was stored. Without `news` in it there is no hurry.
    pub fn reported(&self, id: DeviceId, report: Arc<DeviceReport>, news: bool) {
        self.changed(|changes| {
            let newest = changes.reports.entry(id).or_insert_with(|| Arc::clone(&report));
            if newest.sequence < report.sequence {
                *newest = report;
            }
        });
        if news {
            self.wake.notify_one();
        }
    }

    fn changed(&self, note: impl FnOnce(&mut Changes)) {
        note(&mut self.changes.lock().unwrap_or_else(PoisonError::into_inner));
    }

    async fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&mut Planner) -> BoxFuture<'_, Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        // Whoever asks may have changed something at another hub just before.
        if let Some(heard) = &self.heard {
            heard.up_to_date().await?;
        }
        let (answer, answered) = oneshot::channel();
        let asked: Ask = Box::new(move |planner| {
            Box::pin(async move {
                // Whoever went away needs no answer.
                let _ = answer.send(ask(planner).await);
            })
        });
        let gone = || StoreError::Db(DbError::ShuttingDown);
        self.asks.send(asked).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
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
        let (found, new) =
            self.ask(move |planner| Box::pin(planner.create_rollout(by, id, asked))).await?;
        Ok((self.store.rollout(found).await?, new))
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
        let wanted = id.clone();
        self.ask(move |planner| Box::pin(planner.command(by, wanted, command))).await?;
        self.store.rollout(id).await
    }

    /// What a rollout would do. Nothing of it happens.
    ///
    /// # Errors
    /// What `fleet-core` refuses, or what the store says.
    pub async fn forecast(&self, by: By, asked: NewRollout) -> Result<RolloutPlan, StoreError> {
        let recent = self.store.samples(PACE_ROLLOUTS).await?;
        let plan = self.look(move |world, active| {
            let pace = Pace::measure(world, recent.iter().map(|record| &record.rollout));
            rollout::forecast(asked, &by.actor, world, active, &pace)
        });
        Ok(plan.await??)
    }

    /// What a rollout that is not over will do from now on.
    ///
    /// # Errors
    /// That it is over, or what the store says.
    pub async fn foresee(&self, id: RolloutId) -> Result<RolloutPlan, StoreError> {
        let state = self.store.rollout(id.clone()).await?.state;
        let recent = self.store.samples(PACE_ROLLOUTS).await?;
        let wanted = id.clone();
        let plan = self.look(move |world, active| {
            rollout::foresee(
                &wanted,
                world,
                active,
                &Pace::measure(world, recent.iter().map(|record| &record.rollout)),
            )
        });
        let state = rollout::state_name(state);
        let over = || RolloutError::State { id, state, wanted: "planned" };
        Ok(plan.await?.ok_or_else(over)?)
    }

    /// Whether a device can be pinned to a release.
    ///
    /// # Errors
    /// Why it cannot, or what the store says.
    pub async fn check_pin(&self, id: DeviceId, pin: NewPin) -> Result<(), StoreError> {
        let checked = self.look(move |world, _| {
            let gone = || StoreError::NotFound { kind: "device", name: id.to_string() };
            let device = world.device(&id).ok_or_else(gone)?;
            Ok(rollout::check_pin(world, device, &pin.model, &pin.version)?)
        });
        checked.await?
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
        let promoted = self.look(move |world, _| {
            Ok(rollout::promote(world, &model, &version, &channel, wanted.force)?)
        });
        promoted.await?
    }

    /// All channels in the order in which releases pass them, with what is on each.
    ///
    /// # Errors
    /// What the store says.
    pub async fn channels(&self) -> Result<Vec<ChannelStatus>, StoreError> {
        let channels = in_order(self.store.channels().await?);
        let newest = PageRequest { cursor: None, limit: MAX_PAGE };
        let rollouts = self.store.rollouts(newest).await?.items;
        self.look(move |world, _| {
            let following = |name: &ChannelName| {
                let follows = |it: &&FleetDevice| it.config.channel.as_ref() == Some(name);
                world.devices.iter().filter(|it| !it.revoked).filter(follows).count() as u64
            };
            let status = |channel: Channel| ChannelStatus {
                followers: following(&channel.name),
                releases: releases_on(&channel.name, &rollouts),
                channel,
            };
            channels.into_iter().map(status).collect()
        })
        .await
    }

    /// Asks a question about the fleet as it is now, on a thread for compute work.
    ///
    /// # Errors
    /// What the store says where the fleet must be read from it.
    pub async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&World<'_>, &[RolloutRecord]) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        self.ask(move |planner| {
            Box::pin(planner.with_fleet(move |fleet| fleet.look(Timestamp::now(), look)))
        })
        .await
    }

    /// Whether a blueprint layer would contradict others on some device; which, and why.
    ///
    /// # Errors
    /// As [`Engine::look`].
    pub async fn contradiction(
        &self,
        wanted: StoredBlueprint,
    ) -> Result<Option<Contradiction>, StoreError> {
        self.ask(move |planner| {
            Box::pin(planner.with_fleet(move |fleet| fleet.contradiction(&wanted)))
        })
        .await
    }
}

impl Planner {
    /// Reads the fleet, so that devices can be answered.
    ///
    /// # Errors
    /// What the store says.
    pub async fn load(mut self) -> Result<Self, StoreError> {
        self.fleet = Some(self.load_fleet().await?);
        Ok(self)
    }

    /// Decides and answers until `stop` turns true.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut write_seen = tokio::time::interval(WRITE_SEEN_EVERY);
        write_seen.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut next, mut rested) = (Instant::now(), Instant::now());
        let wake = Arc::clone(&self.wake);
        let mut lead = self.lead.clone();
        loop {
            tokio::select! {
                () = stopped(&mut stop) => break,
                Some(ask) = self.asks.recv() => {
                    ask(&mut self).await;
                    next = rested.max(Instant::now());
                }
                Ok(()) = lead.changed() => next = Instant::now(),
                () = wake.notified() => next = next.min(rested.max(Instant::now())),
                () = tokio::time::sleep_until(next) => {
                    let begun = Instant::now();
                    let wait = match self.settle().await {
                        Ok(deadline) => until(deadline),
                        Err(error) => {
                            tracing::error!(%error, "cannot decide; trying again");
                            RETRY_AFTER
                        }
                    };
                    rested = Instant::now() + begun.elapsed() * REST;
                    next = rested.max(Instant::now() + wait);
                }
                _ = write_seen.tick() => self.write_seen(SEEN_RESOLUTION).await,
            }
        }
        self.write_seen(Duration::ZERO).await;
    }

    async fn write_seen(&self, resolution: Duration) {
        for seen in self.board.take_seen(resolution).chunks(SEEN_AT_ONCE) {
            if let Err(error) = self.store.record_seen(seen.to_vec()).await {
                tracing::warn!(%error, "cannot write when devices were last seen");
            }
        }
    }

    /// The fleet, up to date with everything that this hub was told of. Whoever takes it puts it
    /// back, or it is read from the store anew.
    async fn up_to_date(&mut self) -> Result<Box<Fleet>, StoreError> {
        let take = |changes: &Mutex<Changes>| {
            std::mem::take(&mut *changes.lock().unwrap_or_else(PoisonError::into_inner))
        };
        let mut changes = take(&self.changes);
        let mut fleet = match self.fleet.take() {
            Some(fleet) if !changes.all => fleet,
            _ => return self.load_fleet().await,
        };
        if changes.frame {
            let frame = self.store.frame(vec![]).await?;
            if !fleet.reframe(frame) {
                return self.load_fleet().await;
            }
        }
        for (id, report) in std::mem::take(&mut changes.reports) {
            if fleet.hear(&id, report) {
                changes.devices.insert(id);
            }
        }
        if !changes.devices.is_empty() {
            let ids = changes.devices.into_iter().collect();
            let devices = self.store.devices_of(ids).await?;
            fleet.refresh(devices, &self.board);
        }
        Ok(fleet)
    }

    /// Reads the fleet piece by piece, so that it is never in memory twice. What changes meanwhile is
    /// told apart.
    async fn load_fleet(&self) -> Result<Box<Fleet>, StoreError> {
        let frame = self.store.frame(vec![]).await?;
        let mut fleet = Box::new(Fleet::new(frame, Arc::clone(&self.listening)));
        let mut last = None;
        loop {
            let devices = self.store.devices_after(last, LOADED_AT_ONCE).await?;
            let Some(newest) = devices.last().map(|device| device.id.clone()) else {
                return Ok(fleet);
            };
            last = Some(newest);
            let board = self.board.clone();
            let adding = tokio::task::spawn_blocking(move || {
                fleet.refresh(devices, &board);
                fleet
            });
            fleet = adding.await.map_err(|_| DbError::Panicked)?;
        }
    }

    /// Works with the fleet on a thread for compute work.
    async fn with_fleet<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Fleet) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let fleet = self.up_to_date().await?;
        self.at_work(fleet, work).await
    }

    async fn at_work<T: Send + 'static>(
        &mut self,
        mut fleet: Box<Fleet>,
        work: impl FnOnce(&mut Fleet) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let working = tokio::task::spawn_blocking(move || {
            let result = work(&mut fleet);
            (fleet, result)
        });
        let (fleet, result) = working.await.map_err(|_| DbError::Panicked)?;
        self.fleet = Some(fleet);
        Ok(result)
    }

    /// Makes a decision and persists it. None if what it was made on had changed: try again.
    async fn decide(
        &mut self,
        by: By,
        decide: impl FnOnce(&mut Fleet) -> Result<Decided, StoreError> + Send + 'static,
    ) -> Result<Option<(Arc<Transition>, Option<Timestamp>)>, StoreError> {
        let decided = self.with_fleet(decide).await??;
        self.persist(by, decided).await
    }

    async fn persist(
        &mut self,
        by: By,
        decided: Decided,
    ) -> Result<Option<(Arc<Transition>, Option<Timestamp>)>, StoreError> {
        let Decided { transition, deadline } = decided;
        let transition = Arc::new(transition);
        if transition.is_empty() {
            return Ok(Some((transition, deadline)));
        }
        // Put back only when it is persisted: else the store is right, and the fleet is not.
        let Some(mut fleet) = self.fleet.take() else { return Ok(None) };
        let persisting = self.store.transition(by, fleet.revision(), Arc::clone(&transition));
        match persisting.await {
            Ok(revision) => fleet.persisted(revision),
            Err(StoreError::Outdated) => {
                return self.outdated(fleet, &transition).await.map(|()| None);
            }
            Err(error) => return Err(error),
        }
        self.fleet = Some(fleet);
        self.publish(&transition);
        Ok(Some((transition, deadline)))
    }

    /// What a decision was made on has changed: an operator, or another hub, was faster. The fleet
    /// becomes what it was before the decision, and what has changed.
    async fn outdated(
        &mut self,
        mut fleet: Box<Fleet>,
        decided: &Transition,
    ) -> Result<(), StoreError> {
        let frame = self.store.frame(vec![]).await?;
        if !fleet.reframe(frame) {
            return Ok(());
        }
        let ids = decided.assignments.iter().map(|it| it.device.clone()).collect();
        fleet.refresh(self.store.devices_of(ids).await?, &self.board);
        self.fleet = Some(fleet);
        Ok(())
    }

    /// Decides until nothing changes any more, if this hub leads. Returns when to look again. What is
    /// heard meanwhile waits for the next time: there is no end of it in a large fleet.
    async fn settle(&mut self) -> Result<Option<Timestamp>, StoreError> {
        self.fleet = Some(self.up_to_date().await?);
        let mut next = None;
        for _ in 0..MAX_ROUNDS {
            let fence = match self.lead.borrow().clone() {
                Lead::Alone => None,
                Lead::Here(fence) => Some(fence),
                Lead::Elsewhere => return Ok(None),
            };
            let fleet = match self.fleet.take() {
                Some(fleet) => fleet,
                None => self.up_to_date().await?,
            };
            let now = Timestamp::now();
            let mut decided = self.at_work(fleet, move |fleet| fleet.decide(now)).await?;
            decided.transition.fence = fence;
            match self.persist(By::hub(now), decided).await? {
                Some((transition, deadline)) if transition.is_empty() => return Ok(deadline),
                Some((_, deadline)) => next = deadline,
                None => {}
            }
        }
        // A large wave is told in many rounds, each of which says that there is more to do at once.
        if next.is_none_or(|next| next > Timestamp::now()) {
            tracing::error!("decisions do not settle; going on later");
        }
        Ok(next)
    }

    fn publish(&self, transition: &Transition) {
        self.board.apply(transition);
        for change in &transition.rollouts {
            self.events.announce("rollout", &change.header.rollout.id);
        }
        for assignment in &transition.assignments {
            self.events.announce("device", &assignment.device);
        }
    }

    async fn create_rollout(
        &mut self,
        by: By,
        id: RolloutId,
        asked: NewRollout,
    ) -> Result<(RolloutId, bool), StoreError> {
        for _ in 0..MAX_TRIES {
            let wanted = asked.clone();
            let known = self.with_fleet(move |fleet| fleet.under_way(&wanted).cloned()).await?;
            if let Some(known) = known {
                return Ok((known, false));
            }
            let (at, actor) = (by.at, by.actor.clone());
            let (given, wanted) = (id.clone(), asked.clone());
            let create = move |fleet: &mut Fleet| fleet.create(at, given, wanted, &actor);
            if self.decide(by.clone(), create).await?.is_some() {
                return Ok((id, true));
            }
        }
        Err(StoreError::Outdated)
    }

    async fn command(&mut self, by: By, id: RolloutId, command: Command) -> Result<(), StoreError> {
        for _ in 0..MAX_TRIES {
            let wanted = id.clone();
            if !self.with_fleet(move |fleet| fleet.has_rollout(&wanted)).await? {
                let frame = self.store.frame(vec![id.clone()]).await?;
                if !self.with_fleet(move |fleet| fleet.reframe(frame)).await? {
                    self.fleet = None;
                    continue;
                }
            }
            let (at, actor, wanted) = (by.at, by.actor.clone(), id.clone());
            let carry_out = move |fleet: &mut Fleet| fleet.command(at, &wanted, command, &actor);
            if self.decide(by.clone(), carry_out).await?.is_some() {
                return Ok(());
            }
        }
        Err(StoreError::Outdated)
    }
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
fn releases_on(name: &ChannelName, rollouts: &[Rollout]) -> Vec<ChannelRelease> {
    let mut releases: BTreeMap<ModelName, ChannelRelease> = BTreeMap::new();
    for Rollout { id, asked, state, created_by, created_at, .. } in rollouts {
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
