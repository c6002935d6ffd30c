//! Running a program with a deadline: all of its output, its exit status, and no waiting by sleep.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status, a signal as 128 + its number.
    pub code: i32,
    /// All of stdout.
    pub stdout: Vec<u8>,
    /// All of stderr, as text.
    pub stderr: String,
    /// From start to end.
    pub elapsed: Duration,
}

impl Outcome {
    /// stdout as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Fails unless the program wrote exactly `text` to stdout and exited with `code`.
    ///
    /// # Errors
    /// With everything it wrote and its exit status.
    pub fn says(&self, code: i32, text: &str) -> Result<()> {
        let said = self.text();
        if said != text || self.code != code {
            bail!(
                "expected stdout {text:?} and exit status {code}, got {:?} and {}; stderr: {}",
                super::check::clip(&said),
                self.code,
                super::check::clip(&self.stderr)
            );
        }
        Ok(())
    }

    /// Fails unless the program exited with 0.
    ///
    /// # Errors
    /// With its exit status and stderr.
    pub fn success(self) -> Result<Self> {
        if self.code != 0 {
            bail!(
                "exit status {} instead of 0; stderr: {}",
                self.code,
                super::check::clip(&self.stderr)
            );
        }
        Ok(self)
    }
}

/// A program that runs beside the test, with its streams.
pub struct Running {
    child: Child,
    pidfd: OwnedFd,
    started: Instant,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    name: String,
}

fn drain(mut stream: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut data = Vec::new();
        // An error is an end: what was read so far is what there is.
        let _ = stream.read_to_end(&mut data);
        data
    })
}

/// Who has started a process, or has it now.
///
/// # Errors
/// If it is gone.
pub fn parent(pid: i32) -> Result<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    Ok(parent.context("no parent")?.trim().parse()?)
}

/// A descriptor that becomes readable when the process exits.
///
/// # Errors
/// What `pidfd_open` says.
pub fn pidfd(pid: i32) -> Result<OwnedFd> {
    // SAFETY: takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd)?;
    if fd < 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("cannot watch process {pid}"));
    }
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits until the descriptor is readable (a process has exited).
///
/// # Errors
/// If `poll` fails.
pub fn readable(fd: &OwnedFd, within: Duration) -> Result<bool> {
    let end = Instant::now() + within;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let millis = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, millis) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => bail!("cannot wait: {errno}"),
        }
    }
}

/// Waits until a process that is not our child has exited. True if it has.
///
/// # Errors
/// If it cannot be watched; a process that is already gone has exited.
pub fn exited(pid: i32, within: Duration) -> Result<bool> {
    match pidfd(pid) {
        Ok(fd) => readable(&fd, within),
        Err(_) => Ok(true),
    }
}

impl Running {
    /// Starts a program whose stdout and stderr are collected. Stdin is what the command says.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(mut command: Command) -> Result<Self> {
        let name = format!("{command:?}");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = Self::start_raw(command, &name)?;
        running.stdout = running.child.stdout.take().map(drain);
        running.stderr = running.child.stderr.take().map(drain);
        Ok(running)
    }

    /// Starts a program with the streams that the command names; piped ones can be taken.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_raw(mut command: Command, name: &str) -> Result<Self> {
        let started = Instant::now();
        let child = command
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let pidfd = pidfd(i32::try_from(child.id())?)?;
        Ok(Self {
            child,
            pidfd,
            started,
            stdout: None,
            stderr: None,
            name: name.to_owned(),
        })
    }

    /// The program's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?;
        Ok(())
    }

    /// Whether it has exited.
    pub fn is_done(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Waits for the end; a program past its deadline is killed and is an error.
    ///
    /// # Errors
    /// At the deadline, with what the program wrote so far.
    pub fn finish(mut self, within: Duration) -> Result<Outcome> {
        let in_time = readable(&self.pidfd, within)?;
        if !in_time {
            self.kill_group();
        }
        let status = self.child.wait()?;
        let elapsed = self.started.elapsed();
        let collect = |reader: Option<JoinHandle<Vec<u8>>>| {
            reader
                .and_then(|reader| reader.join().ok())
                .unwrap_or_default()
        };
        let stdout = collect(self.stdout.take());
        let stderr = String::from_utf8_lossy(&collect(self.stderr.take())).into_owned();
        if !in_time {
            bail!(
                "{} did not end within {} s; stdout: {}; stderr: {}",
                self.name,
                within.as_secs(),
                super::check::clip(&String::from_utf8_lossy(&stdout)),
                super::check::clip(&stderr)
            );
        }
        Ok(Outcome {
            code: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout,
            stderr,
            elapsed,
        })
    }

    fn kill_group(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = nix::sys::signal::killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.kill();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill_group();
            let _ = self.child.wait();
        }
    }
}

impl AsRawFd for Running {
    fn as_raw_fd(&self) -> i32 {
        self.pidfd.as_raw_fd()
    }
}

/// The lines a program writes to stdout, as they come.
pub struct Lines {
    receiver: Receiver<String>,
    seen: Vec<String>,
}

impl Lines {
    /// Starts a program whose stdout is read line by line; its stderr is collected.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(mut command: Command) -> Result<(Running, Self)> {
        let name = format!("{command:?}");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = Running::start_raw(command, &name)?;
        running.stderr = running.child.stderr.take().map(drain);
        let stdout = running.child.stdout.take().context("no stdout")?;
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let seen = Vec::new();
        Ok((running, Self { receiver, seen }))
    }

    /// Waits for a line with `text` in it.
    ///
    /// # Errors
    /// At the deadline or the stream's end, with the lines that came.
    pub fn wait_for(&mut self, text: &str, within: Duration) -> Result<String> {
        let end = Instant::now() + within;
        loop {
            match self
                .receiver
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(line) if line.contains(text) => return Ok(line),
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no line with '{text}' in time; lines: {:?}", self.seen)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("output ended without '{text}'; lines: {:?}", self.seen)
                }
            }
        }
    }
}

impl Lines {
    /// The lines that are left, when the stream has ended.
    ///
    /// # Errors
    /// At the deadline.
    pub fn rest(&mut self, within: Duration) -> Result<Vec<String>> {
        let end = Instant::now() + within;
        let mut lines = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.receiver.recv_timeout(left) {
                Ok(line) => lines.push(line),
                Err(RecvTimeoutError::Disconnected) => return Ok(lines),
                Err(RecvTimeoutError::Timeout) => bail!("the output does not end"),
            }
        }
    }
}

/// Runs a program to its end.
///
/// # Errors
/// If it cannot start or does not end in time.
pub fn run(mut command: Command, within: Duration) -> Result<Outcome> {
    command.stdin(Stdio::null());
    Running::start(command)?.finish(within)
}

/// Runs a program that reads `input`.
///
/// # Errors
/// If it cannot start or does not end in time.
pub fn run_with_input(mut command: Command, input: Vec<u8>, within: Duration) -> Result<Outcome> {
    command.stdin(Stdio::piped());
    let mut running = Running::start(command)?;
    if let Some(mut stdin) = running.child.stdin.take() {
        std::thread::spawn(move || {
            // A program that stops reading early is judged by its outcome.
            let _ = stdin.write_all(&input);
        });
    }
    running.finish(within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_reported_as_128_plus_its_number() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; kill -9 $$"]);
        let outcome = run(command, Duration::from_secs(20)).unwrap();
        assert_eq!(outcome.code, 137);
        assert_eq!(outcome.text(), "out\n");
        assert_eq!(outcome.stderr, "err\n");
    }

    #[test]
    fn a_program_past_its_deadline_is_killed_with_its_children() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo started; sleep 1000 & wait"]);
        let error = run(command, Duration::from_millis(300))
            .unwrap_err()
            .to_string();
        assert!(error.contains("did not end"), "{error}");
        assert!(error.contains("started"), "{error}");
    }
}
