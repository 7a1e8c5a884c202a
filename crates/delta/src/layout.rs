//! Blocks of the quantised types, taken apart into fields and put together again. The layouts
//! are those of ggml's `ggml-common.h`; every byte of a block belongs to exactly one field.

use slmops_artifact::gguf::TensorType;

/// The 16 levels of the non-linear 4-bit types (`kvalues_iq4nl`).
pub(crate) const IQ4_LEVELS: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// The most elements of a block.
pub(crate) const MAX_ELEMENTS: usize = 256;
/// The most groups of a block.
pub(crate) const MAX_GROUPS: usize = 16;

/// What a block of a type consists of.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) kind: TensorType,
    pub(crate) elements: usize,
    pub(crate) bytes: usize,
    /// Elements that share a scale.
    pub(crate) group: usize,
    /// How many values a code has.
    pub(crate) levels: usize,
    /// The code that means zero (before the minimum is added).
    pub(crate) zero: f32,
    /// Codes are indices of [`IQ4_LEVELS`].
    pub(crate) indexed: bool,
    pub(crate) minimum: Minimum,
    pub(crate) sub: Option<Sub>,
}

/// How a block stores its minimum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Minimum {
    None,
    /// One for the block, added.
    Added,
    /// A scale of minima, multiplied by the group's and subtracted.
    Subtracted,
}

/// Scales of groups.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sub {
    /// How many values one has.
    pub(crate) levels: usize,
    /// The value that means zero.
    pub(crate) zero: i32,
}

macro_rules! layouts {
    ($($kind:ident: $elements:literal / $bytes:literal, group $group:literal, levels $levels:literal, zero $zero:literal, $minimum:ident $(, sub $sub:literal - $sub_zero:literal)? $(, indexed $indexed:literal)?;)*) => {
        static LAYOUTS: &[Layout] = &[$(Layout {
            kind: TensorType::$kind,
            elements: $elements,
            bytes: $bytes,
            group: $group,
            levels: $levels,
            zero: $zero,
            indexed: false $(|| $indexed)?,
            minimum: Minimum::$minimum,
            sub: { let sub: Option<Sub> = None; $(let _ = sub; let sub = Some(Sub { levels: $sub, zero: $sub_zero });)? sub },
        }),*];
    };
}

layouts! {
    Q4_0: 32 / 18, group 32, levels 16, zero 8.0, None;
    Q4_1: 32 / 20, group 32, levels 16, zero 0.0, Added;
    Q5_0: 32 / 22, group 32, levels 32, zero 16.0, None;
    Q5_1: 32 / 24, group 32, levels 32, zero 0.0, Added;
    Q8_0: 32 / 34, group 32, levels 256, zero 128.0, None;
    Q2_K: 256 / 84, group 16, levels 4, zero 0.0, Subtracted, sub 16 - 0;
    Q3_K: 256 / 110, group 16, levels 8, zero 4.0, None, sub 64 - 32;
    Q4_K: 256 / 144, group 32, levels 16, zero 0.0, Subtracted, sub 64 - 0;
    Q5_K: 256 / 176, group 32, levels 32, zero 0.0, Subtracted, sub 64 - 0;
    Q6_K: 256 / 210, group 16, levels 64, zero 32.0, None, sub 256 - 128;
    IQ4_NL: 32 / 18, group 32, levels 16, zero 0.0, None, indexed true;
    IQ4_XS: 256 / 136, group 32, levels 16, zero 0.0, None, sub 64 - 32, indexed true;
}

impl Layout {
    /// The layout of a type that this codec takes apart.
    pub(crate) fn of(kind: TensorType) -> Option<&'static Self> {
        LAYOUTS.iter().find(|layout| layout.kind == kind)
    }

    pub(crate) fn groups(&self) -> usize {
        self.elements / self.group
    }
}

/// A block, taken apart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fields {
    /// The scale (of scales): F16 bits.
    pub(crate) scale: u16,
    /// The minimum, or the scale of minima: F16 bits.
    pub(crate) minimum: u16,
    pub(crate) scales: [u8; MAX_GROUPS],
    pub(crate) minima: [u8; MAX_GROUPS],
    pub(crate) codes: [u8; MAX_ELEMENTS],
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            scale: 0,
            minimum: 0,
            scales: [0; MAX_GROUPS],
            minima: [0; MAX_GROUPS],
            codes: [0; MAX_ELEMENTS],
        }
    }
}

fn word(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

fn put_word(block: &mut [u8], at: usize, word: u16) {
    block[at..at + 2].copy_from_slice(&word.to_le_bytes());
}

/// The number that F16 bits mean. Infinities and what is no number count as large: contexts
/// need no more, and this is a fraction of a conversion's time.
#[inline(always)]
pub(crate) fn number(bits: u16) -> f32 {
    // 2^112 moves the exponent from one type's bias to the other's.
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    let size = f32::from_bits(u32::from(bits & 0x7fff) << 13) * REBIAS;
    f32::from_bits(size.to_bits() | u32::from(bits & 0x8000) << 16)
}

impl Fields {
    /// The step and the base of a group: a number is `step * (code - zero) + base`.
    #[inline(always)]
    pub(crate) fn line(&self, layout: &Layout, group: usize) -> (f32, f32) {
        let scale = number(self.scale);
        let step = match layout.sub {
            None => scale,
            Some(sub) => scale * (i32::from(self.scales[group]) - sub.zero) as f32,
        };
        let base = match layout.minimum {
            Minimum::None => 0.0,
            Minimum::Added => number(self.minimum),
            Minimum::Subtracted => -number(self.minimum) * f32::from(self.minima[group]),
        };
        (step, base)
    }

    /// Takes `block` apart.
    #[inline(always)]
    pub(crate) fn unpack(&mut self, layout: &Layout, block: &[u8]) {
        let block = &block[..layout.bytes];
        let codes = &mut self.codes;
        match layout.kind {
            TensorType::Q4_0 | TensorType::IQ4_NL => {
                self.scale = word(block, 0);
                nibbles(&block[2..18], codes);
            }
            TensorType::Q4_1 => {
                self.scale = word(block, 0);
                self.minimum = word(block, 2);
                nibbles(&block[4..20], codes);
            }
            TensorType::Q5_0 => {
                self.scale = word(block, 0);
                fifths(&block[2..6], &block[6..22], codes);
            }
            TensorType::Q5_1 => {
                self.scale = word(block, 0);
                self.minimum = word(block, 2);
                fifths(&block[4..8], &block[8..24], codes);
            }
            TensorType::Q8_0 => {
                self.scale = word(block, 0);
                for (code, &byte) in codes.iter_mut().zip(&block[2..34]) {
                    *code = byte ^ 128;
                }
            }
            TensorType::Q2_K => {
                for (group, byte) in block[..16].iter().enumerate() {
                    self.scales[group] = byte & 15;
                    self.minima[group] = byte >> 4;
                }
                pairs(&block[16..80], codes);
                self.scale = word(block, 80);
                self.minimum = word(block, 82);
            }
            TensorType::Q3_K => {
                pairs(&block[32..96], codes);
                for (index, code) in codes.iter_mut().enumerate() {
                    *code |= (block[index % 32] >> (index / 32) & 1) << 2;
                }
                let packed = &block[96..108];
                for group in 0..16 {
                    let lower = packed[group % 8] >> (4 * (group / 8)) & 15;
                    let upper = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
                    self.scales[group] = lower | upper << 4;
                }
                self.scale = word(block, 108);
            }
            TensorType::Q4_K => {
                self.scale = word(block, 0);
                self.minimum = word(block, 2);
                self.sixes(&block[4..16]);
                halves(&block[16..144], &mut self.codes);
            }
            TensorType::Q5_K => {
                self.scale = word(block, 0);
                self.minimum = word(block, 2);
                self.sixes(&block[4..16]);
                let codes = &mut self.codes;
                halves(&block[48..176], codes);
                let high = &block[16..48];
                for (group, codes) in codes.chunks_exact_mut(32).enumerate() {
                    for (code, &byte) in codes.iter_mut().zip(high) {
                        *code |= (byte >> group & 1) << 4;
                    }
                }
            }
            TensorType::Q6_K => {
                for half in 0..2 {
                    let low = &block[64 * half..64 * half + 64];
                    let high = &block[128 + 32 * half..160 + 32 * half];
                    let codes = &mut codes[128 * half..128 * half + 128];
                    for column in 0..32 {
                        codes[column] = low[column] & 15 | (high[column] & 3) << 4;
                        codes[column + 32] = low[column + 32] & 15 | (high[column] >> 2 & 3) << 4;
                        codes[column + 64] = low[column] >> 4 | (high[column] >> 4 & 3) << 4;
                        codes[column + 96] = low[column + 32] >> 4 | (high[column] >> 6) << 4;
                    }
                }
                for group in 0..16 {
                    self.scales[group] = block[192 + group] ^ 128;
                }
                self.scale = word(block, 208);
            }
            TensorType::IQ4_XS => {
                self.scale = word(block, 0);
                let high = word(block, 2);
                for group in 0..8 {
                    let lower = block[4 + group / 2] >> (4 * (group % 2)) & 15;
                    self.scales[group] = lower | ((high >> (2 * group) & 3) as u8) << 4;
                }
                for group in 0..8 {
                    let at = 8 + 16 * group;
                    nibbles(&block[at..at + 16], &mut codes[32 * group..]);
                }
            }
            _ => unreachable!("only types with a layout are taken apart"),
        }
    }

    /// Puts a block together: the inverse of [`Fields::unpack`].
    #[inline(always)]
    pub(crate) fn pack(&self, layout: &Layout, block: &mut [u8]) {
        let block = &mut block[..layout.bytes];
        let codes = &self.codes;
        match layout.kind {
            TensorType::Q4_0 | TensorType::IQ4_NL => {
                put_word(block, 0, self.scale);
                put_nibbles(&mut block[2..18], codes);
            }
            TensorType::Q4_1 => {
                put_word(block, 0, self.scale);
                put_word(block, 2, self.minimum);
                put_nibbles(&mut block[4..20], codes);
            }
            TensorType::Q5_0 => {
                put_word(block, 0, self.scale);
                block[2..6].copy_from_slice(&put_fifths(codes).to_le_bytes());
                put_nibbles(&mut block[6..22], codes);
            }
            TensorType::Q5_1 => {
                put_word(block, 0, self.scale);
                put_word(block, 2, self.minimum);
                block[4..8].copy_from_slice(&put_fifths(codes).to_le_bytes());
                put_nibbles(&mut block[8..24], codes);
            }
            TensorType::Q8_0 => {
                put_word(block, 0, self.scale);
                for (byte, &code) in block[2..34].iter_mut().zip(codes) {
                    *byte = code ^ 128;
                }
            }
            TensorType::Q2_K => {
                for (group, byte) in block[..16].iter_mut().enumerate() {
                    *byte = self.scales[group] | self.minima[group] << 4;
                }
                put_pairs(&mut block[16..80], codes);
                put_word(block, 80, self.scale);
                put_word(block, 82, self.minimum);
            }
            TensorType::Q3_K => {
                put_pairs(&mut block[32..96], codes);
                block[..32].fill(0);
                for (index, &code) in codes.iter().enumerate() {
                    block[index % 32] |= (code >> 2 & 1) << (index / 32);
                }
                let packed = &mut block[96..108];
                packed.fill(0);
                for group in 0..16 {
                    let scale = self.scales[group];
                    packed[group % 8] |= (scale & 15) << (4 * (group / 8));
                    packed[8 + group % 4] |= (scale >> 4) << (2 * (group / 4));
                }
                put_word(block, 108, self.scale);
            }
            TensorType::Q4_K => {
                put_word(block, 0, self.scale);
                put_word(block, 2, self.minimum);
                self.put_sixes(&mut block[4..16]);
                put_halves(&mut block[16..144], codes);
            }
            TensorType::Q5_K => {
                put_word(block, 0, self.scale);
                put_word(block, 2, self.minimum);
                self.put_sixes(&mut block[4..16]);
                put_halves(&mut block[48..176], codes);
                let high = &mut block[16..48];
                high.fill(0);
                for (group, codes) in codes.chunks_exact(32).enumerate() {
                    for (byte, &code) in high.iter_mut().zip(codes) {
                        *byte |= (code >> 4 & 1) << group;
                    }
                }
            }
            TensorType::Q6_K => {
                for half in 0..2 {
                    let codes = &codes[128 * half..128 * half + 128];
                    for column in 0..32 {
                        let [a, b, c, d] = [0, 32, 64, 96].map(|offset| codes[column + offset]);
                        block[64 * half + column] = a & 15 | c << 4;
                        block[64 * half + column + 32] = b & 15 | d << 4;
                        block[128 + 32 * half + column] =
                            a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6;
                    }
                }
                for group in 0..16 {
                    block[192 + group] = self.scales[group] ^ 128;
                }
                put_word(block, 208, self.scale);
            }
            TensorType::IQ4_XS => {
                put_word(block, 0, self.scale);
                let mut high = 0_u16;
                block[4..8].fill(0);
                for group in 0..8 {
                    let scale = self.scales[group];
                    block[4 + group / 2] |= (scale & 15) << (4 * (group % 2));
                    high |= u16::from(scale >> 4) << (2 * group);
                }
                put_word(block, 2, high);
                for group in 0..8 {
                    let at = 8 + 16 * group;
                    put_nibbles(&mut block[at..at + 16], &codes[32 * group..]);
                }
            }
            _ => unreachable!("only types with a layout are put together"),
        }
    }

    /// The 6-bit scales and minima of Q4_K and Q5_K (`get_scale_min_k4`).
    fn sixes(&mut self, packed: &[u8]) {
        for group in 0..4 {
            self.scales[group] = packed[group] & 63;
            self.minima[group] = packed[group + 4] & 63;
            self.scales[group + 4] = packed[group + 8] & 15 | packed[group] >> 6 << 4;
            self.minima[group + 4] = packed[group + 8] >> 4 | packed[group + 4] >> 6 << 4;
        }
    }

    fn put_sixes(&self, packed: &mut [u8]) {
        for group in 0..4 {
            let (scale, minimum) = (self.scales[group + 4], self.minima[group + 4]);
            packed[group] = self.scales[group] | scale >> 4 << 6;
            packed[group + 4] = self.minima[group] | minimum >> 4 << 6;
            packed[group + 8] = scale & 15 | minimum << 4;
        }
    }
}

/// 16 bytes: the halves' codes in the lower and upper nibbles.
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (lower, upper) = codes[..32].split_at_mut(16);
    for ((&byte, lower), upper) in bytes[..16].iter().zip(lower).zip(upper) {
        *lower = byte & 15;
        *upper = byte >> 4;
    }
}

fn put_nibbles(bytes: &mut [u8], codes: &[u8]) {
    let (lower, upper) = codes[..32].split_at(16);
    for ((byte, lower), upper) in bytes[..16].iter_mut().zip(lower).zip(upper) {
        *byte = lower & 15 | upper << 4;
    }
}

fn fifths(high: &[u8], bytes: &[u8], codes: &mut [u8]) {
    nibbles(bytes, codes);
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    for (index, code) in codes[..32].iter_mut().enumerate() {
        *code |= ((high >> index & 1) as u8) << 4;
    }
}

fn put_fifths(codes: &[u8]) -> u32 {
    let bit = |(index, &code): (usize, &u8)| u32::from(code >> 4 & 1) << index;
    codes[..32].iter().enumerate().map(bit).sum()
}

/// 64 bytes of 2-bit codes in the order of Q2_K and Q3_K.
fn pairs(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes[..64].chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (quarter, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, &byte) in codes.iter_mut().zip(bytes) {
                *code = byte >> (2 * quarter) & 3;
            }
        }
    }
}

fn put_pairs(bytes: &mut [u8], codes: &[u8]) {
    bytes.fill(0);
    for (bytes, codes) in bytes[..64].chunks_exact_mut(32).zip(codes.chunks_exact(128)) {
        for (quarter, codes) in codes.chunks_exact(32).enumerate() {
            for (byte, &code) in bytes.iter_mut().zip(codes) {
                *byte |= (code & 3) << (2 * quarter);
            }
        }
    }
}

/// 128 bytes: of each 32, the lower nibbles are one group's codes and the upper the next one's.
fn halves(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes[..128].chunks_exact(32).zip(codes.chunks_exact_mut(64)) {
        let (lower, upper) = codes.split_at_mut(32);
        for ((&byte, lower), upper) in bytes.iter().zip(lower).zip(upper) {
            *lower = byte & 15;
            *upper = byte >> 4;
        }
    }
}

fn put_halves(bytes: &mut [u8], codes: &[u8]) {
    for (bytes, codes) in bytes[..128].chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
        let (lower, upper) = codes.split_at(32);
        for ((byte, lower), upper) in bytes.iter_mut().zip(lower).zip(upper) {
            *byte = lower & 15 | upper << 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use slmops_artifact::gguf::dequantise;

    use super::*;

    /// Bytes without order, but with finite scales.
    fn noise(layout: &Layout, blocks: usize) -> Vec<u8> {
        let mut state = layout.bytes as u64;
        (0..layout.bytes * blocks)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect()
    }

    #[test]
    fn every_byte_survives_in_every_layout() {
        for layout in LAYOUTS {
            assert_eq!(layout.bytes as u64, layout.kind.block_bytes(), "{}", layout.kind);
            assert_eq!(layout.elements as u64, layout.kind.block_elements(), "{}", layout.kind);
            for block in noise(layout, 50).chunks_exact(layout.bytes) {
                let mut fields = Fields::default();
                fields.unpack(layout, block);
                let mut again = vec![0xaa; layout.bytes];
                fields.pack(layout, &mut again);
                assert_eq!(block, again, "{}", layout.kind);
            }
        }
    }

    #[test]
    fn fields_mean_what_the_dequantiser_says() {
        for layout in LAYOUTS {
            for block in noise(layout, 20).chunks_exact(layout.bytes) {
                let expected = dequantise(layout.kind, block).unwrap();
                let mut fields = Fields::default();
                fields.unpack(layout, block);
                for (index, &expected) in expected.iter().enumerate() {
                    let (step, base) = fields.line(layout, index / layout.group);
                    let code = fields.codes[index];
                    let level = if layout.indexed {
                        IQ4_LEVELS[usize::from(code)]
                    } else {
                        f32::from(code) - layout.zero
                    };
                    let found = step * level + base;
                    // The dequantiser multiplies in another order.
                    let tolerance = (step * 64.0).abs().max(base.abs()) * 1e-5;
                    assert!(
                        (found - expected).abs() <= tolerance || !expected.is_finite(),
                        "{}: {found} {expected}",
                        layout.kind
                    );
                }
            }
        }
    }
}
