//! How an export numbers its files for the guest, and what that costs for files the guest has forgotten.
//!
//! Left to itself the library counts files up and keeps each one's number for as long as it lives: memory
//! for every file there ever was. It can use the host's inode numbers instead and keep nothing, but
//! then it tells at most 255 pairs of device and mount apart and fails beyond. So an export takes the host's
//! numbers where it is one file system by itself, which container root file systems and most volumes are, and
//! counts where mounts may appear below it later or one mount has many devices.
//!
//! The library's host numbers have 56 bits, of which a node id has room for [`INODE_BITS`]. Nearly all fit as
//! they are; a table holds the others for as long as the guest knows them.
//!
//! Trusts `/proc/thread-self/mountinfo`. Numbers from the guest are hostile.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::abi::fuse_abi::ROOT_ID;

use super::errno;
use crate::share::GROWING;

/// Bits of a node id that are the export's own: a million million files a mount.
pub(super) const INODE_BITS: u32 = 40;
/// The library's host numbers: (device and mount, counted from 1) in bits 47 to 54, the inode number below.
const HOST_BITS: u32 = 47;
const FIRST_DEVICE: u64 = 1 << HOST_BITS;
/// Set in the numbers that are in the table.
const TABLED: u64 = 1 << (INODE_BITS - 1);
/// The table is cleaned when it has twice the entries that were in use the last time, or this many.
const CLEAN_AT: usize = 1024;

/// An export's numbering.
pub(super) enum Numbers {
    /// The library's own count.
    Counted,
    /// The host's inode numbers.
    Host(Mutex<Table>),
}

/// The numbers that do not fit, both ways.
pub(super) struct Table {
    by_number: HashMap<u64, u64>,
    by_inode: HashMap<u64, u64>,
    next: u64,
    clean_at: usize,
}

impl Numbers {
    /// The numbering for what is mounted at `directory`.
    pub(super) fn of_mount(directory: &Path) -> Self {
        let alone = fs::read("/proc/thread-self/mountinfo")
            .is_ok_and(|table| stands_alone(&String::from_utf8_lossy(&table), directory));
        if alone { Self::host() } else { Self::Counted }
    }

    pub(super) fn host() -> Self {
        Self::Host(Mutex::new(Table {
            by_number: HashMap::new(),
            by_inode: HashMap::new(),
            next: TABLED,
            clean_at: CLEAN_AT,
        }))
    }

    /// Whether the library is to use the host's numbers.
    pub(super) fn are_the_hosts(&self) -> bool {
        matches!(self, Self::Host(_))
    }

    /// The part of a node id for an inode of the library. `lives` tells whether the library still has an
    /// inode.
    ///
    /// # Errors
    /// `ENFILE` when there is no number left.
    pub(super) fn to_guest(&self, inode: u64, lives: impl Fn(u64) -> bool) -> io::Result<u64> {
        let Self::Host(table) = self else {
            return (inode >> INODE_BITS == 0)
                .then_some(inode)
                .ok_or_else(|| errno(libc::ENFILE));
        };
        if inode == ROOT_ID {
            return Ok(ROOT_ID);
        }
        match inode.checked_sub(FIRST_DEVICE) {
            // The export's top is known as ROOT_ID, so another file may have the same number of its own.
            Some(number) if number < TABLED && number > ROOT_ID => Ok(number),
            _ => lock(table).number(inode, lives),
        }
    }

    /// The library's inode for that part of a node id.
    ///
    /// # Errors
    /// `EBADF` for a number the guest was not given, as far as that shows here.
    pub(super) fn inode(&self, number: u64) -> io::Result<u64> {
        let Self::Host(table) = self else {
            return Ok(number);
        };
        if number == ROOT_ID {
            return Ok(ROOT_ID);
        }
        if number < TABLED {
            return Ok(FIRST_DEVICE + number);
        }
        let known = lock(table).by_number.get(&number).copied();
        known.ok_or_else(|| errno(libc::EBADF))
    }
}

impl Table {
    fn number(&mut self, inode: u64, lives: impl Fn(u64) -> bool) -> io::Result<u64> {
        if let Some(number) = self.by_inode.get(&inode) {
            return Ok(*number);
        }
        if self.by_inode.len() >= self.clean_at {
            self.by_inode.retain(|inode, _| lives(*inode));
            let kept = &self.by_inode;
            self.by_number.retain(|_, inode| kept.contains_key(inode));
            self.clean_at = CLEAN_AT.max(2 * self.by_inode.len());
        }
        let number = self.next;
        if number >> INODE_BITS != 0 {
            return Err(errno(libc::ENFILE));
        }
        self.next += 1;
        self.by_inode.insert(inode, number);
        self.by_number.insert(number, inode);
        Ok(number)
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether `directory` is a mount by itself (proc_pid_mountinfo(5)): nothing is mounted below it, nothing
/// propagates into it, and its files have few devices. False when in doubt.
fn stands_alone(mountinfo: &str, directory: &Path) -> bool {
    let Some(directory) = directory.to_str() else {
        return false;
    };
    if directory.ends_with(GROWING) {
        return false;
    }
    let mut alone = false;
    for line in mountinfo.lines() {
        let mut fields = line.split(' ').skip(4);
        let Some(point) = fields.next() else {
            return false;
        };
        let Some(below) = point.strip_prefix(directory) else {
            continue;
        };
        if below.starts_with('/') {
            return false;
        }
        if below.is_empty() {
            let mut optional = fields.by_ref().skip(1).take_while(|field| *field != "-");
            let fixed =
                !optional.any(|field| field.starts_with("master:") || field.starts_with("shared:"));
            // A subvolume of btrfs is a device of its own.
            alone = fixed && fields.next().is_some_and(|kind| kind != "btrfs");
        }
    }
    alone
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &str = "\
21 1 0:20 / / rw - tmpfs none ro
22 21 0:21 / /shared rw - tmpfs none ro
23 22 8:1 /x /shared/c1/rootfs rw,nosuid - overlay overlay rw
24 22 8:1 /y /shared/tree rw,nosuid - ext4 /dev/sda1 rw
25 24 8:2 / /shared/tree/sub rw,nosuid - ext4 /dev/sda2 rw
26 22 8:1 /z /shared/slave rw,nosuid master:7 - ext4 /dev/sda1 rw
27 22 0:40 / /shared/sub rw,nosuid - btrfs /dev/sdb rw
28 22 8:1 /z /shared/c1/rootfs2 rw,nosuid - ext4 /dev/sda1 rw
29 22 8:1 /z /shared/.volumes/1 rw,nosuid - ext4 /dev/sda1 rw
30 22 8:1 /z /shared/.volumes/2.grows rw,nosuid - ext4 /dev/sda1 rw
broken
";

    #[test]
    fn only_a_mount_that_stays_by_itself_takes_the_hosts_numbers() {
        let alone = |path: &str| {
            let table = TABLE.replace("broken\n", "");
            stands_alone(&table, Path::new(path))
        };
        assert!(alone("/shared/c1/rootfs"), "a neighbour's name goes on");
        assert!(alone("/shared/c1/rootfs2"));
        assert!(!alone("/shared/tree"), "has a mount below");
        assert!(alone("/shared/tree/sub"));
        assert!(!alone("/shared/slave"), "mounts may appear");
        assert!(!alone("/shared/sub"), "has many devices");
        assert!(!alone("/shared/none"));
        assert!(alone("/shared/.volumes/1"));
        assert!(!alone("/shared/.volumes/2.grows"), "mounts will come");
        assert!(!alone("/shared"));
        assert!(!stands_alone(TABLE, Path::new("/shared/c1/rootfs")));
    }

    #[test]
    fn numbers_that_do_not_fit_are_kept_only_while_they_live() {
        let numbers = Numbers::host();
        let wide = |n: u64| FIRST_DEVICE + TABLED + n;
        for n in 0..10_000 {
            // The guest forgets each as soon as it has the next.
            let number = numbers
                .to_guest(wide(n), |inode| inode == wide(n - 1))
                .unwrap();
            assert_eq!(numbers.inode(number).unwrap(), wide(n));
            assert_eq!(numbers.to_guest(wide(n), |_| false).unwrap(), number);
        }
        let Numbers::Host(table) = &numbers else {
            unreachable!()
        };
        let table = lock(table);
        assert!(table.by_inode.len() <= CLEAN_AT);
        assert_eq!(table.by_inode.len(), table.by_number.len());
    }

    #[test]
    fn numbers_that_were_never_given_are_refused() {
        let numbers = Numbers::host();
        let error = numbers.inode(TABLED + 5).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        assert!(
            Numbers::Counted
                .to_guest(1 << INODE_BITS, |_| true)
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn every_inode_has_a_number_of_its_own(
            inodes in prop::collection::hash_set((0u64..3, 0u64..1 << HOST_BITS, 0u32..41), 1..200)
        ) {
            for numbers in [Numbers::host(), Numbers::Counted] {
                let mut seen = HashMap::new();
                for (device, inode, shift) in &inodes {
                    let inode = if numbers.are_the_hosts() {
                        ((device + 1) << HOST_BITS) + (inode >> shift)
                    } else {
                        (inode >> shift) & ((1 << INODE_BITS) - 1)
                    };
                    let number = numbers.to_guest(inode, |_| true).unwrap();
                    prop_assert_eq!(number >> INODE_BITS, 0);
                    prop_assert_eq!(numbers.inode(number).unwrap(), inode);
                    prop_assert_eq!(*seen.entry(number).or_insert(inode), inode);
                    prop_assert!(number != ROOT_ID || inode == ROOT_ID);
                }
            }
        }
    }
}
