//! What the VMM process may do by itself: identity, capabilities, securebits, limits of inheritance.

use std::ffi::{c_int, c_uint, c_ulong};
use std::io;
use std::os::fd::RawFd;

use caps::CapSet;
use nix::errno::Errno;

use super::allow::CAPABILITIES;
use super::error::{JailError, Step};

/// `linux/securebits.h`. Each bit's lock is the next higher bit.
const NOROOT: c_ulong = 1 << 0;
const NO_SETUID_FIXUP: c_ulong = 1 << 2;
const KEEP_CAPS_LOCKED: c_ulong = 1 << 5;
const NO_CAP_AMBIENT_RAISE: c_ulong = 1 << 6;

/// The securebits every thread of the VMM has. `NO_SETUID_FIXUP`: the file server takes the id of
/// the guest's user for each request, and must keep its capabilities then, or supplementary groups
/// (fsGroup volumes) would not be able to write what the guest's kernel has already allowed them.
pub(super) const SECUREBITS: c_ulong = NOROOT
    | NOROOT << 1
    | NO_SETUID_FIXUP
    | NO_SETUID_FIXUP << 1
    | KEEP_CAPS_LOCKED
    | NO_CAP_AMBIENT_RAISE
    | NO_CAP_AMBIENT_RAISE << 1;

/// Closes every descriptor from `first` on.
pub(super) fn close_other_descriptors(first: RawFd) -> Result<(), JailError> {
    // SAFETY: numbers only; the caller is at the start of main, where nothing owns these.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, c_uint::MAX, 0) };
    Errno::result(closed)
        .map(drop)
        .step("closing inherited descriptors")
}

/// Forbids namespaces below the process's own user namespace, whose limits these are: a broken VMM must
/// not gain capabilities in a namespace of its own making. Needs the node's `/proc` in view.
pub(super) fn forbid_namespaces() -> Result<(), JailError> {
    // Not "mnt": every detached mount is one, and the shim makes such on this namespace's account. Without
    // a user namespace nobody here can make another.
    for kind in ["user", "pid", "ipc", "uts", "net", "cgroup", "time"] {
        let limit = format!("/proc/sys/user/max_{kind}_namespaces");
        match std::fs::write(limit, "0") {
            Ok(()) => {}
            // A kind that this kernel does not have.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).step("forbidding further namespaces"),
        }
    }
    Ok(())
}

/// Takes away what would tell one pod's VMM from another's.
pub(super) fn neutral_identity() -> Result<(), JailError> {
    nix::unistd::sethostname("brig").step("setting the host name")?;
    nix::unistd::setgroups(&[]).step("dropping supplementary groups")?;
    // The guest's kernel applies the umask of the guest's process.
    // SAFETY: umask cannot fail and touches no memory.
    unsafe { libc::umask(0) };
    Ok(())
}

/// First of the real user ids of VMMs: far above any that a node gives to somebody.
const FIRST_REAL_ID: u32 = 0xff00_0000;
/// Random bits of the id.
const ID_BITS: u32 = 22;

/// Takes a real user id that no other process has. What the kernel counts by user (epoll watches, pipe
/// pages, descriptors in flight, locked memory) it counts by this id, and the limits are the node's: as root
/// a broken VMM could use up what the node's own daemons need. Access to files goes by the effective
/// id, which stays 0. The filters allow no way back.
pub(super) fn own_counters() -> Result<(), JailError> {
    let mut random = [0u8; 4];
    rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty())
        .step("drawing a user id")?;
    let id = FIRST_REAL_ID | (u32::from_le_bytes(random) >> (u32::BITS - ID_BITS));
    let unchanged = libc::uid_t::MAX;
    // SAFETY: numbers only; the process has one thread.
    let set = unsafe { libc::syscall(libc::SYS_setresuid, id, unchanged, unchanged) };
    Errno::result(set)
        .map(drop)
        .step("taking a user id of its own")
}

/// Leaves [`CAPABILITIES`] in the user namespace and no way to more.
pub(super) fn drop_all() -> Result<(), JailError> {
    prctl(libc::PR_SET_SECUREBITS, SECUREBITS).step("setting securebits")?;
    caps::clear(None, CapSet::Ambient)
        .map_err(io::Error::other)
        .step("clearing the ambient capabilities")?;
    clear_bounding_set().step("clearing the bounding set")?;
    caps::clear(None, CapSet::Inheritable)
        .map_err(io::Error::other)
        .step("clearing the inheritable capabilities")?;
    let kept = CAPABILITIES.iter().copied().collect();
    // Effective first: it must stay within permitted.
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &kept)
            .map_err(io::Error::other)
            .step("reducing the capabilities")?;
    }
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).step("setting no_new_privs")?;
    // Nobody but the node's root may trace it or look at its memory, and no core is written.
    prctl(libc::PR_SET_DUMPABLE, 0).step("making the process undumpable")
}

/// One after another, until the kernel has none of the number. To ask first which are there, as the library does, would be as many calls again.
fn clear_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            result => result?,
        }
    }
    Ok(())
}

fn prctl(option: c_int, value: c_ulong) -> io::Result<()> {
    let none: c_ulong = 0;
    // SAFETY: the options used here take numbers only.
    let result = unsafe { libc::prctl(option, value, none, none, none) };
    Ok(Errno::result(result).map(drop)?)
}
