//! The umask that new files are made with. The host's file system applies it where the directory has no default
//! ACL, which only it knows: neither the guest's kernel nor this server may take bits away before.
//!
//! A umask belongs to what the kernel calls a view of the file system, which the threads of a process share. A helper
//! takes one of its own before it sets one. Each thread remembers what it set last; nearly always that is what is wanted
//! again.

use std::cell::Cell;
use std::io;

use rustix::fs::Mode;
use rustix::thread::{UnshareFlags, unshare_unsafe};

thread_local! {
    static CURRENT: Cell<Option<u32>> = const { Cell::new(None) };
    /// The view is another thread's too, who sets its umask.
    static SHARED: Cell<bool> = const { Cell::new(false) };
}

/// This thread has been started by one that makes files.
pub(super) fn inherited() {
    SHARED.set(true);
}

/// Has this thread's next files be made with `mask`; bits beyond the permissions do not count.
///
/// # Errors
/// If the host gives no view of the thread's own.
pub(super) fn set(mask: u32) -> io::Result<()> {
    let mask = mask & 0o777;
    if SHARED.get() {
        // SAFETY: the working directory, the root and the umask become this thread's own; no descriptor does.
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        SHARED.set(false);
    }
    if CURRENT.replace(Some(mask)) != Some(mask) {
        rustix::process::umask(Mode::from_raw_mode(mask));
    }
    Ok(())
}
