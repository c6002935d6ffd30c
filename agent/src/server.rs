//! The ttrpc service `brig.agent.Agent` (agent.proto): checks a request's form and passes it on.
use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use brig_agent_protocol::MAX_LISTED;
use brig_agent_protocol::{
    agent::{
        AddNetworkRequest, AddNetworkResponse, AdjustClockRequest, AdjustClockResponse,
        ConnectPortRequest, ContainerRef, CreateContainerRequest, CreateExecRequest, DeviceNode,
        DeviceRef, Empty, Event, FindDeviceRequest, FoundDevice, LookRequest, LookResponse,
        MemoryFigures, ProcessExited, ProcessList, ProcessRef, ProcessStarted, ResizeMemoryRequest,
        ResizePtyRequest, SetCpusRequest, ShutdownRequest, SignalRequest, StartSandboxRequest,
        StartSandboxResponse, StatsResponse, UpdateRequest, UpdateVolumeRequest, VolumeRef,
        update_volume_request,
    },
    agent_ttrpc::Agent,
};
use tokio::sync::{OnceCell, mpsc};
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use crate::{
    clock,
    command::Command,
    context::Context,
    cpus,
    error::{Error, Result},
    forward::Forwarder,
    look::Looker,
    names, network, pci,
    process::Reply,
    queue_pairs, sandbox, setup, spec, validate,
    volume::disk::Disk,
};

/// The service. Every request of a container becomes one message to that container's task.
pub struct Service {
    context: Arc<Context>,
    started: OnceCell<StartSandboxResponse>,
    forwarder: Forwarder,
    looker: Looker,
    /// Told once, when the guest is to power off.
    shutdown: mpsc::UnboundedSender<()>,
}

impl Service {
    /// A service over `context`; `shutdown` is sent to once the containers have ended.
    pub fn new(context: Arc<Context>, shutdown: mpsc::UnboundedSender<()>) -> Self {
        Self {
            started: OnceCell::new(),
            forwarder: Forwarder::default(),
            looker: Looker::new(&context.places),
            context,
            shutdown,
        }
    }

    async fn ask<T>(
        &self,
        id: &str,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> ttrpc::Result<T> {
        Ok(self.context.ask(id, command).await?)
    }
}

/// Runs a request to its end even when the caller gives up: half a container must not be left.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    let outcome = tokio::spawn(work).await;
    Ok(outcome
        .unwrap_or_else(|e| Err(Error::Internal(format!("the request was given up: {e}"))))?)
}

/// Does file system work on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
}

fn started(pid: u32) -> ProcessStarted {
    ProcessStarted {
        pid,
        ..Default::default()
    }
}

#[async_trait]
impl Agent for Service {
    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let mut fresh = false;
        let response = self
            .started
            .get_or_try_init(async || {
                fresh = true;
                setup::sandbox(&self.context, request).await
            })
            .await?;
        if !fresh {
            return Err(
                Error::FailedPrecondition("the sandbox has been started already".into()).into(),
            );
        }
        Ok(response.clone())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<ProcessStarted> {
        if !self.started.initialized() {
            return Err(Error::FailedPrecondition("start the sandbox first".into()).into());
        }
        self.context.page_reporting.stirred();
        let context = Arc::clone(&self.context);
        to_the_end(async move { sandbox::create(&context, request).await })
            .await
            .map(started)
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: CreateExecRequest,
    ) -> ttrpc::Result<Empty> {
        names::id(&request.exec_id)?;
        let process: spec::Process = spec::parse(&request.process).map_err(|e| {
            Error::InvalidArgument(format!("the process of exec {}: {e}", request.exec_id))
        })?;
        validate::process(&process)?;
        let (exec_id, stdio) = (
            request.exec_id,
            request.stdio.into_option().unwrap_or_default(),
        );
        self.ask(&request.id, |reply| Command::CreateExec {
            exec_id,
            process: Box::new(process),
            stdio,
            reply,
        })
        .await?;
        Ok(Empty::new())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRef,
    ) -> ttrpc::Result<ProcessStarted> {
        let exec_id = request.exec_id;
        self.context.page_reporting.stirred();
        self.ask(&request.id, |reply| Command::Start { exec_id, reply })
            .await
            .map(started)
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalRequest,
    ) -> ttrpc::Result<Empty> {
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|s| (0..=64).contains(s));
        let signal = signal
            .ok_or_else(|| Error::InvalidArgument(format!("{} is not a signal", request.signal)))?;
        if request.all && !request.exec_id.is_empty() {
            return Err(Error::InvalidArgument(
                "a signal to all processes takes no exec id".into(),
            )
            .into());
        }
        let (exec_id, all) = (request.exec_id, request.all);
        self.ask(&request.id, |reply| Command::Signal {
            exec_id,
            signal,
            all,
            reply,
        })
        .await?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let ResizePtyRequest {
            exec_id,
            rows,
            columns,
            ..
        } = request;
        self.ask(&request.id, |reply| Command::Resize {
            exec_id,
            rows,
            columns,
            reply,
        })
        .await?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRef) -> ttrpc::Result<Empty> {
        let exec_id = request.exec_id;
        self.ask(&request.id, |reply| Command::CloseStdin { exec_id, reply })
            .await?;
        Ok(Empty::new())
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRef,
    ) -> ttrpc::Result<ProcessExited> {
        let exec_id = request.exec_id;
        self.context.page_reporting.stirred();
        self.ask(&request.id, |reply| Command::Delete { exec_id, reply })
            .await
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRef,
    ) -> ttrpc::Result<ProcessList> {
        let mut pids = self
            .ask(&request.id, |reply| Command::List { reply })
            .await?;
        pids.truncate(MAX_LISTED);
        Ok(ProcessList {
            pids,
            ..Default::default()
        })
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRef,
    ) -> ttrpc::Result<Empty> {
        self.ask(&request.id, |reply| Command::Freeze {
            frozen: true,
            reply,
        })
        .await?;
        Ok(Empty::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRef,
    ) -> ttrpc::Result<Empty> {
        self.ask(&request.id, |reply| Command::Freeze {
            frozen: false,
            reply,
        })
        .await?;
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateRequest,
    ) -> ttrpc::Result<Empty> {
        let resources = spec::parse(&request.resources)
            .map_err(|e| Error::InvalidArgument(format!("the resources of {}: {e}", request.id)))?;
        self.ask(&request.id, |reply| Command::Update {
            resources: Box::new(resources),
            reply,
        })
        .await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRef) -> ttrpc::Result<StatsResponse> {
        self.ask(&request.id, |reply| Command::Stats { reply })
            .await
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: Empty,
        sender: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let mut events = self.context.events.subscribe()?;
        while let Some(event) = events.recv().await {
            sender.send(&event).await?;
        }
        Ok(())
    }

    async fn connect_port(
        &self,
        _: &TtrpcContext,
        request: ConnectPortRequest,
    ) -> ttrpc::Result<Empty> {
        let (streams, logger) = (&self.context.streams, &self.context.logger);
        self.forwarder
            .connect(request.port, request.stream, streams, logger)
            .await?;
        Ok(Empty::new())
    }

    async fn ping(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.context.page_reporting.looked_in();
        Ok(Empty::new())
    }

    async fn update_volume(
        &self,
        _: &TtrpcContext,
        mut request: UpdateVolumeRequest,
    ) -> ttrpc::Result<Empty> {
        if !self.started.initialized() {
            return Err(Error::FailedPrecondition("start the sandbox first".into()).into());
        }
        let volumes = Arc::clone(&self.context.volumes);
        if let Some(disk) = request.disk.take() {
            let disk = Disk::find(disk, &self.context.logger).await?;
            blocking(move || volumes.update_disk(&request.id, &disk, request.size)).await?;
            return Ok(Empty::new());
        }
        let pages = Arc::clone(&self.context.huge_pages);
        blocking(move || {
            if request.kind.enum_value() == Ok(update_volume_request::Kind::HUGE) {
                pages.allow_more()?;
            }
            volumes.update(request)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn remove_volume(&self, _: &TtrpcContext, request: VolumeRef) -> ttrpc::Result<Empty> {
        let volumes = Arc::clone(&self.context.volumes);
        blocking(move || volumes.remove(&request.id)).await?;
        Ok(Empty::new())
    }

    async fn add_network(
        &self,
        _: &TtrpcContext,
        request: AddNetworkRequest,
    ) -> ttrpc::Result<AddNetworkResponse> {
        let request = StartSandboxRequest {
            interfaces: request.interfaces,
            routes: request.routes,
            neighbours: request.neighbours,
            inherited: request.inherited,
            netfilter: request.netfilter,
            ..StartSandboxRequest::default()
        };
        let context = &self.context;
        let owns_machine = context.places.owns_machine;
        let netfilter = network::apply(&request, owns_machine, &context.logger).await?;
        Ok(AddNetworkResponse {
            netfilter_refused: netfilter.refused,
            netfilter_generation: netfilter.generation,
            ..AddNetworkResponse::default()
        })
    }

    async fn find_device(
        &self,
        _: &TtrpcContext,
        request: FindDeviceRequest,
    ) -> ttrpc::Result<FoundDevice> {
        let wait = Duration::from_millis(request.wait_ms.into());
        Ok(pci::find(request.function, wait).await?)
    }

    async fn remove_device(&self, _: &TtrpcContext, request: DeviceRef) -> ttrpc::Result<Empty> {
        let nodes = pci::nodes(request.function).await.unwrap_or_default();
        pci::remove(request.function).await?;
        let kind = |node: &DeviceNode| if node.block { "b" } else { "c" }.to_owned();
        let nodes: Vec<_> = nodes
            .iter()
            .map(|node| (kind(node), (node.major.into(), node.minor.into())))
            .collect();
        // One that is being created now was not given it.
        for id in self.context.ids() {
            if let Ok(mailbox) = self.context.mailbox(&id) {
                let nodes = nodes.clone();
                let _ = mailbox.send(Command::Revoke { nodes });
            }
        }
        Ok(Empty::new())
    }

    async fn memory(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<MemoryFigures> {
        Ok(self.context.memory.figures()?)
    }

    async fn resize_memory(
        &self,
        _: &TtrpcContext,
        request: ResizeMemoryRequest,
    ) -> ttrpc::Result<MemoryFigures> {
        let wait = Duration::from_millis(request.wait_ms.into());
        let memory = &self.context.memory;
        let settled = memory.settle(request.function, request.added, wait).await?;
        Ok(settled)
    }

    async fn set_cpus(&self, _: &TtrpcContext, request: SetCpusRequest) -> ttrpc::Result<Empty> {
        if !self.context.places.owns_machine {
            return Err(Error::FailedPrecondition(
                "these CPUs are not the agent's to switch".into(),
            )
            .into());
        }
        let logger = self.context.logger.clone();
        blocking(move || {
            cpus::set(request.count)?;
            queue_pairs::follow(request.count, &logger);
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn drop_caches(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        // Walks every cached inode, which takes as long as there are many.
        let dropped =
            tokio::task::spawn_blocking(|| std::fs::write("/proc/sys/vm/drop_caches", "2")).await;
        let dropped = dropped.map_err(|e| Error::Internal(e.to_string()))?;
        dropped.map_err(|e| Error::io("drop_caches", e))?;
        Ok(Empty::new())
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: AdjustClockRequest,
    ) -> ttrpc::Result<AdjustClockResponse> {
        if request.offset_ns != 0 && self.context.places.owns_machine {
            clock::adjust(request.offset_ns)?;
        }
        Ok(AdjustClockResponse {
            unix_time_ns: clock::now(),
            ..Default::default()
        })
    }

    async fn look(&self, _: &TtrpcContext, request: LookRequest) -> ttrpc::Result<LookResponse> {
        Ok(self.looker.look(request.words).await?)
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        if request.grace_ms > 0 {
            let grace = Duration::from_millis(request.grace_ms);
            sandbox::terminate_all(&self.context, grace).await;
        }
        sandbox::end_all(&self.context).await;
        // Their stream would hold the connection open, and with it the machine on.
        self.context.events.end();
        let _ = self.shutdown.send(());
        Ok(Empty::new())
    }
}
