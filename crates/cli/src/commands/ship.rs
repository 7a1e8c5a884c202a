//! `slm ship`.

use std::path::PathBuf;

use semver::Version;
use slmops_api::ModelName;
use slmops_api::selector::version_numbers;

use super::Session;
use super::rollout::PolicyArgs;
use crate::error::Result;
use crate::home::DEFAULT_KEY;
use crate::ship::engine::MeasuringArgs;

/// From a file to a confirmed rollout.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Import a model, make a variant for each device class, measure each against the \
                  16-bit reference, ask the gate, pack, sign and push, register the release, and \
                  roll it out. What is done already (same digests) is not done again, so an \
                  interrupted ship goes on where it stopped.",
    after_help = "Examples:
  $ slm ship model.gguf --to 'class=small|large'
  $ slm ship ./hf-folder --to site=berlin-3 --name helper --version 2.1.0 --waves 1,25%,rest
  $ slm ship model.gguf --adapter till.gguf --to class=small
  $ slm ship model.gguf --until gate        measure and judge, release nothing

Exit code 3: the gate says worse, or the rollout was halted."
)]
pub struct Ship {
    /// A GGUF file, or a Hugging Face folder of a Llama-architecture model
    pub model: PathBuf,
    /// A LoRA adapter (GGUF) of the model: devices that have the model fetch the adapter alone
    #[arg(long, value_name = "FILE")]
    pub adapter: Option<PathBuf>,
    /// Which devices, and how
    #[command(flatten)]
    pub policy: Box<PolicyArgs>,
    /// The model line [default: from the model's own name]
    #[arg(long)]
    pub name: Option<ModelName>,
    /// The version [default: the next minor one, or 1.0.0]
    #[arg(long)]
    pub version: Option<Version>,
    /// Stop after this stage
    #[arg(long, value_enum, default_value = "rollout", value_name = "STAGE")]
    pub until: Until,
    /// Leave out devices whose engine is older, such as 0.0.7100
    #[arg(long, value_parser = parse_least, value_name = "VERSION")]
    pub min_engine: Option<String>,
    /// Leave out devices whose agent is older
    #[arg(long, value_parser = parse_least, value_name = "VERSION")]
    pub min_agent: Option<String>,
    /// Release in spite of the gate; the reason goes into the audit log
    #[arg(long, value_name = "REASON")]
    pub override_gate: Option<String>,
    /// Also refuse what the gate has too few samples to judge
    #[arg(long)]
    pub strict: bool,
    /// The publisher key that signs
    #[arg(long, default_value = DEFAULT_KEY)]
    pub key: String,
    /// How variants are measured
    #[command(flatten)]
    pub measuring: MeasuringArgs,
    /// Do not ask before the rollout starts (without a terminal nothing is asked)
    #[arg(long, short)]
    pub yes: bool,
    /// Do not stay until the rollout is over
    #[arg(long)]
    pub detach: bool,
}

fn parse_least(given: &str) -> Result<String, String> {
    version_numbers(given)
        .map(|_| given.to_owned())
        .ok_or_else(|| format!("`{given}` is no version: write numbers such as 0.0.7100"))
}

/// The stages of a ship.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Until {
    /// Variants are made
    Variants,
    /// They are measured and judged
    Gate,
    /// They are signed, pushed and registered
    Release,
    /// They are on the devices
    Rollout,
}

impl Ship {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        crate::ship::run(&self, session).await
    }
}
