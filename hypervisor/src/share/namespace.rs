//! What happens inside the VMM's mount namespace, each time on a thread of its own that never comes back.
//!
//! The thread has the node root's privileges in a namespace that a hostile process shares. So it
//! follows no link, names nothing but `/shared`, and makes mount points through a clone of the
//! share's root that the VMM cannot reach: the VMM's own view of that root is read-only.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use brig_agent_protocol::OWN_DIRECTORY;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, mknodat, openat, openat2,
    unlinkat,
};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::ShareError;
use super::path::SharePath;
use crate::jail::SHARED;
use crate::mount_attr::{self, Change};

/// No link, no way up, no other mount.
const PLAIN: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Moves a detached mount to `path`, making the mount point.
pub(super) fn attach(vmm: &OwnedFd, mount: &OwnedFd, path: &SharePath) -> Result<(), ShareError> {
    inside(vmm, || {
        let failed = |what| inside_error(what, path);
        let stat = fstat(mount).map_err(failed("examine the mount for"))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        make_mount_point(path, kind)?;

        let shared = open_directory(SHARED).map_err(failed("open the share for"))?;
        let target = openat2(
            &shared,
            path.as_str(),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            PLAIN,
        )
        .map_err(|errno| match errno {
            // A mount lies on it or above it.
            rustix::io::Errno::XDEV => ShareError::AlreadyAttached {
                share_path: path.to_string(),
            },
            errno => inside_error("open", path)(errno),
        })?;
        move_mount(
            mount,
            "",
            &target,
            "",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )
        .map_err(failed("attach"))
    })
}

/// What a path below an attached directory leads to: mounts are crossed, links are not followed, and no
/// step leaves the directory.
fn open_below(path: &SharePath, below: &Path) -> rustix::io::Result<OwnedFd> {
    let shared = open_directory(SHARED)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = openat2(&shared, path.as_str(), flags, Mode::empty(), resolve)?;
    openat2(&top, below, flags, Mode::empty(), resolve)
}

/// Moves a detached mount onto a file or directory below what is attached at `path`.
pub(super) fn attach_below(
    vmm: &OwnedFd,
    mount: &OwnedFd,
    path: &SharePath,
    below: &Path,
) -> Result<(), ShareError> {
    inside(vmm, || {
        let target = open_below(path, below)
            .map_err(inside_error("find the place of a later mount below", path))?;
        move_mount(
            mount,
            "",
            &target,
            "",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )
        .map_err(inside_error("attach a later mount below", path))
    })
}

/// Unmounts what is mounted below what is attached at `path`, whoever uses it.
pub(super) fn detach_below(
    vmm: &OwnedFd,
    path: &SharePath,
    below: &Path,
) -> Result<(), ShareError> {
    inside(vmm, || {
        let failed = inside_error("find a mount below", path);
        let top = match open_below(path, below) {
            // The place went with the mount.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(()),
            other => other.map_err(failed)?,
        };
        // By the directory that was found: a name could lead elsewhere by now. The working directory is
        // this thread's own.
        rustix::process::fchdir(&top).map_err(inside_error("enter a mount below", path))?;
        umount2(".", MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).map_err(|errno| {
            match errno {
                // Nothing is mounted there.
                Errno::EINVAL => ShareError::NotAttached {
                    share_path: format!("{path}/{}", below.display()),
                },
                errno => umount_error(errno, path),
            }
        })
    })
}

/// Changes the flags of the mount at `path`.
pub(super) fn change(vmm: &OwnedFd, path: &SharePath, change: Change) -> Result<(), ShareError> {
    inside(vmm, || {
        let shared = open_directory(SHARED).map_err(inside_error("open the share for", path))?;
        // The mount points are the share's own, so what is found is the top of a mount or nothing.
        let top = openat2(
            &shared,
            path.as_str(),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        )
        .map_err(|errno| match errno {
            rustix::io::Errno::NOENT => ShareError::NotAttached {
                share_path: path.to_string(),
            },
            errno => inside_error("open", path)(errno),
        })?;
        mount_attr::change(top.as_fd(), change).map_err(|source| ShareError::Attributes {
            share_path: path.to_string(),
            source,
        })
    })
}

/// Unmounts what is at `path`, mounts below it first, and removes the mount point.
pub(super) fn detach(vmm: &OwnedFd, pid: u32, path: &SharePath) -> Result<(), ShareError> {
    let below = match mounts_below(pid, path) {
        Ok(below) => below,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ShareError::Vmm(error)),
    };
    let result = inside(vmm, || {
        for mount in below.iter().rev() {
            match umount2(mount.as_c_str(), MntFlags::UMOUNT_NOFOLLOW) {
                // EINVAL: locked to the mount above, with which it goes. ENOENT: it went with its mount
                // point, which the host has removed meanwhile.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(errno) => return Err(umount_error(errno, path)),
            }
        }
        let top = path.inside();
        match umount2(top.as_c_str(), MntFlags::UMOUNT_NOFOLLOW) {
            Err(Errno::EBUSY) if has_locked_children(pid, path) => umount2(
                top.as_c_str(),
                MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH,
            ),
            other => other,
        }
        .map_err(|errno| umount_error(errno, path))?;
        remove_mount_point(path)
    });
    match result {
        // A zombie has no namespaces any more.
        Err(ShareError::Vmm(error)) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

fn umount_error(errno: Errno, path: &SharePath) -> ShareError {
    let share_path = path.to_string();
    match errno {
        Errno::EBUSY => ShareError::Busy { share_path },
        Errno::EINVAL | Errno::ENOENT => ShareError::NotAttached { share_path },
        errno => ShareError::Inside {
            what: "unmount",
            share_path,
            source: errno.into(),
        },
    }
}

/// Runs `work` in the VMM's mount namespace.
fn inside<T: Send>(
    vmm: &OwnedFd,
    work: impl FnOnce() -> Result<T, ShareError> + Send,
) -> Result<T, ShareError> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("share".into())
            .spawn_scoped(scope, || {
                // setns wants a thread that shares no root or working directory.
                unshare(CloneFlags::CLONE_FS).map_err(|errno| ShareError::Thread(errno.into()))?;
                setns(vmm, CloneFlags::CLONE_NEWNS)
                    .map_err(|errno| ShareError::Vmm(errno.into()))?;
                work()
            })
            .map_err(ShareError::Thread)?
            .join()
            .unwrap_or_else(|_| Err(ShareError::Thread(io::Error::other("the thread panicked"))))
    })
}

fn inside_error(
    what: &'static str,
    path: &SharePath,
) -> impl FnOnce(rustix::io::Errno) -> ShareError {
    let share_path = path.to_string();
    move |errno| ShareError::Inside {
        what,
        share_path,
        source: errno.into(),
    }
}

fn open_directory(path: &str) -> rustix::io::Result<OwnedFd> {
    openat(
        CWD,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// The share's root through a writable, unattached clone of its mount, without what is mounted on it.
fn writable_root(path: &SharePath) -> Result<OwnedFd, ShareError> {
    let root = open_tree(
        CWD,
        SHARED,
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_SYMLINK_NOFOLLOW,
    )
    .map_err(inside_error("clone the share's root for", path))?;
    mount_attr::change(
        root.as_fd(),
        Change {
            clear: mount_attr::RDONLY,
            ..Change::default()
        },
    )
    .map_err(|source| ShareError::Inside {
        what: "open the share's root for",
        share_path: path.to_string(),
        source,
    })?;
    Ok(root)
}

fn step_into(directory: &OwnedFd, name: &str) -> rustix::io::Result<OwnedFd> {
    openat2(
        directory,
        name,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        PLAIN,
    )
}

fn existing_is_fine(result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        other => other,
    }
}

fn make_mount_point(path: &SharePath, kind: FileType) -> Result<(), ShareError> {
    let failed = |what| inside_error(what, path);
    let mut directory = writable_root(path)?;
    let mut parts = path.parts();
    let leaf = parts.next_back().unwrap_or_default();
    for part in parts {
        existing_is_fine(mkdirat(&directory, part, Mode::from_raw_mode(0o755)))
            .map_err(failed("make a directory for"))?;
        directory = step_into(&directory, part).map_err(failed("enter a directory of"))?;
    }
    // An existing leaf of the other kind makes move_mount fail with ENOTDIR.
    existing_is_fine(if kind == FileType::Directory {
        mkdirat(&directory, leaf, Mode::from_raw_mode(0o755))
    } else {
        mknodat(
            &directory,
            leaf,
            FileType::RegularFile,
            Mode::from_raw_mode(0o644),
            0,
        )
    })
    .map_err(failed("make the mount point"))
}

/// Removes the leaf and the directories that are empty without it, but for that of the pod's own, which is served.
fn remove_mount_point(path: &SharePath) -> Result<(), ShareError> {
    let mut directories = vec![writable_root(path)?];
    let names: Vec<&str> = path.parts().collect();
    let (leaf, parents) = match names.split_last() {
        Some(split) => split,
        None => return Ok(()),
    };
    for part in parents {
        let Some(last) = directories.last() else {
            break;
        };
        let next = step_into(last, part).map_err(inside_error("enter a directory of", path))?;
        directories.push(next);
    }
    let mut names = parents.to_vec();
    names.push(leaf);
    for (depth, (directory, name)) in directories.iter().zip(&names).enumerate().rev() {
        if depth == 0 && *name == OWN_DIRECTORY {
            break;
        }
        let removed = match unlinkat(directory, *name, AtFlags::REMOVEDIR) {
            Err(rustix::io::Errno::NOTDIR) => unlinkat(directory, *name, AtFlags::empty()),
            other => other,
        };
        match removed {
            Ok(()) => {}
            // Another mount point of the pod is beside it.
            Err(rustix::io::Errno::NOTEMPTY | rustix::io::Errno::BUSY) => break,
            Err(errno) => return Err(inside_error("remove the mount point", path)(errno)),
        }
    }
    Ok(())
}

/// Mount points below `path` in the VMM's namespace, parents before children.
fn mounts_below(pid: u32, path: &SharePath) -> io::Result<Vec<CString>> {
    let table = std::fs::read(format!("/proc/{pid}/mountinfo"))?;
    let mut top = path.inside().into_bytes();
    top.push(b'/');
    Ok(mount_points(&table)
        .filter(|point| point.starts_with(&top))
        .filter_map(|point| CString::new(point).ok())
        .collect())
}

fn has_locked_children(pid: u32, path: &SharePath) -> bool {
    mounts_below(pid, path).is_ok_and(|below| !below.is_empty())
}

/// The mount points of a mountinfo table, unescaped.
fn mount_points(table: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
}

/// Undoes the kernel's `\ooo` for space, tab, newline and backslash in a field of mountinfo
/// (proc_pid_mountinfo(5)).
#[must_use]
pub fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match tail {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if *first == b'\\' => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mount_points_are_read_and_unescaped() {
        let table =
            b"1 2 0:3 / / rw - tmpfs tmpfs rw\n4 1 0:5 / /shared/a\\040b\\134c rw - x x rw\n\n";
        let points: Vec<_> = mount_points(table).collect();
        assert_eq!(points, [b"/".to_vec(), b"/shared/a b\\c".to_vec()]);
    }

    proptest! {
        #[test]
        fn no_table_makes_the_parser_fail(table in proptest::collection::vec(any::<u8>(), 0..256)) {
            for point in mount_points(&table) {
                prop_assert!(point.len() <= table.len());
            }
        }
    }
}
