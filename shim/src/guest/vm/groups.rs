//! Which IOMMU groups of the node a VM has, and for whom.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::shown::Show;
use crate::asked::spec::Moved;
use crate::node::vfio::open::{Group, Space};

/// The groups of a VM.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// While there is a group.
    pub(super) space: Option<Space>,
    /// By number.
    pub(super) groups: BTreeMap<u32, Held>,
    /// Somebody waits for the VM's end, to let go of all of it: the memory of a VM that has died stays pinned as long
    /// as its groups are held.
    pub(super) watched: bool,
    /// The guest can see the handler's driver bundle.
    pub(super) has_bundle: bool,
}

/// What is to be seen of a group that the VM has.
#[derive(Debug, Clone)]
pub struct GroupShown {
    /// The IOMMU group.
    pub number: u32,
    /// On the guest's bus.
    pub functions: Vec<u8>,
    /// Of its devices, on the node and in the guest.
    pub addresses: Vec<Moved>,
    /// For whom it is.
    pub holder: Holder,
}

impl Show for Groups {
    type Seen = Vec<GroupShown>;

    fn show(&self) -> Self::Seen {
        let groups = self.groups.iter();
        groups
            .map(|(number, group)| GroupShown {
                number: *number,
                functions: group.functions.clone(),
                addresses: group.addresses.clone(),
                holder: group.holder.clone(),
            })
            .collect()
    }
}

/// Whom a group is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// All containers of the pod: the handler's list names it.
    Pod,
    /// The container that asked.
    Container(String),
    /// A container that has not asked yet: kubelet has assigned it.
    Nobody,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod => f.write_str("all containers of this pod"),
            Self::Container(id) => write!(f, "container {id} of this pod"),
            Self::Nobody => f.write_str("no container of this pod yet"),
        }
    }
}

/// A group that the VM has.
#[derive(Debug)]
pub(super) struct Held {
    /// Held open.
    pub(super) _group: Arc<Group>,
    /// Of the guest's bus; those that the node has taken back are not there.
    pub(super) functions: Vec<u8>,
    /// Of its devices, as they came.
    pub(super) addresses: Vec<Moved>,
    /// For whom.
    pub(super) holder: Holder,
    /// It is the VM's as long as that lives, whoever of the pod has it.
    pub(super) stays: bool,
    /// The guest's drivers have its devices, as far as anybody has looked.
    pub(super) found: bool,
}
