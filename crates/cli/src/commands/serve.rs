//! `slm serve`.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::Session;
use crate::error::{Failure, Result};

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
    /// Tokens of context for each parallel request
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    pub context: u32,
    /// Requests that are answered at the same time
    #[arg(long, default_value_t = 2, value_name = "COUNT")]
    pub parallel: u32,
    /// Compute threads; 0 means one for each core
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    pub threads: u32,
    /// The name under which it answers [default: the file's name]
    #[arg(long)]
    pub name: Option<String>,
}

impl Serve {
    pub(crate) async fn run(self, _session: &Session) -> Result<()> {
        Err(Failure::internal("not connected yet"))
    }
}
