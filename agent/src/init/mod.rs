//! `brig-agent container-init`: the single-threaded helper that becomes a container's process.
//!
//! It runs as root of the guest until it has given that up. It trusts its instructions, which the
//! agent checked, and nothing of the container: every path that an image can shape is resolved
//! inside the container's root.
mod agent;
mod caps;
mod device_mapper;
mod devices;
mod failure;
pub mod file_system;
mod filter;
mod guest_devices;
mod holder;
mod idmap;
mod kernel_modules;
mod lookup;
mod mapped;
mod mounts;
mod namespaces;
mod null;
pub mod options;
mod place;
mod process;
mod root;
mod root_mounts;
mod sched;
mod seccomp;
mod shared_pids;
mod syscalls;
mod sysctl;
mod terminal;
mod verity;

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::{FromRawFd as _, OwnedFd},
    process::ExitCode,
};

use nix::sched::CloneFlags;

use self::{
    agent::Agent,
    failure::{Context as _, Failure, Result},
    idmap::Ids,
    shared_pids::SharedPids,
};
use crate::control::{CONTROL_FD, Create, Exec, INSTRUCTIONS_FD, Instructions, JOINED_FD, Message};

pub use idmap::check as check_user_namespace;
#[cfg(any(test, feature = "fuzzing"))]
pub use lookup::environment;
pub use mapped::check as check_mount_maps;
pub use options::parse as read_options;
pub use process::check as check_process;
pub use process::is_resource;
pub use seccomp::check as check_seccomp;
pub use sysctl::{check as check_sysctl, path_of as sysctl_path};

/// The helper's whole life. Returns only when the program could not be executed.
pub fn main() -> ExitCode {
    // SAFETY: the agent started this helper with exactly these descriptors besides stdio, and
    // nothing else in this process refers to them.
    let (socket, memory, joined) = unsafe {
        (
            OwnedFd::from_raw_fd(CONTROL_FD),
            OwnedFd::from_raw_fd(INSTRUCTIONS_FD),
            OwnedFd::from_raw_fd(JOINED_FD),
        )
    };
    let agent = Agent::new(socket);
    match run(&agent, File::from(memory), joined) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            agent.tell(&Message::Failed(failure.0));
            ExitCode::FAILURE
        }
    }
}

fn run(agent: &Agent, mut memory: File, joined: OwnedFd) -> Result<()> {
    close_on_exec()?;
    // A container that this process joins must not trace it or read its memory (ptrace(2)).
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .during("making the helper undumpable")?;
    io::Seek::rewind(&mut memory).during("instructions")?;
    let instructions: Instructions = serde_json::from_reader(io::BufReader::new(memory))
        .map_err(|e| Failure(format!("instructions: {e}")))?;
    match instructions {
        Instructions::Create(create) => create_container(agent, &create, joined),
        Instructions::Exec(exec) => exec_process(agent, &exec, joined),
        Instructions::HoldPidNamespace { cgroup } => holder::hold(agent, &cgroup),
    }
}

/// Nothing but stdio survives the exec, whatever was inherited.
fn close_on_exec() -> Result<()> {
    // SAFETY: close_range with CLOSE_RANGE_CLOEXEC only sets a flag on descriptors.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).during("close_range")
    }
}

fn create_container(agent: &Agent, create: &Create, joined: OwnedFd) -> Result<()> {
    let spec = &create.spec;
    let ids = Ids::new(&spec.linux.uid_mappings, &spec.linux.gid_mappings);
    let maps = mapped::Maps::prepare(create)?;
    let shared_pids = SharedPids::open(create, joined)?;
    let root_disks = root_mounts::open_disks(create)?;
    let mut user_namespace = namespaces::prepare(spec)?;
    let mut prepared = BTreeMap::new();
    // A pid namespace of others is entered later, when there is nothing of the guest to be seen.
    match &shared_pids {
        Some(shared) => prepared = shared.procfs(create)?,
        None => {
            let own = CloneFlags::CLONE_NEWPID;
            if !namespaces::fork_container(agent, &mut user_namespace, &ids, own)? {
                return Ok(());
            }
        }
    }
    let default_process = crate::spec::Process::default();
    let process = spec.process.as_ref().unwrap_or(&default_process);
    process::set_oom_score_adj(process.oom_score_adj.unwrap_or(0))?;
    let cgroups = namespaces::Cgroups::open(std::slice::from_ref(&create.cgroup))?;
    cgroups.join()?;
    namespaces::unshare_container(spec)?;

    // What is made below must have the modes it was asked for.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    // Before the mounts become private: a copy of a shared one hears of what is mounted below it.
    prepared.append(&mut mounts::clone_volumes(create)?);
    let container_root = root::Root::prepare(create, &ids, root_disks)?;
    let mounted = mounts::mount_all(create, &container_root, prepared, (&ids, &maps))?;
    if mounted.needs_devices {
        devices::make(agent, &container_root, (&spec.linux, &create.given), &ids)?;
    }
    let terminal = match create.terminal {
        Some(size) => {
            let terminal = terminal::open(&container_root, size)?;
            terminal.bind_console(&container_root)?;
            Some(terminal)
        }
        None => None,
    };
    sysctl::apply(&spec.linux.sysctl, &ids)?;
    process::make_cwd(&container_root, process)?;
    mounted.finish()?;
    mounts::mask_paths(&container_root, &spec.linux.masked_paths, &ids)?;
    mounts::readonly_paths(&container_root, &spec.linux.readonly_paths)?;
    container_root.pivot(&spec.linux.rootfs_propagation)?;
    if spec.root.as_ref().is_some_and(|root| root.readonly) {
        mounts::make_root_readonly()?;
    }
    drop(container_root);
    drop(maps);
    if let Some(shared) = shared_pids {
        shared.join()?;
        let joined = CloneFlags::empty();
        if !namespaces::fork_container(agent, &mut user_namespace, &ids, joined)? {
            return Ok(());
        }
        cgroups.join()?;
    }
    drop(cgroups);
    process::start_session(&create.id)?;
    if let Some(terminal) = terminal {
        terminal.adopt(agent, ids.uid(process.user.uid)?)?;
    } else {
        null::replace_stdio(&ids)?;
        terminal::give_stdio_to(ids.uid(process.user.uid)?)?;
    }
    sched::reset_affinity()?;
    sched::apply(
        process,
        spec.linux.personality.as_ref(),
        spec.linux.memory_policy.as_ref(),
    )?;
    process::set_rlimits(&create.limits, process)?;
    if let Some(entry) = user_namespace {
        entry.enter()?;
    }
    process::become_program(
        agent,
        process,
        spec.linux.seccomp.as_ref(),
        process::Refused::ToldOutput,
    )
}

fn exec_process(agent: &Agent, exec: &Exec, container: OwnedFd) -> Result<()> {
    let process = &exec.process;
    let ids = Ids::new(&exec.uid_mappings, &exec.gid_mappings);
    let Some(user_namespace) = namespaces::fork_into(agent, exec, container)? else {
        return Ok(());
    };
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    if let Some(size) = exec.terminal {
        let root = root::Root::current()?;
        terminal::open(&root, size)?.adopt(agent, ids.uid(process.user.uid)?)?;
    } else {
        null::replace_stdio(&ids)?;
        terminal::give_stdio_to(ids.uid(process.user.uid)?)?;
    }
    sched::set_final_affinity(process)?;
    sched::apply(process, exec.personality.as_ref(), None)?;
    process::set_rlimits(&exec.limits, process)?;
    namespaces::enter_user(user_namespace)?;
    process::become_program(
        agent,
        process,
        exec.seccomp.as_ref(),
        process::Refused::ToldAgent,
    )
}
