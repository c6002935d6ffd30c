//! The symbols of a pod's guest kernel: a file for gdb that is beside the kernel, as `guest-kernel/symbols` has made it.

use std::path::{Path, PathBuf};

use brig_shim::error::{Error, Result};

use super::pod::Pod;

/// The name of the file.
const NAME: &str = "vmlinux.debug";

/// The file for this pod: of the version of Brig that it runs, or else beside the kernel of its configuration.
///
/// # Errors
/// `FailedPrecondition` if there is none.
pub fn of(pod: &Pod) -> Result<PathBuf> {
    let running = std::fs::read_link(format!("/proc/{}/exe", pod.vmm)).ok();
    // …/VERSION/bin/brig-vmm
    let version = running
        .as_deref()
        .and_then(Path::parent)
        .and_then(Path::parent);
    let of_version = version.map(|version| version.join("share/brig").join(NAME));
    let beside = pod.kernel.with_file_name(NAME);
    let places = of_version.into_iter().chain([beside.clone()]);
    places
        .into_iter()
        .find(|place| place.exists())
        .ok_or_else(|| {
            Error::state(format!(
                "the guest kernel's symbols are not there: {} is missing",
                beside.display()
            ))
        })
}
