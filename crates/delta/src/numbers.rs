//! Coding plain numbers (F32, F16, BF16) and plain bytes against old ones.

use half::{bf16, f16};
use slmops_artifact::gguf::{TensorType, dequantise_into};

use crate::coder::{Coder, Slot};
use crate::model::{Model, Number, SIZES, SLOTS, at, octave_halves, with_inverse};
use crate::planes::Start;

/// Numbers or bytes that share one flag for "nothing here changed".
const CELL: usize = 8;
/// Numbers that are predicted at a time from another type.
const PIECE: usize = 256;
/// How fast the estimate of the noise follows, per number.
const NOISE_RATE: f32 = 1.0 / 64.0;

/// A type whose elements are single numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plain {
    F32,
    F16,
    Bf16,
}

impl Plain {
    fn of(kind: TensorType) -> Option<Self> {
        Some(match kind {
            TensorType::F32 => Self::F32,
            TensorType::F16 => Self::F16,
            TensorType::BF16 => Self::Bf16,
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn mask(self) -> u32 {
        if self == Self::F32 { u32::MAX } else { 0xffff }
    }

    fn get(self, bytes: &[u8]) -> u32 {
        match self {
            Self::F32 => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            _ => u32::from(u16::from_le_bytes([bytes[0], bytes[1]])),
        }
    }

    fn put(self, bits: u32, bytes: &mut [u8]) {
        bytes.copy_from_slice(&bits.to_le_bytes()[..self.bytes()]);
    }

    /// The bits of the nearest number of this type.
    fn nearest(self, number: f32) -> u32 {
        match self {
            Self::F32 => number.to_bits(),
            Self::F16 => u32::from(f16::from_f32(number).to_bits()),
            Self::Bf16 => u32::from(bf16::from_f32(number).to_bits()),
        }
    }

    /// Bits in the order of the numbers that they mean.
    fn ordinal(self, bits: u32) -> u32 {
        let sign = (self.mask() >> 1) + 1;
        if bits & sign != 0 { !bits & self.mask() } else { bits | sign }
    }

    /// The inverse of [`Plain::ordinal`].
    fn bits_at(self, ordinal: u32) -> u32 {
        let sign = (self.mask() >> 1) + 1;
        if ordinal & sign != 0 { ordinal & !sign } else { !ordinal & self.mask() }
    }

    /// The distance between neighbours, as a power of two.
    fn spacing(self, bits: u32) -> f32 {
        let (exponent, unit) = match self {
            Self::F32 => (bits >> 23 & 255, 150),
            Self::F16 => (bits >> 10 & 31, 25),
            Self::Bf16 => (bits >> 7 & 255, 134),
        };
        let exponent = exponent.max(1) as i32 - unit;
        if exponent < -126 {
            f32::MIN_POSITIVE
        } else {
            f32::from_bits(((exponent + 127) as u32) << 23)
        }
    }
}

/// Whether this module codes `kind` as numbers.
pub(crate) fn is_plain(kind: TensorType) -> bool {
    Plain::of(kind).is_some()
}

/// Codes plain numbers against as many of any type that can be dequantised.
pub(crate) fn numbers<C: Coder>(
    coder: &mut C,
    model: &mut Model,
    (kind, old_kind): (TensorType, TensorType),
    start: Start,
    old: &[u8],
    new: &mut [u8],
) {
    let Some(plain) = Plain::of(kind) else { return };
    let slots = &mut *model.slots;
    let mut state = Number::new(at::SCALE, start.noise(), NOISE_RATE);
    let mut local = 0;
    let old_bytes = PIECE / old_kind.block_elements() as usize * old_kind.block_bytes() as usize;
    let mut converted = [0.0_f32; PIECE];
    let mut bits = [0_u32; PIECE];
    for (old, new) in old.chunks(old_bytes).zip(new.chunks_mut(PIECE * plain.bytes())) {
        let count = new.len() / plain.bytes();
        if kind == old_kind {
            for (bits, bytes) in bits.iter_mut().zip(old.chunks_exact(plain.bytes())) {
                *bits = plain.get(bytes);
            }
        } else {
            if dequantise_into(old_kind, old, &mut converted[..count]).is_err() {
                // Lengths and types are checked before; zeros predict as well as anything.
                converted.fill(0.0);
            }
            for (bits, &number) in bits.iter_mut().zip(&converted[..count]) {
                *bits = plain.nearest(number);
            }
        }
        for (old, new) in bits[..count].chunks(CELL).zip(new.chunks_mut(CELL * plain.bytes())) {
            cell(coder, slots, &mut state, &mut local, plain, old, new);
        }
    }
}

fn cell<C: Coder>(
    coder: &mut C,
    slots: &mut [Slot; SLOTS],
    state: &mut Number,
    local: &mut usize,
    plain: Plain,
    old: &[u32],
    new: &mut [u8],
) {
    let differs = C::ENCODES
        && old.iter().zip(new.chunks_exact(plain.bytes())).any(|(&old, new)| plain.get(new) != old);
    let differs = coder.bit(&mut slots[at::CELL + *local], differs);
    *local = usize::from(differs) + usize::from(differs && *local > 0);
    for (&old, new) in old.iter().zip(new.chunks_exact_mut(plain.bytes())) {
        if !differs {
            plain.put(old, new);
            continue;
        }
        let ordinal = plain.ordinal(old);
        let known = if C::ENCODES {
            let difference = plain.ordinal(plain.get(new)).wrapping_sub(ordinal);
            if plain == Plain::F32 { difference as i32 } else { i32::from(difference as i16) }
        } else {
            0
        };
        let spacing = plain.spacing(old);
        let found = match plain {
            Plain::F32 => wide(coder, slots, state, spacing, known),
            _ => state.code(coder, slots, with_inverse(spacing), 0.0, 1, known),
        };
        let ordinal = ordinal.wrapping_add(found as u32) & plain.mask();
        plain.put(plain.bits_at(ordinal), new);
    }
}

/// Codes a difference that may take all 32 bits: its length in bits, then the bits, of which
/// only the first is worth predicting.
fn wide<C: Coder>(
    coder: &mut C,
    slots: &mut [Slot; SLOTS],
    state: &mut Number,
    spacing: f32,
    difference: i32,
) -> i32 {
    // A full octave each, from 2^-3 to 2^20.
    let ratio = state.mean / spacing;
    let low = octave_halves(ratio, -3) / 2;
    let expected = if ratio >= 256.0 { 11 + octave_halves(ratio, 8) / 2 } else { low };
    let tree = at::FLOAT_CLASS + expected.min(SIZES - 1) * 64;
    let magnitude = difference.unsigned_abs();
    // 0 for nothing, else one more than the position of the highest bit: up to 32, since
    // i32::MIN has no positive counterpart.
    let class = if magnitude == 0 { 0 } else { magnitude.ilog2() + 1 };
    let mut node = 1_usize;
    for bit in (0..6).rev() {
        node = node << 1 | usize::from(coder.bit(&mut slots[tree + node], class >> bit & 1 == 1));
    }
    let class = (node as u32 & 63).min(32);
    let mut found = 0;
    if class > 0 {
        let negative = coder.bit(&mut slots[at::CODE_SIGN], difference < 0);
        let mut size = 1_u32;
        let mut left = class - 1;
        if left > 0 {
            left -= 1;
            let slot = &mut slots[at::FLOAT_TOP + class as usize];
            let top = coder.bit(slot, magnitude >> left & 1 == 1);
            size = size << 1 | u32::from(top);
        }
        while left > 0 {
            let bits = left.min(16);
            left -= bits;
            size = size << bits | coder.raw(bits, magnitude >> left & ((1 << bits) - 1));
        }
        found = if negative { size.wrapping_neg() as i32 } else { size as i32 };
    }
    let seen = found.unsigned_abs() as f32 * spacing;
    if seen.is_finite() {
        state.mean += (seen - state.mean) * NOISE_RATE;
    }
    found
}

/// Codes bytes against as many old ones; `stride` is the length of the records that they form.
pub(crate) fn bytes<C: Coder>(
    coder: &mut C,
    model: &mut Model,
    stride: usize,
    old: &[u8],
    new: &mut [u8],
) {
    let slots = &mut *model.slots;
    let (mut local, mut position) = (0, 0);
    for (old, new) in old.chunks(CELL).zip(new.chunks_mut(CELL)) {
        let differs = C::ENCODES && old != &*new;
        let differs = coder.bit(&mut slots[at::CELL + local], differs);
        local = usize::from(differs) + usize::from(differs && local > 0);
        if !differs {
            new.copy_from_slice(old);
            position = (position + CELL) % stride;
            continue;
        }
        let mut before = 0;
        for (&old, new) in old.iter().zip(new) {
            let known = new.wrapping_sub(old);
            let column = position.min(255);
            let changed = coder.bit(&mut slots[at::BYTE + column * 3 + before], known != 0);
            let mut node = 0;
            if changed {
                let tree = at::BYTE_TREE + 256 * usize::from(before == 2);
                node = 1_usize;
                for bit in (0..8).rev() {
                    let set = coder.bit(&mut slots[tree + node], known >> bit & 1 == 1);
                    node = node << 1 | usize::from(set);
                }
            }
            *new = old.wrapping_add(node as u8);
            before = if changed { (before + 1).min(2) } else { 0 };
            position = (position + 1) % stride;
        }
    }
}

/// How far numbers of one plain type moved on average, from a sample.
pub(crate) fn measure(kind: TensorType, old: &[u8], new: &[u8]) -> Start {
    let Some(plain) = Plain::of(kind) else { return Start::default() };
    let pairs = old.chunks_exact(plain.bytes()).zip(new.chunks_exact(plain.bytes()));
    let skip = (old.len() / plain.bytes() / 4096).max(1);
    let (mut sum, mut count) = (0.0_f64, 0_u32);
    for (old, new) in pairs.step_by(skip) {
        let (old, new) = (plain.get(old), plain.get(new));
        let moved = plain.ordinal(old).abs_diff(plain.ordinal(new));
        sum += f64::from(moved) * f64::from(plain.spacing(old));
        count += 1;
    }
    Start::of((sum / f64::from(count.max(1))) as f32)
}

/// The differences of plain numbers as ordinals, or of bytes, one after the other.
pub(crate) fn differences(
    kind: Option<TensorType>,
    old: &[u8],
    new: &[u8],
    mut each: impl FnMut(i32),
) {
    let Some(plain) = kind.and_then(Plain::of) else {
        old.iter().zip(new).for_each(|(old, new)| each(i32::from(new.wrapping_sub(*old) as i8)));
        return;
    };
    for (old, new) in old.chunks_exact(plain.bytes()).zip(new.chunks_exact(plain.bytes())) {
        let (old, new) = (plain.ordinal(plain.get(old)), plain.ordinal(plain.get(new)));
        each(new.wrapping_sub(old) as i32);
    }
}
