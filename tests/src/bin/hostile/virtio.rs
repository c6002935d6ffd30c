//! A virtio driver that does what it is told, right or wrong (virtio 1.3 §2.7, §4.1.4.3).

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::dma::Page;
use crate::pci::Function;

/// Size of the queues made here unless a [`Mode`] says otherwise, in descriptors: everything fits in one page.
pub const SIZE: u16 = 16;
/// Descriptors that the page has room for; an index beyond a queue's size is written all the same.
const TABLE: u16 = 64;
const AVAIL: usize = 0x400;
const USED: usize = 0x800;

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

const VERSION_1: u32 = 1;
/// VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX, in the low word.
const F_INDIRECT: u32 = 1 << 28;
const F_EVENT_INDEX: u32 = 1 << 29;

/// What a driver has chosen of the features of the rings.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// Descriptors of each queue.
    pub size: u16,
    /// The event index is used.
    pub event_index: bool,
    /// Each chain lies in an indirect table.
    pub indirect: bool,
}

/// What an attack on a ring is tried with.
pub const MODES: [Mode; 4] = [
    Mode {
        size: SIZE,
        event_index: false,
        indirect: false,
    },
    Mode {
        size: 4,
        event_index: true,
        indirect: false,
    },
    Mode {
        size: SIZE,
        event_index: false,
        indirect: true,
    },
    Mode {
        size: 8,
        event_index: true,
        indirect: true,
    },
];

impl Function {
    fn common8(&self, offset: usize, value: u8) {
        self.bar.write(self.common.offset + offset, value);
    }

    /// Writes a 16-bit field of the common configuration.
    pub fn common16(&self, offset: usize, value: u16) {
        self.bar.write(self.common.offset + offset, value);
    }

    /// Writes a 32-bit field of the common configuration.
    pub fn common32(&self, offset: usize, value: u32) {
        self.bar.write(self.common.offset + offset, value);
    }

    fn common64(&self, offset: usize, value: u64) {
        let bytes = value.to_le_bytes();
        let (low, high) = bytes.split_at(4);
        let half = |part: &[u8]| part.try_into().map_or(0, u32::from_le_bytes);
        self.common32(offset, half(low));
        self.common32(offset + 4, half(high));
    }

    /// A 64-bit field of the device's own configuration.
    pub fn device64(&self, offset: usize) -> u64 {
        let half = |at| u64::from(self.bar.read::<u32>(self.device.offset + at));
        half(offset) | half(offset + 4) << 32
    }

    /// device_status.
    pub fn status(&self) -> u8 {
        self.bar.read(self.common.offset + 0x14)
    }

    /// Sets device_status.
    pub fn set_status(&self, value: u8) {
        self.common8(0x14, value);
    }

    /// num_queues.
    pub fn queues(&self) -> u16 {
        self.bar.read(self.common.offset + 0x12)
    }

    /// Resets and waits until the device has.
    pub fn reset(&self) -> Result<()> {
        self.set_status(0);
        let end = Instant::now() + Duration::from_secs(10);
        while self.status() != 0 {
            if Instant::now() > end {
                bail!("device {} does not reset", self.kind);
            }
        }
        Ok(())
    }

    /// Resets, accepts VIRTIO_F_VERSION_1 and nothing else, up to FEATURES_OK.
    pub fn negotiate(&self) -> Result<()> {
        self.accept(0)
    }

    /// As [`Self::negotiate`], with these features of the low word.
    pub fn accept(&self, features: u32) -> Result<()> {
        self.reset()?;
        self.set_status(1);
        self.set_status(3);
        self.common32(0x08, 0);
        self.common32(0x0c, features);
        self.common32(0x08, 1);
        self.common32(0x0c, VERSION_1);
        self.set_status(0xb);
        if self.status() & 8 == 0 {
            bail!("device {} refuses its own features", self.kind);
        }
        Ok(())
    }

    /// Describes a queue to the device and enables it.
    pub fn set_queue(&self, index: u16, size: u16, desc: u64, avail: u64, used: u64) {
        self.common16(0x16, index);
        self.common16(0x18, size);
        self.common64(0x20, desc);
        self.common64(0x28, avail);
        self.common64(0x30, used);
        self.common16(0x1c, 1);
    }

    /// Notifies a queue.
    pub fn kick(&self, index: u16) {
        self.common16(0x16, index);
        let offset: u16 = self.bar.read(self.common.offset + 0x1e);
        let at = self.notify.offset + usize::from(offset) * self.notify_multiplier;
        self.bar.write(at, index);
    }

    /// Brings the device up with every queue in a page of its own.
    pub fn start(&self) -> Result<Vec<Ring>> {
        self.start_as(MODES[0])
    }

    /// Resets and takes these rings again, empty.
    pub fn start_again(&self, rings: &[&Ring]) -> Result<()> {
        self.negotiate()?;
        for ring in rings {
            ring.page.write(AVAIL, &[0; 4]);
            ring.page.write(USED, &[0; 4]);
            ring.attach(self);
        }
        self.set_status(0xf);
        Ok(())
    }

    /// As [`Self::start`], with rings of this mode.
    pub fn start_as(&self, mode: Mode) -> Result<Vec<Ring>> {
        let event_index = if mode.event_index { F_EVENT_INDEX } else { 0 };
        let indirect = if mode.indirect { F_INDIRECT } else { 0 };
        self.accept(event_index | indirect)?;
        let mut rings = Vec::new();
        for index in 0..self.queues().min(8) {
            let mut ring = Ring::new(index)?;
            ring.size = mode.size;
            ring.attach(self);
            rings.push(ring);
        }
        self.set_status(0xf);
        Ok(rings)
    }
}

/// A split queue in one page.
pub struct Ring {
    /// Its index in the device.
    pub index: u16,
    /// The page.
    pub page: Page,
    /// Its size in descriptors.
    pub size: u16,
}

impl Ring {
    /// An empty queue.
    pub fn new(index: u16) -> Result<Self> {
        Ok(Self {
            index,
            page: Page::new()?,
            size: SIZE,
        })
    }

    /// Describes it to the device.
    pub fn attach(&self, function: &Function) {
        let base = self.page.address;
        function.set_queue(
            self.index,
            self.size,
            base,
            base + AVAIL as u64,
            base + USED as u64,
        );
    }

    /// Writes a descriptor.
    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0u8; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.page.write(usize::from(index % TABLE) * 16, &bytes);
    }

    /// Moves the table into `page` and leaves one descriptor that says so.
    pub fn make_indirect(&self, page: &Page) {
        page.write(0, &self.page.read(0, usize::from(TABLE) * 16));
        self.descriptor(0, page.address, u32::from(self.size) * 16, INDIRECT, 0);
    }

    /// The driver's word on when it wants to be told (event index).
    pub fn set_used_event(&self, value: u16) {
        self.page
            .write(AVAIL + 4 + usize::from(self.size) * 2, &value.to_le_bytes());
    }

    /// Makes a descriptor available without telling the device.
    pub fn offer(&self, head: u16) {
        let position = self.page.read16(AVAIL + 2);
        let slot = AVAIL + 4 + usize::from(position % self.size) * 2;
        self.page.write(slot, &head.to_le_bytes());
        self.set_position(position.wrapping_add(1));
    }

    /// Sets the driver's position in the ring of available descriptors.
    pub fn set_position(&self, position: u16) {
        self.page.write(AVAIL + 2, &position.to_le_bytes());
    }

    /// The driver's position.
    pub fn position(&self) -> u16 {
        self.page.read16(AVAIL + 2)
    }

    /// Sends what lies at the beginning of `page` as a request of so many bytes, with room for an answer at `to`; false if the device
    /// does not use it.
    pub fn ask(
        &self,
        function: &Function,
        page: &Page,
        request: u32,
        (to, answer): (u16, u32),
        within: Duration,
    ) -> bool {
        self.descriptor(0, page.address, request, NEXT, 1);
        self.descriptor(1, page.address + u64::from(to), answer, WRITE, 0);
        let before = self.used();
        self.offer(0);
        function.kick(0);
        self.wait_used(before.wrapping_add(1), within)
    }

    /// How many the device has used.
    pub fn used(&self) -> u16 {
        self.page.read16(USED + 2)
    }

    /// Waits until the device has used `count`; false if it does not.
    pub fn wait_used(&self, count: u16, within: Duration) -> bool {
        let end = Instant::now() + within;
        while self.used() != count {
            if Instant::now() > end {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }
}
