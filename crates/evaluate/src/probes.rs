//! Making golden probes: the small examination that a package carries and that a device repeats.
//!
//! The questions belong to the model *line*: they are asked of the reference once, at its first
//! release, and what the reference answers greedily is the golden continuation. Each variant then
//! gets floors of its own, from what it scored itself where it was packed. Later releases carry the
//! set over unchanged ([`carry_over`]), so that a damaged successor fails its predecessor's
//! examination.

use std::path::Path;

use slmops_api::probe::{Expectation, Probe, ProbeSet, ReplayPrompt};
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::probe;
use slmops_inference::worker::{GenerateRequest, Worker, WorkerError};

use crate::{gate, runtime};

/// How far a probe's mean log-probability may fall below what the variant scored where it was
/// packed, in nats per token.
///
/// Other processors' kernels move it by some hundredths, another quantisation of the same model by
/// some tenths, scrambled layers by whole nats. A fine-tuned successor that no longer reaches it
/// answers these plain questions otherwise, and deserves a set of its own.
pub const MARGIN_NATS: f64 = 0.7;
/// By how many nats per token the reference must prefer the right choice for a `choice` probe.
const SURE_NATS: f64 = 1.0;
/// By how many nats per token the variant itself must: so that another kernel does not tip it.
const VARIANT_SURE_NATS: f64 = 0.3;
/// Tokens of a golden continuation, at most.
const CONTINUATION_TOKENS: u32 = 24;
/// Tokens of an answer that is replayed, at most: there are many, and devices score each twice.
const REPLAY_TOKENS: u32 = 16;
/// Bytes of a golden continuation, at least: shorter ones say too little.
const MIN_CONTINUATION_BYTES: usize = 12;
/// Knowledge probes in one set, at most.
const MAX_CHOICES: usize = 3;
/// Context of the workers that make probes, in tokens.
const CONTEXT_TOKENS: u32 = 512;
/// The version of the probe file format.
const FORMAT_VERSION: u32 = 1;

/// What a model with a chat template is asked.
const QUESTIONS: &[&str] = &[
    "What is the capital of France?",
    "Name three kinds of fruit.",
    "What do bees make?",
    "Explain in one sentence what a computer does.",
    "Why do people wear coats in winter?",
    "Write one sentence about a dog in a park.",
];

/// What a model without one continues.
const OPENINGS: &[&str] = &[
    "Once upon a time, there was a",
    "She opened the door and",
    "The sun was setting, and the",
    "He looked at the King and said,",
    "It was a very",
    "In the morning they",
];

/// What is replayed on both versions, of a model with a chat template. No probe asks the same.
const REPLAY_QUESTIONS: &[&str] = &[
    "What is the capital of Italy?",
    "What colour is the sky on a clear day?",
    "How many days are in a week?",
    "Name a large animal that lives in the sea.",
    "What do you use to cut paper?",
    "Write a short greeting for a new customer.",
    "What is the opposite of cold?",
    "Give one reason to drink water.",
    "What happens to ice when it gets warm?",
    "Name two things that people eat for breakfast.",
    "What is two plus three?",
    "Finish the sentence: The cat sat on the",
    "Which season comes after summer?",
    "What does a doctor do?",
    "Write one sentence about the moon.",
    "How do you say thank you politely?",
    "What is a library for?",
    "Name a tool that carpenters use.",
    "Why do plants need light?",
    "What is the largest planet of our solar system?",
    "Describe a rainy day in one sentence.",
    "What should you do before you cross a street?",
    "Name three colours.",
    "What is bread made of?",
    "Explain what a map is.",
    "What sound does a dog make?",
    "Give a name for a small boat.",
    "What is the freezing point of water?",
    "How can someone save money?",
    "Write a polite reply to a customer who waits for a parcel.",
    "What do people do at a market?",
    "Which animal gives us wool?",
    "Tell me one thing about the sun.",
    "What comes after the letter B in the alphabet?",
    "Why do we sleep?",
    "Name a musical instrument with strings.",
];

/// What is replayed of a model without one.
const REPLAY_OPENINGS: &[&str] = &[
    "The little girl looked up and",
    "One day, a boy went to the",
    "It was late at night when",
    "The old man sat down and",
    "There was no sound but the",
    "They walked along the road until",
    "\"I do not know,\" said the",
    "At last the door",
    "The dog ran into the",
    "She had never seen such a",
    "On the table there was a",
    "He took the letter and",
    "The children began to",
    "Far away, behind the hills,",
    "The queen was very",
    "After a while the rain",
    "When the clock struck twelve,",
    "My mother told me that",
    "The ship sailed across the",
    "In the middle of the garden",
    "He was so tired that he",
    "The bird sat in the tree and",
    "\"Come here,\" she said, and",
    "Nobody in the town knew",
    "The fire burned and the",
    "They were all very glad to",
    "As soon as he heard this, he",
    "The water was cold and",
    "For a long time she",
    "The man with the hat",
    "Down in the valley there",
    "Before they could answer, the",
    "The horse stopped at the",
    "I have often thought that",
    "The next morning, everyone",
    "With a loud cry the",
];

/// Facts of which some must be known: prompt, right answer, wrong ones.
const FACTS: &[(&str, &str, [&str; 3])] = &[
    ("The capital of France is", " Paris", [" Moscow", " chair", " seven"]),
    ("The opposite of hot is", " cold", [" window", " Monday", " green"]),
    ("Bees make", " honey", [" paper", " iron", " music"]),
    ("One, two, three, four,", " five", [" blue", " river", " nine"]),
    ("The bird flew up into the", " sky", [" soup", " drawer", " idea"]),
    ("A week has", " seven", [" purple", " eleven", " cold"]),
];

/// Why no probes were made.
#[derive(Debug, thiserror::Error)]
pub enum ProbesError {
    /// A worker failed.
    #[error("make golden probes with {}", model.display())]
    Worker {
        /// The model file.
        model: std::path::PathBuf,
        /// How it failed.
        #[source]
        source: WorkerError,
    },
    /// The reference says nothing that could be checked.
    #[error(
        "make golden probes with {}: the model answers none of the built-in prompts at length\nhint: check the model with `slm serve`; a release needs at least one probe",
        model.display()
    )]
    Silent {
        /// The model file.
        model: std::path::PathBuf,
    },
}

/// The line's questions with the reference's answers, without floors.
#[derive(Clone, Debug, PartialEq)]
pub struct Golden {
    probes: Vec<Probe>,
    replay: Vec<ReplayPrompt>,
}

/// Asks the reference, with an adapter if there is one: golden continuations, and the facts of which
/// it is sure. Of `runtime`, the context and the number of sequences are lowered to what probes need.
///
/// # Errors
/// The reference does not run, or has nothing to say.
pub async fn ask(
    reference: &Path,
    adapter: Option<&Path>,
    runtime: &RuntimeConfig,
) -> Result<Golden, ProbesError> {
    let failed = |source| ProbesError::Worker { model: reference.to_owned(), source };
    let worker = spawn(reference, adapter, runtime).await.map_err(failed)?;
    let golden = ask_worker(&worker).await.map_err(failed);
    worker.drain().await;
    let golden = golden?;
    if golden.probes.is_empty() {
        return Err(ProbesError::Silent { model: reference.to_owned() });
    }
    Ok(golden)
}

/// The probe set of one variant: the golden probes with floors from what this variant scores, and the
/// prompts that devices replay.
/// A fact that the variant itself does not hold for sure is left out.
///
/// # Errors
/// The variant does not run.
pub async fn for_variant(
    golden: &Golden,
    variant: &Path,
    adapter: Option<&Path>,
    runtime: &RuntimeConfig,
) -> Result<ProbeSet, ProbesError> {
    let failed = |source| ProbesError::Worker { model: variant.to_owned(), source };
    let worker = spawn(variant, adapter, runtime).await.map_err(failed)?;
    let set = set_floors(golden, &worker).await.map_err(failed);
    worker.drain().await;
    set
}

/// The set that a later release's variant carries: that of the same quantisation in the release
/// before, or of the one with the nearest number of bits where it is new. Unchanged, so that
/// standards never sink from release to release.
pub fn carry_over(before: &[(String, ProbeSet)], quantisation: &str) -> Option<ProbeSet> {
    let bits = gate::nominal_bits(quantisation);
    let distance = |other: &str| {
        let same = other.eq_ignore_ascii_case(quantisation);
        (!same, gate::nominal_bits(other).abs_diff(bits))
    };
    let nearest = before.iter().min_by_key(|(other, _)| distance(other));
    nearest.map(|(_, set)| set.clone())
}

async fn spawn(
    model: &Path,
    adapter: Option<&Path>,
    runtime: &RuntimeConfig,
) -> Result<Worker, WorkerError> {
    let wanted = RuntimeConfig { context_tokens: CONTEXT_TOKENS, parallel: 1, ..runtime.clone() };
    let runtime = runtime::fitting(model, &wanted);
    Worker::spawn(runtime::worker(model, adapter, runtime)).await
}

async fn ask_worker(worker: &Worker) -> Result<Golden, WorkerError> {
    let raw = !worker.template().is_own();
    let prompts = if raw { OPENINGS } else { QUESTIONS };
    let mut probes = Vec::new();
    for prompt in prompts {
        let mut golden = Probe {
            name: format!("golden-{:02}", probes.len() + 1),
            prompt: (*prompt).to_owned(),
            raw,
            expect: Expectation::LogProbability {
                continuation: String::new(),
                measured: 0.0,
                floor: 0.0,
            },
        };
        let text = greedy_answer(worker, prompt, raw, CONTINUATION_TOKENS).await?;
        if text.trim().len() < MIN_CONTINUATION_BYTES {
            continue;
        }
        golden.expect =
            Expectation::LogProbability { continuation: text, measured: 0.0, floor: 0.0 };
        probes.push(golden);
    }
    let mut facts = 0;
    for (prompt, right, wrong) in FACTS {
        if facts == MAX_CHOICES {
            break;
        }
        // The right answer's place varies, so that no place is right by habit.
        let answer = facts % (wrong.len() + 1);
        let mut choices: Vec<String> = wrong.iter().map(|text| (*text).to_owned()).collect();
        choices.insert(answer, (*right).to_owned());
        let fact = Probe {
            name: format!("fact-{:02}", facts + 1),
            prompt: (*prompt).to_owned(),
            raw: true,
            expect: Expectation::Choice { choices, answer },
        };
        if probe::measure(worker, &fact).await? >= SURE_NATS {
            probes.push(fact);
            facts += 1;
        }
    }
    let mut replay = Vec::new();
    for prompt in if raw { REPLAY_OPENINGS } else { REPLAY_QUESTIONS } {
        let answer = greedy_answer(worker, prompt, raw, REPLAY_TOKENS).await?;
        if !answer.trim().is_empty() {
            replay.push(ReplayPrompt { prompt: (*prompt).to_owned(), raw, answer });
        }
    }
    Ok(Golden { probes, replay })
}

async fn greedy_answer(
    worker: &Worker,
    prompt: &str,
    raw: bool,
    max_tokens: u32,
) -> Result<String, WorkerError> {
    let request = GenerateRequest::greedy(probe::prompt(worker, prompt, raw)?, max_tokens);
    let (answer, _) = worker.generate(request)?.finish().await?;
    // A cut character at the end would be scored as something else.
    Ok(answer.text.trim_end_matches(char::REPLACEMENT_CHARACTER).to_owned())
}

async fn set_floors(golden: &Golden, worker: &Worker) -> Result<ProbeSet, WorkerError> {
    let mut probes = Vec::with_capacity(golden.probes.len());
    for probe in &golden.probes {
        let value = probe::measure(worker, probe).await?;
        let mut probe = probe.clone();
        match &mut probe.expect {
            Expectation::LogProbability { measured, floor, .. } => {
                *measured = round(value);
                *floor = round(value - MARGIN_NATS);
            }
            Expectation::Choice { .. } if value < VARIANT_SURE_NATS => continue,
            Expectation::Choice { .. } | Expectation::Contains { .. } => {}
        }
        probes.push(probe);
    }
    Ok(ProbeSet { version: FORMAT_VERSION, probes, replay: golden.replay.clone() })
}

/// Four decimals: what is read by people and is far below any margin.
fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}
