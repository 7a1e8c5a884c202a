//! `slm up`.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::Session;
use crate::error::{Failure, Result};

/// Run the hub.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Run the hub in the foreground until Ctrl-C: control plane, model registry and \
                  dashboard. On the first start it makes its own certificate authority, an admin \
                  token and a publisher key, and notes in SLM_HOME how to reach it, so that the \
                  other commands of this user find it.",
    after_help = "Examples:\n  $ slm up\n  $ slm up --data /var/lib/slm --listen 0.0.0.0:8443 --public-url https://hub.example:8443"
)]
pub struct Up {
    /// Where the hub keeps everything [default: SLM_HOME/hub]
    #[arg(long, value_name = "DIR", env = "SLM_DATA", hide_env_values = true)]
    pub data: Option<PathBuf>,
    /// Where HTTPS answers, for devices and operators; port 0 takes a free one
    #[arg(
        long,
        default_value = "127.0.0.1:8443",
        value_name = "ADDRESS",
        env = "SLM_LISTEN",
        hide_env_values = true
    )]
    pub listen: SocketAddr,
    /// Where plain HTTP answers, for a browser on this machine; loopback addresses only
    #[arg(
        long,
        default_value = "127.0.0.1:8080",
        value_name = "ADDRESS",
        env = "SLM_HTTP",
        hide_env_values = true
    )]
    pub http: SocketAddr,
    /// The URL under which devices reach the hub [default: https:// and the listening address]
    #[arg(long, value_name = "URL", env = "SLM_PUBLIC_URL", hide_env_values = true)]
    pub public_url: Option<String>,
}

impl Up {
    pub(crate) async fn run(self, _session: &Session) -> Result<()> {
        Err(Failure::internal("not connected yet"))
    }
}
