//! A pid namespace that a container shares with others.
//!
//! The others are hostile. One with CAP_SYS_PTRACE sees root directory and descriptors of every process there, so
//! that nothing enters it by which the guest could be seen: the container's process comes when its root is
//! the container's, and what must be made inside before, its procfs, is made by a process without a root.
use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::{prctl, signal::Signal, wait::waitpid},
    unistd::{ForkResult, fork},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::{
    failure::{Context as _, Failure, Result},
    file_system, mounts,
    namespaces::Cgroups,
    options::Options,
    root::Root,
};
use crate::{control, control::Create, spec::Mount};

/// A pid namespace to be entered, see the module.
pub struct SharedPids {
    /// The process whose it is.
    of: OwnedFd,
    /// The helper's own cgroup.
    home: Cgroups,
}

impl SharedPids {
    /// The one of the process `of`, if the container is to share it; `None` if it gets its own.
    pub fn open(create: &Create, of: OwnedFd) -> Result<Option<Self>> {
        if !create.shares_pids {
            return Ok(None);
        }
        let home = Cgroups::open(&[own_cgroup(&create.cgroup_root)?.into()])?;
        Ok(Some(Self { of, home }))
    }

    /// Makes the container's procfs mounts, attached nowhere, by index into `spec.mounts`. Before the container's
    /// cgroup is joined: it may have room for one process.
    pub fn procfs(&self, create: &Create) -> Result<BTreeMap<u32, OwnedFd>> {
        let mut made = BTreeMap::new();
        for (index, mount, options) in mounts::procfs(create) {
            let tree = self.make_inside(mount, &options).map_err(|failure| {
                Failure(format!(
                    "mounting \"proc\" at {}: {failure}",
                    mount.destination
                ))
            })?;
            made.insert(index, tree);
        }
        Ok(made)
    }

    /// Has a mount made by a process of the namespace.
    fn make_inside(&self, mount: &Mount, options: &Options) -> Result<OwnedFd> {
        let packets = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (ours, theirs) = socketpair(AddressFamily::UNIX, packets.0, packets.1, None)
            .during("a socket for the mount")?;
        // SAFETY: this process has one thread, so no lock is held by another one in the child.
        let child = match unsafe { fork() }.during("fork")? {
            ForkResult::Parent { child } => child,
            ForkResult::Child => self.maker(mount, options, theirs.as_fd()),
        };
        drop(theirs);
        let received = control::receive_fd(&ours).during("the mount made inside");
        while waitpid(child, None) == Err(Errno::EINTR) {}
        match received? {
            (_, Some(tree)) => {
                let file_system = rustix::fs::fstatfs(&tree).during("the mount made inside")?;
                // Whoever may trace its maker can have sent anything.
                (file_system.f_type == mounts::PROC_MAGIC)
                    .then_some(tree)
                    .ok_or_else(|| Failure("another process has interfered".into()))
            }
            (words, None) if words.is_empty() => Err(Failure(
                "the process that makes it was ended by another one".into(),
            )),
            (words, None) => Err(Failure(String::from_utf8_lossy(&words).into_owned())),
        }
    }

    /// The process that makes a mount, and its parent, which stays outside.
    fn maker(&self, mount: &Mount, options: &Options, socket: BorrowedFd<'_>) -> ! {
        let outcome = self.forked_inside(socket).and_then(|inside| match inside {
            true => {
                let tree = file_system::new_file_system(mount, options)?;
                control::send_fd(socket, b"made", tree.as_fd()).during("handing it over")
            }
            false => Ok(()),
        });
        if let Err(failure) = outcome {
            let _ = rustix::io::write(socket, failure.to_string().as_bytes());
        }
        // SAFETY: ends this process at once, without what a copy of the helper would do.
        unsafe { libc::_exit(0) }
    }

    /// Gives up the guest's root and every descriptor but the socket, and forks into the namespace. Whether this is
    /// the process inside; the other one has seen its end.
    fn forked_inside(&self, socket: BorrowedFd<'_>) -> Result<bool> {
        prctl::set_pdeathsig(Signal::SIGKILL).during("prctl")?;
        unshare(CloneFlags::CLONE_NEWNS).during("new mount namespace")?;
        Root::empty()?.pivot("")?;
        setns(&self.of, CloneFlags::CLONE_NEWPID).during("joining the pid namespace")?;
        close_all_but(socket)?;
        // SAFETY: as above, one thread.
        match unsafe { fork() }.during("fork")? {
            ForkResult::Child => Ok(true),
            ForkResult::Parent { child } => {
                while waitpid(child, None) == Err(Errno::EINTR) {}
                Ok(false)
            }
        }
    }

    /// What is left to do before the fork into the namespace: out of the container's cgroup, in which the
    /// container's process alone is counted.
    pub fn join(self) -> Result<()> {
        self.home.join()?;
        setns(&self.of, CloneFlags::CLONE_NEWPID).during("joining the sandbox's pid namespace")
    }
}

/// The cgroup of this process, in a mount of the hierarchy.
fn own_cgroup(root: &Path) -> Result<String> {
    let table = fs::read_to_string("/proc/self/cgroup").during("/proc/self/cgroup")?;
    let own = table.lines().find_map(|line| line.strip_prefix("0::"));
    let own = own.ok_or_else(|| Failure("/proc/self/cgroup names no cgroup".into()))?;
    Ok(format!("{}{own}", root.display()))
}

fn close_all_but(socket: BorrowedFd<'_>) -> Result<()> {
    let kept = socket.as_raw_fd().unsigned_abs();
    for (first, last) in [
        (0, kept.checked_sub(1)),
        (kept.saturating_add(1), Some(libc::c_uint::MAX)),
    ] {
        let Some(last) = last else { continue };
        // SAFETY: this process, a copy that ends by _exit, uses none of them any more, and drops no owner of one.
        let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        Errno::result(result).during("close_range")?;
    }
    Ok(())
}
