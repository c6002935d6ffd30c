//! Files that are open because they are read or written, where the guest opens none and names them by their numbers.
//!
//! Few at a time, the last ones used. What is open for writing is closed as soon as no requests come, so that the mount
//! can be made read-only; a file that the guest has forgotten is closed with that.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use rustix::fs::OFlags;

use super::NO_HANDLE;
use super::open::Open;
use crate::sync::lock;

/// Of one mount.
const MOST: usize = 32;

struct Held {
    open: Arc<Open>,
    writable: bool,
    used: u64,
}

#[derive(Default)]
struct Table {
    held: HashMap<u64, Held>,
    /// Counts uses.
    now: u64,
    /// Counts what was opened for writing, which on an overlay may be another file than what was read before.
    changes: u64,
}

impl Table {
    fn used(&mut self, number: u64, writes: bool) -> Option<Arc<Open>> {
        self.now += 1;
        let held = self.held.get_mut(&number);
        let held = held.filter(|held| held.writable || !writes)?;
        held.used = self.now;
        Some(Arc::clone(&held.open))
    }

    /// What has to be closed for that.
    fn put(&mut self, number: u64, open: &Arc<Open>, writable: bool) -> [Option<Held>; 2] {
        self.now += 1;
        self.changes += u64::from(writable);
        let held = Held {
            open: Arc::clone(open),
            writable,
            used: self.now,
        };
        let replaced = self.held.insert(number, held);
        let oldest = (self.held.len() > MOST)
            .then(|| self.held.iter().min_by_key(|(_, held)| held.used))
            .flatten()
            .map(|(number, _)| *number);
        [
            replaced,
            oldest.and_then(|oldest| self.held.remove(&oldest)),
        ]
    }
}

/// The table of them.
#[derive(Default)]
pub(super) struct Files(Mutex<Table>);

impl Files {
    /// The file of this number, opened by `open` if it is not, to be read, or written too.
    pub(super) fn get(
        &self,
        number: u64,
        writes: bool,
        open: impl FnOnce(OFlags) -> io::Result<Open>,
    ) -> io::Result<Arc<Open>> {
        let changes = {
            let mut table = lock(&self.0);
            if let Some(open) = table.used(number, writes) {
                return Ok(open);
            }
            table.changes
        };
        // Without the lock: it may take long.
        let access = if writes { OFlags::RDWR } else { OFlags::RDONLY };
        let open = Arc::new(open(access)?);
        let mut table = lock(&self.0);
        // Another thread may have opened it for writing meanwhile.
        let kept = (writes || table.changes == changes).then(|| table.put(number, &open, writes));
        drop(table);
        // Closed without the lock.
        drop(kept);
        Ok(open)
    }

    /// A file that was made open, for reading and writing; the handle for the answer.
    pub(super) fn put(&self, number: u64, open: Open) -> u64 {
        let gone = lock(&self.0).put(number, &Arc::new(open), true);
        drop(gone);
        NO_HANDLE
    }

    /// The guest does not know it any more.
    pub(super) fn close(&self, number: u64) {
        let gone = lock(&self.0).held.remove(&number);
        drop(gone);
    }

    /// Closes what is open for writing.
    pub(super) fn close_writable(&self) {
        let gone: Vec<(u64, Held)> = lock(&self.0)
            .held
            .extract_if(|_, held| held.writable)
            .collect();
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(access: OFlags) -> io::Result<Open> {
        let file = rustix::fs::open("/dev/null", access, rustix::fs::Mode::empty())?;
        Ok(Open::new(file.into(), 7, access))
    }

    fn never(_: OFlags) -> io::Result<Open> {
        Err(io::ErrorKind::Other.into())
    }

    #[test]
    fn what_was_read_is_opened_anew_to_be_written_and_then_serves_both() {
        let files = Files::default();
        let read = files.get(7, false, open).unwrap();
        assert!(Arc::ptr_eq(&read, &files.get(7, false, never).unwrap()));
        assert!(files.get(7, true, never).is_err());
        let written = files.get(7, true, open).unwrap();
        assert!(Arc::ptr_eq(&written, &files.get(7, false, never).unwrap()));
        files.close(7);
        assert!(files.get(7, false, never).is_err());
    }

    #[test]
    fn what_was_opened_to_be_read_before_a_write_is_not_kept_after_it() {
        let files = Files::default();
        files
            .get(7, false, |access| {
                files.get(7, true, open)?;
                files.close_writable();
                open(access)
            })
            .unwrap();
        assert!(files.get(7, false, never).is_err());
    }

    #[test]
    fn few_are_open_and_none_for_writing_once_it_is_quiet() {
        let files = Files::default();
        for number in 0..1000 {
            files.get(number, number % 2 == 0, open).unwrap();
        }
        assert_eq!(lock(&files.0).held.len(), MOST);
        assert!(files.get(999, false, never).is_ok());
        files.close_writable();
        assert!(lock(&files.0).held.values().all(|held| !held.writable));
        assert!(files.get(999, false, never).is_ok());
    }
}
