//! Coding blocks of quantised types against the old ones, field by field.

mod guess;
mod shift;
mod start;

use half::f16;
use slmops_artifact::gguf::{TensorType, dequantise_into};

use crate::coder::{Coder, Slot};
use crate::layout::{Fields, Layout, MAX_ELEMENTS, MAX_GROUPS, Minimum, number};
use crate::model::{
    self, FRACTIONS, Model, Number, SLOTS, UNARY, at, octave_halves, signed_octaves, with_inverse,
};
use guess::{Guess, guessed_small};
pub(crate) use shift::place;
use shift::{Predicted, Shift, nearest, predict, ratio, round};
pub(crate) use start::{Start, measure};

/// Codes that share one flag for "nothing here changed".
const CELL: usize = 8;
/// Elements of a run of blocks that share one flag for "nothing here changed".
const RUN_ELEMENTS: usize = 512;
/// The least and greatest expected rate of change of a code.
const RATES: (f32, f32) = (1e-5, 0.5);
/// How fast the estimate of the noise follows, per group.
const NOISE_RATE: f32 = 1.0 / 96.0;
/// The same for numbers of blocks and of groups.
const NUMBER_RATE: f32 = 1.0 / 48.0;

/// The state of one segment's coding.
struct Segment<'a> {
    layout: &'static Layout,
    slots: &'a mut [Slot; SLOTS],
    noise: f32,
    /// Codes that changed since the noise was last estimated, how many were expected to, and the
    /// number of groups.
    changed: f32,
    expected: f32,
    groups: f32,
    edges: [f32; 2],
    /// How many codes changed in the last group: none, one, more.
    local: usize,
    scale: Number,
    minimum: Number,
    pull: Pull,
    scales: Number,
    minima: Number,
    runs: usize,
}

/// Codes blocks of one type against as many of the same type.
/// `new` is read by encoders and written by decoders.
pub(crate) fn same<C: Coder>(
    coder: &mut C,
    model: &mut Model,
    layout: &'static Layout,
    start: Start,
    old: &[u8],
    new: &mut [u8],
) {
    let mut segment = Segment::new(model, layout, start);
    let run_bytes = RUN_ELEMENTS / layout.elements * layout.bytes;
    let (mut before, mut after) = (Fields::default(), Fields::default());
    for (old, new) in old.chunks(run_bytes).zip(new.chunks_mut(run_bytes)) {
        let differs = C::ENCODES && old != &*new;
        let differs = coder.bit(&mut segment.slots[at::RUN + segment.runs], differs);
        segment.runs = segment.runs << 1 & 3 | usize::from(differs);
        if !differs {
            new.copy_from_slice(old);
            continue;
        }
        let blocks = old.chunks_exact(layout.bytes).zip(new.chunks_exact_mut(layout.bytes));
        for (old, new) in blocks {
            before.unpack(layout, old);
            if C::ENCODES {
                after.unpack(layout, new);
            }
            segment.block(coder, &before, &mut after);
            if !C::ENCODES {
                after.pack(layout, new);
            }
        }
        segment.settle();
    }
}

/// Codes blocks of one type against the same elements of another.
pub(crate) fn across<C: Coder>(
    coder: &mut C,
    model: &mut Model,
    layout: &'static Layout,
    old_kind: TensorType,
    start: Start,
    old: &[u8],
    new: &mut [u8],
) {
    let mut segment = Segment::new(model, layout, start);
    let mut numbers = [0.0_f32; MAX_ELEMENTS];
    let mut after = Fields::default();
    let mut guess = Guess::default();
    let old_bytes =
        MAX_ELEMENTS / old_kind.block_elements() as usize * old_kind.block_bytes() as usize;
    let new_bytes = MAX_ELEMENTS / layout.elements * layout.bytes;
    for (old, new) in old.chunks(old_bytes).zip(new.chunks_mut(new_bytes)) {
        let elements = new.len() / layout.bytes * layout.elements;
        if dequantise_into(old_kind, old, &mut numbers[..elements]).is_err() {
            // Lengths and types are checked before; zeros predict as well as anything.
            numbers.fill(0.0);
        }
        let blocks = new.chunks_exact_mut(layout.bytes).zip(numbers.chunks_exact(layout.elements));
        for (new, numbers) in blocks {
            if C::ENCODES {
                after.unpack(layout, new);
            }
            segment.guessed_block(coder, &mut guess, numbers, &mut after);
            if !C::ENCODES {
                after.pack(layout, new);
            }
        }
        segment.settle();
    }
}

/// F16 bits in the order of the numbers that they mean.
#[inline(always)]
pub(crate) fn ordinal(bits: u16) -> u16 {
    if bits & 0x8000 != 0 { !bits } else { bits | 0x8000 }
}

#[inline(always)]
fn from_ordinal(ordinal: u16) -> u16 {
    if ordinal & 0x8000 != 0 { ordinal & 0x7fff } else { !ordinal }
}

/// The distance between neighbours of an F16 number.
#[inline(always)]
fn spacing(bits: u16) -> f32 {
    let exponent = u32::from(bits >> 10 & 31).max(1);
    // 2^(exponent - 25).
    f32::from_bits((exponent + 127 - 25) << 23)
}

/// `difference` as the nearest to zero of what it is modulo 65536.
#[inline(always)]
fn wrapped(new: u16, old: u16) -> i32 {
    i32::from(ordinal(new).wrapping_sub(ordinal(old)) as i16)
}

#[inline(always)]
fn sign_state(difference: i32) -> usize {
    (difference.signum() + 1) as usize
}

/// How much of what the minimum suggests the scale does: a running regression.
#[derive(Clone, Copy, Default)]
struct Pull {
    squares: f32,
    products: f32,
}

impl Pull {
    #[inline(always)]
    fn predict(self, pull: f32) -> f32 {
        if self.squares > 0.0 { pull * (self.products / self.squares) } else { 0.0 }
    }

    #[inline(always)]
    fn learn(&mut self, pull: f32, found: f32) {
        let (square, product) = (pull * pull, pull * found);
        // An outlier would drown what all others say.
        if product.is_finite() && (self.squares == 0.0 || square < self.squares * 64.0) {
            self.squares += (square - self.squares) * NUMBER_RATE;
            self.products +=
                (product.clamp(-square * 2.0, square * 2.0) - self.products) * NUMBER_RATE;
        }
    }
}

impl<'a> Segment<'a> {
    fn new(model: &'a mut Model, layout: &'static Layout, start: Start) -> Self {
        let noise = start.noise();
        Self {
            layout,
            slots: &mut model.slots,
            noise,
            changed: 0.0,
            expected: 0.0,
            groups: 0.0,
            edges: start.edges(),
            local: 0,
            scale: Number::new(at::SCALE, noise / layout.levels as f32, NUMBER_RATE),
            minimum: Number::new(at::MINIMUM, noise, NUMBER_RATE),
            pull: Pull::default(),
            scales: Number::new(at::SCALES, noise / layout.levels as f32, NUMBER_RATE),
            minima: Number::new(at::MINIMA, noise, NUMBER_RATE),
            runs: 0,
        }
    }

    /// Codes one block against the old one.
    #[inline(always)]
    fn block<C: Coder>(&mut self, coder: &mut C, old: &Fields, new: &mut Fields) {
        let layout = self.layout;
        let mut moved = 1;
        if layout.minimum != Minimum::None {
            let step = spacing(old.minimum);
            let known = if C::ENCODES { wrapped(new.minimum, old.minimum) } else { 0 };
            let moved_by = self.minimum.code(coder, self.slots, with_inverse(step), 0.0, 1, known);
            new.minimum = from_ordinal(ordinal(old.minimum).wrapping_add(moved_by as u16));
            moved = sign_state(moved_by);
        }
        let step = spacing(old.scale);
        // The step is the distance from the minimum to the maximum: what the one does, the
        // other has to make up for.
        let pull = if layout.minimum == Minimum::Added {
            (number(old.minimum) - number(new.minimum)) / (layout.levels - 1) as f32
        } else {
            0.0
        };
        let (step, per_step) = with_inverse(step);
        let shift = self.pull.predict(pull) * per_step;
        let shift = if shift.abs() < 1024.0 { shift } else { 0.0 };
        let whole = round(shift) as i32;
        let known = if C::ENCODES { wrapped(new.scale, old.scale) - whole } else { 0 };
        let fraction = shift - whole as f32;
        let units = (step, per_step);
        let moved_by = whole + self.scale.code(coder, self.slots, units, fraction, moved, known);
        new.scale = from_ordinal(ordinal(old.scale).wrapping_add(moved_by as u16));
        if pull != 0.0 {
            self.pull.learn(pull, moved_by as f32 * step);
        }

        if let Some(sub) = layout.sub {
            let groups = layout.groups();
            let unit = number(new.scale).abs();
            let ratio = ratio(number(old.scale), number(new.scale));
            let (scales, slots) = (&mut self.scales, &mut *self.slots);
            small(
                coder,
                slots,
                scales,
                &old.scales[..groups],
                &mut new.scales,
                sub.levels,
                sub.zero,
                unit,
                ratio,
            );
            if layout.minimum == Minimum::Subtracted {
                let unit = number(new.minimum).abs();
                let ratio = self::ratio(number(old.minimum), number(new.minimum));
                let minima = &mut self.minima;
                small(
                    coder,
                    slots,
                    minima,
                    &old.minima[..groups],
                    &mut new.minima,
                    sub.levels,
                    0,
                    unit,
                    ratio,
                );
            }
        }

        let mut predicted = Predicted::default();
        for group in 0..layout.groups() {
            let (old_step, old_base) = old.line(layout, group);
            let (step, base) = new.line(layout, group);
            let range = group * layout.group..(group + 1) * layout.group;
            let old_codes = &old.codes[range.clone()];
            let new_codes = &mut new.codes[range];
            let shift = Shift::of(layout, (old_step, old_base), (step, base));
            if !shift.is_small(layout) {
                predict(layout, &shift, old_codes, &mut predicted);
                self.codes(coder, step, &mut predicted, new_codes);
                continue;
            }
            // Every old code is its own prediction, and whether any changes is told from the
            // line alone: where none does, the codes are not even looked at.
            let rate = self.rate(step);
            let len = old_codes.len();
            let sum = shift.typical(layout, rate) * len as f32;
            let differs = C::ENCODES && old_codes != new_codes;
            if self.group_differs(coder, sum, differs) {
                predict(layout, &shift, old_codes, &mut predicted);
                let sum = self.expect(rate, len, &mut predicted);
                self.changed_codes(coder, rate, sum, &predicted, new_codes);
            } else {
                new_codes.copy_from_slice(old_codes);
                self.local = 0;
                self.note(0.0, len as f32, rate, sum);
            }
        }
    }

    /// The rate at which codes of this step change.
    #[inline(always)]
    fn rate(&self, step: f32) -> f32 {
        let step = step.abs() * if self.layout.indexed { 16.0 } else { 1.0 };
        // `min` and `max` turn a rate that is no number, or endless, into the upper bound.
        (self.noise / step).min(RATES.1).max(RATES.0)
    }

    /// Codes whether any code of a group differs from its prediction; `sum` codes are expected to.
    #[inline(always)]
    fn group_differs<C: Coder>(&mut self, coder: &mut C, sum: f32, differs: bool) -> bool {
        let context = at::GROUP + octave_halves(sum, -9) * 3 + self.local;
        coder.bit(&mut self.slots[context], differs)
    }

    /// Codes the codes of a group that fell where `predicted` says.
    #[inline(always)]
    fn codes<C: Coder>(
        &mut self,
        coder: &mut C,
        step: f32,
        predicted: &mut Predicted,
        new: &mut [u8],
    ) {
        let len = new.len();
        let rate = self.rate(step);
        let sum = self.expect(rate, len, predicted);
        let differs = C::ENCODES && predicted.code[..len] != *new;
        if self.group_differs(coder, sum, differs) {
            self.changed_codes(coder, rate, sum, predicted, new);
        } else {
            new.copy_from_slice(&predicted.code[..len]);
            self.local = 0;
            self.note(0.0, len as f32, rate, sum);
        }
    }

    /// How likely each code is to change, and how many are expected to.
    #[inline(always)]
    fn expect(&self, rate: f32, len: usize, predicted: &mut Predicted) -> f32 {
        // The mean distance of a normally distributed number from another.
        for (expected, fraction) in predicted.rates.iter_mut().zip(&predicted.fraction) {
            *expected = (fraction * fraction + rate * rate).sqrt();
        }
        // An extreme code can change to one side alone.
        let highest = (self.layout.levels - 1) as u8;
        for (expected, &code) in predicted.rates.iter_mut().zip(&predicted.code) {
            *expected *= if code == 0 {
                self.edges[0]
            } else if code == highest {
                self.edges[1]
            } else {
                1.0
            };
        }
        let mut lanes = [0.0; CELL];
        for cell in predicted.rates[..len].as_chunks::<CELL>().0 {
            for (lane, rate) in lanes.iter_mut().zip(cell) {
                *lane += rate;
            }
        }
        sums(&lanes)
    }

    /// Codes a group of which at least one code differs from its prediction.
    #[inline(never)]
    fn changed_codes<C: Coder>(
        &mut self,
        coder: &mut C,
        rate: f32,
        sum: f32,
        predicted: &Predicted,
        new: &mut [u8],
    ) {
        let mut changed = 0;
        let mut rest = sum;
        let len = new.len();
        let cells = len / CELL;
        for (index, new) in new.as_chunks_mut::<CELL>().0.iter_mut().enumerate() {
            let at = index * CELL;
            let code: &[u8; CELL] = predicted.code[at..].first_chunk().expect("a cell");
            let rates: &[f32; CELL] = predicted.rates[at..].first_chunk().expect("a cell");
            let expected = sums(rates);
            // One of the cells differs: the last one, if none before it did.
            if changed > 0 || index + 1 < cells {
                let context = if changed == 0 {
                    let size = (octave_halves(expected, -6) / 4).min(5);
                    at::FIRST_CELL + octave_halves(expected / rest, -8) * 6 + size
                } else {
                    at::CELL + octave_halves(expected, -9) * 2 + usize::from(changed > 1)
                };
                rest -= expected;
                if !coder.bit(&mut self.slots[context], C::ENCODES && code != new) {
                    *new = *code;
                    continue;
                }
            }
            let fraction: &[f32; CELL] = predicted.fraction[at..].first_chunk().expect("a cell");
            changed += self.cell(coder, code, fraction, rates, rate, new);
        }
        self.local = changed.min(2);
        self.note(changed as f32, len as f32, rate, sum);
    }

    /// Notes how many codes of a group changed. The estimate follows later, in
    /// [`Segment::settle`]: the next group would have to wait for it.
    #[inline(always)]
    fn note(&mut self, changed: f32, len: f32, rate: f32, sum: f32) {
        // The share of the changes that the noise caused.
        let expected = rate * len;
        let share = expected / sum;
        if share.is_finite() {
            self.changed += changed * share;
            self.expected += expected * share;
            self.groups += 1.0;
        }
    }

    /// Lets the estimate of the noise follow the ratio of what was seen to what was expected.
    fn settle(&mut self) {
        let doubt = self.groups * 0.02;
        let ratio = (self.changed + doubt) / (self.expected + doubt);
        if self.groups > 0.0 {
            let factor = 1.0 + NOISE_RATE * self.groups * (ratio - 1.0).min(8.0);
            self.noise = (self.noise * factor.max(0.5)).clamp(1e-18, 1e6);
        }
        (self.changed, self.expected, self.groups) = (0.0, 0.0, 0.0);
    }

    /// Codes eight codes of which at least one differs from its prediction.
    #[inline(always)]
    fn cell<C: Coder>(
        &mut self,
        coder: &mut C,
        predicted: &[u8; CELL],
        fractions: &[f32; CELL],
        rates: &[f32; CELL],
        rate: f32,
        new: &mut [u8; CELL],
    ) -> usize {
        let highest = (self.layout.levels - 1) as u8;
        let mut rest = sums(rates);
        let mut changed = 0;
        let mut index = 0;
        let old = *predicted;
        let known = *new;
        *new = old;
        while index < CELL {
            if changed > 0 {
                let context = at::MORE + octave_halves(rest, -8) * 2 + usize::from(changed > 1);
                let more = C::ENCODES && known[index..] != old[index..];
                if !coder.bit(&mut self.slots[context], more) {
                    break;
                }
            }
            // At least one of the rest changes.
            while index + 1 < CELL {
                let code = old[index];
                let edge = if code == 0 { 1 } else { 2 * usize::from(code == highest) };
                let likely = octave_halves(rates[index] / rest, -10);
                let size = (octave_halves(rest, -6) / 4).min(3);
                let context = at::CODE + (likely * 3 + edge) * 4 + size;
                if coder.bit(&mut self.slots[context], C::ENCODES && known[index] != code) {
                    break;
                }
                rest -= rates[index];
                index += 1;
            }
            rest -= rates[index];
            new[index] = self.step(coder, old[index], fractions[index], rate, known[index]);
            changed += 1;
            index += 1;
        }
        changed
    }

    /// Codes a code that differs from its prediction.
    #[inline(always)]
    fn step<C: Coder>(&mut self, coder: &mut C, old: u8, fraction: f32, rate: f32, new: u8) -> u8 {
        let levels = self.layout.levels;
        let mask = (levels - 1) as u8;
        let edge = if old == 0 { 1 } else { 2 * usize::from(old == mask) };
        let coarse = (octave_halves(rate, -8) / 3).min(7);
        let difference = new.wrapping_sub(old) & mask;
        let negative = usize::from(difference) > levels / 2;
        // The side is a matter of the ratio to the noise.
        let towards = signed_octaves(fraction / rate * (1.0 / 64.0));
        let context = at::CODE_SIGN + (edge * (2 * FRACTIONS - 1) + towards) * 4 + coarse / 2;
        let negative = coder.bit(&mut self.slots[context], negative);
        let size = if negative { difference.wrapping_neg() & mask } else { difference };
        let steps = at::CODE_SIZE + coarse * UNARY;
        let size = model::size(coder, self.slots, steps, at::CODE_CLASS, 0, size.into()) as u8;
        let difference = if negative { size.wrapping_neg() } else { size };
        old.wrapping_add(difference) & mask
    }

    /// Codes one block whose old numbers are known, but not in this type.
    fn guessed_block<C: Coder>(
        &mut self,
        coder: &mut C,
        guess: &mut Guess,
        numbers: &[f32],
        new: &mut Fields,
    ) {
        let layout = self.layout;
        guess.look(layout, numbers);
        if layout.minimum != Minimum::None {
            let expected = f16::from_f32(guess.minimum).to_bits();
            new.minimum =
                guess.offsets[1].code(coder, self.slots, &mut self.minimum, expected, new.minimum);
        }
        let expected = f16::from_f32(guess.scale).to_bits();
        new.scale = guess.offsets[0].code(coder, self.slots, &mut self.scale, expected, new.scale);
        if let Some(sub) = layout.sub {
            let groups = layout.groups();
            let wanted = &guess.steps[..groups];
            let unit = number(new.scale);
            guessed_small(
                coder,
                self.slots,
                &mut self.scales,
                wanted,
                &mut new.scales,
                sub.levels,
                sub.zero,
                unit,
            );
            if layout.minimum == Minimum::Subtracted {
                let unit = number(new.minimum);
                let wanted = &guess.minima[..groups];
                guessed_small(
                    coder,
                    self.slots,
                    &mut self.minima,
                    wanted,
                    &mut new.minima,
                    sub.levels,
                    0,
                    unit,
                );
            }
        }
        let mut predicted = Predicted::default();
        for (group, numbers) in numbers.chunks_exact(layout.group).enumerate() {
            let (step, base) = new.line(layout, group);
            for (index, &number) in numbers.iter().enumerate() {
                let (code, fraction) = place(layout, number, step, base);
                predicted.code[index] = code;
                predicted.fraction[index] = fraction;
            }
            let range = group * layout.group..(group + 1) * layout.group;
            self.codes(coder, step, &mut predicted, &mut new.codes[range]);
        }
    }
}

/// The sum of a cell's rates.
#[inline(always)]
fn sums([a, b, c, d, e, f, g, h]: &[f32; CELL]) -> f32 {
    ((a + e) + (b + f)) + ((c + g) + (d + h))
}

/// Codes the scales or minima of a block's groups against the old ones.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "one inner loop, used four times")]
fn small<C: Coder>(
    coder: &mut C,
    slots: &mut [Slot; SLOTS],
    state: &mut Number,
    old: &[u8],
    new: &mut [u8; MAX_GROUPS],
    levels: usize,
    zero: i32,
    unit: f32,
    ratio: f32,
) {
    let units = (unit, 1.0 / unit);
    let mut changed = 0_usize;
    for (&old, new) in old.iter().zip(new) {
        let (predicted, fraction) = if ratio == 1.0 {
            (i32::from(old), 0.0)
        } else {
            nearest((i32::from(old) - zero) as f32 * ratio + zero as f32, levels)
        };
        let known = if C::ENCODES { i32::from(*new) - predicted } else { 0 };
        let found = state.code(coder, slots, units, fraction, changed.min(2), known);
        *new = predicted.wrapping_add(found).rem_euclid(levels as i32) as u8;
        changed += usize::from(found != 0);
    }
}
