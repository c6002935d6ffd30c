//! Devices of the node by way of VFIO: which group a node in /dev names, whether the group is whole, and its descriptors.
//!
//! A group is what the IOMMU can tell apart, so it goes whole or not at all. The devices are with vfio-pci already, as
//! device plugins leave them; nothing is bound here, so nothing has to be given back but descriptors: the kernel resets a
//! device when its last one is closed, by whatever death. Blocking. Trusts the node's sysfs.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use brig_hypervisor::launch::open_sealed;
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::error::{Error, Kind, Result};

mod choose;

pub use choose::Opened;

/// `linux/vfio.h`: `_IO(';', 100 + n)`.
const GET_API_VERSION: libc::Ioctl = 0x3b64;
const CHECK_EXTENSION: libc::Ioctl = 0x3b65;
const SET_IOMMU: libc::Ioctl = 0x3b66;
const GROUP_SET_CONTAINER: libc::Ioctl = 0x3b68;
const GROUP_GET_DEVICE_FD: libc::Ioctl = 0x3b6a;
/// `VFIO_TYPE1v2_IOMMU`.
const TYPE1: libc::c_ulong = 3;

/// Where the node shows its devices.
#[derive(Debug, Clone)]
pub struct Node {
    sys: PathBuf,
    dev: PathBuf,
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

/// What a node in /dev is to VFIO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// A device or a group of this number.
    Group(u32),
    /// The container's node, which device plugins give as well and which means nothing in a guest.
    Container,
}

/// The name of what a link of sysfs leads to.
fn target(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// A group that is open.
#[derive(Debug)]
pub struct Group {
    /// Held as long as its devices are used.
    _group: OwnedFd,
    /// Its devices by their PCI addresses, each until it is given to a VMM.
    pub devices: Vec<(String, OwnedFd)>,
}

impl Group {
    /// One that is open.
    pub(crate) fn new(group: OwnedFd, devices: Vec<(String, OwnedFd)>) -> Self {
        Self {
            _group: group,
            devices,
        }
    }
}

impl Node {
    /// This one.
    #[must_use]
    pub fn new() -> Self {
        Self {
            sys: "/sys".into(),
            dev: "/dev/vfio".into(),
        }
    }

    /// Whether anything is there to be passed through.
    #[must_use]
    pub fn has_devices(&self) -> bool {
        let Ok(entries) = fs::read_dir(&self.dev) else {
            return false;
        };
        entries.flatten().any(|entry| entry.file_name() != "vfio")
    }

    /// What a character device is to VFIO, by its numbers: a container may have it under any name.
    ///
    /// # Errors
    /// A device whose group has no node, because the kernel has only the newer interface.
    pub fn named(&self, (major, minor): (u32, u32)) -> Result<Option<Named>> {
        let link = self.sys.join(format!("dev/char/{major}:{minor}"));
        let Ok(place) = fs::canonicalize(link) else {
            return Ok(None);
        };
        let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        let (Some(own), Some(class)) = (name(&place), place.parent().and_then(name)) else {
            return Ok(None);
        };
        match class.as_str() {
            "vfio" => Ok(own.parse().ok().map(Named::Group)),
            "misc" if own == "vfio" => Ok(Some(Named::Container)),
            "vfio-dev" => {
                let group = target(&place.join("device/iommu_group"));
                let number = group.and_then(|group| group.parse().ok());
                match number {
                    Some(number) if self.dev.join(format!("{number}")).exists() => {
                        Ok(Some(Named::Group(number)))
                    }
                    _ => Err(Error::new(
                        Kind::FailedPrecondition,
                        format!(
                            "/dev/vfio/devices/{own} has no group in /dev/vfio: Brig needs a kernel with \
                             CONFIG_VFIO_GROUP"
                        ),
                    )),
                }
            }
            _ => Ok(None),
        }
    }

    /// A container for groups.
    ///
    /// # Errors
    /// `FailedPrecondition`: the module is missing.
    pub fn container(&self) -> Result<OwnedFd> {
        let container = open_sealed(&self.dev.join("vfio"), OFlag::O_RDWR).map_err(|error| {
            Error::new(
                Kind::FailedPrecondition,
                format!("/dev/vfio/vfio cannot be opened ({error}): load vfio-pci on this node"),
            )
        })?;
        let version = request(&container, GET_API_VERSION, 0);
        if version != Ok(0) || !matches!(request(&container, CHECK_EXTENSION, TYPE1), Ok(1..)) {
            return Err(Error::new(
                Kind::FailedPrecondition,
                "this node's VFIO has no type 1 IOMMU: load vfio_iommu_type1".to_owned(),
            ));
        }
        Ok(container)
    }

    /// The PCI addresses of a group's devices.
    ///
    /// # Errors
    /// `FailedPrecondition` with the members that hold it back, and their drivers.
    pub fn members(&self, group: u32) -> Result<Vec<String>> {
        let directory = self
            .sys
            .join(format!("kernel/iommu_groups/{group}/devices"));
        let entries = fs::read_dir(&directory).map_err(|error| {
            Error::new(
                Kind::FailedPrecondition,
                format!(
                    "the node has no IOMMU group {group} ({error}): is its IOMMU on (intel_iommu=on, or amd_iommu in the \
                     firmware)?"
                ),
            )
        })?;
        let (mut ours, mut others) = (Vec::new(), Vec::new());
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = entry.path();
            let class = fs::read_to_string(path.join("class")).unwrap_or_default();
            match target(&path.join("driver")) {
                Some(driver) if driver.contains("vfio") => ours.push(name),
                // A bridge above the devices.
                _ if class.trim().starts_with("0x0604") => {}
                // Nobody's, and nobody can take it meanwhile; pci-stub is there to keep it so.
                None => {}
                Some(driver) if driver == "pci-stub" => {}
                Some(driver) => others.push(format!("{name} ({driver})")),
            }
        }
        if !others.is_empty() {
            others.sort();
            return Err(Error::new(
                Kind::FailedPrecondition,
                format!(
                    "IOMMU group {group} is not free: a driver of the node holds {}; bind every device of the group to \
                     vfio-pci",
                    others.join(", ")
                ),
            ));
        }
        if ours.is_empty() {
            return Err(Error::new(
                Kind::FailedPrecondition,
                format!("no device of IOMMU group {group} is bound to vfio-pci"),
            ));
        }
        ours.sort();
        Ok(ours)
    }

    /// Each PCI device of the node but its bridges: where it is, and what it takes to give it to a pod, or that it can be.
    #[must_use]
    pub fn survey(&self) -> Vec<(String, std::result::Result<String, String>)> {
        let Ok(entries) = fs::read_dir(self.sys.join("bus/pci/devices")) else {
            return Vec::new();
        };
        let mut found: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let read = |file: &str| {
                    let text = fs::read_to_string(entry.path().join(file)).unwrap_or_default();
                    text.trim().trim_start_matches("0x").to_owned()
                };
                if read("class").starts_with("06") {
                    return None;
                }
                let name = entry.file_name().to_string_lossy().into_owned();
                let what = format!("{name} ({}:{})", read("vendor"), read("device"));
                Some((what, self.verdict(&entry.path())))
            })
            .collect();
        found.sort();
        found
    }

    /// Whether a device can be given to a pod, by its directory in sysfs.
    fn verdict(&self, device: &Path) -> std::result::Result<String, String> {
        let Some(group) = target(&device.join("iommu_group")) else {
            return Err(
                "no IOMMU stands above it: turn it on in the firmware, and with intel_iommu=on"
                    .to_owned(),
            );
        };
        match target(&device.join("driver")) {
            Some(driver) if driver.contains("vfio") => {
                let number = group.parse().map_err(|_| format!("IOMMU group {group}"))?;
                self.members(number).map_err(|error| error.message)?;
                Ok(format!(
                    "can be given to a pod as {}/{group}",
                    self.dev.display()
                ))
            }
            Some(driver) => Err(format!(
                "the node uses it ({driver}, IOMMU group {group}): bind it to vfio-pci to give it to a pod"
            )),
            None => Err(format!(
                "no driver has it (IOMMU group {group}): bind it to vfio-pci to give it to a pod"
            )),
        }
    }

    /// Opens a group and its devices, in `container`; `first`: nothing is in it yet.
    ///
    /// # Errors
    /// One sentence with the fix: held by another pod, not whole, not safe.
    pub fn open(&self, number: u32, container: &OwnedFd, first: bool) -> Result<Group> {
        let members = self.members(number)?;
        let refused = |what: String| Error::new(Kind::FailedPrecondition, what);
        let path = self.dev.join(number.to_string());
        let group = fs::File::options().read(true).write(true).open(&path);
        let group: OwnedFd = group
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => refused(format!(
                    "IOMMU group {number} ({}) is in use by another pod or program",
                    members.join(", ")
                )),
                _ => refused(format!("{} cannot be opened: {error}", path.display())),
            })?
            .into();
        let raw = container.as_raw_fd();
        // The kernel reads an int.
        request(
            &group,
            GROUP_SET_CONTAINER,
            (&raw const raw).addr() as libc::c_ulong,
        )
        .map_err(|errno| {
            refused(format!(
                "IOMMU group {number} ({}) cannot be put beside the pod's other devices: {errno}",
                members.join(", ")
            ))
        })?;
        if first {
            request(container, SET_IOMMU, TYPE1).map_err(|errno| match errno {
                Errno::EPERM => refused(format!(
                    "the node's IOMMU does not remap interrupts, so IOMMU group {number} is not safe to give away: turn \
                     interrupt remapping on in the firmware"
                )),
                _ => refused(format!("the node's IOMMU cannot be used for group {number}: {errno}")),
            })?;
        }
        let mut devices = Vec::new();
        for name in members {
            let text = CString::new(name.clone())
                .map_err(|_| Error::internal("a PCI address with a zero in it"))?;
            let address = text.as_ptr().addr() as libc::c_ulong;
            let fd = request(&group, GROUP_GET_DEVICE_FD, address).map_err(|errno| {
                refused(format!(
                    "device {name} cannot be opened: {}",
                    io::Error::from(errno)
                ))
            })?;
            // SAFETY: the kernel has just made this descriptor for us alone.
            devices.push((name, unsafe { OwnedFd::from_raw_fd(fd) }));
        }
        Ok(Group::new(group, devices))
    }
}

fn request(
    fd: &OwnedFd,
    request: libc::Ioctl,
    argument: libc::c_ulong,
) -> nix::Result<libc::c_int> {
    // SAFETY: the requests made here take a number, or read an int or a text that the caller keeps meanwhile.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    pub(super) struct Fake {
        root: tempfile::TempDir,
        pub(super) node: Node,
    }

    impl Fake {
        pub(super) fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let node = Node {
                sys: root.path().join("sys"),
                dev: root.path().join("dev"),
            };
            fs::create_dir_all(&node.dev).unwrap();
            Self { root, node }
        }

        fn directory(&self, path: &str) -> PathBuf {
            let made = self.root.path().join("sys").join(path);
            fs::create_dir_all(&made).unwrap();
            made
        }

        fn member(&self, group: u32, name: &str, class: &str, driver: Option<&str>) {
            let device = self.directory(&format!("kernel/iommu_groups/{group}/devices/{name}"));
            fs::write(device.join("class"), format!("{class}\n")).unwrap();
            if let Some(driver) = driver {
                symlink(format!("/drivers/{driver}"), device.join("driver")).unwrap();
            }
        }

        /// An NVMe.
        pub(super) fn device(
            &self,
            name: &str,
            class: &str,
            driver: Option<&str>,
            group: Option<u32>,
        ) {
            let place = self.directory(&format!("bus/pci/devices/{name}"));
            for (file, text) in [("class", class), ("vendor", "0x1b36"), ("device", "0x0010")] {
                fs::write(place.join(file), format!("{text}\n")).unwrap();
            }
            if let Some(driver) = driver {
                let target = self.directory(&format!("bus/pci/drivers/{driver}"));
                symlink(target, place.join("driver")).unwrap();
            }
            if let Some(group) = group {
                let target = self.directory(&format!("kernel/iommu_groups/{group}"));
                symlink(target, place.join("iommu_group")).unwrap();
                self.member(group, name, class, driver);
            }
        }

        fn character(&self, number: &str, target: &str) {
            let target = self.directory(target);
            let links = self.directory("dev/char");
            symlink(target, links.join(number)).unwrap();
        }
    }

    #[test]
    fn nodes_are_known_by_their_numbers_and_not_by_their_names() {
        let fake = Fake::new();
        fake.character("240:0", "devices/virtual/vfio/12");
        fake.character("10:196", "devices/virtual/misc/vfio");
        fake.character("10:229", "devices/virtual/misc/fuse");
        fake.character("511:0", "devices/pci0000:00/0000:00:04.0/vfio-dev/vfio0");
        let named = |numbers| fake.node.named(numbers).unwrap();
        assert_eq!(named((240, 0)), Some(Named::Group(12)));
        assert_eq!(named((10, 196)), Some(Named::Container));
        assert_eq!(named((10, 229)), None);
        assert_eq!(named((1, 3)), None);
        // A device by itself, first without a group's node, then with.
        let device = fake.directory("devices/pci0000:00/0000:00:04.0");
        let group = fake.directory("kernel/iommu_groups/7");
        symlink(&group, device.join("iommu_group")).unwrap();
        let place = device.join("vfio-dev/vfio0");
        symlink(&device, place.join("device")).unwrap();
        let refused = fake.node.named((511, 0)).unwrap_err().message;
        assert!(refused.contains("CONFIG_VFIO_GROUP"), "{refused}");
        fs::write(fake.node.dev.join("7"), "").unwrap();
        assert_eq!(named((511, 0)), Some(Named::Group(7)));
    }

    #[test]
    fn a_group_goes_whole_or_its_other_members_are_named_with_their_drivers() {
        let fake = Fake::new();
        fake.member(3, "0000:03:00.0", "0x030000", Some("vfio-pci"));
        fake.member(3, "0000:02:00.0", "0x060400", Some("pcieport"));
        assert_eq!(fake.node.members(3).unwrap(), ["0000:03:00.0"]);
        fake.member(3, "0000:03:00.1", "0x040300", Some("snd_hda_intel"));
        let refused = fake.node.members(3).unwrap_err();
        assert_eq!(refused.kind, Kind::FailedPrecondition);
        let said = refused.message;
        assert!(said.contains("0000:03:00.1 (snd_hda_intel)"), "{said}");
        assert!(
            !said.contains("pcieport") && said.contains("vfio-pci"),
            "{said}"
        );
        fake.member(5, "0000:05:00.0", "0x030000", Some("vfio-pci"));
        fake.member(5, "0000:05:00.1", "0x040300", Some("pci-stub"));
        assert_eq!(fake.node.members(5).unwrap(), ["0000:05:00.0"]);
        fake.member(4, "0000:04:00.0", "0x020000", None);
        let nobody = fake.node.members(4).unwrap_err().message;
        assert!(nobody.contains("bound to vfio-pci"), "{nobody}");
        let none = fake.node.members(9).unwrap_err().message;
        assert!(none.contains("IOMMU"), "{none}");
    }

    #[test]
    fn every_device_but_bridges_is_told_with_what_it_takes() {
        let fake = Fake::new();
        fake.device("0000:00:00.0", "0x060000", None, Some(0));
        fake.device("0000:00:02.0", "0x010802", Some("vfio-pci"), Some(2));
        fake.device("0000:00:03.0", "0x020000", Some("e1000e"), Some(3));
        fake.device("0000:00:04.0", "0x030000", None, Some(4));
        fake.device("0000:00:05.0", "0x030000", None, None);
        let said: Vec<String> = fake
            .node
            .survey()
            .into_iter()
            .map(|(what, verdict)| format!("{what}: {verdict:?}"))
            .collect();
        assert_eq!(said.len(), 4, "{said:?}");
        for (line, words) in said.iter().zip([
            "0000:00:02.0 (1b36:0010): Ok(\"can be given",
            "the node uses it (e1000e, IOMMU group 3)",
            "no driver has it",
            "no IOMMU stands above it",
        ]) {
            assert!(line.contains(words), "{line}");
        }
    }

    #[test]
    fn a_node_without_vfio_has_nothing_and_says_what_to_load() {
        let fake = Fake::new();
        assert!(!fake.node.has_devices());
        let refused = fake.node.container().unwrap_err().message;
        assert!(refused.contains("vfio-pci"), "{refused}");
        fs::write(fake.node.dev.join("vfio"), "").unwrap();
        assert!(!fake.node.has_devices());
        assert!(fake.node.container().is_err());
        fs::write(fake.node.dev.join("12"), "").unwrap();
        assert!(fake.node.has_devices());
    }
}
