//! What a root file system or a volume's is on: a block device of the node, or an image in a file.
//!
//! A file that is read goes to the VMM as it is. One that is written to goes by way of a loop device, because the owner of
//! a file could change more of it than its bytes (`open_sealed`). The loop device goes when its last descriptor is
//! closed, by whatever death. One that is written to is the VM's alone, be it a device or a file (`in_use`). No file
//! system is looked at, let alone mounted. Blocking. Trusts the paths, which containerd's snapshotter or a storage driver
//! chose.

mod in_use;
mod loops;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use brig_hypervisor::control::PIECE_ALIGNMENT;
use brig_hypervisor::launch::open_sealed;
use nix::fcntl::OFlag;

use self::in_use::Use;
use super::disk::{self, Numbers, Opened};
use crate::error::{Error, Kind, Result};

/// An image that is open.
#[derive(Debug)]
pub enum Image {
    /// A device, or a file that is written to.
    Disk(Opened),
    /// A file that is read.
    File {
        /// The file.
        file: OwnedFd,
        /// Which: device and inode.
        identity: (u64, u64),
        /// Its bytes, and the zeros up to a multiple of [`PIECE_ALIGNMENT`].
        length: u64,
    },
}

/// Opens an image: one that is to be written to alone, one that is only read beside others who read it.
///
/// # Errors
/// One sentence with the fix; nothing is left of it then. `FailedPrecondition` for one that is in use on the node.
pub fn open(path: &Path, readonly: bool) -> Result<Image> {
    let failed = |error: io::Error| Error::io(format_args!("image {}", path.display()), &error);
    let metadata = fs::metadata(path).map_err(failed)?;
    if metadata.file_type().is_block_device() {
        let numbers = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
        let opened = disk::open_alone(numbers, !readonly)?;
        if opened.readonly && !readonly {
            return Err(Error::new(
                Kind::FailedPrecondition,
                format!(
                    "{} is read-only on the node, and is to be written to",
                    path.display()
                ),
            ));
        }
        return Ok(Image::Disk(opened));
    }
    let length = metadata.len().checked_next_multiple_of(PIECE_ALIGNMENT);
    let Some(length) = length.filter(|length| *length > 0 && metadata.is_file()) else {
        return Err(Error::invalid(format!(
            "image {} is neither a block device nor a file with something in it",
            path.display()
        )));
    };
    if readonly {
        let file = open_sealed(path, OFlag::O_RDONLY).map_err(failed)?;
        in_use::take(&file, path, Use::Read)?;
        return Ok(Image::File {
            file,
            identity: (metadata.dev(), metadata.ino()),
            length,
        });
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(failed)?;
    in_use::take(&file, path, Use::Write)?;
    let file = loops::attach(&file).map_err(|error| {
        let fix = match error.kind() {
            io::ErrorKind::NotFound => "; load the module loop on this node",
            _ => "",
        };
        Error::new(
            Kind::FailedPrecondition,
            format!("no loop device for image {}: {error}{fix}", path.display()),
        )
    })?;
    Ok(Image::Disk(Opened {
        file,
        readonly: false,
        block_size: 512,
    }))
}

/// Lets a loop device have as many bytes as its file has by now.
///
/// # Errors
/// `FailedPrecondition` with what the system says.
pub fn follow_file(numbers: Numbers) -> Result<()> {
    let failed = |error: io::Error| {
        let (major, minor) = numbers;
        let message = format!("the loop device {major}:{minor} does not follow its file: {error}");
        Error::new(Kind::FailedPrecondition, message)
    };
    let device = File::open(disk::place(numbers)?).map_err(failed)?;
    loops::follow(&device).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::{Duration, Instant};

    use super::*;
    use brig_fixtures::needs::{needs, root};

    const IN_USE: &str = "in use on the node";

    /// A directory with a file of a MiB in it, where loop devices can be made.
    fn image() -> Option<(tempfile::TempDir, PathBuf)> {
        let control = Path::new("/dev/loop-control").exists();
        if !root() || !needs(control, "loop devices (/dev/loop-control)") {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        Some((directory, path))
    }

    /// Opens what is given up. A child that a test beside this one has made holds every descriptor until it runs its program.
    fn given_up(path: &Path, readonly: bool) -> Image {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match open(path, readonly) {
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
                opened => return opened.unwrap(),
            }
        }
    }

    /// It is refused for this use, in words that name the file and these; likewise not always at once.
    fn refused(path: &Path, readonly: bool, words: &[&str]) {
        let name = path.display().to_string();
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let error = open(path, readonly).unwrap_err();
            assert_eq!(error.kind, Kind::FailedPrecondition, "{error}");
            let has = |word: &str| error.message.contains(word);
            if has(&name) && words.iter().all(|word| has(word)) {
                return;
            }
            assert!(Instant::now() < end, "{words:?}: {error}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn a_file_that_is_written_to_is_nobody_elses_until_its_loop_device_is_closed() {
        let Some((_directory, path)) = image() else {
            return;
        };
        let Image::Disk(first) = open(&path, false).unwrap() else {
            panic!("not a disk")
        };
        for readonly in [false, true] {
            refused(&path, readonly, &["another pod", "/dev/loop", IN_USE]);
        }
        drop(first);
        drop(given_up(&path, false));
    }

    #[test]
    fn a_file_that_is_read_is_read_by_others_too_and_written_to_by_none() {
        let Some((_directory, path)) = image() else {
            return;
        };
        let readers = [open(&path, true).unwrap(), open(&path, true).unwrap()];
        refused(&path, false, &["another pod reads it", IN_USE]);
        drop(readers);
        drop(given_up(&path, false));
    }

    #[test]
    fn a_file_that_the_node_has_by_a_loop_device_is_refused_whatever_it_is_called_by_now() {
        let Some((directory, path)) = image() else {
            return;
        };
        // As losetup and mount do it: nothing is locked.
        let writable = OpenOptions::new().read(true).write(true).open(&path);
        let of_node = loops::attach(&writable.unwrap()).unwrap();
        let renamed = directory.path().join("renamed.img");
        fs::rename(&path, &renamed).unwrap();
        for readonly in [false, true] {
            refused(
                &renamed,
                readonly,
                &["/dev/loop", "losetup --detach", IN_USE],
            );
        }
        drop(of_node);
        drop(given_up(&renamed, false));
        // Where the node only reads it, others may.
        let of_node = loops::attach(&File::open(&renamed).unwrap()).unwrap();
        drop(given_up(&renamed, true));
        refused(&renamed, false, &["losetup --detach", IN_USE]);
        drop(of_node);
        drop(given_up(&renamed, false));
    }

    #[test]
    fn a_device_that_is_read_only_on_the_node_is_opened_for_reading_or_refused() {
        let Some((_directory, path)) = image() else {
            return;
        };
        let is_for_reading = |opened: &Opened| {
            let flags = nix::fcntl::fcntl(&opened.file, nix::fcntl::FcntlArg::F_GETFL).unwrap();
            opened.readonly
                && OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE == OFlag::O_RDONLY
        };
        let of_node = loops::attach(&File::open(&path).unwrap()).unwrap();
        let stat = nix::sys::stat::fstat(&of_node).unwrap();
        let numbers = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
        let node = disk::place(numbers).unwrap();
        assert!(is_for_reading(&disk::open(numbers, true).unwrap()));
        // Nobody has it alone any more, and somebody still has it.
        let device = File::open(&node).unwrap();
        drop(of_node);
        refused(&node, false, &["read-only on the node"]);
        let Image::Disk(opened) = open(&node, true).unwrap() else {
            panic!("not a disk")
        };
        assert!(is_for_reading(&opened));
        drop(device);
    }

    #[test]
    fn a_file_that_is_read_is_told_with_its_rounded_length_and_what_is_no_image_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer.erofs");
        fs::write(&path, vec![1; 5000]).unwrap();
        if root() {
            let Image::File { length, .. } = open(&path, true).unwrap() else {
                panic!("not a file")
            };
            assert_eq!(length, 8192);
        }
        fs::write(&path, "").unwrap();
        for wrong in [path.as_path(), directory.path(), Path::new("/dev/null")] {
            let error = open(wrong, true).unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument, "{error}");
        }
        assert_eq!(
            open(Path::new("/nonexistent"), true).unwrap_err().kind,
            Kind::NotFound
        );
    }
}
