//! A volume that is a file system on a disk of the guest, mounted once for all containers of the pod.
//!
//! The host says which disk, and what is on it; it is trusted. What is on the disk is not: no name in it is followed.
mod grow;
mod ownership;

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use brig_agent_protocol::{agent::VolumeDisk, identity};
use rustix::fs::{CWD, Mode, OFlags, openat, syncfs};
use slog::{Logger, warn};

use crate::{
    error::{Error, Result},
    init::{
        file_system::new_file_system,
        options::{self, Options},
    },
    mount_attr, pci,
    spec::Mount,
};

/// How long the guest's driver may take to see that a disk has grown, and the pause between two looks.
const PATIENCE: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(10);
/// What sysfs counts in, bytes.
const SECTOR: u64 = 512;

/// What fstab(5) has for those who read it and not for the kernel.
const FOR_OTHERS: [&str; 8] = [
    "auto", "noauto", "user", "nouser", "users", "nofail", "_netdev", "nofsck",
];

/// Such a volume, by its place in the guest.
#[derive(Debug)]
pub struct Disk {
    /// Its node.
    node: PathBuf,
    wanted: VolumeDisk,
    logger: Logger,
}

impl Disk {
    /// That of a request.
    ///
    /// # Errors
    /// `NotFound` for a disk that is not there.
    pub async fn find(wanted: VolumeDisk, logger: &Logger) -> Result<Self> {
        let nodes = pci::nodes(wanted.function).await?;
        // Its partitions come after it.
        let node = nodes.into_iter().find(|node| node.block).ok_or_else(|| {
            Error::NotFound(format!(
                "function {} of the guest's bus is no disk",
                wanted.function
            ))
        })?;
        Ok(Self {
            node: Path::new("/dev").join(node.name),
            wanted,
            logger: logger.clone(),
        })
    }

    /// Mounts it, attached nowhere: as large as its disk, and its group's, if it has one. Blocking.
    pub(super) fn mount(&self) -> Result<OwnedFd> {
        let VolumeDisk { type_: kind, .. } = &self.wanted;
        if !is_for_disks(kind) {
            return Err(Error::InvalidArgument(format!(
                "{kind:?} is no file system of a disk"
            )));
        }
        if self.wanted.has_group {
            identity::check("fsGroup", self.wanted.group).map_err(Error::InvalidArgument)?;
        }
        let options = for_kernel(&self.wanted.options);
        let plain = Mount {
            kind: kind.clone(),
            source: self.node.display().to_string(),
            ..Mount::default()
        };
        let refused = |failure: &dyn std::fmt::Display| {
            Error::FailedPrecondition(format!("mounting it as {kind}: {failure}"))
        };
        let tree = new_file_system(&plain, &options).map_err(|failure| refused(&failure))?;
        mount_attr::apply(tree.as_fd(), &options.own, false).map_err(|error| refused(&error))?;
        if !options.readonly {
            if let Err(error) = self.fill(&top(&tree)?) {
                // It is whole all the same, and of its old size.
                warn!(self.logger, "a volume's file system does not fill its disk"; "type" => kind, "error" => %error);
            }
            if self.wanted.has_group {
                let only_unless_root = self.wanted.group_unless_root;
                ownership::give(&top(&tree)?, self.wanted.group, only_unless_root)
                    .map_err(|error| refused(&format_args!("giving it to fsGroup: {error}")))?;
            }
        }
        Ok(tree)
    }

    /// Lets the file system grow to the end of its disk, which has `size` bytes by now. Blocking.
    pub(super) fn grow(&self, at: &Path, size: u64) -> Result<()> {
        let failed = |error: io::Error| {
            Error::FailedPrecondition(format!(
                "the volume's file system did not grow with its disk: {error}"
            ))
        };
        let end = Instant::now() + PATIENCE;
        let mut has = self.size().map_err(failed)?;
        while has < size {
            if Instant::now() >= end {
                let error = format!("the guest sees {has} bytes of {size}");
                return Err(failed(io::Error::other(error)));
            }
            std::thread::sleep(LOOK);
            has = self.size().map_err(failed)?;
        }
        if for_kernel(&self.wanted.options).readonly {
            return Ok(());
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let tree = openat(CWD, at, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
        self.fill(&top(&tree)?).map_err(failed)
    }

    fn fill(&self, top: &OwnedFd) -> io::Result<()> {
        grow::to(&self.wanted.type_, top, self.size()?)
    }

    /// Bytes of the disk.
    fn size(&self) -> io::Result<u64> {
        let name = self.node.file_name().unwrap_or_default();
        let text = fs::read_to_string(Path::new("/sys/class/block").join(name).join("size"))?;
        let sectors: u64 = text.trim().parse().map_err(io::Error::other)?;
        Ok(sectors.saturating_mul(SECTOR))
    }
}

/// Writes back what was written to what is mounted at a place.
pub(super) fn sync(at: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(syncfs(openat(CWD, at, flags, Mode::empty())?)?)
}

/// The top of a mount, to be read and to be told things.
fn top(tree: &OwnedFd) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(tree, ".", flags, Mode::empty()).map_err(|error| Error::io("the volume's top", error))
}

/// The kernel's own file systems, and those that lie elsewhere, need no disk, and have nothing to do with what is on one.
fn is_for_disks(kind: &str) -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    let of_a_disk = |line: &str| {
        line.split_once('\t')
            .is_none_or(|(how, name)| how.is_empty() || name != kind)
    };
    !kind.is_empty() && kind.bytes().all(plain) && known.lines().all(of_a_disk)
}

/// A volume's options, as the kernel wants them.
fn for_kernel(given: &[String]) -> Options {
    let mut options = options::parse(given);
    options.data.retain(|(key, _)| {
        !FOR_OTHERS.contains(&key.as_str()) && !key.starts_with("x-") && key != "comment"
    });
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_file_systems_of_disks_are_mounted_from_one() {
        for kind in [
            "proc", "sysfs", "tmpfs", "", "ext4 x", "../ext4", "fuse.x", "EXT4",
        ] {
            assert!(!is_for_disks(kind), "{kind:?}");
        }
        // Whether there is a module for it the kernel says.
        for kind in ["no_such_file_system", "zonefs"] {
            assert!(is_for_disks(kind), "{kind:?}");
        }
    }

    #[test]
    fn one_that_is_to_grow_and_is_not_there_yet_is_not_mounted_for_that() {
        let run = tempfile::tempdir().unwrap();
        let submounts = std::sync::Arc::new(crate::submounts::Submounts::new(None));
        let volumes = super::super::Volumes::new(run.path(), run.path(), submounts);
        let disk = Disk {
            node: "/dev/null".into(),
            wanted: VolumeDisk::default(),
            logger: Logger::root(slog::Discard, slog::o!()),
        };
        let error = volumes.update_disk("d1", &disk, 4096).unwrap_err();
        assert!(matches!(error, Error::NotFound(_)), "{error}");
    }

    #[test]
    fn what_is_not_for_the_kernel_is_left_out() {
        let given = [
            "noatime,_netdev",
            "x-systemd.automount",
            "commit=5",
            "defaults",
            "nofail",
            "ro",
        ];
        let options = for_kernel(&given.map(str::to_owned));
        assert_eq!(options.data, [("commit".to_owned(), Some("5".to_owned()))]);
        assert!(options.readonly);
    }
}
