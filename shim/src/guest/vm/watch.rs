//! Watches one VMM process until it is reaped: forwards what it says to the log, within bounds, and
//! tells its end once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use brig_hypervisor::control::{DeviceWord, Event};
use brig_hypervisor::launch::VmmExit;
use slog::{Logger, info, warn};
use tokio::io::Interest;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::timeout;

use super::VmProcess;
use super::death::Death;
use super::kill::Kill;
use super::lines;
use crate::log::{CONSOLE, Gate};
use crate::node::cgroup::Cgroup;
use crate::node::watched::watched;

/// Console lines kept for the reason of a panic.
const KEPT_LINES: usize = 64;
/// How long the last words of an ended VMM may take to arrive.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Everything a watch needs.
pub struct Watch {
    /// The process; dropped, and thereby certainly gone, when the watch ends.
    pub process: Box<dyn VmProcess>,
    /// What the VMM says over the control socket.
    pub events: mpsc::Receiver<Event>,
    /// What it writes to its standard error.
    pub stderr: OwnedFd,
    /// The pod's cgroup, to tell a kill for memory from others.
    pub cgroup: Option<Cgroup>,
    /// Whether the VMM is to be killed, and why.
    pub kill: Arc<Kill>,
    /// Notified when the guest should let go of cached files.
    pub pressure: Arc<Notify>,
    /// What becomes of devices of the node. More than fit are dropped: the VMM repeats that one is wanted.
    pub words: mpsc::Sender<(u8, DeviceWord)>,
    /// Where the end is told.
    pub death: watch::Sender<Option<Death>>,
    /// The log.
    pub logger: Logger,
}

impl Watch {
    /// Runs until the process is reaped.
    pub async fn run(mut self) {
        let kills = self.cgroup.as_ref().map(Cgroup::kills);
        let errors = lines::forward(self.stderr, "vmm", self.logger.clone());
        let mut errors = tokio::spawn(errors);
        let heard = listen(self.events, self.pressure, self.words, self.logger.clone());
        let mut heard = tokio::spawn(heard);
        let exit = loop {
            match wait_readable(&*self.process, &self.kill).await {
                Ok(true) => {}
                Ok(false) | Err(_) => {
                    let _ = self.process.kill();
                }
            }
            match self.process.try_wait() {
                Ok(Some(exit)) => break Some(exit),
                Ok(None) => {}
                Err(error) => {
                    warn!(self.logger, "the VMM cannot be waited for"; "error" => %error);
                    break None;
                }
            }
        };
        let mut heard = last_words(&mut heard).await.unwrap_or_default();
        let last_line = last_words(&mut errors).await.flatten();
        let said = heard.reason.or(last_line);
        // What was killed for memory was killed by that; others of the cgroup may have been as well.
        let oom = exit == Some(VmmExit::Signal(libc::SIGKILL))
            && kills.is_some_and(|kills| kills.is_more());
        let at = SystemTime::now();
        let death = match (exit, self.kill.reason()) {
            (Some(VmmExit::Signal(libc::SIGKILL)), Some(reason)) if !oom => Death {
                reason: reason.to_owned(),
                oom,
                killed: true,
                at,
            },
            _ => Death::new(
                exit,
                oom,
                heard.console.make_contiguous(),
                said.as_deref(),
                at,
            ),
        };
        info!(self.logger, "the VM has ended"; "reason" => &death.reason);
        drop(self.process);
        self.death.send_replace(Some(death));
    }
}

/// Waits for the end of the process (true) or for the wish to kill it (false).
async fn wait_readable(process: &dyn VmProcess, kill: &Kill) -> io::Result<bool> {
    let pidfd = watched(process.pidfd().try_clone_to_owned()?, Interest::READABLE)?;
    tokio::select! {
        ready = pidfd.readable() => ready.map(|_| true),
        () = kill.wished() => Ok(false),
    }
}

async fn last_words<T>(task: &mut tokio::task::JoinHandle<T>) -> Option<T> {
    match timeout(LAST_WORDS, &mut *task).await {
        Ok(result) => result.ok(),
        Err(_) => {
            task.abort();
            None
        }
    }
}

/// What the VMM has said over the control socket.
#[derive(Default)]
struct Heard {
    /// The last console lines.
    console: VecDeque<String>,
    /// Its own reason of its end.
    reason: Option<String>,
}

/// Listens until the connection ends; console lines are logged within the gate's rate.
async fn listen(
    mut events: mpsc::Receiver<Event>,
    pressure: Arc<Notify>,
    words: mpsc::Sender<(u8, DeviceWord)>,
    logger: Logger,
) -> Heard {
    let mut heard = Heard::default();
    let mut gate = Gate::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Console { mut line } => {
                lines::cut(&mut line);
                lines::log(&logger, &mut gate, CONSOLE, &line);
                if heard.console.len() == KEPT_LINES {
                    heard.console.pop_front();
                }
                heard.console.push_back(line);
            }
            Event::SharePressure => pressure.notify_one(),
            Event::Device { function, word } => drop(words.try_send((function, word))),
            Event::Ended { reason, .. } => heard.reason = Some(reason),
            Event::BootMark { .. } | Event::AgentConnected { .. } | Event::StreamClosed { .. } => {}
        }
    }
    heard
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use brig_hypervisor::launch::VmmExit;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, ChildStdin, Command, Stdio};

    /// An ordinary child in the place of a VMM.
    pub(crate) struct FakeProcess {
        child: Child,
        pidfd: OwnedFd,
    }

    impl FakeProcess {
        pub(crate) fn with_stdin(script: &str) -> (Self, ChildStdin) {
            let mut child = Command::new("sh")
                .args(["-c", script])
                .stdin(Stdio::piped())
                .spawn()
                .unwrap();
            let stdin = child.stdin.take().unwrap();
            let pid = rustix::process::Pid::from_child(&child);
            let pidfd =
                rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
            (Self { child, pidfd }, stdin)
        }
    }

    impl VmProcess for FakeProcess {
        fn pid(&self) -> u32 {
            self.child.id()
        }
        fn pidfd(&self) -> BorrowedFd<'_> {
            self.pidfd.as_fd()
        }
        fn try_wait(&mut self) -> io::Result<Option<VmmExit>> {
            Ok(self.child.try_wait()?.map(|status| match status.code() {
                Some(code) => VmmExit::Code(code),
                None => VmmExit::Signal(status.signal().unwrap()),
            }))
        }
        fn kill(&self) -> io::Result<()> {
            let signal = rustix::process::Signal::KILL;
            Ok(rustix::process::pidfd_send_signal(&self.pidfd, signal)?)
        }
    }

    impl Drop for FakeProcess {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    async fn end_of(script: &str, kill: Option<&str>) -> Death {
        end_in(script, kill, None).await
    }

    /// The script begins when the watch has.
    async fn end_in(script: &str, kill: Option<&str>, cgroup: Option<Cgroup>) -> Death {
        let (events_sender, events) = mpsc::channel(4);
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (death, mut told) = watch::channel(None);
        let wished = Arc::new(Kill::default());
        if let Some(reason) = kill {
            wished.wish((!reason.is_empty()).then(|| reason.to_owned()));
        }
        events_sender
            .send(Event::Console {
                line: "Kernel panic - not syncing: test".into(),
            })
            .await
            .unwrap();
        rustix::io::write(&write, b"one\ntwo\n").unwrap();
        drop((events_sender, write));
        let (process, mut begin) = FakeProcess::with_stdin(&format!("read begin; {script}"));
        let watch = Watch {
            process: Box::new(process),
            events,
            stderr: read,
            cgroup,
            kill: wished,
            pressure: Arc::default(),
            words: mpsc::channel(1).0,
            death,
            logger: Logger::root(slog::Discard, slog::o!()),
        };
        tokio::join!(watch.run(), async {
            let _ = io::Write::write_all(&mut begin, b"\n");
        });
        told.wait_for(Option::is_some)
            .await
            .unwrap()
            .clone()
            .unwrap()
    }

    #[tokio::test]
    async fn the_end_is_told_with_the_last_words() {
        let death = end_of("exit 11", None).await;
        assert!(
            death.reason.contains("not syncing: test"),
            "{}",
            death.reason
        );
        let death = end_of("exit 12", None).await;
        assert!(death.reason.ends_with(": two"), "{}", death.reason);
    }

    #[tokio::test]
    async fn a_vm_that_was_killed_when_its_cgroup_counted_a_kill_was_killed_for_memory() {
        let dir = tempfile::tempdir().unwrap();
        let events = dir.path().join("memory.events");
        std::fs::write(&events, "oom_kill 1\n").unwrap();
        let json = serde_json::json!({ "dirs": [dir.path()], "parents": [], "home": null });
        let cgroup: Cgroup = serde_json::from_value(json).unwrap();
        let end = async |count: u32, how: &str| {
            let script = format!("echo oom_kill {count} >{}; {how}", events.display());
            end_in(&script, None, Some(cgroup.clone())).await
        };
        assert!(!end(1, "kill -KILL $$").await.oom);
        assert!(end(2, "kill -KILL $$").await.oom);
        // A hook of the pod's was.
        assert!(!end(3, "exit 0").await.oom);
    }

    #[tokio::test]
    async fn a_wish_to_kill_is_granted() {
        let death = end_of("sleep 60", Some("")).await;
        assert!(death.reason.contains("signal 9"), "{}", death.reason);
        let death = end_of("sleep 60", Some("it was silent")).await;
        assert_eq!(death.reason, "it was silent");
        // It ended by itself before it was killed.
        let death = end_of("kill -TERM $$", Some("it was silent")).await;
        assert!(
            death.reason.contains("signal 15") || death.reason == "it was silent",
            "{}",
            death.reason
        );
    }
}
