//! How a device behind the PCI transport interrupts its driver: MSI-X only, there is no INTx.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::super::Interrupt;
use super::super::counts::DeviceCounts;
use crate::pci::msix::Msix;

/// VIRTIO_MSI_NO_VECTOR.
pub const NO_VECTOR: u16 = 0xffff;
/// The configuration bit of the interrupt status.
const ISR_CONFIG: u8 = 2;

/// The interrupts of one device. Shared by its transport and its worker; takes no lock of the
/// transport, which may be waiting for the worker.
pub struct VirtioInterrupt {
    msix: Msix,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    needs_reset: AtomicBool,
    counts: Arc<DeviceCounts>,
}

impl VirtioInterrupt {
    /// For a device with `queues` queues.
    #[must_use]
    pub fn new(msix: Msix, queues: usize) -> Self {
        Self {
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            counts: Arc::new(DeviceCounts::new(queues)),
        }
    }

    /// What the device's queues carry, over all its activations.
    #[must_use]
    pub fn counts(&self) -> &Arc<DeviceCounts> {
        &self.counts
    }

    /// The function's MSI-X state.
    #[must_use]
    pub fn msix(&self) -> &Msix {
        &self.msix
    }

    /// Sets the vector of a queue, at activation.
    pub fn set_queue_vector(&self, index: usize, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(index) {
            slot.store(vector, Ordering::Release);
        }
    }

    /// Sets the vector of configuration changes, at activation.
    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(vector, Ordering::Release);
    }

    /// DEVICE_NEEDS_RESET is set.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Sets DEVICE_NEEDS_RESET and tells the driver (virtio 1.3 §2.1.2).
    pub fn fail(&self) {
        self.needs_reset.store(true, Ordering::Release);
        // A driver that cannot be interrupted will read the status when it next looks.
        let _ = self.config();
    }

    /// Back to the state before activation.
    pub fn reset(&self) {
        self.set_config_vector(NO_VECTOR);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.msix.take_back();
        self.isr.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    fn vector_of(&self, index: u16) -> u16 {
        let vector = self.queue_vectors.get(usize::from(index));
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// Reads and clears the interrupt status.
    #[must_use]
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }
}

impl Interrupt for VirtioInterrupt {
    fn queue(&self, index: u16) -> io::Result<()> {
        match self.vector_of(index) {
            NO_VECTOR => Ok(()),
            vector => self.msix.trigger(vector),
        }
    }

    fn event(&self, index: u16) -> io::Result<Option<EventFd>> {
        match self.vector_of(index) {
            NO_VECTOR => Ok(None),
            vector => self.msix.lend(vector),
        }
    }

    fn config(&self) -> io::Result<()> {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        match self.config_vector.load(Ordering::Acquire) {
            NO_VECTOR => Ok(()),
            vector => self.msix.trigger(vector),
        }
    }
}
