//! Enters a network namespace, on a thread of its own that ends afterwards: a thread cannot be relied upon to
//! come back.
//!
//! Trusted: nothing about the path; the host's own namespace is refused before anything is done in it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::sched::{CloneFlags, setns};

use super::error::{NetworkError, failed};

mod requests {
    // `linux/nsfs.h`.
    nix::ioctl_none!(namespace_type, 0xb7, 0x3);
}

/// A pod's network namespace.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// Opens the namespace at `path`.
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        let not_one = |source| NetworkError::NotANamespace {
            path: path.to_owned(),
            source,
        };
        // Non-blocking, because the path might be a FIFO's.
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => NetworkError::Missing {
                path: path.to_owned(),
            },
            _ => not_one(error),
        })?;
        // SAFETY: the request takes no argument, and any descriptor may be asked.
        let kind = unsafe { requests::namespace_type(file.as_raw_fd()) }
            .map_err(|error| not_one(error.into()))?;
        if kind != libc::CLONE_NEWNET {
            return Err(not_one(io::ErrorKind::InvalidInput.into()));
        }
        if is_hosts(&file).map_err(not_one)? {
            return Err(NetworkError::HostNetwork {
                path: path.to_owned(),
            });
        }
        Ok(Self { file })
    }

    /// Runs `work` on a thread inside the namespace.
    pub fn run<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, NetworkError> + Send,
    ) -> Result<T, NetworkError> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("pod-network".to_owned())
                .spawn_scoped(scope, || {
                    setns(&self.file, CloneFlags::CLONE_NEWNET)
                        .map_err(|error| failed("be", error.into()))?;
                    work()
                })
                .map_err(|error| failed("start a thread", error))?;
            thread.join().unwrap_or(Err(NetworkError::Panicked))
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether this is the node's own namespace: the one the shim was started in, which is containerd's, or
/// init's.
fn is_hosts(file: &File) -> io::Result<bool> {
    let given = file.metadata()?;
    for own in ["/proc/self/ns/net", "/proc/1/ns/net"] {
        let own = match std::fs::metadata(own) {
            Ok(own) => own,
            // Who may not look at init (inside another container) has no other way to its namespace either.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
            Err(error) => return Err(error),
        };
        if (own.dev(), own.ino()) == (given.dev(), given.ino()) {
            return Ok(true);
        }
    }
    Ok(false)
}
