//! `mount_setattr(2)`, which neither nix nor rustix offers, for the jail and the share.
//!
//! Trusts its callers: it changes whatever mount they hold.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// Per-mount flags; the values are the kernel's `MOUNT_ATTR_*`.
pub(crate) const RDONLY: u64 = 0x1;
/// Set-user-id bits and file capabilities have no effect.
pub(crate) const NOSUID: u64 = 0x2;
/// Device nodes cannot be opened.
pub(crate) const NODEV: u64 = 0x4;
/// Nothing can be executed or mapped executable.
pub(crate) const NOEXEC: u64 = 0x8;
/// Owners are mapped by `userns_fd`.
const IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr` of `linux/mount.h`.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// What to change.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Change {
    /// Flags to set.
    pub(crate) set: u64,
    /// Flags to clear.
    pub(crate) clear: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`… or 0 to leave it.
    pub(crate) propagation: u64,
    /// The mounts below too.
    pub(crate) recursive: bool,
}

/// Changes the mount behind `mount`, a descriptor of `open_tree` or `fsmount`, or of the root
/// directory of an attached mount.
///
/// # Errors
/// What the kernel says; with `recursive` it changes all mounts or none.
pub(crate) fn change(mount: BorrowedFd<'_>, change: Change) -> io::Result<()> {
    let attr = MountAttr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: 0,
    };
    set(mount, &attr, change.recursive)
}

/// Has a mount that was never attached show its files' owners through the map of a user namespace;
/// `recursive`: the mounts below too.
///
/// # Errors
/// What the kernel says: `EINVAL` from a file system that cannot do it.
pub(crate) fn map_ids(
    mount: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
    recursive: bool,
) -> io::Result<()> {
    let attr = MountAttr {
        attr_set: IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    set(mount, &attr, recursive)
}

fn set(mount: BorrowedFd<'_>, attr: &MountAttr, recursive: bool) -> io::Result<()> {
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, `attr` has the size given, and the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    Ok(Errno::result(result).map(drop)?)
}
