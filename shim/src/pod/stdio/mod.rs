//! The stdio of one process: containerd's FIFOs (or files, or a logger, or streams) joined to streams of the
//! VM. Where it can, the shim opens the ends and hands them to the VMM, and the bytes do not pass through it: FIFOs
//! and devices, in a way that only their bytes can be changed ([`brig_hypervisor::launch::open_sealed`]). Of a regular file the VMM could
//! change more, and containerd's streams are no descriptors; there it gets a pipe.
//!
//! The opposite end of each FIFO is kept open here, so that a restart of containerd gives neither an
//! end of file nor EPIPE. An output's is let go when its stream has ended; standard input's at
//! CloseIO, and then containerd's own end decides.

mod copied;
mod end;
mod logger;
mod open;
mod percent;
pub mod streaming;

use std::fs::File;
use std::time::Duration;

use brig_agent_protocol::agent;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::error::{Error, Kind, Result};
use crate::guest::vm::Vm;
use crate::guest::vm::control::StreamEnd;
use crate::pod::process::Io;
use end::{End, Kept};
use logger::LoggerProcess;
use open::{names_a_file, no_pipe, open_file, open_input, open_output, open_to_append, scheme};
use streaming::Streams;

/// Everything one process's streams hold on the host.
#[derive(Debug)]
pub struct Stdio {
    /// What the agent is told.
    pub numbers: agent::Stdio,
    stdin: Option<Kept>,
    outputs_ended: watch::Receiver<bool>,
    /// Of containerd's streams.
    pumps: Vec<streaming::Output>,
    logger: Option<LoggerProcess>,
}

/// The ends of the three streams, before the VM knows of them.
#[derive(Debug, Default)]
pub struct Ends {
    stdin: Option<End>,
    stdout: Option<End>,
    stderr: Option<End>,
    terminal: bool,
    logger: Option<LoggerProcess>,
}

impl Ends {
    /// Opens what containerd named. An open may take as long as it likes (a FIFO that nobody reads, a file system that does
    /// not answer), and is waited for as long as `limit`, while the pod goes on.
    ///
    /// # Errors
    /// `InvalidArgument` for an URI of an unknown scheme, `DeadlineExceeded` for what does not open in time, else what the host
    /// says.
    pub async fn open(
        io: &Io,
        streams: &Streams,
        namespace: &str,
        id: &str,
        limit: Duration,
    ) -> Result<Self> {
        let (named, claimed) = (io.clone(), streams.clone());
        let opening = tokio::task::spawn_blocking(move || Self::opened(&named, &claimed));
        let Ok(opened) = timeout(limit, opening).await else {
            return Err(not_in_time(io, limit));
        };
        let mut ends = opened??;
        if has_logger(io) {
            let (stdout, stderr, process) = logger::start(&io.stdout, namespace, id, limit).await?;
            let given = |given| {
                let kept = Kept::Nothing;
                Some(End { given, kept })
            };
            ends.stdout = given(stdout);
            ends.stderr = if io.terminal { None } else { given(stderr) };
            ends.logger = Some(process);
        }
        Ok(ends)
    }

    /// All but a logger's. Blocking.
    fn opened(io: &Io, streams: &Streams) -> Result<Self> {
        let mut ends = Self {
            stdin: open_input(&io.stdin, streams)?,
            terminal: io.terminal,
            ..Self::default()
        };
        match scheme(&io.stdout) {
            _ if has_logger(io) => {}
            // Both outputs, wherever stderr is said to go.
            Some("file") => ends.share(open_file(&io.stdout)?)?,
            _ if io.stdout == io.stderr && names_a_file(&io.stdout)? => {
                ends.share(open_to_append(&io.stdout)?)?;
            }
            _ => {
                ends.stdout = open_output(&io.stdout, streams)?;
                if !io.terminal {
                    ends.stderr = open_output(&io.stderr, streams)?;
                }
            }
        }
        Ok(ends)
    }

    /// Has both outputs written to a file.
    fn share(&mut self, file: File) -> Result<()> {
        let (given, written) = copied::start(file).map_err(no_pipe)?;
        if !self.terminal {
            let given = given.try_clone().map_err(no_pipe)?;
            let kept = Kept::Nothing;
            self.stderr = Some(End { given, kept });
        }
        let kept = Kept::Copied(written);
        self.stdout = Some(End { given, kept });
        Ok(())
    }

    /// Opens a stream of the VM for each end.
    ///
    /// # Errors
    /// The VMM's; streams that were opened are closed.
    pub async fn connect(self, vm: &Vm) -> Result<Stdio> {
        let mut numbers = agent::Stdio {
            terminal: self.terminal,
            ..agent::Stdio::default()
        };
        let mut opened = Vec::new();
        let mut outputs = Vec::new();
        let mut pumps = Vec::new();
        let mut stdin = None;
        let result: Result<()> = async {
            if let Some(end) = self.stdin {
                let (number, _end) = vm.open_stream(Some(end.given), None).await?;
                (numbers.stdin, stdin) = (number, Some(end.kept));
                opened.push(number);
            }
            for (end, number) in [
                (self.stdout, &mut numbers.stdout),
                (self.stderr, &mut numbers.stderr),
            ] {
                if let Some(end) = end {
                    let (opened_number, ended) = vm.open_stream(None, Some(end.given)).await?;
                    *number = opened_number;
                    opened.push(opened_number);
                    let last = match end.kept {
                        Kept::Output(pump, delivered) => {
                            pumps.push(pump);
                            Last::Delivery(delivered)
                        }
                        Kept::Copied(written) => Last::Delivery(written),
                        kept => Last::Release(kept),
                    };
                    outputs.push((ended, last));
                }
            }
            Ok(())
        }
        .await;
        if let Err(error) = result {
            for number in opened {
                vm.close_stream(number).await;
            }
            return Err(error);
        }
        Ok(Stdio {
            numbers,
            stdin,
            outputs_ended: release_at_end(outputs),
            pumps,
            logger: self.logger,
        })
    }
}

impl Stdio {
    /// Lets go of standard input: end of file comes when containerd's end is closed too.
    pub fn close_stdin(&mut self) {
        if let Some(Kept::Input(pump)) = &self.stdin {
            // What it has taken in must still reach the process.
            pump.close();
        } else {
            self.stdin = None;
        }
    }

    /// Turns true when all output has been delivered; `None` where containerd may hear of the exit first,
    /// which is everywhere but with its streams.
    #[must_use]
    pub fn delivery(&self) -> Option<watch::Receiver<bool>> {
        let waits = !self.pumps.is_empty() && !*self.outputs_ended.borrow();
        waits.then(|| self.outputs_ended.clone())
    }

    /// Ends the streams of a process that did not come to life.
    pub async fn abandon(self, vm: &Vm) {
        let numbers = [self.numbers.stdin, self.numbers.stdout, self.numbers.stderr];
        for number in numbers.into_iter().filter(|&number| number != 0) {
            vm.close_stream(number).await;
        }
        if let Some(logger) = self.logger {
            logger.end().await;
        }
    }

    /// Whether all output is delivered within this time.
    pub async fn ends_within(&mut self, limit: Duration) -> bool {
        let ended = self.outputs_ended.wait_for(|ended| *ended);
        timeout(limit, ended).await.is_ok()
    }

    /// Waits until all output has been delivered, at most so long; then standard input's stream is
    /// ended too. False when the time was not enough.
    pub async fn finish(mut self, vm: &Vm, limit: Duration) -> bool {
        let complete = self.ends_within(limit).await;
        let numbers = &self.numbers;
        if numbers.stdin != 0 {
            vm.close_stream(numbers.stdin).await;
        }
        if !complete {
            for number in [numbers.stdout, numbers.stderr] {
                if number != 0 {
                    vm.close_stream(number).await;
                }
            }
        }
        if let Some(logger) = self.logger {
            logger.end().await;
        }
        complete
    }
}

/// What is left of an output when its stream has ended.
#[derive(Debug)]
enum Last {
    /// To let go of what was kept.
    Release(Kept),
    /// To wait for what is still on its way.
    Delivery(JoinHandle<()>),
}

/// Does each output's last step when its stream has ended; the receiver turns true when all are done.
fn release_at_end(outputs: Vec<(StreamEnd, Last)>) -> watch::Receiver<bool> {
    let (sender, receiver) = watch::channel(outputs.is_empty());
    if !outputs.is_empty() {
        tokio::spawn(async move {
            let each = outputs.into_iter().map(|(ended, last)| async move {
                let _ = ended.await;
                match last {
                    Last::Release(kept) => drop(kept),
                    Last::Delivery(delivered) => drop(delivered.await),
                }
            });
            futures::future::join_all(each).await;
            sender.send_replace(true);
        });
    }
    receiver
}

fn has_logger(io: &Io) -> bool {
    scheme(&io.stdout).is_some_and(|scheme| logger::SCHEMES.contains(&scheme))
}

fn not_in_time(io: &Io, limit: Duration) -> Error {
    let mut named = vec![io.stdin.as_str(), &io.stdout, &io.stderr];
    named.retain(|uri| !uri.is_empty());
    Error::new(
        Kind::DeadlineExceeded,
        format!(
            "stdio {} could not be opened within {:.0} s: does somebody read a FIFO that is named as a file, and does the file \
             system answer?",
            named.join(", "),
            limit.as_secs_f64()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::open::open;
    use super::*;
    use rustix::io::Errno;
    use std::fs;
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;
    use std::path::PathBuf;
    use tokio::sync::oneshot;

    fn fifo(dir: &tempfile::TempDir, name: &str) -> PathBuf {
        let path = dir.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    }

    #[tokio::test]
    async fn a_fifo_that_nobody_reads_keeps_its_own_process_waiting_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir, "log");
        let io = Io {
            stdout: format!("file://{}", path.display()),
            ..Io::default()
        };
        let limit = Duration::from_millis(50);
        // On the thread of the test this would never end.
        let opened = Ends::open(&io, &none(), "ns", "c", limit).await;
        let error = opened.unwrap_err();
        assert_eq!(error.kind, Kind::DeadlineExceeded, "{error}");
        assert!(error.message.contains(&io.stdout), "{error}");
        // Lets the open end, which the runtime waits for.
        drop(open(&path, true).unwrap());
    }

    fn none() -> Streams {
        Streams::default()
    }

    fn uri(path: &Path) -> &str {
        path.to_str().unwrap()
    }

    /// What is for a VMM comes by way of a mount of its own, which takes root.
    fn can_seal() -> bool {
        brig_fixtures::needs::root()
    }

    /// Tries everything that would change more than the bytes.
    fn assert_sealed(given: &OwnedFd) {
        use rustix::fs::{Mode, Timestamps, XattrFlags};
        let time = |tv_sec| rustix::fs::Timespec { tv_sec, tv_nsec: 0 };
        let times = Timestamps {
            last_access: time(1),
            last_modification: time(1),
        };
        let root = rustix::fs::Uid::ROOT;
        for (what, outcome) in [
            ("mode", rustix::fs::fchmod(given, Mode::from(0o4755))),
            ("owner", rustix::fs::fchown(given, Some(root), None)),
            ("times", rustix::fs::futimens(given, &times)),
            (
                "attribute",
                rustix::fs::fsetxattr(given, "trusted.x", b"x", XattrFlags::empty()),
            ),
        ] {
            assert_eq!(outcome, Err(Errno::ROFS), "{what}");
        }
        assert!(rustix::fs::ftruncate(given, 0).is_err());
    }

    #[tokio::test]
    async fn a_vmm_can_change_nothing_of_the_node_but_bytes() {
        if !can_seal() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for name in ["stdin", "stdout"] {
            fifo(&dir, name);
        }
        let stdin = dir.path().join("stdin");
        assert_sealed(&open_input(uri(&stdin), &none()).unwrap().unwrap().given);
        let stdout = dir.path().join("stdout");
        assert_sealed(&open_output(uri(&stdout), &none()).unwrap().unwrap().given);
        // A regular file is not given at all.
        let file = dir.path().join("file");
        fs::write(&file, "kept ").unwrap();
        let end = open_output(uri(&file), &none()).unwrap().unwrap();
        assert!(rustix::fs::ftruncate(&end.given, 0).is_err());
        let _ = rustix::fs::fchmod(&end.given, rustix::fs::Mode::from(0o4755));
        let metadata = fs::metadata(&file).unwrap();
        assert_eq!(metadata.len(), 5);
        assert_eq!(metadata.permissions().mode() & 0o7000, 0);
    }

    #[test]
    fn a_restart_of_containerd_does_not_break_an_output() {
        if !can_seal() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir, "stdout");
        let end = open_output(uri(&path), &none()).unwrap().unwrap();
        let containerd = open(&path, true).unwrap();
        drop(containerd);
        let mut given = File::from(end.given);
        given.write_all(b"while away").unwrap();
        let mut back = open(&path, true).unwrap();
        let mut buffer = [0; 10];
        back.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"while away");
    }

    #[tokio::test]
    async fn the_end_of_a_stream_gives_containerd_its_end_of_file() {
        if !can_seal() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir, "stdout");
        let end = open_output(uri(&path), &none()).unwrap().unwrap();
        let mut containerd = open(&path, true).unwrap();
        let (ended, stream_end) = oneshot::channel();
        let mut outputs_ended = release_at_end(vec![(stream_end, Last::Release(end.kept))]);
        let mut buffer = [0; 1];
        let error = containerd.read(&mut buffer).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        assert!(!*outputs_ended.borrow());
        drop(end.given);
        ended.send(()).unwrap();
        outputs_ended.wait_for(|ended| *ended).await.unwrap();
        assert_eq!(containerd.read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn standard_input_ends_only_when_both_writers_have_let_go() {
        if !can_seal() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir, "stdin");
        let end = open_input(uri(&path), &none()).unwrap().unwrap();
        let mut containerd = open(&path, false).unwrap();
        containerd.write_all(b"x").unwrap();
        let mut given = File::from(end.given);
        let mut buffer = [0; 4];
        assert_eq!(given.read(&mut buffer).unwrap(), 1);
        drop(containerd);
        let error = given.read(&mut buffer).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        drop(end.kept);
        assert_eq!(given.read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn nothing_is_opened_for_no_stdio_and_unknown_schemes_are_refused() {
        for nothing in ["", "/dev/null"] {
            assert!(open_input(nothing, &none()).unwrap().is_none());
            assert!(open_output(nothing, &none()).unwrap().is_none());
        }
        let error = open_output("npipe://x", &none()).unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        let error = open_output("/nonexistent/fifo", &none()).unwrap_err();
        assert_eq!(error.kind, Kind::NotFound);
    }

    #[tokio::test]
    async fn a_log_file_is_appended_to_by_both_outputs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/a log");
        let encoded = format!("file://{}?x=1", uri(&path).replace(' ', "%20"));
        // A file that is named by its path alone has to be there.
        for named in [encoded.as_str(), uri(&path)] {
            let io = Io {
                stdout: named.to_owned(),
                stderr: named.to_owned(),
                ..Io::default()
            };
            let ends = Ends::open(&io, &none(), "ns", "c", Duration::from_secs(1))
                .await
                .unwrap();
            let (stdout, stderr) = (ends.stdout.unwrap(), ends.stderr.unwrap());
            File::from(stdout.given).write_all(b"out\n").unwrap();
            File::from(stderr.given).write_all(b"err\n").unwrap();
            let Kept::Copied(written) = stdout.kept else {
                panic!("the VMM has the file");
            };
            written.await.unwrap();
        }
        assert_eq!(fs::read_to_string(path).unwrap(), "out\nerr\nout\nerr\n");
    }
}
