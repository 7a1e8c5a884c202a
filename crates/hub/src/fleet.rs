//! The fleet in memory, as decisions see it: loaded from the store, brought up to date by what has
//! changed, never the only truth. It decides by `fleet-core`, and says what to write.
//! Start reading at [`Fleet::new`], then [`Fleet::decide`].

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use slmops_api::blueprint::{Layer, StoredBlueprint};
use slmops_api::device::{DesiredState, DeviceFacts, DeviceReport};
use slmops_api::rollout::{NewRollout, RolloutDevice, RolloutState};
use slmops_api::{DeviceId, RolloutId};
use slmops_fleet_core::blueprint::{BlueprintError, Resolved, resolve};
use slmops_fleet_core::labels::Texts;
use slmops_fleet_core::rollout::{self, Command, Moved, RolloutRecord, Targets};
use slmops_fleet_core::world::{CompletedRollout, FleetDevice, World};

use crate::events::{Board, Place};
use crate::listening::Listening;
use crate::store::{
    AuditDraft, Frame, RolloutChange, RolloutPart, StoreError, StoredDevice, Transition,
};
use crate::telemetry::Group;

#[cfg(test)]
mod tests;

/// Devices that are put in their place one by one; more are sorted in together.
const FEW: usize = 8;

/// What changed since the fleet was brought up to date. Several changes of one thing are one.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Reports, newer than those known.
    pub reports: BTreeMap<DeviceId, Arc<DeviceReport>>,
    /// Devices to read again: new ones, and those that an operator changed.
    pub devices: BTreeSet<DeviceId>,
    /// Whether anything else changed: classes, blueprints, releases, rollouts.
    pub frame: bool,
    /// Whether everything is to be read again: what changed is not known.
    pub all: bool,
}

/// The fleet.
pub struct Fleet {
    frame: Frame,
    /// By id.
    devices: Vec<FleetDevice>,
    /// Their places on the board, in the same order.
    places: Vec<Arc<Place>>,
    layers: Layers,
    texts: Texts,
    /// What is stored of each rollout of the frame, in the same order.
    stored: Vec<Stored>,
    /// Devices that changed since the last decision.
    changed: BTreeSet<DeviceId>,
    /// Whether more than devices changed since.
    everything: bool,
    listening: Arc<Listening>,
}

/// A decision, to be persisted.
#[derive(Debug, Default)]
pub struct Decided {
    /// What changes.
    pub transition: Transition,
    /// When to decide again even if nothing is heard before.
    pub deadline: Option<Timestamp>,
}

/// Fingerprints of a rollout's rows.
#[derive(Default)]
struct Stored(HashMap<DeviceId, u64>);

impl Fleet {
    /// A fleet without devices; [`Fleet::refresh`] adds them.
    pub fn new(frame: Frame, listening: Arc<Listening>) -> Self {
        Self {
            layers: Layers::of(&frame.blueprints),
            texts: Texts::default(),
            stored: frame.rollouts.iter().map(Stored::of).collect(),
            frame,
            devices: Vec::new(),
            places: Vec::new(),
            changed: BTreeSet::new(),
            everything: true,
            listening,
        }
    }

    /// The revision of the store that it agrees with.
    pub fn revision(&self) -> i64 {
        self.frame.revision
    }

    /// Takes over what was read from the store anew. False if the whole fleet must be loaded again.
    #[must_use]
    pub fn reframe(&mut self, frame: Frame) -> bool {
        // Classes and blueprints say what each device is.
        if frame.classes != self.frame.classes || frame.blueprints != self.frame.blueprints {
            return false;
        }
        self.stored = frame.rollouts.iter().map(Stored::of).collect();
        self.frame = frame;
        self.everything = true;
        true
    }

    /// Takes over devices that were read from the store.
    pub fn refresh(&mut self, devices: Vec<StoredDevice>, board: &Board) {
        let mut new = Vec::new();
        for device in devices {
            let place = board.put(&device);
            let site = device.site.clone();
            let told = place.desired();
            let device = self.seen_by_decisions(device, told);
            place.belongs_to(Group { class: device.class.clone(), site });
            self.changed.insert(device.id.clone());
            match self.devices.binary_search_by(|known| known.id.cmp(&device.id)) {
                Ok(index) => self.devices[index] = device,
                Err(_) => new.push((device, place)),
            }
        }
        if new.len() <= FEW {
            for (device, place) in new {
                let found = self.devices.binary_search_by(|known| known.id.cmp(&device.id));
                let Err(index) = found else { continue };
                self.devices.insert(index, device);
                self.places.insert(index, place);
            }
            return;
        }
        let (devices, places): (Vec<_>, Vec<_>) = new.into_iter().unzip();
        self.devices.extend(devices);
        self.places.extend(places);
        self.sort();
    }

    /// Takes over a report. True if the device must be read from the store again: it is not known,
    /// or may be in another class now.
    #[must_use]
    pub fn hear(&mut self, id: &DeviceId, report: Arc<DeviceReport>) -> bool {
        let Ok(index) = self.devices.binary_search_by(|known| known.id.cmp(id)) else {
            return true;
        };
        let device = &mut self.devices[index];
        let before = device.report.as_ref();
        if before.is_some_and(|before| before.sequence >= report.sequence) {
            return false;
        }
        // Its class follows from this.
        let same_budget = device.budget_bytes == report.facts.memory_budget_bytes;
        let mut report = Arc::unwrap_or_clone(report);
        device.facts = Arc::new(std::mem::replace(&mut report.facts, no_facts()));
        device.report = Some(report);
        self.changed.insert(id.clone());
        !same_budget
    }

    fn sort(&mut self) {
        if self.devices.is_sorted_by(|a, b| a.id < b.id) {
            return;
        }
        let (devices, places) =
            (std::mem::take(&mut self.devices), std::mem::take(&mut self.places));
        let mut both: Vec<_> = devices.into_iter().zip(places).collect();
        both.sort_by(|a, b| a.0.id.cmp(&b.0.id));
        (self.devices, self.places) = both.into_iter().unzip();
    }

    /// `told` is what the board has for it: many devices share that.
    fn seen_by_decisions(&mut self, device: StoredDevice, told: Arc<DesiredState>) -> FleetDevice {
        let class = device.classify(&self.frame.classes).class;
        let labels = self.texts.share(&device.all_labels(&class));
        let mut seen = FleetDevice {
            config: Arc::new(as_it_is(&device)),
            id: device.id,
            name: device.name,
            labels,
            class,
            budget_bytes: device.facts.memory_budget_bytes,
            facts: Arc::new(device.facts),
            orders: device.orders,
            last_seen: device.last_seen,
            desired: if *told == device.desired { told } else { Arc::new(device.desired) },
            report: device.report.map(without_facts),
            revoked: device.revoked,
        };
        // Layers are checked when they are put; should they contradict each other all the same (a
        // device moved to another class), the device stays as it is until they are mended.
        if let Ok(config) = self.layers.config(&seen) {
            seen.config = config;
        }
        seen
    }

    /// Calls `ask` with the fleet as it is now.
    pub fn look<T>(
        &mut self,
        now: Timestamp,
        ask: impl FnOnce(&World<'_>, &[RolloutRecord]) -> T,
    ) -> T {
        self.catch_up();
        ask(&self.world(now), &self.frame.rollouts)
    }

    fn world(&self, now: Timestamp) -> World<'_> {
        World {
            now,
            listening_since: self.listening.since(Timestamp::now(), Instant::now()),
            devices: &self.devices,
            releases: &self.frame.releases,
            quarantine: &self.frame.quarantine,
            completed: &self.frame.completed,
        }
    }

    /// When devices were last heard of is on the board.
    fn catch_up(&mut self) {
        for (device, place) in self.devices.iter_mut().zip(&self.places) {
            device.last_seen = device.last_seen.max(place.last_seen());
        }
    }

    /// The hub's own decision. The fleet is then as if it were persisted; where it cannot be, the
    /// fleet must be loaded again.
    pub fn decide(&mut self, now: Timestamp) -> Decided {
        self.catch_up();
        let mut records = std::mem::take(&mut self.frame.rollouts);
        let changed = std::mem::take(&mut self.changed);
        let world = self.world(now);
        let moved = match self.everything {
            true => rollout::plan_in_place(&world, &mut records, Targets::new()),
            false => rollout::replan(&world, &mut records, &changed),
        };
        self.frame.rollouts = records;
        self.everything = false;
        self.take_over(moved, vec![], vec![])
    }

    /// Makes a rollout and starts its first wave. Nothing changes if it is under way already.
    ///
    /// # Errors
    /// What `fleet-core` refuses; nothing changed then.
    pub fn create(
        &mut self,
        now: Timestamp,
        id: RolloutId,
        asked: NewRollout,
        actor: &str,
    ) -> Result<Decided, StoreError> {
        self.catch_up();
        let details = serde_json::json!({
            "model": asked.model, "version": asked.version, "policy": asked.policy,
        });
        let audit = AuditDraft { action: "rollout.create", object: id.to_string(), details };
        let promoted = asked.promotion.as_ref().map(|promotion| AuditDraft {
            action: "release.promote",
            object: format!("{} {}", asked.model, asked.version),
            details: serde_json::json!({ "promotion": promotion, "rollout": id }),
        });
        let world = self.world(now);
        let created = rollout::create(id, asked, actor, &world, &self.frame.rollouts)?;
        let mut forced = Vec::new();
        let targets = created.targets;
        for record in created.superseded.into_iter().chain([created.record]) {
            forced.push(self.put(record));
        }
        let audit = promoted.into_iter().chain([audit]).collect();
        Ok(self.plan(now, targets, forced, audit))
    }

    /// The rollout that was asked for like this and is under way.
    pub fn under_way(&self, asked: &NewRollout) -> Option<&RolloutId> {
        let active = |record: &&RolloutRecord| {
            matches!(record.rollout.state, RolloutState::Running | RolloutState::Paused)
        };
        let mut found = self.frame.rollouts.iter().filter(active);
        found.find(|record| record.rollout.asked == *asked).map(|record| &record.rollout.id)
    }

    /// Whether a rollout is in memory: those that are not final are.
    pub fn has_rollout(&self, id: &RolloutId) -> bool {
        self.frame.rollouts.iter().any(|record| record.rollout.id == *id)
    }

    /// Carries out an operator's command.
    ///
    /// # Errors
    /// What `fleet-core` refuses; nothing changed then.
    pub fn command(
        &mut self,
        now: Timestamp,
        id: &RolloutId,
        command: Command,
        actor: &str,
    ) -> Result<Decided, StoreError> {
        self.catch_up();
        let found = self.frame.rollouts.iter().find(|record| record.rollout.id == *id);
        let record =
            found.ok_or_else(|| StoreError::NotFound { kind: "rollout", name: id.to_string() })?;
        let (changed, targets) = rollout::command(record, command, actor, &self.world(now))?;
        if changed == *record {
            return Ok(Decided::default());
        }
        let forced = vec![self.put(changed)];
        let audit = AuditDraft {
            action: match command {
                Command::Pause => "rollout.pause",
                Command::Resume => "rollout.resume",
                Command::Abort => "rollout.abort",
                Command::Approve { .. } => "rollout.approve",
                Command::Rollback => "rollout.rollback",
            },
            object: id.to_string(),
            details: match command {
                Command::Approve { wave } => serde_json::json!({ "wave": wave }),
                _ => serde_json::json!({}),
            },
        };
        Ok(self.plan(now, targets, forced, vec![audit]))
    }

    fn plan(
        &mut self,
        now: Timestamp,
        targets: Targets,
        forced: Vec<usize>,
        audit: Vec<AuditDraft>,
    ) -> Decided {
        let mut records = std::mem::take(&mut self.frame.rollouts);
        let moved = rollout::plan_in_place(&self.world(now), &mut records, targets);
        self.frame.rollouts = records;
        self.everything = true;
        self.take_over(moved, forced, audit)
    }

    /// Puts a rollout in the place of what is known of it, or at the end.
    fn put(&mut self, record: RolloutRecord) -> usize {
        let same = |known: &RolloutRecord| known.rollout.id == record.rollout.id;
        match self.frame.rollouts.iter().position(same) {
            Some(index) => {
                self.frame.rollouts[index] = record;
                index
            }
            None => {
                self.frame.rollouts.push(record);
                self.stored.push(Stored::default());
                self.stored.len() - 1
            }
        }
    }

    fn take_over(&mut self, moved: Moved, forced: Vec<usize>, audit: Vec<AuditDraft>) -> Decided {
        let Moved { changed, assignments, mut quarantined, deadline } = moved;
        let indexes: BTreeSet<usize> = changed.into_iter().chain(forced).collect();
        let mut rollouts = Vec::with_capacity(indexes.len());
        for index in indexes {
            let record = &mut self.frame.rollouts[index];
            record.rollout.recount();
            // It may be where newcomers find their model from now on, or no longer hold others.
            self.everything |= record.rollout.state != RolloutState::Running;
            rollouts.push(self.stored[index].change(record));
            let rollout = &record.rollout;
            self.frame.completed.retain(|known| known.id != rollout.id);
            if rollout.state == RolloutState::Completed {
                self.frame.completed.insert(0, CompletedRollout::from(rollout));
            }
        }
        let ended = |record: &RolloutRecord| record.rollout.state.is_final();
        while let Some(index) = self.frame.rollouts.iter().position(ended) {
            self.frame.rollouts.remove(index);
            self.stored.remove(index);
        }
        quarantined.retain(|pair| self.frame.quarantine.insert(pair.clone()));
        self.everything |= !quarantined.is_empty();
        for assignment in &assignments {
            let id = &assignment.device;
            let found = self.devices.binary_search_by(|known| known.id.cmp(id));
            let index = found.expect("a plan is about the devices it was given");
            self.devices[index].desired = Arc::clone(&assignment.desired);
            self.changed.insert(id.clone());
        }
        let transition =
            Transition { rollouts, assignments, quarantined, audit, ..Transition::default() };
        Decided { transition, deadline }
    }

    /// Notes that the last decision is persisted.
    pub fn persisted(&mut self, revision: i64) {
        self.frame.revision = revision;
    }

    /// Whether a blueprint layer would contradict others on some device.
    pub fn contradiction(&self, wanted: &StoredBlueprint) -> Option<Contradiction> {
        let mut blueprints = self.frame.blueprints.clone();
        blueprints.retain(|known| known.place != wanted.place);
        blueprints.push(wanted.clone());
        let mut layers = Layers::of(&blueprints);
        self.devices.iter().filter(|device| !device.revoked).find_map(|device| {
            let (what, hint) = match layers.config(device) {
                Err(error) => (error.to_string(), error.hint().to_owned()),
                Ok(config) => {
                    // What was in conflict before (a device changed its class) does not stand in
                    // the way.
                    let known = &device.config.conflicts;
                    let new = config.conflicts.iter().find(|conflict| !known.contains(conflict))?;
                    let hint = "take the key out of that layer, or add it to `overridable`";
                    (new.clone(), hint.to_owned())
                }
            };
            Some(Contradiction { device: device.name.clone(), what, hint })
        })
    }
}

/// Why a blueprint layer cannot be put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contradiction {
    /// The name of a device for which it does not hold.
    pub device: String,
    /// What does not.
    pub what: String,
    /// The next step.
    pub hint: String,
}

/// Facts are kept once, with the device: a hundred thousand copies are many megabytes.
fn without_facts(report: DeviceReport) -> DeviceReport {
    DeviceReport { facts: no_facts(), ..report }
}

fn no_facts() -> DeviceFacts {
    DeviceFacts {
        hostname: String::new(),
        arch: String::new(),
        kernel: String::new(),
        cpu: String::new(),
        cpu_features: Vec::new(),
        cores: 0,
        memory_bytes: 0,
        memory_budget_bytes: 0,
        disk_free_bytes: 0,
        agent_version: String::new(),
        engine: String::new(),
        endpoint: None,
        time_zone: None,
        metered: false,
        shares_at: None,
        obeys: Vec::new(),
    }
}

fn as_it_is(device: &StoredDevice) -> Resolved {
    Resolved {
        model: None,
        runtime: device.desired.runtime.clone(),
        context_set: true,
        confirm_timeout_s: device.desired.confirm_timeout_s,
        frozen: true,
        rules: device.desired.rules.clone(),
        channel: None,
        values: vec![],
        conflicts: vec![],
    }
}

/// Blueprint layers by place, and what they come to for each combination that devices have.
struct Layers {
    texts: BTreeMap<Layer, String>,
    resolved: HashMap<Vec<Layer>, Result<Arc<Resolved>, BlueprintError>>,
}

impl Layers {
    fn of(blueprints: &[StoredBlueprint]) -> Self {
        let texts = blueprints.iter().map(|b| (b.place.clone(), b.toml.clone())).collect();
        Self { texts, resolved: HashMap::new() }
    }

    fn config(&mut self, device: &FleetDevice) -> Result<Arc<Resolved>, BlueprintError> {
        let site = device.labels.get("site").and_then(|site| site.parse().ok());
        let mut places = vec![Layer::Fleet, Layer::Class(device.class.clone())];
        places.extend(site.map(Layer::Site));
        places.push(Layer::Device(device.id.clone()));
        places.retain(|place| self.texts.contains_key(place));
        if let Some(known) = self.resolved.get(&places) {
            return known.clone();
        }
        let texts = places.iter().map(|place| (place.clone(), self.texts[place].clone()));
        let resolved = resolve(&texts.collect::<Vec<_>>()).map(Arc::new);
        self.resolved.insert(places, resolved.clone());
        resolved
    }
}

impl Stored {
    fn of(record: &RolloutRecord) -> Self {
        let parts = record.rollout.devices.iter();
        Self(parts.map(|part| (part.device.clone(), fingerprint(part))).collect())
    }

    /// What of `record` is to be written, which is then taken for written.
    fn change(&mut self, record: &mut RolloutRecord) -> RolloutChange {
        let devices = std::mem::take(&mut record.rollout.devices);
        let before = std::mem::take(&mut record.before);
        let header = record.clone();
        (record.rollout.devices, record.before) = (devices, before);
        let mut parts = Vec::new();
        for (position, part) in (0..).zip(&record.rollout.devices) {
            let now = fingerprint(part);
            match self.0.get_mut(&part.device) {
                Some(known) if *known == now => continue,
                Some(known) => *known = now,
                None => {
                    self.0.insert(part.device.clone(), now);
                }
            }
            let before = record.before.get(&part.device).cloned();
            parts.push(RolloutPart { position, part: part.clone(), before });
        }
        let mut gone = Vec::new();
        if self.0.len() > record.rollout.devices.len() {
            let left: BTreeSet<&DeviceId> =
                record.rollout.devices.iter().map(|part| &part.device).collect();
            gone.extend(self.0.keys().filter(|id| !left.contains(id)).cloned());
            for id in &gone {
                self.0.remove(id);
            }
        }
        RolloutChange { header, parts, gone }
    }
}

/// A number that another part is very unlikely to have; what is told with it (what the device ran
/// before) never changes alone.
fn fingerprint(part: &RolloutDevice) -> u64 {
    let RolloutDevice {
        device: _,
        name,
        wave,
        variant,
        manifest,
        generation,
        started_at,
        held,
        due_at,
        finished_at,
        outcome,
        fit,
        unready,
    } = part;
    let mut hasher = DefaultHasher::new();
    (name, wave, variant, manifest, generation, started_at, finished_at, fit, unready)
        .hash(&mut hasher);
    (due_at, held.as_ref().map(std::mem::discriminant), std::mem::discriminant(outcome))
        .hash(&mut hasher);
    match outcome {
        slmops_api::rollout::Outcome::Failed { failure } => {
            format!("{failure:?}").hash(&mut hasher);
        }
        slmops_api::rollout::Outcome::NoFit { smallest_bytes, budget_bytes } => {
            (smallest_bytes, budget_bytes).hash(&mut hasher);
        }
        _ => {}
    }
    hasher.finish()
}
