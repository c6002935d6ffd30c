//! A host descriptor at the end of a stream, used without blocking.
//!
//! The shim hands over FIFOs, pipes, sockets, regular files and devices like `/dev/null`. What
//! epoll can wait for is waited for edge-triggered: readiness is remembered until the descriptor
//! says `EAGAIN`, so a stream that waits for credit costs no wake-ups. Files that epoll refuses
//! are always ready.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::stat::{SFlag, fstat};
use vmm_sys_util::epoll::EventSet;

use crate::virtio::Sources;

/// One direction of a stream's host end.
#[derive(Debug)]
pub struct Endpoint {
    fd: OwnedFd,
    waited_for: bool,
    socket: bool,
    /// The last operation was not refused with `EAGAIN`, or an event came since.
    pub ready: bool,
}

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Host to guest: the descriptor is read.
    Input,
    /// Guest to host: the descriptor is written.
    Output,
}

impl Endpoint {
    /// Makes the descriptor non-blocking and waits for it under `token`.
    ///
    /// An input that can be waited for is read only after an event: a FIFO that no writer has
    /// opened yet would read as ended.
    ///
    /// # Errors
    /// If the descriptor cannot be examined, changed or waited for.
    pub fn new(
        fd: OwnedFd,
        direction: Direction,
        token: u32,
        sources: &mut Sources<'_>,
    ) -> io::Result<Self> {
        let kind = SFlag::from_bits_truncate(fstat(&fd)?.st_mode) & SFlag::S_IFMT;
        let socket = kind == SFlag::S_IFSOCK;
        let events = match direction {
            Direction::Input => EventSet::IN | EventSet::READ_HANG_UP,
            Direction::Output => EventSet::OUT,
        };
        let waited_for = match sources.add(fd.as_fd(), token, events | EventSet::EDGE_TRIGGERED) {
            Ok(()) => true,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => false,
            Err(error) => return Err(error),
        };
        let endpoint = Self {
            fd,
            waited_for,
            socket,
            ready: !waited_for || direction == Direction::Output,
        };
        if waited_for && let Err(error) = endpoint.set_nonblocking() {
            endpoint.release(sources);
            return Err(error);
        }
        Ok(endpoint)
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(&self.fd, FcntlArg::F_GETFL)?);
        if !flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&self.fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(())
    }

    /// Ends this direction and closes the descriptor. A socket is also shut down, since another
    /// descriptor of it may stay open for the other direction.
    pub fn finish(self, direction: Direction, sources: &mut Sources<'_>) {
        if self.socket {
            let how = match direction {
                Direction::Input => Shutdown::Read,
                Direction::Output => Shutdown::Write,
            };
            // Fails only if the peer is gone already.
            let _ = shutdown(self.fd.as_raw_fd(), how);
        }
        self.release(sources);
    }

    /// Closes the descriptor. It has to leave the epoll set first: the shim may hold a copy, which
    /// would keep it there.
    pub fn release(self, sources: &mut Sources<'_>) {
        if self.waited_for {
            // It was added in `new`; if the epoll set is gone there is nothing to remove.
            let _ = sources.remove(self.fd.as_fd());
        }
    }
}

/// What an operation on an endpoint led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// This many bytes were moved.
    Moved(usize),
    /// Nothing now; an event will tell.
    Blocked,
    /// End of file, or an error that ends the direction.
    Ended,
}

impl Endpoint {
    /// Runs one read or write and remembers whether the descriptor has had enough.
    pub fn attempt(
        &mut self,
        mut operation: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> Outcome {
        loop {
            match operation(self.fd.as_fd()) {
                Ok(0) => return Outcome::Ended,
                Ok(count) => return Outcome::Moved(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.ready = false;
                    return Outcome::Blocked;
                }
                Err(_) => return Outcome::Ended,
            }
        }
    }
}
