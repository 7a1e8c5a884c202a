//! Rules that devices obey by themselves: an agent that does not know one would ignore it, so a
//! device with such an agent is not told.

use slmops_api::rollout::RolloutPolicy;
use slmops_api::rules::DeviceRules;
use slmops_api::window;

use super::{Hold, RolloutError, refuse};
use crate::world::FleetDevice;

/// The rule that this device's agent does not know.
pub(super) fn hold(rules: &DeviceRules, device: &FleetDevice) -> Option<Hold> {
    if rules.is_none() && device.config.rules.is_none() {
        return None;
    }
    let unknown = device.ignores(&rules.and(&device.config.rules));
    if unknown.is_empty() {
        return None;
    }
    let why = format!("a newer agent: theirs is not known to obey {}", unknown.join(", "));
    Some(Hold { why, until: None })
}

pub(super) fn validate(policy: &RolloutPolicy) -> Result<(), RolloutError> {
    let schedule = &policy.schedule;
    if let Some(zone) = &schedule.time_zone
        && window::time_zone(zone).is_none()
    {
        let zone: String = zone.chars().take(200).collect();
        return refuse(format!(
            "schedule.time_zone = \"{zone}\" is no time zone: write a name such as Europe/Berlin, or leave it out for each device's own"
        ));
    }
    if let (Some(start), Some(activate)) = (schedule.start_at, schedule.activate_at)
        && activate < start
    {
        return refuse("schedule.activate_at is before schedule.start_at");
    }
    Ok(())
}
