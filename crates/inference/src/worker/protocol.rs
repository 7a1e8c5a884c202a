//! What a program and its worker process say to each other: one JSON value a line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use slmops_api::model::ModelShape;
use slmops_api::runtime::{EffectiveConfig, RuntimeConfig};

use crate::constraint::Constraint;
use crate::llama::Token;

/// The most bytes of one line in either direction.
pub(crate) const MAX_LINE_BYTES: usize = 64 << 20;
/// The most bytes of a prompt given as text.
pub const MAX_PROMPT_BYTES: usize = 8 << 20;
/// The most stop strings of one request.
pub const MAX_STOPS: usize = 16;
/// The most bytes of one stop string.
pub const MAX_STOP_BYTES: usize = 512;
/// The most alternatives listed beside each token.
pub const MAX_TOP_LOGPROBS: u32 = 20;
/// The most tokens that are guessed at once.
pub const MAX_DRAFTED: u32 = 16;
/// The most biased tokens of one request.
pub const MAX_LOGIT_BIASES: usize = 1024;

/// What a worker is to run, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// The GGUF file.
    pub model_path: PathBuf,
    /// The runtime configuration, honoured exactly or refused.
    pub runtime: RuntimeConfig,
    /// Adapters that are loaded with it.
    #[serde(default)]
    pub adapters: Vec<AdapterFile>,
    /// What is off unless somebody asks for it.
    #[serde(default)]
    pub extras: Extras,
}

/// What a worker does beyond answering; each is off by default, and refused where the model cannot do it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Extras {
    /// Whether an answer goes on where the context is full: half of what follows the prompt's first
    /// message (or its first tokens) is then forgotten.
    pub context_shift: bool,
    /// Where sequences are kept over the end of the process.
    pub prompt_cache: Option<PromptCache>,
    /// Where guesses of the next tokens come from, which the model checks several at a time.
    pub speculation: Option<Speculation>,
}

/// Speculative decoding: where guesses come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Speculation {
    /// From what stands in the prompt and the answer already.
    Ngram {
        /// Tokens guessed at once, at most.
        tokens: u32,
    },
    /// From a smaller model of the same vocabulary.
    Draft {
        /// Its GGUF file.
        model_path: PathBuf,
        /// Tokens guessed at once, at most.
        tokens: u32,
    },
}

impl Speculation {
    /// Tokens guessed at once, at most.
    pub(crate) fn tokens(&self) -> u32 {
        match self {
            Self::Ngram { tokens } | Self::Draft { tokens, .. } => *tokens,
        }
    }
}

/// A folder for what prompts became in the engine's memory. It says what users wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptCache {
    /// The folder, which only its owner may read.
    pub folder: PathBuf,
    /// The most bytes of it.
    pub limit_bytes: u64,
}

impl WorkerSpec {
    /// A model without adapters.
    pub fn new(model_path: PathBuf, runtime: RuntimeConfig) -> Self {
        Self { model_path, runtime, adapters: Vec::new(), extras: Extras::default() }
    }

    /// The model with an adapter in its full strength in every answer.
    #[must_use]
    pub fn adapted(mut self, name: &str, path: PathBuf) -> Self {
        let id = self.adapters.len() as u32;
        self.adapters.push(AdapterFile { id, name: name.to_owned(), path, scale: 1.0 });
        self
    }
}

/// A LoRA adapter beside a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterFile {
    /// By which requests choose it; never given to another one while the model is loaded.
    pub id: u32,
    /// The name by which requests choose it.
    pub name: String,
    /// The GGUF file.
    pub path: PathBuf,
    /// The factor of its change in answers to requests that choose no adapters.
    pub scale: f32,
}

/// An adapter that is applied, and how strongly.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterUse {
    /// Which.
    pub id: u32,
    /// The factor of its change: 0 for none, 1 as it was trained.
    pub scale: f32,
}

/// Which adapters are applied in an answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterChoice {
    /// All of them, each at its own scale.
    #[default]
    Common,
    /// These alone.
    These(Vec<AdapterUse>),
    /// The one of this name alone, as it was trained.
    Named(String),
}

/// What is known of a loaded model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Its dimensions.
    pub shape: ModelShape,
    /// GGUF file type, such as `Q4_K - Medium`.
    pub file_type: String,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Its own chat template (Jinja), where it has one.
    pub chat_template: Option<String>,
    /// The text of the token that begins a text; empty where there is none.
    pub beginning_text: String,
    /// The text of the token that ends a text; empty where there is none.
    pub end_text: String,
    /// Whether tokenising puts the beginning token first.
    pub adds_beginning: bool,
    /// Milliseconds from the start of the process until it was ready.
    pub load_ms: u64,
}

/// What is to be continued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// Text as a person wrote it; control tokens written in it are plain text.
    Text(String),
    /// Text that a chat template made; control tokens written in it count as such.
    Template(String),
    /// Tokens as they are.
    Tokens(Vec<Token>),
}

/// How tokens are chosen. The order is: bias, penalties, temperature, `top_k`, `top_p`, `min_p`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 takes the most probable token; 1 samples the model's own distribution.
    pub temperature: f32,
    /// Only the `top_k` most probable tokens; 0 for all.
    pub top_k: u32,
    /// Only the smallest set of most probable tokens whose probabilities reach this sum.
    pub top_p: f32,
    /// Only tokens at least this probable, as a share of the most probable one.
    pub min_p: f32,
    /// Divides (multiplies, where negative) the logits of recent tokens; 1 for none.
    pub repeat_penalty: f32,
    /// How many tokens back `repeat_penalty` looks, prompt included.
    pub repeat_last_n: u32,
    /// Subtracted from a token's logit for each time it was generated before.
    pub frequency_penalty: f32,
    /// Subtracted from a token's logit if it was generated before.
    pub presence_penalty: f32,
    /// Makes the choice repeatable; a random one if absent.
    pub seed: Option<u64>,
    /// Added to the logits of some tokens.
    pub logit_bias: Vec<(Token, f32)>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: None,
            logit_bias: Vec::new(),
        }
    }
}

impl Sampling {
    /// Always the most probable token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether every number is one, and within its range.
    pub(crate) fn check(&self) -> Result<(), RequestError> {
        let biases = self.logit_bias.iter().map(|(_, bias)| ("logit_bias", *bias, -100.0, 100.0));
        let numbers = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repeat_penalty", self.repeat_penalty, 0.01, 100.0),
            ("frequency_penalty", self.frequency_penalty, -100.0, 100.0),
            ("presence_penalty", self.presence_penalty, -100.0, 100.0),
        ];
        for (name, value, low, high) in numbers.into_iter().chain(biases) {
            if !(low..=high).contains(&value) {
                let message = format!("{value} is not within {low} to {high}");
                return Err(RequestError::Invalid { parameter: name.to_owned(), message });
            }
        }
        Ok(())
    }
}

/// A request to continue a prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// What is to be continued.
    pub prompt: Prompt,
    /// Tokens to generate, at most; as many as the context holds if absent.
    pub max_tokens: Option<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Log-probabilities of the chosen tokens and of this many alternatives each, of the model's
    /// own distribution (before bias, penalties and temperature).
    pub logprobs: Option<u32>,
    /// Whether the answer begins with the prompt ([`Event::Echo`]), log-probabilities included where
    /// they are asked for; then `max_tokens` may be 0, and the token that ends the answer is among
    /// its log-probabilities.
    pub echo: bool,
    /// What the answer is held to; it must have passed [`crate::constraint::Checked::check`].
    pub constraint: Option<Constraint>,
    /// Whether tokens that would end the answer are never chosen.
    pub ignore_end: bool,
    /// Whether the prompt is computed anew even where an earlier request left it in the cache.
    pub fresh: bool,
    /// Which adapters are applied.
    pub adapters: AdapterChoice,
}

impl GenerateRequest {
    /// The most probable continuation of `prompt`.
    pub fn greedy(prompt: Prompt, max_tokens: u32) -> Self {
        Self {
            prompt,
            max_tokens: Some(max_tokens),
            sampling: Sampling::greedy(),
            stop: Vec::new(),
            logprobs: None,
            echo: false,
            constraint: None,
            ignore_end: false,
            fresh: false,
            adapters: AdapterChoice::Common,
        }
    }
}

/// A request for the log-probability of a given continuation (teacher-forced).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScoreRequest {
    /// What stands before.
    pub prompt: Prompt,
    /// What is scored. Prompt and continuation are tokenised together, and the tokens from the
    /// first one that differs from the prompt's alone are scored.
    pub continuation: String,
}

/// The log-probabilities of a continuation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The scored tokens.
    pub tokens: Vec<Token>,
    /// Their log-probabilities, in nats.
    pub logprobs: Vec<f64>,
    /// Whether each was the most probable one.
    pub greedy: Vec<bool>,
}

impl Score {
    /// Mean log-probability in nats per token.
    pub fn mean(&self) -> f64 {
        self.logprobs.iter().sum::<f64>() / self.logprobs.len().max(1) as f64
    }
}

/// A token beside its log-probability.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token.
    pub token: Token,
    /// Its bytes, which may be a part of a character.
    pub bytes: Vec<u8>,
    /// Its log-probability in nats; absent for the first token of a prompt, which has nothing before it.
    pub logprob: Option<f64>,
    /// The most probable tokens in its place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TokenLogprob>,
}

/// A piece of an answer: whole characters, never a part of a stop string.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Piece {
    /// The text; may be empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// The tokens that `text` completes.
    pub tokens: Vec<Token>,
    /// Their log-probabilities, if asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
}

impl Piece {
    /// Puts what follows it at its end.
    pub(crate) fn append(&mut self, next: Self) {
        self.text.push_str(&next.text);
        self.tokens.extend(next.tokens);
        self.logprobs.extend(next.logprobs);
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop string came.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
}

/// The end of an answer, with its cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, tokens that an earlier request had left in the cache.
    pub cached_tokens: u32,
    /// Of these, tokens that came from the disk.
    pub restored_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// How often the context was full, and a part of it was forgotten.
    pub context_shifts: u32,
    /// Tokens that were guessed ahead.
    pub drafted_tokens: u32,
    /// Of these, tokens that were right.
    pub accepted_tokens: u32,
    /// Milliseconds spent waiting for a free sequence.
    pub queue_ms: f64,
    /// Milliseconds from then to the first token.
    pub prompt_ms: f64,
    /// Milliseconds from the first token to the last.
    pub decode_ms: f64,
    /// Tokens of which the entropy was taken: the first, and one in so many.
    pub entropy_tokens: u32,
    /// The sum of these entropies in nats.
    pub entropy_nats: f64,
}

/// Why a worker refused or failed one request; the worker goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RequestError {
    /// The request itself is wrong.
    #[error("{message}")]
    Invalid {
        /// The parameter.
        parameter: String,
        /// What is wrong with it.
        message: String,
    },
    /// Prompt and answer do not fit into the context.
    #[error(
        "this model's context is {context_tokens} tokens, but the prompt has {prompt_tokens}{}\nhint: shorten the prompt, lower max_tokens, or serve the model with more context",
        match max_tokens {
            Some(max_tokens) => format!(" and {max_tokens} more were asked for"),
            None => " and leaves no room for an answer".to_owned(),
        }
    )]
    ContextLength {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens asked for, if a number was given.
        max_tokens: Option<u32>,
        /// Tokens of the context.
        context_tokens: u32,
    },
    /// As many requests wait as may.
    #[error("{limit} requests are waiting already\nhint: try again in a moment")]
    QueueFull {
        /// The limit.
        limit: u32,
    },
    /// The engine failed.
    #[error("the engine failed: {message}")]
    Engine {
        /// Its words.
        message: String,
    },
}

/// Why a worker could not load its model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum LoadFailure {
    Model { message: String },
    Settings { settings: Vec<(String, String, String)> },
    TrainedContext { asked: u32, trained: u32 },
    Adapter { message: String },
    PromptCache { message: String },
    Draft { message: String },
}

/// What the worker is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub(crate) enum Command {
    Generate { id: u64, request: GenerateRequest },
    Score { id: u64, request: ScoreRequest },
    Embed { id: u64, prompt: Prompt, adapters: Vec<AdapterUse> },
    LoadAdapter { id: u64, adapter: u32, path: PathBuf },
    UnloadAdapter { id: u64, adapter: u32 },
    Tokenise { id: u64, text: String, add_special: bool, parse_special: bool },
    Detokenise { id: u64, tokens: Vec<Token> },
    Cancel { id: u64 },
}

/// An embedding of a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Embedding {
    /// Unit length, `[embedding]`.
    pub values: Vec<f32>,
    /// Tokens of the text.
    pub prompt_tokens: u32,
}

/// What the worker tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    Loaded {
        effective: EffectiveConfig,
        info: Box<ModelInfo>,
    },
    LoadFailed {
        failure: LoadFailure,
    },
    /// The request got a sequence.
    Started {
        id: u64,
    },
    /// The prompt that was asked to be echoed.
    Echo {
        id: u64,
        piece: Piece,
    },
    Piece {
        id: u64,
        piece: Piece,
    },
    Finished {
        id: u64,
        finish: Finish,
    },
    Score {
        id: u64,
        score: Score,
    },
    Embedding {
        id: u64,
        embedding: Embedding,
    },
    Tokens {
        id: u64,
        tokens: Vec<Token>,
    },
    Bytes {
        id: u64,
        bytes: Vec<u8>,
    },
    /// A command that has no other result.
    Done {
        id: u64,
    },
    Failed {
        id: u64,
        error: RequestError,
    },
}

impl Event {
    /// The request it belongs to.
    pub(crate) fn id(&self) -> Option<u64> {
        match self {
            Self::Loaded { .. } | Self::LoadFailed { .. } => None,
            Self::Started { id }
            | Self::Echo { id, .. }
            | Self::Piece { id, .. }
            | Self::Finished { id, .. }
            | Self::Score { id, .. }
            | Self::Embedding { id, .. }
            | Self::Tokens { id, .. }
            | Self::Bytes { id, .. }
            | Self::Done { id }
            | Self::Failed { id, .. } => Some(*id),
        }
    }

    /// Whether nothing follows it for its request.
    pub(crate) fn is_last(&self) -> bool {
        !matches!(self, Self::Started { .. } | Self::Echo { .. } | Self::Piece { .. })
    }
}
