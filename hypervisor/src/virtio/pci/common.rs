//! The common configuration structure (virtio 1.3 §4.1.4.3) as a state machine.
//!
//! Every field is written by the guest, in any order, size and value. Two rules keep that harmless:
//! an enabled queue is never changed, and from DRIVER_OK until the device has given its queues back
//! nothing is (CVE-2026-5747 was a queue size that still could be).

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

use super::interrupt::NO_VECTOR;
use crate::memory::is_writable;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;
const FAILED: u8 = 0x80;
/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;

/// VIRTIO_F_EVENT_IDX, which the ring implementation must know.
const EVENT_IDX: u64 = 1 << 29;

/// What the transport must do after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// Hand the queues to the device: DRIVER_OK was set.
    Activate,
    /// Take the queues back: zero was written to the status.
    Reset,
}

/// A queue the driver enabled is not usable.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("queue {index} is not usable: {reason}")]
pub struct QueueError {
    /// Its index.
    pub index: u16,
    /// What is wrong with it.
    pub reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct QueueSetup {
    max: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueSetup {
    fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        }
    }
}

/// The registers.
#[derive(Clone, Debug)]
pub struct CommonConfig {
    offered: u64,
    accepted: u64,
    vector_count: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    config_vector: u16,
    status: u8,
    /// Zero was written and the device has not given its queues back yet.
    resetting: bool,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

impl CommonConfig {
    /// Registers of a device with queues of at most these sizes; none if a size is not a power of
    /// two up to 32768 or there are too many.
    #[must_use]
    pub fn new(offered: u64, queue_sizes: &[u16], vector_count: u16) -> Option<Self> {
        let sizes_ok = queue_sizes.iter().all(|size| size.is_power_of_two());
        if !sizes_ok || queue_sizes.len() > 64 {
            return None;
        }
        Some(Self {
            offered,
            accepted: 0,
            vector_count,
            device_feature_select: 0,
            driver_feature_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            resetting: false,
            queue_select: 0,
            queues: queue_sizes
                .iter()
                .map(|max| QueueSetup::new(*max))
                .collect(),
        })
    }

    /// Features both sides accepted.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Vector of configuration changes.
    #[must_use]
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Vector of each queue.
    #[must_use]
    pub fn vectors(&self) -> Vec<u16> {
        self.queues.iter().map(|queue| queue.vector).collect()
    }

    /// The device has given its queues back.
    pub fn was_reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max).collect();
        if let Some(fresh) = Self::new(self.offered, &sizes, self.vector_count) {
            *self = fresh;
        }
    }

    fn frozen(&self) -> bool {
        self.status & DRIVER_OK != 0 || self.resetting
    }

    /// Reads a register; a read that is not of a register's size gives zeros.
    pub fn read(&self, offset: u64, data: &mut [u8], needs_reset: bool) {
        data.fill(0);
        let select = |select: u32, value: u64| match select {
            0 => value & 0xffff_ffff,
            1 => value >> 32,
            _ => 0,
        };
        let queue = self.queues.get(usize::from(self.queue_select));
        let of = |field: fn(&QueueSetup) -> u64| queue.map_or(0, field);
        let count = u16::try_from(self.queues.len()).unwrap_or(0);
        let value = match (offset, data.len()) {
            (0x00, 4) => u64::from(self.device_feature_select),
            (0x04, 4) => select(self.device_feature_select, self.offered),
            (0x08, 4) => u64::from(self.driver_feature_select),
            (0x0c, 4) => select(self.driver_feature_select, self.accepted),
            (0x10, 2) => u64::from(self.config_vector),
            (0x12, 2) => u64::from(count),
            (0x14, 1) => u64::from(self.status | if needs_reset { NEEDS_RESET } else { 0 }),
            (0x16, 2) => u64::from(self.queue_select),
            (0x18, 2) => of(|queue| u64::from(queue.size)),
            (0x1a, 2) => queue.map_or(u64::from(NO_VECTOR), |queue| u64::from(queue.vector)),
            (0x1c, 2) => of(|queue| u64::from(queue.enabled)),
            (0x1e, 2) => queue.map_or(0, |_| u64::from(self.queue_select)),
            (0x20, 4 | 8) => of(|queue| queue.descriptors),
            (0x24, 4) => of(|queue| queue.descriptors >> 32),
            (0x28, 4 | 8) => of(|queue| queue.driver),
            (0x2c, 4) => of(|queue| queue.driver >> 32),
            (0x30, 4 | 8) => of(|queue| queue.device),
            (0x34, 4) => of(|queue| queue.device >> 32),
            _ => 0,
        };
        let length = data.len().min(8);
        data[..length].copy_from_slice(&value.to_le_bytes()[..length]);
    }

    /// Writes a register; what is not one, or is frozen, is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let mut bytes = [0u8; 8];
        let length = data.len().min(8);
        bytes[..length].copy_from_slice(&data[..length]);
        let long = u64::from_le_bytes(bytes);
        let word = u32::try_from(long & 0xffff_ffff).unwrap_or(0);
        let short = u16::try_from(long & 0xffff).unwrap_or(0);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = word,
            (0x08, 4) => self.driver_feature_select = word,
            (0x16, 2) => self.queue_select = short,
            (0x14, 1) => return self.write_status(bytes[0]),
            _ if self.frozen() => {}
            (0x0c, 4) if self.status & FEATURES_OK == 0 => self.write_feature(word),
            (0x10, 2) => self.config_vector = self.vector(short),
            (0x1a, 2) => {
                let vector = self.vector(short);
                self.setup(|queue| queue.vector = vector);
            }
            (0x18, 2) => self.setup(|queue| {
                if short.is_power_of_two() && short <= queue.max {
                    queue.size = short;
                }
            }),
            (0x1c, 2) if short == 1 => self.setup(|queue| queue.enabled = true),
            (0x20 | 0x28 | 0x30, 8) => self.set_address(offset, |_| long),
            (0x20 | 0x28 | 0x30, 4) => {
                self.set_address(offset, |old| old & !0xffff_ffff | u64::from(word));
            }
            (0x24 | 0x2c | 0x34, 4) => {
                self.set_address(offset - 4, |old| old & 0xffff_ffff | u64::from(word) << 32);
            }
            _ => {}
        }
        Action::None
    }

    /// Changes the selected queue unless it is enabled.
    fn setup(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
            && !queue.enabled
        {
            change(queue);
        }
    }

    fn set_address(&mut self, register: u64, value: impl FnOnce(u64) -> u64) {
        self.setup(|queue| {
            let field = match register {
                0x20 => &mut queue.descriptors,
                0x28 => &mut queue.driver,
                _ => &mut queue.device,
            };
            *field = value(*field);
        });
    }

    fn vector(&self, vector: u16) -> u16 {
        if vector < self.vector_count {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn write_feature(&mut self, word: u32) {
        let word = u64::from(word);
        match self.driver_feature_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | word,
            1 => self.accepted = self.accepted & 0xffff_ffff | word << 32,
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) -> Action {
        if self.resetting {
            return Action::None;
        }
        if value == 0 {
            if self.status == 0 {
                return Action::None;
            }
            self.resetting = true;
            return Action::Reset;
        }
        // Bits are only ever added, in the order of §3.1.1.
        let before = self.status;
        self.status |= value & (ACKNOWLEDGE | DRIVER | FAILED);
        if value & FEATURES_OK != 0
            && self.accepted & !self.offered == 0
            && self.accepted & VERSION_1 != 0
        {
            self.status |= FEATURES_OK;
        }
        if value & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 {
            self.status |= DRIVER_OK;
        }
        if before & DRIVER_OK == 0 && self.status & DRIVER_OK != 0 {
            Action::Activate
        } else {
            Action::None
        }
    }

    /// The enabled queues, checked against guest RAM.
    ///
    /// # Errors
    /// The first queue that is not usable.
    pub fn queues(&self, memory: &GuestMemoryMmap) -> Result<Vec<(u16, Queue)>, QueueError> {
        (0u16..)
            .zip(&self.queues)
            .filter(|(_, setup)| setup.enabled)
            .map(|(index, setup)| {
                build(setup, self.accepted, memory)
                    .map(|queue| (index, queue))
                    .map_err(|reason| QueueError { index, reason })
            })
            .collect()
    }
}

/// Sizes of the three rings (virtio 1.3 §2.7), event fields included.
fn build(
    setup: &QueueSetup,
    features: u64,
    memory: &GuestMemoryMmap,
) -> Result<Queue, &'static str> {
    let size = u64::from(setup.size);
    let parts = [
        (setup.descriptors, 16, 16 * size),
        (setup.driver, 2, 6 + 2 * size),
        (setup.device, 4, 6 + 8 * size),
    ];
    for (address, alignment, length) in parts {
        if address % alignment != 0 {
            return Err("a ring is not aligned");
        }
        let length = usize::try_from(length).map_err(|_| "a ring is too long")?;
        if !memory.check_range(GuestAddress(address), length)
            || !is_writable(memory, address, length as u64)
        {
            return Err("a ring lies outside guest memory");
        }
    }
    let mut queue = Queue::new(setup.max).map_err(|_| "impossible maximum size")?;
    queue
        .try_set_size(setup.size)
        .and_then(|()| queue.try_set_desc_table_address(GuestAddress(setup.descriptors)))
        .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(setup.driver)))
        .and_then(|()| queue.try_set_used_ring_address(GuestAddress(setup.device)))
        .map_err(|_| "the ring addresses are not acceptable")?;
    queue.set_event_idx(features & EVENT_IDX != 0);
    queue.set_ready(true);
    if queue.is_valid(memory) {
        Ok(queue)
    } else {
        Err("the rings are not valid")
    }
}

#[cfg(test)]
mod tests;
