use super::*;
use crate::signing::PrivateKey;

fn package() -> Package {
    let config = ModelConfig {
        name: "glass".to_owned(),
        version: Some(semver::Version::new(1, 2, 3)),
        family: Some("llama".to_owned()),
        licenses: vec!["MIT".to_owned()],
        parameters: Some(852_608),
        quantisation: Some("Q4_K_M".to_owned()),
        ..ModelConfig::default()
    };
    let files = vec![
        PackageFile::of_bytes("model.gguf", b"weights"),
        PackageFile::of_bytes("probes.json", b"{}"),
        PackageFile::of_bytes("LICENSE", b"MIT"),
    ];
    Package::new(files, &config).unwrap()
}

#[test]
fn the_manifest_is_a_model_pack() {
    let package = package();
    let json = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
    insta::assert_json_snapshot!("manifest", json(&package.manifest_bytes()));
    insta::assert_json_snapshot!("config", json(package.config_bytes().unwrap()));
}

#[test]
fn a_manifest_survives_its_bytes() {
    let package = package();
    let bytes = package.manifest_bytes();
    let mut again = Package::parse(&bytes).unwrap();
    assert_eq!(again.config_bytes(), None);
    assert_eq!(again.files, package.files);
    assert_eq!(again.manifest_bytes(), bytes);
    let config = again.set_config_bytes(package.config_bytes().unwrap().to_vec()).unwrap();
    assert_eq!(config.version, Some(semver::Version::new(1, 2, 3)));
    assert_eq!(config.parameters, Some(852_600));
    assert_eq!(again, package);
    assert_eq!(again.weights().title, "model.gguf");
    assert!(matches!(again.set_config_bytes(b"{}".to_vec()), Err(PackageError::Config { .. })));
}

#[test]
fn a_signature_of_exactly_these_files_is_accepted() {
    let key = PrivateKey::generate();
    let package = package();
    let manifest = package.manifest_bytes();
    let sign = |files: &[(String, Digest)]| signing::sign("glass", files, &key).unwrap();
    let keys = [key.public()];
    let files = package.signed_files();
    assert_eq!(verify(&manifest, &sign(&files), &keys).unwrap().files, package.files);

    let check = |files: &[(String, Digest)], reason: &str| {
        let error = verify(&manifest, &sign(files), &keys).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    };
    let mut changed = files.clone();
    changed[1].1 = Digest::of(b"other");
    check(&changed, "\"probes.json\": the signature names another digest");
    check(&files[..2], "\"LICENSE\": the signature does not name it");
    let mut added = files.clone();
    added.push(("extra.json".to_owned(), Digest::of(b"extra")));
    check(&added, "\"extra.json\": the manifest lacks it");
    let stranger = PrivateKey::generate().public();
    assert!(verify(&manifest, &sign(&files), &[stranger]).is_err());
}

#[test]
fn an_adapter_names_the_weights_that_it_was_made_for() {
    let mut package = package();
    package.files.insert(0, PackageFile::of_bytes(ADAPTER_FILE, b"low rank"));
    let bytes = package.manifest_bytes();
    let weights = package.weights().digest;
    assert_ne!(weights, Digest::of(b"low rank"));
    let read = Package::parse(&bytes).unwrap();
    assert_eq!(read.adapter().map(|it| it.digest), Some(Digest::of(b"low rank")));
    assert_eq!(read.manifest_bytes(), bytes);
    // Of other weights: whoever made this mixed two packages up.
    let text = String::from_utf8(bytes).unwrap();
    let base = format!("\"{ADAPTER_BASE_ANNOTATION}\":\"{weights}\"");
    assert!(text.contains(&base), "{text}");
    let other = Digest::of(b"other weights");
    let mixed = text.replace(&base, &format!("\"{ADAPTER_BASE_ANNOTATION}\":\"{other}\""));
    let error = Package::parse(mixed.as_bytes()).unwrap_err().to_string();
    assert!(error.contains(&format!("\"adapter.gguf\" is made for {other}")), "{error}");
}

#[test]
fn a_signature_travels_as_a_referrer() {
    let subject = package().manifest_descriptor();
    let bundle = Digest::of(b"bundle");
    let bytes = signature_manifest(&subject, bundle, 6);
    insta::assert_json_snapshot!(
        "signature",
        serde_json::from_slice::<serde_json::Value>(&bytes).unwrap()
    );
    let manifest = parse_signature_manifest(&bytes).unwrap();
    assert_eq!(manifest.subject, subject);
    assert_eq!((manifest.bundle.digest, manifest.bundle.size), (bundle, 6));
    assert!(parse_signature_manifest(&package().manifest_bytes()).is_err());
    assert!(Package::parse(&bytes).is_err());
    let long = signature_manifest(&subject, bundle, u64::MAX);
    assert!(matches!(parse_signature_manifest(&long), Err(PackageError::Limit { .. })));
}

#[test]
fn unsafe_packages_are_not_made() {
    let config = ModelConfig::default();
    let file = |title: &str| PackageFile::of_bytes(title, b"");
    let check = |files: Vec<PackageFile>, message: &str| {
        let error = Package::new(files, &config).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    check(vec![], "no file holds weights");
    check(vec![file("README.md")], "no file holds weights");
    check(vec![file("adapter.gguf")], "no file holds weights");
    check(vec![file("model.gguf"), file("../x")], "plain relative path");
    check(vec![file("model.gguf"), file("model.gguf")], "occurs twice");
    check(vec![file("model.gguf"), file("model.sig")], "signature's own name");
    check(vec![file("model.gguf"); MAX_FILES + 1], "number of files");
    let mut long = file("model.gguf");
    long.size_bytes = u64::MAX;
    check(vec![long], "file length");
}

#[test]
fn foreign_or_hostile_manifests_are_refused() {
    let manifest: serde_json::Value = serde_json::from_slice(&package().manifest_bytes()).unwrap();
    let check = |field: &str, value: serde_json::Value, message: &str| {
        let mut changed = manifest.clone();
        *changed.pointer_mut(field).unwrap_or_else(|| panic!("no {field}")) = value;
        let error = Package::parse(&serde_json::to_vec(&changed).unwrap()).expect_err(field);
        let error = error.to_string();
        assert!(error.contains(message), "{field}: {error}");
        assert!(error.contains("hint:") && error.len() < 1000, "{field}: {error}");
    };
    check("/schemaVersion", 1.into(), "schemaVersion");
    check("/mediaType", "application/vnd.docker.distribution.manifest.v2+json".into(), "mediaType");
    check("/artifactType", "x".repeat(5000).into(), "artifactType");
    check("/config/mediaType", "application/json".into(), "config media type");
    check("/config/size", (1_u64 << 40).into(), "config length");
    check("/config/digest", "sha256:00".into(), "parse manifest");
    check("/layers/0/size", (-1).into(), "parse manifest");
    check("/layers/0/annotations", serde_json::json!({}), "layer 0 has no");
    check("/layers/0/annotations/org.cncf.model.filepath", "/etc/passwd".into(), "plain relative");
    check("/layers", serde_json::json!([]), "no file holds weights");
    assert!(Package::parse(&vec![b' '; MAX_MANIFEST_BYTES + 1]).is_err());
}

#[test]
fn parameter_counts_are_written_as_the_specification_asks() {
    for (count, text) in
        [(134_515_008, "134.5M"), (852_608, "852.6K"), (7_000_000_000, "7B"), (12, "0K")]
    {
        let config = ModelConfig { parameters: Some(count), ..ModelConfig::default() };
        let json: serde_json::Value = serde_json::from_slice(&config.to_bytes(&[])).unwrap();
        assert_eq!(json["config"]["paramSize"], text);
    }
}
