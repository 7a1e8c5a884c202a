//! Change notices: for pages that follow along, and for devices that wait for their desired state.
//! Everything here is in memory and can be rebuilt from the store.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use slmops_api::DeviceId;
use slmops_api::device::DesiredState;
use tokio::sync::{broadcast, watch};

use crate::store::{StoredDevice, Transition};
use crate::telemetry::Group;

/// Notices kept for a page that reads slowly; one that falls further behind is told to reload.
const MAX_PENDING_NOTICES: usize = 1024;

/// Desired states that are looked at for one that is the same.
const MAX_SHARED: usize = 64;

/// Something changed; whoever shows it reads it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Change {
    /// `device`, `rollout`, `release`, `class`, `blueprint`, `invitation`, `token`, `key`,
    /// `quarantine`, `channel` or `webhook`.
    pub kind: &'static str,
    /// Which one.
    pub id: String,
}

/// Where changes are announced. Clones share it.
#[derive(Clone, Debug)]
pub struct Events {
    sender: broadcast::Sender<Change>,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::Sender::new(MAX_PENDING_NOTICES) }
    }
}

impl Events {
    /// Announces a change. Nobody listening is no error.
    pub fn announce(&self, kind: &'static str, id: impl ToString) {
        // An error only says that nobody listens.
        let _ = self.sender.send(Change { kind, id: id.to_string() });
    }

    /// Everything announced from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Change> {
        self.sender.subscribe()
    }
}

/// What devices' calls are answered from without asking the store: each device's desired state, its
/// key, whether it is shut out, and when it was last heard of. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Board {
    places: Arc<RwLock<HashMap<DeviceId, Arc<Place>>>>,
    /// Desired states that many devices share word for word, the latest ones.
    shared: Arc<Mutex<VecDeque<Arc<DesiredState>>>>,
}

/// A device's place on the board. It never moves, so whoever holds it needs the board no more.
#[derive(Debug)]
pub struct Place {
    desired: watch::Sender<Arc<DesiredState>>,
    /// SPKI PEM; absent until the device's enrolment has come here.
    public_key: OnceLock<Box<str>>,
    revoked: AtomicBool,
    /// Milliseconds since the epoch.
    last_seen_ms: AtomicI64,
    /// The same, as far as it was handed out for writing.
    written_ms: AtomicI64,
    /// Absent until the planner has seen the device.
    group: Mutex<Option<Group>>,
}

impl Place {
    fn new(desired: Arc<DesiredState>) -> Self {
        Self {
            desired: watch::Sender::new(desired),
            public_key: OnceLock::new(),
            revoked: AtomicBool::new(false),
            last_seen_ms: AtomicI64::new(0),
            written_ms: AtomicI64::new(0),
            group: Mutex::new(None),
        }
    }

    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        Self::new(Arc::new(DesiredState {
            generation: 1,
            model: None,
            runtime: Default::default(),
            rules: Default::default(),
            confirm_timeout_s: 60,
            reason: String::new(),
        }))
    }

    /// A view of the device's desired state that follows its changes.
    pub fn watch(&self) -> watch::Receiver<Arc<DesiredState>> {
        self.desired.subscribe()
    }

    /// What the device should be.
    pub fn desired(&self) -> Arc<DesiredState> {
        Arc::clone(&self.desired.borrow())
    }

    /// Its public key, SPKI PEM.
    pub fn public_key(&self) -> Option<&str> {
        self.public_key.get().map(AsRef::as_ref)
    }

    /// Whether it is enrolled and not shut out.
    pub fn is_active(&self) -> bool {
        !self.revoked.load(Ordering::Acquire)
    }

    /// Whose counts its own are added to, if that is known yet.
    pub fn group(&self) -> Option<Group> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says whose counts its own are added to.
    pub fn belongs_to(&self, group: Group) {
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = Some(group);
    }

    /// Notes that the device was heard of.
    pub fn seen(&self, at: Timestamp) {
        self.last_seen_ms.fetch_max(at.as_millisecond(), Ordering::Relaxed);
    }

    /// When the device was last heard of, to the millisecond.
    pub fn last_seen(&self) -> Timestamp {
        let milliseconds = self.last_seen_ms.load(Ordering::Relaxed);
        Timestamp::from_millisecond(milliseconds).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

impl Board {
    /// A board with these devices.
    pub fn new<'a>(devices: impl IntoIterator<Item = &'a StoredDevice>) -> Self {
        let board = Self::default();
        for device in devices {
            board.put(device);
        }
        board
    }

    /// A device's place with this desired state, if it has none that is newer.
    fn tell(
        &self,
        device: &DeviceId,
        desired: &DesiredState,
        own: impl FnOnce() -> Arc<DesiredState>,
    ) -> Arc<Place> {
        if let Some(place) = self.place(device) {
            let newer = |known: &Arc<DesiredState>| desired.generation > known.generation;
            if newer(&place.desired.borrow()) {
                let desired = self.share(desired, own);
                // Transitions may arrive here in another order than they were committed.
                place.desired.send_if_modified(|known| {
                    let newer = desired.generation > known.generation;
                    if newer {
                        *known = desired;
                    }
                    newer
                });
            }
            return place;
        }
        let desired = self.share(desired, own);
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let place = places.entry(device.clone()).or_insert_with(|| Arc::new(Place::new(desired)));
        Arc::clone(place)
    }

    /// A large fleet is told few different things: each of them is kept once.
    fn share(
        &self,
        desired: &DesiredState,
        own: impl FnOnce() -> Arc<DesiredState>,
    ) -> Arc<DesiredState> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = shared.iter().find(|known| ***known == *desired) {
            return Arc::clone(known);
        }
        let new = own();
        shared.truncate(MAX_SHARED - 1);
        shared.push_front(Arc::clone(&new));
        new
    }

    /// Adds a device, or takes over its state if it is newer than what is here. Returns its place.
    pub fn put(&self, device: &StoredDevice) -> Arc<Place> {
        let place = self.tell(&device.id, &device.desired, || Arc::new(device.desired.clone()));
        place.public_key.get_or_init(|| device.public_key.as_str().into());
        place.revoked.fetch_or(device.revoked, Ordering::AcqRel);
        place.seen(device.last_seen);
        place.written_ms.fetch_max(device.last_seen.as_millisecond(), Ordering::Relaxed);
        place
    }

    /// Takes over what a transition assigned, and wakes the devices that wait for it.
    pub fn apply(&self, transition: &Transition) {
        for assignment in &transition.assignments {
            // A device that joins right now may be assigned something before its own request gets
            // here; what shuts devices out also keeps them from being assigned anything.
            let desired = &assignment.desired;
            self.tell(&assignment.device, desired, || Arc::clone(desired));
        }
    }

    /// The device's place, if it is enrolled.
    pub fn place(&self, device: &DeviceId) -> Option<Arc<Place>> {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        places.get(device).cloned()
    }

    /// When the device was last heard of, if the board knows better than the store.
    pub fn last_seen(&self, device: &DeviceId) -> Option<Timestamp> {
        self.place(device).map(|place| place.last_seen())
    }

    /// Devices that were heard of at least `resolution` after what was last returned of them here,
    /// for writing.
    pub fn take_seen(&self, resolution: Duration) -> Vec<(DeviceId, Timestamp)> {
        let resolution_ms = i64::try_from(resolution.as_millis()).unwrap_or(i64::MAX);
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = Vec::new();
        for (id, place) in places.iter() {
            let seen = place.last_seen();
            let since_ms = seen.as_millisecond() - place.written_ms.load(Ordering::Relaxed);
            if since_ms > 0 && since_ms >= resolution_ms {
                place.written_ms.store(seen.as_millisecond(), Ordering::Relaxed);
                found.push((id.clone(), seen));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use slmops_fleet_core::rollout::Assignment;

    use super::*;

    fn desired(generation: u64) -> DesiredState {
        DesiredState {
            generation,
            model: None,
            runtime: Default::default(),
            confirm_timeout_s: 60,
            reason: String::new(),
            rules: Default::default(),
        }
    }

    fn assigned(generation: u64) -> Transition {
        let device = "d1".parse().unwrap();
        let desired = desired(generation);
        let assignments = vec![Assignment { device, desired: Arc::new(desired) }];
        Transition { assignments, ..Transition::default() }
    }

    #[test]
    fn newest_generation_stays_whatever_comes_last() {
        let board = Board::default();
        // Assigned before the request that enrols it gets to the board.
        board.apply(&assigned(3));
        board.apply(&assigned(2));
        let device = "d1".parse().unwrap();
        let place = board.place(&device).unwrap();
        assert_eq!(place.desired().generation, 3);
        assert!(place.is_active());
        assert!(board.place(&"d2".parse().unwrap()).is_none());
    }

    #[test]
    fn seen_is_written_once() {
        let board = Board::default();
        board.apply(&assigned(1));
        let device = "d1".parse().unwrap();
        let at = |second: i64| Timestamp::from_second(1_800_000_000 + second).unwrap();
        let place = board.place(&device).unwrap();
        place.seen(at(10));
        place.seen(at(5));
        let minute = Duration::from_secs(60);
        assert_eq!(board.take_seen(minute), [(device.clone(), at(10))]);
        assert_eq!(board.take_seen(Duration::ZERO), []);
        place.seen(at(69));
        assert_eq!(board.take_seen(minute), []);
        assert_eq!(board.take_seen(Duration::ZERO), [(device.clone(), at(69))]);
        assert_eq!(board.last_seen(&device), Some(at(69)));
    }
}
