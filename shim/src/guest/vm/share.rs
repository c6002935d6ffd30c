//! [`Mounts`] on the share of a real VMM. Sources come from containerd and the spec, which are trusted
//! to name what the pod may see; the share itself refuses file systems that are not known to hold data.

use std::path::Path;

use brig_hypervisor::share::{
    Attributes, LaterMount, LeftOut, RootfsMount as Mount, Share, ShareError,
};

use super::{Mounts, RootfsMount, shown};
use crate::error::{Error, Kind, Result};

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

    fn attach(&self, path: &str, source: &Path, how: Attributes) -> Result<Vec<LeftOut>> {
        let metadata = std::fs::metadata(source)
            .map_err(|error| Error::io(format_args!("mount source {}", shown(source)), &error))?;
        let attached = if metadata.is_dir() {
            self.attach_dir(source, path, how)
        } else {
            self.attach_file(source, path, how).map(|()| Vec::new())
        };
        attached.map_err(|error| refused(&error))
    }

    fn attach_below(&self, path: &str, later: &LaterMount<'_>, readonly: bool) -> Result<()> {
        Share::attach_below(self, later, path, readonly).map_err(|error| refused(&error))
    }

    fn detach_below(&self, path: &str, below: &Path) -> Result<()> {
        match Share::detach_below(self, path, below) {
            Ok(()) | Err(ShareError::NotAttached { .. }) => Ok(()),
            Err(error) => Err(refused(&error)),
        }
    }

    fn set_readonly(&self, path: &str, readonly: bool) -> Result<()> {
        Share::set_readonly(self, path, readonly).map_err(|error| refused(&error))
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
        ShareError::InvalidPath { .. }
        | ShareError::Kind { .. }
        | ShareError::KernelFileSystem { .. }
        | ShareError::UnknownFileSystem { .. }
        | ShareError::Unmappable { .. } => Kind::InvalidArgument,
        ShareError::Source { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Kind::NotFound
        }
        ShareError::Unsupported { .. } => Kind::Unimplemented,
        ShareError::Moved { .. } => Kind::FailedPrecondition,
        ShareError::AlreadyAttached { .. } => Kind::AlreadyExists,
        ShareError::Busy { .. } | ShareError::NotAttached { .. } => Kind::FailedPrecondition,
        ShareError::Vmm(_) | ShareError::Jail(_) => Kind::Unavailable,
        _ => Kind::Internal,
    };
    Error::new(kind, error.to_string())
}
