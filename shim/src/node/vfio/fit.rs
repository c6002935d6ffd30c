//! Whether a device fits a VM: its BARs into the windows of the guest's addresses, its interrupt vectors to the guest's
//! CPUs. By sysfs, before anybody has opened it. Blocking.

use std::fs;
use std::path::Path;

use brig_hypervisor::arch::x86_64::layout;
use brig_hypervisor::builder::VECTORS_PER_CPU;
use brig_hypervisor::pci::window::Window;

use super::refusal::Refusal;

/// `linux/ioport.h`.
const IORESOURCE_MEM: u64 = 0x200;
const IORESOURCE_MEM_64: u64 = 0x0010_0000;
/// Registers of the configuration space (PCI 3.0 §6).
const STATUS: usize = 0x06;
const CAPABILITIES: usize = 0x34;
const HAS_CAPABILITIES: u8 = 1 << 4;
const ID_MSIX: u8 = 0x11;
/// The windows have functions of the VM's own besides.
const OWN: u64 = 1 << 20;

/// What a VM has for a device.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Bytes at its start.
    pub memory: u64,
    /// Bytes that it may have later.
    pub max_memory: u64,
    /// Its CPUs.
    pub vcpus: u8,
    /// Bits of a physical address of the node's CPU.
    pub phys_bits: u8,
}

impl Room {
    /// Bits of a physical address, as the kernel writes them in /proc/cpuinfo; what the least CPU has if it does not.
    #[must_use]
    pub fn phys_bits_of(cpuinfo: &str) -> u8 {
        let line = cpuinfo
            .lines()
            .find(|line| line.starts_with("address sizes"));
        let bits = line
            .and_then(|line| line.split(':').nth(1))
            .and_then(|text| text.split_ascii_whitespace().next()?.parse().ok());
        bits.unwrap_or(36)
    }
}

/// Whether a device fits, by its directory in sysfs.
pub(super) fn check(device: &Path, room: &Room) -> Result<(), Refusal> {
    let growth = layout::growth(room.memory, room.max_memory, room.phys_bits);
    let (mut low, mut high) = (
        Window::new(layout::MMIO32),
        Window::new(layout::mmio64(room.memory, &growth, room.phys_bits)),
    );
    // If that fails, so will every other.
    let _ = low.allocate(OWN);
    let resources = fs::read_to_string(device.join("resource")).unwrap_or_default();
    for (size, wide) in bars(&resources) {
        let window = if wide { &mut high } else { &mut low };
        window.allocate(size).map_err(|error| {
            let fix = if wide {
                "give the handler less max_memory, or the device to a node whose CPU has more address bits"
            } else {
                "no VM can have it"
            };
            Refusal::new(error.to_string(), fix)
        })?;
    }
    let space = fs::read(device.join("config")).unwrap_or_default();
    let (vectors, available) = (vectors(&space), u32::from(room.vcpus) * VECTORS_PER_CPU);
    if vectors > available {
        return Err(Refusal::new(
            format!(
                "it has {vectors} interrupt vectors, but {} vCPUs have {available}",
                room.vcpus
            ),
            "give the handler more vcpus",
        ));
    }
    Ok(())
}

/// Sizes of the memory BARs, and whether each may be above 4 GiB, of the file `resource`.
fn bars(resources: &str) -> Vec<(u64, bool)> {
    let lines = resources.lines().take(6);
    let bars = lines.filter_map(|line| {
        let mut numbers = line.split_ascii_whitespace().map(|text| {
            let digits = text.strip_prefix("0x")?;
            u64::from_str_radix(digits, 16).ok()
        });
        let (start, end, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let size = end.checked_sub(start)?.checked_add(1)?;
        (flags & IORESOURCE_MEM != 0).then_some((size, flags & IORESOURCE_MEM_64 != 0))
    });
    bars.collect()
}

/// Entries of the MSI-X table; none without that.
fn vectors(space: &[u8]) -> u32 {
    let byte = |at: usize| space.get(at).copied().unwrap_or(0);
    if byte(STATUS) & HAS_CAPABILITIES == 0 {
        return 0;
    }
    let mut at = usize::from(byte(CAPABILITIES) & 0xfc);
    // No more than fit, whatever the links say.
    for _ in 0..64 {
        if at == 0 {
            break;
        }
        if byte(at) == ID_MSIX {
            return u32::from(u16::from_le_bytes([byte(at + 2), byte(at + 3)]) & 0x7ff) + 1;
        }
        at = usize::from(byte(at + 1) & 0xfc);
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn room(phys_bits: u8) -> Room {
        Room {
            memory: GIB,
            max_memory: GIB,
            vcpus: 1,
            phys_bits,
        }
    }

    /// A device with these BARs, of memory at low addresses or high ones, and so many vectors.
    fn device(bars: &[(u64, bool)], vectors: u16) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let line = |(size, wide): &(u64, bool)| {
            let flags = IORESOURCE_MEM | if *wide { IORESOURCE_MEM_64 } else { 0 };
            format!("{:#018x} {:#018x} {flags:#018x}\n", 0, size - 1)
        };
        let mut text: String = bars.iter().map(line).collect();
        text.push_str("0x000000000000c000 0x000000000000c03f 0x0000000000040101\n");
        fs::write(dir.path().join("resource"), text).unwrap();
        let mut space = [0u8; 64 + 12];
        space[STATUS] = HAS_CAPABILITIES;
        space[CAPABILITIES] = 0x40;
        if let Some(last) = vectors.checked_sub(1) {
            space[0x40] = ID_MSIX;
            space[0x42..0x44].copy_from_slice(&last.to_le_bytes());
        }
        fs::write(dir.path().join("config"), space).unwrap();
        dir
    }

    #[test]
    fn what_fits_the_windows_and_the_cpus_is_told_from_what_does_not() {
        let fits = |bars: &[(u64, bool)], vectors, bits| {
            check(device(bars, vectors).path(), &room(bits)).map_err(|refusal| refusal.to_string())
        };
        fits(
            &[(16 << 20, false), (64 * GIB, true), (32 << 20, true)],
            9,
            40,
        )
        .unwrap();
        fits(&[(256 << 20, false)], 0, 40).unwrap();
        let low = fits(&[(512 << 20, false)], 0, 40).unwrap_err();
        assert!(
            low.starts_with("a BAR of 0x20000000 bytes does not fit"),
            "{low}"
        );
        let high = fits(&[(64 * GIB, true)], 0, 36).unwrap_err();
        assert!(
            high.contains("0x1000000000 bytes") && high.contains("max_memory"),
            "{high}"
        );
        fits(&[], 180, 40).unwrap();
        let many = fits(&[], 181, 40).unwrap_err();
        assert!(
            many.contains("it has 181 interrupt vectors, but 1 vCPUs have 180"),
            "{many}"
        );
    }

    #[test]
    fn a_device_of_which_nothing_can_be_read_is_not_refused_for_it() {
        let dir = tempfile::tempdir().unwrap();
        check(dir.path(), &room(40)).unwrap();
        fs::write(dir.path().join("resource"), "0x\nno\n\n0x2 0x1 0x200\n").unwrap();
        // A list that leads back to itself ends.
        let mut space = [0u8; 64];
        (space[STATUS], space[CAPABILITIES]) = (HAS_CAPABILITIES, 0x20);
        space[0x21] = 0x20;
        fs::write(dir.path().join("config"), space).unwrap();
        check(dir.path(), &room(40)).unwrap();
    }

    #[test]
    fn address_bits_are_read_as_the_kernel_writes_them() {
        let text = "processor\t: 0\naddress sizes\t: 46 bits physical, 48 bits virtual\n";
        assert_eq!(Room::phys_bits_of(text), 46);
        assert_eq!(Room::phys_bits_of("flags: none"), 36);
    }
}
