//! Mounts that are attached nowhere yet: copies of what there is, and where they are put.
//!
//! What is attached to a descriptor goes where that descriptor was resolved to, whatever the path leads to
//! by then.
use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat, openat2},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
    },
};

/// A detached copy of the mount at `path` under the share. The path is the shim's and has no symlink
/// of its own; refusing them keeps what a guest can write there from leading elsewhere.
///
/// # Errors
/// Those of openat2(2) and open_tree(2).
pub fn clone_from_share(share: &Path, path: &str, recursive: bool) -> io::Result<OwnedFd> {
    let base = openat(
        rustix::fs::CWD,
        share,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    let source = openat2(
        &base,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )?;
    clone_mount(source.as_fd(), recursive)
}

/// A detached copy of what `source` refers to, as bind mounts make them.
///
/// # Errors
/// Those of open_tree(2).
pub fn clone_mount(source: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(source, "", flags)?)
}

/// A read-only tmpfs that can hold nothing.
///
/// # Errors
/// Those of fsopen(2) and fsmount(2).
pub fn empty_directory() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "nr_inodes", "1")?;
    fsconfig_set_string(&context, "mode", "0555")?;
    fsconfig_create(&context)?;
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?)
}

/// A procfs of this process's pid namespace.
///
/// # Errors
/// Those of fsopen(2) and fsmount(2).
pub fn procfs() -> io::Result<OwnedFd> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let plain = MountAttrFlags::empty();
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, plain)?)
}

/// Attaches a detached mount at a path of the agent's own.
///
/// # Errors
/// Those of move_mount(2).
pub fn attach_at(tree: &OwnedFd, at: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(tree, "", rustix::fs::CWD, at, flags)?)
}

/// Attaches a detached mount on what `at` refers to.
///
/// # Errors
/// Those of move_mount(2).
pub fn attach_on(tree: &OwnedFd, at: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", at, "", flags)?)
}
