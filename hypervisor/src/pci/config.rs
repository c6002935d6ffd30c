//! A type-0 configuration space (PCI 3.0 §6.1): registers, the bits a guest may change, BARs and
//! the capability list.
//!
//! Writes come from the guest. What a write may change is a mask fixed when the function is built,
//! so no sequence of writes can reach anything else.

use super::bar::BarRange;

/// Bytes of conventional configuration space.
pub const SIZE: usize = 256;
/// Command register.
pub const COMMAND: u16 = 0x04;
/// First BAR.
pub const BARS: u16 = 0x10;
/// First register after the BARs.
pub const BARS_END: u16 = 0x28;

const STATUS: usize = 0x06;
const HEADER_TYPE: usize = 0x0e;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// INTx disable, in the second byte.
const COMMAND_INTX_DISABLE_HIGH: u8 = 1 << 2;
const STATUS_CAPABILITY_LIST: u8 = 1 << 4;
const MULTI_FUNCTION: u8 = 1 << 7;
const BAR_64: u8 = 0b100;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor and device id.
    pub subsystem: (u16, u16),
}

/// There is no room for another capability, or a BAR is malformed. Both are our own mistakes.
#[derive(Debug, thiserror::Error)]
#[error("PCI configuration space: {0}")]
pub struct ConfigError(&'static str);

/// A configuration space.
pub struct ConfigSpace {
    registers: [u8; SIZE],
    writable: [u8; SIZE],
    bars: Vec<(u8, u64)>,
    next: usize,
    last: usize,
}

impl ConfigSpace {
    /// A function with no BARs and no capabilities.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            registers: [0; SIZE],
            writable: [0; SIZE],
            bars: Vec::new(),
            next: FIRST_CAPABILITY,
            last: 0,
        };
        let [class, subclass, interface] = identity.class;
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision, interface, subclass, class]);
        space.put(0x2c, &identity.subsystem.0.to_le_bytes());
        space.put(0x2e, &identity.subsystem.1.to_le_bytes());
        space.writable[usize::from(COMMAND)] = COMMAND_MEMORY | COMMAND_BUS_MASTER;
        space.writable[usize::from(COMMAND) + 1] = COMMAND_INTX_DISABLE_HIGH;
        // Interrupt line: scratch for software.
        space.writable[0x3c] = 0xff;
        space
    }

    /// Says that the slot may have more functions (DESIGN section 5: function 0 always does).
    pub fn set_multi_function(&mut self) {
        self.registers[HEADER_TYPE] |= MULTI_FUNCTION;
    }

    /// Adds a 64-bit memory BAR of `size` bytes, at `base`.
    ///
    /// # Errors
    /// If the index or the size is impossible or the base is not aligned.
    pub fn add_bar64(&mut self, bar: u8, size: u64, base: u64) -> Result<(), ConfigError> {
        if bar > 4 || !size.is_power_of_two() || size < 16 || !base.is_multiple_of(size) {
            return Err(ConfigError("impossible BAR"));
        }
        let at = usize::from(BARS) + usize::from(bar) * 4;
        let mut value = base.to_le_bytes();
        value[0] |= BAR_64;
        self.put(at, &value);
        let mask = (!(size - 1)).to_le_bytes();
        self.writable[at..at + 8].copy_from_slice(&mask);
        self.writable[at] &= 0xf0;
        self.bars.push((bar, size));
        Ok(())
    }

    /// Appends a capability: `body` follows its id and next pointer, `writable` are the bits of the
    /// body that a guest may change (missing ones are read-only). Returns the capability's offset.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, ConfigError> {
        let at = self.next;
        let end = at + 2 + body.len();
        if end > SIZE || writable.len() > body.len() {
            return Err(ConfigError("no room for a capability"));
        }
        let position = u8::try_from(at).map_err(|_| ConfigError("no room for a capability"))?;
        if self.last == 0 {
            self.registers[CAPABILITIES] = position;
            self.registers[STATUS] |= STATUS_CAPABILITY_LIST;
        } else {
            self.registers[self.last + 1] = position;
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.last = at;
        self.next = end.next_multiple_of(4);
        Ok(u16::from(position))
    }

    /// Reads registers; what lies outside reads as all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (offset, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.registers.get(offset).copied().unwrap_or(0xff);
        }
    }

    /// Writes the writable bits of registers.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (offset, byte) in (usize::from(offset)..SIZE).zip(data) {
            let mask = self.writable[offset];
            let register = &mut self.registers[offset];
            *register = *register & !mask | *byte & mask;
        }
    }

    /// Reads `N` bytes of our own layout.
    #[must_use]
    pub fn get<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes);
        bytes
    }

    /// The BARs that are decoded now.
    #[must_use]
    pub fn decoded(&self) -> Vec<BarRange> {
        if self.registers[usize::from(COMMAND)] & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        self.bars
            .iter()
            .map(|(bar, size)| {
                let raw = u64::from_le_bytes(self.get(BARS + u16::from(*bar) * 4));
                BarRange {
                    bar: *bar,
                    base: raw & !0xf,
                    size: *size,
                }
            })
            .collect()
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.registers[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1053,
            revision: 1,
            class: [0x07, 0x80, 0],
            subsystem: (0x1af4, 0x40),
        });
        space.add_bar64(0, 0x8000, 0xc000_8000).unwrap();
        space.add_capability(9, &[1; 14], &[]).unwrap();
        space.add_capability(0x11, &[0; 10], &[0, 0xc0]).unwrap();
        space
    }

    #[test]
    fn a_bar_answers_its_size_when_all_ones_are_written() {
        let mut space = space();
        space.write(BARS, &[0xff; 8]);
        let raw = u64::from_le_bytes(space.get(BARS));
        assert_eq!(!(raw & !0xf) + 1, 0x8000);
        assert_eq!(raw & 0xf, 0b100);
    }

    #[test]
    fn bars_are_decoded_only_while_memory_decoding_is_on_and_follow_writes() {
        let mut space = space();
        assert!(space.decoded().is_empty());
        space.write(COMMAND, &[2, 0]);
        assert_eq!(space.decoded()[0].base, 0xc000_8000);
        space.write(BARS, &0u64.to_le_bytes());
        assert_eq!(space.decoded()[0].base, 0);
        space.write(COMMAND, &[0, 0]);
        assert!(space.decoded().is_empty());
    }

    #[test]
    fn the_capability_list_is_linked_in_order() {
        let space = space();
        assert_ne!(space.get::<1>(6)[0] & 1 << 4, 0);
        let first = space.get::<1>(0x34)[0];
        let [id, next] = space.get::<2>(u16::from(first));
        assert_eq!(id, 9);
        assert_eq!(space.get::<2>(u16::from(next)), [0x11, 0]);
    }

    #[test]
    fn a_capability_that_does_not_fit_is_refused() {
        let mut space = space();
        assert!(space.add_capability(9, &[0; 190], &[]).is_err());
        assert!(space.add_bar64(5, 4096, 0).is_err());
        assert!(space.add_bar64(2, 4097, 0).is_err());
    }

    proptest! {
        #[test]
        fn no_writes_change_read_only_bits(
            writes in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 1..9)), 0..64)
        ) {
            let fresh = space();
            let mut written = space();
            for (offset, data) in &writes {
                written.write(*offset, data);
            }
            for at in 0..SIZE {
                let mask = !fresh.writable[at];
                prop_assert_eq!(written.registers[at] & mask, fresh.registers[at] & mask);
            }
            prop_assert!(written.decoded().len() <= 1);
        }
    }
}
