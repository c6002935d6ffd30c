//! The umask that new files are made with. The host's file system applies it where the directory has no default
//! ACL, which only it knows: neither the guest's kernel nor this server may take bits away before.
//!
//! A umask belongs to the process's view of the file system, and the file server's thread is the only one that makes
//! files. So it remembers what it set last; nearly always that is what is wanted again.

use std::cell::Cell;

use rustix::fs::Mode;

thread_local! {
    static CURRENT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Has this thread's next files be made with `mask`; bits beyond the permissions do not count.
pub(super) fn set(mask: u32) {
    let mask = mask & 0o777;
    CURRENT.with(|current| {
        if current.replace(Some(mask)) != Some(mask) {
            rustix::process::umask(Mode::from_raw_mode(mask));
        }
    });
}
