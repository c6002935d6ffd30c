//! Changes files below a volume's top directory.
//!
//! A container that may write to the volume can put anything anywhere in it at any moment: each path is
//! resolved beneath the top, without links and without leaving the file system, and each change is
//! made relative to the directory that was found.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, Dir, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid,
        chownat, fchmod, fchown, fstat, ftruncate, futimens, linkat, mkdirat, openat, openat2,
        readlinkat, renameat, statat, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};

use super::entry::{Entry, Kind, split};

/// How deep what a container left may be to be removed.
const MAX_DEPTH: usize = 64;
/// What replaces a file has this name until it is complete.
const REPLACEMENT: &str = "..brig_tmp";

/// A volume's files.
pub struct Tree {
    top: OwnedFd,
}

/// How the directories on a path are found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// There is none on the way, or it is an error.
    Refused,
    /// They are followed inside the volume.
    Inside,
}

impl Tree {
    /// The files below `top`.
    pub fn new(top: OwnedFd) -> Self {
        Self { top }
    }

    /// Opens the directory at `path`; empty is the top.
    pub fn directory(&self, path: &Path, links: Links) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV
            | match links {
                Links::Refused => ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
                Links::Inside => ResolveFlags::IN_ROOT,
            };
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        loop {
            match openat2(
                &self.top,
                path,
                OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
                Mode::empty(),
                resolve,
            ) {
                // A rename of a container raced with it.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    /// The directory that holds `path`, and the last name. Not for the top.
    fn holder<'a>(&self, path: &'a [u8], links: Links) -> io::Result<(OwnedFd, &'a OsStr)> {
        let (parent, name) = split(path).ok_or(io::ErrorKind::InvalidInput)?;
        Ok((self.directory(parent, links)?, name))
    }

    /// What is at `path`, itself.
    pub fn stat(&self, path: &[u8]) -> io::Result<Option<Stat>> {
        let Some((parent, name)) = split(path) else {
            return Ok(Some(fstat(&self.top)?));
        };
        let found = self
            .directory(parent, Links::Refused)
            .and_then(|holder| Ok(statat(&holder, name, AtFlags::SYMLINK_NOFOLLOW)?));
        match found {
            Ok(stat) => Ok(Some(stat)),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes something that is not there. `EEXIST` if it is.
    pub fn make(&self, entry: &Entry, links: Links) -> io::Result<()> {
        let (holder, name) = self.holder(&entry.path, links)?;
        match entry.kind {
            Kind::Directory => {
                mkdirat(&holder, name, Mode::RWXU)?;
                let made = openat(
                    &holder,
                    name,
                    OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                own(&made, entry)
            }
            Kind::File => {
                let file = unnamed(&holder, entry)?;
                linkat(&file, "", &holder, name, AtFlags::EMPTY_PATH)?;
                Ok(())
            }
            Kind::Link => {
                symlinkat(OsStr::from_bytes(&entry.content), &holder, name)?;
                own_link(&holder, name, entry)
            }
        }
    }

    /// Puts a file or link in the place of another by a rename.
    pub fn replace(&self, entry: &Entry) -> io::Result<()> {
        let (holder, name) = self.holder(&entry.path, Links::Refused)?;
        let temporary = if entry.kind == Kind::Link {
            // As kubelet's atomic writer calls it: "..data_tmp".
            let mut temporary = name.to_owned();
            temporary.push("_tmp");
            temporary
        } else {
            OsString::from(REPLACEMENT)
        };
        match unlinkat(&holder, &temporary, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        match entry.kind {
            Kind::Directory => return Err(io::ErrorKind::InvalidInput.into()),
            Kind::File => {
                let file = unnamed(&holder, entry)?;
                linkat(&file, "", &holder, &temporary, AtFlags::EMPTY_PATH)?;
            }
            Kind::Link => {
                symlinkat(OsStr::from_bytes(&entry.content), &holder, &temporary)?;
                own_link(&holder, &temporary, entry)?;
            }
        }
        Ok(renameat(&holder, &temporary, &holder, name)?)
    }

    /// Brings the content, owner and mode of something that stays up to date, where they differ.
    pub fn refresh(&self, entry: &Entry) -> io::Result<()> {
        match entry.kind {
            Kind::Link => {
                let (holder, name) = self.holder(&entry.path, Links::Refused)?;
                let target = readlinkat(&holder, name, Vec::new())?;
                if target.as_bytes() == entry.content {
                    return own_link(&holder, name, entry);
                }
                self.replace(entry)
            }
            Kind::Directory => {
                let path = Path::new(OsStr::from_bytes(&entry.path));
                own(&self.directory(path, Links::Refused)?, entry)
            }
            Kind::File => {
                let (holder, name) = self.holder(&entry.path, Links::Refused)?;
                let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = openat(&holder, name, flags | OFlags::RDWR, Mode::empty())?;
                if !same_content(&file, &entry.content)? {
                    write_all(&file, &entry.content)?;
                    ftruncate(&file, entry.content.len().try_into().unwrap_or(u64::MAX))?;
                }
                own(&file, entry)
            }
        }
    }

    /// Gives a directory its time, when nothing is made in it any more. Files and links have theirs as they are made.
    pub fn date(&self, entry: &Entry, links: Links) -> io::Result<()> {
        let path = Path::new(OsStr::from_bytes(&entry.path));
        date(&self.directory(path, links)?, entry)
    }

    /// Removes what is at `path`, with everything below; what is not there is no error.
    pub fn remove(&self, path: &[u8]) -> io::Result<()> {
        match self.holder(path, Links::Refused) {
            Ok((holder, name)) => remove_at(&holder, name, MAX_DEPTH),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// A complete file without a name, in the file system of `holder`.
fn unnamed(holder: &OwnedFd, entry: &Entry) -> io::Result<OwnedFd> {
    let file = openat(
        holder,
        ".",
        OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
        Mode::RUSR | Mode::WUSR,
    )?;
    write_all(&file, &entry.content)?;
    own(&file, entry)?;
    Ok(file)
}

/// Owner first: a change of owner takes set-id bits away.
fn own(file: &OwnedFd, entry: &Entry) -> io::Result<()> {
    let stat = fstat(file)?;
    if (stat.st_uid, stat.st_gid) != (entry.uid, entry.gid) {
        fchown(
            file,
            Some(Uid::from_raw(entry.uid)),
            Some(Gid::from_raw(entry.gid)),
        )?;
    }
    if Mode::from_raw_mode(fstat(file)?.st_mode & 0o7777) != entry.mode {
        fchmod(file, entry.mode)?;
    }
    match entry.kind {
        // What is made in it would change it again.
        Kind::Directory => Ok(()),
        Kind::File | Kind::Link => date(file, entry),
    }
}

fn date(file: &OwnedFd, entry: &Entry) -> io::Result<()> {
    match times(entry, &fstat(file)?) {
        Some(times) => Ok(futimens(file, &times)?),
        None => Ok(()),
    }
}

/// The times that are to be set, if it has others: a change that is none would be told to who watches it.
fn times(entry: &Entry, stat: &Stat) -> Option<Timestamps> {
    let modified = entry.modified?;
    let same = stat.st_mtime == modified.tv_sec
        && i64::try_from(stat.st_mtime_nsec).is_ok_and(|nsec| nsec == modified.tv_nsec);
    (!same).then_some(Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: modified,
    })
}

fn own_link(holder: &OwnedFd, name: &OsStr, entry: &Entry) -> io::Result<()> {
    let stat = statat(holder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if (stat.st_uid, stat.st_gid) != (entry.uid, entry.gid) {
        chownat(
            holder,
            name,
            Some(Uid::from_raw(entry.uid)),
            Some(Gid::from_raw(entry.gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
    }
    if let Some(times) = times(entry, &stat) {
        utimensat(holder, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

fn same_content(file: &OwnedFd, content: &[u8]) -> io::Result<bool> {
    let length = u64::try_from(fstat(file)?.st_size).unwrap_or(0);
    if length != u64::try_from(content.len()).unwrap_or(u64::MAX) {
        return Ok(false);
    }
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    while at < content.len() {
        let offset = u64::try_from(at).unwrap_or(u64::MAX);
        let read = rustix::io::pread(file, buffer.as_mut_slice(), offset)?;
        if read == 0 || content.get(at..at + read) != buffer.get(..read) {
            return Ok(false);
        }
        at += read;
    }
    Ok(true)
}

fn write_all(file: &OwnedFd, content: &[u8]) -> io::Result<()> {
    let mut at = 0;
    while let Some(rest) = content.get(at..).filter(|rest| !rest.is_empty()) {
        let offset = u64::try_from(at).unwrap_or(u64::MAX);
        match rustix::io::pwrite(file, rest, offset)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => at += written,
        }
    }
    Ok(())
}

fn remove_at(holder: &OwnedFd, name: &OsStr, depth: usize) -> io::Result<()> {
    match unlinkat(holder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) if depth > 0 => {}
        Err(error) => return Err(error.into()),
    }
    let directory = openat(
        holder,
        name,
        OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    for entry in Dir::read_from(directory.as_fd())? {
        let below = entry?.file_name().to_bytes().to_vec();
        if !matches!(below.as_slice(), b"." | b"..") {
            remove_at(&directory, &OsString::from_vec(below), depth - 1)?;
        }
    }
    match unlinkat(holder, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
