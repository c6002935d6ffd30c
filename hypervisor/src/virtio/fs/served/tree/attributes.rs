//! What belongs to a file beside its content: mode, owner, size, times, extended attributes, flags.

use std::ffi::CStr;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{SetattrValid, stat64, statvfs64};
use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
    XattrFlags, chmodat, chownat, ftruncate, getxattr, listxattr, removexattr, setxattr, utimensat,
};

use super::super::errno;
use super::nodes::Node;
use super::{NO_HANDLE, Tree, path_of, stat};

const CAPABILITY: &CStr = c"security.capability";
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

/// The most that an attribute or a list of names can be: `XATTR_SIZE_MAX`, `XATTR_LIST_MAX`.
pub(in super::super) const LARGEST: usize = 64 << 10;
/// Nearly all are shorter.
const USUAL: usize = 512;

impl Tree {
    pub(in super::super) fn setattr(
        &self,
        number: u64,
        wanted: &stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let node = self.nodes.get(number)?;
        let name = Self::name_of(&node.file);
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_raw_mode(wanted.st_mode);
            chmodat(&self.descriptors, &name, mode, AtFlags::empty())?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let id = |flag, id| valid.contains(flag).then_some(id);
            // The number that means "unchanged" to the host is no id.
            if [
                id(SetattrValid::UID, wanted.st_uid),
                id(SetattrValid::GID, wanted.st_gid),
            ]
            .contains(&Some(u32::MAX))
            {
                return Err(errno(libc::EINVAL));
            }
            let uid = id(SetattrValid::UID, wanted.st_uid).map(Uid::from_raw);
            let gid = id(SetattrValid::GID, wanted.st_gid).map(Gid::from_raw);
            chownat(&node.file, "", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(wanted.st_size).map_err(|_| errno(libc::EINVAL))?;
            let kill = valid.contains(SetattrValid::KILL_SUIDGID);
            // What was opened for reading alone may be another file than what is written, on an overlay.
            let handle = match &self.files {
                Some(_) => Some(NO_HANDLE),
                None => handle,
            };
            self.keeping_set_id(&node, kill, || match handle {
                Some(handle) => Ok(ftruncate(&self.open_as(number, handle, true)?.file, size)?),
                None => {
                    let file = self.reopen(&node, OFlags::RDWR | OFlags::NONBLOCK)?;
                    Ok(ftruncate(file, size)?)
                }
            })?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let times = Timestamps {
                last_access: time(
                    valid.contains(SetattrValid::ATIME),
                    valid.contains(SetattrValid::ATIME_NOW),
                    (wanted.st_atime, wanted.st_atime_nsec),
                ),
                last_modification: time(
                    valid.contains(SetattrValid::MTIME),
                    valid.contains(SetattrValid::MTIME_NOW),
                    (wanted.st_mtime, wanted.st_mtime_nsec),
                ),
            };
            utimensat(&self.descriptors, &name, &times, AtFlags::empty())?;
        }
        let seen = stat::look(&node.file, StatxFlags::empty())?;
        Ok((Self::shown(&node, &seen), self.timeout))
    }

    pub(in super::super) fn statfs(&self, number: u64) -> io::Result<statvfs64> {
        let node = self.nodes.get(number)?;
        let told = rustix::fs::fstatvfs(&node.file)?;
        // SAFETY: a struct of numbers, for which zero is valid.
        let mut statvfs: statvfs64 = unsafe { std::mem::zeroed() };
        statvfs.f_bsize = told.f_bsize;
        statvfs.f_frsize = told.f_frsize;
        statvfs.f_blocks = told.f_blocks;
        statvfs.f_bfree = told.f_bfree;
        statvfs.f_bavail = told.f_bavail;
        statvfs.f_files = told.f_files;
        statvfs.f_ffree = told.f_ffree;
        statvfs.f_namemax = told.f_namemax;
        Ok(statvfs)
    }

    /// An attribute's value.
    ///
    /// # Errors
    /// `ERANGE` if it is longer than [`LARGEST`], else the host's.
    pub(in super::super) fn getxattr(&self, number: u64, name: &CStr) -> io::Result<Vec<u8>> {
        let node = self.nodes.get(number)?;
        // The guest asks before the first write to each file it has looked at again.
        let known = node.incapable.load(Ordering::SeqCst);
        if name == CAPABILITY && known & 1 != 0 {
            return Err(errno(libc::ENODATA));
        }
        let path = path_of(&node.file);
        let value = sized(|buffer| getxattr(&path, name, buffer));
        let is_acl = matches!(name.to_bytes(), ACCESS_ACL | DEFAULT_ACL);
        match value {
            // The guest's kernel takes any other error for "no access at all".
            Err(error) if is_acl && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Err(errno(libc::ENODATA))
            }
            Err(error) if name == CAPABILITY && error.raw_os_error() == Some(libc::ENODATA) => {
                if self.alone(&node) {
                    // Unless it has been given one meanwhile.
                    let _ = node.incapable.compare_exchange(
                        known,
                        known | 1,
                        Ordering::SeqCst,
                        Ordering::SeqCst,
                    );
                }
                Err(error)
            }
            value => value,
        }
    }

    pub(in super::super) fn listxattr(&self, number: u64) -> io::Result<Vec<u8>> {
        let node = self.nodes.get(number)?;
        let path = path_of(&node.file);
        sized(|buffer| listxattr(&path, buffer))
    }

    /// Sets an attribute; with `kill_sgid`, as somebody outside the file's group who sets an ACL.
    pub(in super::super) fn setxattr(
        &self,
        number: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> io::Result<()> {
        let node = self.nodes.get(number)?;
        let capable = || {
            if name == CAPABILITY {
                node.may_be_capable();
            }
        };
        capable();
        let flags = XattrFlags::from_bits_retain(flags);
        let set = setxattr(path_of(&node.file), name, value, flags);
        capable();
        set?;
        if kill_sgid && name.to_bytes() == ACCESS_ACL {
            self.clear_sgid(&node)?;
        }
        Ok(())
    }

    /// The host leaves the bit, as it is root who sets the ACL there.
    fn clear_sgid(&self, node: &Node) -> io::Result<()> {
        let seen = stat::look(&node.file, StatxFlags::empty())?;
        let mode = Mode::from_raw_mode(u32::from(seen.stx_mode));
        if mode.contains(Mode::SGID) {
            let name = Self::name_of(&node.file);
            chmodat(&self.descriptors, name, mode - Mode::SGID, AtFlags::empty())?;
        }
        Ok(())
    }

    pub(in super::super) fn removexattr(&self, number: u64, name: &CStr) -> io::Result<()> {
        let node = self.nodes.get(number)?;
        Ok(removexattr(path_of(&node.file), name)?)
    }

    /// Reads or changes the flags that `lsattr` shows, on an open file: `command` is one of
    /// [`super::super::flags::COMMANDS`], and `argument` as long as it wants it.
    pub(in super::super) fn flags(
        &self,
        number: u64,
        handle: u64,
        command: u32,
        argument: &mut [u8],
    ) -> io::Result<()> {
        let open = self.open_as(number, handle, false)?;
        super::super::flags::call(&open.file, command, argument)
    }
}

fn time(set: bool, now: bool, (tv_sec, tv_nsec): (i64, i64)) -> Timespec {
    match (set || now, now) {
        (false, _) => Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        (true, true) => Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        },
        // The host refuses what is no part of a second; these two would mean something else.
        (true, false) if tv_nsec == UTIME_OMIT || tv_nsec == UTIME_NOW => {
            Timespec { tv_sec, tv_nsec: 0 }
        }
        (true, false) => Timespec { tv_sec, tv_nsec },
    }
}

/// What `ask` writes into a buffer, which grows once if it is too short.
fn sized(ask: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; USUAL];
    let length = match ask(&mut buffer) {
        Err(rustix::io::Errno::RANGE) => {
            buffer = vec![0; LARGEST];
            ask(&mut buffer)?
        }
        asked => asked?,
    };
    buffer.truncate(length);
    Ok(buffer)
}
