//! Volumes in the guest's memory, replicas of host directories (ConfigMap, Secret…) and emptyDirs, and on disks of the
//! guest.
//!
//! Each is a mount of its own in the agent's directory, made and fed by the host (`UpdateVolume`) and
//! bound into containers. The host is trusted; what containers do to a volume's files is not: every
//! path is resolved inside the volume, without the links they may have put there.
pub mod copy;
pub mod disk;
mod entry;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod replica;
mod tree;

use std::{
    collections::HashMap,
    fs,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use brig_agent_protocol::agent::{UpdateVolumeRequest, VolumeEntry, update_volume_request::Kind};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{FileType, Mode, OFlags, openat};

use crate::{
    detached::{attach_at, clone_from_share},
    error::{Error, Result},
    huge_pages,
    mount_attr::{self, Change},
    names,
    submounts::{Entered, Submounts},
    sync::lock,
};
use disk::Disk;
use entry::Entry;
use replica::Replica;
use tree::Tree;

/// Volumes of one sandbox. A pod has a few; a host that asks for more has lost count.
const MAX_VOLUMES: usize = 1024;
/// Entries of one volume, also while they arrive.
const MAX_ENTRIES: usize = 16 * 1024;
/// Bytes of content that wait for the last request of an update.
const MAX_PENDING: usize = 64 << 20;

/// The sandbox's volumes.
pub struct Volumes {
    root: PathBuf,
    share: PathBuf,
    submounts: Arc<Submounts>,
    live: Mutex<HashMap<String, Arc<Mutex<Volume>>>>,
}

struct Volume {
    /// Its top directory.
    tree: Tree,
    content: Content,
    pending: Vec<Entry>,
    pending_bytes: usize,
    /// It is the share's.
    _entered: Option<Entered>,
}

enum Content {
    Replica(Replica),
    Memory,
    /// Its files are the host's.
    Shared,
    /// Its files are on a disk.
    Disk,
}

impl Volume {
    fn add_pending(&mut self, message: VolumeEntry, id: &str) -> Result<()> {
        let entry = Entry::parse(message)?;
        self.pending_bytes += entry.content.len();
        self.pending.push(entry);
        if self.pending_bytes > MAX_PENDING || self.pending.len() > MAX_ENTRIES {
            return Err(Error::ResourceExhausted(format!(
                "volume {id} is too large for the guest's memory"
            )));
        }
        Ok(())
    }

    fn forget_pending(&mut self) {
        self.pending = Vec::new();
        self.pending_bytes = 0;
    }
}

/// Where the volumes of an agent with this directory are.
#[must_use]
pub fn directory(run: &Path) -> PathBuf {
    run.join("volumes")
}

impl Volumes {
    /// No volumes yet, in the agent's directory `run`; the share is at `share`, with `submounts`.
    #[must_use]
    pub fn new(run: &Path, share: &Path, submounts: Arc<Submounts>) -> Self {
        Self {
            root: directory(run),
            share: share.to_owned(),
            submounts,
            live: Mutex::default(),
        }
    }

    /// Makes a volume or brings it up to date. Blocking.
    ///
    /// # Errors
    /// `InvalidArgument` for what can never be a volume, `ResourceExhausted` beyond its limits, `Internal` for
    /// what the guest's kernel refuses.
    pub fn update(&self, request: UpdateVolumeRequest) -> Result<()> {
        names::id(&request.id)?;
        let volume = self.volume(&request)?;
        let mut volume = lock(&volume);
        if !request.continued {
            volume.forget_pending();
        }
        for message in request.entries {
            if let Err(error) = volume.add_pending(message, &request.id) {
                volume.forget_pending();
                return Err(error);
            }
        }
        if request.more {
            return Ok(());
        }
        let entries = std::mem::take(&mut volume.pending);
        volume.forget_pending();
        let Volume { tree, content, .. } = &mut *volume;
        let applied = match content {
            Content::Replica(replica) => replica.become_exactly(tree, entries),
            Content::Memory | Content::Disk => replica::add_missing(tree, &entries),
            Content::Shared => Ok(()),
        };
        applied.map_err(|error| Error::io(format_args!("volume {}", request.id), error))
    }

    /// Mounts the file system on a disk as a volume, or, with a `size`, lets the one that is there grow with its disk to as
    /// many bytes. Blocking, for as long as the disk takes; other volumes are not held up.
    ///
    /// # Errors
    /// `NotFound` if there is none to grow; `InvalidArgument` for what is no file system of a disk, `FailedPrecondition` with what the kernel says of this one.
    pub fn update_disk(&self, id: &str, disk: &Disk, size: u64) -> Result<()> {
        names::id(id)?;
        let at = self.root.join(id);
        let there = lock(&self.live).get(id).map(Arc::clone);
        if let Some(volume) = there {
            // The kernel lets no two of one file system grow at once.
            let _alone = lock(&volume);
            return disk.grow(&at, size);
        }
        if size != 0 {
            // Who mounts it is under way, and has all of the disk then.
            return Err(Error::NotFound(format!("volume {id} is not there yet")));
        }
        let tree = disk.mount()?;
        let failed = |error: std::io::Error| Error::io(format_args!("volume {id}"), error);
        let mut live = lock(&self.live);
        if live.len() >= MAX_VOLUMES || live.contains_key(id) {
            return Err(Error::ResourceExhausted(format!(
                "the sandbox has {MAX_VOLUMES} volumes already, or one with this id"
            )));
        }
        fs::create_dir_all(&at).map_err(failed)?;
        attach_at(&tree, &at)
            .inspect_err(|_| drop(fs::remove_dir(&at)))
            .map_err(failed)?;
        let volume = Volume {
            tree: Tree::new(tree),
            content: Content::Disk,
            pending: Vec::new(),
            pending_bytes: 0,
            _entered: None,
        };
        live.insert(id.to_owned(), Arc::new(Mutex::new(volume)));
        Ok(())
    }

    /// The volume, mounted if it is new.
    fn volume(&self, request: &UpdateVolumeRequest) -> Result<Arc<Mutex<Volume>>> {
        let mut live = lock(&self.live);
        if let Some(volume) = live.get(&request.id) {
            return Ok(Arc::clone(volume));
        }
        if live.len() >= MAX_VOLUMES {
            return Err(Error::ResourceExhausted(format!(
                "the sandbox has {MAX_VOLUMES} volumes already"
            )));
        }
        let content = match request.kind.enum_value() {
            Ok(Kind::REPLICA) => Content::Replica(Replica::default()),
            Ok(Kind::MEMORY | Kind::HUGE) => Content::Memory,
            Ok(Kind::SHARED) => Content::Shared,
            Ok(Kind::DISK) => {
                return Err(Error::InvalidArgument(format!(
                    "volume {} is on a disk that was not named",
                    request.id
                )));
            }
            Err(kind) => {
                return Err(Error::InvalidArgument(format!(
                    "volume {} is of the unknown kind {kind}",
                    request.id
                )));
            }
        };
        let at = self.root.join(&request.id);
        let mut entered = None;
        let top = match content {
            Content::Shared => {
                names::share_path(&request.share_path)?;
                entered = Some(self.submounts.enter(vec![request.share_path.clone()]));
                mount_shared(&self.share, &request.share_path, &at)
            }
            Content::Memory if request.kind.enum_value() == Ok(Kind::HUGE) => {
                let pages = format!("pagesize={}", huge_pages::PAGE);
                mount_memory("hugetlbfs", &at, Some(&pages), request.size)
            }
            _ => mount_memory("tmpfs", &at, None, request.size),
        };
        let top = top.map_err(|error| Error::io(format_args!("volume {}", request.id), error))?;
        let volume = Arc::new(Mutex::new(Volume {
            tree: Tree::new(top),
            content,
            pending: Vec::new(),
            pending_bytes: 0,
            _entered: entered,
        }));
        live.insert(request.id.clone(), Arc::clone(&volume));
        Ok(volume)
    }

    /// Frees a volume; containers that still have it mounted keep their view. One that is not there is no
    /// error. Blocking.
    ///
    /// # Errors
    /// `Internal` when it cannot be unmounted.
    pub fn remove(&self, id: &str) -> Result<()> {
        names::id(id)?;
        let Some(volume) = lock(&self.live).remove(id) else {
            return Ok(());
        };
        let at = self.root.join(id);
        let synced = match lock(&volume).content {
            // An error that nobody has met yet is met here or nowhere.
            Content::Disk => disk::sync(&at),
            _ => Ok(()),
        };
        // It keeps its mount in use.
        drop(volume);
        umount2(&at, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|error| Error::io(format_args!("volume {id}"), error))?;
        fs::remove_dir(&at)
            .or_else(|_| fs::remove_file(&at))
            .and(synced)
            .map_err(|error| Error::io(format_args!("volume {id}"), error))
    }
}

/// Mounts a file system in memory of `size` bytes (0: the kernel's default) at `at`; returns its top
/// directory.
fn mount_memory(
    kind: &str,
    at: &Path,
    option: Option<&str>,
    size: u64,
) -> std::io::Result<OwnedFd> {
    fs::create_dir_all(at)?;
    let size = (size != 0).then(|| format!("size={size}"));
    let options = ["mode=755"]
        .into_iter()
        .chain(option)
        .chain(size.as_deref());
    let data = options.collect::<Vec<_>>().join(",");
    mount(
        Some(kind),
        at,
        Some(kind),
        MsFlags::empty(),
        Some(data.as_str()),
    )
    .inspect_err(|_| drop(fs::remove_dir(at)))?;
    Ok(openat(
        rustix::fs::CWD,
        at,
        OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Mounts what is at a path of the share at `at`, so that mounts below it propagate; returns its top.
fn mount_shared(share: &Path, path: &str, at: &Path) -> std::io::Result<OwnedFd> {
    let tree = clone_from_share(share, path, true).map_err(|error| {
        std::io::Error::new(error.kind(), format!("{path} in the share: {error}"))
    })?;
    let shared = Change {
        propagation: libc::MS_SHARED,
        ..Change::default()
    };
    mount_attr::apply(tree.as_fd(), &shared, true)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&tree)?.st_mode);
    if kind == FileType::Directory {
        fs::create_dir_all(at)?;
    } else {
        fs::File::create_new(at)?;
    }
    attach_at(&tree, at)?;
    Ok(tree)
}
