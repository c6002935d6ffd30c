//! Loads a vmlinux (ELF64) with a PVH entry note, and the initramfs.
//!
//! The files come from the node's installation and are trusted; what the loader makes of them is
//! checked against the address map.

mod filler;

use std::fs::File;
use std::io;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{Error as LoaderError, KernelLoader};
use vm_memory::{Address, GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::layout::{self, PAGE};
use crate::memory::{self, MemoryError};

/// The kernel or the initramfs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file is not what it should be.
    #[error("the guest kernel is not a PVH vmlinux: {0}")]
    Format(&'static str),
    /// It cannot be loaded.
    #[error("the guest kernel is not a PVH vmlinux that fits into memory: {0}")]
    Load(#[from] LoaderError),
    /// Reading failed.
    #[error("reading the initramfs: {0}")]
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

/// Loads the kernel.
///
/// # Errors
/// See [`KernelError`].
pub fn load(memory: &GuestMemoryMmap, mut file: &File) -> Result<Kernel, KernelError> {
    filler::spare_low_memory(memory)?;
    let himem = Some(GuestAddress(layout::HIMEM));
    let loaded = Elf::load(memory, None, &mut file, himem)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(KernelError::Format("it has no PVH entry note (CONFIG_PVH)"));
    };
    if loaded.kernel_end > layout::LOW_RAM_END {
        return Err(KernelError::Format("it reaches beyond low memory"));
    }
    filler::give_back(memory, loaded.kernel_load.raw_value()..loaded.kernel_end)?;
    Ok(Kernel {
        entry: entry.raw_value(),
        end: loaded.kernel_end,
    })
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const PT_LOAD: u32 = 1;
    const PT_NOTE: u32 = 4;

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
        image[24..32].copy_from_slice(&(16u64 << 20).to_le_bytes());
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
        assert!(refused(b"#!").contains("elf header"));
        assert!(refused(&[0; 128]).contains("magic number"));
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
        fn a_damaged_header_never_panics(at in 0usize..176, byte: u8) {
            let notes = note(b"Xen\0", 18, &[0, 0, 0, 1]);
            let mut image = vmlinux(&[1; 100], 0, &notes);
            image[at] = byte;
            let memory = memory::allocate(32 << 20).unwrap();
            let _ = load(&memory, &file_of(&image));
        }
    }
}
