//! Whose ids the file server's thread has while it makes something: new files belong to who asked for them.
//!
//! The ids are the guest's to choose. The thread keeps its capabilities (`SECBIT_NO_SETUID_FIXUP`), so nothing else
//! changes.

use std::io;

use fuse_backend_rs::api::filesystem::Context;

/// Does `act` as the caller.
pub(super) fn as_caller<T>(ctx: &Context, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if (ctx.uid, ctx.gid) == (0, 0) {
        return act();
    }
    let _caller = Caller::new(ctx)?;
    act()
}

/// Does `act` as root, and again as the caller where the mount's map demands it: a mapped mount takes a new name
/// for a file (rename, link) from nobody who is in no map, as root of the VMM is.
pub(super) fn or_as_caller<T>(ctx: &Context, act: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match act() {
        Err(error) if error.raw_os_error() == Some(libc::EOVERFLOW) => {
            let _caller = Caller::new(ctx)?;
            act()
        }
        outcome => outcome,
    }
}

/// This thread's effective ids are the caller's until it is dropped.
struct Caller;

impl Caller {
    fn new(ctx: &Context) -> io::Result<Self> {
        // Dropped, and so undone, also if the second fails.
        let caller = Self;
        set(libc::SYS_setresgid, ctx.gid)?;
        set(libc::SYS_setresuid, ctx.uid)?;
        Ok(caller)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        // The saved ids are root's.
        let _ = set(libc::SYS_setresuid, 0);
        let _ = set(libc::SYS_setresgid, 0);
    }
}

/// The effective id alone, of this thread alone: libc's functions would change all threads.
fn set(call: libc::c_long, id: u32) -> io::Result<()> {
    let unchanged = u32::MAX;
    // SAFETY: the system call takes three numbers and changes the calling thread's credentials only.
    match unsafe { libc::syscall(call, unchanged, id, unchanged) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
