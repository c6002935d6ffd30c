//! Guest memory with known physical addresses: what a device can be told to use.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

/// Size of a page in bytes.
pub const PAGE: usize = 4096;

// SAFETY: all accesses are volatile and of single bytes; what races on a page races with a device anyway.
unsafe impl Sync for Page {}
// SAFETY: as above; the page is never freed.
unsafe impl Send for Page {}

/// One locked page. Never freed: a hostile device configuration may refer to it for ever.
pub struct Page {
    start: NonNull<u8>,
    /// Its guest-physical address.
    pub address: u64,
}

impl Page {
    /// A zeroed page.
    pub fn new() -> Result<Self> {
        let size = NonZeroUsize::new(PAGE).context("no size")?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap_anonymous(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_LOCKED | MapFlags::MAP_POPULATE,
            )
        }?
        .cast::<u8>();
        let page = Self { start, address: 0 };
        page.write(0, &[0u8]);
        // proc(5): bits 0 to 54 of a pagemap entry are the frame number.
        let mut entry = [0u8; 8];
        let index = start.as_ptr() as u64 / PAGE as u64;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, index * 8)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        ensure!(frame != 0, "pagemap hides frame numbers");
        Ok(Self {
            start,
            address: frame * PAGE as u64,
        })
    }

    /// Writes bytes; what would go over the end is cut.
    pub fn write(&self, offset: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate().take(PAGE.saturating_sub(offset)) {
            // SAFETY: offset + index is below the page's size; the page is ours and writable.
            unsafe {
                self.start
                    .as_ptr()
                    .add(offset + index)
                    .write_volatile(*byte);
            }
        }
    }

    /// Reads bytes; what would go over the end is cut.
    pub fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        (offset..offset.saturating_add(length).min(PAGE))
            // SAFETY: each offset is below the page's size; the page is ours.
            .map(|at| unsafe { self.start.as_ptr().add(at).read_volatile() })
            .collect()
    }

    /// Reads a little-endian u16; zero beyond the end.
    pub fn read16(&self, offset: usize) -> u16 {
        if offset + 2 > PAGE {
            return 0;
        }
        // SAFETY: both bytes are inside the page.
        unsafe {
            u16::from_le_bytes([
                self.start.as_ptr().add(offset).read_volatile(),
                self.start.as_ptr().add(offset + 1).read_volatile(),
            ])
        }
    }
}
