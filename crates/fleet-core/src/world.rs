//! What is known of the fleet when a decision is made.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use slmops_api::device::{DesiredState, DeviceFacts, DeviceReport};
use slmops_api::model::NewRelease;
use slmops_api::orders::{Exclusion, Orders, Pin};
use slmops_api::rollout::Rollout;
use slmops_api::rules::DeviceRules;
use slmops_api::selector::Selector;
use slmops_api::{ChannelName, ClassName, DeviceId, ModelName, RolloutId};
use slmops_artifact::Digest;

use crate::blueprint::Resolved;
use crate::labels::Labels;

/// Releases by model line and version.
pub type Releases = BTreeMap<(ModelName, semver::Version), Arc<NewRelease>>;

/// One device as decisions see it.
#[derive(Clone, Debug)]
pub struct FleetDevice {
    /// Its id.
    pub id: DeviceId,
    /// Its name.
    pub name: String,
    /// Its class.
    pub class: ClassName,
    /// Its labels, with `class`, `site`, `name` and `id` among them.
    pub labels: Labels,
    /// What it says of itself.
    pub facts: Arc<DeviceFacts>,
    /// Memory that models may use.
    pub budget_bytes: u64,
    /// Its blueprint, resolved.
    pub config: Arc<Resolved>,
    /// When it was last heard of.
    pub last_seen: Timestamp,
    /// What it is told to be; many devices are told the same.
    pub desired: Arc<DesiredState>,
    /// Its latest report; what it says of itself is in [`FleetDevice::facts`].
    pub report: Option<DeviceReport>,
    /// Whether it is shut out.
    pub revoked: bool,
    /// What operators decided about it; few devices have any.
    pub orders: Option<Box<Orders>>,
}

impl FleetDevice {
    /// Whether a selector means this device, by its labels and its facts.
    pub fn is_meant_by(&self, selector: &Selector) -> bool {
        selector.matches(|key| self.labels.get(key), &self.facts)
    }

    /// Whether it is one of those that a completed rollout was for.
    pub fn is_among(&self, completed: &CompletedRollout) -> bool {
        self.config.channel == completed.channel && self.is_meant_by(&completed.selector)
    }

    /// The generation of the next thing it is told: above all that it was told or says it has seen
    /// (more than the hub knows of when the hub was restored from a backup).
    pub fn next_generation(&self) -> u64 {
        let seen = self.report.as_ref().map_or(0, |report| report.generation);
        self.desired.generation.max(seen).saturating_add(1)
    }

    /// The release that an operator holds it to.
    pub fn pin(&self) -> Option<&Pin> {
        self.orders.as_ref()?.pin.as_ref()
    }

    /// Why an operator keeps it out of rollouts.
    pub fn exclusion(&self) -> Option<&Exclusion> {
        self.orders.as_ref()?.exclusion.as_ref()
    }

    /// Whether it has seen a generation that the hub does not know of.
    pub fn is_ahead(&self) -> bool {
        self.report.as_ref().is_some_and(|report| report.generation > self.desired.generation)
    }

    /// Whether its agent obeys the rule of this name, as far as it has said.
    pub fn obeys(&self, rule: &str) -> bool {
        self.facts.obeys.iter().any(|known| known == rule)
    }

    /// The names of those rules that its agent would ignore.
    pub fn ignores(&self, rules: &DeviceRules) -> Vec<&'static str> {
        rules.names().into_iter().filter(|name| !self.obeys(name)).collect()
    }

    /// Whether this manifest failed on this very device before.
    pub fn rejected(&self, manifest: &Digest) -> bool {
        let rejected = self.report.iter().flat_map(|report| &report.rejected);
        rejected.into_iter().any(|rejection| rejection.manifest == *manifest)
    }
}

/// A rollout that was completed and not taken back: where devices that join later find their model.
#[derive(Clone, Debug)]
pub struct CompletedRollout {
    /// Which.
    pub id: RolloutId,
    /// The model line.
    pub model: ModelName,
    /// The release.
    pub version: semver::Version,
    /// The devices it was for.
    pub selector: Selector,
    /// The channel that it was promoted to; none for one that was started by hand.
    pub channel: Option<ChannelName>,
}

impl From<&Rollout> for CompletedRollout {
    fn from(rollout: &Rollout) -> Self {
        Self {
            id: rollout.id.clone(),
            model: rollout.asked.model.clone(),
            version: rollout.asked.version.clone(),
            selector: rollout.asked.policy.selector.clone(),
            channel: rollout.asked.promotion.as_ref().map(|promotion| promotion.channel.clone()),
        }
    }
}

/// Everything that decisions are made from.
#[derive(Clone, Debug)]
pub struct World<'a> {
    /// The time of the decision.
    pub now: Timestamp,
    /// Since when the hub has listened without a gap: it started then, or its clock was set. Nobody
    /// is late for what could not be heard before.
    pub listening_since: Timestamp,
    /// All devices; sorted by id, or finding one takes as long as there are devices.
    pub devices: &'a [FleetDevice],
    /// All releases that devices or rollouts refer to.
    pub releases: &'a Releases,
    /// Manifests that halted a rollout, with the class of the device that failed.
    pub quarantine: &'a BTreeSet<(Digest, ClassName)>,
    /// Completed rollouts, newest first.
    pub completed: &'a [CompletedRollout],
}

impl World<'_> {
    /// The device with this id: fast where the devices are sorted by id, right in any order.
    pub fn device(&self, id: &DeviceId) -> Option<&FleetDevice> {
        match self.devices.binary_search_by(|device| device.id.cmp(id)) {
            Ok(found) => self.devices.get(found),
            Err(_) => self.devices.iter().find(|device| device.id == *id),
        }
    }

    /// The release of this model and version.
    pub fn release(&self, model: &ModelName, version: &semver::Version) -> Option<&NewRelease> {
        self.releases.get(&(model.clone(), version.clone())).map(Arc::as_ref)
    }

    /// Whether this manifest may not be offered to this device.
    pub fn quarantined(&self, device: &FleetDevice, manifest: &Digest) -> bool {
        device.rejected(manifest) || self.quarantine.contains(&(*manifest, device.class.clone()))
    }
}
