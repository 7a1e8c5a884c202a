//! What can go wrong, in words with a next step.

use std::io;
use std::path::{Path, PathBuf};

/// Why the agent cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A file of the state folder.
    #[error("{operation} {}\nhint: check that the folder exists, is yours and has space left", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file that holds something else.
    #[error(
        "{} is damaged\nhint: restore it from a backup, or remove the state folder and join again with a new invitation",
        path.display()
    )]
    Garbled {
        /// The file.
        path: PathBuf,
    },
    /// A ledger in a format of the future.
    #[error(
        "{} has format {found}, which this agent does not know\nhint: run the newer agent that wrote it",
        path.display()
    )]
    NewerLedger {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// Another agent has the folder.
    #[error(
        "another agent is running on {}{}\nhint: stop it first, or give this one a state folder of its own with --state",
        path.display(),
        pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    Locked {
        /// The folder.
        path: PathBuf,
        /// The other agent's process.
        pid: Option<u32>,
    },
    /// The device has not joined.
    #[error(
        "{} holds no device yet\nhint: get an invitation with `slm device invite` and run `slm-agent join invite.txt --state {0}`",
        path.display()
    )]
    NotJoined {
        /// The folder.
        path: PathBuf,
    },
    /// The device has joined already.
    #[error(
        "{} already holds device {device} of {url}\nhint: run it with `slm-agent run --state {0}`, or use another --state folder for another device",
        path.display()
    )]
    Joined {
        /// The folder.
        path: PathBuf,
        /// The device.
        device: String,
        /// Its hub.
        url: String,
    },
    /// An invitation that is none.
    #[error(
        "this is not an invitation: {reason}\nhint: copy the whole line that `slm device invite` printed"
    )]
    Invitation {
        /// What is wrong.
        reason: String,
    },
    /// Unencrypted connections end on this machine.
    #[error(
        "the invitation names {host} without encryption\nhint: start the hub with a TLS address and invite the device again; plain http works on this machine only"
    )]
    PlainHttp {
        /// The host.
        host: String,
    },
    /// The hub's list of keys.
    #[error(
        "the hub's publisher keys cannot be used: {reason}\nhint: check them with `slm key list` on the hub"
    )]
    PublisherKeys {
        /// What is wrong.
        reason: String,
    },
    /// The hub said no.
    #[error("{operation}: the hub at {url} refused: {detail}\nhint: {hint}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// The hub.
        url: String,
        /// Its words.
        detail: String,
        /// The next step.
        hint: String,
    },
    /// The hub cannot be reached.
    #[error("{operation}: cannot reach the hub at {url}: {cause}\nhint: {hint}")]
    Unreachable {
        /// What was asked.
        operation: &'static str,
        /// The hub.
        url: String,
        /// The innermost cause.
        cause: String,
        /// The next step.
        hint: &'static str,
    },
    /// The local endpoint's address.
    #[error(
        "listen on {address}\nhint: another program uses this address; choose another with --listen, such as 127.0.0.1:0 for any free port"
    )]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// There is no model to do something with.
    #[error("{} has no confirmed model yet\nhint: wait until `slm-agent status` shows one", path.display())]
    NoModel {
        /// The folder.
        path: PathBuf,
    },
    /// The keys of the endpoint cannot be used.
    #[error("{0}")]
    Keys(#[from] slmops_inference::server::KeysError),
    /// Metrics cannot be pushed as asked.
    #[error("push metrics: {0}")]
    Otlp(#[from] slmops_inference::otlp::OtlpError),
    /// The engine did not come up.
    #[error("{0}")]
    Engine(#[source] slmops_inference::worker::WorkerError),
    /// The TLS library refused the setup.
    #[error("set up TLS")]
    Tls(#[source] rustls::Error),
    /// The HTTP client refused the setup.
    #[error("set up the HTTP client")]
    Http(#[source] reqwest::Error),
}

impl AgentError {
    /// For `map_err` on file operations.
    pub fn file(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File { operation, path: path.clone(), source }
    }

    /// Whether the user can mend it (exit code 1) or we must (2).
    pub fn is_users(&self) -> bool {
        !matches!(self, Self::Tls(_) | Self::Http(_))
    }
}
