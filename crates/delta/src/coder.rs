//! The binary range coder, its adaptive probabilities, and the one trait through which a model
//! is written once and both encodes and decodes.

/// Bits of a probability in the coder.
const PROBABILITY_BITS: u32 = 16;
/// Bits of a slot that count what it has seen; the rest is its probability.
const COUNT_BITS: u32 = 10;
const COUNT_MASK: u32 = (1 << COUNT_BITS) - 1;
/// How many symbols a probability remembers: adapts at 1 / (1.5 + count), down to this.
const MEMORY: u32 = 400;
/// What a probability from a header counts for, in symbols seen.
const PRIOR_COUNT: u32 = 60;

/// 65536 / (count + 1.5), rounded down.
const RATES: [u32; MEMORY as usize + 1] = {
    let mut rates = [0; MEMORY as usize + 1];
    let mut count = 0;
    while count <= MEMORY as usize {
        rates[count] = (65536 * 2 / (2 * count + 3)) as u32;
        count += 1;
    }
    rates
};

/// One adaptive probability (that the bit is set): 22 bits, and a count in the lower 10.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Slot(u32);

impl Default for Slot {
    fn default() -> Self {
        Self(1 << 31)
    }
}

impl Slot {
    /// A slot that begins with a probability of `level` / 256 on a logistic-like scale.
    pub(crate) fn from_prior(level: u8) -> Self {
        let probability = level_probability(level);
        Self((probability << 16) & !COUNT_MASK | PRIOR_COUNT)
    }

    /// The level that is nearest to this slot's probability.
    pub(crate) fn level(self) -> u8 {
        let probability = self.0 >> 16;
        let mut low = 0_u8;
        let mut high = 255_u8;
        while low < high {
            let middle = low + (high - low) / 2;
            if level_probability(middle) < probability { low = middle + 1 } else { high = middle }
        }
        if low > 0 {
            let (below, above) = (level_probability(low - 1), level_probability(low));
            if probability.abs_diff(below) < probability.abs_diff(above) {
                return low - 1;
            }
        }
        low
    }

    /// How many symbols it has seen, up to its memory.
    pub(crate) fn seen(self) -> u32 {
        self.0 & COUNT_MASK
    }

    /// Of 65536, never 0.
    #[inline(always)]
    fn probability(self) -> u64 {
        u64::from((self.0 >> 16) | 1)
    }

    #[inline(always)]
    fn learn(&mut self, bit: bool) {
        let count = self.0 & COUNT_MASK;
        let rate = u64::from(RATES[count.min(MEMORY) as usize]);
        let value = self.0 >> COUNT_BITS;
        // Both differences are below 2^22 and the rate below 2^16.
        let value = if bit {
            value + ((u64::from((1 << 22) - 1 - value) * rate) >> 16) as u32
        } else {
            value - ((u64::from(value) * rate) >> 16) as u32
        };
        self.0 = value << COUNT_BITS | (count + u32::from(count < MEMORY));
    }
}

/// Probability of 65536 of a level: 16 levels for each halving towards either end.
fn level_probability(level: u8) -> u32 {
    let (index, mirrored) =
        if level < 128 { (u32::from(level), false) } else { (255 - u32::from(level), true) };
    // 128 levels over 15 octaves below one half, linear inside an octave.
    let from_half = 127 - index;
    let octave = from_half * 15 / 128;
    let within = from_half * 15 % 128;
    let top = 32768 >> octave;
    let probability = (top - top * within / 256).max(1);
    if mirrored { 65536 - probability } else { probability }
}

/// Encodes or decodes: what a model says is the same for both.
pub(crate) trait Coder {
    /// Whether the new values are known: true for an encoder.
    const ENCODES: bool;
    /// Codes one bit; an encoder takes it, a decoder ignores it; both return it.
    fn bit(&mut self, slot: &mut Slot, bit: bool) -> bool;
    /// Codes up to 16 bits that nothing predicts.
    fn raw(&mut self, bits: u32, value: u32) -> u32;
}

/// Counts nothing and writes nothing, but teaches the slots: for priors.
pub(crate) struct Learner;

impl Coder for Learner {
    const ENCODES: bool = true;
    #[inline(always)]
    fn bit(&mut self, slot: &mut Slot, bit: bool) -> bool {
        slot.learn(bit);
        bit
    }
    #[inline(always)]
    fn raw(&mut self, _bits: u32, value: u32) -> u32 {
        value
    }
}

/// Once the range is narrower than this, 32 bits of it are settled.
const NARROW: u64 = 1 << 32;

/// A range encoder over 64 bits, whose carries go back into what was written.
pub(crate) struct Encoder {
    low: u64,
    range: u64,
    out: Vec<u8>,
}

impl Encoder {
    pub(crate) fn new() -> Self {
        Self { low: 0, range: u64::MAX, out: Vec::new() }
    }

    /// How many bytes there are so far; up to eight more follow from what was coded.
    pub(crate) fn written(&self) -> u64 {
        self.out.len() as u64
    }

    #[inline(always)]
    fn add(&mut self, amount: u64) {
        let (low, carries) = self.low.overflowing_add(amount);
        self.low = low;
        if carries {
            self.carry();
        }
    }

    fn carry(&mut self) {
        for byte in self.out.iter_mut().rev() {
            *byte = byte.wrapping_add(1);
            if *byte != 0 {
                return;
            }
        }
    }

    #[inline(always)]
    fn shift(&mut self) {
        if self.range < NARROW {
            self.out.extend_from_slice(&((self.low >> 32) as u32).to_be_bytes());
            self.low <<= 32;
            self.range <<= 32;
        }
    }

    /// The bytes; the decoder reads zeros after their end.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        // The shortest number whose continuation with zeros lies inside the interval.
        for bytes in 0..=8_u32 {
            let rest = (1_u128 << (64 - 8 * bytes)) - 1;
            let candidate = (u128::from(self.low) + rest) & !rest;
            if candidate - u128::from(self.low) < u128::from(self.range) {
                if candidate >> 64 != 0 {
                    self.carry();
                }
                self.out.extend_from_slice(&(candidate as u64).to_be_bytes()[..bytes as usize]);
                break;
            }
        }
        while self.out.last() == Some(&0) {
            self.out.pop();
        }
        self.out
    }
}

impl Coder for Encoder {
    const ENCODES: bool = true;

    #[inline(always)]
    fn bit(&mut self, slot: &mut Slot, bit: bool) -> bool {
        let bound = (self.range >> PROBABILITY_BITS) * slot.probability();
        if bit {
            self.range = bound;
        } else {
            self.add(bound);
            self.range -= bound;
        }
        slot.learn(bit);
        self.shift();
        bit
    }

    #[inline(always)]
    fn raw(&mut self, bits: u32, value: u32) -> u32 {
        self.range >>= bits;
        self.add(self.range * u64::from(value));
        self.shift();
        value
    }
}

/// The decoder of [`Encoder`]. Any bytes decode to something: what they decode to is checked by
/// a hash.
pub(crate) struct Decoder<'a> {
    /// The distance of the input from the interval's low end.
    code: u64,
    range: u64,
    input: &'a [u8],
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        let mut decoder = Self { code: 0, range: u64::MAX, input };
        decoder.code = u64::from(decoder.word()) << 32;
        decoder.code |= u64::from(decoder.word());
        decoder
    }

    #[inline(always)]
    fn word(&mut self) -> u32 {
        if let Some((word, rest)) = self.input.split_first_chunk::<4>() {
            self.input = rest;
            return u32::from_be_bytes(*word);
        }
        let mut word = [0; 4];
        word[..self.input.len()].copy_from_slice(self.input);
        self.input = &[];
        u32::from_be_bytes(word)
    }

    #[inline(always)]
    fn shift(&mut self) {
        if self.range < NARROW {
            self.range <<= 32;
            self.code = self.code << 32 | u64::from(self.word());
        }
    }
}

impl Coder for Decoder<'_> {
    const ENCODES: bool = false;

    #[inline(always)]
    fn bit(&mut self, slot: &mut Slot, _bit: bool) -> bool {
        let bound = (self.range >> PROBABILITY_BITS) * slot.probability();
        let bit = self.code < bound;
        if bit {
            self.range = bound;
        } else {
            self.code -= bound;
            self.range -= bound;
        }
        slot.learn(bit);
        self.shift();
        bit
    }

    #[inline(always)]
    fn raw(&mut self, bits: u32, _value: u32) -> u32 {
        self.range >>= bits;
        // Bits that no encoder writes may lie beyond the interval.
        let value = (self.code / self.range).min((1 << bits) - 1);
        self.code -= self.range * value;
        self.shift();
        value as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let mut state = 7_u64;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u32
        };
        for length in [0, 1, 2, 3, 10, 1000, 100_000] {
            let symbols: Vec<(bool, u32)> =
                (0..length).map(|_| (next() % 100 == 0, next() & 0x3ff)).collect();
            let mut encoder = Encoder::new();
            let mut slots = [Slot::default(); 2];
            for &(bit, value) in &symbols {
                encoder.bit(&mut slots[0], bit);
                encoder.raw(10, value);
                encoder.bit(&mut slots[1], !bit);
            }
            let bytes = encoder.finish();
            let mut decoder = Decoder::new(&bytes);
            let mut slots = [Slot::default(); 2];
            for &(bit, value) in &symbols {
                assert_eq!(decoder.bit(&mut slots[0], false), bit);
                assert_eq!(decoder.raw(10, 0), value);
                assert_eq!(decoder.bit(&mut slots[1], false), !bit);
            }
        }
    }

    #[test]
    fn levels_are_ordered_and_survive() {
        for level in 0..=255_u8 {
            assert_eq!(
                level_probability(Slot::from_prior(level).level()),
                level_probability(level)
            );
            if level > 0 {
                assert!(level_probability(level) >= level_probability(level - 1), "{level}");
            }
        }
    }
}
