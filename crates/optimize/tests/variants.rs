//! Variants of the small fixture model, made in real child processes.

use std::fs;
use std::path::{Path, PathBuf};

use slmops_artifact::gguf;
use slmops_optimize::{
    DAMAGE_KEY, Damage, OptimizeError, damage, quantise, quantise_onto, reference,
};

fn start() -> PathBuf {
    slmops_inference::child::set_program(env!("CARGO_BIN_EXE_slmops-optimize-child"));
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/glasslm/glass-f32.gguf")
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_model_goes_through_reference_and_quantisation() {
    let model = start();
    let folder = tempfile::tempdir().unwrap();
    let f16 = folder.path().join("f16.gguf");
    let steps = reference(&model, &f16).await.unwrap();
    assert_eq!(steps.len(), 1);
    assert_eq!(steps[0].settings["type"], "F16");

    let q8 = folder.path().join("q8_0.gguf");
    let mut seen = Vec::new();
    let step = quantise(&f16, &q8, "q8_0", 1, |progress| seen.push(progress)).await.unwrap();
    assert_eq!(step.name, "quantise");
    assert_eq!(step.settings["type"], "Q8_0");
    let bits: f64 = step.settings["bits_per_weight"].parse().unwrap();
    // Eight bits and a half-float for 32 weights, and norms in F32.
    assert!((8.5..9.5).contains(&bits), "{bits}");
    assert_eq!(gguf::check_file(&q8).unwrap().file_type(), "Q8_0");
    let last = seen.last().unwrap();
    assert!(last.done == last.total && seen.len() > 5, "{seen:?}");
    assert!(fs::metadata(&q8).unwrap().len() < fs::metadata(&f16).unwrap().len());
    assert_eq!(names(folder.path()), ["f16.gguf", "q8_0.gguf"]);

    // A second loss upon the first is refused, with the way out.
    let error = quantise(&q8, &folder.path().join("q4.gguf"), "Q4_0", 1, |_| ()).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("already Q8_0") && error.contains("hint: "), "{error}");
}

#[tokio::test]
async fn a_huggingface_folder_gives_the_same_reference_as_its_gguf() {
    let model = start();
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("one.gguf"), folder.path().join("other.gguf"));
    reference(&model, &one).await.unwrap();
    let steps = reference(&model.with_file_name("hf"), &other).await.unwrap();
    assert_eq!(
        steps.iter().map(|step| step.name.as_str()).collect::<Vec<_>>(),
        ["import", "reference"]
    );
    let (one, other) = (gguf::open(&one).unwrap(), gguf::open(&other).unwrap());
    for tensor in one.header().tensors() {
        let theirs = other.header().tensor(&tensor.name).unwrap();
        assert!(one.data(tensor) == other.data(theirs), "{}", tensor.name);
    }
    assert_eq!(names(folder.path()), ["one.gguf", "other.gguf"]);
}

#[tokio::test]
async fn bad_input_is_told_and_leaves_nothing() {
    let model = start();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.gguf");

    let error = quantise(&model, &output, "Q5_X", 1, |_| ()).await.unwrap_err().to_string();
    assert!(error.contains("`Q5_X`") && error.contains("Q4_K_M"), "{error}");

    let torn = folder.path().join("torn.gguf");
    let bytes = fs::read(&model).unwrap();
    fs::write(&torn, &bytes[..bytes.len() / 2]).unwrap();
    for error in [
        quantise(&torn, &output, "Q8_0", 1, |_| ()).await.unwrap_err(),
        reference(&torn, &output).await.unwrap_err(),
        damage(&torn, &output, &Damage::default()).unwrap_err(),
        quantise(&folder.path().join("none"), &output, "Q8_0", 1, |_| ()).await.unwrap_err(),
    ] {
        assert!(matches!(error, OptimizeError::Model { .. }), "{error}");
    }
    let nowhere = folder.path().join("none/out.gguf");
    let error = quantise(&model, &nowhere, "Q8_0", 1, |_| ()).await.unwrap_err();
    assert!(matches!(error, OptimizeError::Io { .. }), "{error}");
    assert_eq!(names(folder.path()), ["torn.gguf"]);
}

#[test]
fn damage_moves_rows_of_middle_layers_and_says_so() {
    let model = start();
    let folder = tempfile::tempdir().unwrap();
    let (one, same, other) =
        (folder.path().join("one"), folder.path().join("same"), folder.path().join("other"));
    let what = Damage { seed: 7, layers_percent: 40 };
    let step = damage(&model, &one, &what).unwrap();
    damage(&model, &same, &what).unwrap();
    damage(&model, &other, &Damage { seed: 8, ..what }).unwrap();
    assert_eq!(fs::read(&one).unwrap(), fs::read(&same).unwrap(), "it is repeatable");
    assert_ne!(fs::read(&one).unwrap(), fs::read(&other).unwrap());

    let (before, after) = (gguf::open(&model).unwrap(), gguf::open(&one).unwrap());
    assert!(after.header().text(DAMAGE_KEY).unwrap().contains("seed 7"));
    let mut changed = Vec::new();
    for tensor in before.header().tensors() {
        let (old, new) =
            (before.data(tensor), after.data(after.header().tensor(&tensor.name).unwrap()));
        if old != new {
            changed.push(tensor.name.clone());
            let row = tensor.row_elements() as usize * 4;
            let sorted = |data: &[u8]| {
                let mut rows: Vec<Vec<u8>> = data.chunks(row).map(<[u8]>::to_vec).collect();
                rows.sort();
                rows
            };
            assert_eq!(sorted(old), sorted(new), "rows are moved whole");
        }
    }
    let layers: Vec<&str> = step.settings["layers"].split(' ').collect();
    assert!(!layers.is_empty());
    let expected: Vec<String> =
        layers.iter().map(|layer| format!("blk.{layer}.ffn_down.weight")).collect();
    assert_eq!(changed, expected);
}

#[tokio::test]
async fn a_new_version_keeps_the_scales_of_the_one_before() {
    let model = start();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    reference(&model, &path("f16.gguf")).await.unwrap();
    quantise(&path("f16.gguf"), &path("base.gguf"), "q4_0", 1, |_| ()).await.unwrap();
    // The next version: the old one in 16 bits, with its feed-forward rows in another order.
    damage(&path("f16.gguf"), &path("next.gguf"), &Damage { seed: 1, layers_percent: 50 }).unwrap();
    let step = quantise_onto(&path("next.gguf"), &path("base.gguf"), &path("onto.gguf")).unwrap();
    assert_eq!(step.settings["type"], "Q4_0");
    let (base, onto) =
        (gguf::open(&path("base.gguf")).unwrap(), gguf::open(&path("onto.gguf")).unwrap());
    assert_eq!(onto.header().file_type(), "Q4_0");
    let (mut same, mut scales) = (0, 0);
    for tensor in onto.header().tensors() {
        let known = base.header().tensor(&tensor.name).unwrap();
        assert_eq!(known.tensor_type, tensor.tensor_type, "{}", tensor.name);
        let (old, new) = (base.data(known), onto.data(tensor));
        same += usize::from(old == new);
        if tensor.tensor_type == gguf::TensorType::Q4_0 && old != new {
            let of = |blocks: &[u8]| -> Vec<[u8; 2]> {
                blocks.chunks_exact(18).map(|block| [block[0], block[1]]).collect()
            };
            assert!(of(old) == of(new), "{} has other scales", tensor.name);
            scales += 1;
        }
    }
    assert!(same > 0 && scales > 0, "{same} tensors stay, {scales} keep their scales");

    let error = quantise_onto(&path("next.gguf"), &path("f16.gguf"), &path("x.gguf"));
    let onto_f16 = error.map(|step| step.settings["tensors"].clone());
    assert!(onto_f16.is_ok_and(|kept| kept == "0"), "nothing has scales there");
    let error = quantise_onto(&path("base.gguf"), &path("base.gguf"), &path("y.gguf"));
    assert!(matches!(error, Err(OptimizeError::AlreadyQuantised { .. })));
    assert!(!path("y.gguf").exists());
}
