//! Watches one VMM process until it is reaped: forwards what it says to the log, within bounds, and
//! tells its end once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use brig_hypervisor::control::Event;
use slog::{Logger, info, warn};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader, Interest};
use tokio::net::unix::pipe;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::timeout;

use super::VmProcess;
use super::death::Death;
use crate::cgroup::Cgroup;
use crate::log::{Gate, Passed};
use crate::watched::watched;

/// Console lines kept for the reason of a panic.
const KEPT_LINES: usize = 64;
/// The longest line taken from the guest or the VMM, in bytes.
const MAX_LINE: u64 = 1024;
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
    /// Notified when the VMM is to be killed.
    pub kill: Arc<Notify>,
    /// Where the end is told.
    pub death: watch::Sender<Option<Death>>,
    /// The log.
    pub logger: Logger,
}

impl Watch {
    /// Runs until the process is reaped.
    pub async fn run(mut self) {
        let before = self.cgroup.as_ref().map_or(0, Cgroup::oom_kills);
        let errors = forward_lines(self.stderr, "vmm", self.logger.clone());
        let mut errors = tokio::spawn(errors);
        let console = keep_console(self.events, self.logger.clone());
        let mut console = tokio::spawn(console);
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
        let lines = last_words(&mut console).await.unwrap_or_default();
        let said = last_words(&mut errors).await.flatten();
        let oom = self.cgroup.as_ref().map_or(0, Cgroup::oom_kills) > before;
        let death = Death::new(exit, oom, &lines, said.as_deref(), SystemTime::now());
        info!(self.logger, "the VM has ended"; "reason" => &death.reason);
        drop(self.process);
        self.death.send_replace(Some(death));
    }
}

/// Waits for the end of the process (true) or for the wish to kill it (false).
async fn wait_readable(process: &dyn VmProcess, kill: &Notify) -> io::Result<bool> {
    let pidfd = watched(process.pidfd().try_clone_to_owned()?, Interest::READABLE)?;
    tokio::select! {
        ready = pidfd.readable() => ready.map(|_| true),
        () = kill.notified() => Ok(false),
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

/// Logs console lines within the gate's rate and returns the last ones.
async fn keep_console(mut events: mpsc::Receiver<Event>, logger: Logger) -> Vec<String> {
    let mut kept = VecDeque::new();
    let mut gate = Gate::new();
    while let Some(event) = events.recv().await {
        if let Event::Console { line } = event {
            log_line(&logger, &mut gate, "console", &line);
            if kept.len() == KEPT_LINES {
                kept.pop_front();
            }
            kept.push_back(line);
        }
    }
    kept.into()
}

/// Logs the lines of a pipe within the gate's rate; returns the last one.
pub async fn forward_lines(fd: OwnedFd, source: &'static str, logger: Logger) -> Option<String> {
    let _ = rustix::io::ioctl_fionbio(fd.as_fd(), true);
    let reader = match pipe::Receiver::from_owned_fd(fd) {
        Ok(reader) => reader,
        Err(error) => {
            warn!(logger, "cannot read lines"; "from" => source, "error" => %error);
            return None;
        }
    };
    let mut gate = Gate::new();
    let mut reader = BufReader::new(reader);
    let mut last = None;
    while let Ok(Some(line)) = next_line(&mut reader).await {
        log_line(&logger, &mut gate, source, &line);
        if !line.trim().is_empty() {
            last = Some(line);
        }
    }
    last
}

/// A line without its end; a longer one comes in pieces.
async fn next_line<R: AsyncRead + Unpin>(reader: &mut BufReader<R>) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    if reader.take(MAX_LINE).read_until(b'\n', &mut bytes).await? == 0 {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&bytes);
    Ok(Some(text.trim_end_matches(['\n', '\r']).to_owned()))
}

fn log_line(logger: &Logger, gate: &mut Gate, source: &str, line: &str) {
    if let Passed::Yes { suppressed } = gate.pass(Instant::now()) {
        if suppressed > 0 {
            warn!(logger, "lines were suppressed"; "from" => source, "lines" => suppressed);
        }
        info!(logger, "{}", line; "from" => source);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use brig_hypervisor::launch::VmmExit;
    use std::os::fd::BorrowedFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command};

    /// An ordinary child in the place of a VMM.
    pub(crate) struct FakeProcess {
        child: Child,
        pidfd: OwnedFd,
    }

    impl FakeProcess {
        pub(crate) fn spawn(script: &str) -> Self {
            let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            let pid = rustix::process::Pid::from_child(&child);
            let pidfd =
                rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
            Self { child, pidfd }
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

    async fn end_of(script: &str, kill: bool) -> Death {
        let (events_sender, events) = mpsc::channel(4);
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (death, mut told) = watch::channel(None);
        let notify = Arc::new(Notify::new());
        if kill {
            notify.notify_one();
        }
        events_sender
            .send(Event::Console {
                line: "Kernel panic - not syncing: test".into(),
            })
            .await
            .unwrap();
        rustix::io::write(&write, b"one\ntwo\n").unwrap();
        drop((events_sender, write));
        let watch = Watch {
            process: Box::new(FakeProcess::spawn(script)),
            events,
            stderr: read,
            cgroup: None,
            kill: notify,
            death,
            logger: Logger::root(slog::Discard, slog::o!()),
        };
        watch.run().await;
        told.wait_for(Option::is_some)
            .await
            .unwrap()
            .clone()
            .unwrap()
    }

    #[tokio::test]
    async fn the_end_is_told_with_the_last_words() {
        let death = end_of("exit 11", false).await;
        assert!(
            death.reason.contains("not syncing: test"),
            "{}",
            death.reason
        );
        let death = end_of("exit 12", false).await;
        assert!(death.reason.ends_with(": two"), "{}", death.reason);
    }

    #[tokio::test]
    async fn a_wish_to_kill_is_granted() {
        let death = end_of("sleep 60", true).await;
        assert!(death.reason.contains("signal 9"), "{}", death.reason);
    }
}
