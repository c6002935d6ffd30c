//! What operations act on: open files, and what can be told of a file without telling where it is.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, OFlags, RawDir, Stat, StatxFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_res_gid, set_thread_res_uid};

use super::Outcome;

const SLOTS: usize = 4;
const PAGE: usize = 4096;

/// Open files by slot.
#[derive(Default)]
pub struct World([Option<OwnedFd>; SLOTS]);

impl World {
    pub fn put(&mut self, slot: usize, file: OwnedFd) {
        self.0[slot] = Some(file);
    }

    pub fn close(&mut self, slot: usize) -> Result<(), Errno> {
        self.0[slot].take().map(drop).ok_or(Errno::BADF)
    }

    pub fn file(&self, slot: usize) -> Result<BorrowedFd<'_>, Errno> {
        self.0[slot].as_ref().map(AsFd::as_fd).ok_or(Errno::BADF)
    }

    pub fn fstat(&self, slot: usize) -> Outcome {
        Ok(describe(&rustix::fs::fstat(self.file(slot)?)?))
    }

    /// Whether its time of birth is known.
    pub fn born(&self, slot: usize) -> Outcome {
        let flags = AtFlags::EMPTY_PATH;
        let seen = rustix::fs::statx(self.file(slot)?, "", flags, StatxFlags::BTIME)?;
        let known = StatxFlags::from_bits_retain(seen.stx_mask).contains(StatxFlags::BTIME);
        Ok(format!(
            "{}",
            known && seen.stx_btime.tv_sec > 1_000_000_000
        ))
    }

    /// Writes a byte through a shared mapping of the first page, and reads it back through the file.
    pub fn map(&self, slot: usize, byte: u8) -> Outcome {
        let file = self.file(slot)?;
        if rustix::fs::fstat(file)?.st_size < 1 {
            return Ok("empty".to_owned());
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let map = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                PAGE,
                access,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        // SAFETY: the page is mapped writable, and its first byte lies within the file.
        unsafe { map.cast::<u8>().write_volatile(byte) };
        let mut read = [0u8; 8];
        let count = rustix::io::pread(file, &mut read[..], 0);
        // SAFETY: what was mapped above, and nothing points there any more.
        unsafe { rustix::mm::munmap(map, PAGE)? };
        let count = count?;
        Ok(format!("{count} {:x}", sum(&read[..count])))
    }

    /// Everything below a directory.
    pub fn tree(&self, directory: &Path) -> String {
        let mut out = String::new();
        let mut names: Vec<_> = std::fs::read_dir(directory)
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        names.sort();
        for path in names {
            let text = path.to_string_lossy();
            let stat = stat(&text).unwrap_or_else(super::name);
            let _ = write!(out, " {text} {stat}");
            if path.is_dir() && !path.is_symlink() {
                out.push_str(&self.tree(&path));
            }
        }
        out
    }
}

/// Kind, mode, owner, links, and a file's size.
fn describe(stat: &Stat) -> String {
    let kind = FileType::from_raw_mode(stat.st_mode);
    let directory = kind == FileType::Directory;
    let size = if directory { 0 } else { stat.st_size };
    format!(
        "{kind:?} {:o} {}:{} {} {size}",
        stat.st_mode & 0o7777,
        stat.st_uid,
        stat.st_gid,
        stat.st_nlink
    )
}

pub fn stat(path: &str) -> Outcome {
    Ok(describe(&rustix::fs::lstat(path)?))
}

/// A checksum (FNV-1a).
pub fn sum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Names and kinds in a directory, with its dots.
pub fn list(path: &str) -> Outcome {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    let directory = rustix::fs::open(path, flags, rustix::fs::Mode::empty())?;
    let mut buffer: Vec<u8> = Vec::with_capacity(PAGE);
    let mut names = BTreeSet::new();
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy();
        names.insert(format!("{name} {:?}", entry.file_type()));
    }
    Ok(Vec::from_iter(names).join(", "))
}

/// Extended attributes with checksums, without those of the node's security modules.
pub fn attributes(path: &str) -> Outcome {
    let mut names = vec![0u8; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names[..])?;
    let mut all = BTreeSet::new();
    for name in names[..length].split(|byte| *byte == 0) {
        if name.is_empty() || name == b"security.selinux" {
            continue;
        }
        let mut value = vec![0u8; 64 << 10];
        let read = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        let name = String::from_utf8_lossy(name).into_owned();
        all.insert(format!("{name} {read} {:x}", sum(&value[..read])));
    }
    Ok(format!("{all:?}"))
}

/// Does `act` with the ids of a user, and without root's capabilities.
pub fn as_user(uid: u32, gid: u32, act: impl FnOnce() -> Outcome) -> Outcome {
    let become_ids = |uid: u32, gid: u32, first_group: bool| {
        let group = || set_thread_res_gid(None::<Gid>, Gid::from_raw(gid), None::<Gid>);
        let user = || set_thread_res_uid(None::<Uid>, Uid::from_raw(uid), None::<Uid>);
        if first_group {
            group().and_then(|()| user())
        } else {
            user().and_then(|()| group())
        }
    };
    let outcome = become_ids(uid, gid, true).and_then(|()| act());
    become_ids(0, 0, false)?;
    outcome
}
