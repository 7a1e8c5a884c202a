//! A fire drill: damaging a model on purpose, to see that a fleet notices and takes it back.
//!
//! The damaged model loads, runs at full speed and writes sentences; it only knows less and writes
//! worse. That is the failure that checksums and health checks miss, and that probes on the device
//! are there to catch. The file says of itself that it is damaged ([`DAMAGE_KEY`]).

use std::path::Path;

use slmops_artifact::gguf::{self, GgufFile, TensorInfo};
use slmops_artifact::lineage::Step;

use crate::{OptimizeError, space};

/// The metadata entry that a damaged file carries: what was done to it.
pub const DAMAGE_KEY: &str = "slmops.rehearsal.damage";

/// What is damaged, and how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Decides the permutations; the same seed makes the same file.
    pub seed: u64,
    /// The share of layers that is damaged, percent; at least one layer.
    pub layers_percent: u32,
}

impl Default for Damage {
    fn default() -> Self {
        Self { seed: 1, layers_percent: 10 }
    }
}

/// Writes a copy of the model `input` to `output` in which the rows of the feed-forward output
/// matrices (`blk.N.ffn_down.weight`) of some middle layers stand in another order. Rows are moved
/// whole, so every tensor type can be damaged and the file stays as valid as it was.
///
/// Returns the step for its lineage, which names the layers.
///
/// # Errors
/// The input is no GGUF file or has no such tensors; the disk is full.
pub fn damage(input: &Path, output: &Path, what: &Damage) -> Result<Step, OptimizeError> {
    let model =
        |source| OptimizeError::Model { operation: "damage", path: input.to_owned(), source };
    let file = gguf::open(input).map_err(model)?;
    let layers = middle_layers(&file, what.layers_percent);
    if layers.is_empty() {
        return Err(OptimizeError::NothingToDamage { path: input.to_owned() });
    }
    space::check(output, file.bytes().len() as u64)?;
    let shown = layers.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    let mut writer = gguf::Writer::with_metadata_of(file.header());
    let text = format!("rows of ffn_down permuted in layers {shown}, seed {}", what.seed);
    writer.set(DAMAGE_KEY, text.as_str());
    for tensor in file.header().tensors() {
        writer.tensor(&tensor.name, &tensor.dimensions, tensor.tensor_type);
    }
    let mut random = SplitMix64(what.seed);
    let written = writer.create(output, |out| {
        for tensor in file.header().tensors() {
            let data = file.data(tensor);
            if layer_of(tensor).is_some_and(|layer| layers.contains(&layer)) {
                let rows = (tensor.elements() / tensor.row_elements().max(1)) as usize;
                let row_bytes = data.len() / rows.max(1);
                for row in random.permutation(rows) {
                    out.write(&data[row * row_bytes..(row + 1) * row_bytes])?;
                }
            } else {
                out.write(data)?;
            }
        }
        Ok(())
    });
    written.map_err(model)?;
    let settings = [("layers", shown), ("seed", what.seed.to_string())];
    Ok(Step::new("damage for a rehearsal", settings))
}

/// The layers around the middle that have the tensor: the first turn meaning into numbers and the
/// last back again, and damage there makes noise instead of text.
fn middle_layers(file: &GgufFile, percent: u32) -> Vec<u32> {
    let mut layers: Vec<u32> = file.header().tensors().iter().filter_map(layer_of).collect();
    layers.sort_unstable();
    let count = (layers.len() * percent.min(100) as usize).div_ceil(100);
    let start = (layers.len() - count) / 2;
    layers[start..start + count].to_vec()
}

/// `12` for `blk.12.ffn_down.weight`.
fn layer_of(tensor: &TensorInfo) -> Option<u32> {
    let name = tensor.name.strip_prefix("blk.")?.strip_suffix(".ffn_down.weight")?;
    (tensor.dimensions.len() == 2).then_some(())?;
    name.parse().ok()
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A permutation of `0..count` (Fisher and Yates); not quite even, which does not matter here.
    fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            let other = (self.next() % (last as u64 + 1)) as usize;
            order.swap(last, other);
        }
        order
    }
}
