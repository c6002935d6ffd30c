//! Files as guest memory: one behind the other in one region, as the node's page cache has them, so that all VMs with the
//! same files have the same pages. The rest of the region reads as zeros.
//!
//! Nothing in it can be written, neither by the guest nor by a device of its VM. The files come from the shim and are
//! trusted to keep their size: behind the end of one that has become shorter there is nothing to read, and whoever touches
//! that ends the VM.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::stat::fstat;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

use crate::arch::x86_64::layout::HUGE_PAGE;
use crate::control::{PIECE_ALIGNMENT, PMEM_START};
use crate::memory::MemoryError;

/// Files that are mapped, for as long as the guest may have them.
#[derive(Debug)]
pub struct MappedFiles(Vec<(File, u64)>);

/// A file that is not what was mapped any more.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "file {number} of a container's image (inode {inode} of the node) has become shorter, {now} instead of {was} bytes, while the \
     pod had it mapped; nobody may change a snapshot that is in use"
)]
pub struct Shortened {
    /// Which, from 1 on.
    pub number: usize,
    /// Which on its file system.
    pub inode: u64,
    /// Bytes that it had.
    pub was: u64,
    /// Bytes that it has.
    pub now: u64,
}

/// Bytes of the region for files that have so many each: a multiple of 2 MiB. None: too many.
#[must_use]
pub fn region_size(lengths: &[u64]) -> Option<u64> {
    let sum = |sum: u64, length: &u64| sum.checked_add(*length);
    lengths
        .iter()
        .try_fold(PMEM_START, sum)?
        .checked_next_multiple_of(HUGE_PAGE)
}

/// Maps `files`, each with its length in the region, for guest address `start`.
///
/// # Errors
/// [`MemoryError`]; also if a length is not its file's size rounded up to [`PIECE_ALIGNMENT`].
pub fn map(
    start: u64,
    files: Vec<(OwnedFd, u64)>,
) -> Result<(GuestRegionMmap, MappedFiles), MemoryError> {
    let lengths: Vec<u64> = files.iter().map(|(_, length)| *length).collect();
    let all = lengths
        .iter()
        .fold(0, |sum: u64, length| sum.saturating_add(*length));
    let bytes = region_size(&lengths).ok_or(MemoryError::Size(all))?;
    let fail = |source| MemoryError::Map { bytes, source };
    let size = usize::try_from(bytes).map_err(|_| MemoryError::Size(bytes))?;
    // What no file is mapped over stays the kernel's page of zeros.
    let region = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()?;
    let mut mapped = Vec::new();
    let mut at = PMEM_START;
    for (file, length) in files {
        let file = File::from(file);
        let own = size_of(&file).map_err(fail)?;
        if length == 0 || own.checked_next_multiple_of(PIECE_ALIGNMENT) != Some(length) {
            let reason = format!("a file of {own} bytes cannot have {length} of them");
            return Err(fail(io::Error::other(reason)));
        }
        // Below `bytes`, which is one.
        let offset = usize::try_from(at).map_err(|_| MemoryError::Size(bytes))?;
        let own_size = usize::try_from(length).map_err(|_| MemoryError::Size(bytes))?;
        // SAFETY: `region_size` has room for all files one behind the other, so the place is inside the region.
        let place = unsafe { region.as_ptr().add(offset) };
        // SAFETY: the range lies in the region made above, which nobody else knows yet and which unmaps it. What is mapped
        // is read-only, so no memory of Rust's changes behind its back by way of it.
        let done = unsafe {
            libc::mmap(
                place.cast(),
                own_size,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            )
        };
        if done == libc::MAP_FAILED {
            return Err(fail(io::Error::last_os_error()));
        }
        mapped.push((file, own));
        at += length;
    }
    // Advice only: a core file without it would hold the image.
    // SAFETY: the region is mapped, and the advice changes nothing in it.
    let _ = unsafe { libc::madvise(region.as_ptr().cast(), size, libc::MADV_DONTDUMP) };
    let region =
        GuestRegionMmap::new(region, GuestAddress(start)).ok_or(MemoryError::Size(bytes))?;
    Ok((region, MappedFiles(mapped)))
}

/// By a call that the control loop may make.
fn size_of(file: &File) -> io::Result<u64> {
    Ok(u64::try_from(fstat(file)?.st_size).unwrap_or(0))
}

impl MappedFiles {
    /// The first that is shorter than it was when it was mapped.
    #[must_use]
    pub fn shortened(&self) -> Option<Shortened> {
        let short = |(number, (file, was)): (usize, &(File, u64))| {
            let stat = fstat(file).ok()?;
            let now = u64::try_from(stat.st_size).unwrap_or(0);
            (now < *was).then_some(Shortened {
                number,
                inode: stat.st_ino,
                was: *was,
                now,
            })
        };
        (1..).zip(&self.0).find_map(short)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _};

    use super::*;
    use crate::memory;

    fn file(bytes: &[u8]) -> (OwnedFd, u64) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let length = (bytes.len() as u64).next_multiple_of(PIECE_ALIGNMENT);
        (file.into(), length)
    }

    #[test]
    fn a_length_that_is_not_the_files_is_refused() {
        for wrong in [0, 4096, 12_288, 8191] {
            let (file, _) = file(&[1; 5000]);
            assert!(map(0, vec![(file, wrong)]).is_err(), "{wrong}");
        }
        let lengths = [u64::MAX, 4096];
        assert_eq!(region_size(&lengths), None);
        let files = lengths.map(|length| (file(&[1]).0, length));
        assert!(map(0, files.into()).is_err());
    }

    #[test]
    fn a_file_that_becomes_shorter_is_told_with_its_sizes() {
        let (first, second) = (file(&[1; 4096]), file(&[2; 9000]));
        let copy = File::from(second.0.try_clone().unwrap());
        let (_region, files) = map(0, vec![first, second]).unwrap();
        assert_eq!(files.shortened(), None);
        copy.set_len(20_000).unwrap();
        assert_eq!(files.shortened(), None);
        copy.set_len(17).unwrap();
        let short = files.shortened().unwrap();
        assert_eq!((short.number, short.was, short.now), (2, 9000, 17));
        assert!(short.to_string().contains("17 instead of 9000 bytes"));
    }

    #[test]
    fn a_region_is_for_reading_and_gone_with_its_last_owner() {
        let (region, _files) = map(16 << 20, vec![file(&[3; 4096])]).unwrap();
        assert!(!memory::is_writable_region(&region));
        let host = region.as_ptr() as usize;
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let start = format!("{:x}-", host);
            maps.lines().any(|line| line.starts_with(&start))
        };
        assert!(mapped());
        drop(region);
        assert!(!mapped());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn files_lie_one_behind_the_other_and_zeros_around_them(
            sizes in prop::collection::vec(1usize..20_000, 1..6),
        ) {
            const START: u64 = 1 << 32;
            let contents: Vec<Vec<u8>> = (1u8..).zip(&sizes).map(|(byte, size)| vec![byte; *size]).collect();
            let files = contents.iter().map(|bytes| file(bytes)).collect();
            let (region, _files) = map(START, files).unwrap();
            prop_assert_eq!(region.len() % HUGE_PAGE, 0);
            let length = usize::try_from(region.len()).unwrap();
            let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
            let mut seen = vec![9; length];
            memory.read_slice(&mut seen, GuestAddress(START)).unwrap();
            let mut expected = vec![0; usize::try_from(PMEM_START).unwrap()];
            for bytes in contents {
                expected.extend(&bytes);
                expected.resize(expected.len().next_multiple_of(4096), 0);
            }
            expected.resize(length, 0);
            prop_assert!(seen == expected);
            prop_assert!(memory.get_slice(GuestAddress(START), length).is_ok());
        }
    }
}
