//! A passed-through device as the node's kernel shows it (`linux/vfio.h`). Implemented over its descriptor, and by tests.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

/// Index of the configuration space among a device's regions; BARs are 0 to 5.
pub const CONFIG_REGION: u32 = 7;

/// A region of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 if the device has no such region.
    pub size: u64,
    /// Parts that can be mapped, in bytes from its start.
    pub mappable: Vec<Range<u64>>,
}

/// The ways in which a device interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Message signalled, one message.
    Msi,
    /// Message signalled, a table.
    Msix,
}

/// What the node's kernel says of a device by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// It is wanted back.
    Wanted,
    /// It has failed.
    Failed,
}

/// Interrupts of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vectors {
    /// How many there are.
    pub count: u16,
    /// More can be enabled while some are.
    pub resizable: bool,
}

/// A mapped part of a region. Unmapped when dropped.
pub trait Mapping: Send + Sync {
    /// Where it is in this process.
    fn host(&self) -> u64;
}

/// A device.
pub trait Device: Send {
    /// What a region is like.
    ///
    /// # Errors
    /// What the kernel says.
    fn region(&self, index: u32) -> io::Result<Region>;
    /// Reads `data.len()` bytes of a region.
    ///
    /// # Errors
    /// What the kernel says.
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes to a region.
    ///
    /// # Errors
    /// What the kernel says.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Maps a part of a region at a host address that is congruent to its offset modulo `alignment`, a power of two:
    /// then large pages are possible.
    ///
    /// # Errors
    /// What the kernel says.
    fn map(&self, region: u32, part: &Range<u64>, alignment: u64) -> io::Result<Box<dyn Mapping>>;
    /// The interrupts of a kind.
    ///
    /// # Errors
    /// What the kernel says.
    fn vectors(&self, kind: Kind) -> io::Result<Vectors>;
    /// From now on interrupts `first..` signal these events; none: the vector is off.
    ///
    /// # Errors
    /// What the kernel says.
    fn set_triggers(&self, kind: Kind, first: u16, events: &[Option<RawFd>]) -> io::Result<()>;
    /// Switches the interrupts of a kind off.
    ///
    /// # Errors
    /// What the kernel says.
    fn disable(&self, kind: Kind) -> io::Result<()>;
    /// From now on `event` is signalled when the node's kernel has this to say.
    ///
    /// # Errors
    /// What the kernel says, also if it never says that of this device.
    fn hear(&self, word: Word, event: RawFd) -> io::Result<()>;
    /// Resets the function.
    ///
    /// # Errors
    /// What the kernel says, also if the device has no reset.
    fn reset(&self) -> io::Result<()>;
}
