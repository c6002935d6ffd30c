//! Host files whose metadata a VMM cannot change.
//!
//! The VMM is the node's root to file permissions: it owns every root-owned inode it has a descriptor of,
//! and may `fchmod`, `fchown` or `fsetxattr` it, be that `/dev/kvm`, the kernel image or its own
//! executable. Nothing in namespaces, capabilities or Landlock forbids that; a read-only mount does. So a
//! file goes to a VMM by way of a detached, read-only clone of its mount. Devices can be written to
//! nevertheless.
//!
//! Trusted: the path.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::mount_attr::{self, Change};

/// Opens a host file or device to be given to a VMM: `/dev/kvm`, `/dev/net/tun`, the kernel, the
/// initramfs, a block device. Not for regular files the VMM must write.
///
/// # Errors
/// What the host says; `EROFS` for a regular file opened for writing.
pub fn open_sealed(path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let mount = open_tree(
        CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    mount_attr::change(
        mount.as_fd(),
        Change {
            set: mount_attr::RDONLY | mount_attr::NOSUID,
            propagation: libc::MS_PRIVATE,
            ..Change::default()
        },
    )?;
    // An O_PATH descriptor is opened in earnest by its link.
    let link = format!("/proc/thread-self/fd/{}", mount.as_raw_fd());
    Ok(open(
        link.as_str(),
        flags | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use nix::sys::stat::fchmod;

    #[test]
    fn a_sealed_file_can_be_used_but_not_changed() {
        if !brig_fixtures::needs::root() {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let sealed = open_sealed(file.path(), OFlag::O_RDONLY).unwrap();
        assert_eq!(fchmod(&sealed, Mode::empty()), Err(Errno::EROFS));
        let error = open_sealed(file.path(), OFlag::O_RDWR).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));

        let null = open_sealed(Path::new("/dev/null"), OFlag::O_RDWR).unwrap();
        assert_eq!(nix::unistd::write(&null, b"x"), Ok(1));
        assert_eq!(
            fchmod(&null, Mode::from_bits_truncate(0o666)),
            Err(Errno::EROFS)
        );
        assert!(open_sealed(Path::new("/nonexistent"), OFlag::O_RDONLY).is_err());
    }
}
