//! The agent on an ordinary host, for component tests: in namespaces of its own, over Unix sockets,
//! without a VM. Needs root.
use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::ExitCode,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, Pid, fork},
};
use tokio::net::UnixListener;

use crate::{cgroup, launch, log::LogRing, network, places::Places, serve};

/// `--serve-unix SOCKET --state DIR`: serves one connection on SOCKET, streams on SOCKET.streams,
/// with DIR/share as the share.
pub fn main(socket: &Path, state: &Path) -> ExitCode {
    match run(socket, state) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("brig-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(socket: &Path, state: &Path) -> io::Result<()> {
    let binary = launch::open_binary(std::env::current_exe()?.to_str().unwrap_or_default())?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWNET,
    )?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )?;
    let cgroup_root = state.join("cgroup");
    fs::create_dir_all(&cgroup_root)?;
    mount(
        Some("cgroup2"),
        &cgroup_root,
        Some("cgroup2"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    let cgroup_base = cgroup_root.join(format!("brig-test-{}", std::process::id()));
    // SAFETY: the process has one thread, so the child may do anything.
    let outcome = match unsafe { fork() }? {
        ForkResult::Parent { child } => wait_for(child),
        ForkResult::Child => {
            let places = Places {
                run: state.join("run"),
                share: state.join("share"),
                cgroup_root,
                cgroup_base,
                owns_machine: false,
            };
            let served = as_init(places, binary, socket);
            if let Err(error) = &served {
                eprintln!("brig-agent: {error}");
            }
            std::process::exit(i32::from(served.is_err()));
        }
    };
    // The containers died with their pid namespace; their cgroups are empty.
    let _ = cgroup::tree::remove(&cgroup_base);
    outcome
}

fn wait_for(child: Pid) -> io::Result<()> {
    match waitpid(child, None)? {
        WaitStatus::Exited(_, 0) => Ok(()),
        status => Err(io::Error::other(format!("the agent ended with {status:?}"))),
    }
}

/// As PID 1 of the new pid namespace.
fn as_init(places: Places, binary: OwnedFd, socket: &Path) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), quiet, None::<&str>)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        network::loopback_up().map_err(io::Error::other)?;
        let log = LogRing::new(true);
        let parts = serve::Parts::new(places, binary, log.clone())?;
        let mut streams = socket.as_os_str().to_owned();
        streams.push(".streams");
        let stream_listener = UnixListener::bind(PathBuf::from(streams))?;
        let listener = UnixListener::bind(socket)?;
        tokio::spawn(
            parts
                .streams
                .clone()
                .serve_unix(stream_listener, log, parts.logger.clone()),
        );
        let (connection, _) = listener.accept().await?;
        serve::serve(parts, connection).await
    })
}
