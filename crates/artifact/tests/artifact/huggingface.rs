use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use slmops_artifact::gguf::{self, GgufFile, TensorType, Value};
use slmops_artifact::huggingface::{export, import};

use crate::tiny::{fixture, write_folder, write_gguf};

/// Checks that two files have the same tensors, bit for bit.
#[track_caller]
fn check_same_tensors(left: &GgufFile, right: &GgufFile) {
    let names = |file: &GgufFile| -> Vec<String> {
        let mut names: Vec<_> =
            file.header().tensors().iter().map(|tensor| tensor.name.clone()).collect();
        names.sort();
        names
    };
    assert_eq!(names(left), names(right));
    for tensor in left.header().tensors() {
        let other = right.header().tensor(&tensor.name).unwrap();
        assert_eq!(tensor.dimensions, other.dimensions, "{}", tensor.name);
        assert_eq!(tensor.tensor_type, other.tensor_type, "{}", tensor.name);
        assert!(left.data(tensor) == right.data(other), "{} differs", tensor.name);
    }
}

/// Checks that two files say the same under each key that `is_compared` names.
#[track_caller]
fn check_same_metadata(left: &GgufFile, right: &GgufFile, is_compared: impl Fn(&str) -> bool) {
    let chosen = |file: &GgufFile| -> BTreeMap<String, Value> {
        let entries = file.header().metadata().iter().filter(|(key, _)| is_compared(key));
        entries.cloned().collect()
    };
    let (left, right) = (chosen(left), chosen(right));
    assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>());
    for (key, value) in &left {
        assert!(value == &right[key], "{key} differs");
    }
}

fn is_of_model(key: &str) -> bool {
    key.starts_with("tokenizer.") || key.starts_with("llama.") || key == "general.file_type"
}

/// A folder with a copy of the tiny model, in which `change` edits a JSON file.
struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_folder(&folder.path().join("hf"));
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("hf")
    }

    fn change(self, file: &str, change: impl FnOnce(&mut Json)) -> Self {
        let path = self.path().join(file);
        let mut json: Json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
        self
    }

    /// Edits the safetensors header; the data stays.
    fn change_tensors(self, change: impl FnOnce(&mut serde_json::Map<String, Json>)) -> Self {
        let path = self.path().join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut head: Json = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        change(head.as_object_mut().unwrap());
        let head = serde_json::to_vec(&head).unwrap();
        let parts = [&(head.len() as u64).to_le_bytes()[..], &head, &bytes[8 + len..]];
        std::fs::write(path, parts.concat()).unwrap();
        self
    }

    fn import(&self) -> Result<GgufFile, String> {
        let output = self.folder.path().join("out.gguf");
        match import(&self.path(), &output) {
            Ok(()) => Ok(gguf::open(&output).unwrap()),
            Err(error) => {
                assert!(!output.exists(), "a refused import leaves a file");
                let left = std::fs::read_dir(self.folder.path()).unwrap().count();
                assert_eq!(left, 1, "a refused import leaves a temporary file");
                Err(error.to_string())
            }
        }
    }

    #[track_caller]
    fn check_refused(&self, message: &str) {
        let error = self.import().expect_err("the import must be refused");
        assert!(error.contains(message), "{error:?} lacks {message:?}");
        assert!(error.contains("\nhint: "), "{error:?} lacks a hint");
    }
}

#[test]
fn the_fixture_folder_equals_the_fixture_gguf() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.gguf");
    import(&fixture("glasslm/hf"), &output).unwrap();
    let (ours, reference) =
        (gguf::open(&output).unwrap(), gguf::open(&fixture("glasslm/glass-f32.gguf")).unwrap());
    check_same_tensors(&ours, &reference);
    check_same_metadata(&ours, &reference, is_of_model);
    let again = folder.path().join("again.gguf");
    import(&fixture("glasslm/hf"), &again).unwrap();
    assert!(std::fs::read(again).unwrap() == ours.bytes(), "two imports differ");
}

#[test]
fn an_exported_model_comes_back_the_same() {
    for kind in [TensorType::F32, TensorType::F16, TensorType::BF16] {
        for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-coder"] {
            let folder = tempfile::tempdir().unwrap();
            let model = folder.path().join("model.gguf");
            write_gguf(&model, kind, pre);
            export(&model, &folder.path().join("hf")).unwrap();
            let back = folder.path().join("back.gguf");
            import(&folder.path().join("hf"), &back).unwrap();
            let (before, after) = (gguf::open(&model).unwrap(), gguf::open(&back).unwrap());
            check_same_tensors(&before, &after);
            check_same_metadata(&before, &after, |_| true);
        }
    }
}

/// The whole way with a real model: GGUF to F16 to folder and back. Needs the file that
/// `SLMOPS_SMOLLM2` names (`make test` fetches it); says so where there is none.
#[test]
fn smollm2_comes_back_the_same() {
    let Some(model) = std::env::var_os("SLMOPS_SMOLLM2") else {
        eprintln!("skipped: SLMOPS_SMOLLM2 does not name the SmolLM2 GGUF file");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let reference = folder.path().join("reference.gguf");
    gguf::to_f16(Path::new(&model), &reference).unwrap();
    export(&reference, &folder.path().join("hf")).unwrap();
    let back = folder.path().join("back.gguf");
    import(&folder.path().join("hf"), &back).unwrap();
    let (before, after) = (gguf::open(&reference).unwrap(), gguf::open(&back).unwrap());
    check_same_tensors(&before, &after);
    // The original leaves this one to its default, which is false.
    let key = "tokenizer.ggml.add_eos_token";
    check_same_metadata(&before, &after, |other| other != key && is_of_model(other));
    assert_eq!(after.header().get(key), Some(&false.into()));
    assert_eq!(after.header().text("tokenizer.ggml.pre"), Some("smollm"));
}

#[test]
fn weights_in_two_files_are_put_together() {
    let folder = Folder::new();
    let whole = folder.import().unwrap().bytes().to_vec();
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort_unstable();
    let mut places = serde_json::Map::new();
    for (index, part) in names.chunks(names.len() / 2 + 1).enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", index + 1);
        let views = part.iter().map(|name| (*name, tensors.tensor(name).unwrap()));
        let data = safetensors::serialize(views, None).unwrap();
        std::fs::write(folder.path().join(&file), data).unwrap();
        places.extend(part.iter().map(|name| ((*name).to_owned(), Json::from(file.clone()))));
    }
    std::fs::remove_file(path).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    let write = |places: &serde_json::Map<String, Json>| {
        std::fs::write(&index, json!({ "weight_map": places }).to_string()).unwrap();
    };
    write(&places);
    assert!(folder.import().unwrap().bytes() == whole);

    std::fs::remove_file(folder.folder.path().join("out.gguf")).unwrap();
    let mut wrong = places.clone();
    wrong["model.norm.weight"] = places["lm_head.weight"].clone();
    write(&wrong);
    folder.check_refused("tensor \"model.norm.weight\": is not in model-00001");
    for name in ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin"] {
        wrong["model.norm.weight"] = name.into();
        write(&wrong);
        folder.check_refused("names the file");
    }
}

#[test]
fn other_models_are_refused_by_name() {
    let config = |change: fn(&mut Json)| Folder::new().change("config.json", change);
    config(|json| json["architectures"][0] = "Qwen2ForCausalLM".into()).check_refused(
        "architecture \"Qwen2ForCausalLM\" cannot be imported (known: LlamaForCausalLM)",
    );
    config(|json| *json = json!({"model_type": "bert"})).check_refused("architecture \"bert\"");
    config(|json| json["hidden_act"] = "gelu".into()).check_refused("activation \"gelu\"");
    config(|json| json["quantization_config"] = json!({"bits": 4})).check_refused("quantization");
    config(|json| json["rope_scaling"] = json!({"rope_type": "yarn", "factor": 2.0}))
        .check_refused("rope scaling \"yarn\"");
    config(|json| json["rope_scaling"] = json!({"type": "linear"})).check_refused("usable factor");
    config(|json| json["partial_rotary_factor"] = 0.5.into())
        .check_refused("partial_rotary_factor");
    config(|json| json["vocab_size"] = 0.into()).check_refused("vocab_size is 0");
    config(|json| json["num_hidden_layers"] = 4_000_000.into()).check_refused("num_hidden_layers");
    config(|json| json["num_key_value_heads"] = 0.into()).check_refused("num_key_value_heads");
    config(|json| json["head_dim"] = 3.into()).check_refused("odd");
    config(|json| json["rms_norm_eps"] = (-1.0).into()).check_refused("rms_norm_eps");
    config(|json| json["vocab_size"] = (-1).into()).check_refused("parse");
    config(|json| json["vocab_size"] = 10.into()).check_refused("config.json asks for [10, 8]");
    config(|json| json["bos_token_id"] = 99.into())
        .change("tokenizer_config.json", |json| json["bos_token"] = Json::Null)
        .check_refused("bos token id: is 99");
}

#[test]
fn a_folder_that_lacks_a_file_says_which() {
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = Folder::new();
        std::fs::remove_file(folder.path().join(file)).unwrap();
        folder.check_refused(file);
    }
    let folder = Folder::new();
    std::fs::remove_file(folder.path().join("tokenizer_config.json")).unwrap();
    assert_eq!(folder.import().unwrap().header().chat_template(), None);
}

#[test]
fn tensors_that_are_missing_wrong_or_unknown_are_refused() {
    let head =
        |change: fn(&mut serde_json::Map<String, Json>)| Folder::new().change_tensors(change);
    let rename = |head: &mut serde_json::Map<String, Json>, from: &str, to: &str| {
        let tensor = head.remove(from).unwrap();
        head.insert(to.to_owned(), tensor);
    };
    let folder = Folder::new()
        .change_tensors(|head| rename(head, "model.layers.1.mlp.up_proj.weight", "model.extra"));
    folder.check_refused("tensor \"model.layers.1.mlp.up_proj.weight\": is missing");
    let folder = Folder::new().change_tensors(|head| {
        rename(head, "model.layers.1.self_attn.v_proj.bias", "model.layers.1.self_attn.lora");
    });
    folder.check_refused("tensor \"model.layers.1.self_attn.lora\" cannot be imported");
    head(|head| head["model.norm.weight"]["dtype"] = "I32".into()).check_refused("\"I32\"");
    head(|head| head["lm_head.weight"]["shape"] = json!([8, 9])).check_refused("shape [8, 9]");
    head(|head| head["lm_head.weight"]["data_offsets"] = json!([0, 1])).check_refused("parse");
    head(|head| head["lm_head.weight"]["shape"] = json!([1_u64 << 63, 2])).check_refused("parse");
    let folder = Folder::new();
    std::fs::write(folder.path().join("model.safetensors"), u64::MAX.to_le_bytes()).unwrap();
    folder.check_refused("the header has 18446744073709551615 bytes");
}

#[test]
fn tied_output_is_left_out() {
    let folder = Folder::new().change("config.json", |json| {
        json["tie_word_embeddings"] = true.into();
    });
    assert!(folder.import().unwrap().header().tensor("output.weight").is_none());
}

#[test]
fn rope_scaling_of_llama_3_becomes_factors() {
    let folder = Folder::new().change("config.json", |json| {
        json["head_dim"] = 4.into();
        json["rope_theta"] = 500_000.0.into();
        json["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
        });
    });
    let file = folder.import().unwrap();
    let tensor = file.header().tensor("rope_freqs.weight").unwrap();
    let factors = gguf::dequantise(TensorType::F32, file.data(tensor)).unwrap();
    // Waves of 6.3 and 4443 tokens: the short one stays, the long one is blended:
    // (8192 / 4442.9 - 1) / 3 = 0.28128, 1 / ((1 - 0.28128) / 32 + 0.28128) = 3.29226.
    assert_eq!(factors.len(), 2);
    assert_eq!(factors[0], 1.0);
    assert!((factors[1] - 3.29226).abs() < 1e-4, "{}", factors[1]);

    let folder = Folder::new().change("config.json", |json| {
        json["rope_parameters"] = json!({"rope_type": "linear", "factor": 4.0});
    });
    let file = folder.import().unwrap();
    assert_eq!(file.header().text("llama.rope.scaling.type"), Some("linear"));
    assert_eq!(file.header().get("llama.rope.scaling.factor"), Some(&Value::F32(4.0)));
}

#[test]
fn tokenizers_that_would_cut_otherwise_are_refused() {
    let tokenizer = |change: fn(&mut Json)| Folder::new().change("tokenizer.json", change);
    tokenizer(|json| json["model"]["type"] = "WordPiece".into()).check_refused("\"WordPiece\"");
    tokenizer(|json| json["pre_tokenizer"] = json!({"type": "Whitespace"}))
        .check_refused("pre-tokenizer \"Whitespace\"");
    tokenizer(|json| {
        json["pre_tokenizer"]["pretokenizers"][0] =
            json!({"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated"});
    })
    .check_refused("Split x+");
    tokenizer(|json| json["normalizer"] = json!({"type": "Lowercase"}))
        .check_refused("normalizer \"Lowercase\"");
    tokenizer(|json| json["model"]["end_of_word_suffix"] = "</w>".into()).check_refused("</w>");
    tokenizer(|json| json["model"]["merges"][0] = "ab".into()).check_refused("two parts");
    tokenizer(|json| json["model"]["vocab"]["z"] = 9.into()).check_refused("has the id 9");
    tokenizer(|json| json["added_tokens"][0]["content"] = "a".into()).check_refused("occurs twice");
}

#[test]
fn merges_may_be_pairs_and_gaps_are_filled() {
    let folder = Folder::new().change("tokenizer.json", |json| {
        json["model"]["merges"] = json!([["a", "b"], [" ", "c"]]);
        json["model"]["vocab"].as_object_mut().unwrap().remove("c");
    });
    let file = folder.import().unwrap();
    let strings = |key| file.header().get(key).unwrap().as_strings().unwrap();
    assert_eq!(strings("tokenizer.ggml.merges"), ["a b", "Ġ c"]);
    assert_eq!(strings("tokenizer.ggml.tokens")[4], "[PAD4]");
}

#[test]
fn sentencepiece_vocabularies_keep_their_bytes_and_order() {
    let folder = Folder::new().change("tokenizer.json", |json| {
        json["pre_tokenizer"] = Json::Null;
        json["normalizer"] = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        ]});
        json["post_processor"] = json!({"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        ], "pair": [], "special_tokens": {}});
        json["added_tokens"] = json!([
            {"id": 0, "content": "<unk>", "special": true},
            {"id": 1, "content": "<s>", "special": true}
        ]);
        json["model"] = json!({
            "type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "▁ab": 7},
            "merges": ["a b", "▁ ab"]
        });
    });
    let folder = folder.change("tokenizer_config.json", |json| {
        *json = json!({"bos_token": {"content": "<s>"}, "unk_token": "<unk>"});
    });
    let file = folder.import().unwrap();
    let get = |key: &str| file.header().get(&format!("tokenizer.ggml.{key}")).cloned();
    assert_eq!(get("model"), Some("llama".into()));
    let types = gguf::Array::I32(vec![2, 3, 6, 1, 1, 1, 1, 1, 5]);
    assert_eq!(get("token_type"), Some(Value::Array(types)));
    let unmerged = -10_000.0;
    let scores = vec![0.0, 0.0, 0.0, unmerged, unmerged, unmerged, -1.0, -2.0, unmerged];
    assert_eq!(get("scores"), Some(Value::Array(gguf::Array::F32(scores))));
    assert_eq!(get("add_bos_token"), Some(true.into()));
    assert_eq!(get("add_space_prefix"), Some(true.into()));
    assert_eq!(get("bos_token_id"), Some(1_u32.into()));
}

#[test]
fn unigram_vocabularies_keep_their_scores() {
    for (falls_back, model) in [(true, "llama"), (false, "t5")] {
        let folder = Folder::new().change("tokenizer.json", |json| {
            json["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁"});
            json["added_tokens"] = json!([]);
            json["model"] = json!({"type": "Unigram", "unk_id": 0, "byte_fallback": falls_back,
                "vocab": [["<unk>", 0.0], ["▁a", -1.5], ["<0x0A>", 0.0]]});
        });
        let folder = folder.change("config.json", |json| json["bos_token_id"] = Json::Null);
        let file = folder.import().unwrap();
        assert_eq!(file.header().text("tokenizer.ggml.model"), Some(model));
        let Some(Value::Array(gguf::Array::F32(scores))) =
            file.header().get("tokenizer.ggml.scores")
        else {
            panic!("no scores");
        };
        assert_eq!(scores[..3], [0.0, -1.5, 0.0]);
    }
}

#[test]
fn named_chat_templates_are_kept() {
    let folder = Folder::new().change("tokenizer_config.json", |json| {
        json["chat_template"] = json!([
            {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}
        ]);
    });
    let file = folder.import().unwrap();
    assert_eq!(file.header().chat_template(), Some("plain"));
    assert_eq!(file.header().text("tokenizer.chat_template.tool_use"), Some("tools"));
    drop(file);
    std::fs::write(folder.path().join("chat_template.jinja"), "own file").unwrap();
    assert_eq!(folder.import().unwrap().header().chat_template(), Some("own file"));
}

#[test]
fn other_tokenizers_are_not_exported() {
    let folder = tempfile::tempdir().unwrap();
    let error = export(&fixture("glasslm/glass-f32.gguf"), folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer \"llama\""), "{error}");
}
