use std::fmt;

use p256::ecdsa::signature::{Signer as _, Verifier as _};
use p256::ecdsa::{Signature, SigningKey, VerifyingKey};
use p256::elliptic_curve::rand_core::OsRng;
use p256::pkcs8::{
    DecodePrivateKey as _, DecodePublicKey as _, EncodePrivateKey as _, EncodePublicKey as _,
    LineEnding,
};

use super::SigningError;
use crate::Digest;

/// The longest key file in bytes.
const MAX_PEM_BYTES: usize = 16 << 10;

/// A publisher's or device's signing key (P-256). Wiped from memory when dropped; never shown.
#[derive(Clone)]
pub struct PrivateKey(SigningKey);

/// The public half of a [`PrivateKey`].
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    key: VerifyingKey,
    pem: String,
    id: String,
}

impl PrivateKey {
    /// A new key from the operating system's randomness.
    pub fn generate() -> Self {
        Self(SigningKey::random(&mut OsRng))
    }

    /// Reads a key from PKCS#8 PEM (`BEGIN PRIVATE KEY`) or SEC1 PEM (`BEGIN EC PRIVATE KEY`).
    ///
    /// # Errors
    /// [`SigningError::Key`] for anything else.
    pub fn from_pem(pem: &str) -> Result<Self, SigningError> {
        let error = || SigningError::Key { what: "private key" };
        if pem.len() > MAX_PEM_BYTES {
            return Err(error());
        }
        if let Ok(key) = SigningKey::from_pkcs8_pem(pem) {
            return Ok(Self(key));
        }
        // `openssl ecparam -genkey` writes the curve's parameters in a block before the key.
        let sec1 = pem.find("-----BEGIN EC PRIVATE KEY-----").map(|start| &pem[start..]);
        let key = p256::SecretKey::from_sec1_pem(sec1.ok_or_else(error)?).map_err(|_| error())?;
        Ok(Self(SigningKey::from(key)))
    }

    /// The key as PKCS#8 PEM; wiped from memory when dropped.
    pub fn to_pem(&self) -> p256::elliptic_curve::zeroize::Zeroizing<String> {
        self.0.to_pkcs8_pem(LineEnding::LF).expect("a P-256 key always has a PKCS#8 form")
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey::new(*self.0.verifying_key())
    }

    /// An ECDSA signature over the SHA-256 of `message`, in DER (deterministic, RFC 6979).
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let signature: Signature = self.0.sign(message);
        signature.to_der().as_bytes().to_vec()
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({})", self.public().id)
    }
}

impl PublicKey {
    fn new(key: VerifyingKey) -> Self {
        let pem = key.to_public_key_pem(LineEnding::LF).expect("a P-256 key always has a PEM form");
        let der = key.to_public_key_der().expect("a P-256 key always has a DER form");
        let id = Digest::of(der.as_bytes()).hex()[..16].to_owned();
        Self { key, pem, id }
    }

    /// Reads a key from SPKI PEM (`BEGIN PUBLIC KEY`).
    ///
    /// # Errors
    /// [`SigningError::Key`] for anything else.
    pub fn from_pem(pem: &str) -> Result<Self, SigningError> {
        if pem.len() > MAX_PEM_BYTES {
            return Err(SigningError::Key { what: "public key" });
        }
        let key = VerifyingKey::from_public_key_pem(pem.trim())
            .map_err(|_| SigningError::Key { what: "public key" })?;
        Ok(Self::new(key))
    }

    /// The key as SPKI PEM.
    pub fn to_pem(&self) -> &str {
        &self.pem
    }

    /// The first 16 hex digits of the SHA-256 of its SPKI DER.
    pub fn id(&self) -> String {
        self.id.clone()
    }

    /// Whether `signature` (DER) is this key's over the SHA-256 of `message`.
    pub fn accepts(&self, message: &[u8], signature: &[u8]) -> bool {
        Signature::from_der(signature)
            .is_ok_and(|signature| self.key.verify(message, &signature).is_ok())
    }

    /// How bundles name the key: the hex SHA-256 of its PEM text.
    pub(super) fn pem_hash(&self) -> String {
        Digest::of(self.pem.as_bytes()).hex()
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.id)
    }
}
