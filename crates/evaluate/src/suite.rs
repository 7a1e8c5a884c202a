//! Evaluation suites: task items (JSON Lines) and held-out text, bound together by one digest.
//!
//! The format is described in `suites/README.md`. Everything is bounded and parsed once; an error
//! names its line.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;

/// The most bytes in a suite's task file, and the most in its text.
pub const MAX_FILE_BYTES: u64 = 16 << 20;
/// The most bytes in one line of a task file.
pub const MAX_LINE_BYTES: usize = 64 << 10;
/// The most items in a suite.
pub const MAX_ITEMS: usize = 10_000;
/// The most choices of one item.
pub const MAX_CHOICES: usize = 26;
/// The most tokens that an item may ask to generate.
pub const MAX_ANSWER_TOKENS: u32 = 512;
/// Tokens generated for an item that names no limit.
pub const DEFAULT_ANSWER_TOKENS: u32 = 64;
/// The most memory that one compiled regular expression may take, in bytes.
const MAX_REGEX_BYTES: usize = 1 << 20;
/// The longest task name in bytes.
const MAX_TASK_NAME_BYTES: usize = 64;

const BUILTIN_TASKS: &str = include_str!("../suites/tasks.jsonl");
const BUILTIN_TEXT: &str = include_str!("../suites/held-out.txt");

/// Why a suite cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    /// A file cannot be read.
    #[error("read suite file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is longer than [`MAX_FILE_BYTES`].
    #[error(
        "suite file {} has more than {MAX_FILE_BYTES} bytes\nhint: split it into several suites",
        path.display()
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A line is not an item.
    #[error("suite line {line}: {why}\nhint: see the format in crates/evaluate/suites/README.md")]
    Line {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// There is nothing to measure.
    #[error("the suite has no {what}\nhint: {hint}")]
    Empty {
        /// What is missing.
        what: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// The text is longer than [`MAX_FILE_BYTES`].
    #[error("the suite's {0} is longer than {MAX_FILE_BYTES} bytes\nhint: shorten it")]
    TextTooLarge(&'static str),
}

/// How the held-out text is cut. The first half of each chunk is context only; the positions of
/// the second half are scored, so that every scored token has at least half a chunk before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextPlan {
    /// Tokens in a chunk; fewer when the model was trained on a shorter context.
    pub chunk_tokens: u32,
    /// Chunks at most, spread evenly over the text.
    pub chunks: u32,
}

impl Default for TextPlan {
    /// Sixteen chunks of 192 tokens: 1536 scored tokens, some seconds for a model of 135 million
    /// parameters on two cores.
    fn default() -> Self {
        Self { chunk_tokens: 192, chunks: 16 }
    }
}

/// A suite: tasks and held-out text.
#[derive(Clone, Debug)]
pub struct Suite {
    source: SuiteSource,
    tasks: Vec<Task>,
    digest: Digest,
}

/// A suite as written: what a child process is handed to parse again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SuiteSource {
    /// The task items, JSON Lines.
    pub tasks: String,
    /// The held-out text.
    pub text: String,
    /// How the text is cut.
    pub plan: TextPlan,
}

/// The items of one task, in the order of the file.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its name.
    pub name: String,
    /// Its items.
    pub items: Vec<Item>,
}

/// One question.
#[derive(Clone, Debug)]
pub struct Item {
    /// The prompt.
    pub prompt: String,
    /// Whether the prompt goes into the model's chat template as the user's message.
    pub chat: bool,
    /// What is right.
    pub check: Check,
}

/// How an item is scored.
#[derive(Clone, Debug)]
pub enum Check {
    /// The answer has the highest mean log-probability per token of all choices.
    Choice {
        /// The continuations to rank.
        choices: Vec<String>,
        /// Index of the right one.
        answer: usize,
    },
    /// The greedy answer passes a test.
    Answer {
        /// Tokens to generate at most.
        max_tokens: u32,
        /// The test.
        test: AnswerTest,
    },
}

/// A test of a generated answer.
#[derive(Clone, Debug)]
pub enum AnswerTest {
    /// Trimmed, it equals one of these.
    Exact(Vec<String>),
    /// It contains this text, ASCII case ignored.
    Contains(String),
    /// The expression matches somewhere in it.
    Regex(regex::Regex),
    /// It is JSON, perhaps in a Markdown fence, that the schema accepts.
    Json(std::sync::Arc<jsonschema::Validator>),
}

/// One line of a task file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    task: String,
    kind: Kind,
    prompt: String,
    #[serde(default)]
    chat: bool,
    max_tokens: Option<u32>,
    choices: Option<Vec<String>>,
    answer: Option<usize>,
    answers: Option<Vec<String>>,
    text: Option<String>,
    pattern: Option<String>,
    schema: Option<serde_json::Value>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Choice,
    Exact,
    Contains,
    Regex,
    Json,
}

impl Suite {
    /// The suite that comes with the program.
    pub fn builtin() -> Self {
        Self::parse(SuiteSource {
            tasks: BUILTIN_TASKS.to_owned(),
            text: BUILTIN_TEXT.to_owned(),
            plan: TextPlan::default(),
        })
        .expect("the built-in suite is checked by a test")
    }

    /// Reads a suite: a folder with `tasks.jsonl` and `held-out.txt` (either may be missing), or a
    /// JSON Lines file alone. A missing text is the built-in one.
    ///
    /// # Errors
    /// A file that cannot be read, is too large, or has a line that is not an item.
    pub fn load(path: &Path) -> Result<Self, SuiteError> {
        let (tasks, text) = if path.is_dir() {
            let text = path.join("held-out.txt");
            let tasks = path.join("tasks.jsonl");
            if !text.exists() && !tasks.exists() {
                return Err(SuiteError::Empty {
                    what: "tasks.jsonl and no held-out.txt",
                    hint: "name a folder that holds one of them, or a .jsonl file",
                });
            }
            (
                tasks.exists().then(|| read_bounded(&tasks)).transpose()?.unwrap_or_default(),
                text.exists().then(|| read_bounded(&text)).transpose()?,
            )
        } else {
            (read_bounded(path)?, None)
        };
        let text = text.unwrap_or_else(|| BUILTIN_TEXT.to_owned());
        Self::parse(SuiteSource { tasks, text, plan: TextPlan::default() })
    }

    /// Parses a suite from its source.
    ///
    /// # Errors
    /// The first line that is not an item, or a suite without text.
    pub fn parse(source: SuiteSource) -> Result<Self, SuiteError> {
        for (name, part) in [("task file", &source.tasks), ("text", &source.text)] {
            if part.len() as u64 > MAX_FILE_BYTES {
                return Err(SuiteError::TextTooLarge(name));
            }
        }
        if source.text.trim().is_empty() || source.plan.chunks == 0 {
            return Err(SuiteError::Empty {
                what: "held-out text",
                hint: "perplexity and KL divergence need prose of some thousand words",
            });
        }
        let mut tasks: Vec<Task> = Vec::new();
        let mut items = 0;
        for (index, line) in source.tasks.lines().enumerate() {
            let error = |why: String| SuiteError::Line { line: index + 1, why };
            if line.trim().is_empty() {
                continue;
            }
            if line.len() > MAX_LINE_BYTES {
                return Err(error(format!("it has more than {MAX_LINE_BYTES} bytes")));
            }
            items += 1;
            if items > MAX_ITEMS {
                return Err(error(format!("more than {MAX_ITEMS} items")));
            }
            let parsed: Line = serde_json::from_str(line).map_err(|e| error(e.to_string()))?;
            let (task, item) = parsed.check().map_err(error)?;
            match tasks.iter_mut().find(|known| known.name == task) {
                Some(known) => known.items.push(item),
                None => tasks.push(Task { name: task, items: vec![item] }),
            }
        }
        let digest = source.digest();
        Ok(Self { source, tasks, digest })
    }

    /// The tasks in the order of their first item.
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// The held-out text.
    pub fn text(&self) -> &str {
        &self.source.text
    }

    /// How the text is cut.
    pub fn plan(&self) -> TextPlan {
        self.source.plan
    }

    /// SHA-256 over the items, the text and how it is cut: reports of different digests are
    /// never compared.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// What [`Suite::parse`] makes this suite from.
    pub fn source(&self) -> &SuiteSource {
        &self.source
    }

    /// The suite with its text cut otherwise; its digest changes.
    pub fn with_plan(mut self, plan: TextPlan) -> Self {
        self.source.plan = plan;
        self.digest = self.source.digest();
        self
    }
}

impl SuiteSource {
    /// Each part is preceded by its length, so that no two suites share a byte string.
    fn digest(&self) -> Digest {
        let head = format!(
            "slmops suite v1\nchunks {} of {} tokens\ntasks {}\ntext {}\n",
            self.plan.chunks,
            self.plan.chunk_tokens,
            self.tasks.len(),
            self.text.len()
        );
        Digest::of(&[head.as_bytes(), self.tasks.as_bytes(), self.text.as_bytes()].concat())
    }
}

impl Line {
    fn check(self) -> Result<(String, Item), String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._- ".contains(&byte);
        if self.task.is_empty()
            || self.task.len() > MAX_TASK_NAME_BYTES
            || !self.task.bytes().all(plain)
        {
            return Err(format!(
                "`task` must be 1 to {MAX_TASK_NAME_BYTES} letters, digits, spaces, `.`, `_` or `-`"
            ));
        }
        if self.prompt.is_empty() {
            return Err("`prompt` is empty".into());
        }
        self.only_fields_of_kind()?;
        let check = match self.kind {
            Kind::Choice => {
                let choices = self.choices.ok_or("kind `choice` needs `choices`")?;
                let answer = self.answer.ok_or("kind `choice` needs `answer`, an index from 0")?;
                if !(2..=MAX_CHOICES).contains(&choices.len()) {
                    return Err(format!("`choices` must be 2 to {MAX_CHOICES} texts"));
                }
                if choices.iter().any(String::is_empty) {
                    return Err("a choice is empty".into());
                }
                if answer >= choices.len() {
                    return Err(format!("`answer` {answer} is none of {} choices", choices.len()));
                }
                Check::Choice { choices, answer }
            }
            kind => {
                let max_tokens = self.max_tokens.unwrap_or(DEFAULT_ANSWER_TOKENS);
                if !(1..=MAX_ANSWER_TOKENS).contains(&max_tokens) {
                    return Err(format!("`max_tokens` must be 1 to {MAX_ANSWER_TOKENS}"));
                }
                let test = match kind {
                    Kind::Choice => unreachable!("handled above"),
                    Kind::Exact => AnswerTest::Exact(
                        self.answers
                            .filter(|answers| !answers.is_empty())
                            .ok_or("kind `exact` needs `answers`")?,
                    ),
                    Kind::Contains => AnswerTest::Contains(
                        self.text
                            .filter(|text| !text.is_empty())
                            .ok_or("kind `contains` needs `text`")?,
                    ),
                    Kind::Regex => {
                        let pattern = self.pattern.ok_or("kind `regex` needs `pattern`")?;
                        let built = regex::RegexBuilder::new(&pattern)
                            .size_limit(MAX_REGEX_BYTES)
                            .dfa_size_limit(MAX_REGEX_BYTES)
                            .build();
                        AnswerTest::Regex(built.map_err(|error| error.to_string())?)
                    }
                    Kind::Json => {
                        let schema = self.schema.ok_or("kind `json` needs `schema`")?;
                        let validator = jsonschema::validator_for(&schema)
                            .map_err(|error| format!("`schema` is no JSON Schema: {error}"))?;
                        AnswerTest::Json(validator.into())
                    }
                };
                Check::Answer { max_tokens, test }
            }
        };
        Ok((self.task, Item { prompt: self.prompt, chat: self.chat, check }))
    }

    /// A field of another kind is a mistake that would otherwise pass unseen.
    fn only_fields_of_kind(&self) -> Result<(), String> {
        let fields = [
            ("choices", self.choices.is_some(), self.kind == Kind::Choice),
            ("answer", self.answer.is_some(), self.kind == Kind::Choice),
            ("answers", self.answers.is_some(), self.kind == Kind::Exact),
            ("text", self.text.is_some(), self.kind == Kind::Contains),
            ("pattern", self.pattern.is_some(), self.kind == Kind::Regex),
            ("schema", self.schema.is_some(), self.kind == Kind::Json),
            ("max_tokens", self.max_tokens.is_some(), self.kind != Kind::Choice),
        ];
        match fields.iter().find(|(_, given, belongs)| *given && !belongs) {
            Some((field, ..)) => Err(format!("`{field}` does not belong to this kind")),
            None => Ok(()),
        }
    }
}

impl AnswerTest {
    /// Whether `answer` is right.
    pub fn passes(&self, answer: &str) -> bool {
        match self {
            Self::Exact(answers) => answers.iter().any(|right| right.trim() == answer.trim()),
            Self::Contains(text) => {
                answer.to_ascii_lowercase().contains(&text.to_ascii_lowercase())
            }
            Self::Regex(pattern) => pattern.is_match(answer),
            Self::Json(schema) => serde_json::from_str(unfenced(answer))
                .is_ok_and(|value: serde_json::Value| schema.is_valid(&value)),
        }
    }
}

/// The inside of a Markdown code fence if the answer is one, or the whole answer.
fn unfenced(answer: &str) -> &str {
    let trimmed = answer.trim();
    let Some(inside) = trimmed.strip_prefix("```") else { return trimmed };
    let inside = inside.strip_prefix("json").unwrap_or(inside);
    inside.strip_suffix("```").unwrap_or(inside).trim()
}

fn read_bounded(path: &Path) -> Result<String, SuiteError> {
    let read = |source| SuiteError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = fs::File::open(path).map_err(read)?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(read)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(SuiteError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
