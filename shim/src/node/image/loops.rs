//! Loop devices (`linux/loop.h`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use brig_hypervisor::launch::open_sealed;
use nix::fcntl::OFlag;

const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;
const LOOP_SET_CAPACITY: libc::Ioctl = 0x4c07;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;
/// How often another program may have been faster with the free device.
const ATTEMPTS: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Info {
    device: u64,
    inode: u64,
    /// Of its own, offset and limit.
    places: [u64; 3],
    number: u32,
    encryption: [u32; 2],
    flags: u32,
    names: [u8; 160],
    init: [u64; 2],
}

impl Info {
    const fn empty() -> Self {
        Self {
            device: 0,
            inode: 0,
            places: [0; 3],
            number: 0,
            encryption: [0; 2],
            flags: 0,
            names: [0; 160],
            init: [0; 2],
        }
    }

    /// Which file it is over, as stat(2) has its device and inode.
    pub(super) fn file(&self) -> (u64, u64) {
        (self.device, self.inode)
    }
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A loop device over a file, which is there as long as it is open.
pub(super) fn attach(file: &File) -> io::Result<OwnedFd> {
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
        info: Info {
            flags,
            ..Info::empty()
        },
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads the structure, which has its layout and outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    done(result)
}

/// What a loop device is over. ENXIO if it has no file.
pub(super) fn info(device: &File) -> io::Result<Info> {
    let mut info = Info::empty();
    // SAFETY: the kernel writes the structure, which has its layout and outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
    done(result).map(|()| info)
}

/// Lets a loop device have as many bytes as its file has by now.
pub(super) fn follow(device: &File) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    done(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_CAPACITY, 0) })
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        assert_eq!((size_of::<Info>(), size_of::<Config>()), (232, 304));
        assert_eq!(std::mem::offset_of!(Info, flags), 52);
    }
}
