//! GGUF files, versions 2 and 3 (the ggml project's `docs/gguf.md`): reading, writing,
//! dequantising. The reader treats every byte as hostile: it panics at nothing, reads nothing
//! outside the file and allocates no more than a fixed multiple of the bytes it has seen.

mod dequantise;
mod error;
mod file;
mod header;
mod reference;
mod shape;
mod types;
mod value;
mod write;

pub use dequantise::{dequantise, dequantise_into};
pub use error::{Fault, GgufError};
pub use file::{GgufFile, check_file, open};
pub use header::{Header, TensorInfo};
pub use reference::to_f16;
pub use shape::shape;
pub use types::{TensorType, file_type_name};
pub use value::{Array, Value};
pub use write::{TensorWriter, Writer};

/// The most metadata entries in one file.
pub const MAX_METADATA_ENTRIES: u64 = 4096;
/// The longest metadata key in bytes (GGUF: 2^16 - 1).
pub const MAX_KEY_BYTES: u64 = 65_535;
/// The longest string value in bytes.
pub const MAX_STRING_BYTES: u64 = 16 << 20;
/// The most elements in one array.
pub const MAX_ARRAY_LEN: u64 = 4 << 20;
/// How deep arrays may nest.
pub const MAX_ARRAY_DEPTH: u32 = 4;
/// The most memory that all metadata together may take, in bytes.
pub const MAX_METADATA_MEMORY_BYTES: u64 = 128 << 20;
/// The most tensors in one file.
pub const MAX_TENSORS: u64 = 65_536;
/// The longest tensor name in bytes (GGUF: 64).
pub const MAX_TENSOR_NAME_BYTES: u64 = 64;
/// The most dimensions of a tensor (GGUF: 4).
pub const MAX_DIMENSIONS: u32 = 4;
/// The greatest alignment in bytes.
pub const MAX_ALIGNMENT_BYTES: u64 = 1 << 20;
/// The alignment where a file names none, in bytes.
pub const DEFAULT_ALIGNMENT_BYTES: u64 = 32;

#[cfg(test)]
mod tests;
