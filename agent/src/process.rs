//! One process of a container, from preparation to exit: a small state machine without I/O of its own.
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::{errno::Errno, unistd::Pid};
use tokio::sync::oneshot;

use crate::{
    error::{Error, Result},
    events::Sender,
    launch::Prepared,
    reaper::Exit,
    stdio::Running,
};

/// Answer to a request about the process.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// Where a process is in its life.
pub enum Phase {
    /// A helper is setting it up.
    Preparing,
    /// Waits for its start.
    Created(Prepared),
    /// Was told to run; the word that it does is still out.
    Starting {
        /// Who waits for that word.
        reply: Reply<u32>,
        /// It ended before the word came.
        early: Option<Exit>,
    },
    /// Runs its program.
    Running,
    /// Has ended.
    Stopped(Exit),
}

/// A process the host knows.
pub struct Process {
    /// Where it is in its life.
    pub phase: Phase,
    /// Its stdio.
    pub stdio: Running,
    /// Tells it from another process of the same name, in the container's life.
    pub serial: u64,
    /// By whom its end will be told, until that is done.
    pub owed: Option<Sender>,
    identity: Option<(Pid, OwnedFd)>,
}

impl Process {
    /// One that a helper has just begun to set up.
    pub fn preparing(serial: u64) -> Self {
        Self {
            serial,
            phase: Phase::Preparing,
            stdio: Running::default(),
            owed: None,
            identity: None,
        }
    }

    /// One that waits for its start.
    ///
    /// # Errors
    /// `Internal` when descriptors run out.
    pub fn created(
        serial: u64,
        prepared: Prepared,
        stdio: Running,
        owed: Option<Sender>,
    ) -> Result<Self> {
        let pidfd = prepared
            .pidfd
            .try_clone()
            .map_err(|e| Error::io("pidfd", e))?;
        let identity = Some((prepared.pid, pidfd));
        Ok(Self {
            serial,
            phase: Phase::Created(prepared),
            stdio,
            owed,
            identity,
        })
    }

    /// Tells of its end, if that is not done.
    pub fn tell(&mut self, id: &str, exec_id: &str, exit: Exit) {
        if let Some(owed) = self.owed.take() {
            owed.exited(id, exec_id, self.pid(), exit);
        }
    }

    /// Its pid in the agent's namespace; 0 before it has one.
    pub fn pid(&self) -> u32 {
        self.identity
            .as_ref()
            .and_then(|(pid, _)| u32::try_from(pid.as_raw()).ok())
            .unwrap_or(0)
    }

    /// Its pid in the agent's namespace, and a pidfd; `None` before it has them.
    ///
    /// # Errors
    /// `Internal` when descriptors run out.
    pub fn identity(&self) -> Result<Option<(i32, OwnedFd)>> {
        let Some((pid, pidfd)) = &self.identity else {
            return Ok(None);
        };
        let pidfd = pidfd.try_clone().map_err(|e| Error::io("pidfd", e))?;
        Ok(Some((pid.as_raw(), pidfd)))
    }

    /// Sends `signal`, also a real-time one, through the pidfd: never to a recycled pid.
    ///
    /// # Errors
    /// `NotFound` when it has ended, `FailedPrecondition` before it exists.
    pub fn signal(&self, signal: i32) -> Result<()> {
        if matches!(self.phase, Phase::Stopped(_)) {
            return Err(finished());
        }
        let Some((_, pidfd)) = &self.identity else {
            return Err(Error::FailedPrecondition(
                "the process is still being set up".into(),
            ));
        };
        match send(pidfd, signal) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(finished()),
            Err(error) => Err(Error::io(format_args!("signal {signal}"), error)),
        }
    }
}

/// Sends a signal, also a real-time one, to the process that a pidfd holds.
///
/// # Errors
/// `ESRCH` for one that has ended.
pub fn send(pidfd: &OwnedFd, signal: i32) -> nix::Result<()> {
    // SAFETY: the descriptor is a live pidfd; no siginfo is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// What a signal to an ended process gets: containerd looks for this kind.
fn finished() -> Error {
    Error::NotFound("process already finished".into())
}
