//! The descriptors of a group's devices, by either interface of the kernel, in the one address space of a VM.
//!
//! By groups: a container, in which the groups are, and the devices out of them. By iommufd: an I/O address space, and the
//! devices by their own nodes, each bound to the same `/dev/iommu` and attached to that space. Blocking.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};

use brig_hypervisor::pci::config::SIZE;
use brig_hypervisor::wants_port;
use nix::errno::Errno;

use super::calls::{
    ATTACH_IOMMUFD_PT, BIND_IOMMUFD, CHECK_EXTENSION, GET_API_VERSION, IOAS_ALLOC, OPTION,
    SET_IOMMU,
};
use super::{Node, Way, device_node};
use crate::asked::spec::Moved;
use crate::error::{Error, Kind, Result};

/// `VFIO_TYPE1v2_IOMMU`.
const TYPE1: libc::c_ulong = 3;

/// What the devices of a VM have in common: guest memory as they see it. The VMM maps it.
#[derive(Debug)]
pub enum Space {
    /// A container of groups.
    Container(OwnedFd),
    /// An I/O address space.
    Ioas {
        /// `/dev/iommu`.
        iommufd: OwnedFd,
        /// Its number there.
        id: u32,
    },
}

impl Space {
    /// The same one.
    ///
    /// # Errors
    /// If there are too many descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Container(container) => Self::Container(container.try_clone()?),
            Self::Ioas { iommufd, id } => Self::Ioas {
                iommufd: iommufd.try_clone()?,
                id: *id,
            },
        })
    }
}

/// A group that is open.
#[derive(Debug)]
pub struct Group {
    /// Held as long as its devices are used; by iommufd they are held by nothing but their own descriptors.
    _group: Option<OwnedFd>,
    /// Its devices by their PCI addresses, each until it is given to a VMM.
    pub devices: Vec<(String, OwnedFd)>,
    /// Those of them that a VMM puts behind a root port of their own.
    pub(super) behind_ports: BTreeSet<String>,
}

impl Group {
    /// One that is open.
    pub(crate) fn new(group: Option<OwnedFd>, devices: Vec<(String, OwnedFd)>) -> Self {
        Self {
            _group: group,
            devices,
            behind_ports: BTreeSet::new(),
        }
    }

    /// The address of a member on the node, and in the guest that has it as this function: behind a root port it is alone on
    /// the bus that has the number of the port's slot.
    #[must_use]
    pub fn moved(&self, name: String, function: u8) -> Moved {
        let (slot, part) = (function >> 3, function & 7);
        let guest = if self.behind_ports.contains(&name) {
            format!("0000:{slot:02x}:00.0")
        } else {
            format!("0000:00:{slot:02x}.{part}")
        };
        (name, guest)
    }
}

fn refused(what: String) -> Error {
    Error::new(Kind::FailedPrecondition, what)
}

/// The words of a structure, 32 bits each.
fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The last word that the kernel has written into one.
fn last(bytes: &[u8]) -> u32 {
    bytes
        .last_chunk()
        .map_or(0, |word| u32::from_ne_bytes(*word))
}

impl Node {
    /// An address space for devices.
    ///
    /// # Errors
    /// `FailedPrecondition`: what is to be loaded.
    pub fn space(&self, way: Way) -> Result<Space> {
        match way {
            Way::Groups => self.container().map(Space::Container),
            Way::Iommufd => self.ioas(),
        }
    }

    fn container(&self) -> Result<OwnedFd> {
        let container = self.calls.open_sealed(&self.dev.join("vfio/vfio"));
        let container = container.map_err(|error| {
            refused(format!(
                "/dev/vfio/vfio cannot be opened ({error}): load vfio-pci on this node"
            ))
        })?;
        let version = self.calls.number(&container, GET_API_VERSION, 0);
        let extension = self.calls.number(&container, CHECK_EXTENSION, TYPE1);
        if version != Ok(0) || !matches!(extension, Ok(1..)) {
            return Err(refused(
                "this node's VFIO has no type 1 IOMMU: load vfio_iommu_type1".to_owned(),
            ));
        }
        Ok(container)
    }

    fn ioas(&self) -> Result<Space> {
        let iommufd = self.calls.open_sealed(&self.dev.join("iommu"));
        let iommufd = iommufd.map_err(|error| {
            refused(format!(
                "/dev/iommu cannot be opened ({error}): load iommufd on this node"
            ))
        })?;
        // Pinned memory counts against the VMM's own limit, as in a container, and not against that of all VMs together.
        // Where the shim may not choose that, the kernel's way stays.
        let _ = self
            .calls
            .structure(&iommufd, OPTION, &mut words([24, 0, 0, 0, 1, 0]));
        let mut made = words([12, 0, 0]);
        self.calls
            .structure(&iommufd, IOAS_ALLOC, &mut made)
            .map_err(|errno| refused(format!("/dev/iommu makes no address space: {errno}")))?;
        Ok(Space::Ioas {
            iommufd,
            id: last(&made),
        })
    }

    /// Opens a group's devices, in `space`; `first`: nothing is in it yet.
    ///
    /// # Errors
    /// One sentence with the fix: held by another pod, not whole, not safe.
    pub fn open(&self, number: u32, space: &Space, first: bool) -> Result<Group> {
        let members = self.members(number)?;
        let behind = members.iter().filter(|name| self.wants_port(name));
        let behind_ports = behind.cloned().collect();
        let mut group = match space {
            Space::Container(container) => self.open_group(number, members, container, first)?,
            Space::Ioas { iommufd, id } => self.open_devices(number, &members, iommufd, *id)?,
        };
        group.behind_ports = behind_ports;
        Ok(group)
    }

    /// As the VMM sees it.
    fn wants_port(&self, name: &str) -> bool {
        let path = self.sys.join("bus/pci/devices").join(name).join("config");
        let mut space = [0; SIZE];
        let read = File::open(path).and_then(|mut file| file.read_exact(&mut space));
        read.is_ok() && wants_port(&space)
    }

    fn open_group(
        &self,
        number: u32,
        members: Vec<String>,
        container: &OwnedFd,
        first: bool,
    ) -> Result<Group> {
        let path = self.dev.join(format!("vfio/{number}"));
        let group = self
            .calls
            .open(&path)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => in_use(number, &members),
                _ => refused(format!("{} cannot be opened: {error}", path.display())),
            })?;
        self.calls
            .set_container(&group, container)
            .map_err(|errno| not_beside(number, &members, errno))?;
        if first {
            let set = self.calls.number(container, SET_IOMMU, TYPE1);
            set.map_err(|errno| match errno {
                Errno::EPERM => not_safe(number),
                _ => refused(format!(
                    "the node's IOMMU cannot be used for group {number}: {errno}"
                )),
            })?;
        }
        let mut devices = Vec::new();
        for name in members {
            let text = CString::new(name.clone())
                .map_err(|_| Error::internal("a PCI address with a zero in it"))?;
            let device = self.calls.device(&group, &text);
            let device = device.map_err(|errno| cannot_be_opened(&name, io::Error::from(errno)))?;
            devices.push((name, device));
        }
        Ok(Group::new(Some(group), devices))
    }

    fn open_devices(
        &self,
        number: u32,
        members: &[String],
        iommufd: &OwnedFd,
        ioas: u32,
    ) -> Result<Group> {
        let raw = iommufd.as_raw_fd().cast_unsigned();
        let mut devices = Vec::new();
        for name in members {
            let place = self.sys.join("bus/pci/devices").join(name);
            let node = device_node(&place).map_err(|what| cannot_be_opened(name, what))?;
            let path = self.dev.join("vfio/devices").join(node);
            let device = self.calls.open_sealed(&path);
            let device = device.map_err(|error| cannot_be_opened(name, error))?;
            let mut bind = words([16, 0, raw, 0]);
            let bound = self.calls.structure(&device, BIND_IOMMUFD, &mut bind);
            bound.map_err(|errno| match errno {
                // Its group is open elsewhere, or it is itself.
                Errno::EBUSY | Errno::EINVAL => in_use(number, members),
                Errno::EPERM => not_safe(number),
                _ => cannot_be_opened(name, io::Error::from(errno)),
            })?;
            let mut attach = words([12, 0, ioas]);
            self.calls
                .structure(&device, ATTACH_IOMMUFD_PT, &mut attach)
                .map_err(|errno| not_beside(number, members, errno))?;
            devices.push((name.clone(), device));
        }
        Ok(Group::new(None, devices))
    }
}

fn in_use(number: u32, members: &[String]) -> Error {
    refused(format!(
        "IOMMU group {number} ({}) is in use by another pod or program",
        members.join(", ")
    ))
}

fn not_beside(number: u32, members: &[String], errno: Errno) -> Error {
    refused(format!(
        "IOMMU group {number} ({}) cannot be put beside the pod's other devices: {errno}",
        members.join(", ")
    ))
}

fn not_safe(number: u32) -> Error {
    refused(format!(
        "the node's IOMMU does not remap interrupts, so IOMMU group {number} is not safe to give away: turn interrupt \
         remapping on in the firmware"
    ))
}

fn cannot_be_opened(name: &str, why: impl std::fmt::Display) -> Error {
    refused(format!("device {name} cannot be opened: {why}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::testing::Fake;
    use super::*;

    const ONE: &str = "0000:00:02.0";
    const TWO: &str = "0000:00:03.0";
    const THREE: &str = "0000:00:03.1";

    fn fake() -> Fake {
        Fake::with_devices(&[(ONE, 7), (TWO, 8), (THREE, 8)])
    }

    fn said(result: Result<Group>) -> String {
        result.unwrap_err().message
    }

    #[test]
    fn groups_come_out_of_one_container_whose_iommu_is_set_with_the_first() {
        let fake = fake();
        let space = fake.node.space(Way::Groups).unwrap();
        let first = fake.node.open(7, &space, true).unwrap();
        let second = fake.node.open(8, &space, false).unwrap();
        let names = |group: &Group| group.devices.iter().map(|(name, _)| name.clone()).collect();
        let (one, both): (Vec<_>, Vec<_>) = (names(&first), names(&second));
        assert_eq!(
            (one, both),
            (vec![ONE.to_owned()], vec![TWO.into(), THREE.into()])
        );
        let held = [ONE, TWO, THREE, "vfio/7", "vfio/8", "vfio/vfio"];
        assert_eq!(fake.kernel.holds(), held);
        drop((first, second, space));
        assert!(fake.kernel.holds().is_empty());
    }

    #[test]
    fn a_display_has_the_address_of_its_root_ports_bus_in_the_guest() {
        let fake = fake();
        let mut space = [0; SIZE];
        // A display with a list of capabilities: PCI Express, an endpoint.
        (space[0x06], space[0x0b], space[0x34]) = (0x10, 0x03, 0x40);
        space[0x40] = 0x10;
        fake.configuration(THREE, &space);
        let space = fake.node.space(Way::Groups).unwrap();
        let group = fake.node.open(8, &space, true).unwrap();
        let guest = |name: &str, function| group.moved(name.to_owned(), function).1;
        assert_eq!(guest(TWO, 0xf9), "0000:00:1f.1");
        assert_eq!(guest(THREE, 0xf0), "0000:1e:00.0");
    }

    #[test]
    fn devices_by_iommufd_are_bound_and_attached_to_one_address_space_and_nothing_else_is_held() {
        let fake = fake();
        let space = fake.node.space(Way::Iommufd).unwrap();
        assert!(matches!(space, Space::Ioas { id: 5, .. }));
        let first = fake.node.open(7, &space, true).unwrap();
        let second = fake.node.open(8, &space, false).unwrap();
        assert_eq!((first.devices.len(), second.devices.len()), (1, 2));
        let held = [
            "iommu",
            "vfio/devices/vfio0",
            "vfio/devices/vfio1",
            "vfio/devices/vfio2",
        ];
        assert_eq!(fake.kernel.holds(), held);
        // A VMM that has taken a device over holds it alone.
        let devices = second.devices;
        drop((first, space));
        assert_eq!(fake.kernel.holds(), held[2..]);
        drop(devices);
        assert!(fake.kernel.holds().is_empty());
    }

    #[test]
    fn what_another_pod_has_is_refused_by_either_way_and_free_again_after_it() {
        for (theirs, ours) in [
            (Way::Groups, Way::Groups),
            (Way::Iommufd, Way::Iommufd),
            (Way::Groups, Way::Iommufd),
        ] {
            let fake = fake();
            let their_space = fake.node.space(theirs).unwrap();
            let held = fake.node.open(8, &their_space, true).unwrap();
            let space = fake.node.space(ours).unwrap();
            let refusal = said(fake.node.open(8, &space, true));
            let expected = format!("({TWO}, {THREE}) is in use by another pod or program");
            assert!(
                refusal.contains(&expected),
                "{theirs:?} {ours:?}: {refusal}"
            );
            drop((held, their_space));
            fake.node.open(8, &space, true).unwrap();
        }
    }

    #[test]
    fn a_node_that_does_not_remap_interrupts_gives_nothing_and_nothing_stays_open() {
        for way in [Way::Groups, Way::Iommufd] {
            let fake = fake();
            fake.kernel.unsafe_interrupts.store(true, Ordering::Relaxed);
            let space = fake.node.space(way).unwrap();
            let refusal = said(fake.node.open(8, &space, true));
            assert!(refusal.contains("does not remap interrupts"), "{refusal}");
            drop(space);
            assert!(fake.kernel.holds().is_empty());
        }
    }

    #[test]
    fn assigned_groups_are_opened_beside_the_handlers_list_by_the_way_of_the_first() {
        let fake = fake();
        let assigned = |number| (number, Way::Iommufd, "main".to_owned());
        let wishes = [ONE.parse().unwrap()];
        let opened = fake
            .node
            .open_all(&wishes, &[assigned(8), assigned(7)])
            .unwrap();
        let numbers: Vec<_> = opened.groups.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [7, 8]);
        assert_eq!(opened.for_all, [7].into());
        assert!(matches!(opened.space, Space::Ioas { .. }));
        let refusal = fake.node.open_all(&[], &[assigned(8)]).unwrap_err().message;
        let expected = "assigned to container main: IOMMU group 8";
        assert!(
            refusal.contains(expected) && refusal.contains("in use"),
            "{refusal}"
        );
    }

    #[test]
    fn what_is_not_there_is_named_with_what_to_load() {
        let fake = Fake::new();
        let refused = |way| fake.node.space(way).unwrap_err().message;
        assert!(refused(Way::Groups).contains("load vfio-pci"));
        assert!(refused(Way::Iommufd).contains("load iommufd"));
        // A device of a kernel that has no nodes for devices.
        fake.node_file("iommu");
        fake.device(ONE, "0x010802", Some("vfio-pci"), Some(7));
        let space = fake.node.space(Way::Iommufd).unwrap();
        let refusal = said(fake.node.open(7, &space, true));
        assert!(
            refusal.contains(ONE) && refusal.contains("CONFIG_VFIO_DEVICE_CDEV"),
            "{refusal}"
        );
    }
}
