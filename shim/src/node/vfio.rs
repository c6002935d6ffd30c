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
mod fit;
pub mod open;
pub mod readiness;
mod refusal;
mod survey;
#[cfg(test)]
pub(crate) mod testing;

pub use assigned::Meant;
use calls::{Calls, Kernel};
pub use choose::Opened;
pub use fit::Room;
pub use refusal::Refusal;
pub use survey::{Survey, Surveyed};

/// Where the node shows its devices.
#[derive(Debug, Clone)]
pub struct Node {
    sys: PathBuf,
    dev: PathBuf,
    proc: PathBuf,
    /// Those of the kernel that runs.
    modules: PathBuf,
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
fn device_node(device: &Path) -> std::result::Result<String, Refusal> {
    let mut entries = fs::read_dir(device.join("vfio-dev")).into_iter().flatten();
    let entry = entries.next().and_then(std::result::Result::ok);
    let name = entry.and_then(|entry| entry.file_name().into_string().ok());
    name.ok_or_else(|| {
        Refusal::new(
            "it has no node in /dev/vfio/devices",
            "the node's kernel needs CONFIG_VFIO_DEVICE_CDEV, or CONFIG_VFIO_GROUP",
        )
    })
}

/// A device of a group.
struct Member {
    name: String,
    driver: Option<String>,
    /// A bridge above the devices.
    is_bridge: bool,
}

impl Member {
    fn is_with_vfio(&self) -> bool {
        let mut driver = self.driver.iter();
        driver.any(|driver| driver.contains("vfio"))
    }

    /// The driver of the node that keeps the group from being given away. Nobody can take meanwhile what nobody has;
    /// pci-stub is there to keep it so.
    fn held_by(&self) -> Option<&str> {
        let driver = self.driver.as_deref()?;
        let harmless = self.is_bridge || self.is_with_vfio() || driver == "pci-stub";
        (!harmless).then_some(driver)
    }
}

impl Node {
    /// This one.
    #[must_use]
    pub fn new() -> Self {
        let kernel = rustix::system::uname();
        let release = kernel.release().to_string_lossy().into_owned();
        Self {
            sys: "/sys".into(),
            dev: "/dev".into(),
            proc: "/proc".into(),
            modules: Path::new("/lib/modules").join(release),
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

    /// The members of a group, by name.
    fn members_of(&self, group: &str) -> std::io::Result<Vec<Member>> {
        let directory = self
            .sys
            .join(format!("kernel/iommu_groups/{group}/devices"));
        let mut members: Vec<_> = fs::read_dir(directory)?
            .flatten()
            .map(|entry| {
                let class = fs::read_to_string(entry.path().join("class")).unwrap_or_default();
                Member {
                    name: entry.file_name().to_string_lossy().into_owned(),
                    driver: target(&entry.path().join("driver")),
                    is_bridge: class.trim().starts_with("0x0604"),
                }
            })
            .collect();
        members.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(members)
    }

    /// The PCI addresses of a group's devices.
    ///
    /// # Errors
    /// `FailedPrecondition` with the members that hold it back, and their drivers.
    pub fn members(&self, group: u32) -> Result<Vec<String>> {
        let refused = |refusal: Refusal| Error::new(Kind::FailedPrecondition, refusal.to_string());
        self.whole(group).map_err(refused)
    }

    fn whole(&self, group: u32) -> std::result::Result<Vec<String>, Refusal> {
        let members = self.members_of(&group.to_string()).map_err(|error| {
            Refusal::new(
                format!("the node has no IOMMU group {group} ({error})"),
                "turn its IOMMU on in the firmware, and with intel_iommu=on",
            )
        })?;
        let others = members
            .iter()
            .filter_map(|member| Some(format!("{} ({})", member.name, member.held_by()?)));
        let others: Vec<_> = others.collect();
        if !others.is_empty() {
            let held = others.join(", ");
            return Err(Refusal::new(
                format!(
                    "IOMMU group {group} is not free, because a driver of the node holds {held}"
                ),
                "bind every device of the group to vfio-pci",
            ));
        }
        let ours = members.into_iter().filter(Member::is_with_vfio);
        let ours: Vec<_> = ours.map(|member| member.name).collect();
        if ours.is_empty() {
            return Err(Refusal::new(
                format!("no device of IOMMU group {group} is bound to vfio-pci"),
                "bind it first",
            ));
        }
        Ok(ours)
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
