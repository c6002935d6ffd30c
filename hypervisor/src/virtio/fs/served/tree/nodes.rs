//! The files of one mount that the guest knows, by the numbers it was given.
//!
//! Each is an `O_PATH` descriptor, so a number means the same file whatever happens to its names. A number is
//! given once: a file that was forgotten and found again gets another, and nothing is kept of it in between.
//! Of a file that was let go ([`super::removal`]) there is no descriptor, until it is found again.
//! Numbers and counts from the guest are hostile.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use rustix::fs::FileType;

use super::super::errno;
use super::identity::Identity;

/// Bits of a node id that are the mount's own: a million million files found in its life.
pub(in super::super) const NUMBER_BITS: u32 = 40;

/// Files without a descriptor, at most: nothing else bounds how many a guest does not forget.
const MOST_LET_GO: usize = 1 << 16;

/// A file that the guest knows.
pub(super) struct Node {
    pub(super) number: u64,
    /// `O_PATH`.
    pub(super) file: OwnedFd,
    pub(super) kind: FileType,
    pub(super) identity: Identity,
    /// It had set-id bits when it was looked at last.
    pub(super) set_id: AtomicBool,
    /// A name of it went while it was open.
    name_went: AtomicBool,
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

/// A file that the guest knows, and of which nothing is held.
struct LetGo {
    identity: Identity,
    lookups: u64,
}

struct Table {
    known: HashMap<u64, Known>,
    let_go: HashMap<u64, LetGo>,
    numbers: HashMap<Identity, u64>,
    next: u64,
}

/// The table of them; its top is [`ROOT_ID`] and stays.
pub(super) struct Nodes(Mutex<Table>);

impl Nodes {
    pub(super) fn new(top: OwnedFd, kind: FileType, identity: Identity) -> Self {
        let nodes = Self(Mutex::new(Table {
            known: HashMap::new(),
            let_go: HashMap::new(),
            numbers: HashMap::new(),
            next: ROOT_ID,
        }));
        nodes.lock().add(top, kind, identity);
        nodes
    }

    /// The table is consistent at each point where a panic could leave it.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// `EBADF` for a number that the guest has not, or not any more; `ESTALE` if the file was let go.
    pub(super) fn get(&self, number: u64) -> io::Result<Arc<Node>> {
        let table = self.lock();
        match table.known.get(&number) {
            Some(known) => Ok(Arc::clone(&known.node)),
            None if table.let_go.contains_key(&number) => Err(errno(libc::ESTALE)),
            None => Err(errno(libc::EBADF)),
        }
    }

    pub(super) fn has(&self, number: u64) -> bool {
        self.lock().lookups(number).is_some()
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
        if let Some(number) = table.numbers.get(&identity).copied() {
            if let Some(known) = table.known.get_mut(&number) {
                known.lookups = known.lookups.saturating_add(1);
                return Ok(Arc::clone(&known.node));
            }
            if let Some(gone) = table.let_go.remove(&number) {
                let lookups = gone.lookups.saturating_add(1);
                return Ok(table.insert(number, file, kind, identity, lookups));
            }
        }
        if table.next >> NUMBER_BITS != 0 {
            return Err(errno(libc::ENFILE));
        }
        Ok(table.add(file, kind, identity))
    }

    /// One more answer names it.
    ///
    /// # Errors
    /// `ESTALE` if the guest has forgotten it meanwhile.
    pub(super) fn again(&self, node: &Node) -> io::Result<()> {
        let mut table = self.lock();
        let lookups = table.lookups(node.number);
        let lookups = lookups.ok_or_else(|| errno(libc::ESTALE))?;
        *lookups = lookups.saturating_add(1);
        Ok(())
    }

    /// Holds nothing of a file any more, if it is known and no directory; whether that is so. If it `is_open`, that is put
    /// off to [`Self::closed`]. It is asked with the table locked: who opens the file at the same time calls
    /// [`Self::hold_again`] afterwards. Requests that are under way still use what they have.
    pub(super) fn let_go(&self, identity: &Identity, is_open: impl FnOnce(u64) -> bool) -> bool {
        let table = self.lock();
        let Some(number) = table.numbers.get(identity).copied() else {
            return false;
        };
        if is_open(number) {
            if let Some(known) = table.known.get(&number) {
                known.node.name_went.store(true, Ordering::Relaxed);
            }
            return false;
        }
        Table::let_go(table, number)
    }

    /// Something of a file was closed: it is let go if that was put off, and nothing else of it `is_open`.
    pub(super) fn closed(&self, number: u64, is_open: impl FnOnce(u64) -> bool) {
        let table = self.lock();
        let known = table.known.get(&number);
        if known.is_some_and(|known| known.node.name_went.load(Ordering::Relaxed))
            && !is_open(number)
        {
            Table::let_go(table, number);
        }
    }

    /// If the file was let go meanwhile, it is held again.
    pub(super) fn hold_again(&self, node: &Arc<Node>) {
        let mut table = self.lock();
        if let Some(gone) = table.let_go.remove(&node.number) {
            let (node, lookups) = (Arc::clone(node), gone.lookups);
            table.known.insert(node.number, Known { node, lookups });
        }
    }

    /// Takes back that many answers.
    pub(super) fn forget(&self, number: u64, count: u64) {
        if number == ROOT_ID {
            return;
        }
        let mut table = self.lock();
        let Some(lookups) = table.lookups(number) else {
            return;
        };
        *lookups = lookups.saturating_sub(count);
        if *lookups > 0 {
            return;
        }
        let gone = table.known.remove(&number);
        if let Some(gone) = &gone {
            table.numbers.remove(&gone.node.identity);
        } else if let Some(gone) = table.let_go.remove(&number) {
            table.numbers.remove(&gone.identity);
        }
        table.shrink();
        drop(table);
        // Its descriptor is closed without the lock.
        drop(gone);
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        let table = self.lock();
        let count = table.known.len() + table.let_go.len();
        assert_eq!(count, table.numbers.len());
        count
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
    /// A file by a number of its own.
    fn add(&mut self, file: OwnedFd, kind: FileType, identity: Identity) -> Arc<Node> {
        let number = self.next;
        self.next += 1;
        self.insert(number, file, kind, identity, 1)
    }

    fn insert(
        &mut self,
        number: u64,
        file: OwnedFd,
        kind: FileType,
        identity: Identity,
        lookups: u64,
    ) -> Arc<Node> {
        self.numbers.insert(identity.clone(), number);
        let node = Arc::new(Node {
            number,
            file,
            kind,
            identity,
            set_id: AtomicBool::new(false),
            name_went: AtomicBool::new(false),
            incapable: AtomicU32::new(0),
        });
        let known = Arc::clone(&node);
        self.known.insert(
            number,
            Known {
                node: known,
                lookups,
            },
        );
        node
    }

    fn let_go(mut table: MutexGuard<'_, Self>, number: u64) -> bool {
        let of_no_directory =
            |known: &&Known| number != ROOT_ID && known.node.kind != FileType::Directory;
        if table.known.get(&number).filter(of_no_directory).is_none()
            || table.let_go.len() >= MOST_LET_GO
        {
            return false;
        }
        let Some(gone) = table.known.remove(&number) else {
            return false;
        };
        let (identity, lookups) = (gone.node.identity.clone(), gone.lookups);
        table.let_go.insert(number, LetGo { identity, lookups });
        drop(table);
        // Its descriptor is closed without the lock, and before this returns unless somebody uses it.
        drop(gone);
        true
    }

    fn lookups(&mut self, number: u64) -> Option<&mut u64> {
        let known = self.known.get_mut(&number);
        let known = known.map(|known| &mut known.lookups);
        known.or_else(|| self.let_go.get_mut(&number).map(|gone| &mut gone.lookups))
    }

    /// A guest that has walked a large tree and forgotten it gives its memory back.
    fn shrink(&mut self) {
        const SMALL: usize = 1024;
        let wanted = 2 * self.known.len().max(SMALL);
        if self.known.capacity() > 4 * wanted {
            self.known.shrink_to(wanted);
            self.numbers.shrink_to(wanted);
        }
        if self.let_go.is_empty() && self.let_go.capacity() > SMALL {
            self.let_go = HashMap::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::identity::Beyond;
    use super::*;
    use proptest::prelude::*;

    fn identity(inode: u64) -> Identity {
        Identity {
            device: 1,
            inode,
            mount: 1,
            beyond: None,
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

    /// As a server's: another client has removed the file, and the next one has its number.
    #[test]
    fn a_number_of_the_servers_that_is_given_again_is_another_file() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let nodes = nodes();
        let mut found = Vec::new();
        for name in ["old", "new", "old"] {
            let path = directory.path().join(name);
            let file = std::fs::File::options()
                .create(true)
                .append(true)
                .open(path)
                .unwrap();
            let seen = super::super::stat::look(&file, rustix::fs::StatxFlags::empty()).unwrap();
            let beyond = Some(Arc::new(Beyond::of(&file, &seen).unwrap()));
            let identity = Identity {
                beyond,
                ..identity(7)
            };
            let file = nodes.found(file.into(), FileType::RegularFile, identity);
            found.push(file.unwrap());
        }
        let [old, new, again] = [&found[0], &found[1], &found[2]];
        assert_ne!(old.number, new.number);
        assert!(Arc::ptr_eq(old, again));
        nodes.forget(old.number, 2);
        assert!(nodes.get(old.number).is_err());
        assert!(Arc::ptr_eq(new, &nodes.get(new.number).unwrap()));
        let twice = nodes.found(descriptor(), FileType::RegularFile, new.identity.clone());
        assert_eq!(twice.unwrap().number, new.number, "and it is found still");
    }

    #[test]
    fn a_file_that_was_let_go_has_its_number_until_it_is_forgotten() {
        let nodes = nodes();
        let error = |number| nodes.get(number).err().unwrap().raw_os_error();
        let number = find(&nodes, 5);
        assert!(!nodes.let_go(&identity(5), |_| true), "it is open");
        assert!(!nodes.let_go(&identity(6), |_| false), "nobody knows it");
        assert!(!nodes.let_go(&identity(1), |_| false), "the top");
        assert!(nodes.let_go(&identity(5), |_| false));
        assert!(!nodes.let_go(&identity(5), |_| false), "it has gone");
        assert_eq!(error(number), Some(libc::ESTALE));
        assert!(nodes.has(number));
        assert_eq!(find(&nodes, 5), number, "found again");
        assert!(nodes.let_go(&identity(5), |_| false));
        nodes.forget(number, 1);
        assert!(nodes.has(number), "two answers have named it");
        nodes.forget(number, 1);
        assert_eq!(error(number), Some(libc::EBADF));
        assert_ne!(find(&nodes, 5), number);
        assert_eq!(nodes.count(), 2);
    }

    #[test]
    fn what_is_let_go_and_not_forgotten_has_a_bound() {
        let nodes = nodes();
        let most = u64::try_from(MOST_LET_GO).unwrap();
        for inode in 2..most + 10 {
            let number = find(&nodes, inode);
            let gone = nodes.let_go(&identity(inode), |_| false);
            assert_eq!(gone, inode < most + 2);
            if !gone {
                nodes.forget(number, 1);
            }
        }
        for number in 2..most + 10 {
            nodes.forget(number, 1);
        }
        assert_eq!(nodes.count(), 1);
        assert!(nodes.lock().let_go.capacity() < most.try_into().unwrap());
    }

    proptest! {
        /// Whatever the guest takes back, a number it still has means the file it was given for.
        #[test]
        fn a_number_never_means_two_files(
            steps in prop::collection::vec((0u64..8, 0u8..3, 0u64..4), 1..200)
        ) {
            let nodes = nodes();
            let mut held: HashMap<u64, (u64, u64)> = HashMap::new();
            for (inode, step, count) in steps {
                let inode = inode + 2;
                if step == 2 {
                    let known = held.values().any(|held| held.0 == inode);
                    let here = known && !nodes.lock().let_go.values().any(|gone| gone.identity.inode == inode);
                    prop_assert_eq!(nodes.let_go(&identity(inode), |_| false), here);
                } else if step == 1 {
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
                    match nodes.get(*number) {
                        Ok(node) => prop_assert_eq!(node.identity.inode, *inode),
                        Err(_) => prop_assert_eq!(nodes.lock().let_go[number].identity.inode, *inode),
                    }
                }
                prop_assert_eq!(nodes.count(), held.len() + 1);
            }
        }
    }
}
