//! New file systems, mounted detached, and what the kernel says when it refuses one.
use std::{io, os::fd::OwnedFd};

use rustix::{
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen,
    },
};

use super::{
    failure::{Context as _, Failure, Result, error_text},
    options::Options,
};
use crate::spec::Mount;

/// A detached mount of a new file system.
pub fn new_file_system(mount: &Mount, options: &Options) -> Result<OwnedFd> {
    // The container's cgroup namespace makes its own cgroup the root of this mount.
    let kind = if mount.kind == "cgroup" {
        "cgroup2"
    } else {
        mount.kind.as_str()
    };
    let kernel_own = matches!(
        kind,
        "proc" | "sysfs" | "cgroup2" | "devpts" | "mqueue" | "tmpfs"
    );
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| match error {
        Errno::NODEV => Failure(format!("the guest kernel has no file system {kind:?}")),
        error => Failure(format!("fsopen: {}", error_text(&error.into()))),
    })?;
    if !mount.source.is_empty() {
        fsconfig_set_string(&context, "source", mount.source.as_str()).during("source")?;
    }
    for (key, value) in &options.data {
        let set = match value {
            Some(value) => fsconfig_set_string(&context, key.as_str(), value.as_str()),
            None => fsconfig_set_flag(&context, key.as_str()),
        };
        set.map_err(|error| Failure(format!("option {key}: {}", complaint(&context, error))))?;
    }
    // The super block of the kernel's own file systems is shared with other mounts of them.
    if options.readonly && !kernel_own {
        fsconfig_set_flag(&context, "ro").during("option ro")?;
    }
    fsconfig_create(&context).map_err(|error| Failure(complaint(&context, error)))?;
    fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .during("fsmount")
}

/// What the kernel says in the context's log, or the error's own text.
pub fn complaint(context: &OwnedFd, error: Errno) -> String {
    let mut line = [0; 512];
    match rustix::io::read(context, &mut line) {
        // "e tmpfs: Unknown parameter 'x'".
        Ok(n @ 3..) => String::from_utf8_lossy(line.get(2..n).unwrap_or_default())
            .trim_end()
            .to_owned(),
        _ => error_text(&io::Error::from(error)),
    }
}
