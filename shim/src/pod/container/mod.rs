//! One container: an actor that owns its processes and answers every request at once.
//!
//! Whatever takes time (the agent, the VMM, mounts) is done by tasks that report back to the mailbox,
//! so a stuck container blocks neither `kill` nor `stats` nor another container. The mailbox is the
//! only way in, which makes the order of events the order of messages.

mod context;
mod create;
mod creation;
mod devices;
mod exit;
mod messages;
mod privileged;
mod requests;
pub mod sandbox;
mod terminals;
mod work;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use brig_agent_protocol::agent::StatsResponse;
use containerd_shim_protos::api::Mount;
use tokio::sync::{mpsc, oneshot, watch};

use crate::asked::spec::Role;
use crate::error::{Error, Result};
use crate::guest::vm::Vm;
use crate::guest::vm::boot::{Boot, News};
use crate::guest::vm::death::Death;
use crate::guest::vm::patience::Asked;
use crate::node::hooks::ContainerHooks;
use crate::node::stand_in::StandIn;
use crate::pod::events::TaskEvent;
use crate::pod::process::{Exit, Io, Phase, Process};
use crate::pod::stdio::Stdio;
use crate::pod::timeline::CONTAINER_STARTED;
use crate::pod::volume::Leases;
pub use context::Context;
pub use creation::Creation;
use creation::Made;
pub use messages::{Deleted, Listed, ProcessState, Reply, Request};
use work::Begun;

/// Messages that wait for one container; senders wait when it is full.
const MAILBOX: usize = 128;

enum Message {
    Request(Request),
    /// The agent's word about a process.
    Exited {
        exec_id: String,
        exit: Exit,
    },
    /// The agent's word about memory.
    Oom,
    VmEnded(Death),
    /// The init process's output has been delivered, or its time is over.
    Delivered,
    /// The time is over that the guest has for SIGKILL to the init process.
    Doomed,
    // Reports of our own tasks.
    Made(Box<Result<Made>>),
    Started {
        exec_id: String,
        result: Result<Begun>,
        reply: Reply<u32>,
    },
    ExecDeleted {
        exec_id: String,
        reply: Reply<Deleted>,
    },
    InitDeleted {
        reply: Reply<Deleted>,
    },
    Paused {
        paused: bool,
        result: Result<()>,
        reply: Reply<()>,
    },
}

/// The way to a container; cheap to clone.
#[derive(Debug, Clone)]
pub struct ContainerHandle {
    id: String,
    mailbox: mpsc::Sender<Message>,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Message")
    }
}

impl ContainerHandle {
    /// Asks the container and waits for the answer.
    ///
    /// # Errors
    /// The container's, or `NotFound` when it is gone.
    pub async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let gone = || not_found(&self.id, "");
        let message = Message::Request(request(reply));
        self.mailbox.send(message).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Passes on that the agent reported the end of a process.
    pub async fn exited(&self, exec_id: String, exit: Exit) {
        let _ = self.mailbox.send(Message::Exited { exec_id, exit }).await;
    }

    /// Passes on that the guest's kernel killed for memory.
    pub async fn oom(&self) {
        let _ = self.mailbox.send(Message::Oom).await;
    }

    /// Passes on that the VM has ended.
    pub async fn vm_ended(&self, death: Death) {
        let _ = self.mailbox.send(Message::VmEnded(death)).await;
    }
}

/// The error for a container or process nobody knows.
fn not_found(id: &str, exec_id: &str) -> Error {
    if exec_id.is_empty() {
        Error::not_found(format!("container {id} not found"))
    } else {
        Error::not_found(format!("exec {exec_id} of container {id} not found"))
    }
}

/// An exec, or the init process.
struct Member {
    process: Process,
    stdio: Option<Stdio>,
    /// The process's OCI JSON, until an exec is started.
    spec: Vec<u8>,
    /// CloseIO came before the streams were there.
    stdin_closed: bool,
    /// Rows and columns of its terminal, told before the agent knew it.
    size: Option<(u32, u32)>,
    /// The agent knows it.
    in_guest: bool,
    /// Its pid in the guest once it was started, else 0.
    guest_pid: u32,
    deleting: bool,
}

impl Member {
    fn new(io: Io, phase: Phase, spec: Vec<u8>) -> Self {
        Self {
            process: Process::new(io, phase),
            stdio: None,
            spec,
            stdin_closed: false,
            size: None,
            in_guest: false,
            guest_pid: 0,
            deleting: false,
        }
    }

    fn set_stdio(&mut self, mut stdio: Stdio) {
        if self.stdin_closed {
            stdio.close_stdin();
        }
        self.stdio = Some(stdio);
    }
}

/// The actor.
struct Container {
    context: Context,
    id: String,
    bundle: String,
    rootfs: Vec<Mount>,
    mailbox: mpsc::Sender<Message>,
    init: Member,
    execs: HashMap<String, Member>,
    vm: Option<Arc<Vm>>,
    /// A pod by itself, whose network may be set up between Create and Start.
    alone: bool,
    stand_in: Option<StandIn>,
    hooks: Option<Arc<ContainerHooks>>,
    attached: Vec<String>,
    /// Held until the container is gone.
    leases: Leases,
    paused: bool,
    created: Option<Reply<u32>>,
    /// Turned true to abandon a creation.
    cancel: watch::Sender<bool>,
    /// A Delete that came while the container was being created.
    abandoned: Option<Reply<Deleted>>,
    /// The init process's exit, until its output has been delivered.
    held: Option<Exit>,
    /// The init process was sent SIGKILL.
    doomed: bool,
    /// It was said that it has not ended in time.
    overdue: bool,
    stats: Asked<StatsResponse>,
    /// In the guest.
    pids: Asked<Vec<u32>>,
}

/// Whether the actor goes on.
#[derive(PartialEq, Eq)]
enum Next {
    Continue,
    End,
}

/// Starts a container's actor, which creates it and answers `reply`.
pub fn spawn(
    context: Context,
    mut creation: Creation,
    boot: Boot,
    reply: Reply<u32>,
) -> ContainerHandle {
    let (mailbox, messages) = mpsc::channel(MAILBOX);
    let (cancel, cancelled) = watch::channel(false);
    let own_pid = creation.stand_in.as_ref().map(StandIn::pid);
    let hooks = ContainerHooks::of(&creation.spec, &creation.id, &creation.bundle, own_pid);
    let hooks = hooks.map(Arc::new);
    let container = Container {
        hooks: hooks.clone(),
        context: context.clone(),
        id: creation.id.clone(),
        bundle: creation.bundle.display().to_string(),
        rootfs: creation.rootfs.clone(),
        mailbox: mailbox.clone(),
        init: Member::new(creation.io.clone(), Phase::Creating, Vec::new()),
        execs: HashMap::new(),
        vm: None,
        alone: creation.role == Role::Single,
        stand_in: creation.stand_in.take(),
        attached: Vec::new(),
        leases: Leases::default(),
        paused: false,
        created: Some(reply),
        cancel,
        abandoned: None,
        held: None,
        doomed: false,
        overdue: false,
        stats: Asked::new("Stats"),
        pids: Asked::new("ListProcesses"),
    };
    let handle = ContainerHandle {
        id: creation.id.clone(),
        mailbox: mailbox.clone(),
    };
    tokio::spawn(async move {
        let made = create::create(&context, creation, boot, hooks, cancelled).await;
        let _ = mailbox.send(Message::Made(Box::new(made))).await;
    });
    tokio::spawn(container.run(messages));
    handle
}

impl Container {
    async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        while let Some(message) = messages.recv().await {
            if self.handle(message) == Next::End {
                break;
            }
        }
        self.context.doomed.ended(&self.id);
        let _ = self.context.removed.send(self.id);
    }

    /// Never waits: what takes time is spawned.
    fn handle(&mut self, message: Message) -> Next {
        match message {
            Message::Request(request) => self.request(request),
            Message::Exited { exec_id, exit } => self.exited(&exec_id, exit),
            Message::Oom => self.publish(TaskEvent::Oom {
                id: self.id.clone(),
            }),
            Message::VmEnded(death) => self.vm_ended(&death),
            Message::Delivered => self.delivered(),
            Message::Doomed => self.end_doomed(),
            Message::Made(made) => return self.made(*made),
            Message::Started {
                exec_id,
                result,
                reply,
            } => self.started(&exec_id, result, reply),
            Message::ExecDeleted { exec_id, reply } => self.exec_deleted(&exec_id, reply),
            Message::InitDeleted { reply } => {
                self.init_deleted(reply);
                return Next::End;
            }
            Message::Paused {
                paused,
                result,
                reply,
            } => {
                self.paused_now(paused, result, reply);
            }
        }
        Next::Continue
    }

    fn publish(&self, event: TaskEvent) {
        self.context.events.publish(event);
    }

    fn pid(&self) -> u32 {
        let own = self.stand_in.as_ref().map(StandIn::pid);
        let vm = self.vm.as_ref().map(|vm| vm.pid());
        // None before there is a VM.
        vm.map_or(0, |vm| own.unwrap_or(vm))
    }

    fn mark(&self, name: &str) {
        let news = News::Mark(name.to_owned(), SystemTime::now());
        let _ = self.context.news.try_send(news);
    }

    fn member(&mut self, exec_id: &str) -> Result<&mut Member> {
        if exec_id.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs
            .get_mut(exec_id)
            .ok_or_else(|| not_found(&self.id, exec_id))
    }

    /// The VM of a container that has been created.
    fn vm(&self) -> Result<Arc<Vm>> {
        self.vm
            .clone()
            .ok_or_else(|| Error::state(format!("container {} is still being created", self.id)))
    }

    fn made(&mut self, made: Result<Made>) -> Next {
        let reply = self.created.take();
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                self.init.process.lost(SystemTime::now());
                if let Some(reply) = reply {
                    let _ = reply.send(Err(error));
                }
                if let Some(reply) = self.abandoned.take() {
                    let exit = self.init.process.exit();
                    let deleted = exit.map(|exit| Deleted { pid: 0, exit });
                    let _ = reply.send(deleted.ok_or_else(|| not_found(&self.id, "")));
                }
                return Next::End;
            }
        };
        self.init.set_stdio(made.stdio);
        self.init.in_guest = true;
        self.init.process.created();
        self.attached = made.attached;
        self.leases = made.leases;
        self.vm = Some(Arc::clone(&made.vm));
        self.let_hang_up("");
        self.mark("container.created");
        self.publish(TaskEvent::Create {
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            rootfs: self.rootfs.clone(),
            io: self.init.process.io.clone(),
            pid: self.pid(),
        });
        if let Some(reply) = reply {
            let _ = reply.send(Ok(self.pid()));
        }
        // The VM may have ended while the last step was under way; its news came too early for us.
        if let Some(death) = made.vm.death() {
            self.vm_ended(&death);
        }
        if let Some(reply) = self.abandoned.take() {
            self.delete_init(reply);
        }
        Next::Continue
    }

    fn started(&mut self, exec_id: &str, result: Result<Begun>, reply: Reply<u32>) {
        let (id, pid) = (self.id.clone(), self.pid());
        let init = exec_id.is_empty();
        let Ok(member) = self.member(exec_id) else {
            return;
        };
        match result {
            Err(error) => {
                // As a shell tells of a command it could not run.
                let exit = Exit {
                    status: 127,
                    at: SystemTime::now(),
                };
                member.process.start_failed(exit);
                let _ = reply.send(Err(error));
            }
            Ok(begun) => {
                member.guest_pid = begun.guest_pid;
                if let Some(stdio) = begun.stdio {
                    member.set_stdio(stdio);
                }
                member.in_guest = true;
                let size = member.size.take();
                let early = member.process.started();
                if init {
                    self.context.doomed.lives(&id);
                }
                if let Some(error) = begun.vetoed {
                    self.fail_start(error, reply);
                } else {
                    if init {
                        self.mark(CONTAINER_STARTED);
                        self.publish(TaskEvent::Start { id, pid });
                    } else {
                        let exec_id = exec_id.to_owned();
                        self.publish(TaskEvent::ExecStarted { id, exec_id, pid });
                    }
                    let _ = reply.send(Ok(pid));
                }
                // What came while the process was being started.
                self.let_hang_up(exec_id);
                if let (Some(size), Some(vm)) = (size, self.vm.clone()) {
                    let sized = self.size_terminal(vm, exec_id.to_owned(), size);
                    tokio::spawn(async move {
                        let _ = sized.await;
                    });
                }
                if let Some(exit) = early {
                    self.exited(exec_id, exit);
                }
            }
        }
        if let Some(death) = self.vm.as_ref().and_then(|vm| vm.death()) {
            self.vm_ended(&death);
        }
    }

    /// Execs first, as in a container whose init ends.
    fn vm_ended(&mut self, death: &Death) {
        if death.oom && self.init.process.exit().is_none() {
            self.publish(TaskEvent::Oom {
                id: self.id.clone(),
            });
        }
        let mut ended = Vec::new();
        for (exec_id, member) in &mut self.execs {
            // One whose start is under way is told of by the failure of that.
            if member.process.phase() != Phase::Starting
                && let Some(exit) = member.process.lost(death.at)
            {
                ended.push((exec_id.clone(), exit));
            }
        }
        // What the VMM had written before it ended is delivered first, as with any exit.
        let killed = Exit {
            status: crate::pod::process::KILLED,
            at: death.at,
        };
        let init = if self.hold(killed) || self.init.process.phase() == Phase::Starting {
            None
        } else {
            self.init.process.lost(death.at)
        };
        ended.extend(init.map(|exit| (String::new(), exit)));
        for (exec_id, exit) in ended {
            // An exec that never ran has nobody to tell.
            let ran = self.member(&exec_id).is_ok_and(|member| member.in_guest);
            if ran {
                self.tell_exit(&exec_id, exit);
            }
        }
    }

    fn paused_now(&mut self, paused: bool, result: Result<()>, reply: Reply<()>) {
        if result.is_ok() {
            self.paused = paused;
            let id = self.id.clone();
            self.publish(if paused {
                TaskEvent::Paused { id }
            } else {
                TaskEvent::Resumed { id }
            });
        }
        let _ = reply.send(result);
    }

    fn exec_deleted(&mut self, exec_id: &str, reply: Reply<Deleted>) {
        let pid = self.pid();
        let exit = self
            .execs
            .remove(exec_id)
            .and_then(|member| member.process.exit());
        let _ = reply.send(match exit {
            Some(exit) => Ok(Deleted { pid, exit }),
            None => Err(not_found(&self.id, exec_id)),
        });
    }

    fn init_deleted(&mut self, reply: Reply<Deleted>) {
        let at = SystemTime::now();
        for (exec_id, mut member) in std::mem::take(&mut self.execs) {
            // One that was never started has nobody to tell.
            if member.in_guest
                && let Some(exit) = member.process.lost(at)
            {
                self.tell_exit(&exec_id, exit);
            }
        }
        if let Some(exit) = self.init.process.lost(at) {
            self.tell_exit("", exit);
        }
        let exit = self.init.process.exit().unwrap_or(Exit {
            status: crate::pod::process::KILLED,
            at,
        });
        let deleted = Deleted {
            pid: self.pid(),
            exit,
        };
        self.publish(TaskEvent::Delete {
            id: self.id.clone(),
            pid: deleted.pid,
            exit,
        });
        let _ = reply.send(Ok(deleted));
    }
}
