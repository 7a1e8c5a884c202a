//! The invariants, checked after each event in constant time.

use std::collections::BTreeMap;

use jiff::Timestamp;
use slmops_agent_core::{Core, Effect, Outcome, Package, Snapshot};
use slmops_api::RolloutId;
use slmops_api::device::{DesiredState, Phase};
use slmops_api::rollout::{
    Limits, Outcome as PartOutcome, Rollout, RolloutPolicy, RolloutState, WavePer, WaveSize,
};
use slmops_api::rules::{DeviceRules, Hours};
use slmops_api::window::Opening;
use slmops_artifact::Digest;
use slmops_fleet_core::rollout::Assignment;
use slmops_fleet_core::world::FleetDevice;

use crate::catalog::Catalog;
use crate::device::{Device, Durable};
use crate::hub::{Hub, number_of, rollout_id};
use crate::link::Link;
use crate::report::Violation;
use crate::scenario::Scenario;
use crate::time::Time;

/// The most violations that are kept.
const MAX_VIOLATIONS: usize = 20;
/// Effects that a device may wait for at the same time.
const MAX_PENDING: usize = 8;

/// What surrounds a device.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    time_zone: Option<&'a str>,
    link: &'a Link,
}

impl<'a> Place<'a> {
    pub(crate) fn of(device: &Device, scenario: &'a Scenario, links: &'a [Link]) -> Self {
        let time_zone = scenario.spec.groups[device.group].time_zone.as_deref();
        Self { time_zone, link: &links[device.group] }
    }
}

/// What must hold, and what is remembered to see that it does.
pub(crate) struct Watch {
    pub violations: Vec<Violation>,
    waves: Vec<Option<Waves>>,
    seen: Vec<Seen>,
}

/// What was seen of one device.
#[derive(Clone, Default)]
struct Seen {
    /// The newest report that the hub has thanked for.
    acknowledged: u64,
    /// The newest generation that it was told.
    told: u64,
    /// The newest generation in its ledger.
    durable: u64,
    /// The newest generation that it reported.
    reported: u64,
    /// What this very process was told, and under which rules.
    wanted: Option<Box<(Digest, DeviceRules)>>,
}

/// A rollout's waves, as its policy means them.
struct Waves {
    id: RolloutId,
    /// Each device's wave, and what its size counts within; none for those that are no part.
    of_device: Vec<Option<(u32, usize)>>,
    /// What the sizes of waves count within.
    groups: Vec<Group>,
    told: Vec<bool>,
    max_failures: usize,
    /// Whether an operator went on in spite of failures.
    resumed: bool,
}

/// Devices within which the sizes of waves count.
#[derive(Default)]
struct Group {
    /// Devices that are going to be told.
    going: usize,
    /// How many may have been told once a wave has started.
    limits: Vec<usize>,
    told: usize,
}

/// What the policy counts its waves within: the name of a device's class or site.
fn group_of(device: &FleetDevice, per: WavePer) -> Option<&str> {
    match per {
        WavePer::Fleet => None,
        WavePer::Class => Some(device.class.as_str()),
        WavePer::Site => device.labels.get("site"),
    }
}

impl Watch {
    pub(crate) fn new(devices: usize, rollouts: usize) -> Self {
        Self {
            violations: Vec::new(),
            waves: (0..rollouts).map(|_| None).collect(),
            seen: vec![Seen::default(); devices],
        }
    }

    pub(crate) fn violation(&mut self, at: Time, what: String) {
        if self.violations.len() < MAX_VIOLATIONS {
            self.violations.push(Violation { at, what });
        }
    }

    // --- the hub

    /// A rollout was made: its waves are counted here anew, from the policy alone.
    pub(crate) fn created(&mut self, rollout: usize, record: &Rollout, devices: &[FleetDevice]) {
        let policy = &record.asked.policy;
        let mut of_device = vec![None; devices.len()];
        let mut names: Vec<Option<&str>> = Vec::new();
        let mut groups: Vec<Group> = Vec::new();
        for part in &record.devices {
            let number = number_of(&part.device);
            let name = group_of(&devices[number], policy.per);
            let group = names.iter().position(|known| *known == name).unwrap_or_else(|| {
                names.push(name);
                groups.push(Group::default());
                groups.len() - 1
            });
            of_device[number] = Some((part.wave, group));
            groups[group].going += usize::from(part.outcome == PartOutcome::Pending);
        }
        for group in &mut groups {
            let (mut sum, going) = (0, group.going);
            for wave in policy.waves.iter().chain([&WaveSize::Rest]) {
                let size = match wave {
                    WaveSize::Count(number) => *number as usize,
                    WaveSize::Percent(share) => (going * *share as usize).div_ceil(100),
                    WaveSize::Rest => going,
                };
                sum = (sum + size).min(going);
                // A wave of nobody is no wave.
                if group.limits.last() != Some(&sum) {
                    group.limits.push(sum);
                }
            }
        }
        self.waves[rollout] = Some(Waves {
            id: record.id.clone(),
            of_device,
            groups,
            told: vec![false; devices.len()],
            max_failures: policy.max_failures as usize,
            resumed: false,
        });
    }

    pub(crate) fn resumed(&mut self, id: &RolloutId) {
        for waves in self.waves.iter_mut().flatten().filter(|waves| waves.id == *id) {
            waves.resumed = true;
        }
    }

    /// A rollout changed: it has ended, or says what it waits for; it keeps to its limits; and who
    /// changes places between waves was not told yet.
    pub(crate) fn rollout(&mut self, now: Time, rollout: &Rollout, devices: &[FleetDevice]) {
        let id = &rollout.id;
        if !rollout.state.is_final() && rollout.waiting_for.is_empty() {
            self.violation(now, format!("rollout {id} waits and does not say for what"));
        }
        let Some(waves) = self.waves.iter_mut().flatten().find(|waves| waves.id == *id) else {
            return;
        };
        let mut problems = Vec::new();
        let limits = &rollout.asked.policy.limits;
        let (mut updating, mut of_site) = (0, BTreeMap::<&str, u32>::new());
        for part in &rollout.devices {
            let number = number_of(&part.device);
            if let Some((wave, _)) = &mut waves.of_device[number]
                && *wave != part.wave
            {
                *wave = part.wave;
                if waves.told[number] {
                    problems.push(format!("device {number} changes waves after it was told"));
                }
            }
            if part.outcome == PartOutcome::Updating && *limits != Limits::default() {
                updating += 1;
                if let Some(site) = devices[number].labels.get("site") {
                    *of_site.entry(site).or_default() += 1;
                }
            }
        }
        if limits.updating.is_some_and(|limit| updating > limit) {
            problems.push(format!("{updating} devices update at once in rollout {id}"));
        }
        if let Some(limit) = limits.updating_per_site
            && let Some((site, many)) = of_site.iter().find(|(_, many)| **many > limit)
        {
            problems.push(format!("{many} devices of site {site} update at once in rollout {id}"));
        }
        for problem in problems {
            self.violation(now, problem);
        }
    }

    /// A device is about to be told something.
    pub(crate) fn assignment(
        &mut self,
        now: Time,
        device: usize,
        assignment: &Assignment,
        hub: &Hub,
        catalog: &Catalog,
    ) {
        let before = &hub.devices[device].desired;
        let desired = &assignment.desired;
        if desired.generation <= before.generation {
            let (old, new) = (before.generation, desired.generation);
            self.violation(now, format!("device {device}: generation {old} is followed by {new}"));
        }
        let Some(model) = &desired.model else { return };
        let manifest = model.manifest;
        let repeated = before.model.as_ref().is_some_and(|told| told.manifest == manifest);
        // Going back to what this very device runs or has run is no offer.
        let report = hub.devices[device].report.as_ref();
        let installed = report.map(|report| [report.running.as_ref(), report.previous.as_ref()]);
        let mut installed = installed.into_iter().flatten().flatten();
        let back = installed.any(|installed| installed.manifest == manifest);
        let refused = match back {
            true => hub.devices[device].rejected(&manifest),
            false => hub.is_quarantined(device, &manifest),
        };
        if !repeated && refused {
            let what =
                format!("device {device} is offered {}, which is quarantined", model.version);
            self.violation(now, what);
        }
        let Some(rollout) = catalog.known(&manifest).release.checked_sub(1) else { return };
        let record = hub.rollout(rollout);
        if let Some(lax) = record.filter(|record| is_lax(record, &desired.rules)) {
            let what = format!("device {device} is told less than rollout {} rules", lax.id);
            self.violation(now, what);
        }
        let Some(waves) = &mut self.waves[rollout] else {
            return self
                .violation(now, format!("device {device} is told a release nobody asked for"));
        };
        if std::mem::replace(&mut waves.told[device], true) {
            return;
        }
        let Some(record) = record else { return };
        let id = waves.id.clone();
        let Some((wave, group)) = waves.of_device[device] else {
            let what = format!("device {device} is told of rollout {id}, of which it is no part");
            return self.violation(now, what);
        };
        waves.groups[group].told += 1;
        if record.state == RolloutState::Completed {
            return;
        }
        let current = record.current_wave;
        let Group { limits, told, .. } = &waves.groups[group];
        let limit = limits.get(current as usize).or(limits.last()).copied().unwrap_or(0);
        let first: usize = waves.groups.iter().filter_map(|group| group.limits.first()).sum();
        let guarded = first > waves.max_failures && !waves.resumed;
        let told = *told;
        let refused = forbidden(record, now.timestamp());
        let problem = match wave {
            _ if refused.is_some() => {
                refused.map(|why| format!("device {device} is told of rollout {id} {why}"))
            }
            wave if wave > current => Some(format!(
                "device {device} of wave {} is told in wave {} of rollout {id}",
                wave + 1,
                current + 1
            )),
            _ if told > limit => Some(format!(
                "{told} devices are told in wave {} of rollout {id}, which may have {limit}",
                current + 1
            )),
            wave if wave > 0 && guarded && catalog.is_bad_everywhere(&manifest) => {
                Some(format!("rollout {id} of a bad release is past its first wave"))
            }
            _ => None,
        };
        if let Some(problem) = problem {
            self.violation(now, problem);
        }
    }

    /// The hub thanks for a report.
    pub(crate) fn thanked(&mut self, now: Time, device: usize, sequence: u64, hub: &Hub) {
        let seen = &mut self.seen[device];
        seen.acknowledged = seen.acknowledged.max(sequence);
        self.stored(now, device, hub);
    }

    /// The hub tells a device what it should be.
    pub(crate) fn told(&mut self, device: usize, desired: &DesiredState) {
        let seen = &mut self.seen[device];
        if desired.generation >= seen.told {
            seen.told = desired.generation;
            let manifest = desired.model.as_ref().map(|model| model.manifest);
            seen.wanted = manifest.map(|manifest| Box::new((manifest, desired.rules.clone())));
        }
    }

    /// A device starts: it knows what its ledger says.
    pub(crate) fn booted(&mut self, device: &Device) {
        let wanted = device.durable.wanted.clone().map(Box::new);
        self.seen[device.number as usize].wanted = wanted;
    }

    /// The hub is back: whatever it has told or thanked for is there.
    pub(crate) fn recovered(&mut self, now: Time, hub: &Hub) {
        for device in 0..hub.devices.len() {
            self.stored(now, device, hub);
            let (told, stored) = (self.seen[device].told, hub.devices[device].desired.generation);
            if stored < told {
                let what = format!(
                    "device {device} was told generation {told}; the hub knows {stored} alone"
                );
                self.violation(now, what);
            }
        }
        for waves in
            self.waves.iter().enumerate().filter_map(|(index, w)| w.as_ref().map(|_| index))
        {
            if hub.rollout(waves).is_none() {
                return self.violation(now, format!("rollout {} is lost", rollout_id(waves)));
            }
        }
    }

    fn stored(&mut self, now: Time, device: usize, hub: &Hub) {
        let (thanked, stored) = (self.seen[device].acknowledged, hub.heard[device].sequence);
        // A sabotaged hub may still be going to store it.
        if stored < thanked && !hub.is_waiting_to_store() {
            let what =
                format!("device {device}: report {thanked} was acknowledged, {stored} is stored");
            self.violation(now, what);
        }
    }

    // --- devices

    /// An effect is about to take place on a device.
    pub(crate) fn effect(&mut self, now: Time, device: &Device, place: Place<'_>, effect: &Effect) {
        let number = device.number;
        if device.pending.len() > MAX_PENDING {
            let what = format!("device {number} waits for {} things", device.pending.len());
            self.violation(now, what);
        }
        let durable = &device.durable;
        match effect {
            Effect::Download {
                package,
                has_weights,
                route,
                gives_up,
                max_rate_bytes_per_s,
                ..
            } => {
                if gives_up.is_some()
                    && self.breaks(device, package.manifest, &|rules| !rules.replace)
                {
                    self.violation(now, format!("device {number} gives up what it serves"));
                }
                let deltas = route.iter().map(|delta| delta.bytes).sum();
                let bytes = match has_weights {
                    true => package.small_bytes(),
                    false if route.is_empty() => package.total_bytes(),
                    false => deltas,
                };
                self.fetches(now, now, device, place, (package, bytes));
                let too_fast = |cap: u64| max_rate_bytes_per_s.is_none_or(|rate| rate > cap);
                let broken = |rules: &DeviceRules| rules.max_rate_bytes_per_s.is_some_and(too_fast);
                if self.breaks(device, package.manifest, &broken) {
                    self.violation(now, format!("device {number} fetches faster than it may"));
                }
            }
            Effect::Activate { worker, .. } => {
                let Some(worker) = device.worker(*worker) else { return };
                let manifest = worker.deployment.package.manifest;
                let held = self.breaks(device, manifest, &|rules| rules.hold);
                let time = now.timestamp();
                let too_early = |rules: &DeviceRules| {
                    rules.activate_at.is_some_and(|at| time < at)
                        || is_shut(&rules.activate_in, time, place)
                };
                // One that has no model serves the next one as soon as it can.
                let early = !device.is_clock_wrong()
                    && durable.without.is_none()
                    && self.breaks(device, manifest, &too_early);
                if held {
                    self.violation(now, format!("device {number} switches to what is held"));
                }
                if early {
                    self.violation(now, format!("device {number} switches before its time"));
                }
                self.activates(now, device, effect);
            }
            Effect::Report { snapshot, .. } => self.report(now, device, snapshot),
            _ => {}
        }
    }

    /// A model is being switched to, or was now. What began is finished, whatever the rules have come
    /// to be meanwhile.
    pub(crate) fn activates(&mut self, now: Time, device: &Device, effect: &Effect) {
        let Effect::Activate { worker, .. } = effect else { return };
        let Some(worker) = device.worker(*worker) else { return };
        let (number, manifest) = (device.number, worker.deployment.package.manifest);
        let tried = device.durable.candidate == Some((manifest, true)) && worker.probed;
        if !worker.genuine {
            self.violation(now, format!("device {number} activates unverified bytes"));
        }
        if !device.signed.contains(&manifest) {
            self.violation(now, format!("device {number} activates what nobody signed"));
        }
        if !kept(device, manifest) && !tried {
            let what = format!("device {number} activates what its ledger does not allow");
            self.violation(now, what);
        }
    }

    /// A piece of a download arrives. It may do so in the very moment in which its time is over.
    pub(crate) fn piece(
        &mut self,
        now: Time,
        device: &Device,
        place: Place<'_>,
        package: &Package,
        bytes: u64,
    ) {
        let at = Time(now.0.saturating_sub(1));
        self.fetches(now, at, device, place, (package, bytes));
        let held: u64 = device.files.iter().map(|file| file.have_bytes).sum();
        if held > device.disk_bytes {
            let number = device.number;
            self.violation(now, format!("device {number} has {held} bytes on a smaller disk"));
        }
    }

    /// A device fetches so many bytes over its line for a package; whether it may is seen from `at`.
    fn fetches(
        &mut self,
        now: Time,
        at: Time,
        device: &Device,
        place: Place<'_>,
        (package, bytes): (&Package, u64),
    ) {
        let (number, manifest) = (device.number, package.manifest);
        if self.breaks(device, manifest, &|rules| rules.hold) {
            self.violation(now, format!("device {number} fetches what is held"));
        }
        let costs = place.link.is_metered(now);
        if costs && self.breaks(device, manifest, &|rules| !rules.metered.allows(bytes)) {
            self.violation(now, format!("device {number} fetches over a metered link"));
        }
        let shut = |rules: &DeviceRules| is_shut(&rules.download_in, at.timestamp(), place);
        if !device.is_clock_wrong() && self.breaks(device, manifest, &shut) {
            self.violation(now, format!("device {number} fetches outside of its hours"));
        }
    }

    /// Whether doing something with `manifest` breaks a rule that the device was given with it. What
    /// it runs or ran before is held up by none.
    fn breaks(
        &self,
        device: &Device,
        manifest: Digest,
        broken: &dyn Fn(&DeviceRules) -> bool,
    ) -> bool {
        // What it was told counts, durable or not.
        let seen = &self.seen[device.number as usize];
        let wanted = [device.durable.wanted.as_ref(), seen.wanted.as_deref()];
        let mut rules = wanted.into_iter().flatten().filter(|(what, _)| *what == manifest);
        !kept(device, manifest) && rules.any(|(_, rules)| broken(rules))
    }

    fn report(&mut self, now: Time, device: &Device, snapshot: &Snapshot) {
        let number = device.number;
        let reported = &mut self.seen[number as usize].reported;
        let before = std::mem::replace(reported, snapshot.generation);
        if snapshot.generation < before {
            let new = snapshot.generation;
            self.violation(now, format!("device {number} reports generation {new} after {before}"));
        }
        if snapshot.phase != Phase::Confirmed {
            return;
        }
        let durable = &device.durable;
        let running = snapshot.running.as_ref().map(|running| running.manifest);
        let live = device.live_worker().map(|worker| worker.deployment.package.manifest);
        if running.is_some() && running != live {
            let what = format!("device {number} says that it runs what it does not run");
            self.violation(now, what);
        }
        if !durable.confirmed || running.is_some_and(|running| durable.current != Some(running)) {
            let what = format!("device {number} confirms what its ledger does not name");
            self.violation(now, what);
        }
    }

    /// A device's ledger was written.
    pub(crate) fn saved(&mut self, now: Time, device: &Device) {
        let number = device.number as usize;
        let new = device.durable.generation;
        let before = std::mem::replace(&mut self.seen[number].durable, new);
        if new < before {
            let what = format!("device {number}: its ledger's generation {before} fell to {new}");
            self.violation(now, what);
        }
    }
}

/// Whether these rules ask less of a device than the policy of a running rollout.
fn is_lax(rollout: &Rollout, rules: &DeviceRules) -> bool {
    let RolloutPolicy { schedule, limits, .. } = &rollout.asked.policy;
    let hours = |windows| Hours::of(windows, schedule.time_zone.as_ref()).into_iter().collect();
    let asked = DeviceRules {
        activate_at: schedule.activate_at,
        activate_in: hours(&schedule.activate_in),
        download_in: hours(&schedule.download_in),
        metered: limits.metered,
        max_rate_bytes_per_s: limits.device_bytes_per_s,
        ..DeviceRules::default()
    };
    rollout.state == RolloutState::Running && rules.and(&asked) != *rules
}

/// Whether a device's ledger names this manifest as what it runs, or ran before; also where it gave
/// that up.
fn kept(device: &Device, manifest: Digest) -> bool {
    let Durable { current, previous, without, .. } = device.durable;
    [current, previous, without].contains(&Some(manifest))
}

fn is_shut(hours: &[Hours], at: Timestamp, place: Place<'_>) -> bool {
    matches!(Hours::opening(hours, at, place.time_zone), Opening::Shut { .. })
}

/// Which rule of its policy keeps a rollout from telling anybody now.
fn forbidden(rollout: &Rollout, now: Timestamp) -> Option<&'static str> {
    let policy = &rollout.asked.policy;
    let wave = rollout.current_wave + 1;
    let freezes = &policy.schedule.freezes;
    if policy.schedule.start_at.is_some_and(|start_at| now < start_at) {
        return Some("before its start");
    }
    if freezes.iter().any(|freeze| freeze.from <= now && now < freeze.until) {
        return Some("in a freeze");
    }
    let needed = policy.approvals.iter().any(|step| step.wave == wave);
    let given = rollout.approvals.iter().any(|approval| approval.wave == wave);
    (needed && !given).then_some("without an approval")
}

fn held_up<R: rand::Rng>(core: &Core<R>) -> bool {
    core.status().snapshot.is_some_and(|snapshot| snapshot.phase.held().is_some())
}

/// Why a device has not come to rest as what it should be, if it has not.
pub(crate) fn unsettled(device: &Device, hub: &Hub) -> Option<String> {
    let number = device.number;
    let desired = &hub.devices[number as usize].desired;
    let core = device.core.as_ref()?;
    let ledger = core.durable_ledger();
    if ledger.generation != desired.generation {
        let (has, told) = (ledger.generation, desired.generation);
        return Some(format!("device {number} knows generation {has}, not {told}"));
    }
    let live = device.live_worker().filter(|worker| worker.up).map(|worker| &worker.deployment);
    if live != ledger.current.as_ref() {
        return Some(format!("device {number} does not serve what its ledger names"));
    }
    let model = desired.model.as_ref()?;
    match &ledger.outcome {
        Some(Outcome::Confirmed) if live.is_some_and(|live| live.is(model, &desired.runtime)) => {
            None
        }
        Some(Outcome::Confirmed) => {
            Some(format!("device {number} has confirmed, and does not serve it"))
        }
        Some(Outcome::RolledBack { .. }) => {
            let refusal = ledger.refuses(model.manifest, &desired.runtime, desired.generation);
            refusal.is_none().then(|| format!("device {number} went back without a reason"))
        }
        None if desired.rules.hold && held_up(core) => None,
        None => Some(format!("device {number} has no outcome: {:?}", core.status().snapshot)),
    }
}
