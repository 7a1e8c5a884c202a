//! A model of a few kilobytes with a byte-level BPE tokenizer.

use std::path::{Path, PathBuf};

use slmops_artifact::gguf::{Array, TensorType, Value, Writer};
use slmops_artifact::huggingface;

pub const VOCABULARY: u64 = 9;
const EMBEDDING: u64 = 8;
const FEED_FORWARD: u64 = 16;
const HEADS: u64 = 2;

/// A file of the repository's `testdata/`.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

/// Writes the model as GGUF, its matrices in `kind`.
pub fn write_gguf(path: &Path, kind: TensorType, pre_tokenizer: &str) {
    let mut writer = Writer::new();
    let strings = |list: &[&str]| {
        Value::Array(Array::String(list.iter().map(|text| (*text).to_owned()).collect()))
    };
    writer
        .set("general.architecture", "llama")
        .set("general.type", "model")
        .set("general.name", "hf")
        .set("llama.context_length", 64_u32)
        .set("llama.embedding_length", EMBEDDING as u32)
        .set("llama.block_count", 2_u32)
        .set("llama.feed_forward_length", FEED_FORWARD as u32)
        .set("llama.attention.head_count", HEADS as u32)
        .set("llama.attention.head_count_kv", 1_u32)
        .set("llama.rope.dimension_count", (EMBEDDING / HEADS) as u32)
        .set("llama.rope.freq_base", 10_000_f32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-6_f32)
        .set("llama.vocab_size", VOCABULARY as u32)
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", pre_tokenizer)
        .set(
            "tokenizer.ggml.tokens",
            strings(&["<|end|>", "<|user|>", "a", "b", "c", "ab", "abc", "Ġ", "  "]),
        )
        .set("tokenizer.ggml.merges", strings(&["a b", "ab c"]))
        .set("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![3, 3, 1, 1, 1, 1, 1, 1, 4])))
        .set("tokenizer.ggml.bos_token_id", 1_u32)
        .set("tokenizer.ggml.eos_token_id", 0_u32)
        .set("tokenizer.ggml.add_bos_token", true)
        .set("tokenizer.ggml.add_eos_token", false)
        .set("tokenizer.ggml.add_space_prefix", false)
        .set("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
        .set(
            "general.file_type",
            match kind {
                TensorType::F16 => 1_u32,
                TensorType::BF16 => 32,
                _ => 0,
            },
        );
    let (query, key) = (EMBEDDING, EMBEDDING / HEADS);
    let mut tensors = vec![
        ("token_embd.weight".to_owned(), vec![EMBEDDING, VOCABULARY]),
        ("output_norm.weight".to_owned(), vec![EMBEDDING]),
        ("output.weight".to_owned(), vec![EMBEDDING, VOCABULARY]),
    ];
    for layer in 0..2 {
        let mut add = |name: &str, dimensions: &[u64]| {
            tensors.push((format!("blk.{layer}.{name}"), dimensions.to_vec()));
        };
        add("attn_norm.weight", &[EMBEDDING]);
        add("attn_q.weight", &[EMBEDDING, query]);
        add("attn_q.bias", &[query]);
        add("attn_k.weight", &[EMBEDDING, key]);
        add("attn_k.bias", &[key]);
        add("attn_v.weight", &[EMBEDDING, key]);
        add("attn_v.bias", &[key]);
        add("attn_output.weight", &[query, EMBEDDING]);
        add("ffn_norm.weight", &[EMBEDDING]);
        add("ffn_gate.weight", &[EMBEDDING, FEED_FORWARD]);
        add("ffn_up.weight", &[EMBEDDING, FEED_FORWARD]);
        add("ffn_down.weight", &[FEED_FORWARD, EMBEDDING]);
    }
    for (name, dimensions) in &tensors {
        let is_vector = dimensions.len() == 1;
        writer.tensor(name, dimensions, if is_vector { TensorType::F32 } else { kind });
    }
    writer
        .create(path, |out| {
            for (index, (_, dimensions)) in tensors.iter().enumerate() {
                let kind = if dimensions.len() == 1 { TensorType::F32 } else { kind };
                let elements: u64 = dimensions.iter().product();
                // Every element differs from its neighbours, so that a lost order shows.
                let numbers =
                    (0..elements).map(|element| (element as f32 + 1.0) / 64.0 + index as f32);
                let bytes: Vec<u8> = match kind {
                    TensorType::F16 => {
                        numbers.flat_map(|n| half::f16::from_f32(n).to_le_bytes()).collect()
                    }
                    TensorType::BF16 => {
                        numbers.flat_map(|n| half::bf16::from_f32(n).to_le_bytes()).collect()
                    }
                    _ => numbers.flat_map(f32::to_le_bytes).collect(),
                };
                out.write(&bytes)?;
            }
            Ok(())
        })
        .unwrap();
}

/// Writes the model as a Hugging Face folder.
pub fn write_folder(folder: &Path) {
    let model = tempfile::NamedTempFile::new().unwrap();
    write_gguf(model.path(), TensorType::F32, "smollm");
    huggingface::export(model.path(), folder).unwrap();
}
