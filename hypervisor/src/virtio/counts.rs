//! What a device's queues have carried, for [`crate::control::Counters`].
//!
//! Counted where a chain, an interrupt or an event is handled anyhow, without a locked instruction: a queue is one
//! thread's at a time, and so is its device's wake-up. The main thread reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that one thread at a time raises.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// One more.
    pub fn raise(&self) {
        self.0.store(self.get().wrapping_add(1), Ordering::Relaxed);
    }

    /// How many.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One queue.
#[derive(Debug, Default)]
pub struct QueueCounts {
    /// Chains that the device has given back.
    pub chains: Count,
    /// Interrupts that the driver wanted for it.
    pub interrupts: Count,
}

/// One device.
#[derive(Debug, Default)]
pub struct DeviceCounts {
    /// Events that woke its thread: kicks of the guest, frames for it, ends of I/O.
    pub wakeups: Count,
    /// By index.
    queues: Vec<Arc<QueueCounts>>,
}

impl DeviceCounts {
    /// For a device with so many queues.
    #[must_use]
    pub fn new(queues: usize) -> Self {
        Self {
            wakeups: Count::default(),
            queues: (0..queues).map(|_| Arc::default()).collect(),
        }
    }

    /// Those of a queue; of one that the device has not, nobody sees them.
    #[must_use]
    pub fn queue(&self, index: u16) -> Arc<QueueCounts> {
        let queue = self.queues.get(usize::from(index));
        queue.cloned().unwrap_or_default()
    }

    /// Of each queue its chains and its interrupts.
    #[must_use]
    pub fn of_queues(&self) -> Vec<(u64, u64)> {
        let queues = self.queues.iter();
        queues
            .map(|queue| (queue.chains.get(), queue.interrupts.get()))
            .collect()
    }
}
