//! Why a pod's network cannot be taken over, and which of containerd's codes that is.

use std::io;
use std::path::PathBuf;

use crate::error::{Error, Kind};

/// The most interfaces of a pod. Each costs the guest interrupt vectors, of which a CPU has about 200.
pub const MAX_INTERFACES: usize = 8;

/// Why a pod's network cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is nothing at the path.
    #[error("network namespace {path} does not exist")]
    Missing {
        /// As it was given.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{path} is not a network namespace: {source}")]
    NotANamespace {
        /// As it was given.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The node's own network.
    #[error(
        "host network is not supported: {path} is the node's own network namespace, which a container in a VM \
         cannot share; drop hostNetwork (--net-host)"
    )]
    HostNetwork {
        /// As it was given.
        path: PathBuf,
    },
    /// More interfaces than the guest has interrupts for.
    #[error("the pod has {0} network interfaces; a VM takes at most {MAX_INTERFACES}")]
    TooMany(usize),
    /// Another VM is there.
    #[error(
        "interface {interface} of network namespace {path} is another VM's already, by its tap {tap}: a VM has a namespace's \
         network to itself; give this container a namespace of its own, or end the other first"
    )]
    InUse {
        /// As it was given.
        path: PathBuf,
        /// The pod's interface.
        interface: String,
        /// What its packets are sent to.
        tap: String,
    },
    /// Something that a VM cannot have.
    #[error("the pod's network cannot be given to a VM: {0}")]
    Unsupported(String),
    /// No taps on this node.
    #[error("cannot open /dev/net/tun: {0}; load the kernel module tun")]
    NoTun(io::Error),
    /// The kernel lacks traffic control.
    #[error(
        "cannot redirect the pod's packets: {0}; the node's kernel needs sch_ingress, cls_u32 and act_mirred"
    )]
    NoRedirect(io::Error),
    /// The kernel refused.
    #[error("cannot {what} in the pod's network namespace: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// Ours.
    #[error("the thread in the pod's network namespace panicked")]
    Panicked,
}

impl From<NetworkError> for Error {
    fn from(error: NetworkError) -> Self {
        let kind = match &error {
            NetworkError::Missing { .. } => Kind::NotFound,
            NetworkError::NotANamespace { .. } | NetworkError::HostNetwork { .. } => {
                Kind::InvalidArgument
            }
            NetworkError::InUse { .. } => Kind::FailedPrecondition,
            NetworkError::TooMany(_) => Kind::ResourceExhausted,
            NetworkError::Unsupported(_) => Kind::Unimplemented,
            NetworkError::NoTun(_) | NetworkError::NoRedirect(_) => Kind::Unavailable,
            NetworkError::Host { .. } | NetworkError::Panicked => Kind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

/// The node has refused `what`.
pub(super) fn failed(what: impl Into<String>, source: std::io::Error) -> NetworkError {
    NetworkError::Host {
        what: what.into(),
        source,
    }
}
