//! containerd as its users drive it: `ctr`, one process a call.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::clock;
use super::process::{self, Outcome, Running};
use super::terminal::Session;

/// Base time-out in seconds of one `ctr` call, a container's start included.
const CALL_SECONDS: u32 = 12;

/// A containerd namespace and a runtime to start containers with.
#[derive(Clone)]
pub struct Ctr {
    /// containerd's namespace.
    pub namespace: String,
    /// "io.containerd.brig.v2".
    pub runtime: String,
}

/// What `ctr run` starts.
#[derive(Clone)]
pub struct Run {
    /// The container's id.
    pub id: String,
    image: String,
    flags: Vec<String>,
    args: Vec<String>,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Run {
    /// A container of `image` that runs `args`, with a new id that begins with `name`.
    #[must_use]
    pub fn new(name: &str, image: &str, args: &[&str]) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self {
            id: format!("{name}-{}-{number}", std::process::id()),
            image: image.to_owned(),
            flags: Vec::new(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        }
    }

    /// Adds a flag of `ctr run`.
    #[must_use]
    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    /// Adds a flag with its value.
    #[must_use]
    pub fn with(mut self, flag: &str, value: &str) -> Self {
        self.flags.push(flag.to_owned());
        self.flags.push(value.to_owned());
        self
    }
}

impl Ctr {
    /// `ctr` in this namespace.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        // The default is 10 s, which many clients at once exceed on an emulated node.
        let connect = format!("{}s", clock::seconds(10).as_secs());
        command
            .args(["--connect-timeout", &connect])
            .args(["--namespace", &self.namespace])
            .args(args);
        command
    }

    /// Runs `ctr` to its end.
    ///
    /// # Errors
    /// If it does not end in time; its exit status is for the caller to judge.
    pub fn call(&self, args: &[&str]) -> Result<Outcome> {
        process::run(self.command(args), clock::seconds(CALL_SECONDS))
    }

    /// Runs `ctr`, which must succeed; returns its stdout.
    ///
    /// # Errors
    /// If it fails.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let outcome = self
            .call(args)?
            .success()
            .with_context(|| format!("ctr {}", args.join(" ")))?;
        Ok(outcome.text())
    }

    /// The command of `ctr run`.
    #[must_use]
    pub fn run_command(&self, run: &Run, extra: &[&str]) -> Command {
        let mut command = self.command(&["run", "--runtime", &self.runtime]);
        command
            .args(extra)
            .args(&run.flags)
            .arg(&run.image)
            .arg(&run.id)
            .args(&run.args);
        command
    }

    /// Runs a container in the foreground and removes it.
    ///
    /// # Errors
    /// If `ctr` does not end in time.
    pub fn run(&self, run: &Run) -> Result<Outcome> {
        let result = process::run(
            self.run_command(run, &["--rm"]),
            clock::seconds(CALL_SECONDS),
        );
        if !matches!(&result, Ok(outcome) if outcome.code == 0) {
            // A failed run may leave the container behind; the next test must not meet it.
            self.remove(&run.id);
        }
        result
    }

    /// Starts a container that stays; it is removed when the guard is dropped.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(&self, run: &Run) -> Result<Container> {
        let container = Container {
            ctr: self.clone(),
            id: run.id.clone(),
        };
        process::run(
            self.run_command(run, &["--detach"]),
            clock::seconds(CALL_SECONDS),
        )?
        .success()
        .with_context(|| format!("ctr run --detach {} {:?}", run.id, run.args))?;
        Ok(container)
    }

    /// The same by a specification in a file, which is all that counts of it.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_by(&self, spec: &Path, run: &Run) -> Result<Container> {
        let container = Container {
            ctr: self.clone(),
            id: run.id.clone(),
        };
        let mut command = self.command(&["run", "--detach", "--runtime", &self.runtime]);
        command.arg("--config").arg(spec).arg(&run.id);
        process::run(command, clock::seconds(CALL_SECONDS))?
            .success()
            .with_context(|| format!("ctr run --detach --config {} {}", spec.display(), run.id))?;
        Ok(container)
    }

    /// Starts a container in the foreground, beside the test.
    ///
    /// # Errors
    /// If `ctr` cannot be started.
    pub fn spawn(&self, run: &Run) -> Result<(Running, Container)> {
        let container = Container {
            ctr: self.clone(),
            id: run.id.clone(),
        };
        Ok((Running::start(self.run_command(run, &[]))?, container))
    }

    /// Kills and removes a container, whatever state it is in. Silent: what is left is judged
    /// elsewhere.
    pub fn remove(&self, id: &str) {
        let _ = self.call(&["task", "delete", "--force", id]);
        let _ = self.call(&["container", "delete", id]);
    }

    /// Status of a container's task as `ctr task ls` shows it, e.g. "RUNNING"; None without a task.
    ///
    /// # Errors
    /// If `ctr` fails.
    pub fn status(&self, id: &str) -> Result<Option<(String, u32)>> {
        let listing = self.ok(&["task", "ls"])?;
        Ok(listing.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(id)).then_some(())?;
            let pid = words.next()?.parse().ok()?;
            Some((words.next()?.to_owned(), pid))
        }))
    }

    /// Ids of all containers.
    ///
    /// # Errors
    /// If `ctr` fails.
    pub fn containers(&self) -> Result<Vec<String>> {
        let listing = self.ok(&["container", "ls", "--quiet"])?;
        Ok(listing.split_whitespace().map(str::to_owned).collect())
    }
}

/// A container that is removed at the end of its scope.
pub struct Container {
    ctr: Ctr,
    /// Its id.
    pub id: String,
}

impl Container {
    fn exec_command(&self, flags: &[&str], args: &[&str]) -> Command {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut command = self.ctr.command(&["task", "exec"]);
        command
            .arg("--exec-id")
            .arg(format!("x{number}"))
            .args(flags)
            .arg(&self.id)
            .args(args);
        command
    }

    /// Runs a command in the container to its end.
    ///
    /// # Errors
    /// If `ctr` does not end in time; the exit status is for the caller to judge.
    pub fn exec(&self, args: &[&str]) -> Result<Outcome> {
        self.exec_with(&[], args)
    }

    /// As [`Self::exec`], with flags of `ctr task exec`.
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub fn exec_with(&self, flags: &[&str], args: &[&str]) -> Result<Outcome> {
        process::run(self.exec_command(flags, args), clock::seconds(CALL_SECONDS))
    }

    /// As [`Self::exec`], with something to read.
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub fn exec_with_input(
        &self,
        args: &[&str],
        input: Vec<u8>,
        within: Duration,
    ) -> Result<Outcome> {
        process::run_with_input(self.exec_command(&[], args), input, within)
    }

    /// Starts a command in the container beside the test. `id` names it to `ctr task kill`.
    ///
    /// # Errors
    /// If `ctr` cannot be started.
    pub fn spawn(&self, id: &str, args: &[&str]) -> Result<Running> {
        let mut command = self
            .ctr
            .command(&["task", "exec", "--exec-id", id, &self.id]);
        command.args(args);
        Running::start(command)
    }

    /// As [`Self::spawn`], the streams as the caller sets them.
    #[must_use]
    pub fn exec_process(&self, flags: &[&str], args: &[&str]) -> Command {
        self.exec_command(flags, args)
    }

    /// Starts a command in the container on a terminal.
    ///
    /// # Errors
    /// If there is no terminal or `ctr` cannot be started.
    pub fn terminal(&self, args: &[&str], rows: u16, columns: u16) -> Result<Session> {
        Session::start(self.exec_command(&["--tty"], args), rows, columns)
    }

    /// Runs the probe in the container and returns what it printed as JSON.
    ///
    /// # Errors
    /// If it fails or prints anything else.
    pub fn probe(&self, args: &[&str]) -> Result<Value> {
        let mut all = vec!["/bin/brig-probe"];
        all.extend_from_slice(args);
        json(&self.exec(&all)?.success()?)
    }

    /// Kills a process of the task.
    ///
    /// # Errors
    /// If `ctr task kill` fails.
    pub fn kill(&self, signal: &str, flags: &[&str]) -> Result<()> {
        let mut args = vec!["task", "kill", "--signal", signal];
        args.extend_from_slice(flags);
        args.push(&self.id);
        self.ctr.ok(&args)?;
        Ok(())
    }

    /// Leaves the container to the caller.
    pub fn forget(self) -> String {
        let id = self.id.clone();
        std::mem::forget(self);
        id
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.ctr.remove(&self.id);
    }
}

/// The JSON a probe printed.
///
/// # Errors
/// With the text, if it is none.
pub fn json(outcome: &Outcome) -> Result<Value> {
    let text = outcome.text();
    let line = text
        .lines()
        .find(|line| line.starts_with(['{', '[']))
        .with_context(|| format!("no JSON in '{}'", super::check::clip(&text)))?;
    serde_json::from_str(line).with_context(|| format!("bad JSON '{}'", super::check::clip(line)))
}
