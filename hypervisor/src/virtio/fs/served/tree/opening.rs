//! Opening and creating of files: which flags are the host's affair, and what the guest is told of what it has open.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID};
use fuse_backend_rs::api::filesystem::{Context, Entry};
use rustix::fs::{Mode, OFlags, Statx, openat};

use super::super::umask;
use super::Tree;
use super::nodes::Node;
use super::open::Open;

/// Flags of open(2) that are the host's affair. The guest's O_DIRECT means "not through the guest's cache"; the
/// host's needs alignment that a guest buffer does not have. O_ASYNC would send signals to the VMM.
const PASSED_ON: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::TRUNC)
    .union(OFlags::NONBLOCK)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::NOATIME);

/// A new or found file that was opened.
pub(in crate::virtio::fs) struct Opened {
    pub(in crate::virtio::fs) entry: Entry,
    pub(in crate::virtio::fs) handle: u64,
    /// Flags of the protocol's answer.
    pub(in crate::virtio::fs) flags: u32,
}

fn passed_on(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags) & PASSED_ON
}

impl Tree {
    /// Opens a file or directory; a handle, and flags for the answer.
    pub(in super::super) fn open(
        &self,
        number: u64,
        flags: u32,
        kill: bool,
    ) -> io::Result<(u64, u32)> {
        let node = self.nodes.get(number)?;
        let flags = passed_on(flags);
        let file = self.reopen_keeping(&node, flags, kill)?;
        let handle = self.hold_open(&node, Open::new(file, node.number, flags));
        Ok((handle, self.answer_flags(&node, flags)))
    }

    pub(in super::super) fn opendir(&self, number: u64) -> io::Result<(u64, u32)> {
        let node = self.nodes.get(number)?;
        let file = self.reopen(&node, OFlags::DIRECTORY)?;
        let open = Open::new(file, node.number, OFlags::empty());
        let handle = self.hold_open(&node, open);
        Ok((handle, self.answer_flags(&node, OFlags::empty())))
    }

    pub(in super::super) fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<Opened> {
        let parent = self.nodes.get(parent)?;
        let flags = passed_on(args.flags);
        umask::set(args.umask)?;
        let fresh = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(args.mode);
        match self.as_caller(ctx, || Ok(openat(&parent.file, name, fresh, mode)?)) {
            Ok(file) => self.new_file(file, flags),
            Err(error)
                if error.kind() == io::ErrorKind::AlreadyExists
                    && !OFlags::from_bits_retain(args.flags).contains(OFlags::EXCL) =>
            {
                let (node, seen) = self.find(&parent, name)?;
                let kill = args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                match self.as_caller(ctx, || self.reopen_keeping(&node, flags, kill)) {
                    Ok(file) => Ok(self.opened(&node, &seen, file, flags)),
                    Err(error) => {
                        self.nodes.forget(node.number, 1);
                        Err(error)
                    }
                }
            }
            Err(error) => Err(error),
        }
    }

    /// A file without a name; it may be linked later, unless `O_EXCL` says that it may not.
    pub(in super::super) fn tmpfile(
        &self,
        ctx: &Context,
        parent: u64,
        args: CreateIn,
    ) -> io::Result<Opened> {
        let parent = self.nodes.get(parent)?;
        let mut flags = passed_on(args.flags) - OFlags::TRUNC;
        if self.files.is_some() {
            flags = (flags - OFlags::ACCMODE - OFlags::APPEND) | OFlags::RDWR;
        }
        umask::set(args.umask)?;
        let exclusive = OFlags::from_bits_retain(args.flags) & OFlags::EXCL;
        let all = flags | exclusive | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(args.mode);
        let file = self.as_caller(ctx, || Ok(openat(&parent.file, c".", all, mode)?))?;
        self.new_file(file, flags)
    }

    fn new_file(&self, file: OwnedFd, flags: OFlags) -> io::Result<Opened> {
        let path = OFlags::PATH | OFlags::CLOEXEC;
        let name = Self::name_of(&file);
        let (node, seen) = self.known(openat(&self.descriptors, name, path, Mode::empty())?)?;
        if self.alone(&node) {
            node.incapable.fetch_or(1, Ordering::Relaxed);
        }
        Ok(self.opened(&node, &seen, file.into(), flags))
    }

    /// Whether only the guest, and only by this number, changes the file.
    pub(super) fn alone(&self, node: &Node) -> bool {
        self.exclusive && node.identity.mount == self.mount
    }

    /// The guest has it open from now on; the handle for the answer.
    pub(super) fn hold_open(&self, node: &Arc<Node>, open: Open) -> u64 {
        let handle = self.opens.insert(open);
        // Its name may have gone while it was being opened.
        if self.is_remote() {
            self.nodes.hold_again(node);
        }
        handle
    }

    fn opened(&self, node: &Arc<Node>, seen: &Statx, file: File, flags: OFlags) -> Opened {
        let open = Open::new(file, node.number, flags);
        let handle = match &self.files {
            Some(files) => files.put(node.number, open),
            None => self.hold_open(node, open),
        };
        Opened {
            entry: self.entry(node, seen),
            handle,
            flags: self.answer_flags(node, flags),
        }
    }
}
