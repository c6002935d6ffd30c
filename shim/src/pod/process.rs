//! One process of a container as the shim tells of it: its phase, its exit and who waits for that.
//!
//! Pure state, no I/O. The agent's word is not trusted: an exit counts once, and only for a process
//! that was started; one that overtakes the reply to the start is kept until the start is told.

use std::time::SystemTime;

use tokio::sync::oneshot;

/// 128 + SIGKILL: the status of what died with its VM.
pub const KILLED: u32 = 137;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n for a signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// Where containerd wants a process's stdio: FIFO paths, URIs, or empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Io {
    /// Standard input.
    pub stdin: String,
    /// Standard output, or both with `binary://` and `file://`.
    pub stdout: String,
    /// Standard error; unused with a terminal.
    pub stderr: String,
    /// The process has a terminal.
    pub terminal: bool,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Being made in the guest.
    Creating,
    /// Ready to be started.
    Created,
    /// The agent was asked to start it.
    Starting,
    /// It runs.
    Running,
    /// It ended, or could not be started.
    Stopped(Exit),
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its stdio.
    pub io: Io,
    phase: Phase,
    /// An exit that came before the reply to the start.
    early: Option<Exit>,
    waiters: Vec<oneshot::Sender<Exit>>,
    since: SystemTime,
}

impl Process {
    /// A process in its first phase.
    #[must_use]
    pub fn new(io: Io, phase: Phase) -> Self {
        Self {
            io,
            phase,
            early: None,
            waiters: Vec::new(),
            since: SystemTime::now(),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        match self.phase {
            Phase::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// It was made.
    pub fn created(&mut self) {
        if self.phase == Phase::Creating {
            self.phase = Phase::Created;
        }
    }

    /// Begins the start; false when the phase does not allow it.
    pub fn begin_start(&mut self) -> bool {
        let allowed = self.phase == Phase::Created;
        if allowed {
            self.phase = Phase::Starting;
        }
        allowed
    }

    /// It runs. Returns the exit that had overtaken this news; the caller tells of the start first and
    /// then calls [`Self::exited`] with it.
    pub fn started(&mut self) -> Option<Exit> {
        if self.phase == Phase::Starting {
            self.phase = Phase::Running;
        }
        self.early.take()
    }

    /// It could not be started: it is stopped, without an exit to tell of.
    pub fn start_failed(&mut self, exit: Exit) {
        self.early = None;
        self.stop(exit);
    }

    /// The guest says that it ended. Returns the exit to tell of, if this is news.
    pub fn exited(&mut self, exit: Exit) -> Option<Exit> {
        match self.phase {
            Phase::Starting => {
                self.early.get_or_insert(exit);
                None
            }
            Phase::Running | Phase::Created => {
                let exit = Exit {
                    status: exit.status & 0xff,
                    at: exit.at.clamp(self.since, SystemTime::now().max(self.since)),
                };
                self.stop(exit);
                Some(exit)
            }
            Phase::Creating | Phase::Stopped(_) => None,
        }
    }

    /// Its VM is gone. Returns the exit to tell of, if it had been made and not ended.
    pub fn lost(&mut self, at: SystemTime) -> Option<Exit> {
        let told = !matches!(self.phase, Phase::Creating | Phase::Stopped(_));
        if self.exit().is_some() {
            return None;
        }
        let exit = Exit { status: KILLED, at };
        self.stop(exit);
        told.then_some(exit)
    }

    /// Tells the exit when there is one, now or later.
    pub fn wait(&mut self, waiter: oneshot::Sender<Exit>) {
        match self.phase {
            Phase::Stopped(exit) => {
                let _ = waiter.send(exit);
            }
            _ => {
                self.waiters.retain(|waiter| !waiter.is_closed());
                self.waiters.push(waiter);
            }
        }
    }

    fn stop(&mut self, exit: Exit) {
        self.phase = Phase::Stopped(exit);
        for waiter in self.waiters.drain(..) {
            let _ = waiter.send(exit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn exit(status: u32) -> Exit {
        Exit {
            status,
            at: SystemTime::now(),
        }
    }

    fn created() -> Process {
        let mut process = Process::new(Io::default(), Phase::Creating);
        process.created();
        process
    }

    #[test]
    fn an_exit_that_overtakes_the_start_is_told_after_it() {
        let mut process = created();
        assert!(process.begin_start());
        assert_eq!(process.exited(exit(3)), None);
        assert_eq!(process.phase(), Phase::Starting);
        let early = process.started().unwrap();
        assert_eq!(process.exited(early).unwrap().status, 3);
    }

    #[test]
    fn an_exit_that_cannot_be_is_told_as_one_that_can() {
        let begin = SystemTime::now();
        for (status, at, told) in [
            (u32::MAX, SystemTime::UNIX_EPOCH, 255),
            (256 + 3, begin + Duration::from_secs(1_000_000), 3),
        ] {
            let mut process = created();
            process.begin_start();
            process.started();
            let exit = process.exited(Exit { status, at }).unwrap();
            assert_eq!(exit.status, told);
            assert!((begin..=SystemTime::now()).contains(&exit.at), "{exit:?}");
        }
    }

    #[test]
    fn an_exit_counts_once_and_reaches_every_waiter() {
        let mut process = created();
        let (first, mut told_first) = oneshot::channel();
        process.wait(first);
        process.begin_start();
        process.started();
        assert_eq!(process.exited(exit(143)).unwrap().status, 143);
        assert_eq!(process.exited(exit(0)), None);
        assert_eq!(process.lost(SystemTime::now()), None);
        let (second, mut told_second) = oneshot::channel();
        process.wait(second);
        assert_eq!(told_first.try_recv().unwrap().status, 143);
        assert_eq!(told_second.try_recv().unwrap().status, 143);
    }

    #[test]
    fn a_time_the_guest_makes_up_is_brought_between_creation_and_now() {
        let mut process = created();
        process.begin_start();
        process.started();
        let made_up = Exit {
            status: 0,
            at: SystemTime::now() + Duration::from_secs(9999),
        };
        assert!(process.exited(made_up).unwrap().at <= SystemTime::now());
    }

    #[test]
    fn what_is_lost_before_it_was_created_has_no_exit_to_tell_of() {
        let mut process = Process::new(Io::default(), Phase::Creating);
        let (waiter, mut told) = oneshot::channel();
        process.wait(waiter);
        assert_eq!(process.lost(SystemTime::now()), None);
        assert_eq!(told.try_recv().unwrap().status, KILLED);
        assert_eq!(created().lost(SystemTime::now()).unwrap().status, KILLED);
    }

    #[test]
    fn a_process_is_started_once() {
        let mut process = created();
        assert!(process.begin_start());
        assert!(!process.begin_start());
        process.start_failed(exit(127));
        assert!(!process.begin_start());
        assert_eq!(process.exited(exit(1)), None);
    }

    proptest! {
        #[test]
        fn whatever_the_guest_says_at_most_one_exit_is_told(steps in proptest::collection::vec(0u8..5, 0..20)) {
            let mut process = Process::new(Io::default(), Phase::Creating);
            let mut told = 0;
            for step in steps {
                told += match step {
                    0 => { process.created(); 0 }
                    1 => { process.begin_start(); 0 }
                    2 => {
                        let early = process.started();
                        usize::from(early.is_some_and(|exit| process.exited(exit).is_some()))
                    }
                    3 => usize::from(process.exited(exit(1)).is_some()),
                    _ => usize::from(process.lost(SystemTime::now()).is_some()),
                };
            }
            prop_assert!(told <= 1);
        }
    }
}
