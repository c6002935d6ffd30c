//! What clones need of a template at once, so that they are given it before they run and not page by page at an exit each.
//!
//! The template's maker lets one clone run until its agent calls, and then looks which pages of the file it has touched, and which it has
//! made its own by a write. The record stands behind the pages of the file. It is of a guest that has had nothing of any pod, and it is
//! advice: what a clone does with it is have pages that it would have had a moment later.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use kvm_bindings::kvm_pre_fault_memory;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap};

use super::pages::Extent;
use crate::arch::x86_64::layout::PAGE;

const MAGIC: [u8; 8] = *b"BRIGWSET";
/// Magic number and length of the JSON.
const PREFIX: usize = 12;
/// A record has some 10 KiB.
const MAX_RECORD: u32 = 1 << 20;
/// Runs that are apart by no more than this many pages are touched as one: a page that nobody needs costs less than a call.
const BRIDGED: u64 = 16;
/// proc(5), pagemap: the page is there; it is of a file.
const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;

/// linux/kvm.h.
const KVM_PRE_FAULT_MEMORY: libc::Ioctl = 0xc040_aed5;

/// Runs of pages: the number of the first, counted from the first page of memory in the file, and how many.
type Runs = Vec<(u64, u64)>;

/// Pages of a template that every clone touches.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSet {
    /// Those that it writes.
    written: Runs,
    /// Those that it has touched at all, and some between them.
    touched: Runs,
}

impl WorkingSet {
    /// What process `pid` has of the pages that are in `file` from byte `pages` on.
    ///
    /// # Errors
    /// If the process is gone, or not to be looked at.
    pub fn of_process(pid: u32, file: &File, pages: u64) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let device = metadata.dev();
        let device = format!("{:02x}:{:02x}", libc::major(device), libc::minor(device));
        let map = File::open(format!("/proc/{pid}/pagemap"))?;
        let (mut written, mut touched) = (Vec::new(), Vec::new());
        for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
            let of_file =
                |mapping: &Mapping<'_>| mapping.device == device && mapping.inode == metadata.ino();
            let Some(mapping) = Mapping::parse(line).filter(of_file) else {
                continue;
            };
            let Some(first) = mapping.offset.checked_sub(pages) else {
                continue;
            };
            let count = usize::try_from((mapping.end - mapping.start) / PAGE);
            let mut entries = vec![0; 8 * count.map_err(io::Error::other)?];
            map.read_exact_at(&mut entries, mapping.start / PAGE * 8)?;
            for (number, entry) in (first / PAGE..).zip(entries.as_chunks::<8>().0) {
                let entry = u64::from_le_bytes(*entry);
                if entry & PRESENT != 0 {
                    touched.push(number);
                    if entry & OF_FILE == 0 {
                        written.push(number);
                    }
                }
            }
        }
        Ok(Self {
            written: runs(written, 0),
            touched: runs(touched, BRIDGED),
        })
    }

    /// Writes it behind the last page of a template, whose file has `length` bytes.
    ///
    /// # Errors
    /// What the host says.
    pub fn append(&self, file: &File, length: u64) -> io::Result<()> {
        let json = serde_json::to_vec(self).map_err(io::Error::other)?;
        let size = u32::try_from(json.len()).ok();
        let size = size
            .filter(|size| *size <= MAX_RECORD)
            .ok_or_else(|| io::Error::other("the record of touched pages is too long"))?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(size.to_le_bytes());
        bytes.extend(json);
        file.write_all_at(&bytes, length)
    }

    /// That of a file of `held` bytes whose `pages` pages of memory end at byte `end`: nothing if it has no record.
    ///
    /// # Errors
    /// What the host says, or what is wrong with the record.
    pub(super) fn read(file: &File, end: u64, held: u64, pages: u64) -> io::Result<Self> {
        let Some(length) = held.checked_sub(end).filter(|length| *length > 0) else {
            return Ok(Self::default());
        };
        let damaged = |what: &str| io::Error::other(format!("the record of touched pages {what}"));
        let mut prefix = [0; PREFIX];
        file.read_exact_at(&mut prefix, end)?;
        let size = u32::from_le_bytes([prefix[8], prefix[9], prefix[10], prefix[11]]);
        let whole = PREFIX as u64 + u64::from(size) == length;
        if prefix[..8] != MAGIC || size > MAX_RECORD || !whole {
            return Err(damaged("is none"));
        }
        let mut json = vec![0; usize::try_from(size).map_err(io::Error::other)?];
        file.read_exact_at(&mut json, end + PREFIX as u64)?;
        let found: Self = serde_json::from_slice(&json)?;
        for runs in [&found.written, &found.touched] {
            let mut after = 0;
            for (first, count) in runs {
                let end = first.checked_add(*count);
                let Some(end) = end.filter(|end| *first >= after && *count > 0 && *end <= pages)
                else {
                    return Err(damaged("names pages that are not in the file"));
                };
                after = end;
            }
        }
        Ok(found)
    }

    /// Has fresh memory of a clone make its own what it will write, and map what it will read.
    pub(super) fn populate(&self, memory: &GuestMemoryMmap, extents: &[Extent]) {
        advise(
            memory,
            &places(&self.written, extents),
            libc::MADV_POPULATE_WRITE,
        );
        advise(
            memory,
            &places(&self.touched, extents),
            libc::MADV_POPULATE_READ,
        );
    }

    /// Has KVM map what the clone will touch; a host older than Linux 6.11 does not know how.
    pub(super) fn map(&self, vcpu: &VcpuFd, extents: &[Extent]) {
        for place in places(&self.touched, extents) {
            let mut range = kvm_pre_fault_memory {
                gpa: place.guest,
                size: place.bytes,
                ..kvm_pre_fault_memory::default()
            };
            while range.size > 0 {
                let before = range.size;
                // SAFETY: the structure is KVM's for this call, which maps guest memory that the VM has, and writes how far it came.
                let done =
                    unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &raw mut range) };
                if done != 0 && range.size == before {
                    return;
                }
            }
        }
    }
}

/// Advice only: what the host does not do now it does at the first access.
fn advise(memory: &GuestMemoryMmap, places: &[Extent], advice: libc::c_int) {
    for place in places {
        let length = usize::try_from(place.bytes).unwrap_or(0);
        if let Ok(slice) = memory.get_slice(GuestAddress(place.guest), length) {
            // SAFETY: the range is guest memory, which stays mapped; its contents do not change.
            let _ = unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), length, advice) };
        }
    }
}

/// Where the guest has pages of the file.
fn places(runs: &[(u64, u64)], extents: &[Extent]) -> Vec<Extent> {
    let mut found = Vec::with_capacity(runs.len());
    let mut before = 0;
    let mut runs = runs.iter().copied().peekable();
    for extent in extents {
        let end = before + extent.bytes / PAGE;
        while let Some((first, count)) = runs.peek_mut() {
            if *first >= end {
                break;
            }
            let part = (*count).min(end - *first);
            found.push(Extent {
                guest: extent.guest + (*first - before) * PAGE,
                bytes: part * PAGE,
            });
            *first += part;
            *count -= part;
            if *count > 0 {
                break;
            }
            runs.next();
        }
        before = end;
    }
    found
}

/// Pages in runs, those joined that are no more than `apart` from each other.
fn runs(mut pages: Vec<u64>, apart: u64) -> Runs {
    pages.sort_unstable();
    let mut runs: Runs = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some((first, count)) if page <= *first + *count + apart => *count = page + 1 - *first,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

/// A line of `/proc/PID/maps`.
struct Mapping<'a> {
    start: u64,
    end: u64,
    offset: u64,
    device: &'a str,
    inode: u64,
}

impl<'a> Mapping<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = words.next()?.split_once('-')?;
        let offset = words.nth(1)?;
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            offset: hex(offset)?,
            device: words.next()?,
            inode: words.next()?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;
    use crate::memory;

    const EXTENTS: [Extent; 3] = [
        Extent {
            guest: 0x1000,
            bytes: 0x3000,
        },
        Extent {
            guest: 0x8000,
            bytes: 0x1000,
        },
        Extent {
            guest: 0x10_0000,
            bytes: 0x5000,
        },
    ];
    const PAGES: u64 = 9;

    fn guest_page(number: u64) -> u64 {
        let mut left = number;
        for extent in EXTENTS {
            let count = extent.bytes / PAGE;
            if left < count {
                return extent.guest + left * PAGE;
            }
            left -= count;
        }
        unreachable!("page {number}")
    }

    proptest! {
        #[test]
        fn runs_have_the_pages_and_places_have_them_where_the_guest_has(
            pages in prop::collection::btree_set(0..PAGES, 0..9)
        ) {
            let numbers: Vec<u64> = pages.iter().copied().collect();
            let runs = runs(numbers.clone(), 0);
            let listed: Vec<u64> = runs.iter().flat_map(|(first, count)| *first..first + count).collect();
            prop_assert_eq!(&listed, &numbers);
            let found = places(&runs, &EXTENTS);
            let guest: Vec<u64> = found.iter()
                .flat_map(|place| (place.guest..place.guest + place.bytes).step_by(4096)).collect();
            let expected: Vec<u64> = numbers.into_iter().map(guest_page).collect();
            prop_assert_eq!(guest, expected);
        }

        #[test]
        fn a_record_of_any_bytes_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let _ = WorkingSet::read(&file, 0, bytes.len() as u64, PAGES);
        }
    }

    #[test]
    fn runs_with_little_between_them_are_one() {
        assert_eq!(runs(vec![9, 1, 2, 5], 2), [(1, 5), (9, 1)]);
    }

    #[test]
    fn what_was_recorded_is_read_again_and_pages_that_there_are_not_are_refused() {
        let read = |set: &WorkingSet, pages| {
            let file = tempfile::tempfile().unwrap();
            set.append(&file, 8192).unwrap();
            let held = file.metadata().unwrap().len();
            WorkingSet::read(&file, 8192, held, pages)
        };
        let set = WorkingSet {
            written: vec![(1, 1)],
            touched: vec![(0, 3), (5, 4)],
        };
        assert_eq!(read(&set, PAGES).unwrap(), set);
        assert!(read(&set, PAGES - 1).is_err());
        for touched in [vec![(3, 2), (4, 1)], vec![(0, 0)], vec![(u64::MAX, 2)]] {
            let written = Vec::new();
            assert!(read(&WorkingSet { written, touched }, PAGES).is_err());
        }
        let file = tempfile::tempfile().unwrap();
        assert_eq!(
            WorkingSet::read(&file, 0, 0, PAGES).unwrap(),
            WorkingSet::default()
        );
    }

    #[test]
    fn what_a_process_has_touched_and_written_is_found_and_can_be_given_to_another() {
        // As the maker's file is: of no file system that could show another device in the list of mappings.
        let file = rustix::fs::memfd_create("template", rustix::fs::MemfdFlags::CLOEXEC);
        let file = File::from(file.unwrap());
        file.write_all_at(&[7; 10 * 4096], 0).unwrap();
        let ram = memory::allocate(2 << 20).unwrap();
        // The pages are behind a head of one page.
        super::super::pages::map(&ram, &EXTENTS, &file, PAGE).unwrap();
        let poke = |number: u64| {
            let slice = ram.get_slice(GuestAddress(guest_page(number)), 1).unwrap();
            slice.copy_from(&[1u8]);
        };
        poke(1);
        poke(6);
        let set = WorkingSet::of_process(std::process::id(), &file, PAGE).unwrap();
        assert_eq!(set.written, [(1, 1), (6, 1)]);
        let touched = |number: u64| {
            set.touched
                .iter()
                .any(|(first, count)| (*first..first + count).contains(&number))
        };
        assert!(touched(1) && touched(6));

        let other = memory::allocate(2 << 20).unwrap();
        super::super::pages::map(&other, &EXTENTS, &file, PAGE).unwrap();
        set.populate(&other, &EXTENTS);
        let map = File::open("/proc/self/pagemap").unwrap();
        let own = |number: u64| {
            let slice = other
                .get_slice(GuestAddress(guest_page(number)), 1)
                .unwrap();
            let mut entry = [0; 8];
            map.read_exact_at(&mut entry, slice.ptr_guard().as_ptr() as u64 / PAGE * 8)
                .unwrap();
            let entry = u64::from_le_bytes(entry);
            entry & PRESENT != 0 && entry & OF_FILE == 0
        };
        let found: Vec<u64> = (0..PAGES).filter(|number| own(*number)).collect();
        assert_eq!(found, [1, 6]);
    }
}
