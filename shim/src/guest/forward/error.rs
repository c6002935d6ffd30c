//! Why ports cannot be forwarded.

use std::io;

use crate::node::network::NetworkError;

/// Why ports of a pod cannot be forwarded. The pod itself is none the worse for it.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// No listener.
    #[error("cannot listen in the pod's network namespace: {0}")]
    Listen(io::Error),
    /// The kernel refused.
    #[error(
        "cannot {step}: {source}; forwarding needs Linux 5.9 with CONFIG_BPF_SYSCALL and CONFIG_BPF_STREAM_PARSER, \
         and CAP_SYS_ADMIN for containerd's shims"
    )]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// What it says.
        source: io::Error,
    },
}
