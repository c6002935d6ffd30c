//! The templates of this node: guests that were captured once for each kind, from which pods go on instead of booting.
//!
//! They are files of root's on the node's tmpfs, beside the state directory, so that none outlives the boot of the node. A file has a name
//! only when it is whole: whoever is killed while he makes one leaves nothing. What is trusted: whoever can write there, who is root.

mod kind;
pub mod maker;
mod recipe;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

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
/// Says why no template of a kind can be made, so that it is not tried for each pod.
const FAILED: &str = "failed";
/// Says why none could be made for the moment, likewise.
const LATER: &str = "later";
/// How long that moment is: a node that has too little for it, as in the rush after its boot, is not asked again for each pod.
const MOMENT: Duration = Duration::from_secs(600);
/// Of what the file system has free a template may take one part in so many: systemd, containerd and kubelet need it too.
const SHARE: u64 = 2;
/// The recipe of a template, with its file. `trusted.*` is what root alone can set and see.
const MARK: &str = "trusted.brig";
/// The longest recipe in bytes.
const MAX_RECIPE: usize = 16 << 10;
/// The most that are kept: each holds some 30 MiB of the node, and up to 20 more for each GiB of the guest's memory.
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
    /// It is tried again.
    pub later: bool,
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

    fn failure(&self, key: &str, how: &str) -> PathBuf {
        self.dir.join(format!("{key}.{how}"))
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

    /// Whether it is of use to make one: there is none, and it has not failed, or only for a moment that is over.
    #[must_use]
    pub fn lacks(&self, key: &str) -> bool {
        !self.file(key).exists() && !self.failure(key, FAILED).exists() && !self.waits(key, MOMENT)
    }

    fn waits(&self, key: &str, moment: Duration) -> bool {
        let failed = fs::metadata(self.failure(key, LATER)).and_then(|marker| marker.modified());
        // One from the future, of a clock that was set back, says nothing.
        let age = failed.ok().and_then(|at| at.elapsed().ok());
        age.is_some_and(|age| age < moment)
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

    /// Keeps what was captured as the template of the recipe's kind, and drops those that are of no use any more, and the oldest beyond
    /// [`MOST`]. To be called by who has the lock.
    ///
    /// # Errors
    /// What the host says, or that it has too little room; nothing is kept then.
    pub fn keep(&self, recipe: &Recipe, mut captured: File) -> io::Result<()> {
        let described = serde_json::to_vec(recipe)?;
        self.refuse_to_fill(captured.metadata()?.len())?;
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(&self.dir, flags, Mode::RUSR)?;
        let mut file = File::from(file);
        io::Seek::rewind(&mut captured)?;
        io::copy(&mut captured, &mut file)?;
        fsetxattr(&file, MARK, &described, XattrFlags::empty())?;
        self.drop_one(&recipe.key)?;
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let name = self.file(&recipe.key);
        linkat(CWD, link.as_str(), CWD, &name, AtFlags::SYMLINK_FOLLOW)?;
        let mut others = self.list()?;
        others.retain(|entry| entry.key != recipe.key && entry.failed.is_none());
        // The newest first.
        others.sort_by_key(|entry| std::cmp::Reverse(entry.made));
        let mut left = MOST - 1;
        for other in others {
            if left > 0 && is_of_use(&other) {
                left -= 1;
            } else {
                self.drop_one(&other.key)?;
            }
        }
        Ok(())
    }

    fn refuse_to_fill(&self, bytes: u64) -> io::Result<()> {
        let room = rustix::fs::statvfs(&self.dir)?;
        let free = room.f_bavail.saturating_mul(room.f_frsize);
        if bytes > free / SHARE {
            return Err(io::Error::other(format!(
                "it has {} MiB, and {} has {} MiB free, of which it may take half",
                bytes >> 20,
                self.dir.display(),
                free >> 20
            )));
        }
        Ok(())
    }

    /// Drops those that no pod can go on from any more: their files are gone or are others, or the node's microcode is.
    ///
    /// # Errors
    /// What the host says.
    pub fn drop_useless(&self) -> io::Result<()> {
        for entry in self.list()? {
            if entry.failed.is_none() && !is_of_use(&entry) {
                self.drop_one(&entry.key)?;
            }
        }
        Ok(())
    }

    /// Remembers that none can be made of this kind, or none for the moment.
    ///
    /// # Errors
    /// What the host says.
    pub fn refuse(&self, key: &str, reason: &str, later: bool) -> io::Result<()> {
        let how = if later { LATER } else { FAILED };
        fs::write(self.failure(key, how), reason)
    }

    /// Drops one. Pods that go on from it keep what they have.
    ///
    /// # Errors
    /// What the host says; one that is gone is no error.
    pub fn drop_one(&self, key: &str) -> io::Result<()> {
        ignore_missing(fs::remove_file(self.file(key)))?;
        ignore_missing(fs::remove_file(self.failure(key, FAILED)))?;
        ignore_missing(fs::remove_file(self.failure(key, LATER)))
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
        let (key, later) = match name.rsplit_once('.') {
            Some((key, how)) if [FAILED, LATER].contains(&how) => (Some(key), how == LATER),
            _ => (None, false),
        };
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
            later,
        })
    }
}

/// Whether what the template was made from still makes its kind.
fn is_of_use(entry: &Entry) -> bool {
    let kind = entry.recipe.as_ref().map(|recipe| {
        let (kernel, initramfs) = (File::open(&recipe.kernel)?, File::open(&recipe.initramfs)?);
        let files = Files {
            kernel: kernel.as_fd(),
            initramfs: initramfs.as_fd(),
            vmm: &recipe.vmm,
        };
        Kind::of(&files, &recipe.machine)
    });
    kind.is_some_and(|kind: io::Result<Kind>| kind.is_ok_and(|kind| kind.key() == entry.key))
}

#[cfg(test)]
mod tests;
