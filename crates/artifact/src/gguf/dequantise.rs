//! Stored blocks to numbers. The layouts are those of ggml's `ggml-common.h` and the formulas
//! those of its `dequantize_row_*`; operations keep ggml's order, so that results are equal bit
//! for bit.

use half::f16;

use super::{Fault, GgufError, TensorType};

/// The 16 levels of the non-linear 4-bit types (`kvalues_iq4nl`).
const IQ4_LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the 16 values of E2M1 (OCP Microscaling Formats v1.0, section 5.3.3).
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The numbers behind the stored bytes of whole blocks.
///
/// # Errors
/// As [`dequantise_into`].
pub fn dequantise(kind: TensorType, data: &[u8]) -> Result<Vec<f32>, GgufError> {
    let blocks = data.len() as u64 / kind.block_bytes();
    // At most 16 times the bytes at hand: the densest type stores 256 numbers in 50 bytes.
    let mut numbers = vec![0.0; (blocks * kind.block_elements()) as usize];
    dequantise_into(kind, data, &mut numbers)?;
    Ok(numbers)
}

/// Writes the numbers behind the stored bytes of whole blocks to `numbers`.
///
/// # Errors
/// [`GgufError::Unsupported`] for types without a dequantiser here, and where the lengths of
/// `data` and `numbers` do not belong together.
pub fn dequantise_into(
    kind: TensorType,
    data: &[u8],
    numbers: &mut [f32],
) -> Result<(), GgufError> {
    if kind.bytes_of(numbers.len() as u64) != Some(data.len() as u64) {
        let fault = Fault::Other("gives another number of elements than asked for");
        return Err(GgufError::unsupported(format!("{kind} data"), fault));
    }
    let scalar: Option<fn(&[u8]) -> f32> = match kind {
        TensorType::F32 => {
            Some(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        }
        TensorType::F16 => Some(|bytes| half_at(bytes, 0)),
        TensorType::BF16 => Some(|bytes| half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()),
        TensorType::F64 => Some(|bytes| {
            f64::from_le_bytes(bytes.try_into().expect("blocks of F64 have 8 bytes")) as f32
        }),
        _ => None,
    };
    if let Some(scalar) = scalar {
        let stored = data.chunks_exact(kind.block_bytes() as usize);
        numbers.iter_mut().zip(stored).for_each(|(number, bytes)| *number = scalar(bytes));
        return Ok(());
    }
    let block: fn(&[u8], &mut [f32]) = match kind {
        TensorType::Q4_0 => q4_0,
        TensorType::Q4_1 => q4_1,
        TensorType::Q5_0 => q5_0,
        TensorType::Q5_1 => q5_1,
        TensorType::Q8_0 => q8_0,
        TensorType::Q2_K => q2_k,
        TensorType::Q3_K => q3_k,
        TensorType::Q4_K => q4_k,
        TensorType::Q5_K => q5_k,
        TensorType::Q6_K => q6_k,
        TensorType::IQ4_NL => iq4_nl,
        TensorType::IQ4_XS => iq4_xs,
        TensorType::MXFP4 => mxfp4,
        _ => return Err(GgufError::unsupported("data", Fault::NoDequantiser(kind.name()))),
    };
    let stored = data.chunks_exact(kind.block_bytes() as usize);
    let out = numbers.chunks_exact_mut(kind.block_elements() as usize);
    stored.zip(out).for_each(|(bytes, out)| block(bytes, out));
    Ok(())
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Layout: scale, 16 bytes with the halves' elements in the lower and upper nibbles.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    for (index, &byte) in block[2..18].iter().enumerate() {
        out[index] = (f32::from(byte & 15) - 8.0) * scale;
        out[index + 16] = (f32::from(byte >> 4) - 8.0) * scale;
    }
}

/// Layout: scale, minimum, nibbles as in Q4_0.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (index, &byte) in block[4..20].iter().enumerate() {
        out[index] = f32::from(byte & 15) * scale + minimum;
        out[index + 16] = f32::from(byte >> 4) * scale + minimum;
    }
}

/// The two 5-bit numbers at `index`: nibbles from `nibbles`, fifth bits from `high`.
fn five_bits(high: u32, nibbles: &[u8], index: usize) -> (f32, f32) {
    let fifth = |bit: usize| ((high >> bit) & 1) << 4;
    let lower = u32::from(nibbles[index] & 15) | fifth(index);
    let upper = u32::from(nibbles[index] >> 4) | fifth(index + 16);
    (lower as f32, upper as f32)
}

/// Layout: scale, fifth bits, nibbles.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for index in 0..16 {
        let (lower, upper) = five_bits(high, &block[6..], index);
        out[index] = (lower - 16.0) * scale;
        out[index + 16] = (upper - 16.0) * scale;
    }
}

/// Layout: scale, minimum, fifth bits, nibbles.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for index in 0..16 {
        let (lower, upper) = five_bits(high, &block[8..], index);
        out[index] = lower * scale + minimum;
        out[index + 16] = upper * scale + minimum;
    }
}

/// Layout: scale, 32 signed bytes.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    for (number, &byte) in out.iter_mut().zip(&block[2..34]) {
        *number = f32::from(byte as i8) * scale;
    }
}

/// Layout: 16 bytes of scales (lower nibble) and minima (upper nibble), 64 bytes of 2-bit
/// numbers, scale of scales, scale of minima.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, numbers) = (&block[..16], &block[16..80]);
    let (scale, minimum) = (half_at(block, 80), half_at(block, 82));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let shift = 2 * ((group % 8) / 2);
        let start = 32 * (group / 8) + 16 * (group % 2);
        let scale = scale * f32::from(scales[group] & 15);
        let minimum = minimum * f32::from(scales[group] >> 4);
        for (number, &byte) in out.iter_mut().zip(&numbers[start..start + 16]) {
            *number = scale * f32::from((byte >> shift) & 3) - minimum;
        }
    }
}

/// Layout: 32 bytes of third bits, 64 bytes of 2-bit numbers, 12 bytes of 16 6-bit scales, scale
/// of scales.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, numbers, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let scale = half_at(block, 108);
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let lower = if group < 8 { scales[group] & 15 } else { scales[group - 8] >> 4 };
        let upper = (scales[8 + group % 4] >> (2 * (group / 4))) & 3;
        let scale = scale * (f32::from(lower | upper << 4) - 32.0);
        let pair = group / 2;
        let shift = 2 * (pair % 4);
        let half = 16 * (group % 2);
        let start = 32 * (group / 8) + half;
        for (index, number) in out.iter_mut().enumerate() {
            let low = f32::from((numbers[start + index] >> shift) & 3);
            let third = high[half + index] & (1 << pair) != 0;
            *number = scale * (low - if third { 0.0 } else { 4.0 });
        }
    }
}

/// The 6-bit scale and minimum of group `group` (0 to 7) of Q4_K and Q5_K.
fn six_bits(scales: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (scales[group] & 63, scales[group + 4] & 63)
    } else {
        (
            (scales[group + 4] & 15) | (scales[group - 4] >> 6) << 4,
            (scales[group + 4] >> 4) | (scales[group] >> 6) << 4,
        )
    };
    (scale.into(), minimum.into())
}

/// Layout: scale of scales, scale of minima, 12 bytes of 6-bit scales and minima, 128 bytes of
/// nibbles.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let (scales, nibbles) = (&block[4..16], &block[16..144]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_minimum) = six_bits(scales, group);
        let (scale, minimum) = (scale * group_scale, minimum * group_minimum);
        let start = 32 * (group / 2);
        let shift = 4 * (group % 2);
        for (number, &byte) in out.iter_mut().zip(&nibbles[start..start + 32]) {
            *number = scale * f32::from((byte >> shift) & 15) - minimum;
        }
    }
}

/// Layout: as Q4_K, with 32 bytes of fifth bits before the nibbles.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let (scales, high, nibbles) = (&block[4..16], &block[16..48], &block[48..176]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_minimum) = six_bits(scales, group);
        let (scale, minimum) = (scale * group_scale, minimum * group_minimum);
        let start = 32 * (group / 2);
        let shift = 4 * (group % 2);
        for (index, number) in out.iter_mut().enumerate() {
            let low = (nibbles[start + index] >> shift) & 15;
            let fifth = ((high[index] >> group) & 1) << 4;
            *number = scale * f32::from(low | fifth) - minimum;
        }
    }
}

/// Layout: 128 bytes of nibbles, 64 bytes of upper bit pairs, 16 signed scales, scale of scales.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 208);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let nibbles = &block[64 * half..64 * half + 64];
        let pairs = &block[128 + 32 * half..128 + 32 * half + 32];
        let scales = &block[192 + 8 * half..192 + 8 * half + 8];
        for (index, number) in out.iter_mut().enumerate() {
            let (quarter, column) = (index / 32, index % 32);
            let low = (nibbles[index % 64] >> (4 * (quarter / 2))) & 15;
            let high = (pairs[column] >> (2 * quarter)) & 3;
            let group_scale = f32::from(scales[index / 16] as i8);
            *number = scale * group_scale * (f32::from(low | high << 4) - 32.0);
        }
    }
}

/// Layout: as Q4_0; the nibbles are indices of levels.
fn iq4_nl(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    for (index, &byte) in block[2..18].iter().enumerate() {
        out[index] = scale * f32::from(IQ4_LEVELS[usize::from(byte & 15)]);
        out[index + 16] = scale * f32::from(IQ4_LEVELS[usize::from(byte >> 4)]);
    }
}

/// Layout: scale of scales, 2 bytes of upper pairs and 4 bytes of lower nibbles of 8 6-bit
/// scales, 128 bytes of nibbles that are indices of levels.
fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let (low, nibbles) = (&block[4..8], &block[8..136]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let lower = (low[group / 2] >> (4 * (group % 2))) & 15;
        let upper = ((high >> (2 * group)) & 3) as u8;
        let scale = scale * (f32::from(lower | upper << 4) - 32.0);
        for (index, &byte) in nibbles[16 * group..16 * group + 16].iter().enumerate() {
            out[index] = scale * f32::from(IQ4_LEVELS[usize::from(byte & 15)]);
            out[index + 16] = scale * f32::from(IQ4_LEVELS[usize::from(byte >> 4)]);
        }
    }
}

/// Layout: exponent (E8M0), nibbles that are E2M1 numbers.
fn mxfp4(block: &[u8], out: &mut [f32]) {
    // 2^(exponent - 128): half the scale, since the levels are doubled. The two least exponents
    // give subnormal numbers.
    let exponent = u32::from(block[0]);
    let bits = if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 };
    let scale = f32::from_bits(bits);
    for (index, &byte) in block[1..17].iter().enumerate() {
        out[index] = f32::from(E2M1_DOUBLED[usize::from(byte & 15)]) * scale;
        out[index + 16] = f32::from(E2M1_DOUBLED[usize::from(byte >> 4)]) * scale;
    }
}
