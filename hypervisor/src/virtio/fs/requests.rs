//! Requests of the FUSE protocol (linux/fuse.h) that the library does not know, or knows in an older shape: INIT with
//! all its flags, SETXATTR with its extension, TMPFILE, SYNCFS, STATX, IOCTL.
//!
//! Hostile: every byte. A request is copied out of guest memory once, at most [`LONGEST`] bytes of it, and read from
//! that copy; what is short, long or of a wrong kind is EINVAL.

use std::ffi::CStr;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{Attr, CreateIn, EntryOut, InHeader, OpenOut};
use fuse_backend_rs::api::filesystem::Context;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use vm_memory::ByteValued;

use super::served::Served;

const SETXATTR: u32 = 21;
const INIT: u32 = 26;
const IOCTL: u32 = 39;
const SYNCFS: u32 = 50;
const TMPFILE: u32 = 51;
const STATX: u32 = 52;

/// The version that is spoken; minor 39 has STATX.
const MAJOR: u32 = 7;
const MINOR: u32 = 39;
/// Kernels before this have a shorter INIT; no guest is that old.
const OLDEST_MINOR: u32 = 31;

/// Flags of INIT. What is not here is the guest's own affair: POSIX and BSD locks; or is not wanted: DAX.
mod init {
    const ASYNC_READ: u32 = 1 << 0;
    const ATOMIC_O_TRUNC: u32 = 1 << 3;
    const BIG_WRITES: u32 = 1 << 5;
    /// The umask comes with the request: a default ACL decides whether it counts.
    const DONT_MASK: u32 = 1 << 6;
    const AUTO_INVAL_DATA: u32 = 1 << 12;
    const DO_READDIRPLUS: u32 = 1 << 13;
    const READDIRPLUS_AUTO: u32 = 1 << 14;
    const ASYNC_DIO: u32 = 1 << 15;
    const PARALLEL_DIROPS: u32 = 1 << 18;
    /// The guest's kernel reads ACLs and holds everybody to them.
    pub(super) const POSIX_ACL: u32 = 1 << 20;
    const MAX_PAGES: u32 = 1 << 22;
    /// A link's target never changes, only which link has the name.
    const CACHE_SYMLINKS: u32 = 1 << 23;
    const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
    pub(super) const SETXATTR_EXT: u32 = 1 << 29;
    /// A volume can be a file system of its own in the guest. Taken with [`SUBMOUNTS_ENFORCE`] alone.
    pub(super) const SUBMOUNTS: u32 = 1 << 27;
    /// There are 32 more flags.
    pub(super) const INIT_EXT: u32 = 1 << 30;
    /// Of those: ACLs hold in such file systems too, as they do in our guest's kernel (`guest-kernel/patches`) and in no
    /// other.
    pub(super) const SUBMOUNTS_ENFORCE: u32 = 1 << 31;

    pub(super) const OFFERED: u32 = ASYNC_READ
        | ATOMIC_O_TRUNC
        | BIG_WRITES
        | DONT_MASK
        | AUTO_INVAL_DATA
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | ASYNC_DIO
        | PARALLEL_DIROPS
        | POSIX_ACL
        | MAX_PAGES
        | CACHE_SYMLINKS
        | HANDLE_KILLPRIV_V2
        | SETXATTR_EXT;

    /// Written pages may stay in the guest, which then knows better than the host how long a file is and when it was
    /// changed: only where nobody else writes.
    const WRITEBACK_CACHE: u32 = 1 << 16;
    /// A guest that opens nothing truncates by SETATTR.
    pub(super) const OFFERED_OWN: u32 = (OFFERED & !ATOMIC_O_TRUNC) | WRITEBACK_CACHE;
}

/// Pages of the longest request, and its bytes.
const MAX_PAGES: u16 = 256;
const MAX_WRITE: u32 = 1 << 20;
/// `FUSE_SETXATTR_ACL_KILL_SGID`.
const ACL_KILL_SGID: u32 = 1;
/// SETXATTR has the longest: an attribute of 64 KiB, its name, and what is before them.
const LONGEST: usize = (64 << 10) + 512;
const HEADER: usize = size_of::<InHeader>();
/// Of the answer.
pub(super) const OUT_HEADER: usize = 16;
/// As much as IOCTL's longest argument.
const LONGEST_ARGUMENT: u32 = 32;

/// What was agreed with the driver.
#[derive(Default)]
pub(super) struct Session {
    long_setxattr: AtomicBool,
}

type Reply = io::Result<Vec<u8>>;

pub(super) fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// Whether [`answer`] is for it.
pub(super) fn knows(opcode: u32) -> bool {
    matches!(opcode, SETXATTR | INIT | IOCTL | SYNCFS | TMPFILE | STATX)
}

/// Serves one request, whose header has been read; returns the bytes of its answer, 0 for none.
pub(super) fn answer(
    served: &Served,
    session: &Session,
    header: InHeader,
    reader: Reader<'_>,
    mut writer: VirtioFsWriter<'_>,
) -> u32 {
    let reply = body_of(header, reader).and_then(|body| serve(served, session, header, &body));
    let (error, payload) = match reply {
        Ok(payload) => (0, payload),
        Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
    };
    let length = OUT_HEADER + payload.len();
    let Ok(told) = u32::try_from(length) else {
        return 0;
    };
    if writer.available_bytes() < length {
        return 0;
    }
    let mut bytes = Vec::with_capacity(length);
    bytes.extend(out_header(told, error, header.unique));
    bytes.extend(payload);
    writer.write_all(&bytes).map_or(0, |()| told)
}

/// `struct fuse_out_header`: the answer's bytes, an error or 0, whose answer it is.
pub(super) fn out_header(length: u32, error: i32, unique: u64) -> [u8; OUT_HEADER] {
    let mut bytes = [0; OUT_HEADER];
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes[4..8].copy_from_slice(&error.to_le_bytes());
    bytes[8..].copy_from_slice(&unique.to_le_bytes());
    bytes
}

/// A request's bytes behind its header.
pub(super) fn body_of(header: InHeader, mut reader: Reader<'_>) -> Reply {
    let length = (header.len as usize)
        .checked_sub(HEADER)
        .filter(|length| *length <= LONGEST.min(reader.available_bytes()))
        .ok_or_else(invalid)?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(body)
}

fn serve(served: &Served, session: &Session, header: InHeader, body: &[u8]) -> Reply {
    let mut body = Body(body);
    let node = header.nodeid;
    match header.opcode {
        INIT => init(served, session, &mut body),
        SETXATTR => setxattr(served, session, node, &mut body).map(|()| Vec::new()),
        IOCTL => ioctl(served, node, &mut body),
        SYNCFS => served.sync(node).map(|()| Vec::new()),
        TMPFILE => tmpfile(served, header, &mut body),
        STATX => statx(served, node),
        _ => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
    }
}

/// A request behind its header, read from the front.
pub(super) struct Body<'a>(pub(super) &'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, count: usize) -> io::Result<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(count).ok_or_else(invalid)?;
        self.0 = rest;
        Ok(front)
    }

    pub(super) fn u32(&mut self) -> io::Result<u32> {
        let (front, rest) = self.0.split_first_chunk().ok_or_else(invalid)?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*front))
    }

    pub(super) fn u64(&mut self) -> io::Result<u64> {
        let (front, rest) = self.0.split_first_chunk().ok_or_else(invalid)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*front))
    }

    fn name(&mut self) -> io::Result<&'a CStr> {
        let name = CStr::from_bytes_until_nul(self.0).map_err(|_| invalid())?;
        self.take(name.to_bytes_with_nul().len())?;
        Ok(name)
    }

    /// All that is left, which must be `length` bytes.
    fn rest(&self, length: u32) -> io::Result<&'a [u8]> {
        (u32::try_from(self.0.len()) == Ok(length))
            .then_some(self.0)
            .ok_or_else(invalid)
    }
}

fn init(served: &Served, session: &Session, body: &mut Body<'_>) -> Reply {
    let (major, minor) = (body.u32()?, body.u32()?);
    let mut out = Vec::with_capacity(64);
    out.extend(MAJOR.to_le_bytes());
    out.extend(MINOR.to_le_bytes());
    if major > MAJOR {
        // The driver asks again in that version.
        out.resize(64, 0);
        return Ok(out);
    }
    if major < MAJOR || minor < OLDEST_MINOR {
        return Err(io::Error::from_raw_os_error(libc::EPROTO));
    }
    let (readahead, offered) = (body.u32()?, body.u32()?);
    served.reset()?;
    let more = if offered & init::INIT_EXT == 0 {
        0
    } else {
        body.u32()?
    };
    let known = if served.is_own() {
        init::OFFERED_OWN
    } else {
        init::OFFERED
    };
    let mut agreed = offered & known;
    let submounts = offered & init::SUBMOUNTS != 0 && more & init::SUBMOUNTS_ENFORCE != 0;
    if submounts {
        agreed |= init::SUBMOUNTS;
    }
    served.make_submounts(submounts);
    let long = agreed & init::SETXATTR_EXT != 0;
    session.long_setxattr.store(long, Ordering::Relaxed);
    out.extend(readahead.to_le_bytes());
    out.extend(agreed.to_le_bytes());
    out.extend(u16::MAX.to_le_bytes());
    out.extend((u16::MAX / 4 * 3).to_le_bytes());
    out.extend(MAX_WRITE.to_le_bytes());
    // Times are in nanoseconds.
    out.extend(1u32.to_le_bytes());
    out.extend(MAX_PAGES.to_le_bytes());
    out.resize(64, 0);
    Ok(out)
}

fn setxattr(served: &Served, session: &Session, node: u64, body: &mut Body<'_>) -> io::Result<()> {
    let (size, flags) = (body.u32()?, body.u32()?);
    let more = if session.long_setxattr.load(Ordering::Relaxed) {
        let more = body.u32()?;
        body.u32()?;
        more
    } else {
        0
    };
    let name = body.name()?;
    let kill_sgid = more & ACL_KILL_SGID != 0;
    served.set_attribute(node, name, body.rest(size)?, flags, kill_sgid)
}

fn ioctl(served: &Served, node: u64, body: &mut Body<'_>) -> Reply {
    let handle = body.u64()?;
    let (_flags, command) = (body.u32()?, body.u32()?);
    let _address = body.u64()?;
    let (in_size, out_size) = (body.u32()?, body.u32()?);
    let data = body.rest(in_size)?;
    let length = in_size.max(out_size).min(LONGEST_ARGUMENT) as usize;
    let mut argument = vec![0; length];
    let given = data.len().min(length);
    argument[..given].copy_from_slice(&data[..given]);
    served.flags(node, handle, command, &mut argument)?;
    // `struct fuse_ioctl_out` with result 0.
    let mut out = vec![0; 16];
    out.extend(argument.iter().take(out_size as usize));
    Ok(out)
}

fn tmpfile(served: &Served, header: InHeader, body: &mut Body<'_>) -> Reply {
    let args = CreateIn {
        flags: body.u32()?,
        mode: body.u32()?,
        umask: body.u32()?,
        fuse_flags: body.u32()?,
    };
    let context = Context::from(&header);
    let opened = served.tmpfile(&context, header.nodeid, args)?;
    let mut out = EntryOut::from(opened.entry).as_slice().to_vec();
    let open = OpenOut {
        fh: opened.handle,
        open_flags: opened.flags,
        passthrough: 0,
    };
    out.extend(open.as_slice());
    Ok(out)
}

/// `struct fuse_statx_out`.
fn statx(served: &Served, node: u64) -> Reply {
    let (seen, stat, timeout) = served.statx(node)?;
    let attr = Attr::with_flags(stat, 0);
    let mut out = Vec::with_capacity(288);
    put_timeout(&mut out, timeout);
    out.resize(32, 0);
    // Of what the host knows, no more than there is a place for.
    let known = rustix::fs::StatxFlags::BASIC_STATS | rustix::fs::StatxFlags::BTIME;
    out.extend((seen.stx_mask & known.bits()).to_le_bytes());
    out.extend(attr.blksize.to_le_bytes());
    out.extend(seen.stx_attributes.bits().to_le_bytes());
    for word in [attr.nlink, attr.uid, attr.gid] {
        out.extend(word.to_le_bytes());
    }
    out.extend(seen.stx_mode.to_le_bytes());
    out.extend([0; 2]);
    for word in [attr.ino, attr.size, attr.blocks] {
        out.extend(word.to_le_bytes());
    }
    out.extend(seen.stx_attributes_mask.bits().to_le_bytes());
    for time in [
        seen.stx_atime,
        seen.stx_btime,
        seen.stx_ctime,
        seen.stx_mtime,
    ] {
        out.extend(time.tv_sec.to_le_bytes());
        out.extend(time.tv_nsec.to_le_bytes());
        out.extend([0; 4]);
    }
    for word in [seen.stx_rdev_major, seen.stx_rdev_minor, 0, 0] {
        out.extend(word.to_le_bytes());
    }
    out.resize(288, 0);
    Ok(out)
}

fn put_timeout(out: &mut Vec<u8>, timeout: Duration) {
    out.extend(timeout.as_secs().to_le_bytes());
    out.extend(timeout.subsec_nanos().to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_enforces_acls_is_offered_together() {
        assert_ne!(init::OFFERED & init::POSIX_ACL, 0);
        assert_ne!(init::OFFERED & 1 << 6, 0, "DONT_MASK");
        // Without more, submounts are file systems without ACLs.
        assert_eq!(init::OFFERED & init::SUBMOUNTS, 0);
    }

    proptest! {
        #[test]
        fn a_body_is_never_read_beyond_its_end(bytes in prop::collection::vec(any::<u8>(), 0..64), size in any::<u32>()) {
            let mut body = Body(&bytes);
            let mut left = bytes.len();
            while body.u32().is_ok() { left -= 4; }
            prop_assert!(left < 4 && body.0.len() == left);
            prop_assert!(body.u64().is_err());
            let mut body = Body(&bytes);
            match body.name() {
                Ok(name) => prop_assert_eq!(body.0.len() + name.to_bytes_with_nul().len(), bytes.len()),
                Err(_) => prop_assert!(!bytes.contains(&0)),
            }
            prop_assert_eq!(body.rest(size).is_ok(), body.0.len() == size as usize);
        }
    }
}
