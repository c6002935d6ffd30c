//! One file, directory or link of a volume as the host describes it, checked.

use std::{ffi::OsStr, fmt, os::unix::ffi::OsStrExt as _, path::Path};

use brig_agent_protocol::{agent::VolumeEntry, identity};
use rustix::fs::{FileType, Mode, Timespec};

use crate::error::{Error, Result};

/// Longest path in bytes.
const MAX_PATH: usize = 4095;
/// Nanoseconds in a second; numbers beyond are words of utimensat(2).
const SECOND: u32 = 1_000_000_000;
/// Longest name in bytes.
const MAX_NAME: usize = 255;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
}

impl Kind {
    /// The kind of a file on disk, if it is one that volumes have.
    #[must_use]
    pub fn of(kind: FileType) -> Option<Self> {
        match kind {
            FileType::Directory => Some(Self::Directory),
            FileType::RegularFile => Some(Self::File),
            FileType::Symlink => Some(Self::Link),
            _ => None,
        }
    }
}

/// A checked entry. `Debug` leaves the content out, which may be secret.
#[derive(Clone)]
pub struct Entry {
    /// Relative, of plain names; empty for the top directory.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions.
    pub mode: Mode,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// A file's bytes or a link's target.
    pub content: Vec<u8>,
    /// Tells a file from its successor of the same name.
    pub identity: u64,
    /// Its time of change, if that is not when it is made.
    pub modified: Option<Timespec>,
}

impl Entry {
    /// Checks a message.
    ///
    /// # Errors
    /// `InvalidArgument`, without the content.
    pub fn parse(message: VolumeEntry) -> Result<Self> {
        let refused = |what: &str| {
            Err(Error::InvalidArgument(format!(
                "a volume's entry {:?} {what}",
                String::from_utf8_lossy(&message.path)
            )))
        };
        if !is_plain(&message.path) {
            return refused("is not a plain relative path");
        }
        let Some(kind) = Kind::of(FileType::from_raw_mode(message.mode)) else {
            return refused("is neither file, directory nor link");
        };
        if message.path.is_empty() && kind != Kind::Directory {
            return refused("must be a directory");
        }
        if kind == Kind::Link
            && (message.content.is_empty()
                || message.content.len() > MAX_PATH
                || message.content.contains(&0))
        {
            return refused("has no valid link target");
        }
        for (field, id) in [("user", message.uid), ("group", message.gid)] {
            if let Err(error) = identity::check(field, id) {
                return refused(&format!("cannot be owned so: {error}"));
            }
        }
        let modified = message.modified.into_option();
        if modified
            .as_ref()
            .is_some_and(|time| time.nanoseconds >= SECOND)
        {
            return refused("has no valid time");
        }
        Ok(Self {
            modified: modified.map(|time| Timespec {
                tv_sec: time.seconds,
                tv_nsec: time.nanoseconds.into(),
            }),
            path: message.path,
            kind,
            mode: Mode::from_raw_mode(message.mode & 0o7777),
            uid: message.uid,
            gid: message.gid,
            content: message.content,
            identity: message.identity,
        })
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("path", &String::from_utf8_lossy(&self.path))
            .field("kind", &self.kind)
            .field("bytes", &self.content.len())
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// A path's directory and last name; nothing for the empty path.
#[must_use]
pub fn split(path: &[u8]) -> Option<(&Path, &OsStr)> {
    let path = Path::new(OsStr::from_bytes(path));
    Some((path.parent()?, path.file_name()?))
}

fn is_plain(path: &[u8]) -> bool {
    path.is_empty()
        || path.len() <= MAX_PATH
            && path.split(|byte| *byte == b'/').all(|name| {
                !matches!(name, b"" | b"." | b"..") && name.len() <= MAX_NAME && !name.contains(&0)
            })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(path: &[u8], mode: u32) -> VolumeEntry {
        VolumeEntry {
            path: path.to_vec(),
            mode,
            content: b"x".to_vec(),
            ..VolumeEntry::default()
        }
    }

    #[test]
    fn only_plain_paths_and_files_directories_and_links_are_taken() {
        for path in [&b"a"[..], b"..data", b"a/b c", b"\xff", b"..."] {
            assert!(
                Entry::parse(message(path, libc::S_IFREG | 0o644)).is_ok(),
                "{path:?}"
            );
        }
        for path in [&b"/a"[..], b"a/", b"a//b", b".", b"a/../b", b"a\0b"] {
            assert!(
                Entry::parse(message(path, libc::S_IFREG | 0o644)).is_err(),
                "{path:?}"
            );
        }
        assert!(Entry::parse(message(b"a", libc::S_IFCHR)).is_err());
        assert!(Entry::parse(message(b"", libc::S_IFREG)).is_err());
        for (nanoseconds, taken) in [(999_999_999, true), (1_000_000_000, false)] {
            let mut timed = message(b"a", libc::S_IFREG);
            timed.modified.mut_or_insert_default().nanoseconds = nanoseconds;
            assert_eq!(Entry::parse(timed).is_ok(), taken);
        }
        let mut link = message(b"a", libc::S_IFLNK);
        link.content = Vec::new();
        assert!(Entry::parse(link).is_err());
    }

    #[test]
    fn an_owner_who_is_nobody_is_refused() {
        for owner in [(u32::MAX, 1), (1, u32::MAX)] {
            let mut entry = message(b"x", libc::S_IFREG);
            (entry.uid, entry.gid) = owner;
            assert!(Entry::parse(entry).is_err(), "{owner:?}");
        }
    }

    #[test]
    fn a_refusal_does_not_tell_the_content() {
        let mut secret = message(b"../x", libc::S_IFREG);
        secret.content = b"sesame".to_vec();
        let Err(error) = Entry::parse(secret) else {
            panic!("it should be refused")
        };
        assert!(!error.to_string().contains("sesame"));
    }

    proptest! {
        #[test]
        fn a_path_that_is_taken_never_climbs(path in proptest::collection::vec(any::<u8>(), 0..32), mode in any::<u32>()) {
            if let Ok(entry) = Entry::parse(message(&path, mode)) {
                let path = Path::new(OsStr::from_bytes(&entry.path));
                prop_assert!(path.components().all(|c| matches!(c, std::path::Component::Normal(_))));
            }
        }
    }
}
