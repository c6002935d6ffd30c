//! The guest-physical address map and the I/O ports. Constants only; nothing is trusted here.
//!
//! ```text
//! 0          boot information (start_info, memory map, command line)
//! 0xa_0000   reserved; ACPI tables at 0xe_0000
//! 0x10_0000  RAM up to 3 GiB; the initramfs at its end
//! 3 GiB      32-bit MMIO window: every BAR of a virtio function
//! 0xe000_0000  ECAM
//! 4 GiB      the rest of RAM, then the region of memory that may come later, then the 64-bit MMIO window,
//!            and files that are memory in the last sixteenth of the guest-physical space
//! ```

use std::ops::Range;

/// Bytes of a small page.
pub const PAGE: u64 = 4096;
/// Guest RAM is a multiple of this, and its host mapping is congruent to it.
pub const HUGE_PAGE: u64 = 2 << 20;

/// `hvm_start_info`, followed by its module list.
pub const START_INFO: u64 = 0x6000;
/// The PVH module list.
pub const MODULE_LIST: u64 = 0x6800;
/// The PVH memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// x86 Linux takes 2048 bytes with the final zero (`COMMAND_LINE_SIZE`).
pub const CMDLINE_SIZE: usize = 2048;

/// What a PC has no RAM in; holds the ACPI tables.
pub const RESERVED_LOW: Range<u64> = 0xa_0000..0x10_0000;
/// The RSDP; the other ACPI tables follow.
pub const RSDP: u64 = 0xe_0000;
/// Where RAM for the kernel starts.
pub const HIMEM: u64 = 0x10_0000;

/// The end of RAM below 4 GiB.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// BARs of virtio functions, and 32-bit BARs of passed-through ones.
pub const MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// The highest bus number: as many as bus 0 has slots, each of which may have a port.
pub const LAST_BUS: u8 = 31;
/// Enhanced configuration space, 1 MiB for each bus.
pub const ECAM: Range<u64> = 0xe000_0000..0xe200_0000;
/// The local APIC's page and the range for MSI writes.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// A page KVM needs on Intel CPUs without unrestricted guest mode.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages KVM needs on Intel CPUs.
pub const TSS: usize = 0xfffb_d000;
/// The start of RAM above the hole.
pub const HIGH_RAM: u64 = 1 << 32;

/// First GSI for MSI routes: below it are the reserved pins of the (absent) IOAPIC.
pub const FIRST_MSI_GSI: u32 = 24;
/// GSIs end here (KVM_MAX_IRQ_ROUTES).
pub const GSI_END: u32 = 4096;

/// Write-only debug console in the place of a 16550.
pub const CONSOLE_PORTS: Range<u16> = 0x3f8..0x400;
/// ACPI sleep control register (ACPI 6.5 §4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register; any write resets.
pub const RESET_PORT: u16 = 0x602;

/// Bytes of the smallest piece in which Linux adds and takes memory.
pub const MEMORY_SECTION: u64 = 128 << 20;
/// Bytes of the largest.
const LARGEST_SECTION: u64 = 2 << 30;
/// From where RAM ends here or later, Linux takes the largest piece of which the end is a multiple
/// (`probe_memory_block_size`).
const LARGE_SECTIONS: u64 = 64 << 30;

/// Bytes of the pieces in which a guest that has booted with `ram_bytes` adds and takes memory, or a multiple of that. A
/// part of one is of no use to it.
#[must_use]
pub fn memory_section(ram_bytes: u64) -> u64 {
    if ram_end(ram_bytes) < LARGE_SECTIONS {
        MEMORY_SECTION
    } else {
        LARGEST_SECTION
    }
}

/// Where RAM ends.
fn ram_end(ram_bytes: u64) -> u64 {
    match ram_bytes.saturating_sub(LOW_RAM_END) {
        0 => ram_bytes,
        high => HIGH_RAM + high,
    }
}

/// The end of the guest-physical space. `phys_bits` is the guest's MAXPHYADDR.
fn space_end(phys_bits: u8) -> u64 {
    1 << phys_bits.clamp(36, 46)
}

/// Where a VM of `ram_bytes` that may have `max_bytes` gets the rest: after RAM, at a multiple of the largest piece of
/// memory that Linux adds, and in the lower half of the guest-physical space, which leaves the upper to the 64-bit
/// window. Empty if it may have no more.
#[must_use]
pub fn growth(ram_bytes: u64, max_bytes: u64, phys_bits: u8) -> Range<u64> {
    let section = memory_section(ram_bytes);
    let high = ram_bytes.saturating_sub(LOW_RAM_END);
    let start = (HIGH_RAM + high).next_multiple_of(LARGEST_SECTION);
    let more = max_bytes.saturating_sub(ram_bytes);
    let room = (space_end(phys_bits) / 2).saturating_sub(start);
    let length = more.min(room).div_ceil(section) * section;
    start..start + length.min(room - room % section)
}

/// Where the last sixteenth of the guest-physical space begins.
fn last_part(phys_bits: u8) -> u64 {
    space_end(phys_bits) / 16 * 15
}

/// Where files are that are memory of the guest: behind the 64-bit MMIO `window`, and never in it, as Linux gives BARs of
/// functions that come later new places there.
#[must_use]
pub fn files(window: &Range<u64>, phys_bits: u8) -> Range<u64> {
    let start = window.end.max(last_part(phys_bits));
    start..space_end(phys_bits).max(start)
}

/// The 64-bit MMIO window: from the first GiB after RAM, and after the region for more, to the last sixteenth of the
/// guest-physical space.
#[must_use]
pub fn mmio64(ram_bytes: u64, growth: &Range<u64>, phys_bits: u8) -> Range<u64> {
    const GIB: u64 = 1 << 30;
    let high = ram_bytes.saturating_sub(LOW_RAM_END);
    let after = if growth.is_empty() {
        HIGH_RAM + high
    } else {
        growth.end
    };
    let start = after.next_multiple_of(GIB);
    start..last_part(phys_bits).max(start)
}

/// RAM as (address, length) pairs for `ram_bytes` bytes.
#[must_use]
pub fn ram(ram_bytes: u64) -> Vec<(u64, u64)> {
    let low = ram_bytes.min(LOW_RAM_END);
    let high = ram_bytes - low;
    if high == 0 {
        vec![(0, low)]
    } else {
        vec![(0, low), (HIGH_RAM, high)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bus_has_its_mebibyte_of_configuration_space() {
        assert_eq!(ECAM.end - ECAM.start, (u64::from(LAST_BUS) + 1) << 20);
        const { assert!(MMIO32.end <= ECAM.start && ECAM.end <= LOCAL_APIC) };
    }

    #[test]
    fn ram_never_overlaps_the_hole_or_the_64_bit_window() {
        for ram_bytes in [128 << 20, LOW_RAM_END, LOW_RAM_END + HUGE_PAGE, 64 << 30] {
            let total: u64 = ram(ram_bytes).iter().map(|region| region.1).sum();
            assert_eq!(total, ram_bytes);
            for (start, length) in ram(ram_bytes) {
                assert!(start + length <= LOW_RAM_END || start >= HIGH_RAM);
                assert!(start + length <= mmio64(ram_bytes, &(0..0), 40).start);
            }
        }
    }

    #[test]
    fn the_region_for_more_lies_between_ram_and_a_window_that_keeps_half_of_the_space() {
        for ram_bytes in [128 << 20, LOW_RAM_END, 64 << 30] {
            for (max_bytes, bits) in [
                (1 << 30, 40),
                (200 << 30, 40),
                (u64::MAX, 40),
                (1 << 44, 46),
                (8 << 30, 36),
            ] {
                let region = growth(ram_bytes, max_bytes, bits);
                let window = mmio64(ram_bytes, &region, bits);
                let ram_end = ram(ram_bytes)
                    .last()
                    .map(|(start, length)| start + length)
                    .unwrap();
                assert!(
                    region.start.is_multiple_of(MEMORY_SECTION)
                        && region.end.is_multiple_of(MEMORY_SECTION)
                );
                assert!(region.start >= ram_end);
                assert!(region.is_empty() || region.end <= window.start);
                assert!(window.is_empty() || window.end == (1 << bits) / 16 * 15);
                let files = files(&window, bits);
                assert!(files.start >= window.end && files.start >= ram_end);
                assert!(files.is_empty() || files.end == 1 << bits);
                let more = region.end.saturating_sub(region.start);
                assert!(
                    more <= 1 << (bits - 1) && window.start <= (1 << (bits - 1)).max(region.start)
                );
                if ram_bytes < 1 << 30 && max_bytes <= 200 << 30 {
                    assert!(more >= max_bytes.saturating_sub(ram_bytes).min(1 << (bits - 2)));
                }
            }
            assert!(growth(ram_bytes, ram_bytes, 40).is_empty());
        }
    }

    #[test]
    fn what_is_added_is_of_whole_sections_of_the_guest() {
        // `IS_ALIGNED(boot_mem_end, bz)`, from the largest on.
        let linux = |ram_bytes: u64| {
            let end = ram(ram_bytes).last().map(|(start, size)| start + size);
            let end = end.unwrap();
            let sizes = (27..=31).rev().map(|bits| 1u64 << bits);
            let mut fitting = sizes.filter(|size| end.is_multiple_of(*size));
            match end < 64 << 30 {
                true => MEMORY_SECTION,
                false => fitting.next().unwrap_or(MEMORY_SECTION),
            }
        };
        const GIB: u64 = 1 << 30;
        for ram_bytes in [
            GIB,
            62 * GIB,
            63 * GIB,
            63 * GIB + HUGE_PAGE,
            64 * GIB,
            65 * GIB,
        ] {
            for more in [HUGE_PAGE, 512 << 20, GIB, 3 * GIB] {
                let region = growth(ram_bytes, ram_bytes + more, 46);
                assert!(region.end - region.start >= more);
                let section = linux(ram_bytes);
                assert!(memory_section(ram_bytes).is_multiple_of(section));
                for end in [region.start, region.end] {
                    assert!(end.is_multiple_of(section), "{ram_bytes:#x} {region:x?}");
                }
            }
        }
        assert_eq!(memory_section(62 * GIB), MEMORY_SECTION);
    }

    #[test]
    fn the_64_bit_window_is_empty_rather_than_inverted_when_ram_fills_the_address_space() {
        let window = mmio64(1 << 37, &growth(1 << 37, u64::MAX, 36), 36);
        assert!(window.is_empty());
    }
}
