//! A descriptor chain as lists of guest memory slices (virtio 1.3 §2.7.4, §2.7.13).
//!
//! Trusts nothing in the descriptors: a chain that loops, leaves its table, points outside RAM or
//! puts a readable part behind a writable one is a [`ChainError`], never a shortened chain. The
//! slices point into guest memory, which the guest changes at will: read a field once, into host
//! memory, and check that copy.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{Address as _, GuestMemory, GuestMemoryMmap};

use crate::memory::is_writable;

mod buffers;

pub use buffers::{Buffers, Vectors};

/// The most memory slices one chain may consist of; also `UIO_MAXIOV`, so that one system call can
/// take a whole chain.
pub const MAX_SEGMENTS: usize = 1024;

/// How a descriptor chain breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It has no end: a loop, an index beyond the table, an unreadable or nested indirect table.
    #[error("a descriptor chain has no proper end")]
    Endless,
    /// A buffer is not wholly inside RAM, or to be written to where that cannot be.
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
            if descriptor.is_write_only()
                && !is_writable(
                    memory,
                    descriptor.addr().raw_value(),
                    descriptor.len().into(),
                )
            {
                return Err(ChainError::Address);
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::pmem::files;
    use crate::virtio::testing::{INDIRECT, NEXT, RAM, WRITE, any_descriptor};
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion as _};

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
    fn memory_that_is_files_can_be_read_from_and_not_be_written_to() {
        const FILES: u64 = 1 << 32;
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let (region, _files) = files::map(FILES, vec![(file.into(), 4096)]).unwrap();
        let end = FILES + region.len();
        let region = std::sync::Arc::new(region);
        let with_files =
            |table: &[(u64, u32, u16, u16)]| memory(table).insert_region(region.clone()).unwrap();
        let readable = with_files(&[(FILES + 8192, 4096, NEXT, 1), (0x5000, 8, WRITE, 0)]);
        let chain = parse(&readable).unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (4096, 8));
        for (address, length) in [
            (FILES, 1),
            (FILES + 8192, 4096),
            (end - 1, 1),
            (FILES - 1, 2),
            (end - 1, u32::MAX),
        ] {
            let writable = with_files(&[(address, length, WRITE, 0)]);
            assert_eq!(parse(&writable).unwrap_err(), ChainError::Address);
        }
        assert!(is_writable(&readable, 0, FILES) && is_writable(&readable, end, u64::MAX));
        assert!(!is_writable(&readable, 0, FILES + 1) && !is_writable(&readable, 0, u64::MAX));
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
