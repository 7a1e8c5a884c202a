//! Where a variant comes from: its parent, the steps that made it, the tools that ran.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Digest;

/// The file name of a [`Lineage`] in a model package.
pub const LINEAGE_FILE: &str = "lineage.json";
/// The format written here.
pub const LINEAGE_VERSION: u32 = 1;
/// The longest lineage file in bytes.
pub const MAX_LINEAGE_BYTES: usize = 256 << 10;
/// The most steps of a recipe.
pub const MAX_STEPS: usize = 256;

/// How one model file came to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Lineage {
    /// Format version: [`LINEAGE_VERSION`].
    #[serde(default = "current_version")]
    pub format: u32,
    /// The model line, such as `smollm2-135m-instruct`.
    pub model: String,
    /// Its version in that line.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// The variant's name, such as `q4_k_m`.
    pub variant: String,
    /// The file this one was made from; absent where it is the original itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub parent: Option<Digest>,
    /// The file at the beginning of the line, as its publisher gave it out.
    #[schema(value_type = String)]
    pub original: Digest,
    /// What was done, from the original to this file, in order.
    pub recipe: Vec<Step>,
    /// Versions of the tools that ran, such as `llama.cpp` → `b6000`.
    pub tools: BTreeMap<String, String>,
}

/// One step of a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Step {
    /// What was done, such as `quantise`.
    pub name: String,
    /// With which settings, such as `type` → `Q4_K_M`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: BTreeMap<String, String>,
}

/// Why bytes are not a [`Lineage`].
#[derive(Debug, thiserror::Error)]
pub enum LineageError {
    /// Over [`MAX_LINEAGE_BYTES`] or [`MAX_STEPS`].
    #[error("{LINEAGE_FILE} is too long\nhint: pack the model again")]
    TooLong,
    /// A newer format.
    #[error(
        "{LINEAGE_FILE} has format {found}, {LINEAGE_VERSION} is known here\nhint: update this program"
    )]
    Format {
        /// The format it names.
        found: u32,
    },
    /// Not JSON of the expected form.
    #[error("parse {LINEAGE_FILE}\nhint: pack the model again")]
    Json {
        /// The cause.
        #[from]
        source: serde_json::Error,
    },
}

impl Lineage {
    /// The lineage of an original: no parent, no steps.
    pub fn original(model: &str, version: semver::Version, variant: &str, digest: Digest) -> Self {
        Self {
            format: LINEAGE_VERSION,
            model: model.to_owned(),
            version,
            variant: variant.to_owned(),
            parent: None,
            original: digest,
            recipe: Vec::new(),
            tools: BTreeMap::new(),
        }
    }

    /// The lineage of a file made from the file `parent` that this lineage describes.
    #[must_use]
    pub fn child(&self, variant: &str, parent: Digest, step: Step) -> Self {
        let mut child = self.clone();
        variant.clone_into(&mut child.variant);
        child.parent = Some(parent);
        child.recipe.push(step);
        child
    }

    /// The file's bytes: indented JSON with a final newline.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a lineage is always JSON");
        bytes.push(b'\n');
        bytes
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`LineageError`] for what is too long, newer or malformed.
    pub fn parse(bytes: &[u8]) -> Result<Self, LineageError> {
        if bytes.len() > MAX_LINEAGE_BYTES {
            return Err(LineageError::TooLong);
        }
        let lineage: Self = serde_json::from_slice(bytes)?;
        if lineage.format != LINEAGE_VERSION {
            return Err(LineageError::Format { found: lineage.format });
        }
        if lineage.recipe.len() > MAX_STEPS {
            return Err(LineageError::TooLong);
        }
        Ok(lineage)
    }
}

impl Step {
    /// A step with its settings.
    pub fn new<'a>(name: &str, settings: impl IntoIterator<Item = (&'a str, String)>) -> Self {
        let settings = settings.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Self { name: name.to_owned(), settings }
    }
}

fn current_version() -> u32 {
    LINEAGE_VERSION
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lineage_survives_its_file_and_grows_by_steps() {
        let original = Digest::of(b"original");
        let first = Lineage::original("glass", semver::Version::new(1, 0, 0), "f32", original);
        let step = Step::new("quantise", [("type", "Q4_0".to_owned())]);
        let child = first.child("q4_0", original, step);
        assert_eq!(Lineage::parse(&child.to_bytes()).unwrap(), child);
        assert_eq!((child.parent, child.original), (Some(original), original));
        assert_eq!(child.recipe.len(), 1);
    }

    #[test]
    fn a_newer_or_overlong_lineage_is_refused() {
        let original = Digest::of(b"original");
        let mut lineage = Lineage::original("m", semver::Version::new(1, 0, 0), "f32", original);
        lineage.format = 2;
        assert!(matches!(
            Lineage::parse(&lineage.to_bytes()),
            Err(LineageError::Format { found: 2 })
        ));
        assert!(matches!(
            Lineage::parse(&vec![b' '; MAX_LINEAGE_BYTES + 1]),
            Err(LineageError::TooLong)
        ));
        assert!(Lineage::parse(b"{}").is_err());
    }
}
