//! Rounding new weights to the scales that an old version has.

use slmops_artifact::gguf::TensorType;

use crate::layout::{Fields, Layout};
use crate::planes::place;

/// Quantises `weights` with the scales and minima of `base`, blocks of type `kind` that hold as
/// many weights: each code is the one whose number lies nearest. Such a version costs less to
/// send, since only codes differ; it is a little less exact, because scales that fit the old
/// weights best fit the new ones nearly so. `None` for types whose blocks are not taken apart,
/// and where the lengths do not belong together.
pub fn round_to_scales(kind: TensorType, base: &[u8], weights: &[f32]) -> Option<Vec<u8>> {
    let layout = Layout::of(kind)?;
    if kind.bytes_of(weights.len() as u64) != Some(base.len() as u64) {
        return None;
    }
    let mut out = base.to_vec();
    let mut fields = Fields::default();
    let blocks = out.chunks_exact_mut(layout.bytes).zip(weights.chunks_exact(layout.elements));
    for (block, weights) in blocks {
        fields.unpack(layout, block);
        for (group, weights) in weights.chunks_exact(layout.group).enumerate() {
            let (step, base) = fields.line(layout, group);
            // Without a step, every code means the same.
            if step == 0.0 {
                continue;
            }
            for (offset, &weight) in weights.iter().enumerate() {
                fields.codes[group * layout.group + offset] = place(layout, weight, step, base).0;
            }
        }
        fields.pack(layout, block);
    }
    Some(out)
}
