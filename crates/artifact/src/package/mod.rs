//! Model packages as OCI artifacts: CNCF ModelPack manifests (model-spec v1) and the manifests
//! that attach signatures to them (OCI image-spec 1.1, "Manifest with subject").

mod config;
mod wire;

pub use config::ModelConfig;
pub use wire::Descriptor;

use std::collections::BTreeMap;

use crate::Digest;
use crate::signing::{self, BUNDLE_MEDIA_TYPE, PublicKey, SigningError};
use crate::title::{TitleError, check_title};

/// The media type of every manifest (OCI image-spec 1.1).
pub const MANIFEST_MEDIA_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// The artifact type of a model package (ModelPack).
pub const ARTIFACT_TYPE: &str = "application/vnd.cncf.model.manifest.v1+json";
/// The media type of a package's config (ModelPack).
pub const CONFIG_MEDIA_TYPE: &str = "application/vnd.cncf.model.config.v1+json";
/// The media type of weights as they are (ModelPack).
pub const WEIGHT_MEDIA_TYPE: &str = "application/vnd.cncf.model.weight.v1.raw";
/// The media type of documents as they are (ModelPack).
pub const DOC_MEDIA_TYPE: &str = "application/vnd.cncf.model.doc.v1.raw";
/// The media type of the config `{}` (OCI image-spec 1.1, "Guidance for an empty descriptor").
pub const EMPTY_MEDIA_TYPE: &str = "application/vnd.oci.empty.v1+json";
/// The content that goes with [`EMPTY_MEDIA_TYPE`]; a registry must hold it as a blob.
pub const EMPTY_CONFIG: &[u8] = b"{}";
/// The file that holds the weights.
pub const MODEL_FILE: &str = "model.gguf";
/// The file that holds a LoRA adapter (GGUF) of the weights beside it.
pub const ADAPTER_FILE: &str = "adapter.gguf";
/// The annotation of an adapter's layer with the digest of the weights that it was made for.
pub const ADAPTER_BASE_ANNOTATION: &str = "io.slmops.adapter.base";
/// The file that holds the evaluation report.
pub const REPORT_FILE: &str = "report.json";
/// The longest manifest in bytes.
pub const MAX_MANIFEST_BYTES: usize = 1 << 20;
/// The longest config in bytes.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;
/// The most files in one package.
pub const MAX_FILES: usize = 256;
/// The longest file in bytes: 1 TiB.
pub const MAX_FILE_BYTES: u64 = 1 << 40;

const TITLE_ANNOTATION: &str = "org.opencontainers.image.title";
const FILEPATH_ANNOTATION: &str = "org.cncf.model.filepath";

/// Why a manifest or a package was refused.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// A manifest, config or package over its bound.
    #[error("{what} is {found}, at most {limit} is accepted\nhint: pack the model again")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// The bound.
        limit: u64,
    },
    /// Not JSON of the expected form.
    #[error(
        "parse {what}\nhint: the registry holds something else under this name; pack the model again"
    )]
    Json {
        /// Which document.
        what: &'static str,
        /// The cause.
        source: serde_json::Error,
    },
    /// A manifest of something else.
    #[error("manifest is no {expected}: its {field} is {found:?}\nhint: name a model package")]
    Kind {
        /// What was expected.
        expected: &'static str,
        /// The field that says otherwise.
        field: &'static str,
        /// What it says.
        found: String,
    },
    /// A file name that no package may have, or twice the same one.
    #[error(transparent)]
    Title(#[from] TitleError),
    /// A file without weights, or other rules between the files.
    #[error("package: {reason}\nhint: pack the model again")]
    Files {
        /// What is wrong.
        reason: String,
    },
    /// The config's bytes are not the ones that the manifest names.
    #[error("config is {found}, the manifest names {expected}\nhint: fetch the package again")]
    Config {
        /// Digest of the bytes given.
        found: Digest,
        /// Digest in the manifest.
        expected: Digest,
    },
    /// The signature does not cover exactly the files of the manifest.
    #[error(
        "signature does not cover {file:?}: {reason}\nhint: do not use this package; fetch it \
         again or tell its publisher"
    )]
    Unsigned {
        /// The file.
        file: String,
        /// How manifest and signature differ.
        reason: &'static str,
    },
    /// The signature itself was refused.
    #[error(transparent)]
    Signature(#[from] SigningError),
}

/// One file of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackageFile {
    /// Its path in the model's folder, such as `model.gguf`.
    pub title: String,
    /// [`WEIGHT_MEDIA_TYPE`] or [`DOC_MEDIA_TYPE`] in packages made here.
    pub media_type: String,
    /// Digest of its bytes.
    pub digest: Digest,
    /// Its length in bytes.
    pub size_bytes: u64,
}

impl PackageFile {
    /// A file with the media type that goes with its name.
    pub fn new(title: &str, digest: Digest, size_bytes: u64) -> Self {
        let is_weights = title.ends_with(".gguf") || title.ends_with(".safetensors");
        let media_type = if is_weights { WEIGHT_MEDIA_TYPE } else { DOC_MEDIA_TYPE };
        Self { title: title.to_owned(), media_type: media_type.to_owned(), digest, size_bytes }
    }

    fn holds_weights(&self) -> bool {
        self.title == MODEL_FILE
            || (self.media_type == WEIGHT_MEDIA_TYPE && self.title != ADAPTER_FILE)
    }

    /// A file whose bytes are at hand.
    pub fn of_bytes(title: &str, bytes: &[u8]) -> Self {
        Self::new(title, Digest::of(bytes), bytes.len() as u64)
    }
}

/// A model package: its files, and the config that describes the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// The files, in manifest order; titles are unique.
    pub files: Vec<PackageFile>,
    /// Digest, size and media type of the config blob.
    pub config: Descriptor,
    /// Annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
    config_bytes: Option<Vec<u8>>,
}

impl Package {
    /// A package of these files. The config's list of file digests is filled in here.
    ///
    /// # Errors
    /// [`PackageError`] for unsafe or repeated titles, no weights, or too many or too long files.
    pub fn new(files: Vec<PackageFile>, config: &ModelConfig) -> Result<Self, PackageError> {
        check_files(&files)?;
        let bytes = config.to_bytes(&files);
        check_len("config length in bytes", bytes.len(), MAX_CONFIG_BYTES)?;
        let descriptor = Descriptor::of_bytes(CONFIG_MEDIA_TYPE, &bytes);
        let annotations = config.annotations();
        Ok(Self { files, config: descriptor, annotations, config_bytes: Some(bytes) })
    }

    /// The manifest's bytes; the same package always gives the same bytes.
    pub fn manifest_bytes(&self) -> Vec<u8> {
        let layers = self.files.iter().map(|file| {
            let mut annotations = BTreeMap::from([
                (TITLE_ANNOTATION.to_owned(), file.title.clone()),
                (FILEPATH_ANNOTATION.to_owned(), file.title.clone()),
            ]);
            if file.title == ADAPTER_FILE {
                let base = self.weights().digest.to_string();
                annotations.insert(ADAPTER_BASE_ANNOTATION.to_owned(), base);
            }
            Descriptor {
                media_type: file.media_type.clone(),
                digest: file.digest,
                size: file.size_bytes,
                annotations,
            }
        });
        wire::Manifest {
            schema_version: 2,
            media_type: Some(MANIFEST_MEDIA_TYPE.to_owned()),
            artifact_type: Some(ARTIFACT_TYPE.to_owned()),
            config: self.config.clone(),
            layers: layers.collect(),
            subject: None,
            annotations: self.annotations.clone(),
        }
        .to_bytes()
    }

    /// Digest, size and media type of the manifest itself.
    pub fn manifest_descriptor(&self) -> Descriptor {
        Descriptor::of_bytes(MANIFEST_MEDIA_TYPE, &self.manifest_bytes())
    }

    /// The config's bytes; `None` for a package that was parsed from its manifest alone.
    pub fn config_bytes(&self) -> Option<&[u8]> {
        self.config_bytes.as_deref()
    }

    /// Adds the config's bytes to a parsed package and reads them.
    ///
    /// # Errors
    /// [`PackageError::Config`] where they are not the ones that the manifest names.
    pub fn set_config_bytes(&mut self, bytes: Vec<u8>) -> Result<ModelConfig, PackageError> {
        check_len("config length in bytes", bytes.len(), MAX_CONFIG_BYTES)?;
        let found = Digest::of(&bytes);
        if found != self.config.digest {
            return Err(PackageError::Config { found, expected: self.config.digest });
        }
        let config = ModelConfig::parse(&bytes)?;
        self.config_bytes = Some(bytes);
        Ok(config)
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// [`PackageError`] where it is no ModelPack manifest or breaks a bound.
    pub fn parse(manifest: &[u8]) -> Result<Self, PackageError> {
        let manifest = wire::Manifest::parse(manifest)?;
        let kind = |field, found: Option<String>| PackageError::Kind {
            expected: "model package",
            field,
            found: found.unwrap_or_default().chars().take(200).collect(),
        };
        if manifest.artifact_type.as_deref() != Some(ARTIFACT_TYPE) {
            return Err(kind("artifactType", manifest.artifact_type));
        }
        if manifest.config.media_type != CONFIG_MEDIA_TYPE {
            return Err(kind("config media type", Some(manifest.config.media_type)));
        }
        let limit = MAX_CONFIG_BYTES as u64;
        if manifest.config.size > limit {
            let what = "config length in bytes";
            return Err(PackageError::Limit { what, found: manifest.config.size, limit });
        }
        let mut files = Vec::with_capacity(manifest.layers.len());
        let mut bases = Vec::new();
        for (index, mut layer) in manifest.layers.into_iter().enumerate() {
            let title = layer
                .annotations
                .remove(FILEPATH_ANNOTATION)
                .or_else(|| layer.annotations.remove(TITLE_ANNOTATION))
                .ok_or_else(|| PackageError::Files {
                    reason: format!("layer {index} has no {FILEPATH_ANNOTATION} annotation"),
                })?;
            if let Some(base) = layer.annotations.remove(ADAPTER_BASE_ANNOTATION) {
                bases.push((title.clone(), base));
            }
            files.push(PackageFile {
                title,
                media_type: layer.media_type,
                digest: layer.digest,
                size_bytes: layer.size,
            });
        }
        check_files(&files)?;
        let annotations = manifest.annotations;
        let package = Self { files, config: manifest.config, annotations, config_bytes: None };
        let weights = package.weights().digest.to_string();
        match bases.into_iter().find(|(_, base)| *base != weights) {
            Some((title, base)) => Err(PackageError::Files {
                reason: format!("{title:?} is made for {base:.80}, and the weights are {weights}"),
            }),
            None => Ok(package),
        }
    }

    /// The file with this title.
    pub fn file(&self, title: &str) -> Option<&PackageFile> {
        self.files.iter().find(|file| file.title == title)
    }

    /// The weights: [`MODEL_FILE`], or else the first file of [`WEIGHT_MEDIA_TYPE`] that is no
    /// adapter.
    pub fn weights(&self) -> &PackageFile {
        self.file(MODEL_FILE)
            .or_else(|| self.files.iter().find(|file| file.holds_weights()))
            .expect("`check_files` holds: a package has weights")
    }

    /// The LoRA adapter that is applied to the weights, if there is one.
    pub fn adapter(&self) -> Option<&PackageFile> {
        self.file(ADAPTER_FILE)
    }

    /// What [`signing::sign`] takes: every file with its digest.
    pub fn signed_files(&self) -> Vec<(String, Digest)> {
        self.files.iter().map(|file| (file.title.clone(), file.digest)).collect()
    }
}

/// Verifies a package: the signature is by one of `keys` and covers exactly the manifest's files.
///
/// # Errors
/// [`PackageError`] saying which file or which part of the signature is wrong.
pub fn verify(manifest: &[u8], bundle: &[u8], keys: &[PublicKey]) -> Result<Package, PackageError> {
    let package = Package::parse(manifest)?;
    let mut signed = signing::verify(bundle, keys)?.files;
    let unsigned = |file: &str, reason| PackageError::Unsigned { file: file.to_owned(), reason };
    for file in &package.files {
        match signed.remove(&file.title) {
            None => return Err(unsigned(&file.title, "the signature does not name it")),
            Some(digest) if digest != file.digest => {
                return Err(unsigned(&file.title, "the signature names another digest"));
            }
            Some(_) => {}
        }
    }
    if let Some(file) = signed.keys().next() {
        return Err(unsigned(file, "the manifest lacks it"));
    }
    Ok(package)
}

/// The manifest that attaches a signature bundle to a package: an OCI referrer of `subject`.
pub fn signature_manifest(subject: &Descriptor, bundle: Digest, bundle_size: u64) -> Vec<u8> {
    wire::Manifest {
        schema_version: 2,
        media_type: Some(MANIFEST_MEDIA_TYPE.to_owned()),
        artifact_type: Some(BUNDLE_MEDIA_TYPE.to_owned()),
        config: Descriptor::of_bytes(EMPTY_MEDIA_TYPE, EMPTY_CONFIG),
        layers: vec![Descriptor {
            media_type: BUNDLE_MEDIA_TYPE.to_owned(),
            digest: bundle,
            size: bundle_size,
            annotations: BTreeMap::new(),
        }],
        subject: Some(Descriptor { annotations: BTreeMap::new(), ..subject.clone() }),
        annotations: BTreeMap::new(),
    }
    .to_bytes()
}

/// What a signature's manifest names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignatureManifest {
    /// The manifest of the package that is signed.
    pub subject: Descriptor,
    /// The bundle.
    pub bundle: Descriptor,
}

/// Reads a manifest made by [`signature_manifest`].
///
/// # Errors
/// [`PackageError`] where it is of something else or names an overlong bundle.
pub fn parse_signature_manifest(manifest: &[u8]) -> Result<SignatureManifest, PackageError> {
    let manifest = wire::Manifest::parse(manifest)?;
    let kind = |field, found: &str| PackageError::Kind {
        expected: "signature",
        field,
        found: found.chars().take(200).collect(),
    };
    let artifact_type = manifest.artifact_type.unwrap_or_default();
    if artifact_type != BUNDLE_MEDIA_TYPE {
        return Err(kind("artifactType", &artifact_type));
    }
    let subject = manifest.subject.ok_or_else(|| kind("subject", "absent"))?;
    let Ok([bundle]) = <[Descriptor; 1]>::try_from(manifest.layers) else {
        return Err(kind("layers", "not exactly one"));
    };
    if bundle.media_type != BUNDLE_MEDIA_TYPE {
        return Err(kind("layer media type", &bundle.media_type));
    }
    let limit = signing::MAX_BUNDLE_BYTES as u64;
    if bundle.size > limit {
        let what = "signature length in bytes";
        return Err(PackageError::Limit { what, found: bundle.size, limit });
    }
    Ok(SignatureManifest { subject, bundle })
}

fn check_files(files: &[PackageFile]) -> Result<(), PackageError> {
    if files.len() > MAX_FILES {
        let (found, limit) = (files.len() as u64, MAX_FILES as u64);
        return Err(PackageError::Limit { what: "number of files", found, limit });
    }
    let mut seen = std::collections::BTreeSet::new();
    for file in files {
        check_title(&file.title)?;
        if file.title == signing::SIGNATURE_FILE {
            let reason = format!("{:?} is the signature's own name", file.title);
            return Err(PackageError::Files { reason });
        }
        if !seen.insert(file.title.as_str()) {
            return Err(TitleError::duplicate(&file.title).into());
        }
        if file.size_bytes > MAX_FILE_BYTES {
            let (found, limit) = (file.size_bytes, MAX_FILE_BYTES);
            return Err(PackageError::Limit { what: "file length in bytes", found, limit });
        }
    }
    if !files.iter().any(PackageFile::holds_weights) {
        return Err(PackageError::Files { reason: "no file holds weights".to_owned() });
    }
    Ok(())
}

fn check_len(what: &'static str, found: usize, limit: usize) -> Result<(), PackageError> {
    if found > limit {
        return Err(PackageError::Limit { what, found: found as u64, limit: limit as u64 });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
