//! The config of a package: what the model is, for people and other tools (ModelPack
//! `docs/config.md`, `schema/config-schema.json`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{MAX_CONFIG_BYTES, PackageError, PackageFile, check_len};

/// What a package's config says of its model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelConfig {
    /// The model line, such as `smollm2-135m-instruct`.
    pub name: String,
    /// Its version in that line; `None` where a package of others names none.
    pub version: Option<semver::Version>,
    /// The family, such as `llama`.
    pub family: Option<String>,
    /// A title for people.
    pub title: Option<String>,
    /// SPDX licence expressions.
    pub licenses: Vec<String>,
    /// Number of parameters.
    pub parameters: Option<u64>,
    /// The GGUF file type, such as `Q4_K_M`.
    pub quantisation: Option<String>,
    /// When the package was made.
    pub created_at: Option<jiff::Timestamp>,
}

#[derive(Serialize, Deserialize)]
struct Config {
    descriptor: ModelDescriptor,
    config: Technical,
    modelfs: ModelFs,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ModelDescriptor {
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<jiff::Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    family: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    title: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    licenses: Vec<String>,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Technical {
    #[serde(skip_serializing_if = "Option::is_none")]
    architecture: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    param_size: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quantization: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    capabilities: Option<Capabilities>,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Capabilities {
    input_types: Vec<String>,
    output_types: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ModelFs {
    #[serde(rename = "type")]
    kind: String,
    // The specification's text spells it `diff_ids` in older revisions.
    #[serde(alias = "diff_ids")]
    diff_ids: Vec<String>,
}

impl ModelConfig {
    /// The config blob's bytes for a package of these files.
    pub(super) fn to_bytes(&self, files: &[PackageFile]) -> Vec<u8> {
        let text = || vec!["text".to_owned()];
        let config = Config {
            descriptor: ModelDescriptor {
                created_at: self.created_at,
                family: self.family.clone(),
                name: (!self.name.is_empty()).then(|| self.name.clone()),
                version: self.version.as_ref().map(ToString::to_string),
                title: self.title.clone(),
                licenses: self.licenses.clone(),
            },
            config: Technical {
                architecture: Some("transformer".to_owned()),
                format: Some("gguf".to_owned()),
                param_size: self.parameters.map(scaled),
                quantization: self.quantisation.clone(),
                capabilities: Some(Capabilities { input_types: text(), output_types: text() }),
            },
            modelfs: ModelFs {
                kind: "layers".to_owned(),
                // Raw layers: the digest of the content is that of the blob.
                diff_ids: files.iter().map(|file| file.digest.to_string()).collect(),
            },
        };
        serde_json::to_vec(&config).expect("a config is always JSON")
    }

    /// The annotations that the manifest repeats, so that a listing need not fetch the config.
    pub(super) fn annotations(&self) -> BTreeMap<String, String> {
        let title = self.title.clone().or((!self.name.is_empty()).then(|| self.name.clone()));
        let licenses = (!self.licenses.is_empty()).then(|| self.licenses.join(" AND "));
        [
            ("org.opencontainers.image.created", self.created_at.map(|time| time.to_string())),
            ("org.opencontainers.image.title", title),
            ("org.opencontainers.image.version", self.version.as_ref().map(ToString::to_string)),
            ("org.opencontainers.image.licenses", licenses),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)))
        .collect()
    }

    /// Reads a config blob. Its parameter count is only as exact as it was written, such as
    /// `135M`.
    ///
    /// # Errors
    /// [`PackageError`] where it is too long or not JSON of the expected form.
    pub fn parse(bytes: &[u8]) -> Result<Self, PackageError> {
        check_len("config length in bytes", bytes.len(), MAX_CONFIG_BYTES)?;
        let config: Config = serde_json::from_slice(bytes)
            .map_err(|source| PackageError::Json { what: "config", source })?;
        Ok(Self {
            name: config.descriptor.name.unwrap_or_default(),
            version: config.descriptor.version.and_then(|version| version.parse().ok()),
            family: config.descriptor.family,
            title: config.descriptor.title,
            licenses: config.descriptor.licenses,
            parameters: config.config.param_size.as_deref().and_then(unscaled),
            quantisation: config.config.quantization,
            created_at: config.descriptor.created_at,
        })
    }
}

const SCALES: [(char, u64); 5] = [
    ('Q', 1_000_000_000_000_000),
    ('T', 1_000_000_000_000),
    ('B', 1_000_000_000),
    ('M', 1_000_000),
    ('K', 1_000),
];

/// A count as ModelPack's `paramSize`: at most one digit after the point and a scale letter.
fn scaled(count: u64) -> String {
    let (letter, scale) =
        SCALES.into_iter().find(|&(_, scale)| count >= scale).unwrap_or(('K', 1_000));
    let tenths = (u128::from(count) * 10 + u128::from(scale) / 2) / u128::from(scale);
    match tenths % 10 {
        0 => format!("{}{letter}", tenths / 10),
        tenth => format!("{}.{tenth}{letter}", tenths / 10),
    }
}

fn unscaled(text: &str) -> Option<u64> {
    let letter = text.chars().last()?.to_ascii_uppercase();
    let (_, scale) = SCALES.into_iter().find(|&(candidate, _)| candidate == letter)?;
    let count: f64 = text[..text.len() - 1].parse().ok()?;
    (count.is_finite() && count >= 0.0).then_some((count * scale as f64) as u64)
}
