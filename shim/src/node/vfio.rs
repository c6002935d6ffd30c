//! Devices of the node by way of VFIO: which group a node in /dev names, and whether the group is whole.
//!
//! A group is what the IOMMU can tell apart, so it goes whole or not at all. The devices are with vfio-pci already, as
//! device plugins leave them; nothing is bound here, so nothing has to be given back but descriptors: the kernel resets a
//! device when its last one is closed, by whatever death. Blocking. Trusts the node's sysfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Kind, Result};

mod assigned;
mod calls;
mod choose;
pub mod open;
#[cfg(test)]
mod testing;

pub use assigned::Meant;
use calls::{Calls, Kernel};
pub use choose::Opened;

/// Where the node shows its devices.
#[derive(Debug, Clone)]
pub struct Node {
    sys: PathBuf,
    dev: PathBuf,
    calls: Arc<dyn Calls>,
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

/// What a node in /dev is to VFIO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// A group of this number.
    Group(u32),
    /// A device by itself, of the group of this number.
    Device(u32),
    /// The node of all groups, or of iommufd, which device plugins give as well and which mean nothing in a guest.
    Interface,
}

impl Named {
    /// The group that it is or belongs to, and the way to it that the name implies.
    #[must_use]
    pub fn group(self) -> Option<(u32, Way)> {
        match self {
            Self::Group(number) => Some((number, Way::Groups)),
            Self::Device(number) => Some((number, Way::Iommufd)),
            Self::Interface => None,
        }
    }
}

/// By which interface of the kernel a VM has its devices: all of them by the same one, which pins its memory once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `/dev/vfio/12`, in a container.
    Groups,
    /// `/dev/vfio/devices/vfio0`, in an address space of `/dev/iommu`.
    Iommufd,
}

/// The name of what a link of sysfs leads to.
fn target(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// The name of a device's own node, by its directory in sysfs.
fn device_node(device: &Path) -> std::result::Result<String, String> {
    let mut entries = fs::read_dir(device.join("vfio-dev")).into_iter().flatten();
    let entry = entries.next().and_then(std::result::Result::ok);
    let name = entry.and_then(|entry| entry.file_name().into_string().ok());
    name.ok_or_else(|| {
        "it has no node in /dev/vfio/devices: the node's kernel needs CONFIG_VFIO_DEVICE_CDEV, or CONFIG_VFIO_GROUP"
            .to_owned()
    })
}

impl Node {
    /// This one.
    #[must_use]
    pub fn new() -> Self {
        Self {
            sys: "/sys".into(),
            dev: "/dev".into(),
            calls: Arc::new(Kernel),
        }
    }

    /// Whether anything is there to be passed through.
    #[must_use]
    pub fn has_devices(&self) -> bool {
        let Ok(entries) = fs::read_dir(self.dev.join("vfio")) else {
            return false;
        };
        entries.flatten().any(|entry| entry.file_name() != "vfio")
    }

    /// What a character device is to VFIO, by its numbers: a container may have it under any name.
    #[must_use]
    pub fn named(&self, (major, minor): (u32, u32)) -> Option<Named> {
        let place = fs::canonicalize(self.sys.join(format!("dev/char/{major}:{minor}"))).ok()?;
        let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        let (own, class) = (name(&place)?, place.parent().and_then(name)?);
        match (class.as_str(), own.as_str()) {
            ("vfio", _) => own.parse().ok().map(Named::Group),
            ("misc", "vfio" | "iommu") => Some(Named::Interface),
            ("vfio-dev", _) => {
                let group = target(&place.join("device/iommu_group"))?;
                group.parse().ok().map(Named::Device)
            }
            _ => None,
        }
    }

    /// The way to have devices that were asked for by `wanted`: the other one on a node whose kernel lacks that.
    #[must_use]
    pub fn way(&self, wanted: Way) -> Way {
        let groups = self.dev.join("vfio/vfio").exists();
        let iommufd = self.dev.join("iommu").exists();
        match (groups, iommufd) {
            // Without the option for it, devices have no nodes.
            (true, true) if self.dev.join("vfio/devices").exists() => wanted,
            // There is none as long as no device is with vfio-pci.
            (false, true) => Way::Iommufd,
            _ => Way::Groups,
        }
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

    /// The other members of a device's group that a driver of the node has, with their drivers.
    fn and_others(&self, device: &Path, group: &str) -> String {
        let members = self
            .sys
            .join(format!("kernel/iommu_groups/{group}/devices"));
        let entries = fs::read_dir(members).into_iter().flatten().flatten();
        let mut others: Vec<_> = entries
            .filter(|entry| Some(entry.file_name().as_os_str()) != device.file_name())
            .filter(|entry| {
                let class = fs::read_to_string(entry.path().join("class")).unwrap_or_default();
                !class.trim().starts_with("0x0604")
            })
            .filter_map(|entry| {
                let driver = target(&entry.path().join("driver"))?;
                let is_held = !driver.contains("vfio") && driver != "pci-stub";
                let name = entry.file_name();
                is_held.then(|| format!("{} ({driver})", name.to_string_lossy()))
            })
            .collect();
        if others.is_empty() {
            return String::new();
        }
        others.sort();
        format!(", and with it {} of the same group,", others.join(", "))
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
                let path = self.dev.join("vfio");
                let node = match self.way(Way::Groups) {
                    Way::Groups => path.join(group),
                    Way::Iommufd => path.join("devices").join(device_node(device)?),
                };
                Ok(format!("can be given to a pod as {}", node.display()))
            }
            Some(driver) => Err(format!(
                "the node uses it ({driver}, IOMMU group {group}): bind it{} to vfio-pci to give it to a pod",
                self.and_others(device, &group)
            )),
            None => Err(format!(
                "no driver has it (IOMMU group {group}): bind it{} to vfio-pci to give it to a pod",
                self.and_others(device, &group)
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::Fake;
    use super::*;

    #[test]
    fn nodes_are_known_by_their_numbers_and_not_by_their_names() {
        let fake = Fake::new();
        fake.character("240:0", "devices/virtual/vfio/12");
        fake.character("10:196", "devices/virtual/misc/vfio");
        fake.character("10:125", "devices/virtual/misc/iommu");
        fake.character("10:229", "devices/virtual/misc/fuse");
        fake.device("0000:00:04.0", "0x010802", Some("vfio-pci"), Some(7));
        fake.character("511:0", &fake.own_node("0000:00:04.0", "vfio0"));
        let named = |numbers| fake.node.named(numbers);
        assert_eq!(named((240, 0)), Some(Named::Group(12)));
        assert_eq!(named((10, 196)), Some(Named::Interface));
        assert_eq!(named((10, 125)), Some(Named::Interface));
        assert_eq!(named((10, 229)), None);
        assert_eq!(named((1, 3)), None);
        let device = named((511, 0)).unwrap();
        assert_eq!(device, Named::Device(7));
        assert_eq!(device.group(), Some((7, Way::Iommufd)));
    }

    #[test]
    fn the_way_is_what_was_asked_for_or_the_only_one_that_the_kernel_has() {
        let fake = Fake::new();
        let ways = || [Way::Groups, Way::Iommufd].map(|way| fake.node.way(way));
        // Where there is neither, a container is what is missed.
        assert_eq!(ways(), [Way::Groups; 2]);
        fake.node_file("iommu");
        assert_eq!(ways(), [Way::Iommufd; 2]);
        fake.node_file("vfio/vfio");
        assert_eq!(ways(), [Way::Groups; 2]);
        fake.node_file("vfio/devices/vfio0");
        assert_eq!(ways(), [Way::Groups, Way::Iommufd]);
        fs::remove_file(fake.node.dev.join("iommu")).unwrap();
        assert_eq!(ways(), [Way::Groups; 2]);
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
        fake.node_file("vfio/vfio");
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
    fn a_device_that_is_not_bound_is_told_with_those_of_its_group_that_the_node_uses() {
        let fake = Fake::new();
        fake.device("0000:03:00.0", "0x030000", Some("nouveau"), Some(3));
        fake.device("0000:03:00.1", "0x040300", Some("snd_hda_intel"), Some(3));
        fake.device("0000:03:00.2", "0x0c0330", None, Some(3));
        fake.member(3, "0000:02:00.0", "0x060400", Some("pcieport"));
        let said: Vec<_> = fake
            .node
            .survey()
            .into_iter()
            .map(|(_, verdict)| verdict.unwrap_err())
            .collect();
        let first =
            "bind it, and with it 0000:03:00.1 (snd_hda_intel) of the same group, to vfio-pci";
        assert!(said[0].contains(first), "{}", said[0]);
        let third = "0000:03:00.0 (nouveau), 0000:03:00.1 (snd_hda_intel) of the same group";
        assert!(said[2].contains(third), "{}", said[2]);
    }

    #[test]
    fn a_device_of_a_kernel_without_groups_is_told_by_its_own_node() {
        let fake = Fake::new();
        fake.device("0000:00:02.0", "0x010802", Some("vfio-pci"), Some(2));
        fake.node_file("iommu");
        fake.node_file("vfio/devices/vfio3");
        let verdict = || fake.node.survey().remove(0).1;
        assert!(verdict().unwrap_err().contains("CONFIG_VFIO_DEVICE_CDEV"));
        fake.own_node("0000:00:02.0", "vfio3");
        assert!(verdict().unwrap().ends_with("/vfio/devices/vfio3"));
    }

    #[test]
    fn a_node_has_devices_when_one_has_a_node() {
        let fake = Fake::new();
        assert!(!fake.node.has_devices());
        fake.node_file("vfio/vfio");
        assert!(!fake.node.has_devices());
        fake.node_file("vfio/12");
        assert!(fake.node.has_devices());
        let fake = Fake::new();
        fake.node_file("vfio/devices/vfio0");
        assert!(fake.node.has_devices());
    }
}
