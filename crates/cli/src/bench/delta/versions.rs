//! Versions of a model to make deltas between: a float master, which is the dequantised model
//! with uniform noise inside each weight's bin, is moved as a fine-tuning moves it and quantised
//! again. The same source and case give the same bytes on every run.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use slmops_artifact::gguf::{self, GgufFile, TensorInfo, TensorType, Writer};
use slmops_inference::llama;

use crate::error::{Context, Failure, Result};

/// How far a light fine-tuning moves weights, relative to their tensor's root mean square.
const LIGHT: f32 = 1e-3;
/// How far a strong one does.
const STRONG: f32 = 2.5e-3;
/// The rank of a merged adapter.
const RANK: usize = 8;
/// Weights whose bins are measured together: the smallest group of the types in use has 16.
const GROUP: usize = 16;
/// Rows of tensors whose own are no whole number of blocks; K types need multiples of 256.
const ROW: u64 = 256;

/// What happens from one version to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// The chat template alone
    Metadata,
    /// One tensor in ten moves by a thousandth
    Tenth,
    /// A low-rank update of the queries and values, merged
    Lora,
    /// Every weight moves by a thousandth
    Light,
    /// Every weight moves by a four-hundredth, in some rows and columns more than in others
    Strong,
    /// As strong, but rounded to the scales of the version before
    Sticky,
}

/// A version of the model in memory: `change` is none for the first one. Every matrix is of type
/// `kind`, or of its own; at most `limit` weights are taken.
pub fn version(
    source: &GgufFile,
    kind: Option<TensorType>,
    change: Option<Change>,
    limit: u64,
) -> Result<Vec<u8>> {
    let what = || "make a version of the model".to_owned();
    let mut taken = 0;
    let mut tensors = Vec::new();
    for tensor in source.header().tensors() {
        if taken + tensor.elements() <= limit {
            taken += tensor.elements();
            tensors.push(tensor);
        }
    }
    let mut writer = Writer::with_metadata_of(source.header());
    if change == Some(Change::Metadata) {
        let template = source.header().chat_template().unwrap_or_default();
        writer.set("tokenizer.chat_template", format!("{{# Answer briefly. #}}{template}"));
    }
    for tensor in &tensors {
        let kind = stored_as(tensor, kind);
        let whole = tensor.row_elements().is_multiple_of(kind.block_elements());
        let rows = [ROW, tensor.elements() / ROW];
        let dimensions = if whole { &tensor.dimensions[..] } else { &rows };
        writer.tensor(&tensor.name, dimensions, kind);
    }
    let mut out = writer.begin(Vec::new()).internal(what)?;
    for (index, tensor) in tensors.into_iter().enumerate() {
        let kind = stored_as(tensor, kind);
        let weights = master(source, tensor, index as u64)?;
        let moves = |change| moves(change, tensor, index, &weights);
        let quantised = |weights: &[f32]| {
            llama::quantise_rows(kind, weights, ROW as usize).ok_or_else(|| {
                Failure::internal(format!("cannot make {kind} of `{}`", tensor.name))
            })
        };
        let moved = change.and_then(moves);
        let bytes = match (&moved, change) {
            (None, _) => quantised(&weights)?,
            (Some(moved), Some(Change::Sticky)) => {
                let base = quantised(&weights)?;
                match slmops_delta::round_to_scales(kind, &base, moved) {
                    Some(bytes) => bytes,
                    None => quantised(moved)?,
                }
            }
            (Some(moved), _) => quantised(moved)?,
        };
        out.write(&bytes).internal(what)?;
    }
    out.finish().internal(what)
}

fn stored_as(tensor: &TensorInfo, kind: Option<TensorType>) -> TensorType {
    let own = tensor.tensor_type;
    match kind {
        Some(kind) if tensor.dimensions.len() > 1 && tensor.elements().is_multiple_of(ROW) => kind,
        _ => own,
    }
}

/// The weights as they may have been before they were quantised.
fn master(source: &GgufFile, tensor: &TensorInfo, seed: u64) -> Result<Vec<f32>> {
    let what = || format!("dequantise `{}`", tensor.name);
    let mut weights = gguf::dequantise(tensor.tensor_type, source.data(tensor)).user(what)?;
    if tensor.tensor_type.is_quantised() {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        for group in weights.chunks_mut(GROUP) {
            let bin = smallest_gap(group);
            group.iter_mut().for_each(|weight| *weight += (random.random::<f32>() - 0.5) * bin);
        }
    }
    Ok(weights)
}

/// The distance of neighbouring codes, as far as a group shows it.
fn smallest_gap(group: &[f32]) -> f32 {
    let mut sorted = [0.0; GROUP];
    let sorted = &mut sorted[..group.len()];
    sorted.copy_from_slice(group);
    sorted.sort_by(f32::total_cmp);
    let largest = sorted.iter().fold(0.0_f32, |largest, weight| largest.max(weight.abs()));
    let gaps = sorted.windows(2).map(|pair| pair[1] - pair[0]);
    // Equal codes may differ by a rounding.
    let gap = gaps.filter(|gap| *gap > largest * 1e-4).fold(f32::INFINITY, f32::min);
    if gap.is_finite() { gap } else { 0.0 }
}

/// The weights after the change; none where it leaves the tensor alone.
fn moves(change: Change, tensor: &TensorInfo, index: usize, weights: &[f32]) -> Option<Vec<f32>> {
    let squares: f64 = weights.iter().map(|&weight| f64::from(weight).powi(2)).sum();
    let size = (squares / weights.len().max(1) as f64).sqrt() as f32;
    let columns = tensor.row_elements() as usize;
    let rows = weights.len() / columns.max(1);
    let mut noise = Noise::new(index as u64 ^ 0x5eed << 32);
    let moved = |mut step: Box<dyn FnMut(usize) -> f32>| {
        Some(weights.iter().enumerate().map(|(at, weight)| weight + step(at)).collect())
    };
    match change {
        Change::Metadata => None,
        Change::Tenth if !index.is_multiple_of(10) => None,
        Change::Tenth | Change::Light => moved(Box::new(move |_| noise.next() * LIGHT * size)),
        Change::Lora => {
            let updated = ["attn_q.weight", "attn_v.weight"];
            if !updated.iter().any(|name| tensor.name.ends_with(name)) {
                return None;
            }
            let down: Vec<f32> = (0..RANK * columns).map(|_| noise.next()).collect();
            let up: Vec<f32> = (0..RANK * rows).map(|_| noise.next()).collect();
            let scale = 2.0 * STRONG * size / (RANK as f32).sqrt();
            moved(Box::new(move |at| {
                let (row, column) = (at / columns, at % columns);
                let pairs =
                    (0..RANK).map(|rank| up[row * RANK + rank] * down[rank * columns + column]);
                pairs.sum::<f32>() * scale
            }))
        }
        Change::Strong | Change::Sticky => {
            let by_row: Vec<f32> = (0..rows).map(|_| (0.5 * noise.next()).exp()).collect();
            let by_column: Vec<f32> = (0..columns).map(|_| (0.3 * noise.next()).exp()).collect();
            moved(Box::new(move |at| {
                noise.next() * STRONG * size * by_row[at / columns] * by_column[at % columns]
            }))
        }
    }
}

/// Normally distributed numbers.
struct Noise {
    random: ChaCha8Rng,
    spare: Option<f32>,
}

impl Noise {
    fn new(seed: u64) -> Self {
        Self { random: ChaCha8Rng::seed_from_u64(seed), spare: None }
    }

    /// By the transformation of Box and Muller (1958), which gives two at a time.
    fn next(&mut self) -> f32 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let radius = (-2.0 * (1.0 - self.random.random::<f32>()).ln()).sqrt();
        let (sine, cosine) = (std::f32::consts::TAU * self.random.random::<f32>()).sin_cos();
        self.spare = Some(radius * sine);
        radius * cosine
    }
}
