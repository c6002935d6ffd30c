//! The making of execs: further processes of a container that was created.
use std::{os::fd::OwnedFd, sync::Arc};

use brig_agent_protocol::agent;

use super::{Container, prepare, terminal_of};
use crate::{
    command::Command,
    control::{Exec, Instructions},
    error::{Error, Result},
    process::{Phase, Process, Reply},
    spec,
};

impl Container {
    pub(super) fn create_exec(
        &mut self,
        exec_id: String,
        mut process: spec::Process,
        stdio: agent::Stdio,
        reply: Reply<()>,
    ) {
        let (init_pid, init) = match self.may_exec(&exec_id) {
            Ok(init) => init,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        self.parts.exec_defaults.complete(&mut process);
        let terminal = terminal_of(&stdio, &process);
        self.serial += 1;
        let serial = self.serial;
        self.execs
            .insert(exec_id.clone(), Process::preparing(serial));
        let own = self.parts.cgroup.path();
        let mut cgroups = vec![own.to_owned()];
        // By a number, which may be another container's by now.
        let of_init = self.context.cgroup_of(init_pid);
        cgroups.extend(of_init.filter(|cgroup| cgroup.starts_with(own)));
        let instructions = Instructions::Exec(Box::new(Exec {
            id: self.parts.id.clone(),
            process,
            seccomp: self.parts.seccomp.clone(),
            personality: self.parts.exec_defaults.personality.clone(),
            uid_mappings: self.parts.uid_mappings.clone(),
            gid_mappings: self.parts.gid_mappings.clone(),
            time_namespace: self.parts.time_namespace,
            cgroups,
            limits: self.context.limits.all(),
            terminal,
        }));
        let (context, mailbox) = (Arc::clone(&self.context), self.mailbox.clone());
        tokio::spawn(async move {
            let result = prepare(
                &context,
                (&instructions, Some(&init)),
                &stdio,
                &mailbox,
                (&exec_id, serial),
            )
            .await;
            let _ = mailbox.send(Command::Prepared {
                exec_id,
                result,
                reply,
            });
        });
    }

    fn may_exec(&self, exec_id: &str) -> Result<(i32, OwnedFd)> {
        let id = &self.parts.id;
        if self.execs.contains_key(exec_id) {
            return Err(Error::AlreadyExists(format!(
                "container {id} already has an exec process {exec_id}"
            )));
        }
        let init = self.living_init()?;
        if self.freezer.is_paused() {
            return Err(Error::FailedPrecondition(format!(
                "container {id} is paused; resume it first"
            )));
        }
        Ok(init)
    }

    pub(super) fn prepared(&mut self, exec_id: &str, result: Result<Process>, reply: Reply<()>) {
        let outcome = match (self.execs.get_mut(exec_id), result) {
            (Some(place), Ok(mut process)) => {
                // It was killed, and that was heard of before this.
                if let Phase::Stopped(exit) = place.phase {
                    process.phase = Phase::Stopped(exit);
                    process.tell(&self.parts.id, exec_id, exit);
                }
                *place = process;
                Ok(())
            }
            (_, Err(error)) => {
                self.execs.remove(exec_id);
                Err(error)
            }
            (None, Ok(process)) => {
                let _ = process.signal(libc::SIGKILL);
                Err(Error::NotFound(format!(
                    "exec process {exec_id} was deleted while it was set up"
                )))
            }
        };
        let _ = reply.send(outcome);
    }
}
