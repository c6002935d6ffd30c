//! Why the helper could not do its work, as one sentence for the user.
use std::{fmt, io};

/// Why a process could not be set up, as the sentence that the user sees.
#[derive(Debug)]
pub struct Failure(pub String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// Result of the helper.
pub type Result<T> = std::result::Result<T, Failure>;

/// Says what was being done when a system call failed.
pub trait Context<T> {
    /// Turns the error into a [`Failure`] that begins with `what`.
    ///
    /// # Errors
    /// The failure.
    fn during(self, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn during(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Failure(format!("{what}: {}", error_text(&error.into()))))
    }
}

/// The system's text for an error, without Rust's "(os error n)".
pub fn error_text(error: &io::Error) -> String {
    let text = error.to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    let mut chars = text.get(..end).unwrap_or_default().chars();
    // Lower case, as the messages of other runtimes that people search for.
    chars
        .next()
        .map_or(String::new(), |c| c.to_lowercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn failures_read_without_error_numbers() {
        let failure = fs::metadata("/nonexistent").during("looking").unwrap_err();
        assert_eq!(failure.to_string(), "looking: no such file or directory");
    }
}
