//! Loads a vmlinux (ELF64) with a PVH entry note, and the initramfs.
//!
//! The files come from the node's installation and are trusted to boot, but their headers are
//! checked like any input: every offset and length is bounded before use.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::GuestMemoryMmap;

use crate::arch::x86_64::layout::{self, PAGE};
use crate::memory::{self, MemoryError};

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const MAX_SEGMENTS: usize = 64;
const MAX_NOTES: u64 = 64 * 1024;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit PVH entry.
const NOTE_PVH_ENTRY: u32 = 18;

/// The kernel or the initramfs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file is not what it should be.
    #[error("the guest kernel is not a PVH vmlinux: {0}")]
    Format(&'static str),
    /// Reading failed.
    #[error("reading the guest kernel: {0}")]
    Read(#[from] io::Error),
    /// It does not fit.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// There is no room.
    #[error(
        "an initramfs of {initramfs} bytes does not fit beside the kernel into {ram} bytes of memory"
    )]
    NoRoom {
        /// Its size.
        initramfs: u64,
        /// Bytes of low RAM.
        ram: u64,
    },
}

/// A kernel in guest RAM.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Guest address of the PVH entry.
    pub entry: u64,
    /// First address after its segments, uninitialised data included.
    pub end: u64,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// Loads the kernel.
///
/// # Errors
/// See [`KernelError`].
pub fn load(memory: &GuestMemoryMmap, file: &File) -> Result<Kernel, KernelError> {
    let segments = segments(file)?;
    let mut kernel = Kernel {
        entry: u64::from(pvh_entry(file, &segments)?),
        end: 0,
    };
    for segment in segments.iter().filter(|segment| segment.kind == PT_LOAD) {
        if segment.file_size > segment.memory_size || segment.address < layout::HIMEM {
            return Err(KernelError::Format(
                "a segment has an impossible size or address",
            ));
        }
        let end = segment
            .address
            .checked_add(segment.memory_size)
            .ok_or(KernelError::Format("a segment wraps"))?;
        kernel.end = kernel.end.max(end);
        if segment.file_size > 0 {
            // The rest, up to the memory size, is zero as all fresh RAM.
            memory::load(
                memory,
                file,
                segment.offset,
                segment.address,
                segment.file_size,
            )?;
        }
    }
    if kernel.end == 0 || kernel.end > layout::LOW_RAM_END {
        return Err(KernelError::Format("no loadable segment below the hole"));
    }
    Ok(kernel)
}

/// Puts the initramfs at the end of low RAM, away from the kernel; returns (address, length).
///
/// # Errors
/// See [`KernelError`].
pub fn load_initramfs(
    memory: &GuestMemoryMmap,
    file: &File,
    ram_bytes: u64,
    kernel: &Kernel,
) -> Result<(u64, u64), KernelError> {
    let length = file.metadata()?.len();
    let ram = ram_bytes.min(layout::LOW_RAM_END);
    let address = ram
        .checked_sub(length.next_multiple_of(PAGE))
        .filter(|address| *address >= kernel.end.next_multiple_of(PAGE))
        .ok_or(KernelError::NoRoom {
            initramfs: length,
            ram,
        })?;
    memory::load(memory, file, 0, address, length)?;
    Ok((address, length))
}

fn segments(file: &File) -> Result<Vec<Segment>, KernelError> {
    let mut header = [0u8; HEADER_SIZE];
    file.read_exact_at(&mut header, 0)
        .map_err(|_| KernelError::Format("shorter than an ELF header"))?;
    // 64 bit, little endian, x86-64.
    if header[..6] != *b"\x7fELF\x02\x01" || u16_at(&header, 18) != 62 {
        return Err(KernelError::Format("not an ELF file for x86-64"));
    }
    let offset = u64_at(&header, 32);
    let count = usize::from(u16_at(&header, 56));
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER_SIZE || count > MAX_SEGMENTS {
        return Err(KernelError::Format("unusual program headers"));
    }
    let mut table = vec![0u8; count * PROGRAM_HEADER_SIZE];
    file.read_exact_at(&mut table, offset)
        .map_err(|_| KernelError::Format("program headers outside the file"))?;
    Ok(table
        .chunks_exact(PROGRAM_HEADER_SIZE)
        .map(|entry| Segment {
            kind: u32_at(entry, 0),
            offset: u64_at(entry, 8),
            address: u64_at(entry, 24),
            file_size: u64_at(entry, 32),
            memory_size: u64_at(entry, 40),
        })
        .collect())
}

fn pvh_entry(file: &File, segments: &[Segment]) -> Result<u32, KernelError> {
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        let length = usize::try_from(segment.file_size.min(MAX_NOTES))
            .map_err(|_| KernelError::Format("notes too long"))?;
        let mut notes = vec![0u8; length];
        file.read_exact_at(&mut notes, segment.offset)
            .map_err(|_| KernelError::Format("notes outside the file"))?;
        if let Some(entry) = find_pvh_note(&notes) {
            return Ok(entry);
        }
    }
    Err(KernelError::Format("no PVH entry note (CONFIG_PVH)"))
}

/// Finds the entry in a sequence of ELF notes; each step consumes at least the 12-byte header.
fn find_pvh_note(mut notes: &[u8]) -> Option<u32> {
    while notes.len() >= 12 {
        let name_size = usize::try_from(u32_at(notes, 0)).ok()?;
        let desc_size = usize::try_from(u32_at(notes, 4)).ok()?;
        let kind = u32_at(notes, 8);
        let desc_start = 12usize.checked_add(name_size.checked_next_multiple_of(4)?)?;
        let desc_end = desc_start.checked_add(desc_size)?;
        let name = notes.get(12..12usize.checked_add(name_size)?)?;
        let desc = notes.get(desc_start..desc_end)?;
        if name == b"Xen\0" && kind == NOTE_PVH_ENTRY && desc.len() >= 4 {
            return Some(u32_at(desc, 0));
        }
        notes = notes.get(desc_end.checked_next_multiple_of(4)?..)?;
    }
    None
}

/// Little-endian fields; zero beyond the end, which no caller reaches.
fn field<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut field = [0u8; N];
    if let Some(source) = bytes.get(offset..offset + N) {
        field.copy_from_slice(source);
    }
    field
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(field(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(field(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(field(bytes, offset))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(name.len()).unwrap().to_le_bytes());
        bytes.extend(u32::try_from(desc.len()).unwrap().to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(desc);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// One text segment at 16 MiB (file offset 4096) and one note segment.
    fn vmlinux(text: &[u8], bss: u64, notes: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 8192 + text.len()];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[18..20].copy_from_slice(&62u16.to_le_bytes());
        image[32..40].copy_from_slice(&64u64.to_le_bytes());
        image[54..56].copy_from_slice(&56u16.to_le_bytes());
        image[56..58].copy_from_slice(&2u16.to_le_bytes());
        let mut program = |index: usize, kind: u32, fields: [u64; 4]| {
            let base = 64 + index * 56;
            image[base..base + 4].copy_from_slice(&kind.to_le_bytes());
            for (at, value) in [8, 24, 32, 40].into_iter().zip(fields) {
                image[base + at..base + at + 8].copy_from_slice(&value.to_le_bytes());
            }
        };
        let size = text.len() as u64;
        program(0, PT_LOAD, [4096, 16 << 20, size, size + bss]);
        program(1, PT_NOTE, [512, 0, notes.len() as u64, notes.len() as u64]);
        image[512..512 + notes.len()].copy_from_slice(notes);
        image[4096..4096 + text.len()].copy_from_slice(text);
        image
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_pvh_kernel_is_placed_and_its_entry_found_after_other_notes() {
        let memory = memory::allocate(32 << 20).unwrap();
        let mut notes = note(b"Linux\0", 0x100, &[1; 7]);
        notes.extend(note(b"Xen\0", 18, &0x0100_0200u64.to_le_bytes()));
        let text = vec![7u8; 10_000];
        let kernel = load(&memory, &file_of(&vmlinux(&text, 5000, &notes))).unwrap();
        assert_eq!(kernel.entry, 0x0100_0200);
        assert_eq!(kernel.end, (16 << 20) + 15_000);
        let mut loaded = vec![0u8; 10_100];
        memory
            .read_slice(&mut loaded, GuestAddress(16 << 20))
            .unwrap();
        assert_eq!(&loaded[..10_000], &text[..]);
        assert_eq!(&loaded[10_000..], &[0u8; 100]);
    }

    #[test]
    fn what_is_not_a_pvh_vmlinux_is_refused_with_its_reason() {
        let memory = memory::allocate(32 << 20).unwrap();
        let refused = |bytes: &[u8]| load(&memory, &file_of(bytes)).unwrap_err().to_string();
        assert!(refused(b"#!").contains("shorter"));
        assert!(refused(&[0; 128]).contains("not an ELF"));
        assert!(refused(&vmlinux(&[1], 0, &[])).contains("PVH entry"));
    }

    #[test]
    fn an_initramfs_goes_to_the_end_of_ram_and_never_onto_the_kernel() {
        let memory = memory::allocate(32 << 20).unwrap();
        let kernel = Kernel {
            entry: 0,
            end: 20 << 20,
        };
        let ram = 32 << 20;
        let (address, length) =
            load_initramfs(&memory, &file_of(&[9; 5000]), ram, &kernel).unwrap();
        assert_eq!((address, length), (ram - 8192, 5000));
        let big = file_of(&vec![0; 13 << 20]);
        assert!(matches!(
            load_initramfs(&memory, &big, ram, &kernel),
            Err(KernelError::NoRoom { .. })
        ));
    }

    proptest! {
        #[test]
        fn notes_of_any_bytes_end_without_a_panic(notes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = find_pvh_note(&notes);
        }

        #[test]
        fn a_damaged_header_never_panics(at in 0usize..176, byte: u8) {
            let notes = note(b"Xen\0", 18, &[0, 0, 0, 1]);
            let mut image = vmlinux(&[1; 100], 0, &notes);
            image[at] = byte;
            let memory = memory::allocate(32 << 20).unwrap();
            let _ = load(&memory, &file_of(&image));
        }
    }
}
