//! Virtio functions on the PCI bus, through sysfs: configuration space, BARs, capabilities.

use std::fs::{self, File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

const VIRTIO_VENDOR: &str = "0x1af4";
/// Modern virtio functions have 0x1040 + the device id of virtio 1.3 §5.
const MODERN: u16 = 0x1040;
const COMMAND: u64 = 4;
const CAPABILITIES: u64 = 0x34;
const VENDOR_SPECIFIC: u8 = 9;

/// A part of a BAR.
#[derive(Clone, Copy, Default)]
pub struct Region {
    /// Offset in the BAR.
    pub offset: usize,
    /// Length in bytes.
    pub length: usize,
}

/// A mapped BAR.
pub struct Bar {
    start: NonNull<u8>,
    /// Its length in bytes.
    pub length: usize,
}

impl Bar {
    /// Writes with one access of the value's size. Out of range is ignored.
    pub fn write<T: Copy>(&self, offset: usize, value: T) {
        if offset + size_of::<T>() <= self.length {
            // SAFETY: inside the mapping; x86 takes any alignment, and device memory holds no Rust value.
            unsafe {
                let target = self.start.as_ptr().add(offset).cast::<T>();
                match size_of::<T>() {
                    1 | 2 | 4 | 8 if target.is_aligned() => target.write_volatile(value),
                    _ => target.write_unaligned(value),
                }
            }
        }
    }

    /// Reads with one access of the value's size; None out of range.
    pub fn read<T: Copy + Default>(&self, offset: usize) -> T {
        if offset + size_of::<T>() > self.length {
            return T::default();
        }
        // SAFETY: as in write; every bit pattern is a valid integer.
        unsafe {
            let source = self.start.as_ptr().add(offset).cast::<T>();
            if source.is_aligned() {
                source.read_volatile()
            } else {
                source.read_unaligned()
            }
        }
    }
}

/// One virtio function.
pub struct Function {
    directory: PathBuf,
    config: File,
    /// Virtio device id: 1 net, 2 block, 4 rng, 5 balloon, 19 vsock, 24 memory, 26 fs.
    pub kind: u16,
    /// Common configuration.
    pub common: Region,
    /// Notifications.
    pub notify: Region,
    /// Bytes between the notification addresses of two queues.
    pub notify_multiplier: usize,
    /// Device-specific configuration.
    pub device: Region,
    /// The BAR that holds them.
    pub bar: Bar,
    /// Its number.
    pub bar_index: u8,
}

/// All virtio functions, in the order of the bus.
pub fn find() -> Result<Vec<Function>> {
    let mut directories: Vec<PathBuf> = fs::read_dir("/sys/bus/pci/devices")?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    directories.sort();
    let mut functions = Vec::new();
    for directory in directories {
        let vendor = fs::read_to_string(directory.join("vendor")).unwrap_or_default();
        if vendor.trim() == VIRTIO_VENDOR {
            functions.push(Function::open(directory)?);
        }
    }
    ensure!(!functions.is_empty(), "no virtio functions");
    Ok(functions)
}

impl Function {
    fn open(directory: PathBuf) -> Result<Self> {
        let device = fs::read_to_string(directory.join("device"))?;
        let id = u16::from_str_radix(device.trim().trim_start_matches("0x"), 16)?;
        let config = OpenOptions::new()
            .read(true)
            .write(true)
            .open(directory.join("config"))?;
        let byte = |at: u64| -> Result<u8> {
            let mut value = [0u8];
            config.read_exact_at(&mut value, at)?;
            Ok(value[0])
        };
        let dword = |at: u64| -> Result<usize> {
            let mut value = [0u8; 4];
            config.read_exact_at(&mut value, at)?;
            Ok(usize::try_from(u32::from_le_bytes(value))?)
        };
        let mut regions = [Region::default(); 5];
        let mut bar_index = 0;
        let mut notify_multiplier = 0;
        let mut next = byte(CAPABILITIES)?;
        // A list in 192 bytes has at most 48 entries.
        for _ in 0..48 {
            if next == 0 {
                break;
            }
            let at = u64::from(next);
            if byte(at)? == VENDOR_SPECIFIC {
                let kind = usize::from(byte(at + 3)?);
                if let Some(region) = regions.get_mut(kind) {
                    region.offset = dword(at + 8)?;
                    region.length = dword(at + 12)?;
                    bar_index = byte(at + 4)?;
                    if kind == 2 {
                        notify_multiplier = dword(at + 16)?;
                    }
                }
            }
            next = byte(at + 1)?;
        }
        let _ = fs::write(directory.join("enable"), "1");
        let resource = directory.join(format!("resource{bar_index}"));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&resource)
            .with_context(|| format!("cannot open {}", resource.display()))?;
        let length = usize::try_from(file.metadata()?.len())?;
        let size = NonZeroUsize::new(length).context("an empty BAR")?;
        // SAFETY: a shared mapping of device memory, which holds no Rust value.
        let start = unsafe {
            mmap(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &file,
                0,
            )
        }
        .context("cannot map the BAR")?;
        let function = Self {
            kind: id.wrapping_sub(MODERN),
            directory,
            config,
            common: regions[1],
            notify: regions[2],
            notify_multiplier,
            device: regions[4],
            bar: Bar {
                start: start.cast(),
                length,
            },
            bar_index,
        };
        Ok(function)
    }

    /// Takes the function from its driver and lets it decode and master the bus again.
    pub fn unbind(&self) {
        if let Some(name) = self.directory.file_name() {
            let _ = fs::write(
                self.directory.join("driver/unbind"),
                name.as_encoded_bytes(),
            );
        }
        let _ = fs::write(self.directory.join("enable"), "1");
        self.enable();
    }

    /// Memory decoding, bus mastering and no INTx.
    pub fn enable(&self) {
        self.config_write(COMMAND, &0x0406u16.to_le_bytes());
    }

    /// Writes to configuration space.
    pub fn config_write(&self, offset: u64, data: &[u8]) {
        let _ = self.config.write_all_at(data, offset);
    }

    /// Reads from configuration space.
    pub fn config_read(&self, offset: u64) -> u32 {
        let mut value = [0u8; 4];
        let _ = self.config.read_exact_at(&mut value, offset);
        u32::from_le_bytes(value)
    }

    /// The configuration register of the BAR.
    pub fn bar_register(&self) -> u64 {
        0x10 + 4 * u64::from(self.bar_index)
    }

    /// Puts the BAR (64-bit) at an address.
    pub fn move_bar(&self, address: u64) {
        let bytes = address.to_le_bytes();
        self.config_write(self.bar_register(), &bytes[..4]);
        self.config_write(self.bar_register() + 4, &bytes[4..]);
    }

    /// Where the BAR is.
    pub fn bar_address(&self) -> u64 {
        let low = self.config_read(self.bar_register()) & !0xf;
        u64::from(low) | u64::from(self.config_read(self.bar_register() + 4)) << 32
    }
}
