//! The files of one mount that the guest knows, by the numbers it was given.
//!
//! Each is an `O_PATH` descriptor, so a number means the same file whatever happens to its names. A number is
//! given once: a file that was forgotten and found again gets another, and nothing is kept of it in between.
//! Numbers and counts from the guest are hostile.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use rustix::fs::FileType;

use super::super::errno;

/// Bits of a node id that are the mount's own: a million million files found in its life.
pub(in super::super) const NUMBER_BITS: u32 = 40;

/// Tells a file from all others as long as a descriptor of it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) device: u64,
    pub(super) inode: u64,
    /// The same file below two mounts is two: one may be read-only.
    pub(super) mount: u64,
}

/// A file that the guest knows.
pub(super) struct Node {
    pub(super) number: u64,
    /// `O_PATH`.
    pub(super) file: OwnedFd,
    pub(super) kind: FileType,
    pub(super) identity: Identity,
    /// It had set-id bits when it was looked at last.
    pub(super) set_id: AtomicBool,
    /// Odd: it has no `security.capability`, and nobody but the guest could give it one. Each time that it is given one
    /// makes the number larger, so that who has asked before does not say what is no longer so.
    pub(super) incapable: AtomicU32,
}

impl Node {
    /// It may have a `security.capability` from now on.
    pub(super) fn may_be_capable(&self) {
        let next = |number: u32| Some((number | 1).wrapping_add(1));
        // It never refuses.
        let _ = self
            .incapable
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, next);
    }
}

struct Known {
    node: Arc<Node>,
    /// How many answers have named it that the guest has not taken back.
    lookups: u64,
}

struct Table {
    known: HashMap<u64, Known>,
    numbers: HashMap<Identity, u64>,
    next: u64,
}

/// The table of them; its top is [`ROOT_ID`] and stays.
pub(super) struct Nodes(Mutex<Table>);

impl Nodes {
    pub(super) fn new(top: OwnedFd, kind: FileType, identity: Identity) -> Self {
        let nodes = Self(Mutex::new(Table {
            known: HashMap::new(),
            numbers: HashMap::new(),
            next: ROOT_ID,
        }));
        nodes.lock().insert(top, kind, identity);
        nodes
    }

    /// The table is consistent at each point where a panic could leave it.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// `EBADF` for a number that the guest has not, or not any more.
    pub(super) fn get(&self, number: u64) -> io::Result<Arc<Node>> {
        let table = self.lock();
        let known = table.known.get(&number);
        known
            .map(|known| Arc::clone(&known.node))
            .ok_or_else(|| errno(libc::EBADF))
    }

    pub(super) fn has(&self, number: u64) -> bool {
        self.lock().known.contains_key(&number)
    }

    /// The node of a file that an answer will name.
    ///
    /// # Errors
    /// `ENFILE` when there is no number left.
    pub(super) fn found(
        &self,
        file: OwnedFd,
        kind: FileType,
        identity: Identity,
    ) -> io::Result<Arc<Node>> {
        let mut table = self.lock();
        if let Some(number) = table.numbers.get(&identity).copied()
            && let Some(known) = table.known.get_mut(&number)
        {
            known.lookups = known.lookups.saturating_add(1);
            return Ok(Arc::clone(&known.node));
        }
        if table.next >> NUMBER_BITS != 0 {
            return Err(errno(libc::ENFILE));
        }
        Ok(table.insert(file, kind, identity))
    }

    /// One more answer names it.
    ///
    /// # Errors
    /// `ESTALE` if the guest has forgotten it meanwhile.
    pub(super) fn again(&self, node: &Node) -> io::Result<()> {
        let mut table = self.lock();
        let known = table.known.get_mut(&node.number);
        let known = known.ok_or_else(|| errno(libc::ESTALE))?;
        known.lookups = known.lookups.saturating_add(1);
        Ok(())
    }

    /// Takes back that many answers.
    pub(super) fn forget(&self, number: u64, count: u64) {
        if number == ROOT_ID {
            return;
        }
        let mut table = self.lock();
        let Some(known) = table.known.get_mut(&number) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups > 0 {
            return;
        }
        let gone = table.known.remove(&number);
        if let Some(gone) = &gone {
            table.numbers.remove(&gone.node.identity);
        }
        table.shrink();
        drop(table);
        // Its descriptor is closed without the lock.
        drop(gone);
    }

    /// A file of each device among them that can be opened.
    pub(super) fn of_each_device(&self) -> Vec<Arc<Node>> {
        let mut devices: HashMap<u64, Arc<Node>> = HashMap::new();
        for known in self.lock().known.values() {
            if matches!(known.node.kind, FileType::RegularFile | FileType::Directory) {
                devices
                    .entry(known.node.identity.device)
                    .or_insert_with(|| Arc::clone(&known.node));
            }
        }
        devices.into_values().collect()
    }
}

impl Table {
    fn insert(&mut self, file: OwnedFd, kind: FileType, identity: Identity) -> Arc<Node> {
        let number = self.next;
        self.next += 1;
        let node = Arc::new(Node {
            number,
            file,
            kind,
            identity,
            set_id: AtomicBool::new(false),
            incapable: AtomicU32::new(0),
        });
        self.numbers.insert(identity, number);
        self.known.insert(
            number,
            Known {
                node: Arc::clone(&node),
                lookups: 1,
            },
        );
        node
    }

    /// A guest that has walked a large tree and forgotten it gives its memory back.
    fn shrink(&mut self) {
        const SMALL: usize = 1024;
        let wanted = 2 * self.known.len().max(SMALL);
        if self.known.capacity() > 4 * wanted {
            self.known.shrink_to(wanted);
            self.numbers.shrink_to(wanted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity(inode: u64) -> Identity {
        Identity {
            device: 1,
            inode,
            mount: 1,
        }
    }

    fn descriptor() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn nodes() -> Nodes {
        Nodes::new(descriptor(), FileType::Directory, identity(1))
    }

    fn find(nodes: &Nodes, inode: u64) -> u64 {
        let found = nodes.found(descriptor(), FileType::RegularFile, identity(inode));
        found.unwrap().number
    }

    #[test]
    fn the_top_is_never_forgotten() {
        let nodes = nodes();
        nodes.forget(ROOT_ID, u64::MAX);
        assert_eq!(find(&nodes, 1), ROOT_ID);
        assert_eq!(nodes.get(ROOT_ID).unwrap().identity, identity(1));
    }

    #[test]
    fn a_million_files_that_came_and_went_leave_nothing() {
        let nodes = nodes();
        let mut last = 0;
        for inode in 2..10_000 {
            let number = find(&nodes, inode);
            assert!(number > last, "a number is given once");
            last = number;
        }
        for number in 2..=last {
            nodes.forget(number, 1);
        }
        let table = nodes.lock();
        assert_eq!((table.known.len(), table.numbers.len()), (1, 1));
        assert!(table.known.capacity() < 9000, "{}", table.known.capacity());
    }

    proptest! {
        /// Whatever the guest takes back, a number it still has means the file it was given for.
        #[test]
        fn a_number_never_means_two_files(
            steps in prop::collection::vec((0u64..8, any::<bool>(), 0u64..4), 1..200)
        ) {
            let nodes = nodes();
            let mut held: HashMap<u64, (u64, u64)> = HashMap::new();
            for (inode, find_it, count) in steps {
                let inode = inode + 2;
                if find_it {
                    let number = find(&nodes, inode);
                    let entry = held.entry(number).or_insert((inode, 0));
                    prop_assert_eq!(entry.0, inode);
                    entry.1 += 1;
                } else if let Some(number) = held.iter().find(|(_, held)| held.0 == inode).map(|(number, _)| *number) {
                    nodes.forget(number, count);
                    let left = held[&number].1.saturating_sub(count);
                    if left == 0 { held.remove(&number); } else { held.insert(number, (inode, left)); }
                }
                for (number, (inode, _)) in &held {
                    prop_assert_eq!(nodes.get(*number).unwrap().identity.inode, *inode);
                }
                prop_assert_eq!(nodes.lock().known.len(), held.len() + 1);
            }
        }
    }
}
