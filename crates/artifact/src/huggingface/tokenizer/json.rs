//! What `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` hold, as far as it
//! matters here.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

use super::super::config::TokenIds;
use super::super::{ImportError, MAX_TOKENIZER_BYTES, read, unsupported};

pub(super) struct RawTokenizer {
    pub steps: Steps,
    pub model: Model,
}

/// All of `tokenizer.json` but its model.
#[derive(Deserialize)]
pub(super) struct Steps {
    #[serde(default)]
    pub added_tokens: Vec<AddedToken>,
    pub normalizer: Option<Normalizer>,
    pub pre_tokenizer: Option<PreTokenizer>,
    pub post_processor: Option<PostProcessor>,
}

#[derive(Deserialize)]
pub(super) struct AddedToken {
    pub id: u32,
    pub content: String,
    #[serde(default)]
    pub special: bool,
}

pub(super) enum Model {
    Bpe(Bpe),
    Unigram(Unigram),
}

#[derive(Deserialize)]
pub(super) struct Bpe {
    pub vocab: HashMap<String, u32>,
    pub merges: Vec<Merge>,
    pub byte_fallback: Option<bool>,
    pub unk_token: Option<String>,
    pub continuing_subword_prefix: Option<String>,
    pub end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Unigram {
    pub vocab: Vec<(String, f64)>,
    pub unk_id: Option<u32>,
    pub byte_fallback: Option<bool>,
}

impl RawTokenizer {
    /// Reads `tokenizer.json`: once for the kind of model, then for the model, then for the rest,
    /// so that no tree of the whole file is ever held.
    pub fn read(path: &Path) -> Result<Self, ImportError> {
        #[derive(Deserialize)]
        struct Kind {
            #[serde(rename = "type")]
            name: Option<String>,
        }
        #[derive(Deserialize)]
        struct Only<T> {
            model: T,
        }
        let bytes = read(path, MAX_TOKENIZER_BYTES)?;
        let json = |source| ImportError::Json { path: path.to_owned(), source };
        let kind: Only<Kind> = serde_json::from_slice(&bytes).map_err(json)?;
        // The oldest files name no kind; all of them are BPE.
        let model = match kind.model.name.as_deref().unwrap_or("BPE") {
            "BPE" => Model::Bpe(serde_json::from_slice::<Only<Bpe>>(&bytes).map_err(json)?.model),
            "Unigram" => {
                Model::Unigram(serde_json::from_slice::<Only<Unigram>>(&bytes).map_err(json)?.model)
            }
            other => return Err(unsupported("tokenizer model", other, "BPE, Unigram")),
        };
        Ok(Self { steps: serde_json::from_slice(&bytes).map_err(json)?, model })
    }
}

/// Two pieces that become one: as one text with a space between, or as a pair.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Merge {
    Text(String),
    Pair(String, String),
}

impl Merge {
    pub fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Self::Text(text) => text.split_once(' '),
            Self::Pair(left, right) => Some((left, right)),
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "type")]
pub(super) enum Normalizer {
    Sequence {
        normalizers: Vec<Normalizer>,
    },
    Prepend {
        prepend: String,
    },
    Replace {
        pattern: Pattern,
        content: String,
    },
    Precompiled {
        precompiled_charsmap: Option<String>,
    },
    #[serde(rename = "NFC")]
    Nfc {},
    #[serde(rename = "NFKC")]
    Nfkc {},
    #[serde(untagged)]
    Other(OtherStep),
}

#[derive(Deserialize)]
#[serde(tag = "type")]
pub(super) enum PreTokenizer {
    Sequence {
        pretokenizers: Vec<PreTokenizer>,
    },
    Split {
        pattern: Pattern,
    },
    Digits {
        #[serde(default)]
        individual_digits: bool,
    },
    ByteLevel {
        #[serde(default)]
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Metaspace {
        prepend_scheme: Option<String>,
        add_prefix_space: Option<bool>,
    },
    #[serde(untagged)]
    Other(OtherStep),
}

#[derive(Deserialize)]
#[serde(tag = "type")]
pub(super) enum PostProcessor {
    Sequence {
        processors: Vec<PostProcessor>,
    },
    TemplateProcessing {
        single: Vec<TemplatePiece>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
pub(super) enum TemplatePiece {
    SpecialToken { id: String },
    Sequence {},
}

#[derive(Deserialize)]
pub(super) enum Pattern {
    String(String),
    Regex(String),
}

#[derive(Deserialize)]
pub(super) struct OtherStep {
    #[serde(rename = "type")]
    pub name: String,
}

pub(super) fn yes() -> bool {
    true
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct TokenizerConfig {
    pub bos_token: Option<TokenText>,
    pub eos_token: Option<TokenText>,
    pub unk_token: Option<TokenText>,
    pub pad_token: Option<TokenText>,
    pub add_bos_token: Option<bool>,
    pub add_eos_token: Option<bool>,
    pub chat_template: Option<ChatTemplate>,
}

/// A token by its text, or as an object that has it.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum TokenText {
    Text(String),
    Object { content: String },
}

impl TokenText {
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum ChatTemplate {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
pub(super) struct NamedTemplate {
    pub name: String,
    pub template: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct GenerationConfig {
    pub bos_token_id: TokenIds,
    pub eos_token_id: TokenIds,
    pub pad_token_id: TokenIds,
}
