//! Which of the node's file systems may come into a VMM: those that hold data.
//!
//! A file system of the node's kernel must not, not even below a volume: with a descriptor of a host procfs, a file
//! server's capabilities are enough to write `core_pattern`. New ones appear with every kernel, so the list is of
//! those that may. An operator may add one that it lacks, but none of those that are the kernel itself.
//!
//! Names are those of mountinfo, what is before the first dot of `fuse.sshfs` and the like. Trusted: mountinfo.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags, statx};

/// Those that hold data: on disks, in memory, on other machines, in a process of the node.
const DATA: [&str; 49] = [
    "9p", "afs", "aufs", "bcachefs", "beegfs", "btrfs", "ceph", "cifs", "cramfs", "devtmpfs",
    "ecryptfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "fuse", "fuseblk", "gfs2",
    "gpfs", "hfs", "hfsplus", "iso9660", "jffs2", "jfs", "lustre", "minix", "msdos", "nfs", "nfs4",
    "nilfs2", "ntfs", "ntfs3", "ocfs2", "orangefs", "overlay", "ramfs", "reiserfs", "romfs",
    "smb3", "squashfs", "tmpfs", "ubifs", "udf", "vfat", "virtiofs", "xfs", "zfs",
];

/// The node's kernel itself, whatever an operator says.
const KERNEL: [&str; 28] = [
    "autofs",
    "bdev",
    "binder",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "efivarfs",
    "functionfs",
    "fusectl",
    "hugetlbfs",
    "ipathfs",
    "mqueue",
    "nfsd",
    "nsfs",
    "proc",
    "pstore",
    "resctrl",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "smackfs",
    "sysfs",
    "tracefs",
    "xenfs",
];

/// What a file system is to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It holds data.
    Data,
    /// It is the node's kernel.
    Kernel,
    /// Nobody has said.
    Unknown,
}

/// A name that cannot be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotData {
    /// It is part of the node's kernel.
    #[error("{0:?} is a file system of the node's kernel, which is never shared with a VM")]
    Kernel(String),
    /// It is no name of a file system.
    #[error("{0:?} is no file system's name as /proc/filesystems has it")]
    Name(String),
}

/// The file systems that may be shared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileSystems {
    also: Vec<String>,
}

/// A mount that did not come along with what it lies below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// Where it is mounted on the node.
    pub path: PathBuf,
    /// Its file system, as mountinfo has it.
    pub kind: String,
}

impl FileSystems {
    /// Those that are known to hold data, and these.
    ///
    /// # Errors
    /// [`NotData`].
    pub fn and(also: &[String]) -> Result<Self, NotData> {
        for name in also {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-+".contains(&byte);
            if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
                return Err(NotData::Name(name.chars().take(80).collect()));
            }
            if KERNEL.contains(&name.as_str()) {
                return Err(NotData::Kernel(name.clone()));
            }
        }
        Ok(Self {
            also: also.to_vec(),
        })
    }

    /// Those that were added to the known ones.
    #[must_use]
    pub fn added(&self) -> &[String] {
        &self.also
    }

    pub(super) fn judge(&self, kind: &str) -> Verdict {
        let name = kind.split('.').next().unwrap_or(kind);
        if KERNEL.contains(&name) {
            Verdict::Kernel
        } else if DATA.contains(&name) || self.also.iter().any(|also| also == name) {
            Verdict::Data
        } else {
            Verdict::Unknown
        }
    }

    /// The mounts below a path of the calling thread's mount namespace that may not come along, parents before
    /// children, with what they are.
    pub(super) fn refused_below(&self, path: &Path) -> io::Result<Vec<(LeftOut, Verdict)>> {
        Ok(self.refused(&table()?, path.as_os_str().as_bytes()))
    }

    fn refused(&self, table: &[u8], path: &[u8]) -> Vec<(LeftOut, Verdict)> {
        let mut top = path.to_owned();
        if top.last() != Some(&b'/') {
            top.push(b'/');
        }
        mounts(table)
            .filter(|mount| mount.point.starts_with(&top))
            .filter_map(|mount| {
                let verdict = self.judge(&mount.kind);
                (verdict != Verdict::Data).then(|| {
                    let path = OsString::from_vec(mount.point).into();
                    let kind = mount.kind;
                    (LeftOut { path, kind }, verdict)
                })
            })
            .collect()
    }
}

impl LeftOut {
    /// Its path as a system call takes it.
    pub(super) fn c_path(&self) -> io::Result<CString> {
        CString::new(self.path.as_os_str().as_bytes()).map_err(io::Error::other)
    }
}

/// The file system that a file of the calling thread's mount namespace lies on. None for one of another namespace.
pub(super) fn kind_of(file: impl AsFd) -> io::Result<Option<String>> {
    let flags = AtFlags::EMPTY_PATH;
    let seen = statx(file, "", flags, StatxFlags::MNT_ID)?;
    Ok(mounts(&table()?)
        .find(|mount| mount.id == seen.stx_mnt_id)
        .map(|mount| mount.kind))
}

fn table() -> io::Result<Vec<u8>> {
    std::fs::read("/proc/thread-self/mountinfo")
}

struct Mount {
    id: u64,
    point: Vec<u8>,
    kind: String,
}

/// proc_pid_mountinfo(5); a line that is none is passed over.
fn mounts(table: &[u8]) -> impl Iterator<Item = Mount> {
    table.split(|byte| *byte == b'\n').filter_map(|line| {
        let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let dash = words.iter().position(|word| *word == b"-")?;
        Some(Mount {
            id: std::str::from_utf8(words.first()?).ok()?.parse().ok()?,
            point: super::namespace::unescape(words.get(4)?),
            kind: String::from_utf8_lossy(words.get(dash + 1)?).into_owned(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &[u8] = b"1 0 8:1 / / rw shared:1 - ext4 /dev/vda rw\n\
        2 1 0:5 / /proc rw shared:2 master:3 - proc proc rw\n\
        3 2 0:6 / /proc/sys/fs/binfmt_misc rw - autofs x rw\n\
        4 1 0:7 / /data/my\\040proc rw - proc proc rw\n\
        5 1 0:8 / /data rw - xfs x rw\n\
        6 1 0:9 / /database rw - sysfs x rw\n\
        7 1 0:10 / /data/remote rw - fuse.sshfs x rw\n\
        8 1 0:11 / /data/new rw - newfs x rw\n";

    fn refused(file_systems: &FileSystems, path: &str) -> Vec<(String, Verdict)> {
        let refused = file_systems.refused(TABLE, path.as_bytes());
        let shown =
            |(left, verdict): (LeftOut, Verdict)| (left.path.display().to_string(), verdict);
        refused.into_iter().map(shown).collect()
    }

    #[test]
    fn what_holds_no_data_below_a_path_is_found() {
        let known = FileSystems::default();
        let own = |path: &str| (path.to_owned(), Verdict::Kernel);
        let new = ("/data/new".to_owned(), Verdict::Unknown);
        assert_eq!(
            refused(&known, "/"),
            [
                own("/proc"),
                own("/proc/sys/fs/binfmt_misc"),
                own("/data/my proc"),
                own("/database"),
                new.clone()
            ]
        );
        assert_eq!(refused(&known, "/data"), [own("/data/my proc"), new]);
        assert_eq!(refused(&known, "/srv"), []);
        let told = FileSystems::and(&["newfs".to_owned()]).unwrap();
        assert_eq!(refused(&told, "/data"), [own("/data/my proc")]);
    }

    #[test]
    fn an_operator_cannot_add_the_nodes_kernel() {
        for name in KERNEL {
            assert!(!DATA.contains(&name), "{name}");
            let refused = FileSystems::and(&[name.to_owned()]).unwrap_err();
            assert_eq!(refused, NotData::Kernel(name.to_owned()));
        }
        for name in ["", "proc.x", "a b", "/proc", "ext4\n"] {
            let refused = FileSystems::and(&[name.to_owned()]);
            assert!(matches!(refused, Err(NotData::Name(_))), "{name:?}");
        }
    }

    /// Whatever this machine's kernel has is judged, and what needs no disk is data only if the list says so.
    #[test]
    fn a_file_is_told_its_file_system() {
        let file = std::fs::File::open("/proc/self/stat").unwrap();
        assert_eq!(kind_of(&file).unwrap().as_deref(), Some("proc"));
        let known = FileSystems::default();
        for kind in [
            "rpc_pipefs",
            "binder",
            "nfsd",
            "resctrl",
            "functionfs",
            "xenfs",
        ] {
            assert_eq!(known.judge(kind), Verdict::Kernel);
        }
        for kind in ["fuse", "fuse.s3fs", "ext4", "nfs4", "overlay", "tmpfs"] {
            assert_eq!(known.judge(kind), Verdict::Data);
        }
        for kind in ["", "guest_memfd", "secretmem", "tomorrowfs", "ext"] {
            assert_eq!(known.judge(kind), Verdict::Unknown);
        }
    }

    proptest! {
        #[test]
        fn no_table_makes_the_parser_fail(table in proptest::collection::vec(any::<u8>(), 0..300)) {
            FileSystems::default().refused(&table, b"/");
        }
    }
}
