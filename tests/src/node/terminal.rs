//! A pseudo-terminal for `ctr -t`: write keys, wait for text, change its size.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::Signal;

use super::process::{Outcome, Running};

nix::ioctl_write_ptr_bad!(
    /// Changes a terminal's size.
    set_window_size, libc::TIOCSWINSZ, Winsize);

/// A program on a terminal of its own.
pub struct Session {
    master: File,
    running: Running,
    output: Receiver<Vec<u8>>,
    seen: String,
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Session {
    /// Starts the program with the terminal as its standard streams.
    ///
    /// # Errors
    /// If there is no pseudo-terminal or the program cannot start.
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Result<Self> {
        let pty = openpty(&size(rows, columns), None).context("cannot open a terminal")?;
        let slave = File::from(pty.slave);
        command
            .stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave));
        let name = format!("{command:?}");
        let running = Running::start_raw(command, &name)?;
        let master = File::from(pty.master);
        let (sender, output) = channel();
        let mut reader = master.try_clone()?;
        std::thread::spawn(move || {
            let mut block = [0u8; 4096];
            // EIO is how a terminal says that nobody has it open any more.
            while let Ok(length) = reader.read(&mut block) {
                if length == 0 || sender.send(block[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            master,
            running,
            output,
            seen: String::new(),
        })
    }

    /// Types.
    ///
    /// # Errors
    /// If the terminal is gone.
    pub fn send(&mut self, keys: &[u8]) -> Result<()> {
        self.master.write_all(keys)?;
        Ok(())
    }

    /// Changes the size, tells the program as a terminal emulator does, and waits until it shows
    /// `text`. The program is told more than once: it may not listen yet, and a size is not lost by
    /// being told twice.
    ///
    /// # Errors
    /// If the terminal or the program is gone, or does not show the text in time.
    pub fn resize(&mut self, rows: u16, columns: u16, text: &str, within: Duration) -> Result<()> {
        let size = size(rows, columns);
        // SAFETY: TIOCSWINSZ reads one Winsize, which lives for the call.
        unsafe { set_window_size(self.master.as_raw_fd(), &raw const size) }?;
        let end = Instant::now() + within;
        loop {
            // The terminal is not the program's controlling one, so the kernel sends it nothing.
            self.running.signal(Signal::SIGWINCH)?;
            match self.wait_for(text, within / 20) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// Waits until the terminal has shown `text`; returns everything it has shown.
    ///
    /// # Errors
    /// At the deadline or at the program's end, with what was shown.
    pub fn wait_for(&mut self, text: &str, within: Duration) -> Result<&str> {
        let end = Instant::now() + within;
        while !self.seen.contains(text) {
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(data) => self.seen.push_str(&String::from_utf8_lossy(&data)),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("terminal did not show '{text}' in time, but: {}", self.seen)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("program ended before it showed '{text}': {}", self.seen)
                }
            }
        }
        Ok(&self.seen)
    }

    /// Waits for the program's end.
    ///
    /// # Errors
    /// At the deadline.
    pub fn finish(self, within: Duration) -> Result<Outcome> {
        let Self {
            running,
            output,
            mut seen,
            master,
        } = self;
        let mut outcome = running.finish(within)?;
        drop(master);
        while let Ok(data) = output.try_recv() {
            seen.push_str(&String::from_utf8_lossy(&data));
        }
        outcome.stdout = seen.into_bytes();
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_sees_the_terminal_and_its_size() {
        let mut command = Command::new("stty");
        command.arg("size");
        let mut session = Session::start(command, 31, 101).unwrap();
        session.wait_for("31 101", Duration::from_secs(20)).unwrap();
        assert_eq!(session.finish(Duration::from_secs(20)).unwrap().code, 0);
    }
}
