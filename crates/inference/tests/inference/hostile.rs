//! Requests that nobody in their right mind sends, and more of them than there is room for. Whatever comes,
//! nothing ends in a 5xx, hangs, grows or kills the worker. `SLM_FUZZ_CASES` and `SLM_SERVE_REQUESTS` say how
//! many; `make nightly` takes many more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::host::HostEvent;
use slmops_inference::server::ServerOptions;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::server::{Endpoint, completion, named, with};
use crate::support::{PROMPT_TOKENS, runtime, smollm2};

/// The longest that one request may take; others may use the machine, too.
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory that a process may take up beside leaks: caches fill, allocators keep what they had.
const SLACK_BYTES: u64 = 8 << 20;
/// What `/proc/self/statm` counts in; larger pages make the check stricter only in name.
const PAGE_BYTES: u64 = 4096;

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

fn one_thread() -> RuntimeConfig {
    RuntimeConfig { threads: 1, ..runtime() }
}

/// Requests with a bit of everything, to begin from.
fn samples() -> Vec<(&'static str, Value)> {
    let messages = json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": [{ "type": "text", "text": "Hi" }] },
        { "role": "assistant", "content": null, "tool_calls": [
            { "id": "c", "type": "function", "function": { "name": "f", "arguments": "{}" } },
        ] },
        { "role": "tool", "tool_call_id": "c", "content": "1" },
    ]);
    let parameters = json!({ "type": "object", "properties": { "a": { "enum": [1, 2] } } });
    let schema = json!({ "type": "array", "items": { "type": "integer" }, "maxItems": 2 });
    vec![
        (
            "/v1/completions",
            json!({
                "prompt": "Alice was", "max_tokens": 3, "temperature": 0.8, "top_k": 5, "top_p": 0.9,
                "min_p": 0.01, "repeat_penalty": 1.1, "frequency_penalty": 0.1, "seed": 1, "n": 2,
                "logit_bias": { "5": 1.5 }, "stop": ["x"], "logprobs": 2, "echo": true,
            }),
        ),
        (
            "/v1/completions",
            json!({
                "prompt": [PROMPT_TOKENS, [5, 6]], "max_tokens": 3, "regex": "[a-z]{2,5}",
                "stream": true, "stream_options": { "include_usage": true }, "ignore_eos": false,
            }),
        ),
        (
            "/v1/completions",
            json!({
                "prompt": ["a", "b"], "max_tokens": 3, "grammar": "root ::= [a-c]+ | \"d\" root",
            }),
        ),
        (
            "/v1/chat/completions",
            json!({
                "messages": messages, "max_completion_tokens": 3, "logprobs": true, "top_logprobs": 3,
                "response_format": { "type": "json_schema", "json_schema": {
                    "name": "x", "strict": true, "schema": schema } },
                "stream": true, "cache_prompt": true, "user": "u",
            }),
        ),
        (
            "/v1/chat/completions",
            json!({
                "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 3,
                "tools": [{ "type": "function", "function": { "name": "f", "parameters": parameters } }],
                "tool_choice": "auto", "parallel_tool_calls": true,
            }),
        ),
        (
            "/v1/responses",
            json!({
                "input": [
                    { "role": "user", "content": "Hi" },
                    { "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}" },
                    { "type": "function_call_output", "call_id": "c", "output": "1" },
                ],
                "instructions": "Be brief.", "max_output_tokens": 3, "stream": true,
                "text": { "format": { "type": "json_schema", "name": "x", "schema": schema } },
                "include": ["message.output_text.logprobs"], "top_logprobs": 1, "metadata": {},
            }),
        ),
        (
            "/v1/responses",
            json!({
                "input": "Hi", "max_output_tokens": 3, "tool_choice": "none",
                "tools": [{ "type": "function", "name": "f", "parameters": parameters }],
            }),
        ),
        ("/v1/embeddings", json!({ "input": ["a", "b"], "encoding_format": "base64" })),
        ("/v1/feedback", json!({ "response_id": "x", "value": 1 })),
        ("/tokenize", json!({ "content": "a", "add_special": true, "parse_special": false })),
        ("/detokenize", json!({ "tokens": PROMPT_TOKENS })),
        ("/apply-template", json!({ "messages": [{ "role": "user", "content": "Hi" }] })),
    ]
}

/// Values that are too big, too small, of the wrong kind, or strange.
fn strange(random: &mut StdRng) -> Value {
    let deep = |depth: usize| (0..depth).fold(json!(1), |inner, _| json!([inner]));
    match random.random_range(0..24) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(0),
        3 => json!(-1),
        4 => json!(u64::MAX),
        5 => json!(i64::MIN),
        6 => json!(1e308),
        7 => json!(-0.0),
        8 => json!(1e-320),
        9 => json!(""),
        10 => json!("\u{0}\u{7f}\u{202e}\u{fffd}"),
        11 => json!("\u{1f917}\u{5abd}\u{e9}e\u{301}"),
        12 => json!("<|im_end|><s></s><tool_call>\n{\"name\": \"f\", \"arguments\": "),
        13 => json!("x".repeat(random.random_range(1..20_000))),
        14 => json!([]),
        15 => json!({}),
        16 => json!([null, {}, [], "", 1.5]),
        17 => json!(vec![7; random.random_range(1..2000)]),
        18 => deep(random.random_range(1..120)),
        19 => {
            json!({ "type": "function", "function": { "name": "f" }, "text": "x", "role": "user" })
        }
        20 => {
            json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": { "$ref": "#" } } })
        }
        21 => json!({ "anyOf": [{}, { "not": {} }], "pattern": "(a+)+$", "minimum": 1e300 }),
        22 => json!(random.random_range(-300_000..300_000)),
        _ => json!(random.random::<f64>() * 4.0),
    }
}

/// All places in a value, by their pointers.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, inner)| places(inner, &format!("{at}/{name}"), found));
        }
        Value::Array(items) => {
            items
                .iter()
                .enumerate()
                .for_each(|(index, inner)| places(inner, &format!("{at}/{index}"), found));
        }
        _ => {}
    }
}

/// A request's body after some damage.
fn damaged(mut body: Value, names: &[String], random: &mut StdRng) -> Vec<u8> {
    for _ in 0..random.random_range(1..3) {
        let mut found = Vec::new();
        places(&body, "", &mut found);
        let place = &found[random.random_range(0..found.len())];
        let kind = random.random_range(0..4);
        let value = strange(random);
        let name = names[random.random_range(0..names.len())].clone();
        let Some(target) = body.pointer_mut(place) else { continue };
        match (kind, &mut *target) {
            (0, Value::Object(fields)) => drop(fields.insert(name, value)),
            (1, Value::Object(fields)) => {
                let key = fields.keys().nth(random.random_range(0..fields.len().max(1))).cloned();
                key.map(|key| fields.remove(&key));
            }
            (0 | 1, Value::Array(items)) => items.push(value),
            (2, Value::Array(items)) => items.clear(),
            _ => *target = value,
        }
    }
    let mut bytes = body.to_string().into_bytes();
    match random.random_range(0..12) {
        0 => bytes.truncate(random.random_range(0..bytes.len())),
        1 => {
            let at = random.random_range(0..bytes.len());
            bytes[at] = random.random();
        }
        2 => {
            let at = random.random_range(0..bytes.len());
            bytes.splice(at..at, [0xff, 0xc3, 0x28]);
        }
        _ => {}
    }
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_requests_get_answers_or_reasons() {
    let endpoint = Endpoint::new(one_thread()).await;
    let (_, document) = endpoint.get("/openapi.json").await;
    let document: Value = serde_json::from_str(&document).unwrap();
    let schemas = document["components"]["schemas"].as_object().unwrap().values();
    let mut names: Vec<String> = schemas
        .filter_map(|schema| schema["properties"].as_object())
        .flat_map(|properties| properties.keys().cloned())
        .collect();
    names.extend(["store", "best_of", "functions", "suffix", "type", "$ref"].map(str::to_owned));
    let samples = samples();
    let (mut answered, mut refused) = (0, 0);
    for case in 0..number("SLM_FUZZ_CASES", 400) {
        let mut random = StdRng::seed_from_u64(case as u64);
        let (path, body) = &samples[random.random_range(0..samples.len())];
        let bytes = damaged(body.clone(), &names, &mut random);
        let shown = String::from_utf8_lossy(&bytes).chars().take(2000).collect::<String>();
        let ask = async {
            let url = format!("{}{path}", endpoint.url);
            let response = endpoint.client.post(url).body(bytes).send().await.expect("an answer");
            (response.status().as_u16(), response.text().await.expect("it ends"))
        };
        let asked = tokio::time::timeout(PATIENCE, ask).await;
        let (status, text) = asked.unwrap_or_else(|_| panic!("case {case} hangs: {path} {shown}"));
        let clue = || format!("case {case}: {path} {shown}\n{status} {text}");
        match status {
            200 => {
                // A failure on the way is an event.
                assert!(!text.contains("\"server_error\""), "{}", clue());
                answered += 1;
            }
            400..500 => {
                let error: Value = serde_json::from_str(&text).unwrap_or_default();
                assert!(error["error"]["message"].is_string(), "{}", clue());
                assert!(error["error"]["code"].is_string(), "{}", clue());
                refused += 1;
            }
            _ => panic!("{}", clue()),
        }
    }
    println!("{answered} answered, {refused} refused");
    assert!(answered > 0 && refused > 0);
    let (status, body) = endpoint.post("/v1/completions", completion(3)).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(endpoint.host.telemetry().worker_crashes, 0);
    endpoint.stop().await;
}

/// Prompts of every length around what the context holds.
#[tokio::test]
async fn the_context_is_used_to_its_last_token() {
    let endpoint = Endpoint::new(one_thread()).await;
    const CONTEXT: usize = 128;
    let tokens =
        |count: usize| -> Vec<i32> { PROMPT_TOKENS.iter().copied().cycle().take(count).collect() };
    for count in CONTEXT - 4..=CONTEXT + 3 {
        for max_tokens in [1, 2, 3] {
            let body = json!({ "prompt": tokens(count), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true });
            let (status, answer) = endpoint.post("/v1/completions", body.clone()).await;
            if count + max_tokens <= CONTEXT {
                assert_eq!(
                    (status, &answer["usage"]["completion_tokens"]),
                    (200, &json!(max_tokens)),
                    "{answer}"
                );
            } else {
                let error = &answer["error"];
                assert_eq!(
                    (status, &error["code"], &error["param"]),
                    (400, &json!("context_length_exceeded"), &json!("prompt")),
                    "{count} + {max_tokens}: {answer}"
                );
                let message = error["message"].as_str().unwrap();
                assert!(
                    message.contains(&count.to_string()) && message.contains("128"),
                    "{message}"
                );
                // A stream is refused as soon.
                let (status, _) =
                    endpoint.post("/v1/completions", with(body, "stream", json!(true))).await;
                assert_eq!(status, 400);
            }
        }
        let (status, answer) =
            endpoint.post("/v1/embeddings", json!({ "input": tokens(count) })).await;
        assert_eq!(status == 200, count <= CONTEXT, "{count}: {answer}");
        let echo = json!({ "prompt": tokens(count), "max_tokens": 0, "echo": true, "logprobs": 0 });
        let (status, answer) = endpoint.post("/v1/completions", echo).await;
        assert_eq!(status == 200, count <= CONTEXT, "{count}: {answer}");
    }
    endpoint.stop().await;
}

#[tokio::test]
async fn long_prompts_are_refused_soon() {
    let endpoint = Endpoint::new(one_thread()).await;
    let text = "the queen said to the king ".repeat((1 << 20) / 27);
    let messages = json!([{ "role": "user", "content": text }]);
    for (path, body, parameter) in [
        ("/v1/completions", json!({ "prompt": text }), "prompt"),
        ("/v1/chat/completions", json!({ "messages": messages }), "messages"),
        ("/v1/responses", json!({ "input": text }), "input"),
        ("/v1/embeddings", json!({ "input": text }), "input"),
    ] {
        let asked = tokio::time::timeout(PATIENCE, endpoint.post(path, body)).await;
        let (status, answer) = asked.expect("it is answered");
        let error = &answer["error"];
        assert_eq!((status, &error["param"]), (400, &json!(parameter)), "{path}: {error}");
        assert_eq!(error["code"], "context_length_exceeded");
    }
    let (status, answer) = endpoint.post("/tokenize", json!({ "content": text })).await;
    assert!(status == 200 && answer["count"].as_u64().unwrap() > 100_000, "{status}");
    let (status, body) = endpoint.post("/v1/completions", completion(3)).await;
    assert_eq!(status, 200, "{body}");
    endpoint.stop().await;
}

/// Characters that are several tokens come whole, wherever an answer is cut.
#[tokio::test]
async fn characters_are_never_torn() {
    let Some(model) = smollm2() else { return };
    let runtime = RuntimeConfig { context_tokens: 256, threads: 1, ..RuntimeConfig::default() };
    let endpoint = Endpoint::serving(named("smol", model, runtime)).await;
    let wanted = "\u{1f917}\u{5abd}\u{e9}\u{1f600}\u{10ffff}";
    for max_tokens in 1..24 {
        let body =
            json!({ "prompt": "x", "regex": wanted, "max_tokens": max_tokens, "temperature": 0 });
        let (status, whole) = endpoint.post("/v1/completions", body.clone()).await;
        assert_eq!(status, 200, "{whole}");
        let text = whole["choices"][0]["text"].as_str().unwrap();
        let kept = text.trim_end_matches('\u{fffd}');
        assert!(wanted.starts_with(kept), "{text:?} after {max_tokens} tokens");
        let events = endpoint.events("/v1/completions", with(body, "stream", json!(true))).await;
        let streamed: String =
            events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
        assert_eq!(streamed, text);
        let ended = whole["choices"][0]["finish_reason"] == "stop";
        assert_eq!(ended, text == wanted, "{whole}");
    }
    endpoint.stop().await;
}

/// Two hundred at once where 64 may wait: an answer or 429, for everyone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_gets_answers_or_is_told_to_come_back() {
    let endpoint = Arc::new(Endpoint::new(RuntimeConfig { queue_limit: 64, ..one_thread() }).await);
    let clients: Vec<_> = (0..200)
        .map(|client| {
            let endpoint = Arc::clone(&endpoint);
            tokio::spawn(async move {
                let body = with(completion(4), "stream", json!(client % 2 == 0));
                let url = format!("{}/v1/completions", endpoint.url);
                let response = endpoint
                    .client
                    .post(url)
                    .body(body.to_string())
                    .send()
                    .await
                    .expect("an answer");
                let status = response.status().as_u16();
                let again = response.headers().contains_key("retry-after");
                let text = response.text().await.expect("it ends");
                assert!(status == 200 || (status == 429 && again), "{status} {text}");
                assert!(!text.contains("server_error"), "{text}");
                status
            })
        })
        .collect();
    let mut answered = 0;
    for client in clients {
        answered += usize::from(client.await.expect("joined") == 200);
    }
    println!("{answered} of 200 answered, the others told to come back");
    assert!(answered >= 64, "{answered}");
    Arc::into_inner(endpoint).expect("the last one").stop().await;
}

/// Who stops in the middle of a request is not waited for.
#[tokio::test]
async fn half_a_request_is_given_up() {
    let body_patience = Duration::from_millis(200);
    let options = ServerOptions { body_patience, ..ServerOptions::default() };
    let endpoint = Endpoint::with_options(options).await;
    let address = endpoint.url.strip_prefix("http://").expect("an address");
    let mut connection = tokio::net::TcpStream::connect(address).await.expect("it listens");
    let head =
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"prompt\":";
    connection.write_all(head.as_bytes()).await.expect("it reads");
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(PATIENCE, connection.read(&mut answer)).await;
    let count = read.expect("it answers").expect("an answer");
    let answer = String::from_utf8_lossy(&answer[..count]);
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("request_timeout"), "{answer}");
    endpoint.stop().await;
}

/// The worker dies again and again while many ask: everybody gets an answer or an error that says so, and
/// nothing of it stays behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_killed_under_load_leaves_nobody_waiting() {
    const KILLS: u64 = 4;
    let endpoint = Arc::new(Endpoint::new(RuntimeConfig { queue_limit: 64, ..one_thread() }).await);
    let mut events = endpoint.host.events();
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..12)
        .map(|client| {
            let (endpoint, over) = (Arc::clone(&endpoint), Arc::clone(&over));
            tokio::spawn(async move {
                let (mut answered, mut lost) = (0, 0);
                while !over.load(Ordering::Relaxed) {
                    let body = with(completion(40), "stream", json!(client % 2 == 0));
                    let url = format!("{}/v1/completions", endpoint.url);
                    let asked = async {
                        let request = endpoint.client.post(url).body(body.to_string());
                        let response = request.send().await.expect("an answer");
                        let status = response.status().as_u16();
                        (status, response.text().await.expect("it ends"))
                    };
                    let asked = tokio::time::timeout(PATIENCE, asked).await;
                    let (status, text) = asked.expect("nobody waits for ever");
                    let known = ["\"worker_died\"", "\"model_restarting\""];
                    let failed = known.iter().any(|code| text.contains(code));
                    assert!(status == 200 || failed, "{status} {text}");
                    let whole = client % 2 == 1 || text.ends_with("data: [DONE]\n\n");
                    assert!(failed || whole, "{text}");
                    answered += usize::from(!failed);
                    lost += usize::from(failed);
                }
                (answered, lost)
            })
        })
        .collect();
    for _ in 0..KILLS {
        endpoint.signal_worker(rustix::process::Signal::KILL);
        loop {
            let event = tokio::time::timeout(PATIENCE, events.recv()).await;
            match event.expect("it comes back").expect("an event") {
                HostEvent::Restarted { .. } => break,
                HostEvent::RestartFailed { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
        // Under load again.
        let before = endpoint.host.telemetry().requests;
        let busy = async {
            while endpoint.host.telemetry().requests < before + 12 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, busy).await.expect("it answers");
    }
    over.store(true, Ordering::Relaxed);
    let (mut answered, mut lost) = (0, 0);
    for client in clients {
        let (more, fewer) = client.await.expect("joined");
        (answered, lost) = (answered + more, lost + fewer);
    }
    println!("{answered} answered, {lost} lost to {KILLS} kills");
    assert!(answered >= 48, "{answered}");
    let (_, metrics) = endpoint.get("/metrics").await;
    for line in [
        "slmops_requests_waiting 0".to_owned(),
        "slmops_requests_running 0".to_owned(),
        format!("slmops_worker_crashes_total {KILLS}"),
    ] {
        assert!(metrics.lines().any(|it| it == line), "{line} is not in {metrics}");
    }
    Arc::into_inner(endpoint).expect("the last one").stop().await;
}

/// Many requests of every kind, some broken off: memory stays what it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_leave_nothing_behind() {
    let endpoint = Arc::new(Endpoint::new(RuntimeConfig { queue_limit: 64, ..one_thread() }).await);
    let requests = number("SLM_SERVE_REQUESTS", 600);
    let third = requests / 3;
    let asked = ask_many(&endpoint, third, mixed).await.len();
    let early = resident(&endpoint);
    let asked = asked + ask_many(&endpoint, requests - third, mixed).await.len();
    let late = resident(&endpoint);
    assert_eq!(asked, requests);
    println!(
        "worker and server: {early:?} bytes after {third} requests, {late:?} after {requests}"
    );
    for (early, late) in [(early.0, late.0), (early.1, late.1)] {
        assert!(late < early + SLACK_BYTES, "{early} became {late}");
    }
    assert_eq!(endpoint.host.telemetry().worker_crashes, 0);
    Arc::into_inner(endpoint).expect("the last one").stop().await;
}

/// Nobody waits longer than twice the median while equals are served. What is counted is how many
/// others were answered meanwhile: no clock of a busy machine plays a part.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equals_wait_equally() {
    let endpoint = Arc::new(Endpoint::new(RuntimeConfig { queue_limit: 64, ..one_thread() }).await);
    let requests = number("SLM_SERVE_REQUESTS", 600);
    let mut overtaken = ask_many(&endpoint, requests, |_| ("/v1/completions", completion(4))).await;
    overtaken.sort_unstable();
    let (median, most) = (overtaken[overtaken.len() / 2], overtaken[overtaken.len() - 1]);
    println!("while one waited, {median} others were answered at the median, {most} at most");
    // Those that are being answered when one comes are ahead of it.
    assert!(most <= 2 * median + 2, "{overtaken:?}");
    Arc::into_inner(endpoint).expect("the last one").stop().await;
}

/// Sends so many requests, twelve at a time; how many others were answered while each waited.
async fn ask_many(
    endpoint: &Arc<Endpoint>,
    requests: usize,
    of_turn: fn(usize) -> (&'static str, Value),
) -> Vec<usize> {
    const CLIENTS: usize = 12;
    let (begun, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let endpoint = Arc::clone(endpoint);
            let (begun, done) = (Arc::clone(&begun), Arc::clone(&done));
            tokio::spawn(async move {
                let mut overtaken = Vec::new();
                loop {
                    let turn = begun.fetch_add(1, Ordering::Relaxed);
                    if turn >= requests {
                        return overtaken;
                    }
                    let (path, body) = of_turn(turn);
                    let before = done.load(Ordering::Relaxed);
                    ask(&endpoint, path, body, turn % 8 == 1).await;
                    overtaken.push(done.fetch_add(1, Ordering::Relaxed) - before);
                }
            })
        })
        .collect();
    let mut overtaken = Vec::new();
    for client in clients {
        overtaken.extend(client.await.expect("no request failed"));
    }
    overtaken
}

/// One of several kinds of requests.
fn mixed(turn: usize) -> (&'static str, Value) {
    match turn % 4 {
        0 => ("/v1/completions", completion(4)),
        1 => ("/v1/completions", with(completion(4), "stream", json!(true))),
        2 => (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4, "stream": true }),
        ),
        _ => {
            ("/v1/responses", json!({ "input": "Hi", "max_output_tokens": 4, "regex": "[a-z ]+" }))
        }
    }
}

/// Asks, and reads the answer to its end, or only its beginning where it streams.
async fn ask(endpoint: &Endpoint, path: &str, body: Value, leaves: bool) {
    let url = format!("{}{path}", endpoint.url);
    let leaves = leaves && body["stream"] == true;
    let mut response =
        endpoint.client.post(url).body(body.to_string()).send().await.expect("an answer");
    assert_eq!(response.status(), 200);
    if leaves {
        response.chunk().await.expect("a chunk");
        return;
    }
    response.text().await.expect("it ends");
}

/// Resident bytes of the worker and of this process.
fn resident(endpoint: &Endpoint) -> (u64, u64) {
    let (_, worker) = endpoint.host.current().expect("it serves");
    let own = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = own.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    (worker.memory().resident_bytes, pages * PAGE_BYTES)
}
