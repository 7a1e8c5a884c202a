//! `slm-agent`'s verbs.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand, ValueEnum};
use slmops_agent_core::Config;
use slmops_api::device::EnrolRequest;
use slmops_inference::server::{KeyLimits, Keys};

use crate::engine::{self, Engine};
use crate::error::AgentError;
use crate::hub::Hub;
use crate::identity::{self, DeviceKey, Identity, MAX_INVITATION_BYTES, MeteredLink, Settings};
use crate::outbox::{self, Outbox};
use crate::shell::{self, Agent};
use crate::state::{ENDPOINT_KEYS_FILE, StateFolder};
use crate::status::StatusFile;
use crate::tls::{PinnedAuthority, SystemClock};
use crate::{durable, facts, units};

const DEFAULT_LISTEN: &str = "127.0.0.1:8480";

/// Runs the right language model on this device: pulls it from the fleet's hub, proves that it
/// works here, serves it, and goes back by itself when it does not.
#[derive(Debug, Parser)]
#[command(
    name = "slm-agent",
    version,
    disable_help_subcommand = true,
    after_help = "\
Example: join a fleet with an invitation and serve from then on
  slm-agent join invite.txt --name kiosk-7 --memory-budget 300MB

Exit codes: 0 success; 1 something you can mend (the message ends with a hint); 2 our fault.
Environment: SLM_AGENT_STATE (state folder), SLM_AGENT_LOG (log filter, such as `debug`)."
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Join a fleet with an invitation, then run
    #[command(after_help = "\
The invitation is read from a file, or from stdin with `-`: its secret never stands on a command
line. The device makes its own key; the private half never leaves it.

Example:
  slm device invite | slm-agent join - --name kiosk-7 --memory-budget 300MB")]
    Join(Join),
    /// Run a device that has joined: pull, verify, serve
    #[command(after_help = "\
Ctrl-C or SIGTERM lets requests finish, then ends. The hub need not be reachable.

Example:
  slm-agent run --state /var/lib/slm-agent --listen 127.0.0.1:8480")]
    Run(Run),
    /// Show what this device runs and what it is doing
    #[command(after_help = "\
Example:
  slm-agent status --output json")]
    Status(Show),
    /// Show the ledger: all that the device must not forget
    #[command(after_help = "\
Example:
  slm-agent ledger --state /var/lib/slm-agent")]
    Ledger(Show),
    /// Show everything that left this device: when, where to, which fields
    #[command(after_help = "\
Prompts and answers never leave the device; this is the record that shows it.

Example:
  slm-agent outbox | tail -n 20")]
    Outbox(Show),
    /// Run the golden probes of this device's model now
    #[command(after_help = "\
Loads the model a second time, beside the one that serves, and needs no network.
Ends with exit code 1 if a probe fails.

Example:
  slm-agent probe --state /var/lib/slm-agent")]
    Probe(Show),
    /// Make a key for an application; once there is one, the endpoint answers keys alone
    #[command(after_help = "\
The key is printed once; the state folder holds its digest. A key of the same name is replaced. The
first key counts from the agent's next start, later ones at once.

Example:
  slm-agent key till --per-minute 60")]
    Key(NewKey),
}

#[derive(Debug, Args)]
struct NewKey {
    /// Whose it is
    name: String,
    #[command(flatten)]
    state: StateArgument,
    /// Requests at the same time; any number if absent
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    concurrent: Option<u32>,
    /// Requests that may begin within a minute; any number if absent
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    per_minute: Option<u32>,
}

#[derive(Debug, Args)]
struct StateArgument {
    /// The device's folder
    #[arg(long, env = "SLM_AGENT_STATE", value_name = "DIR", default_value_os_t = default_state())]
    state: PathBuf,
}

#[derive(Debug, Args)]
struct Join {
    /// The file with the invitation, or `-` for stdin
    #[arg(value_name = "FILE")]
    invitation: PathBuf,
    #[command(flatten)]
    state: StateArgument,
    /// A name for people; the host name if not given
    #[arg(long)]
    name: Option<String>,
    /// Memory that models may use, such as 300MB; half of this machine's if not given
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    memory_budget: Option<u64>,
    /// Where programs on this device ask the model; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = DEFAULT_LISTEN)]
    listen: SocketAddr,
    /// Whether every byte over this device's link costs; `auto` looks at the link: mobile networks
    /// and dial-up lines do
    #[arg(long, value_enum, default_value_t)]
    metered: MeteredLink,
    /// Join only; do not run
    #[arg(long)]
    no_run: bool,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    state: StateArgument,
    /// Changes the memory that models may use, such as 300MB
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    memory_budget: Option<u64>,
    /// Changes where programs on this device ask the model
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Changes whether every byte over this device's link costs
    #[arg(long, value_enum)]
    metered: Option<MeteredLink>,
    /// From now on pushes what the local endpoint counts to this OpenTelemetry collector, such as
    /// http://collector:4318; `none` ends that
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
}

#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    state: StateArgument,
    /// How the answer is written
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

fn default_state() -> PathBuf {
    std::env::var_os("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from).join(".slm-agent")
}

/// Runs the program and says with which code it ends.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    log_to_stderr();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(dispatch(cli.verb)),
        Err(error) => {
            eprintln!("error: start the runtime: {error}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            ExitCode::from(if error.is_users() { 1 } else { 2 })
        }
    }
}

/// The error with its causes before its hint.
fn chain(error: &AgentError) -> String {
    let text = error.to_string();
    let (what, hint) = match text.split_once("\nhint: ") {
        Some((what, hint)) => (what, Some(hint)),
        None => (text.as_str(), None),
    };
    let mut chained = what.to_owned();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !chained.contains(&cause_text) {
            chained = format!("{chained}: {cause_text}");
        }
        source = cause.source();
    }
    if let Some(hint) = hint {
        chained = format!("{chained}\nhint: {hint}");
    }
    chained
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("SLM_AGENT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,slmops_agent=info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

async fn dispatch(verb: Verb) -> Result<ExitCode, AgentError> {
    match verb {
        Verb::Join(join) => self::join(join).await,
        Verb::Run(run) => self::run(run).await,
        Verb::Status(show) => status(&show),
        Verb::Ledger(show) => ledger(&show),
        Verb::Outbox(show) => self::outbox(&show),
        Verb::Probe(show) => probe(&show).await,
        Verb::Key(new) => make_key(&new),
    }
}

async fn join(join: Join) -> Result<ExitCode, AgentError> {
    let text = read_invitation(&join.invitation)?;
    let (invitation, url) = identity::parse_invitation(&text)?;
    let state = StateFolder::create(&join.state.state)?;
    let lock = state.lock()?;
    if let Some(identity) = Identity::load(state.root())? {
        return Err(AgentError::Joined {
            path: state.root().to_owned(),
            device: identity.device.to_string(),
            url: identity.url.to_string(),
        });
    }
    let memory_budget_bytes = join.memory_budget.unwrap_or_else(|| facts::memory_bytes() / 2);
    let settings =
        Settings { memory_budget_bytes, listen: join.listen, metered: join.metered, otlp: None };
    let key = DeviceKey::open(state.root())?;
    let authority = PinnedAuthority::new(invitation.ca, None);
    let outbox = Arc::new(Outbox::open(state.root()));
    let hub = Hub::new(url.clone(), &authority, Arc::new(SystemClock), outbox)?;
    let request = EnrolRequest {
        invitation: invitation.id,
        secret: invitation.secret,
        public_key: key.public_pem(),
        name: join.name,
        facts: facts::read(memory_budget_bytes, state.free_bytes(), &Engine::version(), None),
    };
    let response = hub.enrol(&request).await.map_err(|error| error.explain("join", &url))?;
    identity::check_keys(&response.publisher_keys)?;
    if let Some(der) = authority.certificate() {
        identity::save_ca(state.root(), der)?;
    }
    let identity = Identity {
        device: response.device,
        url,
        ca: invitation.ca,
        publisher_keys: response.publisher_keys,
        settings,
    };
    identity.save(state.root())?;
    tracing::info!(
        "joined {} as device {}; models may use {}",
        identity.url,
        identity.device,
        units::size(memory_budget_bytes)
    );
    drop(lock);
    match join.no_run {
        true => Ok(ExitCode::SUCCESS),
        false => start(state, identity).await,
    }
}

fn read_invitation(path: &Path) -> Result<String, AgentError> {
    let limit = MAX_INVITATION_BYTES as u64;
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        let read = std::io::stdin().lock().take(limit + 1).read_to_end(&mut bytes);
        read.map_err(AgentError::file("read", Path::new("stdin")))?;
        bytes
    } else {
        let bytes = durable::read(path, limit).map_err(AgentError::file("read", path))?;
        let absent = || std::io::Error::from(std::io::ErrorKind::NotFound);
        bytes.ok_or_else(|| AgentError::file("read", path)(absent()))?
    };
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn run(run: Run) -> Result<ExitCode, AgentError> {
    let (state, mut identity) = joined(&run.state.state)?;
    let before = identity.settings.clone();
    if let Some(memory_budget_bytes) = run.memory_budget {
        identity.settings.memory_budget_bytes = memory_budget_bytes;
    }
    if let Some(listen) = run.listen {
        identity.settings.listen = listen;
    }
    if let Some(metered) = run.metered {
        identity.settings.metered = metered;
    }
    if let Some(url) = run.otlp {
        identity.settings.otlp = (url != "none").then_some(url);
    }
    // What cannot be followed is not kept.
    shell::collector(&identity)?;
    if identity.settings != before {
        let _lock = state.lock()?;
        identity.save(state.root())?;
    }
    start(state, identity).await
}

async fn start(state: StateFolder, identity: Identity) -> Result<ExitCode, AgentError> {
    let clock = Arc::new(SystemClock);
    let agent = Agent { state, identity, config: Config::default(), clock };
    agent.run(stop_signal()).await?;
    Ok(ExitCode::SUCCESS)
}

/// Done when the process is told to stop. Told twice, it ends at once.
async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let both = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = both else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        std::process::exit(1);
    });
}

fn joined(path: &Path) -> Result<(StateFolder, Identity), AgentError> {
    let state = StateFolder::at(path);
    let identity = Identity::load(path)?;
    let identity = identity.ok_or_else(|| AgentError::NotJoined { path: path.to_owned() })?;
    StateFolder::create(path)?;
    Ok((state, identity))
}

fn status(show: &Show) -> Result<ExitCode, AgentError> {
    let (state, identity) = joined(&show.state.state)?;
    let running = state.locked_by().and_then(|pid| {
        let file: StatusFile = serde_json::from_slice(&state.read_status()?).ok()?;
        (file.pid == Some(pid)).then_some(file)
    });
    let file = match running {
        Some(file) => file,
        None => StatusFile::at_rest(&identity, &state.load_ledger()?, state.load_telemetry()),
    };
    match show.output {
        Output::Text => print(&file.to_text()),
        Output::Json => print_json(&file),
    }
}

fn ledger(show: &Show) -> Result<ExitCode, AgentError> {
    let (state, _) = joined(&show.state.state)?;
    let ledger = state.load_ledger()?;
    if show.output == Output::Json {
        return print_json(&ledger);
    }
    let name = |deployment: &Option<slmops_agent_core::Deployment>| {
        deployment.as_ref().map_or_else(
            || "none".to_owned(),
            |deployment| {
                let manifest = deployment.model.manifest.short();
                format!("{} {manifest}", crate::words::model(&deployment.model))
            },
        )
    };
    let mut text = format!(
        "generation {}\ncurrent    {}\nprevious   {}\n",
        ledger.generation,
        name(&ledger.current),
        name(&ledger.previous)
    );
    if let Some(candidate) = &ledger.candidate {
        text += &format!(
            "candidate  {} (attempt {}, {})\n",
            name(&Some(candidate.deployment.clone())),
            candidate.attempts,
            if candidate.probed { "probes passed" } else { "not probed yet" }
        );
    }
    for rejected in &ledger.rejected {
        let rejection = &rejected.rejection;
        text += &format!(
            "rejected   {} in generation {}: {}\n",
            rejection.manifest.short(),
            rejection.generation,
            crate::words::failure(&rejection.failure)
        );
    }
    print(&text)
}

fn outbox(show: &Show) -> Result<ExitCode, AgentError> {
    let (state, _) = joined(&show.state.state)?;
    let path = state.root().join(outbox::OUTBOX_FILE);
    let entries = outbox::read(state.root()).map_err(AgentError::file("read", &path))?;
    match show.output {
        Output::Text => print(&entries.iter().map(|line| format!("{line}\n")).collect::<String>()),
        Output::Json => print_json(&entries),
    }
}

fn make_key(new: &NewKey) -> Result<ExitCode, AgentError> {
    let (state, _) = joined(&new.state.state)?;
    let path = state.root().join(ENDPOINT_KEYS_FILE);
    let first = !path.exists();
    let limits = KeyLimits { concurrent: new.concurrent, per_minute: new.per_minute };
    let key = Keys::create(&path, &new.name, limits)?;
    if first {
        eprintln!("the endpoint answers keys alone from the agent's next start");
    }
    print(&format!("{key}\n"))
}

async fn probe(show: &Show) -> Result<ExitCode, AgentError> {
    let (state, _) = joined(&show.state.state)?;
    let ledger = state.load_ledger()?;
    let current =
        ledger.current.ok_or_else(|| AgentError::NoModel { path: state.root().to_owned() })?;
    let results = engine::probe_once(&state, &current).await.map_err(AgentError::Engine)?;
    match show.output {
        Output::Text => print(&engine::table(&results))?,
        Output::Json => print_json(&results)?,
    };
    let passed = !results.is_empty() && results.iter().all(|result| result.passed);
    Ok(ExitCode::from(u8::from(!passed)))
}

fn print_json(value: &impl serde::Serialize) -> Result<ExitCode, AgentError> {
    let text = serde_json::to_string_pretty(value).expect("plain data is always JSON");
    print(&(text + "\n"))
}

/// A reader that went away (`| head`) is no failure.
fn print(text: &str) -> Result<ExitCode, AgentError> {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(ExitCode::SUCCESS)
}
