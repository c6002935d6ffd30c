//! The trees of a share: one for its root, one for each mount that was looked up.
//!
//! The root's tree has only the directories of mount points, which the shim made; their paths are
//! remembered so that the shim can name a mount by path.

use std::collections::{BTreeSet, HashMap};
use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{ATTR_SUBMOUNT, ROOT_ID, stat64};
use fuse_backend_rs::api::filesystem::Entry;
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::errno;
use super::tree::{NUMBER_BITS, Tree};

/// A node id has the export's number above [`NUMBER_BITS`]: a share has 16 million in its life, and none is
/// used twice.
const MAX_EXPORT: u32 = (1 << (u64::BITS - NUMBER_BITS)) - 1;

/// A volume may change on the host: the guest asks again after this.
const VOLUME_TIMEOUT: Duration = Duration::from_secs(1);
/// A container's root file system has no other writer, so the guest keeps what it knows: attributes, file
/// contents over a close, and that a name does not exist.
const ROOTFS_TIMEOUT: Duration = Duration::from_secs(3600);
/// The last name of a share path below which nobody but the guest writes.
const ROOTFS: &str = "rootfs";

const ROOT_EXPORT: u32 = 0;

/// How long the control thread waits for a request on a mount that is to go. It takes longer only on a
/// volume that hangs, which then stays busy.
const PATIENCE: Duration = Duration::from_secs(1);

/// Paths of the root's directories are cleaned of forgotten ones when there are twice as many as were in
/// use the last time, or this many.
const CLEAN_AT: usize = 256;

/// Which export, and which number of its tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeId {
    pub(super) export: u32,
    pub(super) number: u64,
}

impl NodeId {
    pub(super) fn from_guest(node: u64) -> Self {
        Self {
            // 24 bits are left, so this never fails.
            export: u32::try_from(node >> NUMBER_BITS).unwrap_or(u32::MAX),
            number: node & ((1 << NUMBER_BITS) - 1),
        }
    }

    fn to_guest(self) -> io::Result<u64> {
        if self.number >> NUMBER_BITS != 0 || self.export > MAX_EXPORT {
            return Err(errno(libc::ENFILE));
        }
        Ok(u64::from(self.export) << NUMBER_BITS | self.number)
    }
}

/// One mount, or the share's own root.
pub(super) struct Export {
    pub(super) number: u32,
    pub(super) tree: Tree,
    /// Below the share's root; empty for that root.
    path: PathBuf,
    /// Device of its top directory.
    device: u64,
    /// Inode number of its top directory: tells a mount from its successor at the same path.
    top: u64,
    /// Nobody but the guest writes to it.
    exclusive: bool,
    /// The guest makes a file system of its own of it, with a device number of its own.
    submount: bool,
}

impl Export {
    /// What LOOKUP answers for a name that is not there: an entry without an inode that the guest may keep,
    /// where nobody else can make that name.
    pub(super) fn absent(&self, error: io::Error) -> io::Result<Entry> {
        if self.exclusive && error.raw_os_error() == Some(libc::ENOENT) {
            return Ok(Entry {
                entry_timeout: ROOTFS_TIMEOUT,
                ..Entry::default()
            });
        }
        Err(error)
    }
}

/// Told of a mount that is looked at for the first time.
#[cfg(test)]
pub(super) type Gate = Box<dyn Fn(&Path) + Send + Sync>;

/// All exports of a share.
pub(super) struct Exports {
    root: PathBuf,
    /// What is mounted here is one pod's own.
    own: bool,
    /// `/proc/self/fd`, through which every tree opens what it knows.
    descriptors: Arc<OwnedFd>,
    state: Mutex<State>,
    /// The guest takes submounts.
    submounts: AtomicBool,
    /// Threads in [`Exports::forget_path`].
    waiting: AtomicU32,
    /// Signalled with the lock held when a request has ended while one waits.
    ended: Condvar,
    /// Called before a mount is opened.
    #[cfg(test)]
    pub(super) gate: std::sync::OnceLock<Gate>,
}

struct State {
    live: HashMap<u32, Arc<Export>>,
    next: u32,
    /// Numbers and paths of those that are being opened, and whether they have been forgotten meanwhile.
    opening: Vec<(u32, PathBuf, bool)>,
    /// Paths of mounts that may never answer.
    remote: BTreeSet<PathBuf>,
    /// Paths of the root export's inodes.
    directories: HashMap<u64, PathBuf>,
    clean_at: usize,
    /// A number for each device of each export, mixed into inode numbers.
    devices: HashMap<(u32, u64), u16>,
    next_device: u16,
}

impl Exports {
    pub(super) fn new(root: &Path, own: bool) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let exports = Self {
            root: root.to_owned(),
            own,
            descriptors: Arc::new(openat(CWD, "/proc/self/fd", flags, Mode::empty())?),
            state: Mutex::new(State {
                live: HashMap::new(),
                next: ROOT_EXPORT,
                opening: Vec::new(),
                remote: BTreeSet::new(),
                directories: HashMap::new(),
                clean_at: CLEAN_AT,
                devices: HashMap::new(),
                next_device: 0,
            }),
            submounts: AtomicBool::new(false),
            waiting: AtomicU32::new(0),
            ended: Condvar::new(),
            #[cfg(test)]
            gate: std::sync::OnceLock::new(),
        };
        exports.add_root(&mut exports.lock())?;
        Ok(exports)
    }

    /// The state is consistent at each point where a panic could leave it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_root(&self, state: &mut State) -> io::Result<()> {
        state.next = state.next.max(ROOT_EXPORT + 1);
        let root = self.open_export(ROOT_EXPORT, &self.root, PathBuf::new())?;
        // First, so that it is number 0 and plain inode numbers stay as they are.
        state.devices.insert((ROOT_EXPORT, root.device), 0);
        state.next_device = state.next_device.max(1);
        state.directories.insert(ROOT_ID, PathBuf::new());
        state.live.insert(ROOT_EXPORT, Arc::new(root));
        Ok(())
    }

    /// Ends the session with a driver: every descriptor but the root's is closed.
    ///
    /// # Errors
    /// If the root cannot be opened again. Every request fails then.
    pub(super) fn reset(&self) -> io::Result<()> {
        let mut state = self.lock();
        self.make_submounts(false);
        state.live.clear();
        state.directories.clear();
        self.add_root(&mut state)
    }

    /// What is looked up from now on as a volume's top directory is marked as a submount, or not.
    pub(super) fn make_submounts(&self, make: bool) {
        self.submounts.store(make, Ordering::Relaxed);
    }

    /// No requests come at the moment.
    pub(super) fn rest(&self) {
        if self.own {
            let live: Vec<_> = self.lock().live.values().cloned().collect();
            live.iter().for_each(|export| export.tree.rest());
        }
    }

    /// The exports that are one file system in the guest with that of this number.
    pub(super) fn of_one_file_system(&self, number: u32) -> Vec<Arc<Export>> {
        let state = self.lock();
        let alone = state.live.get(&number).filter(|export| export.submount);
        match alone {
            Some(alone) => vec![Arc::clone(alone)],
            None => {
                let all = state.live.values();
                all.filter(|export| !export.submount).cloned().collect()
            }
        }
    }

    pub(super) fn get(&self, number: u32) -> io::Result<Arc<Export>> {
        self.lock()
            .live
            .get(&number)
            .cloned()
            .ok_or_else(|| errno(libc::ESTALE))
    }

    /// What is at or below a path may never answer.
    pub(super) fn expect_remote(&self, path: &str) {
        let path = plain(path);
        let mut state = self.lock();
        for export in state.live.values() {
            if export.number != ROOT_EXPORT && export.path == path {
                export.tree.is_taken_for_remote();
            }
        }
        state.remote.insert(path);
    }

    /// Whether a request about this node may have to wait for an answer from elsewhere: it is about a file in such a mount,
    /// or about the directory that has one in it.
    pub(super) fn is_remote(&self, node: NodeId) -> bool {
        let state = self.lock();
        let Some(export) = state.live.get(&node.export) else {
            return false;
        };
        if export.tree.is_remote() {
            return true;
        }
        if node.export != ROOT_EXPORT || state.remote.is_empty() {
            return false;
        }
        let directory = state.directories.get(&node.number);
        directory.is_some_and(|directory| {
            let mut remote = state.remote.iter();
            remote.any(|path| path.parent() == Some(directory))
        })
    }

    /// Drops the exports at and below a path of the share, and waits a little for the request that may be
    /// using or opening one.
    pub(super) fn forget_path(&self, path: &str) {
        let path = plain(path);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut gone = Vec::new();
        let mut state = self.lock();
        state.remote.retain(|remote| !remote.starts_with(&path));
        for (_, opening, forgotten) in &mut state.opening {
            *forgotten |= opening.starts_with(&path);
        }
        state.live.retain(|number, export| {
            let keep = *number == ROOT_EXPORT || !export.path.starts_with(&path);
            if !keep {
                gone.push(Arc::clone(export));
            }
            keep
        });
        state
            .devices
            .retain(|(number, _), _| !gone.iter().any(|export| export.number == *number));
        state
            .directories
            .retain(|inode, directory| *inode == ROOT_ID || !directory.starts_with(&path));
        let waited = self.ended.wait_timeout_while(state, PATIENCE, |state| {
            let mut opening = state.opening.iter();
            opening.any(|(_, opening, _)| opening.starts_with(&path))
                || gone.iter().any(|export| Arc::strong_count(export) > 1)
        });
        drop(waited);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        // Closing some hundred thousand descriptors takes a while, without the lock.
        drop(gone);
    }

    /// To be called when a request has ended and holds no export any more.
    pub(super) fn request_ended(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            let _state = self.lock();
            self.ended.notify_all();
        }
    }

    /// An entry as the guest sees it; one of the root export may be a mount's top.
    pub(super) fn found(
        &self,
        export: &Arc<Export>,
        parent: u64,
        name: &CStr,
        entry: Entry,
    ) -> io::Result<Entry> {
        if export.number != ROOT_EXPORT {
            return self.entry(export, entry);
        }
        let Some(path) = self.path_of(parent, name) else {
            return Err(errno(libc::ESTALE));
        };
        if entry.attr.st_dev == export.device {
            self.remember(export, entry.inode, path);
            let mut entry = self.entry(export, entry)?;
            // A mount point comes and goes by the shim's hand.
            entry.entry_timeout = Duration::ZERO;
            return Ok(entry);
        }
        // It belongs to a mount: the root's tree must not hold a descriptor of it.
        export.tree.forget(entry.inode, 1);
        let mount = self.mounted_at(path, (entry.attr.st_dev, entry.attr.st_ino))?;
        let (attr, attr_timeout) = mount.tree.getattr(ROOT_ID)?;
        let attr_flags = if mount.submount { ATTR_SUBMOUNT } else { 0 };
        let mut entry = self.entry(
            &mount,
            Entry {
                inode: ROOT_ID,
                attr,
                attr_timeout,
                attr_flags,
                ..entry
            },
        )?;
        entry.entry_timeout = Duration::ZERO;
        Ok(entry)
    }

    fn path_of(&self, parent: u64, name: &CStr) -> Option<PathBuf> {
        let name = std::ffi::OsStr::from_bytes(name.to_bytes());
        Some(self.lock().directories.get(&parent)?.join(name))
    }

    /// Notes the path of an inode of the root export.
    fn remember(&self, root: &Export, inode: u64, path: PathBuf) {
        let mut state = self.lock();
        if state.directories.len() >= state.clean_at {
            state
                .directories
                .retain(|inode, _| *inode == ROOT_ID || root.tree.has(*inode));
            state.clean_at = CLEAN_AT.max(2 * state.directories.len());
        }
        state.directories.insert(inode, path);
    }

    /// The export of the mount at a path, made when it is first seen. `top` tells the mount that is
    /// there now from one that has left.
    fn mounted_at(&self, path: PathBuf, top: (u64, u64)) -> io::Result<Arc<Export>> {
        let mut state = self.lock();
        let known = state
            .live
            .values()
            .find(|export| export.number != ROOT_EXPORT && export.path == path)
            .cloned();
        match known {
            Some(known) if (known.device, known.top) == top => return Ok(known),
            Some(stale) => {
                state.live.remove(&stale.number);
            }
            None => {}
        }
        let number = state.next;
        if number > MAX_EXPORT {
            return Err(errno(libc::ENFILE));
        }
        state.next = number + 1;
        state.opening.push((number, path.clone(), false));
        drop(state);
        // Without the lock: it may take long, and others serve what there is.
        let directory = self.root.join(&path);
        let opened = self.open_export(number, &directory, path.clone());
        let mut state = self.lock();
        let own = state.opening.iter().position(|(one, _, _)| *one == number);
        let forgotten = own.is_none_or(|own| state.opening.swap_remove(own).2);
        let fresh = Arc::new(opened?);
        if forgotten {
            return Err(errno(libc::ESTALE));
        }
        let mut live = state.live.values();
        let other = live.find(|export| export.number != ROOT_EXPORT && export.path == path);
        match other {
            // Somebody else has looked there at the same time.
            Some(other) if (other.device, other.top) == (fresh.device, fresh.top) => {
                return Ok(Arc::clone(other));
            }
            Some(stale) => {
                let stale = stale.number;
                state.live.remove(&stale);
            }
            None => {}
        }
        if state.remote.contains(&path) {
            fresh.tree.is_taken_for_remote();
        }
        state.live.insert(number, Arc::clone(&fresh));
        Ok(fresh)
    }

    fn open_export(&self, number: u32, directory: &Path, path: PathBuf) -> io::Result<Export> {
        #[cfg(test)]
        if let Some(gate) = self.gate.get() {
            gate(&path);
        }
        let exclusive = path.file_name().is_some_and(|name| name == ROOTFS);
        let timeout = if exclusive {
            ROOTFS_TIMEOUT
        } else {
            VOLUME_TIMEOUT
        };
        let descriptors = Arc::clone(&self.descriptors);
        let own = self.own && number != ROOT_EXPORT;
        let tree = Tree::new(directory, descriptors, own, exclusive, timeout)?;
        let (top, _) = tree.getattr(ROOT_ID)?;
        let volume = number != ROOT_EXPORT && !exclusive;
        let directory = top.st_mode & libc::S_IFMT == libc::S_IFDIR;
        Ok(Export {
            number,
            tree,
            path,
            device: top.st_dev,
            top: top.st_ino,
            exclusive,
            submount: volume && directory && self.submounts.load(Ordering::Relaxed),
        })
    }

    /// An entry of an export with the guest's node id and inode number.
    pub(super) fn entry(&self, export: &Export, mut entry: Entry) -> io::Result<Entry> {
        let node = NodeId {
            export: export.number,
            number: entry.inode,
        };
        entry.inode = node.to_guest()?;
        entry.attr = self.shown(export, entry.attr);
        Ok(entry)
    }

    /// Attributes with an inode number that no other file of the share has (as far as the host's numbers
    /// stay below 2^48, as they do everywhere but on stacked file systems with `xino`).
    pub(super) fn shown(&self, export: &Export, mut stat: stat64) -> stat64 {
        let mut state = self.lock();
        let next = state.next_device;
        let number = *state
            .devices
            .entry((export.number, stat.st_dev))
            .or_insert(next);
        if number == next {
            state.next_device = next.wrapping_add(1);
        }
        stat.st_ino ^= u64::from(number) << 48;
        stat
    }
}

/// A path of the share as its exports have it.
fn plain(path: &str) -> PathBuf {
    path.split('/').filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_id_is_an_export_and_an_inode() {
        let node = NodeId {
            export: 7,
            number: 12,
        };
        assert_eq!(NodeId::from_guest(node.to_guest().unwrap()), node);
        assert_eq!(
            NodeId::from_guest(ROOT_ID),
            NodeId {
                export: ROOT_EXPORT,
                number: ROOT_ID
            }
        );
        let most = NodeId::from_guest(u64::MAX);
        assert_eq!(NodeId::from_guest(most.to_guest().unwrap()), most);
        let too_far = NodeId {
            export: 1,
            number: 1 << NUMBER_BITS,
        };
        assert!(too_far.to_guest().is_err());
    }

    #[test]
    fn a_volume_is_written_back_by_itself_where_it_is_a_file_system_of_its_own() {
        let Some(share) = crate::virtio::fs::tests::mounted_share() else {
            return;
        };
        for own in [false, true] {
            let exports = Exports::new(share.path(), false).unwrap();
            exports.make_submounts(own);
            let volume = exports.mounted_at("v".into(), (0, 0)).unwrap().number;
            let rootfs = exports.mounted_at("c/rootfs".into(), (0, 0)).unwrap();
            let with = |number: u32| {
                let mut numbers: Vec<u32> = exports
                    .of_one_file_system(number)
                    .iter()
                    .map(|export| export.number)
                    .collect();
                numbers.sort_unstable();
                numbers
            };
            let root = vec![ROOT_EXPORT, rootfs.number];
            if own {
                assert_eq!(with(volume), [volume]);
                assert_eq!(with(ROOT_EXPORT), root);
                // Of a mount that has left: the rest.
                assert_eq!(with(99), root);
            } else {
                assert_eq!(with(volume).len(), 3);
                assert_eq!(with(ROOT_EXPORT).len(), 3);
            }
        }
    }
}
