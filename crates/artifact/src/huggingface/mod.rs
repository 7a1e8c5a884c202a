//! Import of Hugging Face model folders of the Llama architecture: `config.json`, safetensors
//! weights and `tokenizer.json` become one GGUF file, and back.
//!
//! What the GGUF side must look like is set by llama.cpp (its `convert_hf_to_gguf.py` and
//! `gguf-py` constants): tensor names, the rotary layout of query and key rows, and the
//! `tokenizer.ggml.*` metadata. Whatever would make the imported model differ from the original
//! is refused by name.

mod config;
mod export;
mod tokenizer;
mod weights;

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

pub use export::export;

use crate::gguf::{GgufError, Writer};

/// The longest `config.json`, `generation_config.json` or `tokenizer_config.json` in bytes.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// The longest `tokenizer.json` in bytes.
pub const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// The longest header of a safetensors file in bytes.
pub const MAX_SAFETENSORS_HEADER_BYTES: u64 = 8 << 20;
/// The most files that the weights may be split into.
pub const MAX_SHARDS: usize = 1024;
/// The largest vocabulary in tokens.
pub const MAX_VOCABULARY: u32 = 1 << 20;
/// The most layers.
pub const MAX_LAYERS: u32 = 1024;
/// Architectures that can be imported, as `config.json` names them.
pub const ARCHITECTURES: [&str; 1] = ["LlamaForCausalLM"];

/// Why a folder was not imported, or a model not exported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The operating system refused.
    #[error("{operation} `{}` failed\nhint: {}", path.display(), io_hint(source))]
    Io {
        /// What was tried, such as `read`.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file is longer than any real one.
    #[error("`{}` has more than {limit} bytes\nhint: check that it is what its name says", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The bound in bytes.
        limit: u64,
    },
    /// A file is not JSON of the expected form.
    #[error("parse `{}`\nhint: fetch the folder again from its publisher", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// A file of weights is malformed.
    #[error("parse `{}`: {reason}\nhint: fetch the file again from its publisher", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The model has a feature that the import does not know.
    #[error(
        "{what} {found:?} cannot be imported (known: {known})\nhint: convert the folder to GGUF \
         with llama.cpp's convert_hf_to_gguf.py and give the GGUF file instead"
    )]
    Unsupported {
        /// The feature, such as `architecture`.
        what: &'static str,
        /// What the folder says.
        found: String,
        /// What is known.
        known: String,
    },
    /// The files contradict each other or themselves.
    #[error("{object}: {reason}\nhint: the folder is incomplete or damaged; fetch it again")]
    Inconsistent {
        /// Which part, such as `tensor "lm_head.weight"`.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The GGUF side refused.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

fn io_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => {
            "a model folder holds config.json, tokenizer.json and model.safetensors"
        }
        _ => "check that the path is readable and that the disk has space",
    }
}

/// Imports the model folder `folder` as the GGUF file `output`: matrices keep their type (F32,
/// F16 or BF16), vectors become F32. The same folder always gives the same bytes. Written under a
/// temporary name beside `output` and renamed when it is complete and flushed.
///
/// # Errors
/// [`ImportError::Unsupported`] for other architectures and features, naming what is known;
/// [`ImportError::Inconsistent`] for missing tensors, wrong shapes and the like; nothing is left
/// at `output` then.
pub fn import(folder: &Path, output: &Path) -> Result<(), ImportError> {
    let config = config::Config::read(folder)?;
    let name = folder.canonicalize().ok();
    let name = name.as_deref().unwrap_or(folder).file_name();
    let name = name.map_or_else(|| "model".into(), |name| name.to_string_lossy());
    let mut writer = Writer::new();
    writer.set("general.architecture", "llama").set("general.type", "model");
    writer.set("general.name", name.as_ref());
    config.describe(&mut writer);
    // The weights first: once they have the shapes that config.json asks for, its numbers are
    // backed by bytes.
    let weights = weights::Weights::open(folder)?;
    let targets = weights.targets(&config)?;
    tokenizer::describe(folder, &config, &mut writer)?;
    weights::write(&targets, &mut writer, output)
}

/// Whether `path` looks like a model folder: a folder with a `config.json`.
pub fn is_model_folder(path: &Path) -> bool {
    path.is_dir() && path.join("config.json").is_file()
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImportError {
    move |source| ImportError::Io { operation, path: path.to_owned(), source }
}

fn inconsistent(object: impl Into<String>, reason: impl Into<String>) -> ImportError {
    ImportError::Inconsistent { object: object.into(), reason: reason.into() }
}

fn unsupported(what: &'static str, found: &str, known: impl Into<String>) -> ImportError {
    ImportError::Unsupported { what, found: found.chars().take(300).collect(), known: known.into() }
}

/// Reads a file of at most `limit` bytes.
fn read(path: &Path, limit: u64) -> Result<Vec<u8>, ImportError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(ImportError::TooLong { path: path.to_owned(), limit });
    }
    Ok(bytes)
}

fn read_json<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<T, ImportError> {
    let bytes = read(path, limit)?;
    serde_json::from_slice(&bytes)
        .map_err(|source| ImportError::Json { path: path.to_owned(), source })
}

/// As [`read_json`]; the default where there is no such file.
fn read_optional_json<T: DeserializeOwned + Default>(
    path: &Path,
    limit: u64,
) -> Result<T, ImportError> {
    match read_json(path, limit) {
        Err(ImportError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(T::default())
        }
        result => result,
    }
}
