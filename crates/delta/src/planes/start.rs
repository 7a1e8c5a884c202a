//! What a segment starts from, and how the encoder finds it.

use super::shift::{Predicted, Shift, predict};
use crate::layout::{Fields, Layout};

/// What a segment starts from, chosen by the encoder.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Start {
    /// How far weights moved, as a power of 2: `2^(level / 4 - 48)`, 0 for not at all.
    pub(crate) noise: u8,
    /// How much less often the lowest and the highest code change than others: `2^(-level / 4)`.
    pub(crate) edges: [u8; 2],
}

impl Start {
    pub(crate) fn of(noise: f32) -> Self {
        if noise.is_nan() || noise <= 0.0 {
            return Self::default();
        }
        let level = (noise.log2() + 48.0) * 4.0;
        Self { noise: level.round().clamp(1.0, 255.0) as u8, ..Self::default() }
    }

    pub(crate) fn noise(self) -> f32 {
        if self.noise == 0 {
            return 1e-12;
        }
        quarter_power(i32::from(self.noise) - 48 * 4)
    }

    pub(super) fn edges(self) -> [f32; 2] {
        self.edges.map(|level| quarter_power(-i32::from(level)))
    }
}

/// `2^(level / 4)` for levels from -255 to 255, by multiplication alone: the same on all machines.
fn quarter_power(level: i32) -> f32 {
    const QUARTERS: [f32; 4] = [1.0, 1.189_207_1, std::f32::consts::SQRT_2, 1.681_792_8];
    let exponent = level.div_euclid(4);
    f32::from_bits(((exponent + 127) as u32) << 23) * QUARTERS[level.rem_euclid(4) as usize]
}

/// The mean size of a change of the weights from `old` to `new`, blocks of one type, as far as
/// their codes show it: what the encoder starts a segment with.
pub(crate) fn measure(layout: &Layout, old: &[u8], new: &[u8]) -> Start {
    let (mut before, mut after) = (Fields::default(), Fields::default());
    let (mut sum, mut count) = (0.0_f64, 0_u64);
    // Changes and codes: of the lowest code, of the highest, of the others.
    let mut seen = [[0_u64; 2]; 3];
    let highest = (layout.levels - 1) as u8;
    let blocks = old.chunks_exact(layout.bytes).zip(new.chunks_exact(layout.bytes));
    // A sample is enough.
    let skip = (old.len() / layout.bytes / 2048).max(1);
    for (old, new) in blocks.step_by(skip) {
        before.unpack(layout, old);
        after.unpack(layout, new);
        for group in 0..layout.groups() {
            let (old_step, old_base) = before.line(layout, group);
            let (step, base) = after.line(layout, group);
            if !step.is_finite() {
                continue;
            }
            let range = group * layout.group..(group + 1) * layout.group;
            let mut predicted = Predicted::default();
            let shift = Shift::of(layout, (old_step, old_base), (step, base));
            predict(layout, &shift, &before.codes[range.clone()], &mut predicted);
            let drift: f32 = predicted.fraction[..layout.group].iter().map(|it| it.abs()).sum();
            if drift > 0.5 {
                continue;
            }
            let mut changed = 0;
            for (&new, &old) in after.codes[range].iter().zip(&predicted.code) {
                let class = if old == 0 { 0 } else { 2 - usize::from(old == highest) };
                seen[class][0] += u64::from(new != old);
                seen[class][1] += 1;
                changed += u64::from(new != old);
            }
            let width = step.abs() * if layout.indexed { 16.0 } else { 1.0 };
            sum += changed as f64 * f64::from(width);
            count += layout.group as u64;
        }
    }
    let [edges @ .., others] = seen;
    let often = (others[0] as f64 + 1.0) / (others[1] as f64 + 1.0);
    // As if one half as often as the others had been seen to begin with.
    let level = |[changes, codes]: [u64; 2]| {
        let less = (changes as f64 + 1.0) / (codes as f64 * often + 2.0);
        (-4.0 * less.log2()).round().clamp(0.0, 80.0) as u8
    };
    Start { edges: edges.map(level), ..Start::of((sum / count.max(1) as f64) as f32) }
}
