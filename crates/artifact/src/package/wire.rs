//! The JSON of manifests (OCI image-spec 1.1). Unknown fields are ignored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{MANIFEST_MEDIA_TYPE, MAX_FILES, MAX_MANIFEST_BYTES, PackageError, check_len};
use crate::Digest;

/// What names a blob or a manifest: OCI image-spec 1.1, "OCI Content Descriptors".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the content is.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Free annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// The descriptor of these bytes.
    pub fn of_bytes(media_type: &str, bytes: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            annotations: BTreeMap::new(),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Manifest {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    pub config: Descriptor,
    #[serde(default)]
    pub layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a manifest is always JSON")
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, PackageError> {
        check_len("manifest length in bytes", bytes.len(), MAX_MANIFEST_BYTES)?;
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|source| PackageError::Json { what: "manifest", source })?;
        let kind = |field, found: String| PackageError::Kind {
            expected: "OCI image manifest",
            field,
            found: found.chars().take(200).collect(),
        };
        if manifest.schema_version != 2 {
            return Err(kind("schemaVersion", manifest.schema_version.to_string()));
        }
        match &manifest.media_type {
            Some(media_type) if media_type != MANIFEST_MEDIA_TYPE => {
                return Err(kind("mediaType", media_type.clone()));
            }
            _ => {}
        }
        check_len("number of layers", manifest.layers.len(), MAX_FILES)?;
        Ok(manifest)
    }
}
