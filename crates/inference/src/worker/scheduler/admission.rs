//! Which request gets which sequence, and how much of its prompt is there already.

use std::time::Instant;

use super::super::protocol::Event;
use super::turns::AdapterSet;
use super::{Scheduler, Task, Work};
use crate::llama::Token;

/// One sequence of the engine.
#[derive(Default)]
pub(super) struct Slot {
    /// The tokens in the engine's memory.
    pub(super) held: Vec<Token>,
    /// From which one on they were computed after tokens that are gone: not what the same tokens are
    /// elsewhere.
    pub(super) shifted_from: Option<usize>,
    /// What was applied when they were computed.
    pub(super) adapters: AdapterSet,
    pub(super) running: Option<Running>,
}

impl Slot {
    /// How many tokens of a sequence, computed with these adapters, it holds from the first one on.
    fn shared(&self, tokens: &[Token], adapters: &AdapterSet) -> usize {
        if self.adapters != *adapters {
            return 0;
        }
        let pairs = self.held.iter().zip(tokens).take(self.shifted_from.unwrap_or(usize::MAX));
        pairs.take_while(|(held, token)| held == token).count()
    }

    /// Notes that only its first `count` tokens are left.
    pub(super) fn keep_first(&mut self, count: usize) {
        self.held.truncate(count);
        self.shifted_from = self.shifted_from.filter(|from| *from < count);
    }
}

/// A request that has a sequence.
pub(super) struct Running {
    pub(super) task: Task,
    pub(super) started: Instant,
    /// Tokens of its prompt that were there, and how many of them came from the disk.
    pub(super) cached_tokens: usize,
    pub(super) restored_tokens: usize,
}

impl Scheduler {
    /// Gives free sequences to waiting requests: to each the one that already holds the most of
    /// its prompt.
    pub(super) fn admit(&mut self) {
        while !self.queue.is_empty() {
            let (next, adapters) = &self.queue[0];
            let shared = |slot: &Slot| slot.shared(&next.tokens, adapters);
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
            let own = shared(slot).min(needed);
            // Any other sequence, also one that is under way, may hold more of it.
            let others = self.slots.iter().enumerate().filter(|(at, _)| *at != index);
            let richest = others.map(|(at, slot)| (shared(slot).min(needed), at)).max();
            let richest = richest.filter(|(held, _)| *held >= own + self.copy_saves);
            let (task, adapters) = self.queue.pop_front().expect("it is not empty");
            self.save_before_loss(index, own);
            let at_hand = richest.map_or(own, |(held, _)| held);
            let restored = self.restore(index, &task.tokens[..needed], &adapters, at_hand);
            // What could not be read may have taken the place of what was there.
            let mut cached = restored.unwrap_or(own.min(self.slots[index].held.len()));
            if let (None, Some((held, from))) = (restored, richest) {
                self.context.copy(from as u32, index as u32);
                self.slots[index].held = self.slots[from].held.clone();
                self.slots[index].shifted_from = self.slots[from].shifted_from;
                cached = held;
            }
            let slot = &mut self.slots[index];
            if cached < slot.held.len() {
                let place = u32::try_from(cached).expect("a context is shorter");
                if !self.context.truncate(index as u32, place) {
                    self.context.truncate(index as u32, 0);
                    cached = 0;
                }
                slot.keep_first(cached);
            }
            slot.adapters = adapters;
            self.outbox.push(&Event::Started { id: task.id });
            slot.running = Some(Running {
                task,
                started: Instant::now(),
                cached_tokens: cached,
                restored_tokens: restored.unwrap_or(0).min(cached),
            });
        }
    }
}
