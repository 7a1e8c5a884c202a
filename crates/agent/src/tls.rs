//! Trust in the hub: its own certificate authority, pinned by the invitation.
//!
//! Signature, chain and host name are checked in full. The time of day is not known for sure: a
//! device may boot in 1970, or ten years ahead. A certificate counts as in date if it is so by the
//! system clock or at [`EARLIEST_NOW`], the latest moment that is certainly past.

use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::time_provider::TimeProvider;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use slmops_artifact::Digest;

use crate::error::AgentError;

/// This program was written after this moment, 2026-01-01T00:00:00Z, in seconds since 1970.
pub const EARLIEST_NOW: u64 = 1_767_225_600;

/// The most certificates of a chain in which the authority is looked for.
const MAX_CHAIN: usize = 8;

/// Accepts servers under the pinned authority and no other.
#[derive(Debug)]
pub struct PinnedAuthority {
    pin: Digest,
    authority: OnceLock<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl PinnedAuthority {
    /// Trusts the authority with this digest. `stored` is its certificate where it is known
    /// already; otherwise the first connection brings it.
    pub fn new(pin: Digest, stored: Option<Vec<u8>>) -> Arc<Self> {
        let stored = stored.filter(|der| Digest::of(der) == pin);
        let authority = OnceLock::new();
        if let Some(der) = stored {
            let _ = authority.set(CertificateDer::from(der));
        }
        Arc::new(Self { pin, authority, provider: Arc::new(ring::default_provider()) })
    }

    /// The authority's certificate, DER, once it is known.
    pub fn certificate(&self) -> Option<&[u8]> {
        self.authority.get().map(AsRef::as_ref)
    }

    /// What a client connects with; `time` is the system clock, or a test's.
    ///
    /// # Errors
    /// Only if the TLS library refuses its own defaults.
    pub fn client_config(
        self: &Arc<Self>,
        time: Arc<dyn TimeProvider>,
    ) -> Result<ClientConfig, AgentError> {
        Ok(ClientConfig::builder_with_details(Arc::clone(&self.provider), time)
            .with_safe_default_protocol_versions()
            .map_err(AgentError::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(self) as _)
            .with_no_client_auth())
    }
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let authority = match self.authority.get() {
            Some(stored) => stored.clone(),
            None => intermediates
                .iter()
                .take(MAX_CHAIN)
                .find(|certificate| Digest::of(certificate) == self.pin)
                .ok_or(unknown)?
                .clone()
                .into_owned(),
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::clone(&self.provider),
        )
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
        let at = |time| {
            verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, time)
        };
        let earliest = UnixTime::since_unix_epoch(std::time::Duration::from_secs(EARLIEST_NOW));
        let verified = at(now).or_else(|error| match error {
            rustls::Error::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            ) => at(earliest),
            other => Err(other),
        })?;
        let _ = self.authority.set(authority);
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The system's clock.
#[derive(Debug)]
pub struct SystemClock;

impl TimeProvider for SystemClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::now())
    }
}
