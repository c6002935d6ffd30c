//! The node's mount table, as far as volumes need it (proc_pid_mountinfo(5)): which file system a path is
//! on, and where in it. The kernel wrote it; paths in it may be chosen by anyone.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use brig_hypervisor::share::{is_remote, unescape};

/// A mount of the shim's mount namespace, which is the node's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mounted {
    /// The kernel's number of it, which the next mount may have when this one has gone: see [`Self::is`].
    pub id: u64,
    /// It is mounted read-only.
    pub readonly: bool,
    /// Major and minor number of the file system.
    pub device: (u32, u32),
    /// What of the file system is mounted, from its own top.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// File system type.
    pub kind: String,
    /// What was mounted, in the words of who mounted it: of NFS the server and the directory, which it tells nowhere else.
    pub source: OsString,
}

impl Mounted {
    /// Whether it is this very mount, read-only or not. While a clone of a mount is held its file system lives, so that no
    /// other has its device number.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        let all = |mounted: &Self| {
            let Self {
                id,
                device,
                root,
                point,
                kind,
                source,
                readonly: _,
            } = mounted.clone();
            (id, device, root, point, kind, source)
        };
        all(self) == all(other)
    }

    /// Whether looking at it may wait for an answer from elsewhere.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        is_remote(&self.kind)
    }
}

/// All mounts, in the order of the table: a later one covers an earlier one at the same place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountTable(Vec<Mounted>);

impl MountTable {
    /// The node's table. Blocking.
    ///
    /// # Errors
    /// When procfs cannot be read.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read("/proc/thread-self/mountinfo")?))
    }

    /// Lines that are no mounts are left out.
    #[must_use]
    pub fn parse(table: &[u8]) -> Self {
        Self(
            table
                .split(|byte| *byte == b'\n')
                .filter_map(line)
                .collect(),
        )
    }

    /// The mount that a path without links is on.
    #[must_use]
    pub fn of(&self, path: &Path) -> Option<&Mounted> {
        self.0
            .iter()
            .filter(|mounted| path.starts_with(&mounted.point))
            .max_by_key(|mounted| mounted.point.as_os_str().len())
    }

    /// Mounts of the same file system from its top.
    pub fn tops(&self, device: (u32, u32)) -> impl Iterator<Item = &Mounted> {
        self.0
            .iter()
            .filter(move |mounted| mounted.device == device && mounted.root == Path::new("/"))
    }

    /// The mount that a path is on and those below it: a bind of the path shows them all.
    #[must_use]
    pub fn seen_from(&self, path: &Path) -> Vec<&Mounted> {
        let top = self.of(path);
        let below = self.below(path).filter(|mounted| Some(*mounted) != top);
        top.into_iter().chain(below).collect()
    }

    /// The mounts at and below a path, in the order of the table.
    pub fn below(&self, path: &Path) -> impl Iterator<Item = &Mounted> {
        self.0
            .iter()
            .filter(move |mounted| mounted.point.starts_with(path))
    }

    /// Where a path lies in its file system, relative to its top; none if the table does not show it, or if
    /// it was removed.
    #[must_use]
    pub fn place(&self, path: &Path) -> Option<(&Mounted, PathBuf)> {
        let mounted = self.of(path)?;
        let rest = path.strip_prefix(&mounted.point).ok()?;
        let root = mounted.root.strip_prefix("/").ok()?;
        if root.as_os_str().as_encoded_bytes().ends_with(b"//deleted") {
            return None;
        }
        Some((mounted, root.join(rest)))
    }
}

fn line(line: &[u8]) -> Option<Mounted> {
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = words.iter().skip(6).position(|word| *word == b"-")? + 6;
    let device = std::str::from_utf8(words.get(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let options = words.get(5)?;
    let point = path(words.get(4)?);
    if !point.is_absolute() {
        return None;
    }
    Some(Mounted {
        id: std::str::from_utf8(words.first()?).ok()?.parse().ok()?,
        readonly: options
            .split(|byte| *byte == b',')
            .any(|word| word == b"ro"),
        device: (major.parse().ok()?, minor.parse().ok()?),
        root: path(words.get(3)?),
        point,
        kind: String::from_utf8_lossy(words.get(dash + 1)?).into_owned(),
        source: path(words.get(dash + 2).copied().unwrap_or_default()).into_os_string(),
    })
}

fn path(field: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(field)).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &[u8] = b"1 0 8:1 / / rw shared:1 - ext4 /dev/vda rw\n\
        2 1 0:30 / /kubelet/my\\040vol rw,relatime shared:2 master:3 - tmpfs tmpfs rw,size=4096k\n\
        3 1 0:30 /inner/deep /kubelet/sub/0 rw - tmpfs tmpfs rw\n\
        4 1 0:30 /gone//deleted /kubelet/sub/1 rw - tmpfs tmpfs rw\n\
        5 1 0:31 / /kubelet/sub/0 rw - xfs x rw\n\
        not a mount\n";

    #[test]
    fn a_path_is_placed_in_its_file_system() {
        let table = MountTable::parse(TABLE);
        let place = |path: &str| {
            let (mounted, inside) = table.place(Path::new(path))?;
            Some((mounted.device, inside.to_str()?.to_owned()))
        };
        assert_eq!(place("/etc/x"), Some(((8, 1), "etc/x".into())));
        assert_eq!(place("/kubelet/my vol"), Some(((0, 30), String::new())));
        assert_eq!(place("/kubelet/my vol/a/b"), Some(((0, 30), "a/b".into())));
        assert_eq!(
            place("/kubelet/my volume"),
            Some(((8, 1), "kubelet/my volume".into()))
        );
        // The later mount covers the earlier.
        assert_eq!(place("/kubelet/sub/0/x"), Some(((0, 31), "x".into())));
        assert_eq!(place("/kubelet/sub/1"), None);
        let tops: Vec<_> = table.tops((0, 30)).map(|m| m.point.clone()).collect();
        assert_eq!(tops, [Path::new("/kubelet/my vol")]);
    }

    #[test]
    fn a_bind_of_a_directory_is_placed_below_its_root() {
        let table = MountTable::parse(b"3 1 0:30 /inner/deep /sub/0 rw - tmpfs tmpfs rw\n");
        let (_, inside) = table.place(Path::new("/sub/0/x")).unwrap();
        assert_eq!(inside, Path::new("inner/deep/x"));
    }

    #[test]
    fn a_path_shows_its_own_mount_and_those_below() {
        let table = MountTable::parse(
            b"1 0 8:1 / / rw - ext4 x rw\n2 1 0:3 / /a ro,nosuid - x x rw\n\
              3 2 0:4 / /a/b rw - x x rw\n4 1 0:5 / /ab rw - x x rw\n",
        );
        let seen = |path: &str| -> Vec<(u64, bool)> {
            let seen = table.seen_from(Path::new(path));
            seen.iter().map(|m| (m.id, m.readonly)).collect()
        };
        assert_eq!(seen("/a"), [(2, true), (3, false)]);
        assert_eq!(seen("/a/x"), [(2, true)]);
        assert_eq!(seen("/"), [(1, false), (2, true), (3, false), (4, false)]);
    }

    #[test]
    fn a_number_that_is_used_again_is_another_mount() {
        let one = |line: &str| {
            let table = MountTable::parse(line.as_bytes());
            table.of(Path::new("/v/x")).unwrap().clone()
        };
        let first = one("7 1 0:30 /a /v rw - nfs4 server:/a rw\n");
        assert!(first.is(&one("7 1 0:30 /a /v ro - nfs4 server:/a rw\n")));
        for other in [
            "8 1 0:30 /a /v rw - nfs4 server:/a rw\n",
            "7 1 0:31 /a /v rw - nfs4 server:/a rw\n",
            "7 1 0:30 /b /v rw - nfs4 server:/a rw\n",
            "7 1 0:30 /a /v/x rw - nfs4 server:/a rw\n",
            "7 1 0:30 /a /v rw - nfs server:/a rw\n",
            "7 1 0:30 /a /v rw - nfs4 server:/b rw\n",
        ] {
            assert!(!first.is(&one(other)), "{other}");
        }
    }

    #[test]
    fn the_living_table_is_read() {
        let table = MountTable::read().unwrap();
        assert_eq!(table.of(Path::new("/proc/self")).unwrap().kind, "proc");
    }

    proptest! {
        #[test]
        fn no_table_makes_the_parser_fail(table in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = MountTable::parse(&table).place(Path::new("/a"));
        }

        #[test]
        fn no_line_makes_the_parser_fail(line in "[0-9]{1,2} [0-9] [0-9:]{0,6} [/a-z\\\\0-9 -]{0,40} - [a-z]{0,4} x rw") {
            let _ = MountTable::parse(line.as_bytes()).of(Path::new("/a/b"));
        }
    }
}
