//! The adaptive probabilities of one pair of types, and the numbers coded with them.

use crate::coder::{Coder, Slot};

/// Buckets of an expected size, half an octave each.
pub(crate) const SIZES: usize = 24;
/// Buckets of a distance from the middle of a bin.
pub(crate) const FRACTIONS: usize = 10;
/// How many sizes above one are coded one by one.
pub(crate) const UNARY: usize = 14;
/// The classes of what lies beyond.
const CLASSES: usize = 16;

/// Where each context's probabilities lie.
macro_rules! tables {
    ($($name:ident: $len:expr;)*) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        enum Order { $($name),* }
        const LENGTHS: &[usize] = &[$($len),*];
        pub(crate) mod at {
            use super::*;
            $(pub(crate) const $name: usize = super::start(Order::$name as usize);)*
        }
    };
}

const fn start(index: usize) -> usize {
    let mut sum = 0;
    let mut next = 0;
    while next < index {
        sum += LENGTHS[next];
        next += 1;
    }
    sum
}

/// Probabilities of one [`Number`].
pub(crate) const NUMBER: usize = NUMBER_ZERO + NUMBER_SIGN + NUMBER_SIZE + CLASSES;
const NUMBER_ZERO: usize = SIZES * FRACTIONS * 3;
const NUMBER_SIGN: usize = (2 * FRACTIONS - 1) * 3;
const NUMBER_SIZE: usize = SIZES * UNARY;

tables! {
    SCALE: NUMBER;
    MINIMUM: NUMBER;
    SCALES: NUMBER;
    MINIMA: NUMBER;
    RUN: 4;
    CELL: SIZES * 3;
    GROUP: SIZES * 3;
    FIRST_CELL: SIZES * 6;
    CODE: SIZES * 3 * 4;
    MORE: SIZES * 2;
    CODE_SIGN: 3 * (2 * FRACTIONS - 1) * 4;
    CODE_SIZE: 8 * UNARY;
    CODE_CLASS: CLASSES;
    FLOAT_CLASS: SIZES * 64;
    FLOAT_TOP: 33;
    BYTE: 256 * 3;
    BYTE_TREE: 256 * 2;
    END: 0;
}

/// How many probabilities a model has.
pub(crate) const SLOTS: usize = at::END;

/// The probabilities of one pair of types.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) slots: Box<[Slot; SLOTS]>,
}

impl Default for Model {
    fn default() -> Self {
        let slots = vec![Slot::default(); SLOTS].into_boxed_slice();
        Self { slots: slots.try_into().expect("made with this length") }
    }
}

/// Codes a size of at least 1: its lowest `raw` bits are not predicted; of the rest, each step up
/// to [`UNARY`] has a probability.
#[inline]
pub(crate) fn size<C: Coder>(
    coder: &mut C,
    slots: &mut [Slot; SLOTS],
    steps: usize,
    classes: usize,
    raw: u32,
    value: u32,
) -> u32 {
    let value = value.wrapping_sub(1);
    let upper = value >> raw;
    let mut found = 0;
    while found < UNARY as u32 && coder.bit(&mut slots[steps + found as usize], upper > found) {
        found += 1;
    }
    if found == UNARY as u32 {
        // Exponential Golomb of what is left, with adaptive classes.
        let rest = upper.wrapping_sub(found).wrapping_add(1);
        let known = (rest | 1).ilog2().min(CLASSES as u32 - 1);
        let mut class = 0;
        while class < CLASSES as u32 - 1
            && coder.bit(&mut slots[classes + class as usize], known > class)
        {
            class += 1;
        }
        found += (1 << class | coder.raw(class, rest & ((1 << class) - 1))) - 1;
    }
    if raw > 0 {
        found = found << raw | coder.raw(raw, value & ((1 << raw) - 1));
    }
    found.wrapping_add(1)
}

/// A whole number that is predicted up to a small difference, with a running estimate of how
/// large the differences are.
#[derive(Clone, Copy)]
pub(crate) struct Number {
    table: usize,
    /// The mean size of the differences, in the unit that the caller divides by its step.
    pub(crate) mean: f32,
    rate: f32,
}

impl Number {
    pub(crate) fn new(table: usize, mean: f32, rate: f32) -> Self {
        Self { table, mean, rate }
    }

    /// Codes the difference of a value from its prediction. `step` is what a difference of one
    /// means, and `per_step` its inverse; `fraction` is where inside its bin the prediction lies, `hint` one of three states.
    #[inline(always)]
    pub(crate) fn code<C: Coder>(
        &mut self,
        coder: &mut C,
        slots: &mut [Slot; SLOTS],
        (step, per_step): (f32, f32),
        fraction: f32,
        hint: usize,
        difference: i32,
    ) -> i32 {
        let ratio = self.mean * per_step;
        let expected = octave_halves(ratio, -8);
        let zero = self.table + (expected * FRACTIONS + octaves(fraction)) * 3 + hint;
        let mut found = 0;
        if coder.bit(&mut slots[zero], difference != 0) {
            let sign = self.table + NUMBER_ZERO + signed_octaves(fraction) * 3 + hint;
            let negative = coder.bit(&mut slots[sign], difference < 0);
            let sizes = self.table + NUMBER_ZERO + NUMBER_SIGN;
            // Of large differences, the bits below a quarter of the expected size are not worth
            // predicting; what remains has about the same distribution whatever the size.
            let exponent = ((ratio.to_bits() >> 23) as i32 - 127).clamp(0, 14);
            let raw = (exponent - 1).max(0) as u32;
            let shape = if raw > 0 { 20 + (ratio.to_bits() >> 22 & 1) as usize } else { expected };
            let steps = sizes + shape * UNARY;
            let classes = sizes + NUMBER_SIZE;
            let size = size(coder, slots, steps, classes, raw, difference.unsigned_abs()) as i32;
            found = if negative { size.wrapping_neg() } else { size };
        }
        let seen = (found.unsigned_abs() as f32) * step;
        if seen.is_finite() {
            // A few large jumps say nothing about the many small ones.
            let mean = self.mean + (seen.min(self.mean * 4.0 + step) - self.mean) * self.rate;
            // Numbers without a leading one are slow.
            self.mean = mean.max(1e-20);
        }
        found
    }
}

/// The half-octave of a positive number, counted from 2 to the `lowest`; 0 for all that is no
/// positive number.
#[inline(always)]
pub(crate) fn octave_halves(number: f32, lowest: i32) -> usize {
    if number.is_nan() || number <= 0.0 {
        return 0;
    }
    // The exponent and the upper bit of the fraction.
    let half = (number.to_bits() >> 22) as i32 - (127 + lowest) * 2;
    half.clamp(0, SIZES as i32 - 1) as usize
}

/// The octave of a distance of up to one half, 0 for none.
#[inline(always)]
pub(crate) fn octaves(distance: f32) -> usize {
    if distance == 0.0 {
        return 0;
    }
    let exponent = ((distance.to_bits() >> 23) & 255) as i32 - 127;
    (exponent + 10).clamp(0, FRACTIONS as i32 - 2) as usize + 1
}

/// As [`octaves`], with the sign.
#[inline(always)]
pub(crate) fn signed_octaves(distance: f32) -> usize {
    let size = octaves(distance);
    if distance < 0.0 { FRACTIONS - 1 - size } else { FRACTIONS - 1 + size }
}

/// A power of two and its inverse.
#[inline(always)]
pub(crate) fn with_inverse(power: f32) -> (f32, f32) {
    (power, f32::from_bits((254 << 23) - power.to_bits()))
}
