//! `slm optimize`.

use std::path::{Path, PathBuf};

use slmops_artifact::files;

use super::Session;
use crate::error::{Context as _, Result};
use crate::output::table;
use crate::ship::report::{self, Row};
use crate::ship::{engine, source};
use crate::units;

/// Make variants.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Make variants of a model from its 16-bit reference, without a hub. With \
                  --evaluate each is measured against the reference.",
    after_help = "Examples:\n  $ slm optimize model.gguf --quantisation Q8_0,Q4_K_M --out variants --evaluate\n  $ slm optimize tuned.gguf --quantisation Q4_1 --base before-q4_1.gguf --out variants --evaluate"
)]
pub struct Optimize {
    /// A GGUF file, or a Hugging Face folder of a Llama-architecture model
    pub model: PathBuf,
    /// GGUF file types, joined by commas
    #[arg(
        long,
        visible_alias = "quantization",
        value_delimiter = ',',
        required_unless_present = "base",
        value_name = "TYPES"
    )]
    pub quantisation: Vec<String>,
    /// The folder that the variants go to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Also make a variant with the types and scales of this earlier one, which costs less to send to
    /// devices that have it
    #[arg(long, value_name = "FILE")]
    pub base: Option<PathBuf>,
    /// Measure each variant
    #[arg(long)]
    pub evaluate: bool,
    /// How variants are measured
    #[command(flatten)]
    pub measuring: engine::MeasuringArgs,
}

impl Optimize {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        std::fs::create_dir_all(&self.out).user(|| format!("create `{}`", self.out.display()))?;
        let original = source::original(session, &self.model).await?;
        let reference = source::reference(session, &original).await?;
        let mut made = Vec::new();
        for quantisation in &self.quantisation {
            let quantisation = quantisation.to_uppercase();
            let variant = source::variant(session, &reference, &quantisation).await?;
            let target = self.out.join(format!("{}.gguf", quantisation.to_lowercase()));
            std::fs::copy(&variant.path, &target)
                .user(|| format!("write `{}`", target.display()))?;
            made.push((quantisation, source::File { path: target, ..variant }));
        }
        if let Some(base) = &self.base {
            let file = onto(session, &reference, base, &self.out).await?;
            made.push((format!("{} on the base", file.file_type), file));
            for (name, file) in &made {
                compare(session, name, base, &file.path).await?;
            }
        }
        if !self.evaluate {
            let files: Vec<&source::File> = made.iter().map(|(_, file)| file).collect();
            return session.out.show(&files, || {
                let rows = made.iter().map(|(name, file)| {
                    vec![
                        name.clone(),
                        units::bytes(file.size_bytes),
                        file.path.display().to_string(),
                    ]
                });
                table(&["type", ">size", "file"], rows)
            });
        }
        let measuring = self.measuring.load()?;
        let mut reports = vec![(
            "reference".to_owned(),
            engine::evaluate(session, "the reference", &reference, &reference, &measuring).await?,
        )];
        for (name, file) in &made {
            let report = engine::evaluate(session, name, file, &reference, &measuring).await?;
            reports.push((name.to_lowercase(), report));
        }
        let all: Vec<_> = reports.iter().map(|(_, report)| report).collect();
        session.out.show(&all, || {
            let rows: Vec<Row<'_>> = reports
                .iter()
                .map(|(name, report)| Row {
                    name: name.clone(),
                    classes: String::new(),
                    report,
                    gate: None,
                })
                .collect();
            report::measurements(&rows)
        })
    }
}

/// A tensor that takes more than this share of a delta is named.
const LARGE_SHARE: f64 = 0.4;

/// Makes the variant that keeps the scales of `base`.
async fn onto(
    session: &Session,
    reference: &source::File,
    base: &Path,
    out: &Path,
) -> Result<source::File> {
    let stage = session.progress.stage(format!("round to the scales of {}", base.display()));
    let target = out.join("on-base.gguf");
    let work = {
        let (reference, base, target) = (reference.path.clone(), base.to_owned(), target.clone());
        tokio::task::spawn_blocking(move || -> Result<source::File> {
            let what = || format!("make `{}`", target.display());
            let step = slmops_optimize::quantise_onto(&reference, &base, &target).user(what)?;
            Ok(source::File { steps: vec![step], ..source::inspect(&target)? })
        })
    };
    let file = work.await.internal(|| "round to the scales of the base".to_owned())??;
    stage.done(units::bytes(file.size_bytes));
    Ok(file)
}

/// Says what the delta from `base` takes, and which tensor takes most of it.
async fn compare(session: &Session, name: &str, base: &Path, new: &Path) -> Result<()> {
    let stage = session.progress.stage(format!("delta from the base to {name}"));
    let (base, new) = (base.to_owned(), new.to_owned());
    let work = tokio::task::spawn_blocking(move || -> Result<slmops_delta::Encoded> {
        let map = |path: &Path| files::map(path).user(|| format!("read `{}`", path.display()));
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(slmops_delta::encode(&map(&base)?, &map(&new)?, threads, &|_| ()))
    });
    let encoded = work.await.internal(|| "make a delta".to_owned())??;
    let bytes = encoded.bytes.len() as u64;
    stage.done(units::bytes(bytes));
    let largest = encoded.parts.iter().max_by_key(|part| part.delta_bytes);
    if let Some(part) = largest
        && let Some(tensor) = &part.name
        && part.delta_bytes as f64 > bytes as f64 * LARGE_SHARE
    {
        let share = part.delta_bytes as f64 * 100.0 / bytes as f64;
        session.progress.say(format!(
            "    {share:.0} % of it is `{tensor}`: left as it was in training (frozen), it would \
             cost nothing"
        ));
    }
    Ok(())
}
