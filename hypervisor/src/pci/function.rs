//! What the bus asks of a function. Everything written comes from the guest and is hostile.

use std::sync::Arc;

use super::bar::BarRange;
use super::config::SIZE;

/// One PCI function. Called from CPU threads, several at once.
pub trait Function: Send + Sync {
    /// Reads configuration space; `offset + data.len()` is at most 256.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space; `offset + data.len()` is at most 256.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// The registers as they are, without the effects of reading them.
    fn config_image(&self) -> [u8; SIZE];
    /// Whether reading a register has an effect now, so that reads must not be answered from an
    /// image.
    fn reads_have_effects(&self) -> bool {
        false
    }
    /// The BARs that the function decodes now: none while memory decoding is off.
    fn decoded(&self) -> Vec<BarRange>;
    /// Reads `data.len()` (1 to 8) bytes of a BAR.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes `data.len()` (1 to 8) bytes of a BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);
    /// What each byte of its BARs reads as after it was taken from the bus without the guest's consent.
    fn reads_when_gone(&self) -> u8 {
        0xff
    }
    /// Of a port: the number of the bus behind it, as the guest has it now, and the one function there.
    fn behind(&self) -> Option<(u8, Arc<dyn Function>)> {
        None
    }
    /// Its bus was reset (PCIe 5.0 §6.6.1): it decodes nothing from then on, and does nothing by itself. Only what can be
    /// behind a port is ever asked.
    fn bus_reset(&self) {}
    /// A BAR became visible (`Some`) at an address or ceased to be.
    fn bar_moved(&self, bar: u8, old: Option<u64>, new: Option<u64>);
}
