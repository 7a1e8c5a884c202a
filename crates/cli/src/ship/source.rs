//! The files of a ship: the original, its 16-bit reference and its variants, kept by digest.

use std::path::{Path, PathBuf};

use semver::Version;
use serde::{Deserialize, Serialize};
use slmops_api::model::Adapter;
use slmops_api::{ModelName, VariantName};
use slmops_artifact::lineage::{Lineage, Step};
use slmops_artifact::shape::ModelShape;
use slmops_artifact::{Digest, gguf};

use super::engine;
use crate::commands::{Session, model};
use crate::error::{Context, Failure, Result};
use crate::units;

/// A model file whose digest is known.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct File {
    /// Where it is.
    pub path: PathBuf,
    /// Its digest.
    pub digest: Digest,
    /// Its length.
    pub size_bytes: u64,
    /// Its GGUF file type.
    pub file_type: String,
    /// Its dimensions.
    pub shape: ModelShape,
    /// Bytes that the engine holds a second time in a faster layout.
    #[serde(default)]
    pub repacked_bytes: u64,
    /// What made it from its parent, as far as this program did.
    #[serde(default)]
    pub steps: Vec<Step>,
}

/// A LoRA adapter file whose digest is known.
#[derive(Clone, Debug)]
pub struct AdapterFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub adapter: Adapter,
}

/// Reads an adapter's header and digest. Whether it goes with a model is for the engine to say.
pub fn adapter(path: &Path) -> Result<AdapterFile> {
    let what = || format!("read `{}`", path.display());
    let opened = gguf::open(path).user(what)?;
    if opened.header().text("general.type") != Some("adapter") {
        return Err(Failure::user(format!("`{}` is no LoRA adapter", path.display())).hint(
            "llama.cpp's convert_lora_to_gguf.py makes one; a whole model is shipped without \
             --adapter",
        ));
    }
    let size_bytes = opened.bytes().len() as u64;
    let adapter = Adapter { digest: Digest::of(opened.bytes()), size_bytes };
    Ok(AdapterFile { path: path.to_owned(), adapter })
}

/// What is shipped.
pub struct Original {
    /// The file (of a folder: what it was imported to).
    pub file: File,
    /// The model's own name.
    pub title: Option<String>,
    /// Its licence, if it says.
    pub license: Option<String>,
    stem: String,
}

impl Original {
    /// An original of known content.
    pub fn new(file: File, title: Option<String>, license: Option<String>, stem: String) -> Self {
        Self { file, title, license, stem }
    }

    /// A name for the model line, from the model's own name or else the file's.
    pub fn model_name(&self) -> Result<ModelName> {
        let from = self.title.as_deref().unwrap_or(&self.stem);
        let from_words = |between: fn(char) -> bool| {
            let lower = from.to_lowercase();
            let words = lower.split(between).filter(|word| !word.is_empty());
            words.collect::<Vec<_>>().join("-").trim_matches(['.', '_']).parse()
        };
        from_words(|letter| !(letter.is_ascii_alphanumeric() || "._".contains(letter)))
            .or_else(|_| from_words(|letter| !letter.is_ascii_alphanumeric()))
            .map_err(|_| {
                Failure::user(format!("no name can be made of `{from}`"))
                    .hint("give one with --name")
            })
    }
}

/// Reads a file's header and digest.
pub fn inspect(path: &Path) -> Result<File> {
    let what = || format!("read `{}`", path.display());
    let opened = gguf::open(path).user(what)?;
    let shape = gguf::shape(opened.header()).user(what)?;
    Ok(File {
        path: path.to_owned(),
        digest: Digest::of(opened.bytes()),
        size_bytes: opened.bytes().len() as u64,
        file_type: opened.header().file_type().to_owned(),
        // The engine is told not to repack (see the worker's load options).
        repacked_bytes: 0,
        steps: Vec::new(),
        shape,
    })
}

async fn inspect_off_thread(path: PathBuf) -> Result<File> {
    let what = format!("read `{}`", path.display());
    tokio::task::spawn_blocking(move || inspect(&path)).await.internal(|| what)?
}

/// The original: a GGUF file as it is, a folder imported.
pub async fn original(session: &Session, model: &Path) -> Result<Original> {
    if !model.exists() {
        return Err(Failure::user(format!("there is no `{}`", model.display()))
            .hint("name a GGUF file or a Hugging Face folder"));
    }
    let stage = session.progress.stage(format!("read {}", model.display()));
    let file = if model.is_dir() {
        // Keyed by the weights' digest would need to read them twice; the import itself is quick.
        let folder = session.home.cache("originals")?;
        let part = folder.join(format!("import-{}.gguf", std::process::id()));
        let imported = async {
            model::import(model, &part).await?;
            inspect_off_thread(part.clone()).await
        };
        let imported = imported.await.inspect_err(|_| {
            // What is left of a failed import is of no use.
            let _ = std::fs::remove_file(&part);
        })?;
        let path = folder.join(format!("{}.gguf", imported.digest.hex()));
        std::fs::rename(&part, &path).user(|| format!("keep `{}`", path.display()))?;
        File { path, ..imported }
    } else {
        inspect_off_thread(model.to_owned()).await?
    };
    let opened = gguf::open(&file.path).user(|| format!("read `{}`", file.path.display()))?;
    let text = |key: &str| opened.header().text(key).map(str::to_owned);
    let original = Original::new(
        file,
        text("general.name").filter(|name| !name.trim().is_empty()),
        text("general.license"),
        model.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
    );
    stage.done(format!(
        "{}, {:.0} million parameters, {}, {}",
        original.file.shape.architecture,
        original.file.shape.parameters as f64 / 1e6,
        original.file.file_type,
        units::bytes(original.file.size_bytes)
    ));
    Ok(original)
}

/// A file of the cache, if it was made completely.
fn cached(path: &Path) -> Option<File> {
    let noted = std::fs::read(path.with_extension("json")).ok()?;
    let file: File = serde_json::from_slice(&noted).ok()?;
    let length = std::fs::metadata(path).ok()?.len();
    (length == file.size_bytes).then(|| File { path: path.to_owned(), ..file })
}

/// Notes a finished file, so that the next ship need not make or read it.
fn note(file: &File) -> Result<()> {
    let path = file.path.with_extension("json");
    let what = || format!("write `{}`", path.display());
    let noted = serde_json::to_vec(file).internal(what)?;
    crate::home::write_private(&path, &noted)
}

/// The original with every weight in 16 bits: what variants are made from and measured against.
pub async fn reference(session: &Session, original: &Original) -> Result<File> {
    let path =
        session.home.cache("references")?.join(format!("{}.gguf", original.file.digest.hex()));
    let stage = session.progress.stage("make the 16-bit reference");
    if let Some(file) = cached(&path) {
        stage.done("made before");
        return Ok(file);
    }
    let part = path.with_extension("part");
    let steps = engine::reference(&original.file.path, &part).await?;
    finish(&part, path, steps, stage).await
}

/// A variant of the reference.
pub async fn variant(session: &Session, reference: &File, quantisation: &str) -> Result<File> {
    let path = session.home.cache("variants")?.join(format!(
        "{}-{}.gguf",
        reference.digest.hex(),
        quantisation.to_lowercase()
    ));
    let stage = session.progress.stage(format!("make {quantisation}"));
    if let Some(file) = cached(&path) {
        stage.done("made before");
        return Ok(file);
    }
    let part = path.with_extension("part");
    let step = engine::quantise(&reference.path, &part, quantisation, &stage).await?;
    finish(&part, path, vec![step], stage).await
}

async fn finish(
    part: &Path,
    path: PathBuf,
    steps: Vec<Step>,
    stage: crate::progress::Stage,
) -> Result<File> {
    let file = inspect_off_thread(part.to_owned()).await?;
    std::fs::rename(part, &path).user(|| format!("keep `{}`", path.display()))?;
    let file = File { path, steps, ..file };
    note(&file)?;
    stage.done(units::bytes(file.size_bytes));
    Ok(file)
}

/// Where a variant comes from.
pub fn lineage(
    model: &ModelName,
    version: &Version,
    name: &VariantName,
    original: &Original,
    reference: &File,
    variant: &File,
    adapter: Option<&AdapterFile>,
) -> Lineage {
    let mut lineage =
        Lineage::original(model.as_str(), version.clone(), "original", original.file.digest);
    for step in &reference.steps {
        lineage = lineage.child("reference", original.file.digest, step.clone());
    }
    for step in &variant.steps {
        lineage = lineage.child(name.as_str(), reference.digest, step.clone());
    }
    if let Some(file) = adapter {
        let step = Step::new("apply adapter", [("digest", file.adapter.digest.to_string())]);
        lineage = lineage.child(name.as_str(), variant.digest, step);
    }
    lineage.tools = slmops_optimize::tools();
    lineage
}
