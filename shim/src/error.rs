//! The one error the shim gives to containerd: a class, which is one ttrpc code, and a sentence that
//! names the thing and the fix.
//!
//! Library errors (control protocol, agent, files) are turned into it where they are met, so that
//! nothing further up compares text. It trusts neither agent nor VMM: their sentences are length-limited.

use std::fmt;
use std::io;

use brig_agent_protocol::cut;
use brig_hypervisor::control::{ErrorKind, ErrorReply};
use tokio::task::JoinError;
use ttrpc::Code;

/// Classes of errors, each of which is one containerd code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The container, process or file does not exist.
    NotFound,
    /// It exists already.
    AlreadyExists,
    /// The request does not fit the state of the thing.
    FailedPrecondition,
    /// The request itself is wrong.
    InvalidArgument,
    /// The host or the VM cannot serve it now.
    Unavailable,
    /// Brig does not offer this.
    Unimplemented,
    /// A limit was met.
    ResourceExhausted,
    /// It took too long.
    DeadlineExceeded,
    /// A fault of ours.
    Internal,
}

impl Kind {
    /// Every class.
    pub const ALL: [Self; 9] = [
        Self::NotFound,
        Self::AlreadyExists,
        Self::FailedPrecondition,
        Self::InvalidArgument,
        Self::Unavailable,
        Self::Unimplemented,
        Self::ResourceExhausted,
        Self::DeadlineExceeded,
        Self::Internal,
    ];

    /// As it is written in metrics and accounts: the ttrpc code in small letters.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::AlreadyExists => "already_exists",
            Self::FailedPrecondition => "failed_precondition",
            Self::InvalidArgument => "invalid_argument",
            Self::Unavailable => "unavailable",
            Self::Unimplemented => "unimplemented",
            Self::ResourceExhausted => "resource_exhausted",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Internal => "internal",
        }
    }
}

/// An error with its class.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The class.
    pub kind: Kind,
    /// One sentence.
    pub message: String,
}

/// A result of the shim.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of this class.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// [`Kind::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// [`Kind::AlreadyExists`].
    pub fn already_exists(message: impl Into<String>) -> Self {
        Self::new(Kind::AlreadyExists, message)
    }

    /// [`Kind::FailedPrecondition`].
    pub fn state(message: impl Into<String>) -> Self {
        Self::new(Kind::FailedPrecondition, message)
    }

    /// [`Kind::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, message)
    }

    /// [`Kind::Unavailable`].
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Kind::Unavailable, message)
    }

    /// [`Kind::Unimplemented`].
    pub fn unimplemented(message: impl Into<String>) -> Self {
        Self::new(Kind::Unimplemented, message)
    }

    /// [`Kind::Internal`].
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// An I/O error met while doing `what`; the class follows from the error.
    pub fn io(what: impl fmt::Display, error: &io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => Kind::NotFound,
            io::ErrorKind::AlreadyExists => Kind::AlreadyExists,
            io::ErrorKind::InvalidInput | io::ErrorKind::NotADirectory => Kind::InvalidArgument,
            _ => Kind::Internal,
        };
        Self::new(kind, format!("{what}: {error}"))
    }

    /// What the agent answered; an error of the connection itself is [`Kind::Unavailable`].
    #[must_use]
    pub fn from_agent(error: ttrpc::Error) -> Self {
        let ttrpc::Error::RpcStatus(status) = error else {
            return Self::unavailable(format!(
                "the connection to the guest's agent broke: {error}"
            ));
        };
        let kind = match status.code() {
            Code::NOT_FOUND => Kind::NotFound,
            Code::ALREADY_EXISTS => Kind::AlreadyExists,
            Code::FAILED_PRECONDITION => Kind::FailedPrecondition,
            Code::INVALID_ARGUMENT => Kind::InvalidArgument,
            Code::UNAVAILABLE => Kind::Unavailable,
            Code::UNIMPLEMENTED => Kind::Unimplemented,
            Code::RESOURCE_EXHAUSTED => Kind::ResourceExhausted,
            Code::DEADLINE_EXCEEDED => Kind::DeadlineExceeded,
            _ => Kind::Internal,
        };
        let mut message = status.message;
        cut(&mut message);
        Self::new(kind, message)
    }

    /// The ttrpc code of the class.
    #[must_use]
    pub fn code(&self) -> Code {
        match self.kind {
            Kind::NotFound => Code::NOT_FOUND,
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::Unavailable => Code::UNAVAILABLE,
            Kind::Unimplemented => Code::UNIMPLEMENTED,
            Kind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
            Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            Kind::Internal => Code::INTERNAL,
        }
    }
}

impl From<ErrorReply> for Error {
    fn from(reply: ErrorReply) -> Self {
        let kind = match reply.kind {
            ErrorKind::Invalid => Kind::InvalidArgument,
            ErrorKind::State => Kind::FailedPrecondition,
            ErrorKind::Host => Kind::Unavailable,
            ErrorKind::Limit => Kind::ResourceExhausted,
            ErrorKind::Internal => Kind::Internal,
        };
        let mut message = reply.message;
        cut(&mut message);
        Self::new(kind, message)
    }
}

/// A blocking piece of work that panicked, or whose runtime ended.
impl From<JoinError> for Error {
    fn from(error: JoinError) -> Self {
        Self::internal(format!("a worker of the shim ended: {error}"))
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = error.code();
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.message))
    }
}

/// Makes "it does not exist" a success.
///
/// # Errors
/// Every other error.
pub fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_agent_protocol::MAX_SENTENCE;

    #[test]
    fn a_broken_agent_connection_is_unavailable_and_a_status_keeps_its_code() {
        assert_eq!(
            Error::from_agent(ttrpc::Error::RemoteClosed).kind,
            Kind::Unavailable
        );
        let status = ttrpc::get_status(Code::NOT_FOUND, "no such process");
        let error = Error::from_agent(ttrpc::Error::RpcStatus(status));
        assert_eq!(error, Error::not_found("no such process"));
        assert_eq!(error.code(), Code::NOT_FOUND);
    }

    #[test]
    fn a_long_sentence_of_the_agent_or_the_vmm_is_cut() {
        let long = "é".repeat(MAX_SENTENCE);
        let status = ttrpc::get_status(Code::INTERNAL, &long);
        let error = Error::from_agent(ttrpc::Error::RpcStatus(status));
        assert_eq!(error.message.len(), MAX_SENTENCE);
        let error = Error::from(ErrorReply {
            kind: ErrorKind::Host,
            message: long,
        });
        assert_eq!(error.message.len(), MAX_SENTENCE);
    }
}
