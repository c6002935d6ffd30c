//! The agent's errors: one kind for each ttrpc status the shim tells apart, and one sentence.
use std::io;

/// What went wrong, in the terms the shim maps to containerd's codes (DESIGN 2.9).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The container, process or stream is not known, or it has ended.
    #[error("{0}")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The object is in a state that does not allow the request.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request can never be served as it stands.
    #[error("{0}")]
    InvalidArgument(String),
    /// A limit was met.
    #[error("{0}")]
    ResourceExhausted(String),
    /// The host did not do its part in time.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// The guest could not do it.
    #[error("{0}")]
    Internal(String),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Internal`] from a failed system call on a named thing.
    pub fn io(what: impl std::fmt::Display, error: impl Into<io::Error>) -> Self {
        Self::Internal(format!("{what}: {}", error.into()))
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        use ttrpc::Code;
        let code = match &error {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Error::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Error::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Error::ResourceExhausted(_) => Code::RESOURCE_EXHAUSTED,
            Error::DeadlineExceeded(_) => Code::DEADLINE_EXCEEDED,
            Error::Internal(_) => Code::INTERNAL,
        };
        let mut sentence = error.to_string();
        // The host ends a guest whose answers are too long.
        brig_agent_protocol::cut(&mut sentence);
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, sentence))
    }
}
