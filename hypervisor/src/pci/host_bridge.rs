//! The host bridge at 0:0.0: an identity, so that Linux finds a bus, and the place at which a clone of a captured guest reads what it is told
//! first (`brig_agent_protocol::Resumption`): where configuration space is mirrored, that costs no exit. It is gone with the guest's first write there.

use std::sync::Mutex;

use brig_agent_protocol::Resumption;

use super::config::{ConfigSpace, Identity, SIZE};
use super::{BarRange, Function};
use crate::sync::lock;

/// A host bridge without BARs.
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
    /// What can be read from [`Resumption::REGISTER`] on, until something is written there.
    told: Mutex<Vec<u8>>,
}

impl HostBridge {
    /// The bridge, as function 0 of slot 0. What is told is cut at the end of configuration space.
    #[must_use]
    pub fn telling(told: &[u8]) -> Self {
        let mut config = ConfigSpace::new(&Identity {
            // Red Hat's "PCIe host bridge".
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: [0x06, 0x00, 0x00],
            subsystem: (0, 0),
        });
        config.set_multi_function();
        Self {
            config: Mutex::new(config),
            told: Mutex::new(told.to_vec()),
        }
    }
}

impl Function for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let image = self.config_image();
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0xff);
        }
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.config).write(offset, data);
        if usize::from(offset) + data.len() > usize::from(Resumption::REGISTER) {
            lock(&self.told).clear();
        }
    }
    fn config_image(&self) -> [u8; SIZE] {
        let mut image: [u8; SIZE] = lock(&self.config).get(0);
        let place = &mut image[usize::from(Resumption::REGISTER)..];
        for (place, byte) in place.iter_mut().zip(&*lock(&self.told)) {
            *place = *byte;
        }
        image
    }
    fn decoded(&self) -> Vec<BarRange> {
        Vec::new()
    }
    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
    fn bar_moved(&self, _bar: u8, _old: Option<u64>, _new: Option<u64>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_can_be_read_until_something_is_written_there() {
        let told = [7; Resumption::BYTES];
        let bridge = HostBridge::telling(&told);
        let mut read = [0; Resumption::BYTES];
        bridge.config_write(4, &[6, 0]);
        bridge.config_read(Resumption::REGISTER, &mut read);
        assert_eq!(read, told);
        bridge.config_write(Resumption::REGISTER, &[0]);
        bridge.config_read(Resumption::REGISTER, &mut read);
        assert_eq!(read, [0; Resumption::BYTES]);
        assert!(bridge.config_image()[0x40..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_bridge_that_tells_nothing_has_no_registers_there_and_one_that_tells_too_much_is_cut() {
        assert!(
            HostBridge::telling(&[]).config_image()[0x40..]
                .iter()
                .all(|byte| *byte == 0)
        );
        let image = HostBridge::telling(&[9; 1000]).config_image();
        assert_eq!((image[0x3f], image[0x40], image[0xff]), (0, 9, 9));
    }
}
