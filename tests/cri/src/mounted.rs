//! Mounts that a case makes on the node, undone at the end of their scope.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mount of the node.
pub struct Mounted(PathBuf);

impl Mounted {
    /// One that somebody else has made.
    pub fn made(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// A tmpfs.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn tmpfs(path: &Path, options: &str) -> Result<Self> {
        Self::memory("tmpfs", path, options)
    }

    /// Huge pages as files.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn hugetlbfs(path: &Path, options: &str) -> Result<Self> {
        Self::memory("hugetlbfs", path, options)
    }

    fn memory(kind: &str, path: &Path, options: &str) -> Result<Self> {
        mount(
            Some(kind),
            path,
            Some(kind),
            MsFlags::empty(),
            Some(options),
        )
        .with_context(|| format!("cannot mount a {kind} on {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }

    /// A file or directory at a second place.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn bind(from: &Path, to: &Path) -> Result<Self> {
        mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("cannot bind {} to {}", from.display(), to.display()))?;
        Ok(Self(to.to_owned()))
    }

    /// Lets mounts below propagate to whoever has this one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn share(&self) -> Result<()> {
        mount(
            None::<&str>,
            &self.0,
            None::<&str>,
            MsFlags::MS_SHARED,
            None::<&str>,
        )
        .with_context(|| format!("cannot share {}", self.0.display()))
    }

    /// Unmounts it now, and not lazily: a volume still in use is busy.
    ///
    /// # Errors
    /// If it is in use.
    pub fn unmount(self) -> Result<()> {
        umount2(&self.0, MntFlags::empty())
            .with_context(|| format!("{} is busy", self.0.display()))?;
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
