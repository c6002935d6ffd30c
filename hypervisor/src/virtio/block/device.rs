//! The block device's queues and configuration (virtio 1.3 §5.2.2, §5.2.4).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vmm_sys_util::epoll::EventSet;

use super::backend::Backend;
use super::queue_thread::QueueThreads;
use super::request::{Limits, MAX_RANGE_SECTORS, MAX_RANGES, SERIAL};
use super::service::{Active, Job, NAME, Service};
use crate::virtio::helpers::{self, Helpers};
use crate::virtio::ring::Ring;
use crate::virtio::{Activation, ConfigSpace, DeviceError, Sources, VirtioDevice};

/// Device id (§5.2.1).
const DEVICE_TYPE: u16 = 2;
const QUEUE_SIZE: u16 = 256;
/// The most queues: each costs the guest a vector and room for as many requests as it has descriptors.
pub const MAX_QUEUES: u16 = 8;
/// Data descriptors per request that the driver is told to stay below.
const SEG_MAX: u32 = 254;

/// Requests of a queue that take their time and are in flight at once.
const IN_FLIGHT: usize = 4;
/// The same of all queues of a disk.
const ALL_IN_FLIGHT: usize = 16;

/// Bytes of the smallest logical block.
const MIN_BLOCK: u32 = 512;

/// Feature bits (§5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Why a block device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The serial number is too long.
    #[error("a disk's serial number of {0} bytes is over the limit of {SERIAL}")]
    Serial(usize),
    /// The file has no size.
    #[error("cannot get the size of a disk: {0}")]
    Size(#[source] io::Error),
    /// The file has no whole sector.
    #[error("a disk of less than one sector")]
    Empty,
    /// Something is wrong with what it is made of.
    #[error("a disk of pieces: {0}")]
    Pieces(String),
    /// The driver needs one queue, and more than [`MAX_QUEUES`] are not served.
    #[error("a disk with {0} queues: 1 to {MAX_QUEUES} are possible")]
    Queues(u16),
    /// The size of its blocks is none.
    #[error("a disk with blocks of {0} bytes: 512 to 4096 are possible")]
    Blocks(u32),
}

/// `struct virtio_blk_config`, of which the capacity can change.
struct Config {
    /// In sectors.
    capacity: AtomicU64,
    generation: AtomicU8,
    /// All of it; the capacity's place is not used.
    bytes: Vec<u8>,
}

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = self.bytes.clone();
        bytes[..8].copy_from_slice(&self.capacity.load(Ordering::SeqCst).to_le_bytes());
        bytes.read(offset, data);
    }

    fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }
}

/// A disk.
pub struct Block {
    service: Arc<Service>,
    config: Arc<Config>,
    helpers: Option<Arc<Helpers<Job>>>,
    threads: QueueThreads,
}

impl Block {
    /// A disk over a regular file or a block device. `serial` has at most 20 bytes, a logical block `block_size`.
    ///
    /// # Errors
    /// If the file has no size, the serial number is too long, or the block size or the number of queues is none.
    pub fn new(
        file: OwnedFd,
        readonly: bool,
        serial: &str,
        block_size: u32,
        queues: u16,
    ) -> Result<Self, BlockError> {
        let backend = Backend::new(file, padded(serial)?);
        Self::over(backend, readonly, block_size, queues)
    }

    /// A read-only disk of files with the bytes that each has on it.
    ///
    /// # Errors
    /// As of [`Self::new`]; a length that is not the file's size rounded up.
    pub fn of_pieces(
        files: Vec<(OwnedFd, u64)>,
        serial: &str,
        queues: u16,
    ) -> Result<Self, BlockError> {
        let backend = Backend::of_pieces(files, padded(serial)?);
        let backend = backend.map_err(|error| BlockError::Pieces(error.to_string()))?;
        Self::over(backend, true, MIN_BLOCK, queues)
    }

    fn over(
        backend: Backend,
        readonly: bool,
        block_size: u32,
        queues: u16,
    ) -> Result<Self, BlockError> {
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(BlockError::Queues(queues));
        }
        if !block_size.is_power_of_two() || !(MIN_BLOCK..=4096).contains(&block_size) {
            return Err(BlockError::Blocks(block_size));
        }
        let sectors = backend.sectors().map_err(BlockError::Size)?;
        if sectors == 0 {
            return Err(BlockError::Empty);
        }
        Ok(Self {
            service: Arc::new(Service::new(backend, Limits { sectors, readonly }, queues)),
            config: Arc::new(Config {
                capacity: AtomicU64::new(sectors),
                generation: AtomicU8::new(0),
                bytes: configuration(block_size, queues),
            }),
            helpers: None,
            threads: QueueThreads::default(),
        })
    }

    /// With threads for what takes its time and for queues that keep each other waiting, which are started when there is
    /// such a thing. Without, the worker does everything.
    #[must_use]
    pub fn with_helpers(mut self) -> Self {
        let service = Arc::clone(&self.service);
        let queues = usize::from(service.queues());
        let limits = helpers::Limits {
            threads: (IN_FLIGHT * queues).min(ALL_IN_FLIGHT),
            of_lane: IN_FLIGHT,
        };
        let helpers = Helpers::new("block-io", limits, || (), move |job| service.help(job));
        self.helpers = Some(Arc::new(helpers));
        self
    }

    /// A flush waits at the gate.
    #[cfg(test)]
    pub fn gated(mut self, gate: Arc<std::sync::Barrier>) -> Self {
        if let Some(service) = Arc::get_mut(&mut self.service) {
            service.set_gate(gate);
        }
        self
    }

    /// Helpers have begun all that was handed to them.
    #[cfg(test)]
    pub fn all_begun(&self) -> bool {
        self.helpers.as_ref().is_none_or(|it| it.waiting() == 0)
    }

    /// Queues that have a thread of their own.
    #[cfg(test)]
    pub fn queue_threads(&self) -> Vec<u16> {
        self.threads.queues()
    }

    /// For how long such a thread waits for something to do.
    #[cfg(test)]
    pub fn with_rest(mut self, rest: std::time::Duration) -> Self {
        self.threads = QueueThreads::resting(rest);
        self
    }

    /// Serves a queue of the worker's, and sees to it that it keeps no other waiting again.
    fn serve(&mut self, index: u16, sources: &mut Sources<'_>) -> Result<(), DeviceError> {
        self.service.serve(index, self.helpers.as_deref())?;
        let Some(helpers) = &self.helpers else {
            return Ok(());
        };
        let waiting = |other: &u16| {
            *other != index && !self.threads.has(*other) && self.service.waits(*other)
        };
        // Queue 0 stays with the worker.
        match (0..self.service.queues()).rev().find(waiting) {
            None => {}
            Some(other) => {
                let apart = if other == 0 { index } else { other };
                self.threads.start(apart, &self.service, helpers, sources);
            }
        }
        Ok(())
    }
}

/// A serial number as the guest reads it.
fn padded(serial: &str) -> Result<[u8; SERIAL], BlockError> {
    let mut padded = [0; SERIAL];
    padded
        .get_mut(..serial.len())
        .ok_or(BlockError::Serial(serial.len()))?
        .copy_from_slice(serial.as_bytes());
    Ok(padded)
}

/// `struct virtio_blk_config` up to `write_zeroes_may_unmap`.
fn configuration(block_size: u32, queues: u16) -> Vec<u8> {
    let mut config = Vec::with_capacity(60);
    // Capacity.
    config.extend([0; 8]);
    // size_max, not offered.
    config.extend([0; 4]);
    config.extend(SEG_MAX.to_le_bytes());
    // Geometry, not offered.
    config.extend([0; 4]);
    config.extend(block_size.to_le_bytes());
    // Topology and writeback, not offered.
    config.extend([0; 10]);
    config.extend(queues.to_le_bytes());
    for _ in ["discard", "write zeroes"] {
        config.extend(MAX_RANGE_SECTORS.to_le_bytes());
        config.extend(MAX_RANGES.to_le_bytes());
        if config.len() == 44 {
            // discard_sector_alignment: 4 KiB.
            config.extend(8u32.to_le_bytes());
        }
    }
    // write_zeroes_may_unmap.
    config.extend([1, 0, 0, 0]);
    config
}

impl VirtioDevice for Block {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let changes = if self.service.limits().readonly {
            feature::RO
        } else {
            feature::DISCARD | feature::WRITE_ZEROES
        };
        let multiple = if self.service.queues() > 1 {
            feature::MQ
        } else {
            0
        };
        feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | changes
            | multiple
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.service.queues())]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        self.config.clone()
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let opened = activation.open(NAME, sources)?;
        let [first] = opened.rings;
        let take = |index, ring| {
            let active = Active {
                memory: opened.memory.clone(),
                interrupt: Arc::clone(&opened.interrupt),
                ring,
            };
            self.service.activate(index, active);
        };
        take(0, first);
        // A driver that does not know of more has no business with them.
        if opened.features & feature::MQ == 0 {
            return Ok(());
        }
        for queue in opened.others {
            let index = queue.index;
            match Ring::new(queue, NAME, opened.features, u32::from(index), sources) {
                Ok(ring) => take(index, ring),
                Err(error) => {
                    self.service.deactivate(sources);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn process(
        &mut self,
        token: u32,
        _events: EventSet,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        match u16::try_from(token) {
            Ok(index) if !self.threads.has(index) => self.serve(index, sources)?,
            _ => {}
        }
        // Afterwards: who has something to say of it says it by a kick of queue 0, which serving that has just read. What is
        // said from now on kicks again.
        self.service.failed()?;
        self.threads.take_back(&self.service, sources)
    }

    fn refresh(&mut self) -> Result<(), DeviceError> {
        // One that is gone has no size: what the guest asks of it then fails by itself.
        let sectors = self.service.backend().sectors().unwrap_or(0);
        if sectors == self.service.limits().sectors {
            return Ok(());
        }
        self.config.capacity.store(sectors, Ordering::SeqCst);
        self.config.generation.fetch_add(1, Ordering::SeqCst);
        self.service.resize(sectors)
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        self.service.give_up();
        self.threads.stop();
        if let Some(helpers) = &self.helpers {
            // The driver has given up what nobody has begun.
            drop(helpers.settle());
        }
        self.service.deactivate(sources);
    }
}
