//! The reference: the file that all variants are made from and measured against.

use std::path::{Path, PathBuf};

use slmops_artifact::lineage::Step;
use slmops_artifact::{gguf, huggingface};

use crate::{OptimizeError, space};

/// Room for metadata (the vocabulary above all) and vectors.
const METADATA_MARGIN_BYTES: u64 = 64 << 20;

/// Makes the F16 reference of a model: a GGUF file, whose quantised tensors are dequantised, or a
/// Hugging Face folder of the Llama architecture. Norms stay F32. Returns the steps for its
/// lineage. `output` appears whole or not at all.
///
/// # Errors
/// The input is no such model, is damaged or has a tensor type that cannot be dequantised, or the
/// disk is full.
pub async fn reference(input: &Path, output: &Path) -> Result<Vec<Step>, OptimizeError> {
    let (input, output) = (input.to_owned(), output.to_owned());
    let made = tokio::task::spawn_blocking(move || {
        if !input.is_dir() {
            return Ok(vec![of_gguf(&input, &output)?]);
        }
        let imported = Imported::new(&output);
        huggingface::import(&input, &imported.path)
            .map_err(|source| OptimizeError::Import { path: input.clone(), source })?;
        let import = Step::new("import", [("from", "Hugging Face folder".to_owned())]);
        Ok(vec![import, of_gguf(&imported.path, &output)?])
    });
    made.await.expect("conversion does not panic")
}

fn of_gguf(input: &Path, output: &Path) -> Result<Step, OptimizeError> {
    let model = |source| OptimizeError::Model {
        operation: "make a reference of",
        path: input.to_owned(),
        source,
    };
    let header = gguf::check_file(input).map_err(model)?;
    // Two bytes a weight; what stays F32 is less than the margin.
    let needed = header.parameters().saturating_mul(2).saturating_add(METADATA_MARGIN_BYTES);
    space::check(output, needed)?;
    let from = header.file_type();
    gguf::to_f16(input, output).map_err(model)?;
    Ok(Step::new("reference", [("from", from.to_owned()), ("type", "F16".to_owned())]))
}

/// The imported file on its way to the reference; removed in the end.
struct Imported {
    path: PathBuf,
}

impl Imported {
    fn new(output: &Path) -> Self {
        let mut name = output.as_os_str().to_owned();
        name.push(format!(".{}.import", std::process::id()));
        Self { path: name.into() }
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
