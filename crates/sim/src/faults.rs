//! What goes wrong: operations carried out, drawn from rates, and ended.

use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use slmops_agent_core::Death;

use crate::catalog::mix;
use crate::device::Armed;
use crate::operation::{Action, EffectKind, HubWork, Moment, Operation};
use crate::run::Simulation;
use crate::spec::FleetSpec;
use crate::time::{MINUTE, Time};

impl Simulation<'_> {
    pub(crate) fn apply(&mut self, action: Action) {
        let now = self.now;
        let until = |lasts: Time| Time(now.0 + lasts.0);
        let count = self.devices.len();
        let number = |device: u32| (device as usize).min(count - 1);
        let mut touched = None;
        let mut device = |device: u32| {
            touched = Some(number(device));
            number(device)
        };
        match action {
            Action::Crash { device: it } => {
                let it = device(it);
                self.cut_power(it);
            }
            Action::CrashAt { device: it, moment, effect } => {
                self.devices[device(it)].armed.push(Armed::Crash(moment, effect));
            }
            Action::LoseRequest { device: it } => {
                self.devices[device(it)].armed.push(Armed::LoseRequest);
            }
            Action::LoseReply { device: it } => {
                self.devices[device(it)].armed.push(Armed::LoseReply);
            }
            Action::Cut { device: it, lasts } => {
                self.devices[device(it)].cut_until = until(lasts);
            }
            Action::CutGroup { group, lasts } => {
                if let Some(cut) = self.group_cut_until.get_mut(group as usize) {
                    *cut = until(lasts);
                }
            }
            Action::MeterGroup { group, lasts } => {
                if let Some(link) = self.links.get_mut(group as usize) {
                    link.meter(until(lasts));
                    self.meter_changes(group as usize);
                    self.unmeter_later(group as usize, until(lasts));
                }
            }
            Action::TearLedger { device: it } => {
                self.devices[device(it)].armed.push(Armed::TearLedger);
            }
            Action::FillDisk { device: it, lasts } => {
                self.devices[device(it)].full_until = until(lasts);
            }
            Action::FlipBit { device: it } => {
                let it = &mut self.devices[device(it)];
                let current = it.durable.current;
                if let Some(current) = current {
                    let weights = self.catalog.known(&current).package.weights.digest;
                    let file = it.files.iter_mut().find(|file| file.digest == weights);
                    file.into_iter().for_each(|file| file.intact = false);
                }
            }
            Action::BreakEngine { device: it, lasts } => {
                self.devices[device(it)].broken_until = until(lasts);
            }
            Action::KillWorker { device: it } => {
                let it = device(it);
                self.end_worker(it, Death::Killed);
            }
            Action::CrashWorker { device: it } => {
                let it = device(it);
                self.end_worker(it, Death::Fault);
            }
            Action::JumpClock { device: it, by } => self.devices[device(it)].jump(now, by),
            Action::DriftClock { device: it, ppm } => self.devices[device(it)].drift(now, ppm),
            Action::CrashHub { lasts } => self.crash_hub(lasts),
            Action::CrashHubAt { moment, work, lasts } => {
                self.hub.armed.push((moment, work, lasts));
            }
            Action::Operate(command) => {
                if self.hub.is_up {
                    let (catalog, watch) = (&self.catalog, &mut self.watch);
                    let told = self.hub.operate(now, command.into(), catalog, watch);
                    self.tell(told);
                }
                self.reschedule_hub();
            }
        }
        if let Some(number) = touched {
            self.reschedule(number);
        }
    }

    /// Every fault ends.
    pub(crate) fn heal(&mut self) {
        let now = self.now;
        self.group_cut_until.fill(now);
        for link in &mut self.links {
            link.heal();
        }
        self.hub.armed.clear();
        self.hub.up_at = now;
        self.reschedule_hub();
        for number in 0..self.devices.len() {
            let device = &mut self.devices[number];
            device.armed.clear();
            device.cut_until = now;
            device.full_until = now;
            device.broken_until = now;
            device.power_at = device.power_at.min(now);
            self.reschedule(number);
        }
        for group in 0..self.links.len() {
            self.meter_changes(group);
        }
    }
}

/// Draws operations from the rates of a specification; the same ones for the same seed.
pub(crate) fn draw(spec: &FleetSpec) -> Vec<Operation> {
    let mut rng = ChaCha8Rng::seed_from_u64(mix(spec.seed ^ 0xFA17));
    let devices = spec.devices();
    let end = spec.end();
    let mut operations = Vec::new();
    for (kind, rate) in spec.faults.rates().into_iter().enumerate() {
        let of_hub = kind == spec.faults.rates().len() - 1;
        let places = if of_hub { 1.0 } else { f64::from(devices) };
        let expected = rate * places * f64::from(spec.hours) / 24.0;
        // The fraction that is left is the chance of one more.
        let mut number = expected as u64;
        number += u64::from(rng.random_bool(expected.fract()));
        for _ in 0..number {
            let at = Time(rng.random_range(0..end.0));
            let device = rng.random_range(0..devices);
            operations.push(Operation { at, action: draw_one(&mut rng, kind, device) });
        }
    }
    operations.sort_by_key(|operation| operation.at);
    operations
}

fn draw_one(rng: &mut ChaCha8Rng, kind: usize, device: u32) -> Action {
    match kind {
        0 => Action::Crash { device },
        1 => {
            let effect = EffectKind::ALL[rng.random_range(0..EffectKind::ALL.len())];
            Action::CrashAt { device, moment: moment(rng), effect }
        }
        2 => Action::LoseRequest { device },
        3 => Action::LoseReply { device },
        4 => Action::Cut { device, lasts: up_to(rng, 60) },
        5 => Action::TearLedger { device },
        6 => Action::FillDisk { device, lasts: up_to(rng, 60) },
        7 => Action::FlipBit { device },
        8 => Action::BreakEngine { device, lasts: up_to(rng, 20) },
        9 => Action::KillWorker { device },
        10 => Action::CrashWorker { device },
        11 if rng.random_bool(0.5) => Action::JumpClock { device, by: up_to(rng, 60) },
        11 => Action::DriftClock { device, ppm: rng.random_range(-50_000..=50_000) },
        _ => {
            let lasts = up_to(rng, 10);
            match rng.random_range(0..3) {
                0 => Action::CrashHub { lasts },
                1 => Action::CrashHubAt { moment: moment(rng), work: HubWork::Decision, lasts },
                _ => Action::CrashHubAt { moment: moment(rng), work: HubWork::Report, lasts },
            }
        }
    }
}

fn up_to(rng: &mut ChaCha8Rng, minutes: u64) -> Time {
    Time(rng.random_range(1..=minutes) * MINUTE)
}

fn moment(rng: &mut ChaCha8Rng) -> Moment {
    if rng.random_bool(0.5) { Moment::Before } else { Moment::After }
}
