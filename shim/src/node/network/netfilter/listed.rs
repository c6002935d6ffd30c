//! What the kernel lists, and why a list could not be had.

use std::io;

/// The most that all lists of a namespace together may be long, in bytes.
pub const MAX_BYTES: usize = 1 << 20;

/// An object that was listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its address family.
    pub family: u8,
    /// Its attributes.
    pub attributes: Vec<u8>,
}

/// A list was not read.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// It changed meanwhile.
    #[error("the ruleset changed while it was read")]
    Changed,
    /// All lists together are longer than we take.
    #[error("the ruleset is larger than {} KiB", MAX_BYTES >> 10)]
    TooLarge,
    /// The kernel refused, or cannot be understood.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The kernel, or what is loaded of it, has no nf_tables.
pub fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPROTONOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP)
    )
}
