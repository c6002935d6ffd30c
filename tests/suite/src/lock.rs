//! One suite at a time in a node: a second would take the first's containers for leftovers.

use std::fs::File;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

const LOCK: &str = "/run/brig-e2e.lock";

/// Waits until no other suite runs in this node; none begins while the result lives.
///
/// # Errors
/// If the lock cannot be made or taken.
pub fn only_one(program: &str) -> Result<Flock<File>> {
    let file = File::create(LOCK).with_context(|| format!("cannot make {LOCK}"))?;
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((file, _)) => file,
    };
    eprintln!("{program}: another suite runs in this node; waiting for it");
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("cannot lock {LOCK}"))
}
