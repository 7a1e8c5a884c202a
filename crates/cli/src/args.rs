//! The command line as a whole: global options and the list of nouns.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::commands::{
    audit, backup, bench, blueprint, channel, class, completions, demo, device, doctor, evaluate,
    fleet, key, model, optimize, quarantine, release, rollout, serve, ship, sim, token, up,
    webhook,
};
use crate::output::Format;

/// Get the right variant of a small language model onto every device it fits, prove it there,
/// and take it back when it is worse.
#[derive(Debug, Parser)]
#[command(
    name = "slm",
    version,
    max_term_width = 100,
    propagate_version = true,
    after_help = "Examples:
  $ slm serve model.gguf                        one model on this machine, no fleet
  $ slm up                                      a hub, with its dashboard
  $ slm ship model.gguf --to 'class=small'      everything from a file to a confirmed rollout
  $ slm rollout why                             what was decided, and on which evidence

Exit codes: 0 done; 1 a problem that you can mend; 2 a problem of ours or of the machine;
3 a gate says that the candidate is worse.
Environment variables are listed in docs/configuration.md."
)]
pub struct Args {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// How results are printed on stdout; json has the fields of the hub's API
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        env = "SLM_OUTPUT",
        hide_env_values = true
    )]
    pub output: Format,
    /// Folder of this user's context, keys and cache [default: ~/.slm]
    #[arg(long, global = true, value_name = "DIR", env = "SLM_HOME", hide_env_values = true)]
    pub home: Option<PathBuf>,
    /// Say nothing on stderr but errors
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

/// Everything that `slm` does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the hub: control plane, registry and dashboard
    Up(up::Up),
    /// Make a backup of the hub, while it runs
    Backup(backup::Backup),
    /// Make a hub of a backup
    Restore(backup::Restore),
    /// Take a model from a file to a confirmed rollout
    Ship(ship::Ship),
    /// Serve one model on this machine, with no fleet
    Serve(serve::Serve),
    /// Look at this machine and the hub, and say what is wrong
    Doctor(doctor::Doctor),
    /// Show the whole product on a real model, with real processes
    Demo(demo::Demo),
    /// Import and inspect model files
    #[command(subcommand)]
    Model(model::Model),
    /// Make variants of a model
    Optimize(optimize::Optimize),
    /// Measure a model against a reference
    Evaluate(evaluate::Evaluate),
    /// Releases: versions of a model with their variants
    #[command(subcommand)]
    Release(release::Release),
    /// Rollouts: which devices get a release, in waves
    #[command(subcommand)]
    Rollout(rollout::Rollout),
    /// Channels: the steps of a release on its way through the fleet
    #[command(subcommand)]
    Channel(channel::Channel),
    /// The quarantine: packages that failed in a class
    #[command(subcommand)]
    Quarantine(quarantine::Quarantine),
    /// Show what a rollout policy would do to a fleet, in virtual time
    Sim(sim::Sim),
    /// Measure how much a hub can take
    #[command(subcommand)]
    Bench(bench::Bench),
    /// The fleet as a whole, counted
    #[command(subcommand)]
    Fleet(fleet::Fleet),
    /// Devices of the fleet
    #[command(subcommand)]
    Device(device::Device),
    /// Device classes: which variant is made for which memory
    #[command(subcommand)]
    Class(class::Class),
    /// Blueprints: desired configuration in layers
    #[command(subcommand)]
    Blueprint(blueprint::Blueprint),
    /// Publisher keys, which sign releases
    #[command(subcommand)]
    Key(key::Key),
    /// Operator tokens
    #[command(subcommand)]
    Token(token::Token),
    /// Webhooks: the audit log, event by event, to other programs
    #[command(subcommand)]
    Webhook(webhook::Webhook),
    /// The audit log
    #[command(subcommand)]
    Audit(audit::Audit),
    /// Print a completion script for a shell
    Completions(completions::Completions),
}
