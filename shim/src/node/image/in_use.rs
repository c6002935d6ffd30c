//! Whether an image in a file is somebody's already: another pod's, or the node's own.
//!
//! Linux has no O_EXCL for regular files, and a loop device is alone with itself however many there are over its file. So
//! a lock (flock) says that a VM has the file: it belongs to the open file, which the loop device or the VMM keeps, and
//! goes with the last of them, by whatever death. mount(8), losetup(8) and containerd lock nothing, so the node's loop
//! devices are asked which files they are over, by device and inode: a path may be of another mount namespace, or have
//! been renamed. Blocking.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::stat::fstat;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::loops;
use crate::error::{Error, Kind, Result};

/// How long whoever has just let go of a file may take: a loop device goes when the last who looks at it closes it, and
/// udev looks at each that changes.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// What the file is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// To read, beside others who do.
    Read,
    /// To write, alone.
    Write,
}

/// Who has a file.
enum Holder {
    /// Another VM, or a process that locks files as Brig does, and the loop device by which it has it.
    Locked(Option<PathBuf>),
    /// A loop device that nobody locked the file for: the node's.
    Loop(PathBuf),
}

/// Takes the file at `path`, for as long as its open file lives.
///
/// # Errors
/// `FailedPrecondition` with who has it and what to do.
pub(super) fn take(file: &impl AsFd, path: &Path, wanted: Use) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let failed = |error: io::Error| Error::io(format_args!("image {}", path.display()), &error);
        let Some(holder) = holder(file, wanted).map_err(failed)? else {
            return Ok(());
        };
        if Instant::now() >= end {
            return Err(refused(path, wanted, &holder));
        }
        sleep(PAUSE);
    }
}

fn holder(file: &impl AsFd, wanted: Use) -> io::Result<Option<Holder>> {
    let found = fstat(file)?;
    let identity = (found.st_dev, found.st_ino);
    let operation = match wanted {
        Use::Read => FlockOperation::NonBlockingLockShared,
        Use::Write => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(file, operation) {
        // Not every file system has locks; its loop devices can still be seen.
        Ok(()) | Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
            Ok(over(identity, wanted)?.map(Holder::Loop))
        }
        Err(Errno::WOULDBLOCK) => Ok(Some(Holder::Locked(over(identity, Use::Write)?))),
        Err(error) => Err(error.into()),
    }
}

/// A loop device over the file that is in the way of this use, if there is one.
fn over(identity: (u64, u64), wanted: Use) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let (name, of_sysfs) = (entry.file_name(), entry.path());
        // Most have no file. None is opened for nothing: who has one open delays its end.
        if !name.as_bytes().starts_with(b"loop") || !of_sysfs.join("loop/backing_file").exists() {
            continue;
        }
        let reads = || fs::read_to_string(of_sysfs.join("ro")).is_ok_and(|ro| ro.trim() != "0");
        if wanted == Use::Read && reads() {
            continue;
        }
        let node = Path::new("/dev").join(name);
        // One that has gone meanwhile has no file.
        let info = File::open(&node).and_then(|device| loops::info(&device));
        if info.is_ok_and(|info| info.file() == identity) {
            return Ok(Some(node));
        }
    }
    Ok(None)
}

fn refused(path: &Path, wanted: Use, holder: &Holder) -> Error {
    let (who, fix) = match holder {
        Holder::Loop(node) => (
            format!("{} of the node has it", node.display()),
            format!(
                "unmount that and detach it (losetup --detach {})",
                node.display()
            ),
        ),
        Holder::Locked(Some(node)) => (
            format!("another pod has it, by way of {}", node.display()),
            "end that pod first".to_owned(),
        ),
        Holder::Locked(None) => (
            match wanted {
                Use::Read => "another pod writes to it, or a process of the node has locked it",
                Use::Write => "another pod reads it, or a process of the node has locked it",
            }
            .to_owned(),
            "end that first (lslocks tells which it is)".to_owned(),
        ),
    };
    Error::new(
        Kind::FailedPrecondition,
        format!(
            "image {} cannot be given to the pod: it is in use on the node: {who}: {fix}, because two kernels would \
             damage what is on it",
            path.display()
        ),
    )
}
