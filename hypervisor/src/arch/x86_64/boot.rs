//! Boot information for a PVH kernel: command line, memory map, modules, ACPI tables.
//!
//! Written into guest RAM before any CPU runs; built from the shim's configuration only.

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::acpi::{self, Platform};
use super::layout;

/// "xEn3" with the top bit of E set.
const START_MAGIC: u32 = 0x336e_c578;
const MEMMAP_RAM: u32 = 1;
const MEMMAP_RESERVED: u32 = 2;

/// What the kernel's built-in command line starts with.
///
/// - `earlyprintk` writes to the debug port; at log level 1 that is panics only.
/// - `reboot=t panic=-1`: a triple fault ends the VM at once.
/// - `pci=noearly` leaves out the port-I/O probes that find nothing here; `lastbus=0` the search of 31 buses that are
///   behind no port (32 exits each).
/// - `percpu_alloc=page`: memory by CPU grows in pieces of what the kernel's own takes (190 KiB). Else each piece is 2 MiB of
///   addresses, whose accounting takes 4 MiB at once, and the second piece comes with little.
/// - `audit=0`: no audit thread; what is wanted of it is `/proc/PID/loginuid` alone.
/// - `swiotlb=noforce`: devices reach all memory, so no 64 MiB of bounce buffers above 4 GiB.
///
/// The log level comes before it: `earlyprintk` prints what was logged so far at the level it finds.
const BASE: &str = "earlyprintk=serial,0x3f8,115200,keep reboot=t panic=-1 tsc=reliable \
     no_timer_check rcupdate.rcu_expedited=1 random.trust_cpu=on pci=noearly,lastbus=0 swiotlb=noforce dummy.numdummies=0 \
     audit=0 percpu_alloc=page";

/// Boot information did not fit or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {0} bytes, at most {max} are possible", max = layout::CMDLINE_SIZE - 1)]
    CommandLine(usize),
    /// A zero byte or a control character would end or split the command line.
    #[error("the kernel command line contains a control character")]
    ControlCharacter,
    /// Guest RAM is too small.
    #[error("guest memory is too small for boot information: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What the kernel is told.
pub struct BootInfo<'a> {
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// The operator's addition to the command line.
    pub cmdline: &'a str,
    /// Early messages, not only a panic's.
    pub debug_console: bool,
    /// (guest address, length) of the initramfs.
    pub initramfs: Option<(u64, u64)>,
    /// For the ACPI tables.
    pub platform: Platform,
}

/// An addition to the command line for a guest that is started with `vcpus` CPUs of `most`: the others stay offline
/// until they are asked for.
#[must_use]
pub fn with_cpus(extra: &str, vcpus: u8, most: u8) -> String {
    if most <= vcpus {
        return extra.to_owned();
    }
    let space = if extra.is_empty() { "" } else { " " };
    format!("{extra}{space}maxcpus={vcpus}")
}

/// The whole kernel command line.
///
/// # Errors
/// See [`BootError`].
pub fn command_line(extra: &str, debug_console: bool) -> Result<String, BootError> {
    let level = if debug_console {
        "loglevel=7"
    } else {
        "quiet loglevel=1"
    };
    let mut line = format!("{level} {BASE}");
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    if line.chars().any(char::is_control) {
        return Err(BootError::ControlCharacter);
    }
    if line.len() >= layout::CMDLINE_SIZE {
        return Err(BootError::CommandLine(line.len()));
    }
    Ok(line)
}

/// Writes boot information and returns the address of `hvm_start_info`.
///
/// # Errors
/// See [`BootError`].
pub fn write(memory: &GuestMemoryMmap, info: &BootInfo<'_>) -> Result<u64, BootError> {
    let mut line = command_line(info.cmdline, info.debug_console)?.into_bytes();
    line.push(0);
    memory.write_slice(&line, GuestAddress(layout::CMDLINE))?;
    memory.write_slice(&acpi::tables(&info.platform), GuestAddress(layout::RSDP))?;

    let map = memory_map(info.ram_bytes);
    let mut address = layout::MEMORY_MAP;
    for entry in &map {
        memory.write_slice(&memmap_bytes(entry), GuestAddress(address))?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
    }
    if let Some((paddr, size)) = info.initramfs {
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..hvm_modlist_entry::default()
        };
        let fields = [
            module.paddr,
            module.size,
            module.cmdline_paddr,
            module.reserved,
        ];
        let bytes: Vec<u8> = fields
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect();
        memory.write_slice(&bytes, GuestAddress(layout::MODULE_LIST))?;
    }
    let start = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: u32::from(info.initramfs.is_some()),
        modlist_paddr: layout::MODULE_LIST,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::RSDP,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        reserved: 0,
    };
    memory.write_slice(&start_bytes(&start), GuestAddress(layout::START_INFO))?;
    Ok(layout::START_INFO)
}

/// RAM and the ranges nothing may be placed in.
fn memory_map(ram_bytes: u64) -> Vec<hvm_memmap_table_entry> {
    let entry = |start: u64, end: u64, type_| hvm_memmap_table_entry {
        addr: start,
        size: end - start,
        type_,
        reserved: 0,
    };
    let mut map = vec![
        entry(0, layout::RESERVED_LOW.start, MEMMAP_RAM),
        entry(
            layout::RESERVED_LOW.start,
            layout::RESERVED_LOW.end,
            MEMMAP_RESERVED,
        ),
    ];
    for (start, length) in layout::ram(ram_bytes) {
        map.push(entry(start.max(layout::HIMEM), start + length, MEMMAP_RAM));
    }
    map.push(entry(layout::ECAM.start, layout::ECAM.end, MEMMAP_RESERVED));
    map.sort_by_key(|entry| entry.addr);
    map
}

fn memmap_bytes(entry: &hvm_memmap_table_entry) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    bytes.extend(entry.addr.to_le_bytes());
    bytes.extend(entry.size.to_le_bytes());
    bytes.extend(entry.type_.to_le_bytes());
    bytes.extend(entry.reserved.to_le_bytes());
    bytes
}

fn start_bytes(start: &hvm_start_info) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(56);
    for word in [start.magic, start.version, start.flags, start.nr_modules] {
        bytes.extend(word.to_le_bytes());
    }
    for address in [
        start.modlist_paddr,
        start.cmdline_paddr,
        start.rsdp_paddr,
        start.memmap_paddr,
    ] {
        bytes.extend(address.to_le_bytes());
    }
    bytes.extend(start.memmap_entries.to_le_bytes());
    bytes.extend(start.reserved.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_is_sorted_covers_all_ram_and_never_overlaps() {
        for ram_bytes in [64 << 20, layout::LOW_RAM_END + (1 << 30)] {
            let map = memory_map(ram_bytes);
            for pair in map.windows(2) {
                assert!(pair[0].addr + pair[0].size <= pair[1].addr);
            }
            let ram: u64 = map
                .iter()
                .filter(|entry| entry.type_ == MEMMAP_RAM)
                .map(|entry| entry.size)
                .sum();
            let reserved = layout::RESERVED_LOW.end - layout::RESERVED_LOW.start;
            assert_eq!(ram, ram_bytes - reserved);
        }
    }

    #[test]
    fn a_command_line_that_does_not_fit_or_has_control_characters_is_refused() {
        assert!(command_line("", false).unwrap().contains("loglevel=1"));
        assert!(command_line("", true).unwrap().contains("loglevel=7"));
        assert!(command_line("a=b", true).unwrap().ends_with(" a=b"));
        assert!(matches!(
            command_line(&"x".repeat(2048), false),
            Err(BootError::CommandLine(_))
        ));
        assert!(matches!(
            command_line("a\0b", false),
            Err(BootError::ControlCharacter)
        ));
    }

    #[test]
    fn cpus_for_later_are_kept_offline() {
        assert_eq!(with_cpus("", 2, 2), "");
        assert_eq!(with_cpus("a=b", 2, 0), "a=b");
        assert_eq!(with_cpus("", 1, 4), "maxcpus=1");
        assert_eq!(with_cpus("a=b", 2, 4), "a=b maxcpus=2");
    }

    #[test]
    fn start_info_points_at_what_was_written() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let address = write(
            &memory,
            &BootInfo {
                ram_bytes: 4 << 20,
                cmdline: "x=y",
                debug_console: false,
                initramfs: Some((0x20_0000, 123)),
                platform: Platform {
                    vcpus: 1,
                    mmio64: 0..0,
                },
            },
        )
        .unwrap();
        let word = |offset| {
            memory
                .read_obj::<u32>(GuestAddress(address + offset))
                .unwrap()
        };
        let long = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!((word(0), word(4), word(12)), (START_MAGIC, 1, 1));
        let modules = long(address + 16);
        assert_eq!((long(modules), long(modules + 8)), (0x20_0000, 123));
        let mut rsdp = [0u8; 8];
        memory
            .read_slice(&mut rsdp, GuestAddress(long(address + 32)))
            .unwrap();
        assert_eq!(&rsdp, b"RSD PTR ");
        assert_eq!(word(48), 4);
    }
}
