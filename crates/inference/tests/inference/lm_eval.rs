//! The evaluation harness of PyPI `lm_eval` scores the endpoint as the worker scores itself.
//! `scripts/interop-lm-eval.sh` installs it and runs this test; without it the test says that it was
//! skipped. The real model is used where `SLMOPS_SMOLLM2` names it.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use slmops_api::runtime::RuntimeConfig;
use slmops_inference::worker::{Prompt, ScoreRequest, Worker};

use crate::server::{Endpoint, named};
use crate::support::{glass, testdata};

/// How far apart two log-probabilities of the same answer may be: batches of other sizes add up in
/// another order.
const NOISE_NATS: f64 = 0.02;

fn harness() -> Option<PathBuf> {
    let installed = || {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cache/slmops/lm-eval/bin/lm_eval"))
    };
    let path = std::env::var_os("SLMOPS_LM_EVAL").map(PathBuf::from).or_else(installed)?;
    path.exists().then_some(path)
}

/// What the worker itself says of each answer to a question.
async fn own_scores(worker: &Worker, doc: &Value) -> Vec<f64> {
    let prompt = format!("Question: {}\nAnswer:", doc["question"].as_str().unwrap());
    let mut scores = Vec::new();
    for choice in doc["choices"].as_array().unwrap() {
        let continuation = format!(" {}", choice.as_str().unwrap());
        let request = ScoreRequest { prompt: Prompt::Text(prompt.clone()), continuation };
        scores.push(worker.score(request).await.expect("a score").logprobs.iter().sum());
    }
    scores
}

fn best(scores: &[f64]) -> usize {
    let order = |a: &(usize, &f64), b: &(usize, &f64)| a.1.total_cmp(b.1);
    scores.iter().enumerate().max_by(order).expect("there are answers").0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_harness_scores_the_endpoint_as_it_scores_itself() {
    let Some(harness) = harness() else {
        eprintln!("skipped: run scripts/interop-lm-eval.sh to install lm_eval");
        return;
    };
    let model = std::env::var_os("SLMOPS_SMOLLM2").map_or_else(glass, PathBuf::from);
    let runtime = RuntimeConfig { context_tokens: 128, parallel: 4, ..RuntimeConfig::default() };
    let endpoint = Endpoint::serving(named("real", model, runtime)).await;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let arguments = format!(
        "model=real,base_url={}/v1/completions,tokenizer_backend=remote,num_concurrent=4,max_length=128",
        endpoint.url
    );
    let mut command = Command::new(harness);
    command
        .args(["run", "--model", "local-completions", "--model_args", &arguments])
        .args(["--tasks", "slmops_small", "--include_path", "."])
        .args(["--log_samples", "--output_path"])
        .arg(&out)
        .current_dir(testdata("lm-eval"))
        .env("HF_HOME", folder.path().join("cache"))
        .env("HF_HUB_OFFLINE", "1")
        .env("no_proxy", "127.0.0.1");
    let ran = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success(), "{said}");

    let samples = std::fs::read_dir(&out)
        .unwrap()
        .flat_map(|entry| std::fs::read_dir(entry.unwrap().path()).unwrap())
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    let samples = std::fs::read_to_string(samples.expect("samples are written")).unwrap();
    let (_, worker) = endpoint.host.current().expect("it serves");
    let (mut right, mut own_right, mut questions) = (0, 0, 0);
    for line in samples.lines() {
        let sample: Value = serde_json::from_str(line).unwrap();
        let theirs: Vec<f64> =
            sample["filtered_resps"].as_array().unwrap().iter().map(number).collect();
        let own = own_scores(&worker, &sample["doc"]).await;
        for (theirs, own) in theirs.iter().zip(&own) {
            assert!((theirs - own).abs() < NOISE_NATS, "{theirs} is not {own}: {sample}");
        }
        let answer = sample["doc"]["answer"].as_u64().unwrap() as usize;
        assert_eq!(best(&theirs), best(&own), "{sample}");
        right += usize::from(best(&theirs) == answer);
        own_right += usize::from(best(&own) == answer);
        questions += 1;
    }
    assert_eq!((questions, right), (40, own_right));
    // Without the log-probabilities of the prompt a harness guesses, and a quarter is right.
    println!("{right} of {questions} right");
    endpoint.stop().await;
}

/// The log-probability in the harness's notes, which may be text.
fn number(response: &Value) -> f64 {
    let first = &response[0];
    first.as_f64().or_else(|| first.as_str()?.parse().ok()).expect("a number")
}
