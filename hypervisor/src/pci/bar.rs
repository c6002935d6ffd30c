//! Where a base address register puts its window.

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
