//! What each device should be: by its rollout, or by the release that it already has.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use slmops_api::device::{DesiredModel, DesiredState};
use slmops_api::model::{NewRelease, Variant};
use slmops_api::orders::Pin;
use slmops_api::rollout::{Limits, Outcome, Rollout, RolloutPolicy, RolloutState, Schedule};
use slmops_api::rules::{DeviceRules, Hours};
use slmops_api::runtime::RuntimeConfig;
use slmops_api::{DeviceId, ModelName};
use slmops_artifact::Digest;

use super::{Assignment, Look, RolloutError, RolloutRecord, Target, TargetState, Targets};
use crate::fit::{self, Fit, unmet};
use crate::room::{Room, room_on};
use crate::words;
use crate::world::{CompletedRollout, FleetDevice, World};

/// Desired states of one decision that are looked at for one that is the same.
const MAX_SHARED: usize = 16;

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

/// What a device goes back to from `left` (or will, when it is told something new now): what it was
/// told before, unless that failed on this very device, or is quarantined and never ran here; then
/// what it says that it runs, or ran before that.
pub(super) fn way_back(
    world: &World<'_>,
    device: &FleetDevice,
    told: Option<DesiredModel>,
    left: Option<&Digest>,
) -> Option<DesiredModel> {
    let report = device.report.as_ref();
    let installed = report.map(|report| [report.running.as_ref(), report.previous.as_ref()]);
    let installed: Vec<_> = installed.into_iter().flatten().flatten().collect();
    let unfit = told.as_ref().is_some_and(|told| {
        let ran = installed.iter().any(|installed| installed.manifest == told.manifest);
        device.rejected(&told.manifest) || (!ran && world.quarantined(device, &told.manifest))
    });
    if !unfit {
        return told;
    }
    let found = installed.into_iter().find_map(|installed| {
        if device.rejected(&installed.manifest) || Some(&installed.manifest) == left {
            return None;
        }
        let release = world.release(&installed.model, &installed.version)?;
        let mut variants = release.variants.iter();
        let variant = variants.find(|variant| variant.manifest == installed.manifest)?;
        Some(desired_model(release, variant, &runtime_for(device, release)))
    });
    // Asked again when it comes to going back: the device may have reported by then.
    found.or(told.filter(|_| left.is_none()))
}

pub(super) fn assign(
    world: &World<'_>,
    records: &[RolloutRecord],
    targets: &Targets,
    look: Look<'_>,
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
    let under_way = under_way(records, targets, look);
    let devices: Vec<&FleetDevice> = match look {
        Look::Everything => world.devices.iter().collect(),
        Look::At(changed) => {
            let ids = changed.iter().chain(targets.keys()).chain(under_way.keys().copied());
            let ids: BTreeSet<&DeviceId> = ids.collect();
            ids.into_iter().filter_map(|id| world.device(id)).collect()
        }
    };
    let mut assignments = Vec::new();
    let mut shared: VecDeque<Arc<DesiredState>> = VecDeque::with_capacity(MAX_SHARED);
    for device in devices.into_iter().filter(|device| !device.revoked) {
        let record = under_way.get(&device.id).copied();
        let target = targets.get(&device.id).map(|TargetState(target)| target);
        // Nothing holds up what was there before.
        let going_back = matches!(target, Some(Target::Before { .. }));
        let wanted = match target {
            Some(target) => targeted(world, device, target),
            None if has_what_fits(world, device) => None,
            None => sticky(world, device, &completed),
        };
        let changed =
            |wanted: &DesiredState| !same(&device.desired, wanted.model.as_ref(), &wanted.runtime);
        let mut desired = match (wanted, record) {
            (Some(wanted), _) if changed(&wanted) || device.is_ahead() => wanted,
            // What it is told stays, under other rules.
            (_, Some(record)) if rules(device, record) != device.desired.rules => {
                let reason = rules_reason(&record.rollout);
                DesiredState { reason, ..DesiredState::clone(&device.desired) }
            }
            // It must hear a generation that is newer than what it has seen.
            (None, _) if device.is_ahead() => DesiredState::clone(&device.desired),
            _ => continue,
        };
        if let Some(record) = record {
            desired.rules = rules(device, record);
        } else if going_back {
            desired.rules = device.config.rules.permissions();
        } else {
            obey_blueprint(device, &mut desired);
        }
        if let Some(model) = desired.model.as_ref().filter(|_| desired.rules.replace)
            && room_on(device, world, model.weights, model.size_bytes, true) == Room::Replaces
        {
            desired.reason += "; ";
            desired.reason += &Room::Replaces.words().unwrap_or_default();
        }
        desired.generation = device.next_generation();
        let desired = share(&mut shared, desired);
        assignments.push(Assignment { device: device.id.clone(), desired });
    }
    assignments
}

/// A large fleet is told few different things: each of them is kept once.
fn share(shared: &mut VecDeque<Arc<DesiredState>>, desired: DesiredState) -> Arc<DesiredState> {
    if let Some(known) = shared.iter().find(|known| ***known == desired) {
        return Arc::clone(known);
    }
    let new = Arc::new(desired);
    shared.truncate(MAX_SHARED - 1);
    shared.push_front(Arc::clone(&new));
    new
}

/// The rollout of each device that is on its way, of those that are looked at. A rollout that does
/// not run is about all of its devices: they are held.
fn under_way<'r>(
    records: &'r [RolloutRecord],
    targets: &Targets,
    look: Look<'_>,
) -> BTreeMap<&'r DeviceId, &'r RolloutRecord> {
    let mut under_way = BTreeMap::new();
    for record in records.iter().filter(|record| !record.rollout.state.is_final()) {
        let runs = record.rollout.state == RolloutState::Running;
        let asked = |id: &DeviceId| !runs || look.is_at(id) || targets.contains_key(id);
        for part in &record.rollout.devices {
            if part.outcome == Outcome::Updating && asked(&part.device) {
                under_way.insert(&part.device, record);
            }
        }
    }
    under_way
}

/// What a device on its way in a rollout must obey. One whose agent knows no `hold` goes on.
fn rules(device: &FleetDevice, record: &RolloutRecord) -> DeviceRules {
    let runs = record.rollout.state == RolloutState::Running;
    let hold = !runs && device.obeys(DeviceRules::HOLD);
    let policy = &record.rollout.asked.policy;
    let mut rules = policy_rules(policy).and(&device.config.rules);
    if device.labels.get("site").is_some() {
        rules = rules.and(&site_rules(&policy.limits));
    }
    DeviceRules { hold, ..rules }
}

/// What a rollout's policy asks of its devices.
pub(super) fn policy_rules(policy: &RolloutPolicy) -> DeviceRules {
    let Schedule { activate_at, activate_in, download_in, time_zone, .. } = &policy.schedule;
    DeviceRules {
        hold: false,
        activate_at: *activate_at,
        activate_in: Hours::of(activate_in, time_zone.as_ref()).into_iter().collect(),
        download_in: Hours::of(download_in, time_zone.as_ref()).into_iter().collect(),
        metered: policy.limits.metered,
        max_rate_bytes_per_s: policy.limits.device_bytes_per_s,
        share_bytes_per_s: None,
        replace: false,
    }
}

/// What the limits ask of a device of a site, besides: its share of what the site may fetch.
pub(super) fn site_rules(limits: &Limits) -> DeviceRules {
    let share = |bytes: u64| bytes / u64::from(limits.site_downloads.unwrap_or(1).max(1));
    DeviceRules {
        max_rate_bytes_per_s: limits.site_bytes_per_s.map(share),
        ..DeviceRules::default()
    }
}

/// Gives a device outside of rollouts the rules of its blueprint. What its agent does not know it
/// would ignore in silence: then that is said.
fn obey_blueprint(device: &FleetDevice, desired: &mut DesiredState) {
    desired.rules = device.config.rules.clone();
    let unknown = device.ignores(&desired.rules);
    if !unknown.is_empty() {
        desired.reason += &format!("; its agent is too old to obey {}", unknown.join(", "));
    }
}

fn rules_reason(rollout: &Rollout) -> String {
    let (version, id) = (&rollout.asked.version, &rollout.id);
    match rollout.state {
        RolloutState::Running => format!("release {version} by rollout {id}, which goes on"),
        state => {
            let state = super::state_name(state);
            format!("release {version} by rollout {id}, which is {state}: nothing new begins")
        }
    }
}

/// Whether [`sticky`] has nothing new to say, found out without its words: nearly always.
fn has_what_fits(world: &World<'_>, device: &FleetDevice) -> bool {
    let Some(told) = &device.desired.model else { return false };
    if device.pin().is_some_and(|pin| !pin.names(&told.model, &told.version)) {
        return false;
    }
    let other_line = device.config.model.as_ref().is_some_and(|asked| *asked != told.model);
    if device.is_ahead() || (other_line && !device.config.frozen) {
        return false;
    }
    let Some(release) = world.release(&told.model, &told.version) else { return false };
    let runtime = runtime_for(device, release);
    let best = fit::best(&release.variants, device.budget_bytes, &runtime);
    runtime == device.desired.runtime
        && best.is_ok_and(|(index, _)| release.variants[index].manifest == told.manifest)
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
    let rules = DeviceRules::default();
    Some(DesiredState { generation: 0, model, runtime, confirm_timeout_s, reason, rules })
}

/// A device outside any change keeps its release, in the variant that fits it now; one without a
/// model, or whose blueprint names another model line, gets the newest completed release for it. A
/// pin wins over both, as far as the pinned release can be given to the device at all.
fn sticky(
    world: &World<'_>,
    device: &FleetDevice,
    completed: &[&CompletedRollout],
) -> Option<DesiredState> {
    if let Some(found) = device.pin().and_then(|pin| pinned(world, device, pin)) {
        return Some(found);
    }
    let told = device.desired.model.as_ref();
    let stays = device.config.frozen || device.pin().is_some() || device.exclusion().is_some();
    let asked = device.config.model.as_ref();
    let other_line = |told: &DesiredModel| asked.is_some_and(|asked| *asked != told.model);
    if told.is_none_or(other_line) && !stays {
        let found = completed
            .iter()
            .filter(|rollout| asked.is_none_or(|asked| *asked == rollout.model))
            .filter(|rollout| device.is_among(rollout))
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
            if !stays && manifest != told.manifest && !world.quarantined(device, &manifest) =>
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
        rules: DeviceRules::default(),
    })
}

/// The pinned release, unless nothing of it fits or it failed here: then the device keeps what it has.
fn pinned(world: &World<'_>, device: &FleetDevice, pin: &Pin) -> Option<DesiredState> {
    let release = world.release(&pin.model, &pin.version)?;
    if unmet(release, &device.facts).is_some() {
        return None;
    }
    let (fit, runtime) = fit_device(device, release);
    let Fit::Fits { index, manifest, why, .. } = fit else { return None };
    let told = device.desired.model.as_ref().is_some_and(|told| told.manifest == manifest);
    if !told && world.quarantined(device, &manifest) {
        return None;
    }
    Some(DesiredState {
        generation: 0,
        model: Some(desired_model(release, &release.variants[index], &runtime)),
        runtime,
        confirm_timeout_s: device.config.confirm_timeout_s,
        reason: format!("{}; {why}", words::pin(pin)),
        rules: DeviceRules::default(),
    })
}

/// Whether a device can be pinned to a release: it is registered, a variant of it fits, and that did
/// not fail here before.
///
/// # Errors
/// [`RolloutError::NoRelease`] or [`RolloutError::Pin`].
pub fn check_pin(
    world: &World<'_>,
    device: &FleetDevice,
    model: &ModelName,
    version: &semver::Version,
) -> Result<(), RolloutError> {
    let title = format!("{model} {version}");
    let release = world.release(model, version);
    let release = release.ok_or_else(|| RolloutError::NoRelease(title.clone()))?;
    let refused = |why: String, hint: String| RolloutError::Pin {
        device: device.name.clone(),
        release: title.clone(),
        why,
        hint,
    };
    if let Some(why) = unmet(release, &device.facts) {
        return Err(refused(why, "update the device's agent first".to_owned()));
    }
    match fit_device(device, release).0 {
        Fit::NoFit { why, .. } => {
            let hint =
                format!("`slm device explain {}` shows what each variant needs", device.name);
            Err(refused(why, hint))
        }
        Fit::Fits { variant, manifest, .. } if device.rejected(&manifest) => Err(refused(
            format!("{variant} ({}) failed on this very device", manifest.short()),
            "pin it to another release, or ship a new version".to_owned(),
        )),
        Fit::Fits { variant, manifest, .. } if world.quarantined(device, &manifest) => {
            let (digest, class) = (manifest.short(), &device.class);
            Err(refused(
                format!("{variant} ({digest}) is quarantined for class {class}"),
                format!(
                    "`slm quarantine lift {digest} --class {class} --reason …` offers it again"
                ),
            ))
        }
        Fit::Fits { .. } => Ok(()),
    }
}

fn newest(
    world: &World<'_>,
    device: &FleetDevice,
    rollout: &CompletedRollout,
) -> Option<DesiredState> {
    let release = world.release(&rollout.model, &rollout.version)?;
    if unmet(release, &device.facts).is_some() {
        return None;
    }
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
        rules: DeviceRules::default(),
    })
}
