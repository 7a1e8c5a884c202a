//! Starting and stopping the hub.

use std::net::SocketAddr;
use std::path::PathBuf;

/// How the hub is started.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Where everything is kept; made if absent.
    pub data_dir: PathBuf,
    /// Where HTTPS answers; none for plain HTTP alone.
    pub listen: Option<SocketAddr>,
    /// Where plain HTTP answers; loopback addresses only.
    pub http: Option<SocketAddr>,
    /// Host names and addresses for the certificate, besides those of `listen` and loopback.
    pub names: Vec<String>,
    /// The URL that invitations name; `https://` and the listening address if absent.
    pub public_url: Option<String>,
}

/// The hub.
pub struct Hub;

/// A started hub.
pub struct RunningHub {}
