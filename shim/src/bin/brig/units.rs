//! The exporter's units as the operator has them: linked from a version's `share/brig/systemd`, copied, or the package's.
//!
//! Nothing here is fatal to what is being done: a node may have no systemd, or an operator units of another kind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where an operator's own units are.
const PLACE: &str = "/etc/systemd/system";
const SOCKET: &str = "brig-metrics.socket";
const SERVICE: &str = "brig-metrics.service";
/// It is there where systemd runs the node.
const SYSTEMD: &str = "/run/systemd/system";

/// Starts the exporter, if it runs, with the version that is current by now.
pub fn restart() {
    if Path::new(SYSTEMD).is_dir() {
        systemctl(&["try-restart", "--no-block", SERVICE]);
    }
}

/// Stops the exporter of units that are links into an installation, which `is_ours` knows, and takes the links away.
pub fn remove(is_ours: impl Fn(&Path) -> bool) {
    let links = [SOCKET, SERVICE].map(|unit| Path::new(PLACE).join(unit));
    let links: Vec<_> = links.into_iter().filter(|link| is_ours(link)).collect();
    if links.is_empty() {
        return;
    }
    if Path::new(SYSTEMD).is_dir() {
        systemctl(&["disable", "--now", SOCKET, SERVICE]);
    }
    // `disable` takes links to units along, where there is systemd.
    for link in links {
        let _ = fs::remove_file(link);
    }
    if Path::new(SYSTEMD).is_dir() {
        systemctl(&["daemon-reload"]);
    }
}

/// The socket's unit, if somebody has one of their own.
#[must_use]
pub fn left() -> Option<PathBuf> {
    Some(Path::new(PLACE).join(SOCKET)).filter(|unit| unit.exists())
}

fn systemctl(args: &[&str]) {
    // It has said why to the operator's journal, and complains of units that nobody has.
    let _ = Command::new("systemctl").args(args).output();
}
