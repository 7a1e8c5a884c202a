//! Who must agree before a wave starts.

use slmops_api::rollout::{Approval, ApprovalStep, Rollout};

use super::super::create::MAX_WAVES;
use super::{Hold, RolloutError, refuse};
use crate::words::list;

/// The most names in one step.
const MAX_APPROVERS: usize = 32;

/// Whether this wave, from 1, is approved as far as it must be.
fn missing(rollout: &Rollout, wave: u32) -> Option<&ApprovalStep> {
    let given = |approval: &Approval| approval.wave == wave;
    let step = rollout.asked.policy.approvals.iter().find(|step| step.wave == wave)?;
    (!rollout.approvals.iter().any(given)).then_some(step)
}

/// Whose approval this wave, from 1, still needs, in words.
pub(in super::super) fn wanted(rollout: &Rollout, wave: u32) -> Option<String> {
    let step = missing(rollout, wave)?;
    let who = match step.by.is_empty() {
        true => format!("anybody but {}", rollout.created_by),
        false => list(&step.by, MAX_APPROVERS),
    };
    Some(format!("approval by {who}"))
}

/// The approval that the current wave waits for.
pub(super) fn hold(rollout: &Rollout) -> Option<Hold> {
    let wave = rollout.current_wave + 1;
    let wanted = wanted(rollout, wave)?;
    let why = format!("{wanted}: `slm rollout approve {} --wave {wave}`", rollout.id);
    Some(Hold { why, until: None })
}

/// Gives an approval, which may come before the wave does. Whether it was new.
pub(in super::super) fn approve(
    rollout: &mut Rollout,
    wave: u32,
    by: &str,
    at: jiff::Timestamp,
) -> Result<bool, RolloutError> {
    let refused = |why: String| RolloutError::Approval { id: rollout.id.clone(), why };
    let Some(step) = rollout.asked.policy.approvals.iter().find(|step| step.wave == wave) else {
        return Err(refused(format!("wave {wave} needs no approval")));
    };
    if missing(rollout, wave).is_none() {
        return Ok(false);
    }
    let named = |name: &String| by.strip_prefix("token ") == Some(name.as_str());
    if step.by.is_empty() && by == rollout.created_by {
        let why = format!("{by} created it, so somebody else must approve wave {wave}");
        return Err(refused(why));
    }
    if !step.by.is_empty() && !step.by.iter().any(named) {
        let who = list(&step.by, MAX_APPROVERS);
        return Err(refused(format!("wave {wave} is approved by {who}, and not by {by}")));
    }
    rollout.approvals.push(Approval { wave, by: by.to_owned(), at });
    Ok(true)
}

pub(super) fn validate(steps: &[ApprovalStep]) -> Result<(), RolloutError> {
    for (index, step) in steps.iter().enumerate() {
        let ApprovalStep { wave, by } = step;
        if *wave == 0 || *wave as usize > MAX_WAVES {
            return refuse(format!("an approval before wave {wave}: waves are 1 to {MAX_WAVES}"));
        }
        if steps[..index].iter().any(|other| other.wave == *wave) {
            return refuse(format!("two approvals before wave {wave}: name all approvers in one"));
        }
        let good =
            |name: &String| (1..=100).contains(&name.len()) && !name.chars().any(char::is_control);
        if by.len() > MAX_APPROVERS || !by.iter().all(good) {
            return refuse(format!(
                "the approval before wave {wave}: at most {MAX_APPROVERS} names of tokens"
            ));
        }
    }
    Ok(())
}
