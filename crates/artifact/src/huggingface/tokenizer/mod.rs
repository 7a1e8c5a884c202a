//! `tokenizer.json` and `tokenizer_config.json` to `tokenizer.ggml.*` metadata.

mod json;

use std::collections::HashMap;
use std::path::Path;

use base64::Engine as _;

use self::json::{
    AddedToken, Bpe, ChatTemplate, GenerationConfig, Merge, Model, NamedTemplate, Normalizer,
    Pattern, PostProcessor, PreTokenizer, RawTokenizer, TemplatePiece, TokenText, TokenizerConfig,
    Unigram,
};
use super::config::{Config, TokenIds};
use super::{
    ImportError, MAX_CONFIG_BYTES, inconsistent, io_error, read, read_optional_json, unsupported,
};
use crate::gguf::{Array, Value, Writer};

/// What stands for a space in SentencePiece vocabularies.
const SPACE_MARK: char = '\u{2581}';
/// The score of pieces that no merge makes (single characters): below that of every merge.
const UNMERGED_SCORE: f32 = -10_000.0;

/// Token types (`llama_token_type` in llama.cpp's `llama.h`).
mod kind {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

/// Pre-tokenizers by the regular expressions of their `Split` steps, as published tokenizers
/// spell them, and the name under which llama.cpp knows the same rules.
pub(super) const KNOWN_SPLITS: [(&str, &[&str]); 5] = [
    (
        "llama-bpe",
        &[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
    ),
    (
        "qwen2",
        &[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
    ),
    (
        "seed-coder",
        &[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}|",
            r" ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
    ),
    (
        "tekken",
        &[concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
    ),
    ("deepseek-coder", &["[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥ࠀ-一가-퟿]+"]),
];

/// Sets the metadata that describes the tokenizer.
pub(super) fn describe(
    folder: &Path,
    config: &Config,
    writer: &mut Writer,
) -> Result<(), ImportError> {
    let raw = RawTokenizer::read(&folder.join("tokenizer.json"))?;
    let described: TokenizerConfig =
        read_optional_json(&folder.join("tokenizer_config.json"), MAX_CONFIG_BYTES)?;
    let generation: GenerationConfig =
        read_optional_json(&folder.join("generation_config.json"), MAX_CONFIG_BYTES)?;

    let vocabulary = Vocabulary::new(&raw, config.vocabulary)?;
    let ids = &vocabulary.ids;
    vocabulary.describe(&raw, writer)?;
    let id_of = |text: &Option<TokenText>| text.as_ref().and_then(|text| ids.get(text.text()));
    let unknown = match &raw.model {
        Model::Bpe(bpe) => bpe.unk_token.as_ref().and_then(|token| ids.get(token).copied()),
        Model::Unigram(unigram) => unigram.unk_id,
    };
    // The texts of tokenizer_config.json go before the numbers of the other files.
    let specials = [
        ("bos", id_of(&described.bos_token).copied(), config.bos, &generation.bos_token_id),
        ("eos", id_of(&described.eos_token).copied(), config.eos, &generation.eos_token_id),
        ("unknown", id_of(&described.unk_token).copied(), unknown, &TokenIds::None),
        ("padding", id_of(&described.pad_token).copied(), config.pad, &generation.pad_token_id),
    ];
    for (name, first, second, third) in specials {
        let Some(id) = first.or(second).or(third.first()) else { continue };
        if id >= config.vocabulary {
            let reason = format!("is {id}, the vocabulary has {} tokens", config.vocabulary);
            return Err(inconsistent(format!("{name} token id"), reason));
        }
        writer.set(&format!("tokenizer.ggml.{name}_token_id"), id);
    }
    let (adds_bos, adds_eos) = added_around(&raw.steps.post_processor, &described);
    writer.set("tokenizer.ggml.add_bos_token", described.add_bos_token.unwrap_or(adds_bos));
    writer.set("tokenizer.ggml.add_eos_token", described.add_eos_token.unwrap_or(adds_eos));
    writer.set("tokenizer.ggml.add_space_prefix", adds_space(&raw));
    describe_chat(folder, described.chat_template, writer)
}

struct Vocabulary {
    tokens: Vec<String>,
    scores: Vec<f32>,
    kinds: Vec<i32>,
    ids: HashMap<String, u32>,
}

impl Vocabulary {
    /// The tokens of the model and the added ones, filled up to `size` with unused ones.
    fn new(raw: &RawTokenizer, size: u32) -> Result<Self, ImportError> {
        let mut pieces: Vec<Option<(String, f32, i32)>> = vec![None; size as usize];
        let mut put = |id: u32, text: &str, score: f32, kind: i32| match pieces.get_mut(id as usize)
        {
            Some(place) => {
                *place = Some((text.to_owned(), score, kind));
                Ok(())
            }
            None => Err(inconsistent(
                format!("token {text:?}"),
                format!("has the id {id}, config.json's vocab_size is {size}"),
            )),
        };
        match &raw.model {
            Model::Bpe(Bpe { vocab, byte_fallback, unk_token, .. }) => {
                let scores = merge_scores(raw);
                for (text, &id) in vocab {
                    let kind = if *byte_fallback == Some(true) && is_byte_token(text) {
                        kind::BYTE
                    } else if is_sentencepiece(raw) && unk_token.as_ref() == Some(text) {
                        kind::UNKNOWN
                    } else {
                        kind::NORMAL
                    };
                    let merged = scores.get(text.as_str()).copied();
                    let score = match kind {
                        kind::NORMAL => merged.unwrap_or(UNMERGED_SCORE),
                        _ => 0.0,
                    };
                    put(id, text, score, kind)?;
                }
            }
            Model::Unigram(Unigram { vocab, unk_id, byte_fallback }) => {
                for (id, (text, score)) in (0_u32..).zip(vocab) {
                    let kind = if *unk_id == Some(id) {
                        kind::UNKNOWN
                    } else if *byte_fallback == Some(true) && is_byte_token(text) {
                        kind::BYTE
                    } else {
                        kind::NORMAL
                    };
                    put(id, text, *score as f32, kind)?;
                }
            }
        }
        let unknown = match &raw.model {
            Model::Bpe(bpe) if is_sentencepiece(raw) => bpe.unk_token.as_deref(),
            _ => None,
        };
        for AddedToken { id, content, special } in &raw.steps.added_tokens {
            if unknown == Some(content) {
                put(*id, content, 0.0, kind::UNKNOWN)?;
            } else if *special {
                put(*id, content, 0.0, kind::CONTROL)?;
            } else {
                // llama.cpp matches these against the text before spaces are marked.
                put(*id, &content.replace(SPACE_MARK, " "), 0.0, kind::USER_DEFINED)?;
            }
        }
        let mut vocabulary =
            Self { tokens: vec![], scores: vec![], kinds: vec![], ids: HashMap::new() };
        for (id, piece) in (0_u32..).zip(pieces) {
            let (text, score, kind) =
                piece.unwrap_or_else(|| (format!("[PAD{id}]"), UNMERGED_SCORE, kind::UNUSED));
            if vocabulary.ids.insert(text.clone(), id).is_some() {
                let reason = format!("occurs twice, the second time with the id {id}");
                return Err(inconsistent(format!("token {text:?}"), reason));
            }
            vocabulary.tokens.push(text);
            vocabulary.scores.push(score);
            vocabulary.kinds.push(kind);
        }
        Ok(vocabulary)
    }

    fn describe(&self, raw: &RawTokenizer, writer: &mut Writer) -> Result<(), ImportError> {
        check_normalizer(raw)?;
        let set_tokens = |writer: &mut Writer| {
            let tokens = Value::Array(Array::String(self.tokens.clone()));
            writer.set("tokenizer.ggml.tokens", tokens);
        };
        let set_scores = |writer: &mut Writer| {
            let scores = Value::Array(Array::F32(self.scores.clone()));
            writer.set("tokenizer.ggml.scores", scores);
        };
        match &raw.model {
            Model::Bpe(Bpe { merges, .. }) if !is_sentencepiece(raw) => {
                writer.set("tokenizer.ggml.model", "gpt2");
                writer.set("tokenizer.ggml.pre", pre_tokenizer(raw)?);
                set_tokens(writer);
                let merges = merges.iter().map(merge_text).collect::<Result<_, _>>()?;
                writer.set("tokenizer.ggml.merges", Value::Array(Array::String(merges)));
            }
            Model::Bpe(_) => {
                self.check_splits(raw)?;
                writer.set("tokenizer.ggml.model", "llama");
                set_tokens(writer);
                set_scores(writer);
            }
            Model::Unigram(Unigram { byte_fallback, .. }) => {
                // llama.cpp has byte fallback in its SentencePiece tokenizer alone, and exact
                // unigram search in the T5 one alone. Losing characters is worse.
                let falls_back = *byte_fallback == Some(true);
                writer.set("tokenizer.ggml.model", if falls_back { "llama" } else { "t5" });
                set_tokens(writer);
                set_scores(writer);
                if !falls_back {
                    describe_unigram(raw.steps.normalizer.as_ref(), writer)?;
                }
            }
        }
        let kinds = Value::Array(Array::I32(self.kinds.clone()));
        writer.set("tokenizer.ggml.token_type", kinds);
        Ok(())
    }

    /// llama.cpp's SentencePiece tokenizer merges across the whole text. A `Split` step changes
    /// nothing only where no token reaches over its borders: before marked spaces and around
    /// line ends.
    fn check_splits(&self, raw: &RawTokenizer) -> Result<(), ImportError> {
        let known = "null, Metaspace, or a Split at spaces and line ends";
        for step in steps(raw.steps.pre_tokenizer.as_ref()) {
            match step {
                PreTokenizer::Metaspace { .. } => {}
                PreTokenizer::Split { pattern: Pattern::Regex(regex) }
                    if regex.contains(SPACE_MARK) =>
                {
                    let reaches_over = |text: &str| {
                        let inner = text.trim_start_matches(SPACE_MARK);
                        inner.contains(SPACE_MARK)
                            || text.chars().count() > 1 && text.contains('\n')
                    };
                    let normal = self.tokens.iter().zip(&self.kinds);
                    let mut normal = normal.filter(|&(_, &kind)| kind == kind::NORMAL);
                    if normal.any(|(text, _)| reaches_over(text)) {
                        return Err(unsupported("pre-tokenizer", regex, known));
                    }
                }
                other => return Err(unsupported("pre-tokenizer", &step_name(other), known)),
            }
        }
        Ok(())
    }
}

/// Whether text is `<0x00>` to `<0xFF>`.
fn is_byte_token(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Whether a BPE model works on text with marked spaces, not on bytes.
fn is_sentencepiece(raw: &RawTokenizer) -> bool {
    let is_byte_level = steps(raw.steps.pre_tokenizer.as_ref())
        .iter()
        .any(|step| matches!(step, PreTokenizer::ByteLevel { .. }));
    let falls_back = matches!(&raw.model, Model::Bpe(bpe) if bpe.byte_fallback == Some(true));
    let marks = normalizers(raw.steps.normalizer.as_ref()).iter().any(
        |step| matches!(step, Normalizer::Replace { content, .. } if content.contains(SPACE_MARK)),
    );
    let metaspace = steps(raw.steps.pre_tokenizer.as_ref())
        .iter()
        .any(|step| matches!(step, PreTokenizer::Metaspace { .. }));
    !is_byte_level && (falls_back || marks || metaspace)
}

/// The score of each piece that a merge makes: the earlier the merge, the higher.
fn merge_scores(raw: &RawTokenizer) -> HashMap<String, f32> {
    let mut scores = HashMap::new();
    if let Model::Bpe(Bpe { merges, .. }) = &raw.model
        && is_sentencepiece(raw)
    {
        for (rank, merge) in merges.iter().enumerate() {
            if let Some((left, right)) = merge.parts() {
                scores.entry(format!("{left}{right}")).or_insert(-(rank as f32 + 1.0));
            }
        }
    }
    scores
}

/// A merge as GGUF stores it: two parts with a space between, spaces within them as GPT-2's
/// alphabet writes them.
fn merge_text(merge: &Merge) -> Result<String, ImportError> {
    let (left, right) = merge
        .parts()
        .ok_or_else(|| inconsistent("tokenizer.json", "a merge does not have two parts"))?;
    Ok(format!("{} {}", left.replace(' ', "\u{120}"), right.replace(' ', "\u{120}")))
}

fn steps(step: Option<&PreTokenizer>) -> Vec<&PreTokenizer> {
    match step {
        None => Vec::new(),
        Some(PreTokenizer::Sequence { pretokenizers }) => {
            pretokenizers.iter().flat_map(|step| steps(Some(step))).collect()
        }
        Some(step) => vec![step],
    }
}

fn normalizers(step: Option<&Normalizer>) -> Vec<&Normalizer> {
    match step {
        None => Vec::new(),
        Some(Normalizer::Sequence { normalizers: inner }) => {
            inner.iter().flat_map(|step| normalizers(Some(step))).collect()
        }
        Some(step) => vec![step],
    }
}

fn step_name(step: &PreTokenizer) -> String {
    match step {
        PreTokenizer::Sequence { .. } => "Sequence".to_owned(),
        PreTokenizer::Split { pattern: Pattern::Regex(pattern) | Pattern::String(pattern) } => {
            format!("Split {pattern}")
        }
        PreTokenizer::Digits { individual_digits } => format!("Digits {individual_digits}"),
        PreTokenizer::ByteLevel { use_regex, .. } => format!("ByteLevel {use_regex}"),
        PreTokenizer::Metaspace { .. } => "Metaspace".to_owned(),
        PreTokenizer::Other(step) => step.name.clone(),
    }
}

/// llama.cpp's name for the rules that cut a text before byte-level merging.
fn pre_tokenizer(raw: &RawTokenizer) -> Result<&'static str, ImportError> {
    let steps = steps(raw.steps.pre_tokenizer.as_ref());
    let unknown = || {
        let found: Vec<String> = steps.iter().map(|step| step_name(step)).collect();
        let known: Vec<&str> = KNOWN_SPLITS.iter().map(|&(name, _)| name).collect();
        let known = format!("those of gpt-2, smollm, {}", known.join(", "));
        Err(unsupported("pre-tokenizer", &found.join(", "), known))
    };
    let mut splits = Vec::new();
    let mut digits = false;
    let mut bytes = None;
    for step in &steps {
        match step {
            PreTokenizer::Split { pattern: Pattern::Regex(pattern) | Pattern::String(pattern) } => {
                splits.push(pattern.as_str());
            }
            PreTokenizer::Digits { individual_digits: true } => digits = true,
            PreTokenizer::ByteLevel { use_regex, .. } => bytes = Some(*use_regex),
            _ => return unknown(),
        }
    }
    let named = |splits: &[&str]| KNOWN_SPLITS.iter().find(|&&(_, known)| *known == *splits);
    match (splits.as_slice(), digits, bytes) {
        ([], false, Some(true)) => Ok("gpt-2"),
        ([], true, Some(true)) => Ok("smollm"),
        (splits, digits, Some(false)) => match named(splits) {
            // Of the known ones, this alone also cuts digits apart.
            Some(&(name, _)) if digits == (name == "deepseek-coder") => Ok(name),
            _ => unknown(),
        },
        _ => unknown(),
    }
}

/// Refuses normalizers that change letters: llama.cpp would not, and so see other tokens.
fn check_normalizer(raw: &RawTokenizer) -> Result<(), ImportError> {
    for step in normalizers(raw.steps.normalizer.as_ref()) {
        if let Normalizer::Other(step) = step {
            let known = "Prepend, Replace, Precompiled, NFC, NFKC";
            return Err(unsupported("normalizer", &step.name, known));
        }
    }
    if let Model::Bpe(Bpe { continuing_subword_prefix, end_of_word_suffix, .. }) = &raw.model {
        let affix = continuing_subword_prefix.as_ref().or(end_of_word_suffix.as_ref());
        if let Some(affix) = affix.filter(|affix| !affix.is_empty()) {
            return Err(unsupported("word affix of the tokenizer", affix, "none"));
        }
    }
    Ok(())
}

fn describe_unigram(
    normalizer: Option<&Normalizer>,
    writer: &mut Writer,
) -> Result<(), ImportError> {
    let mut merges_spaces = false;
    for step in normalizers(normalizer) {
        match step {
            Normalizer::Replace { pattern: Pattern::Regex(regex), .. } if regex == " {2,}" => {
                merges_spaces = true;
            }
            Normalizer::Precompiled { precompiled_charsmap: Some(map) } => {
                let map = base64::engine::general_purpose::STANDARD.decode(map).map_err(|_| {
                    inconsistent("tokenizer.json", "precompiled_charsmap is not base64")
                })?;
                let map = Value::Array(Array::U8(map));
                writer.set("tokenizer.ggml.precompiled_charsmap", map);
            }
            _ => {}
        }
    }
    writer.set("tokenizer.ggml.remove_extra_whitespaces", merges_spaces);
    Ok(())
}

/// Whether a space is put before the text.
fn adds_space(raw: &RawTokenizer) -> bool {
    let prepends = normalizers(raw.steps.normalizer.as_ref()).iter().any(
        |step| matches!(step, Normalizer::Prepend { prepend } if prepend.contains(SPACE_MARK)),
    );
    prepends
        || steps(raw.steps.pre_tokenizer.as_ref()).iter().any(|step| match step {
            PreTokenizer::ByteLevel { add_prefix_space, .. } => *add_prefix_space,
            PreTokenizer::Metaspace { prepend_scheme, add_prefix_space } => {
                match prepend_scheme.as_deref() {
                    Some(scheme) => scheme != "never",
                    None => add_prefix_space.unwrap_or(true),
                }
            }
            _ => false,
        })
}

/// Whether the post-processor puts the first and the last token around a text.
fn added_around(processor: &Option<PostProcessor>, described: &TokenizerConfig) -> (bool, bool) {
    let is = |piece: Option<&TemplatePiece>, token: &Option<TokenText>| match (piece, token) {
        (Some(TemplatePiece::SpecialToken { id }), Some(token)) => id == token.text(),
        _ => false,
    };
    match processor {
        Some(PostProcessor::TemplateProcessing { single }) => {
            (is(single.first(), &described.bos_token), is(single.last(), &described.eos_token))
        }
        Some(PostProcessor::Sequence { processors }) => {
            let flags = processors.iter().map(|step| match step {
                PostProcessor::TemplateProcessing { single } => (
                    is(single.first(), &described.bos_token),
                    is(single.last(), &described.eos_token),
                ),
                _ => (false, false),
            });
            flags.fold((false, false), |all, one| (all.0 || one.0, all.1 || one.1))
        }
        _ => (false, false),
    }
}

fn describe_chat(
    folder: &Path,
    template: Option<ChatTemplate>,
    writer: &mut Writer,
) -> Result<(), ImportError> {
    // Newer folders keep the template in a file of its own, which goes first.
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        let bytes = read(&path, MAX_CONFIG_BYTES)?;
        let template = String::from_utf8(bytes).map_err(|error| {
            io_error("read", &path)(std::io::Error::new(std::io::ErrorKind::InvalidData, error))
        })?;
        writer.set("tokenizer.chat_template", template);
        return Ok(());
    }
    match template {
        Some(ChatTemplate::One(template)) => {
            writer.set("tokenizer.chat_template", template);
        }
        Some(ChatTemplate::Named(templates)) => {
            let mut names = Vec::new();
            for NamedTemplate { name, template } in templates {
                if name == "default" {
                    writer.set("tokenizer.chat_template", template);
                } else {
                    writer.set(&format!("tokenizer.chat_template.{name}"), template);
                    names.push(name);
                }
            }
            if !names.is_empty() {
                writer.set("tokenizer.chat_templates", Value::Array(Array::String(names)));
            }
        }
        None => {}
    }
    Ok(())
}
