//! Turns the lists of [`super::allow`] into seccomp filters, one for each kind of thread.
//!
//! A system call that is not on the thread's list kills the whole process: nothing a VMM needs is
//! missing from the lists, so one that is means that the guest has taken the thread over. Debug builds,
//! and builds with the feature `seccomp-trap`, say on stderr which call it was.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

pub use super::allow::ThreadKind;
use super::allow::{Allowed, WITHOUT_CLONE3, When, system_calls};

/// Why a filter is not in force.
#[derive(Debug, thiserror::Error)]
#[error("cannot confine the {kind:?} thread with seccomp: {source}")]
pub struct SeccompError {
    kind: ThreadKind,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// Confines the calling thread for the rest of its life to the list of its kind.
///
/// # Errors
/// If the kernel refuses the filter; the thread must not go on then.
pub fn apply(kind: ThreadKind) -> Result<(), SeccompError> {
    #[cfg(any(debug_assertions, feature = "seccomp-trap"))]
    trap::install().map_err(|source| SeccompError {
        kind,
        source: source.into(),
    })?;
    narrow(kind)
}

/// As [`apply`], for a thread that a confined one has started: the list is beside the filters it was born with.
///
/// # Errors
/// As of [`apply`].
pub fn narrow(kind: ThreadKind) -> Result<(), SeccompError> {
    let error = |source: Box<dyn std::error::Error + Send + Sync>| SeccompError { kind, source };
    for program in chain(kind, on_mismatch()).map_err(|source| error(source.into()))? {
        seccompiler::apply_filter(&program).map_err(|source| error(source.into()))?;
    }
    Ok(())
}

/// The filters of a kind, in the order in which they are put in force.
fn chain(
    kind: ThreadKind,
    mismatch: SeccompAction,
) -> Result<Vec<BpfProgram>, seccompiler::BackendError> {
    let list = compile(system_calls(kind), mismatch)?;
    Ok(match kind {
        kind if kind.is_main() || kind.has_helpers() => vec![without_clone3()?, list],
        _ => vec![list],
    })
}

/// Answers `clone3` as a kernel that does not have it. The other filter allows the call: of two answers the
/// kernel gives the stricter one.
fn without_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(WITHOUT_CLONE3, Vec::new())]);
    let missing = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    SeccompFilter::new(rules, SeccompAction::Allow, missing, TargetArch::x86_64)?.try_into()
}

/// Confines the calling thread to what any kind of thread may do. Threads share their memory, so who has taken one
/// over can make the others work for him, and this is what he has: tests of the jail try their escapes under it.
///
/// # Errors
/// If the kernel refuses the filter.
#[cfg(any(test, feature = "jail-probe"))]
pub fn apply_union() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    #[cfg(any(debug_assertions, feature = "seccomp-trap"))]
    trap::install()?;
    let every = super::allow::KINDS.into_iter().flat_map(system_calls);
    let union = compile(every, on_mismatch())?;
    seccompiler::apply_filter(&without_clone3()?)?;
    seccompiler::apply_filter(&union)?;
    Ok(())
}

/// Keeps the allocator within the lists, while there is one thread.
///
/// glibc's arenas for other threads read `/proc/sys/vm/overcommit_memory` when they shrink, which no thread
/// may open. The main arena does not; one arena also costs less memory.
pub(super) fn prepare() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number in the allocator; no other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Control loops.
const LOOPS: [ThreadKind; 5] = [
    ThreadKind::Main,
    ThreadKind::MainWithDevices,
    ThreadKind::MainWithCpus,
    ThreadKind::MainWithBoth,
    ThreadKind::MainWithDebugger,
];

fn on_mismatch() -> SeccompAction {
    if cfg!(any(debug_assertions, feature = "seccomp-trap")) {
        SeccompAction::Trap
    } else {
        SeccompAction::KillProcess
    }
}

/// The filters a thread of this kind may have: those of a release and those of a build with a message, each for
/// a thread of the boot and for one that the control loop has started.
pub(super) fn programs(
    kind: ThreadKind,
) -> Result<Vec<Vec<BpfProgram>>, seccompiler::BackendError> {
    let mut all = Vec::new();
    for mismatch in [SeccompAction::KillProcess, SeccompAction::Trap] {
        let own = chain(kind, mismatch.clone())?;
        let starters: &[ThreadKind] = match kind {
            ThreadKind::Worker | ThreadKind::Disk => &LOOPS,
            ThreadKind::Vfio => &[
                ThreadKind::MainWithDevices,
                ThreadKind::MainWithBoth,
                ThreadKind::MainWithDebugger,
            ],
            ThreadKind::DebuggedVcpu => &[ThreadKind::MainWithDebugger],
            ThreadKind::Vcpu => &[ThreadKind::MainWithCpus, ThreadKind::MainWithBoth],
            // A VM's control loop has one of these lists.
            ThreadKind::Main => {
                for other in &LOOPS[1..] {
                    all.push(chain(*other, mismatch.clone())?);
                }
                &[]
            }
            _ => &[],
        };
        for starter in starters {
            let mut inherited = chain(*starter, mismatch.clone())?;
            inherited.extend(own.iter().cloned());
            all.push(inherited);
        }
        all.push(own);
    }
    Ok(all)
}

fn compile(
    calls: impl Iterator<Item = &'static Allowed>,
    mismatch: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in calls {
        let conditions = conditions(call.when)?;
        match rules.entry(call.number) {
            Entry::Vacant(entry) => drop(entry.insert(conditions)),
            // No rule means "with any arguments", and that is the one to win.
            Entry::Occupied(mut entry) if conditions.is_empty() => entry.get_mut().clear(),
            Entry::Occupied(entry) if entry.get().is_empty() => {}
            Entry::Occupied(mut entry) => entry.get_mut().extend(conditions),
        }
    }
    SeccompFilter::new(rules, mismatch, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

fn conditions(when: When) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let condition = |argument, operator, value: u32| {
        let condition = SeccompCondition::new(
            argument,
            SeccompCmpArgLen::Dword,
            operator,
            u64::from(value),
        )?;
        SeccompRule::new(vec![condition])
    };
    match when {
        When::Always => Ok(Vec::new()),
        When::OneOf(argument, values) => values
            .iter()
            .map(|value| condition(argument, SeccompCmpOp::Eq, *value))
            .collect(),
        When::Without(argument, bits) => Ok(vec![condition(
            argument,
            SeccompCmpOp::MaskedEq(u64::from(bits)),
            0,
        )?]),
    }
}

/// Says which call was refused before the process dies of it.
#[cfg(any(debug_assertions, feature = "seccomp-trap"))]
mod trap {
    use std::io;

    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

    pub(super) fn install() -> io::Result<()> {
        let action = SigAction::new(
            SigHandler::SigAction(report),
            SaFlags::SA_SIGINFO,
            SigSet::empty(),
        );
        // SAFETY: the handler makes two system calls and touches only its own stack.
        unsafe { sigaction(Signal::SIGSYS, &action) }?;
        Ok(())
    }

    extern "C" fn report(
        _signal: libc::c_int,
        info: *mut libc::siginfo_t,
        _context: *mut libc::c_void,
    ) {
        // `_sifields._sigsys._syscall` of siginfo_t on x86-64; libc has no accessor.
        const SYSCALL_OFFSET: usize = 24;
        // SAFETY: the kernel passes a valid siginfo_t, larger than offset and value.
        let mut number: i32 = unsafe {
            info.cast::<u8>()
                .add(SYSCALL_OFFSET)
                .cast::<i32>()
                .read_unaligned()
        };
        let mut line = *b"brig-vmm: seccomp refused system call     \n";
        let mut place = line.len() - 2;
        loop {
            line[place] = b'0' + u8::try_from(number % 10).unwrap_or(b'?' - b'0');
            number /= 10;
            place -= 1;
            if number <= 0 {
                break;
            }
        }
        // SAFETY: writes the local line; then ends the process with 128 + SIGSYS.
        unsafe {
            libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
            libc::_exit(128 + libc::SIGSYS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// Runs `attempt` in a child under the filter of `kind`; true if it survived.
    fn survives(kind: ThreadKind, attempt: fn()) -> bool {
        // SAFETY: the child makes system calls and exits; its copy of the harness is not touched.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let filtered = apply(kind).is_ok();
                attempt();
                // SAFETY: ends the child without running the harness's exit handlers.
                unsafe { libc::_exit(if filtered { 0 } else { 1 }) }
            }
            ForkResult::Parent { child } => {
                matches!(waitpid(child, None).unwrap(), WaitStatus::Exited(_, 0))
            }
        }
    }

    fn bare(number: libc::c_long, a: usize, b: usize, c: usize) {
        // SAFETY: the calls below take numbers, or null pointers that the kernel refuses.
        unsafe { libc::syscall(number, a, b, c, 0usize, 0usize, 0usize) };
    }

    #[test]
    fn a_thread_does_what_is_on_its_list() {
        assert!(survives(ThreadKind::Main, || bare(
            libc::SYS_gettid,
            0,
            0,
            0
        )));
        assert!(survives(ThreadKind::Fs, || bare(
            libc::SYS_openat,
            usize::MAX,
            0,
            0
        )));
        assert!(survives(ThreadKind::Vcpu, || bare(
            libc::SYS_ioctl,
            usize::MAX,
            0xae80,
            0
        )));
    }

    #[test]
    fn a_handle_is_made_of_a_descriptor_alone() {
        fn handle(flags: usize) {
            let call = libc::SYS_name_to_handle_at;
            // SAFETY: null pointers, which the kernel refuses.
            unsafe { libc::syscall(call, usize::MAX, 0usize, 0usize, 0usize, flags) };
        }
        assert!(survives(ThreadKind::Fs, || handle(0x1000)));
        assert!(survives(ThreadKind::Fs, || handle(0x1200)));
        assert!(!survives(ThreadKind::Fs, || handle(0)));
        assert!(!survives(ThreadKind::Disk, || handle(0x1000)));
    }

    #[test]
    fn a_call_of_another_kind_of_thread_kills_the_process() {
        assert!(!survives(ThreadKind::Vcpu, || bare(
            libc::SYS_openat,
            usize::MAX,
            0,
            0
        )));
        assert!(!survives(ThreadKind::Worker, || bare(
            libc::SYS_ioctl,
            usize::MAX,
            0xae80,
            0
        )));
    }

    #[test]
    fn the_thread_of_a_device_takes_its_filter_beside_the_loops() {
        assert!(survives(ThreadKind::MainWithDevices, || {
            let thread = std::thread::Builder::new().name("vfio".into()).spawn(|| {
                narrow(ThreadKind::Vfio).unwrap();
                bare(libc::SYS_ioctl, usize::MAX, 0x3b6e, 0);
            });
            thread.unwrap().join().unwrap();
        }));
        assert!(!survives(ThreadKind::Main, || bare(
            libc::SYS_ioctl,
            usize::MAX,
            0x3b6e,
            0
        )));
    }

    #[test]
    fn the_thread_of_a_late_cpu_takes_its_filter_beside_the_loops() {
        assert!(survives(ThreadKind::MainWithCpus, || {
            bare(libc::SYS_ioctl, usize::MAX, 0xae41, 0);
            let thread = std::thread::Builder::new().name("vcpu1".into()).spawn(|| {
                narrow(ThreadKind::Vcpu).unwrap();
                bare(libc::SYS_ioctl, usize::MAX, 0xae80, 0);
            });
            thread.unwrap().join().unwrap();
        }));
        for kind in [
            ThreadKind::Main,
            ThreadKind::MainWithDevices,
            ThreadKind::Vcpu,
        ] {
            assert!(!survives(kind, || bare(
                libc::SYS_ioctl,
                usize::MAX,
                0xae41,
                0
            )));
        }
    }

    #[test]
    fn the_control_loop_starts_threads_that_take_a_filter_of_their_own() {
        assert!(survives(ThreadKind::Main, || {
            let thread = std::thread::Builder::new().name("late".into()).spawn(|| {
                narrow(ThreadKind::Worker).unwrap();
                // Its list is in force: this is one that the control loop may call and a worker may not.
                bare(libc::SYS_gettid, 0, 0, 0);
            });
            thread.unwrap().join().unwrap();
        }));
        assert!(!survives(ThreadKind::Main, || {
            let thread = std::thread::spawn(|| {
                narrow(ThreadKind::Worker).unwrap();
                bare(libc::SYS_epoll_create1, 0, 0, 0);
            });
            let _ = thread.join();
        }));
        // One that helps is as the one that it helps.
        assert!(survives(ThreadKind::Disk, || {
            let thread = std::thread::spawn(|| bare(libc::SYS_fdatasync, usize::MAX, 0, 0));
            thread.join().unwrap();
        }));
        assert!(!survives(ThreadKind::Disk, || {
            let thread = std::thread::spawn(|| bare(libc::SYS_epoll_create1, 0, 0, 0));
            let _ = thread.join();
        }));
        // A process, and a thread in a namespace.
        assert!(!survives(ThreadKind::Main, || bare(
            libc::SYS_clone,
            17,
            0,
            0
        )));
        assert!(!survives(ThreadKind::Main, || bare(
            libc::SYS_clone,
            0x003d_0f00 | 0x1000_0000,
            0,
            0
        )));
        assert!(!survives(ThreadKind::Worker, || bare(
            libc::SYS_clone3,
            0,
            0,
            0
        )));
    }

    #[test]
    fn executable_memory_kills_the_process() {
        assert!(survives(ThreadKind::Worker, || bare(
            libc::SYS_mmap,
            0,
            4096,
            1
        )));
        assert!(!survives(ThreadKind::Worker, || bare(
            libc::SYS_mmap,
            0,
            4096,
            5
        )));
        assert!(!survives(ThreadKind::Worker, || bare(
            libc::SYS_mprotect,
            0,
            4096,
            4
        )));
    }

    #[test]
    fn what_one_list_allows_with_any_arguments_no_other_list_cuts() {
        const ALWAYS: &Allowed = &Allowed {
            number: libc::SYS_fcntl,
            name: "fcntl",
            when: When::Always,
        };
        const SOMETIMES: &Allowed = &Allowed {
            when: When::OneOf(1, &[7]),
            ..*ALWAYS
        };
        let program = |calls: &[&'static Allowed]| {
            compile(calls.iter().copied(), SeccompAction::KillProcess).unwrap()
        };
        let any = program(&[ALWAYS]);
        assert_eq!(program(&[ALWAYS, SOMETIMES]), any);
        assert_eq!(program(&[SOMETIMES, ALWAYS]), any);
        assert_ne!(program(&[SOMETIMES]), any);
    }

    #[test]
    fn sockets_and_namespaces_kill_the_process() {
        for kind in [
            ThreadKind::Main,
            ThreadKind::Vcpu,
            ThreadKind::Worker,
            ThreadKind::Disk,
            ThreadKind::Fs,
        ] {
            assert!(!survives(kind, || bare(libc::SYS_socket, 1, 1, 0)));
            assert!(!survives(kind, || bare(libc::SYS_unshare, 0, 0, 0)));
        }
    }
}
