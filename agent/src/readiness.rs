//! Readiness of descriptors that tokio has no type for (ptys, inotify, the helpers' sockets).
use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers `fd`, which must be non-blocking, with the runtime.
///
/// # Errors
/// Those of epoll_ctl(2).
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays open under the same number until it is dropped, and AsyncFd owns it
    // and deregisters it first.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
