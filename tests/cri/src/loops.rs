//! Loop devices that a case makes on the node, detached at the end of their scope.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use brig_tests::node::clock;
use nix::fcntl::OFlag;

use crate::container::eventually;
use crate::node;

/// A loop device over a file.
pub struct Loop {
    /// Its node.
    pub path: PathBuf,
    /// Its file.
    pub file: PathBuf,
    attached: bool,
}

impl Loop {
    /// A device of so many bytes over a new sparse file.
    ///
    /// # Errors
    /// If losetup finds no free device.
    pub fn new(file: &Path, bytes: u64) -> Result<Self> {
        File::create(file)?.set_len(bytes)?;
        let path = node::run(
            "losetup",
            &["--find", "--show", &file.display().to_string()],
        )?;
        Ok(Self {
            path: path.trim().into(),
            file: file.to_owned(),
            attached: true,
        })
    }

    /// Its node, as text.
    pub fn node(&self) -> String {
        self.path.display().to_string()
    }

    /// What is on it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(&self, at: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        File::open(&self.path)?.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    /// Makes it larger, as its owner does.
    ///
    /// # Errors
    /// If losetup refuses.
    pub fn grow(&self, bytes: u64) -> Result<()> {
        OpenOptions::new()
            .write(true)
            .open(&self.file)?
            .set_len(bytes)?;
        node::run("losetup", &["--set-capacity", &self.node()]).map(drop)
    }

    /// Nobody has it: it opens for one alone, and goes at once when it is detached.
    ///
    /// # Errors
    /// If somebody has it.
    pub fn freed(mut self) -> Result<()> {
        // udev may look at it for a moment after its last writer has closed it.
        let what = format!(
            "{} of {} opens exclusively",
            self.node(),
            self.file.display()
        );
        eventually(&what, clock::seconds(1), || {
            let flags = OFlag::O_EXCL.bits();
            Ok(OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(flags)
                .open(&self.path)
                .ok())
        })?;
        self.attached = false;
        node::run("losetup", &["--detach", &self.node()])?;
        let name = self.path.file_name().context("no name")?;
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        let gone = eventually("the device is detached", clock::seconds(1), || {
            Ok((!backing.exists()).then_some(()))
        });
        ensure!(
            gone.is_ok(),
            "{} is held: {}",
            self.node(),
            holders(&self.path)
        );
        Ok(())
    }
}

/// The processes that have it open, for the message.
fn holders(path: &Path) -> String {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let open = fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        for entry in open {
            if fs::metadata(entry.path()).is_ok_and(|it| same(&it, path)) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                found.push(format!(
                    "{} {}",
                    process.file_name().to_string_lossy(),
                    name.trim()
                ));
            }
        }
    }
    format!("{found:?}")
}

fn same(found: &fs::Metadata, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).is_ok_and(|device| device.rdev() == found.rdev())
}

impl Drop for Loop {
    fn drop(&mut self) {
        if self.attached {
            let _ = node::run("losetup", &["--detach", &self.node()]);
        }
    }
}
