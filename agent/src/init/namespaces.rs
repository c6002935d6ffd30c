//! Forking into new and existing namespaces, and joining cgroups.
use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::fd::{AsFd as _, FromRawFd as _, OwnedFd},
    path::PathBuf,
};

use nix::sched::{CloneFlags, setns, unshare};

use super::{
    agent::Agent,
    failure::{Context as _, Failure, Result},
    idmap::{self, Ids},
    process, sched,
};
use crate::{
    control::Exec,
    spec::{Spec, TimeOffset},
};

/// On which side of a fork this is.
pub enum Fork {
    /// In the new process.
    Child,
    /// With the child's pid.
    Parent(i32),
}

/// Forks so that the child's parent is the agent, which then reaps it, and with `flags` for new
/// namespaces.
pub fn fork_sibling(agent: &Agent, flags: CloneFlags) -> Result<Fork> {
    let flags = libc::c_long::from((flags | CloneFlags::CLONE_PARENT).bits());
    let flags = flags | libc::c_long::from(libc::CLONE_PIDFD | libc::SIGCHLD);
    let mut pidfd: libc::c_int = -1;
    // SAFETY: without CLONE_VM and with a null stack this is fork; the process has one thread, so
    // no lock is held by another one in the child. The kernel writes the pidfd to where the third argument says.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
    match pid {
        0 => Ok(Fork::Child),
        1.. => {
            // SAFETY: the kernel has just made this descriptor for us alone.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).map_err(|_| Failure("clone gave no pid".into()))?;
            agent.name_process(pid, pidfd.as_fd());
            Ok(Fork::Parent(pid))
        }
        _ => Err(io::Error::last_os_error()).during("clone"),
    }
}

/// Whether the container wants a namespace of its own: listed, and without a path.
fn wants_own(spec: &Spec, kind: &str) -> bool {
    spec.linux
        .namespaces
        .iter()
        .any(|ns| ns.kind == kind && ns.path.is_empty())
}

/// Before the fork of a container's process: makes its time namespace, if it has one, and prepares the way into its
/// user namespace.
pub fn prepare(spec: &Spec) -> Result<Option<idmap::Entry>> {
    if wants_own(spec, "time") {
        unshare_time(spec)?;
    }
    wants_user(spec).then(idmap::Entry::new).transpose()
}

/// Forks the container's process, which goes on here: `false` in its parent, which has nothing more to do.
pub fn fork_container(
    agent: &Agent,
    entry: &mut Option<idmap::Entry>,
    ids: &Ids,
    flags: CloneFlags,
) -> Result<bool> {
    match fork_sibling(agent, flags)? {
        Fork::Child => Ok(true),
        Fork::Parent(pid) => match entry.take() {
            Some(entry) => entry.write_maps(pid, ids).map(|()| false),
            None => Ok(false),
        },
    }
}

/// A user namespace of the pod: each container gets one of its own, with the pod's map.
fn wants_user(spec: &Spec) -> bool {
    spec.linux.namespaces.iter().any(|ns| ns.kind == "user")
}

/// A new time namespace holds for children only, and takes its offsets before the first one.
fn unshare_time(spec: &Spec) -> Result<()> {
    // SAFETY: unshare changes only what the children of this single-threaded process inherit.
    if unsafe { libc::unshare(libc::CLONE_NEWTIME) } != 0 {
        return Err(io::Error::last_os_error()).during("new time namespace");
    }
    let mut file = OpenOptions::new()
        .write(true)
        .open("/proc/self/timens_offsets")
        .during("linux.timeOffsets")?;
    for (clock, TimeOffset { secs, nanosecs }) in &spec.linux.time_offsets {
        file.write_all(format!("{clock} {secs} {nanosecs}\n").as_bytes())
            .during(format_args!("linux.timeOffsets {clock}"))?;
    }
    Ok(())
}

/// Cgroups that can be joined later, when their paths are out of sight.
pub struct Cgroups(Vec<(PathBuf, File)>);

impl Cgroups {
    /// Opens `cgroups` for joining.
    pub fn open(cgroups: &[PathBuf]) -> Result<Self> {
        let open = |path: &PathBuf| {
            let file = OpenOptions::new()
                .write(true)
                .open(path.join("cgroup.procs"));
            Ok((
                path.clone(),
                file.during(format_args!("cgroup {}", path.display()))?,
            ))
        };
        cgroups.iter().map(open).collect::<Result<_>>().map(Self)
    }

    /// Moves this process into the first that takes it: one with cgroups below it and controllers
    /// enabled takes none (the "no internal processes" rule).
    pub fn join(&self) -> Result<()> {
        let mut outcome = Err(Failure("no cgroup to join".into()));
        for (path, file) in &self.0 {
            let mut file = file;
            outcome = file
                .write_all(b"0")
                .during(format_args!("joining cgroup {}", path.display()));
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }
}

/// The namespaces of the child: always its own mounts and cgroup root; ipc and uts as asked.
/// The network is always the sandbox's: the VM is the boundary.
pub fn unshare_container(spec: &Spec) -> Result<()> {
    let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP;
    if wants_own(spec, "ipc") {
        flags |= CloneFlags::CLONE_NEWIPC;
    }
    let own_uts = wants_own(spec, "uts");
    if own_uts {
        flags |= CloneFlags::CLONE_NEWUTS;
    }
    unshare(flags).during("new namespaces")?;
    // Names of the shared namespace were set with the sandbox.
    if own_uts && !spec.hostname.is_empty() {
        nix::unistd::sethostname(&spec.hostname).during("hostname")?;
    }
    if own_uts && !spec.domainname.is_empty() {
        // SAFETY: the pointer and length are those of a live string.
        let result =
            unsafe { libc::setdomainname(spec.domainname.as_ptr().cast(), spec.domainname.len()) };
        if result != 0 {
            return Err(io::Error::last_os_error()).during("domainname");
        }
    }
    Ok(())
}

/// Forks a process into the container whose init process is `container`. In the child, the
/// container's user namespace if it has one, to be entered last ([`enter_user`]); `None` in the
/// parent.
pub fn fork_into(agent: &Agent, exec: &Exec, container: OwnedFd) -> Result<Option<UserNamespace>> {
    sched::set_initial_affinity(&exec.process)?;
    // Inherited by the child, which starts in this cgroup.
    process::set_oom_score_adj(exec.process.oom_score_adj.unwrap_or(0))?;
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    if exec.time_namespace {
        flags |= CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);
    }
    // Opened here: afterwards the agent's cgroup mount is not in sight. They are close-on-exec and gone before anything of the
    // container runs.
    let cgroups = Cgroups::open(&exec.cgroups)?;
    setns(&container, flags).during("joining the container's namespaces")?;
    if let Fork::Parent(_) = fork_sibling(agent, CloneFlags::empty())? {
        return Ok(None);
    }
    // Only the process that stays: the helper itself is not the container's to count.
    cgroups.join()?;
    process::start_session(&exec.id)?;
    let has_user = !exec.uid_mappings.is_empty();
    Ok(Some(UserNamespace(has_user.then_some(container))))
}

/// The user namespace of the container that an exec joins, by its init process.
pub struct UserNamespace(Option<OwnedFd>);

/// Enters it; the guest's root is given up.
pub fn enter_user(namespace: UserNamespace) -> Result<()> {
    match namespace.0 {
        Some(container) => setns(container, CloneFlags::CLONE_NEWUSER)
            .during("joining the container's user namespace"),
        None => Ok(()),
    }
}
