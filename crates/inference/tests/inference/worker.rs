//! The worker: one model in a child process.

use std::path::Path;
use std::time::Duration;

use slmops_api::runtime::RuntimeConfig;
use slmops_inference::worker::{
    AdapterChoice, FinishReason, GenerateRequest, Output, Prompt, RequestError, Sampling,
    ScoreRequest, Worker, WorkerError, WorkerSpec,
};

use crate::support::{GREEDY, PROMPT, PROMPT_TOKENS, glass, one_thread, runtime, set_up};

async fn worker(runtime: RuntimeConfig) -> Worker {
    set_up();
    let spec = WorkerSpec::new(glass(), runtime);
    Worker::spawn(spec).await.expect("the worker starts")
}

fn greedy(prompt: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest::greedy(Prompt::Text(prompt.to_owned()), max_tokens)
}

#[tokio::test]
async fn a_worker_gives_the_reference_tokens_and_its_configuration() {
    let asked = runtime();
    let worker = worker(asked.clone()).await;
    assert_eq!(worker.effective().differences(&asked), []);
    assert!(worker.effective().threads > 0);
    assert_eq!(worker.model_info().shape.trained_context, 128);
    assert_eq!(worker.model_info().chat_template, None);
    let memory = worker.memory();
    assert!(memory.resident_bytes > 1 << 20 && memory.peak_bytes >= memory.resident_bytes);

    let (piece, finish) =
        worker.generate(greedy(PROMPT, 20)).expect("taken").finish().await.expect("an answer");
    assert_eq!(piece.tokens, GREEDY);
    assert_eq!((finish.reason, finish.prompt_tokens), (FinishReason::Length, 5));
    assert_eq!((finish.completion_tokens, finish.cached_tokens), (20, 0));

    // The same again is mostly in the cache, and the same.
    let again = worker.generate(greedy(PROMPT, 20)).expect("taken").finish().await;
    let (again, finish) = again.expect("an answer");
    assert_eq!(again, piece);
    assert_eq!(finish.cached_tokens, 4);

    let tokens = worker.tokenise(PROMPT.to_owned(), true, false).await.expect("tokens");
    assert_eq!(tokens, PROMPT_TOKENS);
    let bytes = worker.detokenise(tokens).await.expect("bytes");
    assert_eq!(String::from_utf8_lossy(&bytes).trim(), PROMPT);
    let ended = worker.ended();
    worker.drain().await;
    assert!(ended.await.expected);
}

#[tokio::test]
async fn answers_beside_each_other_are_the_same_as_alone() {
    let worker = worker(RuntimeConfig { parallel: 4, ..runtime() }).await;
    let long = "the queen said to the king that ".repeat(6);
    let prompts = [PROMPT, "The Queen", &long, "Down the rabbit", "I", "Why is a raven like"];
    let mut alone = Vec::new();
    for prompt in prompts {
        alone.push(worker.generate(greedy(prompt, 24)).expect("taken").finish().await.unwrap().0);
    }
    let together: Vec<_> = prompts
        .iter()
        .map(|prompt| worker.generate(greedy(prompt, 24)).expect("taken").finish())
        .collect();
    let together = futures_util::future::join_all(together).await;
    for (prompt, (alone, together)) in prompts.iter().zip(alone.iter().zip(together)) {
        assert_eq!(alone.tokens, together.expect("an answer").0.tokens, "{prompt}");
    }
}

#[tokio::test]
async fn a_prompt_that_begins_as_another_one_is_not_computed_twice() {
    let worker = worker(RuntimeConfig { parallel: 3, ..one_thread() }).await;
    let prompt = |last: i32| {
        let shared = PROMPT_TOKENS.iter().copied().cycle().take(80);
        GenerateRequest {
            logprobs: Some(0),
            ..GenerateRequest::greedy(Prompt::Tokens(shared.chain([last]).collect()), 20)
        }
    };
    let mut alone = Vec::new();
    for last in [97, 11, 168] {
        let request = GenerateRequest { fresh: true, ..prompt(last) };
        alone.push(worker.generate(request).unwrap().finish().await.unwrap().0);
    }
    // Another worker, of whose three sequences one is under way.
    let worker = self::worker(RuntimeConfig { parallel: 3, ..one_thread() }).await;
    let mut first = worker.generate(prompt(97)).unwrap();
    let mut tokens = Vec::new();
    while tokens.is_empty() {
        if let Output::Piece(piece) = first.next().await.expect("an answer") {
            tokens = piece.tokens;
        }
    }
    let others = [11, 168].map(|last| worker.generate(prompt(last)).unwrap().finish());
    let (rest, others) =
        futures_util::future::join(first.finish(), futures_util::future::join_all(others)).await;
    tokens.extend(rest.expect("an answer").0.tokens);
    assert_eq!(tokens, alone[0].tokens);
    for (alone, other) in alone[1..].iter().zip(others) {
        let (piece, finish) = other.expect("an answer");
        assert_eq!((finish.prompt_tokens, finish.cached_tokens), (81, 80));
        assert_eq!(piece.tokens, alone.tokens);
        for (found, wanted) in piece.logprobs.iter().zip(&alone.logprobs) {
            // The order of float operations differs between batches.
            assert!((found.logprob.unwrap() - wanted.logprob.unwrap()).abs() < 1e-3);
        }
    }
}

#[tokio::test]
async fn log_probabilities_agree_with_the_score() {
    let worker = worker(runtime()).await;
    let mut request = greedy(PROMPT, 12);
    request.logprobs = Some(3);
    let (piece, _) = worker.generate(request).expect("taken").finish().await.expect("an answer");
    assert_eq!(piece.logprobs.len(), 12);
    for entry in &piece.logprobs {
        assert_eq!(entry.top.len(), 3);
        assert_eq!(entry.top[0].token, entry.token, "greedy takes the most probable");
        assert!(entry.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
    }
    let score =
        ScoreRequest { prompt: Prompt::Text(PROMPT.to_owned()), continuation: piece.text.clone() };
    let score = worker.score(score).await.expect("a score");
    assert_eq!(score.tokens, piece.tokens);
    assert!(score.greedy.iter().all(|greedy| *greedy));
    let sum: f64 = piece.logprobs.iter().map(|entry| entry.logprob.unwrap()).sum();
    let scored: f64 = score.logprobs.iter().sum();
    // The order of float operations differs between batches of one token and of many.
    assert!((sum - scored).abs() < 0.01, "{sum} is not {scored}");
    assert!((score.mean() - scored / 12.0).abs() < 1e-9);

    let nonsense = ScoreRequest {
        prompt: Prompt::Text(PROMPT.to_owned()),
        continuation: " zx qj vvv kk".to_owned(),
    };
    let nonsense = worker.score(nonsense).await.expect("a score");
    assert!(nonsense.mean() < score.mean() - 2.0, "{nonsense:?}");
}

/// The fixture's vocabulary has no byte tokens, so that these characters cannot be spelt.
#[tokio::test]
async fn characters_outside_the_vocabulary_do_no_harm() {
    let worker = worker(runtime()).await;
    for text in ["caf\u{e9}", "\u{2603}", "tab\tand\nline", "\u{1f600}\u{0}"] {
        worker.tokenise(text.to_owned(), true, true).await.expect("tokens");
    }
    let tokens = worker.tokenise(PROMPT.to_owned(), true, false).await.expect("tokens");
    assert_eq!(tokens, PROMPT_TOKENS);
}

#[tokio::test]
async fn stop_strings_reach_over_tokens() {
    let worker = worker(runtime()).await;
    let (whole, _) = worker.generate(greedy(PROMPT, 20)).unwrap().finish().await.unwrap();
    // A stop string from the middle of one token to the middle of another.
    let at = whole.text.len() / 2;
    let stop = whole.text.get(at..at + 5).expect("ASCII").to_owned();
    let end = whole.text.find(&stop).expect("it is in there");
    let request = GenerateRequest { stop: vec!["never".to_owned(), stop], ..greedy(PROMPT, 20) };
    let (piece, finish) = worker.generate(request).unwrap().finish().await.unwrap();
    assert_eq!(piece.text, whole.text[..end]);
    assert_eq!(finish.reason, FinishReason::Stop);
    assert!(finish.completion_tokens < 20);
}

#[tokio::test]
async fn a_seed_repeats_an_answer_and_bias_forbids_a_token() {
    let worker = worker(runtime()).await;
    let run = async |seed, bias: Vec<(i32, f32)>| {
        let sampling = Sampling { seed: Some(seed), logit_bias: bias, ..Sampling::default() };
        let request = GenerateRequest { sampling, ..greedy(PROMPT, 16) };
        worker.generate(request).unwrap().finish().await.unwrap().0.tokens
    };
    assert_eq!(run(1, vec![]).await, run(1, vec![]).await);
    assert_ne!(run(1, vec![]).await, run(2, vec![]).await);
    let forced = run(1, vec![(97, 100.0)]).await;
    assert_eq!(forced, vec![97; 16]);
}

#[tokio::test]
async fn embeddings_have_length_one_and_know_their_text() {
    let worker = worker(runtime()).await;
    let embed = async |text: &str| {
        worker
            .embed(Prompt::Text(text.to_owned()), &AdapterChoice::Common)
            .await
            .expect("an embedding")
            .values
    };
    let long = "the queen and the king ".repeat(12);
    let [queen, again, other] = [embed(&long).await, embed(&long).await, embed("42, 17").await];
    let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    assert!((product(&queen, &queen) - 1.0).abs() < 1e-4);
    assert!((product(&queen, &again) - 1.0).abs() < 1e-4);
    assert!(product(&queen, &other) < 0.99);
    // A generation afterwards is not disturbed.
    let (piece, _) = worker.generate(greedy(PROMPT, 20)).unwrap().finish().await.unwrap();
    assert_eq!(piece.tokens, GREEDY);
}

#[tokio::test]
async fn a_cancelled_request_frees_its_sequence() {
    let runtime = RuntimeConfig { parallel: 1, batch_tokens: 128, queue_limit: 1, ..runtime() };
    let worker = worker(runtime).await;
    let mut first = worker.generate(greedy(PROMPT, 110)).unwrap();
    assert_eq!(first.next().await.expect("it starts"), Output::Started);
    let mut second = worker.generate(greedy("The", 110)).unwrap();
    // The third finds one running and one waiting.
    let third = worker.generate(greedy("The", 1)).unwrap().finish().await;
    let full = |error: &WorkerError| {
        matches!(error, WorkerError::Request(RequestError::QueueFull { limit: 1 }))
    };
    assert!(third.as_ref().is_err_and(full), "{third:?}");
    drop(first);
    assert_eq!(second.next().await.expect("it starts"), Output::Started);
    drop(second);
    let fourth = worker.generate(greedy(PROMPT, 20)).unwrap().finish().await;
    assert_eq!(fourth.expect("an answer").0.tokens, GREEDY);
    assert_eq!(worker.requests(), 0);
}

#[tokio::test]
async fn bad_requests_have_clear_errors() {
    let worker = worker(runtime()).await;
    let check = async |request: GenerateRequest, wanted: &str| {
        let outcome = match worker.generate(request) {
            Ok(generation) => generation.finish().await,
            Err(error) => Err(error),
        };
        let error = outcome.expect_err(wanted).to_string();
        assert!(error.contains(wanted), "`{wanted}` is not in: {error}");
    };
    let base = || greedy(PROMPT, 4);
    let sampling = |sampling: Sampling| GenerateRequest { sampling, ..base() };
    check(greedy(&PROMPT.repeat(60), 4), "context is 128 tokens, but the prompt has").await;
    check(greedy(PROMPT, 124), "128 tokens, but the prompt has 5 and 124 more were asked").await;
    check(greedy(PROMPT, 0), "at least 1").await;
    check(greedy(&"a".repeat(9 << 20), 1), "bytes are more than").await;
    let tokens = |tokens| GenerateRequest { prompt: Prompt::Tokens(tokens), ..base() };
    check(tokens(vec![5, 1024]), "1024 is not a token: the vocabulary has 1024").await;
    check(tokens(vec![-1]), "-1 is not a token").await;
    let default = Sampling::default;
    check(sampling(Sampling { temperature: f32::NAN, ..default() }), "NaN is not within").await;
    check(sampling(Sampling { top_p: 1.5, ..default() }), "1.5 is not within 0 to 1").await;
    check(sampling(Sampling { logit_bias: vec![(4096, 1.0)], ..default() }), "4096 is not").await;
    check(GenerateRequest { stop: vec!["x".to_owned(); 17], ..base() }, "more than 16 stop").await;
    check(GenerateRequest { logprobs: Some(21), ..base() }, "at most 20").await;
    let empty = ScoreRequest { prompt: Prompt::Text(PROMPT.into()), continuation: String::new() };
    let error = worker.score(empty).await.expect_err("nothing to score").to_string();
    assert!(error.contains("no tokens to score"), "{error}");
    // It still works.
    let (piece, _) = worker.generate(greedy(PROMPT, 20)).unwrap().finish().await.unwrap();
    assert_eq!(piece.tokens, GREEDY);
}

#[tokio::test]
async fn a_killed_worker_is_a_clear_error() {
    let worker = worker(runtime()).await;
    let mut generation = worker.generate(greedy(PROMPT, 120)).unwrap();
    assert_eq!(generation.next().await.expect("it starts"), Output::Started);
    let pid = rustix::process::Pid::from_raw(worker.pid().cast_signed()).expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
    let error = loop {
        match generation.next().await {
            Ok(Output::Finished(_)) => return, // It was faster than the signal.
            Ok(_) => {}
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("ended (signal 9, SIGKILL)"), "{error}");
    assert!(error.contains("hint: "), "{error}");
    let ending = worker.ended().await;
    assert!(!ending.expected);
    assert!(matches!(worker.generate(greedy("x", 1)), Err(WorkerError::Died { .. })));
}

#[tokio::test]
async fn a_worker_that_nobody_holds_is_gone() {
    let worker = worker(runtime()).await;
    let ended = worker.ended();
    drop(worker);
    let ending = tokio::time::timeout(Duration::from_secs(10), ended).await;
    assert!(ending.expect("it ends").expected);
}

async fn load_error(path: &Path, runtime: RuntimeConfig) -> String {
    set_up();
    let spec = WorkerSpec::new(path.to_owned(), runtime);
    match Worker::spawn(spec).await {
        Ok(_) => panic!("{} should not load", path.display()),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn settings_that_cannot_be_honoured_are_refused() {
    let check = async |runtime: RuntimeConfig, wanted: &str| {
        let error = load_error(&glass(), runtime).await;
        assert!(error.contains(wanted), "`{wanted}` is not in: {error}");
    };
    check(
        RuntimeConfig { context_tokens: 2048, ..runtime() },
        "context_tokens = 2048 is more than the 128 tokens this model was trained for",
    )
    .await;
    check(RuntimeConfig { parallel: 0, ..runtime() }, "parallel (asked 0, effective 1 to").await;
    check(RuntimeConfig { batch_tokens: 1, ..runtime() }, "batch_tokens (asked 1").await;
    let small = RuntimeConfig { parallel: 1, batch_tokens: 512, ..runtime() };
    check(small, "batch_tokens (asked 512, effective 256)").await;
    let kv = slmops_api::runtime::KvType::Q8_0;
    let quantised = RuntimeConfig { kv_type: kv, flash_attention: false, ..runtime() };
    check(quantised, "flash_attn").await;
}

#[tokio::test]
async fn damaged_files_are_errors_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = std::fs::read(glass()).expect("the model");
    let check = async |name: &str, bytes: &[u8], wanted: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        let error = load_error(&path, runtime()).await;
        assert!(error.contains(name), "{error}");
        assert!(error.contains(wanted), "`{wanted}` is not in: {error}");
    };
    check("empty.gguf", b"", "hint: ").await;
    check("text.gguf", b"GGUFthis is no model at all", "hint: ").await;
    check("half.gguf", &good[..good.len() / 2], "hint: ").await;
    check("header.gguf", &good[..40], "hint: ").await;
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    check("count.gguf", &with(15, 0x7f), "hint: ").await;
    let mut unknown = good.clone();
    let at = unknown.windows(5).position(|window| window == b"llama").expect("architecture");
    unknown[at..at + 5].copy_from_slice(b"zebra");
    check("zebra.gguf", &unknown, "zebra").await;
    // Weights that are no numbers.
    let mut nan = good.clone();
    let end = nan.len();
    nan[end - 4096..].fill(0xff);
    check("nan.gguf", &nan, "hint: ").await;
    let error = load_error(&folder.path().join("none.gguf"), runtime()).await;
    assert!(error.contains("No such file"), "{error}");

    // Any flipped bit in the header: an error or a model that loads, never a hang or a panic here.
    for at in (0..2400).step_by(97) {
        let path = folder.path().join("flipped.gguf");
        std::fs::write(&path, with(at, good[at] ^ 0x40)).expect("written");
        let spec = WorkerSpec::new(path, runtime());
        let outcome = tokio::time::timeout(Duration::from_secs(60), Worker::spawn(spec)).await;
        drop(outcome.expect("it comes to an end"));
    }
}
