//! Images of file systems that the host has put into the share for the agent, mounted when something first needs them.
//!
//! Trusted: they are the operator's, read-only, and no container is given the share itself.
use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use rustix::fs::FlockOperation;

use crate::places::SHARE;

/// One of them.
pub struct Image {
    /// Its name in the share.
    pub name: &'static str,
    /// Where it goes; the lock beside it has this name and `.lock`.
    pub at: &'static str,
    /// Further flags of the mount, which is read-only, without devices and set-user-id programs.
    pub flags: MsFlags,
}

impl Image {
    /// Mounts it unless that has been done, by whichever process. Blocks.
    ///
    /// # Errors
    /// `NotFound` if the host has none, or those of mount(2).
    pub fn mounted(&self) -> io::Result<&'static Path> {
        let at = Path::new(self.at);
        if is_filled(at) {
            return Ok(at);
        }
        fs::create_dir_all(at)?;
        let lock = fs::File::create(PathBuf::from(format!("{}.lock", self.at)))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        if !is_filled(at) {
            let image = Path::new(SHARE).join(self.name);
            let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | self.flags;
            mount(Some(&image), at, Some("erofs"), flags, None::<&str>)?;
        }
        Ok(at)
    }
}

fn is_filled(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}
