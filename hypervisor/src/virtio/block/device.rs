//! The block device's queue and configuration (virtio 1.3 §5.2.2, §5.2.4).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vmm_sys_util::epoll::EventSet;

use super::backend::Backend;
use super::request::{Limits, MAX_RANGE_SECTORS, MAX_RANGES, SERIAL};
use super::service::{Active, Job, NAME, Service};
use crate::virtio::helpers::{self, Helpers};
use crate::virtio::{Activation, ConfigSpace, DeviceError, Sources, VirtioDevice};

/// Device id (§5.2.1).
const DEVICE_TYPE: u16 = 2;
const QUEUE_SIZE: u16 = 256;
const REQUESTS: u32 = 0;
/// Data descriptors per request that the driver is told to stay below.
const SEG_MAX: u32 = 254;

/// Requests of a disk that are in flight at once.
const IN_FLIGHT: helpers::Limits = helpers::Limits {
    threads: 4,
    of_lane: 4,
};

/// Bytes of the smallest logical block.
const MIN_BLOCK: u32 = 512;

/// Feature bits (§5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
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
    helpers: Option<Helpers<Job>>,
}

impl Block {
    /// A disk over a regular file or a block device. `serial` has at most 20 bytes, a logical block `block_size`.
    ///
    /// # Errors
    /// If the file has no size, the serial number is too long or the block size is none.
    pub fn new(
        file: OwnedFd,
        readonly: bool,
        serial: &str,
        block_size: u32,
    ) -> Result<Self, BlockError> {
        let backend = Backend::new(file, padded(serial)?);
        Self::over(backend, readonly, block_size)
    }

    /// A read-only disk of files with the bytes that each has on it.
    ///
    /// # Errors
    /// As of [`Self::new`]; a length that is not the file's size rounded up.
    pub fn of_pieces(files: Vec<(OwnedFd, u64)>, serial: &str) -> Result<Self, BlockError> {
        let backend = Backend::of_pieces(files, padded(serial)?);
        let backend = backend.map_err(|error| BlockError::Pieces(error.to_string()))?;
        Self::over(backend, true, MIN_BLOCK)
    }

    fn over(backend: Backend, readonly: bool, block_size: u32) -> Result<Self, BlockError> {
        if !block_size.is_power_of_two() || !(MIN_BLOCK..=4096).contains(&block_size) {
            return Err(BlockError::Blocks(block_size));
        }
        let sectors = backend.sectors().map_err(BlockError::Size)?;
        if sectors == 0 {
            return Err(BlockError::Empty);
        }
        Ok(Self {
            service: Arc::new(Service::new(backend, Limits { sectors, readonly })),
            config: Arc::new(Config {
                capacity: AtomicU64::new(sectors),
                generation: AtomicU8::new(0),
                bytes: configuration(block_size),
            }),
            helpers: None,
        })
    }

    /// With threads for what takes its time, which are started when there is such a thing. Without, the worker does
    /// everything.
    #[must_use]
    pub fn with_helpers(mut self) -> Self {
        let service = Arc::clone(&self.service);
        self.helpers = Some(Helpers::new(
            "block-io",
            IN_FLIGHT,
            || (),
            move |job| service.help(job),
        ));
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
fn configuration(block_size: u32) -> Vec<u8> {
    let mut config = Vec::with_capacity(60);
    // Capacity.
    config.extend([0; 8]);
    // size_max, not offered.
    config.extend([0; 4]);
    config.extend(SEG_MAX.to_le_bytes());
    // Geometry, not offered.
    config.extend([0; 4]);
    config.extend(block_size.to_le_bytes());
    // Topology, writeback, num_queues, none offered.
    config.extend([0; 12]);
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
        feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | changes
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
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
        let [ring] = opened.rings;
        self.service.activate(Active {
            memory: opened.memory,
            interrupt: opened.interrupt,
            ring,
        });
        Ok(())
    }

    fn process(
        &mut self,
        token: u32,
        _events: EventSet,
        _sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        if token == REQUESTS {
            self.service.serve(self.helpers.as_ref())?;
        }
        Ok(())
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
        if let Some(helpers) = &self.helpers {
            // The driver has given up what nobody has begun.
            drop(helpers.settle());
        }
        self.service.deactivate(sources);
    }
}
