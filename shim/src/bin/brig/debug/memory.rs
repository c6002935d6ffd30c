//! A guest's memory, read from its VMM, which knows nothing of it: by the guest's physical address, or by a virtual one
//! of a CPU. Its page tables are the guest's and are followed within its memory alone.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;

use brig_hypervisor::arch::x86_64::layout;
use brig_hypervisor::control::Registers;

use crate::processes::{Mapping, guest_memory};

/// Where Linux has all memory in its address space (`page_offset_base` with four levels of page tables and no KASLR,
/// as Brig's guest kernel is built).
pub const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
/// Where its own image is, and how much of the memory's beginning is there (`__START_KERNEL_map`,
/// `KERNEL_IMAGE_SIZE`).
pub const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
pub const KERNEL_MAP_SIZE: u64 = 512 << 20;
/// Page table entries (Intel SDM, volume 3, section 4.5): there is one; it is of a large page; the address in it.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// CR0.PG, CR4.LA57.
const PAGING: u64 = 1 << 31;
const FIVE_LEVELS: u64 = 1 << 12;

/// A part of the guest's memory: where the guest has it, where its VMM has it, and its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Guest-physical.
    pub guest: u64,
    /// In the VMM.
    pub host: u64,
    /// Bytes.
    pub length: u64,
}

/// The memory that a guest was started with.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    /// In the order of addresses.
    pub parts: Vec<Part>,
    /// Bytes that the VM grew by, which are not in it.
    pub left_out: u64,
}

impl GuestMemory {
    /// That of a VMM whose VM was started with so many bytes.
    ///
    /// # Errors
    /// What the system says; that it is not there as it should be.
    pub fn of(vmm: u32, first: u64) -> io::Result<Self> {
        let mappings = guest_memory(&fs::read_to_string(format!("/proc/{vmm}/smaps"))?);
        let (parts, left_out) = places(&layout::ram(first), &mappings).ok_or_else(|| {
            io::Error::other(
                "the VMM's memory is not laid out as its VM's is: is it of another version of Brig?",
            )
        })?;
        Ok(Self {
            file: File::open(format!("/proc/{vmm}/mem"))?,
            parts,
            left_out,
        })
    }

    /// Fills `buffer` with what is in a part.
    ///
    /// # Errors
    /// What the system says.
    pub fn read_part(&self, part: &Part, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, part.host + offset)
    }

    /// Fills `buffer` with what is at a physical address; nothing if not all of it is memory.
    pub fn read_physical(&self, at: u64, buffer: &mut [u8]) -> Option<()> {
        let end = at.checked_add(buffer.len() as u64)?;
        let inside = |part: &&Part| part.guest <= at && end <= part.guest + part.length;
        let part = self.parts.iter().find(inside)?;
        self.read_part(part, at - part.guest, buffer).ok()
    }

    /// Fills `buffer` with what a CPU has at a virtual address; how many bytes are there.
    pub fn read_virtual(&self, cpu: &Registers, at: u64, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buffer.len() {
            let Some((physical, left)) = at
                .checked_add(done as u64)
                .and_then(|at| self.translate(cpu, at))
            else {
                break;
            };
            let left = usize::try_from(left).unwrap_or(usize::MAX);
            let length = left.min(buffer.len() - done);
            if self
                .read_physical(physical, &mut buffer[done..done + length])
                .is_none()
            {
                break;
            }
            done += length;
        }
        done
    }

    /// Where a virtual address of a CPU is, and how many bytes from there are in one piece.
    pub fn translate(&self, cpu: &Registers, at: u64) -> Option<(u64, u64)> {
        let page = layout::PAGE;
        if cpu.cr0 & PAGING == 0 {
            return Some((at, page - at % page));
        }
        let levels: u32 = if cpu.cr4 & FIVE_LEVELS == 0 { 4 } else { 5 };
        let mapped = self.walk(cpu.cr3 & ADDRESS, levels, at);
        // A CPU in a process, whose page tables have next to nothing of the kernel, knows it all the same.
        let known = [(DIRECT_MAP, 1 << 46), (KERNEL_MAP, KERNEL_MAP_SIZE)];
        mapped.or_else(|| {
            let found = known.iter().find_map(|(start, size)| {
                let offset = at.checked_sub(*start)?;
                (offset < *size).then_some(offset)
            });
            let offset = found?;
            let there = |part: &Part| (part.guest..part.guest + part.length).contains(&offset);
            self.parts
                .iter()
                .any(there)
                .then_some((offset, page - offset % page))
        })
    }

    fn walk(&self, mut table: u64, levels: u32, at: u64) -> Option<(u64, u64)> {
        let bits = 12 + 9 * levels;
        // What is above is the last bit again.
        let above = at >> (bits - 1);
        if above != 0 && above != u64::MAX >> (bits - 1) {
            return None;
        }
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let index = (at >> shift) & 511;
            let mut entry = [0; 8];
            self.read_physical(table + 8 * index, &mut entry)?;
            let entry = u64::from_le_bytes(entry);
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 0 || (level <= 2 && entry & LARGE != 0) {
                let size = 1 << shift;
                let offset = at & (size - 1);
                return Some((((entry & ADDRESS) & !(size - 1)) + offset, size - offset));
            }
            table = entry & ADDRESS;
        }
        None
    }
}

/// Where the VMM has the memory that its VM was started with, and the bytes that it has besides; nothing if a part of
/// it cannot be told from others.
fn places(ram: &[(u64, u64)], mappings: &[Mapping]) -> Option<(Vec<Part>, u64)> {
    let mut parts = Vec::new();
    for &(guest, length) in ram {
        let mut fitting = mappings.iter().filter(|mapping| mapping.length == length);
        let mapping = fitting.next()?;
        if fitting.next().is_some() {
            return None;
        }
        parts.push(Part {
            guest,
            host: mapping.start,
            length,
        });
    }
    let all: u64 = mappings.iter().map(|mapping| mapping.length).sum();
    let known: u64 = parts.iter().map(|part| part.length).sum();
    Some((parts, all - known))
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_shim::asked::config::MIB;
    use proptest::prelude::*;

    #[test]
    fn what_a_vm_was_started_with_is_told_from_what_it_grew_by() {
        let mapping = |start, length| Mapping {
            start,
            length,
            resident: 0,
        };
        let grown = [
            mapping(0x1000_0000, 2 * MIB),
            mapping(0x2000_0000, 64 * MIB),
        ];
        let (parts, left_out) = places(&[(0, 64 * MIB)], &grown).unwrap();
        let expected = Part {
            guest: 0,
            host: 0x2000_0000,
            length: 64 * MIB,
        };
        assert_eq!((parts, left_out), (vec![expected], 2 * MIB));
        assert_eq!(places(&[(0, 32 * MIB)], &grown), None);
        let twice = [mapping(0, 64 * MIB), mapping(0x2000_0000, 64 * MIB)];
        assert_eq!(places(&[(0, 64 * MIB)], &twice), None, "which of the two?");
    }

    /// Memory of 64 KiB with these words in it.
    fn memory(words: &[(u64, u64)]) -> GuestMemory {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1_0000).unwrap();
        for (at, word) in words {
            file.write_all_at(&word.to_le_bytes(), *at).unwrap();
        }
        GuestMemory {
            file,
            parts: vec![Part {
                guest: 0,
                host: 0,
                length: 0x1_0000,
            }],
            left_out: 0,
        }
    }

    fn cpu() -> Registers {
        Registers {
            cr0: PAGING,
            cr3: 0x1000,
            ..Registers::default()
        }
    }

    #[test]
    fn page_tables_lead_to_small_and_large_pages_and_nowhere_else() {
        // 0xffff_c900_0000_0000: entry 402 of the first table; then 0, 0 and 5.
        let memory = memory(&[
            (0x1000 + 8 * 402, 0x2001),
            (0x2000, 0x3001),
            (0x3000, 0x4001),
            (0x3008, LARGE | PRESENT),
            (0x4000 + 8 * 5, 0x5001),
            (0x5ff8, 0x1122_3344_5566_7788),
            (0x6000, 0x99),
        ]);
        let stack = 0xffff_c900_0000_5ff8;
        let mut bytes = [0; 16];
        assert_eq!(memory.read_virtual(&cpu(), stack, &mut bytes), 8);
        assert_eq!(bytes[..8], 0x1122_3344_5566_7788_u64.to_le_bytes());
        let large = 0xffff_c900_0020_6000;
        assert_eq!(memory.read_virtual(&cpu(), large, &mut bytes), 16);
        assert_eq!(bytes[0], 0x99);
        for nowhere in [0, 0x1000, 0x0000_c900_0000_5ff8, u64::MAX] {
            assert_eq!(memory.read_virtual(&cpu(), nowhere, &mut bytes), 0);
        }
        // The kernel's image and the direct map, which these page tables do not have.
        for known in [KERNEL_MAP + 0x6000, DIRECT_MAP + 0x6000] {
            assert_eq!(memory.read_virtual(&cpu(), known, &mut bytes), 16);
            assert_eq!(bytes[0], 0x99);
        }
        let off = Registers::default();
        assert_eq!(memory.read_virtual(&off, 0x6000, &mut bytes), 16);
    }

    proptest! {
        #[test]
        fn any_page_tables_are_followed_within_memory(
            words in prop::collection::vec((0u64..0x2000, any::<u64>()), 0..64),
            at: u64, cr3 in 0u64..0x2_0000, cr4: u64,
        ) {
            let words: Vec<_> = words.into_iter().map(|(at, word)| (8 * at, word)).collect();
            let memory = memory(&words);
            let cpu = Registers { cr3, cr4, ..cpu() };
            let mut bytes = [0; 64];
            let read = memory.read_virtual(&cpu, at, &mut bytes);
            prop_assert!(read <= bytes.len());
        }
    }
}
