//! Continuous batching: every step decodes one token of each answer under way, and beside them a
//! bounded piece of the prompts that wait, so that a long prompt never stalls the others.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::outbox::Outbox;
use super::protocol::{
    AdapterUse, Embedding, Event, Finish, FinishReason, GenerateRequest, Piece, RequestError, Score,
};
use super::sampler::{Sampler, entropy, log_sum_exp, logprob, most_probable};
use super::text::TextAssembler;
use crate::constraint::Guide;
use crate::llama::{Adapter, Batch, Context, EngineError, Model, Token};

/// Prompt tokens in one step beside answers under way.
const PROMPT_TOKENS_BESIDE_ANSWERS: usize = 64;
/// Tokens that copying a sequence must save before it is done. It moves the whole memory of one, which takes
/// as long as computing a few tokens, and more for a longer context: one in so many.
const COPY_SAVES_TOKENS: usize = 32;
const CONTEXT_TOKENS_COPIED_PER_TOKEN: usize = 128;
/// Steps in which one set of adapters is applied before another one that is waited for gets its turn: the
/// engine applies one set at a time, and plans its computation anew for another.
const TURN_STEPS: u32 = 8;

/// A request whose prompt is tokens, ready for a sequence.
pub(super) struct Task {
    pub(super) id: u64,
    /// The prompt; for a score also what is scored.
    pub(super) tokens: Vec<Token>,
    pub(super) work: Work,
    /// The adapters that are applied.
    pub(super) adapters: Vec<AdapterUse>,
    pub(super) arrived: Instant,
}

/// Loaded adapters, and how strongly each is applied.
#[derive(Clone, Default)]
struct AdapterSet(Vec<(Arc<Adapter>, f32)>);

impl AdapterSet {
    fn has(&self, adapter: &Arc<Adapter>) -> bool {
        self.0.iter().any(|(it, _)| Arc::ptr_eq(it, adapter))
    }
}

impl PartialEq for AdapterSet {
    fn eq(&self, other: &Self) -> bool {
        let is_in = |(adapter, scale): &(Arc<Adapter>, f32)| {
            other.0.iter().any(|(it, its)| Arc::ptr_eq(it, adapter) && its == scale)
        };
        self.0.len() == other.0.len() && self.0.iter().all(is_in)
    }
}

/// What is done with the tokens.
pub(super) enum Work {
    Generate(Box<Generating>),
    Score(Scoring),
    Embed(Embedding64),
}

/// The entropy of one token in so many is taken: one pass over the vocabulary, which decoding a token
/// outweighs a hundred times.
const ENTROPY_EVERY: u32 = 8;

/// An answer under way.
pub(super) struct Generating {
    request_max_tokens: Option<u32>,
    logprobs: Option<u32>,
    sampler: Sampler,
    guide: Option<Guide>,
    text: TextAssembler,
    /// The prompt, where the answer begins with it; taken when it was handed out.
    echo: Option<Piece>,
    /// Whether nothing of its prompt comes from the cache.
    fresh: bool,
    /// Whether the token that ends the answer is among its log-probabilities.
    shows_end: bool,
    prompt_tokens: usize,
    generated: u32,
    first_token_at: Option<Instant>,
    entropy_tokens: u32,
    entropy_nats: f64,
}

impl Generating {
    pub(super) fn new(
        request: GenerateRequest,
        guide: Option<Guide>,
        prompt_tokens: usize,
        echo: Option<Piece>,
    ) -> Self {
        Self {
            request_max_tokens: request.max_tokens,
            logprobs: request.logprobs,
            sampler: Sampler::new(request.sampling),
            guide,
            text: TextAssembler::new(request.stop),
            echo,
            fresh: request.fresh,
            shows_end: request.echo,
            prompt_tokens,
            generated: 0,
            first_token_at: None,
            entropy_tokens: 0,
            entropy_nats: 0.0,
        }
    }

    /// Its end, and what it cost.
    fn finish(&self, reason: FinishReason, first_token_at: Instant, stage: &Stage<'_>) -> Finish {
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Finish {
            reason,
            prompt_tokens: number(self.prompt_tokens),
            cached_tokens: number(stage.cached_tokens),
            completion_tokens: self.generated,
            queue_ms: (stage.started - stage.arrived).as_secs_f64() * 1e3,
            prompt_ms: (first_token_at - stage.started).as_secs_f64() * 1e3,
            decode_ms: first_token_at.elapsed().as_secs_f64() * 1e3,
            entropy_tokens: self.entropy_tokens,
            entropy_nats: self.entropy_nats,
        }
    }

    /// Whether the log-probability of the token after `place` of the prompt is wanted.
    fn scores(&self, place: usize) -> bool {
        self.echo.is_some() && self.logprobs.is_some() && place + 1 < self.prompt_tokens
    }
}

/// A score under way.
pub(super) struct Scoring {
    /// Index of the first token that is scored; at least 1.
    pub(super) from: usize,
    pub(super) score: Score,
}

/// An embedding under way: the sum over the tokens so far.
#[derive(Default)]
pub(super) struct Embedding64 {
    sum: Vec<f64>,
}

/// One sequence of the engine.
#[derive(Default)]
struct Slot {
    /// The tokens in the engine's memory.
    held: Vec<Token>,
    /// What was applied when they were computed.
    adapters: AdapterSet,
    running: Option<Running>,
}

struct Running {
    task: Task,
    started: Instant,
    cached_tokens: usize,
}

/// An output to read after a batch.
struct Output {
    slot: usize,
    /// Index in the batch.
    index: usize,
    /// Index of the token in its sequence.
    place: usize,
}

/// Decides what is computed next, and computes it.
pub(super) struct Scheduler {
    context: Context,
    model: Arc<Model>,
    context_tokens: usize,
    batch_tokens: usize,
    queue_limit: usize,
    slots: Vec<Slot>,
    queue: VecDeque<(Task, AdapterSet)>,
    adapters: HashMap<u32, Arc<Adapter>>,
    /// What the engine applies now, since how many steps, and the sequence for which it began.
    applied: AdapterSet,
    turn_steps: u32,
    turn_of: usize,
    batch: Batch,
    outbox: Outbox,
    /// Tokens that copying a sequence must save.
    copy_saves: usize,
}

impl Scheduler {
    pub(super) fn new(
        context: Context,
        context_tokens: u32,
        queue_limit: u32,
        outbox: Outbox,
    ) -> Self {
        let slots = (0..context.sequences()).map(|_| Slot::default()).collect();
        Self {
            model: Arc::clone(context.model()),
            context_tokens: context_tokens as usize,
            batch_tokens: context.batch_tokens() as usize,
            queue_limit: queue_limit as usize,
            slots,
            queue: VecDeque::new(),
            adapters: HashMap::new(),
            applied: AdapterSet::default(),
            turn_steps: 0,
            turn_of: 0,
            batch: Batch::new(),
            copy_saves: match context.model().forgets_parts() {
                true => {
                    COPY_SAVES_TOKENS + context_tokens as usize / CONTEXT_TOKENS_COPIED_PER_TOKEN
                }
                // A copy could not be cut to what is shared.
                false => usize::MAX / 2,
            },
            context,
            outbox,
        }
    }

    /// Whether there is nothing to compute.
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.slots.iter().all(|slot| slot.running.is_none())
    }

    /// Takes a request, or refuses it.
    pub(super) fn submit(&mut self, task: Task) {
        self.take(task);
        self.outbox.send();
    }

    fn take(&mut self, task: Task) {
        let free = self.slots.iter().filter(|slot| slot.running.is_none()).count();
        if self.queue.len() >= self.queue_limit + free {
            let limit = u32::try_from(self.queue_limit).unwrap_or(u32::MAX);
            self.fail(task.id, RequestError::QueueFull { limit });
            return;
        }
        let (fits, max_tokens, prompt_tokens) = match &task.work {
            Work::Generate(generating) => {
                let wanted = generating.request_max_tokens.unwrap_or(1) as usize;
                let fits = task.tokens.len() + wanted <= self.context_tokens;
                (fits, generating.request_max_tokens, task.tokens.len())
            }
            Work::Score(scoring) => {
                let scored = task.tokens.len() - scoring.from;
                (task.tokens.len() <= self.context_tokens, u32::try_from(scored).ok(), scoring.from)
            }
            Work::Embed(_) => {
                (task.tokens.len() <= self.context_tokens, Some(0), task.tokens.len())
            }
        };
        if !fits {
            let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
            let error = RequestError::ContextLength {
                prompt_tokens: number(prompt_tokens),
                max_tokens,
                context_tokens: number(self.context_tokens),
            };
            self.fail(task.id, error);
            return;
        }
        let mut adapters = AdapterSet::default();
        for AdapterUse { id, scale } in &task.adapters {
            let Some(adapter) = self.adapters.get(id) else {
                let message = format!("adapter {id} is not loaded any more");
                let error = RequestError::Invalid { parameter: "lora".to_owned(), message };
                self.fail(task.id, error);
                return;
            };
            adapters.0.push((Arc::clone(adapter), *scale));
        }
        self.queue.push_back((task, adapters));
        self.admit();
    }

    /// Loads an adapter under a number that no other one has.
    pub(super) fn load_adapter(&mut self, id: u32, path: &Path) -> Result<(), EngineError> {
        let adapter = Adapter::load(&self.model, path)?;
        self.adapters.insert(id, Arc::new(adapter));
        Ok(())
    }

    /// Takes no more requests with an adapter; its memory is free once none runs that has it.
    pub(super) fn unload_adapter(&mut self, id: u32) {
        let Some(adapter) = self.adapters.remove(&id) else { return };
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.running.is_none() && slot.adapters.has(&adapter) {
                // What was computed with it is of no more use.
                self.context.truncate(index as u32, 0);
                slot.held.clear();
                slot.adapters = AdapterSet::default();
            }
        }
        let needed = self.slots.iter().any(|slot| slot.adapters.has(&adapter));
        if self.applied.has(&adapter) && !needed {
            self.apply(AdapterSet::default());
        }
    }

    fn apply(&mut self, adapters: AdapterSet) {
        self.context.set_adapters(&adapters.0);
        self.applied = adapters;
        self.turn_steps = 0;
    }

    /// Decides which set of adapters the next step computes with: the sets that are waited for take turns.
    fn take_turns(&mut self) {
        let runs = |slot: &Slot| slot.running.is_some();
        let goes_on = self.slots.iter().any(|slot| runs(slot) && slot.adapters == self.applied);
        if !goes_on || self.turn_steps >= TURN_STEPS {
            let count = self.slots.len();
            let next = (1..=count).map(|step| (self.turn_of + step) % count).find(|index| {
                let slot = &self.slots[*index];
                runs(slot) && slot.adapters != self.applied
            });
            if let Some(index) = next {
                self.turn_of = index;
                self.apply(self.slots[index].adapters.clone());
            }
        }
        self.turn_steps = self.turn_steps.saturating_add(1);
    }

    /// Forgets a request; its sequence is free at once.
    pub(super) fn cancel(&mut self, id: u64) {
        self.queue.retain(|(task, _)| task.id != id);
        for slot in &mut self.slots {
            if slot.running.as_ref().is_some_and(|running| running.task.id == id) {
                slot.running = None;
            }
        }
        self.admit();
        self.outbox.send();
    }

    /// Gives free sequences to waiting requests: to each the one that already holds the most of
    /// its prompt.
    fn admit(&mut self) {
        while !self.queue.is_empty() {
            let (next, adapters) = &self.queue[0];
            let shared = |slot: &Slot| match slot.adapters == *adapters {
                true => {
                    let pairs = slot.held.iter().zip(&next.tokens);
                    pairs.take_while(|(held, token)| held == token).count()
                }
                false => 0,
            };
            let free = self.slots.iter().enumerate().filter(|(_, slot)| slot.running.is_none());
            // Among equals the one that holds least, then the first: sequences side by side are
            // computed together.
            let best = free.max_by_key(|(index, slot)| {
                (shared(slot), std::cmp::Reverse((slot.held.len(), *index)))
            });
            let Some((index, slot)) = best else { return };
            // Outputs come only from tokens that are computed now.
            let needed = match &next.work {
                Work::Generate(generating) if generating.fresh || generating.scores(0) => 0,
                Work::Generate(_) => next.tokens.len() - 1,
                Work::Score(scoring) => scoring.from - 1,
                Work::Embed(_) => 0,
            };
            let mut cached = shared(slot).min(needed);
            // Any other sequence, also one that is under way, may hold more of it.
            let others = self.slots.iter().enumerate().filter(|(at, _)| *at != index);
            let richest = others.map(|(at, slot)| (shared(slot).min(needed), at)).max();
            let (task, adapters) = self.queue.pop_front().expect("it is not empty");
            if let Some((held, from)) =
                richest.filter(|(held, _)| *held >= cached + self.copy_saves)
            {
                self.context.copy(from as u32, index as u32);
                self.slots[index].held = self.slots[from].held.clone();
                cached = held;
            }
            let slot = &mut self.slots[index];
            if cached < slot.held.len() {
                let place = u32::try_from(cached).expect("a context is shorter");
                if !self.context.truncate(index as u32, place) {
                    self.context.truncate(index as u32, 0);
                    cached = 0;
                }
                slot.held.truncate(cached);
            }
            slot.adapters = adapters;
            self.outbox.push(&Event::Started { id: task.id });
            slot.running = Some(Running { task, started: Instant::now(), cached_tokens: cached });
        }
    }

    /// Computes one batch and hands out what comes of it.
    pub(super) fn step(&mut self) {
        self.admit();
        self.take_turns();
        let (outputs, fed) = self.plan();
        if !self.batch.is_empty() {
            match self.context.decode(&mut self.batch) {
                Ok(()) => {
                    for (slot, count) in fed {
                        self.advance(slot, count);
                    }
                    for output in outputs {
                        self.read(&output);
                    }
                }
                Err(error) => {
                    for (slot, _) in fed {
                        self.break_off(slot, &error.to_string());
                    }
                }
            }
        }
        self.step_embeddings();
        self.admit();
        self.outbox.send();
    }

    /// Fills the batch: one token of each answer under way, then prompts in equal parts.
    fn plan(&mut self) -> (Vec<Output>, Vec<(usize, usize)>) {
        self.batch.clear();
        let mut outputs = Vec::new();
        let mut fed = Vec::new();
        let mut output_room = self.context.output_limit();
        let applied = self.applied.clone();
        let left = |slot: &Slot| match &slot.running {
            Some(Running { task, .. })
                if !matches!(task.work, Work::Embed(_)) && slot.adapters == applied =>
            {
                task.tokens.len() - slot.held.len()
            }
            _ => 0,
        };
        let answering = |slot: &Slot| {
            let generates = slot
                .running
                .as_ref()
                .is_some_and(|running| matches!(running.task.work, Work::Generate(_)));
            generates && left(slot) == 1
        };
        for index in 0..self.slots.len() {
            if answering(&self.slots[index]) {
                self.feed(index, 1, &mut output_room, &mut outputs, &mut fed);
            }
        }
        let mut room = self.batch_tokens - self.batch.len();
        // A prompt comes in pieces beside answers, and where the cores may be busy: a piece is the
        // least time after which something else can be done.
        if !self.batch.is_empty() || self.context.is_crowded() {
            room = room.min(PROMPT_TOKENS_BESIDE_ANSWERS);
        }
        let mut waiting: Vec<usize> = (0..self.slots.len())
            .filter(|index| {
                let slot = &self.slots[*index];
                left(slot) > 0 && !answering(slot)
            })
            .collect();
        // The shortest first: what it leaves of its part goes to the longer ones.
        waiting.sort_by_key(|index| left(&self.slots[*index]));
        for (done, index) in waiting.iter().enumerate() {
            let part = room.div_ceil(waiting.len() - done);
            let count = left(&self.slots[*index]).min(part);
            room -= self.feed(*index, count, &mut output_room, &mut outputs, &mut fed);
        }
        (outputs, fed)
    }

    /// Puts up to `count` next tokens of a sequence into the batch; returns how many.
    fn feed(
        &mut self,
        index: usize,
        count: usize,
        output_room: &mut usize,
        outputs: &mut Vec<Output>,
        fed: &mut Vec<(usize, usize)>,
    ) -> usize {
        let slot = &self.slots[index];
        let Some(running) = &slot.running else { return 0 };
        let tokens = &running.task.tokens;
        let begin = slot.held.len();
        let mut taken = 0;
        for place in begin..begin + count {
            let wanted = match &running.task.work {
                Work::Generate(generating) => place + 1 == tokens.len() || generating.scores(place),
                // The logits after a token speak of the next one.
                Work::Score(scoring) => place + 1 >= scoring.from && place + 1 < tokens.len(),
                Work::Embed(_) => false,
            };
            if wanted && *output_room == 0 {
                break;
            }
            *output_room -= usize::from(wanted);
            let position = u32::try_from(place).expect("a context is shorter");
            let at = self.batch.push(tokens[place], position, index as u32, wanted);
            if wanted {
                outputs.push(Output { slot: index, index: at, place });
            }
            taken += 1;
        }
        if taken > 0 {
            fed.push((index, taken));
        }
        taken
    }

    /// Notes that the next `count` tokens of a sequence are in the engine's memory now.
    fn advance(&mut self, index: usize, count: usize) {
        let slot = &mut self.slots[index];
        if let Some(running) = &slot.running {
            let begin = slot.held.len();
            slot.held.extend_from_slice(&running.task.tokens[begin..begin + count]);
        }
    }

    /// Ends a request whose batch failed, and forgets its sequence: a part of the batch may be in it.
    fn break_off(&mut self, index: usize, message: &str) {
        self.context.truncate(index as u32, 0);
        let slot = &mut self.slots[index];
        slot.held.clear();
        if let Some(running) = slot.running.take() {
            self.fail(running.task.id, RequestError::Engine { message: message.to_owned() });
        }
    }

    fn fail(&mut self, id: u64, error: RequestError) {
        self.outbox.push(&Event::Failed { id, error });
    }

    /// Reads one output of the batch.
    fn read(&mut self, output: &Output) {
        let Some(logits) = self.context.logits(output.index) else { return };
        let slot = &mut self.slots[output.slot];
        let Some(running) = &mut slot.running else { return };
        let id = running.task.id;
        let outcome = match &mut running.task.work {
            Work::Generate(generating) if generating.scores(output.place) => {
                let place = output.place + 1;
                let (token, top) = (running.task.tokens[place], generating.logprobs);
                let mut entry = logprob(&self.model, logits, token, top.unwrap_or(0));
                let known = entry.logprob.is_some_and(f64::is_finite);
                if let Some(told) =
                    generating.echo.as_mut().and_then(|it| it.logprobs.get_mut(place))
                {
                    std::mem::swap(&mut entry.bytes, &mut told.bytes);
                    *told = entry;
                }
                if known { Outcome::GoesOn } else { Outcome::NoNumbers }
            }
            Work::Generate(generating) => {
                if let Some(mut piece) = generating.echo.take() {
                    if generating.logprobs.is_none() {
                        piece.logprobs.clear();
                    }
                    self.outbox.push(&Event::Echo { id, piece });
                }
                let tokens = &mut running.task.tokens;
                let stage = Stage {
                    model: &self.model,
                    context_tokens: self.context_tokens,
                    started: running.started,
                    arrived: running.task.arrived,
                    cached_tokens: running.cached_tokens,
                };
                next_token(generating, tokens, logits, &stage, |piece| {
                    self.outbox.push(&Event::Piece { id, piece });
                })
            }
            Work::Score(scoring) => {
                let next = running.task.tokens[output.place + 1];
                let logprob = f64::from(logits[next as usize]) - log_sum_exp(logits);
                scoring.score.tokens.push(next);
                scoring.score.logprobs.push(logprob);
                scoring.score.greedy.push(most_probable(logits) == Some(next));
                let complete = output.place + 2 == running.task.tokens.len();
                match (logprob.is_finite(), complete) {
                    (false, _) => Outcome::NoNumbers,
                    (true, true) => {
                        Outcome::Done(Event::Score { id, score: scoring.score.clone() })
                    }
                    (true, false) => Outcome::GoesOn,
                }
            }
            Work::Embed(_) => Outcome::GoesOn,
        };
        match outcome {
            Outcome::GoesOn => {}
            Outcome::Finished(finish) => {
                slot.running = None;
                self.outbox.push(&Event::Finished { id, finish });
            }
            Outcome::Done(event) => {
                slot.running = None;
                self.outbox.push(&event);
            }
            Outcome::Failed(error) => {
                slot.running = None;
                self.fail(id, error);
            }
            Outcome::NoNumbers => {
                self.break_off(
                    output.slot,
                    "its output is not a number: the model's weights are damaged",
                );
            }
        }
    }

    /// Computes one batch of the first embedding that waits.
    ///
    /// The embedding is the mean of the last layer's output over all tokens, scaled to length 1.
    fn step_embeddings(&mut self) {
        let embeds = |slot: &Slot| {
            let is_it = |running: &Running| matches!(running.task.work, Work::Embed(_));
            slot.running.as_ref().is_some_and(is_it) && slot.adapters == self.applied
        };
        let Some(index) = self.slots.iter().position(embeds) else { return };
        let slot = &self.slots[index];
        let running = slot.running.as_ref().expect("it was found by what runs");
        let begin = slot.held.len();
        let end = running.task.tokens.len().min(begin + self.context.output_limit());
        self.batch.clear();
        for place in begin..end {
            let position = u32::try_from(place).expect("a context is shorter");
            self.batch.push(running.task.tokens[place], position, index as u32, true);
        }
        self.context.set_embeddings(true);
        let decoded = self.context.decode(&mut self.batch);
        if let Err(error) = decoded {
            self.context.set_embeddings(false);
            self.break_off(index, &error.to_string());
            return;
        }
        self.advance(index, end - begin);
        let slot = &mut self.slots[index];
        let running = slot.running.as_mut().expect("it runs");
        let Work::Embed(embedding) = &mut running.task.work else { return };
        for at in 0..end - begin {
            let row = self.context.embedding(at).unwrap_or_default();
            embedding.sum.resize(row.len().max(embedding.sum.len()), 0.0);
            for (sum, value) in embedding.sum.iter_mut().zip(row) {
                *sum += f64::from(*value);
            }
        }
        self.context.set_embeddings(false);
        if end < running.task.tokens.len() {
            return;
        }
        let length = embedding.sum.iter().map(|value| value * value).sum::<f64>().sqrt();
        if !length.is_finite() || length == 0.0 {
            self.break_off(index, "its output is not a number: the model's weights are damaged");
            return;
        }
        let values = embedding.sum.iter().map(|value| (value / length) as f32).collect();
        let id = running.task.id;
        let prompt_tokens = u32::try_from(end).unwrap_or(u32::MAX);
        slot.running = None;
        self.outbox.push(&Event::Embedding { id, embedding: Embedding { values, prompt_tokens } });
    }
}

enum Outcome {
    GoesOn,
    Finished(Finish),
    Done(Event),
    Failed(RequestError),
    NoNumbers,
}

/// What surrounds an answer under way.
struct Stage<'a> {
    model: &'a Model,
    context_tokens: usize,
    started: Instant,
    arrived: Instant,
    cached_tokens: usize,
}

/// Chooses the next token of an answer, appends it to `tokens` and hands out its text.
fn next_token(
    generating: &mut Generating,
    tokens: &mut Vec<Token>,
    logits: &[f32],
    stage: &Stage<'_>,
    mut emit: impl FnMut(Piece),
) -> Outcome {
    let first_token_at = *generating.first_token_at.get_or_insert_with(Instant::now);
    if generating.request_max_tokens == Some(0) {
        return Outcome::Finished(generating.finish(FinishReason::Length, first_token_at, stage));
    }
    let token = match choose(generating, tokens, logits, stage.model) {
        Ok(Some(token)) => token,
        Ok(None) => return Outcome::NoNumbers,
        Err(error) => return Outcome::Failed(error),
    };
    if generating.generated.is_multiple_of(ENTROPY_EVERY) {
        generating.entropy_tokens += 1;
        generating.entropy_nats += entropy(logits);
    }
    generating.generated += 1;
    let mut reason = None;
    let ends = stage.model.ends(token);
    let entry = generating
        .logprobs
        .filter(|_| !ends || generating.shows_end)
        .map(|top| logprob(stage.model, logits, token, top));
    if ends {
        reason = Some(FinishReason::Stop);
        if entry.is_some() {
            emit(generating.text.push(token, &[], entry).0);
        }
    } else {
        let bytes = stage.model.piece(token, false);
        let (piece, stopped) = generating.text.push(token, &bytes, entry);
        emit(piece);
        tokens.push(token);
        let complete = match generating.guide.as_mut().map(|guide| guide.take(token)).transpose() {
            Ok(complete) => complete.unwrap_or(false),
            Err(message) => return Outcome::Failed(misguided(generating, message)),
        };
        if stopped || complete {
            reason = Some(FinishReason::Stop);
        } else if generating.request_max_tokens.is_some_and(|max| generating.generated >= max)
            || tokens.len() >= stage.context_tokens
        {
            reason = Some(FinishReason::Length);
        }
        if stopped {
            generating.text = TextAssembler::new(Vec::new());
        }
    }
    let Some(reason) = reason else { return Outcome::GoesOn };
    let rest = generating.text.finish();
    if rest != Piece::default() {
        emit(rest);
    }
    Outcome::Finished(generating.finish(reason, first_token_at, stage))
}

/// Chooses the next token: the sampler's own choice where the guide allows it, which needs no look
/// at the whole vocabulary; else one among those that are allowed. Either way each token has its
/// share of what is allowed.
fn choose(
    generating: &mut Generating,
    tokens: &[Token],
    logits: &[f32],
    model: &Model,
) -> Result<Option<Token>, RequestError> {
    let Some(mut token) = generating.sampler.propose(logits, tokens) else { return Ok(None) };
    if let Some(guide) = &mut generating.guide {
        let allowed = if model.ends(token) { guide.may_end() } else { guide.allows(token) };
        let mask = match allowed {
            Ok(true) => Ok(None),
            Ok(false) => guide.mask().map(Some),
            Err(message) => Err(message),
        };
        match mask {
            Ok(None) => {}
            Ok(Some(mask)) => match generating.sampler.propose_within(&mask) {
                Some(allowed) => token = allowed,
                None => return Ok(None),
            },
            Err(message) => return Err(misguided(generating, message)),
        }
    }
    generating.sampler.choose(token);
    Ok(Some(token))
}

/// A guide that cannot go on.
fn misguided(generating: &Generating, message: String) -> RequestError {
    let parameter = generating.guide.as_ref().map_or("constraint", |guide| guide.parameter());
    RequestError::Invalid { parameter: parameter.to_owned(), message }
}
