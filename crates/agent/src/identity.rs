//! Who this device is: its key, which never leaves it, and what it learnt when it joined.

use std::path::Path;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use slmops_api::DeviceId;
use slmops_api::device::{InvitationText, PublisherKey, TOKEN_CONTEXT};
use slmops_artifact::Digest;
use slmops_artifact::signing::{PrivateKey, PublicKey};

use crate::durable::{self, Access};
use crate::error::AgentError;

/// What an invitation's text begins with.
pub const INVITATION_PREFIX: &str = "slmi1.";
/// The longest invitation that is read, in bytes.
pub const MAX_INVITATION_BYTES: usize = 8 << 10;
/// The most publisher keys that a device keeps.
pub const MAX_PUBLISHER_KEYS: usize = 64;

const KEY_FILE: &str = "device.key";
const IDENTITY_FILE: &str = "device.json";
const CA_FILE: &str = "ca.der";
const MAX_KEY_BYTES: u64 = 4 << 10;
const MAX_IDENTITY_BYTES: u64 = 256 << 10;
const MAX_CA_BYTES: u64 = 16 << 10;

/// What is kept of joining.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The device's id.
    pub device: DeviceId,
    /// The hub's address.
    pub url: HubUrl,
    /// SHA-256 of the hub's CA certificate.
    pub ca: Digest,
    /// The keys whose signatures count.
    pub publisher_keys: Vec<PublisherKey>,
    /// What the owner decided.
    pub settings: Settings,
}

/// What the device's owner decided when joining.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Memory that models may use, in bytes.
    pub memory_budget_bytes: u64,
    /// Where the local endpoint listens.
    pub listen: std::net::SocketAddr,
    /// Whether every byte over the link costs.
    #[serde(default)]
    pub metered: MeteredLink,
    /// The OpenTelemetry collector that is told what the local endpoint counts; nobody is if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub otlp: Option<String>,
}

/// Whether every byte over a link costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum MeteredLink {
    /// It does.
    Yes,
    /// It does not.
    No,
    /// As the system says: it does over mobile networks and dial-up lines.
    #[default]
    Auto,
}

/// The address of a hub: `https://…`, or `http://…` on this machine.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HubUrl(reqwest::Url);

impl HubUrl {
    /// The address of a path, such as `/v1/enrol`.
    pub fn join(&self, path: &str) -> reqwest::Url {
        let mut url = self.0.clone();
        let base = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{base}{path}"));
        url
    }

    /// Whether the connection is encrypted.
    pub fn is_tls(&self) -> bool {
        self.0.scheme() == "https"
    }
}

impl FromStr for HubUrl {
    type Err = AgentError;

    fn from_str(given: &str) -> Result<Self, AgentError> {
        let refuse = |reason: &str| AgentError::Invitation { reason: reason.to_owned() };
        let url: reqwest::Url =
            given.parse().map_err(|_| refuse("its hub address is not a URL"))?;
        let host = url.host_str().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let local = host == "localhost"
            || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        let plain = url.username().is_empty() && url.password().is_none() && url.query().is_none();
        match url.scheme() {
            _ if !plain || host.is_empty() => Err(refuse("its hub address is not a plain URL")),
            "https" => Ok(Self(url)),
            "http" if local => Ok(Self(url)),
            "http" => Err(AgentError::PlainHttp { host: host.chars().take(200).collect() }),
            _ => Err(refuse("its hub address is neither https nor http")),
        }
    }
}

impl TryFrom<String> for HubUrl {
    type Error = AgentError;
    fn try_from(given: String) -> Result<Self, AgentError> {
        given.parse()
    }
}

impl From<HubUrl> for String {
    fn from(url: HubUrl) -> Self {
        url.0.into()
    }
}

impl std::fmt::Display for HubUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.as_str().trim_end_matches('/'))
    }
}

impl std::fmt::Debug for HubUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Reads an invitation as `slm device invite` prints it.
///
/// # Errors
/// [`AgentError::Invitation`] saying what is wrong; never with the secret in it.
pub fn parse_invitation(text: &str) -> Result<(InvitationText, HubUrl), AgentError> {
    let refuse = |reason: &str| AgentError::Invitation { reason: reason.to_owned() };
    if text.len() > MAX_INVITATION_BYTES {
        return Err(refuse("it is too long"));
    }
    let line = text.lines().map(str::trim).find(|line| line.starts_with(INVITATION_PREFIX));
    let line = line.ok_or_else(|| refuse("it does not begin with `slmi1.`"))?;
    let coded = line[INVITATION_PREFIX.len()..].trim_end_matches('=');
    let json = URL_SAFE_NO_PAD.decode(coded).map_err(|_| refuse("it is cut off or mistyped"))?;
    let invitation: InvitationText =
        serde_json::from_slice(&json).map_err(|_| refuse("it is cut off or mistyped"))?;
    let url = invitation.url.parse()?;
    Ok((invitation, url))
}

/// The device's key, made on the device.
pub struct DeviceKey(PrivateKey);

impl DeviceKey {
    /// Reads the key in `folder`, or makes one.
    ///
    /// # Errors
    /// A key that cannot be read, written or understood.
    pub fn open(folder: &Path) -> Result<Self, AgentError> {
        let path = folder.join(KEY_FILE);
        let failed = |operation| AgentError::file(operation, &path);
        if let Some(bytes) = durable::read(&path, MAX_KEY_BYTES).map_err(failed("read"))? {
            let key =
                std::str::from_utf8(&bytes).ok().and_then(|pem| PrivateKey::from_pem(pem).ok());
            return key.map(Self).ok_or_else(|| AgentError::Garbled { path: path.clone() });
        }
        let key = PrivateKey::generate();
        durable::replace(&path, key.to_pem().as_bytes(), Access::Secret)
            .map_err(failed("write"))?;
        Ok(Self(key))
    }

    /// The public half, SPKI PEM.
    pub fn public_pem(&self) -> String {
        self.0.public().to_pem().to_owned()
    }

    /// The answer to a challenge for a token.
    pub fn answer(&self, device: &DeviceId, challenge: &str) -> String {
        let text = format!("{TOKEN_CONTEXT}\n{device}\n{challenge}");
        STANDARD.encode(self.0.sign(text.as_bytes()))
    }
}

impl Identity {
    /// The identity in `folder`; `None` if the device has not joined.
    ///
    /// # Errors
    /// A file that cannot be read or understood.
    pub fn load(folder: &Path) -> Result<Option<Self>, AgentError> {
        let path = folder.join(IDENTITY_FILE);
        let bytes =
            durable::read(&path, MAX_IDENTITY_BYTES).map_err(AgentError::file("read", &path))?;
        bytes
            .map(|bytes| {
                serde_json::from_slice(&bytes)
                    .map_err(|_| AgentError::Garbled { path: path.clone() })
            })
            .transpose()
    }

    /// Keeps it.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), AgentError> {
        let path = folder.join(IDENTITY_FILE);
        let bytes = serde_json::to_vec_pretty(self).expect("an identity is always JSON");
        durable::replace(&path, &bytes, Access::Secret).map_err(AgentError::file("write", &path))
    }
}

/// Checks the hub's list of publisher keys.
///
/// # Errors
/// Too many keys, or a key that is none.
pub fn check_keys(keys: &[PublisherKey]) -> Result<(), AgentError> {
    if keys.len() > MAX_PUBLISHER_KEYS {
        let reason = format!("{} keys, more than {MAX_PUBLISHER_KEYS}", keys.len());
        return Err(AgentError::PublisherKeys { reason });
    }
    keys.iter().try_for_each(|key| parse_key(key).map(|_| ()))
}

/// Reads one publisher key.
///
/// # Errors
/// A key that is none.
pub fn parse_key(key: &PublisherKey) -> Result<PublicKey, AgentError> {
    PublicKey::from_pem(&key.public_key)
        .map_err(|_| AgentError::PublisherKeys { reason: format!("key {} is none", key.id) })
}

/// The hub's CA certificate in `folder`, DER, if the device has met the hub.
///
/// # Errors
/// A file that cannot be read.
pub fn load_ca(folder: &Path) -> Result<Option<Vec<u8>>, AgentError> {
    let path = folder.join(CA_FILE);
    durable::read(&path, MAX_CA_BYTES).map_err(AgentError::file("read", &path))
}

/// Keeps the hub's CA certificate.
///
/// # Errors
/// A folder that cannot be written.
pub fn save_ca(folder: &Path, der: &[u8]) -> Result<(), AgentError> {
    let path = folder.join(CA_FILE);
    durable::replace(&path, der, Access::Public).map_err(AgentError::file("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invitation(url: &str) -> String {
        let text = InvitationText {
            url: url.to_owned(),
            ca: Digest::of(b"ca"),
            id: "inv-1".parse().unwrap(),
            secret: "5ec4e7".to_owned(),
        };
        let json = serde_json::to_vec(&text).unwrap();
        format!("{INVITATION_PREFIX}{}", URL_SAFE_NO_PAD.encode(json))
    }

    #[test]
    fn invitations_are_checked_and_their_secret_stays_in() {
        let good = invitation("https://hub.example:8443");
        let (parsed, url) = parse_invitation(&format!("# for the kiosk\n  {good}\n")).unwrap();
        assert_eq!(parsed.secret, "5ec4e7");
        assert_eq!(url.join("/v1/enrol").as_str(), "https://hub.example:8443/v1/enrol");
        assert!(parse_invitation(&invitation("http://127.0.0.1:8080")).is_ok());
        assert!(parse_invitation(&invitation("http://[::1]:8080")).is_ok());
        let cut = &good[..good.len() - 7];
        for bad in [
            String::new(),
            "hello".to_owned(),
            cut.to_owned(),
            "slmi1.".to_owned(),
            "slmi1.%%%".to_owned(),
            "x".repeat(MAX_INVITATION_BYTES + 1),
            invitation("http://10.0.0.5"),
            invitation("http://localhost.evil.example"),
            invitation("ftp://hub"),
            invitation("https://user:pass@hub"),
            invitation("nonsense"),
        ] {
            let error = parse_invitation(&bad).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("hint:"), "{error}");
            assert!(!error.contains("5ec4e7"), "{error}");
        }
    }

    #[test]
    fn the_key_is_made_once_and_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let first = DeviceKey::open(folder.path()).unwrap();
        let second = DeviceKey::open(folder.path()).unwrap();
        assert_eq!(first.public_pem(), second.public_pem());
        let path = folder.path().join(KEY_FILE);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let device: DeviceId = "kiosk-1".parse().unwrap();
        let signature = STANDARD.decode(first.answer(&device, "abc")).unwrap();
        let public = PublicKey::from_pem(&second.public_pem()).unwrap();
        assert!(public.accepts(b"slmops device token v1\nkiosk-1\nabc", &signature));
        std::fs::write(&path, "garbage").unwrap();
        assert!(DeviceKey::open(folder.path()).err().unwrap().to_string().contains("hint:"));
    }
}
