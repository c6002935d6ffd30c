//! The share: what of the host a pod's VMM may serve to its guest, for the shim.
//!
//! Every mount of a pod (root file systems, volumes, single files) exists only in the VMM's private
//! mount namespace, below `/shared`. A mount is cloned or made on the host's side without ever being
//! attached there ([`source`]), gets its attributes, and is then moved into the VMM's namespace
//! ([`namespace`]). The node's mount table never shows it, and it dies with the VMM (DESIGN section 2.2).
//!
//! Trusted: containerd and kubelet, who name the sources. Not trusted: the VMM; paths are resolved in
//! its namespace without following a link, and nothing there but `/shared` is touched. Blocking code,
//! some milliseconds a call: run it on a blocking thread.

mod file_systems;
mod idmap;
mod namespace;
mod path;
mod remote;
mod source;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

pub use file_systems::{FileSystems, LeftOut, NotData};
pub use idmap::{IdMap, IdRange};
pub use namespace::unescape;
pub use remote::is_remote;
pub(crate) use remote::is_remote_number;
pub use source::RootfsMount;

use crate::launch::{LaunchError, VmmProcess};
use crate::mount_attr::{self, Change};
use path::SharePath;

/// Why something could not be attached to a share or detached from it.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// A path of the share is not relative, plain and UTF-8.
    #[error(
        "{path:?} is no path of the share: it must be relative, without empty, \".\" or \"..\" parts, and at most 1024 bytes"
    )]
    InvalidPath {
        /// The path.
        path: String,
    },
    /// A host path cannot be cloned.
    #[error("cannot clone {} for the pod: {source}", path.display())]
    Source {
        /// The host's path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A host path is not of the kind that was asked for.
    #[error("{} is not a {expected}", path.display())]
    Kind {
        /// The host's path.
        path: PathBuf,
        /// "directory" or "file".
        expected: &'static str,
    },
    /// A host path leads to something else than it did when it was examined.
    #[error("{} leads to something else than before; nothing of it was shared", path.display())]
    Moved {
        /// The host's path.
        path: PathBuf,
    },
    /// A host path is part of the node's kernel.
    #[error("{} is a procfs, sysfs, cgroup or other file system of the node's kernel, which is never shared with a VM", path.display())]
    KernelFileSystem {
        /// The host's path.
        path: PathBuf,
    },
    /// A host path lies on a file system that nobody has said to hold data.
    #[error("{} lies on a file system of type {kind:?}, which is not known to hold data; if it does, add it to file_systems in the handler's configuration", path.display())]
    UnknownFileSystem {
        /// The host's path.
        path: PathBuf,
        /// The file system.
        kind: String,
    },
    /// The root file system's mounts are not of a kind the share can hold.
    #[error("cannot share a root file system of type {fstype:?}: {reason}")]
    Unsupported {
        /// The mount's type.
        fstype: String,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// A root file system cannot be mounted.
    #[error("cannot mount the {fstype} root file system: {what}: {source}")]
    Rootfs {
        /// The mount's type.
        fstype: String,
        /// The step.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// Attributes (read-only, nosuid…) cannot be set, so nothing was attached.
    #[error("cannot set the attributes of the mount for {share_path}: {source}")]
    Attributes {
        /// The share's path.
        share_path: String,
        /// What the host said.
        source: io::Error,
    },
    /// A host path's owners cannot be seen through the pod's map.
    #[error(
        "the owners of {} cannot be mapped to the pod's user namespace: {source}{}", path.display(), map_advice(source)
    )]
    Unmappable {
        /// The host's path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Something is attached at the path or above it already.
    #[error("{share_path} is already in use in the share")]
    AlreadyAttached {
        /// The share's path.
        share_path: String,
    },
    /// Nothing is attached at the path.
    #[error("nothing is attached at {share_path}")]
    NotAttached {
        /// The share's path.
        share_path: String,
    },
    /// Files of the mount are open in the VMM.
    #[error(
        "{share_path} is still in use by the file server: the guest has it mounted, or its inodes were not forgotten"
    )]
    Busy {
        /// The share's path.
        share_path: String,
    },
    /// The VMM's mount namespace cannot be entered.
    #[error("cannot enter the VMM's mount namespace: {0}; has the VMM ended?")]
    Vmm(#[source] io::Error),
    /// The VMM could not close its jail, so there is no share.
    #[error(transparent)]
    Jail(#[from] LaunchError),
    /// A step inside the VMM's mount namespace failed.
    #[error("cannot {what} {share_path} in the share: {source}")]
    Inside {
        /// The step.
        what: &'static str,
        /// The share's path.
        share_path: String,
        /// What the host said.
        source: io::Error,
    },
    /// A thread could not be made.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

/// How a mount is shared. `nosuid`, `nodev` and `noexec` always hold on the host's side; the guest's own
/// mount flags decide inside the guest.
#[derive(Debug, Clone, Default)]
pub struct Attributes {
    /// Nothing of it can be written, whatever the guest does.
    pub readonly: bool,
    /// But the mounts below can, as far as they can be on the host.
    pub writable_below: bool,
    /// Mounts below the source are shared too, but for those that hold no data (procfs, sysfs…).
    pub recursive: bool,
    /// What the source must be, if it was examined before.
    pub expected: Option<FileId>,
    /// Owners are seen through this map.
    pub id_map: Option<IdMap>,
}

/// Tells a file or directory from any other of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Its file system's device number.
    pub device: u64,
    /// Its inode number there.
    pub inode: u64,
}

/// A mount that the host has made below a shared directory. A guest may write there, so each part is checked
/// when the mount is taken: it could have put a link in its place.
#[derive(Debug, Clone, Copy)]
pub struct LaterMount<'a> {
    /// The directory that was shared, without links.
    pub top: &'a Path,
    /// Which directory that is.
    pub identity: FileId,
    /// The way from there to the mount point.
    pub way: &'a Path,
    /// The mount's number in mountinfo.
    pub id: u64,
    /// Owners are seen through this map.
    pub id_map: Option<&'a IdMap>,
}

/// The share of one running VMM.
///
/// It holds no descriptor that would keep the VMM's mounts alive, only the process's pidfd.
#[derive(Debug)]
pub struct Share {
    pid: u32,
    pidfd: OwnedFd,
    file_systems: FileSystems,
}

impl Share {
    /// The share of this VMM, of these file systems; waits until its jail is closed.
    ///
    /// # Errors
    /// [`ShareError::Jail`].
    pub fn new(vmm: &mut VmmProcess, file_systems: FileSystems) -> Result<Self, ShareError> {
        vmm.wait_jailed()?;
        Ok(Self {
            pid: vmm.pid(),
            pidfd: vmm
                .pidfd()
                .try_clone_to_owned()
                .map_err(LaunchError::Prepare)?,
            file_systems,
        })
    }

    /// Shares a host directory. Returns the mounts below it that were left out because nobody has said that their
    /// file systems hold data.
    ///
    /// # Errors
    /// [`ShareError::Source`], [`ShareError::Kind`], [`ShareError::KernelFileSystem`] or
    /// [`ShareError::UnknownFileSystem`] for the source, else as [`Self::attach`].
    pub fn attach_dir(
        &self,
        source: &Path,
        share_path: &str,
        attributes: Attributes,
    ) -> Result<Vec<LeftOut>, ShareError> {
        let kind = source::Kind::Directory;
        let (mount, left_out) =
            source::clone(source, attributes.recursive, kind, &self.file_systems)?;
        source::expect(&mount, source, attributes.expected)?;
        map_ids(&mount, source, attributes.id_map.as_ref())?;
        self.attach(mount, share_path, attributes)?;
        Ok(left_out)
    }

    /// Shares one host file (or socket or device node) and nothing beside it.
    ///
    /// # Errors
    /// As [`Self::attach_dir`].
    pub fn attach_file(
        &self,
        source: &Path,
        share_path: &str,
        attributes: Attributes,
    ) -> Result<(), ShareError> {
        let kind = source::Kind::File;
        let (mount, _) = source::clone(source, false, kind, &self.file_systems)?;
        source::expect(&mount, source, attributes.expected)?;
        map_ids(&mount, source, attributes.id_map.as_ref())?;
        self.attach(mount, share_path, attributes)
    }

    /// Shares a container's root file system as containerd describes it: usually one overlay or bind.
    /// Read-only if the last mount says `ro`.
    ///
    /// # Errors
    /// [`ShareError::Unsupported`] and [`ShareError::Rootfs`] for the mounts, else as [`Self::attach`].
    pub fn attach_rootfs(
        &self,
        mounts: &[RootfsMount],
        share_path: &str,
    ) -> Result<(), ShareError> {
        // A wrong path is cheaper to find than a wrong mount.
        SharePath::new(share_path)?;
        let readonly = source::is_readonly(mounts);
        let (mount, _) = source::rootfs(mounts, &self.file_systems)?;
        self.attach(
            mount,
            share_path,
            Attributes {
                readonly,
                recursive: true,
                ..Attributes::default()
            },
        )
    }

    /// Shares a detached mount (of `open_tree` or `fsmount`), whose attributes are set first, without a map.
    ///
    /// # Errors
    /// [`ShareError::InvalidPath`], [`ShareError::AlreadyAttached`], [`ShareError::Vmm`], and
    /// [`ShareError::Attributes`] or [`ShareError::Inside`] for what the kernel refuses.
    pub fn attach(
        &self,
        mount: OwnedFd,
        share_path: &str,
        attributes: Attributes,
    ) -> Result<(), ShareError> {
        let share_path = SharePath::new(share_path)?;
        seal(&mount, &share_path, &attributes)?;
        namespace::attach(&self.pidfd, &mount, &share_path)
    }

    /// Attaches a mount that the host has made below a shared directory since, at the same place below what is
    /// at `share_path`. Mounts below it do not come along.
    ///
    /// # Errors
    /// [`ShareError::Moved`] when the place leads to something else by now, [`ShareError::KernelFileSystem`]
    /// and [`ShareError::UnknownFileSystem`] for what is not shared, else as [`Self::attach_dir`].
    pub fn attach_below(
        &self,
        later: &LaterMount<'_>,
        share_path: &str,
        readonly: bool,
    ) -> Result<(), ShareError> {
        let share_path = SharePath::new(share_path)?;
        let mount = source::clone_later(later, &self.file_systems)?;
        let attributes = Attributes {
            readonly,
            ..Attributes::default()
        };
        map_ids(&mount, &later.top.join(later.way), later.id_map)?;
        seal(&mount, &share_path, &attributes)?;
        namespace::attach_below(&self.pidfd, &mount, &share_path, later.way)
    }

    /// Takes away what [`Self::attach_below`] or a recursive attachment has put below a shared directory.
    /// What the guest uses of it stays until it lets go.
    ///
    /// # Errors
    /// [`ShareError::NotAttached`], [`ShareError::InvalidPath`], [`ShareError::Inside`].
    pub fn detach_below(&self, share_path: &str, below: &Path) -> Result<(), ShareError> {
        let share_path = SharePath::new(share_path)?;
        namespace::detach_below(&self.pidfd, &share_path, below)
    }

    /// Makes what is attached at a path read-only, or writable again. Mounts below it keep what they have.
    /// What the file server has open for writing stays so.
    ///
    /// # Errors
    /// [`ShareError::NotAttached`], [`ShareError::InvalidPath`], [`ShareError::Attributes`],
    /// [`ShareError::Vmm`].
    pub fn set_readonly(&self, share_path: &str, readonly: bool) -> Result<(), ShareError> {
        let share_path = SharePath::new(share_path)?;
        let change = if readonly {
            Change {
                set: mount_attr::RDONLY,
                ..Change::default()
            }
        } else {
            Change {
                clear: mount_attr::RDONLY,
                ..Change::default()
            }
        };
        namespace::change(&self.pidfd, &share_path, change)
    }

    /// Takes a mount out of the share. The guest must have unmounted it and the VMM's file server
    /// forgotten its inodes before. A VMM that has ended has nothing attached: that is success.
    ///
    /// # Errors
    /// [`ShareError::Busy`], [`ShareError::NotAttached`], [`ShareError::InvalidPath`],
    /// [`ShareError::Inside`].
    pub fn detach(&self, share_path: &str) -> Result<(), ShareError> {
        let share_path = SharePath::new(share_path)?;
        namespace::detach(&self.pidfd, self.pid, &share_path)
    }
}

/// What to do when the kernel does not map a mount.
fn map_advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EINVAL) => {
            "; its file system, or one mounted below it, has no idmapped mounts (NFS has none; ext4, xfs, \
             btrfs and tmpfs have): move the volume, or set hostUsers: true"
        }
        Some(libc::EPERM) => "; it is mapped already on the node",
        _ => "",
    }
}

fn map_ids(mount: &OwnedFd, path: &Path, map: Option<&IdMap>) -> Result<(), ShareError> {
    let Some(map) = map else { return Ok(()) };
    map.map(mount.as_fd())
        .map_err(|source| ShareError::Unmappable {
            path: path.to_owned(),
            source,
        })
}

/// Sets every attribute before the mount can be reached by anyone.
fn seal(
    mount: &OwnedFd,
    share_path: &SharePath,
    attributes: &Attributes,
) -> Result<(), ShareError> {
    let readonly = |asked| if asked { mount_attr::RDONLY } else { 0 };
    let failed = |source| ShareError::Attributes {
        share_path: share_path.to_string(),
        source,
    };
    let below = attributes.readonly && !attributes.writable_below;
    mount_attr::change(
        mount.as_fd(),
        Change {
            set: mount_attr::NOSUID | mount_attr::NODEV | mount_attr::NOEXEC | readonly(below),
            clear: 0,
            // Nothing that happens to the host's mounts or the pod's reaches the other: a slave would let a
            // procfs that is mounted later into the VMM.
            propagation: libc::MS_PRIVATE,
            recursive: true,
        },
    )
    .map_err(failed)?;
    mount_attr::change(
        mount.as_fd(),
        Change {
            set: readonly(attributes.readonly),
            ..Change::default()
        },
    )
    .map_err(failed)
}

/// Where a path of the share is in the VMM's mount namespace, if it is one.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn path_inside(path: &str) -> Option<String> {
    let path = path::SharePath::new(path).ok()?;
    path.inside().into_string().ok()
}
