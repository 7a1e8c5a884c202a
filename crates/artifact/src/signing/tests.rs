use super::*;

fn files() -> Vec<(String, Digest)> {
    [("model.gguf", "weights"), ("probes.json", "probes"), ("docs/README.md", "words")]
        .map(|(title, content)| (title.to_owned(), Digest::of(content.as_bytes())))
        .to_vec()
}

fn envelope_payload(bundle: &[u8]) -> serde_json::Value {
    let bundle: serde_json::Value = serde_json::from_slice(bundle).unwrap();
    let payload = bundle["dsseEnvelope"]["payload"].as_str().unwrap();
    serde_json::from_slice(&BASE64.decode(payload).unwrap()).unwrap()
}

/// The bundle with its payload changed and signed again, as a publisher's broken tool might.
fn resigned(
    key: &PrivateKey,
    change: impl FnOnce(&mut serde_json::Value),
) -> Result<Statement, SigningError> {
    let bundle = sign("model", &files(), key).unwrap();
    let mut payload = envelope_payload(&bundle);
    change(&mut payload);
    let payload = serde_json::to_vec(&payload).unwrap();
    let mut bundle: serde_json::Value = serde_json::from_slice(&bundle).unwrap();
    bundle["dsseEnvelope"]["payload"] = BASE64.encode(&payload).into();
    bundle["dsseEnvelope"]["signatures"][0]["sig"] =
        BASE64.encode(key.sign(&pre_authentication_encoding(&payload))).into();
    verify(&serde_json::to_vec(&bundle).unwrap(), &[key.public()])
}

#[test]
fn what_is_signed_is_verified() {
    let key = PrivateKey::generate();
    let bundle = sign("model", &files(), &key).unwrap();
    let others = [PrivateKey::generate().public(), key.public()];
    let statement = verify(&bundle, &others).unwrap();
    assert_eq!(statement.model_name, "model");
    assert_eq!(statement.key_id, key.public().id());
    assert_eq!(statement.files, files().into_iter().collect());
}

#[test]
fn resources_are_ordered_by_path() {
    let files = ["a.b", "a/c", "b", "a/b"].map(|title| (title.to_owned(), Digest::of(b"")));
    let bundle = sign("model", &files, &PrivateKey::generate()).unwrap();
    let payload = envelope_payload(&bundle);
    let resources = payload["predicate"]["resources"].as_array().unwrap();
    let names: Vec<&str> = resources.iter().map(|item| item["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a/b", "a/c", "a.b", "b"]);
}

#[test]
fn another_key_is_not_trusted() {
    let bundle = sign("model", &files(), &PrivateKey::generate()).unwrap();
    for keys in [vec![], vec![PrivateKey::generate().public()]] {
        let error = verify(&bundle, &keys).unwrap_err();
        assert!(matches!(error, SigningError::UnknownKey { .. }), "{error}");
        assert!(error.to_string().contains("hint:"));
    }
}

#[test]
fn a_bundle_without_hint_is_tried_with_every_key() {
    let key = PrivateKey::generate();
    let bundle = sign("model", &files(), &key).unwrap();
    let mut bundle: serde_json::Value = serde_json::from_slice(&bundle).unwrap();
    bundle["verificationMaterial"] = serde_json::json!({"publicKey": {}});
    let bundle = serde_json::to_vec(&bundle).unwrap();
    verify(&bundle, &[PrivateKey::generate().public(), key.public()]).unwrap();
    assert!(verify(&bundle, &[PrivateKey::generate().public()]).is_err());
}

#[test]
fn a_changed_payload_or_signature_is_refused() {
    let key = PrivateKey::generate();
    let bundle = sign("model", &files(), &key).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&bundle).unwrap();
    for field in ["/dsseEnvelope/payload", "/dsseEnvelope/signatures/0/sig"] {
        let mut changed = json.clone();
        let text = changed.pointer_mut(field).unwrap();
        let mut bytes = BASE64.decode(text.as_str().unwrap()).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        *text = BASE64.encode(&bytes).into();
        let error = verify(&serde_json::to_vec(&changed).unwrap(), &[key.public()]).unwrap_err();
        assert!(matches!(error, SigningError::Mismatch), "{field}: {error}");
    }
}

#[test]
fn statements_that_say_something_else_are_refused_even_when_signed() {
    let key = PrivateKey::generate();
    let check = |field: &str, value: serde_json::Value, message: &str| {
        let result = resigned(&key, |payload| {
            *payload.pointer_mut(field).unwrap_or_else(|| panic!("no {field}")) = value;
        });
        let error = result.expect_err(field).to_string();
        assert!(error.contains(message), "{field}: {error}");
    };
    resigned(&key, |_| ()).unwrap();
    check("/_type", "https://in-toto.io/Statement/v0.1".into(), "statement type");
    check("/predicateType", "https://slsa.dev/provenance/v1".into(), "predicate type");
    check("/subject", serde_json::json!([]), "0 subjects");
    check("/subject/0/digest/sha256", "00".into(), "root digest");
    check("/predicate/serialization/method", "shards".into(), "serialization");
    check("/predicate/serialization/hash_type", "blake3".into(), "serialization");
    check("/predicate/resources", serde_json::json!([]), "0 files");
    check("/predicate/resources/0/name", "../etc/passwd".into(), "plain relative path");
    check("/predicate/resources/0/name", "model.gguf".into(), "occurs twice");
    check("/predicate/resources/0/algorithm", "md5".into(), "algorithm");
    check("/predicate/resources/0/digest", "zz".into(), "digest of");
}

#[test]
fn malformed_bundles_are_refused() {
    let key = PrivateKey::generate();
    let keys = [key.public()];
    assert!(matches!(verify(b"", &keys), Err(SigningError::Json { .. })));
    assert!(matches!(verify(b"[]", &keys), Err(SigningError::Json { .. })));
    let long = vec![b' '; MAX_BUNDLE_BYTES + 1];
    assert!(matches!(verify(&long, &keys), Err(SigningError::TooLong { .. })));
    let deep = "[".repeat(100_000);
    assert!(matches!(verify(deep.as_bytes(), &keys), Err(SigningError::Json { .. })));
    let json: serde_json::Value =
        serde_json::from_slice(&sign("model", &files(), &key).unwrap()).unwrap();
    for (field, value) in [
        ("/mediaType", serde_json::json!("application/json")),
        ("/dsseEnvelope/payloadType", serde_json::json!("text/plain")),
        ("/dsseEnvelope/payload", serde_json::json!("!!!")),
        ("/dsseEnvelope/signatures", serde_json::json!([])),
        ("/verificationMaterial", serde_json::json!({"certificate": {"rawBytes": ""}})),
    ] {
        let mut changed = json.clone();
        *changed.pointer_mut(field).unwrap() = value;
        let error = verify(&serde_json::to_vec(&changed).unwrap(), &keys).unwrap_err();
        assert!(matches!(error, SigningError::Form { .. }), "{field}: {error}");
    }
}

#[test]
fn unsafe_or_repeated_names_are_not_signed() {
    let key = PrivateKey::generate();
    let digest = Digest::of(b"");
    for name in ["", "/etc/passwd", "../x", "a//b", "a/./b", "a\\b", "c:x", "a\0b", "a\nb"] {
        let error = sign("model", &[(name.to_owned(), digest)], &key).unwrap_err();
        assert!(matches!(error, SigningError::Title(_)), "{name:?}: {error}");
    }
    let twice = vec![("a".to_owned(), digest); 2];
    assert!(matches!(sign("model", &twice, &key), Err(SigningError::Title(_))));
    assert!(matches!(sign("model", &[], &key), Err(SigningError::Count { count: 0 })));
}

#[test]
fn keys_survive_their_text_and_hide_their_secret() {
    let key = PrivateKey::generate();
    let again = PrivateKey::from_pem(&key.to_pem()).unwrap();
    assert_eq!(again.public(), key.public());
    assert_eq!(PublicKey::from_pem(key.public().to_pem()).unwrap(), key.public());
    assert_eq!(key.public().id().len(), 16);
    assert!(!format!("{key:?}").contains(&key.to_pem()[30..60]));
    for text in
        ["", "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n", key.public().to_pem()]
    {
        assert!(PrivateKey::from_pem(text).is_err());
    }
    assert!(PublicKey::from_pem(&key.to_pem()).is_err());
}

/// Made by `openssl ecparam -name prime256v1 -genkey` and `openssl ec -pubout`.
#[test]
fn keys_of_openssl_are_read() {
    let private = "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n\
        -----BEGIN EC PRIVATE KEY-----\n\
        MHcCAQEEILPGAUcn15hP4fuqr9pNRMAvCEpS4sjAgdNgeShDGa4toAoGCCqGSM49\n\
        AwEHoUQDQgAEB6fwxNC+FS2LEFhcfbOo61vnqnDGTeUFHDXZSoW2T825K6Jpu7C0\n\
        fgcr67CrTXqm5k3vQt3Mgb6ig+/pObrnlQ==\n\
        -----END EC PRIVATE KEY-----\n";
    let public = "-----BEGIN PUBLIC KEY-----\n\
        MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEB6fwxNC+FS2LEFhcfbOo61vnqnDG\n\
        TeUFHDXZSoW2T825K6Jpu7C0fgcr67CrTXqm5k3vQt3Mgb6ig+/pObrnlQ==\n\
        -----END PUBLIC KEY-----\n";
    let private = PrivateKey::from_pem(private).unwrap();
    assert_eq!(private.public(), PublicKey::from_pem(public).unwrap());
    assert_eq!(private.public().to_pem(), public);
}
