//! What the guest has open in one mount, by the handles it was given.
//!
//! A handle counts only together with the file it was given for: the guest may mix them up on purpose.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use rustix::fs::{OFlags, fcntl_setfl};

use super::super::errno;
use crate::sync::lock;

/// An open file or directory.
pub(in super::super) struct Open {
    pub(in super::super) file: File,
    node: u64,
    /// Whether the host's description appends. The guest's kernel may change its own description's flag,
    /// and writes cached pages back through any, each at its place.
    appends: Mutex<bool>,
    /// Flags of the host's description but for that.
    flags: OFlags,
    /// Held where the description's position matters.
    pub(super) position: Mutex<()>,
}

impl Open {
    pub(super) fn new(file: File, node: u64, flags: OFlags) -> Self {
        Self {
            file,
            node,
            appends: Mutex::new(flags.contains(OFlags::APPEND)),
            flags: flags - OFlags::APPEND,
            position: Mutex::new(()),
        }
    }

    /// Has the next write append, or not, for as long as the result lives.
    pub(super) fn append(&self, wanted: bool) -> io::Result<impl Drop> {
        let mut appends = lock(&self.appends);
        if *appends != wanted {
            let mut flags = self.flags;
            flags.set(OFlags::APPEND, wanted);
            fcntl_setfl(&self.file, flags)?;
            *appends = wanted;
        }
        Ok(appends)
    }
}

struct Table {
    open: HashMap<u64, Arc<Open>>,
    next: u64,
}

/// The table of them.
pub(super) struct Opens(Mutex<Table>);

impl Opens {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Table {
            open: HashMap::new(),
            next: 1,
        }))
    }

    pub(super) fn insert(&self, open: Open) -> u64 {
        let mut table = lock(&self.0);
        let handle = table.next;
        table.next += 1;
        table.open.insert(handle, Arc::new(open));
        handle
    }

    /// # Errors
    /// `EBADF` for a handle that the guest has not, or has for another file.
    pub(super) fn get(&self, handle: u64, node: u64) -> io::Result<Arc<Open>> {
        let table = lock(&self.0);
        let open = table.open.get(&handle).filter(|open| open.node == node);
        open.cloned().ok_or_else(|| errno(libc::EBADF))
    }

    /// Whether the guest has anything open of a file.
    pub(super) fn has(&self, node: u64) -> bool {
        lock(&self.0).open.values().any(|open| open.node == node)
    }

    /// # Errors
    /// As [`Self::get`].
    pub(super) fn release(&self, handle: u64, node: u64) -> io::Result<()> {
        let mut table = lock(&self.0);
        if table.open.get(&handle).is_none_or(|open| open.node != node) {
            return Err(errno(libc::EBADF));
        }
        let gone = table.open.remove(&handle);
        drop(table);
        // Closed without the lock, if no other request uses it.
        drop(gone);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &str, flags: OFlags) -> Open {
        let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
        Open::new(file.into(), 7, flags)
    }

    #[test]
    fn a_handle_is_good_for_its_own_file_only() {
        let opens = Opens::new();
        let handle = opens.insert(open("/dev/null", OFlags::RDONLY));
        assert!(opens.get(handle, 7).is_ok());
        assert!(opens.get(handle, 8).is_err());
        assert!(opens.has(7) && !opens.has(8));
        assert!(opens.release(handle, 8).is_err());
        opens.release(handle, 7).unwrap();
        assert!(opens.get(handle, 7).is_err());
        assert!(!opens.has(7));
        assert!(opens.insert(open("/dev/null", OFlags::RDONLY)) > handle);
    }

    #[test]
    fn appending_is_switched_and_nothing_else_changes() {
        let open = open(
            "/dev/null",
            OFlags::RDWR | OFlags::APPEND | OFlags::NONBLOCK,
        );
        let appends = || {
            let flags = rustix::fs::fcntl_getfl(&open.file).unwrap();
            assert!(flags.contains(OFlags::NONBLOCK));
            flags.contains(OFlags::APPEND)
        };
        assert!(appends());
        drop(open.append(false).unwrap());
        assert!(!appends());
        drop(open.append(true).unwrap());
        assert!(appends());
    }
}
