//! Change notices: for pages that follow along, and for devices that wait for their desired state.
//! Everything here is in memory and can be rebuilt from the store.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use jiff::Timestamp;
use serde::Serialize;
use slmops_api::DeviceId;
use slmops_api::device::DesiredState;
use tokio::sync::{broadcast, watch};

use crate::store::{StoredDevice, Transition};

/// Notices kept for a page that reads slowly; one that falls further behind is told to reload.
const MAX_PENDING_NOTICES: usize = 1024;

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

/// What polls are answered from without asking the store: each device's desired state, whether it
/// is shut out, and when it was last heard of. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Board {
    places: Arc<RwLock<HashMap<DeviceId, Place>>>,
}

#[derive(Debug)]
struct Place {
    desired: watch::Sender<Arc<DesiredState>>,
    revoked: bool,
    last_seen: Timestamp,
    written: Timestamp,
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

    /// Adds a device, or takes over its state if it is newer than what is here.
    pub fn put(&self, device: &StoredDevice) {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let place = places.entry(device.id.clone()).or_insert_with(|| Place {
            desired: watch::Sender::new(Arc::new(device.desired.clone())),
            revoked: device.revoked,
            last_seen: device.last_seen,
            written: device.last_seen,
        });
        place.revoked |= device.revoked;
        place.last_seen = place.last_seen.max(device.last_seen);
        advance(&place.desired, &device.desired);
    }

    /// Takes over what a transition assigned, and wakes the devices that wait for it.
    pub fn apply(&self, transition: &Transition) {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        for assignment in &transition.assignments {
            // A device that joins right now may be assigned something before its own request gets
            // here; what shuts devices out also keeps them from being assigned anything.
            let place = places.entry(assignment.device.clone()).or_insert_with(|| Place {
                desired: watch::Sender::new(Arc::new(assignment.desired.clone())),
                revoked: false,
                last_seen: Timestamp::UNIX_EPOCH,
                written: Timestamp::UNIX_EPOCH,
            });
            advance(&place.desired, &assignment.desired);
        }
    }

    /// Whether it has the device.
    pub fn knows(&self, device: &DeviceId) -> bool {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        places.contains_key(device)
    }

    /// Whether the device is enrolled and not shut out.
    pub fn is_active(&self, device: &DeviceId) -> bool {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        places.get(device).is_some_and(|place| !place.revoked)
    }

    /// A view of the device's desired state that follows its changes.
    pub fn watch(&self, device: &DeviceId) -> Option<watch::Receiver<Arc<DesiredState>>> {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        places.get(device).map(|place| place.desired.subscribe())
    }

    /// Notes that the device was heard of.
    pub fn seen(&self, device: &DeviceId, at: Timestamp) {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = places.get_mut(device) {
            place.last_seen = place.last_seen.max(at);
        }
    }

    /// When the device was last heard of, if the board knows better than the store.
    pub fn last_seen(&self, device: &DeviceId) -> Option<Timestamp> {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        places.get(device).map(|place| place.last_seen)
    }

    /// Devices heard of since they were last returned from here, for writing.
    pub fn take_seen(&self) -> Vec<(DeviceId, Timestamp)> {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let mut found = Vec::new();
        for (id, place) in places.iter_mut().filter(|(_, place)| place.last_seen > place.written) {
            place.written = place.last_seen;
            found.push((id.clone(), place.last_seen));
        }
        found
    }
}

/// Transitions may arrive here in another order than they were committed: the newest one stays.
fn advance(sender: &watch::Sender<Arc<DesiredState>>, desired: &DesiredState) {
    sender.send_if_modified(|known| {
        let newer = desired.generation > known.generation;
        if newer {
            *known = Arc::new(desired.clone());
        }
        newer
    });
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
        Transition { assignments: vec![Assignment { device, desired }], ..Transition::default() }
    }

    #[test]
    fn newest_generation_stays_whatever_comes_last() {
        let board = Board::default();
        // Assigned before the request that enrols it gets to the board.
        board.apply(&assigned(3));
        board.apply(&assigned(2));
        let device = "d1".parse().unwrap();
        let watch = board.watch(&device).unwrap();
        assert_eq!(watch.borrow().generation, 3);
        assert!(board.is_active(&device));
        assert!(board.watch(&"d2".parse().unwrap()).is_none());
    }

    #[test]
    fn seen_is_written_once() {
        let board = Board::default();
        board.apply(&assigned(1));
        let device = "d1".parse().unwrap();
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        board.seen(&device, now);
        assert_eq!(board.take_seen(), [(device.clone(), now)]);
        assert_eq!(board.take_seen(), []);
        assert_eq!(board.last_seen(&device), Some(now));
    }
}
