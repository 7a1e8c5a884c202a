//! What passes between devices and the hub, and what takes place on a device.

use std::sync::Arc;

use rand::Rng as _;
use slmops_agent_core::{
    Blob, Death, Effect, EffectId, Event, FetchError, Obstacle, Offer, Package, Polled, Snapshot,
};
use slmops_api::delta::Sources;
use slmops_api::device::{DesiredModel, DesiredState, WaitCause};
use slmops_api::evidence::Evidence;
use slmops_artifact::Digest;

use crate::device::{Armed, Device, Pending, Piece, Source, Work};
use crate::link::Pipe;
use crate::operation::{EffectKind, Moment};
use crate::run::Simulation;
use crate::spec::Ailment;
use crate::time::{MINUTE, SECOND, Time};
use crate::watch::Place;

/// A device without power gets it back after this time.
const POWER_BACK_MS: u64 = 20 * SECOND;
/// A device without a connection notices within this time.
const UNREACHABLE_MS: u64 = SECOND;
/// A worker that died is started again after this time.
const RESTART_MS: u64 = 3 * SECOND;
/// One that cannot be started is tried again after this time.
const RESTART_AGAIN_MS: u64 = MINUTE;

/// Seconds until a device asks again that was told to wait for another one of its site.
const SEED_WAIT_S: u32 = 5;
/// Seconds of a device's rate that one piece of a capped download holds, at most.
const CAPPED_PIECE_S: u64 = 30;

/// What becomes of a request.
enum Fate {
    /// It fails, and the device knows at this time.
    Fails(Time),
    /// Nobody ever hears of it.
    Lost,
    /// It gets to the hub; its reply may be lost.
    Arrives { reply: bool },
}

fn network() -> Obstacle {
    Obstacle::new(WaitCause::Network)
}

fn kind_of(effect: &Effect) -> Option<EffectKind> {
    Some(match effect {
        Effect::Poll { .. } => EffectKind::Poll,
        Effect::FetchPackage { .. } => EffectKind::FetchPackage,
        Effect::Download { .. } => EffectKind::Download,
        Effect::Verify { .. } => EffectKind::Verify,
        Effect::Stage { .. } => EffectKind::Stage,
        Effect::Probe { .. } => EffectKind::Probe,
        Effect::Activate { .. } => EffectKind::Activate,
        Effect::SaveLedger { .. } => EffectKind::SaveLedger,
        Effect::Report { .. } => EffectKind::Report,
        Effect::Collect { .. } | Effect::Cancel { .. } | Effect::StopServing => return None,
    })
}

impl Simulation<'_> {
    pub(crate) fn is_connected(&self, number: usize) -> bool {
        let device = &self.devices[number];
        self.now >= device.cut_until
            && self.now >= self.group_cut_until[device.group]
            && self.links[device.group].is_online(self.now)
    }

    fn latency_ms(&self, number: usize) -> u64 {
        self.links[self.devices[number].group].latency_ms
    }

    fn request(&mut self, number: usize) -> Fate {
        let latency_ms = self.latency_ms(number);
        if !self.is_connected(number) {
            return Fate::Fails(Time(self.now.0 + UNREACHABLE_MS));
        }
        let device = &mut self.devices[number];
        if !device.armed.is_empty() && device.take_armed(Armed::LoseRequest) {
            return Fate::Lost;
        }
        if !self.hub.is_up {
            return Fate::Fails(Time(self.now.0 + 2 * latency_ms));
        }
        let mut reply = device.armed.is_empty() || !device.take_armed(Armed::LoseReply);
        let loss = self.links[device.group].loss;
        if loss > 0.0 && self.rng.random_bool(loss) {
            if self.rng.random_bool(0.5) {
                return Fate::Lost;
            }
            reply = false;
        }
        Fate::Arrives { reply }
    }

    fn later(&mut self, number: usize, at: Time, id: EffectId, work: Work) {
        self.devices[number].pending.push(Pending { at, id, work });
    }

    fn hear_at(&mut self, number: usize, at: Time, id: EffectId, event: Event) {
        self.later(number, at, id, Work::Hear(Box::new(event)));
    }

    /// A device's core asks for something.
    pub(crate) fn begin(&mut self, number: usize, effect: Effect) {
        if !self.devices[number].armed.is_empty()
            && let Some(kind) = kind_of(&effect)
        {
            if self.devices[number].take_armed(Armed::Crash(Moment::Before, kind)) {
                return self.cut_power(number);
            }
            let remote = matches!(
                kind,
                EffectKind::Poll
                    | EffectKind::FetchPackage
                    | EffectKind::Download
                    | EffectKind::Report
            );
            if remote && self.devices[number].take_armed(Armed::Crash(Moment::After, kind)) {
                return self.carry_out_and_crash(number, effect);
            }
        }
        match effect {
            Effect::Poll { id, known, wait_s } => self.poll(number, id, known, wait_s),
            Effect::FetchPackage { id, model } => self.fetch(number, id, &model),
            download @ Effect::Download { .. } => self.download(number, download),
            Effect::Report { id, snapshot } => self.send_report(number, id, snapshot),
            Effect::Collect { keep } => {
                self.devices[number].files.retain(|file| keep.contains(&file.digest));
            }
            Effect::Cancel { id } => self.cancel(number, id),
            Effect::StopServing => {
                let device = &mut self.devices[number];
                let live = device.live.take();
                device.workers.retain(|worker| Some(worker.id) != live);
            }
            local @ (Effect::Verify { id, .. }
            | Effect::Stage { id, .. }
            | Effect::Probe { id, .. }
            | Effect::Activate { id, .. }
            | Effect::SaveLedger { id, .. }) => {
                let at = Time(self.now.0 + Device::duration_ms(&local));
                self.later(number, at, id, Work::Local(Box::new(local)));
            }
        }
    }

    fn cancel(&mut self, number: usize, id: EffectId) {
        let device = &mut self.devices[number];
        let mut ended = Vec::new();
        device.pending.retain(|pending| {
            let cancelled = pending.id == id;
            if let (true, Work::Piece(piece)) = (cancelled, &pending.work) {
                ended.push(piece.source);
            }
            !cancelled
        });
        device.workers.retain(|worker| worker.id != id);
        if device.live == Some(id) {
            device.live = None;
        }
        ended.into_iter().for_each(|source| self.download_ends(number, source));
    }

    // --- polls

    fn poll(&mut self, number: usize, id: EffectId, known: Option<u64>, wait_s: u32) {
        let latency_ms = self.latency_ms(number);
        match self.request(number) {
            Fate::Lost => {}
            Fate::Fails(at) => {
                self.hear_at(number, at, id, Event::Polled { id, result: Err(network()) });
            }
            Fate::Arrives { reply } => {
                self.hub.seen(self.now, number);
                let there_and_back = self.now.0 + 2 * latency_ms;
                if !reply {
                    return;
                }
                if known == Some(self.hub.heard[number].generation) {
                    let at = Time(there_and_back + u64::from(wait_s) * SECOND);
                    return self.later(number, at, id, Work::Held);
                }
                self.answer(number, id, Time(there_and_back));
            }
        }
    }

    fn answer(&mut self, number: usize, id: EffectId, at: Time) {
        let desired = Box::new(DesiredState::clone(&self.hub.devices[number].desired));
        let result = Ok(Polled::Desired(desired));
        self.hear_at(number, at, id, Event::Polled { id, result });
    }

    /// The hub answers the polls that it holds for these devices.
    pub(crate) fn tell(&mut self, devices: Vec<usize>) {
        for number in devices {
            let held = self.devices[number].pending.iter();
            let held = held.enumerate().find(|(_, it)| matches!(it.work, Work::Held));
            let Some((index, id)) = held.map(|(index, it)| (index, it.id)) else { continue };
            self.devices[number].pending.remove(index);
            if self.is_connected(number) {
                let at = Time(self.now.0 + self.latency_ms(number));
                self.answer(number, id, at);
            }
            self.reschedule(number);
        }
    }

    /// The hub goes down, and with it every connection.
    pub(crate) fn crash_hub(&mut self, lasts: Time) {
        self.hub.crash(Time(self.now.0 + lasts.0));
        for number in 0..self.devices.len() {
            let at = Time(self.now.0 + self.latency_ms(number));
            for pending in &mut self.devices[number].pending {
                let id = pending.id;
                let broken = match &pending.work {
                    Work::Held => Event::Polled { id, result: Err(network()) },
                    Work::Thanks { .. } => Event::Reported { id, result: Err(network()) },
                    _ => continue,
                };
                pending.work = Work::Hear(Box::new(broken));
                pending.at = at;
            }
            self.reschedule(number);
        }
        self.reschedule_hub();
    }

    // --- reports

    fn send_report(&mut self, number: usize, id: EffectId, snapshot: Arc<Snapshot>) {
        self.devices[number].sequence += 1;
        let sequence = self.devices[number].sequence;
        let evidence = self.evidence(number, &snapshot);
        let latency_ms = self.latency_ms(number);
        match self.request(number) {
            Fate::Lost => {}
            Fate::Fails(at) => {
                self.hear_at(number, at, id, Event::Reported { id, result: Err(network()) });
            }
            Fate::Arrives { reply: true } if self.hub.knows(number, &snapshot) => {
                self.hub.touch(self.now, number, sequence, evidence);
                let at = Time(self.now.0 + 2 * latency_ms);
                let epoch = self.hub.epoch;
                self.later(number, at, id, Work::Thanks { sequence, epoch });
            }
            Fate::Arrives { reply } => {
                let at = Time(self.now.0 + latency_ms);
                let evidence = evidence.map(Box::new);
                self.later(number, at, id, Work::Arrives { snapshot, evidence, sequence, reply });
            }
        }
    }

    fn evidence(&mut self, number: usize, snapshot: &Snapshot) -> Option<Evidence> {
        let running = snapshot.running.as_ref().map(|running| running.manifest);
        self.devices[number].evidence(self.now, running, &self.catalog)
    }

    pub(crate) fn report_arrives(
        &mut self,
        number: usize,
        id: EffectId,
        snapshot: Arc<Snapshot>,
        evidence: Option<Evidence>,
        sequence: u64,
        reply: bool,
    ) {
        let back = Time(self.now.0 + self.latency_ms(number));
        if !self.hub.is_up {
            let event = Event::Reported { id, result: Err(network()) };
            return self.hear_at(number, back, id, event);
        }
        match self.hub.record(self.now, number, snapshot, evidence, sequence) {
            Ok(()) if reply => {
                let epoch = self.hub.epoch;
                self.later(number, back, id, Work::Thanks { sequence, epoch });
            }
            Ok(()) => {}
            Err(lasts) => {
                let event = Event::Reported { id, result: Err(network()) };
                self.hear_at(number, back, id, event);
                self.crash_hub(lasts);
            }
        }
        self.reschedule_hub();
    }

    // --- packages

    fn fetch(&mut self, number: usize, id: EffectId, model: &DesiredModel) {
        let latency_ms = self.latency_ms(number);
        let (at, result) = match self.request(number) {
            Fate::Lost | Fate::Arrives { reply: false } => return,
            Fate::Fails(at) => (at, Err(FetchError::Obstacle(network()))),
            Fate::Arrives { reply: true } => {
                let fetched = self.devices[number].fetch(model.manifest, &self.catalog);
                let sources = self.sources(number, model.manifest, model.weights);
                let result = fetched.map(|package| Offer { package, sources });
                (Time(self.now.0 + 2 * latency_ms), result)
            }
        };
        self.hear_at(number, at, id, Event::PackageFetched { id, result });
    }

    /// Another device of the group that has files and is there.
    fn peer_with(&self, number: usize, digests: &[Digest]) -> bool {
        let group = self.devices[number].group;
        let first = self.group_starts[group];
        let count = self.scenario.spec.groups[group].devices as usize;
        let has = |(other, device): (usize, &Device)| {
            other != number
                && device.core.is_some()
                && digests.iter().all(|digest| device.has(digest))
        };
        (first..).zip(&self.devices[first..first + count]).any(has)
    }

    /// What the hub says of where a model can be had. One device of a group that shares gets it
    /// first; the others wait for that one while it is on its way.
    fn sources(&mut self, number: usize, manifest: Digest, weights: Digest) -> Sources {
        let deltas = self.catalog.deltas(&manifest);
        let group = self.devices[number].group;
        let mut wait_s = None;
        if self.links[group].lan.is_some() && !self.peer_with(number, &[weights]) {
            let seed = self.seeds.get(&(group, manifest)).copied();
            let on_its_way = seed.is_some_and(|seed| {
                let device = &self.devices[seed];
                let wanted = device.durable.wanted.as_ref().map(|(wanted, _)| *wanted);
                seed != number
                    && self.is_connected(seed)
                    && wanted == Some(manifest)
                    && device.core.is_some()
                    && !device.durable.confirmed
            });
            match on_its_way {
                true => wait_s = Some(SEED_WAIT_S),
                false => drop(self.seeds.insert((group, manifest), number)),
            }
        }
        Sources { deltas, peers: Vec::new(), wait_s }
    }

    fn download(&mut self, number: usize, effect: Effect) {
        let Effect::Download {
            id,
            package,
            has_weights,
            route,
            gives_up,
            hands_on,
            max_rate_bytes_per_s,
            ..
        } = effect
        else {
            return;
        };
        let latency_ms = self.latency_ms(number);
        let device = &mut self.devices[number];
        let in_place = gives_up.is_some_and(|base| device.give_up(base, package.weights, &route));
        let has_base = route.first().is_some_and(|delta| device.has(&delta.from));
        let lacks_weights = has_weights && !device.has(&package.weights.digest);
        if lacks_weights || (!route.is_empty() && !in_place && !has_base) {
            return self.hear(number, Event::Downloaded { id, result: Err(FetchError::Deltas) });
        }
        let (missing, free) = (device.missing_bytes(&package), device.free_bytes());
        if missing > free {
            let result = Err(FetchError::NoRoom { short_bytes: missing - free });
            return self.hear(number, Event::Downloaded { id, result });
        }
        match self.request(number) {
            Fate::Lost | Fate::Arrives { reply: false } => {}
            Fate::Fails(at) => {
                let result = Err(FetchError::Obstacle(network()));
                self.hear_at(number, at, id, Event::Downloaded { id, result });
            }
            Fate::Arrives { reply: true } => {
                let bytes = route.iter().map(|delta| delta.bytes).sum();
                let blobs: Vec<Digest> = route.iter().map(|delta| delta.blob).collect();
                let fits = hands_on && missing.saturating_add(bytes) <= free;
                let by_delta = in_place || has_base;
                let near = |digests: &[Digest]| hands_on && self.peer_with(number, digests);
                let source = match by_delta {
                    true if (in_place || fits) && near(&blobs) => Source::PeerDeltas { bytes },
                    true if in_place => Source::Deltas { bytes },
                    _ if near(&[package.weights.digest]) => Source::Peer,
                    true => Source::Deltas { bytes },
                    false => Source::Hub,
                };
                let stays = by_delta && fits && !in_place && source != Source::Peer;
                let kept = route.iter().filter(|_| stays);
                let kept = kept.map(|delta| Blob { digest: delta.blob, size_bytes: delta.bytes });
                let kept = kept.collect();
                self.pipes(number, source).for_each(|pipe| pipe.active += 1);
                let rate = max_rate_bytes_per_s;
                self.next_piece(number, id, (package, source, kept), rate, 2 * latency_ms);
            }
        }
    }

    /// What a download from there goes through, besides the device's own link.
    fn pipes(&mut self, number: usize, source: Source) -> impl Iterator<Item = &mut Pipe> {
        let link = &mut self.links[self.devices[number].group];
        let (site, lan, hub) = match source {
            near if near.is_near() => (None, link.lan.as_mut(), None),
            _ => (link.site.as_mut(), None, self.hub_pipe.as_mut()),
        };
        site.into_iter().chain(lan).chain(hub)
    }

    fn moved(&mut self, number: usize, package: &Package, source: Source, bytes: u64) {
        if source.is_near() {
            return self.collected.shared(bytes);
        }
        let release = self.catalog.known(&package.manifest).release;
        self.collected.moved(release, self.devices[number].group, bytes);
    }

    fn download_ends(&mut self, number: usize, source: Source) {
        self.pipes(number, source).for_each(|pipe| pipe.active -= 1);
    }

    fn next_piece(
        &mut self,
        number: usize,
        id: EffectId,
        (package, source, kept): (Package, Source, Vec<Blob>),
        rate: Option<u64>,
        delay_ms: u64,
    ) {
        let missing = self.devices[number].missing_bytes(&package);
        let all = source.wire_bytes(&package, missing);
        let group = self.devices[number].group;
        let left = rate.map_or(all, |rate| all.min(rate * CAPPED_PIECE_S));
        let (wire_bytes, at) = match source {
            near if near.is_near() => self.links[group].peer_piece(self.now, left),
            _ => self.links[group].piece(self.hub_pipe.as_mut(), self.now, left),
        };
        let at =
            rate.map_or(at, |rate| at.max(Time(self.now.0 + wire_bytes * SECOND / rate.max(1))));
        let scaled = u128::from(missing) * u128::from(wire_bytes) / u128::from(all.max(1));
        let bytes = if wire_bytes == all { missing } else { scaled as u64 };
        let piece = Piece { package, source, kept, wire_bytes, bytes, max_rate_bytes_per_s: rate };
        self.later(number, Time(at.0 + delay_ms), id, Work::Piece(Box::new(piece)));
    }

    pub(crate) fn piece_arrives(&mut self, number: usize, id: EffectId, piece: Piece) {
        let Piece { package, source, kept, wire_bytes, bytes, max_rate_bytes_per_s } = piece;
        let by_hub = !source.is_near();
        if by_hub && !self.is_connected(number) {
            // Silence: the core gives up by itself.
            return self.download_ends(number, source);
        }
        let full = self.now < self.devices[number].full_until;
        let failure = match (self.hub.is_up, full) {
            (false, _) if by_hub => Some(WaitCause::Network),
            (_, true) => Some(WaitCause::DiskFull),
            (_, false) => None,
        };
        if let Some(cause) = failure {
            self.download_ends(number, source);
            let result = Err(FetchError::Obstacle(Obstacle::new(cause)));
            return self.hear(number, Event::Downloaded { id, result });
        }
        let device = &self.devices[number];
        let place = Place::of(device, self.scenario, &self.links);
        let pulled = match device.has(&package.weights.digest) {
            true => package.small_bytes(),
            false => package.total_bytes(),
        };
        let over_line = source.wire_bytes(&package, pulled);
        let over_line = if by_hub { over_line } else { 0 };
        self.watch.piece(self.now, device, place, &package, over_line);
        self.devices[number].receive(&package, bytes);
        self.moved(number, &package, source, wire_bytes);
        let left = self.devices[number].missing_bytes(&package);
        if left == 0 {
            self.download_ends(number, source);
            let device = &mut self.devices[number];
            for blob in kept {
                device.file(blob.digest, blob.size_bytes).have_bytes = blob.size_bytes;
            }
            let wrong = self.catalog.ailment(&package.manifest, device.number);
            let result = match wrong == Some(Ailment::WrongBytes) {
                true => {
                    let wrong = package.adapter.unwrap_or(package.weights);
                    device.files.retain(|file| file.digest != wrong.digest);
                    Err(FetchError::Digest)
                }
                false => Ok(()),
            };
            return self.hear(number, Event::Downloaded { id, result });
        }
        self.next_piece(number, id, (package, source, kept), max_rate_bytes_per_s, 0);
        let total_bytes = package.total_bytes();
        let done_bytes = total_bytes - left;
        self.hear(number, Event::Progress { id, done_bytes, total_bytes });
    }

    // --- on the device

    pub(crate) fn perform(&mut self, number: usize, effect: Effect) {
        let sabotage = self.manner.sabotage;
        let kind = kind_of(&effect);
        let device = &mut self.devices[number];
        if !device.armed.is_empty()
            && kind == Some(EffectKind::SaveLedger)
            && device.take_armed(Armed::TearLedger)
        {
            // The new file is torn, and was not renamed yet: the old one stays in force.
            return self.cut_power(number);
        }
        self.watch.activates(self.now, device, &effect);
        let saves = kind == Some(EffectKind::SaveLedger);
        let activates = kind == Some(EffectKind::Activate);
        if activates {
            device.count(self.now, &self.catalog);
        }
        let before = device.durable.clone();
        let event = device.perform(self.now, effect, &self.catalog, sabotage);
        if saves {
            self.watch.saved(self.now, device);
            let release = |durable: &crate::device::Durable| {
                let current = durable.current.filter(|_| durable.confirmed)?;
                Some(self.catalog.known(&current).release)
            };
            self.collected.confirmed(self.now, release(&before), release(&device.durable));
        }
        if let Some(kind) = kind
            && !device.armed.is_empty()
            && device.take_armed(Armed::Crash(Moment::After, kind))
        {
            return self.cut_power(number);
        }
        if activates {
            self.plan_crash(number);
        }
        if let Some(event) = event {
            self.hear(number, event);
        }
    }

    /// A request is carried out, and the power goes before its reply is here.
    fn carry_out_and_crash(&mut self, number: usize, effect: Effect) {
        let arrives = matches!(self.request(number), Fate::Arrives { .. });
        match effect {
            Effect::Report { snapshot, .. } if arrives => {
                self.devices[number].sequence += 1;
                let sequence = self.devices[number].sequence;
                // Should the hub crash of it, its device is no longer there to notice.
                let evidence = self.evidence(number, &snapshot);
                let crashed = self.hub.record(self.now, number, snapshot, evidence, sequence);
                self.cut_power(number);
                if let Err(lasts) = crashed {
                    self.crash_hub(lasts);
                }
                return self.reschedule_hub();
            }
            Effect::Download { package, .. } if arrives => {
                let device = &mut self.devices[number];
                let bytes = device.missing_bytes(&package).min(device.free_bytes());
                device.receive(&package, bytes);
                self.moved(number, &package, Source::Hub, bytes);
            }
            _ => {}
        }
        self.cut_power(number);
    }

    pub(crate) fn cut_power(&mut self, number: usize) {
        let pieces = self.devices[number].pending.iter().filter_map(|it| match &it.work {
            Work::Piece(piece) => Some(piece.source),
            _ => None,
        });
        let pieces: Vec<Source> = pieces.collect();
        pieces.into_iter().for_each(|source| self.download_ends(number, source));
        self.devices[number].power_off(Time(self.now.0 + POWER_BACK_MS));
        self.reschedule(number);
    }

    pub(crate) fn end_worker(&mut self, number: usize, death: Death) {
        let device = &mut self.devices[number];
        let Some(id) = device.live else { return };
        let Some(worker) = device.worker(id) else { return };
        if !worker.up {
            return;
        }
        device.count(self.now, &self.catalog);
        if let Some(traffic) = &mut device.traffic {
            traffic.crashed();
        }
        device.workers.iter_mut().filter(|worker| worker.id == id).for_each(|it| it.up = false);
        let at = Time(self.now.0 + RESTART_MS);
        device.pending.push(Pending { at, id, work: Work::Restart });
        self.hear(number, Event::WorkerDied { worker: id, death });
        self.reschedule(number);
    }

    pub(crate) fn restart_worker(&mut self, number: usize, id: EffectId) {
        let device = &mut self.devices[number];
        let Some(worker) = device.workers.iter_mut().find(|worker| worker.id == id) else { return };
        if self.now < device.broken_until {
            let at = Time(self.now.0 + RESTART_AGAIN_MS);
            return device.pending.push(Pending { at, id, work: Work::Restart });
        }
        worker.up = true;
        // Nobody was answered meanwhile.
        if let Some(traffic) = &mut device.traffic {
            traffic.serve(self.now, None);
        }
        self.plan_crash(number);
        self.hear(number, Event::WorkerRestarted { worker: id });
    }
}
