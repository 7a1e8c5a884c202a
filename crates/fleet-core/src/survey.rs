//! Looking at the fleet: which devices a question is about, and what they do, counted. One pass over
//! the devices for each question.

use std::collections::{BTreeMap, BinaryHeap, HashMap};

use jiff::Timestamp;
use slmops_api::device::{InstalledModel, Phase};
use slmops_api::fleet::{
    ClassSummary, DeviceFilter, DeviceState, FleetSummary, GroupSummary, MAX_GROUPS, OrderKind,
    ReleaseTally, SEEN_BANDS_S, SILENT_AFTER_S, SeenBand,
};
use slmops_api::{ClassName, ModelName};
use slmops_artifact::Digest;

use crate::world::{FleetDevice, World};

#[cfg(test)]
mod tests;

/// A device in one word.
pub fn state(device: &FleetDevice, now: Timestamp) -> DeviceState {
    if device.revoked {
        return DeviceState::Revoked;
    }
    if silence_s(device, now) > SILENT_AFTER_S {
        return DeviceState::Silent;
    }
    let Some(report) = &device.report else { return DeviceState::Joined };
    let wanted = device.desired.model.as_ref();
    match &report.phase {
        Phase::RolledBack { .. } => DeviceState::Failed,
        Phase::Waiting { .. } | Phase::Prestaged { .. } => DeviceState::Waiting,
        _ if wanted.is_some() && report.generation < device.desired.generation => {
            DeviceState::Updating
        }
        Phase::Confirmed => DeviceState::Confirmed,
        Phase::Idle => match (wanted, &report.running) {
            (None, _) => DeviceState::Idle,
            (Some(wanted), Some(running)) if running.manifest == wanted.manifest => {
                DeviceState::Confirmed
            }
            _ => DeviceState::Updating,
        },
        _ => DeviceState::Updating,
    }
}

fn silence_s(device: &FleetDevice, now: Timestamp) -> u64 {
    u64::try_from(now.duration_since(device.last_seen).as_secs()).unwrap_or(0)
}

fn running(device: &FleetDevice) -> Option<&InstalledModel> {
    device.report.as_ref()?.running.as_ref()
}

/// A filter, ready to be asked of many devices.
struct Question<'a> {
    filter: &'a DeviceFilter,
    words: Vec<&'a str>,
    now: Timestamp,
}

impl<'a> Question<'a> {
    fn new(filter: &'a DeviceFilter, now: Timestamp) -> Self {
        let words = filter.search.as_deref().unwrap_or_default().split_whitespace().collect();
        Self { filter, words, now }
    }

    fn means(&self, device: &FleetDevice) -> bool {
        let DeviceFilter { search: _, selector, state: wanted, model, version, orders } =
            self.filter;
        let running = running(device);
        selector.as_ref().is_none_or(|selector| device.is_meant_by(selector))
            && model.as_ref().is_none_or(|model| running.is_some_and(|it| it.model == *model))
            && version.as_ref().is_none_or(|it| running.is_some_and(|run| run.version == *it))
            && orders.is_none_or(|order| match order {
                OrderKind::Pinned => device.pin().is_some(),
                OrderKind::Excluded => device.exclusion().is_some(),
            })
            && wanted.is_none_or(|wanted| state(device, self.now) == wanted)
            && self.words.iter().all(|word| is_about(device, word))
    }
}

/// Whether a word stands in a label (name, id, class and site are among them) or in what answers.
fn is_about(device: &FleetDevice, word: &str) -> bool {
    let in_label = |(key, value): (&str, &str)| match word.split_once('=') {
        // Neither keys nor values hold a `=`.
        Some((end, start)) => ends(key, end) && begins(value, start),
        None => holds(key, word) || holds(value, word),
    };
    let in_model = |it: &InstalledModel| {
        holds(it.model.as_str(), word)
            || holds(it.variant.as_str(), word)
            || holds(&it.version.to_string(), word)
    };
    device.labels.iter().any(in_label) || running(device).is_some_and(in_model)
}

fn holds(text: &str, word: &str) -> bool {
    let (text, word) = (text.as_bytes(), word.as_bytes());
    text.windows(word.len().max(1)).any(|part| part.eq_ignore_ascii_case(word))
}

fn begins(text: &str, start: &str) -> bool {
    let part = text.as_bytes().get(..start.len());
    part.is_some_and(|part| part.eq_ignore_ascii_case(start.as_bytes()))
}

fn ends(text: &str, end: &str) -> bool {
    let from = text.len().checked_sub(end.len());
    from.is_some_and(|from| text.as_bytes()[from..].eq_ignore_ascii_case(end.as_bytes()))
}

/// So many of the devices that a filter means, by name, after that of this name.
pub fn page<'w>(
    world: &World<'w>,
    filter: &DeviceFilter,
    after: &str,
    limit: usize,
) -> Vec<&'w FleetDevice> {
    let question = Question::new(filter, world.now);
    // Names are unique. The heap holds the first ones by name, the last of them on top.
    let mut first: BinaryHeap<(&str, usize)> = BinaryHeap::with_capacity(limit + 1);
    for (index, device) in world.devices.iter().enumerate() {
        let name = device.name.as_str();
        let late = first.len() == limit && first.peek().is_some_and(|(last, _)| *last <= name);
        if name <= after || late || !question.means(device) {
            continue;
        }
        first.push((name, index));
        if first.len() > limit {
            first.pop();
        }
    }
    let devices = world.devices;
    first.into_sorted_vec().into_iter().map(|(_, index)| &devices[index]).collect()
}

#[derive(Default)]
struct ClassTally<'a> {
    devices: u64,
    without: u64,
    releases: HashMap<(&'a ModelName, &'a semver::Version), [u64; 3]>,
}

/// The devices that a filter means, counted; `by` is the label by whose values they are grouped.
pub fn summarise(world: &World<'_>, filter: &DeviceFilter, by: &str) -> FleetSummary {
    let question = Question::new(filter, world.now);
    let manifests: HashMap<Digest, (&ModelName, &semver::Version)> = world
        .releases
        .iter()
        .flat_map(|((model, version), release)| {
            release.variants.iter().map(move |variant| (variant.manifest, (model, version)))
        })
        .collect();
    let mut summary = FleetSummary {
        by: by.to_owned(),
        quarantined: world.quarantine.len() as u64,
        ..FleetSummary::default()
    };
    let mut bands = [0; SEEN_BANDS_S.len() + 1];
    let mut classes: HashMap<&ClassName, ClassTally<'_>> = HashMap::new();
    let mut groups: HashMap<Option<&str>, BTreeMap<DeviceState, u64>> = HashMap::new();
    for device in world.devices.iter().filter(|device| question.means(device)) {
        let state = state(device, world.now);
        summary.devices += 1;
        *summary.states.entry(state).or_default() += 1;
        let value = device.labels.get(by);
        *groups.entry(value).or_default().entry(state).or_default() += 1;
        summary.pinned += u64::from(device.pin().is_some());
        summary.excluded += u64::from(device.exclusion().is_some());
        if let Some(telemetry) = device.report.as_ref().map(|report| &report.telemetry) {
            if state != DeviceState::Silent {
                summary.tokens_per_s += telemetry.tokens_per_s;
            }
            let add = |sum: &mut u64, count: u64| *sum = sum.saturating_add(count);
            add(&mut summary.requests, telemetry.requests);
            add(&mut summary.errors, telemetry.errors);
            add(&mut summary.downloaded_bytes, telemetry.downloaded_bytes);
        }
        if state == DeviceState::Revoked {
            continue;
        }
        let silence_s = silence_s(device, world.now);
        let band = SEEN_BANDS_S.iter().position(|bound| silence_s <= *bound);
        bands[band.unwrap_or(SEEN_BANDS_S.len())] += 1;
        count_models(classes.entry(&device.class).or_default(), device, state, &manifests);
    }
    summary.last_seen = SEEN_BANDS_S
        .into_iter()
        .map(Some)
        .chain([None])
        .zip(bands)
        .map(|(within_s, devices)| SeenBand { within_s, devices })
        .collect();
    summary.classes = classes.into_iter().map(class_summary).collect();
    summary.classes.sort_by(|a, b| a.class.cmp(&b.class));
    let mut groups: Vec<GroupSummary> = groups
        .into_iter()
        .map(|(value, states)| GroupSummary {
            value: value.map(str::to_owned),
            devices: states.values().sum(),
            states,
        })
        .collect();
    groups.sort_by(|a, b| b.devices.cmp(&a.devices).then_with(|| a.value.cmp(&b.value)));
    summary.more_groups = groups.len().saturating_sub(MAX_GROUPS) as u64;
    groups.truncate(MAX_GROUPS);
    summary.groups = groups;
    summary
}

const RUNNING: usize = 0;
const UPDATING: usize = 1;
const FAILED: usize = 2;

fn count_models<'a>(
    tally: &mut ClassTally<'a>,
    device: &'a FleetDevice,
    state: DeviceState,
    manifests: &HashMap<Digest, (&'a ModelName, &'a semver::Version)>,
) {
    tally.devices += 1;
    let runs = running(device).map(|it| (&it.model, &it.version));
    let wanted = device.desired.model.as_ref().map(|it| (&it.model, &it.version));
    let going = wanted.filter(|_| wanted != runs && state != DeviceState::Failed);
    if runs.is_none() && going.is_none() {
        tally.without += 1;
    }
    if let Some(runs) = runs {
        tally.releases.entry(runs).or_default()[RUNNING] += 1;
    }
    if let Some(going) = going {
        tally.releases.entry(going).or_default()[UPDATING] += 1;
    }
    let rejected = device.report.iter().flat_map(|report| &report.rejected);
    let mut failed: Vec<_> =
        rejected.filter_map(|rejection| manifests.get(&rejection.manifest).copied()).collect();
    failed.sort_unstable();
    failed.dedup();
    for release in failed {
        tally.releases.entry(release).or_default()[FAILED] += 1;
    }
}

fn class_summary((class, tally): (&ClassName, ClassTally<'_>)) -> ClassSummary {
    let mut releases: Vec<ReleaseTally> = tally
        .releases
        .into_iter()
        .map(|((model, version), counts)| ReleaseTally {
            model: model.clone(),
            version: version.clone(),
            running: counts[RUNNING],
            updating: counts[UPDATING],
            failed: counts[FAILED],
        })
        .collect();
    releases.sort_by(|a, b| a.model.cmp(&b.model).then_with(|| b.version.cmp(&a.version)));
    ClassSummary { class: class.clone(), devices: tally.devices, without: tally.without, releases }
}
