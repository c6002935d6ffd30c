//! What the guest's FUSE requests act on: each mount below the share's root is served by itself.
//!
//! The share's root and the directories of its mount points are served by one pass-through instance.
//! The first LOOKUP that crosses into a mount makes an instance of its own for it ([`Export`]), which
//! owns every inode and open file of that mount: forgetting a mount is dropping its instance, and no
//! `O_PATH` descriptor can keep a volume busy (DESIGN section 9).
//!
//! A node id is the export's number and the file's number in it ([`numbers`]). Attributes get inode numbers that are
//! unique in the whole share, which the guest sees as one file system.
//!
//! Hostile: every argument. `..` is refused outright; only the kernel's own NFS export asks for it.

mod budget;
mod caller;
mod exports;
mod link;
mod numbers;
mod owner;

use std::ffi::CStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FsOptions, OpenOptions, SetattrValid, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
    ZeroCopyWriter,
};

use super::xattr;
use budget::Budget;
use exports::{Export, Exports, NodeId};

/// The longest reply a guest may ask for: 256 pages, FUSE's own limit.
const MAX_REPLY: u32 = 1 << 20;
/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`.
const MAX_XATTR: u32 = 64 << 10;
/// The guest's O_DIRECT means "not through the guest's cache"; the host's needs alignment that a guest
/// buffer does not have. O_ASYNC would send signals to the VMM. With O_PATH or O_NOATIME the library's change of a
/// handle's flags can fail, after which it closes the descriptor that the handle still names: the next one with
/// that number would be the guest's. No kernel sends O_PATH.
const NOT_PASSED_ON: u32 =
    (libc::O_DIRECT | libc::O_ASYNC | libc::O_PATH | libc::O_NOATIME).cast_unsigned();

/// What the server offers beyond what the pass-through instance asks for. No writeback cache (volumes are
/// shared with the host), no POSIX or BSD locks (they are the guest's own), no DAX.
fn offered() -> FsOptions {
    FsOptions::ASYNC_READ
        | FsOptions::PARALLEL_DIROPS
        | FsOptions::BIG_WRITES
        | FsOptions::MAX_PAGES
        | FsOptions::ATOMIC_O_TRUNC
        | FsOptions::AUTO_INVAL_DATA
        // A link's target never changes, only which link has the name.
        | FsOptions::CACHE_SYMLINKS
        | FsOptions::ASYNC_DIO
        | FsOptions::DO_READDIRPLUS
        | FsOptions::READDIRPLUS_AUTO
        | FsOptions::HANDLE_KILLPRIV_V2
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// The file server behind the device.
pub(super) struct Served {
    exports: Exports,
    budget: Budget,
}

type Opened = (Option<u64>, OpenOptions, Option<u32>);

impl Served {
    pub(super) fn new(root: &Path) -> io::Result<Self> {
        Ok(Self {
            exports: Exports::new(root)?,
            budget: Budget::new()?,
        })
    }

    pub(super) fn forget_path(&self, path: &str) {
        self.exports.forget_path(path);
    }

    pub(super) fn request_ended(&self) {
        self.exports.request_ended();
    }

    pub(super) fn on_pressure(&self, told: Box<dyn Fn() + Send + Sync>) {
        self.budget.on_pressure(told);
    }

    pub(super) fn reset(&self) {
        self.exports.reset();
    }

    /// As [`Self::at`], for a request that will leave something open.
    fn opening_at(&self, node: u64) -> io::Result<(Arc<Export>, u64)> {
        self.budget.admit()?;
        self.at(node)
    }

    fn at(&self, node: u64) -> io::Result<(Arc<Export>, u64)> {
        let node = NodeId::from_guest(node);
        let export = self.exports.get(node.export)?;
        let inode = export.numbers.inode(node.number)?;
        Ok((export, inode))
    }

    /// Both in one export, or a rename or link between mounts, which is EXDEV as everywhere.
    fn pair(&self, first: u64, second: u64) -> io::Result<(Arc<Export>, u64, u64)> {
        let first = NodeId::from_guest(first);
        let second = NodeId::from_guest(second);
        if first.export != second.export {
            return Err(errno(libc::EXDEV));
        }
        let export = self.exports.get(first.export)?;
        let first = export.numbers.inode(first.number)?;
        let second = export.numbers.inode(second.number)?;
        Ok((export, first, second))
    }

    fn plain_name(name: &CStr) -> io::Result<&CStr> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(errno(libc::EINVAL)),
            bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
            _ => Ok(name),
        }
    }
}

impl FileSystem for Served {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.exports.init(capable & offered())?;
        Ok(offered())
    }

    fn destroy(&self) {
        self.exports.reset();
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = Self::plain_name(name)?;
        let (export, inode) = self.opening_at(parent)?;
        match export.fs.lookup(ctx, inode, name) {
            Ok(entry) => self.exports.found(&export, inode, name, entry),
            Err(error) => export.absent(error),
        }
    }

    fn forget(&self, ctx: &Context, node: u64, count: u64) {
        // Of a mount that has left: there is nothing to forget.
        if let Ok((export, inode)) = self.at(node) {
            export.fs.forget(ctx, inode, count);
        }
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(u64, u64)>) {
        for (node, count) in requests {
            self.forget(ctx, node, count);
        }
    }

    fn getattr(
        &self,
        ctx: &Context,
        node: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        let (export, inode) = self.at(node)?;
        let (stat, timeout) = export.fs.getattr(ctx, inode, handle)?;
        Ok((self.exports.shown(&export, stat), timeout))
    }

    fn setattr(
        &self,
        ctx: &Context,
        node: u64,
        attributes: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (export, inode) = self.at(node)?;
        let (stat, timeout) = export.fs.setattr(ctx, inode, attributes, handle, valid)?;
        Ok((self.exports.shown(&export, stat), timeout))
    }

    fn readlink(&self, ctx: &Context, node: u64) -> io::Result<Vec<u8>> {
        let (export, inode) = self.at(node)?;
        export.fs.readlink(ctx, inode)
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (export, inode) = self.opening_at(parent)?;
        let (fs, name) = (&export.fs, Self::plain_name(name)?);
        let make = |ctx: &Context| fs.symlink(ctx, target, inode, name);
        let entry = owner::make(fs, ctx, inode, make)?;
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
        let (export, inode) = self.opening_at(parent)?;
        let (fs, name) = (&export.fs, Self::plain_name(name)?);
        let make = |ctx: &Context| fs.mknod(ctx, inode, name, mode, rdev, umask);
        let entry = owner::make(fs, ctx, inode, make)?;
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
        let (export, inode) = self.opening_at(parent)?;
        let (fs, name) = (&export.fs, Self::plain_name(name)?);
        let make = |ctx: &Context| fs.mkdir(ctx, inode, name, mode, umask);
        let entry = owner::make(fs, ctx, inode, make)?;
        self.exports.entry(&export, entry)
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (export, inode) = self.at(parent)?;
        export.fs.unlink(ctx, inode, Self::plain_name(name)?)
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (export, inode) = self.at(parent)?;
        export.fs.rmdir(ctx, inode, Self::plain_name(name)?)
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
        caller::or_as_caller(ctx, || {
            export.fs.rename(ctx, old, old_name, new, new_name, flags)
        })
    }

    fn link(&self, ctx: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (export, inode, parent) = self.pair(node, parent)?;
        let name = Self::plain_name(name)?;
        let link = || link::link(&export.fs, ctx, inode, parent, name);
        let entry = caller::or_as_caller(ctx, link)?;
        self.exports.entry(&export, entry)
    }

    fn open(&self, ctx: &Context, node: u64, flags: u32, fuse_flags: u32) -> io::Result<Opened> {
        let (export, inode) = self.opening_at(node)?;
        export
            .fs
            .open(ctx, inode, flags & !NOT_PASSED_ON, fuse_flags)
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mut args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let (export, inode) = self.opening_at(parent)?;
        args.flags &= !NOT_PASSED_ON;
        let (fs, name) = (&export.fs, Self::plain_name(name)?);
        let make = |ctx: &Context| fs.create(ctx, inode, name, args);
        let (entry, handle, options, passthrough) = owner::make(fs, ctx, inode, make)?;
        Ok((
            self.exports.entry(&export, entry)?,
            handle,
            options,
            passthrough,
        ))
    }

    fn read(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let (export, inode) = self.at(node)?;
        export.fs.read(
            ctx,
            inode,
            handle,
            writer,
            size.min(MAX_REPLY),
            offset,
            lock_owner,
            flags & !NOT_PASSED_ON,
        )
    }

    fn write(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let (export, inode) = self.at(node)?;
        export.fs.write(
            ctx,
            inode,
            handle,
            reader,
            size,
            offset,
            lock_owner,
            delayed,
            flags & !NOT_PASSED_ON,
            fuse_flags,
        )
    }

    fn flush(&self, ctx: &Context, node: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export.fs.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, node: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export.fs.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export
            .fs
            .fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        node: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export
            .fs
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: &Context, node: u64) -> io::Result<statvfs64> {
        let (export, inode) = self.at(node)?;
        export.fs.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        let name = xattr::to_host(name).map_err(|_| errno(libc::EPERM))?;
        export.fs.setxattr(ctx, inode, &name, value, flags)
    }

    fn getxattr(
        &self,
        ctx: &Context,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let (export, inode) = self.at(node)?;
        let name = xattr::to_host(name).map_err(|_| errno(libc::ENODATA))?;
        export.fs.getxattr(ctx, inode, &name, size.min(MAX_XATTR))
    }

    fn listxattr(&self, ctx: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let (export, inode) = self.at(node)?;
        // Mapped names have another length, so the host's answer is needed whole.
        let names = match export.fs.listxattr(ctx, inode, MAX_XATTR)? {
            ListxattrReply::Names(names) => xattr::list_to_guest(&names),
            ListxattrReply::Count(_) => Vec::new(),
        };
        let length = u32::try_from(names.len()).map_err(|_| errno(libc::E2BIG))?;
        match size {
            0 => Ok(ListxattrReply::Count(length)),
            size if size < length => Err(errno(libc::ERANGE)),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    fn removexattr(&self, ctx: &Context, node: u64, name: &CStr) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        let name = xattr::to_host(name).map_err(|_| errno(libc::EPERM))?;
        export.fs.removexattr(ctx, inode, &name)
    }

    fn opendir(
        &self,
        ctx: &Context,
        node: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (export, inode) = self.opening_at(node)?;
        export.fs.opendir(ctx, inode, flags & !NOT_PASSED_ON)
    }

    fn readdir(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        let size = size.min(MAX_REPLY);
        // With attributes, so that the numbers are those LOOKUP gives.
        export
            .fs
            .readdirplus(ctx, inode, handle, size, offset, &mut |mut item, entry| {
                item.ino = self.exports.shown(&export, entry.attr).st_ino;
                let added = add(item);
                // The instance itself takes back the entry that did not fit.
                if !matches!(added, Ok(0)) {
                    export.fs.forget(ctx, entry.inode, 1);
                }
                added
            })
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        let size = size.min(MAX_REPLY);
        export
            .fs
            .readdirplus(ctx, inode, handle, size, offset, &mut |mut item, entry| {
                let instance_inode = entry.inode;
                if let Err(error) = self.budget.admit() {
                    export.fs.forget(ctx, instance_inode, 1);
                    return Err(error);
                }
                let name = c_name(item.name)?;
                let entry = self.exports.found(&export, inode, &name, entry)?;
                let crossed = NodeId::from_guest(entry.inode).export != export.number;
                item.ino = entry.attr.st_ino;
                let added = add(item, entry);
                // `found` has already taken a crossed entry back, and the instance will do so again
                // for one that did not fit: both saturate at zero.
                if added.is_err() && !crossed {
                    export.fs.forget(ctx, instance_inode, 1);
                }
                added
            })
    }

    fn fsyncdir(&self, ctx: &Context, node: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export.fs.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: &Context, node: u64, flags: u32, handle: u64) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export.fs.releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: &Context, node: u64, mask: u32) -> io::Result<()> {
        let (export, inode) = self.at(node)?;
        export.fs.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let (export, inode) = self.at(node)?;
        export.fs.lseek(ctx, inode, handle, offset, whence)
    }
}

fn c_name(name: &[u8]) -> io::Result<std::ffi::CString> {
    std::ffi::CString::new(name).map_err(|_| errno(libc::EINVAL))
}
