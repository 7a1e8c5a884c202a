//! Reading a pushed manifest: what it needs and what it is about.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;

use super::error::RegistryError;

/// The largest manifest, in bytes (distribution-spec 1.1, "Pushing manifests", asks for 4 MiB).
pub const MAX_MANIFEST_BYTES: usize = 4 << 20;
/// The most blobs or manifests that one manifest may name.
pub const MAX_DESCRIPTORS: usize = 1000;
/// The longest media type, in bytes (RFC 6838, section 4.2: two names of at most 127).
const MAX_MEDIA_TYPE_BYTES: usize = 255;

/// An index of manifests, which is also the form of a list of referrers.
pub(super) const INDEX_MEDIA_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const IMAGE_MEDIA_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const INDEX_MEDIA_TYPES: [&str; 2] =
    [INDEX_MEDIA_TYPE, "application/vnd.docker.distribution.manifest.list.v2+json"];

/// A content descriptor (image-spec 1.1, "OCI Content Descriptors").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The media type of what it names.
    pub media_type: String,
    /// The digest of what it names.
    pub digest: Digest,
    /// The size in bytes of what it names.
    pub size: u64,
    /// The kind of artifact, for manifests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
}

impl Descriptor {
    pub(super) fn check_size(&self, found: u64) -> Result<(), RegistryError> {
        if self.size == found {
            return Ok(());
        }
        Err(RegistryError::manifest_invalid(format!(
            "{} has {found} bytes, the manifest says {}",
            self.digest, self.size
        )))
    }
}

/// A list of descriptors as an image index.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Index {
    pub(super) schema_version: u32,
    pub(super) media_type: String,
    pub(super) manifests: Vec<Descriptor>,
}

/// What the registry needs to know of a manifest.
#[derive(Debug, PartialEq)]
pub(super) struct Parsed {
    pub(super) media_type: String,
    pub(super) blobs: Vec<Descriptor>,
    pub(super) manifests: Vec<Descriptor>,
    pub(super) subject: Option<Digest>,
    pub(super) artifact_type: Option<String>,
    pub(super) annotations: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    schema_version: u32,
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    subject: Option<Descriptor>,
    annotations: Option<BTreeMap<String, String>>,
}

impl Parsed {
    /// Reads a manifest that was sent with the header `Content-Type: content_type`.
    pub(super) fn read(bytes: &[u8], content_type: Option<&str>) -> Result<Self, RegistryError> {
        let invalid = RegistryError::manifest_invalid;
        let body: Body = serde_json::from_slice(bytes)
            .map_err(|error| invalid(format!("the manifest cannot be read: {error}")))?;
        if body.schema_version != 2 {
            return Err(invalid("schemaVersion must be 2".to_owned()));
        }
        let sent = content_type.map(|text| text.split(';').next().unwrap_or_default().trim());
        let media_type = match (sent, &body.media_type) {
            (Some(sent), Some(written)) if sent != written => {
                let shown: String = sent.chars().take(MAX_MEDIA_TYPE_BYTES).collect();
                let written: String = written.chars().take(MAX_MEDIA_TYPE_BYTES).collect();
                return Err(invalid(format!(
                    "Content-Type is `{shown}`, the manifest's own mediaType is `{written}`"
                )));
            }
            (Some(sent), _) => sent.to_owned(),
            (None, Some(written)) => written.clone(),
            (None, None) => return Err(invalid("Content-Type is missing".to_owned())),
        };
        let is_index = INDEX_MEDIA_TYPES.contains(&media_type.as_str());
        if !is_index && !IMAGE_MEDIA_TYPES.contains(&media_type.as_str()) {
            let shown: String = media_type.chars().take(MAX_MEDIA_TYPE_BYTES).collect();
            let known = [IMAGE_MEDIA_TYPES, INDEX_MEDIA_TYPES].concat().join(", ");
            return Err(invalid(format!(
                "`{shown}` is not a kind of manifest: use one of {known}"
            )));
        }

        let missing = |field: &str| invalid(format!("`{field}` is missing"));
        let (mut blobs, mut manifests, mut artifact_type) =
            (Vec::new(), Vec::new(), body.artifact_type);
        if is_index {
            manifests = body.manifests.ok_or_else(|| missing("manifests"))?;
        } else {
            let config = body.config.ok_or_else(|| missing("config"))?;
            // distribution-spec 1.1, "Listing Referrers": the config stands in for the type.
            artifact_type = artifact_type.or_else(|| Some(config.media_type.clone()));
            blobs.push(config);
            blobs.extend(body.layers.ok_or_else(|| missing("layers"))?);
        }
        if blobs.len() > MAX_DESCRIPTORS || manifests.len() > MAX_DESCRIPTORS {
            return Err(invalid(format!("a manifest names at most {MAX_DESCRIPTORS} others")));
        }
        if artifact_type.as_ref().is_some_and(|text| text.len() > MAX_MEDIA_TYPE_BYTES) {
            return Err(invalid(format!("artifactType has at most {MAX_MEDIA_TYPE_BYTES} bytes")));
        }
        let annotations = body.annotations.map(|map| serde_json::json!(map));
        let subject = body.subject.map(|subject| subject.digest);
        Ok(Self { media_type, blobs, manifests, subject, artifact_type, annotations })
    }
}
