use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::SignedDuration;
use slmops_api::device::{
    DesiredModel, DesiredState, DeviceReport, Failure, Rejection, Telemetry, WaitCause,
};
use slmops_api::orders::{Exclusion, Orders, Pin};
use slmops_api::rules::DeviceRules;
use slmops_api::runtime::RuntimeConfig;

use super::*;
use crate::blueprint::resolve;
use crate::testing;
use crate::world::Releases;

const NOW: &str = "2026-01-01T12:00:00Z";

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

fn digest(version: &str) -> Digest {
    testing::release("m", version).variants[0].manifest
}

fn installed(version: &str) -> InstalledModel {
    let variant = &testing::release("m", version).variants[0];
    InstalledModel {
        model: "m".parse().unwrap(),
        version: version.parse().unwrap(),
        variant: variant.name.clone(),
        manifest: variant.manifest,
        weights: variant.weights,
    }
}

/// A device of this name: told to run `wanted`, running `runs`, and this far.
fn device(name: &str, wanted: Option<&str>, runs: Option<&str>, phase: Phase) -> FleetDevice {
    let site = if name < "c" { "berlin" } else { "rome" };
    let labels =
        [("id", format!("d-{name}")), ("name", name.to_owned()), ("site", site.to_owned())];
    FleetDevice {
        id: format!("d-{name}").parse().unwrap(),
        name: name.to_owned(),
        class: "small".parse().unwrap(),
        labels: labels.into_iter().collect(),
        facts: Arc::new(testing::facts(300)),
        budget_bytes: 300 << 20,
        config: Arc::new(resolve(&[]).unwrap()),
        last_seen: now(),
        desired: Arc::new(DesiredState {
            generation: 2,
            model: wanted.map(installed).map(|it| DesiredModel {
                model: it.model,
                version: it.version,
                variant: it.variant,
                manifest: it.manifest,
                weights: it.weights,
                size_bytes: 1,
                predicted_memory_bytes: 1,
            }),
            runtime: RuntimeConfig::default(),
            confirm_timeout_s: 900,
            reason: String::new(),
            rules: DeviceRules::default(),
        }),
        report: Some(DeviceReport {
            sequence: 1,
            generation: 2,
            phase,
            running: runs.map(installed),
            previous: None,
            rejected: vec![],
            probes: vec![],
            effective: None,
            telemetry: Telemetry { requests: 10, tokens_per_s: 1.5, ..Telemetry::default() },
            evidence: None,
            facts: testing::facts(300),
        }),
        revoked: false,
        orders: None,
    }
}

/// A device in each state, named by its first letter.
fn fleet() -> Vec<FleetDevice> {
    let waiting = Phase::Waiting { cause: WaitCause::Network, until: None };
    let failed = Phase::RolledBack { failure: Failure::Load };
    let mut fleet = vec![
        device("a-confirmed", Some("1.0.0"), Some("1.0.0"), Phase::Confirmed),
        device("b-updating", Some("1.1.0"), Some("1.0.0"), Phase::Staged),
        device("c-failed", Some("1.1.0"), Some("1.0.0"), failed),
        device("d-waiting", Some("1.1.0"), Some("1.0.0"), waiting),
        device("e-silent", Some("1.0.0"), Some("1.0.0"), Phase::Confirmed),
        device("f-idle", None, None, Phase::Idle),
        device("g-joined", None, None, Phase::Idle),
        device("h-revoked", Some("1.0.0"), Some("1.0.0"), Phase::Confirmed),
        device("i-behind", Some("1.1.0"), Some("1.0.0"), Phase::Confirmed),
        device("j-steady", Some("1.0.0"), Some("1.0.0"), Phase::Idle),
    ];
    fleet[2].report.as_mut().unwrap().rejected =
        vec![Rejection { manifest: digest("1.1.0"), generation: 2, failure: Failure::Load }];
    fleet[4].last_seen = now() - SignedDuration::from_mins(30);
    fleet[6].report = None;
    fleet[7].revoked = true;
    fleet[8].report.as_mut().unwrap().generation = 1;
    let (reason, by) = ("certified".to_owned(), "token t".to_owned());
    let pin = Pin {
        model: "m".parse().unwrap(),
        version: "1.0.0".parse().unwrap(),
        reason: reason.clone(),
        by: by.clone(),
        at: now(),
    };
    fleet[0].orders = Some(Box::new(Orders { pin: Some(pin), exclusion: None }));
    let exclusion = Exclusion { reason, by, at: now() };
    fleet[1].orders = Some(Box::new(Orders { pin: None, exclusion: Some(exclusion) }));
    fleet
}

fn releases() -> Releases {
    let named = |version: &str| {
        let release = testing::release("m", version);
        ((release.model.clone(), release.version.clone()), Arc::new(release))
    };
    ["1.0.0", "1.1.0"].map(named).into_iter().collect()
}

fn ask<T>(devices: &[FleetDevice], question: impl FnOnce(&World<'_>) -> T) -> T {
    question(&World {
        now: now(),
        listening_since: now(),
        devices,
        releases: &releases(),
        quarantine: &BTreeSet::from([(digest("1.1.0"), "small".parse().unwrap())]),
        completed: &[],
    })
}

#[test]
fn every_device_is_in_one_state() {
    for device in fleet() {
        let expected = match device.name.split_once('-').unwrap().1 {
            "behind" => "updating",
            "steady" => "confirmed",
            name => name,
        };
        assert_eq!(state(&device, now()).name(), expected, "{}", device.name);
    }
}

#[test]
fn filters_mean_what_they_say() {
    let check = |filter: DeviceFilter, expected: &str| {
        let letters = |filter: &DeviceFilter| {
            let devices = fleet();
            ask(&devices, |world| {
                let found = page(world, filter, "", 100);
                found.iter().map(|it| &it.name[..1]).collect::<Vec<_>>().concat()
            })
        };
        assert_eq!(letters(&filter), expected, "{filter:?}");
    };
    let all = DeviceFilter::default;
    let search = |text: &str| DeviceFilter { search: Some(text.to_owned()), ..all() };
    check(all(), "abcdefghij");
    check(search(""), "abcdefghij");
    check(search("CONFIRMED"), "a");
    check(search("d-f"), "f");
    check(search("site=berlin"), "ab");
    check(search("e=rom site=ROME  up"), "");
    check(search("e=rom failed"), "c");
    check(search("site=berlinx"), "");
    check(search("="), "abcdefghij");
    check(search("m 1.0.0 -j"), "j");
    check(search("no such thing"), "");
    check(DeviceFilter { selector: Some("site=berlin".parse().unwrap()), ..all() }, "ab");
    check(DeviceFilter { state: Some(DeviceState::Updating), ..all() }, "bi");
    check(DeviceFilter { version: Some("1.0.0".parse().unwrap()), ..all() }, "abcdehij");
    check(DeviceFilter { version: Some("1.1.0".parse().unwrap()), ..all() }, "");
    check(DeviceFilter { model: Some("other".parse().unwrap()), ..all() }, "");
    check(DeviceFilter { orders: Some(OrderKind::Pinned), ..all() }, "a");
    check(DeviceFilter { orders: Some(OrderKind::Excluded), ..all() }, "b");
    let both = DeviceFilter { orders: Some(OrderKind::Excluded), ..search("a-confirmed") };
    check(both, "");
}

#[test]
fn pages_follow_each_other_whatever_the_order_in_memory() {
    let mut devices = fleet();
    devices.reverse();
    for limit in 1..12 {
        let (mut seen, mut after) = (Vec::new(), String::new());
        loop {
            let found = ask(&devices, |world| {
                let found = page(world, &DeviceFilter::default(), &after, limit);
                found.iter().map(|it| it.name.clone()).collect::<Vec<_>>()
            });
            let Some(last) = found.last() else { break };
            assert!(found.len() <= limit);
            after = last.clone();
            seen.extend(found);
        }
        let names: Vec<String> = fleet().into_iter().map(|it| it.name).collect();
        assert_eq!(seen, names, "{limit} at a time");
    }
}

#[test]
fn a_summary_counts_every_device_once() {
    let devices = fleet();
    let summary = ask(&devices, |world| summarise(world, &DeviceFilter::default(), "site"));
    assert_eq!(summary.devices, 10);
    let counted: Vec<(&str, u64)> =
        summary.states.iter().map(|(state, devices)| (state.name(), *devices)).collect();
    let expected = [("confirmed", 2), ("updating", 2), ("failed", 1), ("waiting", 1)];
    assert_eq!(counted[..4], expected);
    assert_eq!(counted[4..], ["silent", "idle", "joined", "revoked"].map(|name| (name, 1)));
    let bands: Vec<(Option<u64>, u64)> =
        summary.last_seen.iter().map(|band| (band.within_s, band.devices)).collect();
    let day = 24 * 3600;
    let expected = [(Some(180), 8), (Some(3600), 1), (Some(day), 0), (Some(7 * day), 0), (None, 0)];
    assert_eq!(bands, expected);
    let [class] = &summary.classes[..] else { panic!("{:?}", summary.classes) };
    assert_eq!((class.class.as_str(), class.devices, class.without), ("small", 9, 2));
    let tallies: Vec<(String, [u64; 3])> = class
        .releases
        .iter()
        .map(|it| (it.version.to_string(), [it.running, it.updating, it.failed]))
        .collect();
    let expected = [("1.1.0", [0, 3, 1]), ("1.0.0", [7, 0, 0])];
    assert_eq!(tallies, expected.map(|(version, counts)| (version.to_owned(), counts)));
    let groups: Vec<(Option<&str>, u64)> =
        summary.groups.iter().map(|group| (group.value.as_deref(), group.devices)).collect();
    assert_eq!(groups, [(Some("rome"), 8), (Some("berlin"), 2)]);
    assert_eq!((summary.pinned, summary.excluded, summary.quarantined), (1, 1, 1));
    // Nobody generates anything now on a device that is not heard of.
    assert_eq!((summary.requests, summary.tokens_per_s), (90, 12.0));

    let wanted = DeviceFilter { state: Some(DeviceState::Confirmed), ..DeviceFilter::default() };
    let some = ask(&devices, |world| summarise(world, &wanted, "floor"));
    assert_eq!((some.devices, some.by.as_str()), (2, "floor"));
    assert_eq!(some.groups.len(), 1);
    assert_eq!(some.groups[0].value, None);
}

#[test]
fn groups_are_bounded_and_the_largest_come_first() {
    let mut devices = Vec::new();
    for number in 0..MAX_GROUPS + 7 {
        let mut one = device(&format!("n{number:04}"), None, None, Phase::Idle);
        one.labels.insert("site", format!("s{number:04}"));
        devices.push(one);
    }
    devices[100].labels.insert("site", "s0042");
    let summary = ask(&devices, |world| summarise(world, &DeviceFilter::default(), "site"));
    assert_eq!((summary.groups.len(), summary.more_groups), (MAX_GROUPS, 6));
    assert_eq!((summary.groups[0].value.as_deref(), summary.groups[0].devices), (Some("s0042"), 2));
    assert_eq!(summary.groups[1].value.as_deref(), Some("s0000"));
}
