//! What a root file system is on: a block device of the node, or an image in a file.
//!
//! A file that is read goes to the VMM as it is. One that is written to goes by way of a loop device, because the owner of
//! a file could change more of it than its bytes (`open_sealed`). The loop device goes when its last descriptor is
//! closed, by whatever death. No file system is looked at, let alone mounted. Blocking. Trusts the paths, which
//! containerd's snapshotter chose.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use brig_hypervisor::control::PIECE_ALIGNMENT;
use brig_hypervisor::launch::open_sealed;
use nix::fcntl::OFlag;

use super::disk::{self, Numbers, Opened};
use crate::error::{Error, Kind, Result};

/// `linux/loop.h`.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_SET_CAPACITY: libc::Ioctl = 0x4c07;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;
/// How often another program may have been faster with the free device.
const ATTEMPTS: usize = 64;

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

/// Opens an image.
///
/// # Errors
/// One sentence with the fix; nothing is left of it then.
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
        return Ok(Image::File {
            file: open_sealed(path, OFlag::O_RDONLY).map_err(failed)?,
            identity: (metadata.dev(), metadata.ino()),
            length,
        });
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(failed)?;
    let file = attach(&file).map_err(|error| {
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
    // SAFETY: the request takes no argument.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_CAPACITY, 0) };
    if done == 0 {
        Ok(())
    } else {
        Err(failed(io::Error::last_os_error()))
    }
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    /// `struct loop_info64`: five numbers of 64 bits.
    places: [u64; 5],
    number: u32,
    encryption: [u32; 2],
    flags: u32,
    names: [u8; 160],
    rest: [u64; 10],
}

/// A loop device over a file, which is there as long as it is open.
fn attach(file: &File) -> io::Result<OwnedFd> {
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    for _ in 0..ATTEMPTS {
        // SAFETY: the request takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = format!("/dev/loop{number}");
        let device = OpenOptions::new().read(true).write(true).open(&path)?;
        // Not every file system has direct I/O.
        for flags in [AUTOCLEAR | DIRECT_IO, AUTOCLEAR] {
            match configure(&device, file, flags) {
                Ok(()) => return open_sealed(Path::new(&path), OFlag::O_RDWR | OFlag::O_EXCL),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => break,
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && flags != AUTOCLEAR => {}
                Err(error) => return Err(error),
            }
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

fn configure(device: &File, file: &File, flags: u32) -> io::Result<()> {
    let config = Config {
        fd: u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?,
        block_size: 0,
        places: [0; 5],
        number: 0,
        encryption: [0; 2],
        flags,
        names: [0; 160],
        rest: [0; 10],
    };
    // SAFETY: the kernel reads the structure, which has its layout and outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_has_the_kernels_size() {
        assert_eq!(size_of::<Config>(), 304);
        assert_eq!(std::mem::offset_of!(Config, flags), 60);
    }

    #[test]
    fn a_file_that_is_read_is_told_with_its_rounded_length_and_what_is_no_image_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer.erofs");
        fs::write(&path, vec![1; 5000]).unwrap();
        if nix::unistd::geteuid().is_root() {
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
