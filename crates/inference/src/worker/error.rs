//! Why a worker did not start, or did not do what it was asked.

use std::path::PathBuf;
use std::sync::Arc;

use super::protocol::{LoadFailure, RequestError};
use crate::chat::TemplateError;
use crate::child::ChildError;

/// Why a worker did not start, or did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WorkerError {
    /// Its process could not be started.
    #[error("{0}")]
    Start(#[source] Arc<ChildError>),
    /// The engine could not load the model.
    #[error(
        "load {}: {message}\nhint: check that it is a whole GGUF file of a kind the engine knows",
        path.display()
    )]
    Load {
        /// The model file.
        path: PathBuf,
        /// The engine's words.
        message: String,
    },
    /// The model was trained for less context than was asked.
    #[error(
        "load {}: context_tokens = {asked} is more than the {trained} tokens this model was trained for\nhint: set context_tokens to {trained} or less",
        path.display()
    )]
    TrainedContext {
        /// The model file.
        path: PathBuf,
        /// What was asked.
        asked: u32,
        /// What the model can.
        trained: u32,
    },
    /// An adapter could not be loaded with the model.
    #[error(
        "{message}\nhint: check that it is a LoRA adapter in GGUF, made for {}",
        path.display()
    )]
    Adapter {
        /// The model file.
        path: PathBuf,
        /// Which adapter, and the engine's words.
        message: String,
    },
    /// The prompt cache cannot be used.
    #[error("load {}: {message}", path.display())]
    PromptCache {
        /// The model file.
        path: PathBuf,
        /// Which folder, and why.
        message: String,
    },
    /// The draft model cannot guess for this one.
    #[error("load {}: {message}", path.display())]
    Draft {
        /// The model file.
        path: PathBuf,
        /// Which draft model, and why.
        message: String,
    },
    /// The engine would not run with exactly the settings that were asked.
    #[error(
        "load {}: the engine does not follow the configuration: {}\nhint: set these to what the engine does",
        path.display(),
        differences(settings)
    )]
    Settings {
        /// The model file.
        path: PathBuf,
        /// `(name, asked, effective)` of each setting that differs.
        settings: Vec<(String, String, String)>,
    },
    /// The worker process died while loading.
    #[error("load {}: {cause}", path.display())]
    CrashedLoading {
        /// The model file.
        path: PathBuf,
        /// How it ended.
        cause: Arc<ChildError>,
    },
    /// The worker process died; this request was under way or came too late.
    #[error(
        "the process that runs the model ended ({how})\nhint: it is being restarted; try again in a moment"
    )]
    Died {
        /// How it ended.
        how: String,
    },
    /// The worker takes no more requests, because another one takes its place.
    #[error("this worker is being replaced\nhint: try again")]
    Draining,
    /// The worker refused or failed this request.
    #[error("{0}")]
    Request(#[from] RequestError),
    /// The chat could not be made into a prompt.
    #[error("{0}")]
    Template(#[from] TemplateError),
}

fn differences(settings: &[(String, String, String)]) -> String {
    let each = settings
        .iter()
        .map(|(name, asked, effective)| format!("{name} (asked {asked}, effective {effective})"));
    each.collect::<Vec<_>>().join(", ")
}

pub(super) fn load_error(failure: LoadFailure, path: PathBuf) -> WorkerError {
    match failure {
        LoadFailure::Model { message } => {
            // The engine names the file too.
            let prefix = format!("load model {}: ", path.display());
            let message = message.strip_prefix(&prefix).unwrap_or(&message).to_owned();
            WorkerError::Load { path, message }
        }
        LoadFailure::Settings { settings } => WorkerError::Settings { path, settings },
        LoadFailure::TrainedContext { asked, trained } => {
            WorkerError::TrainedContext { path, asked, trained }
        }
        LoadFailure::Adapter { message } => WorkerError::Adapter { path, message },
        LoadFailure::Draft { message } => WorkerError::Draft { path, message },
        LoadFailure::PromptCache { message } => WorkerError::PromptCache { path, message },
    }
}
