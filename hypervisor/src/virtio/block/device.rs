//! The block device's queue and configuration (virtio 1.3 §5.2.2, §5.2.4).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::backend::Backend;
use super::request::{Limits, MAX_RANGE_SECTORS, MAX_RANGES, Request, SERIAL, Status};
use crate::virtio::ring::Ring;
use crate::virtio::{
    Activation, ConfigSpace, DeviceError, GuestMemory, Interrupt, Sources, VirtioDevice,
};

const NAME: &str = "block";
/// Device id (§5.2.1).
const DEVICE_TYPE: u16 = 2;
const QUEUE_SIZE: u16 = 256;
const REQUESTS: u32 = 0;
/// Requests per event.
const BUDGET: usize = 32;
/// Data descriptors per request that the driver is told to stay below.
const SEG_MAX: u32 = 254;

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

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    ring: Ring,
}

/// A disk.
pub struct Block {
    backend: Backend,
    limits: Limits,
    config: Arc<Config>,
    active: Option<Active>,
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
        if !block_size.is_power_of_two() || !(512..=4096).contains(&block_size) {
            return Err(BlockError::Blocks(block_size));
        }
        let mut padded = [0; SERIAL];
        padded
            .get_mut(..serial.len())
            .ok_or(BlockError::Serial(serial.len()))?
            .copy_from_slice(serial.as_bytes());
        let backend = Backend::new(file, padded);
        let sectors = backend.sectors().map_err(BlockError::Size)?;
        if sectors == 0 {
            return Err(BlockError::Empty);
        }
        Ok(Self {
            backend,
            limits: Limits { sectors, readonly },
            config: Arc::new(Config {
                capacity: AtomicU64::new(sectors),
                generation: AtomicU8::new(0),
                bytes: configuration(block_size),
            }),
            active: None,
        })
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut() else {
            return Ok(());
        };
        let memory = active.memory.memory();
        active.ring.disable_kick(&memory)?;
        active
            .ring
            .drain(&memory, &*active.interrupt, BUDGET, |chain| {
                let request =
                    Request::parse(chain, self.limits).map_err(|_| DeviceError::Guest {
                        device: NAME,
                        reason: "a request has no status byte".to_owned(),
                    })?;
                Ok(complete(&self.backend, request))
            })
            .map(drop)
    }
}

/// Runs a request and writes its status; the head of its chain and the bytes written.
fn complete(backend: &Backend, request: Request<'_>) -> (u16, u32) {
    let Request {
        head,
        operation,
        readable,
        writable,
        mut status,
    } = request;
    let (outcome, written) = match operation {
        Ok(operation) => backend.run(&operation, readable, writable),
        Err(status) => (status, 0),
    };
    status.copy_from(&[match outcome {
        Status::Ok => 0,
        Status::IoError => 1,
        Status::Unsupported => 2,
    }]);
    // Bounded by the largest request.
    (head, u32::try_from(written + 1).unwrap_or(1))
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
        let changes = if self.limits.readonly {
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
        self.active = Some(Active {
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
            self.serve()?;
        }
        Ok(())
    }

    fn refresh(&mut self) -> Result<(), DeviceError> {
        let host = |source| DeviceError::Host {
            device: NAME,
            source,
        };
        // One that is gone has no size: what the guest asks of it then fails by itself.
        let sectors = self.backend.sectors().unwrap_or(0);
        if sectors == self.limits.sectors {
            return Ok(());
        }
        self.limits.sectors = sectors;
        self.config.capacity.store(sectors, Ordering::SeqCst);
        self.config.generation.fetch_add(1, Ordering::SeqCst);
        match &self.active {
            Some(active) => active.interrupt.config().map_err(host),
            None => Ok(()),
        }
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        // Nothing is in flight: an operation has ended when `serve` returns.
        if let Some(active) = self.active.take() {
            active.ring.release(sources);
        }
    }
}
