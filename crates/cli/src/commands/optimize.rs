//! `slm optimize`.

use std::path::{Path, PathBuf};

use serde::Serialize;
use slmops_api::report::EvaluationReport;
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

/// What was made, and what is known of it.
#[derive(Serialize)]
struct Report {
    /// The model before it was quantised, measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<EvaluationReport>,
    /// The earlier version, measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<EvaluationReport>,
    variants: Vec<Variant>,
    /// What the scales of the earlier version did to the delta and to the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    on_base: Option<OnBase>,
}

/// A file that was made.
#[derive(Serialize)]
struct Variant {
    name: String,
    file: source::File,
    /// The delta from the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    delta_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<EvaluationReport>,
}

/// The variant with the scales of the base against one of the same type with scales of its own.
#[derive(Serialize)]
struct OnBase {
    delta_bytes: u64,
    own_scales_delta_bytes: u64,
    /// By how much held-out text became more likely from the base on, in nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    gain: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    own_scales_gain: Option<f64>,
}

impl Optimize {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        std::fs::create_dir_all(&self.out).user(|| format!("create `{}`", self.out.display()))?;
        let original = source::original(session, &self.model).await?;
        let reference = source::reference(session, &original).await?;
        let base = self.base.as_deref().map(source::inspect).transpose()?;
        let mut types: Vec<String> = self.quantisation.iter().map(|it| it.to_uppercase()).collect();
        // What the variant on the base is compared with.
        let same = base.as_ref().map(|base| base.file_type.to_uppercase());
        let missing = same.clone().filter(|same| !types.contains(same) && is_file_type(same));
        types.extend(missing);
        let mut variants = Vec::new();
        for name in types {
            let variant = source::variant(session, &reference, &name).await?;
            let target = self.out.join(format!("{}.gguf", name.to_lowercase()));
            std::fs::copy(&variant.path, &target)
                .user(|| format!("write `{}`", target.display()))?;
            let file = source::File { path: target, ..variant };
            variants.push(Variant { name, file, delta_bytes: None, report: None });
        }
        if let Some(base) = &base {
            let file = onto(session, &reference, &base.path, &self.out).await?;
            let name = format!("{} on the base", file.file_type);
            variants.push(Variant { name, file, delta_bytes: None, report: None });
            for variant in &mut variants {
                let bytes = compare(session, &variant.name, &base.path, &variant.file.path).await?;
                variant.delta_bytes = Some(bytes);
            }
        }
        let mut report = Report { reference: None, base: None, variants, on_base: None };
        if self.evaluate {
            let measuring = self.measuring.load()?;
            let evaluate = async |label: &str, file: &source::File| {
                engine::evaluate(session, label, file, &reference, None, &measuring).await
            };
            report.reference = Some(evaluate("the reference", &reference).await?);
            if let Some(base) = &base {
                report.base = Some(evaluate("the base", base).await?);
            }
            for variant in &mut report.variants {
                variant.report = Some(evaluate(&variant.name, &variant.file).await?);
            }
        }
        report.on_base = same.and_then(|same| report.against(&same));
        session.out.show(&report, || text(&report))
    }
}

fn is_file_type(name: &str) -> bool {
    slmops_optimize::check_file_type(name).is_ok()
}

impl Report {
    /// The last variant, which is the one on the base, against the one of type `same`.
    fn against(&self, same: &str) -> Option<OnBase> {
        let own = self.variants.iter().find(|variant| variant.name == same)?;
        let kept = self.variants.last()?;
        Some(OnBase {
            delta_bytes: kept.delta_bytes?,
            own_scales_delta_bytes: own.delta_bytes?,
            gain: self.gain(kept),
            own_scales_gain: self.gain(own),
        })
    }

    /// In nats per token.
    fn gain(&self, variant: &Variant) -> Option<f64> {
        let (base, report) = (self.base.as_ref()?, variant.report.as_ref()?);
        Some((base.perplexity / report.perplexity).ln())
    }
}

fn text(report: &Report) -> String {
    let measured = [("reference", &report.reference), ("base", &report.base)]
        .into_iter()
        .chain(report.variants.iter().map(|variant| (variant.name.as_str(), &variant.report)));
    let rows: Vec<Row<'_>> = measured
        .filter_map(|(name, report)| {
            let report = report.as_ref()?;
            Some(Row { name: name.to_lowercase(), classes: String::new(), report, gate: None })
        })
        .collect();
    let mut parts = Vec::new();
    if rows.is_empty() {
        let rows = report.variants.iter().map(|Variant { name, file, .. }| {
            vec![name.clone(), units::bytes(file.size_bytes), file.path.display().to_string()]
        });
        parts.push(table(&["type", ">size", "file"], rows));
    } else {
        parts.push(report::measurements(&rows));
    }
    if report.variants.iter().any(|variant| variant.delta_bytes.is_some()) {
        let rows = report.variants.iter().map(|variant| {
            let bytes = variant.delta_bytes.unwrap_or(0);
            let gain = report.gain(variant).map(|gain| format!("{gain:.4}"));
            vec![
                variant.name.to_lowercase(),
                units::bytes(bytes),
                percent(bytes as f64 / variant.file.size_bytes.max(1) as f64),
                gain.unwrap_or_default(),
            ]
        });
        parts.push(table(&["variant", ">delta from the base", ">of the file", ">gain"], rows));
    }
    if let Some(kept) = &report.on_base {
        parts.push(kept.text());
    }
    parts.join("\n\n")
}

impl OnBase {
    fn text(&self) -> String {
        let saved = 1.0 - self.delta_bytes as f64 / self.own_scales_delta_bytes.max(1) as f64;
        let mut text = format!("On the scales of the base the delta is {} smaller", percent(saved));
        if let (Some(gain), Some(own)) = (self.gain, self.own_scales_gain) {
            text.push_str(&match own > 0.0 {
                true => format!(
                    ", and {} of the gain on held-out text is kept ({gain:.4} of {own:.4} nats per \
                     token)",
                    percent(gain / own)
                ),
                false => format!(
                    "; on this held-out text the new version is no better than the base \
                     ({own:.4} nats per token, {gain:.4} on its scales)"
                ),
            });
        }
        text.push('.');
        text
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
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

/// The bytes of the delta from `base`; says which tensor takes most of it.
async fn compare(session: &Session, name: &str, base: &Path, new: &Path) -> Result<u64> {
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
    Ok(bytes)
}
