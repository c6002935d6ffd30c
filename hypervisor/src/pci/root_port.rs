//! A PCI Express root port with one function behind it (PCIe 5.0 §1.3.1, §7.5.1.3): drivers of some accelerators want
//! one above theirs.
//!
//! It routes configuration space by the bus number that the guest gives it and resets what is behind it, and nothing else:
//! its windows are kept as the guest writes them, and the function's BARs are answered wherever the machine's windows allow,
//! as those of any other.
//! It has no slot, so no hotplug of its own: it comes and goes with what is behind it. Everything written is hostile.

use std::sync::{Arc, Mutex};

use super::config::SIZE;
use super::{BarRange, Function};
use crate::sync::lock;

const BUS_NUMBERS: usize = 0x18;
const SECONDARY: usize = 0x19;
const BRIDGE_CONTROL: usize = 0x3e;
/// Of bridge control: the bus behind is in reset while it is set (§7.5.1.3.13).
const BUS_RESET: u8 = 1 << 6;

/// Where registers are, their values at first, and the bits that a guest may change.
const REGISTERS: &[(usize, &[u8], &[u8])] = &[
    // Red Hat's "PCIe root port".
    (0x00, &[0x36, 0x1b, 0x0c, 0x00], &[]),
    // Command: memory, bus master, errors. Status: there are capabilities.
    (0x04, &[0, 0, 0x10, 0], &[0x46, 0x05]),
    // A bridge of PCI to PCI.
    (0x08, &[0, 0x00, 0x04, 0x06], &[]),
    (0x0e, &[0x01], &[]),
    (BUS_NUMBERS, &[0, 0, 0, 0], &[0xff, 0xff, 0xff, 0]),
    // No I/O. The windows for memory are closed: their bases are above their limits.
    (0x20, &[0xf0, 0xff, 0, 0], &[0xf0, 0xff, 0xf0, 0xff]),
    (0x24, &[0xf1, 0xff, 0x01, 0], &[0xf0, 0xff, 0xf0, 0xff]),
    (0x28, &[0; 8], &[0xff; 8]),
    (0x34, &[0x40], &[]),
    (0x3c, &[0], &[0xff]),
    // Errors, and a reset of the bus behind.
    (BRIDGE_CONTROL, &[0, 0], &[0x43, 0]),
    // PCI Express (§7.5.3): version 2, a root port without a slot.
    (0x40, &[0x10, 0, 0x42, 0], &[]),
    // Payloads of 512 bytes.
    (0x44, &[0x02, 0x80, 0, 0], &[]),
    (0x48, &[0, 0], &[0xff, 0x7f]),
    // A link of 16 lanes at 16 GT/s, and so it runs.
    (0x4c, &[0x04, 0x01, 0, 0], &[]),
    (0x50, &[0, 0, 0x04, 0x01], &[0xfb, 0x0f]),
    (0x5c, &[0, 0], &[0x1f, 0]),
    (0x6c, &[0x1e, 0, 0, 0, 0x04, 0], &[]),
];

/// The port.
pub struct RootPort {
    behind: Arc<dyn Function>,
    registers: Mutex<[u8; SIZE]>,
    writable: [u8; SIZE],
}

impl RootPort {
    /// One above `behind`, which is on bus `secondary` until the guest says otherwise.
    #[must_use]
    pub fn above(behind: Arc<dyn Function>, secondary: u8) -> Self {
        let (mut registers, mut writable) = ([0; SIZE], [0; SIZE]);
        for (at, values, masks) in REGISTERS {
            for (place, value) in registers.iter_mut().skip(*at).zip(*values) {
                *place = *value;
            }
            for (place, mask) in writable.iter_mut().skip(*at).zip(*masks) {
                *place = *mask;
            }
        }
        registers[SECONDARY] = secondary;
        registers[SECONDARY + 1] = secondary;
        Self {
            behind,
            registers: Mutex::new(registers),
            writable,
        }
    }
}

impl Function for RootPort {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let registers = lock(&self.registers);
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = registers.get(at).copied().unwrap_or(0xff);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut registers = lock(&self.registers);
        let before = registers[BRIDGE_CONTROL];
        let places = registers.iter_mut().zip(&self.writable);
        for ((place, mask), byte) in places.skip(offset.into()).zip(data) {
            *place = *place & !mask | byte & mask;
        }
        let resets = registers[BRIDGE_CONTROL] & !before & BUS_RESET != 0;
        drop(registers);
        if resets {
            self.behind.bus_reset();
        }
    }

    fn config_image(&self) -> [u8; SIZE] {
        *lock(&self.registers)
    }

    /// It has none; those of the function behind it are told by that.
    fn decoded(&self) -> Vec<BarRange> {
        Vec::new()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.behind.bar_read(bar, offset, data);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.behind.bar_write(bar, offset, data);
    }

    fn reads_when_gone(&self) -> u8 {
        self.behind.reads_when_gone()
    }

    fn bar_moved(&self, bar: u8, old: Option<u64>, new: Option<u64>) {
        self.behind.bar_moved(bar, old, new);
    }

    fn behind(&self) -> Option<(u8, Arc<dyn Function>)> {
        let secondary = lock(&self.registers)[SECONDARY];
        Some((secondary, Arc::clone(&self.behind)))
    }
}
