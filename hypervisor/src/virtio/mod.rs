//! What a virtio device is to the rest of the VMM (virtio 1.3 §2).
//!
//! A device is a queue handler: it knows neither PCI nor KVM. The transport negotiates features and
//! queue addresses, then hands the queues to the device on its worker thread ([`worker`]); from then
//! on nothing in the transport changes them until a reset has taken them back (CVE-2026-5747).
//! Everything a device reads from guest memory is hostile.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod counts;
pub mod fs;
pub mod helpers;
pub mod mem;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod request_queue;
pub mod ring;
pub mod rng;
#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
pub mod vsock;
pub mod worker;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use self::counts::QueueCounts;

/// Guest RAM as every device sees it; `memory()` takes a snapshot that outlives a hotplug.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// How a device tells the driver (virtio 1.3 §2.3, §4.1.5.3). Implemented by the transport.
pub trait Interrupt: Send + Sync {
    /// Used-buffer notification of a queue. The device has checked that the driver wants it.
    ///
    /// # Errors
    /// If the event could not be signalled.
    fn queue(&self, index: u16) -> io::Result<()>;
    /// The event of a queue's notification, for the node's kernel to signal; none if the driver wants none. It is good until
    /// the device is reset, before which nobody may be left who signals it.
    ///
    /// # Errors
    /// If there is none to be had.
    fn event(&self, index: u16) -> io::Result<Option<EventFd>>;
    /// Configuration change notification.
    ///
    /// # Errors
    /// If the event could not be signalled.
    fn config(&self) -> io::Result<()>;
}

/// A device's configuration space (virtio 1.3 §2.5). Read and written from CPU threads.
pub trait ConfigSpace: Send + Sync {
    /// Fills `data` from `offset`; bytes beyond the space read as zero.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes a driver write; a device without writable fields ignores it.
    fn write(&self, _offset: u64, _data: &[u8]) {}
    /// Another number after each change that the device made (§4.1.4.3.1).
    fn generation(&self) -> u8 {
        0
    }
}

/// A read-only configuration space.
impl ConfigSpace for Vec<u8> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(tail) = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..))
        {
            let length = tail.len().min(data.len());
            data[..length].copy_from_slice(&tail[..length]);
        }
    }
}

/// One queue as the driver configured it, owned by the device until reset.
pub struct ActiveQueue {
    /// Its index in the device.
    pub index: u16,
    /// Valid: ready, its rings inside guest memory.
    pub queue: Queue,
    /// Signalled when the driver notifies the queue.
    pub kick: EventFd,
    /// What it carries.
    pub counts: Arc<QueueCounts>,
}

/// What a device gets when the driver has set DRIVER_OK.
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// Features both sides accepted.
    pub features: u64,
    /// The queues the driver enabled.
    pub queues: Vec<ActiveQueue>,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A guest or the host made a device unusable; the transport sets DEVICE_NEEDS_RESET
/// (virtio 1.3 §2.1.2) and the VM goes on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the rules: a bad descriptor, a loop, a length that wraps.
    #[error("the guest broke the rules of {device}: {reason}")]
    Guest {
        /// Name of the device.
        device: &'static str,
        /// What was wrong.
        reason: String,
    },
    /// The host failed.
    #[error("{device}: {source}")]
    Host {
        /// Name of the device.
        device: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// A virtio device. Built on the main thread, then moved to a worker thread for its life.
pub trait VirtioDevice: Send {
    /// For logs: "vsock", "fs"…
    fn name(&self) -> &'static str;
    /// Device id of virtio 1.3 §5.
    fn device_type(&self) -> u16;
    /// Offered features, device-specific and ring ones; the transport adds VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;
    /// The largest size of each queue, powers of two.
    fn queue_sizes(&self) -> Vec<u16>;
    /// The configuration space, shared with the transport.
    fn config(&self) -> Arc<dyn ConfigSpace>;
    /// Whether somebody else knows the guest's memory, who must hear of more of it before the guest does: see [`Self::refresh`].
    fn follows_memory(&self) -> bool {
        false
    }
    /// Takes the queues and registers what it waits for (each queue's kick at least).
    ///
    /// # Errors
    /// If the device cannot run with them.
    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError>;
    /// Something registered under `token` is ready. Must not block and must bound its work: it is
    /// called again while more is ready.
    ///
    /// # Errors
    /// If the device cannot go on until it is reset.
    fn process(
        &mut self,
        token: u32,
        events: EventSet,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError>;
    /// What has been put off is done when nothing has happened for this long. None: there is nothing.
    fn puts_off(&self) -> Option<Duration> {
        None
    }
    /// Nothing has happened for as long as [`Self::puts_off`] said.
    ///
    /// # Errors
    /// As those of [`Self::process`].
    fn catch_up(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Looks again at what the device stands on: it may have another size, as the guest's memory may.
    ///
    /// # Errors
    /// As those of [`Self::process`].
    fn refresh(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Gives the queues up: in-flight I/O is drained, no guest memory is touched afterwards, every
    /// source is removed. The device can be activated again.
    fn deactivate(&mut self, sources: &mut Sources<'_>);
}

/// The part of a worker's epoll set that belongs to one device.
pub struct Sources<'a> {
    epoll: &'a Epoll,
    slot: u32,
}

impl<'a> Sources<'a> {
    /// The sources of the device in `slot`.
    #[must_use]
    pub fn new(epoll: &'a Epoll, slot: u32) -> Self {
        Self { epoll, slot }
    }

    fn event(&self, token: u32, events: EventSet) -> EpollEvent {
        EpollEvent::new(events, (u64::from(self.slot) << 32) | u64::from(token))
    }

    /// Waits for `events` on `fd`; `process` gets `token`.
    ///
    /// # Errors
    /// What `epoll_ctl` says: `EPERM` for a regular file, which is always ready.
    pub fn add(&mut self, fd: BorrowedFd<'_>, token: u32, events: EventSet) -> io::Result<()> {
        self.control(
            ControlOperation::Add,
            fd.as_raw_fd(),
            self.event(token, events),
        )
    }

    /// Changes what is waited for; an empty set keeps the fd registered but silent.
    ///
    /// # Errors
    /// What `epoll_ctl` says.
    pub fn modify(&mut self, fd: BorrowedFd<'_>, token: u32, events: EventSet) -> io::Result<()> {
        self.control(
            ControlOperation::Modify,
            fd.as_raw_fd(),
            self.event(token, events),
        )
    }

    /// Stops waiting. To be called before the descriptor is closed.
    ///
    /// # Errors
    /// What `epoll_ctl` says.
    pub fn remove(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.control(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            EpollEvent::default(),
        )
    }

    fn control(&self, operation: ControlOperation, fd: RawFd, event: EpollEvent) -> io::Result<()> {
        self.epoll.ctl(operation, fd, event)
    }
}
