//! `slm model`.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::Serialize;
use slmops_artifact::Digest;
use slmops_artifact::gguf;
use slmops_artifact::shape::ModelShape;

use super::{Session, delta};
use crate::error::{Context, Failure, Result};
use crate::output::fields;
use crate::units;

/// Model files.
#[derive(Debug, Subcommand)]
pub enum Model {
    /// Turn a Hugging Face folder (or a GGUF file) into a checked GGUF file
    #[command(
        after_help = "Example:\n  $ slm model import ./SmolLM2-135M-Instruct --out smollm2.gguf"
    )]
    Import {
        /// A folder with config.json, safetensors and tokenizer.json, or a GGUF file
        source: PathBuf,
        /// Where the GGUF file goes
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Check a GGUF file and show what is in it
    #[command(after_help = "Example:\n  $ slm model show smollm2.gguf")]
    Show {
        /// The file
        file: PathBuf,
    },
    /// Make a damaged copy that still loads and still talks, to see the fleet catch it
    #[command(after_help = "Example:\n  $ slm model damage smollm2.gguf --out damaged.gguf")]
    Damage {
        /// The file
        file: PathBuf,
        /// Where the damaged copy goes
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Make the delta that turns one model file into another
    #[command(
        long_about = "Make the delta that turns one model file into another: for a fine-tuned, \
                      requantised model a few percent of its size. GGUF and safetensors files are \
                      compared tensor by tensor, others as bytes.",
        after_help = "Example:\n  $ slm model delta smollm2-1.0.gguf smollm2-1.1.gguf --out 1.0-1.1.delta"
    )]
    Delta(delta::Delta),
    /// Make the new model file from the old one and a delta
    #[command(
        long_about = "Make the new model file from the old one and a delta. The new file appears \
                      whole, flushed to the disk and compared with its digest, or not at all.",
        after_help = "Example:\n  $ slm model patch smollm2-1.0.gguf 1.0-1.1.delta --out smollm2-1.1.gguf"
    )]
    Patch(delta::Patch),
}

/// What `slm model show` says.
#[derive(Serialize)]
struct Shown {
    file: PathBuf,
    digest: Digest,
    size_bytes: u64,
    name: Option<String>,
    file_type: String,
    license: Option<String>,
    chat_template: bool,
    tensors: usize,
    shape: ModelShape,
}

impl Model {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        match self {
            Self::Delta(delta) => delta.run(session).await,
            Self::Patch(patch) => patch.run(session).await,
            Self::Import { source, out } => {
                let stage = session.progress.stage(format!("import {}", source.display()));
                import(&source, &out).await?;
                let shown = look(&out)?;
                stage.done(format!("{} ({})", out.display(), units::bytes(shown.size_bytes)));
                session.out.show(&shown, || text(&shown))
            }
            Self::Show { file } => {
                let shown = look(&file)?;
                session.out.show(&shown, || text(&shown))
            }
            Self::Damage { file, out } => {
                let stage = session.progress.stage("scramble some layers");
                let what = || format!("damage `{}`", file.display());
                let damage = {
                    let (file, out) = (file.clone(), out.clone());
                    tokio::task::spawn_blocking(move || crate::ship::engine::damage(&file, &out))
                };
                damage.await.internal(what)??;
                stage.done(out.display().to_string());
                session.out.done(&format!("{} is a damaged copy", out.display()))
            }
        }
    }
}

/// Imports a folder, or checks and copies a GGUF file.
pub async fn import(source: &Path, out: &Path) -> Result<()> {
    let what = || format!("import `{}`", source.display());
    if !source.exists() {
        return Err(Failure::user(format!("there is no `{}`", source.display()))
            .hint("name a GGUF file or a Hugging Face folder"));
    }
    let (from, to) = (source.to_owned(), out.to_owned());
    let work = tokio::task::spawn_blocking(move || -> Result<()> {
        let what = || format!("import `{}`", from.display());
        if from.is_dir() {
            return slmops_artifact::huggingface::import(&from, &to).user(what);
        }
        gguf::check_file(&from).user(what)?;
        let part = to.with_extension("part");
        std::fs::copy(&from, &part).and_then(|_| std::fs::rename(&part, &to)).user(what)
    });
    work.await.internal(what)?
}

fn look(file: &Path) -> Result<Shown> {
    let what = || format!("read `{}`", file.display());
    let opened = gguf::open(file).user(what)?;
    let header = opened.header();
    let shape = gguf::shape(header).user(what)?;
    Ok(Shown {
        file: file.to_owned(),
        digest: Digest::of(opened.bytes()),
        size_bytes: opened.bytes().len() as u64,
        name: header.text("general.name").map(str::to_owned),
        file_type: header.file_type().to_owned(),
        license: header.text("general.license").map(str::to_owned),
        chat_template: header.chat_template().is_some(),
        tensors: header.tensors().len(),
        shape,
    })
}

fn text(shown: &Shown) -> String {
    let shape = &shown.shape;
    fields(&[
        ("file", shown.file.display().to_string()),
        ("digest", shown.digest.to_string()),
        ("size", units::bytes(shown.size_bytes)),
        ("name", shown.name.clone().unwrap_or_else(|| "none".to_owned())),
        ("licence", shown.license.clone().unwrap_or_else(|| "not stated".to_owned())),
        ("architecture", shape.architecture.clone()),
        ("file type", shown.file_type.clone()),
        ("parameters", format!("{:.1} million", shape.parameters as f64 / 1e6)),
        ("layers", format!("{} of width {}", shape.layers, shape.embedding)),
        ("heads", format!("{}, {} of them for keys and values", shape.heads, shape.kv_heads)),
        ("vocabulary", format!("{} tokens", shape.vocabulary)),
        ("context", format!("{} tokens in training", shape.trained_context)),
        ("chat template", if shown.chat_template { "yes" } else { "no" }.to_owned()),
        ("tensors", shown.tensors.to_string()),
    ])
}
