use super::*;
use clap::Parser;
use slmops_api::model::Adapter;
use slmops_artifact::Digest;
use slmops_artifact::shape::ModelShape;

fn shape() -> ModelShape {
    ModelShape {
        architecture: "llama".to_owned(),
        parameters: 1,
        layers: 1,
        embedding: 1,
        feed_forward: 1,
        heads: 1,
        kv_heads: 1,
        key_width: 1,
        value_width: 1,
        vocabulary: 1,
        trained_context: 1,
    }
}

fn original(content: &[u8], title: Option<&str>, stem: &str) -> Original {
    let file = File {
        path: "model.gguf".into(),
        digest: Digest::of(content),
        size_bytes: 1,
        file_type: "F16".to_owned(),
        shape: shape(),
        repacked_bytes: 0,
        steps: Vec::new(),
    };
    Original::new(file, title.map(str::to_owned), None, stem.to_owned())
}

fn release(version: &str, content: &[u8]) -> Release {
    Release {
        release: NewRelease {
            model: "glass".parse().unwrap(),
            version: version.parse().unwrap(),
            original: Digest::of(content),
            key: "k".parse().unwrap(),
            variants: Vec::new(),
            gate_override: None,
            requires: Default::default(),
        },
        created_at: jiff::Timestamp::UNIX_EPOCH,
        created_by: "test".to_owned(),
    }
}

fn version(text: &str) -> Version {
    text.parse().unwrap()
}

#[test]
fn a_version_is_chosen_or_refused() {
    let check = |asked: Option<&str>, content: &[u8]| {
        let releases = [release("1.0.0", b"first"), release("1.4.2", b"second")];
        choose_version(asked.map(version), &releases, &original(content, None, "m"), None)
    };
    assert_eq!(check(None, b"third").unwrap(), version("1.5.0"), "the next minor one");
    assert_eq!(check(None, b"second").unwrap(), version("1.4.2"), "the same file goes on");
    assert_eq!(check(Some("1.0.0"), b"first").unwrap(), version("1.0.0"));
    assert_eq!(check(Some("2.0.0"), b"first").unwrap(), version("2.0.0"));
    let refused = check(Some("1.0.0"), b"third").unwrap_err().to_string();
    assert!(refused.contains("released already") && refused.contains("hint: "), "{refused}");
    let first = choose_version(None, &[], &original(b"x", None, "m"), None).unwrap();
    assert_eq!(first, version("1.0.0"));
    // An adapter on the same file is something else.
    let adapter = Adapter { digest: Digest::of(b"adapter"), size_bytes: 7 };
    let adapter = AdapterFile { path: "adapter.gguf".into(), adapter };
    let check = |asked: Option<&str>| {
        let (releases, file) = ([release("1.0.0", b"first")], original(b"first", None, "m"));
        choose_version(asked.map(version), &releases, &file, Some(&adapter))
    };
    assert_eq!(check(None).unwrap(), version("1.1.0"));
    let refused = check(Some("1.0.0")).unwrap_err().to_string();
    assert!(refused.contains("with another adapter, or none"), "{refused}");
}

#[test]
fn a_name_is_made_of_the_models_own() {
    let check = |title, stem| original(b"x", title, stem).model_name().map(|name| name.to_string());
    assert_eq!(check(Some("SmolLM2 135M Instruct"), "m").unwrap(), "smollm2-135m-instruct");
    assert_eq!(check(None, "My Model (v2)").unwrap(), "my-model-v2");
    assert!(check(Some("模型"), "m").is_err(), "nothing is left of it");
}

fn ship(to: &str) -> Ship {
    let arguments = ["slm", "ship", "m.gguf", "--to", to];
    match crate::args::Args::try_parse_from(arguments).unwrap().command {
        crate::args::Command::Ship(ship) => ship,
        other => panic!("{other:?} is not a ship"),
    }
}

fn class(name: &str, min_memory_bytes: u64) -> DeviceClass {
    DeviceClass {
        name: name.parse().unwrap(),
        description: String::new(),
        min_memory_bytes,
        quantisation: "Q8_0".to_owned(),
    }
}

#[test]
fn classes_are_those_of_the_selector() {
    let check = |to: &str| {
        let all = vec![class("small", 0), class("large", 100), class("medium", 50)];
        choose_classes(all, &ship(to)).map(|chosen| report::join(&names(&chosen)))
    };
    fn names(classes: &[DeviceClass]) -> Vec<String> {
        classes.iter().map(|class| class.name.to_string()).collect()
    }
    assert_eq!(check("all").unwrap(), "large medium small");
    assert_eq!(check("class=small|large").unwrap(), "large small");
    assert_eq!(check("site=berlin").unwrap(), "large medium small");
    assert!(check("class=tiny").unwrap_err().to_string().contains("known are: small large medium"));
}
