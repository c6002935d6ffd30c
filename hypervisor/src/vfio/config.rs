//! The configuration space of a passed-through function as its guest sees it (PCI 3.0 §6).
//!
//! What places and routes is ours: BARs, memory decoding, interrupts, the capability list. The rest is the
//! device's, by way of VFIO, which virtualises more. Left out: I/O BARs and the expansion ROM, INTx, power states (a
//! device that sleeps answers no mapped BAR), and every capability that is not known to be harmless. The extended
//! space, with SR-IOV, resizable BARs and ARI, is not on this machine's bus at all.

use std::io;

use super::device::Region;
use crate::pci::BarRange;
use crate::pci::config::{BARS, COMMAND, SIZE};

const STATUS: usize = 0x06;
const STATUS_CAPABILITY_LIST: u8 = 1 << 4;
const HEADER_TYPE: usize = 0x0e;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// Command bits that the guest may see itself change.
const COMMAND_SHOWN: u16 = MEMORY | TO_DEVICE | INTX_DISABLE;
/// Command bits that reach the device: bus mastering, parity and system errors.
const TO_DEVICE: u16 = 1 << 2 | 1 << 6 | 1 << 8;
const MEMORY: u16 = 1 << 1;
const INTX_DISABLE: u16 = 1 << 10;

const BAR_IO: u32 = 1;
const BAR_KIND: u32 = 0b110;
const BAR_64: u32 = 0b100;

const ID_POWER: u8 = 0x01;
const ID_MSI: u8 = 0x05;
const ID_VENDOR: u8 = 0x09;
const ID_SUBSYSTEM: u8 = 0x0d;
const ID_EXPRESS: u8 = 0x10;
const ID_MSIX: u8 = 0x11;
const ID_FEATURES: u8 = 0x13;

/// MSI-X message control: enable and function mask, in its second byte.
const MSIX_WRITABLE: u8 = 0xc0;
/// MSI message control: 64-bit addresses.
const MSI_64: u8 = 1 << 7;

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Index; the lower one of a 64-bit pair.
    pub index: u8,
    /// Bytes, a power of two of at least 16.
    pub size: u64,
    /// It can be above 4 GiB.
    pub wide: bool,
}

/// The MSI-X capability (§6.8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixCapability {
    /// Where it is.
    pub at: u16,
    /// Entries of the table.
    pub count: u16,
    /// The BAR of the table, and where in it.
    pub table: (u8, u64),
    /// The BAR of the pending bits, and where in it.
    pub pending: (u8, u64),
}

/// The MSI capability (§6.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiCapability {
    /// Where it is.
    pub at: u16,
    /// The most messages, a power of two of at most 32.
    pub count: u16,
    wide: bool,
}

/// What a write of the guest's means for the rest of the function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// The command register's bits for the device have changed to this.
    pub command: Option<u16>,
    /// The MSI-X control has been written.
    pub msix: bool,
    /// Anything of MSI has.
    pub msi: bool,
}

/// Whether a driver may want to see a root port above this device: a display or an accelerator that is an endpoint of
/// PCI Express.
#[must_use]
pub fn wants_port(device: &[u8; SIZE]) -> bool {
    const BASE_CLASS: usize = 0x0b;
    /// Displays, accelerators.
    const CLASSES: [u8; 2] = [0x03, 0x12];
    if !CLASSES.contains(&device[BASE_CLASS]) || device[STATUS] & STATUS_CAPABILITY_LIST == 0 {
        return false;
    }
    let mut at = usize::from(device[CAPABILITIES] & 0xfc);
    for _ in 0..SIZE / 4 {
        if at < FIRST_CAPABILITY {
            break;
        }
        if device[at] == ID_EXPRESS {
            // An endpoint, or a legacy one; not one that is a part of the root complex.
            return device[at + 2] >> 4 < 2;
        }
        at = usize::from(device[at + 1] & 0xfc);
    }
    false
}

/// The filtered space.
pub struct FilteredConfig {
    /// What is ours.
    registers: [u8; SIZE],
    /// Bytes that are ours; the others are the device's.
    ours: [bool; SIZE],
    /// Of ours, the bits that a guest may change.
    writable: [u8; SIZE],
    /// Memory BARs.
    pub bars: Vec<Bar>,
    /// MSI-X, if the device has it.
    pub msix: Option<MsixCapability>,
    /// MSI, if the device has it.
    pub msi: Option<MsiCapability>,
}

impl FilteredConfig {
    /// Filters what the device shows. `regions` are its BARs.
    ///
    /// # Errors
    /// If the device has a bridge's header, or a BAR that cannot be.
    pub fn new(device: &[u8; SIZE], regions: &[Region; 6]) -> io::Result<Self> {
        if device[HEADER_TYPE] & 0x7f != 0 {
            return Err(io::Error::other(
                "it is a bridge, which cannot be passed through",
            ));
        }
        let mut config = Self {
            registers: [0; SIZE],
            ours: [false; SIZE],
            writable: [0; SIZE],
            bars: Vec::new(),
            msix: None,
            msi: None,
        };
        let command = usize::from(COMMAND);
        config.own(command, &[0, 0], &COMMAND_SHOWN.to_le_bytes());
        // One function in its slot; no self test; no ROM; no INTx.
        config.own(HEADER_TYPE, &[0, 0], &[]);
        config.own(usize::from(BARS), &[0; 0x18], &[]);
        config.own(0x30, &[0; 5], &[]);
        config.own(0x3c, &[0, 0], &[0xff, 0]);
        config.add_bars(device, regions)?;
        config.add_capabilities(device);
        Ok(config)
    }

    fn own(&mut self, at: usize, values: &[u8], writable: &[u8]) {
        for (place, value) in (at..SIZE).zip(values) {
            self.registers[place] = *value;
            self.ours[place] = true;
        }
        for (place, mask) in (at..SIZE).zip(writable) {
            self.writable[place] = *mask;
        }
    }

    fn add_bars(&mut self, device: &[u8; SIZE], regions: &[Region; 6]) -> io::Result<()> {
        let mut index = 0u8;
        while index < 6 {
            let at = register_of(index);
            let low = word(device, at);
            let wide = low & BAR_IO == 0 && low & BAR_KIND == BAR_64;
            let size = regions[usize::from(index)].size;
            if low & BAR_IO == 0 && size != 0 {
                let impossible = !size.is_power_of_two()
                    || size < 16
                    || (wide && index == 5)
                    || (!wide && size > 1 << 31);
                if impossible {
                    return Err(io::Error::other(format!(
                        "its BAR {index} of {size:#x} bytes is impossible"
                    )));
                }
                let mask = (!(size - 1)).to_le_bytes();
                let width = if wide { 8 } else { 4 };
                self.own(at, &(low & 0xf).to_le_bytes(), &mask[..width]);
                self.writable[at] &= 0xf0;
                self.bars.push(Bar { index, size, wide });
            }
            index += if wide { 2 } else { 1 };
        }
        Ok(())
    }

    /// Puts a BAR at an address, before the guest sees it.
    pub fn place(&mut self, bar: Bar, base: u64) {
        let at = register_of(bar.index);
        let width = if bar.wide { 8 } else { 4 };
        for (place, byte) in (at..at + width).zip(base.to_le_bytes()) {
            let mask = self.writable[place];
            self.registers[place] = self.registers[place] & !mask | byte & mask;
        }
    }

    /// Chains the capabilities that are known, in the device's order.
    fn add_capabilities(&mut self, device: &[u8; SIZE]) {
        let mut last = CAPABILITIES;
        let mut next = usize::from(device[CAPABILITIES] & 0xfc);
        if device[STATUS] & STATUS_CAPABILITY_LIST == 0 {
            next = 0;
        }
        // No more capabilities than fit, whatever the links say; each once.
        for _ in 0..SIZE / 4 {
            if next < FIRST_CAPABILITY || self.ours[next] {
                break;
            }
            let at = next;
            next = usize::from(device[at + 1] & 0xfc);
            if !self.keep(device, at) {
                // Not in the list, and not to be found beside it.
                self.own(at, &[0, 0], &[]);
                continue;
            }
            self.own(at, &[device[at], 0], &[]);
            // Below 256.
            self.registers[last] = u8::try_from(at).unwrap_or(0);
            last = at + 1;
        }
    }

    /// Whether a capability stays; what of it is ours is noted.
    fn keep(&mut self, device: &[u8; SIZE], at: usize) -> bool {
        let place = u16::try_from(at).unwrap_or(0);
        match device[at] {
            ID_VENDOR | ID_SUBSYSTEM | ID_EXPRESS | ID_FEATURES => true,
            ID_POWER if at + 8 <= SIZE => {
                // It is always awake: the state can be written and read, and reaches nothing.
                self.own(at + 4, &[0, 0], &[0x03, 0x01]);
                // No PME.
                let capabilities = device[at + 3] & 0x07;
                self.own(at + 3, &[capabilities], &[]);
                true
            }
            ID_MSIX if at + 12 <= SIZE && self.msix.is_none() => {
                let control = u16::from_le_bytes([device[at + 2], device[at + 3]]);
                let place_of = |offset: usize| {
                    let value = word(device, at + offset);
                    let bar = u8::try_from(value & 7).unwrap_or(0);
                    (bar, u64::from(value & !7))
                };
                let found = MsixCapability {
                    at: place,
                    count: (control & 0x7ff) + 1,
                    table: place_of(4),
                    pending: place_of(8),
                };
                let count = (control & 0x7ff).to_le_bytes();
                self.own(at + 2, &count, &[0, MSIX_WRITABLE]);
                self.own(at + 4, &device[at + 4..at + 12], &[]);
                self.msix = Some(found);
                true
            }
            ID_MSI if self.msi.is_none() => {
                let wide = device[at + 2] & MSI_64 != 0;
                let length = if wide { 14 } else { 10 };
                if at + length > SIZE {
                    return false;
                }
                let log = (device[at + 2] >> 1 & 7).min(5);
                // Enable and the number of messages; no masks.
                self.own(at + 2, &[log << 1 | device[at + 2] & MSI_64, 0], &[0x71, 0]);
                self.own(at + 4, &[0; 10][..length - 4], &[0xfc, 0xff, 0xff, 0xff]);
                for writable in &mut self.writable[at + 8..at + length] {
                    *writable = 0xff;
                }
                self.msi = Some(MsiCapability {
                    at: place,
                    count: 1 << log,
                    wide,
                });
                true
            }
            _ => false,
        }
    }

    /// Reads registers; `device` reads those that are the device's.
    pub fn read(&self, offset: u16, data: &mut [u8], device: impl FnOnce(&mut [u8])) {
        let places = usize::from(offset)..usize::from(offset) + data.len();
        if !places
            .clone()
            .all(|at| self.ours.get(at).copied().unwrap_or(true))
        {
            device(data);
        }
        for (at, byte) in places.zip(data) {
            if self.ours.get(at).copied().unwrap_or(true) {
                *byte = self.registers.get(at).copied().unwrap_or(0xff);
            }
        }
    }

    /// Writes registers; `device` gets the runs of bytes that are the device's.
    pub fn write(
        &mut self,
        offset: u16,
        data: &[u8],
        mut device: impl FnMut(u16, &[u8]),
    ) -> Written {
        let start = usize::from(offset);
        let before = self.command();
        let mut run = None;
        for (at, byte) in (start..SIZE).zip(data) {
            if self.ours[at] {
                if let Some(first) = run.take() {
                    pass(&mut device, start, first, at, data);
                }
                let mask = self.writable[at];
                self.registers[at] = self.registers[at] & !mask | byte & mask;
            } else {
                run.get_or_insert(at);
            }
        }
        if let Some(first) = run {
            pass(
                &mut device,
                start,
                first,
                (start + data.len()).min(SIZE),
                data,
            );
        }
        let touches = |at: u16, length: u16| {
            usize::from(at) < start + data.len() && start < usize::from(at + length)
        };
        let command = self.command();
        Written {
            command: (command & TO_DEVICE != before & TO_DEVICE).then_some(self.device_command()),
            msix: self.msix.is_some_and(|msix| touches(msix.at + 2, 2)),
            msi: self.msi.is_some_and(|msi| touches(msi.at + 2, 12)),
        }
    }

    /// What a reset of its bus leaves of what is ours: nothing that the guest has written.
    pub fn reset(&mut self) {
        for (register, writable) in self.registers.iter_mut().zip(&self.writable) {
            *register &= !writable;
        }
    }

    fn command(&self) -> u16 {
        let at = usize::from(COMMAND);
        u16::from_le_bytes([self.registers[at], self.registers[at + 1]])
    }

    /// What the device's own command register is to be: it always decodes memory, because a mapped BAR that does not
    /// answer would end the VM, and never uses INTx.
    #[must_use]
    pub fn device_command(&self) -> u16 {
        self.command() & TO_DEVICE | MEMORY | INTX_DISABLE
    }

    /// MSI-X is enabled; all of it is masked.
    #[must_use]
    pub fn msix_control(&self) -> (bool, bool) {
        self.msix.map_or((false, false), |msix| {
            let high = self.registers[usize::from(msix.at) + 3];
            (high & 0x80 != 0, high & 0x40 != 0)
        })
    }

    /// The MSI messages that are enabled: how many, the address, the data of the first.
    #[must_use]
    pub fn msi_messages(&self) -> Option<(u16, u64, u32)> {
        let msi = self.msi?;
        let at = usize::from(msi.at);
        let control = self.registers[at + 2];
        if control & 1 == 0 {
            return None;
        }
        let count = (1u16 << (control >> 4 & 7).min(5)).min(msi.count);
        let low = u64::from(word(&self.registers, at + 4));
        let (high, data) = if msi.wide {
            (u64::from(word(&self.registers, at + 8)), at + 12)
        } else {
            (0, at + 8)
        };
        let data = u16::from_le_bytes([self.registers[data], self.registers[data + 1]]);
        Some((count, low | high << 32, data.into()))
    }

    /// What is ours, as the guest would read it; the device's registers are zero.
    #[must_use]
    pub fn image(&self) -> [u8; SIZE] {
        self.registers
    }

    /// The BARs that are decoded now.
    #[must_use]
    pub fn decoded(&self) -> Vec<BarRange> {
        if self.command() & MEMORY == 0 {
            return Vec::new();
        }
        let bars = self.bars.iter().map(|bar| {
            let at = register_of(bar.index);
            let low = u64::from(word(&self.registers, at) & !0xf);
            let high = if bar.wide {
                u64::from(word(&self.registers, at + 4)) << 32
            } else {
                0
            };
            BarRange {
                bar: bar.index,
                base: high | low,
                size: bar.size,
            }
        });
        bars.collect()
    }
}

fn pass(device: &mut impl FnMut(u16, &[u8]), start: usize, from: usize, to: usize, data: &[u8]) {
    if let (Ok(at), Some(bytes)) = (u16::try_from(from), data.get(from - start..to - start)) {
        device(at, bytes);
    }
}

/// The register of a BAR, the lower one of a pair.
fn register_of(bar: u8) -> usize {
    usize::from(BARS) + usize::from(bar) * 4
}

fn word(bytes: &[u8; SIZE], at: usize) -> u32 {
    let mut value = [0; 4];
    if let Some(found) = bytes.get(at..at + 4) {
        value.copy_from_slice(found);
    }
    u32::from_le_bytes(value)
}

#[cfg(test)]
mod tests;
