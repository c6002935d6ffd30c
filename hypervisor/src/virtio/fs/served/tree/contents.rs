//! What is in files: written, synced, allocated and looked for.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::PoisonError;

use fuse_backend_rs::api::filesystem::{Context, ZeroCopyReader};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, fdatasync, fsync, seek, syncfs};

use super::super::{caller, errno};
use super::Tree;

/// How the guest's description writes at the moment.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Writing {
    /// At the end.
    pub(in super::super) appends: bool,
    /// Set-id bits go by it.
    pub(in super::super) kills: bool,
}

impl Tree {
    /// Writes `size` bytes at `offset`, or at the end.
    pub(in super::super) fn write(
        &self,
        ctx: &Context,
        number: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        (size, offset): (usize, u64),
        how: Writing,
    ) -> io::Result<usize> {
        let (node, open) = (self.nodes.get(number)?, self.open_as(number, handle, true)?);
        // The guest alone knows where the end of a file of the pod's own is.
        let appends = how.appends && self.files.is_none();
        // Held until it is written: another write may be asked to be made elsewhere.
        let _appends = open.append(appends)?;
        let mut write = || {
            self.keeping_set_id(&node, how.kills, || {
                reader.read_to(&mut *lent(&open.file), size, offset)
            })
        };
        // Space that a file system keeps for root is root's alone.
        if self.is_judged_elsewhere() {
            write()
        } else {
            caller::as_caller(ctx, write)
        }
    }

    /// What closing one of several descriptors does: errors that come late come now.
    pub(in super::super) fn flush(&self, number: u64, handle: u64) -> io::Result<()> {
        let open = self.opens.get(handle, number)?;
        if self.flushes {
            nix::unistd::close(rustix::io::dup(&open.file)?)?;
        }
        Ok(())
    }

    pub(in super::super) fn fsync(
        &self,
        number: u64,
        handle: u64,
        data_only: bool,
    ) -> io::Result<()> {
        let open = self.open_as(number, handle, false)?;
        let synced = if data_only {
            fdatasync(&open.file)
        } else {
            fsync(&open.file)
        };
        Ok(synced?)
    }

    /// Has the host write back what it holds of the file systems here that the guest can write to.
    pub(in super::super) fn sync(&self) -> io::Result<()> {
        for node in self.nodes.of_each_device() {
            let readonly = rustix::fs::StatVfsMountFlags::RDONLY;
            if !rustix::fs::fstatvfs(&node.file)?.f_flag.contains(readonly) {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK;
                syncfs(self.reopen(&node, flags)?)?;
            }
        }
        Ok(())
    }

    pub(in super::super) fn fallocate(
        &self,
        number: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let (node, open) = (self.nodes.get(number)?, self.open_as(number, handle, true)?);
        let mode = FallocateFlags::from_bits_retain(mode);
        // The guest's kernel has taken them itself, if they had to go.
        self.keeping_set_id(&node, false, || {
            Ok(fallocate(&open.file, mode, offset, length)?)
        })
    }

    /// The next data or hole; the guest's kernel knows all other positions itself.
    pub(in super::super) fn lseek(
        &self,
        number: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let open = self.open_as(number, handle, false)?;
        let position = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(errno(libc::EINVAL)),
        };
        let _held = open.position.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(seek(&open.file, position)?)
    }
}

/// A file as the library's copying wants it.
fn lent(file: &File) -> ManuallyDrop<File> {
    // SAFETY: the descriptor is open as long as `file`, which the caller holds longer than the result, and the
    // result does not close it.
    ManuallyDrop::new(unsafe { File::from_raw_fd(file.as_raw_fd()) })
}
