//! Which block devices of the node a VM has as disks, and for whom.

use std::collections::{BTreeMap, BTreeSet};

use tokio::task::JoinHandle;

use crate::node::disk::Numbers;

/// The disks of a VM.
#[derive(Debug, Default)]
pub(super) struct Disks {
    pub(super) held: BTreeMap<Key, Held>,
    pub(super) roots: Vec<Root>,
    /// While there is one.
    pub(super) watch: Option<Watch>,
}

/// Which device, and whether it was asked for to be written to: the guest cannot be told that a disk has become
/// writable.
pub(super) type Key = (Numbers, bool);

/// A disk and who has it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) disk: Disk,
    /// The containers that have it.
    pub(super) owners: BTreeSet<String>,
}

/// A disk that root file systems are on.
#[derive(Debug)]
pub(super) struct Root {
    /// The files of one that several containers may have, by device and inode.
    pub(super) files: Option<Vec<(u64, u64)>>,
    pub(super) function: u8,
    pub(super) owners: BTreeSet<String>,
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// On the guest's bus.
    pub function: u8,
    /// Its name below the guest's /dev, as the agent says.
    pub name: String,
}

/// Follows the node's devices until it is dropped.
#[derive(Debug)]
pub(super) struct Watch(pub(super) JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Disks {
    /// One for whoever wants to read may be one that others write to: the rules hold a reader.
    pub(super) fn find(&mut self, numbers: Numbers, write: bool) -> Option<&mut Held> {
        let key = if write || self.held.contains_key(&(numbers, true)) {
            (numbers, true)
        } else {
            (numbers, false)
        };
        self.held.get_mut(&key)
    }

    /// The functions of a device's disks.
    pub(super) fn of(&self, numbers: Numbers) -> impl Iterator<Item = u8> {
        let held = self
            .held
            .iter()
            .filter(move |((other, _), _)| *other == numbers);
        held.map(|(_, held)| held.disk.function)
    }
}
