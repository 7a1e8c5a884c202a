//! `slm serve`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use slmops_api::runtime::{EffectiveConfig, KvType, RuntimeConfig};
use slmops_inference::host::ModelSpec;
use slmops_inference::otlp::Collector;
use slmops_inference::server::{self, Keys, ServerOptions};
use slmops_inference::worker::{AdapterFile, Extras, PromptCache, Speculation, Worker, WorkerSpec};
use tokio::signal::unix::{SignalKind, signal};

use super::Session;
use crate::error::{Context, Failure, Result};
use crate::ship::source;
use crate::units;

/// Context of each parallel request, unless the model was trained with less.
const DEFAULT_CONTEXT_TOKENS: u32 = 2048;
/// Tokens that are guessed at once, at most.
const DEFAULT_GUESSED_TOKENS: u32 = 7;

/// One model on this machine.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Serve one model on this machine through an OpenAI-compatible endpoint, with no \
                  fleet, until Ctrl-C.",
    after_help = "Example:\n  $ slm serve model.gguf --listen 127.0.0.1:8480\n  $ curl http://127.0.0.1:8480/v1/models"
)]
pub struct Serve {
    /// A GGUF file, or a Hugging Face folder of a Llama-architecture model
    pub model: PathBuf,
    /// Where it answers; port 0 takes a free one
    #[arg(
        long,
        default_value = "127.0.0.1:8480",
        value_name = "ADDRESS",
        env = "SLM_SERVE_LISTEN"
    )]
    pub listen: SocketAddr,
    /// Tokens of context for each parallel request [default: 2048, or what the model has]
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<u32>,
    /// Requests that are answered at the same time
    #[arg(long, default_value_t = 2, value_name = "COUNT")]
    pub parallel: u32,
    /// Compute threads; 0 means one for each core
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    pub threads: u32,
    /// Tokens submitted to the engine at once, at most
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub batch: u32,
    /// Number format of the key-value cache; q8_0 needs flash attention
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    pub kv_type: KvFormat,
    /// Whether fused attention is used
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub flash_attention: bool,
    /// Requests that may wait; more are answered 429
    #[arg(long, default_value_t = 64, value_name = "COUNT")]
    pub queue: u32,
    /// A LoRA adapter (GGUF) that is applied in answers to requests that choose none, at this scale
    /// [default: 1]; may be given several times
    #[arg(long, value_name = "FILE[=SCALE]", value_parser = adapter)]
    pub lora: Vec<(PathBuf, f32)>,
    /// Free the model's memory after so long without a request, such as `10m`; the next request loads
    /// it again
    #[arg(long, value_name = "DURATION", value_parser = idle_seconds)]
    pub idle_after: Option<u32>,
    /// Go on where an answer fills the context, and forget half of what follows its first message; else
    /// the answer ends there
    #[arg(long)]
    pub context_shift: bool,
    /// Keep what prompts became in the engine's memory in this folder over the end of the process, so that
    /// they need not be computed again. Puts what users wrote on the disk, readable for your user alone
    #[arg(long, value_name = "FOLDER")]
    pub prompt_cache: Option<PathBuf>,
    /// The most that the prompt cache may take; what was not used for longest goes first
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "256MiB",
        requires = "prompt_cache",
        value_parser = units::parse_bytes
    )]
    pub prompt_cache_size: u64,
    /// Guess the next tokens from what stands in the prompt and the answer already, up to so many at once
    /// [default: 7], and check them in one step; answers stay the same
    #[arg(long, value_name = "ngram[:COUNT]", value_parser = ngram, conflicts_with = "draft")]
    pub speculate: Option<u32>,
    /// Guess the next tokens with this smaller model (GGUF) of the same vocabulary, and check them in one
    /// step; answers stay the same
    #[arg(long, value_name = "MODEL")]
    pub draft: Option<PathBuf>,
    /// Push metrics to this OpenTelemetry collector, such as `http://localhost:4318` (OTLP over HTTP,
    /// protobuf)
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    pub otlp: Option<String>,
    /// The name under which it answers [default: the file's name]
    #[arg(long)]
    pub name: Option<String>,
    /// Answer only who has one of the keys in this file; `slm key endpoint` adds one
    #[arg(long, value_name = "FILE", env = "SLM_SERVE_KEYS")]
    pub keys: Option<PathBuf>,
}

impl Serve {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let keys = self.keys.as_deref().map(Keys::open).transpose();
        let keys = keys.user(|| "read the keys".to_owned())?.map(Arc::new);
        let collector = self.otlp.as_deref().filter(|url| !url.is_empty()).map(|url| {
            let instance = format!("{:016x}", rand::random::<u64>());
            Collector::new(url, "slm-serve", &instance, |name| std::env::var(name).ok())
        });
        let otlp = collector.transpose().user(|| "push metrics".to_owned())?;
        if let Some(collector) = &otlp {
            session.progress.say(format!("  Metrics go to {}.", collector.url()));
        }
        // What runs here is its user's own choice, and nobody else's was verified.
        let options =
            ServerOptions { keys, changes_adapters: true, otlp, ..ServerOptions::default() };
        let original = source::original(session, &self.model).await?;
        let trained = original.file.shape.trained_context;
        let runtime = RuntimeConfig {
            context_tokens: self.context.unwrap_or(DEFAULT_CONTEXT_TOKENS.min(trained)),
            parallel: self.parallel,
            threads: self.threads,
            batch_tokens: self.batch,
            kv_type: self.kv_type.into(),
            flash_attention: self.flash_attention,
            queue_limit: self.queue,
            idle_after_s: self.idle_after.unwrap_or(0),
        };
        let id = match &self.name {
            Some(name) => name.clone(),
            None => original.model_name()?.to_string(),
        };
        let listener = tokio::net::TcpListener::bind(self.listen).await.map_err(|error| {
            Failure::user(format!("listen on {}", self.listen))
                .source(error)
                .hint("another program may use the port: --listen 127.0.0.1:0 takes a free one")
        })?;
        let address = listener.local_addr().internal(|| "read the address".to_owned())?;
        let model_path = original.file.path.clone();
        let limit_bytes = self.prompt_cache_size;
        let prompt_cache = self.prompt_cache.map(|folder| PromptCache { folder, limit_bytes });
        let tokens = self.speculate.unwrap_or(DEFAULT_GUESSED_TOKENS);
        let ngram = self.speculate.map(|tokens| Speculation::Ngram { tokens });
        let draft = self.draft.map(|model_path| Speculation::Draft { model_path, tokens });
        let speculation = draft.or(ngram);
        let extras = Extras { context_shift: self.context_shift, prompt_cache, speculation };
        let worker = WorkerSpec { model_path, runtime, adapters: named(self.lora)?, extras };
        let model = ModelSpec { id: id.clone(), aliases: Vec::new(), worker };
        let stage = session.progress.stage(format!("load {}", self.model.display()));
        let (out, progress) = (session.out, session.progress.clone());
        let on_ready = move |worker: &Worker| {
            let effective = worker.effective();
            stage.done(format!("{} resident", units::bytes(worker.memory().resident_bytes)));
            let chats = worker.model_info().chat_template.is_some();
            let ready = Ready { url: format!("http://{address}"), model: id, effective, chats };
            // A closed stdout is no reason not to serve.
            let _ = out.show(&ready, || ready.url.clone());
            progress.say(ready.advice());
        };
        let served = server::serve(listener, model, options, on_ready, stopped());
        served.await.user(|| format!("serve `{}`", self.model.display()))
    }
}

/// A duration of a second or more.
fn idle_seconds(given: &str) -> std::result::Result<u32, String> {
    match units::parse_seconds(given)?.try_into() {
        Ok(0) => Err("a model that sleeps at once answers nobody: give 1s or more".to_owned()),
        Ok(seconds) => Ok(seconds),
        Err(_) => Err("no model is left alone for so long".to_owned()),
    }
}

/// `FILE=SCALE`, or a file alone.
fn adapter(given: &str) -> std::result::Result<(PathBuf, f32), String> {
    let scaled = given.rsplit_once('=').filter(|_| !std::path::Path::new(given).exists());
    let Some((path, scale)) = scaled else { return Ok((given.into(), 1.0)) };
    match scale.parse() {
        Ok(scale) if f32::is_finite(scale) => Ok((path.into(), scale)),
        _ => Err(format!("`{scale}` is no number")),
    }
}

/// `ngram`, or `ngram:COUNT`.
fn ngram(given: &str) -> std::result::Result<u32, String> {
    let count = match given.split_once(':') {
        None if given == "ngram" => return Ok(DEFAULT_GUESSED_TOKENS),
        Some(("ngram", count)) => count.parse().ok(),
        _ => None,
    };
    count.ok_or_else(|| "expected `ngram` or `ngram:COUNT`, such as `ngram:7`".to_owned())
}

/// Adapters under the names of their files.
fn named(given: Vec<(PathBuf, f32)>) -> Result<Vec<AdapterFile>> {
    let mut adapters: Vec<AdapterFile> = Vec::new();
    for (id, (path, scale)) in (0..).zip(given) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if adapters.iter().any(|adapter| adapter.name == name) {
            return Err(Failure::user(format!("two adapters are named `{name}`"))
                .hint("rename one of the files: requests choose an adapter by its file's name"));
        }
        adapters.push(AdapterFile { id, name, path, scale });
    }
    Ok(adapters)
}

/// [`KvType`] on the command line.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum KvFormat {
    /// 32-bit floats
    F32,
    /// 16-bit floats
    #[default]
    F16,
    /// 8.5 bits per value
    #[value(name = "q8_0")]
    Q8,
}

impl From<KvFormat> for KvType {
    fn from(format: KvFormat) -> Self {
        match format {
            KvFormat::F32 => Self::F32,
            KvFormat::F16 => Self::F16,
            KvFormat::Q8 => Self::Q8_0,
        }
    }
}

/// What is said when the model answers.
#[derive(Serialize)]
struct Ready<'a> {
    url: String,
    model: String,
    chats: bool,
    effective: &'a EffectiveConfig,
}

impl Ready<'_> {
    fn advice(&self) -> String {
        let (path, body) = if self.chats {
            ("chat/completions", r#"{"messages":[{"role":"user","content":"Hello"}]}"#)
        } else {
            ("completions", r#"{"prompt":"Once upon a time","max_tokens":32}"#)
        };
        format!(
            "  {} answers, {} requests at a time, {} tokens of context each.\n  \
             Open {} in a browser, or try:\n  \
             $ curl {}/v1/{path} -H 'content-type: application/json' -d '{body}'\n  \
             Ctrl-C ends it.",
            self.model, self.effective.parallel, self.effective.context_tokens, self.url, self.url
        )
    }
}

/// Ctrl-C, or being told to end.
pub async fn stopped() {
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminate => {}
    }
}
