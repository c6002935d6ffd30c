//! How long the guest's kernel keeps what was written to files that are the pod's own before the node has it.
//!
//! A close or a sync does not wait for that time. It bounds what a VM that is killed loses of files that are open, and how
//! late whoever looks from the node sees what is being written.
use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// A page that has been dirty for this long is written, hundredths of a second; it is looked for as often.
const AGE: &str = "100";
const PARAMETERS: [&str; 2] = [
    "/proc/sys/vm/dirty_expire_centisecs",
    "/proc/sys/vm/dirty_writeback_centisecs",
];
const DEVICES: &str = "/sys/class/bdi";

/// Settles it for the file system that is mounted at `own`.
///
/// # Errors
/// What the kernel refuses.
pub fn settle(own: &Path) -> io::Result<()> {
    for parameter in PARAMETERS {
        fs::write(parameter, AGE)?;
    }
    // FUSE may use one part in a hundred of what other file systems may, because a server may never answer: with 256 MiB
    // a writer would wait after 400 KiB. This one is the host.
    let device = device(fs::metadata(own)?.dev());
    fs::write(device.join("strict_limit"), "0")?;
    fs::write(device.join("max_ratio"), "100")
}

/// Its directory in sysfs.
fn device(number: u64) -> PathBuf {
    Path::new(DEVICES).join(format!("{}:{}", libc::major(number), libc::minor(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_is_found_by_its_number() {
        assert_eq!(
            device(libc::makedev(0, 45)),
            Path::new("/sys/class/bdi/0:45")
        );
    }
}
