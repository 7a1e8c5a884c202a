//! When sequences go to the disk, and when they come back.

use std::time::{Duration, Instant};

use slmops_artifact::{Digest, digest::Hasher};

use super::super::prompt_cache::PromptStore;
use super::Scheduler;
use super::turns::AdapterSet;
use crate::llama::Token;

/// Tokens beyond what the disk has that make a sequence worth writing, at least.
const LEAST_SAVED_TOKENS: usize = 64;
/// The part of a sequence that must be new, too: one in so many. What grows is so written a few times
/// and not once for each answer.
const LEAST_SAVED_PART: usize = 4;
/// Tokens that reading a sequence must save.
const RESTORE_SAVES_TOKENS: usize = 32;
/// While there is always something to compute, one sequence is written in such a time.
const SAVE_EVERY: Duration = Duration::from_secs(30);

/// The cache on the disk, as the scheduler uses it.
pub(in super::super) struct Saving {
    store: PromptStore,
    /// What everything in the engine's memory depends on but adapters.
    base: Digest,
    saved_at: Instant,
}

impl Saving {
    pub(in super::super) fn new(store: PromptStore, base: Digest) -> Self {
        Self { store, base, saved_at: Instant::now() }
    }

    /// What the memory of a sequence depends on beside its tokens.
    fn key(&self, adapters: &AdapterSet) -> Digest {
        let mut each: Vec<_> = adapters.0.iter().collect();
        each.sort_by_key(|(adapter, _)| *adapter.digest().as_bytes());
        let mut hasher = Hasher::default();
        hasher.update(self.base.as_bytes());
        for (adapter, scale) in each {
            hasher.update(adapter.digest().as_bytes());
            hasher.update(&scale.to_le_bytes());
        }
        hasher.finish().0
    }
}

/// Whether `count` tokens are worth writing where `covered` of them are of no need.
fn is_worth(count: usize, covered: usize) -> bool {
    count - covered >= LEAST_SAVED_TOKENS.max(count / LEAST_SAVED_PART)
}

impl Scheduler {
    /// Writes what a sequence holds beyond what the disk has and the first `staying` tokens, if that is
    /// worth it.
    pub(super) fn save_before_loss(&mut self, index: usize, staying: usize) {
        let Some(saving) = &self.saving else { return };
        let slot = &self.slots[index];
        let covered = saving.store.covered(&saving.key(&slot.adapters), &slot.held);
        if is_worth(slot.held.len(), covered.max(staying)) {
            self.save(index, false);
        }
    }

    /// Writes the sequence of which the disk has the least; false where none is worth it.
    pub(in super::super) fn save_one(&mut self) -> bool {
        let worst = self.unsaved().into_iter().max();
        worst.is_some_and(|(_, index)| self.save(index, false))
    }

    /// The same for one that is due though there is something to compute.
    pub(super) fn save_if_due(&mut self) {
        if self.saving.as_ref().is_some_and(|saving| saving.saved_at.elapsed() >= SAVE_EVERY) {
            self.save_one();
            if let Some(saving) = &mut self.saving {
                saving.saved_at = Instant::now();
            }
        }
    }

    /// Writes everything that is worth it, and waits until it is written.
    pub(in super::super) fn leave(&mut self) {
        for (_, index) in self.unsaved() {
            self.save(index, true);
        }
        self.saving = None;
    }

    /// The sequences that are worth writing, with how many tokens the disk does not have.
    fn unsaved(&self) -> Vec<(usize, usize)> {
        let Some(saving) = &self.saving else { return Vec::new() };
        let unsaved = self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let count = slot.held.len();
            // After a shift it is not what its tokens are elsewhere.
            let exact = slot.shifted_from.is_none() && count >= LEAST_SAVED_TOKENS;
            let covered =
                exact.then(|| saving.store.covered(&saving.key(&slot.adapters), &slot.held))?;
            is_worth(count, covered).then_some((count - covered, index))
        });
        unsaved.collect()
    }

    fn save(&mut self, index: usize, leaving: bool) -> bool {
        let Some(saving) = &mut self.saving else { return false };
        let slot = &self.slots[index];
        if slot.shifted_from.is_some() {
            return false;
        }
        let bytes = self.context.state_bytes(index as u32);
        let allowed = match leaving {
            true => saving.store.has_room(bytes),
            false => saving.store.may_write(bytes),
        };
        let state = if allowed { self.context.state(index as u32) } else { None };
        let Some(state) = state else { return false };
        let key = saving.key(&slot.adapters);
        saving.store.save(key, slot.held.clone(), state);
        saving.saved_at = Instant::now();
        true
    }

    /// Reads a sequence from the disk where it holds more of `tokens` than any that is at hand, which
    /// hold `at_hand` of them; how many that are.
    pub(super) fn restore(
        &mut self,
        index: usize,
        tokens: &[Token],
        adapters: &AdapterSet,
        at_hand: usize,
    ) -> Option<usize> {
        let saving = self.saving.as_mut()?;
        let key = saving.key(adapters);
        loop {
            let (shared, place) = saving.store.find(&key, tokens, self.context_tokens)?;
            if shared < at_hand + RESTORE_SAVES_TOKENS {
                return None;
            }
            // One that is damaged is gone now: another may do.
            let Some((held, state)) = saving.store.load(place) else { continue };
            let slot = &mut self.slots[index];
            slot.keep_first(0);
            self.context.truncate(index as u32, 0);
            if self.context.set_state(index as u32, &state, held.len()) {
                slot.held = held;
                return Some(shared);
            }
            self.context.truncate(index as u32, 0);
            saving.store.forget(place);
        }
    }
}
