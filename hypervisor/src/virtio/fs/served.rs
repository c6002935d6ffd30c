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
mod requests;
mod tree;
mod umask;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenOptions, stat64};
use fuse_backend_rs::api::filesystem::{Context, Entry};
use rustix::fs::Statx;

use super::xattr;
use budget::Budget;
use exports::{Export, Exports, NodeId};
use tree::{Open, Opened, Tree};

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
        export.tree.pretend_remote();
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
