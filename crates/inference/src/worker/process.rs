//! The worker process itself: loads the model, reads commands, runs the scheduler.

use std::io::{BufRead as _, Read as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Instant;

use slmops_api::runtime::{EffectiveConfig, RuntimeConfig};
use slmops_artifact::Digest;

use super::outbox::Outbox;
use super::preparing::Preparing;
use super::prompt_cache::PromptStore;
use super::protocol::{
    AdapterChoice, AdapterUse, Command, Event, GenerateRequest, LoadFailure, MAX_DRAFTED,
    MAX_LINE_BYTES, MAX_LOGIT_BIASES, MAX_PROMPT_BYTES, MAX_STOP_BYTES, MAX_STOPS,
    MAX_TOP_LOGPROBS, ModelInfo, Piece, Prompt, PromptCache, RequestError, Score, ScoreRequest,
    Speculation, TokenLogprob, WorkerSpec,
};
use super::scheduler::{
    DraftModel, Drafter, Embedding64, Generating, Saving, Scheduler, Scoring, Task, Work,
    same_vocabulary,
};
use crate::child::print_line;
use crate::constraint::Guide;
use crate::llama::{
    Batch, Context, ContextOptions, EngineError, LoadOptions, Model, Token, engine_version,
};
use crate::memory;

/// Outputs in one batch beside one for each sequence: what scores and embeddings proceed by.
/// Each costs two rows of the vocabulary in memory: eight are 3 MB for a vocabulary of 49 152
/// tokens, 17 MB for one of 262 144.
const EXTRA_OUTPUTS: u32 = 8;
/// The most sequences that the engine decodes at the same time.
const MAX_PARALLEL: u32 = 256;

/// Runs a worker until its stdin closes.
pub(crate) fn run() -> i32 {
    let mut input = std::io::stdin().lock();
    let mut line = Vec::new();
    let spec: WorkerSpec = match read_line(&mut input, &mut line) {
        Some(line) => match serde_json::from_slice(line) {
            Ok(spec) => spec,
            Err(error) => return refuse(LoadFailure::Model { message: error.to_string() }),
        },
        None => return 0,
    };
    let (scheduler, model) = match load(&spec) {
        Ok(loaded) => loaded,
        Err(failure) => return refuse(failure),
    };
    let (sender, receiver) = channel();
    let engine = std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || run_engine(scheduler, &receiver))
        .expect("a thread can be started");
    let preparing = Preparing::new(Arc::clone(&model), sender.clone());
    while let Some(line) = read_line(&mut input, &mut line) {
        match serde_json::from_slice(line) {
            Ok(command) => obey(command, &model, &sender, &preparing),
            Err(error) => misunderstood(line, &error),
        }
        if engine.is_finished() {
            // Its panic message is on stderr.
            return 1;
        }
    }
    // Nobody listens any more: what runs has no reader.
    let _ = sender.send(Order::Leave);
    i32::from(engine.join().is_err())
}

/// Answers a command that cannot be read, so that nobody waits for it for ever.
fn misunderstood(line: &[u8], error: &serde_json::Error) {
    eprintln!("worker: a command is not understood: {error}");
    let command: serde_json::Value = serde_json::from_slice(line).unwrap_or_default();
    if let Some(id) = command["id"].as_u64() {
        let error = invalid("request", format!("the worker does not understand it: {error}"));
        emit(&Event::Failed { id, error });
    }
}

fn refuse(failure: LoadFailure) -> i32 {
    emit(&Event::LoadFailed { failure });
    1
}

pub(super) fn emit(event: &Event) {
    print_line(event);
}

fn read_line<'a>(input: &mut impl std::io::BufRead, line: &'a mut Vec<u8>) -> Option<&'a [u8]> {
    line.clear();
    let read = input.by_ref().take(MAX_LINE_BYTES as u64).read_until(b'\n', line).ok()?;
    (read > 0).then_some(line)
}

fn load(spec: &WorkerSpec) -> Result<(Scheduler, Arc<Model>), LoadFailure> {
    let started = Instant::now();
    let runtime = &spec.runtime;
    let failed = |message: String| LoadFailure::Model { message };
    check_runtime(runtime)?;
    check_speculation(spec)?;
    let guesses = spec.extras.speculation.as_ref().map_or(0, Speculation::tokens);
    let options = LoadOptions { check_tensors: true, ..LoadOptions::default() };
    let model = Model::load(&spec.model_path, &options).map_err(|e| failed(e.to_string()))?;
    if !model.generates() {
        return Err(failed("this model does not generate text".to_owned()));
    }
    let trained = model.trained_context();
    if runtime.context_tokens > trained {
        return Err(LoadFailure::TrainedContext { asked: runtime.context_tokens, trained });
    }
    let model = Arc::new(model);
    let options = ContextOptions {
        context_tokens: runtime.context_tokens,
        sequences: runtime.parallel,
        batch_tokens: runtime.batch_tokens,
        outputs: (runtime.parallel * (1 + guesses)).max(runtime.parallel + EXTRA_OUTPUTS),
        threads: runtime.threads,
        kv_type: runtime.kv_type,
        flash_attention: runtime.flash_attention,
        embeddings: false,
        abort: None,
    };
    let mut context = Context::new(&model, &options).map_err(|e| failed(e.to_string()))?;
    let effective = read_back(&context, runtime)?;
    let shifts = spec.extras.context_shift;
    if shifts && !(model.forgets_parts() && context.can_shift()) {
        let impossible = "false: this model's memory cannot be shifted".to_owned();
        let settings = vec![("context_shift".to_owned(), "true".to_owned(), impossible)];
        return Err(LoadFailure::Settings { settings });
    }
    warm_up(&mut context).map_err(failed)?;
    let info = ModelInfo {
        shape: model.shape(),
        file_type: model.file_type(),
        tensor_bytes: model.tensor_bytes(),
        chat_template: model.chat_template(None),
        beginning_text: model.text_of(model.beginning()),
        end_text: model.text_of(model.end()),
        adds_beginning: model.adds_beginning(),
        load_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
    };
    let saving = spec.extras.prompt_cache.as_ref().map(|cache| open_cache(cache, spec, &model));
    let mut scheduler = Scheduler::new(
        context,
        runtime.context_tokens,
        runtime.queue_limit,
        shifts,
        saving.transpose()?,
        drafter(spec, &model, &options)?,
        Outbox::default(),
    );
    for adapter in &spec.adapters {
        scheduler
            .load_adapter(adapter.id, &adapter.path)
            .map_err(|error| LoadFailure::Adapter { message: error.to_string() })?;
    }
    memory::give_back();
    emit(&Event::Loaded { effective, info: Box::new(info) });
    Ok((scheduler, model))
}

/// Refuses guesses that would not fit into a batch.
fn check_speculation(spec: &WorkerSpec) -> Result<(), LoadFailure> {
    let Some(speculation) = &spec.extras.speculation else { return Ok(()) };
    let RuntimeConfig { parallel, batch_tokens, .. } = spec.runtime;
    let (tokens, room) = (speculation.tokens(), batch_tokens / parallel);
    if (1..=MAX_DRAFTED).contains(&tokens) && tokens < room {
        return Ok(());
    }
    let most = MAX_DRAFTED.min(room.saturating_sub(1));
    let wanted = format!("1 to {most} (batch_tokens / parallel - 1, {MAX_DRAFTED} at most)");
    let settings = vec![("speculation.tokens".to_owned(), tokens.to_string(), wanted)];
    Err(LoadFailure::Settings { settings })
}

/// Makes ready whatever guesses; `options` are those of the model that answers.
fn drafter(
    spec: &WorkerSpec,
    model: &Arc<Model>,
    options: &ContextOptions,
) -> Result<Option<Drafter>, LoadFailure> {
    let Some(speculation) = &spec.extras.speculation else { return Ok(None) };
    let failed = |message: String| LoadFailure::Draft { message };
    let forgets = |model: &Model, whose: &str| match model.forgets_parts() {
        true => Ok(()),
        false => Err(failed(format!("{whose} memory cannot be cut back to before a wrong guess"))),
    };
    forgets(model, "speculation: this model's")?;
    let limit = speculation.tokens() as usize;
    let Speculation::Draft { model_path, .. } = speculation else {
        return Ok(Some(Drafter::Ngram { limit }));
    };
    let named = |what: &str| failed(format!("draft model {}: {what}", model_path.display()));
    let loading = LoadOptions { check_tensors: true, ..LoadOptions::default() };
    let draft = Model::load(model_path, &loading).map_err(|error| named(&error.to_string()))?;
    let draft = Arc::new(draft);
    if !same_vocabulary(&draft, model) {
        let what = "its vocabulary is another one
hint: use a smaller model of the same family";
        return Err(named(what));
    }
    forgets(&draft, &format!("draft model {}: its", model_path.display()))?;
    let (trained, asked) = (draft.trained_context(), spec.runtime.context_tokens);
    if trained < asked {
        let what = format!("it was trained for {trained} tokens of context, fewer than {asked}");
        return Err(named(&what));
    }
    let outputs = options.sequences;
    let context = Context::new(&draft, &ContextOptions { outputs, ..options.clone() });
    let mut context = context.map_err(|error| named(&error.to_string()))?;
    warm_up(&mut context).map_err(|cause| named(&cause))?;
    Ok(Some(Drafter::Model(Box::new(DraftModel::new(context, limit)))))
}

/// Opens the prompt cache for what this worker computes.
fn open_cache(
    cache: &PromptCache,
    spec: &WorkerSpec,
    model: &Model,
) -> Result<Saving, LoadFailure> {
    let failed = |message: String| LoadFailure::PromptCache { message };
    if !model.forgets_parts() {
        let effective = "none: this model's memory cannot be cut to a prefix".to_owned();
        let folder = cache.folder.display().to_string();
        let settings = vec![("prompt_cache".to_owned(), folder, effective)];
        return Err(LoadFailure::Settings { settings });
    }
    let (file, _) = std::fs::File::open(&spec.model_path)
        .and_then(Digest::of_reader)
        .map_err(|error| failed(format!("read {}: {error}", spec.model_path.display())))?;
    // The same numbers come of the same engine alone, on a processor of the same kind.
    let runtime = &spec.runtime;
    let base =
        format!("{} {file} {:?} {}", engine_version(), runtime.kv_type, runtime.flash_attention);
    let store = PromptStore::open(cache).map_err(|error| {
        failed(format!("open prompt cache {}: {error}", cache.folder.display()))
    })?;
    Ok(Saving::new(store, Digest::of(base.as_bytes())))
}

/// Refuses settings that no engine could follow.
fn check_runtime(runtime: &RuntimeConfig) -> Result<(), LoadFailure> {
    let wrong = |name: &str, given: u32, wanted: String| {
        Err(LoadFailure::Settings { settings: vec![(name.to_owned(), given.to_string(), wanted)] })
    };
    if runtime.context_tokens < 2 {
        return wrong("context_tokens", runtime.context_tokens, "at least 2".to_owned());
    }
    if !(1..=MAX_PARALLEL).contains(&runtime.parallel) {
        return wrong("parallel", runtime.parallel, format!("1 to {MAX_PARALLEL}"));
    }
    if runtime.batch_tokens < runtime.parallel {
        let wanted = format!("at least {} (parallel)", runtime.parallel);
        return wrong("batch_tokens", runtime.batch_tokens, wanted);
    }
    Ok(())
}

/// The configuration in effect, from the engine itself; an error where it is not what was asked.
fn read_back(context: &Context, asked: &RuntimeConfig) -> Result<EffectiveConfig, LoadFailure> {
    let unknown = |name: &str, asked: String| LoadFailure::Settings {
        settings: vec![(name.to_owned(), asked, "unknown to the engine".to_owned())],
    };
    let effective = EffectiveConfig {
        // The engine allots memory in larger steps; the scheduler holds each sequence to what was
        // asked, so only less than that is a difference.
        context_tokens: context.context_tokens().min(asked.context_tokens),
        parallel: context.sequences(),
        threads: context.threads(),
        batch_tokens: context.batch_tokens(),
        kv_type: context
            .kv_type()
            .ok_or_else(|| unknown("kv_type", format!("{:?}", asked.kv_type)))?,
        flash_attention: context
            .flash_attention()
            .ok_or_else(|| unknown("flash_attention", asked.flash_attention.to_string()))?,
        queue_limit: asked.queue_limit,
        idle_after_s: asked.idle_after_s,
        engine: engine_version(),
    };
    let settings: Vec<_> = effective
        .differences(asked)
        .into_iter()
        .map(|(name, asked, effective)| (name.to_owned(), asked, effective))
        .collect();
    if settings.is_empty() { Ok(effective) } else { Err(LoadFailure::Settings { settings }) }
}

/// Computes one token: brings the weights into memory, and finds out that they compute.
fn warm_up(context: &mut Context) -> Result<(), String> {
    let token = context.model().beginning().unwrap_or(0);
    let mut batch = Batch::new();
    let index = batch.push(token, 0, 0, true);
    context.decode(&mut batch).map_err(|error| error.to_string())?;
    let logits = context.logits(index).unwrap_or_default();
    if logits.is_empty() || !logits.iter().all(|logit| logit.is_finite()) {
        return Err("its output is not a number: its weights are damaged".to_owned());
    }
    context.clear();
    Ok(())
}

/// What the engine's thread is told.
pub(super) enum Order {
    Submit(Task),
    Cancel(u64),
    LoadAdapter { id: u64, adapter: u32, path: PathBuf },
    UnloadAdapter { id: u64, adapter: u32 },
    Leave,
}

fn run_engine(mut scheduler: Scheduler, orders: &Receiver<Order>) {
    loop {
        let idle = scheduler.is_idle();
        let mut next = orders.try_recv();
        // What is worth keeping is written while there is nothing else to do.
        while idle && matches!(next, Err(TryRecvError::Empty)) && scheduler.save_one() {
            next = orders.try_recv();
        }
        if idle && matches!(next, Err(TryRecvError::Empty)) {
            next = orders.recv().map_err(|_| TryRecvError::Disconnected);
        }
        loop {
            match next {
                Ok(order) => {
                    if !follow(&mut scheduler, order) {
                        return scheduler.leave();
                    }
                }
                Err(TryRecvError::Disconnected) => return scheduler.leave(),
                Err(TryRecvError::Empty) => break,
            }
            next = orders.try_recv();
        }
        scheduler.step();
    }
}

fn done(id: u64, outcome: Result<(), RequestError>) {
    match outcome {
        Ok(()) => emit(&Event::Done { id }),
        Err(error) => emit(&Event::Failed { id, error }),
    }
}

/// Does what it is told; false where that is to leave.
fn follow(scheduler: &mut Scheduler, order: Order) -> bool {
    match order {
        Order::Leave => return false,
        Order::Submit(task) => scheduler.submit(task),
        Order::Cancel(id) => scheduler.cancel(id),
        Order::LoadAdapter { id, adapter, path } => {
            let loaded = scheduler.load_adapter(adapter, &path);
            let failed = |error: EngineError| invalid("path", error.to_string());
            done(id, loaded.map_err(failed));
        }
        Order::UnloadAdapter { id, adapter } => {
            scheduler.unload_adapter(adapter);
            done(id, Ok(()));
        }
    }
    true
}

/// Prepares a command on the reader's thread, beside the engine's.
fn obey(command: Command, model: &Model, engine: &Sender<Order>, preparing: &Preparing) {
    let arrived = Instant::now();
    let submit =
        |id: u64, adapters, prepared: Result<(Vec<Token>, Work), RequestError>| match prepared {
            Ok((tokens, work)) => {
                let _ = engine.send(Order::Submit(Task { id, tokens, work, adapters, arrived }));
            }
            Err(error) => emit(&Event::Failed { id, error }),
        };
    match command {
        Command::Generate { id, request } => match check_generate(&request, model) {
            Ok(tokens) if request.constraint.is_some() => {
                preparing.begin(id, request, tokens, arrived);
            }
            Ok(tokens) => {
                let adapters = applied(&request);
                let generating = generating(request, None, &tokens, model);
                submit(id, adapters, Ok((tokens, Work::Generate(Box::new(generating)))));
            }
            Err(error) => emit(&Event::Failed { id, error }),
        },
        Command::Score { id, request } => submit(id, Vec::new(), prepare_score(&request, model)),
        Command::Embed { id, prompt, adapters } => submit(
            id,
            adapters,
            prompt_tokens(&prompt, model)
                .map(|tokens| (tokens, Work::Embed(Embedding64::default()))),
        ),
        Command::Tokenise { id, text, add_special, parse_special } => {
            match tokenise(&text, add_special, parse_special, model) {
                Ok(tokens) => emit(&Event::Tokens { id, tokens }),
                Err(error) => emit(&Event::Failed { id, error }),
            }
        }
        Command::Detokenise { id, tokens } => match check_tokens(&tokens, model) {
            Ok(()) => emit(&Event::Bytes { id, bytes: model.detokenise(&tokens, true) }),
            Err(error) => emit(&Event::Failed { id, error }),
        },
        Command::LoadAdapter { id, adapter, path } => {
            let _ = engine.send(Order::LoadAdapter { id, adapter, path });
        }
        Command::UnloadAdapter { id, adapter } => {
            let _ = engine.send(Order::UnloadAdapter { id, adapter });
        }
        Command::Cancel { id } => {
            preparing.cancel(id);
            let _ = engine.send(Order::Cancel(id));
        }
    }
}

fn invalid(parameter: &str, message: String) -> RequestError {
    RequestError::Invalid { parameter: parameter.to_owned(), message }
}

fn check_tokens(tokens: &[Token], model: &Model) -> Result<(), RequestError> {
    let vocabulary = model.vocabulary();
    let known = |token: &Token| u32::try_from(*token).is_ok_and(|token| token < vocabulary);
    match tokens.iter().find(|token| !known(token)) {
        Some(token) => Err(invalid(
            "tokens",
            format!("{token} is not a token: the vocabulary has {vocabulary} of them"),
        )),
        None => Ok(()),
    }
}

fn tokenise(
    text: &str,
    add_special: bool,
    parse_special: bool,
    model: &Model,
) -> Result<Vec<Token>, RequestError> {
    check_length(text)?;
    model.tokenise(text, add_special, parse_special).map_err(engine_error)
}

fn check_length(text: &str) -> Result<(), RequestError> {
    if text.len() > MAX_PROMPT_BYTES {
        let message = format!("{} bytes are more than {MAX_PROMPT_BYTES}", text.len());
        return Err(invalid("prompt", message));
    }
    Ok(())
}

fn engine_error(error: EngineError) -> RequestError {
    RequestError::Engine { message: error.to_string() }
}

/// A prompt's tokens; at least one.
fn prompt_tokens(prompt: &Prompt, model: &Model) -> Result<Vec<Token>, RequestError> {
    let mut tokens = match prompt {
        Prompt::Tokens(tokens) => {
            check_tokens(tokens, model)?;
            tokens.clone()
        }
        Prompt::Text(text) => tokenise(text, true, false, model)?,
        Prompt::Template(text) => {
            check_length(text)?;
            model.tokenise_chat(text).map_err(engine_error)?
        }
    };
    // An empty prompt of a model without a beginning token: what ends a text also parts texts.
    if tokens.is_empty() {
        tokens.extend(model.beginning().or_else(|| model.end()));
    }
    if tokens.is_empty() {
        return Err(invalid("prompt", "it is empty, and this model cannot begin by itself".into()));
    }
    Ok(tokens)
}

/// Checks a request; returns its prompt's tokens.
fn check_generate(request: &GenerateRequest, model: &Model) -> Result<Vec<Token>, RequestError> {
    let sampling = &request.sampling;
    sampling.check()?;
    if sampling.logit_bias.len() > MAX_LOGIT_BIASES {
        return Err(invalid("logit_bias", format!("more than {MAX_LOGIT_BIASES} tokens")));
    }
    let biased: Vec<Token> = sampling.logit_bias.iter().map(|(token, _)| *token).collect();
    check_tokens(&biased, model).map_err(|error| match error {
        RequestError::Invalid { message, .. } => invalid("logit_bias", message),
        other => other,
    })?;
    if request.max_tokens == Some(0) && !request.echo {
        return Err(invalid("max_tokens", "it must be at least 1 without echo".to_owned()));
    }
    if request.stop.len() > MAX_STOPS {
        return Err(invalid("stop", format!("more than {MAX_STOPS} stop strings")));
    }
    if request.stop.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
        let message = format!("a stop string is longer than {MAX_STOP_BYTES} bytes");
        return Err(invalid("stop", message));
    }
    if request.ignore_end && request.constraint.is_some() {
        let message = "an answer that is held to a shape ends with it".to_owned();
        return Err(invalid("ignore_eos", message));
    }
    if request.logprobs.is_some_and(|top| top > MAX_TOP_LOGPROBS) {
        return Err(invalid("top_logprobs", format!("at most {MAX_TOP_LOGPROBS}")));
    }
    prompt_tokens(&request.prompt, model)
}

/// The adapters of a request: whoever sends it says which.
pub(super) fn applied(request: &GenerateRequest) -> Vec<AdapterUse> {
    match &request.adapters {
        AdapterChoice::These(uses) => uses.clone(),
        AdapterChoice::Common | AdapterChoice::Named(_) => Vec::new(),
    }
}

/// An answer to a request that was checked.
pub(super) fn generating(
    mut request: GenerateRequest,
    guide: Option<Guide>,
    tokens: &[Token],
    model: &Model,
) -> Generating {
    let echo = request.echo.then(|| echoed(&request.prompt, tokens, model));
    if request.ignore_end {
        let all = 0..model.vocabulary().cast_signed();
        let ends = all.filter(|token| model.ends(*token));
        request.sampling.logit_bias.extend(ends.map(|token| (token, f32::NEG_INFINITY)));
    }
    Generating::new(request, guide, tokens.len(), echo)
}

/// A prompt as an answer begins with it, its log-probabilities yet unknown.
fn echoed(prompt: &Prompt, tokens: &[Token], model: &Model) -> Piece {
    let added = |index: usize| {
        let begins = index == 0 && Some(tokens[0]) == model.beginning();
        begins && matches!(prompt, Prompt::Text(_)) && model.adds_beginning()
    };
    let entry = |(index, token): (usize, &Token)| TokenLogprob {
        token: *token,
        // What the tokenizer put in front is no part of the text.
        bytes: if added(index) { Vec::new() } else { model.piece(*token, true) },
        logprob: None,
        top: Vec::new(),
    };
    let text = match prompt {
        Prompt::Text(text) | Prompt::Template(text) => text.clone(),
        Prompt::Tokens(_) => String::from_utf8_lossy(&model.detokenise(tokens, true)).into_owned(),
    };
    let logprobs = tokens.iter().enumerate().map(entry).collect();
    Piece { text, tokens: tokens.to_vec(), logprobs }
}

fn prepare_score(
    request: &ScoreRequest,
    model: &Model,
) -> Result<(Vec<Token>, Work), RequestError> {
    let alone = prompt_tokens(&request.prompt, model)?;
    let whole = match &request.prompt {
        Prompt::Text(text) => {
            prompt_tokens(&Prompt::Text(format!("{text}{}", request.continuation)), model)?
        }
        Prompt::Template(text) => {
            prompt_tokens(&Prompt::Template(format!("{text}{}", request.continuation)), model)?
        }
        Prompt::Tokens(tokens) => {
            let mut whole = tokens.clone();
            whole.extend(tokenise(&request.continuation, false, false, model)?);
            whole
        }
    };
    let shared = alone.iter().zip(&whole).take_while(|(a, b)| a == b).count();
    // The first token of all has nothing before it that could predict it.
    let from = shared.max(1);
    if from >= whole.len() {
        return Err(invalid("continuation", "it has no tokens to score".to_owned()));
    }
    let score = Score { tokens: Vec::new(), logprobs: Vec::new(), greedy: Vec::new() };
    Ok((whole, Work::Score(Scoring { from, score })))
}
