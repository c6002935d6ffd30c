//! The program that runs a benchmark's commands in a container or a guest (`brig-probe commands`), as its other end sees it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::clip;
use brig_tests::node::clock;
use brig_tests::node::daemon::pod::Streams;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

/// Where commands are run, one at a time.
pub struct Runner {
    input: File,
    answers: Receiver<String>,
    /// Held open for who must have one; nothing is written there.
    _errors: Option<File>,
}

impl Runner {
    /// By a stream that is both ends.
    pub fn on(stream: File) -> Result<Self> {
        Ok(Self::of(stream.try_clone()?, stream))
    }

    /// By FIFOs in a directory, and what a shim is to be told of them.
    pub fn by_fifos(directory: &Path) -> Result<(Self, Streams)> {
        let fifo = |name: &str| -> Result<(File, String)> {
            let path = directory.join(format!("runner-{name}"));
            let _ = std::fs::remove_file(&path);
            mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
            // Open at both ends, it waits for nobody.
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            Ok((file, path.display().to_string()))
        };
        let ((input, stdin), (output, stdout)) = (fifo("stdin")?, fifo("stdout")?);
        let (errors, stderr) = fifo("stderr")?;
        let streams = Streams {
            stdin,
            stdout,
            stderr,
        };
        let mut runner = Self::of(input, output);
        runner._errors = Some(errors);
        Ok((runner, streams))
    }

    fn of(input: File, output: File) -> Self {
        let (sender, answers) = channel();
        // Ends with the stream, or with this program.
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            input,
            answers,
            _errors: None,
        }
    }

    /// Runs a command, which must succeed; what it wrote to standard output.
    pub fn run(&mut self, command: &[&str]) -> Result<String> {
        writeln!(self.input, "{}", json!(command))?;
        let answer = self
            .answers
            .recv_timeout(clock::seconds(60))
            .with_context(|| format!("no end of {command:?}"))?;
        let answer: Value = serde_json::from_str(&answer).with_context(|| clip(&answer))?;
        ensure!(
            answer["code"] == 0,
            "{command:?} ends with {}: {}",
            answer["code"],
            clip(answer["stderr"].as_str().unwrap_or_default())
        );
        Ok(answer["stdout"].as_str().unwrap_or_default().to_owned())
    }

    /// Runs a script of the shell.
    pub fn sh(&mut self, script: &str) -> Result<String> {
        self.run(&["/bin/sh", "-c", script])
    }
}
