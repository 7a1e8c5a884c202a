//! Sticky requantisation: a new model on the scales of the version before.

use std::path::Path;

use slmops_artifact::gguf::{self, TensorType};
use slmops_artifact::lineage::Step;
use slmops_delta::round_to_scales;

use crate::{OptimizeError, space};

/// Metadata that says how a file is stored, and so goes with its blocks.
const STORED_AS: [&str; 2] = ["general.file_type", "general.quantization_version"];

/// Quantises the F32, F16 or BF16 model `input` with the types, scales and minima of `base`, an
/// earlier version: each weight is rounded to the nearest number that its old block can hold, with
/// no dead zone. The delta from `base` is then smaller, since only codes differ; the model is a
/// little less exact, so measure it. Returns the step for its lineage. `output` appears whole or
/// not at all.
///
/// # Errors
/// A file is no GGUF file, the two are of different architectures, `input` is quantised already,
/// `base` has types whose blocks are not taken apart, or the disk is full.
pub fn quantise_onto(input: &Path, base: &Path, output: &Path) -> Result<Step, OptimizeError> {
    let model = |path: &Path| {
        let path = path.to_owned();
        move |source| OptimizeError::Model { operation: "quantise", path, source }
    };
    let new = gguf::open(input).map_err(model(input))?;
    let old = gguf::open(base).map_err(model(base))?;
    let unfit = |tensor: &str, why: &'static str| OptimizeError::Base {
        path: base.to_owned(),
        tensor: tensor.to_owned(),
        why,
    };
    if let Some(tensor) = new.header().tensors().iter().find(|it| it.tensor_type.is_quantised()) {
        return Err(OptimizeError::AlreadyQuantised {
            path: input.to_owned(),
            tensor: tensor.name.clone(),
            tensor_type: tensor.tensor_type.name(),
        });
    }
    let mut writer = gguf::Writer::with_metadata_of(new.header());
    for key in STORED_AS {
        if let Some(value) = old.header().get(key) {
            writer.set(key, value.clone());
        }
    }
    for tensor in new.header().tensors() {
        match old.header().tensor(&tensor.name) {
            None => return Err(unfit(&tensor.name, "is not there")),
            Some(known) if known.dimensions != tensor.dimensions => {
                return Err(unfit(&tensor.name, "has other dimensions"));
            }
            Some(known) => writer.tensor(&tensor.name, &tensor.dimensions, known.tensor_type),
        };
    }
    space::check(output, old.bytes().len() as u64)?;
    let mut kept = 0;
    let mut refused = None;
    let written = writer.create(output, |out| {
        for tensor in new.header().tensors() {
            let known = old.header().tensor(&tensor.name).expect("looked for before");
            let kind = known.tensor_type;
            if kind == tensor.tensor_type {
                out.write(new.data(tensor))?;
                continue;
            }
            let weights = gguf::dequantise(tensor.tensor_type, new.data(tensor))?;
            let blocks = match kind {
                TensorType::F32 => weights.iter().flat_map(|it| it.to_le_bytes()).collect(),
                _ => match round_to_scales(kind, old.data(known), &weights) {
                    Some(blocks) => blocks,
                    None => {
                        refused = Some(tensor.name.clone());
                        return out.write(&[]);
                    }
                },
            };
            kept += 1;
            out.write(&blocks)?;
        }
        Ok(())
    });
    if let Some(tensor) = refused {
        return Err(unfit(&tensor, "has a type without scales to keep"));
    }
    written.map_err(model(output))?;
    let base = slmops_artifact::Digest::of(old.bytes());
    let settings = [
        ("type", old.header().file_type().to_owned()),
        ("scales_of", base.to_string()),
        ("tensors", kept.to_string()),
    ];
    Ok(Step::new("quantise", settings))
}
