//! Since when the hub has listened without a gap, by two clocks.
//!
//! Devices are late by the time of day, which jumps: a machine boots without a clock and is set
//! right later, sleeps, or is restored from a snapshot. What nobody could report in a gap is held
//! against nobody.

use std::sync::Mutex;
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};

/// The most by which the time of day may run away from the monotonic clock between two looks: more
/// than a clock is ever slewed, less than a device is ever given to confirm a model.
const MAX_DRIFT: SignedDuration = SignedDuration::from_secs(15);

/// When the hub began to listen. Looks at it must be frequent.
#[derive(Debug)]
pub struct Listening(Mutex<State>);

#[derive(Clone, Copy, Debug)]
struct State {
    since: Timestamp,
    looked: (Timestamp, Instant),
}

impl Listening {
    /// A hub that begins to listen now.
    pub fn begin(now: Timestamp, at: Instant) -> Self {
        Self(Mutex::new(State { since: now, looked: (now, at) }))
    }

    /// Since when it has listened, as it is `now` by the time of day and `at` by the monotonic clock.
    pub fn since(&self, now: Timestamp, at: Instant) -> Timestamp {
        let mut state = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (earlier, earlier_at) = state.looked;
        // Two threads may look in either order.
        let passed = SignedDuration::try_from(at.saturating_duration_since(earlier_at))
            .unwrap_or(SignedDuration::MAX);
        let jump = now.duration_since(earlier) - passed;
        if jump.abs() > MAX_DRIFT {
            tracing::warn!(
                from = %earlier, to = %now,
                "the time of day jumped; devices get their time to confirm anew"
            );
            state.since = now;
        }
        state.looked = (now, at.max(earlier_at));
        state.since
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_jump_of_the_clock_begins_anew() {
        let began = Timestamp::from_second(1_000_000).unwrap();
        let at = Instant::now();
        let listening = Listening::begin(began, at);
        let look = |wall_s: i64, monotonic_s: u64| {
            let now = began + SignedDuration::from_secs(wall_s);
            let since = listening.since(now, at + Duration::from_secs(monotonic_s));
            since.duration_since(began).as_secs()
        };
        // Both go on together, or nearly so.
        assert_eq!(look(30, 30), 0);
        assert_eq!(look(3_610, 3_600), 0);
        // Set ahead by an hour, then back by two; asleep for a day.
        assert_eq!(look(7_240, 3_630), 7_240);
        assert_eq!(look(7_270, 3_660), 7_240);
        assert_eq!(look(100, 3_690), 100);
        assert_eq!(look(86_500, 3_691), 86_500);
        assert_eq!(look(86_501, 3_692), 86_500);
    }
}
