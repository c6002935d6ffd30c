//! Which devices the VMM may have: each from before it is asked for until the VMM has said that it is gone, or has ended.
//!
//! Whoever asks for a device to be plugged or unplugged may have to give up before the VMM answers. What the VMM has is not
//! decided by that: the device stays in the books, and with it what keeps other pods from it, and a plug that comes to its end
//! when nobody waits any more is undone.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::node::disk::Numbers;
use crate::node::vfio::open::Group;

/// What a device is of, by which it could be asked for again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Of {
    /// An IOMMU group of the node.
    Group(u32),
    /// A block device of the node.
    Disk(Numbers),
    /// A volume, by its device or image.
    Volume(PathBuf),
    /// A root file system.
    Root,
    /// The network namespace.
    Network,
}

impl fmt::Display for Of {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group(number) => write!(f, "IOMMU group {number}"),
            Self::Disk((major, minor)) => write!(f, "block device {major}:{minor} of the node"),
            Self::Volume(device) => write!(f, "the volume on {}", device.display()),
            Self::Root => f.write_str("a disk of a root file system"),
            Self::Network => f.write_str("an interface of the network"),
        }
    }
}

/// A device, as its entry begins.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) of: Of,
    /// What keeps others from it, as long as the VMM may have it.
    pub(super) _held: Option<Arc<Group>>,
}

impl Device {
    /// One that nothing of this process need keep others from: the VMM's own descriptor does, or nothing has to.
    pub(super) fn of(of: Of) -> Self {
        Self { of, _held: None }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The VMM was asked for it.
    Coming,
    /// The VMM has it.
    There(u8),
    /// The VMM was asked to give it back.
    Leaving(u8),
}

#[derive(Debug)]
struct Entry {
    device: Device,
    state: State,
}

/// The number of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Number(u64);

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    all: BTreeMap<Number, Entry>,
}

/// The books of one VM; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Books(Arc<Mutex<Entries>>);

impl Books {
    /// The VMM is about to be asked for this.
    pub(super) fn coming(&self, device: Device) -> Number {
        let mut entries = self.lock();
        let number = Number(entries.next);
        entries.next += 1;
        let state = State::Coming;
        entries.all.insert(number, Entry { device, state });
        number
    }

    /// The VMM has said that it is there, as this function.
    pub(super) fn there(&self, number: Number, function: u8) {
        if let Some(entry) = self.lock().all.get_mut(&number) {
            entry.state = State::There(function);
        }
    }

    /// The VMM is about to be asked to give back what is there as this function; none if that is not known, or was asked.
    pub(super) fn leaving(&self, function: u8) -> Option<Number> {
        let mut entries = self.lock();
        let mut all = entries.all.iter_mut();
        let (number, entry) = all.find(|(_, entry)| entry.state == State::There(function))?;
        entry.state = State::Leaving(function);
        Some(*number)
    }

    /// The VMM has said that it does not have it.
    pub(super) fn gone(&self, number: Number) {
        // What it held is let go of without the lock.
        let entry = self.lock().all.remove(&number);
        drop(entry);
    }

    /// The VM has ended, and with it has everything.
    pub(super) fn close(&self) {
        let all = std::mem::take(&mut self.lock().all);
        drop(all);
    }

    /// Why the device cannot be given, if what was asked about it before is not at its end. To be called by whoever asks
    /// for such devices one after another.
    pub(super) fn under_way(&self, of: &Of) -> Option<String> {
        let entries = self.lock();
        let mut same = entries.all.values().filter(|entry| entry.device.of == *of);
        same.find_map(Entry::unsettled)
    }

    /// What the VMM was asked and has not answered yet, a sentence each.
    pub(super) fn unsettled(&self) -> Vec<String> {
        let entries = self.lock();
        entries.all.values().filter_map(Entry::unsettled).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // It is whole whatever its holder did.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn unsettled(&self) -> Option<String> {
        let of = &self.device.of;
        match self.state {
            State::Coming => Some(format!(
                "the VMM was asked to plug {of} and has not answered yet"
            )),
            State::There(_) => None,
            State::Leaving(_) => Some(format!(
                "the VMM was asked to give {of} back and has not answered yet"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_in_the_books_until_the_vmm_has_said_that_it_is_gone() {
        let books = Books::default();
        let group = Arc::new(Group::new(None, Vec::new()));
        let held = || Arc::strong_count(&group) - 1;
        let of = Of::Group(7);
        let entry = books.coming(Device {
            of: of.clone(),
            _held: Some(Arc::clone(&group)),
        });
        let why = books.under_way(&of).unwrap();
        assert!(why.contains("plug IOMMU group 7"), "{why}");
        assert!(books.under_way(&Of::Group(8)).is_none());
        books.there(entry, 0x20);
        assert!(books.under_way(&of).is_none() && books.unsettled().is_empty());
        assert_eq!(books.leaving(0x28), None);
        assert_eq!(books.leaving(0x20), Some(entry));
        assert_eq!(books.leaving(0x20), None, "it is asked once");
        let why = books.under_way(&of).unwrap();
        assert!(why.contains("give IOMMU group 7 back"), "{why}");
        // The function's number is another device's before the answer was read.
        let next = books.coming(Device::of(Of::Root));
        books.there(next, 0x20);
        assert_eq!(held(), 1);
        books.gone(entry);
        assert_eq!(held(), 0);
        assert_eq!(books.leaving(0x20), Some(next));
    }

    #[test]
    fn with_the_vm_everything_is_let_go_of() {
        let books = Books::default();
        let group = Arc::new(Group::new(None, Vec::new()));
        books.coming(Device {
            of: Of::Group(1),
            _held: Some(Arc::clone(&group)),
        });
        books.close();
        assert_eq!(Arc::strong_count(&group), 1);
        assert!(books.unsettled().is_empty());
    }
}
