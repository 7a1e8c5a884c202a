//! LoRA adapters: made here from random matrices, and compared with a model whose weights were
//! changed by the same matrices.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use slmops_api::runtime::RuntimeConfig;
use slmops_artifact::gguf::{self, TensorType, Writer};
use slmops_inference::host::{HostEvent, ModelHost, ModelSpec};
use slmops_inference::server::ServerOptions;
use slmops_inference::worker::{
    AdapterChoice, AdapterUse, Extras, GenerateRequest, Piece, Prompt, PromptCache, Worker,
    WorkerSpec,
};

use crate::server::Endpoint;
use crate::support::{GREEDY, PROMPT, glass, one_thread, set_up};

const RANK: usize = 4;
const ALPHA: f32 = 8.0;
/// The matrices that an adapter changes.
const CHANGED: [&str; 4] = [
    "blk.0.attn_q.weight",
    "blk.1.ffn_down.weight",
    "blk.2.attn_output.weight",
    "blk.3.attn_v.weight",
];

/// An adapter: for each matrix, `a` `[rank, inputs]` and `b` `[outputs, rank]`.
struct Lora(Vec<(Vec<f32>, Vec<f32>)>);

impl Lora {
    /// Matrices of small numbers that only `seed` decides.
    fn random(seed: u64) -> Self {
        let mut state = seed;
        let mut number = move || {
            // Knuth's MMIX generator: the same numbers everywhere.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.6
        };
        let mut numbers = move |count: usize| (0..count).map(|_| number()).collect();
        let pairs = CHANGED.map(|name| {
            let [inputs, outputs] = size(name);
            (numbers(inputs * RANK), numbers(outputs * RANK))
        });
        Self(pairs.into())
    }

    fn write(&self, path: &Path, architecture: &str) {
        let mut writer = Writer::new();
        writer.set("general.type", "adapter").set("general.architecture", architecture);
        writer.set("adapter.type", "lora").set("adapter.lora.alpha", ALPHA);
        for name in CHANGED {
            let [inputs, outputs] = size(name).map(|size| size as u64);
            let rank = RANK as u64;
            writer.tensor(&format!("{name}.lora_a"), &[inputs, rank], TensorType::F32);
            writer.tensor(&format!("{name}.lora_b"), &[rank, outputs], TensorType::F32);
        }
        let written = writer.create(path, |tensors| {
            for (a, b) in &self.0 {
                tensors.write(&bytes(a))?;
                tensors.write(&bytes(b))?;
            }
            Ok(())
        });
        written.expect("it is written");
    }
}

fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// Inputs and outputs of a matrix of the model.
fn size(name: &str) -> [usize; 2] {
    let model = gguf::open(&glass()).expect("the model");
    let tensor = model.header().tensor(name).expect("it has this matrix");
    [tensor.dimensions[0] as usize, tensor.dimensions[1] as usize]
}

/// The model with adapters added to its weights: W + scale · alpha / rank · B · A (Hu et al. 2021,
/// "LoRA", section 4.1).
fn merged(path: &Path, adapters: &[(&Lora, f32)]) {
    let model = gguf::open(&glass()).expect("the model");
    let mut writer = Writer::with_metadata_of(model.header());
    for tensor in model.header().tensors() {
        writer.tensor(&tensor.name, &tensor.dimensions, tensor.tensor_type);
    }
    let written = writer.create(path, |tensors| {
        for tensor in model.header().tensors() {
            let Some(place) = CHANGED.iter().position(|name| *name == tensor.name) else {
                tensors.write(model.data(tensor))?;
                continue;
            };
            let mut weights = gguf::dequantise(tensor.tensor_type, model.data(tensor))?;
            let [inputs, outputs] = size(CHANGED[place]);
            for (Lora(pairs), scale) in adapters {
                let (a, b) = &pairs[place];
                let factor = scale * ALPHA / RANK as f32;
                for output in 0..outputs {
                    for input in 0..inputs {
                        let sum: f32 = (0..RANK)
                            .map(|rank| b[output * RANK + rank] * a[rank * inputs + input])
                            .sum();
                        weights[output * inputs + input] += factor * sum;
                    }
                }
            }
            tensors.write(&bytes(&weights))?;
        }
        Ok(())
    });
    written.expect("it is written");
}

/// The most probable continuation with the log-probabilities of its tokens.
fn request(adapters: &[(u32, f32)]) -> GenerateRequest {
    let uses = adapters.iter().map(|(id, scale)| AdapterUse { id: *id, scale: *scale });
    GenerateRequest {
        logprobs: Some(0),
        adapters: AdapterChoice::These(uses.collect()),
        ..GenerateRequest::greedy(Prompt::Text(PROMPT.to_owned()), 20)
    }
}

async fn answer(worker: &Worker, adapters: &[(u32, f32)]) -> Piece {
    worker.generate(request(adapters)).expect("taken").finish().await.expect("an answer").0
}

fn check_same(found: &Piece, wanted: &Piece, what: &str) {
    assert_eq!(found.tokens, wanted.tokens, "{what}");
    for (found, wanted) in found.logprobs.iter().zip(&wanted.logprobs) {
        let (found, wanted) = (found.logprob.unwrap(), wanted.logprob.unwrap());
        // The product is computed in another order, beside the weights and not in them.
        assert!((found - wanted).abs() < 1e-3, "{what}: {found} is not {wanted}");
    }
}

/// Whether they are further apart than any order of computing explains.
fn differ(one: &Piece, other: &Piece) -> bool {
    let logprobs = |piece: &Piece| piece.logprobs.iter().filter_map(|it| it.logprob).sum::<f64>();
    one.tokens != other.tokens || (logprobs(one) - logprobs(other)).abs() > 0.1
}

#[tokio::test]
async fn an_adapter_does_what_its_merged_weights_do_also_beside_others() {
    set_up();
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    let adapters = [Lora::random(1), Lora::random(2)];
    let configuration = RuntimeConfig { parallel: 4, ..one_thread() };
    let worker = Worker::spawn(WorkerSpec::new(glass(), configuration)).await.expect("it starts");
    for (name, adapter) in ["one", "two"].into_iter().zip(&adapters) {
        adapter.write(&at(name), "llama");
        worker.load_adapter(name.to_owned(), at(name), 0.0).await.expect("it loads");
    }
    let base = answer(&worker, &[]).await;
    assert_eq!(base.tokens, GREEDY);
    let choices: [&[(u32, f32)]; 4] =
        [&[(0, 1.0)], &[(1, 0.5)], &[(0, 0.7), (1, 1.0)], &[(1, -1.0)]];
    let mut alone = Vec::new();
    for choice in choices {
        let wanted: Vec<_> =
            choice.iter().map(|(id, scale)| (&adapters[*id as usize], *scale)).collect();
        merged(&at("merged"), &wanted);
        let model =
            Worker::spawn(WorkerSpec::new(at("merged"), one_thread())).await.expect("it starts");
        let found = answer(&worker, choice).await;
        assert!(differ(&found, &base), "{choice:?} changes nothing");
        check_same(&found, &answer(&model, &[]).await, &format!("{choice:?}"));
        alone.push(found);
    }
    // What was computed with an adapter is of no use without it: all of it is as in the beginning.
    check_same(&answer(&worker, &[(0, 0.0)]).await, &base, "a scale of 0");

    // All of them and the model itself at the same time, twice as many as there are sequences.
    let together = (0..2).flat_map(|_| choices.into_iter().chain([[].as_slice()]));
    let together = together.map(|choice| {
        let worker = &worker;
        async move { (choice, answer(worker, choice).await) }
    });
    for (choice, found) in futures_util::future::join_all(together).await {
        let place = choices.iter().position(|known| *known == choice);
        check_same(&found, place.map_or(&base, |place| &alone[place]), &format!("{choice:?}"));
    }

    // An answer under way is finished with an adapter that is unloaded meanwhile.
    let mut under_way = worker.generate(request(&[(0, 1.0)])).expect("taken");
    under_way.next().await.expect("it starts");
    worker.unload_adapter(0).await.expect("it was loaded");
    check_same(&under_way.finish().await.expect("an answer").0, &alone[0], "unloaded");
    let gone = worker.generate(request(&[(0, 1.0)])).err().expect("it is gone").to_string();
    assert!(gone.contains("there is no adapter number 0"), "{gone}");
    check_same(&answer(&worker, &[]).await, &base, "without the one that is unloaded");
}

fn model(adapters: Vec<slmops_inference::worker::AdapterFile>) -> ModelSpec {
    let worker = WorkerSpec { adapters, ..WorkerSpec::new(glass(), one_thread()) };
    ModelSpec { id: "glass".to_owned(), aliases: vec!["glass:1.0.0".to_owned()], worker }
}

async fn text(endpoint: &Endpoint, more: Value) -> String {
    let mut body = json!({ "prompt": PROMPT, "max_tokens": 20, "temperature": 0 });
    for (name, value) in more.as_object().expect("parameters") {
        body[name] = value.clone();
    }
    let (status, answer) = endpoint.post("/v1/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    answer["choices"][0]["text"].as_str().expect("a text").to_owned()
}

#[tokio::test]
async fn adapters_come_and_go_over_http_and_outlive_the_worker() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    Lora::random(1).write(&path("till.gguf"), "llama");
    Lora::random(2).write(&path("two.gguf"), "llama");
    let options = ServerOptions { changes_adapters: true, ..ServerOptions::default() };
    let endpoint = Endpoint::with_options(options).await;
    endpoint.load(model(Vec::new())).await;
    let base = text(&endpoint, json!({})).await;
    let load = async |body: Value| endpoint.post("/lora-adapters", body).await;

    let (status, loaded) = load(json!({ "path": path("till.gguf") })).await;
    let till = json!({ "id": 0, "name": "till", "path": path("till.gguf"), "scale": 1.0 });
    assert_eq!((status, loaded), (201, till.clone()));
    let (_, loaded) = load(json!({ "path": path("two.gguf"), "name": "b", "scale": 0 })).await;
    assert_eq!(loaded["id"], 1);
    let listed = async || serde_json::from_str::<Value>(&endpoint.get("/lora-adapters").await.1);
    assert_eq!(listed().await.expect("JSON")[0], till);

    // Who chooses nothing gets all of them at their scales; who chooses gets what is chosen.
    let first = text(&endpoint, json!({})).await;
    assert_ne!(first, base);
    assert_eq!(text(&endpoint, json!({ "model": "glass:till" })).await, first);
    assert_eq!(text(&endpoint, json!({ "lora": [{ "id": 0, "scale": 1.0 }] })).await, first);
    assert_eq!(text(&endpoint, json!({ "lora": [] })).await, base);
    let second = text(&endpoint, json!({ "model": "glass:1.0.0:b" })).await;
    assert!(second != first && second != base);
    let (status, _) = load(json!([{ "id": 1, "scale": 1.0 }])).await;
    assert_eq!(status, 200);
    assert_eq!(text(&endpoint, json!({})).await, second);
    let (_, models) = endpoint.get("/v1/models").await;
    let models: Value = serde_json::from_str(&models).expect("JSON");
    let names: Vec<_> =
        models["data"].as_array().expect("models").iter().map(|it| &it["id"]).collect();
    assert_eq!(names, ["glass", "glass:till", "glass:b"]);

    // The worker that follows one that died has the same adapters at the same scales.
    let mut events = endpoint.host.events();
    endpoint.host.current().expect("a worker").1.kill();
    loop {
        if let HostEvent::Restarted { .. } = events.recv().await.expect("events") {
            break;
        }
    }
    assert_eq!(text(&endpoint, json!({})).await, second);

    let (status, _) = endpoint.delete("/lora-adapters/1").await;
    assert_eq!(status, 200);
    assert_eq!(text(&endpoint, json!({})).await, base);
    let (status, gone) =
        endpoint.post("/v1/completions", json!({ "prompt": "a", "model": "glass:b" })).await;
    assert_eq!((status, &gone["error"]["code"]), (404, &json!("model_not_found")));
    endpoint.stop().await;
}

#[tokio::test]
async fn adapters_outlive_the_models_sleep() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("till.gguf");
    Lora::random(1).write(&path, "llama");
    let host = ModelHost::new();
    let options = ServerOptions { changes_adapters: true, ..ServerOptions::default() };
    let endpoint = Endpoint::of(Arc::clone(&host), options).await;
    let mut events = host.events();
    let mut sleepy = model(Vec::new());
    sleepy.worker.runtime.idle_after_s = 1;
    endpoint.load(sleepy).await;
    let (status, _) = endpoint.post("/lora-adapters", json!({ "path": path, "scale": 0.5 })).await;
    assert_eq!(status, 201);
    let adapted = text(&endpoint, json!({})).await;
    let asleep = HostEvent::Asleep { model: "glass".to_owned() };
    while events.recv().await.expect("an event") != asleep {}
    assert_eq!(text(&endpoint, json!({})).await, adapted);
    assert_ne!(text(&endpoint, json!({ "lora": [] })).await, adapted);
    endpoint.stop().await;
}

/// What was computed under an adapter comes back from the disk for that adapter at that scale alone.
#[tokio::test]
async fn prompts_on_the_disk_are_those_of_their_adapters() {
    let folder = tempfile::tempdir().expect("a folder");
    let [one, same, other] =
        ["one.gguf", "same.gguf", "other.gguf"].map(|it| folder.path().join(it));
    Lora::random(1).write(&one, "llama");
    Lora::random(1).write(&same, "llama");
    Lora::random(2).write(&other, "llama");
    set_up();
    let start = async |adapter: &Path| {
        let cache = PromptCache { folder: folder.path().join("prompts"), limit_bytes: 64 << 20 };
        let extras = Extras { prompt_cache: Some(cache), ..Extras::default() };
        let spec = WorkerSpec { extras, ..WorkerSpec::new(glass(), one_thread()) };
        Worker::spawn(spec.adapted("it", adapter.to_owned())).await.expect("the worker starts")
    };
    let ask = async |worker: &Worker, adapters: AdapterChoice| {
        let tokens = (0..90).map(|at| 40 + at * 7).collect();
        let request =
            GenerateRequest { adapters, ..GenerateRequest::greedy(Prompt::Tokens(tokens), 20) };
        let (piece, finish) = worker.generate(request).unwrap().finish().await.unwrap();
        (piece.tokens, finish.restored_tokens)
    };
    let first = start(&one).await;
    let (wanted, restored) = ask(&first, AdapterChoice::Common).await;
    assert_eq!(restored, 0);
    first.drain().await;
    for (path, scale, restored) in
        [(&other, 1.0, 0), (&one, 0.5, 0), (&one, 0.0, 0), (&same, 1.0, 89)]
    {
        let next = start(path).await;
        let choice = AdapterChoice::These(vec![AdapterUse { id: 0, scale }]);
        let (tokens, found) = ask(&next, choice).await;
        assert_eq!(found, restored, "{} at {scale}", path.display());
        if restored > 0 {
            assert_eq!(tokens, wanted);
        }
        next.drain().await;
    }
}

#[tokio::test]
async fn what_is_no_adapter_of_the_model_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let options = ServerOptions { changes_adapters: true, ..ServerOptions::default() };
    let endpoint = Endpoint::with_options(options).await;
    endpoint.load(model(Vec::new())).await;
    let check = async |body: Value, wanted: &str| {
        let (status, answer) = endpoint.post("/lora-adapters", body).await;
        let message = answer["error"]["message"].as_str().expect("a message");
        assert_eq!(status, 400, "{message}");
        assert!(message.contains(wanted), "`{wanted}` is not in: {message}");
    };
    let load = |path: PathBuf| json!({ "path": path });
    check(load(path("missing.gguf")), "missing.gguf").await;
    check(load("relative.gguf".into()), "expected an absolute path").await;
    check(load(glass()), "it is no adapter").await;
    Lora::random(1).write(&path("other.gguf"), "gemma3");
    check(load(path("other.gguf")), "arch").await;
    std::fs::write(path("text.gguf"), "no GGUF at all").expect("written");
    check(load(path("text.gguf")), "text.gguf").await;

    // Matrices of another size, of other matrices, half of them, with numbers that are none.
    let write = |name: &str, tensors: &[(&str, [u64; 2])], number: f32| {
        let mut writer = Writer::new();
        writer.set("general.type", "adapter").set("general.architecture", "llama");
        writer.set("adapter.type", "lora").set("adapter.lora.alpha", ALPHA);
        for (name, dimensions) in tensors {
            writer.tensor(name, dimensions, TensorType::F32);
        }
        let written = writer.create(&path(name), |data| {
            for (_, [a, b]) in tensors {
                data.write(&bytes(&vec![number; (a * b) as usize]))?;
            }
            Ok(())
        });
        written.expect("it is written");
        load(path(name))
    };
    let [inputs, outputs] = size(CHANGED[0]).map(|size| size as u64);
    let (a, b) = ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b");
    let small = write("small.gguf", &[(a, [inputs / 2, 4]), (b, [4, outputs])], 0.1);
    check(small, "incorrect shape").await;
    let apart = write("apart.gguf", &[(a, [inputs, 4]), (b, [8, outputs])], 0.1);
    check(apart, "do not go together").await;
    check(write("half.gguf", &[(a, [inputs, 4])], 0.1), "is missing").await;
    let elsewhere =
        [("blk.9.x.weight.lora_a", [inputs, 4]), ("blk.9.x.weight.lora_b", [4, outputs])];
    check(write("elsewhere.gguf", &elsewhere, 0.1), "does not exist in base model").await;
    check(write("odd.gguf", &[("blk.0.attn_q.weight", [inputs, 4])], 0.1), "is no part of").await;
    let none = write("none.gguf", &[(a, [inputs, 4]), (b, [4, outputs])], f32::NAN);
    check(none, "numbers that are none").await;

    Lora::random(1).write(&path("good.gguf"), "llama");
    let (status, _) = endpoint.post("/lora-adapters", load(path("good.gguf"))).await;
    assert_eq!(status, 201);
    check(load(path("good.gguf")), "there is an adapter `good` already").await;
    check(json!([{ "id": 7, "scale": 1 }]), "there is no adapter number 7").await;
    check(json!([{ "id": 0, "scale": 1e9 }]), "is not within").await;
    check(json!([{ "id": 0 }]), "expected a list such as").await;
    check(json!({ "name": "x" }), "path: it is missing").await;
    let (status, answer) = endpoint
        .post("/v1/completions", json!({ "prompt": "a", "model": "glass:good", "lora": [] }))
        .await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("lora")));
    assert_eq!(endpoint.host.status().worker_crashes, 0);
    endpoint.stop().await;

    // Where the model was verified, nobody changes what it answers.
    let endpoint = Endpoint::serving(model(Vec::new())).await;
    let (status, answer) = endpoint.post("/lora-adapters", load(path("good.gguf"))).await;
    assert_eq!((status, &answer["error"]["code"]), (403, &json!("adapters_fixed")));
    endpoint.stop().await;
}
