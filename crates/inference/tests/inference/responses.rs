//! `/v1/responses`, as an OpenAI client sees it.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::server::ServerOptions;

use crate::server::{Endpoint, events_of, named, with};
use crate::support::{glass, runtime, smollm2};

const PATH: &str = "/v1/responses";

fn asked(max_output_tokens: u32) -> Value {
    json!({
        "model": "glass",
        "instructions": "Be brief.",
        "input": "Who are you?",
        "temperature": 0,
        "max_output_tokens": max_output_tokens,
    })
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().expect("a type")).collect()
}

/// What differs from one answer to the next.
fn without_ids(mut response: Value) -> Value {
    for name in ["id", "created_at", "timings", "usage"] {
        response[name] = Value::Null;
    }
    for item in response["output"].as_array_mut().expect("items") {
        item["id"] = Value::Null;
        item["call_id"] = Value::Null;
        // Batches of other sizes add up in another order.
        if item["type"] == "message" {
            item["content"][0]["logprobs"] = Value::Null;
        }
    }
    response
}

#[tokio::test]
async fn responses_answer_whole_and_streamed() {
    let endpoint = Endpoint::new(RuntimeConfig { threads: 1, ..runtime() }).await;
    let asked = with(asked(8), "include", json!(["message.output_text.logprobs"]));
    let asked = with(asked, "top_logprobs", json!(2));
    let (status, whole) = endpoint.post(PATH, asked.clone()).await;
    assert_eq!(status, 200, "{whole}");
    assert_eq!((&whole["object"], &whole["status"]), (&json!("response"), &json!("incomplete")));
    assert_eq!(whole["incomplete_details"], json!({ "reason": "max_output_tokens" }));
    assert_eq!((&whole["store"], &whole["instructions"]), (&json!(false), &json!("Be brief.")));
    let message = &whole["output"][0];
    assert_eq!((&message["role"], &message["status"]), (&json!("assistant"), &json!("incomplete")));
    let part = &message["content"][0];
    assert_eq!(part["type"], "output_text");
    let entries = part["logprobs"].as_array().expect("entries");
    assert_eq!(entries.len(), 8);
    assert!(entries.iter().all(|entry| entry["top_logprobs"].as_array().unwrap().len() == 2));
    assert_eq!(whole["usage"]["output_tokens"], 8);

    // The same chat in the older shape has the same answer.
    let chat = json!({
        "messages": [
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "Who are you?" },
        ],
        "temperature": 0, "max_tokens": 8,
    });
    let (_, chat) = endpoint.post("/v1/chat/completions", chat).await;
    assert_eq!(chat["choices"][0]["message"]["content"], part["text"]);
    let cached = &whole["usage"]["input_tokens_details"]["cached_tokens"];
    assert_eq!(
        (cached, &whole["usage"]["input_tokens"]),
        (&json!(0), &chat["usage"]["prompt_tokens"])
    );

    let events = endpoint.events(PATH, with(asked, "stream", json!(true))).await;
    for (index, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], index, "{event}");
    }
    let kinds = kinds(&events);
    let around: Vec<&str> =
        kinds.iter().copied().filter(|kind| *kind != "response.output_text.delta").collect();
    insta::assert_snapshot!(around.join("\n"));
    let text: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(part["text"], text);
    let last = events.last().expect("a last event")["response"].clone();
    assert!(last["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
    assert_eq!(without_ids(last), without_ids(whole));
    endpoint.stop().await;
}

#[tokio::test]
async fn a_conversation_is_sent_whole() {
    let endpoint = Endpoint::new(RuntimeConfig { threads: 1, ..runtime() }).await;
    let input = json!([
        { "role": "developer", "content": "Speak." },
        { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "Hi" }] },
        {
            "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
            "content": [{ "type": "output_text", "text": "Ho", "annotations": [], "logprobs": [] }],
        },
        { "type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}" },
        { "type": "function_call_output", "call_id": "c1", "output": "1" },
        { "role": "user", "content": "So?" },
    ]);
    let (status, answer) = endpoint.post(PATH, with(asked(2), "input", input)).await;
    assert_eq!(status, 200, "{answer}");
    let chat = json!({
        "messages": [
            { "role": "system", "content": "Be brief." },
            { "role": "system", "content": "Speak." },
            { "role": "user", "content": "Hi" },
            { "role": "assistant", "content": "Ho", "tool_calls": [
                { "id": "c1", "type": "function", "function": { "name": "f", "arguments": "{}" } },
            ] },
            { "role": "tool", "tool_call_id": "c1", "content": "1" },
            { "role": "user", "content": "So?" },
        ],
        "temperature": 0, "max_tokens": 2,
    });
    let (_, chat) = endpoint.post("/v1/chat/completions", chat).await;
    assert_eq!(
        (&chat["choices"][0]["message"]["content"], &chat["usage"]["prompt_tokens"]),
        (&answer["output"][0]["content"][0]["text"], &answer["usage"]["input_tokens"])
    );
    let number = json!({ "format": {
        "type": "json_schema", "name": "number", "strict": true, "schema": {
            "type": "integer", "minimum": 10, "maximum": 99,
        },
    } });
    let (_, answer) = endpoint.post(PATH, with(asked(40), "text", number.clone())).await;
    assert_eq!((&answer["status"], &answer["text"]), (&json!("completed"), &number), "{answer}");
    let text = answer["output"][0]["content"][0]["text"].as_str().expect("text");
    assert!((10..=99).contains(&text.parse::<u32>().expect("a number")), "{text}");
    endpoint.stop().await;
}

#[tokio::test]
async fn what_needs_a_memory_is_refused_by_name() {
    let endpoint = Endpoint::new(RuntimeConfig { threads: 1, ..runtime() }).await;
    let check = async |name: &str, value: Value, parameter: &str| {
        let (status, body) = endpoint.post(PATH, with(asked(2), name, value)).await;
        assert_eq!((status, &body["error"]["param"]), (400, &json!(parameter)), "{body}");
    };
    for (name, value) in [
        ("previous_response_id", json!("resp_1")),
        ("conversation", json!("conv_1")),
        ("background", json!(true)),
        ("store", json!(true)),
        ("truncation", json!("auto")),
        ("reasoning", json!({ "effort": "high" })),
        ("include", json!(["file_search_call.results"])),
        ("top_logprobs", json!(3)),
        ("max_output_tokens", json!(0)),
        ("text", json!("json")),
        ("metadata", json!(5)),
        ("input", json!([])),
        ("input", Value::Null),
        ("input", json!("x ".repeat(300))),
        ("tools", json!({})),
        ("stream_options", json!({ "include_obfuscation": true })),
        ("response_format", json!({ "type": "json_object" })),
        ("messages", json!([])),
    ] {
        check(name, value, name).await;
    }
    check("input", json!([{ "type": "item_reference", "id": "x" }]), "input[0].type").await;
    check("input", json!([{ "role": "tool", "content": "x" }]), "input[0].role").await;
    check("input", json!([{ "type": "function_call", "call_id": "x" }]), "input[0].name").await;
    let image = json!([{ "type": "input_image", "image_url": "x" }]);
    check("input", json!([{ "role": "user", "content": image }]), "input[0].content").await;
    check("tools", json!([{ "type": "web_search" }]), "tools[0]").await;
    check("text", json!({ "format": { "type": "yaml" } }), "text.format").await;
    // What asks for nothing does no harm.
    let mut harmless = asked(1);
    for (name, value) in [
        ("store", json!(false)),
        ("background", json!(false)),
        ("truncation", json!("disabled")),
        ("tools", json!([])),
        ("include", json!(["reasoning.encrypted_content"])),
        ("metadata", json!({ "a": "b" })),
        ("text", json!({ "format": { "type": "text" } })),
        ("previous_response_id", Value::Null),
        ("service_tier", json!("auto")),
        ("user", json!("someone")),
    ] {
        harmless[name] = value;
    }
    let (status, body) = endpoint.post(PATH, harmless).await;
    assert_eq!((status, &body["metadata"]), (200, &json!({ "a": "b" })), "{body}");
    endpoint.stop().await;
}

#[tokio::test]
async fn calls_are_items_of_the_response() {
    let Some(model) = smollm2() else { return };
    let runtime = RuntimeConfig { context_tokens: 1024, threads: 1, ..RuntimeConfig::default() };
    let endpoint = Endpoint::serving(named("smol", model, runtime)).await;
    let weather = json!({
        "type": "function", "name": "weather", "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": { "city": { "enum": ["Berlin", "Paris"] } },
            "required": ["city"], "additionalProperties": false,
        },
    });
    let asked = json!({
        "input": "What will the weather be in Paris?",
        "tools": [weather],
        "tool_choice": { "type": "function", "name": "weather" },
        "parallel_tool_calls": false,
        "temperature": 0,
        "max_output_tokens": 60,
    });
    let (status, whole) = endpoint.post(PATH, asked.clone()).await;
    assert_eq!((status, &whole["status"]), (200, &json!("completed")), "{whole}");
    let [call] = whole["output"].as_array().expect("items").as_slice() else { panic!("{whole}") };
    assert_eq!((&call["type"], &call["name"]), (&json!("function_call"), &json!("weather")));
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(["Berlin", "Paris"].contains(&arguments["city"].as_str().unwrap()), "{arguments}");

    let events = endpoint.events(PATH, with(asked.clone(), "stream", json!(true))).await;
    let mut around = kinds(&events);
    around.dedup();
    insta::assert_snapshot!(around.join("\n"));
    let deltas: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(call["arguments"], deltas);
    let last = events.last().expect("a last event")["response"].clone();
    assert_eq!(without_ids(last), without_ids(whole.clone()));

    // The output goes back as it came, with the result.
    let input = json!([
        { "role": "user", "content": "What will the weather be in Paris?" },
        call,
        { "type": "function_call_output", "call_id": call["call_id"], "output": "Sunny." },
    ]);
    let next = with(with(asked, "input", input), "tool_choice", json!("none"));
    let (status, answer) = endpoint.post(PATH, with(next, "max_output_tokens", json!(4))).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["output"][0]["type"], "message");
    endpoint.stop().await;
}

/// A worker that says nothing for a while is a queue that does not move: who streams hears comments,
/// and in the end the answer, or why there is none.
#[tokio::test]
async fn who_waits_is_kept_alive_and_told_of_failures() {
    let keep_alive = Duration::from_millis(20);
    let endpoint = Endpoint::with_options(ServerOptions { keep_alive, ..Default::default() }).await;
    endpoint.load(named("glass", glass(), RuntimeConfig { threads: 1, ..runtime() })).await;
    let url = format!("{}{PATH}", endpoint.url);
    for killed in [false, true] {
        endpoint.signal_worker(Signal::STOP);
        let body = with(asked(3), "stream", json!(true)).to_string();
        let mut response =
            endpoint.client.post(&url).body(body).send().await.expect("it begins all the same");
        let first = response.chunk().await.unwrap().expect("a comment");
        assert!(first.starts_with(b": keep-alive\n\n"), "{first:?}");
        endpoint.signal_worker(if killed { Signal::KILL } else { Signal::CONT });
        let rest = response.text().await.expect("it ends");
        let events = events_of(&rest.replace(": keep-alive\n\n", ""));
        let last = events.last().expect("an event");
        let wanted = if killed { "response.failed" } else { "response.incomplete" };
        assert_eq!(last["type"], wanted, "{rest}");
        let error = &last["response"]["error"];
        assert_eq!(error["code"] == "server_error", killed, "{error}");
    }
    endpoint.stop().await;
}
