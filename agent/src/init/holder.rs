//! The process that holds the pid namespace which containers share: its PID 1, as pause is elsewhere.
//!
//! The containers beside it are hostile and may trace it, so it has nothing: an empty root, a cgroup
//! of its own, no capability, no descriptor. All it does is to reap orphans until it is killed.
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};

use super::{
    agent::Agent,
    caps,
    failure::{Context as _, Result},
    namespaces, process,
    root::Root,
};
use crate::control::Message;

/// What `ps` in a container shows, as with other runtimes.
const NAME: &std::ffi::CStr = c"pause";

/// Becomes two processes: this one ends, the child is PID 1 of a new pid namespace, in `cgroup`, and
/// does not return.
pub fn hold(agent: &Agent, cgroup: &Path) -> Result<()> {
    let cgroups = namespaces::Cgroups::open(&[PathBuf::from(cgroup)])?;
    if let namespaces::Fork::Parent(_) = namespaces::fork_sibling(agent, CloneFlags::CLONE_NEWPID)?
    {
        return Ok(());
    }
    process::start_session("sandbox")?;
    cgroups.join()?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP).during("new namespaces")?;
    Root::empty()?.pivot("")?;
    // Its score stays the agent's: killed for memory, it would take every container along.
    let _ = rustix::thread::set_name(NAME);
    let none = caps::Sets::default();
    none.drop_bounding()?;
    none.apply()?;
    rustix::thread::set_no_new_privs(true).during("no_new_privs")?;
    // Blocked for good: an orphan's SIGCHLD stays pending if it comes before the wait for it.
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block().during("blocking SIGCHLD")?;
    agent.tell(&Message::Ready);
    // SAFETY: nothing below uses a descriptor, and the owners of those that are closed here are never
    // dropped, because this function does not return.
    unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
    loop {
        // SAFETY: no status is asked for.
        if unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } < 0 {
            let _ = children.wait();
        }
    }
}
