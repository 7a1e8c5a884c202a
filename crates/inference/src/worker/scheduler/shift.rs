//! Going on where the context is full: half of what follows the kept beginning is forgotten, and the
//! rest moves up.

use super::admission::Running;
use super::{Scheduler, Task, Work};
use crate::llama::{Model, Token};

/// Tokens at the beginning that are kept at least: attention rests on them, and the text falls apart
/// without (Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, 2023, section 3).
const LEAST_KEPT_TOKENS: usize = 4;
/// The part of the context that must remain to be shifted: one in so many. A beginning that leaves less
/// is not shifted, for the model would see nothing but it.
const LEAST_MOVING_PART: usize = 4;

/// How many tokens at the beginning of a prompt are kept: the beginning token and a chat's first message,
/// which is the system's where there is one; absent where that leaves too little of the context.
fn kept(prompt: &[Token], context_tokens: usize, model: &Model) -> Option<usize> {
    let message = prompt.iter().position(|token| model.ends(*token)).map_or(0, |end| end + 1);
    let keep = message.max(LEAST_KEPT_TOKENS).min(prompt.len());
    (keep + context_tokens.div_ceil(LEAST_MOVING_PART) <= context_tokens).then_some(keep)
}

impl Scheduler {
    /// Decides whether an answer goes on past the end of the context, and what is kept then.
    pub(super) fn choose_kept(&self, task: &mut Task) {
        let Work::Generate(generating) = &mut task.work else { return };
        generating.keep = match self.shifts {
            true => kept(&task.tokens, self.context_tokens, &self.model),
            false => None,
        };
        if generating.keep.is_some() {
            // Nothing else would end an answer that goes in circles.
            let whole_context = u32::try_from(self.context_tokens).unwrap_or(u32::MAX);
            generating.request_max_tokens.get_or_insert(whole_context);
        }
    }

    /// Makes room in every sequence whose answer goes on past the end of the context.
    pub(super) fn shift_full(&mut self) {
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let Some(Running { task, .. }) = &mut slot.running else { continue };
            let Work::Generate(generating) = &mut task.work else { continue };
            let Some(keep) = generating.keep else { continue };
            if task.tokens.len() < self.context_tokens {
                continue;
            }
            let gone = keep..keep + (slot.held.len() - keep) / 2;
            self.context.remove(index as u32, gone.start as u32, gone.end as u32);
            task.tokens.drain(gone.clone());
            slot.held.drain(gone);
            slot.shifted_from = Some(slot.shifted_from.map_or(keep, |from| from.min(keep)));
            generating.shifts += 1;
        }
    }
}
