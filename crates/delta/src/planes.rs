//! Coding blocks of quantised types against the old ones, field by field.

use half::f16;
use slmops_artifact::gguf::{TensorType, dequantise_into};

use crate::coder::{Coder, Slot};
use crate::layout::{Fields, IQ4_LEVELS, Layout, MAX_ELEMENTS, MAX_GROUPS, Minimum, number};
use crate::model::{
    self, FRACTIONS, Model, Number, SLOTS, UNARY, at, octave_halves, signed_octaves, with_inverse,
};

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

    fn edges(self) -> [f32; 2] {
        self.edges.map(|level| quarter_power(-i32::from(level)))
    }
}

/// `2^(level / 4)` for levels from -255 to 255, by multiplication alone: the same on all machines.
fn quarter_power(level: i32) -> f32 {
    const QUARTERS: [f32; 4] = [1.0, 1.189_207_1, std::f32::consts::SQRT_2, 1.681_792_8];
    let exponent = level.div_euclid(4);
    f32::from_bits(((exponent + 127) as u32) << 23) * QUARTERS[level.rem_euclid(4) as usize]
}

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

/// Rounds to the nearest whole number, halves to even; exact below 2^22.
#[inline(always)]
fn round(number: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (number + SHIFT) - SHIFT
}

/// Added to a whole number from 0 to 255, it leaves that number in the lowest byte.
const WHOLE: f32 = 8_388_608.0;

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

/// Predictions of a group's codes.
struct Predicted {
    code: [u8; 32],
    /// How far the predicted number lies from the middle of its bin, in bins.
    fraction: [f32; 32],
    /// How likely each code is to change.
    rates: [f32; 32],
}

impl Default for Predicted {
    fn default() -> Self {
        Self { code: [0; 32], fraction: [0.0; 32], rates: [0.0; 32] }
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

/// A scale's old value in units of the new one; 1 where that makes no sense.
#[inline(always)]
fn ratio(old: f32, new: f32) -> f32 {
    let ratio = old / new;
    if ratio.abs() < 64.0 { ratio } else { 1.0 }
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

/// Codes the scales or minima of a block's groups against what the old numbers suggest.
#[allow(clippy::too_many_arguments, reason = "one inner loop, used twice")]
fn guessed_small<C: Coder>(
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

/// The nearest of `levels` whole numbers, and how far from it.
#[inline(always)]
fn nearest(number: f32, levels: usize) -> (i32, f32) {
    let code = round(number).max(0.0).min((levels - 1) as f32);
    let fraction = (number - code).clamp(-1.0, 1.0);
    (code as i32, fraction)
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
fn nearest_level(position: f32) -> (u8, f32) {
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

/// How the numbers of a group's old codes lie on its new line.
enum Shift {
    /// Levels are even: the new position of a code less the code is a line over the codes.
    Line { slope: f32, offset: f32 },
    /// Levels are not: the ratio of the lines' steps.
    Ratio(f32),
}

impl Shift {
    #[inline(always)]
    fn of(layout: &Layout, old: (f32, f32), new: (f32, f32)) -> Self {
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
    fn is_small(&self, layout: &Layout) -> bool {
        let &Self::Line { slope, offset } = self else { return false };
        let low = offset - slope * layout.zero;
        let high = low + slope * (layout.levels - 1) as f32;
        low.abs().max(high.abs()) < 0.49
    }

    /// How likely a code is to change, on the average of three.
    #[inline(always)]
    fn typical(&self, layout: &Layout, rate: f32) -> f32 {
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
fn predict(layout: &Layout, shift: &Shift, codes: &[u8], out: &mut Predicted) {
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

/// What the old numbers suggest for a block's scales.
#[derive(Default)]
struct Guess {
    scale: f32,
    minimum: f32,
    steps: [f32; MAX_GROUPS],
    minima: [f32; MAX_GROUPS],
    offsets: [Offset; 2],
}

impl Guess {
    fn look(&mut self, layout: &Layout, numbers: &[f32]) {
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
struct Offset {
    mean: f32,
}

impl Offset {
    fn code<C: Coder>(
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
