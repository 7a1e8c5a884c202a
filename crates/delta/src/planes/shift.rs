//! Where old numbers fall on a new line of codes.

use crate::layout::{IQ4_LEVELS, Layout};

/// Predictions of a group's codes.
pub(super) struct Predicted {
    pub(super) code: [u8; 32],
    /// How far the predicted number lies from the middle of its bin, in bins.
    pub(super) fraction: [f32; 32],
    /// How likely each code is to change.
    pub(super) rates: [f32; 32],
}

impl Default for Predicted {
    fn default() -> Self {
        Self { code: [0; 32], fraction: [0.0; 32], rates: [0.0; 32] }
    }
}

/// How the numbers of a group's old codes lie on its new line.
pub(super) enum Shift {
    /// Levels are even: the new position of a code less the code is a line over the codes.
    Line { slope: f32, offset: f32 },
    /// Levels are not: the ratio of the lines' steps.
    Ratio(f32),
}

impl Shift {
    #[inline(always)]
    pub(super) fn of(layout: &Layout, old: (f32, f32), new: (f32, f32)) -> Self {
        if old == new {
            return Self::Line { slope: 0.0, offset: 0.0 };
        }
        if layout.indexed {
            return Self::Ratio(ratio(old.0, new.0));
        }
        let per_step = 1.0 / new.0;
        let slope = old.0 * per_step - 1.0;
        let offset = (old.1 - new.1) * per_step;
        if slope.abs() < 64.0 && offset.abs() < 4096.0 {
            Self::Line { slope, offset }
        } else {
            Self::Line { slope: 0.0, offset: 0.0 }
        }
    }

    /// Whether no code's number falls into another bin.
    #[inline(always)]
    pub(super) fn is_small(&self, layout: &Layout) -> bool {
        let &Self::Line { slope, offset } = self else { return false };
        let low = offset - slope * layout.zero;
        let high = low + slope * (layout.levels - 1) as f32;
        low.abs().max(high.abs()) < 0.49
    }

    /// How likely a code is to change, on the average of three.
    #[inline(always)]
    pub(super) fn typical(&self, layout: &Layout, rate: f32) -> f32 {
        let &Self::Line { slope, offset } = self else { return rate };
        let at = |share: f32| {
            let shift = slope * (share * layout.levels as f32 - layout.zero) + offset;
            (shift * shift + rate * rate).sqrt()
        };
        (at(0.25) + at(0.5) + at(0.75)) * (1.0 / 3.0)
    }
}

/// Where a group's old codes fall on its new line.
#[inline(always)]
pub(super) fn predict(layout: &Layout, shift: &Shift, codes: &[u8], out: &mut Predicted) {
    let (slope, offset) = match *shift {
        Shift::Line { slope, offset } => (slope, offset),
        Shift::Ratio(ratio) => {
            let mut table = [(0_u8, 0.0_f32); 16];
            for (level, place) in IQ4_LEVELS.iter().zip(&mut table) {
                *place = nearest_level(level * ratio);
            }
            for (index, &code) in codes.iter().enumerate() {
                (out.code[index], out.fraction[index]) = table[usize::from(code & 15)];
            }
            return;
        }
    };
    let highest = (layout.levels - 1) as f32;
    let len = codes.len();
    for ((&code, predicted), fraction) in
        codes.iter().zip(&mut out.code[..len]).zip(&mut out.fraction[..len])
    {
        let position = f32::from(code);
        let shift = slope * (position - layout.zero) + offset;
        let place = round(position + shift).max(0.0).min(highest);
        // The whole number stands in the lower bits: a cast would saturate, one by one.
        *predicted = (place + WHOLE).to_bits() as u8;
        *fraction = (shift - (place - position)).clamp(-1.0, 1.0);
    }
}

/// A scale's old value in units of the new one; 1 where that makes no sense.
#[inline(always)]
pub(super) fn ratio(old: f32, new: f32) -> f32 {
    let ratio = old / new;
    if ratio.abs() < 64.0 { ratio } else { 1.0 }
}

/// Where a number falls among a group's codes.
pub(crate) fn place(layout: &Layout, number: f32, step: f32, base: f32) -> (u8, f32) {
    let position = (number - base) / step;
    let position = if position.abs() < 1e4 { position } else { 0.0 };
    if layout.indexed {
        return nearest_level(position);
    }
    let (code, fraction) = nearest(position + layout.zero, layout.levels);
    (code as u8, fraction)
}

/// The nearest of the non-linear levels, and how far from it as a share of the gap.
pub(super) fn nearest_level(position: f32) -> (u8, f32) {
    let above = IQ4_LEVELS.partition_point(|&level| level < position);
    if above == 0 {
        return (0, ((position - IQ4_LEVELS[0]) / 23.0).max(-1.0));
    }
    if above == 16 {
        return (15, ((position - IQ4_LEVELS[15]) / 24.0).min(1.0));
    }
    let (low, high) = (IQ4_LEVELS[above - 1], IQ4_LEVELS[above]);
    let share = (position - low) / (high - low);
    if share < 0.5 { (above as u8 - 1, share) } else { (above as u8, share - 1.0) }
}

/// The nearest of `levels` whole numbers, and how far from it.
#[inline(always)]
pub(super) fn nearest(number: f32, levels: usize) -> (i32, f32) {
    let code = round(number).max(0.0).min((levels - 1) as f32);
    let fraction = (number - code).clamp(-1.0, 1.0);
    (code as i32, fraction)
}

/// Rounds to the nearest whole number, halves to even; exact below 2^22.
#[inline(always)]
pub(super) fn round(number: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (number + SHIFT) - SHIFT
}

/// Added to a whole number from 0 to 255, it leaves that number in the lowest byte.
pub(super) const WHOLE: f32 = 8_388_608.0;
