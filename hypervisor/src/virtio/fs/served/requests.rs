//! FUSE's requests, each passed to the tree of the mount that it is about.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, OpenOptions, SetattrValid, WRITE_KILL_PRIV, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
};

use super::tree::{Tree, Writing};
use super::{MAX_REPLY, Opening, PLUS_PER_ENTRY, Served, caller, errno};
use crate::virtio::fs::xattr;

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
