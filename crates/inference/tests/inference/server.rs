//! The HTTP surface, as a client sees it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::host::{HostEvent, ModelHost, ModelSpec};
use slmops_inference::server::{KeyLimits, Keys, ServeError, ServerOptions, serve, serve_host};
use slmops_inference::worker::{Prompt, ScoreRequest, WorkerSpec};

use crate::support::{GREEDY, PROMPT, PROMPT_TOKENS, glass, runtime, set_up};

pub struct Endpoint {
    pub host: Arc<ModelHost>,
    pub url: String,
    pub client: reqwest::Client,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
}

fn model(runtime: RuntimeConfig) -> ModelSpec {
    named("glass", glass(), runtime)
}

/// A model under a name and its first version's.
pub fn named(name: &str, model_path: PathBuf, runtime: RuntimeConfig) -> ModelSpec {
    ModelSpec {
        id: name.to_owned(),
        aliases: vec![format!("{name}:1.0.0")],
        worker: WorkerSpec::new(model_path, runtime),
    }
}

impl Endpoint {
    /// An endpoint whose model is not loaded yet.
    async fn empty() -> Self {
        Self::with_options(ServerOptions::default()).await
    }

    pub async fn with_options(options: ServerOptions) -> Self {
        Self::of(ModelHost::new(), options).await
    }

    pub async fn of(host: Arc<ModelHost>, options: ServerOptions) -> Self {
        set_up();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let server = tokio::spawn(serve_host(listener, Arc::clone(&host), options, async move {
            let _ = stopped.await;
        }));
        Self { host, url, client: reqwest::Client::new(), stop: Some(stop), server }
    }

    pub async fn new(runtime: RuntimeConfig) -> Self {
        Self::serving(model(runtime)).await
    }

    pub async fn serving(model: ModelSpec) -> Self {
        let endpoint = Self::empty().await;
        endpoint.load(model).await;
        endpoint
    }

    pub async fn load(&self, model: ModelSpec) {
        let staged = self.host.stage(model).await.expect("it loads");
        self.host.activate(staged);
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.post_text(path, body.to_string()).await
    }

    async fn post_text(&self, path: &str, body: String) -> (u16, Value) {
        let url = format!("{}{path}", self.url);
        let response = self.client.post(url).body(body).send().await.expect("an answer");
        let status = response.status().as_u16();
        (status, response.json().await.expect("JSON"))
    }

    pub async fn delete(&self, path: &str) -> (u16, Value) {
        let response = self.client.delete(format!("{}{path}", self.url)).send().await;
        let response = response.expect("an answer");
        (response.status().as_u16(), response.json().await.expect("JSON"))
    }

    pub async fn get(&self, path: &str) -> (u16, String) {
        let response = self.client.get(format!("{}{path}", self.url)).send().await;
        let response = response.expect("an answer");
        (response.status().as_u16(), response.text().await.expect("text"))
    }

    /// The events of a stream; `[DONE]` is a string.
    pub async fn events(&self, path: &str, body: Value) -> Vec<Value> {
        let url = format!("{}{path}", self.url);
        let response = self.client.post(url).body(body.to_string()).send().await.expect("begins");
        let (kind, text) = (response.headers().clone(), response.text().await.expect("text"));
        assert_eq!(kind["content-type"], "text/event-stream", "{text}");
        events_of(&text)
    }

    /// Sends a signal to the worker's process.
    pub fn signal_worker(&self, signal: rustix::process::Signal) {
        let (_, worker) = self.host.current().expect("it serves");
        let pid = rustix::process::Pid::from_raw(worker.pid().cast_signed()).expect("a process");
        rustix::process::kill_process(pid, signal).expect("it is told");
    }

    pub async fn stop(mut self) {
        let _ = self.stop.take().expect("it runs").send(());
        self.server.await.expect("joined").expect("it ends well");
    }
}

pub fn events_of(text: &str) -> Vec<Value> {
    text.split("\n\n")
        .filter(|event| !event.is_empty())
        .map(|event| {
            let (name, data) = match event.strip_prefix("event: ") {
                Some(named) => named.split_once('\n').expect("a name and data"),
                None => ("", event),
            };
            let data = data.strip_prefix("data: ").expect("a data line");
            let data: Value =
                serde_json::from_str(data).unwrap_or_else(|_| Value::String(data.to_owned()));
            assert!(name.is_empty() || data["type"] == name, "{name} is not {data}");
            data
        })
        .collect()
}

pub fn completion(max_tokens: u32) -> Value {
    json!({ "model": "glass", "prompt": PROMPT, "temperature": 0, "max_tokens": max_tokens })
}

pub fn with(mut body: Value, name: &str, value: Value) -> Value {
    body[name] = value;
    body
}

#[tokio::test]
async fn completions_answer_whole_and_streamed() {
    let endpoint = Endpoint::new(runtime()).await;
    let (status, whole) = endpoint.post("/v1/completions", completion(20)).await;
    assert_eq!(status, 200, "{whole}");
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!([&whole["usage"]["prompt_tokens"], &whole["usage"]["completion_tokens"]], [5, 20]);
    let (_, reference) = endpoint.post("/detokenize", json!({ "tokens": GREEDY })).await;
    assert_eq!(whole["choices"][0]["text"], reference["content"]);

    let streamed = with(completion(20), "stream", json!(true));
    let streamed = with(streamed, "stream_options", json!({ "include_usage": true }));
    let events = endpoint.events("/v1/completions", streamed).await;
    let text: String =
        events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(whole["choices"][0]["text"], text);
    assert_eq!(events.last(), Some(&json!("[DONE]")));
    let usage = &events[events.len() - 2];
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(20)));
    assert_eq!(events[0]["usage"], Value::Null);
    endpoint.stop().await;
}

#[tokio::test]
async fn chats_stream_as_openai_clients_expect() {
    let endpoint = Endpoint::new(runtime()).await;
    let body = json!({
        "model": "glass:1.0.0",
        "messages": [
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "Who are you?" }] },
        ],
        "temperature": 0,
        "max_completion_tokens": 8,
        "logprobs": true,
        "top_logprobs": 2,
        "user": "someone",
        "tools": [],
    });
    let (status, whole) = endpoint.post("/v1/chat/completions", body.clone()).await;
    assert_eq!(status, 200, "{whole}");
    let message = &whole["choices"][0]["message"];
    assert_eq!(message["role"], "assistant");
    let entries = whole["choices"][0]["logprobs"]["content"].as_array().expect("entries");
    assert_eq!(entries.len(), 8);
    assert!(entries.iter().all(|entry| entry["top_logprobs"].as_array().unwrap().len() == 2));
    assert!(entries.iter().all(|entry| entry["logprob"].as_f64().unwrap() <= 0.0));

    let events = endpoint.events("/v1/chat/completions", with(body, "stream", json!(true))).await;
    let choice = |event: &Value| event["choices"][0].clone();
    assert_eq!(choice(&events[0])["delta"]["role"], "assistant");
    assert_eq!(choice(&events[0])["delta"].get("content"), Some(&Value::Null));
    assert!(events[1..].iter().all(|event| choice(event)["delta"].get("role").is_none()));
    let text: String = events
        .iter()
        .filter_map(|event| choice(event)["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(message["content"], text);
    let [.., end, done] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(
        (&choice(end)["finish_reason"], &choice(end)["delta"]),
        (&json!("length"), &json!({}))
    );
    assert_eq!(done, &json!("[DONE]"));
    assert!(events[..events.len() - 1].iter().all(|event| event.get("usage").is_none()));
    endpoint.stop().await;
}

#[tokio::test]
async fn several_answers_in_one_request() {
    let endpoint = Endpoint::new(runtime()).await;
    let body = json!({ "prompt": [PROMPT, "The"], "n": 2, "seed": 3, "max_tokens": 6 });
    let (status, first) = endpoint.post("/v1/completions", body.clone()).await;
    assert_eq!(status, 200, "{first}");
    let texts = |body: &Value| -> Vec<Value> {
        body["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect()
    };
    assert_eq!(texts(&first).len(), 4);
    assert_ne!(texts(&first)[0], texts(&first)[1]);
    assert_eq!(first["usage"]["completion_tokens"], 24);
    let (_, second) = endpoint.post("/v1/completions", body.clone()).await;
    assert_eq!(texts(&first), texts(&second));
    let events = endpoint.events("/v1/completions", with(body, "stream", json!(true))).await;
    let mut streamed = vec![String::new(); 4];
    for event in &events {
        if let (Some(index), Some(text)) =
            (event["choices"][0]["index"].as_u64(), event["choices"][0]["text"].as_str())
        {
            streamed[index as usize].push_str(text);
        }
    }
    assert_eq!(texts(&first), streamed);
    endpoint.stop().await;
}

#[tokio::test]
async fn a_prompt_is_echoed_with_its_log_probabilities() {
    let endpoint = Endpoint::new(runtime()).await;
    let tokens: Vec<i32> = PROMPT_TOKENS.iter().chain(&GREEDY[..3]).copied().collect();
    let body = |prompt: Value, max_tokens: u32| {
        json!({
            "model": "glass", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "echo": true, "logprobs": 1, "seed": 1234,
        })
    };
    // As an evaluation harness asks: everything but the first token and the one that was generated.
    let (_, whole) = endpoint.post("/v1/completions", body(json!(tokens), 1)).await;
    let choice = &whole["choices"][0];
    let list = |name: &str| choice["logprobs"][name].as_array().cloned().unwrap_or_default();
    let (names, known) = (list("tokens"), list("token_logprobs"));
    assert_eq!((names.len(), known.len()), (9, 9), "{whole}");
    assert_eq!((&known[0], &list("top_logprobs")[0]), (&Value::Null, &Value::Null));
    let text: String = names.iter().filter_map(Value::as_str).collect();
    assert!(text.starts_with(PROMPT), "{text}");
    assert_eq!(choice["text"], text);
    let offsets: Vec<usize> =
        list("text_offset").iter().map(|offset| offset.as_u64().unwrap() as usize).collect();
    for (offset, name) in offsets.iter().zip(&names) {
        assert!(text[*offset..].starts_with(name.as_str().unwrap()), "{offsets:?} in {text}");
    }
    // The greedy continuation is the most probable one, and the prompt is not.
    let greedy = |place: usize| {
        let top = list("top_logprobs")[place].as_object().unwrap().values().next().cloned();
        top.as_ref() == Some(&known[place])
    };
    assert!((5..9).all(greedy) && !(1..5).all(greedy), "{whole}");
    let (_, worker) = endpoint.host.current().expect("it serves");
    let continuation = names[5..8].iter().filter_map(Value::as_str).collect();
    let score = ScoreRequest { prompt: Prompt::Text(PROMPT.to_owned()), continuation };
    let score = worker.score(score).await.expect("a score");
    let sum: f64 = known[5..8].iter().filter_map(Value::as_f64).sum();
    assert!((sum - score.logprobs.iter().sum::<f64>()).abs() < 1e-4, "{sum} {score:?}");

    // Nothing of it comes from a cache, and what is asked of a text and of its tokens is the same.
    let (_, again) = endpoint.post("/v1/completions", body(json!(PROMPT), 0)).await;
    assert_eq!(again["choices"][0]["text"], PROMPT);
    assert_eq!(again["usage"]["completion_tokens"], 0);
    let close = |place: usize| {
        let found = &again["choices"][0]["logprobs"]["token_logprobs"][place];
        (found.as_f64().unwrap() - known[place].as_f64().unwrap()).abs() < 1e-3
    };
    assert!((1..5).all(close), "{again}");
    let streamed = with(body(json!(PROMPT), 3), "stream", json!(true));
    let events = endpoint.events("/v1/completions", streamed).await;
    let shown: String =
        events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(shown, text[..offsets[8]]);
    let plain = json!({ "model": "glass", "prompt": PROMPT, "max_tokens": 0, "echo": true });
    let (_, plain) = endpoint.post("/v1/completions", plain).await;
    assert_eq!(
        (&plain["choices"][0]["text"], &plain["choices"][0]["logprobs"]),
        (&json!(PROMPT), &Value::Null)
    );
    endpoint.stop().await;
}

#[tokio::test]
async fn clients_learn_how_prompts_are_made() {
    let endpoint = Endpoint::new(runtime()).await;
    let (status, text) = endpoint.get("/tokenizer_info").await;
    let info: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &info["vocab_size"]), (200, &json!(1024)), "{info}");
    assert!(info["eos_token"].is_string(), "{info}");
    let asked = json!({ "prompt": PROMPT, "add_special_tokens": false });
    let (_, tokens) = endpoint.post("/tokenize", asked).await;
    assert_eq!(tokens["tokens"], json!(PROMPT_TOKENS));
    let (_, text) = endpoint.post("/detokenize", json!({ "tokens": PROMPT_TOKENS })).await;
    assert_eq!((&text["prompt"], &text["content"]), (&json!(PROMPT), &json!(PROMPT)));
    let chat = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
    let (_, prompt) = endpoint.post("/apply-template", chat).await;
    assert_eq!(prompt["prompt"], "User: Hi\nAssistant:");
    let (_, text) = endpoint.get("/props").await;
    let props: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(props["effective"]["context_tokens"], 128, "{props}");
    assert_eq!(text.matches("\"effective\"").count(), 1, "{text}");
    assert_eq!(props["defaults"]["temperature"], 1.0);
    endpoint.stop().await;
}

#[tokio::test]
async fn embeddings_and_tokens() {
    let endpoint = Endpoint::new(runtime()).await;
    let body = json!({ "model": "glass", "input": ["The Queen", PROMPT] });
    let (status, answer) = endpoint.post("/v1/embeddings", body.clone()).await;
    assert_eq!(status, 200, "{answer}");
    let values = answer["data"][1]["embedding"].as_array().expect("numbers");
    let length: f64 = values.iter().map(|v| v.as_f64().unwrap().powi(2)).sum();
    assert!((length - 1.0).abs() < 1e-3, "{length}");
    // A text and its tokens are the same, and the path is found without its version.
    let mixed = json!({ "input": ["The Queen", PROMPT_TOKENS] });
    let (_, mixed) = endpoint.post("/embeddings", mixed).await;
    let again = mixed["data"][1]["embedding"].as_array().expect("numbers");
    let near = |(a, b): (&Value, &Value)| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-3;
    assert!(again.iter().zip(values).all(near), "{mixed}");
    let (_, packed) =
        endpoint.post("/v1/embeddings", with(body, "encoding_format", json!("base64"))).await;
    let text = packed["data"][1]["embedding"].as_str().expect("text");
    assert_eq!(text.len(), (values.len() * 4).div_ceil(3) * 4);
    assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 5);

    let (_, tokens) =
        endpoint.post("/tokenize", json!({ "content": PROMPT, "add_special": true })).await;
    assert_eq!(tokens, json!({ "count": 5, "tokens": [494, 160, 729, 633, 111] }));
    endpoint.stop().await;
}

#[tokio::test]
async fn wrong_requests_get_errors_in_openais_shape() {
    let endpoint = Endpoint::new(runtime()).await;
    let mut found = Vec::new();
    let mut note = |what: &str, (status, body): (u16, Value)| {
        let error = &body["error"];
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
        assert!(error["type"].is_string(), "{body}");
        found.push(format!("{what}: {status} {} {}", error["code"], error["param"]));
    };
    let path = "/v1/completions";
    note("no JSON", endpoint.post_text(path, "{\"prompt\": ".to_owned()).await);
    note("no object", endpoint.post_text(path, "[]".to_owned()).await);
    note("too large", endpoint.post_text(path, " ".repeat((16 << 20) + 1)).await);
    for (name, value) in [
        ("model", json!("gpt-4")),
        ("model", json!(5)),
        ("prompt", json!({})),
        ("prompt", json!("x ".repeat(300))),
        ("max_tokens", json!(124)),
        ("max_tokens", json!(-1)),
        ("temperature", json!("hot")),
        ("temperature", json!(-1)),
        ("n", json!(0)),
        ("n", json!(17)),
        ("stop", json!([1])),
        ("logit_bias", json!({ "x": 1 })),
        ("logprobs", json!(50)),
        ("best_of", json!(3)),
        ("response_format", json!({ "type": "yaml" })),
        ("response_format", json!({ "type": "json_schema", "json_schema": {} })),
        ("regex", json!("(")),
        ("grammar", json!("root = 5")),
        ("stream_options", json!({ "include_usage": true })),
        ("colour", json!("red")),
    ] {
        let what = format!("{name}={}", value.to_string().chars().take(20).collect::<String>());
        note(&what, endpoint.post(path, with(completion(4), name, value)).await);
    }
    let path = "/v1/chat/completions";
    for (what, messages) in [
        ("missing", Value::Null),
        ("empty", json!([])),
        ("role", json!([{ "role": "wizard", "content": "x" }])),
        ("tool", json!([{ "role": "tool", "content": "x" }])),
        ("calls", json!([{ "role": "assistant", "tool_calls": [{ "id": "x" }] }])),
        ("image", json!([{ "role": "user", "content": [{ "type": "image_url" }] }])),
        ("content", json!([{ "role": "user", "content": 5 }])),
    ] {
        note(what, endpoint.post(path, json!({ "messages": messages })).await);
    }
    note("path", endpoint.post("/v1/nothing", json!({})).await);
    note("method", endpoint.post("/v1/models", json!({})).await);
    insta::assert_snapshot!(found.join("\n"));
    let (status, _) = endpoint.post("/v1/completions", completion(2)).await;
    assert_eq!(status, 200);
    endpoint.stop().await;
}

/// What the document names is looked at: a value that suits nothing is refused as such, and not as
/// unknown.
#[tokio::test]
async fn what_the_document_names_is_taken() {
    let options = ServerOptions { changes_adapters: true, ..ServerOptions::default() };
    let endpoint = Endpoint::with_options(options).await;
    endpoint.load(model(RuntimeConfig { threads: 1, ..runtime() })).await;
    let (_, document) = endpoint.get("/openapi.json").await;
    let document: Value = serde_json::from_str(&document).unwrap();
    let mut checked = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let schema = &methods["post"]["requestBody"]["content"]["application/json"]["schema"];
        let Some(pointer) = schema["$ref"].as_str() else { continue };
        let schema = document.pointer(pointer.trim_start_matches('#')).expect("a schema");
        for name in schema["properties"].as_object().unwrap().keys() {
            let mut body = match path.as_str() {
                "/v1/chat/completions" | "/apply-template" => {
                    json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 1 })
                }
                "/v1/completions" => json!({ "prompt": "x", "max_tokens": 1 }),
                "/v1/responses" => json!({ "input": "x", "max_output_tokens": 1 }),
                "/v1/embeddings" => json!({ "input": "x" }),
                "/v1/feedback" => json!({ "response_id": "x", "value": 1 }),
                "/lora-adapters" => json!({ "path": "/nowhere" }),
                "/tokenize" => json!({ "content": "x" }),
                "/detokenize" => json!({ "tokens": [1] }),
                other => panic!("{other} is new here"),
            };
            if path == "/apply-template" {
                body.as_object_mut().unwrap().remove("max_tokens");
            }
            body[name] = json!([[{}]]);
            let (status, answer) = endpoint.post(path, body).await;
            let code = &answer["error"]["code"];
            let taken = status == 200 || (status == 400 && *code == "invalid_value");
            assert!(taken, "{path} {name}: {answer}");
            checked += 1;
        }
    }
    assert!(checked > 100, "{checked}");
    endpoint.stop().await;
}

#[tokio::test]
async fn only_pages_of_this_machine_may_call() {
    let endpoint = Endpoint::new(runtime()).await;
    let check = async |origin: &str, wanted: u16| {
        let request = endpoint.client.get(format!("{}/v1/models", endpoint.url));
        let response = request.header("origin", origin).send().await.expect("an answer");
        assert_eq!(response.status().as_u16(), wanted, "{origin}");
        let allowed = response.headers().get("access-control-allow-origin");
        assert_eq!(allowed.is_some(), wanted == 200, "{origin}");
    };
    check("http://localhost:3000", 200).await;
    check("http://127.0.0.1", 200).await;
    check("http://[::1]:8080", 200).await;
    check("https://evil.example", 403).await;
    check("http://localhost.evil.example", 403).await;
    check("null", 403).await;
    // The endpoint's own page, asked for by an address and not by a name.
    for (host, wanted) in [("192.0.2.7:8480", 200), ("rebound.example:8480", 403)] {
        let request = endpoint.client.get(format!("{}/v1/models", endpoint.url));
        let request = request.header("host", host).header("origin", format!("http://{host}"));
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status().as_u16(), wanted, "{host}");
    }
    endpoint.stop().await;
}

#[tokio::test]
async fn keys_say_who_may_ask_and_how_much() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let limits = |concurrent, per_minute| KeyLimits { concurrent, per_minute };
    let till = Keys::create(&file, "till", limits(Some(1), None)).unwrap();
    let kiosk = Keys::create(&file, "kiosk", limits(None, Some(2))).unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(!text.contains(&till) && !text.contains(&kiosk), "{text}");
    let keys = Some(Arc::new(Keys::open(&file).unwrap()));
    let endpoint = Endpoint::with_options(ServerOptions { keys, ..Default::default() }).await;
    endpoint.load(model(runtime())).await;
    let ask = async |key: &str, body: Value| {
        let request = endpoint.client.post(format!("{}/v1/completions", endpoint.url));
        request.bearer_auth(key).body(body.to_string()).send().await.expect("an answer")
    };
    assert_eq!(endpoint.get("/health").await.0, 200);
    for path in ["/v1/models", "/metrics", "/props"] {
        let (status, text) = endpoint.get(path).await;
        assert_eq!(status, 401, "{path}");
        assert!(text.contains("invalid_api_key") && text.contains("hint: "), "{text}");
    }
    assert_eq!(ask("slm-of-somebody-else", completion(1)).await.status(), 401);
    assert_eq!(ask(&till, completion(1)).await.status(), 200);

    // One at a time: the second is turned away until the first was read to its end.
    let streamed = with(completion(120), "stream", json!(true));
    let mut first = ask(&till, streamed).await;
    assert_eq!(first.status(), 200);
    first.chunk().await.unwrap();
    let second = ask(&till, completion(1)).await;
    assert_eq!(
        (second.status().as_u16(), &second.headers()["retry-after"]),
        (429, &"1".parse().unwrap())
    );
    while first.chunk().await.unwrap().is_some() {}
    assert_eq!(ask(&till, completion(1)).await.status(), 200);

    // Two a minute, others undisturbed.
    for wanted in [200, 200, 429] {
        assert_eq!(ask(&kiosk, completion(1)).await.status(), wanted);
    }
    let refused = ask(&kiosk, completion(1)).await;
    let seconds: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=31).contains(&seconds), "{seconds}");
    assert_eq!(ask(&till, completion(1)).await.status(), 200);

    // A key that is replaced is worth nothing, within a second.
    let next = Keys::create(&file, "till", KeyLimits::default()).unwrap();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(ask(&next, completion(1)).await.status(), 200);
    assert_eq!(ask(&till, completion(1)).await.status(), 401);
    // A file that is no list of keys any more changes nothing; at the start it is refused.
    std::fs::write(&file, "[[key]]\nname = 5\n").unwrap();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(ask(&next, completion(1)).await.status(), 200);
    let error = Keys::open(&file).unwrap_err().to_string();
    assert!(error.contains("keys.toml") && error.contains("hint: "), "{error}");
    endpoint.stop().await;
}

#[tokio::test]
async fn metrics_count_and_tell_no_text() {
    let endpoint = Endpoint::new(runtime()).await;
    endpoint.post("/v1/completions", completion(8)).await;
    endpoint.post("/v1/completions", completion(500)).await;
    let (status, text) = endpoint.get("/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "slmops_requests_total{outcome=\"answered\"} 1",
        "slmops_requests_total{outcome=\"refused\"} 1",
        "slmops_http_requests_total{endpoint=\"/v1/completions\",status=\"400\"} 1",
        "slmops_generated_tokens_total 8",
        "slmops_prompt_tokens_total 5",
        "gen_ai_server_time_to_first_token_seconds_count{gen_ai_operation_name=\"text_completion\",gen_ai_provider_name=\"slmops\",gen_ai_system=\"slmops\",gen_ai_request_model=\"glass\"} 1",
        "gen_ai_client_token_usage_sum{gen_ai_operation_name=\"text_completion\",gen_ai_provider_name=\"slmops\",gen_ai_system=\"slmops\",gen_ai_request_model=\"glass\",gen_ai_token_type=\"output\"} 8",
        "slmops_requests_running 0",
        "slmops_requests_waiting 0",
        "slmops_model_ready 1",
        "slmops_slots 2",
    ] {
        assert!(text.lines().any(|found| found == line), "`{line}` is not in:\n{text}");
    }
    assert!(!text.contains("Alice"));
    let telemetry = endpoint.host.telemetry();
    assert_eq!((telemetry.requests, telemetry.generated_tokens), (1, 8));
    assert!(telemetry.worker_memory_bytes > 0 && telemetry.time_to_first_token_ms > 0.0);
    endpoint.stop().await;
}

#[tokio::test]
async fn a_loading_endpoint_says_so() {
    let endpoint = Endpoint::empty().await;
    let (status, text) = endpoint.get("/health").await;
    assert_eq!(status, 503);
    assert!(text.contains("no model is loaded yet"), "{text}");
    let (status, body) = endpoint.post("/v1/completions", completion(1)).await;
    assert_eq!((status, &body["error"]["code"]), (503, &json!("model_not_loaded")));
    let staged = endpoint.host.stage(model(runtime())).await.expect("it loads");
    assert_eq!(endpoint.get("/health").await.0, 503, "staged is not serving");
    endpoint.host.activate(staged);
    assert_eq!(endpoint.get("/health").await.0, 200);
    let (_, models) = endpoint.get("/v1/models").await;
    assert!(models.contains("\"id\":\"glass\""), "{models}");
    assert_eq!(endpoint.get("/v1/models/glass").await.0, 200);
    assert_eq!(endpoint.get("/v1/models/other").await.0, 404);
    endpoint.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_worker_is_back_and_its_requests_get_an_error() {
    let endpoint = Arc::new(Endpoint::new(runtime()).await);
    let mut events = endpoint.host.events();
    // Streams under way when the worker dies.
    let body = with(completion(120), "stream", json!(true));
    let mut streams = Vec::new();
    for _ in 0..2 {
        let url = format!("{}/v1/completions", endpoint.url);
        let request = endpoint.client.post(url).body(body.to_string());
        streams.push(request.send().await.expect("begins"));
    }
    let killed = Instant::now();
    endpoint.signal_worker(rustix::process::Signal::KILL);
    for stream in streams {
        let events = events_of(&stream.text().await.expect("it ends"));
        let last = events.last().expect("an event");
        // It may have finished before the signal.
        if last != "[DONE]" {
            assert_eq!(last["error"]["code"], "worker_died", "{last}");
        }
    }
    // A request that comes meanwhile waits, and is answered.
    let (status, body) = endpoint.post("/v1/completions", completion(20)).await;
    assert!(status == 200 || body["error"]["code"] == "worker_died", "{body}");
    assert!(killed.elapsed() < Duration::from_secs(30));
    let crashed = events.recv().await.expect("an event");
    assert!(matches!(crashed, HostEvent::Crashed { .. }), "{crashed:?}");
    let restarted = events.recv().await.expect("an event");
    assert!(matches!(restarted, HostEvent::Restarted { .. }), "{restarted:?}");
    let (status, body) = endpoint.post("/v1/completions", completion(20)).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(endpoint.host.telemetry().worker_crashes, 1);
    Arc::into_inner(endpoint).expect("the last one").stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swap_under_load_drops_nothing() {
    let endpoint = Arc::new(Endpoint::new(runtime()).await);
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|client| {
            let (endpoint, over) = (Arc::clone(&endpoint), Arc::clone(&over));
            tokio::spawn(async move {
                let mut answers = 0;
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    if client % 2 == 0 {
                        let (status, body) = endpoint.post("/v1/completions", completion(6)).await;
                        assert_eq!(status, 200, "{body}");
                    } else {
                        let body = with(completion(6), "stream", json!(true));
                        let events = endpoint.events("/v1/completions", body).await;
                        assert!(events.iter().all(|event| event.get("error").is_none()));
                        assert_eq!(events.last(), Some(&json!("[DONE]")));
                    }
                    answers += 1;
                }
                answers
            })
        })
        .collect();
    for _ in 0..3 {
        let (_, old) = endpoint.host.current().expect("it serves");
        let (old_pid, old_ended) = (old.pid(), old.ended());
        drop(old);
        let staged = endpoint.host.stage(model(runtime())).await.expect("it loads");
        assert_ne!(staged.worker().pid(), old_pid);
        endpoint.host.activate(staged).await.expect("the old one leaves");
        assert!(old_ended.await.expected);
    }
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    for client in clients {
        assert!(client.await.expect("no request failed") > 0);
    }
    assert_eq!(endpoint.host.telemetry().worker_crashes, 0);
    Arc::into_inner(endpoint).expect("the last one").stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_sequence() {
    let one = RuntimeConfig { parallel: 1, batch_tokens: 128, queue_limit: 1, ..runtime() };
    let endpoint = Endpoint::new(one).await;
    let body = with(completion(120), "stream", json!(true));
    let url = format!("{}/v1/completions", endpoint.url);
    let mut first = endpoint.client.post(&url).body(body.to_string()).send().await.expect("begins");
    first.chunk().await.expect("a chunk");
    drop(first);
    let (status, body) = endpoint.post("/v1/completions", completion(4)).await;
    assert_eq!(status, 200, "{body}");
    let (_, worker) = endpoint.host.current().expect("it serves");
    assert_eq!(worker.requests(), 0);
    drop(worker);
    endpoint.stop().await;
}

#[tokio::test]
async fn serve_ends_with_the_reason_when_the_model_does_not_load() {
    set_up();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let spec = model(RuntimeConfig { context_tokens: 4096, ..runtime() });
    let served = serve(
        listener,
        spec,
        ServerOptions::default(),
        |_| panic!("it cannot be ready"),
        std::future::pending(),
    )
    .await;
    assert!(matches!(served, Err(ServeError::Model(_))), "{served:?}");
}

#[tokio::test]
async fn answers_are_called_good_or_bad_once_each() {
    let endpoint = Endpoint::new(runtime()).await;
    let (_, answer) = endpoint.post("/v1/completions", completion(8)).await;
    let id = answer["id"].as_str().expect("an id").to_owned();
    let chunks =
        endpoint.events("/v1/completions", with(completion(4), "stream", json!(true))).await;
    let streamed = chunks[0]["id"].as_str().expect("an id").to_owned();
    let feedback = async |id: &str, value: Value| {
        endpoint.post("/v1/feedback", json!({ "response_id": id, "value": value })).await
    };
    assert_eq!(feedback(&id, json!(1)).await, (200, json!({ "counted": true })));
    assert_eq!(feedback(&id, json!(-1)).await, (200, json!({ "counted": false })));
    assert_eq!(feedback(&streamed, json!(-1)).await, (200, json!({ "counted": true })));
    assert_eq!(feedback("cmpl-0", json!(1)).await, (200, json!({ "counted": false })));
    for wrong in [json!(0), json!(2), json!("1"), json!(1.5), Value::Null] {
        assert_eq!(feedback(&id, wrong.clone()).await.0, 400, "{wrong}");
    }
    let (status, error) = endpoint.post("/v1/feedback", json!({ "value": 1 })).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("response_id")));
    let (status, _) = endpoint
        .post("/v1/feedback", json!({ "response_id": id, "value": 1, "comment": "private" }))
        .await;
    assert_eq!(status, 400, "text has no place here");
    let counts = endpoint.host.evidence();
    assert_eq!((counts.answered, counts.thumbs_up, counts.thumbs_down), (2, 1, 1));
    // One token in eight, from the first; the vocabulary bounds what there is to be unsure of.
    assert!((2..=4).contains(&counts.entropy_tokens), "{counts:?}");
    assert!(counts.entropy_nats > 0.0 && counts.entropy_nats < 4.0 * 12.0, "{counts:?}");
    // What is said of the model before is not about this one.
    let (_, answer) = endpoint.post("/v1/completions", completion(4)).await;
    let staged = endpoint.host.stage(model(runtime())).await.expect("it loads");
    endpoint.host.activate(staged);
    let id = answer["id"].as_str().expect("an id");
    assert_eq!(feedback(id, json!(1)).await, (200, json!({ "counted": false })));
    endpoint.stop().await;
}

#[tokio::test]
async fn ends_are_ignored_and_caches_left_out_on_demand() {
    let endpoint = Endpoint::new(RuntimeConfig { threads: 1, ..runtime() }).await;
    let ask = async |body: Value| {
        let (status, body) = endpoint.post("/v1/completions", body).await;
        assert_eq!(status, 200, "{body}");
        body
    };
    // Token 3 is the tiny model's end.
    let ending = with(completion(9), "logit_bias", json!({ "3": 100 }));
    let answer = ask(ending.clone()).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
    let answer = ask(with(ending.clone(), "ignore_eos", json!(true))).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "length", "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 9);
    let both = with(with(ending, "ignore_eos", json!(true)), "regex", json!("[a-z]{3}"));
    let (status, body) = endpoint.post("/v1/completions", both).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("ignore_eos")));

    let cached = |answer: &Value| {
        let timings = &answer["timings"];
        assert_eq!(timings["cache_n"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]);
        assert_eq!(timings["prompt_n"].as_u64().unwrap() + timings["cache_n"].as_u64().unwrap(), 5);
        assert!(timings["predicted_per_second"].as_f64().unwrap() > 0.0, "{timings}");
        timings["cache_n"].as_u64().unwrap()
    };
    ask(completion(4)).await;
    let again = ask(completion(4)).await;
    assert_eq!(cached(&again), 4);
    let anew = ask(with(completion(4), "cache_prompt", json!(false))).await;
    assert_eq!(cached(&anew), 0);
    assert_eq!(anew["choices"], again["choices"]);
    let streamed = with(completion(4), "stream", json!(true));
    let events = endpoint.events("/v1/completions", streamed).await;
    assert_eq!(cached_of(&events), Some(4), "{events:?}");
    endpoint.stop().await;
}

fn cached_of(events: &[Value]) -> Option<u64> {
    events.iter().find_map(|event| event["timings"]["cache_n"].as_u64())
}

/// A long prompt and a long answer of the real model: comments come while nothing else does, and who
/// leaves frees the sequence, streamed or not.
#[tokio::test]
async fn long_requests_are_kept_alive_and_freed() {
    let Some(model_path) = crate::support::smollm2() else { return };
    let keep_alive = Duration::from_millis(5);
    let endpoint = Endpoint::with_options(ServerOptions { keep_alive, ..Default::default() }).await;
    let runtime = RuntimeConfig { threads: 1, parallel: 1, ..RuntimeConfig::default() };
    let worker = WorkerSpec::new(model_path, runtime);
    endpoint.load(ModelSpec { id: "smol".to_owned(), aliases: vec![], worker }).await;
    let url = format!("{}/v1/completions", endpoint.url);
    let body = json!({
        "prompt": "the queen said to the king that ".repeat(60),
        "max_tokens": 2, "stream": true,
    });
    let response = endpoint.client.post(&url).body(body.to_string()).send().await.expect("begins");
    let text = response.text().await.expect("text");
    assert!(text.starts_with(": keep-alive\n\n"), "{text}");
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    for stream in [true, false] {
        let body = json!({
            "prompt": "Once", "max_tokens": 2000, "ignore_eos": true, "stream": stream,
        });
        let request = endpoint.client.post(&url).body(body.to_string()).send();
        let (_, worker) = endpoint.host.current().expect("it serves");
        let left = tokio::spawn(request);
        let until = |busy: bool| {
            let worker = worker.clone();
            async move {
                while (worker.requests() > 0) != busy {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        };
        let limit = Duration::from_secs(10);
        tokio::time::timeout(limit, until(true)).await.expect("it begins");
        if stream {
            // The answer is here; who asked reads no more of it.
            drop(left.await.expect("joined").expect("an answer"));
        } else {
            left.abort();
        }
        tokio::time::timeout(limit, until(false)).await.expect("it is free at once");
    }
    endpoint.stop().await;
}
