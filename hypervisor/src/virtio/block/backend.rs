//! Operations on the file, each run to its end by the calling thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Whence, fdatasync, lseek64};

use super::request::{Operation, Range, SECTOR, SERIAL, Status};
use crate::virtio::chain::Buffers;

/// `linux/fs.h`: `_IO(0x12, 119)`.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// A raw file or a block device.
#[derive(Debug)]
pub struct Backend {
    file: OwnedFd,
    serial: [u8; SERIAL],
    is_device: bool,
}

impl Backend {
    /// The serial number is filled up with zeros.
    pub fn new(file: OwnedFd, serial: [u8; SERIAL]) -> Self {
        let kind = fstat(&file).map(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT);
        Self {
            file,
            serial,
            is_device: kind == Ok(SFlag::S_IFBLK),
        }
    }

    /// Whole sectors of the file or device; the rest of a file is not part of the disk.
    pub fn sectors(&self) -> io::Result<u64> {
        let bytes = lseek64(&self.file, 0, Whence::SeekEnd)?;
        Ok(u64::try_from(bytes).unwrap_or(0) / SECTOR)
    }

    /// Runs an operation; returns the status and the bytes put into `writable`.
    pub fn run(
        &self,
        operation: &Operation,
        readable: Buffers<'_>,
        writable: Buffers<'_>,
    ) -> (Status, usize) {
        match self.attempt(operation, readable, writable) {
            Ok(written) => (Status::Ok, written),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                (Status::Unsupported, 0)
            }
            Err(_) => (Status::IoError, 0),
        }
    }

    fn attempt(
        &self,
        operation: &Operation,
        readable: Buffers<'_>,
        mut writable: Buffers<'_>,
    ) -> io::Result<usize> {
        let file = self.file.as_fd();
        match operation {
            Operation::Read(offset) => {
                let length = writable.len();
                transfer(writable, *offset, |buffers, left, offset| {
                    buffers.read_at(file, left, offset)
                })?;
                Ok(length)
            }
            Operation::Write(offset) => {
                transfer(readable, *offset, |buffers, left, offset| {
                    buffers.write_at(file, left, offset)
                })?;
                Ok(0)
            }
            Operation::Flush => {
                fdatasync(file)?;
                Ok(0)
            }
            Operation::Serial => Ok(writable.copy_from(&self.serial)),
            Operation::Discard(ranges) => {
                for range in ranges {
                    if self.is_device {
                        discard(file, range)?;
                    } else {
                        punch(file, range)?;
                    }
                }
                Ok(0)
            }
            Operation::WriteZeroes(ranges) => {
                for range in ranges {
                    write_zeroes(file, range)?;
                }
                Ok(0)
            }
        }
    }
}

/// Moves all of `buffers`, in as many system calls as it takes.
fn transfer<'m>(
    mut buffers: Buffers<'m>,
    mut offset: i64,
    mut step: impl FnMut(&mut Buffers<'m>, usize, i64) -> io::Result<usize>,
) -> io::Result<()> {
    while !buffers.is_empty() {
        let left = buffers.len();
        match step(&mut buffers, left, offset) {
            // The file has become shorter than the disk.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                offset = i64::try_from(count)
                    .ok()
                    .and_then(|count| offset.checked_add(count))
                    .ok_or(io::ErrorKind::InvalidInput)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn punch(file: BorrowedFd<'_>, range: &Range) -> io::Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, mode, range.offset, range.length)?)
}

/// A hole in a device would be one of zeros, which not every device that can discard can make.
fn discard(file: BorrowedFd<'_>, range: &Range) -> io::Result<()> {
    let range = [range.offset.cast_unsigned(), range.length.cast_unsigned()];
    // SAFETY: the kernel reads two numbers from the array, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Where a file system cannot zero a range in place, a hole reads as zero as well.
fn write_zeroes(file: BorrowedFd<'_>, range: &Range) -> io::Result<()> {
    if range.unmap && punch(file, range).is_ok() {
        return Ok(());
    }
    let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, mode, range.offset, range.length) {
        Ok(()) => Ok(()),
        Err(nix::Error::EOPNOTSUPP) => punch(file, range),
        Err(error) => Err(error.into()),
    }
}
