//! The files of a cgroup.
use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    path::Path,
};

/// Writes to a file that exists: cgroupfs answers an attempt to make one with "permission denied".
pub(super) fn set(file: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(file)?
        .write_all(value.as_bytes())
}
