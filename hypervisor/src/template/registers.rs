//! The devices of a captured guest, as what its drivers have told them.
//!
//! They are read and written through the bus, as the guest does it: what a template says can bring a device into no state into which a
//! guest could not bring it, and needs no checks of its own. A device that has been given its queues takes up where the used rings are
//! ([`crate::virtio::pci::Services::resuming`]): at rest, all that was taken has been given back.

use serde::{Deserialize, Serialize};

use crate::pci::bus::Bus;
use crate::pci::config::{BARS, COMMAND};
use crate::pci::msix::ENTRY_SIZE;
use crate::virtio::pci::capability::{COMMON, PENDING, TABLE};

const VENDOR: u16 = 0;
const CAPABILITIES: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const MSIX_CAPABILITY: u8 = 0x11;
const VIRTIO_VENDOR: u64 = 0x1af4;
const COMMAND_MEMORY: u64 = 1 << 1;

// Registers of the common configuration (virtio 1.3 §4.1.4.3).
const FEATURE_SELECT: u64 = 0x00;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_ADDRESSES: [u64; 3] = [0x20, 0x28, 0x30];

/// ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK: a device in use, of which neither side has complained.
const IN_USE: u64 = 15;

/// A device is in no state to be captured.
#[derive(Debug, thiserror::Error)]
#[error("function {function} of the guest's bus cannot be captured: {reason}")]
pub struct RegisterError {
    function: u8,
    reason: &'static str,
}

/// A write of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Write {
    space: Space,
    at: u64,
    value: u64,
    bytes: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Space {
    /// At an offset of ECAM.
    Configuration,
    /// At a guest-physical address.
    Memory,
}

impl Write {
    /// Does it.
    fn replay(&self, bus: &Bus) {
        let bytes = self.value.to_le_bytes();
        let data = &bytes[..usize::from(self.bytes).clamp(1, 8)];
        match self.space {
            Space::Configuration => bus.ecam_write(self.at, data),
            Space::Memory => {
                bus.memory_write(self.at, data);
            }
        }
    }
}

/// What brings fresh functions 0 to `functions` to where those of `bus` are. Nothing of them has changed when this returns.
///
/// # Errors
/// [`RegisterError`].
pub fn record(bus: &Bus, functions: u8) -> Result<Vec<Write>, RegisterError> {
    let mut writes = Vec::new();
    for function in 0..functions {
        Recorder {
            bus,
            function,
            writes: &mut writes,
        }
        .all()?;
    }
    Ok(writes)
}

/// Makes the writes, and looks whether they have done what they should: the functions are the same as then.
///
/// # Errors
/// [`RegisterError`].
pub fn replay(bus: &Bus, functions: u8, writes: &[Write]) -> Result<(), RegisterError> {
    for write in writes {
        write.replay(bus);
    }
    if record(bus, functions)? == writes {
        Ok(())
    } else {
        Err(RegisterError {
            function: functions,
            reason: "the functions up to it are not what they were",
        })
    }
}

/// Resets what is in use, as a driver that leaves does: no device touches guest memory any more when this returns.
pub fn reset(bus: &Bus, functions: u8) {
    for function in 0..functions {
        let mut nothing = Vec::new();
        let recorder = Recorder {
            bus,
            function,
            writes: &mut nothing,
        };
        if let Some(base) = recorder.virtio() {
            bus.memory_write(base + COMMON + STATUS, &[0]);
        }
    }
}

struct Recorder<'a> {
    bus: &'a Bus,
    function: u8,
    writes: &'a mut Vec<Write>,
}

impl Recorder<'_> {
    fn all(&mut self) -> Result<(), RegisterError> {
        for register in [BARS, BARS + 4] {
            self.keep_config(register, 4);
        }
        self.keep_config(INTERRUPT_LINE, 1);
        self.keep_config(COMMAND, 2);
        let Some(base) = self.virtio() else {
            return Ok(());
        };
        match self.memory(base + COMMON + STATUS, 1) {
            0 => Ok(()),
            IN_USE => self.device(base),
            _ => Err(self.refused("its driver has not come to rest, or has given it up")),
        }
    }

    /// Where the registers of a virtio function are that can be reached.
    fn virtio(&self) -> Option<u64> {
        let known = self.config(VENDOR, 2) == VIRTIO_VENDOR;
        let reached = self.config(COMMAND, 2) & COMMAND_MEMORY != 0;
        let low = self.config(BARS, 4) & !0xf;
        (known && reached).then(|| low | self.config(BARS + 4, 4) << 32)
    }

    fn device(&mut self, base: u64) -> Result<(), RegisterError> {
        let vectors = self.msix().ok_or_else(|| self.refused("it has no MSI-X"))?;
        let (control, count) = vectors;
        for vector in 0..count {
            for word in 0..4 {
                self.keep(base + TABLE + vector * ENTRY_SIZE + word * 4, 4);
            }
        }
        let pending =
            (0..count.div_ceil(64)).any(|word| self.memory(base + PENDING + word * 8, 8) != 0);
        if pending {
            return Err(self.refused("an interrupt of it is pending"));
        }
        self.keep_config(control, 2);
        let common = base + COMMON;
        // A driver's own choice of what it reads next, which reading here changes.
        let selects = [
            (FEATURE_SELECT, 4),
            (DRIVER_FEATURE_SELECT, 4),
            (QUEUE_SELECT, 2),
        ]
        .map(|(register, bytes)| (register, bytes, self.memory(common + register, bytes)));
        for status in [1, 3] {
            self.make(common + STATUS, 1, status);
        }
        for half in 0..2 {
            self.select(common + DRIVER_FEATURE_SELECT, 4, half);
            self.keep(common + DRIVER_FEATURE, 4);
        }
        self.make(common + STATUS, 1, IN_USE & !4);
        self.keep(common + CONFIG_VECTOR, 2);
        for queue in 0..self.memory(common + QUEUES, 2) {
            self.select(common + QUEUE_SELECT, 2, queue);
            self.keep(common + QUEUE_SIZE, 2);
            self.keep(common + QUEUE_VECTOR, 2);
            for register in QUEUE_ADDRESSES {
                self.keep(common + register, 8);
            }
            self.keep(common + QUEUE_ENABLE, 2);
        }
        self.make(common + STATUS, 1, IN_USE);
        for (register, bytes, value) in selects {
            self.select(common + register, bytes, value);
        }
        Ok(())
    }

    /// The MSI-X control register and the number of vectors.
    fn msix(&self) -> Option<(u16, u64)> {
        let mut at = self.config(CAPABILITIES, 1);
        // A capability has four bytes at least.
        for _ in 0..64 {
            let register = u16::try_from(at).ok().filter(|register| *register != 0)?;
            if self.config(register, 1) == u64::from(MSIX_CAPABILITY) {
                let control = register.checked_add(2)?;
                return Some((control, (self.config(control, 2) & 0x7ff) + 1));
            }
            at = self.config(register.checked_add(1)?, 1);
        }
        None
    }

    fn refused(&self, reason: &'static str) -> RegisterError {
        RegisterError {
            function: self.function,
            reason,
        }
    }

    fn ecam(&self, register: u16) -> u64 {
        u64::from(self.function) << 12 | u64::from(register)
    }

    fn config(&self, register: u16, bytes: u8) -> u64 {
        let mut data = [0; 8];
        self.bus
            .ecam_read(self.ecam(register), &mut data[..usize::from(bytes)]);
        u64::from_le_bytes(data)
    }

    fn memory(&self, at: u64, bytes: u8) -> u64 {
        let mut data = [0; 8];
        self.bus.memory_read(at, &mut data[..usize::from(bytes)]);
        u64::from_le_bytes(data)
    }

    /// Records that the register is to be what it is.
    fn keep_config(&mut self, register: u16, bytes: u8) {
        self.writes.push(Write {
            space: Space::Configuration,
            at: self.ecam(register),
            value: self.config(register, bytes),
            bytes,
        });
    }

    fn keep(&mut self, at: u64, bytes: u8) {
        let value = self.memory(at, bytes);
        self.make(at, bytes, value);
    }

    /// Records that the register is to be this.
    fn make(&mut self, at: u64, bytes: u8, value: u64) {
        self.writes.push(Write {
            space: Space::Memory,
            at,
            value,
            bytes,
        });
    }

    /// Chooses what other registers show, here and then.
    fn select(&mut self, at: u64, bytes: u8, value: u64) {
        let data = value.to_le_bytes();
        self.bus.memory_write(at, &data[..usize::from(bytes)]);
        self.make(at, bytes, value);
    }
}
