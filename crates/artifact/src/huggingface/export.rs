//! The way back: a GGUF file of the Llama architecture as a Hugging Face folder.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::tokenizer::KNOWN_SPLITS;
use super::weights::Rotary;
use super::{ImportError, inconsistent, io_error, unsupported};
use crate::gguf::{self, Array, GgufFile, Header, TensorInfo, TensorType, Value};

/// Exports a Llama-architecture GGUF file in F32, F16 or BF16 with a byte-level BPE tokenizer as
/// a Hugging Face folder, the inverse of [`super::import`]. The folder is made if need be; files
/// of the same names in it are replaced. Durable only once the folder is flushed by the system.
///
/// # Errors
/// [`ImportError::Unsupported`] for quantised tensors (make a reference with
/// [`gguf::to_f16`] first) and other architectures and tokenizers.
pub fn export(model: &Path, folder: &Path) -> Result<(), ImportError> {
    let file = gguf::open(model)?;
    let header = file.header();
    let architecture = header.architecture()?;
    if architecture != "llama" {
        return Err(unsupported("architecture", architecture, "llama"));
    }
    std::fs::create_dir_all(folder).map_err(io_error("create", folder))?;
    let shape = gguf::shape(header)?;
    let number = |key: &str| header.get(key).and_then(Value::as_f64);
    let token = |key: &str| header.number(&format!("tokenizer.ggml.{key}_token_id"));
    if header.get("llama.rope.scaling.type").is_some()
        || header.tensor("rope_freqs.weight").is_some()
    {
        return Err(unsupported("rope scaling", "present", "none"));
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.embedding,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.key_width,
        "max_position_embeddings": shape.trained_context,
        "rms_norm_eps": shortest(number("llama.attention.layer_norm_rms_epsilon").unwrap_or(1e-5)),
        "rope_theta": shortest(number("llama.rope.freq_base").unwrap_or(10_000.0)),
        "hidden_act": "silu",
        "tie_word_embeddings": header.tensor("output.weight").is_none(),
        "bos_token_id": token("bos"),
        "eos_token_id": token("eos"),
        "pad_token_id": token("padding"),
    });
    write_json(&folder.join("config.json"), &config)?;
    export_tokenizer(header, folder)?;
    export_weights(&file, shape.key_width as usize, &folder.join("model.safetensors"))
}

/// The shortest decimal that is the same F32.
fn shortest(number: f64) -> f64 {
    (number as f32).to_string().parse().unwrap_or(number)
}

fn write_json(path: &Path, value: &Json) -> Result<(), ImportError> {
    let bytes = serde_json::to_vec(value).expect("a JSON value is always JSON");
    std::fs::write(path, bytes).map_err(io_error("write", path))
}

fn export_tokenizer(header: &Header, folder: &Path) -> Result<(), ImportError> {
    let model = header.text("tokenizer.ggml.model").unwrap_or("none");
    if model != "gpt2" {
        return Err(unsupported("tokenizer", model, "gpt2"));
    }
    let strings = |key: &str| {
        header.get(key).and_then(Value::as_strings).ok_or_else(|| {
            ImportError::from(gguf::GgufError::Missing {
                key: key.to_owned(),
                expected: "an array of strings",
            })
        })
    };
    let tokens = strings("tokenizer.ggml.tokens")?;
    let merges = strings("tokenizer.ggml.merges")?;
    let kinds: &[i32] = match header.get("tokenizer.ggml.token_type").and_then(Value::as_array) {
        Some(Array::I32(kinds)) if kinds.len() == tokens.len() => kinds,
        _ => return Err(inconsistent("tokenizer.ggml.token_type", "is missing or too short")),
    };
    let added: Vec<Json> = tokens
        .iter()
        .zip(kinds)
        .enumerate()
        .filter(|&(_, (_, &kind))| kind == 3 || kind == 4)
        .map(|(id, (content, &kind))| {
            json!({"id": id, "content": content, "special": kind == 3, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let vocabulary: Map<String, Json> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let flag = |key: &str| header.get(key).and_then(Value::as_bool).unwrap_or(false);
    let space = flag("tokenizer.ggml.add_space_prefix");
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer(header.text("tokenizer.ggml.pre").unwrap_or("gpt-2"), space)?,
        "post_processor": null,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    });
    write_json(&folder.join("tokenizer.json"), &tokenizer)?;
    let text = |key: &str| {
        let id = header.number(&format!("tokenizer.ggml.{key}_token_id"))?;
        tokens.get(usize::try_from(id).ok()?)
    };
    let config = json!({
        "bos_token": text("bos"),
        "eos_token": text("eos"),
        "unk_token": text("unknown"),
        "pad_token": text("padding"),
        "add_bos_token": flag("tokenizer.ggml.add_bos_token"),
        "add_eos_token": flag("tokenizer.ggml.add_eos_token"),
        "chat_template": header.chat_template(),
    });
    write_json(&folder.join("tokenizer_config.json"), &config)
}

fn pre_tokenizer(name: &str, space: bool) -> Result<Json, ImportError> {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "use_regex": use_regex});
    let digits = json!({"type": "Digits", "individual_digits": true});
    let steps = match name {
        "gpt-2" => vec![bytes(true)],
        "smollm" => vec![digits, bytes(true)],
        _ => {
            let Some((_, splits)) = KNOWN_SPLITS.iter().find(|&&(known, _)| known == name) else {
                return Err(unsupported("pre-tokenizer", name, "those that can be imported"));
            };
            let split = |regex: &&str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"});
            let mut steps: Vec<Json> = splits.iter().map(split).collect();
            if name == "deepseek-coder" {
                steps.push(digits);
            }
            steps.push(bytes(false));
            steps
        }
    };
    Ok(json!({"type": "Sequence", "pretokenizers": steps}))
}

/// The Hugging Face name of a tensor, and whether its rows are in llama.cpp's rotary layout.
fn original_name(name: &str) -> Option<(String, bool)> {
    let whole = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some((whole.to_owned(), false));
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, suffix) = rest.rsplit_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    let is_rotary = part.ends_with("q_proj") || part.ends_with("k_proj");
    Some((format!("model.layers.{layer}.{part}.{suffix}"), is_rotary))
}

fn export_weights(file: &GgufFile, head_width: usize, path: &Path) -> Result<(), ImportError> {
    let mut entries: Vec<(String, bool, &TensorInfo)> = Vec::new();
    let mut head = Map::new();
    let mut offset = 0_u64;
    for tensor in file.header().tensors() {
        let (name, is_rotary) = original_name(&tensor.name).ok_or_else(|| {
            unsupported("tensor", &tensor.name, "those of the Llama architecture")
        })?;
        let kind = match tensor.tensor_type {
            TensorType::F32 => "F32",
            TensorType::F16 => "F16",
            TensorType::BF16 => "BF16",
            other => return Err(unsupported("type of weights", other.name(), "F32, F16, BF16")),
        };
        let shape: Vec<u64> = tensor.dimensions.iter().rev().copied().collect();
        let end = offset + tensor.size_bytes;
        head.insert(
            name.clone(),
            json!({"dtype": kind, "shape": shape, "data_offsets": [offset, end]}),
        );
        offset = end;
        entries.push((name, is_rotary, tensor));
    }
    let mut head = serde_json::to_vec(&head).expect("a JSON value is always JSON");
    // Readers want the data aligned to 8 bytes; trailing spaces are part of the format.
    head.resize(head.len().next_multiple_of(8), b' ');
    let output = File::create(path).map_err(io_error("create", path))?;
    let mut output = BufWriter::with_capacity(1 << 20, output);
    let mut write = |bytes: &[u8]| output.write_all(bytes).map_err(io_error("write", path));
    write(&(head.len() as u64).to_le_bytes())?;
    write(&head)?;
    for (_, is_rotary, tensor) in entries {
        let bytes = file.data(tensor);
        let row_elements = if tensor.dimensions.len() > 1 { tensor.row_elements() } else { 1 };
        let row_bytes = (row_elements * tensor.tensor_type.block_bytes()) as usize;
        let head_bytes = head_width.checked_mul(row_bytes).filter(|&bytes| bytes > 0);
        if !is_rotary {
            write(bytes)?;
        } else if head_bytes.is_some_and(|head_bytes| bytes.len().is_multiple_of(head_bytes)) {
            Rotary { head_width, row_bytes }.separate(bytes, &mut write)?;
        } else {
            let reason = "has rows that are no whole number of heads";
            return Err(inconsistent(format!("tensor {:?}", tensor.name), reason));
        }
    }
    output.flush().map_err(io_error("write", path))
}
