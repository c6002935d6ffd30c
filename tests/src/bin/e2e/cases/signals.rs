//! Signals, pause and resume.

use std::time::Duration;

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use brig_tests::node::process::Lines;

use crate::suite::{Case, PROBE, Suite, case, patience, smoke};

/// How long the pod stays paused: a duration is what this case measures.
const PAUSE: Duration = Duration::from_millis(1500);

pub const CASES: &[Case] = &[
    smoke(
        "signals",
        "init gets a signal, and its answer is the exit status",
        trap,
    ),
    case(
        "signals",
        "kill --all ends every process with 137",
        kill_all,
    ),
    case(
        "signals",
        "an exec is killed by its id and the container lives on",
        kill_exec,
    ),
    case(
        "signals",
        "a paused container stands still and a resumed one goes on",
        pause,
    ),
];

fn trap(suite: &mut Suite) -> Result<()> {
    let run = suite.probe("trap", &["trap", "USR1", "7"]);
    let (running, mut lines) = Lines::start(suite.ctr.run_command(&run, &["--rm"]))?;
    let result = lines
        .wait_for("ready", patience())
        .and_then(|_| {
            suite
                .ctr
                .ok(&["task", "kill", "--signal", "SIGUSR1", &run.id])
        })
        .and_then(|_| lines.wait_for("SIGUSR1", patience()))
        .and_then(|_| running.finish(patience()));
    if result.is_err() {
        suite.ctr.remove(&run.id);
    }
    equal("exit status", 7, result?.code)
}

fn kill_all(suite: &mut Suite) -> Result<()> {
    suite.events()?;
    let mark = suite.events()?.mark();
    let run = suite.probe("killall", &["spawn-background", "3"]);
    let container = suite.ctr.start(&run)?;
    container.kill("SIGKILL", &["--all"])?;
    let exit = suite
        .events()?
        .wait_topic(mark, patience(), &run.id, "/tasks/exit")?;
    equal("exit status in the event", 137, exit.exit_status())?;
    let (status, _) = suite.ctr.status(&run.id)?.context("the task is gone")?;
    equal("status", "STOPPED", status)
}

fn kill_exec(suite: &mut Suite) -> Result<()> {
    let exec = format!("victim-{}", std::process::id());
    let mut command = suite.ctr.command(&["task", "exec", "--exec-id"]);
    let shared_id = suite.shared()?.id.clone();
    command.args([&exec, &shared_id]).args([PROBE, "sleep"]);
    let (running, mut lines) = Lines::start(command)?;
    lines.wait_for("sleeping", patience())?;
    suite.ctr.ok(&[
        "task",
        "kill",
        "--signal",
        "SIGKILL",
        "--exec-id",
        &exec,
        &shared_id,
    ])?;
    equal("exit status", 137, running.finish(patience())?.code)?;
    let outcome = suite.shared()?.exec(&[PROBE, "echo", "alive"])?;
    outcome.says(0, "alive\n")
}

fn pause(suite: &mut Suite) -> Result<()> {
    let run = suite.probe("pause", &["longest-gap"]);
    let (running, mut lines) = Lines::start(suite.ctr.run_command(&run, &["--rm"]))?;
    let result = stand_still(suite, &run.id, &mut lines).and_then(|gap| {
        running.finish(patience())?;
        Ok(gap)
    });
    if result.is_err() {
        let _ = suite.ctr.call(&["task", "resume", &run.id]);
        suite.ctr.remove(&run.id);
    }
    let gap = result?;
    that(
        &format!("it did not run for at least 1200 ms of the pause, but at most {gap} ms"),
        gap >= 1200,
    )
}

fn stand_still(suite: &Suite, id: &str, lines: &mut Lines) -> Result<u64> {
    lines.wait_for("ready", patience())?;
    suite.ctr.ok(&["task", "pause", id])?;
    let (status, _) = suite.ctr.status(id)?.context("no task")?;
    equal("status", "PAUSED", status)?;
    std::thread::sleep(PAUSE);
    suite.ctr.ok(&["task", "resume", id])?;
    let (status, _) = suite.ctr.status(id)?.context("no task")?;
    equal("status", "RUNNING", status)?;
    suite.ctr.ok(&["task", "kill", "--signal", "SIGTERM", id])?;
    let line = lines.wait_for("longest_gap_ms", patience())?;
    let value: serde_json::Value = serde_json::from_str(&line)?;
    value["longest_gap_ms"].as_u64().context("no number")
}
