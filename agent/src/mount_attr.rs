//! mount_setattr(2), which neither nix nor rustix wraps.
use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

/// Attributes to set and clear (`MOUNT_ATTR_…`), and the propagation type (`MS_PRIVATE` …) or 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Attributes to set.
    pub set: u64,
    /// Attributes to clear.
    pub clear: u64,
    /// One propagation flag, or 0 to leave it.
    pub propagation: u64,
}

/// Applies `change` to the mount that `fd` refers to the root of; `recursive` includes those below.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn apply(fd: BorrowedFd<'_>, change: &Change, recursive: bool) -> io::Result<()> {
    if *change == Change::default() {
        return Ok(());
    }
    let attr = libc::mount_attr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: 0,
    };
    set(fd, &attr, recursive)
}

/// Has a mount that was never attached show its files' owners through the map of a user namespace;
/// `recursive` includes those below.
///
/// # Errors
/// Those of mount_setattr(2): `EINVAL` from a file system that cannot do it.
pub fn map_ids(fd: BorrowedFd<'_>, namespace: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    set(fd, &attr, recursive)
}

fn set(fd: BorrowedFd<'_>, attr: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, `attr` is a live mount_attr of the size given, and the
    // kernel keeps neither pointer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
