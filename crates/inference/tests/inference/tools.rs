//! Calls of tools, as an OpenAI client sees them.

use serde_json::{Value, json};
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::host::ModelSpec;
use slmops_inference::worker::WorkerSpec;

use crate::server::{Endpoint, with};
use crate::support::{runtime, set_up, smollm2};

const PATH: &str = "/v1/chat/completions";

fn weather() -> Value {
    json!({ "type": "function", "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": { "enum": ["Berlin", "Paris"] },
                "days": { "type": "integer", "minimum": 1, "maximum": 7 },
            },
            "required": ["city", "days"],
            "additionalProperties": false,
        },
    } })
}

fn clock() -> Value {
    json!({ "type": "function", "function": { "name": "clock" } })
}

async fn real() -> Option<Endpoint> {
    let model_path = smollm2()?;
    set_up();
    let runtime = RuntimeConfig { context_tokens: 1024, threads: 1, ..RuntimeConfig::default() };
    let worker = WorkerSpec::new(model_path, runtime);
    Some(Endpoint::serving(ModelSpec { id: "smol".to_owned(), aliases: vec![], worker }).await)
}

fn ask(choice: Value) -> Value {
    json!({
        "messages": [{ "role": "user", "content": "What will the weather be in Paris?" }],
        "tools": [weather(), clock()],
        "tool_choice": choice,
        "temperature": 0,
        "max_tokens": 80,
    })
}

#[tokio::test]
async fn a_required_call_comes_well_formed_whole_and_streamed() {
    let Some(endpoint) = real().await else { return };
    let named = json!({ "type": "function", "function": { "name": "weather" } });
    let body = with(ask(named), "parallel_tool_calls", json!(false));
    let (status, whole) = endpoint.post(PATH, body.clone()).await;
    assert_eq!(status, 200, "{whole}");
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("weather")));
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")), "{call}");
    let arguments = call["function"]["arguments"].as_str().expect("text");
    let parsed: Value = serde_json::from_str(arguments).expect("JSON");
    assert!(["Berlin", "Paris"].contains(&parsed["city"].as_str().unwrap()), "{parsed}");
    assert!((1..=7).contains(&parsed["days"].as_i64().unwrap()), "{parsed}");

    let events = endpoint.events(PATH, with(body, "stream", json!(true))).await;
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    assert_eq!((&deltas[0]["role"], &deltas[0]["content"]), (&json!("assistant"), &Value::Null));
    let calls: Vec<&Value> =
        deltas.iter().filter_map(|delta| delta.get("tool_calls")).map(|calls| &calls[0]).collect();
    assert_eq!(calls[0]["function"], json!({ "name": "weather", "arguments": "" }));
    assert_eq!((&calls[0]["index"], &calls[0]["type"]), (&json!(0), &json!("function")));
    assert!(calls[1..].iter().all(|call| call.get("id").is_none() && call["index"] == 0));
    let streamed: String =
        calls.iter().filter_map(|call| call["function"]["arguments"].as_str()).collect();
    assert_eq!(streamed, arguments);
    let [.., end, done] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(end["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(done, "[DONE]");

    // The call and its result go back into the history.
    let body = json!({
        "messages": [
            { "role": "user", "content": "What will the weather be in Paris?" },
            choice["message"],
            { "role": "tool", "tool_call_id": call["id"], "content": "It will be sunny." },
        ],
        "tools": [weather()],
        "tool_choice": "none",
        "max_tokens": 4,
    });
    let (status, answer) = endpoint.post(PATH, body).await;
    assert_eq!(status, 200, "{answer}");
    assert!(answer["choices"][0]["message"]["content"].is_string());
    assert_eq!(answer["choices"][0]["message"].get("tool_calls"), None);
    endpoint.stop().await;
}

#[tokio::test]
async fn a_model_that_may_call_answers_in_text_or_calls() {
    let Some(endpoint) = real().await else { return };
    for choice in ["auto", "required"] {
        let body = with(with(ask(json!(choice)), "n", json!(2)), "temperature", json!(1.0));
        let (status, whole) = endpoint.post(PATH, with(body, "seed", json!(7))).await;
        assert_eq!(status, 200, "{whole}");
        for answer in whole["choices"].as_array().expect("choices") {
            let calls = answer["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
            let ended = answer["finish_reason"] != "length";
            match (calls.is_empty(), ended) {
                (true, _) => assert_eq!(choice, "auto", "{answer}"),
                (false, true) => assert_eq!(answer["finish_reason"], "tool_calls"),
                (false, false) => {}
            }
            let whole = if ended { &calls[..] } else { &calls[..calls.len().saturating_sub(1)] };
            for call in whole {
                let arguments = call["function"]["arguments"].as_str().expect("text");
                assert!(serde_json::from_str::<Value>(arguments).is_ok(), "{arguments}");
            }
        }
    }
    endpoint.stop().await;
}

#[tokio::test]
async fn wrong_tools_are_refused_by_name() {
    let endpoint = Endpoint::new(RuntimeConfig { threads: 1, ..runtime() }).await;
    let check = async |name: &str, value: Value, parameter: &str| {
        let body = with(ask(json!("auto")), name, value);
        let (status, body) = endpoint.post(PATH, body).await;
        assert_eq!((status, &body["error"]["param"]), (400, &json!(parameter)), "{body}");
    };
    check("tools", json!({}), "tools").await;
    check("tools", json!([{ "type": "retrieval" }]), "tools[0]").await;
    check("tools", json!([{ "type": "function", "function": { "name": "a b" } }]), "tools[0]")
        .await;
    check("tools", json!([clock(), clock()]), "tools").await;
    check("tools", json!(vec![clock(); 129]), "tools").await;
    let text = json!({ "name": "x", "parameters": { "type": "string" } });
    check("tools", json!([{ "type": "function", "function": text }]), "tools[0]").await;
    let schema = json!({ "name": "x", "strict": true,
        "parameters": { "properties": { "a": { "oneOf": [{}, {}] } } } });
    check("tools", json!([{ "type": "function", "function": schema }]), "tools").await;
    check("tool_choice", json!("always"), "tool_choice").await;
    let other = json!({ "type": "function", "function": { "name": "other" } });
    check("tool_choice", other, "tool_choice").await;
    check("grammar", json!("root ::= \"a\" root | \"b\""), "grammar").await;
    let lonely =
        json!({ "messages": [{ "role": "user", "content": "x" }], "tool_choice": "required" });
    let (status, body) = endpoint.post(PATH, lonely).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("tool_choice")), "{body}");
    // An answer that must be a call has no other shape.
    let both = with(ask(json!("required")), "response_format", json!({ "type": "json_object" }));
    let (status, body) = endpoint.post(PATH, both).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("response_format")), "{body}");
    endpoint.stop().await;
}
