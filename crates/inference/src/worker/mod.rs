//! The worker: a child process that runs one model, and the handle by which it is asked.
//!
//! Whatever happens to the engine happens to that process; here its death is an event
//! ([`Worker::ended`]) and a clear error of each request that was under way.

mod adapters;
mod error;
mod generation;
mod keeper;
mod outbox;
mod preparing;
mod process;
mod prompt_cache;
pub mod protocol;
mod sampler;
mod scheduler;
mod text;

pub use error::WorkerError;
pub use generation::{Generation, Output};
pub use keeper::Ending;
pub(crate) use process::run;
pub use protocol::{
    AdapterChoice, AdapterFile, AdapterUse, Embedding, Extras, Finish, FinishReason,
    GenerateRequest, ModelInfo, Piece, Prompt, PromptCache, RequestError, Sampling, Score,
    ScoreRequest, Speculation, TokenLogprob, WorkerSpec,
};

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use slmops_api::runtime::EffectiveConfig;
use tokio::io::BufReader;
use tokio::sync::{mpsc, watch};

use crate::chat::{ChatMessage, ChatTemplate};
use crate::child::{self, StderrTail};
use crate::llama::Token;
use crate::tools::Choice;
use adapters::Adapters;
use error::load_error;
use generation::Answer;
use keeper::{Keeper, Order, Requests, next_event, send_line};
use protocol::{Command, Event};

/// The job name of a worker.
pub(crate) const JOB: &str = "worker";
/// The longest that loading a model may take.
const LOAD_TIMEOUT: Duration = Duration::from_secs(600);

/// Resident memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Now.
    pub resident_bytes: u64,
    /// At its peak.
    pub peak_bytes: u64,
}

/// A running worker. Clones share it; when the last one is dropped, the process is killed.
#[derive(Clone)]
pub struct Worker {
    shared: Arc<Shared>,
}

struct Shared {
    spec: WorkerSpec,
    effective: EffectiveConfig,
    info: ModelInfo,
    template: ChatTemplate,
    adapters: Mutex<Adapters>,
    pid: u32,
    next_id: AtomicU64,
    requests: Arc<Requests>,
    /// To the process; also how its keeper learns that it should leave.
    orders: mpsc::UnboundedSender<Order>,
    ending: watch::Receiver<Option<Ending>>,
}

impl Worker {
    /// Starts a process and loads a model in it; returns once it answers. Dropping the future
    /// kills the process.
    ///
    /// # Errors
    /// The process cannot start or dies, the file cannot be loaded, or the engine's effective
    /// configuration is not the one that was asked.
    pub async fn spawn(spec: WorkerSpec) -> Result<Self, WorkerError> {
        let path = spec.model_path.clone();
        let mut child =
            child::spawn(JOB).await.map_err(|error| WorkerError::Start(Arc::new(error)))?;
        let pid = child.id().unwrap_or(0);
        let mut stdin = child.stdin.take().expect("stdin is piped");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let stderr = child.stderr.take().expect("stderr is piped");
        let tail = StderrTail::default();
        let follower = tokio::spawn(tail.clone().follow(JOB.to_owned(), stderr));

        let load = async {
            let line = serde_json::to_vec(&spec).expect("a spec is plain data");
            // A process that dies early closes the pipe; how it died says more.
            let _ = send_line(&mut stdin, line).await;
            next_event(&mut stdout).await
        };
        let event = tokio::time::timeout(LOAD_TIMEOUT, load).await;
        let (effective, info) = match event {
            Ok(Some(Event::Loaded { effective, info })) => (effective, *info),
            Ok(Some(Event::LoadFailed { failure })) => return Err(load_error(failure, path)),
            Ok(_) => {
                let _ = follower.await;
                let status = child.wait().await.unwrap_or_default();
                let cause = Arc::new(child::ended(JOB, status, tail.text()));
                return Err(WorkerError::CrashedLoading { path, cause });
            }
            Err(_) => {
                let message = format!("it is not ready after {} s", LOAD_TIMEOUT.as_secs());
                return Err(WorkerError::Load { path, message });
            }
        };

        let requests = Arc::new(Requests::default());
        let (orders, received) = mpsc::unbounded_channel();
        let (ended, ending) = watch::channel(None);
        let keeper = Keeper { child, tail, follower, requests: Arc::clone(&requests), ended };
        tokio::spawn(keeper.run(stdin, stdout, received));
        let template = ChatTemplate::of(&info);
        let adapters = Mutex::new(Adapters::new(spec.adapters.clone()));
        let shared = Shared {
            spec,
            adapters,
            effective,
            info,
            template,
            pid,
            next_id: AtomicU64::new(1),
            requests,
            orders,
            ending,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// What it was started with.
    pub fn spec(&self) -> &WorkerSpec {
        &self.shared.spec
    }

    /// The configuration in effect, read back from the engine.
    pub fn effective(&self) -> &EffectiveConfig {
        &self.shared.effective
    }

    /// What is known of its model.
    pub fn model_info(&self) -> &ModelInfo {
        &self.shared.info
    }

    /// The id of its process.
    pub fn pid(&self) -> u32 {
        self.shared.pid
    }

    /// Requests under way or waiting.
    pub fn requests(&self) -> usize {
        self.shared.requests.lock().pending.len()
    }

    /// Resident memory of its process; zeros once it has ended.
    pub fn memory(&self) -> Memory {
        if self.ending().is_some() {
            return Memory::default();
        }
        memory_of(self.shared.pid)
    }

    /// Makes a chat into a prompt by the model's own template.
    ///
    /// # Errors
    /// The template refuses the chat, or is wrong itself.
    pub fn chat_prompt(&self, messages: &[ChatMessage]) -> Result<Prompt, WorkerError> {
        Ok(Prompt::Template(self.shared.template.render(messages)?))
    }

    /// The same for a model that may call tools, defined as OpenAI does.
    ///
    /// # Errors
    /// The template refuses the chat, or is wrong itself.
    pub fn chat_prompt_with_tools(
        &self,
        messages: &[ChatMessage],
        tools: &[serde_json::Value],
        choice: &Choice,
    ) -> Result<Prompt, WorkerError> {
        let template = &self.shared.template;
        Ok(Prompt::Template(template.render_with_tools(messages, tools, choice)?))
    }

    /// The chat template.
    pub fn template(&self) -> &ChatTemplate {
        &self.shared.template
    }

    /// Asks for a continuation. Dropping the [`Generation`] cancels it.
    ///
    /// # Errors
    /// The worker is being replaced, or has died, or a number of the request is out of range. What
    /// else is wrong with the request is the generation's first output.
    pub fn generate(&self, request: GenerateRequest) -> Result<Generation, WorkerError> {
        // JSON has no number that is none: it would not arrive.
        request.sampling.check()?;
        let adapters = AdapterChoice::These(self.applied(&request.adapters)?);
        let request = GenerateRequest { adapters, ..request };
        self.submit(|id| Command::Generate { id, request }).map(Generation::of)
    }

    /// The log-probabilities of a continuation.
    ///
    /// # Errors
    /// The request is wrong or does not fit, or the worker fails.
    pub async fn score(&self, request: ScoreRequest) -> Result<Score, WorkerError> {
        match self.submit(|id| Command::Score { id, request })?.result().await? {
            Event::Score { score, .. } => Ok(score),
            other => Err(unexpected(&other)),
        }
    }

    /// The embedding of a text.
    ///
    /// # Errors
    /// The text does not fit, or the worker fails.
    pub async fn embed(
        &self,
        prompt: Prompt,
        adapters: &AdapterChoice,
    ) -> Result<Embedding, WorkerError> {
        let adapters = self.applied(adapters)?;
        match self.submit(|id| Command::Embed { id, prompt, adapters })?.result().await? {
            Event::Embedding { embedding, .. } => Ok(embedding),
            other => Err(unexpected(&other)),
        }
    }

    /// The tokens of a text. `add_special` adds the beginning token where the model wants one;
    /// `parse_special` reads written control tokens as such.
    ///
    /// # Errors
    /// The text is too long, or the worker fails.
    pub async fn tokenise(
        &self,
        text: String,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<Token>, WorkerError> {
        let command = |id| Command::Tokenise { id, text, add_special, parse_special };
        match self.submit(command)?.result().await? {
            Event::Tokens { tokens, .. } => Ok(tokens),
            other => Err(unexpected(&other)),
        }
    }

    /// The bytes of some tokens, special ones as they are written.
    ///
    /// # Errors
    /// A token is not in the vocabulary, or the worker fails.
    pub async fn detokenise(&self, tokens: Vec<Token>) -> Result<Vec<u8>, WorkerError> {
        match self.submit(|id| Command::Detokenise { id, tokens })?.result().await? {
            Event::Bytes { bytes, .. } => Ok(bytes),
            other => Err(unexpected(&other)),
        }
    }

    fn submit(&self, command: impl FnOnce(u64) -> Command) -> Result<Answer, WorkerError> {
        let shared = &self.shared;
        let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = mpsc::unbounded_channel();
        {
            let mut state = shared.requests.lock();
            // One that was let go has ended as it should: another one takes the request.
            if state.draining {
                return Err(WorkerError::Draining);
            }
            if let Some(ending) = &state.ended {
                return Err(WorkerError::Died { how: ending.how.clone() });
            }
            state.pending.insert(id, sender);
        }
        shared.requests.changed.send_modify(|count| *count += 1);
        // If the process ends before it reads this, the request's error comes from its ending.
        let _ = shared.orders.send(Order::Send(Box::new(command(id))));
        Ok(Answer::new(id, events, self.clone()))
    }

    /// Takes no more requests, waits until those under way are done, and lets the process leave.
    pub async fn drain(&self) {
        self.shared.requests.lock().draining = true;
        let mut changed = self.shared.requests.changed.subscribe();
        while self.requests() > 0 {
            if changed.changed().await.is_err() {
                break;
            }
        }
        let _ = self.shared.orders.send(Order::Leave);
        self.ended().await;
    }

    /// Waits until there was no request for so long. Holds no claim on the worker.
    pub fn idle(&self, limit: Duration) -> impl Future<Output = ()> + Send + 'static {
        let requests = Arc::clone(&self.shared.requests);
        async move {
            let mut changed = requests.changed.subscribe();
            loop {
                let idle = requests.lock().pending.is_empty();
                let limit = if idle { limit } else { Duration::MAX };
                match tokio::time::timeout(limit, changed.changed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => std::future::pending().await,
                    Err(_) => return,
                }
            }
        }
    }

    /// Takes no more requests if there are none now; whether that is so.
    pub(crate) fn refuse_if_idle(&self) -> bool {
        let mut state = self.shared.requests.lock();
        let idle = state.pending.is_empty() && state.ended.is_none() && !state.draining;
        state.draining |= idle;
        idle
    }

    /// Kills the process.
    pub fn kill(&self) {
        let _ = self.shared.orders.send(Order::Kill);
    }

    /// How it ended, if it has.
    pub fn ending(&self) -> Option<Ending> {
        self.shared.ending.borrow().clone()
    }

    /// Waits until the process has ended. Holds no claim on the worker: dropping all handles still
    /// kills it.
    pub fn ended(&self) -> impl Future<Output = Ending> + Send + 'static {
        let mut ending = self.shared.ending.clone();
        async move {
            match ending.wait_for(Option::is_some).await {
                Ok(ending) => ending.clone().expect("it was waited for"),
                Err(_) => Ending {
                    expected: true,
                    how: "its keeper is gone".to_owned(),
                    stderr: String::new(),
                },
            }
        }
    }
}

fn unexpected(event: &Event) -> WorkerError {
    let message = format!("an answer of another kind came: {event:?}");
    WorkerError::Request(RequestError::Engine { message: message.chars().take(200).collect() })
}

/// `VmRSS` and `VmHWM` of a process, as proc(5) shows them; 0 once it is gone.
pub fn memory_of(pid: u32) -> Memory {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
        number.and_then(|number| number.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    Memory { resident_bytes: field("VmRSS:"), peak_bytes: field("VmHWM:") }
}
