//! What each device should be: by its rollout, or by the release that it already has.

use slmops_api::device::{DesiredModel, DesiredState};
use slmops_api::model::{NewRelease, Variant};
use slmops_api::rollout::RolloutState;
use slmops_api::runtime::RuntimeConfig;

use super::{Assignment, RolloutRecord, Target, TargetState, Targets};
use crate::fit::{self, Fit};
use crate::world::{CompletedRollout, FleetDevice, World};

/// The variant of `release` that fits `device`, and the runtime it would run with.
pub(crate) fn fit_device(device: &FleetDevice, release: &NewRelease) -> (Fit, RuntimeConfig) {
    let runtime = runtime_for(device, release);
    (fit::choose(&release.variants, device.budget_bytes, &runtime), runtime)
}

pub(crate) fn runtime_for(device: &FleetDevice, release: &NewRelease) -> RuntimeConfig {
    let trained = release.variants.first().map_or(0, |variant| variant.shape.trained_context);
    device.config.runtime_for(trained)
}

pub(crate) fn desired_model(
    release: &NewRelease,
    variant: &Variant,
    runtime: &RuntimeConfig,
) -> DesiredModel {
    DesiredModel {
        model: release.model.clone(),
        version: release.version.clone(),
        variant: variant.name.clone(),
        manifest: variant.manifest,
        weights: variant.weights,
        size_bytes: variant.size_bytes,
        predicted_memory_bytes: fit::predict_variant(variant, runtime).total_bytes,
    }
}

/// Whether a device that is told `told` has nothing new to hear. Texts and predictions alone are no
/// reason for a new generation.
pub(crate) fn same(
    told: &DesiredState,
    model: Option<&DesiredModel>,
    runtime: &RuntimeConfig,
) -> bool {
    told.model.as_ref().map(|m| m.manifest) == model.map(|m| m.manifest) && told.runtime == *runtime
}

pub(super) fn assign(
    world: &World<'_>,
    records: &[RolloutRecord],
    targets: &Targets,
) -> Vec<Assignment> {
    // A rollout that was just taken back is no longer a source for devices that join later.
    let still_completed = |rollout: &&CompletedRollout| {
        let gone = |record: &&RolloutRecord| {
            record.rollout.id == rollout.id && record.rollout.state != RolloutState::Completed
        };
        !records.iter().any(|record| gone(&record))
    };
    let completed: Vec<&CompletedRollout> =
        world.completed.iter().filter(still_completed).collect();
    let mut assignments = Vec::new();
    for device in world.devices.iter().filter(|device| !device.revoked) {
        let wanted = match targets.get(&device.id).map(|TargetState(target)| target) {
            Some(target) => targeted(world, device, target),
            None => sticky(world, device, &completed),
        };
        let changed =
            |wanted: &DesiredState| !same(&device.desired, wanted.model.as_ref(), &wanted.runtime);
        let mut desired = match wanted {
            Some(wanted) if changed(&wanted) || device.is_ahead() => wanted,
            // It must hear a generation that is newer than what it has seen.
            None if device.is_ahead() => device.desired.clone(),
            _ => continue,
        };
        desired.generation = device.next_generation();
        assignments.push(Assignment { device: device.id.clone(), desired });
    }
    assignments
}

fn targeted(world: &World<'_>, device: &FleetDevice, target: &Target) -> Option<DesiredState> {
    let (model, confirm_timeout_s, reason) = match target {
        Target::Model { model, confirm_timeout_s, reason } => {
            (Some(model.clone()), *confirm_timeout_s, reason.clone())
        }
        Target::Before { model, reason } => {
            (model.clone(), device.config.confirm_timeout_s, reason.clone())
        }
    };
    let release = model.as_ref().and_then(|model| world.release(&model.model, &model.version));
    let runtime = release
        .map_or_else(|| device.config.runtime.clone(), |release| runtime_for(device, release));
    Some(DesiredState { generation: 0, model, runtime, confirm_timeout_s, reason })
}

/// A device outside any change keeps its release, in the variant that fits it now; one without a
/// model, or whose blueprint names another model line, gets the newest completed release for it.
fn sticky(
    world: &World<'_>,
    device: &FleetDevice,
    completed: &[&CompletedRollout],
) -> Option<DesiredState> {
    let told = device.desired.model.as_ref();
    let asked = device.config.model.as_ref();
    let other_line = |told: &DesiredModel| asked.is_some_and(|asked| *asked != told.model);
    if told.is_none_or(other_line) && !device.config.frozen {
        let found = completed
            .iter()
            .filter(|rollout| asked.is_none_or(|asked| *asked == rollout.model))
            .filter(|rollout| rollout.selector.matches(&device.labels))
            .find_map(|rollout| newest(world, device, rollout));
        if found.is_some() {
            return found;
        }
    }
    let told = told?;
    let release = world.release(&told.model, &told.version)?;
    let (fit, runtime) = fit_device(device, release);
    let current = release.variants.iter().find(|variant| variant.manifest == told.manifest);
    let chosen = match fit {
        Fit::Fits { index, manifest, why, .. }
            if !device.config.frozen
                && manifest != told.manifest
                && !world.quarantined(device, &manifest) =>
        {
            Some((&release.variants[index], format!("release {}: {why}", told.version)))
        }
        Fit::Fits { why, .. } => {
            let within = |variant: &&Variant| {
                let needs = fit::predict_variant(variant, &runtime).total_bytes;
                needs <= device.budget_bytes
            };
            current
                .filter(within)
                .map(|variant| (variant, format!("release {}: {why}", told.version)))
        }
        // What it has may be too large by now, but nothing smaller exists: leave it alone.
        Fit::NoFit { .. } => None,
    };
    let (variant, reason) = chosen?;
    Some(DesiredState {
        generation: 0,
        model: Some(desired_model(release, variant, &runtime)),
        runtime,
        confirm_timeout_s: device.config.confirm_timeout_s,
        reason,
    })
}

fn newest(
    world: &World<'_>,
    device: &FleetDevice,
    rollout: &CompletedRollout,
) -> Option<DesiredState> {
    let release = world.release(&rollout.model, &rollout.version)?;
    let (fit, runtime) = fit_device(device, release);
    let Fit::Fits { index, manifest, why, .. } = fit else { return None };
    if world.quarantined(device, &manifest) {
        return None;
    }
    Some(DesiredState {
        generation: 0,
        model: Some(desired_model(release, &release.variants[index], &runtime)),
        runtime,
        confirm_timeout_s: device.config.confirm_timeout_s,
        reason: format!(
            "release {} is the newest one completed for it (rollout {}): {why}",
            rollout.version, rollout.id
        ),
    })
}
