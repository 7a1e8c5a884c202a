use std::path::Path;
use std::thread;

use half::f16;

use super::{Fault, GgufError, GgufFile, TensorInfo, TensorType, Writer};

/// `LLAMA_FTYPE_MOSTLY_F16` in llama.cpp's `llama.h`.
const FILE_TYPE_F16: u32 = 1;
/// Elements that one thread converts at a time; it holds 6 bytes for each.
const CHUNK_ELEMENTS: u64 = 1 << 20;
/// The most threads at work, which bounds the memory at about 6 MiB each.
const MAX_THREADS: usize = 16;
/// Parts of names whose matrices llama.cpp's own converter leaves in F32: small, and sensitive.
const KEPT_PRECISE: [&str; 3] = ["_norm", "ffn_gate_inp", "ssm_conv1d"];

/// Makes the reference of a model: the same model with every matrix in F16, however it was
/// stored, and every vector (norms, biases) in F32. The metadata stays but for the file type.
/// Written under a temporary name beside `output` and renamed when it is complete and flushed.
///
/// # Errors
/// [`GgufError`] where `input` is no valid GGUF, has a type that cannot be dequantised, or holds
/// numbers that F16 cannot (beyond ±65504, or not finite).
pub fn to_f16(input: &Path, output: &Path) -> Result<(), GgufError> {
    let file = super::open(input)?;
    let mut writer = Writer::with_metadata_of(file.header());
    writer.set("general.file_type", FILE_TYPE_F16);
    let described = |key: &str| key.starts_with("quantize.imatrix.");
    for (key, _) in file.header().metadata().iter().filter(|(key, _)| described(key)) {
        writer.remove(key);
    }
    for tensor in file.header().tensors() {
        writer.tensor(&tensor.name, &tensor.dimensions, target(tensor));
    }
    writer.create(output, |out| {
        for tensor in file.header().tensors() {
            convert(&file, tensor, |bytes| out.write(bytes))?;
        }
        Ok(())
    })
}

/// What a tensor becomes.
fn target(tensor: &TensorInfo) -> TensorType {
    let is_number = tensor.tensor_type.is_quantised()
        || matches!(
            tensor.tensor_type,
            TensorType::F32 | TensorType::F16 | TensorType::BF16 | TensorType::F64
        );
    if !is_number {
        return tensor.tensor_type;
    }
    let is_matrix = tensor.dimensions.iter().filter(|&&dimension| dimension > 1).count() > 1;
    if is_matrix && !KEPT_PRECISE.iter().any(|part| tensor.name.contains(part)) {
        TensorType::F16
    } else {
        TensorType::F32
    }
}

/// Hands the converted bytes of a tensor to `write`, in order, converting as many pieces at once
/// as there are processors.
fn convert(
    file: &GgufFile,
    tensor: &TensorInfo,
    mut write: impl FnMut(&[u8]) -> Result<(), GgufError>,
) -> Result<(), GgufError> {
    let (from, to) = (tensor.tensor_type, target(tensor));
    let data = file.data(tensor);
    if from == to {
        return write(data);
    }
    let threads = thread::available_parallelism().map_or(1, |count| count.get().min(MAX_THREADS));
    // A multiple of every block length, so that pieces are whole blocks.
    let piece_bytes = (CHUNK_ELEMENTS / from.block_elements() * from.block_bytes()) as usize;
    let pieces: Vec<&[u8]> = data.chunks(piece_bytes).collect();
    for batch in pieces.chunks(threads) {
        let converted: Vec<Result<Vec<u8>, GgufError>> = thread::scope(|scope| {
            let started: Vec<_> = batch
                .iter()
                .map(|piece| scope.spawn(move || convert_piece(from, to, piece, &tensor.name)))
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().expect("converting a piece panics at nothing")
            };
            started.into_iter().map(join).collect()
        });
        for piece in converted {
            write(&piece?)?;
        }
    }
    Ok(())
}

fn convert_piece(
    from: TensorType,
    to: TensorType,
    data: &[u8],
    name: &str,
) -> Result<Vec<u8>, GgufError> {
    let numbers = super::dequantise(from, data)
        .map_err(|_| named(name, Fault::NoDequantiser(from.name())))?;
    if to == TensorType::F32 {
        return Ok(numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
    }
    let mut bytes = Vec::with_capacity(numbers.len() * 2);
    for number in numbers {
        let half = f16::from_f32(number);
        if !half.is_finite() {
            let fault = if number.is_finite() {
                Fault::Other("holds a number beyond the range of F16")
            } else {
                Fault::Other("holds a number that is not finite")
            };
            return Err(named(name, fault));
        }
        bytes.extend(half.to_le_bytes());
    }
    Ok(bytes)
}

fn named(name: &str, fault: Fault) -> GgufError {
    GgufError::unsupported(format!("tensor {name:?}"), fault)
}
