//! PCI devices of the node that a test gives away: found by what they are, bound to vfio-pci as a device plugin leaves
//! them, and with the node again at the end of a scope. The node needs an IOMMU and devices (`BRIG_NODE_VFIO=1`).

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use brig_suite::case::not_here;

use super::check::equal;

const DEVICES: &str = "/sys/bus/pci/devices";

/// What a device plugin gives beside a group's node, and beside a device's own.
const INTERFACES: [&str; 2] = ["/dev/vfio/vfio", "/dev/iommu"];

/// That of the two that the node has.
#[must_use]
pub fn interface() -> &'static str {
    let [groups, devices] = INTERFACES;
    if Path::new(groups).exists() {
        groups
    } else {
        devices
    }
}

/// `VFIO_DEVICE_BIND_IOMMUFD`.
const BIND_IOMMUFD: libc::Ioctl = 0x3b76;

/// What a device is, by its vendor and device numbers.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    vendor: &'static str,
    device: &'static str,
}

/// An emulated accelerator; `tests/driver-bundle` has a driver for it.
pub const EDU: Kind = Kind {
    vendor: "0x1234",
    device: "0x11e8",
};
/// A disk whose driver every guest has.
pub const VIRTIO: Kind = Kind {
    vendor: "0x1af4",
    device: "0x1042",
};
/// A disk whose driver is a module of the guest's.
pub const NVME: Kind = Kind {
    vendor: "0x1b36",
    device: "0x0010",
};
/// An interface, whose cable leads to one that stays the node's.
pub const E1000E: Kind = Kind {
    vendor: "0x8086",
    device: "0x10d3",
};
/// A display. There are three: the second one has memory of 512 MiB, at addresses of 32 bits, and the third one is an
/// endpoint of PCI Express behind a root port.
pub const DISPLAY: Kind = Kind {
    vendor: "0x1234",
    device: "0x1111",
};
/// A BAR of 64 GiB.
pub const LARGE: Kind = Kind {
    vendor: "0x1b36",
    device: "0x0005",
};

/// A device that is with vfio-pci for as long as this lives.
#[derive(Debug)]
pub struct Given {
    /// Where it is: `0000:00:02.0`.
    pub address: String,
    /// Its IOMMU group.
    pub group: u32,
}

impl Given {
    /// The first of a kind.
    ///
    /// # Errors
    /// `n/a` where there is none; what the node says.
    pub fn take(kind: Kind) -> Result<Self> {
        Self::nth(kind, 0)
    }

    /// One of a kind that is alone in its group, counted by address.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn nth(kind: Kind, number: usize) -> Result<Self> {
        let found = all(kind, |members| members == 1)?.into_iter().nth(number);
        match found {
            Some(address) => Self::bind(&address, "vfio-pci"),
            None => {
                not_here("the node has no IOMMU and such a device to give away (BRIG_NODE_VFIO=1)")
            }
        }
    }

    /// Both functions of the group that has two: the first with vfio-pci, the other with `driver`.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn pair(driver: &str) -> Result<(Self, Self)> {
        let both = [EDU, LARGE].map(|kind| all(kind, |members| members == 2));
        let [Ok(first), Ok(second)] = both else {
            return not_here("the node has no group of two functions (BRIG_NODE_VFIO=1)");
        };
        let (Some(first), Some(second)) = (first.first(), second.first()) else {
            return not_here("the node has no group of two functions (BRIG_NODE_VFIO=1)");
        };
        let second = Self::bind(second, driver)?;
        Ok((Self::bind(first, "vfio-pci")?, second))
    }

    /// Binds a device to a driver of the node.
    ///
    /// # Errors
    /// What the node says.
    pub fn bind(address: &str, driver: &str) -> Result<Self> {
        let loaded = Command::new("modprobe").arg(driver).status()?;
        ensure!(loaded.success(), "{driver} cannot be loaded");
        let device = Path::new(DEVICES).join(address);
        let group = fs::canonicalize(device.join("iommu_group"))?;
        let name = group.file_name().and_then(|name| name.to_str());
        let group = name
            .and_then(|name| name.parse().ok())
            .context("no group")?;
        // Undone by its end, also if what follows fails.
        let given = Self {
            address: address.to_owned(),
            group,
        };
        fs::write(device.join("driver_override"), driver)?;
        given.rebind()?;
        given.is_with(driver)?;
        Ok(given)
    }

    /// The group's node in /dev; its own, where the kernel has no groups.
    #[must_use]
    pub fn node(&self) -> String {
        let group = format!("/dev/vfio/{}", self.group);
        if Path::new(&group).exists() {
            return group;
        }
        self.own_node().unwrap_or(group)
    }

    /// Its own node, where the kernel has such.
    #[must_use]
    pub fn own_node(&self) -> Option<String> {
        let mut own = fs::read_dir(self.directory().join("vfio-dev")).ok()?;
        let name = own.next()?.ok()?.file_name();
        let node = format!("/dev/vfio/devices/{}", name.to_str()?);
        Path::new(&node).exists().then_some(node)
    }

    /// Nobody has it open.
    ///
    /// # Errors
    /// Who cannot be asked.
    pub fn is_free(&self) -> Result<bool> {
        let open = |path: &str| File::options().read(true).write(true).open(path);
        let node = self.node();
        if Some(&node) != self.own_node().as_ref() {
            // A group has one owner.
            return Ok(open(&node).is_ok());
        }
        // Anybody may open the device's node, and one may bind it.
        let (device, iommufd) = (open(&node)?, open(INTERFACES[1])?);
        let mut bind = [16, 0, iommufd.as_raw_fd(), 0];
        // SAFETY: the kernel reads and writes the 16 bytes of `vfio_device_bind_iommufd`.
        let bound = unsafe { libc::ioctl(device.as_raw_fd(), BIND_IOMMUFD, bind.as_mut_ptr()) };
        Ok(bound == 0)
    }

    /// Its directory in sysfs.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        Path::new(DEVICES).join(&self.address)
    }

    /// The driver that has it, if any.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        let driver = fs::read_link(self.directory().join("driver")).ok()?;
        Some(driver.file_name()?.to_str()?.to_owned())
    }

    /// Fails unless this driver has it.
    ///
    /// # Errors
    /// Names both.
    pub fn is_with(&self, wanted: &str) -> Result<()> {
        equal(
            "the device's driver",
            Some(wanted),
            self.driver().as_deref(),
        )
    }

    /// Gives it to the driver that the node has for it; the node's own, or the one that it was bound to here.
    fn rebind(&self) -> Result<()> {
        let device = self.directory();
        if device.join("driver").exists() {
            fs::write(device.join("driver/unbind"), &self.address)?;
        }
        Ok(fs::write("/sys/bus/pci/drivers_probe", &self.address)?)
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        let _ = fs::write(self.directory().join("driver_override"), "\n");
        let _ = self.rebind();
    }
}

/// Addresses of the devices of a kind whose group has so many members.
fn all(kind: Kind, members: impl Fn(usize) -> bool) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(DEVICES)?.flatten() {
        let id = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        let is_one = id("vendor").trim() == kind.vendor && id("device").trim() == kind.device;
        let group = fs::read_dir(entry.path().join("iommu_group/devices"));
        if is_one && group.is_ok_and(|group| members(group.count())) {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found.sort();
    Ok(found)
}
