//! Both ways with the reference implementation of OpenSSF Model Signing (PyPI `model-signing`).
//! `scripts/interop-model-signing.sh` installs it and runs these tests; without it they say that
//! they are skipped.

use std::path::{Path, PathBuf};
use std::process::Command;

use slmops_artifact::Digest;
use slmops_artifact::signing::{PrivateKey, SIGNATURE_FILE, SigningError, sign, verify};

/// The program, where it is installed.
fn program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("SLMOPS_MODEL_SIGNING") {
        return Some(path.into());
    }
    let home = PathBuf::from(std::env::var_os("HOME")?);
    let path = home.join(".cache/slmops/venv/bin/model_signing");
    if !path.is_file() {
        eprintln!("skipped: run scripts/interop-model-signing.sh to install model-signing");
        return None;
    }
    Some(path)
}

/// A model's folder, with keys beside it.
struct Model {
    root: tempfile::TempDir,
    key: PrivateKey,
}

impl Model {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let model = Self { root, key: PrivateKey::generate() };
        std::fs::create_dir_all(model.folder().join("docs")).unwrap();
        // Names whose order differs between whole paths and path components.
        for title in ["model.gguf", "probes.json", "docs/README.md", "docs.txt", "docs-1"] {
            std::fs::write(model.folder().join(title), format!("content of {title}")).unwrap();
        }
        std::fs::write(model.private(), model.key.to_pem().as_bytes()).unwrap();
        std::fs::write(model.public(), model.key.public().to_pem()).unwrap();
        model
    }

    fn folder(&self) -> PathBuf {
        self.root.path().join("model")
    }

    fn private(&self) -> PathBuf {
        self.root.path().join("private.pem")
    }

    fn public(&self) -> PathBuf {
        self.root.path().join("public.pem")
    }

    fn signature(&self) -> PathBuf {
        self.folder().join(SIGNATURE_FILE)
    }

    fn files(&self) -> Vec<(String, Digest)> {
        let mut files = Vec::new();
        collect(&self.folder(), "", &mut files);
        files.retain(|(title, _)| title != SIGNATURE_FILE);
        files
    }

    /// Runs the program on this model; the error is all that it printed.
    fn run(
        &self,
        program: &Path,
        action: &str,
        key_option: &str,
        key: &Path,
    ) -> Result<(), String> {
        let output = Command::new(program)
            .args([action, "key"])
            .arg(self.folder())
            .arg("--signature")
            .arg(self.signature())
            .arg(key_option)
            .arg(key)
            .output()
            .unwrap();
        let printed = [output.stdout, output.stderr].concat();
        let printed = String::from_utf8_lossy(&printed).into_owned();
        if output.status.success() { Ok(()) } else { Err(printed) }
    }

    fn verify_theirs(&self, program: &Path) -> Result<(), String> {
        self.run(program, "verify", "--public_key", &self.public())
    }
}

fn collect(folder: &Path, prefix: &str, files: &mut Vec<(String, Digest)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let title = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            collect(&entry.path(), &format!("{title}/"), files);
        } else {
            files.push((title, Digest::of(&std::fs::read(entry.path()).unwrap())));
        }
    }
}

#[test]
fn the_reference_implementation_accepts_our_signature() {
    let Some(program) = program() else { return };
    let model = Model::new();
    let bundle = sign("model", &model.files(), &model.key).unwrap();
    std::fs::write(model.signature(), bundle).unwrap();
    model.verify_theirs(&program).unwrap();

    let path = model.folder().join("probes.json");
    let content = std::fs::read(&path).unwrap();
    std::fs::write(&path, "changed").unwrap();
    assert!(model.verify_theirs(&program).unwrap_err().contains("Hash mismatch"));
    std::fs::remove_file(&path).unwrap();
    assert!(model.verify_theirs(&program).unwrap_err().contains("Missing files"));
    std::fs::write(&path, content).unwrap();
    std::fs::write(model.folder().join("added"), "").unwrap();
    assert!(model.verify_theirs(&program).unwrap_err().contains("Extra files"));
    std::fs::remove_file(model.folder().join("added")).unwrap();
    model.verify_theirs(&program).unwrap();

    std::fs::write(model.public(), PrivateKey::generate().public().to_pem()).unwrap();
    assert!(model.verify_theirs(&program).unwrap_err().contains("Key mismatch"));
}

#[test]
fn we_accept_the_reference_implementations_signature() {
    let Some(program) = program() else { return };
    let model = Model::new();
    model.run(&program, "sign", "--private_key", &model.private()).unwrap();
    let bundle = std::fs::read(model.signature()).unwrap();
    let statement = verify(&bundle, &[model.key.public()]).unwrap();
    assert_eq!(statement.files, model.files().into_iter().collect());
    assert_eq!(statement.model_name, "model");

    let stranger = [PrivateKey::generate().public()];
    assert!(matches!(verify(&bundle, &stranger), Err(SigningError::UnknownKey { .. })));
    // A changed, an added and a missing file each give other files than the signed ones.
    let check_differs = || assert_ne!(statement.files, model.files().into_iter().collect());
    let path = model.folder().join("probes.json");
    std::fs::write(&path, "changed").unwrap();
    check_differs();
    std::fs::write(&path, "content of probes.json").unwrap();
    assert_eq!(statement.files, model.files().into_iter().collect());
    std::fs::write(model.folder().join("added"), "").unwrap();
    check_differs();
    std::fs::remove_file(model.folder().join("added")).unwrap();
    std::fs::remove_file(path).unwrap();
    check_differs();
}
