//! Whose ids the file server's thread has while it makes something: new files belong to who asked for them.
//!
//! The ids are the guest's to choose. The thread keeps its capabilities (`SECBIT_NO_SETUID_FIXUP`), so nothing else
//! changes. To change them takes two system calls, so they stay until somebody needs other ones: who makes a file
//! makes the next one too.

use std::cell::Cell;
use std::io;

use fuse_backend_rs::api::filesystem::Context;

thread_local! {
    /// This thread's effective user and group.
    static CURRENT: Cell<(u32, u32)> = const { Cell::new(ROOT) };
}

const ROOT: (u32, u32) = (0, 0);
/// No id: whatever is wanted is not what the thread has.
const UNKNOWN: (u32, u32) = (u32::MAX, u32::MAX);

/// This thread has been started by one that had somebody's ids, and has them too.
pub(super) fn inherited() {
    CURRENT.set(UNKNOWN);
}

/// Requests (linux/fuse.h) that end alike whoever the thread is, because its capabilities let it look at, list and
/// remove everything, or that become their caller themselves: LOOKUP, FORGET, GETATTR, MKNOD, MKDIR, UNLINK, RMDIR,
/// READ, WRITE, RELEASE, GETXATTR, LISTXATTR, FLUSH, READDIR, RELEASEDIR, CREATE, BATCH_FORGET, READDIRPLUS, TMPFILE, STATX.
pub(super) const ANYBODYS: [u32; 20] = [
    1, 2, 3, 8, 9, 10, 11, 15, 16, 18, 22, 23, 25, 28, 29, 35, 42, 44, 51, 52,
];

/// Does `act` as the caller, whose ids stay.
pub(super) fn as_caller<T>(ctx: &Context, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    become_user((ctx.uid, ctx.gid))?;
    act()
}

/// The ids are root's from now on.
pub(super) fn as_root() -> io::Result<()> {
    become_user(ROOT)
}

/// Does `act` as root, and again as the caller where the mount's map demands it: a mapped mount takes a new name
/// for a file (rename, link) from nobody who is in no map, as root of the VMM is.
pub(super) fn or_as_caller<T>(ctx: &Context, act: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match act() {
        Err(error) if error.raw_os_error() == Some(libc::EOVERFLOW) => {
            let done = as_caller(ctx, act);
            as_root()?;
            done
        }
        outcome => outcome,
    }
}

fn become_user((uid, gid): (u32, u32)) -> io::Result<()> {
    let (has_uid, has_gid) = CURRENT.get();
    if has_gid != gid {
        set(libc::SYS_setresgid, gid)?;
        CURRENT.set((has_uid, gid));
    }
    if has_uid != uid {
        set(libc::SYS_setresuid, uid)?;
        CURRENT.set((uid, gid));
    }
    Ok(())
}

/// The effective id alone, of this thread alone: libc's functions would change all threads.
fn set(call: libc::c_long, id: u32) -> io::Result<()> {
    let unchanged = u32::MAX;
    if id == unchanged {
        return Err(super::errno(libc::EINVAL));
    }
    // SAFETY: the system call takes three numbers and changes the calling thread's credentials only.
    match unsafe { libc::syscall(call, unchanged, id, unchanged) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
