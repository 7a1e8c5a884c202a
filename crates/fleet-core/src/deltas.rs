//! Deltas between the models that the fleet runs and those that it is to run: which are wanted, and
//! what a device is told of them. They only save bytes: a device that can use none gets the whole.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use slmops_api::ModelName;
use slmops_api::delta::{
    Delta, DeltaJob, DeltaState, MAX_CHAIN, MAX_OFFERED, Sources, Transfer, Transfers, Way,
    WayTaken,
};
use slmops_api::rollout::Outcome;
use slmops_artifact::Digest;

use crate::rollout::RolloutRecord;
use crate::world::World;

/// How long devices wait for a delta that is being made, in seconds since it was wanted.
pub const MAX_WAIT_S: i64 = 120;
/// A delta is useless unless it is smaller than so many hundredths of the whole.
pub const MAX_HUNDREDTHS: u64 = 80;

/// Whether a delta of so many bytes is worth keeping beside a file of `whole_bytes`.
pub fn saves_enough(delta_bytes: u64, whole_bytes: u64) -> bool {
    delta_bytes.saturating_mul(100) < whole_bytes.saturating_mul(MAX_HUNDREDTHS)
}

/// A way from one model file to another that devices are on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The model line.
    pub model: ModelName,
    /// Digest of the file that devices run.
    pub from: Digest,
    /// Digest of the file that they are to run.
    pub to: Digest,
    /// Digest of the new variant's manifest.
    pub manifest: Digest,
    /// How many devices.
    pub devices: u64,
}

/// The ways that devices of rollouts under way have before them, most devices first.
pub fn wanted(world: &World<'_>, records: &[RolloutRecord]) -> Vec<Wanted> {
    let mut ways: BTreeMap<(ModelName, Digest, Digest), (Digest, u64)> = BTreeMap::new();
    for record in records.iter().filter(|record| !record.rollout.state.is_final()) {
        let asked = &record.rollout.asked;
        let Some(release) = world.release(&asked.model, &asked.version) else { continue };
        for part in &record.rollout.devices {
            let ahead =
                matches!(part.outcome, Outcome::Pending | Outcome::Updating | Outcome::Away);
            let variant = release.variants.iter().find(|it| Some(it.manifest) == part.manifest);
            let (true, Some(variant)) = (ahead, variant) else { continue };
            let report = world.device(&part.device).and_then(|device| device.report.as_ref());
            let running = report.and_then(|report| report.running.as_ref());
            let Some(running) = running.filter(|it| it.model == asked.model) else { continue };
            if running.weights != variant.weights {
                let way = (asked.model.clone(), running.weights, variant.weights);
                ways.entry(way).or_insert((variant.manifest, 0)).1 += 1;
            }
        }
    }
    let mut ways: Vec<Wanted> = ways
        .into_iter()
        .map(|((model, from, to), (manifest, devices))| Wanted {
            model,
            from,
            to,
            manifest,
            devices,
        })
        .collect();
    ways.sort_by_key(|way| std::cmp::Reverse(way.devices));
    ways
}

/// What a device is told that holds `bases` and is to have `to`, when the hub knows these deltas.
pub fn sources(known: &[DeltaJob], to: Digest, bases: &[Digest], now: Timestamp) -> Sources {
    let mut deltas: Vec<Delta> = Vec::new();
    let mut ends = BTreeSet::from([to]);
    for _ in 0..MAX_CHAIN {
        let mut starts = BTreeSet::new();
        for delta in known.iter().filter_map(|job| job.delta.as_ref()) {
            let fits = ends.contains(&delta.to) && !deltas.contains(delta);
            if fits && deltas.len() < MAX_OFFERED {
                starts.insert(delta.from);
                deltas.push(delta.clone());
            }
        }
        ends = starts;
    }
    let reached = |base: &Digest| deltas.iter().any(|delta| delta.from == *base);
    let coming = known.iter().find(|job| {
        job.to == to
            && bases.contains(&job.from)
            && matches!(job.state, DeltaState::Queued | DeltaState::Making)
            && now.duration_since(job.wanted_at).as_secs() < MAX_WAIT_S
    });
    let wait_s = coming.filter(|_| !bases.iter().any(reached)).map(|job| {
        // Small ones are there at once; nobody needs to ask every second for a large one.
        let age_s = now.duration_since(job.wanted_at).as_secs();
        u32::try_from(age_s / 4).unwrap_or(0).clamp(1, 10)
    });
    Sources { deltas, peers: Vec::new(), wait_s }
}

/// How a model came to devices, from what each said and how many seconds it took to confirm.
pub fn transfers(told: &[(Transfer, u64)]) -> Transfers {
    let mut by_way: BTreeMap<Way, Vec<&(Transfer, u64)>> = BTreeMap::new();
    for one in told {
        by_way.entry(one.0.way()).or_default().push(one);
    }
    let ways = by_way.into_iter().map(|(way, mut devices)| {
        devices.sort_by_key(|(_, seconds)| *seconds);
        let sum = |bytes: fn(&Transfer) -> u64| {
            devices.iter().fold(0_u64, |sum, (transfer, _)| sum.saturating_add(bytes(transfer)))
        };
        WayTaken {
            way,
            devices: devices.len() as u64,
            model_bytes: sum(|it| it.size_bytes),
            wan_bytes: sum(Transfer::wan_bytes),
            site_bytes: sum(|it| it.peer_bytes),
            half_confirmed_s: devices[(devices.len() - 1) / 2].1,
            last_confirmed_s: devices[devices.len() - 1].1,
        }
    });
    Transfers { devices: told.len() as u64, ways: ways.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn job(from: &str, to: &str, state: DeltaState) -> DeltaJob {
        let (from, to) = (Digest::of(from.as_bytes()), Digest::of(to.as_bytes()));
        let delta = Delta { from, to, to_bytes: 100, blob: from, bytes: 10, header_bytes: 1 };
        DeltaJob {
            model: "m".parse().unwrap(),
            from,
            to,
            manifest: to,
            devices: 1,
            state,
            attempts: 0,
            wanted_at: at(0),
            delta: (state == DeltaState::Ready).then_some(delta),
            why: String::new(),
        }
    }

    fn told(known: &[DeltaJob], bases: &[&str], second: i64) -> (usize, Option<u32>) {
        let bases: Vec<Digest> = bases.iter().map(|base| Digest::of(base.as_bytes())).collect();
        let sources = sources(known, Digest::of(b"3"), &bases, at(second));
        (sources.deltas.len(), sources.wait_s)
    }

    #[test]
    fn a_chain_is_offered_as_far_as_it_may_be() {
        let ready = |from, to| job(from, to, DeltaState::Ready);
        let known = [ready("2", "3"), ready("1", "2"), ready("x", "y"), ready("0", "1")];
        assert_eq!(told(&known, &["1"], 0), (3, None));
        let longer = [&known[..], &[ready("-1", "0")]].concat();
        assert_eq!(told(&longer, &["-1"], 0), (3, None), "no chain is longer than {MAX_CHAIN}");
        let ring = [ready("2", "3"), ready("3", "2")];
        assert_eq!(told(&ring, &["2"], 0), (2, None));
    }

    #[test]
    fn a_device_waits_for_its_delta_but_not_for_ever() {
        let making = [job("2", "3", DeltaState::Making)];
        assert_eq!(told(&making, &["2"], 0), (0, Some(1)));
        assert_eq!(told(&making, &["2"], 60), (0, Some(10)));
        assert_eq!(told(&making, &["2"], MAX_WAIT_S), (0, None));
        assert_eq!(told(&making, &["1"], 0), (0, None), "it is none for this device");
        for state in [DeltaState::Useless, DeltaState::Failed] {
            assert_eq!(told(&[job("2", "3", state)], &["2"], 0), (0, None));
        }
        // What there is does meanwhile.
        let both = [job("2", "3", DeltaState::Making), job("1", "3", DeltaState::Ready)];
        assert_eq!(told(&both, &["1", "2"], 0), (1, None));
    }

    #[test]
    fn ways_are_told_apart() {
        let transfer = |whole_bytes, delta_bytes, peer_bytes| Transfer {
            delta_bytes,
            whole_bytes,
            peer_bytes,
            ..Transfer::new(Digest::of(b"3"), 100, None)
        };
        let adapter = Transfer { adapter_bytes: 2, ..transfer(0, 0, 0) };
        let told = [
            (adapter.clone(), 4),
            (Transfer { whole_bytes: 100, ..adapter }, 90),
            (transfer(100, 0, 0), 80),
            (transfer(0, 3, 0), 9),
            (transfer(10, 3, 0), 5),
            (transfer(0, 4, 0), 7),
            (transfer(0, 0, 100), 6),
        ];
        let found = transfers(&told);
        let ways: Vec<_> = found
            .ways
            .iter()
            .map(|it| (it.way, it.devices, it.wan_bytes, it.half_confirmed_s, it.last_confirmed_s))
            .collect();
        let expected = [
            (Way::Whole, 2, 202, 80, 90),
            (Way::Delta, 3, 20, 7, 9),
            (Way::Adapter, 1, 2, 4, 4),
            (Way::Site, 1, 0, 6, 6),
        ];
        assert_eq!(ways, expected);
        assert_eq!((found.devices, found.ways[3].site_bytes), (7, 100));
        assert_eq!(transfers(&[]), Transfers::default());
    }
}
