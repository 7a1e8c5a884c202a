//! A thin safe wrapper over llama.cpp's C interface: the only unsafe code of this crate.
//!
//! An assertion that fails inside llama.cpp aborts the process, so programs use this module only
//! in child processes (see [`crate::child`]). Everything here blocks.

mod adapter;
mod context;
mod log;
mod model;
mod pace;
mod quantise;

pub use adapter::Adapter;
pub use context::{Batch, Context, ContextOptions};
pub use log::log_to_stderr;
pub use model::{LoadOptions, Model};
pub use quantise::{QuantiseOptions, file_types, quantise, quantise_rows};

use std::ffi::CStr;
use std::path::PathBuf;
use std::sync::Once;

use llama_cpp_sys_2 as sys;

/// A token's id in its model's vocabulary.
pub type Token = i32;

/// Why the engine did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A model file could not be loaded.
    #[error("load model {}: {cause}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// The engine's words.
        cause: String,
    },
    /// An adapter could not be loaded.
    #[error("load adapter {}: {cause}", path.display())]
    Adapter {
        /// The file.
        path: PathBuf,
        /// Why, in the engine's words or ours.
        cause: String,
    },
    /// A context could not be made.
    #[error("make a context of {context_tokens} tokens × {sequences}: {cause}")]
    Context {
        /// Tokens for each sequence.
        context_tokens: u32,
        /// Sequences.
        sequences: u32,
        /// The engine's words.
        cause: String,
    },
    /// A text could not be tokenised.
    #[error("tokenise {bytes} bytes of text: {cause}")]
    Tokenise {
        /// The text's length.
        bytes: usize,
        /// Why.
        cause: &'static str,
    },
    /// A batch was refused or its computation failed.
    #[error("decode a batch of {tokens} tokens: {cause}")]
    Decode {
        /// Tokens in the batch.
        tokens: usize,
        /// Why.
        cause: String,
    },
    /// No file type of that name is known.
    #[error("`{name}` is not a GGUF file type\nhint: use one of {known}")]
    FileType {
        /// What was given.
        name: String,
        /// What exists.
        known: String,
    },
    /// A model could not be quantised.
    #[error("quantise {} to {file_type}: {cause}", path.display())]
    Quantise {
        /// The input file.
        path: PathBuf,
        /// The wanted type.
        file_type: String,
        /// The engine's words.
        cause: String,
    },
}

/// Starts the engine once in this process.
fn start() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        log::install();
        // SAFETY: called once, before any other function of the library.
        unsafe { sys::llama_backend_init() };
    });
}

/// The engine's name, version and the processor features it uses, such as
/// `llama.cpp 0.6.0 (AVX2 FMA F16C)`.
pub fn engine_version() -> String {
    // SAFETY: returns a static NUL-terminated string.
    let version = unsafe { CStr::from_ptr(sys::llama_version()) }.to_string_lossy();
    format!("llama.cpp {version} ({})", processor_features().join(" "))
}

/// The instruction-set extensions that this build of the engine uses.
pub fn processor_features() -> Vec<&'static str> {
    // SAFETY: these functions take nothing and only read constants.
    let features = unsafe {
        [
            ("AVX", sys::ggml_cpu_has_avx()),
            ("AVX2", sys::ggml_cpu_has_avx2()),
            ("AVX512", sys::ggml_cpu_has_avx512()),
            ("FMA", sys::ggml_cpu_has_fma()),
            ("F16C", sys::ggml_cpu_has_f16c()),
            ("BMI2", sys::ggml_cpu_has_bmi2()),
            ("NEON", sys::ggml_cpu_has_neon()),
            ("DOTPROD", sys::ggml_cpu_has_dotprod()),
            ("I8MM", sys::ggml_cpu_has_matmul_int8()),
            ("SVE", sys::ggml_cpu_has_sve()),
        ]
    };
    features.into_iter().filter(|(_, present)| *present != 0).map(|(name, _)| name).collect()
}
