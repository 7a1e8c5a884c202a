//! Jobs in child processes, and the wrapper over the engine inside them.

use serde_json::{Value, json};
use slmops_inference::child::{ChildError, call};

use crate::support::{GREEDY, PROMPT, PROMPT_TOKENS, glass, set_up};

#[tokio::test]
async fn a_job_gets_its_input_and_reports() {
    set_up();
    let mut progress = Vec::new();
    let input = json!({ "text": "é\n".repeat(100_000) });
    let result = call("echo", input.clone(), |step| progress.push(step)).await;
    assert_eq!(result.expect("it echoes"), input);
    assert_eq!(progress, [json!("half")]);
}

#[tokio::test]
async fn every_bad_end_has_its_own_error() {
    set_up();
    let mut found = Vec::new();
    for job in ["fail", "abort", "leave", "unknown"] {
        let error = call(job, Value::Null, |_| {}).await.expect_err("it ends badly");
        found.push(match error {
            ChildError::Failed { message, .. } => message,
            ChildError::Crashed { signal, .. } => format!("signal {signal}"),
            ChildError::Exited { code, .. } => format!("code {code}"),
            other => panic!("{other}"),
        });
    }
    assert_eq!(found, ["it was asked to fail", "signal 6", "code 3", "code 1"]);
}

#[tokio::test]
async fn the_engine_gives_the_reference_tokens() {
    set_up();
    let input = json!({ "model": glass(), "prompt": PROMPT });
    let result = call("greedy", input, |_| {}).await.expect("it runs");
    assert_eq!(result["prompt"], json!(PROMPT_TOKENS));
    assert_eq!(result["tokens"], json!(GREEDY));
    assert_eq!(result["shape"]["vocabulary"], 1024);
    assert_eq!(result["shape"]["trained_context"], 128);
    assert_eq!(result["kv_type"], "f16");
    assert_eq!(result["flash_attention"], true);
    let engine = result["engine"].as_str().expect("text");
    assert!(engine.starts_with("llama.cpp "), "{engine}");
}

#[tokio::test]
async fn an_imported_folder_gives_the_reference_tokens() {
    set_up();
    let folder = tempfile::tempdir().expect("a folder");
    let imported = folder.path().join("imported.gguf");
    let source = glass().with_file_name("hf");
    slmops_artifact::huggingface::import(&source, &imported).expect("it is a Llama model");
    let input = json!({ "model": imported, "prompt": PROMPT });
    let result = call("greedy", input, |_| {}).await.expect("it runs");
    assert_eq!(result["prompt"], json!(PROMPT_TOKENS));
    assert_eq!(result["tokens"], json!(GREEDY));
}

#[tokio::test]
async fn quantising_makes_a_smaller_model_that_runs() {
    set_up();
    let folder = tempfile::tempdir().expect("a folder");
    let output = folder.path().join("q8.gguf");
    let input = json!({ "input": glass(), "output": output, "file_type": "q8_0" });
    let mut steps = Vec::new();
    call("quantise", input, |step| steps.push(step)).await.expect("it quantises");
    let last = steps.last().expect("it reports progress");
    assert_eq!(last[0], last[1]);
    let sizes = [glass(), output.clone()].map(|path| path.metadata().expect("a file").len());
    assert!(sizes[1] < sizes[0] / 3, "{sizes:?}");
    let input = json!({ "model": output, "prompt": PROMPT, "tokens": 3 });
    let result = call("greedy", input, |_| {}).await.expect("it runs");
    assert_eq!(result["tokens"], json!(GREEDY[..3]));
    assert_eq!(result["file_type"], "Q8_0");
}

#[tokio::test]
async fn quantising_says_what_is_wrong() {
    set_up();
    let folder = tempfile::tempdir().expect("a folder");
    let output = folder.path().join("out.gguf");
    let check = async |input: &std::path::Path, file_type: &str, wanted: &str| {
        let input = json!({ "input": input, "output": output, "file_type": file_type });
        let error = call("quantise", input, |_| {}).await.expect_err("it fails").to_string();
        assert!(error.contains(wanted), "`{wanted}` is not in: {error}");
        assert!(!output.exists());
    };
    check(&glass(), "Q4_TYPO", "hint: use one of F32, F16").await;
    check(&folder.path().join("none.gguf"), "Q8_0", "none.gguf").await;
    let text = folder.path().join("text.gguf");
    std::fs::write(&text, "this is no model").expect("written");
    check(&text, "Q8_0", "quantise").await;
}
