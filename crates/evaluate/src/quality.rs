//! The job that measures quality: teacher-forced text against the reference, and the task suite.
//! It loads the model, so it runs in a child process.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use slmops_api::report::TaskResult;
use slmops_artifact::{Digest, digest::Hasher};
use slmops_inference::chat::{ChatMessage, ChatTemplate};
use slmops_inference::llama::{Adapter, Batch, Context, ContextOptions, LoadOptions, Model, Token};

use crate::distributions::{self, Reader, Writer};
use crate::statistics;
use crate::suite::{Check, Item, Suite, SuiteSource, Task};

/// The job's name.
pub const JOB: &str = "evaluate-quality";
/// The fewest tokens of text that give one chunk.
const MIN_CHUNK_TOKENS: usize = 8;
/// The most prompt tokens of one task item.
const MAX_PROMPT_TOKENS: usize = 1024;
/// The quantile of the per-token divergence that a report names.
const TAIL_QUANTILE: f64 = 0.99;

/// What the job is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct Input {
    /// The model file.
    pub model: PathBuf,
    /// A LoRA adapter that is applied to it.
    #[serde(default)]
    pub adapter: Option<PathBuf>,
    /// The suite.
    pub suite: SuiteSource,
    /// What is done with the reference's distributions in this file.
    pub distributions: PathBuf,
    /// Whether this model is the reference: it writes that file instead of reading it.
    pub is_reference: bool,
    /// Compute threads; 0 means one for each core.
    pub threads: u32,
}

/// How far the job is, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Tokens computed.
    pub done: u64,
    /// Tokens in all.
    pub total: u64,
}

/// What the job found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Per-chunk mean negative log-likelihood, nats per token.
    pub chunk_nll: Vec<f64>,
    /// Per-chunk mean divergence from the reference, nats per token.
    pub chunk_kl: Vec<f64>,
    /// Per-chunk share of positions whose most probable token is the reference's.
    pub chunk_top1: Vec<f64>,
    /// 99th percentile of the per-token divergence, nats.
    pub kl_p99: f64,
    /// Task scores.
    pub tasks: Vec<TaskResult>,
}

/// Runs the job.
///
/// # Errors
/// The model or the reference's file cannot be read, or the two do not belong together.
pub fn run(
    input: serde_json::Value,
    on_progress: &mut dyn FnMut(serde_json::Value),
) -> anyhow::Result<serde_json::Value> {
    let input: Input = serde_json::from_value(input).context("read the job's input")?;
    let suite = Suite::parse(input.suite.clone())?;
    let model = Arc::new(Model::load(&input.model, &LoadOptions::default())?);
    if !model.generates() {
        bail!("{} is no text generation model", input.model.display());
    }
    let chunks = chunks(&model, &suite)?;
    let mut scorer = Scorer::new(&model, &suite, &chunks, input.threads, on_progress)?;
    if let Some(adapter) = &input.adapter {
        scorer.context.set_adapters(&[(Arc::new(Adapter::load(&model, adapter)?), 1.0)]);
    }
    let text = match input.is_reference {
        true => scorer.record_reference(&chunks, &input.distributions)?,
        false => scorer.compare(&chunks, &input.distributions)?,
    };
    let tasks =
        suite.tasks().iter().map(|task| scorer.task(task)).collect::<anyhow::Result<_>>()?;
    let Text { chunk_nll, chunk_kl, chunk_top1, kl_p99 } = text;
    Ok(serde_json::to_value(Quality { chunk_nll, chunk_kl, chunk_top1, kl_p99, tasks })?)
}

/// Cuts the text into chunks of equal length, spread evenly over it. Where the model wants a
/// beginning token, it takes the place of each chunk's first.
fn chunks(model: &Model, suite: &Suite) -> anyhow::Result<Vec<Vec<Token>>> {
    let tokens = model.tokenise(suite.text(), false, false)?;
    let wanted = suite.plan().chunk_tokens.min(model.trained_context()) as usize;
    let length = wanted.min(tokens.len()) & !1;
    if length < MIN_CHUNK_TOKENS {
        bail!(
            "the held-out text has {} tokens and the model takes {wanted}: too few to score\nhint: use a longer text",
            tokens.len()
        );
    }
    let available = tokens.len() / length;
    let count = available.min(suite.plan().chunks as usize);
    let chunk = |index: usize| {
        let start = index * available / count * length;
        let mut chunk = tokens[start..start + length].to_vec();
        if let (true, Some(beginning)) = (model.adds_beginning(), model.beginning()) {
            chunk[0] = beginning;
        }
        chunk
    };
    Ok((0..count).map(chunk).collect())
}

/// Binds a file of distributions to the very tokens that it was made from.
fn digest_of(chunks: &[Vec<Token>]) -> Digest {
    let mut hasher = Hasher::default();
    for chunk in chunks {
        hasher.update(&(chunk.len() as u64).to_le_bytes());
        chunk.iter().for_each(|token| hasher.update(&token.to_le_bytes()));
    }
    hasher.finish().0
}

struct Text {
    chunk_nll: Vec<f64>,
    chunk_kl: Vec<f64>,
    chunk_top1: Vec<f64>,
    kl_p99: f64,
}

struct Scorer<'a> {
    context: Context,
    model: Arc<Model>,
    template: ChatTemplate,
    progress: Progress,
    on_progress: &'a mut dyn FnMut(serde_json::Value),
}

impl<'a> Scorer<'a> {
    fn new(
        model: &Arc<Model>,
        suite: &Suite,
        chunks: &[Vec<Token>],
        threads: u32,
        on_progress: &'a mut dyn FnMut(serde_json::Value),
    ) -> anyhow::Result<Self> {
        let chunk = chunks.first().map_or(0, Vec::len);
        let answer = |item: &Item| match item.check {
            Check::Choice { .. } => 0,
            Check::Answer { max_tokens, .. } => max_tokens as usize,
        };
        let items = || suite.tasks().iter().flat_map(|task| &task.items);
        let longest_answer = items().map(answer).max().unwrap_or(0);
        let context_tokens = chunk.max(MAX_PROMPT_TOKENS + longest_answer) as u32;
        let context = Context::new(
            model,
            &ContextOptions {
                context_tokens,
                batch_tokens: chunk.max(MAX_PROMPT_TOKENS) as u32,
                outputs: (chunk / 2).max(64) as u32,
                threads,
                ..ContextOptions::default()
            },
        )?;
        // Item prompts are tokenised when their turn comes; four bytes a token is near enough.
        let tasks: usize = items().map(|item| item.prompt.len() / 4 + answer(item) + 1).sum();
        let text: usize = chunks.iter().map(Vec::len).sum();
        let progress = Progress { done: 0, total: (text + tasks) as u64 };
        let template = ChatTemplate::of_model(model);
        Ok(Self { context, model: Arc::clone(model), template, progress, on_progress })
    }

    fn advance(&mut self, tokens: usize) {
        self.progress.done = (self.progress.done + tokens as u64).min(self.progress.total);
        if let Ok(value) = serde_json::to_value(self.progress) {
            (self.on_progress)(value);
        }
    }

    /// Computes one chunk; afterwards the logits at `scored(chunk)` can be read.
    fn decode_chunk(&mut self, chunk: &[Token]) -> anyhow::Result<()> {
        let mut batch = Batch::new();
        for (position, token) in chunk.iter().enumerate() {
            batch.push(*token, position as u32, 0, scored(chunk).contains(&position));
        }
        self.context.clear();
        self.context.decode(&mut batch)?;
        Ok(())
    }

    fn logits(&self, index: usize) -> anyhow::Result<&[f32]> {
        self.context.logits(index).context("the engine gave no logits")
    }

    fn record_reference(
        &mut self,
        chunks: &[Vec<Token>],
        path: &std::path::Path,
    ) -> anyhow::Result<Text> {
        let mut writer = Writer::create(path, self.model.vocabulary(), digest_of(chunks))?;
        let mut chunk_nll = Vec::new();
        for chunk in chunks {
            self.decode_chunk(chunk)?;
            let mut nll = 0.0;
            for position in scored(chunk) {
                let logits = self.logits(position)?;
                let normaliser = distributions::log_sum_exp(logits);
                nll += normaliser - f64::from(logits[chunk[position + 1] as usize]);
                writer.push(logits, normaliser)?;
            }
            chunk_nll.push(nll / scored(chunk).len() as f64);
            self.advance(chunk.len());
        }
        writer.finish()?;
        let count = chunks.len();
        Ok(Text {
            chunk_nll,
            chunk_kl: vec![0.0; count],
            chunk_top1: vec![1.0; count],
            kl_p99: 0.0,
        })
    }

    fn compare(&mut self, chunks: &[Vec<Token>], path: &std::path::Path) -> anyhow::Result<Text> {
        let mut reader = Reader::open(path, self.model.vocabulary(), digest_of(chunks))?;
        let mut text =
            Text { chunk_nll: vec![], chunk_kl: vec![], chunk_top1: vec![], kl_p99: 0.0 };
        let mut per_token = Vec::new();
        for chunk in chunks {
            self.decode_chunk(chunk)?;
            let (mut nll, mut kl, mut same) = (0.0, 0.0, 0_usize);
            for position in scored(chunk) {
                let logits = self.logits(position)?;
                let compared = reader.compare_next(logits)?;
                nll += compared.normaliser - f64::from(logits[chunk[position + 1] as usize]);
                kl += compared.divergence;
                same += usize::from(compared.same_first);
                per_token.push(compared.divergence as f32);
            }
            let count = scored(chunk).len() as f64;
            text.chunk_nll.push(nll / count);
            text.chunk_kl.push(kl / count);
            text.chunk_top1.push(same as f64 / count);
            self.advance(chunk.len());
        }
        text.kl_p99 = f64::from(statistics::quantile(&mut per_token, TAIL_QUANTILE));
        Ok(text)
    }

    fn task(&mut self, task: &Task) -> anyhow::Result<TaskResult> {
        let mut items = Vec::with_capacity(task.items.len());
        for (index, item) in task.items.iter().enumerate() {
            let right = self.item(item);
            items.push(right.with_context(|| format!("task {}, item {}", task.name, index + 1))?);
        }
        let right = items.iter().filter(|right| **right).count() as u32;
        let accuracy = statistics::proportion(right, items.len() as u32);
        Ok(TaskResult { name: task.name.clone(), accuracy, items })
    }

    fn item(&mut self, item: &Item) -> anyhow::Result<bool> {
        let prompt = match item.chat {
            true => {
                let message = ChatMessage::user(item.prompt.clone());
                Prompt { text: self.template.render(&[message])?, chat: true }
            }
            false => Prompt { text: item.prompt.clone(), chat: false },
        };
        self.advance(item.prompt.len() / 4 + 1);
        match &item.check {
            Check::Choice { choices, answer } => {
                let scores = self.rank(&prompt, choices)?;
                let best = scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
                Ok(best.is_some_and(|(index, _)| index == *answer))
            }
            Check::Answer { max_tokens, test } => {
                let answer = self.generate(&prompt, *max_tokens)?;
                self.advance(*max_tokens as usize);
                Ok(test.passes(&answer))
            }
        }
    }

    /// The mean log-probability per token of each choice after `prompt`.
    ///
    /// Prompt and choice are tokenised as one text, since a tokenizer may join them; what all
    /// choices share is computed once.
    fn rank(&mut self, prompt: &Prompt, choices: &[String]) -> anyhow::Result<Vec<f64>> {
        let texts = choices.iter().map(|choice| prompt.followed_by(choice).tokens(&self.model));
        let texts = texts.collect::<anyhow::Result<Vec<_>>>()?;
        let prompt_tokens = prompt.tokens(&self.model)?;
        let common = |a: &[Token], b: &[Token]| a.iter().zip(b).take_while(|(x, y)| x == y).count();
        let shared = texts.iter().map(|text| common(text, &prompt_tokens)).min().unwrap_or(0);
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        if shared == 0 || texts.iter().any(|text| text.len() <= shared) {
            bail!("the tokenizer joins prompt and choice\nhint: start each choice with a space");
        }
        if longest > MAX_PROMPT_TOKENS {
            bail!("prompt and choice have {longest} tokens, at most {MAX_PROMPT_TOKENS} fit");
        }
        let first = self.prompt_logits(&texts[0][..shared])?;
        let normaliser = distributions::log_sum_exp(&first);
        let mut scores = Vec::with_capacity(texts.len());
        for text in &texts {
            let mut sum = f64::from(first[text[shared] as usize]) - normaliser;
            sum += self.continuation(&text[shared..], shared)?;
            scores.push(sum / (text.len() - shared) as f64);
        }
        Ok(scores)
    }

    /// Forgets everything, computes `tokens` and returns the logits after the last one.
    fn prompt_logits(&mut self, tokens: &[Token]) -> anyhow::Result<Vec<f32>> {
        let mut batch = Batch::new();
        for (position, token) in tokens.iter().enumerate() {
            batch.push(*token, position as u32, 0, position + 1 == tokens.len());
        }
        self.context.clear();
        self.context.decode(&mut batch)?;
        Ok(self.logits(tokens.len() - 1)?.to_vec())
    }

    /// The summed log-probability of all but the first of `tokens`, which stand at `start`;
    /// the context holds what comes before and is left so.
    fn continuation(&mut self, tokens: &[Token], start: usize) -> anyhow::Result<f64> {
        let given = &tokens[..tokens.len() - 1];
        let mut sum = 0.0;
        let mut position = start;
        for part in given.chunks(self.context.output_limit().max(1)) {
            let mut batch = Batch::new();
            for (offset, token) in part.iter().enumerate() {
                batch.push(*token, (position + offset) as u32, 0, true);
            }
            self.context.decode(&mut batch)?;
            for offset in 0..part.len() {
                let logits = self.logits(offset)?;
                let next = tokens[position - start + offset + 1];
                sum += f64::from(logits[next as usize]) - distributions::log_sum_exp(logits);
            }
            position += part.len();
        }
        if !given.is_empty() && !self.context.truncate(0, start as u32) {
            bail!("this model's memory cannot be cut back, so its choices cannot be ranked");
        }
        Ok(sum)
    }

    fn generate(&mut self, prompt: &Prompt, max_tokens: u32) -> anyhow::Result<String> {
        let tokens = prompt.tokens(&self.model)?;
        if tokens.is_empty() || tokens.len() > MAX_PROMPT_TOKENS {
            bail!("the prompt has {} tokens, 1 to {MAX_PROMPT_TOKENS} fit", tokens.len());
        }
        let mut logits = self.prompt_logits(&tokens)?;
        let mut answer = Vec::new();
        for step in 0..max_tokens {
            let token = distributions::first(&logits) as Token;
            if self.model.ends(token) {
                break;
            }
            answer.push(token);
            let mut batch = Batch::new();
            batch.push(token, tokens.len() as u32 + step, 0, true);
            self.context.decode(&mut batch)?;
            logits = self.logits(0)?.to_vec();
        }
        Ok(String::from_utf8_lossy(&self.model.detokenise(&answer, false)).into_owned())
    }
}

/// What a model is given to continue.
struct Prompt {
    text: String,
    /// Whether a chat template made it, so that control tokens in it count as such.
    chat: bool,
}

impl Prompt {
    fn followed_by(&self, choice: &str) -> Self {
        Self { text: format!("{}{choice}", self.text), chat: self.chat }
    }

    fn tokens(&self, model: &Model) -> anyhow::Result<Vec<Token>> {
        let tokens = match self.chat {
            true => model.tokenise_chat(&self.text)?,
            false => model.tokenise(&self.text, true, false)?,
        };
        Ok(tokens)
    }
}

/// The positions whose next token is scored: the second half's tokens, each predicted from the
/// position before it.
fn scored(chunk: &[Token]) -> std::ops::Range<usize> {
    chunk.len() / 2 - 1..chunk.len() - 1
}
