//! Guessing ahead: faster where it pays, and never another answer.

use std::path::PathBuf;

use serde_json::json;
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::constraint::Constraint;
use slmops_inference::host::ModelSpec;
use slmops_inference::worker::{
    Extras, Finish, GenerateRequest, Piece, Prompt, Sampling, Speculation, Worker, WorkerSpec,
};

use crate::server::Endpoint;
use crate::support::{PROMPT, PROMPT_TOKENS, cpu_ms, glass, one_thread, set_up, smollm2};

fn speculating(speculation: Option<Speculation>) -> WorkerSpec {
    let runtime = RuntimeConfig { parallel: 4, ..one_thread() };
    let extras = Extras { speculation, ..Extras::default() };
    WorkerSpec { extras, ..WorkerSpec::new(glass(), runtime) }
}

fn ngram(tokens: u32) -> Option<Speculation> {
    Some(Speculation::Ngram { tokens })
}

fn draft(model_path: PathBuf) -> Option<Speculation> {
    Some(Speculation::Draft { model_path, tokens: 7 })
}

async fn worker(spec: WorkerSpec) -> Worker {
    set_up();
    Worker::spawn(spec).await.expect("the worker starts")
}

/// Requests of every kind, over a text that repeats itself.
fn requests() -> Vec<GenerateRequest> {
    let repeated: Vec<i32> = PROMPT_TOKENS.iter().copied().cycle().take(40).collect();
    let base = || GenerateRequest::greedy(Prompt::Tokens(repeated.clone()), 60);
    let seeded = |sampling: Sampling| GenerateRequest {
        sampling: Sampling { seed: Some(7), ..sampling },
        ..base()
    };
    let default = Sampling::default;
    vec![
        base(),
        GenerateRequest::greedy(Prompt::Text(PROMPT.to_owned()), 120),
        GenerateRequest { logprobs: Some(2), ..base() },
        GenerateRequest { stop: vec!["the".to_owned(), "said".to_owned()], ..base() },
        GenerateRequest { max_tokens: None, ignore_end: true, ..base() },
        GenerateRequest { max_tokens: Some(2), echo: true, logprobs: Some(1), ..base() },
        seeded(default()),
        seeded(Sampling { temperature: 0.3, top_p: 0.8, ..default() }),
        seeded(Sampling { repeat_penalty: 1.3, frequency_penalty: 0.5, ..default() }),
        seeded(Sampling { logit_bias: vec![(97, 3.0), (4, -100.0)], ..default() }),
        GenerateRequest {
            constraint: Constraint::regex("regex", "( ?[a-z]{1,8},?){1,20}").ok(),
            ..base()
        },
    ]
}

async fn answer(worker: &Worker, request: GenerateRequest) -> (Piece, Finish) {
    worker.generate(request).expect("taken").finish().await.expect("an answer")
}

/// The answers of a worker that guesses are those of one that does not; tokens guessed and right.
async fn check(speculation: Option<Speculation>) -> (u32, u32) {
    let plain = worker(speculating(None)).await;
    let guessing = worker(speculating(speculation)).await;
    let (mut drafted, mut accepted) = (0, 0);
    let mut all = Vec::new();
    for (at, request) in requests().into_iter().enumerate() {
        let (wanted, wanted_finish) = answer(&plain, request.clone()).await;
        let (found, finish) = answer(&guessing, request).await;
        assert_eq!((&found.text, &found.tokens), (&wanted.text, &wanted.tokens), "number {at}");
        assert_eq!(finish.reason, wanted_finish.reason, "number {at}");
        assert_eq!(finish.completion_tokens, wanted_finish.completion_tokens, "number {at}");
        assert_eq!(found.logprobs.len(), wanted.logprobs.len(), "number {at}");
        for (found, wanted) in found.logprobs.iter().zip(&wanted.logprobs) {
            let [found, wanted] = [found, wanted].map(|entry| entry.logprob.unwrap_or(0.0));
            // The order of float operations differs between batches.
            assert!((found - wanted).abs() < 1e-3, "number {at}");
        }
        drafted += finish.drafted_tokens;
        accepted += finish.accepted_tokens;
        assert_eq!(wanted_finish.drafted_tokens, 0);
        all.push(wanted.tokens);
    }
    // Side by side, and after each other in the same sequences.
    let together = requests().into_iter().map(|request| answer(&guessing, request));
    let together = futures_util::future::join_all(together).await;
    for (at, ((found, _), wanted)) in together.into_iter().zip(all).enumerate() {
        assert_eq!(found.tokens, wanted, "number {at}");
    }
    (drafted, accepted)
}

#[tokio::test]
async fn guesses_from_the_text_change_no_answer() {
    let (drafted, accepted) = check(ngram(6)).await;
    assert!(accepted > 20 && drafted > accepted, "{accepted} of {drafted}");
}

#[tokio::test]
async fn guesses_of_a_draft_model_change_no_answer() {
    let (drafted, accepted) = check(draft(glass())).await;
    assert!(accepted > 20 && drafted > accepted, "{accepted} of {drafted}");
    // A model that guesses for itself is always right.
    let guessing = worker(speculating(draft(glass()))).await;
    let request = GenerateRequest::greedy(Prompt::Text(PROMPT.to_owned()), 100);
    let (_, finish) = answer(&guessing, request).await;
    assert!(finish.drafted_tokens > 10, "{finish:?}");
    assert_eq!(finish.accepted_tokens, finish.drafted_tokens);
}

#[tokio::test]
async fn guesses_do_not_disturb_what_is_shifted() {
    let shifting = |speculation| {
        let mut spec = speculating(speculation);
        spec.runtime.context_tokens = 64;
        spec.extras.context_shift = true;
        spec
    };
    let request = || GenerateRequest::greedy(Prompt::Text(PROMPT.to_owned()), 200);
    let plain = worker(shifting(None)).await;
    let (wanted, wanted_finish) = answer(&plain, request()).await;
    for speculation in [ngram(8), draft(glass())] {
        let guessing = worker(shifting(speculation)).await;
        let (found, finish) = answer(&guessing, request()).await;
        assert_eq!(found.tokens, wanted.tokens);
        assert_eq!(finish.context_shifts, wanted_finish.context_shifts);
        assert!(finish.accepted_tokens > 0, "{finish:?}");
    }
}

#[tokio::test]
async fn guesses_that_cannot_be_are_refused() {
    set_up();
    let check = async |spec: WorkerSpec, wanted: &str| {
        let error = match Worker::spawn(spec).await {
            Ok(_) => panic!("it should be refused: {wanted}"),
            Err(error) => error.to_string(),
        };
        assert!(error.contains(wanted), "`{wanted}` is not in: {error}");
    };
    check(speculating(ngram(0)), "speculation.tokens (asked 0, effective 1 to 16").await;
    check(speculating(ngram(17)), "speculation.tokens (asked 17").await;
    let mut narrow = speculating(ngram(8));
    narrow.runtime.batch_tokens = 32;
    check(narrow, "speculation.tokens (asked 8, effective 1 to 7").await;
    check(speculating(draft(PathBuf::from("/nowhere.gguf"))), "draft model /nowhere.gguf").await;

    // The same model, but for the spelling of one token.
    let mut bytes = std::fs::read(glass()).expect("the model");
    let place = bytes.windows(6).position(|it| it == b"little").expect("it knows the word");
    bytes[place] = b'L';
    let folder = tempfile::tempdir().expect("a folder");
    let other = folder.path().join("other.gguf");
    std::fs::write(&other, bytes).expect("written");
    check(speculating(draft(other)), "its vocabulary is another one").await;
}

#[tokio::test]
async fn guesses_are_counted() {
    let model =
        ModelSpec { id: "glass".to_owned(), aliases: Vec::new(), worker: speculating(ngram(4)) };
    let endpoint = Endpoint::serving(model).await;
    let repeated = PROMPT.repeat(6);
    let body = json!({ "prompt": repeated, "max_tokens": 40, "temperature": 0 });
    let (status, answer) = endpoint.post("/v1/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    let [drafted, accepted] =
        ["draft_n", "draft_n_accepted"].map(|name| answer["timings"][name].as_u64().unwrap());
    assert!(drafted > 0 && accepted <= drafted, "{answer}");
    let (_, metrics) = endpoint.get("/metrics").await;
    for line in [
        format!("slmops_drafted_tokens_total {drafted}"),
        format!("slmops_accepted_tokens_total {accepted}"),
    ] {
        assert!(metrics.lines().any(|it| it == line), "{line} is not in: {metrics}");
    }
    let (_, properties) = endpoint.get("/props").await;
    let shown = r#""speculation":{"kind":"ngram","tokens":4}"#;
    assert!(properties.contains(shown), "{properties}");
    endpoint.stop().await;
}

/// Prints what guessing brings on a real model, on one thread. `SLMOPS_DRAFT` names a smaller one of its vocabulary.
#[tokio::test]
#[ignore = "prints a table and checks nothing: make guess-table"]
async fn guesses_pay_where_text_repeats() {
    let Some(model) = smollm2() else { return };
    let prose = std::fs::read_to_string(crate::support::testdata("prose-around-the-world.txt"));
    let prose: String = prose.expect("the text").chars().take(1600).collect();
    let list = "alpha = 1\nbravo = 2\ncharlie = 3\ndelta = 4\necho = 5\nfoxtrot = 6\ngolf = 7\n";
    let chat = |asked: String| {
        Prompt::Template(format!("<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"))
    };
    let prompts = [
        ("copy", chat(format!("Repeat this text exactly:\n\n{prose}"))),
        ("edit", chat(format!("Write this file again with every number doubled:\n\n{list}"))),
        ("summary", chat(format!("Summarise this text in three sentences:\n\n{prose}"))),
        ("free", chat("Tell me a story about a lighthouse keeper.".to_owned())),
    ];
    let drafts = std::env::var_os("SLMOPS_DRAFT").map(PathBuf::from);
    let ways: Vec<_> = [("plain", None), ("ngram:3", ngram(3)), ("ngram:7", ngram(7))]
        .into_iter()
        .chain(drafts.map(|path| ("draft", draft(path))))
        .collect();
    for (way, speculation) in ways {
        let runtime = RuntimeConfig { parallel: 1, threads: 1, ..RuntimeConfig::default() };
        let extras = Extras { speculation, ..Extras::default() };
        let spec = WorkerSpec { extras, ..WorkerSpec::new(model.clone(), runtime) };
        let worker = worker(spec).await;
        for (name, prompt) in &prompts {
            // The prompt is computed beforehand.
            answer(&worker, GenerateRequest::greedy(prompt.clone(), 1)).await;
            let before = cpu_ms(worker.pid());
            let (piece, finish) =
                answer(&worker, GenerateRequest::greedy(prompt.clone(), 120)).await;
            let spent_ms = cpu_ms(worker.pid()) - before;
            eprintln!(
                "{way:8} {name:8} {:6.2} ms of processor a token, {:6.1} tokens/s, {} of {} right, {} tokens {}",
                spent_ms as f64 / f64::from(finish.completion_tokens),
                f64::from(finish.completion_tokens - 1) * 1e3 / finish.decode_ms,
                finish.accepted_tokens,
                finish.drafted_tokens,
                finish.completion_tokens,
                slmops_artifact::Digest::of(piece.text.as_bytes()).short(),
            );
        }
    }
}
