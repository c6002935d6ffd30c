//! What a setuid or setcap binary gains, seen by executing it.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

/// Replaces this process by the program at `path`, a copy of the probe, which prints its facts.
pub fn exec_facts(path: &str) -> Result<u8> {
    let error = Command::new(path).arg("facts").exec();
    Err(error).with_context(|| format!("cannot execute {path}"))
}
