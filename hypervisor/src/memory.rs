//! Guest RAM: private anonymous memory, and files read into it.
//!
//! Private, never a shared memfd: that keeps transparent huge pages. The files come from the shim
//! and are trusted, their sizes are checked.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ptr;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::arch::x86_64::layout::{self, HUGE_PAGE};

/// Guest RAM could not be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host did not give the memory.
    #[error("the host did not give {bytes} bytes of guest memory: {source}")]
    Map {
        /// How many.
        bytes: u64,
        /// What it said.
        source: io::Error,
    },
    /// A region was refused by vm-memory.
    #[error("guest memory region: {0}")]
    Region(#[from] MmapRegionError),
    /// The regions do not form an address space.
    #[error("guest memory layout: {0}")]
    Layout(#[from] vm_memory::GuestRegionCollectionError),
    /// KVM refused a memory slot.
    #[error("KVM refused a memory slot: {0}")]
    Slot(kvm_ioctls::Error),
    /// A file part lies outside guest RAM.
    #[error("{length} bytes at guest address {address:#x} lie outside guest memory")]
    Outside {
        /// Guest address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// A file has no such place.
    #[error("reading a boot file: {0}")]
    Seek(#[from] io::Error),
    /// A file could not be read, or is too short.
    #[error("reading a boot file: {0}")]
    Read(#[from] vm_memory::GuestMemoryError),
    /// The request is not possible on this machine.
    #[error("guest memory of {0} bytes is not possible here")]
    Size(u64),
}

/// Makes `bytes` bytes of RAM (a multiple of 2 MiB), huge pages advised, left out of core dumps.
///
/// # Errors
/// See [`MemoryError`].
pub fn allocate(bytes: u64) -> Result<GuestMemoryMmap, MemoryError> {
    let mut regions = Vec::new();
    for (start, length) in layout::ram(bytes) {
        let size = usize::try_from(length).map_err(|_| MemoryError::Size(length))?;
        regions.push(region(start, size)?);
    }
    Ok(GuestMemoryMmap::from_regions(regions)?)
}

/// `size` bytes of RAM at guest address `start`.
fn region(start: u64, size: usize) -> Result<GuestRegionMmap, MemoryError> {
    let host = map_anonymous(size)?;
    let builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: `map_anonymous` has just mapped `size` bytes at `host`, and they stay mapped for
    // the life of the process.
    let region = unsafe { builder.with_raw_mmap_pointer(host) }.build()?;
    GuestRegionMmap::new(region, GuestAddress(start)).ok_or(MemoryError::Size(size as u64))
}

/// Maps `size` bytes at a host address that is a multiple of 2 MiB, so that a huge page of the host
/// is one of the guest.
fn map_anonymous(size: usize) -> Result<*mut u8, MemoryError> {
    let fail = || MemoryError::Map {
        bytes: size as u64,
        source: io::Error::last_os_error(),
    };
    let slack = usize::try_from(HUGE_PAGE).map_err(|_| MemoryError::Size(HUGE_PAGE))?;
    // SAFETY: a fresh reservation anywhere; no memory of ours is replaced.
    let reserved = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size + slack,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if reserved == libc::MAP_FAILED {
        return Err(fail());
    }
    let padding = reserved.align_offset(slack);
    // SAFETY: `padding` is below `slack`, so the result is inside the reservation.
    let host = unsafe { reserved.cast::<u8>().add(padding) };
    // SAFETY: the range lies inside the reservation made above, which nothing else uses.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(fail());
    }
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
        // Advice only: a host without huge pages still works.
        // SAFETY: the range was mapped above.
        let _ = unsafe { libc::madvise(host.cast(), size, advice) };
    }
    Ok(host)
}

/// More RAM for a machine that runs: `length` bytes at guest address `start`, both multiples of 2 MiB, after all that it
/// has. The host gives nothing of it before it is touched.
///
/// # Errors
/// See [`MemoryError`].
pub fn more(start: u64, length: u64) -> Result<GuestRegionMmap, MemoryError> {
    let size = usize::try_from(length).map_err(|_| MemoryError::Size(length))?;
    region(start, size)
}

/// Empties the 2 MiB of RAM at guest address `start`, a multiple of 2 MiB, and has them in small pages from now on: what is
/// never touched of them then costs nothing.
///
/// # Errors
/// [`MemoryError::Outside`].
pub fn in_small_pages(memory: &GuestMemoryMmap, start: u64) -> Result<(), MemoryError> {
    let outside = || MemoryError::Outside {
        address: start,
        length: HUGE_PAGE,
    };
    let length = usize::try_from(HUGE_PAGE).map_err(|_| outside())?;
    let slice = memory
        .get_slice(GuestAddress(start), length)
        .map_err(|_| outside())?;
    for advice in [libc::MADV_DONTNEED, libc::MADV_NOHUGEPAGE] {
        // SAFETY: the slice is guest memory, of which Rust holds no reference; emptying it is what is asked for, and the
        // other advice changes how it is kept. What fails (without huge pages, the second) leaves memory that works.
        let _ = unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), length, advice) };
    }
    Ok(())
}

/// Whether a region is RAM, and not files that are read ([`crate::virtio::pmem::files`]).
#[must_use]
pub fn is_writable_region(region: &GuestRegionMmap) -> bool {
    region.prot() & libc::PROT_WRITE != 0
}

/// Whether nothing of a range is in a region that cannot be written. To be asked before anything is written where a guest
/// says.
#[must_use]
pub fn is_writable(memory: &GuestMemoryMmap, address: u64, length: u64) -> bool {
    let end = address.saturating_add(length);
    let touches = |region: &GuestRegionMmap| {
        let start = region.start_addr().raw_value();
        start < end && address < start.saturating_add(region.len())
    };
    memory
        .iter()
        .all(|region| is_writable_region(region) || !touches(region))
}

/// Gives the RAM to KVM, one slot a region.
///
/// # Errors
/// [`MemoryError::Slot`].
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for the life of the process, and slots do not overlap
        // because regions do not.
        unsafe { vm.set_user_memory_region(slot) }.map_err(MemoryError::Slot)?;
    }
    Ok(())
}

/// Reads `length` bytes of `file` from `offset` to guest address `address`.
///
/// Copied, not mapped: a private mapping shares little, since the kernel patches nearly all of its
/// text, and it costs a fault for each small page. Measured with 256 MiB guests: 153 guest page
/// faults and 44.2 MB PSS with copies, 11,370 and 40.4 MB with mappings. Nor can an upgrade that
/// overwrites the file reach a running VM.
///
/// # Errors
/// See [`MemoryError`]; an end of file in between is a [`MemoryError::Read`].
pub fn load(
    memory: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    address: u64,
    length: u64,
) -> Result<(), MemoryError> {
    let outside = || MemoryError::Outside { address, length };
    let count = usize::try_from(length).map_err(|_| outside())?;
    if !memory.check_range(GuestAddress(address), count) {
        return Err(outside());
    }
    let mut source = file;
    source.seek(SeekFrom::Start(offset))?;
    memory.read_exact_volatile_from(GuestAddress(address), &mut source, count)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn pattern(length: usize) -> Vec<u8> {
        (0..length)
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect()
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn read(memory: &GuestMemoryMmap, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    #[test]
    fn ram_is_aligned_for_huge_pages_on_the_host() {
        let memory = allocate(4 << 20).unwrap();
        for region in memory.iter() {
            assert_eq!(region.as_ptr() as u64 % HUGE_PAGE, 0);
        }
    }

    #[test]
    fn a_short_file_and_a_range_outside_ram_are_refused() {
        let memory = allocate(2 << 20).unwrap();
        let file = file_of(&pattern(4096));
        assert!(matches!(
            load(&memory, &file, 0, 0, 8192),
            Err(MemoryError::Read(_))
        ));
        assert!(matches!(
            load(&memory, &file, 0, (2 << 20) - 100, 4096),
            Err(MemoryError::Outside { .. })
        ));
        assert!(matches!(
            load(&memory, &file, 0, u64::MAX - 10, 4096),
            Err(MemoryError::Outside { .. })
        ));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn loading_anywhere_gives_the_bytes_of_the_file_and_touches_nothing_else(
            offset in 0u64..9000, address in 0u64..9000, length in 0u64..20_000,
        ) {
            let memory = allocate(2 << 20).unwrap();
            let bytes = pattern(30_000);
            let file = file_of(&bytes);
            let base = 0x8000 + address;
            load(&memory, &file, offset, base, length).unwrap();
            let start = usize::try_from(offset).unwrap();
            let count = usize::try_from(length).unwrap();
            prop_assert_eq!(read(&memory, base, count), &bytes[start..start + count]);
            prop_assert_eq!(read(&memory, base - 64, 64), vec![0; 64]);
            prop_assert_eq!(read(&memory, base + length, 64), vec![0; 64]);
        }
    }
}
