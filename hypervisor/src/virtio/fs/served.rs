//! What the guest's FUSE requests act on: each mount below the share's root is served by itself.
//!
//! The share's root and the directories of its mount points are one [`tree`].
//! The first LOOKUP that crosses into a mount makes a tree of its own for it ([`Export`]), which
//! owns every inode and open file of that mount: forgetting a mount is dropping its tree, and no
//! `O_PATH` descriptor can keep a volume busy (DESIGN section 9).
//!
//! A node id is the export's number and the file's number in its tree. Attributes get inode numbers that are
//! unique in the whole share, which the guest sees as one file system.
//!
//! Hostile: every argument. `..` is refused outright; only the kernel's own NFS export asks for it.

mod budget;
mod caller;
mod exports;
mod flags;
mod owner;
mod tree;
mod umask;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, OpenOptions, SetattrValid, WRITE_KILL_PRIV, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
};
use rustix::fs::Statx;

use super::xattr;
use budget::Budget;
use exports::{Export, Exports, NodeId};
use tree::{Open, Opened, Tree, Writing};

/// The longest reply a guest may ask for: 256 pages, FUSE's own limit.
pub(super) const MAX_REPLY: u32 = 1 << 20;
/// An entry of READDIRPLUS takes at least this many times what the host's directory has of it.
const PLUS_PER_ENTRY: u32 = 4;

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// The file server behind the device.
pub(super) struct Served {
    exports: Exports,
    budget: Budget,
    /// What the guest is served here is one pod's own: it keeps what is written for a while, and opens no files.
    own: bool,
    requests: AtomicU64,
    #[cfg(test)]
    gate: std::sync::OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// An open file while it is read.
pub(super) struct Readable {
    export: Arc<Export>,
    open: Arc<Open>,
}

impl Readable {
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.open.file.as_fd()
    }

    /// Whether it can be tried to read what is in memory alone.
    pub(super) fn reads_at_once(&self) -> bool {
        self.export.tree.reads_at_once.load(Ordering::Relaxed)
    }

    /// Its file system cannot: not to be tried again.
    pub(super) fn never_reads_at_once(&self) {
        let tree = &self.export.tree;
        tree.reads_at_once.store(false, Ordering::Relaxed);
    }
}

/// To be called first by a thread that helps: it has the ids and the umask of the one that has started it.
pub(super) fn helper_begins() {
    caller::inherited();
    umask::inherited();
}

type Opening = (Option<u64>, OpenOptions, Option<u32>);

impl Served {
    pub(super) fn new(root: &Path, own: bool) -> io::Result<Self> {
        Ok(Self {
            exports: Exports::new(root, own)?,
            budget: Budget::new()?,
            own,
            requests: AtomicU64::new(0),
            #[cfg(test)]
            gate: std::sync::OnceLock::new(),
        })
    }

    /// Whether it is the pod's own.
    pub(super) fn is_own(&self) -> bool {
        self.own
    }

    /// What the guest does not ask for again once it has been told that there is no such thing here: where its files
    /// are its own, nobody but its kernel judges who opens them.
    fn unless_own(&self) -> io::Result<()> {
        if self.own {
            return Err(errno(libc::ENOSYS));
        }
        Ok(())
    }

    /// How many requests were served.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    pub(super) fn forget_path(&self, path: &str) {
        self.exports.forget_path(path);
    }

    /// Only helpers are to ask what is at or below this path, from the first look on.
    pub(super) fn expect_remote(&self, path: &str) {
        self.exports.expect_remote(path);
    }

    /// To be called when something has been done about a request: it was served, or else it will be, or cannot be.
    pub(super) fn request_ended(&self, served: bool) {
        if served {
            self.requests.fetch_add(1, Ordering::Relaxed);
        }
        self.exports.request_ended();
    }

    pub(super) fn on_pressure(&self, told: Box<dyn Fn() + Send + Sync>) {
        self.budget.on_pressure(told);
    }

    /// To be called before a request of `opcode` is served, whoever's the last one was.
    ///
    /// # Errors
    /// If the thread cannot have root's ids back.
    pub(super) fn request_begins(opcode: u32) -> io::Result<()> {
        if caller::ANYBODYS.contains(&opcode) {
            return Ok(());
        }
        caller::as_root()
    }

    /// Number of the mount that a request is about, of 24 bits.
    pub(super) fn mount_of(node: u64) -> u32 {
        NodeId::from_guest(node).export
    }

    /// Whether a file system that a request about this node may have to ask has its answers from elsewhere: from a server
    /// or a process.
    pub(super) fn is_remote(&self, node: u64) -> bool {
        self.exports.is_remote(NodeId::from_guest(node))
    }

    /// A mount is taken for a remote one.
    #[cfg(test)]
    pub(super) fn pretend_remote(&self, node: u64) {
        let export = self.exports.get(Self::mount_of(node)).unwrap();
        export.tree.is_taken_for_remote();
    }

    /// Called before a mount is first looked at.
    #[cfg(test)]
    pub(super) fn at_first_look(&self, gate: exports::Gate) {
        assert!(self.exports.gate.set(gate).is_ok());
    }

    /// Called in each FSYNC.
    #[cfg(test)]
    pub(super) fn at_sync(&self, gate: Box<dyn Fn() + Send + Sync>) {
        assert!(self.gate.set(gate).is_ok());
    }

    /// An open file, to be read.
    ///
    /// # Errors
    /// `EBADF` for a handle that the guest has not, or has for another file.
    pub(super) fn readable(&self, node: u64, handle: u64) -> io::Result<Readable> {
        let (export, inode) = self.at(node)?;
        let open = export.tree.readable(inode, handle)?;
        Ok(Readable { export, open })
    }

    /// Nothing is asked at the moment: the thread is root's again.
    ///
    /// # Errors
    /// As [`Self::request_begins`].
    pub(super) fn requests_pause(&self) -> io::Result<()> {
        self.exports.rest();
        caller::as_root()
    }

    /// Ends the session with a driver, or begins one: the guest knows nothing then.
    ///
    /// # Errors
    /// If the share's root cannot be opened again.
    pub(super) fn reset(&self) -> io::Result<()> {
        self.exports.reset()
    }

    /// As [`Self::at`], for a request that will leave something open.
    fn opening_at(&self, node: u64) -> io::Result<(Arc<Export>, u64)> {
        self.budget.admit()?;
        self.at(node)
    }

    fn export(&self, number: u32) -> io::Result<Arc<Export>> {
        let export = self.exports.get(number)?;
        if export.tree.is_judged_elsewhere() {
            caller::as_root()?;
        }
        Ok(export)
    }

    fn at(&self, node: u64) -> io::Result<(Arc<Export>, u64)> {
        let node = NodeId::from_guest(node);
        Ok((self.export(node.export)?, node.number))
    }

    /// Both in one export, or a rename or link between mounts, which is EXDEV as everywhere.
    fn pair(&self, first: u64, second: u64) -> io::Result<(Arc<Export>, u64, u64)> {
        let first = NodeId::from_guest(first);
        let second = NodeId::from_guest(second);
        if first.export != second.export {
            return Err(errno(libc::EXDEV));
        }
        let export = self.export(first.export)?;
        Ok((export, first.number, second.number))
    }

    fn plain_name(name: &CStr) -> io::Result<&CStr> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(errno(libc::EINVAL)),
            bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
            _ => Ok(name),
        }
    }

    /// Makes something in `parent` by `make`, which is told the tree, the number there and the caller.
    fn making<T>(
        &self,
        ctx: &Context,
        parent: u64,
        make: impl Fn(&Tree, u64, &Context) -> io::Result<T>,
    ) -> io::Result<(Arc<Export>, T)> {
        let (export, inode) = self.opening_at(parent)?;
        let tree = &export.tree;
        let made = owner::make(tree, ctx, inode, |ctx| make(tree, inode, ctx))?;
        Ok((export, made))
    }

    /// What a new file's answer says: its entry, and how it was opened.
    fn shown_open(&self, export: &Export, opened: Opened) -> io::Result<Opened> {
        Ok(Opened {
            entry: self.exports.entry(export, opened.entry)?,
            ..opened
        })
    }

    /// A file without a name in a directory (`O_TMPFILE`).
    pub(super) fn tmpfile(&self, ctx: &Context, parent: u64, args: CreateIn) -> io::Result<Opened> {
        let make = |tree: &Tree, inode, ctx: &Context| tree.tmpfile(ctx, inode, args);
        let (export, opened) = self.making(ctx, parent, make)?;
        self.shown_open(&export, opened)
    }

    /// Whether volumes are to be file systems of their own in the guest, from its first look at them on.
    pub(super) fn make_submounts(&self, make: bool) {
        self.exports.make_submounts(make);
    }

    /// Writes back what the host holds of every file system that the guest can write to in that of `node`.
    pub(super) fn sync(&self, node: u64) -> io::Result<()> {
        for export in self
            .exports
            .of_one_file_system(NodeId::from_guest(node).export)
        {
            export.tree.sync()?;
        }
        Ok(())
    }

    /// An entry that the guest will not see after all.
    fn take_back(&self, entry: Entry) {
        if let Ok((export, inode)) = self.at(entry.inode) {
            export.tree.forget(inode, 1);
        }
    }

    /// All that is known of a file, with the attributes as the guest is shown them.
    pub(super) fn statx(&self, node: u64) -> io::Result<(Statx, stat64, Duration)> {
        let (export, inode) = self.at(node)?;
        let (seen, stat, timeout) = export.tree.statx(inode)?;
        Ok((seen, self.exports.shown(&export, stat), timeout))
    }

    /// Sets an attribute; with `kill_sgid`, as somebody outside the file's group who sets an ACL.
    pub(super) fn set_attribute(
        &self,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        let name = xattr::to_host(name).map_err(|_| errno(libc::EPERM))?;
        export.tree.setxattr(inode, &name, value, flags, kill_sgid)
    }

    /// One of the commands of [`flags`], on an open file or directory.
    pub(super) fn flags(
        &self,
        node: u64,
        handle: u64,
        command: u32,
        argument: &mut [u8],
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export.tree.flags(inode, handle, command, argument)
    }
}

/// As the library has them, which does not know every flag of today.
fn open_options(flags: u32) -> OpenOptions {
    // SAFETY: a set of bits, which is copied into the answer as it is and nowhere else looked at.
    unsafe { OpenOptions::from_bits_unchecked(flags) }
}

impl FileSystem for Served {
    type Inode = u64;
    type Handle = u64;

    fn destroy(&self) {
        // Without a root every later request fails.
        let _ = self.reset();
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = Self::plain_name(name)?;
        let (export, inode) = self.opening_at(parent)?;
        match export.tree.lookup(inode, name) {
            Ok(entry) => self.exports.found(&export, inode, name, entry),
            Err(error) => export.absent(error),
        }
    }

    fn forget(&self, _ctx: &Context, node: u64, count: u64) {
        // Of a mount that has left: there is nothing to forget.
        if let Ok((export, inode)) = self.at(node) {
            export.tree.forget(inode, count);
        }
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(u64, u64)>) {
        for (node, count) in requests {
            self.forget(ctx, node, count);
        }
    }

    fn getattr(
        &self,
        _ctx: &Context,
        node: u64,
        _handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        let (export, inode) = self.at(node)?;
        let (stat, timeout) = export.tree.getattr(inode)?;
        Ok((self.exports.shown(&export, stat), timeout))
    }

    fn setattr(
        &self,
        _ctx: &Context,
        node: u64,
        attributes: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (export, inode) = self.at(node)?;
        let (stat, timeout) = export.tree.setattr(inode, &attributes, handle, valid)?;
        Ok((self.exports.shown(&export, stat), timeout))
    }

    fn readlink(&self, _ctx: &Context, node: u64) -> io::Result<Vec<u8>> {
        let (export, inode) = self.at(node)?;
        export.tree.readlink(inode)
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = Self::plain_name(name)?;
        let make = |tree: &Tree, inode, ctx: &Context| tree.symlink(ctx, target, inode, name);
        let (export, entry) = self.making(ctx, parent, make)?;
        self.exports.entry(&export, entry)
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let name = Self::plain_name(name)?;
        let make =
            |tree: &Tree, inode, ctx: &Context| tree.mknod(ctx, inode, name, mode, rdev, umask);
        let (export, entry) = self.making(ctx, parent, make)?;
        self.exports.entry(&export, entry)
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let name = Self::plain_name(name)?;
        let make = |tree: &Tree, inode, ctx: &Context| tree.mkdir(ctx, inode, name, mode, umask);
        let (export, entry) = self.making(ctx, parent, make)?;
        self.exports.entry(&export, entry)
    }

    fn unlink(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (export, inode) = self.at(parent)?;
        export.tree.unlink(inode, Self::plain_name(name)?)
    }

    fn rmdir(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (export, inode) = self.at(parent)?;
        export.tree.rmdir(inode, Self::plain_name(name)?)
    }

    fn rename(
        &self,
        ctx: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let (export, old, new) = self.pair(old_parent, new_parent)?;
        let (old_name, new_name) = (Self::plain_name(old_name)?, Self::plain_name(new_name)?);
        let rename = || export.tree.rename(old, old_name, new, new_name, flags);
        caller::or_as_caller(ctx, rename)
    }

    fn link(&self, ctx: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (export, inode, parent) = self.pair(node, parent)?;
        let name = Self::plain_name(name)?;
        let entry = caller::or_as_caller(ctx, || export.tree.link(inode, parent, name))?;
        self.exports.entry(&export, entry)
    }

    fn open(&self, _ctx: &Context, node: u64, flags: u32, fuse_flags: u32) -> io::Result<Opening> {
        self.unless_own()?;
        let (export, inode) = self.opening_at(node)?;
        let kill = fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
        let (handle, flags) = export.tree.open(inode, flags, kill)?;
        Ok((Some(handle), open_options(flags), None))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        self.unless_own()?;
        let name = Self::plain_name(name)?;
        let make = |tree: &Tree, inode, ctx: &Context| tree.create(ctx, inode, name, args);
        let (export, opened) = self.making(ctx, parent, make)?;
        let opened = self.shown_open(&export, opened)?;
        let options = open_options(opened.flags);
        Ok((opened.entry, Some(opened.handle), options, None))
    }

    fn write(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let (export, inode) = self.at(node)?;
        let how = Writing {
            appends: flags & libc::O_APPEND.cast_unsigned() != 0,
            kills: fuse_flags & WRITE_KILL_PRIV != 0,
        };
        export
            .tree
            .write(ctx, inode, handle, reader, (size as usize, offset), how)
    }

    fn flush(&self, _ctx: &Context, node: u64, handle: u64, _lock_owner: u64) -> io::Result<()> {
        self.unless_own()?;
        let (export, inode) = self.at(node)?;
        export.tree.flush(inode, handle)
    }

    fn fsync(&self, _ctx: &Context, node: u64, datasync: bool, handle: u64) -> io::Result<()> {
        #[cfg(test)]
        if let Some(gate) = self.gate.get() {
            gate();
        }
        let (export, inode) = self.at(node)?;
        export.tree.fsync(inode, handle, datasync)
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export.tree.fallocate(inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        _ctx: &Context,
        node: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export.tree.release(inode, handle)
    }

    fn statfs(&self, _ctx: &Context, node: u64) -> io::Result<statvfs64> {
        let (export, inode) = self.at(node)?;
        export.tree.statfs(inode)
    }

    fn getxattr(
        &self,
        _ctx: &Context,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let (export, inode) = self.at(node)?;
        let name = xattr::to_host(name).map_err(|_| errno(libc::ENODATA))?;
        let value = export.tree.getxattr(inode, &name)?;
        Ok(match fitting(&value, size)? {
            Some(length) => GetxattrReply::Count(length),
            None => GetxattrReply::Value(value),
        })
    }

    fn listxattr(&self, _ctx: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let (export, inode) = self.at(node)?;
        let names = xattr::list_to_guest(&export.tree.listxattr(inode)?);
        Ok(match fitting(&names, size)? {
            Some(length) => ListxattrReply::Count(length),
            None => ListxattrReply::Names(names),
        })
    }

    fn removexattr(&self, _ctx: &Context, node: u64, name: &CStr) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        let name = xattr::to_host(name).map_err(|_| errno(libc::EPERM))?;
        export.tree.removexattr(inode, &name)
    }

    fn opendir(
        &self,
        _ctx: &Context,
        node: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (export, inode) = self.opening_at(node)?;
        let (handle, flags) = export.tree.opendir(inode)?;
        Ok((Some(handle), open_options(flags)))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        let room = size.min(MAX_REPLY) as usize;
        let (mut listed, _) = export.tree.getattr(inode)?;
        export.tree.list(inode, handle, room, offset, &mut |entry| {
            listed.st_ino = entry.inode;
            let added = add(DirEntry {
                ino: self.exports.shown(&export, listed).st_ino,
                offset: entry.next,
                type_: entry.kind,
                name: entry.name.to_bytes(),
            })?;
            Ok(added > 0)
        })
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        let room = (size.min(MAX_REPLY) / PLUS_PER_ENTRY) as usize;
        let (mut listed, _) = export.tree.getattr(inode)?;
        export.tree.list(inode, handle, room, offset, &mut |entry| {
            let found = if entry.is_dot() {
                None
            } else {
                // Without descriptors to spare, or if it has just gone, the name alone.
                self.opening_at(node)
                    .and_then(|_| export.tree.lookup(inode, entry.name))
                    .and_then(|found| self.exports.found(&export, inode, entry.name, found))
                    .ok()
            };
            listed.st_ino = entry.inode;
            let ino = match &found {
                Some(found) => found.attr.st_ino,
                None => self.exports.shown(&export, listed).st_ino,
            };
            let item = DirEntry {
                ino,
                offset: entry.next,
                type_: entry.kind,
                name: entry.name.to_bytes(),
            };
            let added = add(item, found.unwrap_or_default());
            // An entry that is not in the answer does not count as an answer.
            if !matches!(added, Ok(1..))
                && let Some(found) = found
            {
                self.take_back(found);
            }
            Ok(added? > 0)
        })
    }

    fn fsyncdir(&self, _ctx: &Context, node: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export.tree.fsync(inode, handle, datasync)
    }

    fn releasedir(&self, _ctx: &Context, node: u64, _flags: u32, handle: u64) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export.tree.release(inode, handle)
    }

    fn lseek(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let (export, inode) = self.at(node)?;
        export.tree.lseek(inode, handle, offset, whence)
    }
}

/// The length alone if the guest asks for it with size 0.
///
/// # Errors
/// `ERANGE` if it has less room.
fn fitting(value: &[u8], size: u32) -> io::Result<Option<u32>> {
    let length = u32::try_from(value.len()).map_err(|_| errno(libc::E2BIG))?;
    match size {
        0 => Ok(Some(length)),
        size if size < length => Err(errno(libc::ERANGE)),
        _ => Ok(None),
    }
}
