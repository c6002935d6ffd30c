//! A process named beyond doubt: its pid with its start time, so that a reused pid is never signalled.

use std::fs;
use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process of this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its pid in our pid namespace.
    pub pid: u32,
    /// Clock ticks after boot at which it started (proc(5), stat field 22).
    pub start_time: u64,
}

impl Identity {
    /// The process that has this pid now.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            pid,
            start_time: start_time(&stat)?,
        })
    }

    /// Whether that process still exists and is no zombie.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid)) else {
            return false;
        };
        start_time(&stat) == Some(self.start_time) && state(&stat) != Some('Z')
    }

    /// Kills the process and waits for its end.
    ///
    /// # Errors
    /// What the kernel says, or `TimedOut`; a process that is gone is no error.
    pub fn kill(&self, timeout: Duration) -> io::Result<()> {
        self.end_by(Signal::KILL, timeout)
    }

    /// As [`Self::kill`], by another signal.
    ///
    /// # Errors
    /// As that.
    pub fn end_by(&self, signal: Signal, timeout: Duration) -> io::Result<()> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(());
        };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
            return Ok(());
        };
        // The pidfd pins whichever process has the pid; only now is the comparison lasting.
        if !self.is_alive() {
            return Ok(());
        }
        match pidfd_send_signal(&pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
        let limit = Timespec::try_from(timeout).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        if poll(&mut fds, Some(&limit))? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("process {} does not end", self.pid),
            ));
        }
        Ok(())
    }
}

/// The text after the command name, which may itself hold blanks and parentheses.
fn after_name(stat: &str) -> Option<&str> {
    Some(stat.rsplit_once(')')?.1.trim_start())
}

fn state(stat: &str) -> Option<char> {
    after_name(stat)?.chars().next()
}

/// Clock ticks after boot at which the process of a line of `/proc/PID/stat` started.
pub(super) fn start_time(stat: &str) -> Option<u64> {
    // Field 22 of the line; the state after the name is field 3.
    after_name(stat)?
        .split_ascii_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_name_with_blanks_and_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b) (c) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 12345 0 0";
        assert_eq!(start_time(stat), Some(12345));
        assert_eq!(state(stat), Some('S'));
    }

    #[test]
    fn the_right_process_is_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let identity = Identity::of(child.id()).unwrap();
        assert!(identity.is_alive());
        identity.kill(Duration::from_secs(5)).unwrap();
        assert!(!identity.is_alive());
        child.wait().unwrap();
    }

    #[test]
    fn a_reused_pid_is_left_alone() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let mut identity = Identity::of(child.id()).unwrap();
        identity.start_time += 1;
        identity.kill(Duration::from_secs(5)).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
