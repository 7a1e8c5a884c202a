//! What the pipeline asks of `optimize` and `evaluate`, with progress and a cache of reports.

use std::path::{Path, PathBuf};

use semver::Version;
use slmops_api::probe::ProbeSet;
use slmops_api::report::{EvaluationReport, GateDecision};
use slmops_api::runtime::RuntimeConfig;
use slmops_artifact::Digest;
use slmops_artifact::lineage::Step;
use slmops_evaluate::gate::{self, Against, Limits};
use slmops_evaluate::probes::{self, Golden};
use slmops_evaluate::suite::Suite;
use slmops_evaluate::{Evaluation, Stage as Measured};

use super::source::{AdapterFile, File};
use crate::commands::Session;
use crate::error::{Context, Result};
use crate::progress::Stage;

/// Threads for quantising: one for each core.
const ALL_CORES: u32 = 0;
/// Steps of a progress bar that stands for a share.
const BAR_STEPS: u64 = 1000;

/// How models are measured.
#[derive(Clone, Debug, clap::Args)]
pub struct MeasuringArgs {
    /// The task suite: a folder with tasks.jsonl and held-out.txt, or a JSONL file [default: the
    /// built-in one]
    #[arg(long, value_name = "PATH")]
    suite: Option<PathBuf>,
    /// Compute threads for measuring; 0 means one for each core
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    threads: u32,
}

/// How models are measured, loaded.
pub struct Measuring {
    suite: Suite,
    threads: u32,
}

impl MeasuringArgs {
    /// Loads the suite.
    pub fn load(&self) -> Result<Measuring> {
        let suite = match &self.suite {
            None => Suite::builtin(),
            Some(path) => {
                Suite::load(path).user(|| format!("load the suite `{}`", path.display()))?
            }
        };
        Ok(Measuring { suite, threads: self.threads })
    }
}

/// Measures a file against the reference, with an adapter on both if there is one; the same pair,
/// adapter, suite and engine are measured once.
pub async fn evaluate(
    session: &Session,
    label: &str,
    file: &File,
    reference: &File,
    adapter: Option<&AdapterFile>,
    measuring: &Measuring,
) -> Result<EvaluationReport> {
    let engine = slmops_inference::llama::engine_version();
    let Measuring { suite, threads } = measuring;
    let key = format!(
        "{} {}{} {} {threads} {engine}",
        file.digest,
        reference.digest,
        adapted(adapter),
        suite.digest()
    );
    let name = &Digest::of(key.as_bytes()).hex()[..32];
    let kept = session.home.cache("reports")?.join(format!("{name}.json"));
    let stage = session.progress.stage(format!("measure {label}"));
    let known: Option<EvaluationReport> =
        std::fs::read(&kept).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if let Some(report) = known {
        stage.done("measured before");
        return Ok(report);
    }
    let runtime = RuntimeConfig { threads: *threads, ..RuntimeConfig::default() };
    let cache = session.home.cache("evaluations")?;
    let adapter = adapter.map(|file| file.path.clone());
    let evaluation = Evaluation { runtime, adapter, ..Evaluation::new(suite.clone(), cache) };
    let on_progress = |slmops_evaluate::Progress { stage: part, fraction }| {
        stage.note(&part.to_string());
        // The parts take about these shares of the time.
        let (start, share) = match part {
            Measured::Reference => (0.0, 0.7),
            Measured::Quality => (0.0, 0.7),
            Measured::Runtime => (0.7, 0.3),
        };
        let position = (start + share * fraction) * BAR_STEPS as f64;
        stage.steps(position as u64, BAR_STEPS);
    };
    let report = evaluation
        .run(&file.path, &reference.path, on_progress)
        .await
        .internal(|| format!("measure {label}"))?;
    let json = serde_json::to_vec(&report).internal(|| "keep the report".to_owned())?;
    crate::home::write_private(&kept, &json)?;
    stage.done(format!(
        "perplexity {:.2}, KL {:.4}, {:.0} tokens/s",
        report.perplexity, report.kl_divergence.mean, report.decode_tokens_per_s
    ));
    Ok(report)
}

/// An adapter's part of a key.
fn adapted(adapter: Option<&AdapterFile>) -> String {
    adapter.map_or_else(String::new, |file| format!("+{}", file.adapter.digest))
}

/// Compares with the reference and, if there is one, the previous release's variant.
pub fn gate(
    candidate: &EvaluationReport,
    original: &EvaluationReport,
    quantisation: &str,
    earlier: Option<(&Version, &EvaluationReport)>,
) -> Result<GateDecision> {
    let what = || format!("judge {quantisation}");
    let limits = Limits::against_original(quantisation);
    let mut decisions =
        vec![gate::decide(candidate, original, &Against::Original, &limits).user(what)?];
    if let Some((version, report)) = earlier {
        let against = Against::Release(version.clone());
        let limits = Limits::against_release();
        decisions.push(gate::decide(candidate, report, &against, &limits).user(what)?);
    }
    Ok(gate::combine(decisions))
}

/// Writes the model with every weight in 16 bits.
pub async fn reference(from: &Path, to: &Path) -> Result<Vec<Step>> {
    let what = || format!("make the reference of `{}`", from.display());
    slmops_optimize::reference(from, to).await.user(what)
}

/// Writes a variant of a reference.
pub async fn quantise(from: &Path, to: &Path, file_type: &str, stage: &Stage) -> Result<Step> {
    slmops_optimize::quantise(from, to, file_type, ALL_CORES, |progress| {
        stage.steps(progress.done, progress.total);
    })
    .await
    .user(|| format!("make {file_type}"))
}

/// The golden probes of a model line that has none yet: questions, with the reference's answers.
/// Asked once for all variants of a ship.
pub struct Probes<'a> {
    session: &'a Session,
    reference: &'a File,
    adapter: Option<&'a AdapterFile>,
    golden: Option<Golden>,
}

impl<'a> Probes<'a> {
    /// Of this reference, with an adapter if there is one; nothing is asked yet.
    pub fn new(
        session: &'a Session,
        reference: &'a File,
        adapter: Option<&'a AdapterFile>,
    ) -> Self {
        Self { session, reference, adapter, golden: None }
    }

    /// The probes with the floors of one variant; the same pair is asked once.
    pub async fn of(&mut self, variant: &File, label: &str) -> Result<ProbeSet> {
        let key = format!("{} {}{}", self.reference.digest, variant.digest, adapted(self.adapter));
        let name = &Digest::of(key.as_bytes()).hex()[..32];
        let kept = self.session.home.cache("probes")?.join(format!("{name}.json"));
        let known = std::fs::read(&kept).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if let Some(known) = known {
            return Ok(known);
        }
        let stage = self.session.progress.stage(format!("make the golden probes of {label}"));
        let what = || format!("make the probes of {label}");
        let runtime = RuntimeConfig::default();
        let adapter = self.adapter.map(|file| file.path.as_path());
        let golden = match self.golden.take() {
            Some(golden) => golden,
            None => probes::ask(&self.reference.path, adapter, &runtime).await.user(what)?,
        };
        let set = probes::for_variant(&golden, &variant.path, adapter, &runtime).await;
        let set = set.user(what)?;
        self.golden = Some(golden);
        let json = serde_json::to_vec(&set).internal(what)?;
        crate::home::write_private(&kept, &json)?;
        stage.done(format!("{} of them", set.probes.len()));
        Ok(set)
    }
}

/// Writes a copy with some layers scrambled.
pub fn damage(from: &Path, to: &Path) -> Result<Step> {
    let damage = slmops_optimize::Damage::default();
    slmops_optimize::damage(from, to, &damage).user(|| format!("damage `{}`", from.display()))
}
