//! The machine: events in, effects out.
//!
//! It is level-triggered: an event only notes what it says, then [`Core::advance`] looks at the
//! whole state and asks for what is missing. So lost, late and repeated events do no harm.

mod fetch;
mod restore;
mod rules;
mod snapshot;
mod step;
mod trial;
mod work;

use std::sync::Arc;

use rand::Rng;
use slmops_api::device::{DesiredState, Failure, WaitCause};
use slmops_api::probe::ProbeResult;
use slmops_api::runtime::EffectiveConfig;

use snapshot::News;
pub use snapshot::{Snapshot, Status};
use step::Step;

use crate::backoff::Backoff;
use crate::{
    Around, Config, Death, Deployment, Effect, EffectId, Event, Ledger, Millis, Obstacle, Polled,
};

/// One device's decisions.
pub struct Core<R> {
    config: Config,
    rng: R,
    next_id: u64,
    /// What should be durable.
    ledger: Box<Ledger>,
    /// Counts the changes of `ledger`.
    revision: u64,
    /// What is durable, and which revision that is.
    saved: Box<Ledger>,
    saved_revision: u64,
    /// What the device is surrounded by, and since when that is known.
    around: (Millis, Around),
    save: Call<Save>,
    poll: Call<()>,
    report: Call<Sent>,
    hub_answers: Option<bool>,
    serving: Option<Serving>,
    step: Step,
    work_backoff: Backoff,
    restore_backoff: Backoff,
    /// Whether the first round through what the ledger names has begun.
    booted: bool,
    /// The rest in which there was nothing to aim at.
    idle: Option<Rest>,
    /// When loading what the ledger names is tried again; set while it is not what serves.
    restore_at: Option<Millis>,
    /// Why the current model does not come up, while nothing serves.
    restore_failure: Option<Failure>,
    /// Whether the current model's file is damaged on disk and must be fetched again.
    damaged: bool,
    /// The revision up to which files were collected.
    collected: Option<u64>,
    report_wanted: bool,
    last_sent: Option<Sent>,
    last_sent_at: Millis,
}

/// A kind of effect of which at most one is in flight, with its retries.
struct Call<T> {
    flying: Option<Flying<T>>,
    not_before: Millis,
    backoff: Backoff,
    failed: Option<WaitCause>,
}

struct Flying<T> {
    id: EffectId,
    until: Millis,
    what: T,
}

struct Save {
    ledger: Box<Ledger>,
    revision: u64,
}

/// A report, and the rest that it speaks of.
struct Sent {
    snapshot: Arc<Snapshot>,
    rest: Option<Rest>,
}

/// A core with nothing under way, by all that its next step and its report depend on. While this
/// stays the same, neither needs to be worked out anew.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Rest {
    revision: u64,
    worker: Option<EffectId>,
    up: bool,
    damaged: bool,
}

impl<T> Call<T> {
    fn new() -> Self {
        Self { flying: None, not_before: Millis(0), backoff: Backoff::default(), failed: None }
    }

    fn take(&mut self, id: EffectId) -> Option<T> {
        self.flying.take_if(|flying| flying.id == id).map(|flying| flying.what)
    }

    fn overdue(&self, now: Millis) -> Option<EffectId> {
        self.flying.as_ref().filter(|flying| flying.until <= now).map(|flying| flying.id)
    }

    fn timer(&self) -> Option<Millis> {
        self.flying.as_ref().map(|flying| flying.until)
    }

    fn succeed(&mut self) {
        self.backoff.reset();
        self.failed = None;
    }
}

/// The activated worker.
struct Serving {
    worker: EffectId,
    deployment: Deployment,
    effective: EffectiveConfig,
    probes: Vec<ProbeResult>,
    up: bool,
    /// Until when it is watched for a crash loop, and how often it crashed by itself so far.
    watch_until: Millis,
    crashes: u32,
    /// Whether it was confirmed in this process: then a crash loop takes it back even when there
    /// is nothing to go back to.
    fresh: bool,
}

impl<R: Rng> Core<R> {
    /// A device with this ledger, just started. The first event should be [`Event::Tick`].
    pub fn new(mut ledger: Ledger, config: Config, rng: R) -> Self {
        // An older agent went on with this ledger and left the words of an older generation in it.
        let generation = ledger.generation;
        ledger.desired.take_if(|desired| desired.generation != generation);
        let ledger = Box::new(ledger);
        Self {
            config,
            rng,
            next_id: 1,
            saved: ledger.clone(),
            ledger,
            revision: 0,
            saved_revision: 0,
            around: (Millis(0), Around::default()),
            save: Call::new(),
            poll: Call::new(),
            report: Call::new(),
            hub_answers: None,
            serving: None,
            step: Step::Settled,
            work_backoff: Backoff::default(),
            restore_backoff: Backoff::default(),
            booted: false,
            idle: None,
            restore_at: Some(Millis(0)),
            restore_failure: None,
            damaged: false,
            collected: None,
            report_wanted: false,
            last_sent: None,
            last_sent_at: Millis(0),
        }
    }

    /// Takes one event and appends what must happen because of it.
    pub fn handle(&mut self, now: Millis, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Tick => {}
            Event::Around(around) => self.around = (now, around),
            Event::Polled { id, result } => self.polled(now, id, result, effects),
            Event::LedgerSaved { id, result } => self.ledger_saved(now, id, result),
            Event::Reported { id, result } => self.reported(now, id, result),
            Event::WorkerDied { worker, death } => self.worker_died(now, worker, death, effects),
            Event::WorkerRestarted { worker } => {
                if let Some(serving) = self.serving.as_mut().filter(|s| s.worker == worker) {
                    serving.up = true;
                }
            }
            Event::PackageFetched { id, result } => self.package_fetched(now, id, result, effects),
            Event::Progress { id, done_bytes, total_bytes } => {
                self.progress(now, id, done_bytes, total_bytes);
            }
            Event::Downloaded { id, result } => self.downloaded(now, id, result, effects),
            Event::FilesVerified { id, result } => self.files_verified(now, id, result, effects),
            Event::Staged { id, result } => self.staged(now, id, result, effects),
            Event::Probed { id, result } => self.probed(now, id, result, effects),
            Event::Activated { id, result } => self.activated(now, id, result, effects),
        }
        self.advance(now, effects);
    }

    /// When [`Event::Tick`] is wanted, if nothing else happens before.
    pub fn deadline(&self) -> Option<Millis> {
        let unsaved = self.dirty() && self.save.flying.is_none();
        let waits = matches!(self.step, Step::Settled | Step::Held { .. });
        let report = match self.report.flying {
            Some(_) => None,
            None => self.report_due().map(|at| at.max(self.report.not_before)),
        };
        let timers = [
            self.save.timer(),
            self.poll.timer(),
            self.report.timer(),
            self.step.timer(),
            self.rules_timer(),
            unsaved.then_some(self.save.not_before),
            self.poll.flying.is_none().then_some(self.poll.not_before),
            report,
            self.restore_at.filter(|_| waits),
        ];
        let never = Millis(u64::MAX);
        let first =
            timers.into_iter().fold(never, |first, timer| first.min(timer.unwrap_or(never)));
        (first < never).then_some(first)
    }

    /// The ledger as it is durable.
    pub fn durable_ledger(&self) -> &Ledger {
        &self.saved
    }

    /// Whether the ledger has changes that are not durable yet.
    fn dirty(&self) -> bool {
        self.revision != self.saved_revision
    }

    fn change(&mut self, change: impl FnOnce(&mut Ledger)) {
        change(&mut self.ledger);
        self.revision += 1;
    }

    fn id(&mut self) -> EffectId {
        let id = EffectId(self.next_id);
        self.next_id += 1;
        id
    }

    fn advance(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        self.expire(now, effects);
        while self.forward(now, effects) {}
        self.save_if_dirty(now, effects);
        self.poll_if_due(now, effects);
        self.collect(effects);
        self.report_if_due(now, effects);
    }

    /// Gives up on whatever did not answer in time, so that a lost completion is a failure among
    /// others and not the end.
    fn expire(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let network = Obstacle::new(WaitCause::Network);
        if let Some(id) = self.poll.overdue(now) {
            effects.push(Effect::Cancel { id });
            self.polled(now, id, Err(network), effects);
        }
        if let Some(id) = self.report.overdue(now) {
            effects.push(Effect::Cancel { id });
            self.reported(now, id, Err(network));
        }
        if let Some(id) = self.save.overdue(now) {
            // Not cancelled: a write that hangs ends before the next one begins.
            self.ledger_saved(now, id, Err(Obstacle::new(WaitCause::Storage)));
        }
        self.expire_step(now, effects);
    }

    fn backoff_limits(&self) -> (u64, u64) {
        (self.config.backoff_base_ms, self.config.backoff_cap_ms)
    }

    // --- the ledger

    fn save_if_dirty(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if !self.dirty() || self.save.flying.is_some() || now < self.save.not_before {
            return;
        }
        let id = self.id();
        let ledger = self.ledger.clone();
        effects.push(Effect::SaveLedger { id, ledger: ledger.clone() });
        let what = Save { ledger, revision: self.revision };
        self.save.flying = Some(Flying { id, until: now + self.config.save_timeout_ms, what });
    }

    fn ledger_saved(&mut self, now: Millis, id: EffectId, result: Result<(), Obstacle>) {
        let Some(save) = self.save.take(id) else { return };
        match result {
            Ok(()) => {
                self.saved = save.ledger;
                self.saved_revision = save.revision;
                self.save.succeed();
                self.save.not_before = now;
            }
            Err(obstacle) => {
                let limits = self.backoff_limits();
                self.save.failed = Some(obstacle.cause);
                self.save.not_before =
                    self.save.backoff.fail(now, limits, obstacle.retry_after_ms, &mut self.rng);
            }
        }
    }

    // --- the hub's wish

    fn poll_if_due(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if self.poll.flying.is_some() || now < self.poll.not_before {
            return;
        }
        let id = self.id();
        let known = self.ledger.desired.as_ref().map(|desired| desired.generation);
        // An agent that knows nothing yet must not wait for a change.
        let wait_s = if known.is_some() { self.config.poll_wait_s } else { 0 };
        effects.push(Effect::Poll { id, known, wait_s });
        let until = now + (u64::from(wait_s) * 1_000 + self.config.answer_timeout_ms);
        self.poll.flying = Some(Flying { id, until, what: () });
        self.poll.not_before = now + self.config.poll_interval_ms;
    }

    fn polled(
        &mut self,
        now: Millis,
        id: EffectId,
        result: Result<Polled, Obstacle>,
        effects: &mut Vec<Effect>,
    ) {
        if self.poll.take(id).is_none() {
            return;
        }
        match result {
            Ok(polled) => {
                self.poll.succeed();
                self.hub_answers = Some(true);
                self.report_wanted = true;
                if let Polled::Desired(desired) = polled {
                    self.adopt(*desired, effects);
                }
            }
            Err(obstacle) => {
                self.hub_answers = Some(false);
                let limits = self.backoff_limits();
                let at =
                    self.poll.backoff.fail(now, limits, obstacle.retry_after_ms, &mut self.rng);
                self.poll.not_before = self.poll.not_before.max(at);
            }
        }
    }

    fn adopt(&mut self, desired: DesiredState, effects: &mut Vec<Effect>) {
        if desired.generation < self.ledger.generation {
            return;
        }
        if desired.generation == self.ledger.generation {
            if self.ledger.desired.is_none() {
                self.change(|ledger| ledger.desired = Some(desired));
            }
            return;
        }
        let generation = desired.generation;
        self.change(|ledger| {
            ledger.generation = generation;
            ledger.desired = Some(desired);
            ledger.outcome = None;
        });
        self.work_backoff.reset();
        self.abandon(effects);
    }

    // --- telling the hub

    /// When a report is due: at once for news, a little later for mere progress.
    fn report_due(&self) -> Option<Millis> {
        if self.rests_as_sent() {
            return self.report_wanted.then_some(Millis(0));
        }
        let view = self.view()?;
        let Some(last) = &self.last_sent else { return Some(Millis(0)) };
        if self.report_wanted {
            return Some(Millis(0));
        }
        match view.news(&last.snapshot) {
            News::None => None,
            News::Progress => Some(self.last_sent_at + self.config.progress_interval_ms),
            News::Substance => Some(Millis(0)),
        }
    }

    /// The state as it is; shared with the report before where that said the same.
    fn snapshot_to_send(&self) -> Option<Arc<Snapshot>> {
        let last = self.last_sent.as_ref().map(|last| &last.snapshot);
        if self.rests_as_sent() {
            return last.cloned();
        }
        let view = self.view()?;
        let known = last.filter(|last| view.news(last) == News::None);
        Some(known.map_or_else(|| Arc::new(view.to_snapshot()), Arc::clone))
    }

    fn rests_as_sent(&self) -> bool {
        let sent = self.last_sent.as_ref().and_then(|last| last.rest);
        sent.is_some() && sent == self.rest()
    }

    /// None while something is under way.
    fn rest(&self) -> Option<Rest> {
        let settled = matches!(self.step, Step::Settled) && self.booted && !self.dirty();
        let unhindered = self.save.failed.is_none()
            && self.restore_failure.is_none()
            && self.restore_at.is_none();
        (settled && unhindered).then(|| Rest {
            revision: self.revision,
            worker: self.serving.as_ref().map(|serving| serving.worker),
            up: self.serving.as_ref().is_some_and(|serving| serving.up),
            damaged: self.damaged,
        })
    }

    fn report_if_due(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if self.report.flying.is_some() || now < self.report.not_before {
            return;
        }
        if self.report_due().is_none_or(|at| now < at) {
            return;
        }
        let Some(snapshot) = self.snapshot_to_send() else { return };
        let rest = self.rest();
        let id = self.id();
        effects.push(Effect::Report { id, snapshot: Arc::clone(&snapshot) });
        let until = now + self.config.answer_timeout_ms;
        self.report.flying = Some(Flying { id, until, what: Sent { snapshot, rest } });
        self.report_wanted = false;
        self.last_sent_at = now;
    }

    fn reported(&mut self, now: Millis, id: EffectId, result: Result<(), Obstacle>) {
        let Some(sent) = self.report.take(id) else { return };
        match result {
            Ok(()) => {
                self.report.succeed();
                self.report.not_before = now;
                self.last_sent = Some(sent);
            }
            Err(obstacle) => {
                self.report_wanted = true;
                let limits = self.backoff_limits();
                self.report.not_before =
                    self.report.backoff.fail(now, limits, obstacle.retry_after_ms, &mut self.rng);
            }
        }
    }

    // --- the serving worker

    fn worker_died(
        &mut self,
        now: Millis,
        worker: EffectId,
        death: Death,
        effects: &mut Vec<Effect>,
    ) {
        let Some(serving) = self.serving.as_mut().filter(|s| s.worker == worker) else { return };
        serving.up = false;
        if death == Death::Killed {
            return;
        }
        if now < serving.watch_until {
            serving.crashes += 1;
        }
        self.crashed_live(now, effects);
    }

    /// Whether the serving model keeps crashing soon after it came, and there is an answer to that.
    fn crash_loops(&self) -> bool {
        self.serving.as_ref().is_some_and(|serving| {
            serving.crashes >= self.config.crash_limit
                && self.ledger.current.as_ref() == Some(&serving.deployment)
                && (serving.fresh || self.ledger.previous.is_some())
        })
    }

    // --- files

    /// Once things have come to rest, deletes the files that the durable ledger does not name.
    fn collect(&mut self, effects: &mut Vec<Effect>) {
        let resting =
            matches!(self.step, Step::Settled) && !self.dirty() && self.restore_at.is_none();
        if resting && self.collected != Some(self.revision) {
            self.collected = Some(self.revision);
            effects.push(Effect::Collect { keep: self.ledger.blobs() });
        }
    }
}
