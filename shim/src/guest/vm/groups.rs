//! Which IOMMU groups of the node a VM has, and for whom.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use crate::node::vfio::Group;

/// The groups of a VM.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// While there is a group.
    pub(super) container: Option<OwnedFd>,
    /// By number.
    pub(super) groups: BTreeMap<u32, Held>,
    /// Somebody waits for the VM's end, to let go of all of it: the memory of a VM that has died stays pinned as long
    /// as its groups are held.
    pub(super) watched: bool,
    /// The guest can see the handler's driver bundle.
    pub(super) has_bundle: bool,
}

/// A group that the VM has.
#[derive(Debug)]
pub(super) struct Held {
    /// Held open.
    pub(super) _group: Group,
    /// Of the guest's bus.
    pub(super) functions: Vec<u8>,
    /// The container that asked for it.
    pub(super) owner: String,
}
