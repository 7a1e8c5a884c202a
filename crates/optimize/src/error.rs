use std::io;
use std::path::PathBuf;

use slmops_artifact::gguf::GgufError;
use slmops_artifact::huggingface::ImportError;
use slmops_inference::child::ChildError;

/// Why a variant was not made.
#[derive(Debug, thiserror::Error)]
pub enum OptimizeError {
    /// A file or folder could not be used.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was done.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The disk lacks room for the result.
    #[error(
        "write {}: it may take {needed_bytes} bytes and the disk has {free_bytes} free\nhint: free some space, or choose another folder",
        path.display()
    )]
    DiskFull {
        /// The result.
        path: PathBuf,
        /// The most bytes that it takes.
        needed_bytes: u64,
        /// Bytes free there.
        free_bytes: u64,
    },
    /// No file type of that name is known.
    #[error("`{name}` is not a GGUF file type\nhint: use one of {known}")]
    FileType {
        /// What was given.
        name: String,
        /// What exists.
        known: String,
    },
    /// The input is quantised already.
    #[error(
        "quantise {}: its tensor {tensor} is already {tensor_type}\nhint: make an F16 reference of it first, so that the loss is measured against one file",
        path.display()
    )]
    AlreadyQuantised {
        /// The input.
        path: PathBuf,
        /// Its first quantised tensor.
        tensor: String,
        /// That tensor's type.
        tensor_type: &'static str,
    },
    /// The input is no usable model.
    #[error("{operation} {}", path.display())]
    Model {
        /// What was done.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: GgufError,
    },
    /// A Hugging Face folder could not be imported.
    #[error("import {}", path.display())]
    Import {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ImportError,
    },
    /// An earlier version cannot lend its scales.
    #[error(
        "keep the scales of {}: its tensor {tensor} {why}\nhint: name the version before, of the same architecture and quantised, or leave out --base",
        path.display()
    )]
    Base {
        /// The earlier version.
        path: PathBuf,
        /// The tensor that does not fit.
        tensor: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The process that quantises failed.
    #[error("quantise {} to {file_type}", path.display())]
    Child {
        /// The input.
        path: PathBuf,
        /// The wanted type.
        file_type: String,
        /// How it failed.
        #[source]
        source: ChildError,
    },
    /// The model has nothing to damage.
    #[error(
        "damage {}: it has no feed-forward tensors named like blk.N.ffn_down.weight\nhint: rehearse with a transformer model",
        path.display()
    )]
    NothingToDamage {
        /// The input.
        path: PathBuf,
    },
}

impl OptimizeError {
    pub(crate) fn io(operation: &'static str, path: &std::path::Path, source: io::Error) -> Self {
        Self::Io { operation, path: path.to_owned(), source }
    }
}
