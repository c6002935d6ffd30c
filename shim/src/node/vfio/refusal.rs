//! Why something of the node's cannot be given to a pod, with what to do about it.

use std::fmt;

/// Why a device cannot be given, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// One sentence.
    pub why: String,
    /// Another one.
    pub fix: String,
}

impl Refusal {
    pub(super) fn new(why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            fix: fix.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.why, self.fix)
    }
}
