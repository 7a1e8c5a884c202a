//! Adapters: the engine applies one set at a time, so the sets that are waited for take turns.

use std::path::Path;
use std::sync::Arc;

use super::Scheduler;
use super::admission::Slot;
use crate::llama::{Adapter, EngineError};

/// Steps in which one set of adapters is applied before another one that is waited for gets its turn: the
/// engine applies one set at a time, and plans its computation anew for another.
const TURN_STEPS: u32 = 8;

/// Loaded adapters, and how strongly each is applied.
#[derive(Clone, Default)]
pub(super) struct AdapterSet(pub(super) Vec<(Arc<Adapter>, f32)>);

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

impl Scheduler {
    /// Loads an adapter under a number that no other one has.
    pub(in super::super) fn load_adapter(
        &mut self,
        id: u32,
        path: &Path,
    ) -> Result<(), EngineError> {
        let adapter = Adapter::load(&self.model, path)?;
        self.adapters.insert(id, Arc::new(adapter));
        Ok(())
    }

    /// Takes no more requests with an adapter; its memory is free once none runs that has it.
    pub(in super::super) fn unload_adapter(&mut self, id: u32) {
        let Some(adapter) = self.adapters.remove(&id) else { return };
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.running.is_none() && slot.adapters.has(&adapter) {
                // What was computed with it is of no more use.
                self.context.truncate(index as u32, 0);
                slot.keep_first(0);
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
    pub(super) fn take_turns(&mut self) {
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
}
