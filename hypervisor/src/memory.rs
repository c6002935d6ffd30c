//! Guest RAM: private anonymous memory, and private file mappings placed over it.
//!
//! Private, never a shared memfd: that keeps transparent huge pages and copy-on-write. The files
//! are the kernel and the initramfs, which the host is trusted not to truncate.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::arch::x86_64::layout::{self, HUGE_PAGE, PAGE};

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
    /// The file could not be read or mapped.
    #[error("reading a boot file: {0}")]
    File(#[from] io::Error),
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
        let host = map_anonymous(size)?;
        let builder = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: `map_anonymous` has just mapped `size` bytes at `host`, and they stay mapped for
        // the life of the process.
        let region = unsafe { builder.with_raw_mmap_pointer(host) }.build()?;
        let region =
            GuestRegionMmap::new(region, GuestAddress(start)).ok_or(MemoryError::Size(length))?;
        regions.push(region);
    }
    Ok(GuestMemoryMmap::from_regions(regions)?)
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

/// How the bytes of a file got into guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// Bytes mapped privately from the file.
    pub mapped: u64,
    /// Bytes copied.
    pub copied: u64,
}

impl std::ops::AddAssign for Placed {
    fn add_assign(&mut self, other: Self) {
        self.mapped += other.mapped;
        self.copied += other.copied;
    }
}

/// Puts `length` bytes of `file` from `offset` at guest address `address`: whole pages as private
/// mappings where file offset and address are congruent, the rest as copies.
///
/// # Errors
/// See [`MemoryError`]; `UnexpectedEof` if the file is shorter.
pub fn place(
    memory: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    address: u64,
    length: u64,
) -> Result<Placed, MemoryError> {
    let outside = || MemoryError::Outside { address, length };
    let end = address.checked_add(length).ok_or_else(outside)?;
    let file_end = offset.checked_add(length).ok_or_else(outside)?;
    let region = memory
        .find_region(GuestAddress(address))
        .ok_or_else(outside)?;
    if end > region.last_addr().raw_value() + 1 {
        return Err(outside());
    }
    if file.metadata()?.len() < file_end {
        return Err(MemoryError::File(io::ErrorKind::UnexpectedEof.into()));
    }
    let first = address.next_multiple_of(PAGE);
    let last = end / PAGE * PAGE;
    let mut placed = Placed::default();
    if address % PAGE != offset % PAGE || first >= last {
        copy(memory, file, offset, address, length)?;
        placed.copied = length;
        return Ok(placed);
    }
    copy(memory, file, offset, address, first - address)?;
    map_file(
        memory,
        file,
        offset + (first - address),
        first,
        last - first,
    )?;
    copy(memory, file, file_end - (end - last), last, end - last)?;
    placed.mapped = last - first;
    placed.copied = length - placed.mapped;
    Ok(placed)
}

fn copy(
    memory: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    address: u64,
    length: u64,
) -> Result<(), MemoryError> {
    use std::os::unix::fs::FileExt;
    use vm_memory::Bytes;

    let mut buffer = vec![0u8; 64 * 1024];
    let mut done = 0;
    while done < length {
        let want = usize::try_from(length - done).map_or(buffer.len(), |n| n.min(buffer.len()));
        let chunk = &mut buffer[..want];
        file.read_exact_at(chunk, offset + done)?;
        memory
            .write_slice(chunk, GuestAddress(address + done))
            .map_err(|_| MemoryError::Outside { address, length })?;
        done += want as u64;
    }
    Ok(())
}

/// Replaces pages of guest RAM by private pages of the file. All arguments are page multiples and
/// the range lies in one region.
fn map_file(
    memory: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    address: u64,
    length: u64,
) -> Result<(), MemoryError> {
    let outside = || MemoryError::Outside { address, length };
    let size = usize::try_from(length).map_err(|_| outside())?;
    let host = memory
        .get_slice(GuestAddress(address), size)
        .map_err(|_| outside())?
        .ptr_guard_mut()
        .as_ptr();
    let offset = libc::off_t::try_from(offset).map_err(|_| outside())?;
    // SAFETY: `get_slice` has checked that the range is guest RAM; guest RAM holds no Rust object,
    // and replacing its pages leaves the mapping's address and size as they were.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(MemoryError::File(io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::Bytes;

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
    fn congruent_pages_are_mapped_and_the_ends_copied() {
        let memory = allocate(2 << 20).unwrap();
        let bytes = pattern(5 * 4096);
        let file = file_of(&bytes);
        let placed = place(&memory, &file, 100, 0x10_0000 + 100, 3 * 4096).unwrap();
        assert_eq!(placed.mapped, 2 * 4096);
        assert_eq!(placed.copied, 4096);
        assert_eq!(
            read(&memory, 0x10_0000 + 100, 3 * 4096),
            bytes[100..100 + 3 * 4096]
        );
        assert_eq!(read(&memory, 0x10_0000, 100), vec![0; 100]);
        assert_eq!(read(&memory, 0x10_0000 + 100 + 3 * 4096, 64), vec![0; 64]);
    }

    #[test]
    fn a_guest_write_never_reaches_the_file() {
        let memory = allocate(2 << 20).unwrap();
        let bytes = pattern(2 * 4096);
        let file = file_of(&bytes);
        let placed = place(&memory, &file, 0, 0x10_0000, 2 * 4096).unwrap();
        assert_eq!(placed.mapped, 2 * 4096);
        memory
            .write_slice(b"guest", GuestAddress(0x10_0000))
            .unwrap();
        let mut first = [0u8; 5];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).unwrap();
        assert_eq!(first, bytes[..5]);
    }

    #[test]
    fn a_short_file_and_a_range_outside_ram_are_refused() {
        let memory = allocate(2 << 20).unwrap();
        let file = file_of(&pattern(4096));
        assert!(matches!(
            place(&memory, &file, 0, 0, 8192),
            Err(MemoryError::File(_))
        ));
        assert!(matches!(
            place(&memory, &file, 0, (2 << 20) - 100, 4096),
            Err(MemoryError::Outside { .. })
        ));
        assert!(matches!(
            place(&memory, &file, 0, u64::MAX - 10, 4096),
            Err(MemoryError::Outside { .. })
        ));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_placement_gives_the_bytes_of_the_file_and_touches_nothing_else(
            offset in 0u64..9000, address in 0u64..9000, length in 0u64..20_000,
        ) {
            let memory = allocate(2 << 20).unwrap();
            let bytes = pattern(30_000);
            let file = file_of(&bytes);
            let base = 0x8000 + address;
            let placed = place(&memory, &file, offset, base, length).unwrap();
            prop_assert_eq!(placed.mapped + placed.copied, length);
            let start = usize::try_from(offset).unwrap();
            let count = usize::try_from(length).unwrap();
            prop_assert_eq!(read(&memory, base, count), &bytes[start..start + count]);
            prop_assert_eq!(read(&memory, base - 64, 64), vec![0; 64]);
            prop_assert_eq!(read(&memory, base + length, 64), vec![0; 64]);
        }
    }
}
