//! `slm completions`.

use clap::CommandFactory;

use crate::args::Args;
use crate::error::Result;

/// Print a completion script.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  $ slm completions bash > ~/.local/share/bash-completion/completions/slm"
)]
pub struct Completions {
    /// The shell
    shell: clap_complete::Shell,
}

impl Completions {
    pub(crate) fn run(self) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Args::command(), "slm", &mut script);
        crate::output::print(String::from_utf8_lossy(&script).trim_end())
    }
}
