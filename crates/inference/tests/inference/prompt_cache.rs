//! Sequences that outlive the worker on the disk.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use slmops_api::runtime::{KvType, RuntimeConfig};
use slmops_inference::host::{HostEvent, ModelHost, ModelSpec};
use slmops_inference::server::ServerOptions;
use slmops_inference::worker::{
    Extras, Finish, GenerateRequest, Prompt, PromptCache, Worker, WorkerSpec,
};

use crate::server::Endpoint;
use crate::support::{PROMPT_TOKENS, cpu_ms, glass, one_thread, set_up, smollm2};

const ROOMY: u64 = 64 << 20;

fn cached(folder: &Path, limit_bytes: u64, runtime: RuntimeConfig) -> WorkerSpec {
    let prompt_cache = Some(PromptCache { folder: folder.to_owned(), limit_bytes });
    let extras = Extras { prompt_cache, ..Extras::default() };
    WorkerSpec { extras, ..WorkerSpec::new(glass(), runtime) }
}

async fn worker(spec: WorkerSpec) -> Worker {
    set_up();
    Worker::spawn(spec).await.expect("the worker starts")
}

/// A prompt of 80 tokens, of which `count` begin as in all others.
fn prompt(count: usize, seed: i32) -> Vec<i32> {
    let shared = PROMPT_TOKENS.iter().copied().cycle().take(count);
    shared.chain((0..).map(|at| 40 + (at * 7 + seed * 13) % 900)).take(80).collect()
}

async fn ask(worker: &Worker, tokens: Vec<i32>) -> (Vec<i32>, Finish) {
    let request = GenerateRequest::greedy(Prompt::Tokens(tokens), 20);
    let (piece, finish) = worker.generate(request).unwrap().finish().await.expect("an answer");
    (piece.tokens, finish)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("the folder");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

/// A folder for its owner alone.
fn folder() -> tempfile::TempDir {
    let permissions = fs::Permissions::from_mode(0o700);
    tempfile::Builder::new().permissions(permissions).tempdir().expect("a folder")
}

#[tokio::test]
async fn a_prompt_is_not_computed_again_after_the_end_of_the_worker() {
    let outside = tempfile::tempdir().expect("a folder");
    let folder = outside.path().join("prompts");
    let first = worker(cached(&folder, ROOMY, one_thread())).await;
    let (tokens, finish) = ask(&first, prompt(60, 1)).await;
    assert_eq!((finish.cached_tokens, finish.restored_tokens), (0, 0));
    first.drain().await;
    let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    let kept = files(&folder);
    assert_eq!((mode(&folder), kept.len()), (0o700, 1), "{kept:?}");
    assert_eq!(mode(&kept[0]), 0o600);

    // Less context, the same prompt, another one that begins alike, and one that does not.
    let runtime = RuntimeConfig { context_tokens: 110, ..one_thread() };
    let second = worker(cached(&folder, ROOMY, runtime)).await;
    let (again, finish) = ask(&second, prompt(60, 1)).await;
    assert_eq!((finish.cached_tokens, finish.restored_tokens), (79, 79));
    assert_eq!(again, tokens);
    second.drain().await;
    let third = worker(cached(&folder, ROOMY, one_thread())).await;
    let (alike, finish) = ask(&third, prompt(60, 2)).await;
    assert_eq!((finish.cached_tokens, finish.restored_tokens), (60, 60));
    let plain = worker(WorkerSpec::new(glass(), one_thread())).await;
    assert_eq!(alike, ask(&plain, prompt(60, 2)).await.0);
    let (_, finish) = ask(&third, prompt(0, 3)).await;
    assert_eq!((finish.cached_tokens, finish.restored_tokens), (0, 0));
}

#[tokio::test]
async fn what_was_computed_otherwise_is_not_taken() {
    let folder = folder();
    let first = worker(cached(folder.path(), ROOMY, one_thread())).await;
    ask(&first, prompt(60, 1)).await;
    first.drain().await;
    for runtime in [
        RuntimeConfig { kv_type: KvType::F32, ..one_thread() },
        RuntimeConfig { flash_attention: false, ..one_thread() },
    ] {
        let other = worker(cached(folder.path(), ROOMY, runtime)).await;
        let (_, finish) = ask(&other, prompt(60, 1)).await;
        assert_eq!((finish.cached_tokens, finish.restored_tokens), (0, 0));
        other.drain().await;
    }
    let again = worker(cached(folder.path(), ROOMY, one_thread())).await;
    assert_eq!(ask(&again, prompt(60, 1)).await.1.restored_tokens, 79);
}

#[tokio::test]
async fn damaged_and_foreign_files_are_removed_and_never_read() {
    let folder = folder();
    let first = worker(cached(folder.path(), ROOMY, one_thread())).await;
    let (tokens, _) = ask(&first, prompt(60, 1)).await;
    first.drain().await;
    let path = files(folder.path()).remove(0);
    let good = fs::read(&path).expect("it is there");
    let mut damaged: Vec<Vec<u8>> = Vec::new();
    // In the header, the tokens, the state, and the digest.
    for place in [0, 20, 50, 56, 70, 90, 500, good.len() / 2, good.len() - 40, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[place] ^= 0x10;
        damaged.push(bytes);
    }
    for length in [0, 10, 59, 200, good.len() - 1] {
        damaged.push(good[..length].to_vec());
    }
    damaged.push([&good[..], b"more"].concat());
    damaged.push(b"GGUF and so on".repeat(100));
    for (at, bytes) in damaged.into_iter().enumerate() {
        for old in files(folder.path()) {
            fs::remove_file(old).expect("removed");
        }
        fs::write(&path, &bytes).expect("written");
        let next = worker(cached(folder.path(), ROOMY, one_thread())).await;
        let (found, finish) = ask(&next, prompt(60, 1)).await;
        assert_eq!(finish.restored_tokens, 0, "number {at}");
        assert_eq!(found, tokens, "number {at}");
        next.drain().await;
        // What it wrote in its place is whole.
        assert_eq!(fs::read(&path).ok().as_ref(), Some(&good), "number {at}");
    }
    // A link to somewhere else is not followed, and other people's files are left alone.
    let elsewhere = folder.path().join("elsewhere");
    fs::rename(&path, &elsewhere).expect("renamed");
    symlink(&elsewhere, &path).expect("linked");
    fs::write(folder.path().join("notes.txt"), "mine").expect("written");
    let next = worker(cached(folder.path(), ROOMY, one_thread())).await;
    assert_eq!(ask(&next, prompt(60, 1)).await.1.restored_tokens, 0);
    assert!(elsewhere.exists() && folder.path().join("notes.txt").exists());
}

#[tokio::test]
async fn the_cache_keeps_within_its_bound_and_forgets_what_was_used_first() {
    let folder = folder();
    let probe = worker(cached(folder.path(), ROOMY, one_thread())).await;
    ask(&probe, prompt(0, 0)).await;
    probe.drain().await;
    let length = fs::metadata(&files(folder.path())[0]).expect("it is there").len();
    let limit = 3 * length + length / 2;
    // Each worker leaves one more; the first of them is asked for once again.
    for seed in [1, 2, 3, 1, 4, 5] {
        let next = worker(cached(folder.path(), limit, one_thread())).await;
        ask(&next, prompt(0, seed)).await;
        next.drain().await;
        let total: u64 =
            files(folder.path()).iter().map(|file| fs::metadata(file).unwrap().len()).sum();
        assert!(total <= limit, "{total} of {limit}");
    }
    for (seed, known) in [(1, true), (2, false)] {
        let next = worker(cached(folder.path(), limit, one_thread())).await;
        assert_eq!(ask(&next, prompt(0, seed)).await.1.restored_tokens > 0, known, "{seed}");
    }

    let tiny = worker(cached(folder.path(), 100, one_thread())).await;
    ask(&tiny, prompt(0, 9)).await;
    tiny.drain().await;
}

#[tokio::test]
async fn a_killed_worker_loses_little() {
    let folder = folder();
    let spec = cached(folder.path(), ROOMY, one_thread());
    let first = worker(spec.clone()).await;
    let (tokens, _) = ask(&first, prompt(60, 1)).await;
    // It has nothing to do now.
    let written = async {
        let whole = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "prefix");
        while !files(folder.path()).iter().any(whole) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), written).await.expect("it is written");
    first.kill();
    first.ended().await;
    let second = worker(spec).await;
    let (again, finish) = ask(&second, prompt(60, 1)).await;
    assert_eq!((again, finish.restored_tokens), (tokens, 79));
}

#[tokio::test]
async fn a_sequence_that_gives_way_is_kept() {
    let folder = folder();
    let runtime = RuntimeConfig { parallel: 1, batch_tokens: 128, ..one_thread() };
    let worker = worker(cached(folder.path(), ROOMY, runtime)).await;
    let (tokens, _) = ask(&worker, prompt(0, 1)).await;
    ask(&worker, prompt(0, 2)).await;
    let (again, finish) = ask(&worker, prompt(0, 1)).await;
    assert_eq!((again, finish.cached_tokens, finish.restored_tokens), (tokens, 79, 79));
    // What is still in memory is not read.
    let (_, finish) = ask(&worker, prompt(0, 1)).await;
    assert_eq!((finish.cached_tokens, finish.restored_tokens), (79, 0));
}

#[tokio::test]
async fn a_model_that_slept_knows_its_prompts() {
    let folder = folder();
    let host = ModelHost::new();
    let endpoint = Endpoint::of(Arc::clone(&host), ServerOptions::default()).await;
    let mut events = host.events();
    let sleepy = RuntimeConfig { idle_after_s: 1, ..one_thread() };
    let worker = cached(folder.path(), ROOMY, sleepy);
    endpoint.load(ModelSpec { id: "glass".to_owned(), aliases: Vec::new(), worker }).await;
    let ask = || {
        let body = json!({ "prompt": prompt(60, 1), "max_tokens": 8, "temperature": 0 });
        endpoint.post("/v1/completions", body)
    };
    let (_, first) = ask().await;
    while events.recv().await.expect("an event")
        != (HostEvent::Asleep { model: "glass".to_owned() })
    {}
    let (_, second) = ask().await;
    assert_eq!(first["choices"], second["choices"]);
    assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], 79);
    assert_eq!(second["timings"]["restored_n"], 79);
    let (_, metrics) = endpoint.get("/metrics").await;
    assert!(metrics.contains("slmops_restored_prompt_tokens_total 79\n"), "{metrics}");
    let (_, properties) = endpoint.get("/props").await;
    assert!(properties.contains("\"limit_bytes\":67108864"), "{properties}");
    endpoint.stop().await;
}

#[tokio::test]
async fn a_folder_that_others_may_read_is_refused() {
    set_up();
    let folder = folder();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    let refused = Worker::spawn(cached(folder.path(), ROOMY, one_thread())).await;
    let error = refused.err().expect("it is refused").to_string();
    assert!(error.contains("others may read") && error.contains("hint: "), "{error}");
    let file = folder.path().join("file");
    fs::write(&file, "").expect("written");
    let refused = Worker::spawn(cached(&file, ROOMY, one_thread())).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("open prompt cache")));
}

/// Prints what a long prompt costs with and without the cache.
#[tokio::test]
async fn a_long_prompt_comes_back_whole() {
    let Some(model) = smollm2() else { return };
    let folder = folder();
    let text = fs::read_to_string(crate::support::testdata("prose-around-the-world.txt"));
    let runtime = RuntimeConfig { parallel: 1, threads: 1, ..RuntimeConfig::default() };
    let spec = WorkerSpec { model_path: model, ..cached(folder.path(), 256 << 20, runtime) };
    let first = worker(spec.clone()).await;
    let mut tokens = first.tokenise(text.expect("the text"), true, false).await.expect("tokens");
    tokens.truncate(1500);
    let spent_before = cpu_ms(first.pid());
    let (plain, before) = ask(&first, tokens.clone()).await;
    let spent_before = cpu_ms(first.pid()) - spent_before;
    first.drain().await;
    let second = worker(spec).await;
    let spent_after = cpu_ms(second.pid());
    let (restored, after) = ask(&second, tokens).await;
    let spent_after = cpu_ms(second.pid()) - spent_after;
    eprintln!(
        "1,500 tokens to the first: {:.0} ms computed, {:.0} ms restored; of the processor with 20 tokens \
         more: {spent_before} and {spent_after} ms; load {} and {} ms, {} bytes",
        before.prompt_ms,
        after.prompt_ms,
        first.model_info().load_ms,
        second.model_info().load_ms,
        fs::metadata(&files(folder.path())[0]).expect("it is there").len(),
    );
    assert_eq!((before.cached_tokens, after.restored_tokens), (0, 1499));
    assert_eq!(restored, plain);
}
