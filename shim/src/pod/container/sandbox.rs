//! CRI's sandbox container: it stands for the pod, and nothing of it runs. What holds the pod's
//! namespaces is the guest itself, so the pause image is neither mounted nor executed.
//!
//! An actor with the mailbox of a container, so that whoever asks cannot tell the difference: it is
//! created when the VM's process exists, runs when the guest is ready, and killing it ends the pod.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::SystemTime;

use brig_agent_protocol::agent::{StatsResponse, stats_response};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

use super::{ContainerHandle, Listed, Message, ProcessState, Reply, Request};
use super::{Context, Creation, Deleted, MAILBOX, Next, not_found};
use crate::error::{Error, Result};
use crate::guest::vm::Vm;
use crate::guest::vm::boot::Boot;
use crate::pod::events::TaskEvent;
use crate::pod::process::{Exit, KILLED, Phase, Process};

/// What becomes of a pause process that gets one of these; it ignores every other signal.
const ENDINGS: [(i32, u32); 3] = [
    (libc::SIGKILL, KILLED),
    (libc::SIGTERM, 0),
    (libc::SIGINT, 0),
];

/// Ends the pod: done when its VM is reaped and nothing is left on the node.
pub type EndPod = Box<dyn Fn() -> BoxFuture<'static, ()> + Send>;

struct SandboxContainer {
    context: Context,
    id: String,
    bundle: String,
    rootfs: Vec<containerd_shim_protos::api::Mount>,
    mailbox: mpsc::Sender<Message>,
    process: Process,
    pid: u32,
    boot: Boot,
    end_pod: EndPod,
    created: Option<Reply<u32>>,
    /// The status to tell once the pod has ended because we were killed.
    ending: Option<u32>,
}

/// Starts the sandbox container's actor; `reply` is answered when the VM's process exists.
pub fn spawn(
    context: Context,
    creation: Creation,
    boot: Boot,
    end_pod: EndPod,
    reply: Reply<u32>,
) -> ContainerHandle {
    let (mailbox, messages) = mpsc::channel(MAILBOX);
    let sandbox = SandboxContainer {
        context,
        id: creation.id.clone(),
        bundle: creation.bundle.display().to_string(),
        rootfs: creation.rootfs,
        mailbox: mailbox.clone(),
        process: Process::new(creation.io, Phase::Creating),
        pid: 0,
        boot,
        end_pod,
        created: Some(reply),
        ending: None,
    };
    tokio::spawn(sandbox.run(messages));
    ContainerHandle {
        id: creation.id,
        mailbox,
    }
}

/// Those of a process that sleeps: collectors of metrics ask every task, and log each that has none. The
/// pod's own figures are those of its cgroup on the node.
fn pause_figures() -> StatsResponse {
    let unlimited = stats_response::Memory {
        limit: u64::MAX,
        swap_limit: u64::MAX,
        ..stats_response::Memory::default()
    };
    StatsResponse {
        memory: Some(unlimited).into(),
        pids_current: 1,
        pids_limit: u64::MAX,
        ..StatsResponse::default()
    }
}

/// The reason of a VM that ended before the sandbox was started.
async fn why_ended(boot: &Boot, id: &str) -> Error {
    match boot.ready().await {
        Err(error) => error,
        Ok(vm) => vm.death().map_or_else(
            || Error::state(format!("the sandbox {id} has ended")),
            |death| death.error(),
        ),
    }
}

impl SandboxContainer {
    async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        let (launched, early) = self.launching(&mut messages).await;
        if self.launched(launched.map(|vm| vm.pid())) == Next::Continue {
            let mut early = VecDeque::from(early);
            loop {
                let Some(message) = (match early.pop_front() {
                    Some(message) => Some(message),
                    None => messages.recv().await,
                }) else {
                    break;
                };
                if self.handle(message) == Next::End {
                    break;
                }
            }
        }
        let _ = self.context.removed.send(self.id);
    }

    /// Waits for the VM's process, and keeps what is asked meanwhile for later. Only whether the task is there is
    /// answered at once: containerd gives up on that after two seconds and tells who asked for the pid that it is 0, and
    /// kubelet's collector of a pod's network figures believes it for as long as the pod lives.
    async fn launching(
        &mut self,
        messages: &mut mpsc::Receiver<Message>,
    ) -> (Result<Arc<Vm>>, Vec<Message>) {
        let mut early = Vec::new();
        let launched = self.boot.launched();
        tokio::pin!(launched);
        loop {
            tokio::select! {
                launched = &mut launched => return (launched, early),
                Some(message) = messages.recv(), if early.len() < MAILBOX => match message {
                    Message::Request(Request::State { exec_id, reply }) => {
                        let _ = reply.send(Err(not_found(&self.id, &exec_id)));
                    }
                    message => early.push(message),
                },
            }
        }
    }

    fn launched(&mut self, pid: Result<u32>) -> Next {
        let reply = self.created.take();
        let answer = pid.inspect(|&pid| {
            self.pid = pid;
            self.process.created();
            self.publish(TaskEvent::Create {
                id: self.id.clone(),
                bundle: self.bundle.clone(),
                rootfs: self.rootfs.clone(),
                io: self.process.io.clone(),
                pid,
            });
        });
        let next = if answer.is_ok() {
            Next::Continue
        } else {
            Next::End
        };
        if let Some(reply) = reply {
            let _ = reply.send(answer);
        }
        next
    }

    /// Never waits: what takes time is spawned.
    fn handle(&mut self, message: Message) -> Next {
        match message {
            Message::Request(request) => return self.request(request),
            Message::Started { result, reply, .. } => self.started(result.map(drop), reply),
            Message::VmEnded(death) => {
                // A pod that we end is told of when nothing of it is left.
                if self.ending.is_none() {
                    if death.oom && self.process.exit().is_none() {
                        let id = self.id.clone();
                        self.publish(TaskEvent::Oom { id });
                    }
                    self.ended(KILLED, death.at);
                }
            }
            Message::Exited { exit, .. } => self.ended(exit.status, exit.at),
            // Nothing else is ever sent for a sandbox container.
            Message::Oom
            | Message::Delivered
            | Message::Doomed
            | Message::Made(_)
            | Message::ExecDeleted { .. }
            | Message::InitDeleted { .. }
            | Message::Paused { .. } => {}
        }
        Next::Continue
    }

    fn request(&mut self, request: Request) -> Next {
        match request {
            Request::Delete { exec_id, reply } if exec_id.is_empty() => {
                return self.delete(reply);
            }
            Request::State { exec_id, reply } => {
                let state = self.init(&exec_id).map(|()| ProcessState {
                    bundle: self.bundle.clone(),
                    pid: self.pid,
                    phase: self.process.phase(),
                    paused: false,
                    io: self.process.io.clone(),
                });
                let _ = reply.send(state);
            }
            Request::Wait { exec_id, reply } => {
                let waiter = self.init(&exec_id).map(|()| {
                    let (waiter, exit) = oneshot::channel();
                    self.process.wait(waiter);
                    exit
                });
                let _ = reply.send(waiter);
            }
            Request::Start { exec_id, reply } => match self.init(&exec_id) {
                Ok(()) => self.start(reply),
                Err(error) => drop(reply.send(Err(error))),
            },
            Request::Kill {
                exec_id,
                signal,
                reply,
                ..
            } => {
                let killed = self.init(&exec_id).and_then(|()| self.kill(signal));
                let _ = reply.send(killed);
            }
            Request::CloseStdin { exec_id, reply } => drop(reply.send(self.init(&exec_id))),
            Request::Pids { reply } => {
                let listed = Listed {
                    pid: self.pid,
                    exec_id: None,
                };
                let _ = reply.send(Ok(vec![listed]));
            }
            Request::Delete { exec_id, reply } => {
                let _ = reply.send(Err(not_found(&self.id, &exec_id)));
            }
            Request::Exec { reply, .. }
            | Request::ResizePty { reply, .. }
            | Request::Pause { reply }
            | Request::Resume { reply }
            | Request::Update { reply, .. } => {
                let _ = reply.send(Err(self.nothing_runs()));
            }
            Request::Stats { reply } => drop(reply.send(Ok(pause_figures()))),
        }
        Next::Continue
    }

    fn nothing_runs(&self) -> Error {
        Error::unimplemented(format!(
            "nothing runs in the sandbox container {}: its pod has a kernel of its own; ask one of the \
             pod's containers",
            self.id
        ))
    }

    /// There is no process but the first.
    fn init(&self, exec_id: &str) -> Result<()> {
        if exec_id.is_empty() {
            Ok(())
        } else {
            Err(not_found(&self.id, exec_id))
        }
    }

    fn start(&mut self, reply: Reply<u32>) {
        if self.process.exit().is_some() {
            let (boot, id) = (self.boot.clone(), self.id.clone());
            tokio::spawn(async move {
                let _ = reply.send(Err(why_ended(&boot, &id).await));
            });
            return;
        }
        if self.ending.is_some() || !self.process.begin_start() {
            let error = format!("the sandbox {} was started already", self.id);
            let _ = reply.send(Err(Error::state(error)));
            return;
        }
        let (boot, mailbox) = (self.boot.clone(), self.mailbox.clone());
        tokio::spawn(async move {
            let ready = boot.ready().await;
            let result = ready.map(|_| super::work::Begun {
                stdio: None,
                guest_pid: 0,
                vetoed: None,
            });
            let exec_id = String::new();
            let _ = mailbox
                .send(Message::Started {
                    exec_id,
                    result,
                    reply,
                })
                .await;
        });
    }

    fn started(&mut self, result: Result<()>, reply: Reply<u32>) {
        match result {
            // The VM may have ended meanwhile, and its end been told.
            Ok(()) if self.process.exit().is_some() => {
                let _ = reply.send(Err(Error::state(format!(
                    "the sandbox {} has ended",
                    self.id
                ))));
            }
            Ok(()) => {
                let early = self.process.started();
                self.publish(TaskEvent::Start {
                    id: self.id.clone(),
                    pid: self.pid,
                });
                let _ = reply.send(Ok(self.pid));
                if let Some(exit) = early {
                    self.ended(exit.status, exit.at);
                }
            }
            Err(error) => {
                self.process.start_failed(Exit {
                    status: KILLED,
                    at: SystemTime::now(),
                });
                let _ = reply.send(Err(error));
            }
        }
    }

    fn kill(&mut self, signal: u32) -> Result<()> {
        if self.process.exit().is_some() {
            return Err(Error::not_found(format!(
                "process {} already finished",
                self.id
            )));
        }
        let ending = ENDINGS
            .iter()
            .find(|(number, _)| u32::try_from(*number) == Ok(signal));
        let Some(&(_, status)) = ending else {
            return Ok(());
        };
        if self.ending.replace(status).is_none() {
            let (ended, mailbox) = ((self.end_pod)(), self.mailbox.clone());
            tokio::spawn(async move {
                ended.await;
                let exit = Exit {
                    status,
                    at: SystemTime::now(),
                };
                let exec_id = String::new();
                let _ = mailbox.send(Message::Exited { exec_id, exit }).await;
            });
        }
        Ok(())
    }

    fn ended(&mut self, status: u32, at: SystemTime) {
        if let Some(exit) = self.process.exited(Exit { status, at }) {
            self.publish(TaskEvent::Exit {
                id: self.id.clone(),
                process: self.id.clone(),
                pid: self.pid,
                exit,
            });
        }
    }

    fn delete(&mut self, reply: Reply<Deleted>) -> Next {
        let exit = match self.process.phase() {
            Phase::Stopped(exit) => exit,
            // Never started: as runc does, it is killed with its deletion.
            Phase::Created => {
                self.ended(KILLED, SystemTime::now());
                Exit {
                    status: KILLED,
                    at: SystemTime::now(),
                }
            }
            Phase::Creating | Phase::Starting | Phase::Running => {
                let _ = reply.send(Err(Error::state(format!(
                    "the sandbox {} is still running",
                    self.id
                ))));
                return Next::Continue;
            }
        };
        let deleted = Deleted {
            pid: self.pid,
            exit,
        };
        self.publish(TaskEvent::Delete {
            id: self.id.clone(),
            pid: self.pid,
            exit,
        });
        let _ = reply.send(Ok(deleted));
        Next::End
    }

    fn publish(&self, event: TaskEvent) {
        self.context.events.publish(event);
    }
}
