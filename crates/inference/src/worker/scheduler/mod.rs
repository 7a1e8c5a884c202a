//! Continuous batching: every step decodes one token of each answer under way, and beside them a
//! bounded piece of the prompts that wait, so that a long prompt never stalls the others.

mod admission;
mod answer;
mod drafting;
mod embedding;
mod saving;
mod shift;
mod turns;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::outbox::Outbox;
use super::protocol::{AdapterUse, Event, Finish, RequestError, Score};
use super::sampler::{log_sum_exp, logprob, most_probable};
use crate::llama::{Adapter, Batch, Context, Model, Token};
use admission::{Running, Slot};
pub(super) use answer::Generating;
use answer::{Stage, next_token};
pub(super) use drafting::{DraftModel, Drafter, same_vocabulary};
pub(super) use embedding::Embedding64;
pub(super) use saving::Saving;
use turns::AdapterSet;

/// Prompt tokens in one step beside answers under way.
const PROMPT_TOKENS_BESIDE_ANSWERS: usize = 64;
/// Tokens that copying a sequence must save before it is done. It moves the whole memory of one, which takes
/// as long as computing a few tokens, and more for a longer context: one in so many.
const COPY_SAVES_TOKENS: usize = 32;
const CONTEXT_TOKENS_COPIED_PER_TOKEN: usize = 128;

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

/// What is done with the tokens.
pub(super) enum Work {
    Generate(Box<Generating>),
    Score(Scoring),
    Embed(Embedding64),
}

/// A score under way.
pub(super) struct Scoring {
    /// Index of the first token that is scored; at least 1.
    pub(super) from: usize,
    pub(super) score: Score,
}

/// An output to read after a batch.
struct Output {
    slot: usize,
    /// Index in the batch.
    index: usize,
    /// Index of the token in its sequence.
    place: usize,
    /// The token, where it is a guess.
    guess: Option<Token>,
}

/// Decides what is computed next, and computes it.
pub(super) struct Scheduler {
    context: Context,
    model: Arc<Model>,
    context_tokens: usize,
    batch_tokens: usize,
    queue_limit: usize,
    /// Whether answers go on past the end of the context.
    shifts: bool,
    /// The sequences on the disk, where there are any.
    saving: Option<Saving>,
    /// Where guesses come from, if there are any.
    drafter: Option<Drafter>,
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
        shifts: bool,
        saving: Option<Saving>,
        drafter: Option<Drafter>,
        outbox: Outbox,
    ) -> Self {
        let slots = (0..context.sequences()).map(|_| Slot::default()).collect();
        Self {
            model: Arc::clone(context.model()),
            context_tokens: context_tokens as usize,
            batch_tokens: context.batch_tokens() as usize,
            queue_limit: queue_limit as usize,
            shifts,
            saving,
            drafter,
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

    fn take(&mut self, mut task: Task) {
        let free = self.slots.iter().filter(|slot| slot.running.is_none()).count();
        if self.queue.len() >= self.queue_limit + free {
            let limit = u32::try_from(self.queue_limit).unwrap_or(u32::MAX);
            self.fail(task.id, RequestError::QueueFull { limit });
            return;
        }
        self.choose_kept(&mut task);
        let (fits, max_tokens, prompt_tokens) = match &task.work {
            Work::Generate(generating) => {
                let wanted = match generating.keep {
                    Some(_) => generating.request_max_tokens.map_or(1, |max| max.min(1)) as usize,
                    None => generating.request_max_tokens.unwrap_or(1) as usize,
                };
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

    /// Computes one batch and hands out what comes of it.
    pub(super) fn step(&mut self) {
        self.admit();
        self.take_turns();
        self.shift_full();
        let (outputs, fed) = self.plan();
        if !self.batch.is_empty() {
            match self.context.decode(&mut self.batch) {
                Ok(()) => {
                    for (slot, count) in fed {
                        self.advance(slot, count);
                    }
                    for output in &outputs {
                        if self.holds(output) {
                            self.read(output);
                        }
                    }
                    self.settle_drafts(&outputs);
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
        self.save_if_due();
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
        let speaking: Vec<usize> =
            (0..self.slots.len()).filter(|index| answering(&self.slots[*index])).collect();
        let guesses = self.draft(&speaking);
        for (index, guesses) in speaking.iter().zip(&guesses) {
            if self.feed(*index, 1, &mut output_room, &mut outputs, &mut fed) == 1 {
                self.feed_draft(*index, guesses, &mut output_room, &mut outputs);
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
                outputs.push(Output { slot: index, index: at, place, guess: None });
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
        slot.keep_first(0);
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
                    restored_tokens: running.restored_tokens,
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
}

enum Outcome {
    GoesOn,
    Finished(Finish),
    Done(Event),
    Failed(RequestError),
    NoNumbers,
}
