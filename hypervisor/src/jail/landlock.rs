//! A Landlock domain: files below `/shared` and reading `/proc`, nothing else, and no TCP.
//!
//! The second wall behind the empty root. Mounts attached below `/shared` later are covered: Landlock
//! walks from a file up through mount points (a test attaches one and opens files in it). The fs
//! server reopens its `O_PATH` inodes through `/proc/self/fd`, and it is the file behind the link that
//! counts.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use rustix::fs::{Mode, OFlags};

use super::error::{JailError, Step};

/// What Landlock does for this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landlock {
    /// In force, with the kernel's ABI version.
    Enforced(u32),
    /// The kernel has none, or one that would forbid renames between directories (ABI 1).
    Unavailable,
}

/// ABI 1 forbids every rename and link between directories, which containers need.
const FIRST_USEFUL_ABI: u32 = 2;

const CREATE_RULESET_VERSION: libc::c_uint = 1;
const RULE_PATH_BENEATH: libc::c_int = 1;

const EXECUTE: u64 = 1 << 0;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const MAKE_CHAR: u64 = 1 << 6;
/// All file rights by ABI version: 13 in the first, then REFER, TRUNCATE, none, IOCTL_DEV.
const FS_RIGHTS: [u64; 5] = [
    (1 << 13) - 1,
    (1 << 14) - 1,
    (1 << 15) - 1,
    (1 << 15) - 1,
    (1 << 16) - 1,
];
const IOCTL_DEV: u64 = 1 << 15;
const BIND_TCP_CONNECT_TCP: u64 = 0b11;
const SCOPE_ABSTRACT_UNIX_AND_SIGNAL: u64 = 0b11;

/// `struct landlock_ruleset_attr`; older kernels take a prefix of it.
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent_fd: RawFd,
}

/// Restricts the calling thread, and the threads it starts, for good.
pub(super) fn restrict(shared: &str) -> Result<Landlock, JailError> {
    let Some(abi) = abi() else {
        return Ok(Landlock::Unavailable);
    };
    let ruleset = create(abi).step("creating a Landlock ruleset")?;
    let all = file_rights(abi);
    // MAKE_CHAR is for overlay whiteouts, which need no privilege; real devices are refused by the
    // kernel for want of CAP_MKNOD.
    let served = all & !(EXECUTE | IOCTL_DEV) | MAKE_CHAR;
    for (path, rights) in [(shared, served), ("/proc", READ_FILE | READ_DIR)] {
        allow(&ruleset, path, rights).step("adding a Landlock rule")?;
    }
    // SAFETY: numbers only.
    let restricted = unsafe {
        libc::syscall(
            libc::SYS_landlock_restrict_self,
            ruleset.as_raw_fd(),
            0 as libc::c_uint,
        )
    };
    Errno::result(restricted).step("entering the Landlock domain")?;
    Ok(Landlock::Enforced(abi))
}

fn abi() -> Option<u32> {
    // SAFETY: with this flag the kernel takes no pointer.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<RulesetAttr>(),
            0usize,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version)
        .ok()
        .filter(|version| *version >= FIRST_USEFUL_ABI)
}

fn file_rights(abi: u32) -> u64 {
    let index = usize::try_from(abi)
        .unwrap_or(FS_RIGHTS.len())
        .clamp(1, FS_RIGHTS.len());
    FS_RIGHTS[index - 1]
}

fn create(abi: u32) -> Result<OwnedFd, Errno> {
    let attr = RulesetAttr {
        handled_access_fs: file_rights(abi),
        handled_access_net: if abi >= 4 { BIND_TCP_CONNECT_TCP } else { 0 },
        scoped: if abi >= 6 {
            SCOPE_ABSTRACT_UNIX_AND_SIGNAL
        } else {
            0
        },
    };
    // SAFETY: the kernel reads `size` bytes of `attr`; it accepts a longer struct than it knows if
    // the rest is zero.
    let raw = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const attr,
            size_of::<RulesetAttr>(),
            0 as libc::c_uint,
        )
    };
    let raw = RawFd::try_from(Errno::result(raw)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn allow(ruleset: &OwnedFd, path: &str, rights: u64) -> Result<(), Errno> {
    let directory = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
    let rule = PathBeneath {
        allowed_access: rights,
        parent_fd: directory.as_raw_fd(),
    };
    // SAFETY: the kernel reads one PathBeneath.
    let added = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            RULE_PATH_BENEATH,
            &raw const rule,
            0 as libc::c_uint,
        )
    };
    Errno::result(added).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_abi_asks_for_no_more_than_is_known() {
        assert_eq!(file_rights(1), 0x1fff);
        assert_eq!(file_rights(2), 0x3fff);
        assert_eq!(file_rights(5), 0xffff);
        assert_eq!(file_rights(99), 0xffff);
    }
}
