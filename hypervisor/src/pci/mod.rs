//! PCI: one segment, one bus, functions with type-0 headers, MSI-X and nothing else.
//!
//! Configuration space is reached through ECAM alone: `0xCF8`/`0xCFC` is not implemented, so that
//! each access is one exit and there is less to attack. Everything written here comes from the
//! guest and is hostile.

pub mod bus;
pub mod config;
pub mod host_bridge;
pub mod mirror;
pub mod msix;

/// A range of guest-physical addresses that a function answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// BAR index, 0 to 5; the lower one of a 64-bit pair.
    pub bar: u8,
    /// Guest-physical address.
    pub base: u64,
    /// Bytes, a power of two.
    pub size: u64,
}

/// One PCI function. Called from CPU threads, several at once.
pub trait Function: Send + Sync {
    /// Reads configuration space; `offset + data.len()` is at most 256.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space; `offset + data.len()` is at most 256.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// The registers as they are, without the effects of reading them.
    fn config_image(&self) -> [u8; config::SIZE];
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
    /// A BAR became visible (`Some`) at an address or ceased to be.
    fn bar_moved(&self, bar: u8, old: Option<u64>, new: Option<u64>);
}
