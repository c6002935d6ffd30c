//! Keeps the file server from taking the last descriptors of the process.
//!
//! The guest decides how many inodes it knows, and each is a descriptor. At `RLIMIT_NOFILE` the control
//! socket could not deliver descriptors any more and the VMM would fail. So the guest gets `ENFILE` a
//! little earlier.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::{FcntlArg, fcntl};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::errno;

/// Descriptors left to the rest of the VMM.
const RESERVE: u64 = 512;
/// The kernel is asked once in so many openings; less than [`RESERVE`] by far.
const INTERVAL: u32 = 64;

/// The file server's share of the descriptor table.
pub(super) struct Budget {
    /// First number the server may not take.
    end: u64,
    /// Something to duplicate.
    spare: EventFd,
    openings: AtomicU32,
}

impl Budget {
    /// What `RLIMIT_NOFILE` leaves.
    pub(super) fn new() -> io::Result<Self> {
        let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
        Self::of(soft)
    }

    fn of(limit: u64) -> io::Result<Self> {
        Ok(Self {
            // A limit that is tiny anyhow is shared by halves.
            end: limit.saturating_sub(RESERVE).max(limit / 2),
            spare: EventFd::new(EFD_NONBLOCK)?,
            openings: AtomicU32::new(0),
        })
    }

    /// To be called before anything is opened for the guest.
    ///
    /// # Errors
    /// `ENFILE` at the end of the budget.
    pub(super) fn admit(&self) -> io::Result<()> {
        if !self
            .openings
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(INTERVAL)
        {
            return Ok(());
        }
        let lowest = self.lowest_free()?;
        if u64::try_from(lowest.as_raw_fd()).is_ok_and(|number| number < self.end) {
            return Ok(());
        }
        // Ask again next time: the guest may have forgotten some.
        self.openings.store(0, Ordering::Relaxed);
        Err(errno(libc::ENFILE))
    }

    /// The kernel hands out the lowest number there is: how far it is tells how full the table is.
    fn lowest_free(&self) -> io::Result<OwnedFd> {
        // SAFETY: open for as long as `self`.
        let spare = unsafe { BorrowedFd::borrow_raw(self.spare.as_raw_fd()) };
        let raw: RawFd = fcntl(spare, FcntlArg::F_DUPFD_CLOEXEC(0))?;
        // SAFETY: fcntl has just made this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_refused_before_the_table_is_full() {
        // Whatever this process has open is below the end of a generous budget and above that of none.
        let generous = Budget::of(1 << 20).unwrap();
        for _ in 0..1000 {
            generous.admit().unwrap();
        }
        let none = Budget::of(2).unwrap();
        for _ in 0..3 {
            assert_eq!(none.admit().unwrap_err().raw_os_error(), Some(libc::ENFILE));
        }
    }

    #[test]
    fn some_numbers_are_always_left_to_the_vmm() {
        assert_eq!(Budget::of(10_000).unwrap().end, 10_000 - RESERVE);
        assert_eq!(Budget::of(100).unwrap().end, 50);
    }
}
