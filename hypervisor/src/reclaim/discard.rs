//! Memory the guest has given up, given back to the host, in whole huge pages or in parts of them.
//!
//! A huge page of which a part is unmapped still holds all of its memory: the kernel splits it when it
//! runs short. So it is split here and now, and kept from being collapsed again, until the guest gives up
//! the whole of it. The guest names the pieces; all it can lose is its own data.

use std::collections::BTreeSet;
use std::ops::Range;

use vm_memory::VolatileSlice;

use crate::arch::x86_64::layout::HUGE_PAGE;

/// What has been given up so far.
#[derive(Debug, Default)]
pub struct Discarded {
    /// Numbers of the huge pages, by host address, that are in small pages for now.
    split: BTreeSet<usize>,
    /// Bytes in all.
    bytes: u64,
}

impl Discarded {
    /// How many bytes have left.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives the whole host pages of a piece of guest memory back to the host. They read as zero, or
    /// as the file that was mapped there, when the guest touches them again.
    pub fn discard(&mut self, slice: &VolatileSlice<'_>) {
        let page = host_page();
        let guard = slice.ptr_guard_mut();
        let first = guard.as_ptr().addr();
        let start = first.next_multiple_of(page);
        let end = first + slice.len();
        let end = end - end % page;
        if start >= end {
            return;
        }
        // It fails for memory that is locked or of huge pages only: then the memory stays, no more.
        // SAFETY: the range lies inside the slice, that is, inside mapped guest memory of which Rust
        // holds no reference; its contents belong to the guest, which has given them up.
        let left = unsafe { advise(start..end, libc::MADV_DONTNEED) };
        if left == 0 {
            self.bytes = self.bytes.saturating_add((end - start) as u64);
        }
        for number in touched(&(start..end)) {
            self.divide(number, &(start..end));
        }
    }

    /// Splits a huge page that has lost a part, and makes one of it again that has lost everything.
    fn divide(&mut self, number: usize, given: &Range<usize>) {
        let block = number * SIZE..(number + 1) * SIZE;
        let whole = given.start <= block.start && block.end <= given.end;
        let changed = if whole {
            self.split.remove(&number)
        } else {
            self.split.insert(number)
        };
        if !changed {
            return;
        }
        let advices: &[libc::c_int] = if whole {
            &[libc::MADV_HUGEPAGE]
        } else {
            // To put a page that is mapped in part on the list of cold ones, the kernel splits it;
            // nothing else asks that of it. Where there is no swap, being cold means nothing more.
            &[libc::MADV_NOHUGEPAGE, libc::MADV_COLD]
        };
        for advice in advices {
            // Advice only: what fails leaves the memory as it is.
            // SAFETY: these three change how pages are kept, never what is in them, whoever's memory
            // the rest of the huge page may be.
            let _ = unsafe { advise(block.clone(), *advice) };
        }
    }
}

/// Bytes of a huge page.
#[expect(clippy::cast_possible_truncation, reason = "2 MiB")]
const SIZE: usize = HUGE_PAGE as usize;

/// The huge pages that a range, which is not empty, has a part of.
fn touched(range: &Range<usize>) -> impl Iterator<Item = usize> + use<> {
    range.start / SIZE..=(range.end - 1) / SIZE
}

/// # Safety
/// As the advice is for the memory of the range.
unsafe fn advise(range: Range<usize>, advice: libc::c_int) -> libc::c_int {
    let start = std::ptr::without_provenance_mut(range.start);
    // SAFETY: see above.
    unsafe { libc::madvise(start, range.len(), advice) }
}

fn host_page() -> usize {
    // SAFETY: no pointers; the C library knows the answer from the start of the process.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use std::fs;
    use vm_memory::{
        Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _,
    };

    const MIB: u64 = 1 << 20;

    /// RAM of `huge` huge pages, all of it written.
    fn filled(huge: u64) -> GuestMemoryMmap {
        let memory = memory::allocate(huge * HUGE_PAGE).unwrap();
        let bytes = vec![7; SIZE];
        for number in 0..huge {
            memory
                .write_slice(&bytes, GuestAddress(number * HUGE_PAGE))
                .unwrap();
        }
        memory
    }

    /// KiB by name that `smaps` tells of the mapping, or mappings, of `memory`.
    fn smaps(memory: &GuestMemoryMmap, name: &str) -> u64 {
        let region = memory.iter().next().unwrap();
        let start = region.as_ptr().addr();
        let end = start + usize::try_from(region.len()).unwrap();
        let mut inside = false;
        let mut sum = 0;
        for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
            let first = line.split([' ', '-']).next().unwrap();
            if let Ok(address) = usize::from_str_radix(first, 16) {
                inside = (start..end).contains(&address);
            } else if inside && first.strip_suffix(':') == Some(name) {
                let kib = line.split_whitespace().nth(1).unwrap();
                sum += kib.parse::<u64>().unwrap();
            }
        }
        sum
    }

    fn discard(memory: &GuestMemoryMmap, into: &mut Discarded, at: u64, bytes: u64) {
        let slice = memory
            .get_slice(GuestAddress(at), usize::try_from(bytes).unwrap())
            .unwrap();
        into.discard(&slice);
    }

    #[test]
    fn a_part_of_a_huge_page_leaves_small_pages_and_the_whole_of_it_a_huge_one() {
        let memory = filled(4);
        let mut discarded = Discarded::default();
        // Only what the host gave in huge pages can be counted in them.
        let all_huge = smaps(&memory, "AnonHugePages") == 8192;
        discard(&memory, &mut discarded, 3 * MIB, MIB / 2);
        assert_eq!(smaps(&memory, "Rss"), 8192 - 512);
        assert!(!all_huge || smaps(&memory, "AnonHugePages") == 6144);
        assert_eq!(discarded.split.len(), 1);
        let mut kept = [0];
        memory
            .read_slice(&mut kept, GuestAddress(3 * MIB - 1))
            .unwrap();
        assert_eq!(kept, [7]);
        // What is given up of it later is given up too.
        discard(&memory, &mut discarded, 2 * MIB, MIB);
        assert_eq!(smaps(&memory, "Rss"), 8192 - 1536);
        discard(&memory, &mut discarded, 2 * MIB, 2 * MIB);
        assert!(discarded.split.is_empty());
        memory.write_slice(&[1], GuestAddress(2 * MIB)).unwrap();
        assert!(!all_huge || smaps(&memory, "AnonHugePages") >= 6144);
    }

    #[test]
    fn memory_of_a_split_huge_page_is_free_at_once() {
        let split = || {
            let text = fs::read_to_string("/proc/vmstat").unwrap();
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("thp_split_page "));
            line.map_or(0, |count| count.parse::<u64>().unwrap())
        };
        let memory = filled(8);
        let has = smaps(&memory, "AnonHugePages") >= 8 * 2048;
        if !brig_fixtures::needs::needs(
            has,
            "huge pages of anonymous memory, and 16 MiB of them free",
        ) {
            return;
        }
        let before = split();
        let mut discarded = Discarded::default();
        for number in 0..8 {
            discard(&memory, &mut discarded, number * HUGE_PAGE, MIB);
        }
        // Others on the host split pages too, but never fewer.
        assert!(
            split() >= before + 8,
            "{} of 8 were split",
            split() - before
        );
    }

    #[test]
    fn a_range_over_several_huge_pages_splits_those_at_its_ends() {
        let memory = filled(4);
        let mut discarded = Discarded::default();
        discard(&memory, &mut discarded, MIB, 6 * MIB);
        assert_eq!(smaps(&memory, "Rss"), 2048);
        assert_eq!(discarded.split.len(), 2);
    }
}
