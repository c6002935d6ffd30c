//! A pass-through of one mount: what the guest asks of a file is asked of the host's, on an `O_PATH`
//! descriptor of it.
//!
//! The protocol's bytes are fuse-backend-rs's; its own pass-through is not used, see `docs/decisions.md`. New files are
//! made by the caller's ids and umask, so that the host's file system applies default ACLs and set-group-id
//! directories as it does for everybody. All else is done as the VMM's root, once the guest's kernel has let the caller.
//!
//! Hostile: numbers, handles, flags, names. Names are plain when they come here, and no link is followed.

mod attributes;
mod contents;
mod files;
mod identity;
mod nodes;
mod open;
mod opening;
mod removal;
mod stat;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Context, Entry};
use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Mode, OFlags, RawDir, SeekFrom, Statx, StatxFlags, chmodat,
    fstatfs, linkat, mkdirat, mknodat, openat, readlinkat, seek, symlinkat,
};

use super::caller;
use super::{errno, umask};
use crate::share::is_remote_number;
pub(super) use contents::Writing;
use files::Files;
use identity::{Beyond, Identity};
pub(super) use nodes::NUMBER_BITS;
use nodes::{Node, Nodes};
pub(super) use open::Open;
use open::Opens;
pub(in crate::virtio::fs) use opening::Opened;

/// `FOPEN_KEEP_CACHE`, `FOPEN_CACHE_DIR`, `FOPEN_NOFLUSH` of the protocol.
const KEEP_CACHE: u32 = 1 << 1;
const CACHE_DIRECTORY: u32 = 1 << 3;
const NO_FLUSH: u32 = 1 << 5;

/// What a request says instead of a handle where there are none.
const NO_HANDLE: u64 = 0;

const SET_ID: Mode = Mode::SUID.union(Mode::SGID);

/// Bytes of a directory that are read at once, at most.
const LISTING: usize = 64 << 10;
/// The least that holds an entry whatever its name.
const SHORTEST_LISTING: usize = 1 << 10;

/// `statfs` types whose close(2) has nothing to say: ext4, xfs, btrfs, tmpfs, overlayfs, f2fs, zfs, bcachefs.
const SILENT: [u64; 8] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    0x0102_1994,
    0x794c_7630,
    0xf2f5_2010,
    0x2fc1_2fc1,
    0xca45_1a4e,
];

/// One mount, and what the guest knows and has open of it.
pub(super) struct Tree {
    /// `/proc/self/fd` of the jail's own procfs: a descriptor's name there is its file.
    descriptors: Arc<OwnedFd>,
    nodes: Nodes,
    opens: Opens,
    /// What is open because it is read and written, where the guest opens nothing itself: in the pod's own.
    files: Option<Files>,
    /// Nobody but the guest writes here.
    exclusive: bool,
    /// How long the guest may keep names and attributes.
    timeout: Duration,
    /// The mount's own number: another's below it may be another view of the same files.
    mount: u64,
    /// Errors of the file system may come at close(2), or others see what was written after it.
    flushes: bool,
    /// There are files of another mount in it, and so perhaps of another kind of file system.
    mixed: AtomicBool,
    /// Its file system, or that of a mount in it, asks a server or a process, which may never answer.
    remote: AtomicBool,
    /// The mount's own file system does.
    itself_remote: AtomicBool,
    /// Mounts in it that were looked at for that, and whether they do.
    others: Mutex<BTreeMap<u64, bool>>,
    /// What is in the node's memory can be read without waiting for the rest, as far as is known.
    pub(super) reads_at_once: AtomicBool,
}

/// An entry of a directory.
pub(super) struct Listed<'a> {
    pub(super) name: &'a CStr,
    pub(super) inode: u64,
    pub(super) kind: u32,
    /// Where the next one is.
    pub(super) next: u64,
}

impl Listed<'_> {
    pub(super) fn is_dot(&self) -> bool {
        matches!(self.name.to_bytes(), b"." | b"..")
    }
}

impl Tree {
    /// The tree below what is mounted at `top`; `descriptors` is `/proc/self/fd`. In the pod's `own` the guest opens no
    /// files: it names them alone.
    pub(super) fn new(
        top: &Path,
        descriptors: Arc<OwnedFd>,
        own: bool,
        exclusive: bool,
        timeout: Duration,
    ) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(CWD, top, flags, Mode::empty())?;
        let seen = stat::look(&file, StatxFlags::MNT_ID)?;
        let file_system = fstatfs(&file)?.f_type.cast_unsigned();
        let is_remote = is_remote_number(file_system);
        let mut identity = stat::identity(&seen);
        let mount = identity.mount;
        if is_remote {
            identity.beyond = Some(Arc::new(Beyond::of(&file, &seen)?));
        }
        Ok(Self {
            descriptors,
            nodes: Nodes::new(file, stat::kind(&seen), identity),
            opens: Opens::new(),
            files: own.then(Files::default),
            exclusive,
            timeout,
            mount,
            flushes: !SILENT.contains(&file_system),
            mixed: AtomicBool::new(false),
            remote: AtomicBool::new(is_remote),
            itself_remote: AtomicBool::new(is_remote),
            others: Mutex::default(),
            reads_at_once: AtomicBool::new(true),
        })
    }

    /// Whether the guest has this number.
    pub(super) fn has(&self, number: u64) -> bool {
        self.nodes.has(number)
    }

    /// A descriptor's name in [`Self::descriptors`].
    fn name_of(file: impl AsFd) -> String {
        file.as_fd().as_raw_fd().to_string()
    }

    fn entry(&self, node: &Node, seen: &Statx) -> Entry {
        Entry {
            inode: node.number,
            generation: 0,
            attr: Self::shown(node, seen),
            attr_flags: 0,
            attr_timeout: self.timeout,
            entry_timeout: self.timeout,
        }
    }

    /// What is shown of a file to the guest.
    fn shown(node: &Node, seen: &Statx) -> stat64 {
        let set_id = Mode::from_raw_mode(u32::from(seen.stx_mode)).intersects(SET_ID);
        node.set_id.store(set_id, Ordering::Relaxed);
        stat::stat(seen)
    }

    /// Changes a file's content by `act`, and gives it back the set-id bits that it loses by that, unless the guest
    /// says that they shall go: in a user namespace the host's kernel takes them from everybody.
    fn keeping_set_id<T>(
        &self,
        node: &Node,
        shall_go: bool,
        act: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        if shall_go || !node.set_id.load(Ordering::Relaxed) || node.kind != FileType::RegularFile {
            return act();
        }
        let mode = || -> io::Result<Mode> {
            let seen = stat::look(&node.file, StatxFlags::empty())?;
            Ok(Mode::from_raw_mode(u32::from(seen.stx_mode)))
        };
        let before = mode()?;
        let done = act()?;
        let lost = before - mode()?;
        if !lost.is_empty() && SET_ID.contains(lost) {
            let name = Self::name_of(&node.file);
            chmodat(&self.descriptors, name, before, AtFlags::empty())?;
        }
        Ok(done)
    }

    fn known(&self, file: OwnedFd) -> io::Result<(Arc<Node>, Statx)> {
        let (identity, seen) = self.identify(&file)?;
        let node = self.nodes.found(file, stat::kind(&seen), identity)?;
        Ok((node, seen))
    }

    /// What tells a file of this tree from all others.
    fn identify(&self, file: &OwnedFd) -> io::Result<(Identity, Statx)> {
        let seen = stat::look(file, StatxFlags::MNT_ID)?;
        let mut identity = stat::identity(&seen);
        let is_remote = if identity.mount == self.mount {
            self.itself_remote.load(Ordering::Relaxed)
        } else {
            self.mixed.store(true, Ordering::Relaxed);
            self.look_at_other(file, identity.mount)?
        };
        if is_remote {
            identity.beyond = Some(Arc::new(Beyond::of(file, &seen)?));
        }
        Ok((identity, seen))
    }

    /// A file of another mount was found here; whether that is a remote one.
    fn look_at_other(&self, file: &OwnedFd, mount: u64) -> io::Result<bool> {
        let others = || self.others.lock().unwrap_or_else(PoisonError::into_inner);
        // The guest makes no mounts; the node's are few.
        if let Some(is_remote) = others().get(&mount) {
            return Ok(*is_remote);
        }
        // Without the lock: it may take long.
        let is_remote = is_remote_number(fstatfs(file)?.f_type.cast_unsigned());
        if is_remote {
            self.remote.store(true, Ordering::Relaxed);
        }
        others().insert(mount, is_remote);
        Ok(is_remote)
    }

    fn look_up(parent: &Node, name: &CStr) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&parent.file, name, flags, Mode::empty())?)
    }

    fn find(&self, parent: &Node, name: &CStr) -> io::Result<(Arc<Node>, Statx)> {
        match self.known(Self::look_up(parent, name)?) {
            // Another client of a server has put another file there. Asked by name, the host's kernel looks again at the
            // server; asked by descriptor, it cannot.
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => {
                stat::look_at(&parent.file, name)?;
                self.known(Self::look_up(parent, name)?)
            }
            found => found,
        }
    }

    /// Opens a file anew. Never a device, pipe or socket of the host: those are the guest's own.
    fn reopen(&self, node: &Node, flags: OFlags) -> io::Result<File> {
        if !matches!(node.kind, FileType::RegularFile | FileType::Directory) {
            return Err(errno(libc::EBADF));
        }
        let flags = flags | OFlags::CLOEXEC;
        let name = Self::name_of(&node.file);
        Ok(openat(&self.descriptors, name, flags, Mode::empty())?.into())
    }

    /// As [`Self::reopen`]; set-id bits stay if it is truncated by that, but with `kill`.
    fn reopen_keeping(&self, node: &Node, flags: OFlags, kill: bool) -> io::Result<File> {
        let whole = !flags.contains(OFlags::TRUNC);
        self.keeping_set_id(node, kill || whole, || self.reopen(node, flags))
    }

    fn answer_flags(&self, node: &Node, flags: OFlags) -> u32 {
        let cache = match (self.exclusive, node.kind) {
            (false, _) => 0,
            (true, FileType::Directory) => KEEP_CACHE | CACHE_DIRECTORY,
            (true, _) => KEEP_CACHE,
        };
        // Without it the guest writes mapped pages back when it closes a file, for whoever else reads it.
        let reads_only = flags & OFlags::ACCMODE == OFlags::RDONLY;
        let quiet = node.kind == FileType::RegularFile && (self.exclusive || reads_only);
        cache | if quiet { NO_FLUSH } else { 0 }
    }

    pub(super) fn lookup(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (node, seen) = self.find(&*self.nodes.get(parent)?, name)?;
        Ok(self.entry(&node, &seen))
    }

    pub(super) fn forget(&self, number: u64, count: u64) {
        self.nodes.forget(number, count);
        if let Some(files) = &self.files
            && !self.nodes.has(number)
        {
            files.close(number);
        }
    }

    /// Closes what is open for writing only because it was written a moment ago.
    pub(super) fn rest(&self) {
        if let Some(files) = &self.files {
            files.close_writable();
        }
    }

    /// What the guest has open by this handle, or a file of the pod's own without one.
    fn open_as(&self, number: u64, handle: u64, writes: bool) -> io::Result<Arc<Open>> {
        let Some(files) = self.files.as_ref().filter(|_| handle == NO_HANDLE) else {
            return self.opens.get(handle, number);
        };
        let node = self.nodes.get(number)?;
        if node.kind != FileType::RegularFile {
            return Err(errno(libc::EBADF));
        }
        files.get(number, writes, |access| {
            let flags = access | OFlags::NONBLOCK;
            Ok(Open::new(self.reopen(&node, flags)?, number, flags))
        })
    }

    pub(super) fn readlink(&self, number: u64) -> io::Result<Vec<u8>> {
        let node = self.nodes.get(number)?;
        Ok(readlinkat(&node.file, "", Vec::new())?.into_bytes())
    }

    /// Whether somebody else than this kernel may judge who may do what: all but new files is root's there.
    pub(super) fn is_judged_elsewhere(&self) -> bool {
        self.flushes || self.mixed.load(Ordering::Relaxed)
    }

    /// Does `act` as the caller, whose ids stay where they make no difference to what comes next.
    fn as_caller<T>(&self, ctx: &Context, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let done = caller::as_caller(ctx, act);
        if self.is_judged_elsewhere() {
            caller::as_root()?;
        }
        done
    }

    /// Makes a name in `parent` by `make`, and finds what it is now.
    fn made(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(&Node) -> rustix::io::Result<()>,
    ) -> io::Result<Entry> {
        let parent = self.nodes.get(parent)?;
        self.as_caller(ctx, || Ok(make(&parent)?))?;
        let (node, seen) = self.find(&parent, name)?;
        Ok(self.entry(&node, &seen))
    }

    pub(super) fn symlink(
        &self,
        ctx: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.made(ctx, parent, name, |parent| {
            symlinkat(target, &parent.file, name)
        })
    }

    pub(super) fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        mask: u32,
    ) -> io::Result<Entry> {
        umask::set(mask)?;
        self.made(ctx, parent, name, |parent| {
            mkdirat(&parent.file, name, Mode::from_raw_mode(mode))
        })
    }

    pub(super) fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        mask: u32,
    ) -> io::Result<Entry> {
        umask::set(mask)?;
        let (kind, mode) = (FileType::from_raw_mode(mode), Mode::from_raw_mode(mode));
        self.made(ctx, parent, name, |parent| {
            mknodat(&parent.file, name, kind, mode, Dev::from(device))
        })
    }

    /// Another name for a file. A descriptor's own name wants no capability, which `AT_EMPTY_PATH` does.
    pub(super) fn link(&self, number: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (node, parent) = (self.nodes.get(number)?, self.nodes.get(parent)?);
        let source = Self::name_of(&node.file);
        let flags = AtFlags::SYMLINK_FOLLOW;
        linkat(&self.descriptors, source, &parent.file, name, flags)?;
        let seen = stat::look(&node.file, StatxFlags::empty())?;
        self.nodes.again(&node)?;
        Ok(self.entry(&node, &seen))
    }

    pub(super) fn release(&self, number: u64, handle: u64) -> io::Result<()> {
        self.opens.release(handle, number)?;
        if self.is_remote() {
            self.nodes.closed(number, |number| self.opens.has(number));
        }
        Ok(())
    }

    /// A file to be read.
    pub(super) fn readable(&self, number: u64, handle: u64) -> io::Result<Arc<Open>> {
        self.open_as(number, handle, false)
    }

    /// Answers are taken to come from elsewhere from now on.
    pub(super) fn is_taken_for_remote(&self) {
        self.remote.store(true, Ordering::Relaxed);
    }

    /// The mount itself is taken for a remote one.
    #[cfg(test)]
    pub(super) fn pretend_remote(&self) {
        self.itself_remote.store(true, Ordering::Relaxed);
        self.is_taken_for_remote();
    }

    /// Whether answers come from elsewhere.
    pub(super) fn is_remote(&self) -> bool {
        self.remote.load(Ordering::Relaxed)
    }

    /// Lists a directory from a position on, until `each` has no room for an entry and says false.
    ///
    /// # Errors
    /// `EINVAL` if there was room for none; that of `each` if it fails.
    pub(super) fn list(
        &self,
        number: u64,
        handle: u64,
        room: usize,
        offset: u64,
        each: &mut dyn FnMut(&Listed<'_>) -> io::Result<bool>,
    ) -> io::Result<()> {
        let open = self.opens.get(handle, number)?;
        let mut buffer: Vec<u8> = Vec::with_capacity(room.clamp(SHORTEST_LISTING, LISTING));
        let _held = open.position.lock().unwrap_or_else(PoisonError::into_inner);
        seek(&open.file, SeekFrom::Start(offset))?;
        let mut directory = RawDir::new(&open.file, buffer.spare_capacity_mut());
        let mut listed = false;
        while let Some(entry) = directory.next() {
            let entry = entry?;
            let fits = each(&Listed {
                name: entry.file_name(),
                inode: entry.ino(),
                kind: kind_in_directory(entry.file_type()),
                next: entry.next_entry_cookie(),
            })?;
            if !fits {
                return if listed {
                    Ok(())
                } else {
                    Err(errno(libc::EINVAL))
                };
            }
            listed = true;
            if directory.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Attributes, and how long they are good for.
    pub(super) fn getattr(&self, number: u64) -> io::Result<(stat64, Duration)> {
        let node = self.nodes.get(number)?;
        let seen = stat::look(&node.file, StatxFlags::empty())?;
        Ok((Self::shown(&node, &seen), self.timeout))
    }

    /// All that the host knows, the time of birth too, and how long it is good for.
    pub(super) fn statx(&self, number: u64) -> io::Result<(Statx, stat64, Duration)> {
        let node = self.nodes.get(number)?;
        let seen = stat::look(&node.file, StatxFlags::BTIME)?;
        let stat = Self::shown(&node, &seen);
        Ok((seen, stat, self.timeout))
    }
}

/// `DT_*` of a directory's entry.
fn kind_in_directory(kind: FileType) -> u32 {
    kind.as_raw_mode() >> 12 & 0xf
}

/// A path of a descriptor's file for calls that take no directory.
fn path_of(file: impl AsFd) -> CString {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    // There is no zero byte in it.
    CString::new(path).unwrap_or_default()
}
