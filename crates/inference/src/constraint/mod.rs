//! What an answer is held to: JSON of a schema, a regular expression, a grammar.
//!
//! Everything becomes one grammar in llguidance's Lark. [`check`] compiles a stranger's grammar in a
//! child process with little memory and time; only what passes reaches a worker, which compiles it
//! beside the engine's thread and asks it before each token ([`Guide`]).

mod gbnf;

use std::collections::VecDeque;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Mutex;
use std::time::Duration;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{
    ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{Matcher, ParserFactory};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::child::{self, ChildError};
use crate::llama::{Model, Token};

/// The job name of a check.
pub(crate) const JOB: &str = "constraint";
/// The most bytes of a constraint.
pub const MAX_CONSTRAINT_BYTES: usize = 256 << 10;
/// Processor seconds that compiling may take.
const COMPILE_CPU_S: u64 = 2;
/// The longest that a check may take, the start of its process included.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of address space that compiling may take.
const COMPILE_MEMORY_BYTES: u64 = 192 << 20;
/// The stack of a thread that compiles. A check gets half, so that what passes has room to spare.
pub(crate) const COMPILE_STACK_BYTES: usize = 8 << 20;
/// Checks at the same time.
const CHECKS_AT_ONCE: usize = 2;
/// Passed checks that are remembered.
const MAX_PASSED: usize = 1024;
/// Compiled constraints that a worker keeps.
const MAX_COMPILED: usize = 16;
/// States of one constraint's lexer, at most: about 2 kB each.
const MAX_LEXER_STATES: usize = 20_000;
/// Steps of the parser for one token where each character is a symbol (about 20 a microsecond).
const MAX_STEPS_BY_CHARACTER: usize = 1_000_000;
/// White space between the parts of a JSON text: what people and programs write there. Of any more,
/// small models put out nothing else for ever.
const JSON_SPACE: &str = r" |\r?\n[ \t]{0,32}";
/// The most characters of an error message.
const MAX_MESSAGE_CHARS: usize = 400;

/// What an answer is held to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Constraint {
    /// The parameter that asked for it, for error messages.
    pub parameter: String,
    /// A grammar in Lark.
    grammar: String,
    /// Whether each character is a symbol of the grammar.
    by_character: bool,
    /// Whether it comes from this program and needs no check.
    trusted: bool,
}

/// Why a constraint is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConstraintError {
    /// It is wrong, or more than this program understands.
    #[error("{message}")]
    Wrong {
        /// What is wrong.
        message: String,
    },
    /// Compiling takes too much time or memory.
    #[error(
        "it takes more than {COMPILE_CPU_S} s or {} MiB to compile\nhint: make it simpler: fewer alternatives, smaller repetitions",
        COMPILE_MEMORY_BYTES >> 20
    )]
    TooComplex,
    /// It could not be checked.
    #[error("check the constraint: {0}")]
    Check(#[source] ChildError),
}

fn wrong(message: impl Into<String>) -> ConstraintError {
    ConstraintError::Wrong { message: message.into() }
}

impl Constraint {
    fn new(parameter: &str, grammar: String) -> Result<Self, ConstraintError> {
        if grammar.len() > MAX_CONSTRAINT_BYTES {
            return Err(wrong(format!("it is longer than {MAX_CONSTRAINT_BYTES} bytes")));
        }
        let parameter = parameter.to_owned();
        Ok(Self { parameter, grammar, by_character: false, trusted: false })
    }

    /// Any JSON object.
    pub fn json_object(parameter: &str) -> Self {
        let schema = schema_text(&json!({ "type": "object" }), false).expect("it is an object");
        let grammar = format!("start: %json {schema}");
        Self { parameter: parameter.to_owned(), grammar, by_character: false, trusted: true }
    }

    /// JSON of a schema. Where `lenient`, parts of the schema that are not understood are left out;
    /// else they are errors.
    ///
    /// # Errors
    /// The schema is no object, or too long.
    pub fn json(parameter: &str, schema: &Value, lenient: bool) -> Result<Self, ConstraintError> {
        Self::new(parameter, format!("start: %json {}", schema_text(schema, lenient)?))
    }

    /// A text that a regular expression matches as a whole.
    ///
    /// # Errors
    /// It is empty or too long.
    pub fn regex(parameter: &str, regex: &str) -> Result<Self, ConstraintError> {
        // The whole text is meant anyway.
        let regex = regex.strip_prefix('^').unwrap_or(regex);
        let regex = match regex.strip_suffix('$') {
            Some(rest) if !rest.ends_with('\\') => rest,
            _ => regex,
        };
        if regex.is_empty() {
            return Err(wrong("it is empty"));
        }
        Self::new(parameter, format!("start: /{}/", llguidance::regex_to_lark(regex, "")))
    }

    /// A text of a grammar in llguidance's Lark, made by this program from what a client sent.
    ///
    /// # Errors
    /// It is too long.
    pub(crate) fn lark(parameter: &str, grammar: String) -> Result<Self, ConstraintError> {
        Self::new(parameter, grammar)
    }

    /// The grammar as an expression in another one; only of JSON and of regular expressions.
    pub(crate) fn expression(&self) -> &str {
        self.grammar.strip_prefix("start: ").unwrap_or(&self.grammar)
    }

    /// Whether [`Self::expression`] stands for the whole grammar.
    pub(crate) fn is_expression(&self) -> bool {
        !self.grammar.contains('\n')
    }

    /// A text of a grammar in GBNF.
    ///
    /// # Errors
    /// It is no GBNF, or too long.
    pub fn gbnf(parameter: &str, grammar: &str) -> Result<Self, ConstraintError> {
        if grammar.len() > MAX_CONSTRAINT_BYTES {
            return Err(wrong(format!("it is longer than {MAX_CONSTRAINT_BYTES} bytes")));
        }
        let gbnf::Lark { text, by_character } = gbnf::translate(grammar).map_err(wrong)?;
        // Translated it is longer; its size was bounded above.
        let parameter = parameter.to_owned();
        Ok(Self { parameter, grammar: text, by_character, trusted: false })
    }
}

/// A schema as it stands after `%json`.
fn schema_text(schema: &Value, lenient: bool) -> Result<Value, ConstraintError> {
    let Value::Object(fields) = schema else { return Err(wrong("the schema must be an object")) };
    let mut fields = fields.clone();
    let options = json!({ "whitespace_pattern": JSON_SPACE, "lenient": lenient });
    fields.insert("x-guidance".to_owned(), options);
    Ok(Value::Object(fields))
}

/// The constraints that passed a check, by their keyed hashes.
pub struct Checked {
    keys: RandomState,
    passed: Mutex<VecDeque<u64>>,
    turns: tokio::sync::Semaphore,
}

impl Default for Checked {
    fn default() -> Self {
        Self {
            keys: RandomState::new(),
            passed: Mutex::default(),
            turns: tokio::sync::Semaphore::new(CHECKS_AT_ONCE),
        }
    }
}

impl Checked {
    /// Compiles a constraint in a child process, unless that was done before.
    ///
    /// # Errors
    /// It is wrong or too complex, or the process could not be started.
    pub async fn check(&self, constraint: &Constraint) -> Result<(), ConstraintError> {
        let key = self.keys.hash_one((&constraint.grammar, constraint.by_character));
        let known = || self.passed.lock().expect("no holder panics").contains(&key);
        if constraint.trusted || known() {
            return Ok(());
        }
        let _turn = self.turns.acquire().await.expect("it is never closed");
        if known() {
            return Ok(());
        }
        let input = serde_json::to_value(constraint).expect("a constraint is plain data");
        match tokio::time::timeout(CHECK_TIMEOUT, child::call(JOB, input, |_| {})).await {
            Ok(Ok(_)) => {
                let mut passed = self.passed.lock().expect("no holder panics");
                if passed.len() == MAX_PASSED {
                    passed.pop_front();
                }
                passed.push_back(key);
                Ok(())
            }
            Ok(Err(ChildError::Failed { message, .. })) => Err(wrong(message)),
            Ok(Err(error @ (ChildError::Spawn { .. } | ChildError::Io { .. }))) => {
                Err(ConstraintError::Check(error))
            }
            // It ran out of memory, stack or time.
            Ok(Err(ChildError::Crashed { .. } | ChildError::Exited { .. })) | Err(_) => {
                Err(ConstraintError::TooComplex)
            }
        }
    }
}

/// The job of [`Checked::check`]: compiles a constraint over a vocabulary of single bytes.
pub(crate) fn check_job(input: Value, _: &mut dyn FnMut(Value)) -> anyhow::Result<Value> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let constraint: Constraint = serde_json::from_value(input)?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let size = size.and_then(|size| size.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let memory = size.unwrap_or(0) * 1024 + COMPILE_MEMORY_BYTES;
    for (resource, limit) in [(Resource::As, memory), (Resource::Cpu, COMPILE_CPU_S)] {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })?;
    }
    let compile = move || -> Result<(), String> {
        let mut compiler = Compiler::new(ApproximateTokEnv::single_byte_env())?;
        compiler.guide(&constraint)?.mask().map(|_| ())
    };
    let thread = std::thread::Builder::new().stack_size(COMPILE_STACK_BYTES / 2).spawn(compile)?;
    match thread.join() {
        Ok(compiled) => compiled.map_err(anyhow::Error::msg).map(|()| Value::Null),
        Err(_) => std::process::exit(1),
    }
}

/// Compiles constraints for one vocabulary, and remembers them.
pub(crate) struct Compiler {
    factory: ParserFactory,
    compiled: VecDeque<(Constraint, Matcher)>,
}

impl Compiler {
    fn new(vocabulary: TokEnv) -> Result<Self, String> {
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let capabilities = InferenceCapabilities::default();
        let mut factory = ParserFactory::new(&vocabulary, capabilities, &slices)
            .map_err(|error| clean(&error.to_string()))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        Ok(Self { factory, compiled: VecDeque::new() })
    }

    /// For the vocabulary of a model.
    pub(crate) fn of(model: &Model) -> Result<Self, String> {
        let count = model.vocabulary();
        let words: Vec<Vec<u8>> = (0..count.cast_signed())
            .map(|token| {
                let piece = model.piece(token, false);
                if !piece.is_empty() {
                    return piece;
                }
                // Control tokens are no text.
                let mut special = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                special.extend(format!("[{token}]").bytes());
                special
            })
            .collect();
        let ends: Vec<u32> = (0..count).filter(|token| model.ends(token.cast_signed())).collect();
        let end = ends.first().copied().unwrap_or(llguidance::toktrie::INVALID_TOKEN);
        let mut trie = TokTrie::from(&TokRxInfo::new(count, end), &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(&ends);
        }
        Self::new(std::sync::Arc::new(ApproximateTokEnv::new(trie)))
    }

    /// The guide of one answer.
    ///
    /// # Errors
    /// The constraint is wrong or too complex.
    pub(crate) fn guide(&mut self, constraint: &Constraint) -> Result<Guide, String> {
        if let Some(place) = self.compiled.iter().position(|(known, _)| known == constraint) {
            let known = self.compiled.remove(place).expect("it was found");
            self.compiled.push_back(known);
        } else {
            let mut limits = self.factory.limits().clone();
            if constraint.by_character {
                limits.step_max_items = MAX_STEPS_BY_CHARACTER;
            }
            let grammar = TopLevelGrammar::from_lark(constraint.grammar.clone());
            let parser = self.factory.create_parser_from_init_ext(
                llguidance::api::GrammarInit::Serialized(grammar),
                llguidance::Logger::new(0, 0),
                InferenceCapabilities::default(),
                limits,
            );
            let matcher = Matcher::new(parser);
            if let Some(error) = matcher.get_error() {
                return Err(clean(&error));
            }
            if self.compiled.len() == MAX_COMPILED {
                self.compiled.pop_front();
            }
            self.compiled.push_back((constraint.clone(), matcher));
        }
        let (_, matcher) = self.compiled.back().expect("it was put there");
        // What one answer makes the lexer remember ends with it.
        Ok(Guide { matcher: matcher.deep_clone(), parameter: constraint.parameter.clone() })
    }
}

/// Says which tokens may come next in one answer.
pub(crate) struct Guide {
    matcher: Matcher,
    parameter: String,
}

impl Guide {
    /// The parameter that asked for it.
    pub(crate) fn parameter(&self) -> &str {
        &self.parameter
    }

    /// Whether the answer may end here.
    pub(crate) fn may_end(&mut self) -> Result<bool, String> {
        self.matcher.is_accepting().map_err(|error| clean(&error.to_string()))
    }

    /// Whether this token, which does not end the answer, may come next.
    pub(crate) fn allows(&mut self, token: Token) -> Result<bool, String> {
        let allowed = self.matcher.validate_tokens(&[token.cast_unsigned()]);
        Ok(allowed.map_err(|error| clean(&error.to_string()))? == 1)
    }

    /// The tokens that may come next; at least one.
    pub(crate) fn mask(&mut self) -> Result<SimpleVob, String> {
        self.matcher.compute_mask_or_eos().map_err(|error| clean(&error.to_string()))
    }

    /// Takes the next token. Whether nothing can follow it.
    pub(crate) fn take(&mut self, token: Token) -> Result<bool, String> {
        self.matcher
            .consume_token(token.cast_unsigned())
            .map_err(|error| clean(&error.to_string()))?;
        Ok(self.matcher.is_stopped())
    }
}

/// A message of the library without its own states and backtraces.
fn clean(message: &str) -> String {
    // So end the errors of regular expressions, after a picture of the whole.
    if let Some(cause) = message.lines().find_map(|line| line.strip_prefix("error: ")) {
        return format!("the regular expression is wrong: {cause}");
    }
    // What follows the first line shows the grammar that this program made of it.
    let message = message.lines().next().unwrap_or_default();
    let place = message.strip_prefix("at ").and_then(|rest| rest.split_once(": "));
    let message = place.map_or(message, |(_, message)| message);
    if message.contains("NoExtensionBias") {
        return "this model has no tokens that spell what must come next".to_owned();
    }
    message.chars().take(MAX_MESSAGE_CHARS).collect::<String>().trim().to_owned()
}

#[cfg(test)]
pub(crate) mod tests;
