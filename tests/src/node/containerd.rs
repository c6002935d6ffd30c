//! Which containerd the node runs.

use std::process::Command;

use anyhow::{Context, Result};

use super::{clock, process};

/// Switches the node to another containerd; returns when it serves.
///
/// # Errors
/// If the node has none of this name, or it does not come up.
pub fn switch(to: &str) -> Result<()> {
    let mut command = Command::new("use-containerd");
    command.arg(to);
    process::run(command, clock::seconds(60))?
        .success()
        .with_context(|| format!("cannot switch to containerd {to}"))
        .map(drop)
}

/// Restarts it under whatever runs; returns when it serves.
///
/// # Errors
/// If it does not come up.
pub fn restart() -> Result<()> {
    let mut command = Command::new("systemctl");
    command.args(["restart", "containerd"]);
    process::run(command, clock::seconds(30))?
        .success()
        .context("containerd does not start again")
        .map(drop)
}

/// What cases and reports call a release: "1.7" of "v1.7.24~ds1".
#[must_use]
pub fn short_version(release: &str) -> String {
    let parts: Vec<_> = release
        .trim()
        .trim_start_matches('v')
        .split('.')
        .take(2)
        .collect();
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_called_by_its_first_two_numbers() {
        for (release, short) in [
            ("v2.3.4", "2.3"),
            (" 1.6.20~ds1", "1.6"),
            ("2.0.0-rc.1", "2.0"),
        ] {
            assert_eq!(short_version(release), short);
        }
    }
}
