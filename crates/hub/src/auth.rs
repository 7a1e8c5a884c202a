//! Who calls: operator tokens, device challenges and tokens, invitations, and a brake on guessing.
//! It never stores anything: a [`Principals`] looks tokens and devices up, and device tokens are
//! stateless. Start reading at [`Auth::caller`], then [`Auth::device_token`].
//!
//! Every secret is 32 random bytes; only its SHA-256 is kept ([`SecretHash`]). A slow hash would
//! add nothing: there is no dictionary of 256-bit random values.

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{ConnectInfo, FromRef, FromRequestParts};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use futures_util::future::BoxFuture;
use hmac::{Hmac, Mac as _};
use jiff::{SignedDuration, Timestamp};
use p256::pkcs8::{DecodePublicKey as _, EncodePublicKey as _, LineEnding};
use rand::RngCore as _;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use sha2::{Digest as _, Sha256};
use slmops_api::DeviceId;
use slmops_api::audit::Role;
use slmops_api::device::{
    Challenge, DeviceToken, DeviceTokenRequest, InvitationText, TOKEN_CONTEXT,
};
use slmops_api::problem::{PROBLEM_MEDIA_TYPE, Problem};
use subtle::ConstantTimeEq as _;

use crate::durable;
use crate::events::Place;

#[cfg(test)]
mod tests;

/// What every operator token starts with, so that scanners can find leaked ones.
pub const OPERATOR_TOKEN_PREFIX: &str = "slmt_";
/// What every device token starts with.
pub const DEVICE_TOKEN_PREFIX: &str = "slmd_";
/// What every invitation starts with.
pub const INVITATION_PREFIX: &str = "slmi1.";
/// How long a device has to sign a challenge.
pub const CHALLENGE_VALID: SignedDuration = SignedDuration::from_secs(60);
/// How long a device token is valid.
pub const DEVICE_TOKEN_VALID: SignedDuration = SignedDuration::from_hours(1);
/// Failed attempts from one address in [`FAILURE_WINDOW`] after which it must wait.
pub const MAX_FAILURES: u32 = 60;
/// The time over which failed attempts are counted.
pub const FAILURE_WINDOW: Duration = Duration::from_secs(60);

/// Random bytes in each secret.
const SECRET_BYTES: usize = 32;
/// The longest credential in a header, in bytes.
const MAX_CREDENTIAL_BYTES: usize = 1024;
/// The longest invitation, in bytes.
const MAX_INVITATION_BYTES: usize = 4096;
/// The longest public key or signature, in bytes.
const MAX_KEY_BYTES: usize = 2048;
/// Addresses whose failures are counted one by one; those beyond share one count.
const MAX_ADDRESSES: usize = 10_000;
/// Credentials remembered as good.
const MAX_KNOWN_GOOD: usize = 4096;
/// The longest file of the hub's secret, in bytes.
const MAX_SECRET_FILE_BYTES: u64 = 256;
const CHALLENGE_NONCE_BYTES: usize = 16;
const MAC_BYTES: usize = 32;

/// Any error of a lookup in the store.
pub type LookupError = Box<dyn Error + Send + Sync>;

/// Why a caller is not let in.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// No credentials at all.
    #[error(
        "this call needs a token\nhint: send `Authorization: Bearer slmt_…`; `slm token create` makes one"
    )]
    Missing,
    /// Credentials that cannot be read.
    #[error(
        "the Authorization header cannot be read\nhint: send `Authorization: Bearer slmt_…`, or Basic with the token as password"
    )]
    Malformed,
    /// The token is not known, expired or revoked; which of them is not told.
    #[error(
        "the token is not valid (any more)\nhint: an operator makes a new one with `slm token create`; a device asks for one by itself"
    )]
    Invalid,
    /// The wrong kind of caller, such as a device where an operator is needed.
    #[error("this call is for {needed}, not for {given}")]
    WrongKind {
        /// Who may.
        needed: &'static str,
        /// Who tried.
        given: &'static str,
    },
    /// The token's role is too low.
    #[error(
        "token `{name}` has the role {has}, this needs {needs}\nhint: ask an admin for a token with the role {needs}"
    )]
    Forbidden {
        /// The token's name.
        name: String,
        /// Its role.
        has: &'static str,
        /// The role that is needed.
        needs: &'static str,
    },
    /// Too many failures from this address.
    #[error(
        "too many failed attempts from this address\nhint: wait {retry_after_s} s, and check which program sends a wrong token"
    )]
    TooMany {
        /// Seconds until the next attempt is looked at.
        retry_after_s: u64,
    },
    /// The challenge is not one of this hub's, is for another device, or is too old.
    #[error("the challenge is not valid (any more)\nhint: ask for a new one and sign it at once")]
    Challenge,
    /// The signature does not verify.
    #[error("the signature over the challenge does not verify with the key of device {device}")]
    Signature {
        /// The device as claimed.
        device: DeviceId,
    },
    /// A device's public key cannot be used.
    #[error("the public key cannot be used: expected a P-256 key as SPKI PEM")]
    DeviceKey,
    /// An invitation's text cannot be read.
    #[error(
        "this is not an invitation: expected text that starts with `{INVITATION_PREFIX}`\nhint: `slm device invite` makes one"
    )]
    Invitation,
    /// The store could not be asked.
    #[error("look up the caller")]
    Lookup(#[source] LookupError),
    /// The hub's own secret cannot be read or written.
    #[error(
        "{path}: {source}\nhint: restore the file from a backup, or delete it; devices then ask for new tokens"
    )]
    SecretFile {
        /// The file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl AuthError {
    /// The HTTP status for it.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Missing | Self::Malformed | Self::Invalid => StatusCode::UNAUTHORIZED,
            Self::Challenge | Self::Signature { .. } => StatusCode::UNAUTHORIZED,
            Self::WrongKind { .. } | Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::TooMany { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::DeviceKey | Self::Invitation => StatusCode::BAD_REQUEST,
            Self::Lookup(_) | Self::SecretFile { .. } => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The RFC 9457 form of it.
    pub fn problem(&self) -> Problem {
        let (kind, title) = match self.status() {
            StatusCode::UNAUTHORIZED => ("unauthenticated", "Credentials are missing or not valid"),
            StatusCode::FORBIDDEN => ("forbidden", "Not allowed"),
            StatusCode::TOO_MANY_REQUESTS => ("too-many-failures", "Too many failed attempts"),
            StatusCode::BAD_REQUEST => ("bad-credentials", "Credentials cannot be read"),
            _ => ("unavailable", "The hub cannot check credentials now"),
        };
        let text = self.to_string();
        let (detail, hint) = match text.split_once("\nhint: ") {
            Some((detail, hint)) => (detail.to_owned(), Some(hint.to_owned())),
            None => (text, None),
        };
        let (kind, title) = (format!("urn:slmops:{kind}"), title.to_owned());
        Problem { kind, title, status: self.status().as_u16(), detail, hint }
    }
}

impl IntoResponse for AuthError {
    fn into_response(self) -> Response {
        if let Self::Lookup(source) = &self {
            tracing::error!(error = %source, "cannot look up a caller");
        }
        let mut response = (self.status(), Json(self.problem())).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_MEDIA_TYPE));
        match self {
            Self::TooMany { retry_after_s } => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_after_s));
            }
            _ if response.status() == StatusCode::UNAUTHORIZED => {
                let scheme = HeaderValue::from_static("Bearer realm=\"slmops\"");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
            }
            _ => {}
        }
        response
    }
}

/// A secret in the clear; shown once to whom it belongs, and never by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The secret itself. Never log it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// A secret that must be kept as it is, since it is used again.
    pub(crate) fn kept(text: String) -> Self {
        Self(text)
    }

    /// What is kept of it.
    pub fn hash(&self) -> SecretHash {
        SecretHash::of(&self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// SHA-256 of a secret: all that is kept of it. Written as 64 hex digits.
#[derive(Clone, Copy, Hash)]
#[expect(clippy::derived_hash_with_manual_eq, reason = "equality compares the same bytes")]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// The hash of `secret`.
    pub fn of(secret: &str) -> Self {
        Self(Sha256::digest(secret.as_bytes()).into())
    }
}

impl PartialEq for SecretHash {
    /// In constant time.
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for SecretHash {}

impl fmt::Display for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretHash(…)")
    }
}

impl FromStr for SecretHash {
    type Err = hex::FromHexError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(given, &mut bytes)?;
        Ok(Self(bytes))
    }
}

/// A new operator token: `slmt_` and 32 random bytes in base64url.
pub fn new_operator_token() -> Secret {
    let random: [u8; SECRET_BYTES] = random();
    Secret(format!("{OPERATOR_TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(random)))
}

/// A new secret of a webhook: `whsec_` and 32 random bytes in base64 (Standard Webhooks 1.0).
pub fn new_webhook_secret() -> Secret {
    let random: [u8; SECRET_BYTES] = random();
    Secret(format!("{}{}", slmops_api::webhook::SECRET_PREFIX, STANDARD.encode(random)))
}

/// A new invitation secret: 32 random bytes in hex, as [`InvitationText::secret`] wants it.
pub fn new_invitation_secret() -> Secret {
    let random: [u8; SECRET_BYTES] = random();
    Secret(hex::encode(random))
}

/// Whether `given` is the secret whose hash is `kept`, in constant time.
pub fn secret_matches(given: &str, kept: &SecretHash) -> bool {
    SecretHash::of(given) == *kept
}

/// The text that a device is given: `slmi1.` and base64url of the JSON of `invitation`.
pub fn encode_invitation(invitation: &InvitationText) -> Secret {
    let json = serde_json::to_vec(invitation).expect("strings always serialise");
    Secret(format!("{INVITATION_PREFIX}{}", URL_SAFE_NO_PAD.encode(json)))
}

/// The inverse of [`encode_invitation`]; white space around the text is ignored.
///
/// # Errors
/// [`AuthError::Invitation`] for anything else.
pub fn decode_invitation(text: &str) -> Result<InvitationText, AuthError> {
    let text = text.trim();
    if text.len() > MAX_INVITATION_BYTES {
        return Err(AuthError::Invitation);
    }
    let encoded = text.strip_prefix(INVITATION_PREFIX).ok_or(AuthError::Invitation)?;
    let json = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| AuthError::Invitation)?;
    serde_json::from_slice(&json).map_err(|_| AuthError::Invitation)
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

/// A device's public key, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceKey(p256::ecdsa::VerifyingKey);

impl DeviceKey {
    /// Reads a P-256 key from SPKI PEM.
    ///
    /// # Errors
    /// [`AuthError::DeviceKey`] for anything else.
    pub fn from_pem(pem: &str) -> Result<Self, AuthError> {
        if pem.len() > MAX_KEY_BYTES {
            return Err(AuthError::DeviceKey);
        }
        let key = p256::ecdsa::VerifyingKey::from_public_key_pem(pem.trim());
        key.map(Self).map_err(|_| AuthError::DeviceKey)
    }

    /// The key in its one canonical form: equal keys give equal text.
    pub fn to_pem(&self) -> String {
        self.0.to_public_key_pem(LineEnding::LF).expect("a P-256 key has an SPKI form")
    }

    fn verifies(&self, message: &str, signature_base64: &str) -> bool {
        if signature_base64.len() > MAX_KEY_BYTES {
            return false;
        }
        let Ok(der) = STANDARD.decode(signature_base64) else { return false };
        // When a fleet reconnects, this is most of what it costs; ring does it several times as fast.
        let point = self.0.to_encoded_point(false);
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point.as_bytes());
        key.verify(message.as_bytes(), &der).is_ok()
    }
}

/// The key of this hub's challenges and device tokens.
#[derive(Clone)]
pub struct HubSecret([u8; SECRET_BYTES]);

impl fmt::Debug for HubSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HubSecret(…)")
    }
}

impl HubSecret {
    /// A new one that is kept nowhere.
    pub fn generate() -> Self {
        Self(random())
    }

    /// Reads the secret from `path` (mode 0600), or makes it on first use.
    ///
    /// # Errors
    /// [`AuthError::SecretFile`] if the file cannot be read or written, or holds something else.
    pub fn load_or_create(path: &Path) -> Result<Self, AuthError> {
        let failed = |source| AuthError::SecretFile { path: path.display().to_string(), source };
        match durable::read_secret(path, MAX_SECRET_FILE_BYTES) {
            Ok(text) => {
                let mut bytes = [0; SECRET_BYTES];
                hex::decode_to_slice(text.trim_ascii(), &mut bytes)
                    .map_err(|_| failed(std::io::ErrorKind::InvalidData.into()))?;
                Ok(Self(bytes))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let new = Self::generate();
                durable::write_secret(path, hex::encode(new.0).as_bytes()).map_err(failed)?;
                Ok(new)
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// HMAC-SHA-256 over `purpose` and the parts, each with its length before it.
    fn mac(&self, purpose: &str, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes any key length");
        for part in std::iter::once(purpose.as_bytes()).chain(parts.iter().copied()) {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        mac
    }

    /// A challenge for `device`: base64url of expiry (8 bytes), nonce (16) and MAC (32).
    fn challenge(&self, device: &DeviceId, now: Timestamp) -> String {
        let expires = (now + CHALLENGE_VALID).as_second().to_be_bytes();
        let nonce: [u8; CHALLENGE_NONCE_BYTES] = random();
        let mac = self.mac("challenge", &[device.as_str().as_bytes(), &expires, &nonce]);
        URL_SAFE_NO_PAD.encode([&expires[..], &nonce, &mac.finalize().into_bytes()].concat())
    }

    fn check_challenge(&self, device: &DeviceId, text: &str, now: Timestamp) -> bool {
        if text.len() > MAX_CREDENTIAL_BYTES {
            return false;
        }
        let Ok(bytes) = URL_SAFE_NO_PAD.decode(text) else { return false };
        let Some((expires, rest)) = bytes.split_first_chunk::<8>() else { return false };
        let Some((nonce, mac)) = rest.split_first_chunk::<CHALLENGE_NONCE_BYTES>() else {
            return false;
        };
        let expected = self.mac("challenge", &[device.as_str().as_bytes(), expires, nonce]);
        expected.verify_slice(mac).is_ok() && i64::from_be_bytes(*expires) > now.as_second()
    }

    /// A bearer token for `device`: `slmd_` and base64url of expiry (8 bytes), MAC (32) and id.
    fn device_token(&self, device: &DeviceId, now: Timestamp) -> String {
        let expires = (now + DEVICE_TOKEN_VALID).as_second().to_be_bytes();
        let id = device.as_str().as_bytes();
        let mac = self.mac("device token", &[id, &expires]).finalize().into_bytes();
        let bytes = [&expires[..], &mac, id].concat();
        format!("{DEVICE_TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    fn check_device_token(&self, token: &str, now: Timestamp) -> Option<DeviceId> {
        let bytes = URL_SAFE_NO_PAD.decode(token.strip_prefix(DEVICE_TOKEN_PREFIX)?).ok()?;
        let (expires, rest) = bytes.split_first_chunk::<8>()?;
        let (mac, id) = rest.split_first_chunk::<MAC_BYTES>()?;
        self.mac("device token", &[id, expires]).verify_slice(mac).ok()?;
        let fresh = i64::from_be_bytes(*expires) > now.as_second();
        fresh.then(|| std::str::from_utf8(id).ok()?.parse().ok()).flatten()
    }
}

/// Who is known: implemented by the store.
pub trait Principals: Send + Sync + 'static {
    /// The operator token whose secret has this hash, unless it is expired or revoked.
    fn operator(&self, hash: SecretHash) -> BoxFuture<'_, Result<Option<Operator>, LookupError>>;

    /// The device's place, if it is at hand: nearly always.
    fn device(&self, device: &DeviceId) -> Option<Arc<Place>>;

    /// The device's place, looked for wherever it could be.
    fn find_device(
        &self,
        device: DeviceId,
    ) -> BoxFuture<'_, Result<Option<Arc<Place>>, LookupError>> {
        let found = self.device(&device);
        Box::pin(async move { Ok(found) })
    }
}

/// A person or program with an operator token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operator {
    /// The token's name.
    pub name: String,
    /// What it may do.
    pub role: Role,
}

impl Operator {
    /// As the audit log names it.
    pub fn actor(&self) -> String {
        format!("token {}", self.name)
    }

    /// Lets through who has `role` or more.
    ///
    /// # Errors
    /// [`AuthError::Forbidden`] for who has less.
    pub fn require(&self, role: Role) -> Result<(), AuthError> {
        if self.role >= role {
            return Ok(());
        }
        let (has, needs) = (role_name(self.role), role_name(role));
        Err(AuthError::Forbidden { name: self.name.clone(), has, needs })
    }
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Viewer => "viewer",
        Role::Operator => "operator",
        Role::Admin => "admin",
    }
}

/// A device with a valid token.
#[derive(Clone, Debug)]
pub struct DeviceIdentity {
    /// Which.
    pub id: DeviceId,
    /// Where its calls are answered from.
    pub place: Arc<Place>,
}

/// Anyone with a valid token.
#[derive(Clone, Debug)]
pub enum Caller {
    /// An operator.
    Operator(Operator),
    /// A device.
    Device(DeviceIdentity),
}

impl Caller {
    /// As the audit log names it.
    pub fn actor(&self) -> String {
        match self {
            Self::Operator(operator) => operator.actor(),
            Self::Device(device) => format!("device {}", device.id),
        }
    }
}

/// The address that a request came from, where the server passes it on
/// (`into_make_service_with_connect_info::<SocketAddr>()`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer(pub Option<IpAddr>);

impl Peer {
    fn of(parts: &Parts) -> Self {
        let info = parts.extensions.get::<ConnectInfo<SocketAddr>>();
        Self(info.map(|ConnectInfo(address)| address.ip().to_canonical()))
    }
}

impl<S: Sync> FromRequestParts<S> for Peer {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        Ok(Self::of(parts))
    }
}

/// Checks callers. Clones share it.
#[derive(Clone)]
pub struct Auth {
    inner: Arc<Inner>,
}

struct Inner {
    secret: HubSecret,
    principals: Arc<dyn Principals>,
    failures: Failures,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Auth(…)")
    }
}

impl Auth {
    /// Checks callers against `principals`; `secret` signs challenges and device tokens.
    pub fn new(secret: HubSecret, principals: Arc<dyn Principals>) -> Self {
        Self { inner: Arc::new(Inner { secret, principals, failures: Failures::default() }) }
    }

    /// A challenge for `device` to sign; the same answer for devices that do not exist.
    pub fn challenge(&self, device: &DeviceId) -> Challenge {
        Challenge { challenge: self.inner.secret.challenge(device, Timestamp::now()) }
    }

    /// A token for a device that has signed a challenge of this hub with `key`, the key it enrolled.
    ///
    /// # Errors
    /// [`AuthError::Challenge`], [`AuthError::Signature`], or [`AuthError::TooMany`] of them.
    pub fn device_token(
        &self,
        peer: Peer,
        request: &DeviceTokenRequest,
        key: &DeviceKey,
    ) -> Result<DeviceToken, AuthError> {
        self.check_rate(peer)?;
        let checked = self.check_device_request(request, key, Timestamp::now());
        checked.inspect_err(|_| self.record_failure(peer))
    }

    fn check_device_request(
        &self,
        request: &DeviceTokenRequest,
        key: &DeviceKey,
        now: Timestamp,
    ) -> Result<DeviceToken, AuthError> {
        let DeviceTokenRequest { device, challenge, signature } = request;
        if !self.inner.secret.check_challenge(device, challenge, now) {
            return Err(AuthError::Challenge);
        }
        if !key.verifies(&format!("{TOKEN_CONTEXT}\n{device}\n{challenge}"), signature) {
            return Err(AuthError::Signature { device: device.clone() });
        }
        let token = self.inner.secret.device_token(device, now);
        let expires_in_s = DEVICE_TOKEN_VALID.as_secs().unsigned_abs();
        Ok(DeviceToken { token, expires_in_s })
    }

    /// Refuses an address that failed too often; for calls that bring a secret in their body.
    ///
    /// # Errors
    /// [`AuthError::TooMany`].
    pub fn check_rate(&self, peer: Peer) -> Result<(), AuthError> {
        match self.inner.failures.wait(peer, Instant::now()) {
            None => Ok(()),
            Some(wait) => Err(AuthError::TooMany { retry_after_s: wait.as_secs().max(1) }),
        }
    }

    /// Counts a failed attempt of `peer`.
    pub fn record_failure(&self, peer: Peer) {
        self.inner.failures.record(peer, Instant::now());
    }

    /// Who sends a request: by `Authorization: Bearer TOKEN`, or Basic with the token as password
    /// (what OCI clients send after `login`).
    ///
    /// # Errors
    /// [`AuthError`] where there is no valid token, or too many failures before.
    pub async fn caller(&self, parts: &Parts) -> Result<Caller, AuthError> {
        let token = credential(parts)?;
        // A device's token proves itself: no table, no lock, whoever else fails from its address.
        if let Some(device) = self.device(&token).await? {
            return Ok(Caller::Device(device));
        }
        let peer = Peer::of(parts);
        let failures = &self.inner.failures;
        let hash = token.hash();
        // One wrong program must not lock out the right ones behind the same address.
        if !failures.is_known_good(&hash) {
            self.check_rate(peer)?;
        }
        let caller = self.look_up(&token, hash).await.map_err(AuthError::Lookup)?;
        match caller {
            Some(caller) => {
                failures.remember_good(hash);
                Ok(caller)
            }
            None => {
                failures.forget_good(&hash);
                failures.record(peer, Instant::now());
                Err(AuthError::Invalid)
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn issue_for_tests(&self, device: &DeviceId) -> String {
        self.inner.secret.device_token(device, Timestamp::now())
    }

    async fn look_up(
        &self,
        token: &Secret,
        hash: SecretHash,
    ) -> Result<Option<Caller>, LookupError> {
        if token.expose().starts_with(DEVICE_TOKEN_PREFIX) {
            return Ok(None);
        }
        Ok(self.inner.principals.operator(hash).await?.map(Caller::Operator))
    }

    /// The device whose token this is, if it is valid.
    async fn device(&self, token: &Secret) -> Result<Option<DeviceIdentity>, AuthError> {
        let Inner { secret, principals, .. } = &*self.inner;
        let id = secret.check_device_token(token.expose(), Timestamp::now());
        let Some(id) = id else { return Ok(None) };
        let place = match principals.device(&id) {
            Some(place) => Some(place),
            None => principals.find_device(id.clone()).await.map_err(AuthError::Lookup)?,
        };
        let place = place.filter(|place| place.is_active());
        Ok(place.map(|place| DeviceIdentity { id, place }))
    }
}

/// The token in the `Authorization` header.
fn credential(parts: &Parts) -> Result<Secret, AuthError> {
    let value = parts.headers.get(header::AUTHORIZATION).ok_or(AuthError::Missing)?;
    let text = value.to_str().map_err(|_| AuthError::Malformed)?;
    let (scheme, rest) = text.split_once(' ').ok_or(AuthError::Malformed)?;
    let rest = rest.trim();
    if rest.is_empty() || rest.len() > MAX_CREDENTIAL_BYTES {
        return Err(AuthError::Malformed);
    }
    if scheme.eq_ignore_ascii_case("bearer") {
        return Ok(Secret(rest.to_owned()));
    }
    if scheme.eq_ignore_ascii_case("basic") {
        let pair = STANDARD.decode(rest).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let (_, password) =
            pair.as_deref().and_then(|p| p.split_once(':')).ok_or(AuthError::Malformed)?;
        return Ok(Secret(password.to_owned()));
    }
    Err(AuthError::Malformed)
}

impl<S> FromRequestParts<S> for Caller
where
    Auth: FromRef<S>,
    S: Send + Sync,
{
    type Rejection = AuthError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, AuthError> {
        Auth::from_ref(state).caller(parts).await
    }
}

impl<S> FromRequestParts<S> for Operator
where
    Auth: FromRef<S>,
    S: Send + Sync,
{
    type Rejection = AuthError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, AuthError> {
        match Auth::from_ref(state).caller(parts).await? {
            Caller::Operator(operator) => Ok(operator),
            Caller::Device(_) => {
                Err(AuthError::WrongKind { needed: "operators", given: "devices" })
            }
        }
    }
}

impl<S> FromRequestParts<S> for DeviceIdentity
where
    Auth: FromRef<S>,
    S: Send + Sync,
{
    type Rejection = AuthError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, AuthError> {
        match Auth::from_ref(state).caller(parts).await? {
            Caller::Device(device) => Ok(device),
            Caller::Operator(_) => {
                Err(AuthError::WrongKind { needed: "devices", given: "operators" })
            }
        }
    }
}

macro_rules! role_extractor {
    ($(#[$doc:meta])* $type:ident, $role:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $type(pub Operator);

        impl<S> FromRequestParts<S> for $type
        where
            Auth: FromRef<S>,
            S: Send + Sync,
        {
            type Rejection = AuthError;

            async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, AuthError> {
                let operator = Operator::from_request_parts(parts, state).await?;
                operator.require($role)?;
                Ok(Self(operator))
            }
        }
    };
}

role_extractor!(
    /// A caller who may read.
    AsViewer, Role::Viewer
);
role_extractor!(
    /// A caller who may publish and roll out.
    AsOperator, Role::Operator
);
role_extractor!(
    /// A caller who may manage tokens, keys and devices.
    AsAdmin, Role::Admin
);

/// Counts failed attempts by address, in memory and bounded.
#[derive(Default)]
struct Failures {
    counts: Mutex<HashMap<Source, Count>>,
    good: Mutex<HashSet<SecretHash>>,
}

/// Where attempts come from. A home or a data centre gets a whole /64 of IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Source {
    Address(IpAddr),
    Network([u8; 8]),
    Others,
}

struct Count {
    since: Instant,
    failures: u32,
}

impl Source {
    fn of(peer: Peer) -> Self {
        match peer.0 {
            None => Self::Others,
            Some(IpAddr::V6(address)) if !address.is_loopback() => {
                Self::Network(*address.octets().first_chunk().expect("an address has 16 bytes"))
            }
            Some(address) => Self::Address(address),
        }
    }
}

impl Failures {
    /// How long `peer` must wait.
    fn wait(&self, peer: Peer, now: Instant) -> Option<Duration> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.get(&Source::of(peer)).or_else(|| {
            // Not counted by itself because the table is full.
            counts.get(&Source::Others).filter(|_| counts.len() >= MAX_ADDRESSES)
        })?;
        if count.failures < MAX_FAILURES {
            return None;
        }
        FAILURE_WINDOW.checked_sub(now.saturating_duration_since(count.since))
    }

    fn record(&self, peer: Peer, now: Instant) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut source = Source::of(peer);
        if counts.len() >= MAX_ADDRESSES && !counts.contains_key(&source) {
            let current =
                |count: &Count| now.saturating_duration_since(count.since) < FAILURE_WINDOW;
            counts.retain(|_, count| current(count));
            if counts.len() >= MAX_ADDRESSES {
                source = Source::Others;
            }
        }
        let count = counts.entry(source).or_insert(Count { since: now, failures: 0 });
        if now.saturating_duration_since(count.since) >= FAILURE_WINDOW {
            *count = Count { since: now, failures: 0 };
        }
        count.failures = count.failures.saturating_add(1);
    }

    fn is_known_good(&self, hash: &SecretHash) -> bool {
        self.good.lock().unwrap_or_else(PoisonError::into_inner).contains(hash)
    }

    fn remember_good(&self, hash: SecretHash) {
        let mut good = self.good.lock().unwrap_or_else(PoisonError::into_inner);
        if good.len() >= MAX_KNOWN_GOOD {
            good.clear();
        }
        good.insert(hash);
    }

    fn forget_good(&self, hash: &SecretHash) {
        self.good.lock().unwrap_or_else(PoisonError::into_inner).remove(hash);
    }
}
