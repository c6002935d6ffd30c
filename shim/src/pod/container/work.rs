//! The work that takes time: calls of the agent, streams, mounts. No state is kept here.

use std::sync::Arc;

use brig_agent_protocol::agent::{CreateExecRequest, ProcessRef, SignalRequest};
use slog::warn;
use ttrpc::context;

use super::context::Context;
use crate::asked::spec::with_guest_addresses;
use crate::error::{Error, Kind, Result};
use crate::guest::vm::Vm;
use crate::node::hooks::{ContainerHooks, Stage};
use crate::pod::process::Io;
use crate::pod::stdio::{Ends, Stdio};

/// What a start has brought about.
pub(super) struct Begun {
    /// An exec's streams.
    pub(super) stdio: Option<Stdio>,
    /// Pid in the guest.
    pub(super) guest_pid: u32,
    /// Why it must not go on: a poststart hook has failed, and it was killed.
    pub(super) vetoed: Option<Error>,
}

/// An exec as containerd asked for it.
pub(super) struct Asked {
    pub(super) io: Io,
    /// Its process as OCI JSON.
    pub(super) spec: Vec<u8>,
    /// Rows and columns of its terminal, if they were told before its start.
    pub(super) size: Option<(u32, u32)>,
}

fn process(id: &str, exec_id: &str) -> ProcessRef {
    ProcessRef {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..ProcessRef::default()
    }
}

/// Starts the init process, under the packet filter that the pod has by now.
pub(super) async fn start_init(context: &Context, vm: &Arc<Vm>, id: &str) -> Result<Begun> {
    if let Err(error) = vm.follow_filter(&context.logger).await {
        kill(vm, id, "").await;
        return Err(error);
    }
    let request = process(id, "");
    let answer = vm
        .agent()
        .start_process(context::Context::default(), &request);
    let limit = vm.timeouts().setup;
    match vm.call_within(limit, "StartProcess", answer).await {
        Ok(started) => Ok(Begun {
            stdio: None,
            guest_pid: started.pid,
            vetoed: None,
        }),
        Err(error) => {
            // A process that we report as stopped must not run on because its answer was late.
            kill(vm, id, "").await;
            Err(error)
        }
    }
}

/// Starts the init process of a container that is a pod by itself, with the network it has by now.
pub(super) async fn start_alone(context: &Context, vm: &Arc<Vm>, id: &str) -> Result<Begun> {
    if let Err(error) = vm.plug_networks(&context.logger).await {
        kill(vm, id, "").await;
        return Err(error);
    }
    start_init(context, vm, id).await
}

async fn run_hooks(hooks: Option<Arc<ContainerHooks>>, stage: Stage, vmm: u32) -> Result<()> {
    let Some(hooks) = hooks else { return Ok(()) };
    let ran = tokio::task::spawn_blocking(move || hooks.run(stage, vmm)).await;
    ran.map_err(Error::from)?
}

/// Runs the hooks of a container whose init process has begun, and kills it when one fails, as the runtime
/// specification has it (and runc always did). The answer is that failure.
pub(super) async fn poststart(
    vm: &Vm,
    id: &str,
    hooks: Option<Arc<ContainerHooks>>,
) -> Option<Error> {
    let failure = run_hooks(hooks, Stage::Started, vm.pid()).await.err()?;
    kill(vm, id, "").await;
    Some(failure)
}

/// Runs the hooks of a container that was deleted. A failure is logged and changes nothing.
pub(super) async fn poststop(
    context: &Context,
    id: &str,
    hooks: Option<Arc<ContainerHooks>>,
    vmm: u32,
) {
    if let Err(error) = run_hooks(hooks, Stage::Stopped, vmm).await {
        warn!(context.logger, "a hook has failed"; "container" => id, "error" => error.message);
    }
}

/// Opens an exec's streams, makes it in the guest and starts it; nothing is left when that fails.
pub(super) async fn start_exec(
    context: &Context,
    vm: &Vm,
    id: &str,
    exec_id: &str,
    asked: Asked,
) -> Result<Begun> {
    let moved = with_guest_addresses(&asked.spec, &vm.addresses(id))?;
    let ends = Ends::open(
        &asked.io,
        &context.streams,
        &context.namespace,
        id,
        context.drain,
    )
    .await?;
    let mut stdio = ends.connect(vm).await?;
    (stdio.numbers.rows, stdio.numbers.columns) = asked.size.unwrap_or_default();
    let request = CreateExecRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        process: moved.unwrap_or(asked.spec),
        stdio: Some(stdio.numbers.clone()).into(),
        ..CreateExecRequest::default()
    };
    let answer = vm
        .agent()
        .create_exec(context::Context::default(), &request);
    let limit = vm.timeouts().setup;
    let created = vm.call_within(limit, "CreateExec", answer).await;
    // Without an answer it may exist all the same.
    let in_guest = match &created {
        Ok(_) => true,
        Err(error) => error.kind == Kind::DeadlineExceeded,
    };
    let started = match created {
        Ok(_) => {
            let request = process(id, exec_id);
            let answer = vm
                .agent()
                .start_process(context::Context::default(), &request);
            vm.call_within(limit, "StartProcess", answer).await
        }
        Err(error) => Err(error),
    };
    match started {
        Ok(started) => Ok(Begun {
            stdio: Some(stdio),
            guest_pid: started.pid,
            vetoed: None,
        }),
        Err(error) => {
            stdio.abandon(vm).await;
            if in_guest {
                kill(vm, id, exec_id).await;
                delete_in_guest(context, vm, id, exec_id).await;
            }
            Err(error)
        }
    }
}

/// Lets a process go that has ended: output is delivered first, then the agent forgets it. What another process
/// keeps open (a child of a shell that was killed) is waited for a little, as runc's shim does; then the agent ends
/// it, after what is in the pipe.
pub(super) async fn release(
    context: &Context,
    vm: &Vm,
    id: &str,
    exec_id: &str,
    stdio: Option<Stdio>,
    in_guest: bool,
) {
    let mut in_guest = in_guest;
    if let Some(mut stdio) = stdio {
        let kept_open = !stdio.ends_within(vm.timeouts().left_behind).await;
        if kept_open && in_guest {
            delete_in_guest(context, vm, id, exec_id).await;
            in_guest = false;
        }
        if !stdio.finish(vm, context.drain).await {
            warn!(context.logger, "output was cut off: the stream did not end in time";
                "container" => id, "exec" => exec_id);
        }
    }
    if in_guest {
        delete_in_guest(context, vm, id, exec_id).await;
    }
}

async fn delete_in_guest(context: &Context, vm: &Vm, id: &str, exec_id: &str) {
    if vm.death().is_some() {
        return;
    }
    let request = process(id, exec_id);
    let answer = vm
        .agent()
        .delete_process(context::Context::default(), &request);
    match vm.clear("DeleteProcess", answer).await {
        Ok(_) => {}
        Err(error) if error.kind == Kind::NotFound => {}
        Err(error) => {
            warn!(context.logger, "the agent did not let go of a process";
                "container" => id, "exec" => exec_id, "error" => error.message);
        }
    }
}

/// Kills what may be left of a process; an empty `exec_id` is the whole container. The agent's
/// DeleteProcess waits for its end.
pub(super) async fn kill(vm: &Vm, id: &str, exec_id: &str) {
    if vm.death().is_some() {
        return;
    }
    let request = SignalRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        signal: libc::SIGKILL.unsigned_abs(),
        all: exec_id.is_empty(),
        ..SignalRequest::default()
    };
    let answer = vm
        .agent()
        .signal_process(context::Context::default(), &request);
    let _ = vm.clear("SignalProcess", answer).await;
}

/// Takes what a container has of the node's devices from the guest.
pub(super) async fn take_devices(context: &Context, vm: &Vm, id: &str) {
    vm.take_groups(id, &context.logger).await;
    vm.take_disks(id, &context.logger).await;
}

/// Takes a container's mounts away; with the VM they are gone anyway.
pub(super) async fn detach(context: &Context, vm: &Vm, id: &str, attached: &[String]) {
    if vm.death().is_some() {
        return;
    }
    if let Err(error) = vm.detach(attached).await {
        warn!(context.logger, "a mount of the pod is still held";
            "container" => id, "error" => error.message);
    }
}
