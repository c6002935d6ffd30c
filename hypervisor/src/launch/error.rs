//! Why no VMM was started.

use std::io;
use std::path::PathBuf;

use super::child::Stage;

/// Why no VMM was started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The binary cannot be opened.
    #[error("cannot open the VMM binary {}: {source}; install brig-vmm there or name another path in Brig's configuration", path.display())]
    Binary {
        /// Where it was looked for.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The kernel does not let us make the namespaces.
    #[error(
        "cannot make the VMM's namespaces: {source}; user namespaces must be allowed: set the sysctl user.max_user_namespaces (now {limit}) and its siblings user.max_{{mnt,pid,ipc,uts}}_namespaces above zero on this node"
    )]
    Namespaces {
        /// `/proc/sys/user/max_user_namespaces`, or "unknown".
        limit: String,
        /// What `clone3` said.
        source: io::Error,
    },
    /// The pod's network namespace cannot be entered.
    #[error("cannot enter the pod's network namespace: {0}")]
    NetworkNamespace(#[source] io::Error),
    /// The VMM cannot be put into the pod's cgroup.
    #[error(
        "cannot start the VMM in the pod's cgroup: {0}; the cgroup must exist, be a leaf and allow another process"
    )]
    Cgroup(#[source] io::Error),
    /// An id map or a limit could not be set from outside.
    #[error("cannot set {what} of the VMM: {source}")]
    Setup {
        /// What was being set.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The child failed between its birth and its `execve`.
    #[error("the VMM failed to start: {stage}: {source}")]
    Child {
        /// What it was doing.
        stage: Stage,
        /// What the kernel said.
        source: io::Error,
    },
    /// brig-vmm ran but could not close its jail.
    #[error("the VMM could not close its jail: {0}")]
    Jail(String),
    /// A pipe, socket or thread could not be made.
    #[error("cannot prepare the start of the VMM: {0}")]
    Prepare(#[source] io::Error),
}
