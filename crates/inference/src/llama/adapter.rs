//! LoRA adapters: low-rank changes of some matrices, kept beside the model's weights.
//!
//! The engine aborts the process over some files that a damaged download or a bad tool may make,
//! so [`check`] looks at the file first.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;
use slmops_artifact::Digest;
use slmops_artifact::gguf::{self, TensorInfo, TensorType};

use super::{EngineError, Model, log};

/// A loaded adapter of one model.
///
/// The engine counts a model's adapters whenever it plans a computation, so adapters are loaded and
/// dropped on the thread that computes.
pub struct Adapter {
    raw: NonNull<sys::llama_adapter_lora>,
    model: Arc<Model>,
    digest: Digest,
}

// SAFETY: an adapter has no ties to the thread that made it; that it is used on one at a time is the
// contract above.
unsafe impl Send for Adapter {}
// SAFETY: nothing of it is reachable through `&Adapter` but its address.
unsafe impl Sync for Adapter {}

impl Drop for Adapter {
    fn drop(&mut self) {
        // SAFETY: `raw` came from a load and is freed once, before the model that knows it; contexts
        // hold the adapters in use.
        unsafe { sys::llama_adapter_lora_free(self.raw.as_ptr()) };
    }
}

impl Adapter {
    /// Loads the adapter in the GGUF file at `path`, made for `model`.
    ///
    /// # Errors
    /// The file is missing, damaged, no LoRA adapter, or one of another model.
    pub fn load(model: &Arc<Model>, path: &Path) -> Result<Self, EngineError> {
        let failed = |cause: String| EngineError::Adapter { path: path.to_owned(), cause };
        let digest = check(path).map_err(failed)?;
        let c_path = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| failed("its path has a NUL byte".to_owned()))?;
        let (raw, lines) = log::capture(None, || {
            // SAFETY: the model is live, and the path outlives the call.
            unsafe { sys::llama_adapter_lora_init(model.raw(), c_path.as_ptr()) }
        });
        let raw = NonNull::new(raw).ok_or_else(|| {
            let words = log::errors(&lines, "the engine gives no reason");
            failed(words.replace("failed to apply lora adapter: ", ""))
        })?;
        let adapter = Self { raw, model: Arc::clone(model), digest };
        // SAFETY: `raw` is a live adapter.
        if unsafe { sys::llama_adapter_get_alora_n_invocation_tokens(raw.as_ptr()) } > 0 {
            let cause = "it counts only after certain tokens (aLoRA), which is not supported";
            return Err(failed(cause.to_owned()));
        }
        Ok(adapter)
    }

    /// The digest of its file.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    pub(super) fn raw(&self) -> *mut sys::llama_adapter_lora {
        self.raw.as_ptr()
    }

    pub(super) fn is_of(&self, model: &Arc<Model>) -> bool {
        Arc::ptr_eq(&self.model, model)
    }
}

/// Refuses what the engine would abort the process over: matrices that do not go together, and
/// numbers that are none. Returns the file's digest.
fn check(path: &Path) -> Result<Digest, String> {
    let file = gguf::open(path).map_err(|error| error.to_string())?;
    let header = file.header();
    if header.text("general.type") != Some("adapter") {
        return Err("it is no adapter (`general.type` is not `adapter`)".to_owned());
    }
    let mut pairs: BTreeMap<&str, [Option<&TensorInfo>; 2]> = BTreeMap::new();
    for tensor in header.tensors() {
        let name = tensor.name.as_str();
        let (base, half) = match (name.strip_suffix(".lora_a"), name.strip_suffix(".lora_b")) {
            (Some(base), _) => (base, 0),
            (_, Some(base)) => (base, 1),
            _ => return Err(format!("`{name}` is no part of a LoRA adapter")),
        };
        if tensor.dimensions.len() > 2 && tensor.dimensions[2..].iter().any(|size| *size != 1) {
            return Err(format!("`{name}` is no matrix"));
        }
        let data = file.data(tensor);
        let finite = match tensor.tensor_type {
            TensorType::F32 => {
                data.as_chunks().0.iter().all(|it| f32::from_le_bytes(*it).is_finite())
            }
            // All bits of the exponent set: an infinity or no number (IEEE 754, binary16 and bfloat16).
            TensorType::F16 => is_finite(data, 0x7c00),
            TensorType::BF16 => is_finite(data, 0x7f80),
            _ => {
                return Err(format!(
                    "`{name}` is {}, not F32, F16 or BF16",
                    tensor.tensor_type.name()
                ));
            }
        };
        if !finite {
            return Err(format!("`{name}` has numbers that are none: the file is damaged"));
        }
        pairs.entry(base).or_default()[half] = Some(tensor);
    }
    if pairs.is_empty() {
        return Err("it has no matrices".to_owned());
    }
    for (base, pair) in pairs {
        let [Some(a), Some(b)] = pair else {
            return Err(format!("one of the two matrices of `{base}` is missing"));
        };
        let size = |tensor: &TensorInfo, place: usize| tensor.dimensions.get(place).copied();
        // Those of the embedding are multiplied the other way around.
        let goes_together = match base == "token_embd.weight" {
            true => size(a, 0) == size(b, 0),
            false => size(a, 1).unwrap_or(1) == size(b, 0).unwrap_or(1),
        };
        if !goes_together {
            return Err(format!("the two matrices of `{base}` do not go together"));
        }
    }
    Ok(Digest::of(file.bytes()))
}

fn is_finite(halves: &[u8], exponent: u16) -> bool {
    let (halves, _) = halves.as_chunks();
    halves.iter().all(|half| u16::from_le_bytes(*half) & exponent != exponent)
}
