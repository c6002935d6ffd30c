//! The memory of a captured guest: which pages are kept, and how a clone has them.
//!
//! Only what was written is mapped from the file. The rest of a clone's memory is anonymous: a page that is missing in a file on tmpfs would
//! be made there, for all, when one of them touches it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

use serde::{Deserialize, Serialize};
use vm_memory::{
    Address as _, Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion as _,
};

use super::TemplateError;
use crate::arch::x86_64::layout::{self, PAGE};

/// Bytes of a page.
#[expect(clippy::cast_possible_truncation, reason = "4 KiB")]
const SIZE: usize = PAGE as usize;
/// Zero pages between two that are not, up to this many, are kept with them: each run costs its clones a mapping.
const BRIDGED: u64 = 16;
/// More runs than a guest that has just booted has, and fewer than a process may have mappings.
const MAX_EXTENTS: usize = 16_384;

/// A run of pages, whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// Guest address of the first.
    pub guest: u64,
    /// Its length.
    pub bytes: u64,
}

impl Extent {
    fn end(&self) -> Option<u64> {
        self.guest.checked_add(self.bytes)
    }
}

/// The runs of pages that are not zero.
///
/// # Errors
/// If guest memory cannot be read.
pub fn extents(memory: &GuestMemoryMmap) -> Result<Vec<Extent>, GuestMemoryError> {
    let mut found: Vec<Extent> = Vec::new();
    const ZERO: [u8; SIZE] = [0; SIZE];
    let mut page = ZERO;
    for region in memory.iter() {
        // None reaches over the end of a region.
        let mut last: Option<Extent> = None;
        let (start, length) = (region.start_addr().raw_value(), region.len());
        for guest in (start..start + length).step_by(SIZE) {
            memory.read_slice(&mut page, GuestAddress(guest))?;
            if page == ZERO {
                continue;
            }
            match &mut last {
                Some(run) if guest - (run.guest + run.bytes) <= BRIDGED * PAGE => {
                    run.bytes = guest + PAGE - run.guest;
                }
                _ => found.extend(last.replace(Extent { guest, bytes: PAGE })),
            }
        }
        found.extend(last);
    }
    Ok(found)
}

/// Whether the runs lie in RAM, in order and apart, and their pages in the `held` bytes that the file has for them; the sum of their bytes.
///
/// # Errors
/// What is wrong.
pub fn check(extents: &[Extent], ram_bytes: u64, held: u64) -> Result<u64, &'static str> {
    if extents.len() > MAX_EXTENTS {
        return Err("it has too many runs of pages");
    }
    let ram = layout::ram(ram_bytes.min(1 << 46));
    let (mut after, mut sum) = (0, 0u64);
    for extent in extents {
        let whole = |number: u64| number.is_multiple_of(PAGE);
        let Some(end) = extent.end().filter(|_| extent.bytes > 0) else {
            return Err("a run of pages has no end");
        };
        if !whole(extent.guest) || !whole(extent.bytes) {
            return Err("a run is not of whole pages");
        }
        let inside = |(start, length): &(u64, u64)| *start <= extent.guest && end <= start + length;
        if extent.guest < after || !ram.iter().any(inside) {
            return Err("a run of pages is not in RAM, or out of order");
        }
        after = end;
        // Each is below 2^46 and there are few.
        sum += extent.bytes;
    }
    if sum > held {
        return Err("the file is shorter than its pages");
    }
    Ok(sum)
}

/// Writes the pages to the file from `at` on; the file's length then.
///
/// # Errors
/// What the host says.
pub fn write(
    memory: &GuestMemoryMmap,
    extents: &[Extent],
    file: &File,
    mut at: u64,
) -> Result<u64, TemplateError> {
    let mut block = vec![0; 64 * SIZE];
    for extent in extents {
        let mut done = 0;
        while done < extent.bytes {
            let length = (extent.bytes - done).min(block.len() as u64);
            let part = &mut block[..usize::try_from(length).map_err(io::Error::other)?];
            memory.read_slice(part, GuestAddress(extent.guest + done))?;
            file.write_all_at(part, at)?;
            done += length;
            at += length;
        }
    }
    Ok(at)
}

/// Maps the pages, which are in the file from `at` on, over fresh RAM: privately, so that the file never changes. The runs have been
/// [`check`]ed against RAM of this size and this file.
///
/// # Errors
/// What the host says.
pub fn map(
    memory: &GuestMemoryMmap,
    extents: &[Extent],
    file: &File,
    mut at: u64,
) -> io::Result<()> {
    for extent in extents {
        let length = usize::try_from(extent.bytes).map_err(io::Error::other)?;
        let slice = memory
            .get_slice(GuestAddress(extent.guest), length)
            .map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
        // SAFETY: the slice is a part of guest memory, whole pages of it, of which Rust holds no reference and which no CPU or device
        // uses yet; what replaces it has the same length and stays as long.
        let mapped = unsafe {
            libc::mmap(
                slice.ptr_guard_mut().as_ptr().cast(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Left out of core dumps, as all guest memory; advice only.
        // SAFETY: the range was mapped above; the advice changes nothing in it.
        let _ = unsafe { libc::madvise(mapped, length, libc::MADV_DONTDUMP) };
        at += extent.bytes;
    }
    Ok(())
}
