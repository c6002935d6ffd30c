//! Block devices of the node that a pod's VM gets as disks: found by their numbers, as a specification names them, and
//! opened for the VMM.
//!
//! Nothing is left of it on the node but descriptors, and those go to the VMM. Blocking. Trusts the node's sysfs and
//! devtmpfs, and checks that what is opened has the number.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use brig_hypervisor::launch::open_sealed;
use nix::fcntl::OFlag;
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek64};

use crate::error::{Error, Kind, Result};

/// `linux/fs.h`: `_IO(0x12, 104)`.
const BLKSSZGET: libc::Ioctl = 0x1268;
/// `linux/fs.h`: `_IO(0x12, 94)`.
const BLKROGET: libc::Ioctl = 0x125e;

/// The number of a block device: major and minor.
pub type Numbers = (u32, u32);

/// A block device that is open.
#[derive(Debug)]
pub struct Opened {
    /// To be given to a VMM.
    pub file: OwnedFd,
    /// It cannot be written to.
    pub readonly: bool,
    /// Bytes of a logical block.
    pub block_size: u32,
}

/// Owner and permissions of a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permissions.
    pub mode: u32,
}

/// Where the kernel has the device's node.
///
/// # Errors
/// `InvalidArgument` for one that is not there.
pub(super) fn place(numbers: Numbers) -> Result<PathBuf> {
    let (major, minor) = numbers;
    let event = format!("/sys/dev/block/{major}:{minor}/uevent");
    let event = fs::read_to_string(event).map_err(|_| {
        Error::invalid(format!(
            "the node has no block device {major}:{minor}: attach it before the pod is started"
        ))
    })?;
    let name = event
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .unwrap_or_default();
    Ok(Path::new("/dev").join(name))
}

/// Whether it is part of another. Of its growth the node's kernel says nothing.
#[must_use]
pub fn is_partition((major, minor): Numbers) -> bool {
    Path::new(&format!("/sys/dev/block/{major}:{minor}/partition")).exists()
}

/// Bytes that a device has at the moment, if it is there.
#[must_use]
pub fn size((major, minor): Numbers) -> Option<u64> {
    let sectors = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size")).ok()?;
    sectors.trim().parse::<u64>().ok()?.checked_mul(512)
}

/// Opens the device, for writing too if that is wanted and the device lets itself be written to; else for reading alone.
///
/// # Errors
/// `InvalidArgument` for one that is not there or has nothing in it, `FailedPrecondition` for one that cannot be opened.
pub fn open(numbers: Numbers, write: bool) -> Result<Opened> {
    open_with(numbers, write, OFlag::empty())
}

/// As [`open`], so that nobody else mounts it as long as it is open.
///
/// # Errors
/// As of [`open`]; one that is mounted or otherwise in use on the node.
pub fn open_alone(numbers: Numbers, write: bool) -> Result<Opened> {
    open_with(numbers, write, OFlag::O_EXCL)
}

fn open_with(numbers: Numbers, write: bool, how: OFlag) -> Result<Opened> {
    let path = place(numbers)?;
    let (major, minor) = numbers;
    let what = format!(
        "block device {} ({major}:{minor}) of the node",
        path.display()
    );
    let failed = |error: io::Error, fix: &str| {
        let message = format!("{what} cannot be given to the pod: {error}{fix}");
        Error::new(Kind::FailedPrecondition, message)
    };
    let not_opened = |error: io::Error| {
        let fix = match error.raw_os_error() {
            Some(libc::EBUSY) => {
                "; it is mounted or otherwise in use on the node: unmount it there, because two kernels would damage what \
                 is on it"
            }
            Some(libc::ENXIO | libc::ENOMEDIUM) => "; attach something to it first",
            _ => "",
        };
        failed(error, fix)
    };
    let open = |access| open_sealed(&path, access | how);
    let mut writable = None;
    if write {
        match open(OFlag::O_RDWR) {
            // A device that is read-only opens all the same, and fails each write. It is closed here, before it is
            // opened alone a second time.
            Ok(file) => writable = Some(file).filter(|file| !is_set_readonly(file)),
            Err(error) if is_readonly(&error) => {}
            Err(error) => return Err(not_opened(error)),
        }
    }
    let (file, readonly) = match writable {
        Some(file) => (file, false),
        None => (open(OFlag::O_RDONLY).map_err(not_opened)?, true),
    };
    let stat = fstat(&file).map_err(|errno| failed(errno.into(), ""))?;
    let found = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
    if stat.st_mode & libc::S_IFMT != libc::S_IFBLK || found != numbers {
        return Err(Error::new(
            Kind::FailedPrecondition,
            format!(
                "{what}: what is at {} is another device; is /dev of the node a devtmpfs?",
                path.display()
            ),
        ));
    }
    let size = lseek64(&file, 0, Whence::SeekEnd).map_err(|errno| failed(errno.into(), ""))?;
    if size < 512 {
        return Err(Error::invalid(format!(
            "{what} is empty: attach something to it (a loop device: losetup) before the pod is started"
        )));
    }
    let mut block_size: libc::c_int = 0;
    // SAFETY: the kernel writes one int, which lives until the call has returned.
    let asked = unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut block_size) };
    if asked != 0 {
        return Err(failed(io::Error::last_os_error(), ""));
    }
    Ok(Opened {
        file,
        readonly,
        block_size: u32::try_from(block_size).unwrap_or(512),
    })
}

/// The device says that it is read-only (`losetup --read-only`, `blockdev --setro`, a snapshot of device-mapper's).
fn is_set_readonly(device: &OwnedFd) -> bool {
    let mut readonly: libc::c_int = 0;
    // SAFETY: the kernel writes one int, which lives until the call has returned.
    let asked = unsafe { libc::ioctl(device.as_raw_fd(), BLKROGET, &raw mut readonly) };
    // What cannot be asked is no block device, which is said of it afterwards.
    asked == 0 && readonly != 0
}

/// The device does not let itself be opened for writing.
fn is_readonly(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EACCES | libc::EROFS | libc::EPERM)
    )
}

/// The block device whose node this is, and the node's owner.
#[must_use]
pub fn at(path: &Path) -> Option<(Numbers, Owner)> {
    let found = fs::metadata(path).ok()?;
    let owner = Owner {
        uid: found.uid(),
        gid: found.gid(),
        mode: found.mode() & 0o7777,
    };
    let numbers = (libc::major(found.rdev()), libc::minor(found.rdev()));
    found
        .file_type()
        .is_block_device()
        .then_some((numbers, owner))
}

/// Which block device an event of the node's kernel says has changed (lib/kobject_uevent.c).
#[must_use]
pub fn changed(event: &[u8]) -> Option<Numbers> {
    let value = |key: &str| {
        let mut fields = event.split(|byte| *byte == 0);
        let found = fields.find_map(|field| field.strip_prefix(key.as_bytes()))?;
        std::str::from_utf8(found).ok()
    };
    if value("ACTION=") != Some("change") || value("SUBSYSTEM=") != Some("block") {
        return None;
    }
    Some((
        value("MAJOR=")?.parse().ok()?,
        value("MINOR=")?.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_named_with_the_fix() {
        let error = open((250, 999), true).unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        assert!(
            error.message.contains("250:999") && error.message.contains("attach"),
            "{error}"
        );
    }

    #[test]
    fn only_the_node_of_a_block_device_is_one() {
        assert_eq!(at(Path::new("/dev/null")), None);
        assert_eq!(at(Path::new("/nonexistent")), None);
    }

    #[test]
    fn an_event_names_the_block_device_that_has_changed_or_none() {
        let event = b"change@/devices/virtual/block/loop3\0ACTION=change\0DEVPATH=/x\0SUBSYSTEM=block\0RESIZE=1\0\
            MAJOR=7\0MINOR=3\0DEVNAME=loop3\0";
        assert_eq!(changed(event), Some((7, 3)));
        for other in [
            &b"add@/x\0ACTION=add\0SUBSYSTEM=block\0MAJOR=7\0MINOR=3\0"[..],
            b"change@/x\0ACTION=change\0SUBSYSTEM=net\0MAJOR=7\0MINOR=3\0",
            b"change@/x\0ACTION=change\0SUBSYSTEM=block\0MINOR=3\0",
            b"change@/x\0ACTION=change\0SUBSYSTEM=block\0MAJOR=-7\0MINOR=3\0",
            b"ACTION=change\0SUBSYSTEM=block\0MAJOR=\xff\0MINOR=3\0",
            b"",
        ] {
            assert_eq!(changed(other), None);
        }
    }
}
