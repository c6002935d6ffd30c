//! Detaching from a container and coming back to it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use brig_tests::node::check::equal;
use brig_tests::node::process::{Lines, Running};
use nix::sys::signal::Signal;

use crate::suite::{Case, PROBE, Suite, case, patience, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "attach",
        "a detached container goes on, and who attaches gets its output and exit status",
        detach,
    ),
    case(
        "attach",
        "the client that started it may die without the container noticing",
        abandoned,
    ),
];

/// Attaches, and returns once the client holds the container's FIFOs.
fn attach(suite: &Suite, id: &str) -> Result<(Running, Lines)> {
    let (running, lines) = Lines::start(suite.ctr.command(&["task", "attach", id]))?;
    let end = Instant::now() + patience();
    while fifos(running.pid()) < 2 {
        ensure!(Instant::now() < end, "ctr task attach opens no FIFOs");
        // A client that attaches says nothing.
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok((running, lines))
}

fn fifos(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .map(|entries| {
            entries
                .flatten()
                .filter_map(|entry| fs::read_link(entry.path()).ok())
                .filter(|target| target.to_string_lossy().contains("/fifo/"))
                .count()
        })
        .unwrap_or(0)
}

fn detach(suite: &mut Suite) -> Result<()> {
    let container = suite
        .ctr
        .start(&suite.probe("detached", &["trap", "USR1", "9"]))?;
    let (running, mut lines) = attach(suite, &container.id)?;
    container.exec(&[PROBE, "await-trap", "USR1"])?.success()?;
    container.kill("SIGUSR1", &[])?;
    lines.wait_for("SIGUSR1", patience())?;
    equal("exit status", 9, running.finish(patience())?.code)
}

fn abandoned(suite: &mut Suite) -> Result<()> {
    let run = suite.probe("abandoned", &["trap", "USR1", "11"]);
    let (client, mut lines) = Lines::start(suite.ctr.run_command(&run, &[]))?;
    let result = lines.wait_for("ready", patience()).and_then(|_| {
        client.signal(Signal::SIGKILL)?;
        client.finish(patience())?;
        let (running, mut lines) = attach(suite, &run.id)?;
        suite
            .ctr
            .ok(&["task", "kill", "--signal", "SIGUSR1", &run.id])?;
        lines.wait_for("SIGUSR1", patience())?;
        running.finish(patience())
    });
    suite.ctr.remove(&run.id);
    equal("exit status", 11, result?.code)
}
