//! The endpoint as other people's clients find it: PyPI `openai`, the usual one, and `schemathesis`,
//! which asks whatever the OpenAPI document allows and forbids. `scripts/interop-endpoint.sh` installs
//! them and runs these tests; without them the tests say that they were skipped.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use slmops_api::runtime::RuntimeConfig;
use slmops_inference::server::{KeyLimits, Keys, ServerOptions};

use crate::server::{Endpoint, named};
use crate::support::{glass, runtime, smollm2, testdata};

fn installed(program: &str) -> Option<PathBuf> {
    let folder = match std::env::var_os("SLMOPS_ENDPOINT_VENV") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".cache/slmops/endpoint"),
    };
    // The last that is installed.
    let complete = folder.join("bin/schemathesis").exists();
    if !complete {
        eprintln!("skipped: run scripts/interop-endpoint.sh to install the clients");
    }
    complete.then(|| folder.join("bin").join(program))
}

/// What a program says, which must end well.
async fn run(mut command: Command) -> String {
    command.env("no_proxy", "127.0.0.1").env("PYTHONDONTWRITEBYTECODE", "1");
    let ran = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    let complained = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{said}\n{complained}");
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_openai_client_finds_what_it_expects() {
    let Some(python) = installed("python") else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let key = Keys::create(&file, "client", KeyLimits::default()).unwrap();
    let one = KeyLimits { concurrent: None, per_minute: Some(1) };
    let limited = Keys::create(&file, "limited", one).unwrap();
    let keys = Some(Arc::new(Keys::open(&file).unwrap()));
    let endpoint = Endpoint::with_options(ServerOptions { keys, ..Default::default() }).await;
    // The tiny model writes no quotation marks, and so no JSON.
    let real = smollm2();
    let wanted = real.as_ref().map(|_| "tools");
    let runtime = match real {
        Some(_) => RuntimeConfig { context_tokens: 1024, ..RuntimeConfig::default() },
        None => runtime(),
    };
    endpoint.load(named("model", real.unwrap_or_else(glass), runtime)).await;
    let mut command = Command::new(python);
    command.arg(testdata("endpoint/openai_client.py")).args([&endpoint.url, &key, &limited]);
    command.args(wanted);
    let said = run(command).await;
    assert_eq!(said.lines().filter(|line| line.starts_with("ok ")).count(), 11, "{said}");
    endpoint.stop().await;
}

/// Requests that the document allows, and such as it forbids. How many: `SLM_FUZZ_CASES`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_says_what_the_endpoint_does() {
    let Some(schemathesis) = installed("schemathesis") else { return };
    let endpoint = Endpoint::new(RuntimeConfig { threads: 1, ..runtime() }).await;
    let cases = std::env::var("SLM_FUZZ_CASES").unwrap_or_else(|_| "10".to_owned());
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(schemathesis);
    command
        .arg("run")
        .arg(format!("{}/openapi.json", endpoint.url))
        .args(["--max-examples", &cases, "--seed", "1", "--generation-database", "none"])
        // What is well formed may still be too long for the model, or a schema that cannot be used.
        .args(["--exclude-checks", "positive_data_acceptance"])
        .args(["--no-color", "--request-timeout", "60"])
        .current_dir(folder.path());
    let said = run(command).await;
    println!("{said}");
    let (status, _) = endpoint.get("/health").await;
    assert_eq!(status, 200);
    assert_eq!(endpoint.host.telemetry().worker_crashes, 0);
    endpoint.stop().await;
}
