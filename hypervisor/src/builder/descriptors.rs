//! The descriptors that came with a message, each to be taken once by whatever the message names it for.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit};

use super::error::StartError;
use crate::control::FdIndex;

/// Descriptors of a message, each taken once.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Those of one message.
    #[must_use]
    pub fn new(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors.into_iter().map(Some).collect())
    }

    /// Takes the descriptor that `what` names.
    ///
    /// # Errors
    /// If there is none with this index or it was taken before.
    pub fn take(&mut self, index: FdIndex, what: &str) -> Result<OwnedFd, StartError> {
        self.0.get_mut(index).and_then(Option::take).ok_or_else(|| {
            StartError::Invalid(format!(
                "{what}: the message has no descriptor {index}, or the VMM has as many open as it may have (max_files)"
            ))
        })
    }
}

/// Descriptors that this process may have open. To be asked before the filters are in force.
#[must_use]
pub fn limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft)
}

/// Bytes that this process may lock, if that is limited. To be asked likewise.
#[must_use]
pub fn lockable() -> Option<u64> {
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    (soft != nix::libc::RLIM_INFINITY).then_some(soft)
}

/// Whether the process can open `count` more descriptors: a device that is half made when they run out would
/// fail in the guest's hands.
///
/// # Errors
/// [`StartError::Limit`] with the numbers.
pub fn room_for(count: usize, limit: u64, what: &str) -> Result<(), StartError> {
    let copy = |_| {
        // SAFETY: the control socket is open for as long as the process serves it.
        let any = unsafe { BorrowedFd::borrow_raw(crate::control::CONTROL_FD) };
        let raw = fcntl(any, FcntlArg::F_DUPFD_CLOEXEC(0))?;
        // SAFETY: fcntl has just made this descriptor for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    };
    let held: nix::Result<Vec<OwnedFd>> = (0..count).map(copy).collect();
    match held {
        Err(nix::Error::EMFILE) => Err(StartError::Limit(format!(
            "{what} needs {count} descriptors, but the VMM has nearly all open that it may have, {limit}: raise max_files"
        ))),
        // Whatever else is wrong will be told by what is about to be made.
        Ok(_) | Err(_) => Ok(()),
    }
}
