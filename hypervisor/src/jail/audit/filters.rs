//! Reads the seccomp filters of a living process and compares them with the compiled lists.
//!
//! By ptrace: each thread stops for a moment. Needs the node's root and a kernel that can dump filters
//! (`CONFIG_CHECKPOINT_RESTORE`, as distributions have it).

use std::fs;
use std::io;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use seccompiler::{BpfProgram, sock_filter};

use crate::jail::seccomp::{self, ThreadKind};

/// `linux/ptrace.h`.
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;

/// A thread that is stopped for as long as this lives.
struct Stopped(Pid);

impl Stopped {
    fn new(thread: Pid) -> io::Result<Self> {
        ptrace(libc::PTRACE_SEIZE, thread, 0, std::ptr::null_mut())?;
        let stopped = Self(thread);
        ptrace(libc::PTRACE_INTERRUPT, thread, 0, std::ptr::null_mut())?;
        waitpid(thread, Some(WaitPidFlag::__WALL))?;
        Ok(stopped)
    }

    /// Filter `index`; `ENOENT` beyond the last.
    fn filter(&self, index: usize) -> io::Result<BpfProgram> {
        let get = |buffer| ptrace(PTRACE_SECCOMP_GET_FILTER, self.0, index, buffer);
        let length = get(std::ptr::null_mut())?;
        let nothing = sock_filter {
            code: 0,
            jt: 0,
            jf: 0,
            k: 0,
        };
        let mut program = vec![nothing; length];
        get(program.as_mut_ptr().cast())?;
        Ok(program)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // A thread that has ended needs no letting go.
        let _ = ptrace(libc::PTRACE_DETACH, self.0, 0, std::ptr::null_mut());
    }
}

fn ptrace(
    request: libc::c_uint,
    thread: Pid,
    address: usize,
    data: *mut libc::c_void,
) -> io::Result<usize> {
    // SAFETY: of the requests used here, GET_FILTER alone writes to `data`, and no more than it has
    // said the filter is long, for which the caller made room; a filter is never changed.
    let result = unsafe { libc::ptrace(request, thread.as_raw(), address, data) };
    Ok(usize::try_from(Errno::result(result)?).unwrap_or_default())
}

/// What is wrong with a thread's filters if it should be of this kind; `None` if it has those of its
/// list and no other.
///
/// # Errors
/// What ptrace says: `EINVAL` from a kernel that cannot dump filters.
pub fn difference(thread: i32, kind: ThreadKind) -> io::Result<Option<String>> {
    let stopped = Stopped::new(Pid::from_raw(thread))?;
    let mut filters = Vec::new();
    loop {
        match stopped.filter(filters.len()) {
            Ok(filter) => filters.push(filter),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
            Err(error) => return Err(error),
        }
    }
    if filters.is_empty() {
        return Ok(Some(format!("thread {thread} has no filter")));
    }
    let lists = seccomp::programs(kind).map_err(io::Error::other)?;
    if lists.contains(&filters) {
        return Ok(None);
    }
    let lengths: Vec<usize> = filters.iter().map(Vec::len).collect();
    Ok(Some(format!(
        "thread {thread} has filters of {lengths:?} instructions that are not those of the list for {kind:?}"
    )))
}

/// What is wrong with the filters of a VMM's threads, one sentence each. Helpers of KVM and vhost, which are the kernel's own,
/// have that of their creator and are left out.
///
/// # Errors
/// As [`difference`], or if the process has ended.
pub fn differences(pid: u32) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?;
        let name = fs::read_to_string(task.path().join("comm"))?;
        if name.starts_with("kvm-") || name.starts_with("vhost-") {
            continue;
        }
        let thread = task.file_name().to_string_lossy().parse();
        let thread = thread.map_err(io::Error::other)?;
        found.extend(difference(thread, kind(name.trim()))?);
    }
    Ok(found)
}

/// The kind of a brig-vmm thread by its name.
#[must_use]
pub fn kind(name: &str) -> ThreadKind {
    match name {
        "brig-vmm" => ThreadKind::Main,
        "fs" | "fs-io" => ThreadKind::Fs,
        "block" | "block-io" | "block-queue" => ThreadKind::Disk,
        // A worker whose interfaces may have threads for their queue pairs, and these: the list is the same.
        "net-pairs" | "net-pair" | "memory-pairs" => ThreadKind::Disk,
        "net-vhost" | "memory-vhost" => ThreadKind::VhostWorker,
        "vfio" => ThreadKind::Vfio,
        name if name.starts_with("vcpu") && name.ends_with("-debug") => ThreadKind::DebuggedVcpu,
        name if name.starts_with("vcpu") => ThreadKind::Vcpu,
        _ => ThreadKind::Worker,
    }
}
