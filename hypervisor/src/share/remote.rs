//! File systems that have their answers from a server, a process or another node, and may wait for ever for them.
//!
//! One list for two who ask: the shim has a line of mountinfo, and so a name, and must not touch the file system to learn
//! more; the file server has a file of it, and so the number that statfs(2) gives.

/// A file system: its names in mountinfo (FUSE's have a second one behind a dot), and its numbers (`linux/magic.h`, or its
/// own sources).
struct Remote {
    names: &'static [&'static str],
    numbers: &'static [u64],
}

const fn remote(names: &'static [&'static str], numbers: &'static [u64]) -> Remote {
    Remote { names, numbers }
}

const ALL: [Remote; 15] = [
    // virtiofs is FUSE to statfs(2).
    remote(&["fuse", "fuseblk", "virtiofs"], &[0x6573_5546]),
    remote(&["nfs", "nfs4"], &[0x6969]),
    remote(
        &["cifs", "smb3", "smbfs"],
        &[0xff53_4d42, 0xfe53_4d42, 0x517b],
    ),
    remote(&["ceph"], &[0x00c3_6400]),
    // OpenAFS's, and the kernel's own.
    remote(&["afs"], &[0x5346_414f, 0x6b41_4653]),
    remote(&["9p"], &[0x0102_1997]),
    remote(&["coda"], &[0x7375_7245]),
    remote(&["ncpfs"], &[0x564c]),
    remote(&["lustre"], &[0x0bd0_0bd0]),
    remote(&["beegfs"], &[0x1983_0326]),
    remote(&["gpfs"], &[0x4750_4653]),
    remote(&["pvfs2", "orangefs"], &[0x2003_0528]),
    remote(&["ocfs2"], &[0x7461_636f]),
    remote(&["gfs2"], &[0x0116_1970]),
    remote(&["vboxsf"], &[0x786f_4256]),
];

/// Whether looking at a file system of this name (of mountinfo) may wait for an answer from elsewhere.
#[must_use]
pub fn is_remote(name: &str) -> bool {
    let name = name.split('.').next().unwrap_or(name);
    ALL.iter().any(|remote| remote.names.contains(&name))
}

/// The same by its number (`f_type` of statfs(2)).
pub(crate) fn is_remote_number(number: u64) -> bool {
    ALL.iter().any(|remote| remote.numbers.contains(&number))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_is_known_by_name_and_by_number_and_none_twice() {
        let mut names = BTreeSet::new();
        let mut numbers = BTreeSet::new();
        for remote in &ALL {
            assert!(!remote.names.is_empty() && !remote.numbers.is_empty());
            for name in remote.names {
                assert!(names.insert(name), "{name}");
                assert!(is_remote(name) && is_remote(&format!("{name}.sub")));
            }
            for number in remote.numbers {
                assert!(numbers.insert(number), "{number:#x}");
                assert!(is_remote_number(*number));
            }
        }
        for name in ["ext4", "tmpfs", "overlay", "", "nfsd", "fusectl"] {
            assert!(!is_remote(name), "{name}");
        }
        // ext4, tmpfs.
        assert!(!is_remote_number(0xef53) && !is_remote_number(0x0102_1994));
    }
}
