//! Requests of users on one device, and what its engine counts of them.

use std::f64::consts::TAU;

use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use slmops_agent_core::Counted;
use slmops_api::evidence::{Evidence, EvidenceCounts, Replay};
use slmops_api::gate::Metric;
use slmops_artifact::Digest;

use crate::catalog::mix;
use crate::spec::TrafficSpec;
use crate::time::{DAY, HOUR, MINUTE, Time};

/// For so long has the model that is there before the simulation been counted.
const HISTORY_MS: u64 = 2 * DAY;
/// Requests are drawn for at least so long at once, and for at most [`LONGEST_MS`].
const SHORTEST_MS: u64 = MINUTE;
const LONGEST_MS: u64 = 10 * MINUTE;
/// Answers of which none fails, by what else may be wrong with them.
const EMPTY_RATE: f64 = 0.002;
const TRUNCATED_RATE: f64 = 0.05;
const REPETITIVE_RATE: f64 = 0.01;
const REFUSAL_RATE: f64 = 0.02;
/// Answers that begin like JSON, and of these those that are none.
const JSON_RATE: f64 = 0.1;
const INVALID_RATE: f64 = 0.03;
/// Answers that are called good or bad, and of these bad ones.
const THUMBS_RATE: f64 = 0.05;
const DOWN_RATE: f64 = 0.2;
/// Prompts that are replayed on two versions, and how much one prompt's loss differs from another's: by
/// the file that is the same on all devices, and by the device.
const REPLAY_PROMPTS: u32 = 36;
const REPLAY_SPREAD_NATS: f64 = 0.2;
const REPLAY_OF_DEVICE_NATS: f64 = 0.01;
/// How unsure the model is of a typical token.
const ENTROPY_NATS: f64 = 1.5;
/// Tokens of an answer after its first.
const TOKENS: u64 = 20;
/// A typical time to first token, and per token, in milliseconds.
const FIRST_TOKEN_MS: f64 = 400.0;
const TOKEN_MS: f64 = 50.0;
/// How much of a load goes into times: they grow with this power of it.
const SLOWED_BY_LOAD: f64 = 0.2;
/// The highest share of requests that may fail.
const MOST: f64 = 0.95;

/// What a release does to a metric of the devices that run it, as a factor.
pub(crate) type Change = (Metric, f64);

/// One device's users.
pub(crate) struct Traffic {
    requests_per_ms: f64,
    error_rate: f64,
    first_token_ms: f64,
    token_ms: f64,
    daily_swing: f64,
    /// When the day is busiest, as a share of it: the same for every device.
    busiest: f64,
    rng: ChaCha8Rng,
    /// The engine's counters, since the agent started.
    counters: EvidenceCounts,
    until: Time,
    counted: Counted,
}

impl Traffic {
    /// The users of a device, drawn from its seed; `installed` has served them for a while.
    pub(crate) fn new(
        spec: &TrafficSpec,
        seed: u64,
        device: u32,
        installed: Option<(Digest, u64)>,
    ) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(mix(seed ^ (u64::from(device) << 24) ^ 0x7AFF));
        let busiest = mix(seed) as f64 / u64::MAX as f64;
        let mut spread = |of: f64| (spec.spread * of * normal(&mut rng)).exp();
        let mut traffic = Self {
            requests_per_ms: (spec.requests_per_hour * spread(1.0)).min(MAX_REQUESTS_PER_HOUR)
                / HOUR as f64,
            error_rate: (spec.error_rate * spread(1.0)).min(MOST),
            first_token_ms: FIRST_TOKEN_MS * spread(0.5),
            token_ms: TOKEN_MS * spread(0.5),
            daily_swing: spec.daily_swing,
            busiest,
            rng,
            counters: EvidenceCounts::default(),
            until: Time(0),
            counted: Counted::default(),
        };
        if let Some((manifest, weights_bytes)) = installed {
            // Whole days before the start: the time of day is that of the same clock.
            traffic.counted.update(Some(manifest), EvidenceCounts::default());
            traffic.serve(Time(HISTORY_MS), Some((None, weights_bytes)));
            traffic.counted.update(Some(manifest), traffic.counters);
        }
        traffic.restart(Time(0));
        traffic
    }

    /// The agent starts: its engine's counters begin at zero.
    pub(crate) fn restart(&mut self, now: Time) {
        self.counters = EvidenceCounts::default();
        self.counted = Counted::from(self.counted.evidence().cloned());
        self.until = now;
    }

    /// A worker ended unasked.
    pub(crate) fn crashed(&mut self) {
        self.counters.crashes += 1;
    }

    /// The prompts of a release (`seed` stands for its file) were replayed on it and on what serves.
    pub(crate) fn replayed(
        &mut self,
        manifest: Digest,
        before: Digest,
        change: Option<Change>,
        seed: u64,
    ) {
        let times = change.filter(|change| change.0 == Metric::Replay).map_or(1.0, |it| it.1);
        let mut of_file = ChaCha8Rng::seed_from_u64(mix(seed));
        let loss = |_| {
            let of_file = REPLAY_SPREAD_NATS * normal(&mut of_file);
            times.ln() + of_file + REPLAY_OF_DEVICE_NATS * normal(&mut self.rng)
        };
        let losses_nats = (0..REPLAY_PROMPTS).map(loss).collect();
        self.counted.replayed(manifest, Replay { before, losses_nats });
    }

    /// What a report says of the model that runs.
    pub(crate) fn evidence(&mut self, running: Option<Digest>) -> Option<Evidence> {
        self.counted.update(running, self.counters).cloned()
    }

    /// Whether there is too little time since the last count to bother.
    pub(crate) fn is_fresh(&self, now: Time) -> bool {
        now.0 < self.until.0 + SHORTEST_MS
    }

    /// Time passes. `by` is what the release in service changes and the size of its weights; absent
    /// where nothing serves.
    pub(crate) fn serve(&mut self, now: Time, by: Option<(Option<Change>, u64)>) {
        while self.until < now {
            let from = self.until;
            self.until = now.min(Time(from.0 + LONGEST_MS));
            let passed_ms = (self.until.0 - from.0) as f64;
            self.counters.serving_s += passed_ms / 1e3;
            let Some((change, weights_bytes)) = by else { continue };
            let time_of_day = (from.0 as f64 + passed_ms / 2.0) / DAY as f64;
            let load = 1.0 + self.daily_swing * (TAU * (time_of_day - self.busiest)).cos();
            self.count(passed_ms, load, change, weights_bytes);
        }
    }

    fn count(&mut self, passed_ms: f64, load: f64, change: Option<Change>, weights_bytes: u64) {
        let times = |metric| change.filter(|change| change.0 == metric).map_or(1.0, |it| it.1);
        let rng = &mut self.rng;
        let requests = poisson(rng, self.requests_per_ms * passed_ms * load);
        let error_rate = self.error_rate * load * times(Metric::Errors);
        let errors = binomial(rng, requests, error_rate);
        let answered = requests - errors;
        let peak = weights_bytes as f64 * times(Metric::Memory) * (1.0 + 0.02 * normal(rng)).abs();
        let counters = &mut self.counters;
        counters.peak_memory_bytes = peak as u64;
        counters.errors += errors;
        if answered == 0 {
            return;
        }
        counters.answered += answered;
        counters.empty += binomial(rng, answered, EMPTY_RATE * times(Metric::Empty));
        counters.truncated += binomial(rng, answered, TRUNCATED_RATE * times(Metric::Truncated));
        counters.repetitive += binomial(rng, answered, REPETITIVE_RATE * times(Metric::Repetition));
        counters.refusals += binomial(rng, answered, REFUSAL_RATE * times(Metric::Refusals));
        let json = binomial(rng, answered, JSON_RATE);
        counters.json += json;
        counters.invalid_json += binomial(rng, json, INVALID_RATE * times(Metric::InvalidJson));
        let thumbs = binomial(rng, answered, THUMBS_RATE);
        let down = binomial(rng, thumbs, DOWN_RATE * times(Metric::ThumbsDown));
        counters.thumbs_up += thumbs - down;
        counters.thumbs_down += down;
        counters.entropy_tokens += answered;
        counters.entropy_nats += answered as f64 * ENTROPY_NATS * times(Metric::Entropy);
        let number = answered as f64;
        let slowed = load.max(0.1).powf(SLOWED_BY_LOAD);
        let first_token_ms = self.first_token_ms * slowed * times(Metric::FirstToken);
        counters.first_tokens += answered;
        counters.first_token_ln_ms +=
            number * first_token_ms.ln() + number.sqrt() * 0.5 * normal(rng);
        let token_ms = self.token_ms * slowed * times(Metric::TokenTime);
        let tokens = answered * TOKENS;
        counters.decoded_tokens += tokens;
        counters.decode_ms += tokens as f64 * token_ms * (0.1 * normal(rng) / number.sqrt()).exp();
    }
}

/// The most requests of one device in an hour: so that a draw for [`LONGEST_MS`] does not underflow.
pub(crate) const MAX_REQUESTS_PER_HOUR: f64 = 1_000.0;

fn normal(rng: &mut ChaCha8Rng) -> f64 {
    // Box and Muller 1958.
    let (a, b): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - a).ln()).sqrt() * (TAU * b).cos()
}

/// Knuth 1969, 3.4.1; fit for means of some hundreds.
fn poisson(rng: &mut ChaCha8Rng, mean: f64) -> u64 {
    let (mut events, mut product, limit) = (0, rng.random::<f64>(), (-mean).exp());
    while product > limit {
        events += 1;
        product *= rng.random::<f64>();
    }
    events
}

fn binomial(rng: &mut ChaCha8Rng, of: u64, rate: f64) -> u64 {
    let rate = rate.clamp(0.0, MOST);
    (0..of).filter(|_| rng.random::<f64>() < rate).count() as u64
}
