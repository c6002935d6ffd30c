//! What the child does between `clone3` and `execveat`.
//!
//! It is a fork of a process that may have had threads, so locks of the allocator may be held by
//! nobody who will release them: everything here is a bare system call on memory prepared before.

use std::ffi::{CStr, CString};
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::control::{CONTROL_FD, exit};

/// The descriptor on which brig-vmm reports the outcome of [`crate::jail::enter`]: one zero byte, or
/// the sentence of the error. It is closed afterwards.
pub const JAIL_REPORT_FD: std::os::fd::RawFd = 4;

/// The first number the child does not assign; all sources of its dups lie at or above it.
pub(super) const FIRST_FREE_FD: RawFd = JAIL_REPORT_FD + 1;

/// What the child was doing when it failed. Sent as one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Putting its descriptors in place.
    Descriptors = 1,
    /// Marking every other descriptor close-on-exec.
    CloseOthers,
    /// Unblocking its signals.
    Signals,
    /// Executing brig-vmm.
    Execute,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "putting its descriptors in place",
            Self::CloseOthers => "closing inherited descriptors (close_range needs Linux 5.11)",
            Self::Signals => "unblocking its signals",
            Self::Execute => {
                "executing brig-vmm (it must be an x86-64 program on a file system without noexec)"
            }
        })
    }
}

/// A failure as it travels over the error pipe: the stage's byte and the errno, little-endian.
pub(super) struct Failure {
    pub(super) stage: Stage,
    pub(super) errno: i32,
}

impl Failure {
    const LENGTH: usize = 5;

    fn encode(&self) -> [u8; Self::LENGTH] {
        let [a, b, c, d] = self.errno.to_le_bytes();
        [self.stage as u8, a, b, c, d]
    }

    /// `None` for an empty or foreign message: the child was executed.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let &[stage, a, b, c, d] = bytes else {
            return None;
        };
        let stage = [
            Stage::Descriptors,
            Stage::CloseOthers,
            Stage::Signals,
            Stage::Execute,
        ]
        .into_iter()
        .find(|known| *known as u8 == stage)?;
        Some(Self {
            stage,
            errno: i32::from_le_bytes([a, b, c, d]),
        })
    }
}

/// Everything the child needs, made before it is born.
pub(super) struct Plan {
    /// The parent writes one byte here when maps and limits are set.
    pub(super) gate: OwnedFd,
    /// The parent's end, which the child must not keep: else the parent's death goes unseen.
    pub(super) gate_write: RawFd,
    /// Where a [`Failure`] goes; closed by a successful `execveat`.
    pub(super) errors: OwnedFd,
    pub(super) null: OwnedFd,
    pub(super) stderr: OwnedFd,
    pub(super) control: OwnedFd,
    pub(super) report: OwnedFd,
    pub(super) binary: OwnedFd,
    /// argv[0].
    pub(super) name: CString,
}

/// The child's whole life before brig-vmm.
pub(super) fn run(plan: &Plan) -> ! {
    if !wait_at_gate(plan) {
        leave();
    }
    let failure = execute(plan).encode();
    // SAFETY: writes from a local buffer of that length; the descriptor is open.
    unsafe {
        libc::write(
            plan.errors.as_raw_fd(),
            failure.as_ptr().cast(),
            failure.len(),
        )
    };
    leave()
}

fn leave() -> ! {
    // SAFETY: _exit runs no handlers and does not return.
    unsafe { libc::_exit(exit::JAIL) }
}

/// Whether the parent opened the gate; end of file means that it died or gave up.
fn wait_at_gate(plan: &Plan) -> bool {
    let mut byte = 0u8;
    // SAFETY: closes a number of this process's own table; nothing here uses it again.
    unsafe { libc::close(plan.gate_write) };
    // SAFETY: reads one byte into a local of that size.
    unsafe { libc::read(plan.gate.as_raw_fd(), (&raw mut byte).cast(), 1) == 1 }
}

/// Returns only with a failure.
fn execute(plan: &Plan) -> Failure {
    for (from, to) in [
        (&plan.null, libc::STDIN_FILENO),
        (&plan.null, libc::STDOUT_FILENO),
        (&plan.stderr, libc::STDERR_FILENO),
        (&plan.control, CONTROL_FD),
        (&plan.report, JAIL_REPORT_FD),
    ] {
        // SAFETY: dup3 takes numbers only; the sources are open and above every target.
        if unsafe { libc::dup3(from.as_raw_fd(), to, 0) } < 0 {
            return failed(Stage::Descriptors);
        }
    }
    // SAFETY: numbers only. The rest stays open until execveat, which needs the binary and must be
    // able to report.
    let closed = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST_FREE_FD,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if closed < 0 {
        return failed(Stage::CloseOthers);
    }
    let none = 0u64;
    // SAFETY: the kernel reads a signal set of 8 bytes, which `none` is.
    let unblocked = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            std::ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
    if unblocked < 0 {
        return failed(Stage::Signals);
    }
    let empty: &CStr = c"";
    let argv = [plan.name.as_ptr(), std::ptr::null()];
    let envp = [std::ptr::null::<libc::c_char>()];
    // SAFETY: both arrays end in a null pointer and their strings in a zero byte; all outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            plan.binary.as_raw_fd(),
            empty.as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    failed(Stage::Execute)
}

fn failed(stage: Stage) -> Failure {
    Failure {
        stage,
        // SAFETY: errno's location is valid for the life of the thread.
        errno: unsafe { *libc::__errno_location() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_pipe() {
        let sent = Failure {
            stage: Stage::Execute,
            errno: libc::ENOEXEC,
        };
        let got = Failure::decode(&sent.encode()).unwrap();
        assert_eq!((got.stage, got.errno), (Stage::Execute, libc::ENOEXEC));
    }

    #[test]
    fn end_of_file_means_executed() {
        assert!(Failure::decode(&[]).is_none());
        assert!(Failure::decode(&[99, 0, 0, 0, 0]).is_none());
    }
}
