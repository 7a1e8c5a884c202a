//! `slm demo`.

use std::path::PathBuf;

use super::Session;
use crate::error::Result;

/// Show the whole product on a real model.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Start a hub and three devices on this machine, ship a model to them, then ship a \
                  damaged version of it and watch it being taken back. Everything is real: \
                  processes, inference, signatures, measurements. Nothing outside the demo's own \
                  folder is touched, and everything is cleaned up at the end.",
    after_help = "Example:\n  $ slm demo --model SmolLM2-135M-Instruct.Q4_1.gguf --keep"
)]
pub struct Demo {
    /// The model: a GGUF file, or a Hugging Face folder of a Llama-architecture model
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Leave everything running for a look around, until Ctrl-C
    #[arg(long)]
    pub keep: bool,
    /// Folder for all of the demo's files; removed at the end
    #[arg(long, value_name = "DIR", default_value = ".demo")]
    pub folder: PathBuf,
    /// The program of a device [default: slm-agent next to this program]
    #[arg(long, value_name = "PATH")]
    pub agent: Option<PathBuf>,
}

impl Demo {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        crate::demo::run(self, session).await
    }
}
