//! The VMM's file system: an empty tmpfs with `/shared` and a `/proc` of its own pid namespace.
//!
//! No descriptor of a host procfs, sysfs or cgroupfs may be held: with one, `..` leads to
//! `/proc/sys/kernel/core_pattern`, which file-server capabilities suffice to write. So `/proc` is a new
//! procfs instance that knows no process but this one and has no `sys` (`subset=pid`).

use std::os::fd::{AsFd, OwnedFd};

use brig_agent_protocol::OWN_DIRECTORY;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::error::{JailError, Step};
use crate::mount_attr::{self, Change};

/// Where the share is, in the jail and nowhere else.
pub const SHARED: &str = "/shared";

/// Room for mount points, not for data: a page for each of some thousand directories is kernel
/// memory, which the inode limit bounds; file data is never written here.
const ROOT_OPTIONS: [(&str, &str); 3] = [("size", "64k"), ("nr_inodes", "16"), ("mode", "0755")];
const SHARED_OPTIONS: [(&str, &str); 3] =
    [("size", "64k"), ("nr_inodes", "65536"), ("mode", "0755")];

const PLAIN: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Replaces the root. The mount namespace is already the process's own.
pub(super) fn replace() -> Result<(), JailError> {
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .step("making the mounts private")?;

    // Made while the node's procfs is in view: the kernel lets a user namespace mount one only then.
    let proc = procfs()?;
    let root = tmpfs(&ROOT_OPTIONS)?;
    let shared = tmpfs(&SHARED_OPTIONS)?;
    rustix::fs::mkdirat(&shared, OWN_DIRECTORY, Mode::from_raw_mode(0o755))
        .step("making the directory of what is the pod's own")?;

    // Any directory will do as the place of the new root until it is the root; /proc exists.
    attach(&root, CWD, "/proc").step("attaching the new root")?;
    for (mount, name) in [(&proc, "proc"), (&shared, "shared")] {
        rustix::fs::mkdirat(&root, name, Mode::from_raw_mode(0o755))
            .step("making a directory in the new root")?;
        attach(mount, root.as_fd(), name).step("attaching a file system in the new root")?;
    }

    rustix::process::fchdir(&root).step("entering the new root")?;
    // Both at ".": the old root ends up on top of the new one, from where it is detached.
    nix::unistd::pivot_root(".", ".").step("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).step("detaching the old root")?;
    nix::unistd::chdir("/").step("chdir")?;

    // The file server must not change the share's own root, only what is attached in it.
    for path in ["/", SHARED] {
        let directory = rustix::fs::open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .step("opening the new root")?;
        mount_attr::change(
            directory.as_fd(),
            Change {
                set: mount_attr::RDONLY,
                ..Change::default()
            },
        )
        .step("making the new root read-only (mount_setattr needs Linux 5.12)")?;
    }
    Ok(())
}

fn tmpfs(options: &[(&str, &str)]) -> Result<OwnedFd, JailError> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).step("opening tmpfs")?;
    for (key, value) in options {
        fsconfig_set_string(context.as_fd(), *key, *value).step("configuring tmpfs")?;
    }
    fsconfig_create(context.as_fd()).step("creating tmpfs")?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, PLAIN).step("mounting tmpfs")
}

fn procfs() -> Result<OwnedFd, JailError> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC).step("opening procfs")?;
    fsconfig_set_string(context.as_fd(), "subset", "pid")
        .step("limiting procfs to processes (subset=pid needs Linux 5.8)")?;
    fsconfig_create(context.as_fd()).step("creating procfs")?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        PLAIN.union(MountAttrFlags::MOUNT_ATTR_RDONLY),
    )
    .step("mounting procfs (the node's /proc must not be partly covered by other mounts)")
}

fn attach(
    mount: &OwnedFd,
    directory: std::os::fd::BorrowedFd<'_>,
    name: &str,
) -> rustix::io::Result<()> {
    move_mount(
        mount,
        "",
        directory,
        name,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}
