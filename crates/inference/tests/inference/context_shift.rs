//! Answers that go on past the end of the context, where that is configured.

use serde_json::json;
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::child;
use slmops_inference::host::ModelSpec;
use slmops_inference::worker::{
    Extras, FinishReason, GenerateRequest, Prompt, RequestError, Worker, WorkerError, WorkerSpec,
};

use crate::server::Endpoint;
use crate::support::{PROMPT, PROMPT_TOKENS, glass, one_thread, set_up};

const CONTEXT_TOKENS: u32 = 64;
/// The tiny model's token that ends a text.
const END: i32 = 3;

fn spec(context_shift: bool) -> WorkerSpec {
    let runtime = RuntimeConfig { context_tokens: CONTEXT_TOKENS, ..one_thread() };
    let extras = Extras { context_shift, ..Extras::default() };
    WorkerSpec { extras, ..WorkerSpec::new(glass(), runtime) }
}

async fn worker(context_shift: bool) -> Worker {
    set_up();
    Worker::spawn(spec(context_shift)).await.expect("the worker starts")
}

fn request(tokens: Vec<i32>, max_tokens: Option<u32>) -> GenerateRequest {
    GenerateRequest { max_tokens, ..GenerateRequest::greedy(Prompt::Tokens(tokens), 1) }
}

#[tokio::test]
async fn an_answer_goes_on_as_in_a_loop_that_shifts() {
    let worker = worker(true).await;
    let (piece, finish) = worker
        .generate(request(PROMPT_TOKENS.to_vec(), Some(150)))
        .unwrap()
        .finish()
        .await
        .unwrap();
    let input = json!({
        "model": glass(), "prompt": PROMPT, "tokens": 150, "shift_at": CONTEXT_TOKENS, "shift_keeps": 4,
    });
    let plain = child::call("greedy", input, |_| {}).await.expect("it runs");
    assert_eq!(json!(piece.tokens), plain["tokens"]);
    // Full with 64 tokens, and then each time that half of what follows the first four is gone.
    assert_eq!((finish.completion_tokens, finish.context_shifts), (150, 4));
    assert_eq!(finish.reason, FinishReason::Length);

    // What came after a shift is not what the same tokens are elsewhere: the kept beginning alone is.
    let again = worker.generate(request(PROMPT_TOKENS.to_vec(), Some(150))).unwrap().finish().await;
    let (again, finish) = again.unwrap();
    assert_eq!((again.tokens, finish.cached_tokens), (piece.tokens, 4));
}

#[tokio::test]
async fn what_was_shifted_is_no_prefix() {
    let worker = worker(true).await;
    let one = request(PROMPT_TOKENS.to_vec(), Some(70));
    let (piece, finish) = worker.generate(one).unwrap().finish().await.unwrap();
    assert_eq!(finish.context_shifts, 1);
    // 74 tokens were computed, of which the 5th to the 33rd are gone.
    let whole: Vec<i32> = PROMPT_TOKENS.iter().chain(&piece.tokens).copied().collect();
    let held: Vec<i32> = whole[..4].iter().chain(&whole[33..]).copied().collect();
    let next = || request(held.clone(), Some(12));
    let (found, finish) = worker.generate(next()).unwrap().finish().await.unwrap();
    assert_eq!(finish.cached_tokens, 4);
    let fresh = self::worker(false).await;
    let (wanted, _) = fresh.generate(next()).unwrap().finish().await.unwrap();
    assert_eq!(found.tokens, wanted.tokens);
}

#[tokio::test]
async fn an_answer_without_a_limit_ends_all_the_same() {
    let worker = worker(true).await;
    let mut endless = request(PROMPT_TOKENS.to_vec(), None);
    endless.ignore_end = true;
    let (_, finish) = worker.generate(endless).unwrap().finish().await.unwrap();
    assert_eq!((finish.completion_tokens, finish.reason), (CONTEXT_TOKENS, FinishReason::Length));
    assert_eq!(finish.context_shifts, 1);
}

#[tokio::test]
async fn what_leaves_no_room_is_refused() {
    let long = |count| PROMPT_TOKENS.iter().copied().cycle().take(count).collect::<Vec<_>>();
    let refused = async |worker: &Worker, request| {
        let error = worker.generate(request).unwrap().finish().await.expect_err("no room");
        assert!(
            matches!(error, WorkerError::Request(RequestError::ContextLength { .. })),
            "{error}"
        );
    };
    let shifting = worker(true).await;
    refused(&shifting, request(long(64), Some(1))).await;
    refused(&worker(false).await, request(long(5), Some(60))).await;
    // The first message fills the context but for 10 tokens: nothing that could move is left.
    let message: Vec<i32> = long(53).into_iter().chain([END]).collect();
    refused(&shifting, request(message.clone(), Some(20))).await;
    let (_, finish) =
        shifting.generate(request(message, Some(8))).unwrap().finish().await.expect("it fits");
    assert_eq!((finish.completion_tokens, finish.context_shifts), (8, 0));
}

#[tokio::test]
async fn shifts_are_counted() {
    let model = ModelSpec { id: "glass".to_owned(), aliases: Vec::new(), worker: spec(true) };
    let endpoint = Endpoint::serving(model).await;
    let body = json!({ "prompt": PROMPT, "max_tokens": 70, "temperature": 0, "ignore_eos": true });
    let (status, answer) = endpoint.post("/v1/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 70);
    assert_eq!(answer["timings"]["context_shifts"], 1);
    let (_, metrics) = endpoint.get("/metrics").await;
    assert!(metrics.contains("slmops_context_shifts_total 1\n"), "{metrics}");
    let (_, properties) = endpoint.get("/props").await;
    assert!(properties.contains("\"context_shift\":true"), "{properties}");
    endpoint.stop().await;
}
