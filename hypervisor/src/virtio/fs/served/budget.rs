//! Keeps the file server from taking the last descriptors of the process.
//!
//! The guest decides how many inodes it knows, and each is a descriptor. At `RLIMIT_NOFILE` the control
//! socket could not deliver descriptors any more and the VMM would fail. So the guest gets `ENFILE` a
//! little earlier. Before that, someone is told: the guest holds most inodes only as cache, and lets go of
//! them when its agent asks its kernel to.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::errno;

/// Descriptors left to the rest of the VMM.
const RESERVE: u64 = 512;
/// The kernel is asked once in so many openings; less than [`RESERVE`] by far.
const INTERVAL: u32 = 64;
/// While the pressure lasts, it is told again once in so many openings.
const REMINDER: u32 = 64 * INTERVAL;

/// Called on the file server's thread when its descriptors run short.
pub(super) type OnPressure = Box<dyn Fn() + Send + Sync>;

/// The file server's share of the descriptor table.
pub(super) struct Budget {
    /// First number the server may not take.
    end: u64,
    /// Three quarters of it: where the pressure begins.
    high: u64,
    on_pressure: OnceLock<OnPressure>,
    /// Openings until pressure is told again.
    reminder: AtomicU32,
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
        // A limit that is tiny anyhow is shared by halves.
        let end = limit.saturating_sub(RESERVE).max(limit / 2);
        Ok(Self {
            end,
            high: end / 4 * 3,
            on_pressure: OnceLock::new(),
            reminder: AtomicU32::new(0),
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
        // The kernel hands out the lowest number there is: while `high` is free, fewer are in use.
        let used = if self.is_free(self.high)? {
            0
        } else {
            open_descriptors()?
        };
        self.judge(used)
    }

    fn judge(&self, used: u64) -> io::Result<()> {
        if used < self.high {
            self.reminder.store(0, Ordering::Relaxed);
            return Ok(());
        }
        self.tell();
        if used < self.end {
            return Ok(());
        }
        // Ask again next time: the guest may have forgotten some.
        self.openings.store(0, Ordering::Relaxed);
        Err(errno(libc::ENFILE))
    }

    /// Sets who is told of pressure; the first one stays.
    pub(super) fn on_pressure(&self, told: OnPressure) {
        let _ = self.on_pressure.set(told);
    }

    /// Called once in [`INTERVAL`] openings, by one thread.
    fn tell(&self) {
        let left = self.reminder.load(Ordering::Relaxed);
        if left > 0 {
            self.reminder
                .store(left.saturating_sub(INTERVAL), Ordering::Relaxed);
            return;
        }
        self.reminder.store(REMINDER, Ordering::Relaxed);
        if let Some(told) = self.on_pressure.get() {
            told();
        }
    }

    fn is_free(&self, number: u64) -> io::Result<bool> {
        let from = RawFd::try_from(number).unwrap_or(RawFd::MAX);
        // SAFETY: open for as long as `self`.
        let spare = unsafe { BorrowedFd::borrow_raw(self.spare.as_raw_fd()) };
        let raw = match fcntl(spare, FcntlArg::F_DUPFD_CLOEXEC(from)) {
            Ok(raw) => raw,
            Err(Errno::EMFILE) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        // SAFETY: fcntl has just made this descriptor.
        drop(unsafe { OwnedFd::from_raw_fd(raw) });
        Ok(raw == from)
    }
}

/// How many descriptors the process has.
fn open_descriptors() -> io::Result<u64> {
    let directory = "/proc/self/fd";
    // Linux 6.2 tells the number as the directory's size; before, it must be listed.
    let size = fs::metadata(directory)?.len();
    if size > 0 {
        return Ok(size);
    }
    Ok(fs::read_dir(directory)?.map(|_| 1).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_counted() {
        let before = open_descriptors().unwrap();
        let files: Vec<_> = (0..100)
            .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
            .collect();
        let with = open_descriptors().unwrap();
        // Other tests open and close some at the same time.
        assert!(with.abs_diff(before + 100) < 60, "{before} {with}");
        drop(files);
    }

    #[test]
    fn the_guest_is_refused_before_the_table_is_full() {
        // Whatever this process has open is below the end of its own budget and above that of none.
        let own = Budget::new().unwrap();
        for _ in 0..1000 {
            own.admit().unwrap();
        }
        let none = Budget::of(2).unwrap();
        for _ in 0..3 {
            assert_eq!(none.admit().unwrap_err().raw_os_error(), Some(libc::ENFILE));
        }
    }

    #[test]
    fn pressure_is_told_before_the_end_and_not_each_time() {
        let budget = Budget::of(10_000).unwrap();
        let told = std::sync::Arc::new(AtomicU32::new(0));
        let counter = std::sync::Arc::clone(&told);
        budget.on_pressure(Box::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        let told = || told.load(Ordering::SeqCst);
        budget.judge(7000).unwrap();
        assert_eq!(told(), 0);
        budget.judge(7200).unwrap();
        assert_eq!(told(), 1);
        for _ in 0..REMINDER / INTERVAL {
            budget.judge(8000).unwrap();
        }
        assert_eq!(told(), 1, "not each time");
        budget.judge(8000).unwrap();
        assert_eq!(told(), 2, "but again when it lasts");
        budget.judge(100).unwrap();
        budget.judge(9400).unwrap();
        assert_eq!(told(), 3, "and when it comes back");
        assert!(budget.judge(9488).is_err());
    }

    #[test]
    fn some_numbers_are_always_left_to_the_vmm() {
        assert_eq!(Budget::of(10_000).unwrap().end, 10_000 - RESERVE);
        assert_eq!(Budget::of(100).unwrap().end, 50);
    }
}
