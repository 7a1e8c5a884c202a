//! Names of files in a package: plain relative paths that are safe to create in any folder.

/// The longest file name in a package, in bytes.
pub const MAX_TITLE_BYTES: usize = 255;

/// Why a name cannot be a file's in a package.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "file name {title:?} {reason}\nhint: a package holds plain relative paths such as \
     `model.gguf`, each once"
)]
pub struct TitleError {
    title: String,
    reason: &'static str,
}

impl TitleError {
    fn new(title: &str, reason: &'static str) -> Self {
        Self { title: title.chars().take(100).collect(), reason }
    }

    pub(crate) fn duplicate(title: &str) -> Self {
        Self::new(title, "occurs twice")
    }
}

/// Checks that `title` is a relative path with `/` between its parts, none of which is empty,
/// `.` or `..`, and without backslash, colon or control character.
///
/// # Errors
/// [`TitleError`] otherwise.
pub fn check_title(title: &str) -> Result<(), TitleError> {
    if title.is_empty() {
        return Err(TitleError::new(title, "is empty"));
    }
    if title.len() > MAX_TITLE_BYTES {
        return Err(TitleError::new(title, "is too long"));
    }
    if title.chars().any(|c| c.is_control() || c == '\\' || c == ':') {
        return Err(TitleError::new(title, "has a character that is not allowed"));
    }
    if title.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(TitleError::new(title, "is not a plain relative path"));
    }
    Ok(())
}
