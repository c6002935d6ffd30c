//! How the end of a process is told.
//!
//! containerd stops reading a streamed output as soon as it hears that the container has ended, which it does
//! not with a FIFO. So the exit of an init process with streamed output is held until that is delivered.

use slog::{debug, info};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{Container, Message, Reply};
use crate::error::Error;
use crate::pod::events::TaskEvent;
use crate::pod::process::{Exit, Phase};
use crate::pod::stdio::Stdio;

/// How many times the usual limit output is waited for: containerd may be restarting, and what is not delivered
/// before the exit is told is lost.
const WITHOUT_CONTAINERD: u32 = 6;

impl Container {
    pub(super) fn exited(&mut self, exec_id: &str, exit: Exit) {
        if exec_id.is_empty() {
            self.context.doomed.ended(&self.id);
        }
        if exec_id.is_empty() && self.hold(exit) {
            return;
        }
        let Ok(member) = self.member(exec_id) else {
            return;
        };
        if let Some(exit) = member.process.exited(exit) {
            self.tell_exit(exec_id, exit);
        }
    }

    /// Whether the exit has to wait for output; then [`Self::delivered`] follows.
    pub(super) fn hold(&mut self, exit: Exit) -> bool {
        if self.init.process.phase() != Phase::Running {
            return false;
        }
        if self.held.is_some() {
            return true;
        }
        let Some(mut delivery) = self.init.stdio.as_ref().and_then(Stdio::delivery) else {
            return false;
        };
        self.held = Some(exit);
        let limit = self.context.drain.saturating_mul(WITHOUT_CONTAINERD);
        let mailbox = self.mailbox.clone();
        tokio::spawn(async move {
            let _ = timeout(limit, delivery.wait_for(|delivered| *delivered)).await;
            let _ = mailbox.send(Message::Delivered).await;
        });
        true
    }

    pub(super) fn delivered(&mut self) {
        let held = self.held.take();
        if let Some(exit) = held.and_then(|exit| self.init.process.exited(exit)) {
            self.tell_exit("", exit);
        }
    }

    /// Its process was killed at its start: the start has failed when the end has been told.
    pub(super) fn fail_start(&mut self, error: Error, reply: Reply<u32>) {
        if let Some(vm) = self.vm.clone() {
            self.doom(&vm);
        }
        let (waiter, ended) = oneshot::channel();
        self.init.process.wait(waiter);
        tokio::spawn(async move {
            let _ = ended.await;
            let _ = reply.send(Err(error));
        });
    }

    pub(super) fn tell_exit(&self, exec_id: &str, exit: Exit) {
        let process = if exec_id.is_empty() {
            info!(self.context.logger, "a container has ended"; "container" => &self.id, "status" => exit.status);
            &self.id
        } else {
            // A probe is an exec every few seconds for as long as the pod lives.
            debug!(self.context.logger, "an exec has ended";
                "container" => &self.id, "exec" => exec_id, "status" => exit.status);
            exec_id
        };
        self.publish(TaskEvent::Exit {
            id: self.id.clone(),
            process: process.to_owned(),
            pid: self.pid(),
            exit,
        });
    }
}
