//! A descriptor chain as lists of guest memory slices (virtio 1.3 §2.7.4, §2.7.13).
//!
//! Trusts nothing in the descriptors: a chain that loops, leaves its table, points outside RAM or
//! puts a readable part behind a writable one is a [`ChainError`], never a shortened chain. The
//! slices point into guest memory, which the guest changes at will: read a field once, into host
//! memory, and check that copy.

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap, VolatileSlice};

/// The most memory slices one chain may consist of; also `UIO_MAXIOV`, so that one system call can
/// take a whole chain.
pub const MAX_SEGMENTS: usize = 1024;

/// How a descriptor chain breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It has no end: a loop, an index beyond the table, an unreadable or nested indirect table.
    #[error("a descriptor chain has no proper end")]
    Endless,
    /// A buffer is not wholly inside RAM.
    #[error("a descriptor points outside RAM")]
    Address,
    /// A device-readable descriptor follows a device-writable one (§2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// More than [`MAX_SEGMENTS`] buffers.
    #[error("a descriptor chain has too many buffers")]
    Segments,
    /// The available ring's index is further ahead than the queue is long.
    #[error("the available index is out of range")]
    AvailableIndex,
}

/// Guest memory in order, with a cursor: reads and writes take bytes off the front.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: VecDeque<VolatileSlice<'m>>,
    length: usize,
}

/// One request: what the device may read, then what it may write.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Index of the head descriptor, for the used ring.
    pub head: u16,
    /// The device-readable part.
    pub readable: Buffers<'m>,
    /// The device-writable part.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Walks a chain from the available ring.
    ///
    /// # Errors
    /// If it breaks a rule of the specification.
    pub fn parse<M: Clone + Deref<Target = GuestMemoryMmap>>(
        descriptors: DescriptorChain<M>,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Self, ChainError> {
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        // The iterator stops at a broken link just as at the end; a last descriptor that promises
        // another one tells them apart.
        let mut unfinished = true;
        for descriptor in descriptors {
            unfinished = descriptor.has_next();
            let part = if descriptor.is_write_only() {
                &mut chain.writable
            } else if chain.writable.slices.is_empty() {
                &mut chain.readable
            } else {
                return Err(ChainError::Order);
            };
            let length = descriptor.len() as usize;
            if length > 0 {
                for slice in memory.get_slices(descriptor.addr(), length) {
                    part.push(slice.map_err(|_| ChainError::Address)?);
                }
            }
            if chain.readable.slices.len() + chain.writable.slices.len() > MAX_SEGMENTS {
                return Err(ChainError::Segments);
            }
        }
        if unfinished {
            return Err(ChainError::Endless);
        }
        Ok(chain)
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{INDIRECT, NEXT, RAM, WRITE, any_descriptor};
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestAddress};

    const TABLE: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const SIZE: u16 = 16;

    /// Two regions that touch at 0x80_0000, and the descriptors from index 0 on.
    fn memory(table: &[(u64, u32, u16, u16)]) -> GuestMemoryMmap {
        let half = usize::try_from(RAM / 2).unwrap();
        let ranges = [(GuestAddress(0), half), (GuestAddress(RAM / 2), half)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        write_table(&memory, TABLE, table);
        memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
        memory
    }

    fn write_table(memory: &GuestMemoryMmap, at: u64, table: &[(u64, u32, u16, u16)]) {
        for (at, (address, length, flags, next)) in (at..).step_by(16).zip(table) {
            memory.write_obj(*address, GuestAddress(at)).unwrap();
            memory.write_obj(*length, GuestAddress(at + 8)).unwrap();
            memory.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(*next, GuestAddress(at + 14)).unwrap();
        }
    }

    fn parse(memory: &GuestMemoryMmap) -> Result<Chain<'_>, ChainError> {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        queue.set_ready(true);
        let descriptors = queue.iter(memory).unwrap().next().unwrap();
        Chain::parse(descriptors, memory)
    }

    #[test]
    fn a_chain_is_its_readable_then_its_writable_part() {
        let memory = memory(&[
            (0x5000, 10, NEXT, 2),
            (0x7000, 30, WRITE, 0),
            (0x6000, 20, NEXT, 1),
        ]);
        let chain = parse(&memory).unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (30, 30));
        assert_eq!(chain.readable.slices().count(), 2);
    }

    #[test]
    fn loops_and_links_out_of_the_table_are_refused() {
        let mut cases = vec![
            vec![(0x5000, 1, NEXT, 0)],
            vec![(0x5000, 1, NEXT, 1), (0x5000, 1, NEXT, 0)],
            vec![(0x5000, 1, NEXT, SIZE)],
            vec![(0x5000, 1, NEXT, u16::MAX)],
            // Indirect tables: of no entries, of part of one, outside RAM, in another.
            vec![(0x5000, 0, INDIRECT, 0)],
            vec![(0x5000, 17, INDIRECT, 0)],
            vec![(RAM, 16, INDIRECT, 0)],
            vec![(u64::MAX - 7, 16, INDIRECT, 0)],
        ];
        // 4 GiB in all.
        cases.push(vec![(0, u32::MAX, NEXT, 1), (0, 1, 0, 0)]);
        for case in cases {
            let memory = memory(&case);
            let error = parse(&memory).unwrap_err();
            assert!(
                matches!(error, ChainError::Endless | ChainError::Address),
                "{case:x?}: {error}"
            );
        }
        let memory = memory(&[(0x5000, 16, INDIRECT, 0)]);
        write_table(&memory, 0x5000, &[(0x6000, 16, INDIRECT, 0)]);
        assert_eq!(parse(&memory).unwrap_err(), ChainError::Endless);
    }

    #[test]
    fn buffers_that_are_not_wholly_in_ram_are_refused() {
        for (address, length) in [
            (RAM, 1),
            (RAM - 1, 2),
            (u64::MAX, 1),
            (u64::MAX, 2),
            (0, u32::MAX),
        ] {
            let memory = memory(&[(address, length, 0, 0)]);
            assert_eq!(parse(&memory).unwrap_err(), ChainError::Address);
        }
    }

    #[test]
    fn a_readable_buffer_behind_a_writable_one_is_refused() {
        let memory = memory(&[(0x5000, 1, WRITE | NEXT, 1), (0x5000, 1, 0, 0)]);
        assert_eq!(parse(&memory).unwrap_err(), ChainError::Order);
    }

    #[test]
    fn an_indirect_table_of_too_many_buffers_is_refused() {
        let length = u32::try_from((MAX_SEGMENTS + 1) * 16).unwrap();
        let memory = memory(&[(0x10000, length, INDIRECT, 0)]);
        let mut table: Vec<_> = (1..=MAX_SEGMENTS + 1)
            .map(|next| (0x5000, 1, NEXT, u16::try_from(next).unwrap()))
            .collect();
        table[MAX_SEGMENTS].2 = 0;
        write_table(&memory, 0x10000, &table);
        assert_eq!(parse(&memory).unwrap_err(), ChainError::Segments);
        table[MAX_SEGMENTS - 1].2 = 0;
        write_table(&memory, 0x10000, &table);
        assert_eq!(parse(&memory).unwrap().readable.len(), MAX_SEGMENTS);
    }

    #[test]
    fn a_buffer_may_span_regions() {
        let memory = memory(&[(RAM / 2 - 3, 8, 0, 0)]);
        memory
            .write_slice(b"12345678", GuestAddress(RAM / 2 - 3))
            .unwrap();
        let mut readable = parse(&memory).unwrap().readable;
        assert_eq!(readable.slices().count(), 2);
        assert_eq!(readable.split_to(2).copy_array(), Some(*b"12"));
        readable.skip(2);
        assert_eq!(readable.copy_array::<5>(), None, "only four are left");
        assert_eq!(readable.copy_array(), Some(*b"5678"));
        assert!(readable.is_empty());
    }

    proptest! {
        /// Splitting, skipping and copying agree with doing the same to a plain vector.
        #[test]
        fn buffers_behave_like_the_bytes_they_cover(
            lengths in prop::collection::vec(1u32..50, 1..8),
            steps in prop::collection::vec((0u8..4, 0usize..40), 0..20),
        ) {
            let mut table = Vec::new();
            let mut at = RAM / 2 - 60;
            for (index, length) in (1u16..).zip(&lengths) {
                table.push((at, *length, NEXT, index));
                at += u64::from(*length);
            }
            table.last_mut().unwrap().2 = 0;
            let total = lengths.iter().sum::<u32>() as usize;
            let memory = memory(&table);
            let mut model: Vec<u8> = (0..total).map(|i| u8::try_from(i % 256).unwrap()).collect();
            memory.write_slice(&model, GuestAddress(RAM / 2 - 60)).unwrap();
            let mut buffers = parse(&memory).unwrap().readable;
            for (step, count) in steps {
                let taken: Vec<u8> = model.drain(..count.min(model.len())).collect();
                match step {
                    0 => buffers.skip(count),
                    1 => {
                        let mut part = buffers.split_to(count);
                        let mut bytes = vec![0; count];
                        prop_assert_eq!(part.len(), taken.len());
                        prop_assert_eq!(part.copy_to(&mut bytes), taken.len());
                        prop_assert_eq!(&bytes[..taken.len()], &taken[..]);
                    }
                    2 => {
                        let mut bytes = vec![0; count];
                        prop_assert_eq!(buffers.copy_to(&mut bytes), taken.len());
                        prop_assert_eq!(&bytes[..taken.len()], &taken[..]);
                    }
                    _ => prop_assert_eq!(buffers.copy_from(&vec![0xee; count]), taken.len()),
                }
                prop_assert_eq!(buffers.len(), model.len());
            }
        }

        /// Any table ends in an error or in slices inside RAM.
        #[test]
        fn any_table_is_survived(
            table in prop::collection::vec(any_descriptor(18), 1..12),
        ) {
            let memory = memory(&table);
            if let Ok(chain) = parse(&memory) {
                let count = chain.readable.slices().count() + chain.writable.slices().count();
                prop_assert!(count <= MAX_SEGMENTS);
            }
        }
    }
}
