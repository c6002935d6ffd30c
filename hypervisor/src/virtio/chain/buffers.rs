//! Slices of guest memory, in order, that bytes are copied to and from, or I/O is done on where they lie.

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

use super::MAX_SEGMENTS;

/// Guest memory in order, with a cursor: reads and writes take bytes off the front.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    pub(super) slices: VecDeque<VolatileSlice<'m>>,
    length: usize,
}

/// The buffers of several chains as one I/O vector, which is kept as they come and go: from the front, in order.
#[derive(Debug, Default)]
pub struct Vectors<'m> {
    all: Vec<libc::iovec>,
    /// Those before are used up.
    first: usize,
    length: usize,
    memory: PhantomData<VolatileSlice<'m>>,
}

impl<'m> Vectors<'m> {
    /// Puts buffers behind the others.
    pub fn push(&mut self, buffers: &Buffers<'m>) {
        self.length += buffers.len();
        self.all.extend(buffers.slices().map(vector));
    }

    /// Takes so many slices off the front.
    pub fn skip(&mut self, slices: usize) {
        let end = self.all.len().min(self.first + slices);
        let gone = self.all.get(self.first..end).unwrap_or_default();
        self.length -= gone.iter().map(|vector| vector.iov_len).sum::<usize>();
        self.first = end;
        // Seldom, so that what is left is seldom moved.
        if self.first >= MAX_SEGMENTS {
            self.all.drain(..self.first);
            self.first = 0;
        }
    }

    /// Bytes left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no byte is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// How many slices are left.
    #[must_use]
    pub fn slices(&self) -> usize {
        self.all.len() - self.first
    }

    /// `readv` into the first `slices`, none of which is taken off; the bytes that they hold, and that were read.
    ///
    /// # Errors
    /// What the system call says.
    pub fn read(&self, fd: BorrowedFd<'_>, slices: usize) -> io::Result<(usize, usize)> {
        let end = self.all.len().min(self.first + slices.min(MAX_SEGMENTS));
        let vectors = self.all.get(self.first..end).unwrap_or_default();
        let room = vectors.iter().map(|vector| vector.iov_len).sum();
        // SAFETY: every vector lies in guest memory that `self` borrows, so it stays mapped during the call; the guest
        // may race with the kernel's copy, but no Rust reference sees it.
        let result =
            unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), vector_count(vectors)) };
        let count = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        Ok((room, count))
    }
}

/// Good while the guest memory that the slice borrows is mapped.
fn vector(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

impl<'m> Buffers<'m> {
    /// Puts a slice behind the others.
    pub fn push(&mut self, slice: VolatileSlice<'m>) {
        self.length += slice.len();
        self.slices.push_back(slice);
    }

    /// Bytes left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no byte is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The slices left, in order.
    pub fn slices(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.slices.iter()
    }

    /// Drops up to `count` bytes from the front.
    pub fn skip(&mut self, mut count: usize) {
        while count > 0 {
            let Some(first) = self.slices.pop_front() else {
                return;
            };
            if first.len() <= count {
                count -= first.len();
                self.length -= first.len();
            } else {
                self.length -= count;
                // Cannot fail: count is inside the slice.
                if let Ok(rest) = first.offset(count) {
                    self.slices.push_front(rest);
                }
                return;
            }
        }
    }

    /// Takes the first `count` bytes, or all there are, off as buffers of their own.
    #[must_use]
    pub fn split_to(&mut self, mut count: usize) -> Buffers<'m> {
        let mut front = Buffers::default();
        while count > 0 {
            let Some(first) = self.slices.pop_front() else {
                break;
            };
            self.length -= first.len();
            if first.len() <= count {
                count -= first.len();
                front.push(first);
            } else {
                // Cannot fail: count is inside the slice.
                if let Ok((taken, rest)) = first.split_at(count) {
                    front.push(taken);
                    self.length += rest.len();
                    self.slices.push_front(rest);
                }
                break;
            }
        }
        front
    }

    /// Copies guest bytes out, as many as fit and are left; returns their number.
    pub fn copy_to(&mut self, target: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            if done == target.len() {
                break;
            }
            done += slice.copy_to(&mut target[done..]);
        }
        self.skip(done);
        done
    }

    /// Reads a fixed-size structure; `None` if fewer bytes are left.
    pub fn copy_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.length < N {
            return None;
        }
        let mut array = [0; N];
        self.copy_to(&mut array);
        Some(array)
    }

    /// Copies host bytes in, as many as fit; returns their number.
    pub fn copy_from(&mut self, source: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            if done == source.len() {
                break;
            }
            let count = slice.len().min(source.len() - done);
            slice.copy_from(&source[done..done + count]);
            done += count;
        }
        self.skip(done);
        done
    }

    /// Writes zeros to all that is left.
    pub fn fill_zero(&mut self) {
        const ZEROS: [u8; 512] = [0; 512];
        while !self.is_empty() {
            let count = self.length.min(ZEROS.len());
            self.copy_from(&ZEROS[..count]);
        }
    }

    /// The slices as an I/O vector, at most `limit` bytes of them. The pointers are good while the
    /// guest memory that `self` borrows is mapped; nothing here turns them into references.
    fn vectors(&self, limit: usize) -> Vec<libc::iovec> {
        let mut left = limit;
        let mut vectors = Vec::with_capacity(self.slices.len().min(MAX_SEGMENTS));
        for slice in self.slices.iter().take(MAX_SEGMENTS) {
            if left == 0 {
                break;
            }
            let count = slice.len().min(left);
            left -= count;
            vectors.push(libc::iovec {
                iov_len: count,
                ..vector(slice)
            });
        }
        vectors
    }

    fn advance(&mut self, result: isize) -> io::Result<usize> {
        let count = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        self.skip(count);
        Ok(count)
    }

    /// `readv`: at most `limit` bytes from `fd` into guest memory.
    ///
    /// # Errors
    /// What the system call says.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        let vectors = self.vectors(limit);
        // SAFETY: every vector lies in guest memory that `self` borrows, so it stays mapped during
        // the call; the guest may race with the kernel's copy, but no Rust reference sees it.
        let result =
            unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), vector_count(&vectors)) };
        self.advance(result)
    }

    /// `writev`: at most `limit` bytes of guest memory to `fd`.
    ///
    /// # Errors
    /// What the system call says.
    pub fn write_to(&mut self, fd: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        let vectors = self.vectors(limit);
        // SAFETY: as in `read_from`; the kernel only reads here.
        let result =
            unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), vector_count(&vectors)) };
        self.advance(result)
    }

    /// `writev` of host bytes, then all guest memory that is left: one packet, all or nothing.
    ///
    /// # Errors
    /// What the system call says.
    pub fn write_behind(&mut self, head: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
        let mut vectors = vec![libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        }];
        vectors.append(&mut self.vectors(usize::MAX));
        // SAFETY: as in `write_to`; `head` is borrowed during the call, which only reads it.
        let result =
            unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), vector_count(&vectors)) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// `preadv`: as [`Self::read_from`], at a file offset in bytes.
    ///
    /// # Errors
    /// What the system call says.
    pub fn read_at(&mut self, fd: BorrowedFd<'_>, limit: usize, offset: i64) -> io::Result<usize> {
        let vectors = self.vectors(limit);
        // SAFETY: as in `read_from`.
        let result = unsafe {
            libc::preadv(
                fd.as_raw_fd(),
                vectors.as_ptr(),
                vector_count(&vectors),
                offset,
            )
        };
        self.advance(result)
    }

    /// `preadv2` with `RWF_NOWAIT`: as [`Self::read_at`], what can be had without waiting.
    ///
    /// # Errors
    /// What the system call says: `EAGAIN`, or that the file has no such thing.
    pub fn read_now(&mut self, fd: BorrowedFd<'_>, offset: i64) -> io::Result<usize> {
        let vectors = self.vectors(usize::MAX);
        // SAFETY: as in `read_from`. The offset's upper half is looked at on 32-bit machines alone.
        let result = unsafe {
            libc::syscall(
                libc::SYS_preadv2,
                fd.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len(),
                offset,
                0,
                libc::RWF_NOWAIT,
            )
        };
        self.advance(isize::try_from(result).map_err(io::Error::other)?)
    }

    /// `pwritev`: as [`Self::write_to`], at a file offset in bytes.
    ///
    /// # Errors
    /// What the system call says.
    pub fn write_at(&mut self, fd: BorrowedFd<'_>, limit: usize, offset: i64) -> io::Result<usize> {
        let vectors = self.vectors(limit);
        // SAFETY: as in `write_to`.
        let result = unsafe {
            libc::pwritev(
                fd.as_raw_fd(),
                vectors.as_ptr(),
                vector_count(&vectors),
                offset,
            )
        };
        self.advance(result)
    }
}

/// At most [`MAX_SEGMENTS`], see [`Buffers::vectors`].
fn vector_count(vectors: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX)
}
