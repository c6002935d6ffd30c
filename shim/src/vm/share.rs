//! [`Mounts`] on the share of a real VMM, and what of the host may never be shared.
//!
//! Sources come from containerd and the spec, which are trusted to name what the pod may see; a host
//! procfs, sysfs or cgroupfs is refused all the same, because its files act on the node.

use std::path::Path;

use brig_hypervisor::share::{Attributes, Propagation, RootfsMount as Mount, Share, ShareError};

use super::{Mounts, RootfsMount, shown};
use crate::error::{Error, Kind, Result};

/// statfs(2) types of file systems that are the node's kernel itself.
const KERNEL_FILE_SYSTEMS: [(i64, &str); 6] = [
    (0x9fa0, "procfs"),
    (0x6265_6572, "sysfs"),
    (0x6367_7270, "cgroup2"),
    (0x27_e0eb, "cgroup"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
];

impl Mounts for Share {
    fn attach_rootfs(&self, path: &str, mounts: &[RootfsMount]) -> Result<()> {
        let mounts: Vec<Mount> = mounts
            .iter()
            .map(|mount| Mount {
                fstype: mount.kind.clone(),
                source: mount.source.clone(),
                options: mount.options.clone(),
            })
            .collect();
        Share::attach_rootfs(self, &mounts, path).map_err(|error| refused(&error))
    }

    fn attach(&self, path: &str, source: &Path, readonly: bool, recursive: bool) -> Result<()> {
        let metadata = std::fs::metadata(source)
            .map_err(|error| Error::io(format_args!("mount source {}", shown(source)), &error))?;
        refuse_kernel_file_system(source)?;
        let attributes = Attributes {
            readonly,
            recursive,
            propagation: Propagation::Private,
        };
        let attached = if metadata.is_dir() {
            self.attach_dir(source, path, attributes)
        } else {
            self.attach_file(source, path, attributes)
        };
        attached.map_err(|error| refused(&error))
    }

    fn detach(&self, path: &str) -> Result<()> {
        match Share::detach(self, path) {
            Ok(()) | Err(ShareError::NotAttached { .. }) => Ok(()),
            Err(error) => Err(refused(&error)),
        }
    }
}

fn refused(error: &ShareError) -> Error {
    let kind = match error {
        ShareError::InvalidPath { .. } | ShareError::Kind { .. } => Kind::InvalidArgument,
        ShareError::Source { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Kind::NotFound
        }
        ShareError::Unsupported { .. } => Kind::Unimplemented,
        ShareError::AlreadyAttached { .. } => Kind::AlreadyExists,
        ShareError::Busy { .. } | ShareError::NotAttached { .. } => Kind::FailedPrecondition,
        ShareError::Vmm(_) | ShareError::Jail(_) => Kind::Unavailable,
        _ => Kind::Internal,
    };
    Error::new(kind, error.to_string())
}

fn refuse_kernel_file_system(source: &Path) -> Result<()> {
    let Ok(stat) = rustix::fs::statfs(source) else {
        return Ok(());
    };
    match KERNEL_FILE_SYSTEMS
        .iter()
        .find(|(kind, _)| *kind == stat.f_type)
    {
        None => Ok(()),
        Some((_, name)) => Err(Error::invalid(format!(
            "mount source {} is on the node's {name}, which a VM cannot be given",
            shown(source)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_kernel_file_systems_are_refused_and_others_are_not() {
        for path in ["/proc", "/proc/self/status", "/sys", "/sys/kernel"] {
            let error = refuse_kernel_file_system(Path::new(path)).unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument, "{path}");
        }
        refuse_kernel_file_system(Path::new("/etc")).unwrap();
    }
}
