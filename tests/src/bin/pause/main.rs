//! `brig-pause`: the sandbox container that runc needs for a pod: waits for its end and reaps
//! orphans. Brig never runs one.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

fn main() -> nix::Result<()> {
    let mut wanted = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGCHLD] {
        wanted.add(signal);
    }
    // Blocked first: as PID 1 an unblocked SIGTERM without a handler would be dropped.
    wanted.thread_block()?;
    loop {
        match wanted.wait()? {
            Signal::SIGCHLD => while reaped() {},
            _ => return Ok(()),
        }
    }
}

fn reaped() -> bool {
    matches!(
        waitpid(None, Some(WaitPidFlag::WNOHANG)),
        Ok(status) if status != WaitStatus::StillAlive
    )
}
