//! The yardstick of benchmarks: what differences would cost without any context.

use std::collections::{BTreeMap, HashMap};

use slmops_artifact::gguf::TensorType;

use crate::encode::{Region, regions};
use crate::layout::{Fields, Layout, Minimum};
use crate::numbers;
use crate::planes::ordinal;

/// The bytes of a delta that codes every field's differences at their order-0 entropy: per tensor
/// and field, as if the frequencies were known to both sides for nothing. Codes differ modulo
/// their range, scales by F16 ordinals. Equal tensors are free, and so is what is no tensor. Summed
/// up for the tensors of each type; `None` is for types that are not known.
///
/// Tensors that have no counterpart of the same type and size count whole. `None` where a file is
/// of no known format.
pub fn order0_bytes(old: &[u8], new: &[u8]) -> Option<BTreeMap<Option<TensorType>, u64>> {
    let (olds, news) = (regions(old)?, regions(new)?);
    let by_name: HashMap<&str, &Region> =
        olds.iter().filter_map(|region| Some((region.name.as_deref()?, region))).collect();
    let mut bits: BTreeMap<Option<TensorType>, f64> = BTreeMap::new();
    for region in news.iter().filter(|region| region.name.is_some()) {
        let after = &new[region.bytes.start as usize..region.bytes.end as usize];
        let same = region.name.as_deref().and_then(|name| by_name.get(name)).filter(|found| {
            found.kind == region.kind && found.bytes.end - found.bytes.start == after.len() as u64
        });
        let bits = bits.entry(region.kind).or_default();
        let Some(same) = same else {
            *bits += after.len() as f64 * 8.0;
            continue;
        };
        let before = &old[same.bytes.start as usize..same.bytes.end as usize];
        if before != after {
            *bits += tensor_bits(region, before, after);
        }
    }
    Some(bits.into_iter().map(|(kind, bits)| (kind, (bits / 8.0).ceil() as u64)).collect())
}

/// How often each difference occurs.
#[derive(Default)]
struct Counts(HashMap<i32, u64>);

impl Counts {
    fn add(&mut self, difference: i32) {
        *self.0.entry(difference).or_default() += 1;
    }

    fn bits(&self) -> f64 {
        let total = self.0.values().sum::<u64>() as f64;
        self.0.values().map(|&count| count as f64 * (total / count as f64).log2()).sum()
    }
}

fn tensor_bits(region: &Region, old: &[u8], new: &[u8]) -> f64 {
    let Some(layout) = region.kind.and_then(Layout::of) else {
        let mut counts = Counts::default();
        numbers::differences(region.kind, old, new, |difference| counts.add(difference));
        return counts.bits();
    };
    let mut counts: [Counts; 5] = Default::default();
    let [codes, scale, minimum, scales, minima] = &mut counts;
    let mut by_code = [0_u64; 256];
    let (mut before, mut after) = (Fields::default(), Fields::default());
    let wrapped = |new: u16, old: u16| i32::from(ordinal(new).wrapping_sub(ordinal(old)) as i16);
    for (old, new) in old.chunks_exact(layout.bytes).zip(new.chunks_exact(layout.bytes)) {
        before.unpack(layout, old);
        after.unpack(layout, new);
        let mask = (layout.levels - 1) as u8;
        for (new, old) in after.codes.iter().zip(&before.codes).take(layout.elements) {
            by_code[usize::from(new.wrapping_sub(*old) & mask)] += 1;
        }
        scale.add(wrapped(after.scale, before.scale));
        if layout.minimum != Minimum::None {
            minimum.add(wrapped(after.minimum, before.minimum));
        }
        if layout.sub.is_some() {
            for group in 0..layout.groups() {
                scales.add(i32::from(after.scales[group]) - i32::from(before.scales[group]));
                if layout.minimum == Minimum::Subtracted {
                    minima.add(i32::from(after.minima[group]) - i32::from(before.minima[group]));
                }
            }
        }
    }
    let counted = by_code.iter().enumerate().filter(|(_, count)| **count > 0);
    codes.0.extend(counted.map(|(code, &count)| (code as i32, count)));
    counts.iter().map(Counts::bits).sum()
}
