//! An operator's hand on a rollout.

use slmops_api::rollout::{Outcome, Rollout, RolloutDevice, RolloutState};

use super::create::is_selected;
use super::rules::approval;
use super::step::after;
use super::{RolloutError, RolloutRecord, Target, TargetState, Targets, decide, state_name};
use crate::words::{self, count, list};
use crate::world::World;

/// Names listed in one line of evidence, at most.
const NAMES_SHOWN: usize = 8;

/// What an operator can do with a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Hold it: no device is told, and those that were told begin nothing new.
    Pause,
    /// Go on: after a pause, or after a halt in spite of its failures.
    Resume,
    /// End it where it stands: devices on their way are told to be what they were before.
    Abort,
    /// Agree that a wave starts, from 1.
    Approve {
        /// The wave.
        wave: u32,
    },
    /// Take it back: its devices get a new generation that names what they ran before.
    Rollback,
}

impl Command {
    /// `paused`, `resumed`, …
    pub fn past(self) -> &'static str {
        match self {
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Abort => "aborted",
            Self::Approve { .. } => "approved",
            Self::Rollback => "rolled back",
        }
    }
}

/// Carries out a command. A command that was carried out before changes nothing. The result goes
/// through [`super::plan`], which tells the devices.
///
/// # Errors
/// [`RolloutError::State`] where the rollout's state does not allow it.
pub fn command(
    record: &RolloutRecord,
    command: Command,
    by: &str,
    world: &World<'_>,
) -> Result<(RolloutRecord, Targets), RolloutError> {
    let mut record = record.clone();
    let state = record.rollout.state;
    let refused = || RolloutError::State {
        id: record.rollout.id.clone(),
        state: state_name(state),
        wanted: command.past(),
    };
    let (next, repeated) = match (command, state) {
        (Command::Pause, RolloutState::Running) => (RolloutState::Paused, false),
        (Command::Pause, RolloutState::Paused) => (state, true),
        (Command::Resume, RolloutState::Paused | RolloutState::Halted) => {
            (RolloutState::Running, false)
        }
        (Command::Resume, RolloutState::Running) => (state, true),
        (Command::Abort, RolloutState::Aborted) => (state, true),
        (Command::Abort, _) if !state.is_final() => (RolloutState::Aborted, false),
        (Command::Approve { wave }, _) if !state.is_final() => {
            (state, !approval::approve(&mut record.rollout, wave, by, world.now)?)
        }
        (Command::Rollback, RolloutState::RolledBack) => (state, true),
        (Command::Rollback, _) => (RolloutState::RolledBack, false),
        _ => return Err(refused()),
    };
    if repeated {
        return Ok((record, Targets::new()));
    }
    let mut because = vec![format!("asked by {by}")];
    if command == Command::Resume && state == RolloutState::Halted {
        because.extend(forgive(&mut record));
    }
    let mut targets = Targets::new();
    match command {
        Command::Rollback => {
            let (told, pinned) = take_back(&record, world);
            targets = told;
            because.push(format!("{} told to go back", count(targets.len(), "device")));
            because.extend(pinned);
        }
        Command::Abort => {
            targets = recall(&mut record, world);
            if !targets.is_empty() {
                let devices = count(targets.len(), "device");
                because.push(format!("{devices} on the way told to keep what they had"));
            }
        }
        Command::Resume => {
            // Time stood still meanwhile.
            let due_at = after(world.now, record.rollout.asked.policy.confirm_timeout_s);
            let updating = |part: &&mut RolloutDevice| part.outcome == Outcome::Updating;
            for part in record.rollout.devices.iter_mut().filter(updating) {
                (part.held, part.due_at) = (None, due_at);
            }
        }
        Command::Pause | Command::Approve { .. } => {}
    }
    let rollout = &mut record.rollout;
    rollout.state = next;
    rollout.updated_at = world.now;
    if next.is_final() {
        rollout.waiting_for = String::new();
    }
    let what = match command {
        Command::Approve { wave } => format!("approved wave {wave}"),
        command => command.past().to_owned(),
    };
    decide(rollout, world.now, what, because);
    Ok((record, targets))
}

/// Devices on their way in a rollout that ends are told to be what they were before.
pub(super) fn recall(record: &mut RolloutRecord, world: &World<'_>) -> Targets {
    let mut targets = Targets::new();
    let Rollout { id, asked, devices, .. } = &mut record.rollout;
    for part in devices.iter_mut().filter(|part| part.outcome == Outcome::Updating) {
        // One that ran this before was told nothing new.
        let (Some(before), Some(device)) =
            (record.before.get(&part.device).cloned(), world.device(&part.device))
        else {
            continue;
        };
        let model = super::assign::way_back(world, device, before, part.manifest.as_ref());
        let reason =
            format!("rollout {id} of {} was aborted before this device confirmed", asked.version);
        let target = Target::Before { model, reason };
        targets.insert(part.device.clone(), TargetState(target));
        part.outcome = Outcome::Recalled;
        part.finished_at = Some(world.now);
    }
    targets
}

fn forgive(record: &mut RolloutRecord) -> Option<String> {
    let failed: Vec<_> = record
        .rollout
        .devices
        .iter()
        .filter(|device| matches!(device.outcome, Outcome::Failed { .. }))
        .filter(|device| !record.forgiven.contains(&device.device))
        .map(|device| (device.device.clone(), device.name.clone()))
        .collect();
    let names: Vec<&str> = failed.iter().map(|(_, name)| name.as_str()).collect();
    let line =
        (!names.is_empty()).then(|| format!("set aside: the failure of {}", names.join(", ")));
    record.forgiven.extend(failed.into_iter().map(|(id, _)| id));
    line
}

/// Devices that are told this rollout's release get what they had before; devices that joined after
/// it was completed and got it from there get nothing, so that [`super::plan`] looks further back.
/// Pinned ones keep it; the second part says which.
fn take_back(record: &RolloutRecord, world: &World<'_>) -> (Targets, Option<String>) {
    let Rollout { asked, id, .. } = &record.rollout;
    let mut targets = Targets::new();
    let mut pinned = Vec::new();
    for device in world.devices.iter().filter(|device| !device.revoked) {
        let told = device.desired.model.as_ref();
        let ours = told.is_some_and(|m| m.model == asked.model && m.version == asked.version);
        if !ours {
            continue;
        }
        if let Some(pin) = device.pin() {
            pinned.push(format!("{} ({})", device.name, words::pin(pin)));
            continue;
        }
        let before = match record.before.get(&device.id) {
            Some(before) => {
                let left = told.map(|told| &told.manifest);
                super::assign::way_back(world, device, before.clone(), left)
            }
            None if is_selected(device, asked)
                && !record.rollout.devices.iter().any(|d| d.device == device.id) =>
            {
                earlier_release(record, world, device)
            }
            None => continue,
        };
        let reason = match &before {
            Some(model) => format!(
                "rollout {id} of {} was taken back: {} {} again",
                asked.version, model.model, model.version
            ),
            None => format!("rollout {id} of {} was taken back; nothing ran before", asked.version),
        };
        let target = Target::Before { model: before, reason };
        targets.insert(device.id.clone(), TargetState(target));
    }
    let pinned =
        (!pinned.is_empty()).then(|| format!("not taken back: {}", list(&pinned, NAMES_SHOWN)));
    (targets, pinned)
}

fn earlier_release(
    record: &RolloutRecord,
    world: &World<'_>,
    device: &crate::world::FleetDevice,
) -> Option<slmops_api::device::DesiredModel> {
    let asked = &record.rollout.asked;
    let older = world.completed.iter().find(|rollout| {
        rollout.id != record.rollout.id
            && rollout.model == asked.model
            && rollout.version != asked.version
            && device.is_among(rollout)
    })?;
    let release = world.release(&older.model, &older.version)?;
    if crate::fit::unmet(release, &device.facts).is_some() {
        return None;
    }
    let (fit, runtime) = super::assign::fit_device(device, release);
    match fit {
        crate::fit::Fit::Fits { index, .. } => {
            Some(super::assign::desired_model(release, &release.variants[index], &runtime))
        }
        crate::fit::Fit::NoFit { .. } => None,
    }
}
