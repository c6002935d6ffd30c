//! What a living thread asks of the kernel while something happens, by strace.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::Signal;

use super::check::that;
use super::clock;
use super::process::Running;

/// The system calls that a thread ends while `act` runs, a line each.
///
/// # Errors
/// If strace cannot attach in time, or fails; those of `act`.
pub fn calls(thread: i32, act: impl FnOnce() -> Result<()>) -> Result<String> {
    let path = format!("/run/brig-strace-{}", std::process::id());
    let mut command = Command::new("strace");
    command.args(["--quiet=all", "--signal=none", "--output", &path]);
    command.args(["--attach", &thread.to_string()]);
    let strace = Running::start(command)?;
    let attached = || -> Result<bool> {
        let status = fs::read_to_string(format!("/proc/{thread}/status"))?;
        Ok(!status.contains("TracerPid:\t0"))
    };
    let end = Instant::now() + clock::seconds(10);
    while !attached()? {
        that("strace attaches in time", Instant::now() < end)?;
        std::thread::sleep(Duration::from_millis(50));
    }
    act()?;
    strace.signal(Signal::SIGINT)?;
    strace.finish(clock::seconds(10))?;
    let trace = fs::read_to_string(&path)?;
    fs::remove_file(&path)?;
    Ok(trace)
}
