//! What is asked of a process's terminal and of its input: sizes, and the end.

use std::sync::Arc;

use brig_agent_protocol::agent::{ProcessRef, ResizePtyRequest};
use ttrpc::context;

use super::{Container, Member, Reply};
use crate::error::{Error, Result};
use crate::guest::vm::Vm;
use crate::pod::process::Phase;

impl Container {
    pub(super) fn resize(&mut self, exec_id: String, rows: u32, columns: u32, reply: Reply<()>) {
        let checked = self.vm().and_then(|vm| {
            let member = self.member(&exec_id)?;
            match member.process.phase() {
                Phase::Stopped(_) => Err(Error::not_found("the process already finished")),
                // As by runc's shim: clients ask for it whatever the process has.
                _ if !member.process.io.terminal => Ok(None),
                // nerdctl tells the size between Exec and Start, when there is no terminal to be sized yet.
                _ if !member.in_guest => {
                    member.size = Some((rows, columns));
                    Ok(None)
                }
                _ => Ok(Some(vm)),
            }
        });
        let vm = match checked {
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
        let sized = self.size_terminal(vm, exec_id, (rows, columns));
        tokio::spawn(async move {
            let _ = reply.send(sized.await);
        });
    }

    pub(super) fn size_terminal(
        &self,
        vm: Arc<Vm>,
        exec_id: String,
        (rows, columns): (u32, u32),
    ) -> impl Future<Output = Result<()>> + use<> {
        let request = ResizePtyRequest {
            id: self.id.clone(),
            exec_id,
            rows,
            columns,
            ..ResizePtyRequest::default()
        };
        async move {
            let answer = vm.agent().resize_pty(context::Context::default(), &request);
            vm.call("ResizePty", answer).await.map(drop)
        }
    }

    pub(super) fn close_stdin(&mut self, exec_id: &str) -> Result<()> {
        let member = self.member(exec_id)?;
        member.stdin_closed = true;
        if let Some(stdio) = &mut member.stdio {
            stdio.close_stdin();
        }
        if member.in_guest {
            self.let_hang_up(exec_id);
        }
        Ok(())
    }

    /// Has the agent hang a terminal up, as runc's shim does, when the stream of its closed input has ended: other
    /// processes see that end by themselves.
    pub(super) fn let_hang_up(&mut self, exec_id: &str) {
        let terminal = |member: &mut Member| member.process.io.terminal && member.stdin_closed;
        let (true, Some(vm)) = (self.member(exec_id).is_ok_and(terminal), self.vm.clone()) else {
            return;
        };
        let request = ProcessRef {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..ProcessRef::default()
        };
        tokio::spawn(async move {
            let answer = vm
                .agent()
                .close_stdin(context::Context::default(), &request);
            let _ = vm.call("CloseStdin", answer).await;
        });
    }
}
