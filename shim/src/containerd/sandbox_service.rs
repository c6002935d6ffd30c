//! The Sandbox service (containerd.runtime.sandbox.v1): a pod without a sandbox container, for handlers with
//! `sandboxer = "shim"`. Turns containerd's messages into requests of the pod and back; no state is kept here.
//!
//! Containers of such a pod come over the Task service of the same socket. Only StopSandbox and
//! ShutdownSandbox end it.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use brig_agent_protocol::agent::Empty;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use futures::future::join_all;
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;
use serde_json::json;
use tokio::time::timeout;
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::context;

use crate::asked::config::Config;
use crate::asked::sandbox_config::PodConfig;
use crate::asked::spec::Network;
use crate::containerd::pod_stats;
use crate::containerd::stats;
use crate::error::{Error, Result};
use crate::pod::actor::{PodHandle, SandboxCreation, SandboxState};
use crate::pod::container::Request;
use crate::pod::spans::TraceParent;

/// CRI's names for the states of a pod (`runtime.v1.PodSandboxState`).
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service; cheap to clone.
#[derive(Clone)]
pub struct SandboxService {
    pod: PodHandle,
    /// The configuration the handler named when the shim was started.
    config: Option<PathBuf>,
}

impl SandboxService {
    /// A service for this pod, whose handler names this configuration file.
    #[must_use]
    pub fn new(pod: PodHandle, config: Option<PathBuf>) -> Self {
        Self { pod, config }
    }
}

/// Reads what a creation needs. Blocking.
fn prepare(request: &CreateSandboxRequest, config: Option<PathBuf>) -> Result<SandboxCreation> {
    let pod = PodConfig::parse(request.options.as_ref())?;
    pod.check()?;
    let network = match request.netns_path.as_str() {
        "" => Network::New,
        path => Network::Path(path.into()),
    };
    let mut config = Config::load(config.as_deref())?;
    let annotations = request.annotations.iter().chain(&pod.annotations);
    config.annotate(annotations.map(|(name, value)| (name.as_str(), value.as_str())))?;
    Ok(SandboxCreation {
        id: request.sandbox_id.clone(),
        pod,
        network,
        config,
    })
}

fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(at))
}

/// This machine's architecture as OCI images name it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn info(state: &SandboxState) -> String {
    json!({
        "pid": state.pid,
        "shimPid": std::process::id(),
        "runtime": "io.containerd.brig.v2",
        "version": env!("CARGO_PKG_VERSION"),
    })
    .to_string()
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        context: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        if let Some(trace) = TraceParent::of(&context.metadata) {
            self.pod.part_of(trace).await;
        }
        let config = self.config.clone();
        let id = request.sandbox_id.clone();
        let prepared = tokio::task::spawn_blocking(move || prepare(&request, config)).await;
        let created = match prepared.map_err(Error::from)? {
            Ok(creation) => self.pod.create_sandbox(creation).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &created {
            self.pod.refused(id, error.clone()).await;
        }
        created?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        _: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let (pid, created_at) = self.pod.start_sandbox().await?;
        Ok(StartSandboxResponse {
            pid,
            created_at: timestamp(created_at),
            ..StartSandboxResponse::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = architecture().to_owned();
        Ok(response)
    }

    /// The guest is powered off in order; after the time-out it is killed.
    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let vm = self.pod.vm().await;
        let stopped = self.pod.stop_sandbox();
        tokio::pin!(stopped);
        match (request.timeout_secs, vm) {
            (seconds @ 1.., Some(vm)) => {
                let patience = Duration::from_secs(seconds.into());
                if let Ok(stopped) = timeout(patience, &mut stopped).await {
                    stopped?;
                } else {
                    vm.kill();
                    stopped.await?;
                }
            }
            _ => stopped.await?,
        }
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        _: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.pod.wait_sandbox().await?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let state = self.pod.sandbox_state().await?;
        let mut response = SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: state.pid,
            state: if state.ready { READY } else { NOT_READY }.to_owned(),
            created_at: timestamp(state.created_at),
            ..SandboxStatusResponse::default()
        };
        if let Some(exit) = state.exit {
            response.exited_at = timestamp(exit.at);
        }
        if request.verbose {
            response.info.insert("info".to_owned(), info(&state));
        }
        Ok(response)
    }

    /// Asks the guest.
    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        let state = self.pod.sandbox_state().await?;
        let vm = self.pod.vm().await.filter(|_| state.ready);
        let vm = vm.ok_or_else(|| {
            Error::state(format!("sandbox {} is not running", request.sandbox_id))
        })?;
        let empty = Empty::new();
        let answer = vm.agent().ping(context::Context::default(), &empty);
        vm.call_within(vm.timeouts().word, "Ping", answer).await?;
        Ok(PingResponse::default())
    }

    /// Ends the pod, whatever is in it, and then the server.
    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.pod.shutdown(true).await;
        Ok(ShutdownSandboxResponse::default())
    }

    /// The sum of the figures of the pod's containers.
    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        self.pod.sandbox_state().await?;
        let containers = self.pod.containers().await;
        let asked = containers
            .iter()
            .map(|container| container.ask(|reply| Request::Stats { reply }));
        // One that has ended, or not begun, uses nothing.
        let figures = join_all(asked).await.into_iter().flatten();
        let mut response = SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.timestamp = timestamp(SystemTime::now());
        metrics.id = request.sandbox_id;
        metrics.data = MessageField::some(stats::encode(pod_stats::sum(figures))?);
        Ok(response)
    }
}
