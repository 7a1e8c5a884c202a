//! Answers that are held to a shape.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::host::ModelSpec;
use slmops_inference::worker::WorkerSpec;

use crate::server::{Endpoint, completion, with};
use crate::support::{runtime, set_up, smollm2};

const PATH: &str = "/v1/completions";

fn text(body: &Value) -> &str {
    body["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("no text in {body}"))
}

/// These tests do not measure: a second thread would only wait for cores that others have.
fn one_thread() -> RuntimeConfig {
    RuntimeConfig { threads: 1, ..runtime() }
}

fn schema(schema: Value) -> Value {
    json!({ "type": "json_schema", "json_schema": { "name": "x", "strict": true, "schema": schema } })
}

/// The tiny model spells no quotation marks: numbers are its JSON.
fn numbers() -> Value {
    schema(json!({ "type": "array", "items": { "type": "integer", "minimum": 10, "maximum": 99 },
        "minItems": 2, "maxItems": 3 }))
}

#[tokio::test]
async fn answers_have_the_shape_that_was_asked() {
    let endpoint = Endpoint::new(one_thread()).await;
    let ask = async |name: &str, value: Value, max_tokens: u32| {
        let (status, body) = endpoint.post(PATH, with(completion(max_tokens), name, value)).await;
        assert_eq!(status, 200, "{body}");
        (text(&body).to_owned(), body["choices"][0]["finish_reason"].as_str().unwrap().to_owned())
    };
    let (answer, reason) = ask("regex", json!("[0-9]{3}-(yes|no)"), 40).await;
    assert!(answer.len() >= 6 && answer.as_bytes()[3] == b'-', "{answer}");
    assert!(answer.ends_with("yes") || answer.ends_with("no"), "{answer}");
    assert_eq!(reason, "stop");
    let (answer, reason) = ask("response_format", numbers(), 60).await;
    let parsed: Vec<u32> = serde_json::from_str(&answer).expect("JSON");
    assert!((2..=3).contains(&parsed.len()) && parsed.iter().all(|n| (10..=99).contains(n)));
    assert_eq!(reason, "stop");
    let (answer, reason) =
        ask("grammar", json!("root ::= \"(\" root \")\" | [0-9] [0-9] \"!\""), 80).await;
    let inside = answer.trim_start_matches('(').trim_end_matches(')');
    assert!(inside.len() == 3 && inside.ends_with('!'), "{answer}");
    assert_eq!(reason, "stop");
    let (answer, _) = ask("response_format", json!({ "type": "json_object" }), 100).await;
    assert_eq!(serde_json::from_str::<Value>(&answer).expect("JSON"), json!({}));
    // What is cut off says so.
    let (answer, reason) = ask("regex", json!("[0-9]{40}"), 5).await;
    assert!(answer.len() >= 5 && answer.bytes().all(|byte| byte.is_ascii_digit()), "{answer}");
    assert_eq!(reason, "length");
    // Text asks for nothing.
    let (answer, _) = ask("response_format", json!({ "type": "text" }), 20).await;
    let (_, free) = endpoint.post(PATH, completion(20)).await;
    assert_eq!(answer, text(&free));
    endpoint.stop().await;
}

#[tokio::test]
async fn a_shape_goes_with_everything_else() {
    let endpoint = Endpoint::new(one_thread()).await;
    let base = json!({
        "prompt": "Alice was", "regex": "([a-z]{2,9} ){3}[.]", "max_tokens": 60, "seed": 5, "n": 3,
        "logprobs": 2, "top_p": 0.9, "temperature": 1.2,
    });
    let (status, first) = endpoint.post(PATH, base.clone()).await;
    assert_eq!(status, 200, "{first}");
    let texts = |body: &Value| -> Vec<String> {
        let choices = body["choices"].as_array().expect("choices");
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    for text in texts(&first) {
        assert!(text.ends_with(" .") && text.split(' ').count() == 4, "{text}");
    }
    let tokens = first["choices"][0]["logprobs"]["tokens"].as_array().expect("tokens");
    let joined: String = tokens.iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(joined, texts(&first)[0]);
    let (_, second) = endpoint.post(PATH, base.clone()).await;
    assert_eq!(texts(&first), texts(&second));
    assert_ne!(texts(&first)[0], texts(&first)[1]);
    let events = endpoint.events(PATH, with(base.clone(), "stream", json!(true))).await;
    let mut streamed = vec![String::new(); 3];
    for event in &events {
        if let Some(text) = event["choices"][0]["text"].as_str() {
            streamed[event["choices"][0]["index"].as_u64().unwrap() as usize].push_str(text);
        }
    }
    assert_eq!(streamed, texts(&first));
    let (_, stopped) = endpoint.post(PATH, with(base, "stop", json!(" "))).await;
    for (text, whole) in texts(&stopped).iter().zip(texts(&first)) {
        assert_eq!(*text, whole.split(' ').next().unwrap());
    }
    endpoint.stop().await;
}

#[tokio::test]
async fn shapes_that_cannot_be_are_refused_by_name() {
    let endpoint = Endpoint::new(one_thread()).await;
    let check = async |name: &str, value: Value, wanted: &str| {
        let (status, body) = endpoint.post(PATH, with(completion(4), name, value)).await;
        assert_eq!((status, &body["error"]["param"]), (400, &json!(name)), "{body}");
        let message = body["error"]["message"].as_str().expect("a message");
        assert!(message.contains(wanted), "`{wanted}` is not in: {message}");
        assert!(message.len() < 600, "{message}");
    };
    check("response_format", schema(json!({ "type": "colour" })), "colour").await;
    check("response_format", schema(json!({ "oneOf": [{}, {}] })), "oneOf").await;
    check("response_format", schema(json!({ "type": "string" })), "no tokens that spell").await;
    check("regex", json!("(a"), "regex").await;
    check("grammar", json!("root ::= nothing"), "used and not defined").await;
    let both = with(with(completion(4), "regex", json!("a")), "grammar", json!("root ::= \"a\""));
    let (status, body) = endpoint.post(PATH, both).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("grammar")), "{body}");
    endpoint.stop().await;
}

/// Constraints that would take for ever, or all memory, are refused while others get their answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bombs_hurt_nobody() {
    let endpoint = Endpoint::new(one_thread()).await;
    let (_, worker) = endpoint.host.current().expect("it serves");
    let pid = worker.pid();
    drop(worker);
    let options: Vec<Value> = (0..12)
        .map(|n| json!({ "properties": { format!("p{n}"): { "type": "integer", "minimum": n } } }))
        .collect();
    let products: Vec<Value> = (0..12).map(|_| json!({ "anyOf": options })).collect();
    let mut nested = json!({ "type": "integer" });
    for _ in 0..55 {
        nested = json!({ "type": "object", "properties": { "x": nested } });
    }
    let mut doubled = serde_json::Map::new();
    for n in 0..40 {
        let next = json!({ "$ref": format!("#/$defs/d{}", n + 1) });
        doubled.insert(format!("d{n}"), json!({ "allOf": [next, next], "anyOf": [next, next] }));
    }
    doubled.insert("d40".to_owned(), json!({ "type": "integer" }));
    let grammars = format!("root ::= {} | \"a\" root", "(\"a\"? ".repeat(10) + &")*".repeat(10));
    let bombs = [
        ("response_format", schema(json!({ "allOf": products }))),
        ("response_format", schema(nested)),
        ("response_format", schema(json!({ "$ref": "#/$defs/d0", "$defs": doubled }))),
        ("response_format", schema(json!({ "$ref": "#" }))),
        (
            "response_format",
            schema(json!({ "type": "string", "pattern": "((a{1,900}){1,900}){1,900}" })),
        ),
        ("response_format", schema(json!({ "type": "array", "minItems": 100_000_000 }))),
        ("response_format", schema(json!({ "type": "string", "minLength": 4_000_000_000_u32 }))),
        ("regex", json!("((((a{1,900}){1,900}){1,900}){1,900}b?){900}c")),
        ("regex", json!("(.*a.{400}b.*)&(.*c.{300}d.*)|(x?){500}y{500}")),
        ("regex", json!("(".repeat(20_000) + &")".repeat(20_000))),
        ("grammar", json!("root ::= ((([a-z]{1,9999}){1,9999}){1,9999}){1,9999}")),
        (
            "grammar",
            json!(
                "root ::= a a a a | root\n".to_owned()
                    + &(0..20)
                        .map(|n| {
                            let (this, next) = (["a".repeat(n + 1)], "a".repeat(n + 2));
                            format!("{} ::= {next} {next} {next} {next}\n", this[0])
                        })
                        .collect::<String>()
                    + &"a".repeat(21)
                    + " ::= [a-z]\n"
            ),
        ),
        ("grammar", json!(grammars)),
        ("grammar", json!("root ::= root root | \"a\"")),
    ];
    for (index, (name, bomb)) in bombs.into_iter().enumerate() {
        let began = Instant::now();
        let (status, body) = endpoint.post(PATH, with(completion(3), name, bomb)).await;
        let took = began.elapsed();
        assert!(took < Duration::from_secs(15), "bomb {index} took {took:?}");
        // Some are harmless after all; what is refused is so by name.
        assert!(
            status == 200 || (status == 400 && body["error"]["param"] == name),
            "bomb {index}: {body}"
        );
        eprintln!("bomb {index}: {status} in {took:?}: {}", body["error"]["message"]);
        let (status, body) = endpoint.post(PATH, completion(3)).await;
        assert_eq!(status, 200, "after bomb {index}: {body}");
    }
    let (_, worker) = endpoint.host.current().expect("it serves");
    assert_eq!(worker.pid(), pid, "the worker lives");
    let resident = worker.memory().peak_bytes;
    assert!(resident < 600 << 20, "{resident}");
    drop(worker);
    endpoint.stop().await;
}

/// A real vocabulary, with parts of characters and many tokens that begin alike.
#[tokio::test]
async fn a_real_model_answers_in_json() {
    let Some(model_path) = smollm2() else { return };
    set_up();
    let runtime = RuntimeConfig { context_tokens: 512, threads: 1, ..RuntimeConfig::default() };
    let worker = WorkerSpec::new(model_path, runtime);
    let spec = ModelSpec { id: "smol".to_owned(), aliases: Vec::new(), worker };
    let endpoint = Endpoint::serving(spec).await;
    let wanted = json!({
        "type": "object",
        "properties": {
            "city": { "type": "string", "maxLength": 20 },
            "kind": { "enum": ["café", "museum"] },
            "stars": { "type": "integer", "minimum": 1, "maximum": 5 },
        },
        "required": ["city", "kind", "stars"],
        "additionalProperties": false,
    });
    for seed in 0..2 {
        let body = json!({
            "messages": [{ "role": "user", "content": "Name a place to visit in Paris." }],
            "response_format": schema(wanted.clone()),
            "seed": seed,
            "max_tokens": 100,
        });
        let (status, answer) = endpoint.post("/v1/chat/completions", body).await;
        assert_eq!(status, 200, "{answer}");
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{answer}");
        let content = choice["message"]["content"].as_str().expect("text");
        let place: Value = serde_json::from_str(content).expect("JSON");
        assert!(["café", "museum"].contains(&place["kind"].as_str().unwrap()), "{place}");
        assert!((1..=5).contains(&place["stars"].as_i64().unwrap()), "{place}");
        assert_eq!(place.as_object().unwrap().len(), 3);
    }
    // Recursion, each character a symbol: the slowest way.
    let grammar = "root ::= item (\", \" item)*\nitem ::= \"(\" item \")\" | [a-zA-Z]+";
    let began = Instant::now();
    let body = json!({ "prompt": "Some animals: ", "grammar": grammar, "max_tokens": 12 });
    let (status, answer) = endpoint.post(PATH, body).await;
    assert_eq!(status, 200, "{answer}");
    let letters = |letter: char| letter.is_ascii_alphabetic() || ", ()".contains(letter);
    assert!(text(&answer).chars().all(letters), "{answer}");
    assert!(began.elapsed() < Duration::from_secs(60));
    endpoint.stop().await;
}
