//! `brig uninstall`: this installation goes, and with the last one of the node what they share.

use std::path::{Path, PathBuf};

use brig_shim::error::Result;
use serde_json::json;

use crate::cli::Output;
use crate::handlers::{Containerd, HANDLERS};
use crate::installed::Installation;
use crate::{check, others, units};

/// Removes `installation` with its links in `links`; with `purge` and no other installation, `/etc/brig` too. Says what is
/// gone, and what is left to the operator.
///
/// # Errors
/// `FailedPrecondition` that says which pods run; `Internal` with what could not be removed.
pub fn uninstall(
    installation: &Installation,
    purge: bool,
    links: &Path,
    output: &Output,
) -> Result<String> {
    installation.refuse_pods()?;
    let others = others::others();
    let is_last = others.is_empty();
    let mut text = String::new();
    let mut is_to_restart = !is_last;
    // While there is a program to say it again with, if a file cannot be changed.
    let files = is_last.then(check::containerd_files).unwrap_or_default();
    for file in files {
        let done = Containerd::new(&file, check::containerd_merges(&file)).remove()?;
        is_to_restart |= !done.changed.is_empty();
        text.push_str(&done.left());
    }
    units::remove(|link| installation.is_ours(link));
    let configuration = (purge && is_last).then_some(Path::new(HANDLERS));
    let removed = installation.uninstall(links, configuration, is_last)?;
    text.push_str(&format!("removed {}\n", removed.display()));
    if is_to_restart && is_last {
        text.push_str(
            "its handlers are gone from containerd's configuration: systemctl restart containerd\n",
        );
    }
    if !is_last {
        text.push_str(&shared(&others));
    }
    if let Some(unit) = units::left().filter(|_| is_last) {
        text.push_str(&format!(
            "left: {}, which was copied by hand: systemctl disable --now brig-metrics.socket brig-metrics.service, and \
             remove it\n",
            unit.display()
        ));
    }
    Ok(output.tell(
        &json!({ "removed": removed, "restartContainerd": is_to_restart, "others": others }),
        text,
    ))
}

/// Why what installations share is left.
#[must_use]
pub fn shared(others: &[PathBuf]) -> String {
    let places = others.iter().map(|place| place.display().to_string());
    // containerd looks in PATH once for each handler, and then goes on with what it found.
    format!(
        "left: the handlers in containerd's configuration, {HANDLERS}, and what is kept of pods, for Brig in {}\n\
         containerd may still look for this one's shim: systemctl restart containerd\n",
        places.collect::<Vec<_>>().join(" and ")
    )
}
