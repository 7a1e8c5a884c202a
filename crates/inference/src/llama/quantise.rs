//! Quantising a GGUF file.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use llama_cpp_sys_2 as sys;
use slmops_artifact::gguf::TensorType;

use super::{EngineError, log, start};

/// GGUF file types by name.
const FILE_TYPES: &[(&str, sys::llama_ftype)] = &[
    ("F32", sys::LLAMA_FTYPE_ALL_F32),
    ("F16", sys::LLAMA_FTYPE_MOSTLY_F16),
    ("BF16", sys::LLAMA_FTYPE_MOSTLY_BF16),
    ("Q8_0", sys::LLAMA_FTYPE_MOSTLY_Q8_0),
    ("Q6_K", sys::LLAMA_FTYPE_MOSTLY_Q6_K),
    ("Q5_K_M", sys::LLAMA_FTYPE_MOSTLY_Q5_K_M),
    ("Q5_K_S", sys::LLAMA_FTYPE_MOSTLY_Q5_K_S),
    ("Q5_1", sys::LLAMA_FTYPE_MOSTLY_Q5_1),
    ("Q5_0", sys::LLAMA_FTYPE_MOSTLY_Q5_0),
    ("Q4_K_M", sys::LLAMA_FTYPE_MOSTLY_Q4_K_M),
    ("Q4_K_S", sys::LLAMA_FTYPE_MOSTLY_Q4_K_S),
    ("IQ4_NL", sys::LLAMA_FTYPE_MOSTLY_IQ4_NL),
    ("IQ4_XS", sys::LLAMA_FTYPE_MOSTLY_IQ4_XS),
    ("Q4_1", sys::LLAMA_FTYPE_MOSTLY_Q4_1),
    ("Q4_0", sys::LLAMA_FTYPE_MOSTLY_Q4_0),
    ("Q3_K_L", sys::LLAMA_FTYPE_MOSTLY_Q3_K_L),
    ("Q3_K_M", sys::LLAMA_FTYPE_MOSTLY_Q3_K_M),
    ("Q3_K_S", sys::LLAMA_FTYPE_MOSTLY_Q3_K_S),
    ("IQ3_M", sys::LLAMA_FTYPE_MOSTLY_IQ3_M),
    ("IQ3_S", sys::LLAMA_FTYPE_MOSTLY_IQ3_S),
    ("Q2_K", sys::LLAMA_FTYPE_MOSTLY_Q2_K),
    ("Q2_K_S", sys::LLAMA_FTYPE_MOSTLY_Q2_K_S),
];

/// The names of the file types that [`quantise`] makes, from the largest to the smallest.
pub fn file_types() -> impl Iterator<Item = &'static str> {
    FILE_TYPES.iter().map(|(name, _)| *name)
}

/// How a file is quantised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantiseOptions {
    /// The file type, one of [`file_types`].
    pub file_type: String,
    /// Compute threads; 0 means one for each core.
    pub threads: u32,
    /// Whether already quantised tensors may be quantised again (a loss on a loss).
    pub requantise: bool,
}

/// Quantises the GGUF file `input` into the new file `output`; `on_progress` gets tensors done and
/// tensors in all.
///
/// # Errors
/// The type is unknown, the input is damaged or of a type that may not be quantised again, or the
/// output cannot be written. An output left by a failure is removed.
pub fn quantise(
    input: &Path,
    output: &Path,
    options: &QuantiseOptions,
    mut on_progress: impl FnMut(u32, u32),
) -> Result<(), EngineError> {
    start();
    let name = options.file_type.to_ascii_uppercase();
    let Some((_, file_type)) = FILE_TYPES.iter().find(|(known, _)| *known == name) else {
        let known = file_types().collect::<Vec<_>>().join(", ");
        return Err(EngineError::FileType { name: options.file_type.clone(), known });
    };
    let failed = |cause: String| EngineError::Quantise {
        path: input.to_owned(),
        file_type: options.file_type.clone(),
        cause,
    };
    let c_path = |path: &Path| {
        CString::new(path.as_os_str().as_bytes())
            .map_err(|_| failed("a path has a NUL byte".to_owned()))
    };
    let (c_input, c_output) = (c_path(input)?, c_path(output)?);
    let threads = i32::try_from(options.threads).unwrap_or(0);
    let (sender, receiver) = std::sync::mpsc::channel();
    let (code, lines) = std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            log::capture(Some(sender), || {
                // SAFETY: the parameters are the library's defaults with plain values changed, and
                // both paths outlive the call.
                unsafe {
                    let mut params = sys::llama_model_quantize_default_params();
                    params.nthread = threads;
                    params.ftype = *file_type;
                    params.allow_requantize = options.requantise;
                    sys::llama_model_quantize(
                        c_input.as_ptr(),
                        c_output.as_ptr(),
                        &raw const params,
                    )
                }
            })
        });
        for line in receiver {
            if let Some((done, total)) = progress(&line) {
                on_progress(done, total);
            }
        }
        work.join().expect("the engine does not unwind")
    });
    if code == 0 {
        return Ok(());
    }
    let _ = std::fs::remove_file(output);
    Err(failed(log::errors(&lines, "the engine gives no reason")))
}

/// Quantises numbers to blocks of `kind`, in rows of `row`, without an importance matrix; `None`
/// where rows are no whole number of blocks, or the engine does not make that type.
pub fn quantise_rows(kind: TensorType, numbers: &[f32], row: usize) -> Option<Vec<u8>> {
    let whole =
        numbers.len().is_multiple_of(row) && (row as u64).is_multiple_of(kind.block_elements());
    let made = matches!(
        kind,
        TensorType::F32
            | TensorType::F16
            | TensorType::BF16
            | TensorType::Q4_0
            | TensorType::Q4_1
            | TensorType::Q5_0
            | TensorType::Q5_1
            | TensorType::Q8_0
            | TensorType::Q2_K
            | TensorType::Q3_K
            | TensorType::Q4_K
            | TensorType::Q5_K
            | TensorType::Q6_K
            | TensorType::IQ4_NL
            | TensorType::IQ4_XS
    );
    if kind == TensorType::F32 {
        return Some(numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
    }
    if !whole || !made {
        return None;
    }
    let mut blocks = vec![0_u8; kind.bytes_of(numbers.len() as u64)? as usize];
    let rows = i64::try_from(numbers.len() / row).ok()?;
    // SAFETY: the source has `rows` rows of `row` numbers, the target has room for as many
    // blocks, and these types need no importance matrix.
    let written = unsafe {
        sys::ggml_quantize_chunk(
            kind.id() as sys::ggml_type,
            numbers.as_ptr(),
            blocks.as_mut_ptr().cast(),
            0,
            rows,
            i64::try_from(row).ok()?,
            std::ptr::null(),
        )
    };
    (written == blocks.len()).then_some(blocks)
}

/// Reads `[  12/ 272] blk.0.ffn_down.weight - …`.
fn progress(line: &str) -> Option<(u32, u32)> {
    let (numbers, _) = line.trim_start().strip_prefix('[')?.split_once(']')?;
    let (done, total) = numbers.split_once('/')?;
    Some((done.trim().parse().ok()?, total.trim().parse().ok()?))
}
