//! Detached mounts of the host's files, never attached in the node's mount namespace.
//!
//! Trusted: the paths and options, which containerd and kubelet chose.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat, StatxFlags, fstat, openat, openat2,
    statx,
};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::file_systems::{FileSystems, LeftOut, Verdict, kind_of};
use super::idmap::IdMap;
use super::{FileId, LaterMount, ShareError};

/// One of the mounts containerd sends for a root file system; each goes on top of the one before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    /// "overlay", "bind"…
    pub fstype: String,
    /// A path, or any word for an overlay.
    pub source: String,
    /// As in fstab.
    pub options: Vec<String>,
}

/// What a source must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    /// Anything but a directory.
    File,
}

/// Where a throw-away namespace mounts what is to be cloned: it exists everywhere and no root file
/// system's layer is below it.
const SCRATCH: &str = "/proc";

/// `mount(2)` copies one page of options, with its ending zero.
const MAX_OPTIONS: usize = 4095;

/// Clones the mount at a host path; with `recursive`, what is mounted below and may be shared too. Tells what of
/// that was left out and is not of the node's kernel.
pub(super) fn clone(
    path: &Path,
    recursive: bool,
    kind: Kind,
    file_systems: &FileSystems,
) -> Result<(OwnedFd, Vec<LeftOut>), ShareError> {
    let failed = |source: io::Error| ShareError::Source {
        path: path.to_owned(),
        source,
    };
    // One look at the path: what is judged is what is cloned.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = openat(CWD, path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let stat = fstat(&found).map_err(|errno| failed(errno.into()))?;
    let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    let expected = match (kind, is_directory) {
        (Kind::Directory, false) => Some("directory"),
        (Kind::File, true) => Some("file"),
        _ => None,
    };
    if let Some(expected) = expected {
        return Err(ShareError::Kind {
            path: path.to_owned(),
            expected,
        });
    }
    judge(&found, path, file_systems)?;
    if recursive {
        clone_recursively(path, found, file_systems).map_err(failed)
    } else {
        let mount = clone_tree(&found, false).map_err(|errno| failed(errno.into()))?;
        Ok((mount, Vec::new()))
    }
}

/// Refuses what lies on a file system that is not shared.
fn judge(found: &OwnedFd, path: &Path, file_systems: &FileSystems) -> Result<(), ShareError> {
    let path = path.to_owned();
    let kind = match kind_of(found) {
        Ok(kind) => kind.unwrap_or_default(),
        Err(source) => return Err(ShareError::Source { path, source }),
    };
    match file_systems.judge(&kind) {
        Verdict::Data => Ok(()),
        Verdict::Kernel => Err(ShareError::KernelFileSystem { path }),
        Verdict::Unknown => Err(ShareError::UnknownFileSystem { path, kind }),
    }
}

/// Checks that a clone is of what its path led to before.
pub(super) fn expect(
    mount: &OwnedFd,
    path: &Path,
    expected: Option<FileId>,
) -> Result<(), ShareError> {
    let stat = fstat(mount).map_err(|errno| ShareError::Source {
        path: path.to_owned(),
        source: errno.into(),
    })?;
    match expected {
        Some(expected) if expected != id_of(&stat) => Err(ShareError::Moved {
            path: path.to_owned(),
        }),
        _ => Ok(()),
    }
}

fn id_of(stat: &Stat) -> FileId {
    FileId {
        device: stat.st_dev,
        inode: stat.st_ino,
    }
}

/// Clones a mount that was made below a shared directory. No link is followed, and what is cloned is that
/// mount: the directory's writers could have exchanged anything on the way.
pub(super) fn clone_later(
    later: &LaterMount<'_>,
    file_systems: &FileSystems,
) -> Result<OwnedFd, ShareError> {
    let path = later.top.join(later.way);
    let failed = |errno: rustix::io::Errno| match errno {
        rustix::io::Errno::LOOP
        | rustix::io::Errno::XDEV
        | rustix::io::Errno::NOENT
        | rustix::io::Errno::NOTDIR => ShareError::Moved { path: path.clone() },
        errno => ShareError::Source {
            path: path.clone(),
            source: errno.into(),
        },
    };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let plain = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let top = openat2(CWD, later.top, flags, Mode::empty(), plain).map_err(failed)?;
    if id_of(&fstat(&top).map_err(failed)?) != later.identity {
        return Err(ShareError::Moved {
            path: later.top.to_owned(),
        });
    }
    let below = ResolveFlags::BENEATH | plain;
    let point = openat2(&top, later.way, flags, Mode::empty(), below).map_err(failed)?;
    let seen = statx(&point, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).map_err(failed)?;
    if seen.stx_mnt_id != later.id {
        return Err(ShareError::Moved { path });
    }
    judge(&point, &path, file_systems)?;
    clone_tree(&point, false).map_err(failed)
}

/// Clones what was found at a path with the mounts below it that may be shared.
fn clone_recursively(
    path: &Path,
    found: OwnedFd,
    file_systems: &FileSystems,
) -> io::Result<(OwnedFd, Vec<LeftOut>)> {
    // As the mount table has it, without links.
    let path = std::fs::canonicalize(path)?;
    if file_systems.refused_below(&path)?.is_empty() {
        return Ok((clone_tree(&found, true)?, Vec::new()));
    }
    drop(found);
    // What is unmounted in a namespace of its own is unmounted nowhere else.
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("share".into())
            .spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
                propagate(MsFlags::MS_PRIVATE)?;
                let refused = file_systems.refused_below(&path)?;
                for (mount, _) in refused.iter().rev() {
                    umount2(
                        mount.c_path()?.as_c_str(),
                        MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
                    )?;
                }
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                let mount = clone_tree(&openat(CWD, &path, flags, Mode::empty())?, true)?;
                let unknown = refused
                    .into_iter()
                    .filter(|(_, verdict)| *verdict == Verdict::Unknown);
                Ok((mount, unknown.map(|(left, _)| left).collect()))
            })?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

/// Clones the mount that a descriptor lies on, from there.
fn clone_tree(top: impl AsFd, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(top, "", flags)
}

/// Whether the guest may not write to the root file system.
pub(super) fn is_readonly(mounts: &[RootfsMount]) -> bool {
    mounts.last().is_some_and(|mount| {
        mount
            .options
            .iter()
            .rev()
            .find(|option| *option == "ro" || *option == "rw")
            .is_some_and(|option| option == "ro")
    })
}

/// Mounts a root file system and returns it detached.
pub(super) fn rootfs(
    mounts: &[RootfsMount],
    file_systems: &FileSystems,
) -> Result<(OwnedFd, Vec<LeftOut>), ShareError> {
    let [lower @ .., top] = mounts else {
        return Err(ShareError::Unsupported {
            fstype: String::new(),
            reason: "containerd sent no mount for it",
        });
    };
    for mount in mounts {
        check(mount)?;
    }
    // The usual cases of a native or a bind snapshot need no namespace.
    if lower.is_empty() && is_bind(top) {
        let recursive = top.options.iter().any(|option| option == "rbind");
        return clone(
            Path::new(&top.source),
            recursive,
            Kind::Directory,
            file_systems,
        );
    }
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("rootfs".into())
            .spawn_scoped(scope, || mount_elsewhere(mounts))
            .map_err(ShareError::Thread)?
            .join()
            .unwrap_or_else(|_| Err(ShareError::Thread(io::Error::other("the thread panicked"))))
            .map(|mount| (mount, Vec::new()))
    })
}

fn is_bind(mount: &RootfsMount) -> bool {
    mount.fstype == "bind"
        || mount
            .options
            .iter()
            .any(|option| option == "bind" || option == "rbind")
}

fn check(mount: &RootfsMount) -> Result<(), ShareError> {
    let unsupported = |reason| {
        Err(ShareError::Unsupported {
            fstype: mount.fstype.clone(),
            reason,
        })
    };
    if mount.options.iter().any(|option| option == "loop") {
        return unsupported("it needs a loop device; use a snapshotter with block devices");
    }
    let mapped = |option: &String| option.starts_with("uidmap=") || option.starts_with("gidmap=");
    if mount.fstype != "overlay" && mount.options.iter().any(mapped) {
        return unsupported("only an overlay's layers can be mapped to a user namespace's ids");
    }
    match mount.fstype.as_str() {
        _ if is_bind(mount) => Ok(()),
        "overlay" | "tmpfs" => Ok(()),
        "ext4" | "xfs" | "btrfs" | "erofs" | "squashfs" => unsupported(
            "its file system would be parsed by the node's kernel; it must be given to the guest as a disk",
        ),
        _ => unsupported("only overlay and bind mounts can be shared"),
    }
}

/// Runs on a thread of its own, which leaves the node's mount namespace for good.
fn mount_elsewhere(mounts: &[RootfsMount]) -> Result<OwnedFd, ShareError> {
    let fstype = mounts.last().map(|m| m.fstype.clone()).unwrap_or_default();
    let failed = |what| {
        move |source: io::Error| ShareError::Rootfs {
            fstype,
            what,
            source,
        }
    };
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)
        .map_err(|errno| failed.clone()("making a mount namespace")(errno.into()))?;
    propagate(MsFlags::MS_PRIVATE)
        .map_err(|source| failed.clone()("making the mounts private")(source))?;
    for one in mounts {
        mount_one(one)?;
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    openat(CWD, SCRATCH, flags, Mode::empty())
        .and_then(|top| clone_tree(&top, true))
        .map_err(|errno| failed("cloning the mount")(errno.into()))
}

/// Sets how the whole namespace hears of other namespaces' mounts; they hear nothing of this one's.
fn propagate(kind: MsFlags) -> io::Result<()> {
    Ok(mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | kind,
        None::<&str>,
    )?)
}

fn mount_one(one: &RootfsMount) -> Result<(), ShareError> {
    let failed = |what| {
        move |source: io::Error| ShareError::Rootfs {
            fstype: one.fstype.clone(),
            what,
            source,
        }
    };
    let mut words = one.options.clone();
    if let Some(map) = IdMap::take(&mut words).map_err(failed("reading its id map"))? {
        map.apply(&words)
            .map_err(failed("mapping its layers' ids"))?;
    }
    let Options {
        flags,
        data,
        directory,
    } = options(&words);
    if data.len() > MAX_OPTIONS {
        return Err(failed(
            "its options exceed a page; the image has too many layers",
        )(io::Error::from_raw_os_error(libc::E2BIG)));
    }
    if let Some(directory) = directory {
        enter_directory(&directory).map_err(failed("entering its layers"))?;
    }
    let data = CString::new(data)
        .map_err(|error| failed("reading its options")(io::Error::other(error)))?;
    mount(
        Some(one.source.as_str()),
        SCRATCH,
        Some(one.fstype.as_str()),
        flags,
        Some(data.as_c_str()),
    )
    .map_err(|errno| failed("mount")(errno.into()))
}

/// The directory is this thread's alone since its `unshare(CLONE_FS)`.
fn enter_directory(directory: &Path) -> io::Result<()> {
    Ok(nix::unistd::chdir(directory)?)
}

/// Mount options as `mount(2)` takes them.
struct Options {
    flags: MsFlags,
    data: String,
    /// The directory that relative layers start from.
    directory: Option<PathBuf>,
}

/// Tells flags from data. Layers are made relative to their common directory if the page would not hold
/// them otherwise.
fn options(options: &[String]) -> Options {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => flags -= MsFlags::MS_RDONLY,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            // Always set on the clone; what the container sees is the guest's affair.
            "nosuid" | "suid" | "nodev" | "dev" | "noexec" | "exec" | "defaults" | "private"
            | "rprivate" => {}
            other => data.push(other),
        }
    }
    let joined = data.join(",");
    if joined.len() <= MAX_OPTIONS {
        return Options {
            flags,
            data: joined,
            directory: None,
        };
    }
    let Some((directory, layers)) = data
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))
        .and_then(relative_layers)
    else {
        return Options {
            flags,
            data: joined,
            directory: None,
        };
    };
    let data: Vec<String> = data
        .iter()
        .map(|option| {
            if option.starts_with("lowerdir=") {
                format!("lowerdir={layers}")
            } else {
                (*option).to_owned()
            }
        })
        .collect();
    Options {
        flags,
        data: data.join(","),
        directory: Some(directory),
    }
}

/// The common parent of all layers, and the layers below it. None if a path is relative or escaped.
fn relative_layers(layers: &str) -> Option<(PathBuf, String)> {
    if layers.contains('\\') || layers.contains("::") {
        return None;
    }
    let layers: Vec<&Path> = layers.split(':').map(Path::new).collect();
    let mut common: PathBuf = layers.first()?.parent()?.to_owned();
    while !layers.iter().all(|layer| layer.starts_with(&common)) {
        common = common.parent()?.to_owned();
    }
    if !common.is_absolute() {
        return None;
    }
    let relative: Option<Vec<&str>> = layers
        .iter()
        .map(|layer| layer.strip_prefix(&common).ok()?.to_str())
        .collect();
    Some((common, relative?.join(":")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(options: &[&str]) -> Vec<String> {
        options.iter().map(|option| (*option).to_owned()).collect()
    }

    #[test]
    fn flags_are_told_from_data() {
        let got = options(&words(&[
            "ro",
            "nosuid",
            "index=off",
            "lowerdir=/a:/b",
            "noatime",
        ]));
        assert_eq!(got.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOATIME);
        assert_eq!(got.data, "index=off,lowerdir=/a:/b");
        assert!(got.directory.is_none());
    }

    #[test]
    fn many_layers_are_made_relative_to_fit_a_page() {
        let layers: Vec<String> = (0..120)
            .map(|n| {
                format!(
                    "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/{n}/fs"
                )
            })
            .collect();
        let got = options(&[format!("lowerdir={}", layers.join(":"))]);
        assert!(got.data.len() < MAX_OPTIONS);
        assert!(got.data.starts_with("lowerdir=0/fs:1/fs:2/fs:"));
        assert_eq!(
            got.directory.unwrap(),
            Path::new("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots")
        );
    }

    #[test]
    fn the_last_word_on_read_only_counts() {
        let mount = |options: &[&str]| {
            vec![RootfsMount {
                fstype: "bind".into(),
                source: "/x".into(),
                options: words(options),
            }]
        };
        assert!(is_readonly(&mount(&["rbind", "ro"])));
        assert!(!is_readonly(&mount(&["ro", "rw"])));
        assert!(!is_readonly(&mount(&["rbind"])));
        assert!(!is_readonly(&[]));
    }

    #[test]
    fn a_disk_image_is_never_mounted_on_the_node() {
        for fstype in ["ext4", "erofs", "fuse.x", ""] {
            let mount = RootfsMount {
                fstype: fstype.into(),
                source: "/dev/null".into(),
                options: Vec::new(),
            };
            let error = rootfs(&[mount], &FileSystems::default()).unwrap_err();
            assert!(matches!(error, ShareError::Unsupported { .. }), "{fstype}");
        }
    }
}
