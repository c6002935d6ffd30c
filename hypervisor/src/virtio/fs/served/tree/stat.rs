//! What the host says of a file, in the shapes that the protocol's library wants.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;

use fuse_backend_rs::abi::fuse_abi::stat64;
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, makedev, statx};

use super::identity::Identity;

/// Asks the host; one system call.
pub(super) fn look(file: impl AsFd, more: StatxFlags) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    Ok(statx(file, "", flags, StatxFlags::BASIC_STATS | more)?)
}

/// Asks the host about a name in a directory.
pub(super) fn look_at(directory: impl AsFd, name: &CStr) -> io::Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    Ok(statx(directory, name, flags, StatxFlags::BASIC_STATS)?)
}

pub(super) fn kind(seen: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(seen.stx_mode))
}

/// By numbers alone. Needs `StatxFlags::MNT_ID` to have been asked for.
pub(super) fn identity(seen: &Statx) -> Identity {
    Identity {
        device: makedev(seen.stx_dev_major, seen.stx_dev_minor),
        inode: seen.stx_ino,
        mount: seen.stx_mnt_id,
        beyond: None,
    }
}

/// Beyond what the file system can have said, the largest value.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn stat(seen: &Statx) -> stat64 {
    // SAFETY: a struct of numbers, for which zero is valid.
    let mut stat: stat64 = unsafe { std::mem::zeroed() };
    stat.st_dev = makedev(seen.stx_dev_major, seen.stx_dev_minor);
    stat.st_rdev = makedev(seen.stx_rdev_major, seen.stx_rdev_minor);
    stat.st_ino = seen.stx_ino;
    stat.st_mode = u32::from(seen.stx_mode);
    stat.st_nlink = u64::from(seen.stx_nlink);
    stat.st_uid = seen.stx_uid;
    stat.st_gid = seen.stx_gid;
    stat.st_size = signed(seen.stx_size);
    stat.st_blksize = i64::from(seen.stx_blksize);
    stat.st_blocks = signed(seen.stx_blocks);
    stat.st_atime = seen.stx_atime.tv_sec;
    stat.st_atime_nsec = i64::from(seen.stx_atime.tv_nsec);
    stat.st_mtime = seen.stx_mtime.tv_sec;
    stat.st_mtime_nsec = i64::from(seen.stx_mtime.tv_nsec);
    stat.st_ctime = seen.stx_ctime.tv_sec;
    stat.st_ctime_nsec = i64::from(seen.stx_ctime.tv_nsec);
    stat
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::fs::MetadataExt;

    #[test]
    fn a_file_is_described_as_the_standard_library_does() {
        for path in ["/dev/null", "/proc/self/stat", "/", "Cargo.toml"] {
            let file = std::fs::File::open(path).unwrap();
            let seen = look(&file, StatxFlags::MNT_ID).unwrap();
            let (got, metadata) = (stat(&seen), file.metadata().unwrap());
            assert_eq!(
                (
                    got.st_dev,
                    got.st_rdev,
                    got.st_ino,
                    got.st_mode,
                    got.st_nlink
                ),
                (
                    metadata.st_dev(),
                    metadata.st_rdev(),
                    metadata.st_ino(),
                    metadata.st_mode(),
                    metadata.st_nlink()
                ),
                "{path}"
            );
            assert_eq!(got.st_mtime_nsec, metadata.st_mtime_nsec(), "{path}");
            assert_eq!(identity(&seen).device, metadata.st_dev());
        }
    }
}
