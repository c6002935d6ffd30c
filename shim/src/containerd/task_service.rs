//! The Task service, v2 and v3 alike: turns containerd's messages into requests of the pod and back.
//! No state is kept here, and every error leaves with its code.

use std::path::PathBuf;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use ttrpc::asynchronous::TtrpcContext;

use crate::asked::config::Config;
use crate::asked::spec::{self, Role, Spec};
use crate::containerd::bootstrap::options;
use crate::containerd::stats;
use crate::error::{Error, Result};
use crate::pod::actor::PodHandle;
use crate::pod::container::{Creation, Deleted, Listed, ProcessState, Request};
use crate::pod::process::{Io, Phase};
use crate::pod::spans::TraceParent;

/// The service; cheap to clone.
#[derive(Clone)]
pub struct TaskService {
    pod: PodHandle,
}

impl TaskService {
    /// A service for this pod.
    #[must_use]
    pub fn new(pod: PodHandle) -> Self {
        Self { pod }
    }

    async fn ask<T>(
        &self,
        id: &str,
        request: impl FnOnce(crate::pod::container::Reply<T>) -> Request,
    ) -> ttrpc::Result<T> {
        Ok(self.pod.find(id).await?.ask(request).await?)
    }
}

/// Reads everything a creation needs from the bundle, and from the configuration what a VM is made by: for a pod that has one it
/// does not matter what the files say by now. Blocking.
fn prepare(request: CreateTaskRequest) -> Result<(Creation, Option<Config>)> {
    if !request.checkpoint.is_empty() {
        return Err(Error::unimplemented(
            "a VM's container cannot be restored from a checkpoint",
        ));
    }
    let path = options::config_path(request.options.as_ref())?;
    let bundle = PathBuf::from(&request.bundle);
    let spec_bytes = spec::read(&bundle.join("config.json"))?;
    let spec = Spec::parse(&spec_bytes)?;
    spec.check_ids()?;
    let role = spec.role()?;
    match role {
        Role::Sandbox => spec.check_sandbox()?,
        Role::Single => spec.check_alone()?,
        Role::Member(_) => drop(spec.network()?),
    }
    let config = match role {
        Role::Member(_) => None,
        Role::Sandbox | Role::Single => {
            let mut config = Config::load(path.as_deref())?;
            config.annotate(spec.annotations())?;
            Some(config)
        }
    };
    let creation = Creation {
        id: request.id,
        bundle,
        rootfs: request.rootfs,
        io: Io {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
        spec_bytes,
        spec,
        role,
        stand_in: None,
        pid_namespace_of: None,
    };
    Ok((creation, config))
}

fn process_info(listed: Listed) -> Result<ProcessInfo> {
    let details = listed.exec_id.map(|exec_id| {
        let details = ProcessDetails {
            exec_id,
            ..ProcessDetails::default()
        };
        details.write_to_bytes().map(|value| Any {
            type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
            value,
            ..Any::default()
        })
    });
    let info = details
        .transpose()
        .map_err(|e| Error::internal(e.to_string()))?;
    Ok(ProcessInfo {
        pid: listed.pid,
        info: info.into(),
        ..ProcessInfo::default()
    })
}

fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(at))
}

fn status(state: &ProcessState) -> Status {
    match state.phase {
        Phase::Creating | Phase::Created | Phase::Starting => Status::CREATED,
        Phase::Running if state.paused => Status::PAUSED,
        Phase::Running => Status::RUNNING,
        Phase::Stopped(_) => Status::STOPPED,
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let exec_id = request.exec_id.clone();
        let state = self
            .ask(&request.id, |reply| Request::State { exec_id, reply })
            .await?;
        let mut response = StateResponse {
            status: status(&state).into(),
            id: request.id,
            exec_id: request.exec_id,
            bundle: state.bundle,
            pid: state.pid,
            stdin: state.io.stdin,
            stdout: state.io.stdout,
            stderr: state.io.stderr,
            terminal: state.io.terminal,
            ..StateResponse::default()
        };
        if let Phase::Stopped(exit) = state.phase {
            response.exit_status = exit.status;
            response.exited_at = timestamp(exit.at);
        }
        Ok(response)
    }

    async fn create(
        &self,
        context: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        if let Some(trace) = TraceParent::of(&context.metadata) {
            self.pod.part_of(trace).await;
        }
        let id = request.id.clone();
        let prepared = tokio::task::spawn_blocking(move || prepare(request)).await;
        let created = match prepared.map_err(Error::from)? {
            Ok((creation, config)) => self.pod.create(creation, config).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &created {
            self.pod.refused(id, error.clone()).await;
        }
        Ok(CreateTaskResponse {
            pid: created?,
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let exec_id = request.exec_id;
        let pid = self
            .ask(&request.id, |reply| Request::Start { exec_id, reply })
            .await?;
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let exec_id = request.exec_id;
        let Deleted { pid, exit } = self
            .ask(&request.id, |reply| Request::Delete { exec_id, reply })
            .await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..DeleteResponse::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let listed = self
            .ask(&request.id, |reply| Request::Pids { reply })
            .await?;
        let mut processes = Vec::new();
        for process in listed {
            processes.push(process_info(process)?);
        }
        Ok(PidsResponse {
            processes,
            ..PidsResponse::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.ask(&request.id, |reply| Request::Pause { reply })
            .await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.ask(&request.id, |reply| Request::Resume { reply })
            .await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Error::unimplemented("a VM's container cannot be checkpointed").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let (exec_id, signal, all) = (request.exec_id, request.signal, request.all);
        let make = |reply| Request::Kill {
            exec_id,
            signal,
            all,
            reply,
        };
        self.ask(&request.id, make).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let io = Io {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let process = request.spec.into_option().unwrap_or_default().value;
        let exec_id = request.exec_id;
        let make = |reply| Request::Exec {
            exec_id,
            io,
            process,
            reply,
        };
        self.ask(&request.id, make).await?;
        Ok(Empty::default())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let (exec_id, rows, columns) = (request.exec_id, request.height, request.width);
        let make = |reply| Request::ResizePty {
            exec_id,
            rows,
            columns,
            reply,
        };
        self.ask(&request.id, make).await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            let exec_id = request.exec_id;
            self.ask(&request.id, |reply| Request::CloseStdin { exec_id, reply })
                .await?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = request.resources.into_option().unwrap_or_default().value;
        serde_json::from_slice::<serde::de::IgnoredAny>(&resources).map_err(|error| {
            Error::invalid(format!(
                "the resources are not OCI LinuxResources as JSON: {error}"
            ))
        })?;
        self.ask(&request.id, |reply| Request::Update { resources, reply })
            .await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exec_id = request.exec_id;
        let exit = self
            .ask(&request.id, |reply| Request::Wait { exec_id, reply })
            .await?;
        let exit = exit
            .await
            .map_err(|_| Error::not_found(format!("container {} was deleted", request.id)))?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let figures = self
            .ask(&request.id, |reply| Request::Stats { reply })
            .await?;
        Ok(StatsResponse {
            stats: MessageField::some(stats::encode(figures)?),
            ..StatsResponse::default()
        })
    }

    /// Answers of any id: containerd asks when it has been restarted, and takes a shim that does not answer for
    /// dead. One that it finds without the task it then ends in order.
    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let task_pid = match self.pod.sandbox_state().await {
            // A containerd that was restarted asks so whether its sandbox lives; there is no task of this id.
            Ok(sandbox) if sandbox.id == request.id => sandbox.pid,
            _ => {
                let exec_id = String::new();
                let state = self.ask(&request.id, |reply| Request::State { exec_id, reply });
                state.await.map_or(0, |state| state.pid)
            }
        };
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    /// May come repeatedly and with containers left; only without any does it end the pod.
    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.pod.shutdown(false).await;
        Ok(Empty::default())
    }
}
