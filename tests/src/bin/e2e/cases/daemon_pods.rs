//! Pods as containerd 2.2 to 2.4 ask for them: through the Sandbox API and with a pause container, the
//! containers joining by version 2 or 3.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::connection::refused;
use brig_tests::node::daemon::event_log::Forwarded;
use brig_tests::node::daemon::generation::Generation;
use brig_tests::node::daemon::pod::Pod;
use brig_tests::node::daemon::pod_config::PodConfig;
use brig_tests::node::leaks::pids_of;
use containerd_shim_protos::api::Status;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse,
};
use protobuf::well_known_types::empty::Empty;
use serde_json::Value;

use super::leaks::baseline;
use crate::suite::{Case, PROBE, Suite, brig, patience};

pub const CASES: &[Case] = &[
    Case {
        smoke: true,
        ..brig(
            "daemon",
            "2.4: two containers join a sandbox of the Sandbox API without start and delete (version 3)",
            |suite| two_containers(suite, Generation::V2_4),
        )
    },
    brig(
        "daemon",
        "2.2: two containers join a sandbox of the Sandbox API, a start and a delete each (version 2)",
        |suite| two_containers(suite, Generation::V2_2),
    ),
    Case {
        smoke: true,
        ..brig(
            "daemon",
            "2.4: containers join a pause container's pod without start and delete (version 3)",
            |suite| pause_container(suite, Generation::V2_4),
        )
    },
    brig(
        "daemon",
        "2.3: containers join a pause container's pod without start and delete (version 3)",
        |suite| pause_container(suite, Generation::V2_3),
    ),
    brig(
        "daemon",
        "2.2: containers join a pause container's pod, a start and a delete each (version 2)",
        |suite| pause_container(suite, Generation::V2_2),
    ),
    brig(
        "daemon",
        "a sandbox without a config.json takes host name and sysctls from the PodSandboxConfig",
        configured,
    ),
    brig(
        "daemon",
        "Shutdown and StopSandbox may be repeated, and methods of a later containerd are Unimplemented",
        repeated,
    ),
];

/// The configuration of a pod of these cases.
pub fn config() -> PodConfig {
    PodConfig {
        hostname: "daemon-host".to_owned(),
        cgroup_parent: brig_tests::node::daemon::CGROUP_PARENT.to_owned(),
        sysctls: vec![("kernel.shm_rmid_forced".to_owned(), "1".to_owned())],
        ..PodConfig::default()
    }
}

fn status(pod: &Pod<'_>) -> Result<SandboxStatusResponse> {
    let request = SandboxStatusRequest {
        sandbox_id: pod.id.clone(),
        verbose: true,
        ..SandboxStatusRequest::default()
    };
    pod.connection.sandbox("SandboxStatus", &request)
}

fn ping(pod: &Pod<'_>) -> Result<PingResponse> {
    let request = PingRequest {
        sandbox_id: pod.id.clone(),
        ..PingRequest::default()
    };
    pod.connection.sandbox("PingSandbox", &request)
}

fn exits(events: &[Forwarded]) -> Vec<(&str, u32)> {
    events
        .iter()
        .filter(|event| event.topic == "/tasks/exit")
        .map(|event| (event.process.as_str(), event.status))
        .collect()
}

fn two_containers(suite: &mut Suite, generation: Generation) -> Result<()> {
    let daemon = Daemon::new(generation, &suite.ctr.runtime, "two")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "two", &config())?;
    let version = if generation.sends_params() { 3 } else { 2 };
    equal("version", version, pod.endpoint.version)?;

    let platform = PlatformRequest {
        sandbox_id: pod.id.clone(),
        ..PlatformRequest::default()
    };
    let platform: PlatformResponse = pod.connection.sandbox("Platform", &platform)?;
    equal("os", "linux", platform.platform.os.as_str())?;
    that(
        "there is an architecture",
        !platform.platform.architecture.is_empty(),
    )?;
    let state = status(&pod)?;
    equal("state", "SANDBOX_READY", state.state.as_str())?;
    equal("pid in the status", pod.pid, state.pid)?;
    serde_json::from_str::<Value>(state.info.get("info").context("no verbose info")?)?;
    // kubelet and NRI look for the pod's network there.
    let network = |path: &Path| fs::metadata(path).map(|file| file.ino());
    equal(
        "the network namespace of the sandbox's pid",
        network(Path::new("/run/netns/brigd-two"))?,
        network(Path::new(&format!("/proc/{}/ns/net", pod.pid)))?,
    )?;
    let again = CreateSandboxRequest {
        sandbox_id: pod.id.clone(),
        ..CreateSandboxRequest::default()
    };
    let again: Result<CreateSandboxResponse> = pod.connection.sandbox("CreateSandbox", &again);
    refused("a second CreateSandbox", ttrpc::Code::ALREADY_EXISTS, again)?;

    let web = pod.container("web", &[PROBE, "sleep"])?;
    let web_ended = web.waiting();
    web.start()?;
    web.exec("look", &[PROBE, "exit", "3"])?;
    let app = pod.container("app", &[PROBE, "echo", "hello", "7"])?;
    let app_ended = app.waiting();
    app.start()?;
    let ended = app_ended.recv_timeout(patience())??;
    equal("exit status from Wait", 7, ended.exit_status)?;
    equal("output", "hello\n", app.written(patience())?)?;
    equal("servers of the pod", 1, daemon.servers().len())?;
    ping(&pod)?;
    let metrics = SandboxMetricsRequest {
        sandbox_id: pod.id.clone(),
        ..SandboxMetricsRequest::default()
    };
    let metrics: SandboxMetricsResponse = pod.connection.sandbox("SandboxMetrics", &metrics)?;
    equal(
        "the metrics' id",
        pod.id.as_str(),
        metrics.metrics.id.as_str(),
    )?;
    contains(
        "the metrics' type",
        "cgroup",
        &metrics.metrics.data.type_url,
    )?;
    that("there are figures", !metrics.metrics.data.value.is_empty())?;

    let app_id = app.id.clone();
    equal("exit status from Delete", 7, app.delete()?.exit_status)?;
    let running = web.connection.state(&web.id)?;
    equal("the other's state", Status::RUNNING.into(), running.status)?;
    daemon.events.wait("/tasks/delete", &app_id, patience())?;
    equal(
        "events of one",
        vec![
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit",
            "/tasks/delete",
        ],
        daemon.events.topics(&app_id),
    )?;
    let seen = daemon.events.of(&app_id);
    equal("exits", vec![(app_id.as_str(), 7)], exits(&seen))?;
    that(
        "every event is in containerd's namespace",
        seen.iter().all(|event| event.namespace == daemon.namespace),
    )?;

    web.connection.kill(&web.id, 9)?;
    let ended = web_ended.recv_timeout(patience())??;
    equal("exit status after SIGKILL", 137, ended.exit_status)?;
    let web_id = web.id.clone();
    web.delete()?;
    daemon.events.wait("/tasks/delete", &web_id, patience())?;
    let seen = daemon.events.of(&web_id);
    equal(
        "exits of the other",
        vec![("look", 3), (web_id.as_str(), 137)],
        exits(&seen),
    )?;
    equal(
        "events of the other",
        vec![
            "/tasks/create",
            "/tasks/start",
            "/tasks/exec-added",
            "/tasks/exec-started",
            "/tasks/exit",
            "/tasks/exit",
            "/tasks/delete",
        ],
        daemon.events.topics(&web_id),
    )?;
    pod.end()?;
    before.nothing_left(patience())
}

fn pause_container(suite: &mut Suite, generation: Generation) -> Result<()> {
    let daemon = Daemon::new(generation, &suite.ctr.runtime, "pause")?;
    let before = baseline(suite)?;
    let pod = Pod::by_pause_container(&daemon, "pause")?;
    // runc's shim of containerd 2.x says 3 to every daemon.
    if suite.is_brig() {
        let version = if generation.sends_params() { 3 } else { 2 };
        equal("version", version, pod.endpoint.version)?;
    }
    // One after the other: the end of the first is not the end of the pod.
    for (name, code) in [("first", 4), ("second", 5)] {
        let container = pod.container(name, &[PROBE, "echo", name, &code.to_string()])?;
        let (said, status) = container.run(patience())?;
        equal(name, code, status)?;
        equal("output", format!("{name}\n"), said)?;
        equal("exit status", code, container.delete()?.exit_status)?;
        let state = pod.connection.state(&pod.id)?;
        equal("the pod", Status::RUNNING.into(), state.status)?;
    }
    equal("servers of the pod", 1, daemon.servers().len())?;
    pod.end()?;
    daemon.events.wait("/tasks/delete", "pause", patience())?;
    equal(
        "events of the pause container",
        vec![
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit",
            "/tasks/delete",
        ],
        daemon.events.topics("pause"),
    )?;
    before.nothing_left(patience())
}

fn configured(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_3, &suite.ctr.runtime, "configured")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "configured", &config())?;
    that(
        "the sandbox's bundle has no config.json",
        !pod.bundle.path.join("config.json").exists(),
    )?;
    that(
        "the pod's cgroup is below its parent",
        Path::new("/sys/fs/cgroup/brig-daemon/configured").is_dir(),
    )?;
    for (name, args, expected) in [
        (
            "facts",
            &[PROBE, "facts"][..],
            "\"hostname\":\"daemon-host\"",
        ),
        (
            "sysctl",
            &[PROBE, "read", "/proc/sys/kernel/shm_rmid_forced"],
            "1",
        ),
    ] {
        let container = pod.container(name, args)?;
        let (said, status) = container.run(patience())?;
        equal(name, 0, status)?;
        contains(name, expected, &said)?;
        container.delete()?;
    }
    pod.end()?;
    before.nothing_left(patience())
}

fn repeated(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_4, &suite.ctr.runtime, "repeated")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "repeated", &config())?;
    // After each Delete, also of containers that never were.
    for id in ["repeated", "gone", "gone"] {
        pod.connection.shutdown(id)?;
    }
    equal("state", "SANDBOX_READY", status(&pod)?.state.as_str())?;
    for method in ["PortForward", "SetPodColour"] {
        let answer: Result<Empty> = pod.connection.sandbox(method, &Empty::new());
        refused(method, ttrpc::Code::UNIMPLEMENTED, answer)?;
    }
    for _ in 0..2 {
        pod.stop_sandbox()?;
        equal("VMMs left", Vec::<i32>::new(), pids_of("brig-vmm"))?;
        equal("exit status", 0, pod.wait_sandbox()?.exit_status)?;
        equal("state", "SANDBOX_NOTREADY", status(&pod)?.state.as_str())?;
    }
    refused(
        "PingSandbox of a stopped sandbox",
        ttrpc::Code::FAILED_PRECONDITION,
        ping(&pod),
    )?;
    pod.connection.shutdown("repeated")?;
    pod.end()?;
    before.nothing_left(patience())
}
