//! What time it is, as far as the device can be sure of it.
//!
//! A device may boot in 1970, or ten years ahead. What counts is the hub's word over the pinned
//! connection, and how long that is ago. After a restart without the hub the system clock counts if
//! it agreed with the hub when the two were last compared, and is not behind that moment: a clock
//! that was lost with the power stands in the past.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::durable::{self, Access};
use crate::tls::EARLIEST_NOW;

/// Seconds by which the system clock may differ from the hub's and still agree with it.
const AGREES_WITHIN_S: i64 = 120;
/// Seconds between two notes on the disk, at least, while they say the same.
const NOTE_EVERY_S: i64 = 3600;
const NOTE_FILE: &str = "clock.json";
const MAX_NOTE_BYTES: u64 = 1 << 10;

/// The device's clock. It is late at most, as long as the hub's is not wrong.
pub struct Clock {
    path: PathBuf,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// The hub's time as it last said it, and how long this machine had run then.
    heard: Option<(Timestamp, SignedDuration)>,
    note: Option<Note>,
}

/// What is kept over restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// The hub's time.
    heard: Timestamp,
    /// Whether the system clock said so too.
    agrees: bool,
}

impl Clock {
    /// The clock of the device whose folder is `root`.
    pub fn open(root: &Path) -> Self {
        let path = root.join(NOTE_FILE);
        let note = durable::read(&path, MAX_NOTE_BYTES).ok().flatten();
        let note = note.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Self { path, known: Mutex::new(Known { heard: None, note }) }
    }

    /// The hub said what time it is.
    pub fn hear(&self, hub_time: Timestamp) {
        self.hear_at(hub_time, Timestamp::now());
    }

    fn hear_at(&self, hub_time: Timestamp, system: Timestamp) {
        let off_s = system.duration_since(hub_time).as_secs().abs();
        let note = Note { heard: hub_time, agrees: off_s <= AGREES_WITHIN_S };
        let mut known = self.lock();
        known.heard = Some((hub_time, running()));
        let stale = known.note.is_none_or(|old| {
            let since_s = hub_time.duration_since(old.heard).as_secs();
            old.agrees != note.agrees || !(0..NOTE_EVERY_S).contains(&since_s)
        });
        if stale {
            known.note = Some(note);
            let bytes = serde_json::to_vec(&note).unwrap_or_default();
            if let Err(error) = durable::replace(&self.path, &bytes, Access::Public) {
                tracing::debug!("write {}: {error}", self.path.display());
            }
        }
    }

    /// The time, if the device can be sure that it is not earlier.
    pub fn sure(&self) -> Option<Timestamp> {
        self.sure_at(Timestamp::now())
    }

    fn sure_at(&self, system: Timestamp) -> Option<Timestamp> {
        let known = self.lock();
        if let Some((hub_time, then)) = known.heard {
            let since = running().checked_sub(then).unwrap_or_default();
            return hub_time.checked_add(since).ok();
        }
        let note = known.note?;
        (note.agrees && system >= note.heard).then_some(system)
    }

    /// The best guess at what time it is: never before this program was written.
    pub fn guess(&self) -> Timestamp {
        let earliest = i64::try_from(EARLIEST_NOW).expect("this century");
        let earliest = Timestamp::from_second(earliest).expect("this century");
        self.sure().unwrap_or_else(Timestamp::now).max(earliest)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long this machine has run, with the time that it slept.
fn running() -> SignedDuration {
    let time = clock_gettime(ClockId::Boottime);
    SignedDuration::new(time.tv_sec, i32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn the_hubs_word_counts_and_the_system_clock_only_if_it_agreed() {
        let folder = tempfile::tempdir().unwrap();
        let hub = at("2030-01-01T12:00:00Z");
        let (lost, right) = (at("1970-01-01T00:00:07Z"), at("2030-01-01T12:01:00Z"));
        let (ahead, later) = (at("2040-01-01T00:00:00Z"), at("2030-01-02T00:00:00Z"));

        let clock = Clock::open(folder.path());
        assert_eq!([clock.sure_at(lost), clock.sure_at(right)], [None, None]);
        // Whatever the system clock says, once the hub has spoken.
        clock.hear_at(hub, ahead);
        for system in [lost, ahead] {
            let sure = clock.sure_at(system).unwrap();
            assert!(sure >= hub && sure < right, "{sure}");
        }
        // It was wrong then, so it does not count after a restart.
        assert_eq!(Clock::open(folder.path()).sure_at(later), None);
        clock.hear_at(hub, right);
        let restarted = Clock::open(folder.path());
        assert_eq!(restarted.sure_at(later), Some(later));
        assert_eq!(restarted.sure_at(lost), None, "it lost its time with the power");
        std::fs::write(folder.path().join(NOTE_FILE), "torn").unwrap();
        assert_eq!(Clock::open(folder.path()).sure_at(later), None);
    }
}
