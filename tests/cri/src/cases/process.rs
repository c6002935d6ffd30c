//! What a container's process is given, and how its end is told.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use brig_tests::node::check::{contains_one, equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::ContainerState;

use crate::client::Cri;
use crate::container::eventually;
use crate::node::{BUSYBOX, Directory};
use crate::suite::{Case, SLEEP, Suite, case, smoke};
use crate::variant;

pub const CASES: &[Case] = &[
    smoke("process", "exit codes are told exactly", exit_codes),
    case(
        "process",
        "a process killed by a signal ends with 128 + its number",
        signalled,
    ),
    case("process", "states and times follow one another", states),
    case(
        "process",
        "environment and working directory are as asked for",
        environment,
    ),
    case(
        "process",
        "of several variables of one name the pod's last one counts",
        repeated_variable,
    ),
    case("process", "args replace the image's arguments", args),
    case(
        "process",
        "a missing program fails the start with its name",
        missing_program,
    ),
    case(
        "process",
        "a file that is no program is started and ends with its reason in the log",
        no_program,
    ),
    smoke(
        "process",
        "SIGTERM ends a container that heeds it, before its grace",
        graceful,
    ),
    case(
        "process",
        "SIGKILL ends one that does not, after its grace",
        ungraceful,
    ),
    case(
        "process",
        "STOPSIGNAL of the image is what a stop sends first",
        stop_signal,
    ),
    case(
        "process",
        "preStop: an exec prepares the end, then the stop comes",
        pre_stop,
    ),
    case(
        "process",
        "an exec that runs when its container is stopped ends with it",
        exec_at_stop,
    ),
];

fn exit_codes(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    for (name, code, reason) in [("zero", 0, "Completed"), ("three", 3, "Error")] {
        let script = format!("exit {code}");
        let (_container, status) = shared
            .pod
            .container(name, &["sh", "-c", &script])
            .finish()?;
        equal("exit code", code, status.exit_code)?;
        equal("reason", reason, status.reason.as_str())?;
    }
    Ok(())
}

fn signalled(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    // PID 1 is immune to signals from inside: its child is not.
    let script = ["sh", "-c", "sh -c 'kill -SEGV $$'; exit $?"];
    let (_container, status) = shared.pod.container("child", &script).finish()?;
    equal("exit code that the shell saw", 139, status.exit_code)?;
    let container = shared.pod.container("killed", SLEEP).start()?;
    container.stop(0)?;
    equal(
        "exit code of a killed one",
        137,
        container.wait()?.exit_code,
    )
}

fn states(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("states", &["sh", "-c", "sleep 1"])
        .create()?;
    let created = container.status()?;
    equal("state", ContainerState::ContainerCreated, created.state())?;
    container.start()?;
    let running = shared.container.status()?;
    equal("state", ContainerState::ContainerRunning, running.state())?;
    let ended = container.wait()?;
    equal("state", ContainerState::ContainerExited, ended.state())?;
    that(
        "created, started and finished in this order",
        0 < ended.created_at
            && ended.created_at <= ended.started_at
            && ended.started_at <= ended.finished_at,
    )
}

fn environment(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("environment", SLEEP)
        .env("GREETING", "hello world")
        .env("EMPTY", "")
        .edit(|config| config.working_dir = "/made/by/runtime".to_owned())
        .start()?;
    let text = container.sh("echo \"$GREETING|${EMPTY-unset}|$(pwd)|$PATH\"")?;
    equal(
        "variables",
        "hello world||/made/by/runtime|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        text.as_str(),
    )?;
    let of_main = container.sh("tr '\\0' '\\n' < /proc/1/environ | grep GREETING")?;
    equal("of the main process", "GREETING=hello world", of_main)
}

/// containerd writes the image's and the pod's one after the other, and most programs read the first.
fn repeated_variable(suite: &mut Suite) -> Result<()> {
    const NAME: &str = "docker.io/brig/env:test";
    let shared = suite.shared()?;
    let env = ["PATH=/bin:/usr/bin", "OF_IMAGE=kept", "TWICE=image"];
    variant::import(BUSYBOX, NAME, "Env", env.map(str::to_owned).to_vec())?;
    let container = shared
        .pod
        .container("twice", SLEEP)
        .image(NAME)
        .env("TWICE", "first")
        .env("TWICE", "last")
        .start()?;
    // Not by a shell's own view of it, which is of the last in any case.
    let of_main = container.sh("tr '\\0' '\\n' < /proc/1/environ | grep -E 'TWICE|OF_IMAGE'")?;
    equal(
        "of the main process",
        "OF_IMAGE=kept\nTWICE=last",
        of_main.trim(),
    )?;
    let of_exec = container.exec(&["env"])?.text();
    let named = of_exec.lines().filter(|line| line.starts_with("TWICE="));
    let named: Vec<&str> = named.collect();
    equal("of an exec", vec!["TWICE=last"], named)
}

fn args(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("args", &[])
        .edit(|config| config.args = vec!["sleep".to_owned(), "4444".to_owned()])
        .start()?;
    let line = container.sh("tr '\\0' ' ' < /proc/1/cmdline")?;
    equal("command line", "sleep 4444", line)
}

fn missing_program(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("missing", &["/no/such/program"])
        .create();
    let outcome = match container {
        // Either call may say it; kubelet shows both.
        Ok(container) => container.start().and(Ok(Some(container))),
        Err(error) => Err(error),
    };
    let error = outcome.err().context("it started")?;
    contains_one("the error", &["/no/such/program"], &format!("{error:#}"))?;
    contains_one(
        "the error",
        &["no such file", "not found"],
        &format!("{error:#}"),
    )?;
    that("the pod is still ready", shared.pod.is_ready()?)
}

fn no_program(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let directory = Directory::new("no-program")?;
    for (name, text, reason) in [
        ("junk", "not a program", "exec format error"),
        (
            "script",
            "#!/no/such/interpreter\n",
            "no such file or directory",
        ),
    ] {
        let file = directory.path.join(name);
        fs::write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
        let (container, status) = shared
            .pod
            .container(name, &["/no-program"])
            .mount_readonly(&file, "/no-program")
            .finish()?;
        equal("reason", "Error", status.reason.as_str())?;
        // 255, and 1 up to runc 1.1; 128 is that of a start that has failed.
        that(
            &format!("its own exit code: {}", status.exit_code),
            [1, 255].contains(&status.exit_code),
        )?;
        container.wait_line(&format!("exec /no-program: {reason}"))?;
    }
    Ok(())
}

fn graceful(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script = "trap 'echo going; exit 5' TERM; echo up; while :; do sleep 0.2; done";
    let container = shared
        .pod
        .container("graceful", &["sh", "-c", script])
        .start()?;
    container.wait_line("up")?;
    let begin = Instant::now();
    let grace = clock::seconds(10);
    container.stop(i64::try_from(grace.as_secs())?)?;
    that("it ended before its grace", begin.elapsed() < grace)?;
    equal("exit code", 5, container.wait()?.exit_code)?;
    container.wait_line("going")
}

fn ungraceful(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script = "trap 'echo no' TERM; echo up; while :; do sleep 0.2; done";
    let container = shared
        .pod
        .container("stubborn", &["sh", "-c", script])
        .start()?;
    container.wait_line("up")?;
    let begin = Instant::now();
    container.stop(3)?;
    that(
        "not before its grace",
        begin.elapsed() >= Duration::from_millis(2_900),
    )?;
    equal("exit code", 137, container.wait()?.exit_code)?;
    container.wait_line("no")
}

fn stop_signal(suite: &mut Suite) -> Result<()> {
    const NAME: &str = "docker.io/brig/stopsignal:test";
    let shared = suite.shared()?;
    variant::import(BUSYBOX, NAME, "StopSignal", "SIGUSR1")?;
    let script = "trap 'exit 6' USR1; trap 'exit 7' TERM; echo up; while :; do sleep 0.2; done";
    let container = shared
        .pod
        .container("stop-signal", &["sh", "-c", script])
        .image(NAME)
        .start()?;
    container.wait_line("up")?;
    container.stop(i64::try_from(clock::seconds(10).as_secs())?)?;
    equal("exit code", 6, container.wait()?.exit_code)
}

/// Kubelet runs the hook to its end, at most the grace period, and stops with what is left of it.
fn pre_stop(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script =
        "trap 'test -e /tmp/drained && exit 0; exit 9' TERM; echo up; while :; do sleep 0.2; done";
    let container = shared
        .pod
        .container("pre-stop", &["sh", "-c", script])
        .start()?;
    container.wait_line("up")?;
    let grace = i64::try_from(clock::seconds(10).as_secs())?;
    let hook = [
        "sh",
        "-c",
        "sleep 1; mkdir -p /tmp; echo done > /tmp/drained",
    ];
    equal(
        "the hook's exit code",
        0,
        container.exec_within(&hook, grace)?.code,
    )?;
    let running = container.status()?;
    equal("state", ContainerState::ContainerRunning, running.state())?;
    container.stop(grace)?;
    equal("exit code", 0, container.wait()?.exit_code)?;
    that("no exec after it", container.exec(&["true"]).is_err())
}

fn exec_at_stop(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared.pod.container("exec-at-stop", SLEEP).start()?;
    let id = container.id.clone();
    // A connection of its own: a call waits for its answer.
    let exec = std::thread::spawn(move || -> Result<Option<i32>> {
        let request = k8s_cri::v1::ExecSyncRequest {
            container_id: id,
            cmd: ["sh", "-c", "touch /tmp/running; sleep 100000"]
                .map(str::to_owned)
                .to_vec(),
            timeout: 0,
        };
        let answer = Cri::connect()?.call("ExecSync", |mut client| async move {
            client.exec_sync(request).await
        });
        Ok(match answer {
            Ok(answer) => Some(answer.exit_code),
            // runc may lose the process with its container; only an answer is wanted.
            Err(error) if format!("{error:#}").contains("no answer") => return Err(error),
            Err(_) => None,
        })
    });
    eventually("the exec runs", clock::seconds(3), || {
        Ok((container.exec(&["test", "-e", "/tmp/running"])?.code == 0).then_some(()))
    })?;
    container.stop(0)?;
    equal("exit code", 137, container.wait()?.exit_code)?;
    let code = exec
        .join()
        .map_err(|_| anyhow::anyhow!("the thread died"))??;
    that(
        &format!("the exec was killed: {code:?}"),
        code.is_none_or(|code| code == 137),
    )
}
