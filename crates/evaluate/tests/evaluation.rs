//! Whole evaluations of the small fixture model, in real child processes.

use std::fs;
use std::path::{Path, PathBuf};

use slmops_api::report::Verdict;
use slmops_api::runtime::RuntimeConfig;
use slmops_artifact::gguf;
use slmops_evaluate::gate::{self, Against, Limits};
use slmops_evaluate::suite::{Suite, SuiteSource, TextPlan};
use slmops_evaluate::{Evaluation, Progress, Stage, probes};

fn start() -> PathBuf {
    slmops_inference::child::set_program(env!("CARGO_BIN_EXE_slmops-evaluate-child"));
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/glasslm/glass-f32.gguf")
}

/// Alice-like prose is all that the fixture knows; its vocabulary has no straight quotation mark.
fn suite() -> Suite {
    let choice = r#"{"task":"alice","kind":"choice","prompt":"Alice was beginning","choices":[" to"," zq"],"answer":0}"#;
    let long = r#"{"task":"alice","kind":"choice","prompt":"said the","choices":[" King","xxqqzz"],"answer":0}"#;
    let answer = r#"{"task":"answers","kind":"regex","prompt":"Alice was","pattern":"[a-z]","max_tokens":8}"#;
    Suite::parse(SuiteSource {
        tasks: [choice, long, answer].join("\n"),
        text: Suite::builtin().text().replace('"', ""),
        plan: TextPlan { chunk_tokens: 64, chunks: 6 },
    })
    .unwrap()
}

/// One thread: the engine's threads wait for each other by spinning, which on a machine that is
/// busy with other tests costs more than it brings.
fn evaluation(cache: &Path) -> Evaluation {
    let mut evaluation = Evaluation::new(suite(), cache);
    evaluation.runtime.threads = 1;
    evaluation.runtime.context_tokens = 128;
    evaluation.runtime.parallel = 1;
    evaluation
}

fn quantised(folder: &Path, model: &Path, file_type: &str) -> PathBuf {
    use slmops_inference::llama::{QuantiseOptions, quantise};
    let path = folder.join(format!("{file_type}.gguf"));
    let file_type = file_type.to_owned();
    let options = QuantiseOptions { file_type, threads: 1, requantise: true };
    quantise(model, &path, &options, |_, _| ()).unwrap();
    path
}

#[tokio::test]
async fn variants_are_measured_against_their_reference() {
    let model = start();
    let folder = tempfile::tempdir().unwrap();
    let evaluation = evaluation(&folder.path().join("cache"));
    let mut seen: Vec<Progress> = Vec::new();
    let original = evaluation.run(&model, &model, |progress| seen.push(progress)).await.unwrap();

    assert_eq!(original.subject, original.reference);
    assert_eq!(original.kl_divergence.mean, 0.0);
    assert_eq!(original.top1_agreement.mean, 1.0);
    assert_eq!(original.chunk_nll.len(), 6);
    assert!((2.0..400.0).contains(&original.perplexity), "{}", original.perplexity);
    assert_eq!(original.tasks.len(), 2);
    assert_eq!(original.tasks[0].items, [true, true]);
    assert_eq!(original.tasks[1].items, [true]);
    assert!(original.decode_tokens_per_s > 0.0 && original.prompt_tokens_per_s > 0.0);
    assert!(original.time_to_first_token_ms > 0.0);
    assert!((4 << 20..1 << 30).contains(&original.peak_memory_bytes));
    for stage in [Stage::Reference, Stage::Runtime] {
        let fractions: Vec<f64> =
            seen.iter().filter(|p| p.stage == stage).map(|p| p.fraction).collect();
        assert!(fractions.is_sorted(), "{stage}: {fractions:?}");
        assert_eq!((fractions[0], fractions[fractions.len() - 1]), (0.0, 1.0), "{stage}");
        assert!(fractions.len() > 3, "{stage}: {fractions:?}");
    }

    let fine = quantised(folder.path(), &model, "Q8_0");
    let coarse = quantised(folder.path(), &model, "Q4_0");
    seen.clear();
    let fine = evaluation.run(&fine, &model, |progress| seen.push(progress)).await.unwrap();
    let coarse = evaluation.run(&coarse, &model, |_| ()).await.unwrap();
    assert!(seen.iter().all(|progress| progress.stage != Stage::Reference), "it was kept");
    assert!(fine.kl_divergence.mean > 0.0);
    assert!(fine.kl_divergence.mean < coarse.kl_divergence.mean / 4.0);
    assert!(fine.top1_agreement.mean > coarse.top1_agreement.mean);
    assert!(fine.kl_p99 >= fine.kl_divergence.mean);
    assert!(fine.size_bytes > coarse.size_bytes);

    // The gate reads these very reports.
    let limits = Limits::against_original("Q8_0");
    let decision = gate::decide(&fine, &original, &Against::Original, &limits).unwrap();
    assert_ne!(decision.verdict, Verdict::Worse, "{decision:#?}");
    let limits = Limits { kl_divergence: 0.002, ..limits };
    let decision = gate::decide(&coarse, &original, &Against::Original, &limits).unwrap();
    assert_eq!(decision.verdict, Verdict::Worse, "{decision:#?}");

    let table = slmops_evaluate::render::reports(&[("f32", &original), ("q8_0", &fine)]);
    assert_eq!(table.lines().count(), 4, "{table}");
    let left: Vec<_> = fs::read_dir(folder.path().join("cache"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(left.iter().all(|name| !name.contains("part")), "{left:?}");
}

#[tokio::test]
async fn chat_items_go_through_the_models_template() {
    let model = start();
    let folder = tempfile::tempdir().unwrap();
    // The template decides: it asks for another text than the item's, or refuses it.
    let templates = [
        ("right", "{{ messages[0].content }} Alice was beginning", Ok(())),
        ("refusing", "{{ raise_exception('not ' ~ messages[0].content) }}", Err("not Alice")),
    ];
    for (name, template, expected) in templates {
        let path = folder.path().join(format!("{name}.gguf"));
        copy(&model, &path, |writer| {
            writer.set("tokenizer.chat_template", template);
        });
        let mut evaluation = evaluation(&folder.path().join(name));
        let items = [true, false].map(|chat| {
            format!(
                r#"{{"task":"t","kind":"choice","prompt":"Alice","choices":["xq"," to"],"answer":1,"chat":{chat}}}"#
            )
        });
        evaluation.suite = Suite::parse(SuiteSource {
            tasks: items.join("\n"),
            text: suite().text().to_owned(),
            plan: TextPlan { chunk_tokens: 64, chunks: 1 },
        })
        .unwrap();
        match (evaluation.run(&path, &path, |_| ()).await, expected) {
            (Ok(report), Ok(())) => assert!(report.tasks[0].items[0], "{report:#?}"),
            (Err(error), Err(words)) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                assert!(error.contains(words), "{error}");
            }
            (outcome, _) => panic!("{name}: {outcome:?}"),
        }
    }
}

#[tokio::test]
async fn a_damaged_cache_is_told_and_a_missing_model_too() {
    let model = start();
    let folder = tempfile::tempdir().unwrap();
    let evaluation = evaluation(&folder.path().join("cache"));
    let missing = folder.path().join("none.gguf");
    let error = evaluation.run(&missing, &model, |_| ()).await.unwrap_err().to_string();
    assert!(error.contains("none.gguf"), "{error}");

    fs::write(&missing, b"GGUF but no more").unwrap();
    let error = evaluation.run(&missing, &missing, |_| ()).await.unwrap_err();
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(source.contains("none.gguf"), "{error} {source}");
    let left = fs::read_dir(folder.path().join("cache")).unwrap().count();
    assert_eq!(left, 0, "a failed evaluation leaves nothing behind");

    let variant = quantised(folder.path(), &model, "Q8_0");
    evaluation.run(&variant, &model, |_| ()).await.unwrap();
    for entry in fs::read_dir(folder.path().join("cache")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "logprobs") {
            fs::write(path, b"torn").unwrap();
        }
    }
    let error = evaluation.run(&variant, &model, |_| ()).await.unwrap_err();
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(source.contains("delete the file"), "{error} {source}");
}

#[tokio::test]
async fn a_cache_folder_that_cannot_be_written_is_told() {
    let model = start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, b"").unwrap();
    let evaluation = evaluation(&file);
    let error = evaluation.run(&model, &model, |_| ()).await.unwrap_err().to_string();
    assert!(error.contains("write"), "{error}");
}

#[tokio::test]
async fn a_damaged_successor_fails_the_golden_probes_of_the_line() {
    use slmops_inference::probe;
    use slmops_inference::worker::{Worker, WorkerSpec};
    let model = start();
    let folder = tempfile::tempdir().unwrap();
    let one_thread = RuntimeConfig { threads: 1, ..RuntimeConfig::default() };
    let golden = probes::ask(&model, None, &one_thread).await.unwrap();
    let variant = quantised(folder.path(), &model, "Q8_0");
    let set = probes::for_variant(&golden, &variant, None, &one_thread).await.unwrap();
    assert!(set.probes.len() >= 3, "{set:#?}");
    let names: std::collections::BTreeSet<_> = set.probes.iter().map(|probe| &probe.name).collect();
    assert_eq!(names.len(), set.probes.len());

    let broken = folder.path().join("broken.gguf");
    scramble(&variant, &broken);
    assert!(set.replay.len() >= 30, "{} prompts to replay", set.replay.len());
    let asked: Vec<&str> = set.probes.iter().map(|probe| probe.prompt.as_str()).collect();
    assert!(set.replay.iter().all(|it| !asked.contains(&it.prompt.as_str())), "held out");
    for (path, healthy) in [(&variant, true), (&model, true), (&broken, false)] {
        let runtime = RuntimeConfig {
            context_tokens: 128,
            batch_tokens: 128,
            parallel: 1,
            threads: 1,
            ..Default::default()
        };
        let worker_spec = WorkerSpec::new(path.clone(), runtime);
        let worker = Worker::spawn(worker_spec.clone()).await.unwrap();
        let results = probe::run(&worker, &set).await;
        let passed = results.iter().filter(|result| result.passed).count();
        if healthy {
            assert_eq!(passed, results.len(), "{results:#?}");
        } else {
            assert!(passed < results.len() / 2, "{results:#?}");
        }
        let spec = WorkerSpec { model_path: model.clone(), ..worker_spec };
        let reference = Worker::spawn(spec).await.unwrap();
        let minute = std::time::Duration::from_secs(60);
        let losses = probe::replay(&reference, &worker, &set.replay, minute).await;
        assert_eq!(losses.len(), set.replay.len());
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        // Eight bits cost hundredths of a nat, scrambled layers whole nats.
        assert!(if healthy { mean.abs() < 0.05 } else { mean > 0.5 }, "{mean}");
        let none = std::time::Duration::ZERO;
        assert!(probe::replay(&reference, &worker, &set.replay, none).await.is_empty());
        reference.drain().await;
        worker.drain().await;
    }

    let carried = probes::carry_over(&[("Q8_0".into(), set.clone())], "Q4_K_M").unwrap();
    assert_eq!(carried, set, "standards never sink");
    assert_eq!(probes::carry_over(&[], "Q4_K_M"), None);
}

/// Reverses the rows of every feed-forward output matrix.
fn scramble(input: &Path, output: &Path) {
    rewrite(
        input,
        output,
        |_| (),
        |tensor, data, out| {
            let rows = (tensor.elements() / tensor.row_elements()) as usize;
            if tensor.name.ends_with("ffn_down.weight") {
                data.chunks(data.len() / rows).rev().try_for_each(|row| out.write(row))
            } else {
                out.write(data)
            }
        },
    );
}

/// Copies a model with other metadata.
fn copy(input: &Path, output: &Path, change: impl Fn(&mut gguf::Writer)) {
    rewrite(input, output, change, |_, data, out| out.write(data));
}

fn rewrite(
    input: &Path,
    output: &Path,
    change: impl Fn(&mut gguf::Writer),
    write: impl Fn(
        &gguf::TensorInfo,
        &[u8],
        &mut gguf::TensorWriter<std::io::BufWriter<&fs::File>>,
    ) -> Result<(), gguf::GgufError>,
) {
    let file = gguf::open(input).unwrap();
    let mut writer = gguf::Writer::with_metadata_of(file.header());
    change(&mut writer);
    for tensor in file.header().tensors() {
        writer.tensor(&tensor.name, &tensor.dimensions, tensor.tensor_type);
    }
    let tensors = file.header().tensors();
    let written = writer.create(output, |out| {
        tensors.iter().try_for_each(|tensor| write(tensor, file.data(tensor), out))
    });
    written.unwrap();
}
