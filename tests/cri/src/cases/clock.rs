//! Time in a pod: the node's, whatever happens to the node's clock or to the pod's processor time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use brig_tests::node::check::that;
use brig_tests::node::clock;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::life::sandbox_pid;
use crate::container::{Container, eventually};
use crate::node;
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "life",
        "the node's clock is set: a running pod's follows at once",
        node_clock_set,
    ),
    case(
        "life",
        "a pod that stood still for a while has the node's time",
        stood_still,
    ),
];

/// The node's clock is put back at the end of the scope.
struct Moved {
    /// "+1 hour", "-1 hour".
    back: &'static str,
}

impl Moved {
    fn by(way: &str, back: &'static str) -> Result<Self> {
        node::run("date", &["--set", way])?;
        Ok(Self { back })
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        if let Err(error) = node::run("date", &["--set", self.back]) {
            eprintln!("brig-cri: the node's clock is wrong: {error:#}");
        }
    }
}

fn now() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

/// Whether the container's clock is the node's, to a second; else what they show.
fn same_time(container: &Container) -> Result<Result<(), String>> {
    let before = now()?;
    let inside: u64 = container.sh("date +%s")?.parse()?;
    let after = now()?;
    Ok(
        match (before.saturating_sub(1)..=after + 1).contains(&inside) {
            true => Ok(()),
            false => Err(format!("{inside} is not between {before} and {after}")),
        },
    )
}

fn soon_the_same(container: &Container) -> Result<()> {
    let mut last = String::new();
    eventually("the pod's time is the node's", clock::seconds(1), || {
        Ok(match same_time(container)? {
            Ok(()) => Some(()),
            Err(shown) => {
                last = shown;
                None
            }
        })
    })
    .with_context(|| last)
}

/// Seconds since the boot of the container's kernel.
fn uptime(container: &Container) -> Result<f64> {
    let text = container.sh("cut -d' ' -f1 /proc/uptime")?;
    Ok(text.parse()?)
}

fn node_clock_set(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("clock-set")?;
    let container = pod.container("main", SLEEP).start()?;
    soon_the_same(&container).context("at first")?;
    let before = uptime(&container)?;
    let moved = Moved::by("+1 hour", "-1 hour")?;
    soon_the_same(&container).context("after an hour forward")?;
    drop(moved);
    soon_the_same(&container).context("after an hour back")?;
    let after = uptime(&container)?;
    that(
        &format!("monotonic time goes on: from {before} to {after} s, and no hour"),
        before < after && after < before + 1_800.0,
    )
}

/// As a machine that is suspended does not run its processes: here they alone are stopped.
fn stood_still(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("stood-still")?;
    let container = pod.container("main", SLEEP).start()?;
    let before = uptime(&container)?;
    let pid = Pid::from_raw(sandbox_pid(&pod)?);
    kill(pid, Signal::SIGSTOP).context("cannot stop the sandbox's process")?;
    std::thread::sleep(clock::seconds(1).max(Duration::from_secs(5)));
    kill(pid, Signal::SIGCONT).context("cannot continue the sandbox's process")?;
    soon_the_same(&container)?;
    let after = uptime(&container)?;
    that(
        &format!("monotonic time goes on: from {before} to {after} s"),
        before < after,
    )?;
    that("the pod is ready", pod.is_ready()?)
}
