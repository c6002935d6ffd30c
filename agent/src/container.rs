//! One container: a task that owns its state and answers commands (DESIGN 2.8).
//!
//! Whatever can take long (preparing and starting processes, freezing, the removal) runs in tasks of
//! its own that report back, so that a container can be killed while a helper hangs on a slow share.
mod execs;

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use brig_agent_protocol::agent;
use tokio::sync::mpsc;

use crate::{
    cgroup::{self, Cgroup, stats, watch::Watch},
    command::{Command, Mailbox},
    context::Context,
    control::{Instructions, Terminal},
    error::{Error, Result},
    events::exit_message,
    exec_defaults::ExecDefaults,
    freezer::Freezer,
    given::Disks,
    huge_pages::Reservation,
    launch::Prepared,
    process::{Phase, Process, Reply},
    reaper::Exit,
    spec::{self, IdMapping, Seccomp},
    stdio::{ChildEnds, HostStreams, Pumps, Running},
    submounts::Entered,
};

/// How long the end of a container may wait for the ends of its killed execs. Shorter than what the host gives a
/// container that it has killed.
const LAST_EXIT_TIME: Duration = Duration::from_secs(10);

/// What a container is made of, besides its processes.
pub struct Parts {
    /// Its id.
    pub id: String,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// The directory its root is mounted on, in its own namespace.
    pub dir: PathBuf,
    /// The profile for each of its processes.
    pub seccomp: Option<Seccomp>,
    /// What its execs have from it.
    pub exec_defaults: ExecDefaults,
    /// The maps of its user namespace; empty without one.
    pub uid_mappings: Vec<IdMapping>,
    /// See `uid_mappings`.
    pub gid_mappings: Vec<IdMapping>,
    /// It has a time namespace of its own.
    pub time_namespace: bool,
    /// Its disks.
    pub disks: Disks,
    /// What it may use of the guest's huge pages, held as long as it is there.
    pub _huge_pages: Option<Reservation>,
    /// The share's volumes that it mounts.
    pub volumes: Option<Entered>,
}

/// The state that the task owns.
pub struct Container {
    parts: Parts,
    context: Arc<Context>,
    mailbox: Mailbox,
    init: Process,
    execs: HashMap<String, Process>,
    freezer: Freezer,
    /// The removal is under way.
    removing: bool,
    oom_kills: u64,
    /// The exit of init, while processes that it has left behind are dying: theirs are told before.
    last_exit: Option<Exit>,
    /// Counts processes: the id of an exec that failed may be used again at once.
    serial: u64,
    /// Who waits for the removal of a container that was never started.
    deletion: Option<Reply<agent::ProcessExited>>,
}

impl Container {
    /// A container whose init process waits for its start.
    pub fn new(parts: Parts, context: Arc<Context>, mailbox: Mailbox, init: Process) -> Self {
        let freezer = Freezer::spawn(parts.id.clone(), parts.cgroup.path().to_owned());
        Self {
            parts,
            context,
            mailbox,
            init,
            execs: HashMap::new(),
            freezer,
            removing: false,
            oom_kills: 0,
            last_exit: None,
            serial: 0,
            deletion: None,
        }
    }

    /// Answers commands until the container is removed.
    pub async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let watcher = self.watch_memory();
        while let Some(command) = commands.recv().await {
            if self.handle(command) {
                break;
            }
        }
        if let Some(watcher) = watcher {
            watcher.abort();
        }
        self.context.forget(&self.parts.id);
    }

    fn watch_memory(&self) -> Option<tokio::task::JoinHandle<()>> {
        // A kernel without the memory controller has no such file and kills nobody for a limit.
        let watch = Watch::new(&self.parts.cgroup.path().join("memory.events")).ok()?;
        let mailbox = self.mailbox.clone();
        Some(tokio::spawn(async move {
            while watch.changed().await.is_ok() && mailbox.send(Command::MemoryEvent).is_ok() {}
        }))
    }

    /// Does one command; `true` when the container is gone.
    fn handle(&mut self, command: Command) -> bool {
        match command {
            Command::CreateExec {
                exec_id,
                process,
                stdio,
                reply,
            } => self.create_exec(exec_id, *process, stdio, reply),
            Command::Prepared {
                exec_id,
                result,
                reply,
            } => self.prepared(&exec_id, result, reply),
            Command::Start { exec_id, reply } => self.start(exec_id, reply),
            Command::Started { exec_id, result } => self.started(&exec_id, result),
            Command::Exited {
                exec_id,
                serial,
                exit,
            } => self.exited(&exec_id, serial, exit),
            Command::Signal {
                exec_id,
                signal,
                all,
                reply,
            } => match all {
                true if signal != libc::SIGKILL => self.freezer.signal_all(signal, reply),
                true => drop(reply.send(self.parts.cgroup.kill())),
                false => drop(reply.send(self.signal(&exec_id, signal))),
            },
            Command::Resize {
                exec_id,
                rows,
                columns,
                reply,
            } => {
                let _ = reply.send(
                    self.process(&exec_id)
                        .and_then(|p| p.stdio.resize(rows, columns)),
                );
            }
            Command::CloseStdin { exec_id, reply } => {
                let _ = reply.send(self.process(&exec_id).map(|p| p.stdio.close_stdin()));
            }
            Command::Delete { exec_id, reply } => self.delete(&exec_id, reply),
            Command::List { reply } => {
                let _ = reply.send(cgroup::processes(self.parts.cgroup.path()));
            }
            Command::Freeze { frozen, reply } => self.freeze(frozen, reply),
            Command::Update {
                mut resources,
                reply,
            } => {
                self.parts.disks.translate(&mut resources);
                self.parts.cgroup.update(*resources, reply);
            }
            Command::PidNamespace { reply } => {
                let _ = reply.send(self.living_init().map(|(_, pidfd)| pidfd));
            }
            Command::Stats { reply } => {
                let _ = reply.send(Ok(stats::read(self.parts.cgroup.path())));
            }
            Command::LastExit => self.tell_last_exit(),
            Command::MemoryEvent => self.report_oom(),
            Command::Revoke { nodes } => {
                if self.parts.disks.revoke(&nodes)
                    && let Err(error) = self.parts.cgroup.revoke(&nodes)
                {
                    slog::warn!(self.context.logger, "a container keeps the rule of a device that has gone";
                        "container" => &self.parts.id, "error" => %error);
                }
            }
            Command::Removed {
                exit,
                result,
                reply,
            } => return self.removed(exit, result, reply),
        }
        false
    }

    fn process(&mut self, exec_id: &str) -> Result<&mut Process> {
        if exec_id.is_empty() {
            return Ok(&mut self.init);
        }
        let id = &self.parts.id;
        self.execs
            .get_mut(exec_id)
            .ok_or_else(|| Error::NotFound(format!("container {id} has no exec process {exec_id}")))
    }

    /// Pid and pidfd of init, whose namespaces are the container's from its creation on.
    fn living_init(&self) -> Result<(i32, OwnedFd)> {
        let identity = match self.init.phase {
            Phase::Created(_) | Phase::Running => self.init.identity()?,
            _ => None,
        };
        let id = &self.parts.id;
        identity.ok_or_else(|| Error::FailedPrecondition(format!("container {id} is not running")))
    }

    fn start(&mut self, exec_id: String, reply: Reply<u32>) {
        let id = self.parts.id.clone();
        let mailbox = self.mailbox.clone();
        let process = match self.process(&exec_id) {
            Ok(process) => process,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        // The phase is taken out and put back unless it is the one that can start.
        match std::mem::replace(&mut process.phase, Phase::Preparing) {
            Phase::Created(prepared) => {
                process.phase = Phase::Starting { reply, early: None };
                tokio::spawn(async move {
                    let result = prepared.go().await;
                    let _ = mailbox.send(Command::Started { exec_id, result });
                });
            }
            other => {
                process.phase = other;
                let _ = reply.send(Err(Error::FailedPrecondition(format!(
                    "process {exec_id:?} of container {id} is not in the state \"created\""
                ))));
            }
        }
    }

    fn started(&mut self, exec_id: &str, result: Result<()>) {
        let Ok(process) = self.process(exec_id) else {
            return;
        };
        let Phase::Starting { reply, early } =
            std::mem::replace(&mut process.phase, Phase::Running)
        else {
            return;
        };
        let pid = process.pid();
        match (result, early) {
            (Ok(()), None) => {
                let _ = reply.send(Ok(pid));
            }
            (Ok(()), Some(exit)) => {
                let serial = process.serial;
                let _ = reply.send(Ok(pid));
                self.exited(exec_id, serial, exit);
            }
            // Not an exit of the program: it never ran, and the caller gets the reason.
            (Err(error), early) => {
                let _ = process.signal(libc::SIGKILL);
                process.owed = None;
                process.phase = Phase::Stopped(early.unwrap_or(Exit {
                    status: 255,
                    at: SystemTime::now(),
                }));
                let _ = reply.send(Err(error));
                self.end_if_last();
            }
        }
    }

    fn exited(&mut self, exec_id: &str, serial: u64, exit: Exit) {
        let (context, id) = (Arc::clone(&self.context), self.parts.id.clone());
        let is_init = exec_id.is_empty();
        let Some(process) = self.process(exec_id).ok().filter(|p| p.serial == serial) else {
            return;
        };
        match &mut process.phase {
            Phase::Starting { early, .. } => {
                *early = Some(exit);
                return;
            }
            // One that failed to start was reported as that; keep its real status.
            Phase::Stopped(earlier) => {
                *earlier = exit;
                return;
            }
            _ => {}
        }
        process.phase = Phase::Stopped(exit);
        let pid = process.pid();
        if is_init {
            // The reason comes before the exit, as consumers of the events expect.
            self.report_oom();
            // Without a pid namespace of its own, what it left behind still runs.
            let _ = self.parts.cgroup.kill();
        }
        // The shim tells of the end too, at the level of what it is of.
        slog::debug!(context.logger, "process exited"; "container" => &id, "exec" => exec_id, "pid" => pid, "status" => exit.status);
        if !is_init {
            if let Ok(process) = self.process(exec_id) {
                process.tell(&id, exec_id, exit);
            }
            return self.end_if_last();
        }
        if let Some(reply) = self.deletion.take() {
            return self.remove(exit, reply);
        }
        self.last_exit = Some(exit);
        self.end_if_last();
        if self.last_exit.is_none() {
            return;
        }
        // One that cannot be killed does not hide the end of the container for ever.
        let mailbox = self.mailbox.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LAST_EXIT_TIME).await;
            let _ = mailbox.send(Command::LastExit);
        });
    }

    /// Tells the exit of init when no exec has still to end. None has, once init has ended, in a pid namespace of the
    /// container's own.
    fn end_if_last(&mut self) {
        let ended =
            |process: &Process| matches!(process.phase, Phase::Preparing | Phase::Stopped(_));
        if self.execs.values().all(ended) {
            self.tell_last_exit();
        }
    }

    /// The exit of init is the last one of its container, as with runc's shim: clients forget the container with it.
    fn tell_last_exit(&mut self) {
        if let Some(exit) = self.last_exit.take() {
            self.init.tell(&self.parts.id, "", exit);
        }
    }

    fn report_oom(&mut self) {
        let kills = stats::oom_kills(self.parts.cgroup.path());
        if kills > self.oom_kills {
            self.oom_kills = kills;
            let sender = self.init.owed.clone();
            if let Some(sender) = sender.or_else(|| self.context.events.sender()) {
                sender.oom(&self.parts.id);
            }
        }
    }

    fn signal(&mut self, exec_id: &str, signal: i32) -> Result<()> {
        self.process(exec_id)?.signal(signal)
    }

    fn freeze(&self, frozen: bool, reply: Reply<()>) {
        if frozen && !matches!(self.init.phase, Phase::Running) {
            let id = &self.parts.id;
            let _ = reply.send(Err(Error::FailedPrecondition(format!(
                "container {id} is not running"
            ))));
            return;
        }
        self.freezer.freeze(frozen, reply);
    }

    fn delete(&mut self, exec_id: &str, reply: Reply<agent::ProcessExited>) {
        let id = self.parts.id.clone();
        let process = match self.process(exec_id) {
            Ok(process) => process,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let outcome = match &process.phase {
            Phase::Stopped(exit) => Ok(*exit),
            Phase::Created(_) => {
                let killed = process.signal(libc::SIGKILL);
                if exec_id.is_empty() {
                    // Answered by its exit, unless that is on its way already.
                    self.deletion = Some(reply);
                    return;
                }
                killed.map(|()| Exit {
                    status: 137,
                    at: SystemTime::now(),
                })
            }
            _ => Err(Error::FailedPrecondition(format!(
                "process {exec_id:?} of container {id} has not stopped; kill it first"
            ))),
        };
        let pid = process.pid();
        let outcome = match outcome {
            Ok(exit) if exec_id.is_empty() => return self.remove(exit, reply),
            Ok(exit) => {
                self.execs.remove(exec_id);
                self.end_if_last();
                Ok(exit_message(pid, exit))
            }
            Err(error) => Err(error),
        };
        let _ = reply.send(outcome);
    }

    /// Takes away everything outside the processes.
    fn remove(&mut self, exit: Exit, reply: Reply<agent::ProcessExited>) {
        if std::mem::replace(&mut self.removing, true) {
            let id = &self.parts.id;
            let error = format!("container {id} is being deleted already");
            return drop(reply.send(Err(Error::FailedPrecondition(error))));
        }
        self.tell_last_exit();
        let (cgroup, mailbox) = (self.parts.cgroup.path().to_owned(), self.mailbox.clone());
        let volumes = self.parts.volumes.take();
        tokio::spawn(async move {
            let result = cgroup::remove(&cgroup).await;
            if let Some(volumes) = volumes {
                volumes.leave().await;
            }
            let _ = mailbox.send(Command::Removed {
                exit,
                result,
                reply,
            });
        });
    }

    /// `true` when the container is gone.
    fn removed(
        &mut self,
        exit: Exit,
        result: Result<()>,
        reply: Reply<agent::ProcessExited>,
    ) -> bool {
        self.removing = false;
        let gone = result.is_ok();
        if gone {
            if let Err(error) = std::fs::remove_dir_all(&self.parts.dir) {
                slog::warn!(self.context.logger, "container directory stays"; "container" => &self.parts.id, "error" => %error);
            }
            // Before the answer: the same id may be created again as soon as it is out.
            self.context.forget(&self.parts.id);
        }
        let _ = reply.send(result.map(|()| exit_message(self.init.pid(), exit)));
        gone
    }
}

/// The terminal that the streams ask for, as large as they say or else the specification.
pub fn terminal_of(stdio: &agent::Stdio, process: &spec::Process) -> Option<Terminal> {
    let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    let (rows, columns) = match (stdio.rows, stdio.columns) {
        (0, 0) => {
            let wanted = process.console_size.unwrap_or_default();
            (wanted.height, wanted.width)
        }
        asked => asked,
    };
    stdio.terminal.then(|| Terminal {
        rows: size(rows),
        columns: size(columns),
    })
}

/// Connects the streams, runs the helper to the point where the process waits for its start, and
/// lets its stdio flow.
///
/// # Errors
/// Those of the streams and of the helper.
pub async fn prepare(
    context: &Context,
    (instructions, joined): (&Instructions, Option<&OwnedFd>),
    stdio: &agent::Stdio,
    mailbox: &Mailbox,
    (exec_id, serial): (&str, u64),
) -> Result<Process> {
    let host = HostStreams::connect(&context.streams, stdio).await?;
    let (pumps, ends) = if stdio.terminal {
        (Pumps::for_terminal(host), ChildEnds::null())
    } else {
        Pumps::with_pipes(host)?
    };
    let (mailbox, exec_id) = (mailbox.clone(), exec_id.to_owned());
    let on_exit = move |exit| {
        let _ = mailbox.send(Command::Exited {
            exec_id,
            serial,
            exit,
        });
    };
    let mut prepared: Prepared = context
        .launcher
        .prepare(instructions, joined, ends, on_exit)
        .await?;
    if let (Instructions::Create(create), Some(directory)) = (instructions, prepared.devices.take())
    {
        context.device_nodes.follow(&create.id, directory);
    }
    let stdio: Running = pumps.start(prepared.terminal.take())?;
    let done = stdio.output_done();
    context.outputs.spawn(done);
    Process::created(serial, prepared, stdio, context.events.sender())
}
