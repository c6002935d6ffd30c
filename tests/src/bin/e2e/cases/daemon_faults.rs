//! What goes wrong in a pod, and what containerd 2.4 does and finds then.

use anyhow::Result;
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::connection::{Connection, refused};
use brig_tests::node::daemon::generation::Generation;
use brig_tests::node::daemon::pod::Pod;
use brig_tests::node::daemon::pod_config::PodConfig;
use brig_tests::node::leaks::Snapshot;
use brig_tests::node::process;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
    StartSandboxRequest, StartSandboxResponse,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::MessageField;

use super::daemon_pods::config;
use super::leaks::baseline;
use crate::suite::{Case, PROBE, Suite, brig, patience};

pub const CASES: &[Case] = &[
    brig(
        "daemon",
        "a sandbox that is refused says why, and ShutdownSandbox leaves nothing of it",
        refused_sandbox,
    ),
    brig(
        "daemon",
        "a container that cannot be created leaves its pod as it was",
        refused_container,
    ),
    brig(
        "daemon",
        "WaitSandbox returns when the VMM dies, and the containers' exits are told",
        dead_machine,
    ),
];

fn refused_sandbox(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_4, &suite.ctr.runtime, "refused")?;
    let before = Snapshot::take();
    let bundle = daemon.bundle("refused", None)?;
    let endpoint = daemon.start(&bundle)?;
    let servers = daemon.servers();
    let connection = Connection::open(&endpoint)?;
    let start = StartSandboxRequest {
        sandbox_id: bundle.id.clone(),
        ..StartSandboxRequest::default()
    };
    let started: Result<StartSandboxResponse> = connection.sandbox("StartSandbox", &start);
    refused(
        "StartSandbox before CreateSandbox",
        ttrpc::Code::FAILED_PRECONDITION,
        started,
    )?;
    let config = PodConfig {
        host_network: true,
        ..config()
    };
    let create = CreateSandboxRequest {
        sandbox_id: bundle.id.clone(),
        bundle_path: bundle.path.display().to_string(),
        options: MessageField::some(config.options()?),
        ..CreateSandboxRequest::default()
    };
    let created: Result<CreateSandboxResponse> = connection.sandbox("CreateSandbox", &create);
    let sentence = refused(
        "CreateSandbox with the node's network",
        ttrpc::Code::INVALID_ARGUMENT,
        created,
    )?;
    contains("the refusal", "hostNetwork", &sentence)?;
    let shutdown = ShutdownSandboxRequest {
        sandbox_id: bundle.id.clone(),
        ..ShutdownSandboxRequest::default()
    };
    let _: ShutdownSandboxResponse = connection.sandbox("ShutdownSandbox", &shutdown)?;
    drop(connection);
    for server in servers {
        that("the shim ends", process::exited(server, patience())?)?;
    }
    daemon.delete(&bundle)?;
    before.nothing_left(patience())
}

fn refused_container(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_4, &suite.ctr.runtime, "bad")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "bad", &config())?;
    let Err(error) = pod.container("nope", &["/no/such/program"]) else {
        anyhow::bail!("a container without its program was created");
    };
    contains("the refusal", "/no/such/program", &format!("{error:#}"))?;
    // As containerd cleans up after a Create that failed.
    refused(
        "Delete of what was not created",
        ttrpc::Code::NOT_FOUND,
        pod.connection.delete("bad-nope"),
    )?;
    pod.connection.shutdown("bad-nope")?;
    // Under the same name: nothing of the first is in the way.
    let good = pod.container("nope", &[PROBE, "echo", "good", "9"])?;
    let ended = good.waiting();
    good.start()?;
    equal(
        "exit status",
        9,
        ended.recv_timeout(patience())??.exit_status,
    )?;
    equal("output", "good\n", good.written(patience())?)?;
    good.delete()?;
    pod.end()?;
    before.nothing_left(patience())
}

fn dead_machine(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_4, &suite.ctr.runtime, "dead")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "dead", &config())?;
    let container = pod.container("app", &[PROBE, "sleep"])?;
    let ended = container.waiting();
    container.start()?;
    kill(Pid::from_raw(i32::try_from(pod.pid)?), Signal::SIGKILL)?;
    equal(
        "exit status of the sandbox",
        137,
        pod.wait_sandbox()?.exit_status,
    )?;
    let ended = ended.recv_timeout(patience())??;
    equal("exit status of the container", 137, ended.exit_status)?;
    let event = daemon
        .events
        .wait("/tasks/exit", &container.id, patience())?;
    equal("exit status in the event", 137, event.status)?;
    equal("from Delete", 137, container.delete()?.exit_status)?;
    let refusal = pod.container("late", &[PROBE, "sleep"]);
    that("no container can join it any more", refusal.is_err())?;
    pod.end()?;
    before.nothing_left(patience())
}
