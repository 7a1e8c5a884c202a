//! Signatures over the files of a model package: OpenSSF Model Signing v1.0 with the key method.
//!
//! A signature is a Sigstore bundle (v0.3) that holds a DSSE envelope (v1.0.0), whose payload is
//! an in-toto Statement v1 with the predicate `https://model_signing/signature/v1.0`, signed by
//! ECDSA over P-256 and SHA-256. No network, clock or transparency log is involved.

mod keys;
mod wire;

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

pub use keys::{PrivateKey, PublicKey};

use crate::Digest;
use crate::title::{TitleError, check_title};

/// The media type of a signature, as layer and as artifact type.
pub const BUNDLE_MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
/// The file name of a signature in a folder; model files may not have it.
pub const SIGNATURE_FILE: &str = "model.sig";
/// The longest bundle in bytes.
pub const MAX_BUNDLE_BYTES: usize = 1 << 20;
/// The most files under one signature.
pub const MAX_SIGNED_FILES: usize = 4096;

const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
const PREDICATE_TYPE: &str = "https://model_signing/signature/v1.0";
/// Paths that verifiers over a folder skip: the signature itself and what git keeps.
const IGNORED_PATHS: [&str; 5] =
    [SIGNATURE_FILE, ".git", ".gitattributes", ".github", ".gitignore"];

/// Protobuf's JSON allows base64 with and without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Why a key, a signature or what it signs was refused.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// Text that is no P-256 key.
    #[error(
        "read {what}: not a P-256 key in PEM\nhint: make one with `slm key create`, or with \
         `openssl ecparam -name prime256v1 -genkey`"
    )]
    Key {
        /// Which kind of key was expected.
        what: &'static str,
    },
    /// The bundle is over [`MAX_BUNDLE_BYTES`].
    #[error(
        "signature bundle of {found} bytes is too long, at most {MAX_BUNDLE_BYTES} are \
         accepted\nhint: sign the package again"
    )]
    TooLong {
        /// Its length in bytes.
        found: usize,
    },
    /// The bundle or its statement is not JSON of the expected form.
    #[error("parse signature {part}\nhint: sign the package again")]
    Json {
        /// Which part.
        part: &'static str,
        /// The cause.
        source: serde_json::Error,
    },
    /// The bundle is JSON, but not one that can be verified here.
    #[error("signature bundle: {reason}\nhint: sign the package again with a P-256 key")]
    Form {
        /// What is wrong.
        reason: String,
    },
    /// No trusted key made the signature.
    #[error(
        "signature was made by a key that is not trusted here ({hint})\nhint: compare `slm key \
         list` with the publisher's key, and add it only if you trust it"
    )]
    UnknownKey {
        /// How the bundle names its key: the start of the SHA-256 of its PEM; or that it names
        /// none.
        hint: String,
    },
    /// The signature does not match what it claims to sign.
    #[error(
        "signature does not match: the statement or the signature was changed\nhint: fetch the \
         package again; if it stays, do not use it and tell its publisher"
    )]
    Mismatch,
    /// A file name that no package may have, or twice the same one.
    #[error(transparent)]
    Title(#[from] TitleError),
    /// Too many files, or none.
    #[error(
        "{count} files to sign; from 1 to {MAX_SIGNED_FILES} are possible\nhint: check the folder"
    )]
    Count {
        /// How many there are.
        count: usize,
    },
}

/// What a verified signature says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// The model's name; informative only.
    pub model_name: String,
    /// Every file that was signed, by its path relative to the model's folder.
    pub files: BTreeMap<String, Digest>,
    /// [`PublicKey::id`] of the key that made the signature.
    pub key_id: String,
}

/// Signs the files of a model and returns the bundle as JSON.
///
/// # Errors
/// [`SigningError::Title`] for a file name that is not a plain relative path or occurs twice,
/// [`SigningError::Count`] where there are none or too many.
pub fn sign(
    model_name: &str,
    files: &[(String, Digest)],
    key: &PrivateKey,
) -> Result<Vec<u8>, SigningError> {
    check_count(files.len())?;
    let mut sorted: Vec<(&str, Digest)> = Vec::with_capacity(files.len());
    for (title, digest) in files {
        check_title(title)?;
        sorted.push((title, *digest));
    }
    // The order that reference verifiers recompute: path by path, component by component.
    sorted.sort_by(|a, b| a.0.split('/').cmp(b.0.split('/')));
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(TitleError::duplicate(pair[0].0).into());
    }
    let resources = sorted.iter().map(|&(name, digest)| wire::Resource {
        name: name.to_owned(),
        algorithm: "sha256".to_owned(),
        digest: digest.hex(),
    });
    let statement = wire::Statement {
        kind: STATEMENT_TYPE.to_owned(),
        subject: vec![wire::Subject {
            name: model_name.to_owned(),
            digest: BTreeMap::from([(
                "sha256".to_owned(),
                root_digest(sorted.iter().map(|&(_, digest)| digest)).hex(),
            )]),
        }],
        predicate_type: PREDICATE_TYPE.to_owned(),
        predicate: wire::Predicate {
            serialization: wire::Serialization {
                method: "files".to_owned(),
                hash_type: "sha256".to_owned(),
                allow_symlinks: false,
                ignore_paths: IGNORED_PATHS.map(str::to_owned).to_vec(),
            },
            resources: resources.collect(),
        },
    };
    let payload = serde_json::to_vec(&statement).expect("a statement is always JSON");
    let bundle = wire::Bundle {
        media_type: BUNDLE_MEDIA_TYPE.to_owned(),
        verification_material: wire::VerificationMaterial {
            public_key: Some(wire::PublicKeyHint { hint: Some(key.public().pem_hash()) }),
            tlog_entries: Vec::new(),
        },
        dsse_envelope: wire::Envelope {
            signatures: vec![wire::Signature {
                sig: BASE64.encode(key.sign(&pre_authentication_encoding(&payload))),
                keyid: String::new(),
            }],
            payload: BASE64.encode(payload),
            payload_type: PAYLOAD_TYPE.to_owned(),
        },
    };
    Ok(serde_json::to_vec(&bundle).expect("a bundle is always JSON"))
}

/// Verifies a bundle against the trusted keys and returns what it signs.
///
/// # Errors
/// [`SigningError::UnknownKey`] where none of `keys` made it, [`SigningError::Mismatch`] where
/// one claims to but the bytes differ, and the other variants for malformed bundles.
pub fn verify(bundle: &[u8], keys: &[PublicKey]) -> Result<Statement, SigningError> {
    if bundle.len() > MAX_BUNDLE_BYTES {
        return Err(SigningError::TooLong { found: bundle.len() });
    }
    let bundle: wire::Bundle = serde_json::from_slice(bundle)
        .map_err(|source| SigningError::Json { part: "bundle", source })?;
    if bundle.media_type != BUNDLE_MEDIA_TYPE {
        return Err(form(format!("media type {:?} is not known", bundle.media_type)));
    }
    let envelope = &bundle.dsse_envelope;
    if envelope.payload_type != PAYLOAD_TYPE {
        return Err(form(format!("payload type {:?} is not known", envelope.payload_type)));
    }
    // Sigstore bundle v0.3: exactly one signature.
    let [signature] = envelope.signatures.as_slice() else {
        return Err(form(format!("has {} signatures, not one", envelope.signatures.len())));
    };
    let decode = |text: &str, what: &str| {
        BASE64.decode(text).map_err(|_| form(format!("{what} is not base64")))
    };
    let payload = decode(&envelope.payload, "payload")?;
    let signature = decode(&signature.sig, "signature")?;
    let Some(material) = &bundle.verification_material.public_key else {
        return Err(form("was not made with a key but with a certificate".to_owned()));
    };
    let message = pre_authentication_encoding(&payload);
    let key = find_key(material.hint.as_deref().unwrap_or_default(), &signature, &message, keys)?;
    let statement: wire::Statement = serde_json::from_slice(&payload)
        .map_err(|source| SigningError::Json { part: "statement", source })?;
    check_statement(statement, key.id())
}

/// The key that made `signature`. A hint narrows the search; only the signature decides.
fn find_key<'a>(
    hint: &str,
    signature: &[u8],
    message: &[u8],
    keys: &'a [PublicKey],
) -> Result<&'a PublicKey, SigningError> {
    if hint.is_empty() {
        let found = keys.iter().find(|key| key.accepts(message, signature));
        let hint = "the signature does not name its key".to_owned();
        return found.ok_or(SigningError::UnknownKey { hint });
    }
    let Some(key) = keys.iter().find(|key| key.pem_hash() == hint) else {
        let shown: String = hint.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
        return Err(SigningError::UnknownKey { hint: format!("key hint {shown}…") });
    };
    if key.accepts(message, signature) { Ok(key) } else { Err(SigningError::Mismatch) }
}

fn check_statement(statement: wire::Statement, key_id: String) -> Result<Statement, SigningError> {
    if statement.kind != STATEMENT_TYPE {
        return Err(form(format!("statement type {:?} is not known", statement.kind)));
    }
    if statement.predicate_type != PREDICATE_TYPE {
        return Err(form(format!("predicate type {:?} is not known", statement.predicate_type)));
    }
    let [subject] = statement.subject.as_slice() else {
        return Err(form(format!("has {} subjects, not one", statement.subject.len())));
    };
    let wire::Predicate { serialization, resources } = statement.predicate;
    if serialization.method != "files" || serialization.hash_type != "sha256" {
        return Err(form(format!(
            "serialization {:?} with {:?} is not known",
            serialization.method, serialization.hash_type
        )));
    }
    check_count(resources.len())?;
    let mut digests = Vec::with_capacity(resources.len());
    let mut files = BTreeMap::new();
    for resource in resources {
        if resource.algorithm != "sha256" {
            return Err(form(format!("algorithm {:?} is not known", resource.algorithm)));
        }
        check_title(&resource.name)?;
        let digest: Digest = format!("sha256:{}", resource.digest)
            .parse()
            .map_err(|_| form(format!("digest of {:?} is malformed", resource.name)))?;
        digests.push(digest);
        if files.insert(resource.name.clone(), digest).is_some() {
            return Err(TitleError::duplicate(&resource.name).into());
        }
    }
    if subject.digest.get("sha256") != Some(&root_digest(digests).hex()) {
        return Err(form("root digest differs from the listed files".to_owned()));
    }
    Ok(Statement { model_name: subject.name.clone(), files, key_id })
}

/// The digest of the subject: SHA-256 over the raw digests of all resources in their order.
fn root_digest(digests: impl IntoIterator<Item = Digest>) -> Digest {
    let bytes: Vec<u8> = digests.into_iter().flat_map(|digest| *digest.as_bytes()).collect();
    Digest::of(&bytes)
}

/// What is signed: DSSE v1.0.0, "Signature Definition" (PAE).
fn pre_authentication_encoding(payload: &[u8]) -> Vec<u8> {
    let head = format!("DSSEv1 {} {PAYLOAD_TYPE} {} ", PAYLOAD_TYPE.len(), payload.len());
    [head.as_bytes(), payload].concat()
}

fn check_count(count: usize) -> Result<(), SigningError> {
    if count == 0 || count > MAX_SIGNED_FILES {
        return Err(SigningError::Count { count });
    }
    Ok(())
}

fn form(reason: String) -> SigningError {
    SigningError::Form { reason: reason.chars().take(300).collect() }
}

#[cfg(test)]
mod tests;
