//! A disk that is guest memory (virtio 1.3 §5.19): the files of an image's layers, which the guest reads where they lie.
//!
//! The device itself only says where that memory is. It is read-only, so a flush has nothing to write and reaches no file:
//! it is answered, and that is all. Trusts nothing of the guest. What is mapped is [`files`].

pub mod files;

use std::ops::Range;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vmm_sys_util::epoll::EventSet;

use super::chain::Chain;
use super::request_queue::RequestQueue;
use super::{Activation, ConfigSpace, DeviceError, Sources, VirtioDevice};

const NAME: &str = "pmem";
/// Device id (§5.19.1).
const DEVICE_TYPE: u16 = 27;
const QUEUE_SIZE: u16 = 16;
/// Requests per event.
const BUDGET: usize = 16;
/// The one type of request (§5.19.6).
const FLUSH: u32 = 0;
/// What is answered (§5.19.7.1).
const DONE: u32 = 0;
const FAILED: u32 = 1;

/// The device.
pub struct Pmem {
    /// Guest-physical addresses.
    range: Range<u64>,
    requests: RequestQueue,
}

impl Pmem {
    /// A device for memory that the guest has at `range`.
    #[must_use]
    pub fn new(range: Range<u64>) -> Self {
        Self {
            range,
            requests: RequestQueue::default(),
        }
    }
}

/// Answers one request; the bytes that were written of the answer.
fn answer(chain: &mut Chain<'_>) -> u32 {
    let asked = chain.readable.copy_array().map(u32::from_le_bytes);
    let answer = if asked == Some(FLUSH) { DONE } else { FAILED };
    let written = chain.writable.copy_from(&answer.to_le_bytes());
    // At most four.
    u32::try_from(written).unwrap_or(0)
}

impl VirtioDevice for Pmem {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    /// §5.19.4: `start` and `size`.
    fn config(&self) -> Arc<dyn ConfigSpace> {
        let size = self.range.end - self.range.start;
        Arc::new([self.range.start.to_le_bytes(), size.to_le_bytes()].concat())
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        self.requests.open(NAME, activation, sources)
    }

    fn process(
        &mut self,
        token: u32,
        _events: EventSet,
        _sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        self.requests
            .serve(token, BUDGET, |_, mut chain| Ok(answer(&mut chain)))
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        self.requests.close(sources);
    }
}

#[cfg(test)]
mod tests;
