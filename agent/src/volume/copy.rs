//! What of a volume a container mounts. The volume's files are hostile: containers write to them.
use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};

use crate::detached::clone_mount;

/// A detached copy of a volume's mount, or of a file or directory in it, for a container. Called by
/// the helper.
///
/// # Errors
/// Those of openat2(2) and open_tree(2); `NotFound` for a path that is not in the volume.
pub fn for_container(root: &Path, id: &str, path: &str) -> io::Result<OwnedFd> {
    let top = openat(
        rustix::fs::CWD,
        root.join(id),
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    if path.is_empty() {
        return clone_mount(top.as_fd(), true);
    }
    let inside = loop {
        // Another container may rename what lies on the way.
        match openat2(
            &top,
            path,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        ) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    clone_mount(inside.as_fd(), true)
}
