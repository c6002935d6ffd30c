//! The way to the pod's actor: what it can be asked, by containerd's services and by its own tasks.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::{mpsc, oneshot, watch};

use crate::asked::config::Config;
use crate::asked::pod_name::PodName;
use crate::asked::sandbox_config::PodConfig;
use crate::asked::spec::Network;
use crate::error::{Error, Result};
use crate::guest::vm::Vm;
use crate::guest::vm::death::Death;
use crate::node::cgroup::Cgroup;
use crate::pod::container::{ContainerHandle, Creation, Reply};
use crate::pod::process::Exit;
use crate::pod::spans::TraceParent;

/// What containerd asks for when it creates a sandbox.
#[derive(Debug)]
pub struct SandboxCreation {
    /// The sandbox's id.
    pub id: String,
    /// CRI's configuration of the pod.
    pub pod: PodConfig,
    /// The pod's network namespace.
    pub network: Network,
    /// The handler's configuration.
    pub config: Config,
}

/// How a sandbox is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxState {
    /// The sandbox's id.
    pub id: String,
    /// The VMM's pid while it lives, else 0.
    pub pid: u32,
    /// It was started and has not ended.
    pub ready: bool,
    /// When it was created.
    pub created_at: SystemTime,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

/// The pod as it is now.
#[derive(Debug)]
pub struct Inspection {
    /// containerd's namespace.
    pub namespace: String,
    /// The pod's id.
    pub id: String,
    /// Its name in Kubernetes.
    pub pod: Option<PodName>,
    /// `creating`, `starting`, `ready`, `ended`, `stopping` or `stopped`.
    pub state: &'static str,
    /// Since when.
    pub since: SystemTime,
    /// The configuration that its VM has, once it has one.
    pub config: Option<Config>,
    /// Its network namespace.
    pub netns: Option<PathBuf>,
    /// Its cgroup.
    pub cgroup: Option<Cgroup>,
    /// Why it failed, if it has.
    pub failure: Option<Error>,
    /// Its VM, as far as there is one.
    pub vm: Option<Arc<Vm>>,
    /// Its containers by id.
    pub containers: Vec<(String, ContainerHandle)>,
}

/// What a sandbox is asked.
pub(super) enum Ask {
    Create(Box<SandboxCreation>, Reply<()>),
    Start(Reply<(u32, SystemTime)>),
    /// The VM is up, or is not.
    Ready(Result<u32>, Reply<(u32, SystemTime)>),
    Stop(oneshot::Sender<()>),
    State(Reply<SandboxState>),
    Wait(Reply<watch::Receiver<Option<Exit>>>),
    Containers(oneshot::Sender<Vec<ContainerHandle>>),
}

pub(super) enum Message {
    Create {
        creation: Box<Creation>,
        config: Option<Box<Config>>,
        reply: Reply<u32>,
    },
    Find {
        id: String,
        reply: Reply<ContainerHandle>,
    },
    Vm {
        reply: oneshot::Sender<Option<Arc<Vm>>>,
    },
    VmEnded(Death),
    Inspect {
        reply: oneshot::Sender<Inspection>,
    },
    /// A request of the start is part of this trace.
    PartOf(TraceParent),
    /// The container of this id could not be made as it was asked for.
    Refused(String, Error),
    Sandbox(Ask),
    Shutdown {
        end: End,
        reply: oneshot::Sender<bool>,
    },
    Stopped,
}

/// What is to end, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The pod alone, whatever is in it: containerd has yet to hear of its containers' ends.
    Pod,
    /// The pod and the shim, if no container is left.
    IfEmpty,
    /// The pod and the shim, whatever is in it.
    Shim,
    /// As [`Self::Shim`], but the processes that still run get SIGTERM first, and the configured time.
    Gently,
}

/// The way to the pod; cheap to clone.
#[derive(Clone)]
pub struct PodHandle {
    pub(super) mailbox: mpsc::Sender<Message>,
    /// The pod has ended, and its shim is to follow.
    pub(super) over: watch::Receiver<bool>,
}

impl PodHandle {
    /// Creates a container; the first one starts the VM, by the configuration, which the others do without. Returns the VMM's pid.
    ///
    /// # Errors
    /// `AlreadyExists`, and whatever goes wrong.
    pub async fn create(&self, creation: Creation, config: Option<Config>) -> Result<u32> {
        let (reply, answer) = oneshot::channel();
        let message = Message::Create {
            creation: Box::new(creation),
            config: config.map(Box::new),
            reply,
        };
        self.mailbox.send(message).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// The container of this id.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn find(&self, id: &str) -> Result<ContainerHandle> {
        let (reply, answer) = oneshot::channel();
        let id = id.to_owned();
        let message = Message::Find { id, reply };
        self.mailbox.send(message).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// The VM, as far as there is one.
    pub async fn vm(&self) -> Option<Arc<Vm>> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(Message::Vm { reply }).await.ok()?;
        answer.await.ok().flatten()
    }

    /// The pod as it is now.
    ///
    /// # Errors
    /// When the pod has ended.
    pub async fn inspect(&self) -> Result<Inspection> {
        let (reply, answer) = oneshot::channel();
        let message = Message::Inspect { reply };
        self.mailbox.send(message).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    /// Remembers which trace a request of the start is part of.
    pub async fn part_of(&self, trace: TraceParent) {
        let _ = self.mailbox.send(Message::PartOf(trace)).await;
    }

    /// Remembers why a container could not be made, if the pod is of no use without it. The first reason stays.
    pub async fn refused(&self, id: String, error: Error) {
        let _ = self.mailbox.send(Message::Refused(id, error)).await;
    }

    /// Ends the pod when no container remains (or regardless), and then the shim: the VM is stopped and
    /// reaped, and nothing is left on the host, not even the shim's socket. False when containers remain.
    pub async fn shutdown(&self, even_if_busy: bool) -> bool {
        let end = if even_if_busy {
            End::Shim
        } else {
            End::IfEmpty
        };
        self.end(end).await
    }

    /// Ends the pod and the shim as the node shuts down: what still runs gets SIGTERM, and the configured time
    /// for it.
    pub async fn terminate(&self) {
        self.end(End::Gently).await;
    }

    /// Ends the pod, whatever is in it; the shim goes on and answers for it.
    pub async fn stop(&self) {
        self.end(End::Pod).await;
    }

    /// Waits until the pod has ended and its shim is to follow.
    pub async fn over(&self) {
        // An actor that is gone answers nobody any more.
        let _ = self.over.clone().wait_for(|over| *over).await;
    }

    async fn end(&self, end: End) -> bool {
        let (reply, answer) = oneshot::channel();
        let message = Message::Shutdown { end, reply };
        if self.mailbox.send(message).await.is_err() {
            return true;
        }
        answer.await.unwrap_or(true)
    }
}

impl PodHandle {
    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let message = Message::Sandbox(ask(reply));
        self.mailbox.send(message).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    /// Creates the sandbox: its VM starts to boot.
    ///
    /// # Errors
    /// `AlreadyExists` the second time, and what a plan can be refused for.
    pub async fn create_sandbox(&self, creation: SandboxCreation) -> Result<()> {
        let creation = Box::new(creation);
        self.ask(|reply| Ask::Create(creation, reply)).await?
    }

    /// Returns the VMM's pid and the time of creation when the guest can be used.
    ///
    /// # Errors
    /// `FailedPrecondition` before its creation or the second time, and why the VM did not come up.
    pub async fn start_sandbox(&self) -> Result<(u32, SystemTime)> {
        self.ask(Ask::Start).await?
    }

    /// Returns when the VMM is reaped and nothing is left on the host. Repeatable; nothing to stop is no
    /// error.
    ///
    /// # Errors
    /// None but that the actor is gone.
    pub async fn stop_sandbox(&self) -> Result<()> {
        self.ask(Ask::Stop).await
    }

    /// How the sandbox is.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub async fn sandbox_state(&self) -> Result<SandboxState> {
        self.ask(Ask::State).await?
    }

    /// Waits for the sandbox's end.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub async fn wait_sandbox(&self) -> Result<Exit> {
        let mut exit = self.ask(Ask::Wait).await??;
        let exit = exit.wait_for(Option::is_some).await.map_err(|_| gone())?;
        exit.ok_or_else(gone)
    }

    /// All containers of the pod.
    pub async fn containers(&self) -> Vec<ContainerHandle> {
        self.ask(Ask::Containers).await.unwrap_or_default()
    }
}

pub(super) fn gone() -> Error {
    Error::unavailable("the pod has ended")
}
