//! The host bridge at 0:0.0: nothing but an identity, so that Linux finds a bus.

use std::sync::Mutex;

use super::config::{ConfigSpace, Identity, SIZE};
use super::{BarRange, Function};
use crate::sync::lock;

/// A host bridge without BARs.
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    /// The bridge, as function 0 of slot 0.
    #[must_use]
    pub fn new() -> Self {
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
        }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl Function for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.config).read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.config).write(offset, data);
    }
    fn config_image(&self) -> [u8; SIZE] {
        lock(&self.config).get(0)
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
