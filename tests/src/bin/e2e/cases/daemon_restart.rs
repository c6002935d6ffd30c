//! containerd goes away and comes back, or the shim does not: what each containerd finds then.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use brig_tests::node::check::{equal, that};
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::connection::{Connection, refused};
use brig_tests::node::daemon::generation::Generation;
use brig_tests::node::daemon::pod::Pod;
use brig_tests::node::leaks::Snapshot;
use brig_tests::node::process;
use containerd_shim_protos::api::Status;
use containerd_shim_protos::sandbox_api::{ShutdownSandboxRequest, ShutdownSandboxResponse};
use ttrpc::Code;

use super::daemon_pods::config;
use super::leaks::baseline;
use crate::suite::{Case, PROBE, Suite, brig, patience};

pub const CASES: &[Case] = &[
    brig(
        "daemon",
        "2.4: a restarted containerd finds a pod of the Sandbox API, and hears of what happened meanwhile",
        |suite| restart(suite, Generation::V2_4, true),
    ),
    brig(
        "daemon",
        "2.3: a restarted containerd finds a pod with a pause container, and hears of what happened meanwhile",
        |suite| restart(suite, Generation::V2_3, false),
    ),
    Case {
        smoke: true,
        ..brig(
            "daemon",
            "2.4: delete after the shim of a Sandbox API pod was killed leaves nothing, and may be repeated",
            |suite| killed(suite, Generation::V2_4, true),
        )
    },
    brig(
        "daemon",
        "2.2: delete after the shim of a pause container's pod was killed leaves nothing, and may be repeated",
        |suite| killed(suite, Generation::V2_2, false),
    ),
    brig(
        "daemon",
        "a restarted containerd finds a shim without its task, and ends it",
        leaked,
    ),
    brig(
        "daemon",
        "ShutdownSandbox that nobody waits for ends the pod and its shim",
        unawaited,
    ),
];

fn pod<'a>(daemon: &'a Daemon, id: &str, api: bool) -> Result<Pod<'a>> {
    if api {
        Pod::by_sandbox_api(daemon, id, &config())
    } else {
        Pod::by_pause_container(daemon, id)
    }
}

fn restart(suite: &mut Suite, generation: Generation, api: bool) -> Result<()> {
    let daemon = Daemon::new(generation, &suite.ctr.runtime, "restart")?;
    let before = baseline(suite)?;
    let mut pod = pod(&daemon, "restart", api)?;
    let mut stays = pod.container("stays", &[PROBE, "sleep"])?;
    stays.start()?;
    let mut ends = pod.container("ends", &[PROBE, "sleep"])?;
    ends.start()?;
    daemon.events.wait("/tasks/start", &ends.id, patience())?;

    daemon.die();
    // Not containerd, which is away: somebody on the node ends a container.
    let operator = Connection::open(&pod.endpoint)?;
    operator.kill(&ends.id, 9)?;
    equal("exit status", 137, operator.wait(&ends.id)?.exit_status)?;
    drop(operator);
    that(
        "nothing was heard while containerd was away",
        !daemon
            .events
            .topics(&ends.id)
            .contains(&"/tasks/exit".to_owned()),
    )?;

    daemon.live()?;
    pod.reload()?;
    stays.reload()?;
    ends.reload()?;
    let exit = daemon.events.wait("/tasks/exit", &ends.id, patience())?;
    equal("exit status in the event", 137, exit.status)?;
    let state = ends.connection.state(&ends.id)?;
    equal("state", Status::STOPPED.into(), state.status)?;
    equal("exit status in State", 137, state.exit_status)?;
    let ends_id = ends.id.clone();
    equal("exit status", 137, ends.delete()?.exit_status)?;
    daemon.events.wait("/tasks/delete", &ends_id, patience())?;
    equal(
        "events, none lost and none twice",
        vec![
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit",
            "/tasks/delete",
        ],
        daemon.events.topics(&ends_id),
    )?;

    stays.exec("look", &[PROBE, "exit", "0"])?;
    let new = pod.container("new", &[PROBE, "echo", "after", "6"])?;
    let (said, status) = new.run(patience())?;
    equal("exit status", 6, status)?;
    equal("output", "after\n", said.as_str())?;
    new.delete()?;
    stays.connection.kill(&stays.id, 9)?;
    stays.connection.wait(&stays.id)?;
    stays.delete()?;
    pod.end()?;
    before.nothing_left(patience())
}

fn killed(suite: &mut Suite, generation: Generation, api: bool) -> Result<()> {
    let daemon = Daemon::new(generation, &suite.ctr.runtime, "killed")?;
    let before = baseline(suite)?;
    let pod = pod(&daemon, "killed", api)?;
    let container = pod.container("app", &[PROBE, "sleep"])?;
    container.start()?;
    daemon.kill_servers()?;
    let vmm = i32::try_from(pod.pid)?;
    that(
        "the VMM ends with its shim",
        process::exited(vmm, patience())?,
    )?;
    let written = container.written(patience())?;
    ensure!(written.len() < 100, "an end of file, not {written:?}");
    // The containers' first, in whatever order their connections ended; then again.
    for round in 1..=2 {
        for bundle in [&container.bundle, &pod.bundle] {
            let deleted = daemon.delete(bundle)?;
            equal("exit status", 137, deleted.exit_status)?;
            that(
                &format!("round {round}: there is a time of exit"),
                deleted.exited_at.seconds > 1_600_000_000,
            )?;
        }
    }
    let socket = PathBuf::from(pod.endpoint.address.trim_start_matches("unix://"));
    that("the socket is gone", !socket.exists())?;
    drop(container);
    drop(pod);
    before.nothing_left(patience())
}

/// containerd was killed between `start` and Create.
fn leaked(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_4, &suite.ctr.runtime, "leaked")?;
    let before = Snapshot::take();
    let bundle = daemon.bundle("leaked", None)?;
    let endpoint = daemon.start(&bundle)?;
    let servers = daemon.servers();
    daemon.die();
    daemon.live()?;
    let connection = Connection::open(&endpoint)?;
    let connected = connection.connect(&bundle.id)?;
    equal("pid of the task", 0, connected.task_pid)?;
    let shim = i32::try_from(connected.shim_pid)?;
    that("the shim tells its pid", servers.contains(&shim))?;
    refused("Pids", Code::NOT_FOUND, connection.pids(&bundle.id))?;
    refused("Delete", Code::NOT_FOUND, connection.delete(&bundle.id))?;
    connection.shutdown(&bundle.id)?;
    drop(connection);
    for server in servers {
        that("the shim ends", process::exited(server, patience())?)?;
    }
    daemon.delete(&bundle)?;
    before.nothing_left(patience())
}

fn unawaited(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_4, &suite.ctr.runtime, "unawaited")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "unawaited", &config())?;
    let servers = daemon.servers();
    let request = ShutdownSandboxRequest {
        sandbox_id: pod.bundle.id.clone(),
        ..ShutdownSandboxRequest::default()
    };
    // No VM ends within that time; should one, the case shows less.
    let _: Result<ShutdownSandboxResponse> = pod.connection.call(
        "containerd.runtime.sandbox.v1.Sandbox",
        "ShutdownSandbox",
        &request,
        Duration::from_millis(5),
    );
    for server in servers {
        that("the shim ends", process::exited(server, patience())?)?;
    }
    daemon.delete(&pod.bundle)?;
    drop(pod);
    before.nothing_left(patience())
}
