//! A guest without a system that writes all of its memory: it fills it, is captured, and in each clone looks whether it is as it was filled, and
//! then fills it with numbers of that clone's own, again and again, and looks each time whether they are still there. It powers off if they
//! always were, and resets if not.

use std::arch::global_asm;

use brig_agent_protocol::{BOOT_MARK_PORT, BootMark, Resumption};
use brig_hypervisor::arch::x86_64::layout::{ECAM, RESET_PORT, SLEEP_CONTROL_PORT};

/// RAM that it takes for granted, in bytes.
pub const MEMORY: u64 = 64 << 20;
/// Where it is itself: one page, with its stack.
const BASE: u32 = 16 << 20;
const PAGE: u32 = 4096;
/// Where the first RAM ends below the hole of old video memory, which is RAM here too but belongs to nobody.
const LOW: u32 = 0x9_f000;
const HIGH: u32 = 1 << 20;
/// What a clone must find.
const FILLED: u32 = 0x5a5a_5a5a;
/// How often a clone fills its memory.
const ROUNDS: u32 = 2;
/// `SLP_EN` with the type of S5, see `acpi::is_power_off`.
const POWER_OFF: u8 = 0b0011_0100;
/// Of the seed in the host bridge's configuration space: behind magic, flags and time.
const SEED: u64 = ECAM.start + Resumption::REGISTER as u64 + 16;

global_asm!(
    ".pushsection .rodata.brig_scribbler, \"a\", @progbits",
    ".code32",
    ".globl brig_scribbler_begin",
    "brig_scribbler_begin:",
    "cld",
    "mov esp, {base} + {page}",
    "mov eax, {filled}",
    "call 10f",
    "mov al, {still}",
    "out {mark}, al",
    // Here each clone begins.
    "mov eax, {filled}",
    "call 20f",
    "mov ebx, dword ptr [{seed}]",
    "mov ebp, {rounds}",
    "5:",
    "mov eax, ebx",
    "call 10f",
    "mov eax, ebx",
    "call 20f",
    "add ebx, 0x01234567",
    "dec ebp",
    "jnz 5b",
    "mov dx, {sleep}",
    "mov al, {off}",
    "out dx, al",
    "6: hlt",
    "jmp 6b",
    // Fills all with eax.
    "10:",
    "mov edi, {page}",
    "mov ecx, ({low} - {page}) / 4",
    "rep stosd",
    "mov edi, {high}",
    "mov ecx, ({base} - {high}) / 4",
    "rep stosd",
    "mov edi, {base} + {page}",
    "mov ecx, ({memory} - {base} - {page}) / 4",
    "rep stosd",
    "ret",
    // Resets unless all is eax.
    "20:",
    "mov edi, {page}",
    "mov ecx, ({low} - {page}) / 4",
    "repe scasd",
    "jne 30f",
    "mov edi, {high}",
    "mov ecx, ({base} - {high}) / 4",
    "repe scasd",
    "jne 30f",
    "mov edi, {base} + {page}",
    "mov ecx, ({memory} - {base} - {page}) / 4",
    "repe scasd",
    "jne 30f",
    "ret",
    "30:",
    "mov dx, {reset}",
    "mov al, 6",
    "out dx, al",
    "jmp 30b",
    ".globl brig_scribbler_end",
    "brig_scribbler_end:",
    ".code64",
    ".popsection",
    base = const BASE,
    page = const PAGE,
    filled = const FILLED,
    still = const BootMark::Still as u8,
    mark = const BOOT_MARK_PORT,
    seed = const SEED,
    rounds = const ROUNDS,
    sleep = const SLEEP_CONTROL_PORT,
    off = const POWER_OFF,
    low = const LOW,
    high = const HIGH,
    memory = const MEMORY,
    reset = const RESET_PORT,
);

unsafe extern "C" {
    static brig_scribbler_begin: u8;
    static brig_scribbler_end: u8;
}

/// The guest as a vmlinux that brig-vmm boots.
#[must_use]
pub fn vmlinux() -> Vec<u8> {
    // SAFETY: both symbols are of the block above, the second at the end of what the first begins.
    let code = unsafe {
        let begin = &raw const brig_scribbler_begin;
        let length = (&raw const brig_scribbler_end).offset_from_unsigned(begin);
        std::slice::from_raw_parts(begin, length)
    };
    pvh(code)
}

/// An ELF file with one segment at [`BASE`], and the note that says that the entry is there.
fn pvh(code: &[u8]) -> Vec<u8> {
    const AT: u64 = 4096;
    const NOTES: u64 = 512;
    let mut note = Vec::new();
    // Lengths of name and address, XEN_ELFNOTE_PHYS32_ENTRY.
    for word in [4_u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(u64::from(BASE).to_le_bytes());
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    // ET_EXEC, EM_X86_64, version; entry, program headers, no sections, no flags.
    for half in [2_u16, 62, 1, 0] {
        file.extend(half.to_le_bytes());
    }
    for word in [u64::from(BASE), 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    // Sizes and numbers of headers.
    for half in [64_u16, 56, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let (size, notes) = (code.len() as u64, note.len() as u64);
    // PT_LOAD, readable and executable; PT_NOTE.
    for (kind, flags, offset, address, length) in [
        (1_u32, 5_u32, AT, u64::from(BASE), size),
        (4, 4, NOTES, 0, notes),
    ] {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        for word in [offset, address, address, length, length, 4] {
            file.extend(word.to_le_bytes());
        }
    }
    file.resize(512, 0);
    file.extend(note);
    file.resize(4096, 0);
    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_fits_into_its_page_below_its_stack() {
        assert!(vmlinux().len() - 4096 < 512);
    }
}
