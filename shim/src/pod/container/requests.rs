//! What each request of containerd does to a container: check the state, answer, or spawn the work.

use std::collections::HashMap;
use std::sync::Arc;

use brig_agent_protocol::MAX_LISTED;
use brig_agent_protocol::agent::{ContainerRef, SignalRequest, UpdateRequest};
use slog::warn;
use tokio::sync::oneshot;
use ttrpc::context;

use super::{Container, Deleted, Listed, Member, Message, ProcessState, Reply, Request, work};
use crate::asked::spec::check_process;
use crate::error::{Error, Kind, Result};
use crate::guest::vm::Vm;
use crate::pod::events::TaskEvent;
use crate::pod::process::{Exit, Io, Phase};

/// Signal numbers of Linux.
const SIGNALS: std::ops::RangeInclusive<u32> = 1..=64;

impl Container {
    pub(super) fn request(&mut self, request: Request) {
        match request {
            Request::State { exec_id, reply } => {
                let _ = reply.send(self.state(&exec_id));
            }
            Request::Wait { exec_id, reply } => {
                let _ = reply.send(self.wait(&exec_id));
            }
            Request::Start { exec_id, reply } => self.start(exec_id, reply),
            Request::Delete { exec_id, reply } if exec_id.is_empty() => self.delete_init(reply),
            Request::Delete { exec_id, reply } => self.delete_exec(exec_id, reply),
            Request::Kill {
                exec_id,
                signal,
                all,
                reply,
            } => self.kill(exec_id, signal, all, reply),
            Request::Exec {
                exec_id,
                io,
                process,
                reply,
            } => {
                let _ = reply.send(self.exec(exec_id, io, process));
            }
            Request::ResizePty {
                exec_id,
                rows,
                columns,
                reply,
            } => {
                self.resize(exec_id, rows, columns, reply);
            }
            Request::CloseStdin { exec_id, reply } => {
                let _ = reply.send(self.close_stdin(&exec_id));
            }
            Request::Pause { reply } => self.pause(true, reply),
            Request::Resume { reply } => self.pause(false, reply),
            Request::Update { resources, reply } => self.update(resources, reply),
            Request::Stats { reply } => self.stats(reply),
            Request::Pids { reply } => self.pids(reply),
        }
    }

    fn state(&mut self, exec_id: &str) -> Result<ProcessState> {
        let (bundle, pid, paused) = (self.bundle.clone(), self.pid(), self.paused);
        let member = self.member(exec_id)?;
        Ok(ProcessState {
            bundle,
            pid,
            phase: member.process.phase(),
            paused,
            io: member.process.io.clone(),
        })
    }

    fn wait(&mut self, exec_id: &str) -> Result<oneshot::Receiver<Exit>> {
        let member = self.member(exec_id)?;
        let (waiter, exit) = oneshot::channel();
        member.process.wait(waiter);
        Ok(exit)
    }

    fn start(&mut self, exec_id: String, reply: Reply<u32>) {
        let vm = match self.startable(&exec_id) {
            Ok(vm) => vm,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let (mailbox, context, id) = (self.mailbox.clone(), self.context.clone(), self.id.clone());
        let exec = self.execs.get_mut(&exec_id).map(|member| work::Asked {
            io: member.process.io.clone(),
            spec: std::mem::take(&mut member.spec),
            size: member.size.take(),
        });
        let (alone, hooks) = (self.alone, self.hooks.clone());
        tokio::spawn(async move {
            let init = exec.is_none();
            let mut result = match exec {
                None if alone => work::start_alone(&context, &vm, &id).await,
                None => work::start_init(&context, &vm, &id).await,
                Some(asked) => work::start_exec(&context, &vm, &id, &exec_id, asked).await,
            };
            if let (true, Ok(begun)) = (init, &mut result) {
                begun.vetoed = work::poststart(&vm, &id, hooks).await;
            }
            let _ = mailbox
                .send(Message::Started {
                    exec_id,
                    result,
                    reply,
                })
                .await;
        });
    }

    /// Begins the start of a process, if its state and the container's allow it.
    fn startable(&mut self, exec_id: &str) -> Result<Arc<Vm>> {
        let vm = self.vm()?;
        if !exec_id.is_empty() {
            self.takes_execs()?;
            if self.paused {
                return Err(Error::state(format!("container {} is paused", self.id)));
            }
        }
        if let Some(death) = vm.death() {
            return Err(death.error());
        }
        let id = self.id.clone();
        let member = self.member(exec_id)?;
        if member.deleting || !member.process.begin_start() {
            let what = match member.process.phase() {
                Phase::Stopped(_) => "has ended",
                _ => "was started already",
            };
            let name = if exec_id.is_empty() { &id } else { exec_id };
            return Err(Error::state(format!("process {name} {what}")));
        }
        Ok(vm)
    }

    /// An exec may run in a container from its creation on, as with runc.
    fn takes_execs(&self) -> Result<()> {
        match self.init.process.phase() {
            Phase::Created | Phase::Running => Ok(()),
            _ => Err(Error::state(format!(
                "container {} is not running",
                self.id
            ))),
        }
    }

    fn exec(&mut self, exec_id: String, io: Io, process: Vec<u8>) -> Result<()> {
        if exec_id.is_empty() {
            return Err(Error::invalid("an exec needs an id"));
        }
        if exec_id == self.id || self.execs.contains_key(&exec_id) {
            return Err(Error::already_exists(format!(
                "exec {exec_id} exists already"
            )));
        }
        self.takes_execs()?;
        check_process(&process).map_err(|error| {
            Error::invalid(format!("the process of exec {exec_id}: {}", error.message))
        })?;
        let member = Member::new(io, Phase::Created, process);
        self.execs.insert(exec_id.clone(), member);
        self.publish(TaskEvent::ExecAdded {
            id: self.id.clone(),
            exec_id,
        });
        Ok(())
    }

    fn kill(&mut self, exec_id: String, signal: u32, all: bool, reply: Reply<()>) {
        let allowed = self.killable(&exec_id, signal);
        let vm = match allowed {
            Ok(Some(vm)) => vm,
            Ok(None) => {
                let _ = reply.send(Ok(()));
                return;
            }
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let request = SignalRequest {
            id: self.id.clone(),
            all: all && exec_id.is_empty(),
            exec_id,
            signal,
            ..SignalRequest::default()
        };
        let deadly = request.exec_id.is_empty() && signal == libc::SIGKILL.unsigned_abs();
        if deadly {
            self.doom(&vm);
        }
        tokio::spawn(async move {
            let _ = reply.send(match vm.signal(request).await {
                // It will end all the same.
                Err(error) if deadly && error.kind == Kind::ResourceExhausted => Ok(()),
                sent => sent,
            });
        });
    }

    /// SIGKILL cannot be ignored: a guest that does not carry it out in time is ended itself, once nobody of the pod is to live on.
    pub(super) fn doom(&mut self, vm: &Arc<Vm>) {
        self.context.doomed.was_killed(&self.id);
        if !std::mem::replace(&mut self.doomed, true) {
            self.give_time(vm);
        }
    }

    fn give_time(&self, vm: &Arc<Vm>) {
        let (mailbox, vm) = (self.mailbox.clone(), Arc::clone(vm));
        tokio::spawn(async move {
            // Of one that has ended meanwhile it is no news.
            let ended = vm.while_disks_get_on(vm.timeouts().ping, vm.ended());
            if ended.await.is_none() {
                let _ = mailbox.send(Message::Doomed).await;
            }
        });
    }

    /// The time of a container that was killed is over.
    pub(super) fn end_doomed(&mut self) {
        let over = matches!(self.init.process.phase(), Phase::Stopped(_)) || self.held.is_some();
        if let (false, Some(vm)) = (over, self.vm.clone()) {
            let seconds = vm.timeouts().ping.as_secs_f64();
            if !self.context.doomed.is_all() {
                if !std::mem::replace(&mut self.overdue, true) {
                    warn!(self.context.logger, "a container has not ended, and the others of its pod go on: a volume that does not answer holds \
                        who waits for it"; "container" => &self.id, "seconds_since_sigkill" => seconds);
                }
                self.give_time(&vm);
                return;
            }
            let reason = format!(
                "the guest did not end container {} within {seconds:.0} s of SIGKILL, and the VM was stopped",
                self.id
            );
            warn!(self.context.logger, "the VM is stopped"; "reason" => &reason);
            vm.end(reason);
        }
    }

    /// The VM to ask, or none when there is nothing in the guest yet to be signalled.
    fn killable(&mut self, exec_id: &str, signal: u32) -> Result<Option<Arc<Vm>>> {
        if !SIGNALS.contains(&signal) {
            return Err(Error::invalid(format!("{signal} is not a signal's number")));
        }
        let vm = self.vm()?;
        let id = self.id.clone();
        let member = self.member(exec_id)?;
        let finished = || {
            Error::not_found(format!(
                "process {} already finished",
                if exec_id.is_empty() { &id } else { exec_id }
            ))
        };
        match member.process.phase() {
            Phase::Stopped(_) => Err(finished()),
            // Its exit is told when its output has been delivered.
            Phase::Running if vm.death().is_some() => Err(finished()),
            Phase::Created if !member.in_guest => {
                Err(Error::state(format!("exec {exec_id} was not started")))
            }
            _ => Ok(Some(vm)),
        }
    }

    fn pause(&mut self, paused: bool, reply: Reply<()>) {
        let running = self.init.process.phase() == Phase::Running;
        let vm = match self.vm() {
            Ok(vm) if running && self.paused != paused => vm,
            Ok(_) => {
                let what = if !running {
                    "is not running"
                } else if paused {
                    "is paused already"
                } else {
                    "is not paused"
                };
                let _ = reply.send(Err(Error::state(format!("container {} {what}", self.id))));
                return;
            }
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let mailbox = self.mailbox.clone();
        let request = self.reference();
        tokio::spawn(async move {
            let context = context::Context::default();
            let result = if paused {
                vm.call(
                    "PauseContainer",
                    vm.agent().pause_container(context, &request),
                )
                .await
            } else {
                vm.call(
                    "ResumeContainer",
                    vm.agent().resume_container(context, &request),
                )
                .await
            };
            let result = result.map(drop);
            let _ = mailbox
                .send(Message::Paused {
                    paused,
                    result,
                    reply,
                })
                .await;
        });
    }

    fn update(&mut self, resources: Vec<u8>, reply: Reply<()>) {
        let vm = match self.in_life() {
            Ok(vm) => vm,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let request = UpdateRequest {
            id: self.id.clone(),
            resources,
            ..UpdateRequest::default()
        };
        let context = self.context.clone();
        tokio::spawn(async move {
            let apply = async {
                let (id, resources) = (&request.id, &request.resources);
                let limits = &context.node_limits;
                let on_node = limits.update(id, resources, &context.logger).await?;
                let answer = vm
                    .agent()
                    .update_container(context::Context::default(), &request);
                let applied = vm.call("UpdateContainer", answer).await.map(drop);
                if applied.is_err() {
                    on_node.undo().await;
                }
                applied
            };
            let (id, resources) = (&request.id, &request.resources);
            let size = &context.size;
            let updated = size.update(id, resources, &vm, &context.logger, apply);
            let _ = reply.send(updated.await);
        });
    }

    fn stats(&mut self, reply: Reply<brig_agent_protocol::agent::StatsResponse>) {
        let vm = match self.in_life() {
            Ok(vm) => vm,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let request = self.reference();
        let patience = vm.figures().clone();
        let figures = self.stats.ask(patience, async move {
            let answer = vm.agent().stats(context::Context::default(), &request);
            vm.call("Stats", answer).await
        });
        tokio::spawn(async move {
            let _ = reply.send(figures.await);
        });
    }

    fn pids(&mut self, reply: Reply<Vec<Listed>>) {
        let vm = match self.in_life() {
            Ok(vm) => vm,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let (request, own_pid) = (self.reference(), self.pid());
        let execs: HashMap<u32, String> = self
            .execs
            .iter()
            .filter(|(_, member)| member.guest_pid != 0)
            .map(|(exec_id, member)| (member.guest_pid, exec_id.clone()))
            .collect();
        let patience = vm.figures().clone();
        let pids = self.pids.ask(patience, async move {
            let answer = vm
                .agent()
                .list_processes(context::Context::default(), &request);
            let list = vm.call("ListProcesses", answer).await?;
            Ok(list.pids)
        });
        tokio::spawn(async move {
            let listed = pids.await.map(|pids| {
                let listed = |pid| Listed {
                    pid: own_pid,
                    exec_id: execs.get(&pid).cloned(),
                };
                pids.into_iter().take(MAX_LISTED).map(listed).collect()
            });
            let _ = reply.send(listed);
        });
    }

    /// The VM of a container whose init process has not ended.
    fn in_life(&self) -> Result<Arc<Vm>> {
        let vm = self.vm()?;
        match self.init.process.phase() {
            Phase::Stopped(_) => Err(Error::not_found(format!("container {} has ended", self.id))),
            _ => Ok(vm),
        }
    }

    fn reference(&self) -> ContainerRef {
        ContainerRef {
            id: self.id.clone(),
            ..ContainerRef::default()
        }
    }

    fn delete_exec(&mut self, exec_id: String, reply: Reply<Deleted>) {
        let vm = self.vm.clone();
        let deletable = self.member(&exec_id).and_then(|member| {
            if member.deleting {
                return Err(Error::state(format!("exec {exec_id} is being deleted")));
            }
            match member.process.phase() {
                Phase::Stopped(_) => {}
                Phase::Created if !member.in_guest => {
                    member.process.lost(std::time::SystemTime::now());
                }
                _ => return Err(Error::state(format!("exec {exec_id} is still running"))),
            }
            member.deleting = true;
            Ok((member.stdio.take(), member.in_guest))
        });
        let (stdio, in_guest) = match deletable {
            Ok(parts) => parts,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let (mailbox, context, id) = (self.mailbox.clone(), self.context.clone(), self.id.clone());
        tokio::spawn(async move {
            if let Some(vm) = vm {
                work::release(&context, &vm, &id, &exec_id, stdio, in_guest).await;
            }
            let _ = mailbox.send(Message::ExecDeleted { exec_id, reply }).await;
        });
    }

    pub(super) fn delete_init(&mut self, reply: Reply<Deleted>) {
        let phase = self.init.process.phase();
        match phase {
            Phase::Creating => {
                // The creation is abandoned; its failure answers.
                self.cancel.send_replace(true);
                self.abandoned = Some(reply);
                return;
            }
            _ if self.init.deleting => {
                let _ = reply.send(Err(Error::state(format!(
                    "container {} is being deleted",
                    self.id
                ))));
                return;
            }
            Phase::Running | Phase::Starting => {
                let _ = reply.send(Err(Error::state(format!(
                    "container {} is still running",
                    self.id
                ))));
                return;
            }
            Phase::Created | Phase::Stopped(_) => {}
        }
        let Ok(vm) = self.vm() else {
            let _ = reply.send(Err(super::not_found(&self.id, "")));
            return;
        };
        self.init.deleting = true;
        let running = phase == Phase::Created;
        let attached = std::mem::take(&mut self.attached);
        let leases = std::mem::take(&mut self.leases);
        let hooks = self.hooks.take();
        let stdio = self.init.stdio.take();
        // The execs stay until the end, because those that still run have an exit to be told of.
        let execs: Vec<_> = self
            .execs
            .iter_mut()
            .map(|(exec_id, member)| {
                let runs = member.in_guest && member.process.exit().is_none();
                (exec_id.clone(), member.stdio.take(), member.in_guest, runs)
            })
            .collect();
        let (mailbox, context, id) = (self.mailbox.clone(), self.context.clone(), self.id.clone());
        tokio::spawn(async move {
            for (exec_id, stdio, in_guest, runs) in execs {
                if runs {
                    work::kill(&vm, &id, &exec_id).await;
                }
                work::release(&context, &vm, &id, &exec_id, stdio, in_guest).await;
            }
            if running {
                work::kill(&vm, &id, "").await;
            }
            work::release(&context, &vm, &id, "", stdio, true).await;
            work::take_devices(&context, &vm, &id).await;
            work::detach(&context, &vm, &id, &attached).await;
            context.volumes.release(leases).await;
            work::poststop(&context, &id, hooks, vm.pid()).await;
            let _ = mailbox.send(Message::InitDeleted { reply }).await;
        });
    }
}
