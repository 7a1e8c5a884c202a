//! The weights: safetensors files, names and layouts.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::config::{Config, RopeScaling};
use super::{
    ImportError, MAX_CONFIG_BYTES, MAX_SAFETENSORS_HEADER_BYTES, MAX_SHARDS, inconsistent,
    io_error, read_json, unsupported,
};
use crate::gguf::{TensorType, Writer, dequantise};
use crate::title::check_title;

/// The opened weights of a folder.
pub(super) struct Weights {
    shards: Vec<Shard>,
    /// By tensor name: the shard and the tensor in it.
    tensors: HashMap<String, (usize, Tensor)>,
}

struct Shard {
    map: Mmap,
    path: PathBuf,
}

#[derive(Clone)]
struct Tensor {
    kind: Dtype,
    shape: Vec<usize>,
    /// Bytes from the start of the file.
    start: usize,
    end: usize,
}

/// A tensor of the GGUF file and its bytes.
pub(super) struct Target<'a> {
    name: String,
    dimensions: Vec<u64>,
    kind: TensorType,
    bytes: Cow<'a, [u8]>,
    rotary: Option<Rotary>,
}

/// How query and key rows lie: a head's rows come as two halves whose rows belong together in
/// pairs; llama.cpp wants each pair's rows side by side.
#[derive(Clone, Copy)]
pub(super) struct Rotary {
    /// Rows of one head.
    pub head_width: usize,
    /// Bytes of one row.
    pub row_bytes: usize,
}

impl Weights {
    pub(super) fn open(folder: &Path) -> Result<Self, ImportError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        let (files, places) = if single.is_file() || !index.is_file() {
            (vec!["model.safetensors".to_owned()], None)
        } else {
            // An index names each tensor in about 100 bytes.
            let index: Index = read_json(&index, MAX_CONFIG_BYTES)?;
            let names: HashSet<&String> = index.weight_map.values().collect();
            let mut files: Vec<String> = names.into_iter().cloned().collect();
            files.sort();
            (files, Some(index.weight_map))
        };
        if files.len() > MAX_SHARDS {
            let reason = format!("names {} files, at most {MAX_SHARDS}", files.len());
            return Err(inconsistent("model.safetensors.index.json", reason));
        }
        let mut weights = Self { shards: Vec::new(), tensors: HashMap::new() };
        for file in files {
            let is_plain = check_title(&file).is_ok() && !file.contains('/');
            if !is_plain || !file.ends_with(".safetensors") {
                let reason = format!("names the file {file:?}");
                return Err(inconsistent("model.safetensors.index.json", reason));
            }
            weights.add(&folder.join(&file))?;
        }
        for (tensor, file) in places.into_iter().flatten() {
            let found = weights.tensors.get(&tensor).map(|&(shard, _)| &weights.shards[shard].path);
            if found.is_none_or(|path| !path.ends_with(&file)) {
                return Err(inconsistent(
                    format!("tensor {tensor:?}"),
                    format!("is not in {file}"),
                ));
            }
        }
        Ok(weights)
    }

    fn add(&mut self, path: &Path) -> Result<(), ImportError> {
        let map = crate::map::map(path).map_err(io_error("open", path))?;
        let tensors = parse_header(&map)
            .map_err(|reason| ImportError::Safetensors { path: path.to_owned(), reason })?;
        for (name, tensor) in tensors {
            let known = self.tensors.insert(name.clone(), (self.shards.len(), tensor));
            if known.is_some() {
                return Err(inconsistent(format!("tensor {name:?}"), "is in two files"));
            }
        }
        self.shards.push(Shard { map, path: path.to_owned() });
        Ok(())
    }

    /// The tensors of the GGUF file.
    pub(super) fn targets<'a>(
        &'a self,
        config: &'a Config,
    ) -> Result<Vec<Target<'a>>, ImportError> {
        Plan { weights: self, config, used: HashSet::new() }.targets()
    }
}

/// Writes the file: the metadata of `writer`, then every tensor.
pub(super) fn write(
    targets: &[Target<'_>],
    writer: &mut Writer,
    output: &Path,
) -> Result<(), ImportError> {
    // `LLAMA_FTYPE_*` in llama.cpp's `llama.h`.
    let file_type: u32 = match targets.first().map(|target| target.kind) {
        Some(TensorType::F16) => 1,
        Some(TensorType::BF16) => 32,
        _ => 0,
    };
    writer.set("general.file_type", file_type);
    for target in targets {
        writer.tensor(&target.name, &target.dimensions, target.kind);
    }
    writer.create(output, |out| {
        targets.iter().try_for_each(|target| match target.rotary {
            None => out.write(&target.bytes),
            Some(rotary) => rotary.interleave(&target.bytes, |bytes| out.write(bytes)),
        })
    })?;
    Ok(())
}

fn as_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// The tensors of a safetensors file. The format: a 64-bit length, a JSON header of that length,
/// then the data, without holes.
fn parse_header(bytes: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let length = bytes.first_chunk::<8>().map(|length| u64::from_le_bytes(*length));
    match length {
        None => return Err("the file is shorter than its 8-byte length field".to_owned()),
        Some(length) if length > MAX_SAFETENSORS_HEADER_BYTES => {
            return Err(format!(
                "the header has {length} bytes, at most {MAX_SAFETENSORS_HEADER_BYTES} are accepted"
            ));
        }
        Some(_) => {}
    }
    let short = |error: safetensors::SafeTensorError| {
        error.to_string().chars().take(300).collect::<String>()
    };
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(short)?;
    let data = header + 8;
    let place = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
        (name, Tensor { kind: info.dtype, shape: info.shape.clone(), start, end })
    };
    Ok(metadata.tensors().into_iter().map(place).collect())
}

/// The mapping of one folder's tensors.
struct Plan<'a> {
    weights: &'a Weights,
    config: &'a Config,
    used: HashSet<String>,
}

impl<'a> Plan<'a> {
    fn targets(mut self) -> Result<Vec<Target<'a>>, ImportError> {
        let Config { vocabulary, embedding, feed_forward, .. } = *self.config;
        let query = self.config.heads * self.config.head_width;
        let key = self.config.kv_heads * self.config.head_width;
        let mut targets = vec![self.required(
            "model.embed_tokens.weight",
            "token_embd",
            &[vocabulary, embedding],
            false,
        )?];
        targets.push(self.required("model.norm.weight", "output_norm", &[embedding], false)?);
        let shape = [vocabulary, embedding];
        let output = "lm_head.weight";
        if self.config.tied == Some(false) {
            targets.push(self.required(output, "output", &shape, false)?);
        } else if self.config.tied.is_none() {
            targets.extend(self.optional(output, "output", &shape, false)?);
        } else {
            // The file repeats the embedding.
            self.used.insert(output.to_owned());
        }
        if let RopeScaling::Factors(factors) = &self.config.rope_scaling {
            targets.push(Target {
                name: "rope_freqs.weight".to_owned(),
                dimensions: vec![factors.len() as u64],
                kind: TensorType::F32,
                bytes: as_bytes(factors).into(),
                rotary: None,
            });
        }
        for layer in 0..self.config.layers {
            let parts: [(&str, &str, &[u32], bool); 9] = [
                ("input_layernorm", "attn_norm", &[embedding], false),
                ("self_attn.q_proj", "attn_q", &[query, embedding], true),
                ("self_attn.k_proj", "attn_k", &[key, embedding], true),
                ("self_attn.v_proj", "attn_v", &[key, embedding], false),
                ("self_attn.o_proj", "attn_output", &[embedding, query], false),
                ("post_attention_layernorm", "ffn_norm", &[embedding], false),
                ("mlp.gate_proj", "ffn_gate", &[feed_forward, embedding], false),
                ("mlp.up_proj", "ffn_up", &[feed_forward, embedding], false),
                ("mlp.down_proj", "ffn_down", &[embedding, feed_forward], false),
            ];
            for (from, to, shape, is_rotary) in parts {
                let from = format!("model.layers.{layer}.{from}");
                let to = format!("blk.{layer}.{to}");
                targets.push(self.required(&format!("{from}.weight"), &to, shape, is_rotary)?);
                if shape.len() == 2 {
                    let bias = format!("{from}.bias");
                    targets.extend(self.optional(&bias, &to, &shape[..1], is_rotary)?);
                }
            }
        }
        self.check_nothing_is_left()?;
        Ok(targets)
    }

    fn required(
        &mut self,
        from: &str,
        to: &str,
        shape: &[u32],
        is_rotary: bool,
    ) -> Result<Target<'a>, ImportError> {
        let found = self.optional(from, to, shape, is_rotary)?;
        found.ok_or_else(|| inconsistent(format!("tensor {from:?}"), "is missing"))
    }

    fn optional(
        &mut self,
        from: &str,
        to: &str,
        shape: &[u32],
        is_rotary: bool,
    ) -> Result<Option<Target<'a>>, ImportError> {
        let weights = self.weights;
        let Some((shard, tensor)) = weights.tensors.get(from) else { return Ok(None) };
        self.used.insert(from.to_owned());
        if !tensor.shape.iter().copied().eq(shape.iter().map(|&width| width as usize)) {
            let reason =
                format!("has the shape {:?}, config.json asks for {shape:?}", tensor.shape);
            return Err(inconsistent(format!("tensor {from:?}"), reason));
        }
        let kind = match tensor.kind {
            Dtype::F32 => TensorType::F32,
            Dtype::F16 => TensorType::F16,
            Dtype::BF16 => TensorType::BF16,
            other => {
                return Err(unsupported(
                    "type of weights",
                    &format!("{other:?}"),
                    "F32, F16, BF16",
                ));
            }
        };
        let stored = &weights.shards[*shard].map[tensor.start..tensor.end];
        let is_vector = shape.len() == 1;
        let (kind, bytes) = if is_vector && kind != TensorType::F32 {
            let numbers = dequantise(kind, stored)?;
            (TensorType::F32, as_bytes(&numbers).into())
        } else {
            (kind, stored.into())
        };
        let row_elements: usize = if is_vector { 1 } else { tensor.shape[1] };
        let rotary = is_rotary.then_some(Rotary {
            head_width: self.config.head_width as usize,
            row_bytes: row_elements * kind.block_bytes() as usize,
        });
        let suffix = if from.ends_with(".bias") { "bias" } else { "weight" };
        let name = format!("{to}.{suffix}");
        let dimensions = shape.iter().rev().map(|&width| width.into()).collect();
        Ok(Some(Target { name, dimensions, kind, bytes, rotary }))
    }

    /// A tensor that has no place would be lost in silence.
    fn check_nothing_is_left(&self) -> Result<(), ImportError> {
        let mut names: Vec<&String> = self.weights.tensors.keys().collect();
        names.sort();
        // Older folders carry the rotary frequencies, which follow from the config.
        let left = names
            .into_iter()
            .find(|name| !self.used.contains(*name) && !name.ends_with(".rotary_emb.inv_freq"));
        match left {
            Some(name) => Err(unsupported("tensor", name, "those of LlamaForCausalLM")),
            None => Ok(()),
        }
    }
}

impl Rotary {
    fn heads<'a>(self, bytes: &'a [u8]) -> std::slice::ChunksExact<'a, u8> {
        bytes.chunks_exact(self.head_width * self.row_bytes)
    }

    /// Hands out the bytes with the rows of each pair side by side, head by head.
    fn interleave<E>(
        self,
        bytes: &[u8],
        mut out: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rows = Vec::with_capacity(self.head_width * self.row_bytes);
        for head in self.heads(bytes) {
            rows.clear();
            let (first, second) = head.split_at(head.len() / 2);
            let pairs = first.chunks_exact(self.row_bytes).zip(second.chunks_exact(self.row_bytes));
            pairs.for_each(|(first, second)| {
                rows.extend_from_slice(first);
                rows.extend_from_slice(second);
            });
            out(&rows)?;
        }
        Ok(())
    }

    /// The inverse of [`Rotary::interleave`].
    pub(super) fn separate<E>(
        self,
        bytes: &[u8],
        mut out: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rows = Vec::with_capacity(self.head_width * self.row_bytes);
        for head in self.heads(bytes) {
            rows.clear();
            for half in 0..2 {
                let chosen = head.chunks_exact(self.row_bytes).skip(half).step_by(2);
                chosen.for_each(|row| rows.extend_from_slice(row));
            }
            out(&rows)?;
        }
        Ok(())
    }
}
