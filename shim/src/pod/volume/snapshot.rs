//! Reads a host directory whole, for a copy in the guest: files, directories and links with their owners,
//! modes and contents, within limits.
//!
//! The directory's writer is trusted not to harm, but may change it at any moment: what vanishes while it
//! is read makes the reading void, and nothing is followed out of the directory. Contents may be secret:
//! they are never logged, and no type here shows them. Blocking code.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use brig_agent_protocol::agent::{Timestamp, VolumeEntry};
use brig_hypervisor::share::FileId;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2,
    readlinkat, statat,
};
use rustix::io::Errno;

/// How much a copy may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Files, directories and links.
    pub entries: usize,
    /// Bytes of one file.
    pub file: u64,
    /// Bytes of all files.
    pub total: u64,
    /// Levels of directories.
    pub depth: usize,
}

/// A ConfigMap or Secret has at most 1 MiB; a projected volume may gather several.
pub const LIMITS: Limits = Limits {
    entries: 4096,
    file: 2 << 20,
    total: 16 << 20,
    depth: 16,
};

/// What a directory held at one moment.
pub struct Snapshot {
    /// Parents before children; the top directory is first, with an empty path.
    pub entries: Vec<VolumeEntry>,
    /// Bytes of all files.
    pub bytes: u64,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("entries", &self.entries.len())
            .field("bytes", &self.bytes)
            .finish()
    }
}

/// Which directory or file a path leads to.
///
/// # Errors
/// Those of stat(2).
pub fn identity(path: &Path) -> io::Result<FileId> {
    Ok(identity_of(&rustix::fs::stat(path)?))
}

/// Which directory or file this is of.
pub fn identity_of(stat: &Stat) -> FileId {
    FileId {
        device: stat.st_dev,
        inode: stat.st_ino,
    }
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It changed meanwhile; try again.
    #[error("it changed while it was read")]
    Changed,
    /// Another directory, or none, is at the path now.
    #[error("it was removed")]
    Gone,
    /// It is nothing that can be copied.
    #[error("{0}")]
    Unsuitable(String),
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for ReadError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE => Self::Changed,
            Errno::XDEV => Self::Unsuitable("another file system is mounted in it".into()),
            errno => Self::Io(errno.into()),
        }
    }
}

/// Calls `watch` with each directory before it is listed, so that no change after that is missed.
pub type Watch<'a> = &'a mut dyn FnMut(BorrowedFd<'_>) -> io::Result<()>;

/// Reads the directory at `top`, which must be the one of that identity.
///
/// # Errors
/// See [`ReadError`].
pub fn directory(
    top: &Path,
    identity: FileId,
    limits: Limits,
    watch: Watch<'_>,
) -> Result<Snapshot, ReadError> {
    let (directory, stat) = open_top(top, identity)?;
    let mut walk = Walk {
        snapshot: Snapshot {
            entries: Vec::new(),
            bytes: 0,
        },
        limits,
        device: stat.st_dev,
        watch,
    };
    walk.add(entry(Vec::new(), &stat, Vec::new()))?;
    walk.directory(&directory, &[], limits.depth)?;
    Ok(walk.snapshot)
}

/// The directory at `top`, which must be the one of that identity, without what is in it.
///
/// # Errors
/// See [`ReadError`].
pub fn top(top: &Path, identity: FileId) -> Result<Snapshot, ReadError> {
    let (_, stat) = open_top(top, identity)?;
    Ok(Snapshot {
        entries: vec![entry(Vec::new(), &stat, Vec::new())],
        bytes: 0,
    })
}

fn open_top(top: &Path, identity: FileId) -> Result<(OwnedFd, Stat), ReadError> {
    let directory = openat(
        CWD,
        top,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| match errno {
        Errno::NOENT | Errno::NOTDIR => ReadError::Gone,
        errno => errno.into(),
    })?;
    let stat = fstat(&directory)?;
    if identity_of(&stat) != identity {
        return Err(ReadError::Gone);
    }
    Ok((directory, stat))
}

/// Reads the single file at `path` as a directory that holds it under `name`.
///
/// # Errors
/// See [`ReadError`].
pub fn file(path: &Path, name: &str, limits: Limits) -> Result<Snapshot, ReadError> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat(CWD, path, flags, Mode::empty())?;
    let (stat, content) = contents(&file, limits.file)?;
    let bytes = length(&content);
    let top = VolumeEntry {
        mode: libc::S_IFDIR | 0o755,
        ..VolumeEntry::default()
    };
    Ok(Snapshot {
        entries: vec![top, entry(name.into(), &stat, content)],
        bytes,
    })
}

/// The directories on the way from `top` to `inside`, and what is there: without contents.
///
/// # Errors
/// See [`ReadError`].
pub fn chain(top: &Path, inside: &Path) -> Result<Vec<VolumeEntry>, ReadError> {
    let mut entries = Vec::new();
    let mut below = std::path::PathBuf::new();
    for name in inside.components() {
        below.push(name);
        let stat = statat(CWD, top.join(&below), AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory | FileType::RegularFile => {}
            _ => break,
        }
        let path = below.as_os_str().as_bytes().to_vec();
        entries.push(entry(path, &stat, Vec::new()));
    }
    Ok(entries)
}

struct Walk<'a> {
    snapshot: Snapshot,
    limits: Limits,
    device: u64,
    watch: Watch<'a>,
}

impl Walk<'_> {
    fn add(&mut self, entry: VolumeEntry) -> Result<(), ReadError> {
        if self.snapshot.entries.len() >= self.limits.entries {
            return Err(ReadError::Unsuitable(format!(
                "it has more than {} files",
                self.limits.entries
            )));
        }
        self.snapshot.entries.push(entry);
        Ok(())
    }

    fn directory(
        &mut self,
        directory: &OwnedFd,
        path: &[u8],
        depth: usize,
    ) -> Result<(), ReadError> {
        if depth == 0 {
            return Err(ReadError::Unsuitable(format!(
                "its directories are more than {} deep",
                self.limits.depth
            )));
        }
        (self.watch)(directory.as_fd())?;
        let mut names = Vec::new();
        for found in Dir::read_from(directory)? {
            let name = found?.file_name().to_bytes().to_vec();
            if !matches!(name.as_slice(), b"." | b"..") {
                names.push(name);
            }
            if names.len() > self.limits.entries {
                // Said with the right number by the next line that adds one.
                break;
            }
        }
        names.sort();
        for name in names {
            let mut below = path.to_vec();
            if !below.is_empty() {
                below.push(b'/');
            }
            below.extend_from_slice(&name);
            self.one(directory, &name, below, depth)?;
        }
        Ok(())
    }

    fn one(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        path: Vec<u8>,
        depth: usize,
    ) -> Result<(), ReadError> {
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if stat.st_dev != self.device {
            return Err(Errno::XDEV.into());
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                let target = readlinkat(directory, name, Vec::new())?;
                self.add(entry(path, &stat, target.into_bytes()))
            }
            FileType::RegularFile => {
                let file = open(directory, name, OFlags::NONBLOCK)?;
                let (stat, content) = contents(&file, self.limits.file)?;
                self.snapshot.bytes += length(&content);
                if self.snapshot.bytes > self.limits.total {
                    return Err(ReadError::Unsuitable(format!(
                        "it holds more than {} bytes",
                        self.limits.total
                    )));
                }
                self.add(entry(path, &stat, content))
            }
            FileType::Directory => {
                let below = open(directory, name, OFlags::DIRECTORY)?;
                self.add(entry(path.clone(), &fstat(&below)?, Vec::new()))?;
                self.directory(&below, &path, depth - 1)
            }
            _ => Err(ReadError::Unsuitable(
                "it holds something else than files, directories and links".into(),
            )),
        }
    }
}

fn open(directory: &OwnedFd, name: &[u8], flags: OFlags) -> Result<OwnedFd, ReadError> {
    Ok(openat2(
        directory,
        name,
        flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
    )?)
}

fn contents(file: &OwnedFd, limit: u64) -> Result<(Stat, Vec<u8>), ReadError> {
    let stat = fstat(file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(ReadError::Changed);
    }
    let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    if size > limit {
        return Err(ReadError::Unsuitable(format!(
            "a file of it has more than {limit} bytes"
        )));
    }
    let mut content = vec![0; usize::try_from(size).unwrap_or(0)];
    let mut at = 0;
    while let Some(rest) = content.get_mut(at..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pread(file, rest, u64::try_from(at).unwrap_or(u64::MAX))? {
            0 => return Err(ReadError::Changed),
            read => at += read,
        }
    }
    Ok((stat, content))
}

fn length(content: &[u8]) -> u64 {
    u64::try_from(content.len()).unwrap_or(u64::MAX)
}

fn entry(path: Vec<u8>, stat: &Stat, content: Vec<u8>) -> VolumeEntry {
    VolumeEntry {
        path,
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        content,
        identity: stat.st_ino,
        modified: Some(Timestamp {
            seconds: stat.st_mtime,
            nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            ..Timestamp::default()
        })
        .into(),
        ..VolumeEntry::default()
    }
}

#[cfg(test)]
mod tests;
