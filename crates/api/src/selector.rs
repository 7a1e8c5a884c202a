//! Selectors: which devices something is meant for, by label.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most terms in one selector.
pub const MAX_TERMS: usize = 32;

/// A conjunction of terms over labels: `class=small,site!=berlin-3`; `all` is every device.
/// `class`, `site`, `name` and `id` are labels of every device that has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    terms: Vec<Term>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Term {
    key: String,
    values: Vec<String>,
    negated: bool,
}

/// Why a string is not a [`Selector`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{given}` is not a selector: write `all`, or terms such as `class=small`, `class=small|medium` and `site!=berlin`, joined by commas"
)]
pub struct ParseSelectorError {
    given: String,
}

impl Selector {
    /// The selector of every device.
    pub fn all() -> Self {
        Self::default()
    }

    /// Whether a device with these labels is meant.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.terms.iter().all(|term| {
            let equal = labels.get(&term.key).is_some_and(|value| term.values.contains(value));
            equal != term.negated
        })
    }

    /// The values asked of `key` by its `=` terms, such as the classes of `class=small|large`.
    pub fn values_of(&self, key: &str) -> Vec<&str> {
        let terms = self.terms.iter().filter(|term| term.key == key && !term.negated);
        terms.flat_map(|term| term.values.iter().map(String::as_str)).collect()
    }
}

impl FromStr for Selector {
    type Err = ParseSelectorError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let error = || ParseSelectorError { given: given.chars().take(200).collect() };
        if given.trim() == "all" {
            return Ok(Self::all());
        }
        let good = |text: &str| {
            !text.is_empty()
                && text.len() <= crate::id::MAX_NAME_BYTES
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte))
        };
        let mut terms = Vec::new();
        for part in given.split(',').map(str::trim) {
            let (key, values, negated) = match part.split_once("!=") {
                Some((key, values)) => (key, values, true),
                None => {
                    let (key, values) = part.split_once('=').ok_or_else(error)?;
                    (key, values, false)
                }
            };
            let key = key.trim().to_owned();
            let values: Vec<String> = values.split('|').map(|v| v.trim().to_owned()).collect();
            if !good(&key) || !values.iter().all(|value| good(value)) || terms.len() == MAX_TERMS {
                return Err(error());
            }
            terms.push(Term { key, values, negated });
        }
        Ok(Self { terms })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.terms.is_empty() {
            return f.write_str("all");
        }
        for (index, term) in self.terms.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let operator = if term.negated { "!=" } else { "=" };
            write!(f, "{comma}{}{operator}{}", term.key, term.values.join("|"))?;
        }
        Ok(())
    }
}

impl Serialize for Selector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Selector {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
