//! READ: what the node has in memory is read at once; for the rest somebody waits who has nothing else to do.
//!
//! Hostile: the request, as those of [`super::requests`].

use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd};

use fuse_backend_rs::abi::fuse_abi::InHeader;
use fuse_backend_rs::common::file_buf::FileVolatileSlice;
use fuse_backend_rs::common::file_traits::FileReadWriteVolatile;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};

use super::requests::{self, Body};
use super::served::{MAX_REPLY, Readable, Served};

/// The opcode.
pub(super) const READ: u32 = 15;
/// `RWF_NOWAIT` ends at a page that is not in memory; an end elsewhere is the file's.
const PAGE: u64 = 4096;

/// What became of it.
pub(super) enum Read {
    /// The bytes of the reply, 0 for none.
    Done(u32),
    /// It is not in the node's memory, and was to be read without waiting.
    Waits,
}

/// Serves one, whose header has been read.
pub(super) fn answer(
    served: &Served,
    header: InHeader,
    reader: Reader<'_>,
    mut writer: VirtioFsWriter<'_>,
    at_once: bool,
) -> Read {
    let done = requests::body_of(header, reader).and_then(|body| {
        let wanted = Wanted::of(&mut Body(&body))?;
        let mut data = writer
            .split_at(requests::OUT_HEADER)
            .map_err(|_| requests::invalid())?;
        let file = served.readable(header.nodeid, wanted.handle)?;
        if at_once && file.reads_at_once() {
            match wanted.at_once(&file, &mut data) {
                Ok(Some(read)) => return Ok(Some(read)),
                Ok(None) => return Ok(None),
                // Nothing has been read.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    file.never_reads_at_once();
                }
                Err(error) => return Err(error),
            }
        }
        let blocking = From(file.file(), 0);
        data.write_from_at(blocking, wanted.size, wanted.offset)
            .map(Some)
    });
    let (error, length) = match done {
        Ok(Some(length)) => (0, length),
        Ok(None) => return Read::Waits,
        Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), 0),
    };
    let Ok(told) = u32::try_from(requests::OUT_HEADER + length) else {
        return Read::Done(0);
    };
    let head = requests::out_header(told, error, header.unique);
    Read::Done(writer.write_all(&head).map_or(0, |()| told))
}

/// `struct fuse_read_in`, of which the rest does not count here.
struct Wanted {
    handle: u64,
    offset: u64,
    size: usize,
}

impl Wanted {
    fn of(body: &mut Body<'_>) -> io::Result<Self> {
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
        Ok(Self {
            handle,
            offset,
            size: size.min(MAX_REPLY) as usize,
        })
    }

    /// The bytes read, all that there are; none if some of them would have to be waited for.
    fn at_once(&self, file: &Readable, data: &mut VirtioFsWriter<'_>) -> io::Result<Option<usize>> {
        let mut done = 0;
        loop {
            let at = self.offset.saturating_add(done as u64);
            let source = From(file.file(), libc::RWF_NOWAIT);
            match data.write_from_at(source, self.size - done, at) {
                Ok(0) => return Ok(Some(done)),
                Ok(count) => {
                    done += count;
                    let end = self.offset.saturating_add(done as u64);
                    if done >= self.size || !end.is_multiple_of(PAGE) {
                        return Ok(Some(done));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

/// A file that is read with `preadv2`, and the call's flags.
struct From<'a>(BorrowedFd<'a>, libc::c_int);

fn unsupported() -> io::Error {
    io::ErrorKind::Unsupported.into()
}

impl FileReadWriteVolatile for From<'_> {
    fn read_vectored_at_volatile(
        &mut self,
        slices: &[FileVolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        let vectors: Vec<libc::iovec> = slices
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        let offset = i64::try_from(offset).map_err(|_| requests::invalid())?;
        // SAFETY: the slices are guest memory that is mapped while they live, which nothing here holds references
        // to. The offset's upper half is looked at on 32-bit machines alone.
        let count = unsafe {
            libc::syscall(
                libc::SYS_preadv2,
                self.0.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len(),
                offset,
                0,
                self.1,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice<'_>, offset: u64) -> io::Result<usize> {
        self.read_vectored_at_volatile(&[slice], offset)
    }

    fn read_volatile(&mut self, _slice: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(unsupported())
    }

    fn write_volatile(&mut self, _slice: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(unsupported())
    }

    fn write_at_volatile(
        &mut self,
        _slice: FileVolatileSlice<'_>,
        _offset: u64,
    ) -> io::Result<usize> {
        Err(unsupported())
    }
}
