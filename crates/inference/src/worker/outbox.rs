//! What the scheduler tells, written together: one write for each step and not one for each event, since
//! every write wakes the reader, which takes a core from the computation.

use super::protocol::Event;
use crate::child::{push_line, write_lines};

/// Events that were not written yet.
#[derive(Default)]
pub(super) struct Outbox {
    lines: Vec<u8>,
}

impl Outbox {
    /// Keeps an event for the next [`Outbox::send`].
    pub(super) fn push(&mut self, event: &Event) {
        push_line(&mut self.lines, event);
    }

    /// Writes what was kept.
    pub(super) fn send(&mut self) {
        if !self.lines.is_empty() {
            write_lines(&self.lines);
            self.lines.clear();
        }
    }
}
