//! Quantising with llama.cpp, in a child process.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use slmops_artifact::gguf::{self, Header, TensorType};
use slmops_artifact::lineage::Step;
use slmops_inference::child;
use slmops_inference::llama::{self, QuantiseOptions};

use crate::{OptimizeError, Progress, space};

/// The job's name.
pub(crate) const JOB: &str = "optimize-quantise";

#[derive(Serialize, Deserialize)]
struct Input {
    input: PathBuf,
    output: PathBuf,
    file_type: String,
    threads: u32,
}

/// The file types that [`quantise`] makes, from the largest to the smallest.
pub fn file_types() -> impl Iterator<Item = &'static str> {
    llama::file_types()
}

/// The canonical spelling of a file type's name.
///
/// # Errors
/// There is none of that name; the error lists those that are.
pub fn check_file_type(name: &str) -> Result<&'static str, OptimizeError> {
    file_types().find(|known| known.eq_ignore_ascii_case(name)).ok_or_else(|| {
        let known = file_types().collect::<Vec<_>>().join(", ");
        OptimizeError::FileType { name: name.chars().take(64).collect(), known }
    })
}

/// Quantises the F32, F16 or BF16 model `input` into the new file `output`, and returns the step
/// for its lineage.
///
/// `output` appears whole or not at all: it is written beside its place, flushed and renamed.
/// `threads` 0 means one for each core. Dropping the future ends the child process.
///
/// Types whose blocks do not divide a tensor's rows fall back to larger ones for that tensor (K
/// types need rows of 256; SmolLM2-135M has rows of 576): the step's `bits_per_weight` says what
/// came of it.
///
/// # Errors
/// The type is unknown, the input is damaged or quantised already, the disk is full, or the child
/// process fails.
pub async fn quantise(
    input: &Path,
    output: &Path,
    file_type: &str,
    threads: u32,
    mut on_progress: impl FnMut(Progress),
) -> Result<Step, OptimizeError> {
    let file_type = check_file_type(file_type)?;
    let header = gguf::check_file(input).map_err(|source| OptimizeError::Model {
        operation: "quantise",
        path: input.to_owned(),
        source,
    })?;
    let quantised = header.tensors().iter().find(|tensor| tensor.tensor_type.is_quantised());
    if let Some(tensor) = quantised {
        return Err(OptimizeError::AlreadyQuantised {
            path: input.to_owned(),
            tensor: tensor.name.clone(),
            tensor_type: tensor.tensor_type.name(),
        });
    }
    let input_bytes =
        fs::metadata(input).map_err(|source| OptimizeError::io("read", input, source))?.len();
    space::check(output, most_bytes(&header, input_bytes, file_type))?;

    let unfinished = Unfinished::new(output);
    let job = Input {
        input: input.to_owned(),
        output: unfinished.path.clone(),
        file_type: file_type.to_owned(),
        threads,
    };
    let job = serde_json::to_value(job).expect("paths that came from text serialise");
    let called = child::call(JOB, job, |value| {
        if let Ok(progress) = serde_json::from_value(value) {
            on_progress(progress);
        }
    });
    called.await.map_err(|source| OptimizeError::Child {
        path: input.to_owned(),
        file_type: file_type.to_owned(),
        source,
    })?;
    let written = gguf::check_file(&unfinished.path).map_err(|source| OptimizeError::Model {
        operation: "check the result of quantising",
        path: input.to_owned(),
        source,
    })?;
    unfinished.keep(output)?;
    let bits: u64 = written.tensors().iter().map(|tensor| tensor.size_bytes * 8).sum();
    let bits_per_weight = bits as f64 / written.parameters().max(1) as f64;
    let settings =
        [("type", file_type.to_owned()), ("bits_per_weight", format!("{bits_per_weight:.2}"))];
    Ok(Step::new("quantise", settings))
}

/// Runs the job.
pub(crate) fn run(
    input: serde_json::Value,
    on_progress: &mut dyn FnMut(serde_json::Value),
) -> anyhow::Result<serde_json::Value> {
    let job: Input = serde_json::from_value(input).context("read the job's input")?;
    let options =
        QuantiseOptions { file_type: job.file_type, threads: job.threads, requantise: false };
    llama::quantise(&job.input, &job.output, &options, |done, total| {
        let progress = Progress { done: done.into(), total: total.into() };
        if let Ok(value) = serde_json::to_value(progress) {
            on_progress(value);
        }
    })?;
    Ok(serde_json::Value::Null)
}

/// The most that the result can take: the input's own size, or what every tensor takes in the
/// widest type that quantising falls back to.
fn most_bytes(header: &Header, input_bytes: u64, file_type: &str) -> u64 {
    let widest = match file_type {
        "F32" => TensorType::F32,
        "F16" | "BF16" => TensorType::F16,
        _ => TensorType::Q8_0,
    };
    let data: u64 = header.tensors().iter().map(|tensor| tensor.size_bytes).sum();
    let wide = widest.bytes_of(header.parameters()).unwrap_or(data);
    input_bytes.saturating_sub(data).saturating_add(wide)
}

/// A file in the making beside its place; removed unless kept.
struct Unfinished {
    path: PathBuf,
}

impl Unfinished {
    fn new(target: &Path) -> Self {
        let mut name = target.as_os_str().to_owned();
        name.push(format!(".{}.part", std::process::id()));
        Self { path: name.into() }
    }

    fn keep(self, target: &Path) -> Result<(), OptimizeError> {
        let write = |source| OptimizeError::io("write", target, source);
        File::open(&self.path).and_then(|file| file.sync_all()).map_err(write)?;
        fs::rename(&self.path, target).map_err(write)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
