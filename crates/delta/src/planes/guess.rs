//! What numbers of another type suggest for the scales of a block.

use super::shift::{nearest, round};
use super::{from_ordinal, ordinal};
use crate::coder::{Coder, Slot};
use crate::layout::{Layout, MAX_GROUPS, Minimum};
use crate::model::{Number, SLOTS};

/// What the old numbers suggest for a block's scales.
#[derive(Default)]
pub(super) struct Guess {
    pub(super) scale: f32,
    pub(super) minimum: f32,
    pub(super) steps: [f32; MAX_GROUPS],
    pub(super) minima: [f32; MAX_GROUPS],
    pub(super) offsets: [Offset; 2],
}

impl Guess {
    pub(super) fn look(&mut self, layout: &Layout, numbers: &[f32]) {
        let mut highest_step = 0.0_f32;
        let mut highest_minimum = 0.0_f32;
        for (group, numbers) in numbers.chunks_exact(layout.group).enumerate() {
            let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
            for &number in numbers {
                low = low.min(number);
                high = high.max(number);
            }
            let (step, minimum) = match layout.minimum {
                Minimum::None if layout.indexed => (low.abs().max(high) / 127.0, 0.0),
                // The number farthest from zero gets the lowest code, which may be negative.
                Minimum::None if layout.levels == 256 => (low.abs().max(high) / 127.0, 0.0),
                Minimum::None => {
                    let extreme = if high.abs() > low.abs() { high } else { low };
                    (extreme / -layout.zero, 0.0)
                }
                Minimum::Added => ((high - low) / (layout.levels - 1) as f32, low),
                Minimum::Subtracted => {
                    let low = low.min(0.0);
                    ((high - low) / (layout.levels - 1) as f32, -low)
                }
            };
            self.steps[group] = step;
            self.minima[group] = minimum;
            if step.abs() > highest_step.abs() {
                highest_step = step;
            }
            highest_minimum = highest_minimum.max(minimum);
        }
        let most = |sub: crate::layout::Sub| match sub.zero {
            0 => (sub.levels - 1) as f32,
            // The largest scale gets the lowest code here too.
            zero => -zero as f32,
        };
        self.scale = layout.sub.map_or(highest_step, |sub| highest_step / most(sub));
        self.minimum = match layout.minimum {
            Minimum::None => 0.0,
            Minimum::Added => self.minima[0],
            Minimum::Subtracted => highest_minimum / layout.sub.map_or(63.0, most),
        };
    }
}

/// How far guesses are off as a rule.
#[derive(Clone, Copy, Default)]
pub(super) struct Offset {
    pub(super) mean: f32,
}

impl Offset {
    pub(super) fn code<C: Coder>(
        &mut self,
        coder: &mut C,
        slots: &mut [Slot; SLOTS],
        state: &mut Number,
        guess: u16,
        new: u16,
    ) -> u16 {
        let expected = ordinal(guess).wrapping_add(round(self.mean) as i32 as u16);
        let known =
            if C::ENCODES { i32::from(ordinal(new).wrapping_sub(expected) as i16) } else { 0 };
        // Counted in neighbours; `state` was started in another unit, and adapts.
        let found = state.code(coder, slots, (1.0, 1.0), 0.0, 1, known);
        let ordinal_found = expected.wrapping_add(found as u16);
        let off = f32::from(ordinal_found.wrapping_sub(ordinal(guess)) as i16);
        self.mean += (off - self.mean).clamp(-64.0, 64.0) / 32.0;
        from_ordinal(ordinal_found)
    }
}

/// Codes the scales or minima of a block's groups against what the old numbers suggest.
#[allow(clippy::too_many_arguments, reason = "one inner loop, used twice")]
pub(super) fn guessed_small<C: Coder>(
    coder: &mut C,
    slots: &mut [Slot; SLOTS],
    state: &mut Number,
    wanted: &[f32],
    new: &mut [u8; MAX_GROUPS],
    levels: usize,
    zero: i32,
    unit: f32,
) {
    let units = (unit.abs(), 1.0 / unit.abs());
    for (&wanted, new) in wanted.iter().zip(new) {
        let steps = wanted / unit;
        let steps = if steps.abs() < 1024.0 { steps } else { 0.0 };
        let (predicted, fraction) = nearest(steps + zero as f32, levels);
        let known = if C::ENCODES { i32::from(*new) - predicted } else { 0 };
        let found = state.code(coder, slots, units, fraction, 0, known);
        *new = predicted.wrapping_add(found).rem_euclid(levels as i32) as u8;
    }
}
