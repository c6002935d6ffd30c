//! Devices of the node that a VM has from its start: those of the handler's list, and those that kubelet has assigned. They are open before the VMM is asked
//! for the machine, and its memory is pinned before the guest runs.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use brig_hypervisor::control::{MAX_FDS, SpaceConfig, VfioConfig};

use super::books::{Books, Device, Of};
use super::groups::{Groups, Held, Holder};
use crate::asked::config::{MIB, Wish};
use crate::error::{Error, Kind, Result};
use crate::node::cdi::Names;
use crate::node::cgroup::Cgroup;
use crate::node::pod_resources::Assigned;
use crate::node::vfio::open::Space;
use crate::node::vfio::{Meant, Node, Opened};

/// What the VMM and the kernel's structures for it take beside the guest's memory (docs/overhead.md), in bytes.
const BESIDE: u64 = 2 * MIB;

/// Devices for a VM that does not run yet.
#[derive(Debug)]
pub struct Given {
    opened: Opened,
    /// The group of each device and its address on the node, as they were described.
    order: Vec<(u32, String)>,
}

impl Given {
    /// Opens what the handler's list names, and what kubelet has assigned, for a VM of `memory` bytes; none if that is
    /// nothing. Blocking.
    ///
    /// # Errors
    /// One sentence with the fix.
    pub(super) fn open(
        list: &[Wish],
        assigned: &[Assigned],
        memory: u64,
        cgroup: Option<&Cgroup>,
    ) -> Result<Option<Self>> {
        let node = Node::new();
        let meant = if assigned.is_empty() {
            Meant::default()
        } else {
            node.meant(assigned, &Names::default())
        };
        if list.is_empty() && meant.groups.is_empty() {
            return Ok(None);
        }
        room_for(memory, cgroup)?;
        let opened = node.open_all(list, &meant.groups)?;
        Ok(Some(Self {
            opened,
            order: Vec::new(),
        }))
    }

    /// Hands the devices' descriptors over, behind those that are in `fds`.
    ///
    /// # Errors
    /// If they are too many for one message.
    pub(super) fn describe(&mut self, fds: &mut Vec<OwnedFd>) -> Result<Vec<VfioConfig>> {
        let mut devices = Vec::new();
        for (number, group) in &mut self.opened.groups {
            for (name, device) in std::mem::take(&mut group.devices) {
                fds.push(device);
                let device = fds.len() - 1;
                let space = if devices.is_empty() {
                    let space = self.opened.space.try_clone();
                    Some(describe(space.map_err(|error| no_space(&error))?, fds))
                } else {
                    None
                };
                self.order.push((*number, name.clone()));
                devices.push(VfioConfig {
                    device,
                    space,
                    name,
                });
            }
        }
        if fds.len() > MAX_FDS {
            return Err(Error::new(
                Kind::FailedPrecondition,
                format!(
                    "the IOMMU groups of the devices of Brig's configuration have {} members, too many for one VM's start: \
                     name fewer devices",
                    devices.len()
                ),
            ));
        }
        Ok(devices)
    }

    /// What the VM has once it runs; `functions` are the devices' on the guest's bus, in the order in which they were
    /// described. All of it is entered into the books.
    pub(super) fn hold(self, functions: &[u8], books: &Books) -> Groups {
        let mut groups = Groups {
            space: Some(self.opened.space),
            ..Groups::default()
        };
        for (number, group) in self.opened.groups {
            let places = self.order.iter().zip(functions);
            let own = places.filter(|((of, _), _)| *of == number);
            let own =
                own.map(|((_, name), function)| (*function, group.moved(name.clone(), *function)));
            let (functions, addresses): (Vec<u8>, Vec<_>) = own.unzip();
            let group = Arc::new(group);
            for function in &functions {
                let device = Device {
                    of: Of::Group(number),
                    _held: Some(Arc::clone(&group)),
                };
                books.there(books.coming(device), *function);
            }
            let holder = if self.opened.for_all.contains(&number) {
                Holder::Pod
            } else {
                Holder::Nobody
            };
            let held = Held {
                _group: group,
                functions,
                addresses,
                holder,
                stays: true,
                found: false,
            };
            groups.groups.insert(number, held);
        }
        groups
    }
}

/// Describes an address space whose descriptor goes behind those that are in `fds`.
pub(super) fn describe(space: Space, fds: &mut Vec<OwnedFd>) -> SpaceConfig {
    let index = fds.len();
    match space {
        Space::Container(container) => {
            fds.push(container);
            SpaceConfig::Container(index)
        }
        Space::Ioas { iommufd, id } => {
            fds.push(iommufd);
            SpaceConfig::Ioas { iommufd: index, id }
        }
    }
}

pub(super) fn no_space(error: &io::Error) -> Error {
    Error::io("the address space of the pod's devices", error)
}

/// Refuses a device to a pod whose limit is below its VM's size: the VM would be killed while its memory is pinned.
///
/// # Errors
/// With the numbers.
pub(super) fn room_for(memory: u64, cgroup: Option<&Cgroup>) -> Result<()> {
    let Some((limit, place)) = cgroup.and_then(Cgroup::memory_limit) else {
        return Ok(());
    };
    let needed = memory + BESIDE;
    if limit >= needed {
        return Ok(());
    }
    Err(Error::new(
        Kind::ResourceExhausted,
        format!(
            "a device needs all {} MiB of the VM's memory pinned, and {} MiB are missing: the cgroup {} is limited to {} \
             MiB; give the RuntimeClass its overhead (docs/overhead.md), or the handler less memory",
            memory.div_ceil(MIB),
            (needed - limit).div_ceil(MIB),
            place.display(),
            limit / MIB
        ),
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::File;

    use super::*;
    use crate::node::vfio::open::Group;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn devices_are_described_behind_what_is_there_and_held_by_their_groups() {
        let group = |names: &[&str]| {
            let devices = names.iter().map(|name| ((*name).to_owned(), null()));
            Group::new(None, devices.collect())
        };
        let ioas = Space::Ioas {
            iommufd: null(),
            id: 2,
        };
        let mut given = Given {
            opened: Opened {
                space: ioas,
                for_all: [3].into(),
                groups: vec![(7, group(&["a", "b"])), (3, group(&["c"]))],
            },
            order: Vec::new(),
        };
        let mut fds = vec![null()];
        let devices = given.describe(&mut fds).unwrap();
        let shown: Vec<_> = devices
            .iter()
            .map(|device| (device.name.as_str(), device.device, device.space))
            .collect();
        // The first brings the address space along.
        let space = Some(SpaceConfig::Ioas { iommufd: 2, id: 2 });
        assert_eq!(shown, [("a", 1, space), ("b", 3, None), ("c", 4, None)]);
        assert_eq!(fds.len(), 5);
        let books = Books::default();
        let groups = given.hold(&[0xf8, 0xf0, 0xe8], &books);
        let held = |number: u32| groups.groups[&number].functions.clone();
        assert_eq!((held(7), held(3)), (vec![0xf8, 0xf0], vec![0xe8]));
        let moved = |node: &str, guest: &str| (node.to_owned(), guest.to_owned());
        assert_eq!(
            groups.groups[&7].addresses,
            [moved("a", "0000:00:1f.0"), moved("b", "0000:00:1e.0")]
        );
        let holders = groups.groups.values().map(|held| &held.holder);
        assert_eq!(holders.collect::<Vec<_>>(), [&Holder::Pod, &Holder::Nobody]);
        assert!(groups.groups.values().all(|held| held.stays && !held.found));
        assert!(groups.space.is_some());
        assert!(
            [0xf8, 0xf0, 0xe8]
                .iter()
                .all(|function| books.leaving(*function).is_some())
        );
    }

    #[test]
    fn more_devices_than_one_message_carries_are_refused() {
        let devices = (0..MAX_FDS).map(|number| (number.to_string(), null()));
        let mut given = Given {
            opened: Opened {
                space: Space::Container(null()),
                for_all: BTreeSet::new(),
                groups: vec![(1, Group::new(None, devices.collect()))],
            },
            order: Vec::new(),
        };
        let error = given.describe(&mut Vec::new()).unwrap_err();
        let said = format!("{MAX_FDS} members");
        assert!(error.message.contains(&said), "{}", error.message);
    }
}
