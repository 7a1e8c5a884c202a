//! Evaluating one model file: which measurements are made, where their parts are kept, and how
//! they become one report.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use slmops_api::report::EvaluationReport;
use slmops_api::runtime::RuntimeConfig;
use slmops_artifact::Digest;
use slmops_inference::child::{self, ChildError};
use slmops_inference::worker::WorkerError;

use crate::quality::{self, Quality};
use crate::suite::Suite;
use crate::{distributions, machine, runtime, statistics};

/// The version of the cached files' names; grows when the numbers in them change their meaning.
const CACHE_VERSION: u32 = 1;
/// The largest vocabulary that disk space is reserved for when a model's own is not known, tokens.
const ASSUMED_VOCABULARY: u32 = 262_144;

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationError {
    /// A file could not be read or written.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was done.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The measuring process failed.
    #[error("evaluate {}", model.display())]
    Child {
        /// The model file.
        model: PathBuf,
        /// How it failed.
        #[source]
        source: ChildError,
    },
    /// The worker whose speed and memory were to be measured failed.
    #[error("measure the speed of {}", model.display())]
    Worker {
        /// The model file.
        model: PathBuf,
        /// How it failed.
        #[source]
        source: WorkerError,
    },
    /// The measuring process answered something else than a result.
    #[error("evaluate {}: read the result of {job}", model.display())]
    Answer {
        /// The model file.
        model: PathBuf,
        /// The job.
        job: &'static str,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The disk lacks room for the reference's distributions.
    #[error(
        "evaluate: {} needs up to {needed_bytes} bytes for the reference's distributions and has {free_bytes} free\nhint: free some space, or choose another cache folder",
        folder.display()
    )]
    DiskFull {
        /// The cache folder.
        folder: PathBuf,
        /// The most bytes that the file takes.
        needed_bytes: u64,
        /// Bytes free there.
        free_bytes: u64,
    },
}

/// What an evaluation is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The reference's distributions, computed once and kept.
    Reference,
    /// Perplexity, divergence and tasks of the model.
    Quality,
    /// Speed and memory of the model.
    Runtime,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Reference => "reference",
            Self::Quality => "quality",
            Self::Runtime => "speed and memory",
        })
    }
}

/// How far an evaluation is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Progress {
    /// What is being measured.
    pub stage: Stage,
    /// The share of that stage that is done, 0 to 1.
    pub fraction: f64,
}

/// How models are evaluated.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// What is asked of them.
    pub suite: Suite,
    /// The folder where the reference's distributions and results are kept. It is made if missing,
    /// and may be deleted at any time between evaluations.
    pub cache: PathBuf,
    /// The runtime configuration in which speed and memory are measured. Its context is lowered to
    /// what the model was trained for, as a device must do.
    pub runtime: RuntimeConfig,
    /// A LoRA adapter that is applied to the model and to the reference alike.
    pub adapter: Option<PathBuf>,
}

impl Evaluation {
    /// An evaluation with the default runtime configuration.
    pub fn new(suite: Suite, cache: impl Into<PathBuf>) -> Self {
        Self { suite, cache: cache.into(), runtime: RuntimeConfig::default(), adapter: None }
    }

    /// Measures `model` against `reference` (which may be the same file: then its divergence is
    /// zero) and binds the numbers to both files' digests.
    ///
    /// The reference is measured once for each suite and engine; later calls reuse what the cache
    /// folder holds. Dropping the future ends the measuring processes.
    ///
    /// # Errors
    /// A file cannot be read, the cache cannot be written, or a measuring process fails.
    pub async fn run(
        &self,
        model: &Path,
        reference: &Path,
        mut on_progress: impl FnMut(Progress),
    ) -> Result<EvaluationReport, EvaluationError> {
        let (subject, size_bytes) = digest_of(model).await?;
        let (reference_digest, _) = digest_of(reference).await?;
        let adapter = match &self.adapter {
            Some(path) => Some(digest_of(path).await?.0),
            None => None,
        };
        let distributions = self.distributions_path(reference_digest, adapter);
        let base = self.reference_quality(reference, &distributions, &mut on_progress).await?;
        let quality = if subject == reference_digest {
            base
        } else {
            let input = self.quality_input(model, distributions, false);
            call(quality::JOB, model, &input, Stage::Quality, &mut on_progress).await?
        };
        let configuration = runtime::fitting(model, &self.runtime);
        let stage = Stage::Runtime;
        on_progress(Progress { stage, fraction: 0.0 });
        let spec = runtime::worker(model, self.adapter.as_deref(), configuration);
        let measured = runtime::measure(spec, self.suite.text(), |fraction| {
            on_progress(Progress { stage, fraction });
        });
        let runtime = measured
            .await
            .map_err(|source| EvaluationError::Worker { model: model.to_owned(), source })?;
        let perplexity = statistics::mean(&quality.chunk_nll).mean.exp();
        Ok(EvaluationReport {
            version: 1,
            subject,
            adapter,
            reference: reference_digest,
            suite: self.suite.digest(),
            size_bytes,
            perplexity,
            kl_divergence: statistics::mean(&quality.chunk_kl),
            kl_p99: quality.kl_p99,
            top1_agreement: statistics::mean(&quality.chunk_top1),
            tasks: quality.tasks,
            decode_tokens_per_s: runtime.decode_tokens_per_s,
            prompt_tokens_per_s: runtime.prompt_tokens_per_s,
            time_to_first_token_ms: runtime.time_to_first_token_ms,
            peak_memory_bytes: runtime.peak_memory_bytes,
            machine: machine::facts(),
            engine: slmops_inference::llama::engine_version(),
            finished_at: jiff::Timestamp::now(),
            chunk_nll: quality.chunk_nll,
            chunk_kl: quality.chunk_kl,
        })
    }

    /// The reference's own quality: from the cache, or measured now and kept there.
    async fn reference_quality(
        &self,
        reference: &Path,
        distributions: &Path,
        on_progress: &mut impl FnMut(Progress),
    ) -> Result<Quality, EvaluationError> {
        let result = distributions.with_extension("json");
        if distributions.exists()
            && let Ok(text) = fs::read(&result)
            && let Ok(quality) = serde_json::from_slice(&text)
        {
            return Ok(quality);
        }
        let write = |source| io_error("write", &self.cache, source);
        fs::create_dir_all(&self.cache).map_err(write)?;
        self.check_free_space()?;
        // Both files appear whole or not at all, the result last; a second program that does the
        // same at the same time ends up with the same bytes.
        let unfinished = Unfinished::new(distributions);
        let input = self.quality_input(reference, unfinished.path.clone(), true);
        let quality: Quality =
            call(quality::JOB, reference, &input, Stage::Reference, on_progress).await?;
        unfinished.keep(distributions)?;
        let unfinished = Unfinished::new(&result);
        let bytes = serde_json::to_vec(&quality).expect("numbers and names serialise");
        fs::write(&unfinished.path, bytes).map_err(write)?;
        unfinished.keep(&result)?;
        Ok(quality)
    }

    fn quality_input(
        &self,
        model: &Path,
        distributions: PathBuf,
        is_reference: bool,
    ) -> quality::Input {
        quality::Input {
            model: model.to_owned(),
            adapter: self.adapter.clone(),
            suite: self.suite.source().clone(),
            distributions,
            is_reference,
            threads: self.runtime.threads,
        }
    }

    /// Named by everything that decides its content.
    fn distributions_path(&self, reference: Digest, adapter: Option<Digest>) -> PathBuf {
        let adapter = adapter.map_or_else(String::new, |adapter| format!("+{adapter}"));
        let key = format!(
            "{CACHE_VERSION} {reference}{adapter} {} {}",
            self.suite.digest(),
            slmops_inference::llama::engine_version()
        );
        let name = &Digest::of(key.as_bytes()).hex()[..32];
        self.cache.join(format!("reference-{name}.logprobs"))
    }

    fn check_free_space(&self) -> Result<(), EvaluationError> {
        let plan = self.suite.plan();
        let positions = u64::from(plan.chunks) * u64::from(plan.chunk_tokens.div_ceil(2));
        let needed_bytes = distributions::size_bytes(ASSUMED_VOCABULARY, positions);
        let stat = rustix::fs::statvfs(&self.cache)
            .map_err(|error| io_error("look at", &self.cache, error.into()))?;
        let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free_bytes < needed_bytes {
            let folder = self.cache.clone();
            return Err(EvaluationError::DiskFull { folder, needed_bytes, free_bytes });
        }
        Ok(())
    }
}

async fn digest_of(path: &Path) -> Result<(Digest, u64), EvaluationError> {
    let path = path.to_owned();
    let digest = tokio::task::spawn_blocking(move || {
        File::open(&path)
            .and_then(Digest::of_reader)
            .map_err(|source| io_error("read", &path, source))
    });
    digest.await.expect("hashing does not panic")
}

async fn call<T: DeserializeOwned>(
    job: &'static str,
    model: &Path,
    input: &impl Serialize,
    stage: Stage,
    on_progress: &mut impl FnMut(Progress),
) -> Result<T, EvaluationError> {
    let input = serde_json::to_value(input).expect("job inputs serialise");
    on_progress(Progress { stage, fraction: 0.0 });
    let result = child::call(job, input, |value| {
        if let Ok(progress) = serde_json::from_value::<quality::Progress>(value) {
            let fraction = progress.done as f64 / progress.total.max(1) as f64;
            on_progress(Progress { stage, fraction: fraction.min(1.0) });
        }
    });
    let result = result
        .await
        .map_err(|source| EvaluationError::Child { model: model.to_owned(), source })?;
    on_progress(Progress { stage, fraction: 1.0 });
    serde_json::from_value(result).map_err(|source| EvaluationError::Answer {
        model: model.to_owned(),
        job,
        source,
    })
}

/// A file in the making beside its place; removed unless kept.
struct Unfinished {
    path: PathBuf,
}

impl Unfinished {
    fn new(target: &Path) -> Self {
        let mut name = target.as_os_str().to_owned();
        name.push(format!(".{}.part", std::process::id()));
        Self { path: name.into() }
    }

    fn keep(self, target: &Path) -> Result<(), EvaluationError> {
        fs::rename(&self.path, target).map_err(|source| io_error("write", target, source))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn io_error(operation: &'static str, path: &Path, source: io::Error) -> EvaluationError {
    EvaluationError::Io { operation, path: path.to_owned(), source }
}
