//! The hub's own certificate authority and the short-lived server certificate under it.
//! It never decides who may connect: tokens do that. Devices pin the authority by its digest.
//! Start reading at [`Tls::open`], then [`client_config`] for the other end.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use slmops_artifact::Digest;

use crate::durable;

#[cfg(test)]
mod tests;

/// The authority's certificate, in the folder given to [`Tls::open`].
pub const CA_CERTIFICATE_FILE: &str = "ca.pem";
/// The authority's private key beside it (mode 0600).
pub const CA_KEY_FILE: &str = "ca.key";

/// The longest certificate or key file, in bytes.
const MAX_PEM_BYTES: u64 = 16 * 1024;
/// Valid from the first day of this year: many devices start with a clock that is behind.
const VALID_FROM_YEAR: i32 = 2020;
/// The authority is valid to the last day of this year. Devices trust it because its digest is
/// pinned, and not because of its dates.
const CA_VALID_TO_YEAR: i32 = 2099;
/// How long a server certificate is valid.
const SERVER_VALID: SignedDuration = SignedDuration::from_hours(90 * 24);
/// A server certificate older than this is replaced at the next handshake.
const RENEW_AFTER: SignedDuration = SignedDuration::from_hours(24);
/// No clock of a hub is right about a time before this was written.
const EARLIEST_NOW: &str = "2026-01-01T00:00:00Z";
/// Names a hub may carry besides its own.
const MAX_EXTRA_NAMES: usize = 100;

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of the authority cannot be read or written.
    #[error("{operation} {}: {source}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The authority's certificate is there, its key is not.
    #[error(
        "the hub's CA certificate {} has lost its private key\nhint: restore {CA_KEY_FILE} from a backup; or delete the certificate to start a new authority, after which every device must join again",
        path.display()
    )]
    KeyLost {
        /// The certificate.
        path: PathBuf,
    },
    /// The authority's files hold something else, or do not belong together.
    #[error(
        "the hub's CA in {} cannot be used: {reason}\nhint: restore {CA_CERTIFICATE_FILE} and {CA_KEY_FILE} from a backup; or delete both to start a new authority, after which every device must join again",
        path.display()
    )]
    Unusable {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A name for the certificate is not one.
    #[error(
        "`{name}` is neither a host name nor an IP address\nhint: give names such as `hub.example.com` or `10.0.0.5`, at most {MAX_EXTRA_NAMES} of them"
    )]
    Name {
        /// The name as given.
        name: String,
    },
    /// A CA certificate given to a client is not PEM.
    #[error(
        "the hub's CA certificate cannot be read: {reason}\nhint: copy {CA_CERTIFICATE_FILE} from the hub's data folder again"
    )]
    ClientCa {
        /// What is wrong.
        reason: String,
    },
    /// A certificate could not be made.
    #[error("make certificate")]
    Generate(#[from] rcgen::Error),
    /// The TLS library refused the setup.
    #[error("set up TLS")]
    Rustls(#[from] rustls::Error),
}

/// The hub's authority and what it serves with. Clones share it.
#[derive(Clone, Debug)]
pub struct Tls {
    authority: Arc<Authority>,
    resolver: Arc<Resolver>,
}

impl Tls {
    /// Loads the authority from `folder`, or makes it on first use, and issues a server certificate
    /// for `localhost`, `127.0.0.1`, `::1`, this host's name and main address, and `extra_names`.
    ///
    /// # Errors
    /// Files that cannot be read, written or used, or a name that is not one.
    pub fn open(folder: &Path, extra_names: &[String]) -> Result<Self, TlsError> {
        let authority = Arc::new(Authority::open(folder)?);
        let names = server_names(extra_names)?;
        let issued_at = now();
        let key = authority.issue(&names, issued_at)?;
        authority.verify(&key, issued_at).map_err(|error| TlsError::Unusable {
            path: folder.to_owned(),
            reason: format!("its certificate and key do not belong together ({error})"),
        })?;
        let current = Mutex::new(Issued { key: Arc::new(key), at: issued_at });
        let resolver = Resolver { authority: Arc::clone(&authority), names, current };
        Ok(Self { authority, resolver: Arc::new(resolver) })
    }

    /// SHA-256 of the DER of the authority's certificate: what an invitation pins.
    pub fn ca_digest(&self) -> Digest {
        Digest::of(&self.authority.certificate)
    }

    /// The authority's certificate as PEM, for clients.
    pub fn ca_pem(&self) -> &str {
        &self.authority.certificate_pem
    }

    /// The names in the server certificate.
    pub fn names(&self) -> &[String] {
        &self.resolver.names
    }

    /// What a TLS listener needs: HTTP/2 and HTTP/1.1 offered, the chain sent with the authority's
    /// certificate at its end, and the server certificate renewed by itself each day.
    ///
    /// # Errors
    /// Only if the TLS library refuses its own defaults.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&self.resolver) as _);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// The client's end: trusts servers whose certificate is signed by the authority in `ca_pem`, and
/// no other.
///
/// # Errors
/// If `ca_pem` is not a CA certificate.
pub fn client_config(ca_pem: &str) -> Result<ClientConfig, TlsError> {
    let refused = |reason: String| TlsError::ClientCa { reason };
    let certificate = CertificateDer::from_pem_slice(ca_pem.as_bytes())
        .map_err(|error| refused(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    roots.add(certificate).map_err(|error| refused(error.to_string()))?;
    Ok(ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// A client's TLS configuration that trusts what this machine trusts.
///
/// # Errors
/// [`TlsError::ClientCa`] if the machine has no authorities.
pub fn system_client_config() -> Result<ClientConfig, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Machines carry a few that nobody can read; those are not trusted.
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let reason = "this machine has no certificate authorities".to_owned();
        return Err(TlsError::ClientCa { reason });
    }
    Ok(ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The time, or the earliest that it can be where the clock is certainly wrong.
fn now() -> Timestamp {
    let earliest: Timestamp = EARLIEST_NOW.parse().expect("a constant timestamp");
    Timestamp::now().max(earliest)
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("ca", &Digest::of(&self.certificate)).finish()
    }
}

impl Authority {
    fn open(folder: &Path) -> Result<Self, TlsError> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| TlsError::File { operation, path, source }
        };
        durable::create_private_folder(folder).map_err(failed("make folder", folder))?;
        let key_path = folder.join(CA_KEY_FILE);
        let certificate_path = folder.join(CA_CERTIFICATE_FILE);
        let unusable = |reason: String| TlsError::Unusable { path: folder.to_owned(), reason };

        let key = if key_path.exists() {
            let bytes = durable::read_secret(&key_path, MAX_PEM_BYTES)
                .map_err(failed("read", &key_path))?;
            let pem = String::from_utf8(bytes)
                .map_err(|_| unusable(format!("{CA_KEY_FILE} is not text")))?;
            KeyPair::from_pem(&pem)
                .map_err(|error| unusable(format!("{CA_KEY_FILE} is no private key: {error}")))?
        } else if certificate_path.exists() {
            return Err(TlsError::KeyLost { path: certificate_path });
        } else {
            // The key goes to the disk first: a certificate without it would be a dead end.
            let key = KeyPair::generate()?;
            durable::write_secret(&key_path, key.serialize_pem().as_bytes())
                .map_err(failed("write", &key_path))?;
            key
        };

        let parameters = authority_parameters();
        let certificate_pem = if certificate_path.exists() {
            let bytes = durable::read_secret(&certificate_path, MAX_PEM_BYTES)
                .map_err(failed("read", &certificate_path))?;
            String::from_utf8(bytes)
                .map_err(|_| unusable(format!("{CA_CERTIFICATE_FILE} is not text")))?
        } else {
            let pem = parameters.self_signed(&key)?.pem();
            durable::write_secret(&certificate_path, pem.as_bytes())
                .map_err(failed("write", &certificate_path))?;
            pem
        };
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|error| unusable(format!("{CA_CERTIFICATE_FILE}: {error}")))?;
        Ok(Self { issuer: Issuer::new(parameters, key), certificate, certificate_pem })
    }

    /// Issues a server certificate with a key of its own, which is never stored.
    fn issue(&self, names: &[String], at: Timestamp) -> Result<CertifiedKey, TlsError> {
        let mut parameters = CertificateParams::new(names)?;
        parameters.distinguished_name = distinguished_name("slmops hub");
        parameters.not_before = date_time_ymd(VALID_FROM_YEAR, 1, 1);
        let last_day = (at + SERVER_VALID).to_zoned(jiff::tz::TimeZone::UTC).date();
        parameters.not_after = date_time_ymd(
            i32::from(last_day.year()),
            last_day.month().unsigned_abs(),
            last_day.day().unsigned_abs(),
        );
        parameters.use_authority_key_identifier_extension = true;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        let key = ring::sign::any_ecdsa_type(&key.into())?;
        Ok(CertifiedKey::new(vec![certificate.der().clone(), self.certificate.clone()], key))
    }

    /// Checks `key` as a client would.
    fn verify(&self, key: &CertifiedKey, at: Timestamp) -> Result<(), rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        let verifier = verifier.map_err(|error| rustls::Error::General(error.to_string()))?;
        let localhost = ServerName::try_from("localhost").expect("a constant name");
        let seconds = u64::try_from(at.as_second()).unwrap_or_default();
        let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        verifier.verify_server_cert(key.end_entity_cert()?, &key.cert[1..], &localhost, &[], at)?;
        Ok(())
    }
}

fn authority_parameters() -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = distinguished_name("slmops hub CA");
    parameters.not_before = date_time_ymd(VALID_FROM_YEAR, 1, 1);
    parameters.not_after = date_time_ymd(CA_VALID_TO_YEAR, 12, 31);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters
}

fn distinguished_name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// The names of this hub, without repeats.
fn server_names(extra: &[String]) -> Result<Vec<String>, TlsError> {
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    // A host's own name may be anything; it is left out where it could not be asked for anyway.
    if ServerName::try_from(host.as_str()).is_ok() {
        names.push(host);
    }
    names.extend(main_address().map(|address| address.to_string()));
    for (index, name) in extra.iter().enumerate() {
        if index >= MAX_EXTRA_NAMES || ServerName::try_from(name.as_str()).is_err() {
            return Err(TlsError::Name { name: name.chars().take(253).collect() });
        }
        names.push(name.clone());
    }
    let mut seen = std::collections::HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    Ok(names)
}

/// The address from which this host would reach others. Connecting a UDP socket asks the routing
/// table and sends nothing.
fn main_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?; // TEST-NET-1, RFC 5737
    let address = socket.local_addr().ok()?.ip();
    (!address.is_unspecified()).then_some(address)
}

/// Gives out the server certificate, and a new one once a day.
struct Resolver {
    authority: Arc<Authority>,
    names: Vec<String>,
    current: Mutex<Issued>,
}

struct Issued {
    key: Arc<CertifiedKey>,
    at: Timestamp,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("names", &self.names).finish_non_exhaustive()
    }
}

impl Resolver {
    fn certificate(&self, now: Timestamp) -> Arc<CertifiedKey> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // A clock that jumps back counts as due, too.
        if now.duration_since(current.at).abs() > RENEW_AFTER {
            match self.authority.issue(&self.names, now) {
                Ok(key) => *current = Issued { key: Arc::new(key), at: now },
                Err(error) => tracing::error!(%error, "cannot renew the server certificate"),
            }
        }
        Arc::clone(&current.key)
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certificate(now()))
    }
}
