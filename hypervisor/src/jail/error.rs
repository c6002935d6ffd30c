//! Why the jail could not be closed: the step that failed, and what the kernel said.

use std::io;

/// Why the jail could not be closed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct JailError {
    what: &'static str,
    source: io::Error,
}

/// Names the step that failed.
pub(super) trait Step<T> {
    fn step(self, what: &'static str) -> Result<T, JailError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, what: &'static str) -> Result<T, JailError> {
        self.map_err(|source| JailError {
            what,
            source: source.into(),
        })
    }
}
