//! Descriptors that the async thread waits on: the one place where they are registered.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Watches a descriptor, which must be non-blocking if it is to be read or written through the watch.
///
/// # Errors
/// What epoll says, e.g. for a regular file.
///
/// # Panics
/// Outside a runtime.
pub fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by the returned value, so it stays open and the same until
    // it is deregistered; an OwnedFd's descriptor cannot be exchanged through a shared reference, and
    // nobody here takes an exclusive one.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(|error| error.into_parts().1)
}
