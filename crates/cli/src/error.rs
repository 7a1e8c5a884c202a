//! What a person sees when something fails: object, cause, and the next step.

use std::error::Error;
use std::fmt;

/// Whose problem a failure is; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The caller's: a wrong argument, file or state.
    User = 1,
    /// Ours, or the machine's: a bug, a dead process, a full disk.
    Internal = 2,
    /// A gate says that the candidate is worse.
    Gate = 3,
}

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    /// Decides the exit code.
    pub exit: Exit,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

/// The result of every command.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure that the caller can mend.
    pub fn user(message: impl Into<String>) -> Self {
        Self { exit: Exit::User, message: message.into(), hint: None, source: None }
    }

    /// A failure that the caller did not cause.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { exit: Exit::Internal, ..Self::user(message) }
    }

    /// With another exit code.
    pub fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// The next step.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What caused it.
    pub fn source(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The failure and its causes on one line, without the hint.
    pub fn line(&self) -> String {
        self.told().0
    }

    /// What stands on stderr: the failure with its causes on one line, and the next step.
    /// Library errors carry a hint in their last line; the outermost one is told.
    pub fn told(&self) -> (String, Option<String>) {
        let mut message = String::new();
        let mut hint = self.hint.clone();
        let mut add = |text: &str| {
            let (said, own) = match text.find("hint: ") {
                None => (text, None),
                Some(at) => (&text[..at], Some(&text[at + "hint: ".len()..])),
            };
            let said = said.trim_end_matches([' ', '\n', ';', '.', ',', '(']);
            // Some libraries print their source as part of themselves.
            if !message.contains(said) {
                if !message.is_empty() {
                    message.push_str(": ");
                }
                message.push_str(said);
            }
            if hint.is_none() {
                hint = own.map(|own| own.trim_end_matches(')').to_owned());
            }
        };
        add(&self.message);
        let mut next: Option<&dyn Error> = self.source.as_deref().map(|source| source as _);
        while let Some(cause) = next {
            add(&cause.to_string());
            next = cause.source();
        }
        (message, hint)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (message, hint) = self.told();
        write!(f, "error: {message}")?;
        match hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl Error for Failure {}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(failure) => failure,
            Err(error) => {
                let message = error.to_string();
                Self::internal(message).source(error)
            }
        }
    }
}

/// Turns a library's error into a [`Failure`] that names the operation.
pub trait Context<T> {
    /// The caller can mend it.
    fn user(self, operation: impl FnOnce() -> String) -> Result<T>;
    /// The caller cannot.
    fn internal(self, operation: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn Error + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn user(self, operation: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::user(operation()).source(error))
    }

    fn internal(self, operation: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::internal(operation()).source(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_the_last_line_wherever_it_came_from() {
        let own = Failure::user("read `a.gguf`").hint("check the path");
        assert_eq!(own.to_string(), "error: read `a.gguf`\nhint: check the path");
        let library = std::io::Error::other("port 80 is taken; hint: choose another");
        let failure = Failure::user("start the hub").source(library);
        assert_eq!(
            failure.to_string(),
            "error: start the hub: port 80 is taken\nhint: choose another"
        );
    }

    #[test]
    fn a_cause_is_never_printed_twice() {
        let inner = std::io::Error::other("disk is full");
        let failure = Failure::internal("write: disk is full").source(inner);
        assert_eq!(failure.line(), "write: disk is full");
    }
}
