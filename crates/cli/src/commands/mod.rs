//! One module for each noun: its arguments, and what they do.

pub mod audit;
pub mod backup;
pub mod bench;
pub mod bench_delta;
mod bench_serve;
pub mod blueprint;
pub mod channel;
pub mod class;
pub mod completions;
pub mod delta;
pub mod demo;
pub mod device;
pub mod doctor;
pub mod evaluate;
pub mod fleet;
pub mod key;
pub mod model;
pub mod optimize;
pub mod quarantine;
pub mod release;
pub mod rollout;
pub mod serve;
pub mod ship;
pub mod sim;
pub mod token;
pub mod up;
pub mod webhook;

use crate::args::{Args, Command};
use crate::client::Hub;
use crate::error::Result;
use crate::home::Home;
use crate::output::Out;
use crate::progress::Progress;

/// What every command is given.
#[derive(Clone)]
pub struct Session {
    /// Results.
    pub out: Out,
    /// Talk.
    pub progress: Progress,
    /// `SLM_HOME`.
    pub home: Home,
}

impl Session {
    /// The hub of this user.
    pub fn hub(&self) -> Result<Hub> {
        Hub::connect(&self.home)
    }
}

/// Runs the command.
pub async fn run(args: Args) -> Result<()> {
    let session = Session {
        out: Out { format: args.global.output },
        progress: Progress::new(args.global.quiet),
        home: Home::new(args.global.home)?,
    };
    let session = &session;
    match args.command {
        Command::Up(up) => up.run(session).await,
        Command::Backup(backup) => backup.run(session).await,
        Command::Restore(restore) => restore.run(session).await,
        Command::Ship(ship) => ship.run(session).await,
        Command::Sim(sim) => sim.run(session).await,
        Command::Bench(bench) => bench.run(session).await,
        Command::Serve(serve) => serve.run(session).await,
        Command::Doctor(doctor) => doctor.run(session).await,
        Command::Demo(demo) => demo.run(session).await,
        Command::Model(model) => model.run(session).await,
        Command::Optimize(optimize) => optimize.run(session).await,
        Command::Evaluate(evaluate) => evaluate.run(session).await,
        Command::Release(release) => release.run(session).await,
        Command::Rollout(rollout) => rollout.run(session).await,
        Command::Channel(channel) => channel.run(session).await,
        Command::Quarantine(quarantine) => quarantine.run(session).await,
        Command::Fleet(fleet) => fleet.run(session).await,
        Command::Device(device) => device.run(session).await,
        Command::Class(class) => class.run(session).await,
        Command::Blueprint(blueprint) => blueprint.run(session).await,
        Command::Key(key) => key.run(session).await,
        Command::Token(token) => token.run(session).await,
        Command::Webhook(webhook) => webhook.run(session).await,
        Command::Audit(audit) => audit.run(session).await,
        Command::Completions(completions) => completions.run(),
    }
}

/// A time for people, to the second.
fn time(at: jiff::Timestamp) -> String {
    at.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// A closed enum's name on the wire, as one word for people.
fn word<T: serde::Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word.replace('_', " "),
        Ok(serde_json::Value::Object(fields)) => fields
            .values()
            .next()
            .and_then(|tag| tag.as_str())
            .map_or_else(String::new, |word| word.replace('_', " ")),
        _ => String::new(),
    }
}

/// A name or id for use in a path; names of other shapes cannot exist.
fn segment(name: &str) -> Result<&str> {
    use crate::error::Failure;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.len() > 128 || !name.bytes().all(plain) || name.contains("..") {
        return Err(Failure::user(format!("`{name}` is no name or id"))
            .hint("names are made of letters, digits, '.', '_' and '-'"));
    }
    Ok(name)
}
