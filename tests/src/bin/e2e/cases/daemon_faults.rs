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
    for (what, words, config) in unacceptable() {
        let create = CreateSandboxRequest {
            sandbox_id: bundle.id.clone(),
            bundle_path: bundle.path.display().to_string(),
            options: MessageField::some(config.options()?),
            ..CreateSandboxRequest::default()
        };
        let created: Result<CreateSandboxResponse> = connection.sandbox("CreateSandbox", &create);
        let what = format!("CreateSandbox with {what}");
        let sentence = refused(&what, ttrpc::Code::INVALID_ARGUMENT, created)?;
        contains(&what, words, &sentence)?;
    }
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

/// What containerd's own sandbox controller, or runc for the pause container, refuses of a pod, and how the
/// refusal says it.
fn unacceptable() -> Vec<(&'static str, &'static str, PodConfig)> {
    let (pod, container, node, target) = (0, 1, 2, 3);
    let whole = vec![[0, 200_000, 65_536]];
    let users = |mode: u64, map: &[[u32; 3]]| PodConfig {
        user_namespace: Some((mode, map.to_vec())),
        ..config()
    };
    let with = |change: fn(&mut PodConfig)| {
        let mut config = config();
        change(&mut config);
        config
    };
    vec![
        (
            "the node's network",
            "hostNetwork",
            with(|config| config.host_network = true),
        ),
        (
            "a user namespace of mode CONTAINER",
            "unsupported mode CONTAINER",
            users(container, &whole),
        ),
        (
            "a user namespace of mode TARGET",
            "unsupported mode TARGET",
            users(target, &[]),
        ),
        (
            "the node's user namespace and a map",
            "mode NODE cannot be used with mappings",
            users(node, &whole),
        ),
        (
            "a user namespace without a map",
            "without UID and GID mappings",
            users(pod, &[]),
        ),
        (
            "a map without root",
            "container id 0 must be mapped",
            users(pod, &[[1, 200_000, 65_536]]),
        ),
        (
            "a map of two lines",
            "only one mapping line",
            users(pod, &[[0, 200_000, 10], [10, 300_000, 10]]),
        ),
        (
            "a map of no ids",
            "invalid mapping length 0",
            users(pod, &[[0, 200_000, 0]]),
        ),
        (
            "a user that is not mapped",
            "not mapped",
            PodConfig {
                run_as: (Some(65_536), None),
                ..users(pod, &whole)
            },
        ),
        (
            "a group without a user",
            "without user",
            with(|config| config.run_as = (None, Some(1000))),
        ),
        (
            "a supplemental group that is none",
            "supplementalGroups",
            with(|config| config.groups = vec![-1]),
        ),
        (
            "a host name of 65 bytes",
            "host name",
            with(|config| config.hostname = "h".repeat(65)),
        ),
        (
            "an SELinux level that is none",
            "'level'",
            with(|config| config.selinux_level = "high".to_owned()),
        ),
        (
            "a seccomp profile that is not there",
            "seccomp profile",
            with(|config| config.seccomp = Some((2, "/nowhere/profile.json".to_owned()))),
        ),
        (
            "a path for a profile that has none",
            "localhost_ref",
            with(|config| config.seccomp = Some((0, "/nowhere/profile.json".to_owned()))),
        ),
    ]
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
    let (said, status) = good.run(patience())?;
    equal("exit status", 9, status)?;
    equal("output", "good\n", said.as_str())?;
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
