//! The templates of this node: guests that were captured once for each kind, from which pods go on instead of booting.
//!
//! They are files of root's on the node's tmpfs, beside the state directory, so that none outlives the boot of the node. A file has a name
//! only when it is whole: whoever is killed while he makes one leaves nothing. What is trusted: whoever can write there, who is root.

mod kind;
pub mod maker;
mod recipe;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use brig_hypervisor::launch::open_sealed;
use nix::fcntl::OFlag;
use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, XattrFlags, fgetxattr, flock, fsetxattr, linkat,
};
use serde_json::Value;

pub use kind::{Files, Kind, Machine};
pub use recipe::Recipe;

use crate::error::ignore_missing;

/// Comes after the state directory's name.
const SUFFIX: &str = ".templates";
const LOCK: &str = "lock";
/// Says why no template of a kind could be made, so that it is not tried for each pod.
const FAILED: &str = "failed";
/// The recipe of a template, with its file. `trusted.*` is what root alone can set and see.
const MARK: &str = "trusted.brig";
/// The longest recipe in bytes.
const MAX_RECIPE: usize = 16 << 10;
/// The most that are kept: each holds some 30 MiB of the node.
pub const MOST: usize = 8;

/// The directory.
#[derive(Debug, Clone)]
pub struct Templates {
    dir: PathBuf,
}

/// A template, or a kind of which none can be made.
#[derive(Debug)]
pub struct Entry {
    /// Its kind's key.
    pub key: String,
    /// Bytes of the node's memory.
    pub bytes: u64,
    /// When it was made.
    pub made: SystemTime,
    /// What it was made from.
    pub recipe: Option<Recipe>,
    /// Why there is none.
    pub failed: Option<String>,
}

impl Templates {
    /// For the pods that have their state below `base`.
    #[must_use]
    pub fn beside(base: &Path) -> Self {
        let mut dir = base.as_os_str().to_owned();
        dir.push(SUFFIX);
        Self { dir: dir.into() }
    }

    fn file(&self, key: &str) -> PathBuf {
        self.dir.join(key)
    }

    fn failure(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.{FAILED}"))
    }

    /// The template of a kind, as a VMM may have it: nobody can change it by this descriptor. None if there is none.
    ///
    /// # Errors
    /// What the host says.
    pub fn open(&self, key: &str) -> io::Result<Option<OwnedFd>> {
        match open_sealed(&self.file(key), OFlag::O_RDONLY) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether it is of use to make one: there is none, and it has not failed.
    #[must_use]
    pub fn lacks(&self, key: &str) -> bool {
        !self.file(key).exists() && !self.failure(key).exists()
    }

    /// The right to make templates, which ends with the last holder of the descriptor. None if somebody has it.
    ///
    /// # Errors
    /// What the host says.
    pub fn lock(&self) -> io::Result<Option<OwnedFd>> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)?;
        let file = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.dir.join(LOCK))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file.into())),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Keeps what was captured as the template of the recipe's kind, and drops those that it makes useless: of the same files as they were
    /// before, and the oldest beyond [`MOST`]. To be called by who has the lock.
    ///
    /// # Errors
    /// What the host says; nothing is kept then.
    pub fn keep(&self, recipe: &Recipe, mut captured: File) -> io::Result<()> {
        let described = serde_json::to_vec(recipe)?;
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(&self.dir, flags, Mode::RUSR)?;
        let mut file = File::from(file);
        io::Seek::rewind(&mut captured)?;
        io::copy(&mut captured, &mut file)?;
        fsetxattr(&file, MARK, &described, XattrFlags::empty())?;
        let _ = fs::remove_file(self.failure(&recipe.key));
        ignore_missing(fs::remove_file(self.file(&recipe.key)))?;
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let name = self.file(&recipe.key);
        linkat(CWD, link.as_str(), CWD, &name, AtFlags::SYMLINK_FOLLOW)?;
        let mut others = self.list()?;
        others.retain(|entry| entry.key != recipe.key && entry.failed.is_none());
        // The newest first.
        others.sort_by_key(|entry| std::cmp::Reverse(entry.made));
        let mut left = MOST - 1;
        for other in others {
            let known = other.recipe.as_ref();
            let useful = left > 0 && known.is_some_and(|other| !other.is_older_than(recipe));
            if useful {
                left -= 1;
            } else {
                self.drop_one(&other.key)?;
            }
        }
        Ok(())
    }

    /// Remembers that none can be made of this kind.
    ///
    /// # Errors
    /// What the host says.
    pub fn refuse(&self, key: &str, reason: &str) -> io::Result<()> {
        fs::write(self.failure(key), reason)
    }

    /// Drops one. Pods that go on from it keep what they have.
    ///
    /// # Errors
    /// What the host says; one that is gone is no error.
    pub fn drop_one(&self, key: &str) -> io::Result<()> {
        ignore_missing(fs::remove_file(self.file(key)))?;
        ignore_missing(fs::remove_file(self.failure(key)))
    }

    /// Drops all, and their directory.
    ///
    /// # Errors
    /// What the host says; none that is there is no error.
    pub fn remove(&self) -> io::Result<()> {
        ignore_missing(fs::remove_dir_all(&self.dir))
    }

    /// All of them, in the order of their keys.
    ///
    /// # Errors
    /// What the host says.
    pub fn list(&self) -> io::Result<Vec<Entry>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let Some(name) = name.to_str().filter(|name| *name != LOCK) else {
                continue;
            };
            // It may just have gone.
            found.extend(self.entry(name).ok());
        }
        found.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    fn entry(&self, name: &str) -> io::Result<Entry> {
        let path = self.dir.join(name);
        let metadata = fs::metadata(&path)?;
        let key = name.strip_suffix(&format!(".{FAILED}"));
        let failed = key.map(|_| fs::read_to_string(&path)).transpose()?;
        let mut described = vec![0; MAX_RECIPE];
        let length = fgetxattr(File::open(&path)?, MARK, &mut described).unwrap_or(0);
        let recipe = serde_json::from_slice::<Value>(&described[..length]);
        Ok(Entry {
            key: key.unwrap_or(name).to_owned(),
            bytes: metadata.len(),
            made: metadata.modified()?,
            recipe: recipe
                .ok()
                .and_then(|value| serde_json::from_value(value).ok()),
            failed,
        })
    }
}

#[cfg(test)]
mod tests;
