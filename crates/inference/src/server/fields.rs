//! The parameters of a request, taken one by one; what is left at the end is refused.

use serde_json::{Map, Value};

use super::document::parameters;
use super::error::ApiError;

/// OpenAI's parameters that have no effect on an answer: they are accepted as they are.
const INFORMATION: &[&str] =
    &["metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"];
/// OpenAI's parameters that this server does not follow, each with the values that ask for
/// nothing.
const UNSUPPORTED: &[(&str, &[&str])] = &[
    ("audio", &[]),
    ("background", &["false"]),
    ("best_of", &["1"]),
    ("context_management", &["[]"]),
    ("conversation", &[]),
    ("dimensions", &[]),
    ("echo", &["false"]),
    ("function_call", &[r#""none""#, r#""auto""#]),
    ("functions", &["[]"]),
    ("include", &["[]"]),
    ("max_tool_calls", &[]),
    ("modalities", &[r#"["text"]"#]),
    ("moderation", &[]),
    ("parallel_tool_calls", &["true", "false"]),
    ("prediction", &[]),
    ("previous_response_id", &[]),
    ("prompt_cache_options", &["{}"]),
    ("reasoning", &["{}"]),
    ("reasoning_effort", &[]),
    ("response_format", &[r#"{"type":"text"}"#]),
    ("service_tier", &[r#""auto""#, r#""default""#]),
    ("store", &["false"]),
    ("suffix", &[r#""""#]),
    ("tool_choice", &[r#""none""#, r#""auto""#]),
    ("tools", &["[]"]),
    ("truncation", &[r#""disabled""#]),
    ("verbosity", &[]),
    ("web_search_options", &[]),
];

/// The parameters that were not taken yet.
pub(super) struct Fields {
    open: Map<String, Value>,
    /// What the path does not have, and nobody can take.
    foreign: Map<String, Value>,
}

impl Fields {
    /// Parameters within another.
    pub(super) fn new(fields: Map<String, Value>) -> Self {
        Self { open: fields, foreign: Map::new() }
    }

    /// Parameters of a path, of which those can be taken that the document names.
    pub(super) fn of_path(path: &str, fields: Map<String, Value>) -> Self {
        let known = |name: &str| parameters(path).is_some_and(|names| names.contains(name));
        let (open, foreign) = fields.into_iter().partition(|(name, _)| known(name));
        Self { open, foreign }
    }

    /// A parameter that is not taken yet; null counts as absent.
    pub(super) fn look(&self, name: &str) -> Option<&Value> {
        self.open.get(name).filter(|value| !value.is_null())
    }

    /// Takes a parameter as it is; null counts as absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.open.remove(name).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &mut self,
        name: &str,
        kind: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match read(&value) {
            Some(value) => Ok(Some(value)),
            None => Err(ApiError::parameter(name, format!("expected {kind}"))),
        }
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, ApiError> {
        self.typed(name, "a number", |value| value.as_f64().map(|number| number as f32))
    }

    pub(super) fn count(&mut self, name: &str) -> Result<Option<u32>, ApiError> {
        self.typed(name, "a whole number, not negative", |value| {
            value.as_u64().and_then(|count| u32::try_from(count).ok())
        })
    }

    /// A seed: any whole number.
    pub(super) fn seed(&mut self, name: &str) -> Result<Option<u64>, ApiError> {
        self.typed(name, "a whole number", |value| {
            value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned))
        })
    }

    /// A parameter that two families of clients name differently, read by `read`.
    pub(super) fn either<T>(
        &mut self,
        names: [&str; 2],
        read: impl Fn(&mut Self, &str) -> Result<Option<T>, ApiError>,
    ) -> Result<Option<T>, ApiError> {
        match (read(self, names[0])?, read(self, names[1])?) {
            (Some(_), Some(_)) => {
                Err(ApiError::parameter(names[1], format!("only without `{}`", names[0])))
            }
            (first, second) => Ok(first.or(second)),
        }
    }

    /// A string or several.
    pub(super) fn texts(&mut self, name: &str) -> Result<Vec<String>, ApiError> {
        let texts = self.typed(name, "a string or an array of strings", |value| match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(items) => {
                items.iter().map(|item| item.as_str().map(str::to_owned)).collect()
            }
            _ => None,
        })?;
        Ok(texts.unwrap_or_default())
    }

    /// Refuses what was not taken.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        for (name, value) in self.open.into_iter().chain(self.foreign) {
            if value.is_null() || INFORMATION.contains(&name.as_str()) {
                continue;
            }
            let Some((_, harmless)) = UNSUPPORTED.iter().find(|(known, _)| *known == name) else {
                let name: String = name.chars().take(100).collect();
                return Err(ApiError::unknown_parameter(&name));
            };
            if !harmless.contains(&value.to_string().as_str()) {
                let message = "this endpoint does not support it\nhint: leave it out".to_owned();
                return Err(ApiError::unsupported(&name, message));
            }
        }
        Ok(())
    }
}
