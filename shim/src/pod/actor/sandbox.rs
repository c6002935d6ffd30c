//! The pod as containerd's Sandbox API sees it: made without a sandbox container, it has a life of its own
//! and lasts until it is stopped, whatever becomes of its containers.

use std::time::SystemTime;

use tokio::sync::{oneshot, watch};

use super::handle::{Ask, Message, SandboxCreation};
use super::sandbox_state::{Phase, Sandbox};
use super::{Pod, Stage, Wanted};
use crate::asked::spec::{Limits, Role, Spec};
use crate::error::{Error, Result};
use crate::node::sandbox_files;
use crate::pod::container::{self, Reply};
use crate::pod::process::KILLED;

impl Pod {
    pub(super) async fn sandbox_asked(&mut self, ask: Ask) {
        match ask {
            Ask::Create(creation, reply) => drop(reply.send(self.create_sandbox(*creation))),
            Ask::Start(reply) => self.start_sandbox(reply),
            Ask::Ready(result, reply) => self.sandbox_ready(result, reply),
            Ask::Stop(reply) => self.stop_sandbox(reply).await,
            Ask::State(reply) => {
                let id = self.setup.id.clone();
                let _ = reply.send(self.sandbox().map(|sandbox| sandbox.state(id)));
            }
            Ask::Wait(reply) => {
                let exit = self.sandbox().map(|sandbox| sandbox.exit.subscribe());
                let _ = reply.send(exit);
            }
            Ask::Containers(reply) => {
                let _ = reply.send(self.containers.values().cloned().collect());
            }
        }
    }

    fn sandbox(&self) -> Result<&Sandbox> {
        self.sandbox
            .as_ref()
            .ok_or_else(|| Error::not_found(format!("sandbox {} was not created", self.setup.id)))
    }

    fn create_sandbox(&mut self, creation: SandboxCreation) -> Result<()> {
        let id = &creation.id;
        if *id != self.setup.id {
            let own = &self.setup.id;
            return Err(Error::invalid(format!(
                "this shim is that of sandbox {own}, not of {id}"
            )));
        }
        if self.sandbox.is_some() || !matches!(self.stage, Stage::Empty) {
            return Err(Error::already_exists(format!(
                "sandbox {id} exists already"
            )));
        }
        let SandboxCreation {
            pod,
            network,
            config,
            ..
        } = creation;
        self.setup.journal.pod = pod.name.clone();
        let cgroups_path = pod.cgroups_path(&self.setup.namespace, &self.setup.id);
        let boot = self.boot(Wanted {
            hostname: pod.hostname.clone(),
            sysctls: pod.sysctls()?,
            network,
            limits: Limits {
                memory: pod.memory,
                huge_pages: super::wanted::huge_pages_of_pod(Some(&cgroups_path)),
                cpu_millis: pod.cpu_millis,
                ..Limits::default()
            },
            shm_size: 0,
            cgroup_path: Some(cgroups_path),
            // As CRI sets it for a sandbox container.
            oom_score_adj: -998,
            config,
        });
        self.sandbox = Some(Sandbox {
            boot,
            phase: Phase::Created,
            created_at: SystemTime::now(),
            config: pod,
            exit: watch::Sender::new(None),
        });
        Ok(())
    }

    fn start_sandbox(&mut self, reply: Reply<(u32, SystemTime)>) {
        let id = &self.setup.id;
        let refused = match &self.sandbox {
            None => Some(format!("sandbox {id} must be created before it is started")),
            Some(sandbox) if sandbox.exit.borrow().is_some() => {
                let boot = sandbox.boot.clone();
                let ended = Error::state(format!("sandbox {id} has ended"));
                tokio::spawn(async move {
                    // A VM that did not come up has a better reason.
                    let error = boot.ready().await.err().unwrap_or(ended);
                    let _ = reply.send(Err(error));
                });
                return;
            }
            Some(sandbox) => match sandbox.phase {
                Phase::Created => None,
                Phase::Starting | Phase::Ready => Some(format!("sandbox {id} was started already")),
                Phase::Stopping => Some(format!("sandbox {id} is being stopped")),
            },
        };
        if let Some(refused) = refused {
            let _ = reply.send(Err(Error::state(refused)));
            return;
        }
        if let Some(sandbox) = &mut self.sandbox {
            sandbox.phase = Phase::Starting;
            let (boot, mailbox) = (sandbox.boot.clone(), self.mailbox.clone());
            let (files, config) = (self.setup.state.files(), sandbox.config.clone());
            let written =
                tokio::task::spawn_blocking(move || sandbox_files::write(&files, &config));
            tokio::spawn(async move {
                let ready = boot.ready().await.map(|vm| vm.pid());
                let written = written.await.unwrap_or_else(|error| Err(error.into()));
                let pid = ready.and_then(|pid| written.map(|()| pid));
                let _ = mailbox.send(Message::Sandbox(Ask::Ready(pid, reply))).await;
            });
        }
    }

    fn sandbox_ready(&mut self, result: Result<u32>, reply: Reply<(u32, SystemTime)>) {
        let Some(sandbox) = &mut self.sandbox else {
            return;
        };
        let answer = result.and_then(|pid| {
            if sandbox.phase != Phase::Starting || sandbox.exit.borrow().is_some() {
                let error = format!("sandbox {} has ended", self.setup.id);
                return Err(Error::state(error));
            }
            sandbox.phase = Phase::Ready;
            Ok((pid, sandbox.created_at))
        });
        if answer.is_err() {
            sandbox.ended(KILLED, SystemTime::now());
        }
        let _ = reply.send(answer);
    }

    async fn stop_sandbox(&mut self, reply: oneshot::Sender<()>) {
        let Some(sandbox) = &mut self.sandbox else {
            let _ = reply.send(());
            return;
        };
        sandbox.phase = Phase::Stopping;
        if matches!(self.stage, Stage::Stopped) {
            let _ = reply.send(());
            return;
        }
        let (told, stopped) = oneshot::channel();
        self.waiting.push(told);
        self.stop(std::time::Duration::ZERO).await;
        tokio::spawn(async move {
            let _ = stopped.await;
            let _ = reply.send(());
        });
    }

    /// Gives a container of the sandbox the pod's files.
    pub(super) fn add_files(&self, creation: &mut container::Creation) -> Result<()> {
        if self.sandbox.is_some() && matches!(creation.role, Role::Member(_)) {
            creation.spec_bytes = sandbox_files::mount(
                &self.setup.state.files(),
                &self.setup.id,
                &creation.spec_bytes,
            )?;
            creation.spec = Spec::parse(&creation.spec_bytes)?;
        }
        Ok(())
    }

    /// The VM has ended by itself, or everything of the pod is gone.
    pub(super) fn sandbox_ended(&mut self, at: SystemTime) {
        if let Some(sandbox) = &mut self.sandbox {
            let status = if sandbox.phase == Phase::Stopping {
                0
            } else {
                KILLED
            };
            sandbox.ended(status, at);
        }
    }
}
