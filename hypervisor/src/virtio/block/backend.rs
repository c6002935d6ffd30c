//! Operations on the files, each run to its end by the calling thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Whence, fdatasync, lseek64};

use crate::control::PIECE_ALIGNMENT;

use super::request::{Operation, Range, SECTOR, SERIAL, Status};
use crate::virtio::chain::Buffers;

/// `linux/fs.h`: `_IO(0x12, 119)`.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// What offsets in a file can be.
const MAX_BYTES: u64 = i64::MAX.cast_unsigned();

/// A raw file or a block device, or several one behind the other.
#[derive(Debug)]
pub struct Backend {
    first: OwnedFd,
    is_device: bool,
    /// All of them, if a disk is made of pieces.
    pieces: Vec<Piece>,
    serial: [u8; SERIAL],
    /// What a flush waits for.
    #[cfg(test)]
    pub gate: Option<std::sync::Arc<std::sync::Barrier>>,
}

/// A file at its place on the disk, in bytes.
#[derive(Debug)]
struct Piece {
    file: OwnedFd,
    start: u64,
    /// What it has of its own; zeros follow.
    size: u64,
    end: u64,
}

impl Backend {
    /// The serial number is filled up with zeros.
    pub fn new(first: OwnedFd, serial: [u8; SERIAL]) -> Self {
        let kind =
            fstat(&first).map(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT);
        Self {
            first,
            is_device: kind == Ok(SFlag::S_IFBLK),
            pieces: Vec::new(),
            serial,
            #[cfg(test)]
            gate: None,
        }
    }

    /// A disk of files with their lengths on it; to be read alone.
    ///
    /// # Errors
    /// If a length is not the file's size rounded up, or all of them exceed what a disk can have.
    pub fn of_pieces(files: Vec<(OwnedFd, u64)>, serial: [u8; SERIAL]) -> io::Result<Self> {
        let mut pieces = Vec::new();
        let mut start = 0u64;
        for (file, length) in files {
            let size = size_of(file.as_fd())?;
            let rounded = size.checked_next_multiple_of(PIECE_ALIGNMENT);
            let end = start.checked_add(length).filter(|end| *end <= MAX_BYTES);
            let (Some(end), true, true) = (end, rounded == Some(length), length > 0) else {
                return Err(io::Error::other(format!(
                    "a piece of {size} bytes cannot have {length} of them at {start}"
                )));
            };
            pieces.push(Piece {
                file,
                start,
                size,
                end,
            });
            start = end;
        }
        let first = pieces.first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut backend = Self::new(first.file.try_clone()?, serial);
        backend.pieces = pieces;
        Ok(backend)
    }

    /// Whole sectors of the file or device, or of all pieces; the rest of a file is not part of the disk.
    pub fn sectors(&self) -> io::Result<u64> {
        let bytes = match self.pieces.last() {
            Some(last) => last.end,
            None => size_of(self.first.as_fd())?,
        };
        Ok(bytes / SECTOR)
    }

    /// Reads from the pieces that the buffers cover. The range is on the disk.
    fn read_pieces(&self, offset: i64, mut buffers: Buffers<'_>) -> io::Result<()> {
        let mut offset = u64::try_from(offset).map_err(io::Error::other)?;
        while !buffers.is_empty() {
            let at = self.pieces.partition_point(|piece| piece.end <= offset);
            let piece = self.pieces.get(at).ok_or(io::ErrorKind::UnexpectedEof)?;
            let within =
                |end: u64| usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
            let mut here = buffers.split_to(within(piece.end));
            let length = here.len();
            let own = here.split_to(within(piece.start + piece.size));
            let start = i64::try_from(offset - piece.start).map_err(io::Error::other)?;
            let file = piece.file.as_fd();
            transfer(own, start, |buffers, left, offset| {
                buffers.read_at(file, left, offset)
            })?;
            here.fill_zero();
            offset += u64::try_from(length).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Reads all of the buffers if that takes no waiting: the node has it in memory. Else what is in them is of no use.
    pub fn read_at_once(&self, offset: i64, mut buffers: Buffers<'_>) -> bool {
        let length = buffers.len();
        let (file, at) = if self.pieces.is_empty() {
            (&self.first, offset)
        } else {
            let Some(found) = self.within_one(offset, length) else {
                return false;
            };
            found
        };
        let read = buffers.read_now(file.as_fd(), at);
        read.is_ok_and(|read| read == length)
    }

    /// The piece whose own bytes these are, and where they are in it.
    fn within_one(&self, offset: i64, length: usize) -> Option<(&OwnedFd, i64)> {
        let start = u64::try_from(offset).ok()?;
        let end = start.checked_add(u64::try_from(length).ok()?)?;
        let piece = self
            .pieces
            .get(self.pieces.partition_point(|piece| piece.end <= start))?;
        let own = end <= piece.start + piece.size;
        own.then_some((&piece.file, i64::try_from(start - piece.start).ok()?))
    }

    /// Runs an operation; returns the status and the bytes put into `writable`. Of one that may take long the rest is left
    /// and fails once it is `given_up`.
    pub fn run(
        &self,
        operation: &Operation,
        readable: Buffers<'_>,
        writable: Buffers<'_>,
        given_up: &AtomicBool,
    ) -> (Status, usize) {
        match self.attempt(operation, readable, writable, given_up) {
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
        given_up: &AtomicBool,
    ) -> io::Result<usize> {
        let file = self.first.as_fd();
        match operation {
            Operation::Read(offset) => {
                let length = writable.len();
                if !self.pieces.is_empty() {
                    self.read_pieces(*offset, writable)?;
                    return Ok(length);
                }
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
                #[cfg(test)]
                if let Some(gate) = &self.gate {
                    gate.wait();
                }
                fdatasync(file)?;
                Ok(0)
            }
            Operation::Serial => Ok(writable.copy_from(&self.serial)),
            Operation::Discard(ranges) => {
                in_pieces(ranges, given_up, |piece| match self.is_device {
                    true => discard(file, piece),
                    false => punch(file, piece),
                })
            }
            Operation::WriteZeroes(ranges) => {
                in_pieces(ranges, given_up, |piece| write_zeroes(file, piece))
            }
        }
    }
}

fn size_of(file: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(u64::try_from(lseek64(file, 0, Whence::SeekEnd)?).unwrap_or(0))
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

/// Does something to all pieces of the ranges, as long as it is not given up.
fn in_pieces(
    ranges: &[Range],
    given_up: &AtomicBool,
    mut change: impl FnMut(&Range) -> io::Result<()>,
) -> io::Result<usize> {
    for piece in ranges.iter().flat_map(|range| range.pieces()) {
        if given_up.load(Ordering::Acquire) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        change(&piece)?;
    }
    Ok(0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_done_in_pieces_and_ends_when_it_is_given_up() {
        const MIB: i64 = 1 << 20;
        let range = |offset, length| Range {
            offset,
            length,
            unmap: true,
        };
        let ranges = [range(512, 1024 * MIB), range(4096 * MIB, 512)];
        let given_up = AtomicBool::new(false);
        let mut done = Vec::new();
        in_pieces(&ranges, &given_up, |piece| {
            done.push((piece.offset, piece.length));
            Ok(())
        })
        .unwrap();
        assert_eq!(done.len(), 18);
        assert!(done.iter().all(|(_, length)| *length <= 64 * MIB));
        // Each begins where the one before has ended.
        let mut next = 512;
        for (offset, length) in &done[..17] {
            assert_eq!(*offset, next);
            assert!(*offset == 512 || *offset % (64 * MIB) == 0);
            next += length;
        }
        assert_eq!(next, 512 + 1024 * MIB);
        assert_eq!(done[17], (4096 * MIB, 512));
        // In the middle.
        let mut count = 0;
        let ended = in_pieces(&ranges, &given_up, |_| {
            count += 1;
            given_up.store(count == 3, Ordering::Release);
            Ok(())
        });
        assert_eq!((ended.is_err(), count), (true, 3));
    }
}
