//! The operator's command line, and the hub in one binary (`slm up`).
//! It never decides about devices by itself: the hub does, and this program asks it.
//! Start reading at [`args::Command`], then `ship/` (the pipeline) and `demo/`.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod client;
mod commands;
mod demo;
mod error;
mod home;
mod output;
mod progress;
mod reference;
mod registry;
mod ship;
mod units;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use slmops_inference::child::{self, Job};

use crate::args::Args;
use crate::error::{Exit, Failure};
use crate::output::Format;

/// Work that runs in a process of its own, whose crashes and memory are not this one's.
fn jobs() -> Vec<Job> {
    let own = [commands::up::DELTA_JOB, bench::serve::raw::RAW_LOOP];
    [slmops_evaluate::JOBS, slmops_optimize::JOBS, &own].concat()
}

fn main() -> ExitCode {
    demo::process::die_with_parent_if_asked();
    child::run_if_child(&jobs());
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return explain_usage(&error),
    };
    let format = args.global.output;
    start_log(&args);
    // Another provider may be compiled in by a dependency: choose, so that none is guessed.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut runtime = match args.command {
        // The cores are the engine's: one thread passes its tokens on, and none wakes another.
        args::Command::Serve(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let failure = Failure::internal("start the asynchronous runtime").source(error);
            return tell(&failure, format);
        }
    };
    let outcome = runtime.block_on(commands::run(args));
    // A blocking task (a child's pipe, a file) must not hold up the end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => tell(&failure, format),
    }
}

fn tell(failure: &Failure, format: Format) -> ExitCode {
    match format {
        Format::Text => eprintln!("{failure}"),
        Format::Json => {
            let (message, hint) = failure.told();
            eprintln!("{}", serde_json::json!({ "error": message, "hint": hint }));
        }
    }
    ExitCode::from(failure.exit as u8)
}

/// Help goes to stdout and succeeds; a wrong command line is the caller's problem (1).
fn explain_usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Nothing can be done if stdout is gone.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let styled = std::io::stderr().is_terminal();
    let text = if styled { error.render().ansi().to_string() } else { error.render().to_string() };
    let text = text.trim_end();
    // clap's own pointer to the help becomes our hint.
    let body = match text.rfind("\n\nFor more information") {
        Some(at) => &text[..at],
        None => text,
    };
    eprintln!("{}", body.trim_end());
    if error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        eprintln!("hint: the same with `--help` shows what is possible, with an example");
    }
    ExitCode::from(Exit::User as u8)
}

fn start_log(args: &Args) {
    let default = if matches!(args.command, args::Command::Up(_)) { "info" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("SLM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}
