//! Pods through the Sandbox API, asked as containerd 2.x asks: Create, Start, tasks over the same socket,
//! Stop, Wait, Status and Shutdown.

use brig_hypervisor::control::exit as control_exit;
use containerd_shim_protos::api::ConnectRequest;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest,
    SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest, StartSandboxRequest,
    StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use protobuf::Message as _;
use tokio::time::timeout;
use ttrpc::Code;

use super::harness::{Harness, code, ctx};
use super::{LONG, Status};
use crate::asked::sandbox_config::tests::{bytes, options, varint};
use crate::guest::fakes::Behaviour;
use crate::node::sandbox_files;

const MEMBER: &str = r#"{"process":{"args":["true"]},"annotations":{
    "io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"c"},
    "linux":{"namespaces":[{"type":"network","path":"/proc/7/ns/net"}],"cgroupsPath":"/pods/app"}}"#;

fn id() -> String {
    "c".to_owned()
}

/// CRI's options: a host name, a cgroup, limits and a resolver.
pub(super) fn creation() -> CreateSandboxRequest {
    let limits = [varint(1, 100_000), varint(2, 50_000), varint(4, 1 << 30)].concat();
    let linux = [bytes(1, b"/pods"), bytes(5, &limits)].concat();
    let pod = [
        bytes(2, b"pod"),
        bytes(4, &bytes(1, b"10.0.0.10")),
        bytes(8, &linux),
    ];
    CreateSandboxRequest {
        sandbox_id: id(),
        options: Some(options(pod.concat())).into(),
        ..CreateSandboxRequest::default()
    }
}

async fn start(client: &SandboxClient) -> ttrpc::Result<u32> {
    let request = StartSandboxRequest {
        sandbox_id: id(),
        ..StartSandboxRequest::default()
    };
    let answer = client.start_sandbox(ctx(), &request).await?;
    assert!(answer.created_at.seconds > 0);
    Ok(answer.pid)
}

async fn status(client: &SandboxClient) -> ttrpc::Result<SandboxStatusResponse> {
    let request = SandboxStatusRequest {
        sandbox_id: id(),
        verbose: true,
        ..SandboxStatusRequest::default()
    };
    client.sandbox_status(ctx(), &request).await
}

async fn stop(client: &SandboxClient) -> ttrpc::Result<()> {
    let request = StopSandboxRequest {
        sandbox_id: id(),
        ..StopSandboxRequest::default()
    };
    client.stop_sandbox(ctx(), &request).await.map(drop)
}

async fn ping(client: &SandboxClient) -> ttrpc::Result<()> {
    let request = PingRequest {
        sandbox_id: id(),
        ..PingRequest::default()
    };
    client.ping_sandbox(ctx(), &request).await.map(drop)
}

async fn wait(client: &SandboxClient) -> ttrpc::Result<u32> {
    let request = WaitSandboxRequest {
        sandbox_id: id(),
        ..WaitSandboxRequest::default()
    };
    Ok(client.wait_sandbox(ctx(), &request).await?.exit_status)
}

/// Shuts the sandbox down and hangs up, as containerd does.
async fn shut_down(harness: Harness, client: SandboxClient) -> Vec<String> {
    let request = ShutdownSandboxRequest {
        sandbox_id: id(),
        ..ShutdownSandboxRequest::default()
    };
    client.shutdown_sandbox(ctx(), &request).await.unwrap();
    drop(client);
    harness.end().await
}

#[tokio::test]
async fn a_sandbox_outlives_its_containers_and_is_stopped_and_shut_down() {
    let harness = Harness::new(Behaviour::default()).await;
    let client = harness.sandbox().await;
    let record = harness.record.clone();
    client.create_sandbox(ctx(), &creation()).await.unwrap();
    let pid = start(&client).await.unwrap();
    assert!(pid > 1 && record.has("sandbox pod") && record.has("cgroup /pods/c"));
    // The limit, what describes its pages, and what the guest takes itself.
    let memory = (1_u64 << 30) + (1_u64 << 30).div_ceil(63) + (64 << 20);
    assert!(record.has(&format!("launch {memory}")));
    let state = status(&client).await.unwrap();
    assert_eq!((state.state.as_str(), state.pid), ("SANDBOX_READY", pid));
    assert!(state.info["info"].contains(&pid.to_string()));
    ping(&client).await.unwrap();

    // As a containerd does that was restarted.
    let connect = |id: &str| ConnectRequest {
        id: id.into(),
        ..ConnectRequest::default()
    };
    let connected = harness.client.connect(ctx(), &connect("c")).await;
    assert_eq!(connected.unwrap().task_pid, pid);
    let other = harness.client.connect(ctx(), &connect("app")).await;
    assert_eq!(other.unwrap().task_pid, 0);

    // Nobody closes the server on a sandbox without containers.
    harness.create_as("app", MEMBER).await.unwrap();
    harness.start_of("app", "").await.unwrap();
    assert!(record.has("attach .own/app/rootfs") && record.has("create app"));
    let metrics = SandboxMetricsRequest {
        sandbox_id: id(),
        ..SandboxMetricsRequest::default()
    };
    let metrics = client.sandbox_metrics(ctx(), &metrics).await.unwrap();
    assert_eq!(metrics.metrics.id, "c");
    assert!(metrics.metrics.data.compute_size() > 2);
    harness.kill_of("app", "", 9).await.unwrap();
    assert_eq!(harness.delete_of("app", "").await.unwrap(), 137);
    let shutdown = super::ShutdownRequest::default();
    harness.client.shutdown(ctx(), &shutdown).await.unwrap();
    assert_eq!(status(&client).await.unwrap().state, "SANDBOX_READY");
    assert!(!record.has("shutdown"));

    let waiting = {
        let client = harness.sandbox().await;
        tokio::spawn(async move { wait(&client).await })
    };
    stop(&client).await.unwrap();
    assert!(record.has("shutdown"));
    assert!(!harness.state().exists(), "something is left on the node");
    let waited = timeout(LONG, waiting).await.unwrap().unwrap();
    assert_eq!(waited.unwrap(), 0);
    let state = status(&client).await.unwrap();
    assert_eq!((state.state.as_str(), state.pid), ("SANDBOX_NOTREADY", 0));
    assert!(state.exited_at.seconds > 0);
    stop(&client).await.unwrap();
    assert_eq!(wait(&client).await.unwrap(), 0);
    let connected = harness.client.connect(ctx(), &connect("c")).await;
    assert_eq!(connected.unwrap().task_pid, 0);
    assert_eq!(code(ping(&client).await).0, Code::FAILED_PRECONDITION);
    shut_down(harness, client).await;
}

#[tokio::test]
async fn what_comes_out_of_order_is_refused_with_its_code() {
    let harness = Harness::new(Behaviour::default()).await;
    let client = harness.sandbox().await;
    let (kind, message) = code(start(&client).await);
    assert_eq!(kind, Code::FAILED_PRECONDITION, "{message}");
    assert_eq!(code(status(&client).await).0, Code::NOT_FOUND);
    assert_eq!(code(wait(&client).await).0, Code::NOT_FOUND);
    stop(&client).await.unwrap();
    let mut other = creation();
    other.sandbox_id = "other".into();
    let refused = client.create_sandbox(ctx(), &other).await;
    assert_eq!(code(refused).0, Code::INVALID_ARGUMENT);
    client.create_sandbox(ctx(), &creation()).await.unwrap();
    assert_eq!(status(&client).await.unwrap().state, "SANDBOX_NOTREADY");
    let again = client.create_sandbox(ctx(), &creation()).await;
    assert_eq!(code(again).0, Code::ALREADY_EXISTS);
    start(&client).await.unwrap();
    assert_eq!(code(start(&client).await).0, Code::FAILED_PRECONDITION);
    stop(&client).await.unwrap();
    assert_eq!(code(start(&client).await).0, Code::FAILED_PRECONDITION);
    shut_down(harness, client).await;
}

#[tokio::test]
async fn the_platform_is_linux_before_and_after_the_creation() {
    let harness = Harness::new(Behaviour::default()).await;
    let client = harness.sandbox().await;
    let request = PlatformRequest::default();
    let answer = client.platform(ctx(), &request).await.unwrap();
    assert_eq!(answer.platform.os, "linux");
    assert!(["amd64", "arm64"].contains(&answer.platform.architecture.as_str()));
    // containerd shuts down what it could not create.
    shut_down(harness, client).await;
}

#[tokio::test]
async fn a_container_gets_copies_of_the_pods_files_and_nothing_of_the_nodes_memory() {
    let harness = Harness::new(Behaviour::default()).await;
    let client = harness.sandbox().await;
    client.create_sandbox(ctx(), &creation()).await.unwrap();
    start(&client).await.unwrap();
    let files = harness.state().join(sandbox_files::DIRECTORY);
    let read = |name: &str| std::fs::read_to_string(files.join(name)).unwrap();
    assert_eq!(read("hostname"), "pod\n");
    assert_eq!(read("resolv.conf"), "nameserver 10.0.0.10\n");
    harness.create_as("app", MEMBER).await.unwrap();
    let all = harness.record.all();
    let count = |kind: &str| all.iter().filter(|entry| entry.starts_with(kind)).count();
    assert_eq!(
        count("attach "),
        1,
        "more than the root file system: {all:?}"
    );
    assert_eq!(count("volume "), 3, "{all:?}");
    shut_down(harness, client).await;
}

#[tokio::test]
async fn a_vm_that_dies_makes_the_sandbox_not_ready_and_ends_the_wait() {
    let harness = Harness::new(Behaviour::default()).await;
    let client = harness.sandbox().await;
    client.create_sandbox(ctx(), &creation()).await.unwrap();
    let pid = start(&client).await.unwrap();
    harness.create_as("app", MEMBER).await.unwrap();
    harness.start_of("app", "").await.unwrap();
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(timeout(LONG, wait(&client)).await.unwrap().unwrap(), 137);
    assert_eq!(status(&client).await.unwrap().state, "SANDBOX_NOTREADY");
    assert_eq!(harness.wait_of("app", "").await.unwrap(), 137);
    let state = harness.status_of("app", "").await.unwrap();
    assert_eq!(state, Status::STOPPED);
    stop(&client).await.unwrap();
    assert_eq!(harness.delete_of("app", "").await.unwrap(), 137);
    shut_down(harness, client).await;
}

#[tokio::test]
async fn a_vm_that_does_not_come_up_fails_the_start_with_its_reason() {
    let harness = Harness::new(Behaviour {
        die_with: Some(control_exit::INTERNAL),
        ..Behaviour::default()
    })
    .await;
    let client = harness.sandbox().await;
    client.create_sandbox(ctx(), &creation()).await.unwrap();
    let (kind, message) = code(start(&client).await);
    assert!(kind != Code::OK && !message.is_empty(), "{message}");
    assert_eq!(status(&client).await.unwrap().state, "SANDBOX_NOTREADY");
    shut_down(harness, client).await;
}

#[tokio::test]
async fn what_belongs_to_the_node_is_refused_before_a_vm_is_started() {
    let harness = Harness::new(Behaviour::default()).await;
    let client = harness.sandbox().await;
    let mut request = creation();
    let host_pid = bytes(8, &bytes(2, &bytes(1, &varint(2, 2))));
    request.options = Some(options(host_pid)).into();
    let (kind, message) = code(client.create_sandbox(ctx(), &request).await);
    assert_eq!(kind, Code::INVALID_ARGUMENT);
    assert!(message.contains("hostPID"), "{message}");
    let all = harness.record.all();
    assert!(!all.iter().any(|entry| entry.starts_with("launch")));
    shut_down(harness, client).await;
}
