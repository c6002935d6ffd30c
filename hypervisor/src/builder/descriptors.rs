//! The descriptors that came with a message, each to be taken once by whatever the message names it for.

use std::os::fd::OwnedFd;

use super::error::StartError;
use crate::control::FdIndex;

/// Descriptors of a message, each taken once.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Those of one message.
    #[must_use]
    pub fn new(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors.into_iter().map(Some).collect())
    }

    /// Takes the descriptor that `what` names.
    ///
    /// # Errors
    /// If there is none with this index or it was taken before.
    pub fn take(&mut self, index: FdIndex, what: &str) -> Result<OwnedFd, StartError> {
        self.0.get_mut(index).and_then(Option::take).ok_or_else(|| {
            StartError::Invalid(format!("{what}: the message has no descriptor {index}"))
        })
    }
}
