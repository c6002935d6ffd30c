//! Memory of a booting guest that is next to empty, kept in small pages.
//!
//! RAM is in huge pages, of which the first touch takes the whole. Linux never uses the first MiB, and the text of its image
//! is aligned to 2 MiB in two places, so that the page between holds a few KiB of text and is breakpoint instructions
//! otherwise, which nothing runs and which read as zero from then on. What is next to empty is told by what it holds, not by
//! the kernel's version. The image comes from the node's installation and is trusted.

use std::ops::Range;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::layout::{HUGE_PAGE, PAGE};
use crate::memory::{self, MemoryError};

/// What compilers and linkers fill gaps of the text with: `int3`.
const FILLER: u8 = 0xcc;
/// Of the pages of a huge page, at most so many hold something where it is to be in small ones: each is a fault of its own.
const FEW: usize = 64;
#[expect(clippy::cast_possible_truncation, reason = "4 KiB")]
const SIZE: usize = PAGE as usize;

/// Has the guest's first 2 MiB in small pages. Before anything is written there.
///
/// # Errors
/// [`MemoryError::Outside`] for a guest without them.
pub fn spare_low_memory(memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
    memory::in_small_pages(memory, 0)
}

/// Gives back the filler of a kernel that has been loaded to the guest addresses `image`; the huge pages that were next to
/// empty are counted.
///
/// # Errors
/// See [`MemoryError`].
pub fn give_back(memory: &GuestMemoryMmap, image: Range<u64>) -> Result<usize, MemoryError> {
    let mut found = 0;
    let first = image.start.div_ceil(HUGE_PAGE);
    for block in (first..image.end / HUGE_PAGE).map(|number| number * HUGE_PAGE) {
        if let Some(kept) = few(memory, block)? {
            memory::in_small_pages(memory, block)?;
            for (address, page) in kept {
                memory.write_slice(&page, GuestAddress(address))?;
            }
            found += 1;
        }
    }
    Ok(found)
}

/// A page and where it is.
type Page = (u64, [u8; SIZE]);

/// The pages of a huge page that hold something, if they are few.
fn few(memory: &GuestMemoryMmap, block: u64) -> Result<Option<Vec<Page>>, MemoryError> {
    let pages = || (block..block + HUGE_PAGE).step_by(SIZE);
    // Nearly every page that holds something says so in its first word.
    let mut full = 0;
    for address in pages() {
        let word: [u8; 8] = memory.read_obj(GuestAddress(address))?;
        full += usize::from(word != [FILLER; 8]);
        if full > FEW {
            return Ok(None);
        }
    }
    let mut kept = Vec::new();
    for address in pages() {
        let mut page = [0; SIZE];
        memory.read_slice(&mut page, GuestAddress(address))?;
        if page != [FILLER; SIZE] {
            kept.push((address, page));
        }
    }
    Ok((kept.len() <= FEW).then_some(kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RAM of four huge pages; the second has `full` pages with something in them, spread, the rest is filler; the third
    /// is filler but for one byte.
    fn loaded(full: usize) -> GuestMemoryMmap {
        let memory = memory::allocate(4 * HUGE_PAGE).unwrap();
        let filler = vec![FILLER; SIZE];
        for page in 512..1536_u64 {
            memory
                .write_slice(&filler, GuestAddress(page * PAGE))
                .unwrap();
        }
        for page in 0..full as u64 {
            let address = HUGE_PAGE + page * 7 % 512 * PAGE + page;
            memory.write_slice(&[1], GuestAddress(address)).unwrap();
        }
        memory
            .write_slice(&[2], GuestAddress(3 * HUGE_PAGE - 1))
            .unwrap();
        memory
    }

    fn bytes(memory: &GuestMemoryMmap) -> Vec<u8> {
        let mut bytes = vec![0; 4 << 21];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    #[test]
    fn what_is_next_to_empty_keeps_what_it_holds_and_reads_as_zero_elsewhere() {
        for full in [0, 1, FEW] {
            let memory = loaded(full);
            let before = bytes(&memory);
            let image = HUGE_PAGE..4 * HUGE_PAGE - 1;
            assert_eq!(give_back(&memory, image).unwrap(), 2, "{full}");
            let after = bytes(&memory);
            for (was, is) in before.chunks(SIZE).zip(after.chunks(SIZE)) {
                let empty = was.iter().all(|byte| *byte == FILLER);
                assert!(is == was || (empty && is.iter().all(|byte| *byte == 0)));
                assert!(!empty || is != was, "filler was kept");
            }
        }
    }

    #[test]
    fn what_is_full_and_what_is_no_part_of_the_image_stays_as_it_is() {
        let memory = loaded(FEW + 1);
        let before = bytes(&memory);
        for image in [
            HUGE_PAGE..2 * HUGE_PAGE,
            2 * HUGE_PAGE + 1..4 * HUGE_PAGE,
            0..3 * HUGE_PAGE - 1,
            u64::MAX - 5..u64::MAX,
        ] {
            let full = image.clone();
            assert_eq!(give_back(&memory, image).unwrap(), 0, "{full:x?}");
        }
        assert!(bytes(&memory) == before);
    }

    #[test]
    fn a_guest_without_low_memory_is_refused() {
        let memory = memory::allocate(HUGE_PAGE).unwrap();
        spare_low_memory(&memory).unwrap();
        assert!(matches!(
            memory::in_small_pages(&memory, HUGE_PAGE),
            Err(MemoryError::Outside { .. })
        ));
    }
}
