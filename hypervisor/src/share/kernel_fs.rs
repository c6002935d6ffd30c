//! File systems that are the node's kernel itself. None may come into a VMM, not even below a volume: with
//! a descriptor of a host procfs, a file server's capabilities are enough to write `core_pattern`.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `statfs` types: procfs, sysfs, cgroup v1 and v2, debugfs, tracefs, securityfs, configfs, pstore, efivarfs,
/// bpf, binfmt_misc, selinuxfs, fusectl.
const MAGIC: [u64; 14] = [
    0x9fa0,
    0x6265_6572,
    0x27_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0x6265_6570,
    0x6165_676c,
    0xde5e_81e4,
    0xcafe_4a11,
    0x4249_4e4d,
    0xf97c_ff8c,
    0x6573_5543,
];

/// The same by the names of mountinfo.
const NAMES: [&[u8]; 15] = [
    b"proc",
    b"sysfs",
    b"cgroup",
    b"cgroup2",
    b"debugfs",
    b"tracefs",
    b"securityfs",
    b"configfs",
    b"pstore",
    b"efivarfs",
    b"bpf",
    b"binfmt_misc",
    b"selinuxfs",
    b"fusectl",
    b"autofs",
];

/// Whether a `statfs` type is one of them.
pub(super) fn is_kernel_type(magic: u64) -> bool {
    MAGIC.contains(&magic)
}

/// Their mount points below a path of the calling thread's mount namespace, parents before children.
pub(super) fn below(path: &Path) -> io::Result<Vec<CString>> {
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(mount_points(&table, path.as_os_str().as_bytes()))
}

fn mount_points(table: &[u8], path: &[u8]) -> Vec<CString> {
    let mut top = path.to_owned();
    if top.last() != Some(&b'/') {
        top.push(b'/');
    }
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
            let dash = words.iter().position(|word| *word == b"-")?;
            let name = words.get(dash + 1)?;
            let point = super::namespace::unescape(words.get(4)?);
            (NAMES.contains(name) && point.starts_with(&top)).then_some(point)
        })
        .filter_map(|point| CString::new(point).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_file_systems_below_a_path_are_found() {
        let table = b"1 0 8:1 / / rw shared:1 - ext4 /dev/vda rw\n\
            2 1 0:5 / /proc rw shared:2 master:3 - proc proc rw\n\
            3 2 0:6 / /proc/sys/fs/binfmt_misc rw - autofs x rw\n\
            4 1 0:7 / /data/my\\040proc rw - proc proc rw\n\
            5 1 0:8 / /data rw - xfs x rw\n\
            6 1 0:9 / /database rw - sysfs x rw\n";
        let found = |path: &str| {
            mount_points(table, path.as_bytes())
                .into_iter()
                .map(|point| point.into_string().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            found("/"),
            [
                "/proc",
                "/proc/sys/fs/binfmt_misc",
                "/data/my proc",
                "/database"
            ]
        );
        assert_eq!(found("/data"), ["/data/my proc"]);
        assert_eq!(found("/srv"), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn no_table_makes_the_parser_fail(table in proptest::collection::vec(any::<u8>(), 0..300)) {
            mount_points(&table, b"/");
        }
    }
}
