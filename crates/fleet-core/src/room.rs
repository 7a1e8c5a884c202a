//! Whether a device's disk has room for another model, as far as its last report says.

use slmops_api::device::{DISK_RESERVE_BYTES, DeviceFacts, DeviceReport, InstalledModel};
use slmops_api::rules::DeviceRules;
use slmops_artifact::Digest;

use crate::words::bytes;
use crate::world::{FleetDevice, Releases, World};

/// What a device's disk means for a model that it is to get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It has room, or will once it lets go of the model before the one that runs.
    Enough,
    /// It gives up the model that runs, and has none until the new one is confirmed.
    Replaces,
    /// It waits until so many bytes more are free.
    Lacks {
        /// How many.
        short_bytes: u64,
    },
}

/// What the disk of a device with these facts means for a model file of `size_bytes`. `kept_bytes` are
/// those of the model that runs and of the one before.
pub fn room(facts: &DeviceFacts, kept_bytes: [u64; 2], size_bytes: u64, replaces: bool) -> Room {
    let free_bytes = facts.disk_free_bytes;
    // 0: it has not said.
    if free_bytes == 0 {
        return Room::Enough;
    }
    let needed = size_bytes.saturating_add(DISK_RESERVE_BYTES);
    let [running, previous] = kept_bytes;
    let with_previous = free_bytes.saturating_add(previous);
    if with_previous >= needed {
        return Room::Enough;
    }
    let obeys = facts.obeys.iter().any(|rule| rule == DeviceRules::REPLACE);
    match replaces && obeys && running > 0 && with_previous.saturating_add(running) >= needed {
        true => Room::Replaces,
        false => Room::Lacks { short_bytes: needed - with_previous },
    }
}

impl Room {
    /// What it means for the device, in words.
    pub fn words(self) -> Option<String> {
        match self {
            Self::Enough => None,
            Self::Replaces => Some(
                "its disk has no room for two models: it gives up the one that runs, and has none \
                 until the new one is confirmed"
                    .to_owned(),
            ),
            Self::Lacks { short_bytes } => Some(format!(
                "its disk has no room for two models: it waits until {} more are free",
                bytes(short_bytes)
            )),
        }
    }
}

/// [`room`] for a device that reported this last, and the file `weights`.
pub fn room_for(
    facts: &DeviceFacts,
    report: Option<&DeviceReport>,
    releases: &Releases,
    (weights, size_bytes): (Digest, u64),
    replaces: bool,
) -> Room {
    let running = report.and_then(|report| report.running.as_ref());
    let previous = report.and_then(|report| report.previous.as_ref());
    if [running, previous].into_iter().flatten().any(|model| model.weights == weights) {
        return Room::Enough;
    }
    let of_running = running.map(|running| running.weights);
    let size = |model: &InstalledModel| {
        let release = releases.get(&(model.model.clone(), model.version.clone()))?;
        let variant = release.variants.iter().find(|it| it.manifest == model.manifest)?;
        Some(variant.size_bytes)
    };
    let previous = previous.filter(|previous| Some(previous.weights) != of_running);
    let kept = [running, previous].map(|model| model.and_then(size).unwrap_or(0));
    room(facts, kept, size_bytes, replaces)
}

/// [`room`] on a device of the fleet.
pub(crate) fn room_on(
    device: &FleetDevice,
    world: &World<'_>,
    weights: Digest,
    size_bytes: u64,
    replaces: bool,
) -> Room {
    let report = device.report.as_ref();
    room_for(&device.facts, report, world.releases, (weights, size_bytes), replaces)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn the_model_before_goes_first_and_the_running_one_only_with_leave() {
        let check = |free_mib: u64, kept_mib: [u64; 2], replaces, expected: Room| {
            let facts = DeviceFacts {
                disk_free_bytes: free_mib << 20,
                obeys: vec![DeviceRules::REPLACE.to_owned()],
                ..testing::facts(100)
            };
            let kept = kept_mib.map(|mib| mib << 20);
            assert_eq!(
                room(&facts, kept, 100 << 20, replaces),
                expected,
                "{free_mib} {kept_mib:?}"
            );
        };
        let lacks = |mib: u64| Room::Lacks { short_bytes: mib << 20 };
        check(0, [100, 0], false, Room::Enough);
        check(116, [100, 0], false, Room::Enough);
        check(115, [100, 0], false, lacks(1));
        check(20, [100, 100], false, Room::Enough);
        check(20, [100, 0], true, Room::Replaces);
        check(20, [100, 0], false, lacks(96));
        check(20, [50, 0], true, lacks(96));
        check(20, [50, 50], true, Room::Replaces);
        let old = DeviceFacts { disk_free_bytes: 20 << 20, obeys: vec![], ..testing::facts(100) };
        assert_eq!(room(&old, [100 << 20, 0], 100 << 20, true), lacks(96));
    }
}
