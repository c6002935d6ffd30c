//! Freezing a container: for a pause, and so that a signal to all reaches every process.
//!
//! A process that waits for a share or a device cannot be frozen, and a hostile one arranges that. So
//! this runs in a task of its own for each container, one request after the other and each for a
//! limited time, while the container's task goes on answering.
use std::{collections::HashSet, os::fd::OwnedFd, path::PathBuf, time::Duration};

use tokio::sync::{mpsc, watch};

use crate::{
    cgroup,
    error::{Error, Result},
    process::{self, Reply},
};

/// How long a pause may take, as with runc.
const PAUSE_TIME: Duration = Duration::from_secs(10);
/// How long a signal to all waits for a process that does not stand still; then it is sent anyway.
const SIGNAL_TIME: Duration = Duration::from_secs(1);

enum Request {
    Freeze { frozen: bool, reply: Reply<()> },
    SignalAll { signal: i32, reply: Reply<()> },
}

/// The way to a container's freezer. Its task ends when this is dropped.
pub struct Freezer {
    requests: mpsc::UnboundedSender<Request>,
    paused: watch::Receiver<bool>,
}

impl Freezer {
    /// Starts the task for container `id` with its cgroup directory.
    pub fn spawn(id: String, cgroup: PathBuf) -> Self {
        let (requests, queue) = mpsc::unbounded_channel();
        let (tell, paused) = watch::channel(false);
        let task = Task {
            id,
            cgroup,
            paused: tell,
        };
        tokio::spawn(task.run(queue));
        Self { requests, paused }
    }

    /// Whether the container is paused.
    pub fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    /// Pauses or resumes.
    pub fn freeze(&self, frozen: bool, reply: Reply<()>) {
        // A task that is gone drops the reply, which its receiver notices.
        let _ = self.requests.send(Request::Freeze { frozen, reply });
    }

    /// Sends a signal other than SIGKILL to every process.
    pub fn signal_all(&self, signal: i32, reply: Reply<()>) {
        let _ = self.requests.send(Request::SignalAll { signal, reply });
    }
}

struct Task {
    id: String,
    cgroup: PathBuf,
    paused: watch::Sender<bool>,
}

impl Task {
    async fn run(self, mut queue: mpsc::UnboundedReceiver<Request>) {
        while let Some(request) = queue.recv().await {
            let (outcome, reply) = match request {
                Request::Freeze { frozen, reply } => (self.freeze(frozen).await, reply),
                Request::SignalAll { signal, reply } => (self.signal_all(signal).await, reply),
            };
            let _ = reply.send(outcome);
        }
    }

    async fn freeze(&self, frozen: bool) -> Result<()> {
        if frozen == *self.paused.borrow() {
            let state = if frozen { "already" } else { "not" };
            return Err(Error::FailedPrecondition(format!(
                "container {} is {state} paused",
                self.id
            )));
        }
        let outcome = cgroup::freeze(&self.cgroup, frozen, PAUSE_TIME).await;
        if outcome.is_ok() {
            self.paused.send_replace(frozen);
        } else if frozen {
            // The others must not stay frozen: nobody would thaw them.
            cgroup::thaw(&self.cgroup)?;
        }
        outcome
    }

    async fn signal_all(&self, signal: i32) -> Result<()> {
        // Frozen, so that no process escapes by forking while the list is walked. One that cannot be
        // frozen does not run either, until it can.
        let _ = cgroup::freeze(&self.cgroup, true, SIGNAL_TIME).await;
        let outcome = signal_each(signal, || cgroup::processes(&self.cgroup));
        if !*self.paused.borrow() {
            cgroup::thaw(&self.cgroup)?;
        }
        outcome
    }
}

/// Processes that are held at a time, by a descriptor each.
const HELD: usize = 512;

/// Sends a signal to each process that `list` names.
///
/// A number may be another container's process by the time it is used. So each is held first, and signalled if it is still
/// listed then: what a held number means by that time is the process that is held, or one that is not listed here.
fn signal_each(signal: i32, list: impl Fn() -> Result<Vec<u32>>) -> Result<()> {
    for numbers in list()?.chunks(HELD) {
        let held: Vec<(u32, OwnedFd)> = numbers
            .iter()
            .filter_map(|number| Some((*number, hold(*number)?)))
            .collect();
        let listed: HashSet<u32> = list()?.into_iter().collect();
        for (_, process_fd) in held.iter().filter(|(number, _)| listed.contains(number)) {
            // One that has ended needs none.
            let _ = process::send(process_fd, signal);
        }
    }
    Ok(())
}

fn hold(number: u32) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(number).ok()?)?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cell::Cell, os::unix::process::ExitStatusExt as _, process::Command};

    /// Who has left the container between two looks stands for a number that is somebody else's by now.
    #[test]
    fn who_is_listed_no_longer_gets_no_signal() {
        let sleeper = || Command::new("sleep").arg("1000").spawn().unwrap();
        let (mut stays, mut gone) = (sleeper(), sleeper());
        let looks = Cell::new(0);
        let list = || {
            looks.set(looks.get() + 1);
            Ok(match looks.get() {
                1 => vec![gone.id(), stays.id()],
                _ => vec![stays.id()],
            })
        };
        signal_each(libc::SIGTERM, list).unwrap();
        assert_eq!(stays.wait().unwrap().signal(), Some(libc::SIGTERM));
        gone.kill().unwrap();
        assert_eq!(gone.wait().unwrap().signal(), Some(libc::SIGKILL));
    }
}
