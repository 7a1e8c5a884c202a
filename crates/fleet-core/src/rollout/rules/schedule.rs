//! Scheduled start and freezes.

use jiff::Timestamp;
use slmops_api::rollout::{Freeze, Schedule};

use super::{Hold, RolloutError, refuse};
use crate::words::clock;

/// The most freezes of one policy.
const MAX_FREEZES: usize = 64;
/// The longest reason of a freeze, in bytes.
const MAX_REASON_BYTES: usize = 200;

/// Everything in the schedule that keeps devices from being told at `now`.
pub(super) fn hold(schedule: &Schedule, now: Timestamp) -> Vec<Hold> {
    let start = schedule.start_at.filter(|at| now < *at).map(|at| Hold {
        why: format!("its start at {} (schedule.start_at)", clock(at)),
        until: Some(at),
    });
    let frozen = |freeze: &&Freeze| freeze.from <= now && now < freeze.until;
    let freezes = schedule.freezes.iter().filter(frozen).map(|freeze| {
        let reason = match freeze.reason.as_str() {
            "" => String::new(),
            reason => format!(" ({reason})"),
        };
        Hold {
            why: format!("the end of a freeze{reason} at {}", clock(freeze.until)),
            until: Some(freeze.until),
        }
    });
    start.into_iter().chain(freezes).collect()
}

pub(super) fn validate(schedule: &Schedule) -> Result<(), RolloutError> {
    if schedule.freezes.len() > MAX_FREEZES {
        return refuse(format!("{} freezes are more than {MAX_FREEZES}", schedule.freezes.len()));
    }
    for freeze in &schedule.freezes {
        if freeze.from >= freeze.until {
            let (from, until) = (clock(freeze.from), clock(freeze.until));
            return refuse(format!("a freeze from {from} until {until} ends before it begins"));
        }
        if freeze.reason.len() > MAX_REASON_BYTES || freeze.reason.chars().any(char::is_control) {
            return refuse(format!(
                "a freeze's reason is one line of at most {MAX_REASON_BYTES} bytes"
            ));
        }
    }
    Ok(())
}
