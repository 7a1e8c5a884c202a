//! What the endpoint counts: numbers only, never text.
//! Counted here; told as [`family::Family`], which Prometheus' and OpenTelemetry's forms are made of.

mod families;
pub(crate) mod family;
pub(crate) mod otlp;
pub(crate) mod prometheus;

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use slmops_api::device::Telemetry;
use slmops_api::evidence::EvidenceCounts;

use self::family::{Attributes, Family, Histogram, Point, Reading};
use crate::host::{HostError, HostStatus};
use crate::shape::{Findings, Shape};
use crate::worker::{Finish, FinishReason, Piece, RequestError, WorkerError};

/// Upper bounds of the histograms of whole durations, in seconds.
const LONG_BUCKETS_S: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Upper bounds of the histogram of the time between tokens, in seconds.
const TOKEN_BUCKETS_S: [f64; 12] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0];
/// Upper bounds of the histograms of tokens, as OpenTelemetry's conventions advise.
const COUNT_BUCKETS: [f64; 10] =
    [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0];
/// Who answers, in OpenTelemetry's conventions.
const PROVIDER: &str = "slmops";
/// Operations that are told apart.
const OPERATIONS: usize = 3;
/// Models whose answers are told apart, at most; a device that is updated for years forgets the oldest.
const MODELS: usize = 8;
/// Requests whose time to first token makes the median.
const RECENT_REQUESTS: usize = 100;
/// Answers that can still be called good or bad.
const RECENT_ANSWERS: usize = 1_000;
/// Seconds over which the rate of generation is taken.
const RATE_WINDOW_S: u64 = 60;

/// What is asked of a model, by its name in OpenTelemetry's conventions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Operation {
    Chat,
    TextCompletion,
    Embeddings,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::TextCompletion => "text_completion",
            Self::Embeddings => "embeddings",
        }
    }
}

/// The histograms of one operation of one model.
struct Series {
    operation: Operation,
    model: String,
    since: SystemTime,
    first_token: Histogram,
    between_tokens: Histogram,
    whole: Histogram,
    /// The same of requests that failed, by what failed.
    failed: BTreeMap<&'static str, Histogram>,
    input_tokens: Histogram,
    output_tokens: Histogram,
}

impl Series {
    fn new(operation: Operation, model: &str) -> Self {
        Self {
            operation,
            model: model.to_owned(),
            since: SystemTime::now(),
            first_token: Histogram::new(&LONG_BUCKETS_S),
            between_tokens: Histogram::new(&TOKEN_BUCKETS_S),
            whole: Histogram::new(&LONG_BUCKETS_S),
            failed: BTreeMap::new(),
            input_tokens: Histogram::new(&COUNT_BUCKETS),
            output_tokens: Histogram::new(&COUNT_BUCKETS),
        }
    }

    /// Who it is, by the conventions' present names and by that which they had before.
    fn attributes(&self) -> Attributes {
        vec![
            ("gen_ai.operation.name", self.operation.name().to_owned()),
            ("gen_ai.provider.name", PROVIDER.to_owned()),
            ("gen_ai.system", PROVIDER.to_owned()),
            ("gen_ai.request.model", self.model.clone()),
        ]
    }

    fn point(
        &self,
        histogram: &Histogram,
        more: Option<(&'static str, &'static str)>,
    ) -> Option<Point> {
        let mut attributes = self.attributes();
        attributes.extend(more.map(|(name, value)| (name, value.to_owned())));
        let value = Reading::Histogram(histogram.clone());
        (histogram.count() > 0).then_some(Point { attributes, since: self.since, value })
    }
}

/// All counters of one host.
#[derive(Clone)]
pub(crate) struct Metrics(Arc<Mutex<Counters>>);

struct Counters {
    began: Instant,
    since: SystemTime,
    /// HTTP requests by endpoint and status.
    http: BTreeMap<(String, u16), u64>,
    answered: u64,
    failed: u64,
    cancelled: u64,
    refused: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    restored_tokens: u64,
    context_shifts: u64,
    drafted_tokens: u64,
    accepted_tokens: u64,
    generated_tokens: u64,
    worker_crashes: u64,
    sleeps: u64,
    wakes: u64,
    wake_s: f64,
    /// Pushes that a collector took, and those that it did not.
    pushes: Option<(u64, u64)>,
    /// What only gates ask for; the rest of it is above.
    quality: EvidenceCounts,
    waiting: u64,
    running: u64,
    /// By model and operation, the newest model's last.
    series: Vec<Series>,
    recent_first_token_ms: VecDeque<f64>,
    /// Ids of answers of the model that serves which nobody has called good or bad.
    recent_answers: VecDeque<String>,
    /// `(second since began, tokens generated in it)`, the last minute.
    rate: VecDeque<(u64, u64)>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Counters {
            began: Instant::now(),
            since: SystemTime::now(),
            http: BTreeMap::new(),
            answered: 0,
            failed: 0,
            cancelled: 0,
            refused: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            restored_tokens: 0,
            context_shifts: 0,
            drafted_tokens: 0,
            accepted_tokens: 0,
            generated_tokens: 0,
            worker_crashes: 0,
            sleeps: 0,
            wakes: 0,
            wake_s: 0.0,
            pushes: None,
            quality: EvidenceCounts::default(),
            waiting: 0,
            running: 0,
            series: Vec::new(),
            recent_first_token_ms: VecDeque::new(),
            recent_answers: VecDeque::new(),
            rate: VecDeque::new(),
        })))
    }
}

impl Counters {
    fn count_tokens(&mut self, tokens: u64) {
        self.generated_tokens += tokens;
        let second = self.began.elapsed().as_secs();
        match self.rate.back_mut() {
            Some((at, count)) if *at == second => *count += tokens,
            _ => self.rate.push_back((second, tokens)),
        }
        self.forget_old_rates(second);
    }

    fn forget_old_rates(&mut self, now_s: u64) {
        while self.rate.front().is_some_and(|(at, _)| at + RATE_WINDOW_S <= now_s) {
            self.rate.pop_front();
        }
    }

    /// Tokens per second, over the seconds of the last minute in which any were generated.
    fn tokens_per_s(&mut self) -> f64 {
        self.forget_old_rates(self.began.elapsed().as_secs());
        let tokens: u64 = self.rate.iter().map(|(_, count)| count).sum();
        if self.rate.is_empty() { 0.0 } else { tokens as f64 / self.rate.len() as f64 }
    }

    fn series(&mut self, operation: Operation, model: &str) -> &mut Series {
        let is_it = |it: &Series| it.operation == operation && it.model == model;
        let place = self.series.iter().position(is_it).unwrap_or_else(|| {
            if self.series.len() == OPERATIONS * MODELS {
                self.series.remove(0);
            }
            self.series.push(Series::new(operation, model));
            self.series.len() - 1
        });
        &mut self.series[place]
    }

    fn median_first_token_ms(&self) -> f64 {
        let mut sorted: Vec<f64> = self.recent_first_token_ms.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
    }
}

impl Metrics {
    fn with<T>(&self, act: impl FnOnce(&mut Counters) -> T) -> T {
        act(&mut self.0.lock().expect("no holder panics"))
    }

    /// A request for an answer of a model came.
    pub(crate) fn begin(&self, operation: Operation, model: String) -> GenerationMeter {
        self.with(|counters| counters.waiting += 1);
        GenerationMeter {
            metrics: self.clone(),
            operation,
            model,
            began: Instant::now(),
            stage: Stage::Waiting,
            last_token_at: None,
            counted_tokens: 0,
            shape: Shape::default(),
        }
    }

    pub(crate) fn count_crash(&self) {
        self.with(|counters| counters.worker_crashes += 1);
    }

    /// A model's memory was freed, since nobody asked it.
    pub(crate) fn count_sleep(&self) {
        self.with(|counters| counters.sleeps += 1);
    }

    /// A request loaded it again.
    pub(crate) fn count_wake(&self, took: Duration) {
        self.with(|counters| {
            counters.wakes += 1;
            counters.wake_s += took.as_secs_f64();
        });
    }

    /// A collector was told all of this, or could not be.
    pub(crate) fn count_push(&self, taken: bool) {
        self.with(|counters| {
            let pushes = counters.pushes.get_or_insert_default();
            match taken {
                true => pushes.0 += 1,
                false => pushes.1 += 1,
            }
        });
    }

    pub(crate) fn worker_crashes(&self) -> u64 {
        self.with(|counters| counters.worker_crashes)
    }

    /// An answer has this id, by which somebody may call it good or bad.
    pub(crate) fn remember_answer(&self, id: &str) {
        self.with(|counters| {
            if counters.recent_answers.len() == RECENT_ANSWERS {
                counters.recent_answers.pop_front();
            }
            counters.recent_answers.push_back(id.to_owned());
        });
    }

    /// Another model serves: what is said of answers so far is not about it.
    pub(crate) fn forget_answers(&self) {
        self.with(|counters| counters.recent_answers.clear());
    }

    /// Somebody called an answer good or bad. Whether that was counted: once for each recent answer.
    pub(crate) fn count_thumb(&self, id: &str, good: bool) -> bool {
        self.with(|counters| {
            let place = counters.recent_answers.iter().position(|known| known == id);
            let found = place.and_then(|place| counters.recent_answers.remove(place)).is_some();
            let quality = &mut counters.quality;
            match good {
                true => quality.thumbs_up += u64::from(found),
                false => quality.thumbs_down += u64::from(found),
            }
            found
        })
    }

    /// An embedding was made by `model` within `took`, or was not.
    pub(crate) fn count_embedding(
        &self,
        model: &str,
        took: Duration,
        prompt_tokens: Result<u32, &HostError>,
    ) {
        self.with(|counters| {
            let whole_s = took.as_secs_f64();
            match prompt_tokens {
                Ok(tokens) => {
                    counters.answered += 1;
                    counters.prompt_tokens += u64::from(tokens);
                    let series = counters.series(Operation::Embeddings, model);
                    series.whole.add(whole_s, 1);
                    series.input_tokens.add(f64::from(tokens), 1);
                }
                Err(error) => {
                    match error {
                        HostError::Worker(error) if !is_our_fault(error) => counters.refused += 1,
                        _ => counters.failed += 1,
                    }
                    let kind = match error {
                        HostError::Worker(error) => error_type(error),
                        HostError::NoModel | HostError::Restarting => "unavailable",
                    };
                    counters.fail(Operation::Embeddings, model, kind, whole_s);
                }
            }
        });
    }

    /// An HTTP request was answered. Endpoints are routes, never what a client wrote.
    pub(crate) fn count_http(&self, endpoint: &str, status: u16) {
        self.with(|counters| {
            *counters.http.entry((endpoint.to_owned(), status)).or_insert(0) += 1;
        });
    }

    pub(crate) fn telemetry(&self) -> Telemetry {
        self.with(|counters| Telemetry {
            requests: counters.answered,
            errors: counters.failed,
            prompt_tokens: counters.prompt_tokens,
            generated_tokens: counters.generated_tokens,
            worker_crashes: counters.worker_crashes,
            tokens_per_s: counters.tokens_per_s(),
            time_to_first_token_ms: counters.median_first_token_ms(),
            ..Telemetry::default()
        })
    }

    /// The peak of memory and the time of service are not known here and stay 0.
    pub(crate) fn evidence(&self) -> EvidenceCounts {
        self.with(|counters| EvidenceCounts {
            answered: counters.answered,
            errors: counters.failed,
            crashes: counters.worker_crashes,
            ..counters.quality
        })
    }

    /// All that is counted, with what is known of the host.
    pub(crate) fn families(&self, status: &HostStatus) -> Vec<Family> {
        self.with(|counters| {
            let mut families = counters.families();
            families.extend(families::of_host(status, counters.since));
            families
        })
    }
}

impl Counters {
    fn fail(&mut self, operation: Operation, model: &str, kind: &'static str, whole_s: f64) {
        let failed = &mut self.series(operation, model).failed;
        failed.entry(kind).or_insert_with(|| Histogram::new(&LONG_BUCKETS_S)).add(whole_s, 1);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waiting,
    Running,
    Over,
}

/// Counts one answer. Dropped before its end it counts as cancelled.
pub(crate) struct GenerationMeter {
    metrics: Metrics,
    operation: Operation,
    model: String,
    began: Instant,
    stage: Stage,
    last_token_at: Option<Instant>,
    /// Tokens of this answer that are counted already.
    counted_tokens: u64,
    shape: Shape,
}

impl GenerationMeter {
    fn leave_stage(&mut self, counters: &mut Counters, next: Stage) {
        match self.stage {
            Stage::Waiting => counters.waiting -= 1,
            Stage::Running => counters.running -= 1,
            Stage::Over => {}
        }
        if next == Stage::Running {
            counters.running += 1;
        }
        self.stage = next;
    }

    fn enter(&mut self, next: Stage, count: impl FnOnce(&mut Counters, Duration)) {
        if self.stage == Stage::Over {
            return;
        }
        let metrics = self.metrics.clone();
        let elapsed = self.began.elapsed();
        metrics.with(|counters| {
            self.leave_stage(counters, next);
            count(counters, elapsed);
        });
    }

    pub(crate) fn started(&mut self) {
        self.enter(Stage::Running, |_, _| {});
    }

    pub(crate) fn piece(&mut self, piece: &Piece) {
        let tokens = piece.tokens.len() as u64;
        self.counted_tokens += tokens;
        self.shape.piece(piece);
        let now = Instant::now();
        let last = self.last_token_at.replace(now);
        let first_ms = (now - self.began).as_secs_f64() * 1e3;
        self.metrics.with(|counters| {
            counters.count_tokens(tokens);
            let series = counters.series(self.operation, &self.model);
            match last {
                // A piece may be made of several tokens.
                Some(last) if tokens > 0 => {
                    let each_s = (now - last).as_secs_f64() / tokens as f64;
                    series.between_tokens.add(each_s, tokens);
                }
                Some(_) => {}
                None => {
                    series.first_token.add(first_ms / 1e3, 1);
                    counters.quality.first_tokens += 1;
                    // A microsecond at least, for the logarithm.
                    counters.quality.first_token_ln_ms += first_ms.max(1e-3).ln();
                    if counters.recent_first_token_ms.len() == RECENT_REQUESTS {
                        counters.recent_first_token_ms.pop_front();
                    }
                    counters.recent_first_token_ms.push_back(first_ms);
                }
            }
        });
    }

    pub(crate) fn finished(&mut self, finish: &Finish) {
        // The end token, and tokens of a stop string, are no part of any piece.
        let rest = u64::from(finish.completion_tokens).saturating_sub(self.counted_tokens);
        let wordless = self.counted_tokens == 0;
        let Findings { repetitive, refusal, json } = self.shape.findings();
        let (operation, model) = (self.operation, self.model.clone());
        self.enter(Stage::Over, |counters, elapsed| {
            counters.answered += 1;
            counters.quality.empty += u64::from(wordless);
            counters.quality.truncated += u64::from(finish.reason == FinishReason::Length);
            counters.quality.repetitive += u64::from(repetitive);
            counters.quality.refusals += u64::from(refusal);
            counters.quality.json += u64::from(json.is_some());
            counters.quality.invalid_json += u64::from(json == Some(false));
            counters.quality.entropy_tokens += u64::from(finish.entropy_tokens);
            counters.quality.entropy_nats += finish.entropy_nats;
            counters.quality.decoded_tokens +=
                u64::from(finish.completion_tokens.saturating_sub(1));
            counters.quality.decode_ms += finish.decode_ms;
            counters.count_tokens(rest);
            counters.prompt_tokens += u64::from(finish.prompt_tokens);
            counters.cached_tokens += u64::from(finish.cached_tokens);
            counters.restored_tokens += u64::from(finish.restored_tokens);
            counters.drafted_tokens += u64::from(finish.drafted_tokens);
            counters.accepted_tokens += u64::from(finish.accepted_tokens);
            counters.context_shifts += u64::from(finish.context_shifts);
            let series = counters.series(operation, &model);
            series.whole.add(elapsed.as_secs_f64(), 1);
            series.input_tokens.add(f64::from(finish.prompt_tokens), 1);
            series.output_tokens.add(f64::from(finish.completion_tokens), 1);
        });
    }

    pub(crate) fn fail(&mut self, error: &WorkerError) {
        let ours = is_our_fault(error);
        let (operation, model) = (self.operation, self.model.clone());
        self.enter(Stage::Over, |counters, elapsed| {
            match ours {
                true => counters.failed += 1,
                false => counters.refused += 1,
            }
            counters.fail(operation, &model, error_type(error), elapsed.as_secs_f64());
        });
    }
}

impl Drop for GenerationMeter {
    fn drop(&mut self) {
        self.enter(Stage::Over, |counters, _| counters.cancelled += 1);
    }
}

/// Whether the one who asked could not have known better.
pub(crate) fn is_our_fault(error: &WorkerError) -> bool {
    use crate::chat::TemplateError;
    !matches!(
        error,
        WorkerError::Template(TemplateError::Refused { .. })
            | WorkerError::Request(
                RequestError::Invalid { .. }
                    | RequestError::ContextLength { .. }
                    | RequestError::QueueFull { .. }
            )
    )
}

/// What failed, as OpenTelemetry's `error.type`.
fn error_type(error: &WorkerError) -> &'static str {
    match error {
        WorkerError::Request(RequestError::ContextLength { .. }) => "context_length_exceeded",
        WorkerError::Request(RequestError::QueueFull { .. }) => "queue_full",
        WorkerError::Request(RequestError::Invalid { .. }) | WorkerError::Template(_) => {
            "invalid_request"
        }
        WorkerError::Died { .. } => "worker_died",
        _ => "_OTHER",
    }
}
