//! Each process of a pod is killed at each moment of its life: containerd ends up with the right
//! state, and nothing is left. One table.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use brig_tests::node::check::{equal, that};
use brig_tests::node::ctr::{Container, Run};
use brig_tests::node::leaks;
use brig_tests::node::process::{self, Running};
use brig_tests::node::{clock, containerd, ctr};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::leaks::baseline;
use crate::suite::{Case, PROBE, Suite, brig, case, patience};

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Vmm,
    Shim,
    /// The guest's PID 1, by a panic from inside the guest.
    Agent,
    Containerd,
}

/// When.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Barrier {
    /// The victim has just started.
    Booting,
    /// containerd has announced the task, which has not started.
    Created,
    /// The container runs.
    Running,
    /// An exec runs beside it.
    ExecInFlight,
    /// The task was deleted, and its VM ends.
    Ending,
}

pub const CASES: &[Case] = &[
    case(
        "crash",
        "the shim is killed while it boots a container",
        |suite| crash(suite, Victim::Shim, Barrier::Booting),
    ),
    case(
        "crash",
        "the shim is killed when the container is created",
        |suite| crash(suite, Victim::Shim, Barrier::Created),
    ),
    case(
        "crash",
        "the shim is killed while the container runs",
        |suite| crash(suite, Victim::Shim, Barrier::Running),
    ),
    case(
        "crash",
        "the shim is killed with an exec in flight",
        |suite| crash(suite, Victim::Shim, Barrier::ExecInFlight),
    ),
    brig("crash", "the VMM is killed while it boots", |suite| {
        crash(suite, Victim::Vmm, Barrier::Booting)
    }),
    brig(
        "crash",
        "the VMM is killed when the container is created",
        |suite| crash(suite, Victim::Vmm, Barrier::Created),
    ),
    brig(
        "crash",
        "the VMM is killed while the container runs",
        |suite| crash(suite, Victim::Vmm, Barrier::Running),
    ),
    brig(
        "crash",
        "the VMM is killed with an exec in flight",
        |suite| crash(suite, Victim::Vmm, Barrier::ExecInFlight),
    ),
    brig(
        "crash",
        "the guest panics while the container runs",
        |suite| crash(suite, Victim::Agent, Barrier::Running),
    ),
    brig(
        "crash",
        "the guest panics with an exec in flight",
        |suite| crash(suite, Victim::Agent, Barrier::ExecInFlight),
    ),
    case(
        "crash",
        "containerd is killed while a container boots",
        |suite| crash(suite, Victim::Containerd, Barrier::Booting),
    ),
    case(
        "crash",
        "containerd is killed when the container is created",
        |suite| crash(suite, Victim::Containerd, Barrier::Created),
    ),
    case(
        "crash",
        "containerd is killed while the container runs",
        |suite| crash(suite, Victim::Containerd, Barrier::Running),
    ),
    case(
        "crash",
        "containerd is killed with an exec in flight",
        |suite| crash(suite, Victim::Containerd, Barrier::ExecInFlight),
    ),
    brig(
        "crash",
        "containerd is killed while the VM of a deleted container ends",
        |suite| crash(suite, Victim::Containerd, Barrier::Ending),
    ),
];

impl Victim {
    fn program(self, suite: &Suite) -> &'static str {
        match self {
            Self::Vmm | Self::Agent => "brig-vmm",
            Self::Shim if suite.is_brig() => "containerd-shim-brig-v2",
            Self::Shim => "containerd-shim-runc-v2",
            Self::Containerd => "containerd",
        }
    }
}

fn kill_all_of(program: &str, except: &BTreeSet<i32>) -> Result<()> {
    let mut killed = 0;
    for pid in leaks::pids_of(program) {
        if !except.contains(&pid) && kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok() {
            killed += 1;
        }
    }
    that(&format!("there is a {program} to kill"), killed > 0)
}

/// Returns as soon as a new process of the program is there.
fn wait_for_process(program: &str, except: &BTreeSet<i32>, within: Duration) -> Result<()> {
    let end = Instant::now() + within;
    while Instant::now() < end {
        if leaks::pids_of(program)
            .iter()
            .any(|pid| !except.contains(pid))
        {
            return Ok(());
        }
        // A process's birth tells nobody without a tracer.
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("no {program} appeared")
}

/// Kills the victim.
fn strike(suite: &Suite, victim: Victim, container: &str, except: &BTreeSet<i32>) -> Result<()> {
    match victim {
        Victim::Agent => {
            // Its own kernel, crashed by a privileged process of the pod.
            let exec = suite.ctr.call(&[
                "task",
                "exec",
                "--exec-id",
                "panic",
                container,
                PROBE,
                "sysrq",
                "c",
            ])?;
            that("the exec that crashes its kernel fails", exec.code != 0)
        }
        _ => kill_all_of(victim.program(suite), except),
    }
}

fn crash(suite: &mut Suite, victim: Victim, barrier: Barrier) -> Result<()> {
    let before = baseline(suite)?;
    let result = story(suite, victim, barrier);
    if victim == Victim::Containerd {
        containerd::restart()?;
        suite.reconnect_events();
    }
    // What an operator does in the end, whatever happened.
    for id in suite.ctr.containers()? {
        suite.ctr.remove(&id);
    }
    result?;
    // FIFOs are the client's: ctr cannot clean up after a task that containerd no longer knows.
    // runc's shim also leaves its socket when it is killed at the wrong moment; Brig may not.
    let known: &[&str] = if suite.is_brig() {
        &["/run/containerd/fifo/"]
    } else {
        &["/run/containerd/fifo/", "/run/containerd/s/"]
    };
    before.nothing_left_but(known, patience())?;
    // The next pod is none the worse.
    let run = suite.probe("after", &["echo", "x"]);
    equal(
        "exit status of the next container",
        0,
        suite.ctr.run(&run)?.code,
    )
}

fn story(suite: &mut Suite, victim: Victim, barrier: Barrier) -> Result<()> {
    let program = victim.program(suite);
    let except: BTreeSet<i32> = match victim {
        Victim::Containerd => BTreeSet::new(),
        _ => leaks::pids_of(program).into_iter().collect(),
    };
    let mut run = suite.probe("crash", &["sleep"]);
    if victim == Victim::Agent {
        run = run.flag("--privileged");
    }
    suite.events()?;
    let mark = suite.events()?.mark();
    match barrier {
        Barrier::Booting | Barrier::Created => {
            let starting = Running::start(suite.ctr.run_command(&run, &["--detach"]))?;
            if barrier == Barrier::Created {
                suite
                    .events()?
                    .wait_topic(mark, patience(), &run.id, "/tasks/create")?;
            } else if victim == Victim::Containerd {
                let shim = Victim::Shim.program(suite);
                let known = BTreeSet::new();
                wait_for_process(shim, &known, patience())?;
            } else {
                wait_for_process(program, &except, patience())?;
            }
            strike(suite, victim, &run.id, &except)?;
            if victim == Victim::Containerd {
                containerd::restart()?;
            }
            let outcome = starting.finish(clock::seconds(20))?;
            if barrier == Barrier::Booting {
                that("ctr run fails", outcome.code != 0)?;
            }
            // Created: the start may have won the race; whatever the state, it can be removed.
            Ok(())
        }
        Barrier::Running | Barrier::ExecInFlight => {
            let container = suite.ctr.start(&run)?;
            let exec = if barrier == Barrier::ExecInFlight {
                Some(in_flight(&container)?)
            } else {
                None
            };
            strike(suite, victim, &run.id, &except)?;
            if victim == Victim::Containerd {
                drop(exec);
                return survived(suite, &container);
            }
            let exit = suite.events()?.wait(mark, patience(), |event| {
                event.topic == "/tasks/exit"
                    && event.container() == run.id
                    && (event.body["id"] == run.id || event.body["id"].is_null())
            })?;
            that(
                "the exit event tells of no success",
                exit.exit_status() != 0,
            )?;
            if let Some(exec) = exec {
                let outcome = exec.finish(patience()).context("the exec in flight")?;
                that("the exec in flight fails", outcome.code != 0)?;
            }
            let status = suite.ctr.status(&run.id)?;
            that(
                &format!("the task is stopped or gone, not {status:?}"),
                status.is_none_or(|(status, _)| status == "STOPPED"),
            )
        }
        Barrier::Ending => deleted(suite, victim, &run, mark),
    }
}

/// Whether or not containerd has come to send Shutdown, the shim ends.
fn deleted(suite: &mut Suite, victim: Victim, run: &Run, mark: usize) -> Result<()> {
    suite.ctr.start(run)?.forget();
    let mut delete = suite.ctr.command(&["task", "delete", "--force", &run.id]);
    delete.stdin(std::process::Stdio::null());
    let deleting = Running::start(delete)?;
    suite
        .events()?
        .wait_topic(mark, patience(), &run.id, "/tasks/delete")?;
    strike(suite, victim, &run.id, &BTreeSet::new())?;
    containerd::restart()?;
    deleting.finish(clock::seconds(20)).map(drop)
}

fn in_flight(container: &Container) -> Result<Running> {
    let (running, mut lines) = process::Lines::start({
        let mut command = container.exec_process(&[], &[PROBE, "sleep"]);
        command.stdin(std::process::Stdio::null());
        command
    })?;
    lines.wait_for("sleeping", patience())?;
    Ok(running)
}

/// A pod does not notice that containerd was away.
fn survived(suite: &Suite, container: &Container) -> Result<()> {
    containerd::restart()?;
    let (status, _) = suite
        .ctr
        .status(&container.id)?
        .context("containerd forgot the task")?;
    equal("status after containerd's restart", "RUNNING", status)?;
    let outcome = container.exec(&[PROBE, "facts"])?.success()?;
    let facts = ctr::json(&outcome)?;
    that("the container runs on", facts["pid"].is_number())
}
