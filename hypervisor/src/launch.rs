//! Starts one brig-vmm, already inside its own namespaces, for the shim.
//!
//! One `clone3` makes the child in new user, mount, pid, ipc and uts namespaces, in the pod's network
//! namespace and cgroup. The child waits at a gate until its id maps and limits are set from outside,
//! puts its five descriptors in place and executes brig-vmm with an empty environment; the rest of
//! the jail is the VMM's own first act ([`crate::jail`]). Blocking std code: the longest wait is for
//! the child's `execve`, a few milliseconds.
//!
//! Trusted: the caller, the binary. The child between `clone3` and `execveat` is a fork of a process
//! that may have threads, so it makes bare system calls only and never allocates ([`child`]).

mod child;
mod error;
mod process;
mod report;
mod sealed;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::resource::{Resource, rlim_t};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

pub use child::{JAIL_REPORT_FD, Stage};
pub use error::LaunchError;
pub use process::{VmmExit, VmmProcess};
pub use sealed::open_sealed;

/// `CLONE_CLEAR_SIGHAND` and `CLONE_INTO_CGROUP` do not fit libc's `c_int` constants.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What the namespaces of a VMM are: everything but the network (the pod's) and cgroup.
const NAMESPACES: libc::c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;

/// How to start a VMM.
#[derive(Debug)]
pub struct LaunchOptions {
    /// The brig-vmm binary.
    pub vmm: PathBuf,
    /// The pod's network namespace; `None` keeps the caller's.
    pub netns: Option<OwnedFd>,
    /// A cgroup v2 directory the VMM is born in.
    pub cgroup: Option<OwnedFd>,
    /// Becomes the VMM's standard error: its log.
    pub stderr: OwnedFd,
    /// `RLIMIT_NOFILE`, soft and hard; at most `fs.nr_open` is used. The file server holds one
    /// descriptor for each inode the guest knows.
    pub max_files: u64,
}

/// Starts brig-vmm in its namespaces and returns when it has been executed. The jail is closed some
/// milliseconds later: [`VmmProcess::wait_jailed`].
///
/// The child is killed and reaped if anything fails, and when the returned process is dropped.
///
/// # Errors
/// See [`LaunchError`].
pub fn launch(options: LaunchOptions) -> Result<VmmProcess, LaunchError> {
    // setns and the signal mask are per thread; a thread of our own leaves the caller's alone.
    std::thread::Builder::new()
        .name("launch".into())
        .spawn(move || launch_here(options))
        .map_err(LaunchError::Prepare)?
        .join()
        .unwrap_or_else(|_| {
            Err(LaunchError::Prepare(io::Error::other(
                "the thread panicked",
            )))
        })
}

fn launch_here(options: LaunchOptions) -> Result<VmmProcess, LaunchError> {
    let LaunchOptions {
        vmm,
        netns,
        cgroup,
        stderr,
        max_files,
    } = options;
    let binary = open_binary(&vmm)?;
    let null = open_sealed(Path::new("/dev/null"), OFlag::O_RDWR).map_err(LaunchError::Prepare)?;
    let (control, vmm_control) = prepare(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    ))?;
    let (report, vmm_report) = prepare(nix::unistd::pipe2(OFlag::O_CLOEXEC))?;
    let (gate_read, gate) = prepare(nix::unistd::pipe2(OFlag::O_CLOEXEC))?;
    let (errors, errors_write) = prepare(nix::unistd::pipe2(OFlag::O_CLOEXEC))?;
    if let Some(netns) = netns {
        nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)
            .map_err(|errno| LaunchError::NetworkNamespace(errno.into()))?;
    }

    // Above every target number, so that no dup in the child overwrites a source.
    let plan = child::Plan {
        gate: high(gate_read)?,
        gate_write: gate.as_raw_fd(),
        errors: high(errors_write)?,
        null: high(null)?,
        stderr: high(stderr)?,
        control: high(vmm_control)?,
        report: high(vmm_report)?,
        binary: high(binary)?,
        name: CString::from(c"brig-vmm"),
    };
    let (pid, pidfd) = spawn(&plan, cgroup.as_ref())?;
    let mut process = VmmProcess::new(pid, pidfd, control, report);

    // From here on, dropping `process` kills and reaps the child.
    map_ids(pid, "uid_map")?;
    map_ids(pid, "gid_map")?;
    set_limits(&process, max_files)?;
    dump_nothing(process.pid())?;
    // The child's copies of these ends are its own; ours must go so that end of file means "executed".
    drop(plan);
    prepare(nix::unistd::write(&gate, &[1]))?;
    drop(gate);

    let mut failure = Vec::new();
    File::from(errors)
        .read_to_end(&mut failure)
        .map_err(LaunchError::Prepare)?;
    match child::Failure::decode(&failure) {
        None => Ok(process),
        Some(failure) => {
            process.end();
            Err(LaunchError::Child {
                stage: failure.stage,
                source: io::Error::from_raw_os_error(failure.errno),
            })
        }
    }
}

fn prepare<T>(result: nix::Result<T>) -> Result<T, LaunchError> {
    result.map_err(|errno| LaunchError::Prepare(errno.into()))
}

/// The binary, sealed: `/proc/self/exe` leads the VMM back to it.
fn open_binary(path: &Path) -> Result<OwnedFd, LaunchError> {
    let failed = |source: io::Error| LaunchError::Binary {
        path: path.to_owned(),
        source,
    };
    let binary = open_sealed(path, OFlag::O_RDONLY).map_err(failed)?;
    let kind = nix::sys::stat::fstat(&binary).map_err(|errno| failed(errno.into()))?;
    if kind.st_mode & libc::S_IFMT == libc::S_IFREG {
        Ok(binary)
    } else {
        Err(failed(io::Error::other("it is not a regular file")))
    }
}

/// Moves a descriptor to a number above those the child assigns.
fn high(fd: OwnedFd) -> Result<OwnedFd, LaunchError> {
    let raw = prepare(fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(child::FIRST_FREE_FD)))?;
    // SAFETY: fcntl has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Makes the child. It returns only in the parent.
fn spawn(plan: &child::Plan, cgroup: Option<&OwnedFd>) -> Result<(u32, OwnedFd), LaunchError> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is plain integers, for which zero is a value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from((NAMESPACES | libc::CLONE_PIDFD).cast_unsigned()) | CLONE_CLEAR_SIGHAND;
    args.pidfd = (&raw mut pidfd).addr() as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }

    // A handler of the caller's must not run in the child, where it would write to pipes both share.
    let mut old = SigSet::empty();
    prepare(pthread_sigmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        Some(&mut old),
    ))?;
    // SAFETY: the arguments are valid for their size; `pidfd` lives on. Without CLONE_VM the child has
    // a copy of our memory and does nothing but the bare system calls of `child::run`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    };
    if result == 0 {
        child::run(plan);
    }
    let error = io::Error::last_os_error();
    prepare(pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&old), None))?;
    match u32::try_from(result) {
        // SAFETY: clone3 succeeded with CLONE_PIDFD and so stored a new descriptor.
        Ok(pid) => Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
        Err(_) => Err(clone_error(error, cgroup.is_some())),
    }
}

/// Tells the pod's cgroup from the node's namespaces as the cause of a failed `clone3`.
fn clone_error(source: io::Error, with_cgroup: bool) -> LaunchError {
    match source.raw_os_error() {
        Some(libc::EBUSY | libc::EOPNOTSUPP | libc::ENODEV | libc::EBADF | libc::EACCES)
            if with_cgroup =>
        {
            LaunchError::Cgroup(source)
        }
        Some(libc::EAGAIN | libc::ENOMEM) => LaunchError::Prepare(source),
        _ => LaunchError::Namespaces {
            limit: std::fs::read_to_string("/proc/sys/user/max_user_namespaces")
                .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned()),
            source,
        },
    }
}

/// Maps every id the caller has to itself: files in a volume keep their owners. What confines the VMM
/// is that it owns no capability outside its user namespace and sees no file but the share's.
fn map_ids(pid: u32, file: &'static str) -> Result<(), LaunchError> {
    let setup = |source| LaunchError::Setup { what: file, source };
    let own = std::fs::read_to_string(format!("/proc/thread-self/{file}")).map_err(setup)?;
    let map = identity_map(&own)
        .ok_or_else(|| setup(io::Error::other("the caller's own map is not understood")))?;
    let mut target = File::options()
        .write(true)
        .open(format!("/proc/{pid}/{file}"))
        .map_err(setup)?;
    // One write: the kernel takes the whole map or nothing.
    target.write_all(map.as_bytes()).map_err(setup)
}

/// Turns `inside outside count` lines into lines that map each inside id to itself.
fn identity_map(own: &str) -> Option<String> {
    let mut map = String::new();
    for line in own.lines() {
        let mut words = line.split_ascii_whitespace();
        let inside: u32 = words.next()?.parse().ok()?;
        let count: u32 = words.nth(1)?.parse().ok()?;
        map.push_str(&format!("{inside} {inside} {count}\n"));
    }
    (!map.is_empty()).then_some(map)
}

/// Leaves nothing of the child's memory to a core dump. The limit on cores holds for files, and a node may give cores to a
/// program; nor is the VMM undumpable for good, since a thread of the file server that takes a user's id makes it what
/// `fs.suid_dumpable` says. Guest memory is left out anyway, and not what was copied of it.
fn dump_nothing(pid: u32) -> Result<(), LaunchError> {
    match std::fs::write(format!("/proc/{pid}/coredump_filter"), "0") {
        // A kernel that dumps none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|source| LaunchError::Setup {
            what: "coredump_filter",
            source,
        }),
    }
}

/// Sets the child's limits from outside: in its user namespace it could not raise them.
fn set_limits(process: &VmmProcess, max_files: u64) -> Result<(), LaunchError> {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(u64::from(u16::MAX));
    let files = max_files.min(most);
    for (what, resource, value) in [
        ("RLIMIT_NOFILE", Resource::RLIMIT_NOFILE, files),
        // A core would be guest memory on the node's disk.
        ("RLIMIT_CORE", Resource::RLIMIT_CORE, 0),
    ] {
        process
            .limit(resource, value as rlim_t)
            .map_err(|source| LaunchError::Setup { what, source })?;
    }
    // What it locks is its guest's memory, for devices of the node, and nothing else: no other way to lock memory is on
    // its lists. The cgroup bounds it. Whoever may not raise it has an inherited one, which a refusal then names.
    let _ = process.limit(Resource::RLIMIT_MEMLOCK, rlim_t::MAX);
    // It gets a user id of its own, which this limit counts for, unlike root's. Whoever may not raise it
    // has an inherited one, which is seldom low.
    let _ = process.limit(Resource::RLIMIT_NPROC, rlim_t::MAX);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_of_the_caller_is_mapped_to_itself() {
        let full = "         0          0 4294967295\n";
        assert_eq!(identity_map(full).unwrap(), "0 0 4294967295\n");
        let nested = "0 100000 65536\n65536 300000 10\n";
        assert_eq!(identity_map(nested).unwrap(), "0 0 65536\n65536 65536 10\n");
    }

    #[test]
    fn a_map_that_is_not_understood_is_refused() {
        assert!(identity_map("").is_none());
        assert!(identity_map("0 0\n").is_none());
        assert!(identity_map("a b c\n").is_none());
    }

    #[test]
    fn namespaces_that_are_switched_off_name_the_sysctl() {
        let error = clone_error(io::Error::from_raw_os_error(libc::ENOSPC), true);
        assert!(error.to_string().contains("user.max_user_namespaces"));
        let error = clone_error(io::Error::from_raw_os_error(libc::EBUSY), true);
        assert!(matches!(error, LaunchError::Cgroup(_)));
    }

    #[test]
    fn no_mapping_is_left_to_a_core_of_what_the_child_executes() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read word; exec cat /proc/self/coredump_filter"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        dump_nothing(child.id()).unwrap();
        drop(child.stdin.take());
        let said = child.wait_with_output().unwrap().stdout;
        assert_eq!(String::from_utf8(said).unwrap().trim(), "00000000");
    }

    #[test]
    fn a_missing_binary_is_named() {
        let null = File::options().write(true).open("/dev/null").unwrap();
        let error = launch(LaunchOptions {
            vmm: "/nonexistent/brig-vmm".into(),
            netns: None,
            cgroup: None,
            stderr: null.into(),
            max_files: 64,
        })
        .unwrap_err();
        assert!(error.to_string().contains("/nonexistent/brig-vmm"));
    }
}
