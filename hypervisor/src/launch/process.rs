//! A running VMM as its parent holds it: one pidfd, never a bare pid that may be another's by now.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::resource::{Resource, rlim_t};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use super::error::LaunchError;
use super::report::read_report;

/// How a VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmmExit {
    /// It exited with a code of [`crate::control::exit`].
    Code(i32),
    /// A signal killed it: SIGKILL by us or for memory, SIGSYS by its own seccomp filter.
    Signal(i32),
}

/// A VMM this process started.
///
/// Dropping it kills the VMM and waits until it is reaped, which for a VM with much memory can take
/// some milliseconds; no zombie is left. With the process die its mounts, taps and streams.
#[derive(Debug)]
pub struct VmmProcess {
    pid: u32,
    pidfd: OwnedFd,
    control: Option<OwnedFd>,
    report: Option<OwnedFd>,
    exit: Option<VmmExit>,
}

impl VmmProcess {
    pub(super) fn new(pid: u32, pidfd: OwnedFd, control: OwnedFd, report: OwnedFd) -> Self {
        Self {
            pid,
            pidfd,
            control: Some(control),
            report: Some(report),
            exit: None,
        }
    }

    /// Its pid in the caller's pid namespace: live, and in the pod's network namespace.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable (by poll or epoll) when the VMM has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The host's end of the control socket, once; the VMM exits when it is closed.
    #[must_use]
    pub fn take_control(&mut self) -> Option<OwnedFd> {
        self.control.take()
    }

    /// Waits until the VMM has closed its jail: only then are `/shared` and the isolation there.
    /// Returns at once when called again.
    ///
    /// # Errors
    /// [`LaunchError::Jail`] if it could not, with the VMM's own sentence.
    pub fn wait_jailed(&mut self) -> Result<(), LaunchError> {
        if let Some(report) = self.report.take() {
            read_report(report.as_fd())?;
        }
        Ok(())
    }

    /// The VMM's mount namespace. Whoever keeps this open keeps the pod's mounts alive after the VMM:
    /// close it soon. [`crate::share::Share`] does without.
    ///
    /// # Errors
    /// What the host says, e.g. `ENOENT` after the VMM was reaped.
    pub fn mount_namespace(&self) -> io::Result<OwnedFd> {
        Ok(std::fs::File::open(format!("/proc/{}/ns/mnt", self.pid))?.into())
    }

    /// How the VMM ended, if it has; reaps it.
    ///
    /// # Errors
    /// What `waitid` says.
    pub fn try_wait(&mut self) -> io::Result<Option<VmmExit>> {
        self.reap(WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG)
    }

    /// Waits for the VMM's end and reaps it.
    ///
    /// # Errors
    /// What `waitid` says.
    pub fn wait(&mut self) -> io::Result<VmmExit> {
        loop {
            if let Some(exit) = self.reap(WaitPidFlag::WEXITED)? {
                return Ok(exit);
            }
        }
    }

    /// How the VMM ended, as far as [`Self::try_wait`] or [`Self::wait`] have seen it.
    #[must_use]
    pub fn exit_status(&self) -> Option<VmmExit> {
        self.exit
    }

    /// Sends SIGKILL. The end is to be waited for.
    ///
    /// # Errors
    /// What the kernel says; a VMM that has already ended is no error.
    pub fn kill(&self) -> io::Result<()> {
        // SAFETY: numbers and a null pointer only.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(sent) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Kills and reaps.
    pub(super) fn end(&mut self) {
        if self.exit.is_none() {
            // Neither can fail for a child of ours that has not been reaped, and there is nobody to
            // tell: this runs on drop and on failed starts.
            let _ = self.kill();
            let _ = self.wait();
        }
    }

    /// Sets a limit, soft and hard.
    pub(super) fn limit(&self, resource: Resource, value: rlim_t) -> io::Result<()> {
        let limit = libc::rlimit64 {
            rlim_cur: value,
            rlim_max: value,
        };
        // SAFETY: the kernel reads one rlimit64 from `limit`. The pid cannot be another's: the child
        // has not been reaped.
        let set = unsafe {
            libc::syscall(
                libc::SYS_prlimit64,
                self.pid,
                resource as libc::c_uint,
                &raw const limit,
                std::ptr::null_mut::<libc::rlimit64>(),
            )
        };
        Ok(Errno::result(set).map(drop)?)
    }

    fn reap(&mut self, flags: WaitPidFlag) -> io::Result<Option<VmmExit>> {
        if self.exit.is_some() {
            return Ok(self.exit);
        }
        self.exit = match waitid(Id::PIDFd(self.pidfd.as_fd()), flags) {
            Ok(WaitStatus::Exited(_, code)) => Some(VmmExit::Code(code)),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(VmmExit::Signal(signal as i32)),
            Ok(_) | Err(Errno::EINTR) => None,
            Err(errno) => return Err(errno.into()),
        };
        Ok(self.exit)
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.end();
    }
}
