//! Embeddings: the mean of the last layer's output over all tokens, scaled to length 1.

use super::super::protocol::{Embedding, Event};
use super::admission::{Running, Slot};
use super::{Scheduler, Work};

/// An embedding under way: the sum over the tokens so far.
#[derive(Default)]
pub(in super::super) struct Embedding64 {
    sum: Vec<f64>,
}

impl Scheduler {
    /// Computes one batch of the first embedding that waits.
    pub(super) fn step_embeddings(&mut self) {
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
