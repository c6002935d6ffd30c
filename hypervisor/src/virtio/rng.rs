//! The entropy device (virtio 1.3 §5.4): the host kernel's random bytes for the guest's pool.
//!
//! Trusts nothing of the guest; the lengths it asks for are cut, which §5.4.6 allows.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vmm_sys_util::epoll::EventSet;

use super::chain::Buffers;
use super::request_queue::RequestQueue;
use super::{Activation, ConfigSpace, DeviceError, Sources, VirtioDevice};

const NAME: &str = "rng";
/// Device id (§5.4.1).
const DEVICE_TYPE: u16 = 4;
const QUEUE_SIZE: u16 = 16;
/// The most bytes one request gets.
const MAX_REQUEST: usize = 64 * 1024;
/// Requests per event.
const BUDGET: usize = 8;

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    requests: RequestQueue,
}

impl Rng {
    /// An entropy device fed by `getrandom`.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

/// Puts random bytes into a request's buffers, at most [`MAX_REQUEST`]; returns their number.
fn fill(buffers: &mut Buffers<'_>) -> std::io::Result<u32> {
    let mut pool = [0u8; 4096];
    let mut left = buffers.len().min(MAX_REQUEST);
    let mut written = 0;
    while left > 0 {
        let part = &mut pool[..left.min(4096)];
        // Without flags it blocks only before the host's pool is ready, early in the host's boot.
        let count = match rustix::rand::getrandom(&mut *part, rustix::rand::GetRandomFlags::empty())
        {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        let copied = buffers.copy_from(&part[..count]);
        left -= copied;
        written += copied;
    }
    // At most MAX_REQUEST.
    Ok(u32::try_from(written).unwrap_or(0))
}

impl VirtioDevice for Rng {
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

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(Vec::new())
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
        self.requests.serve(token, BUDGET, |_, mut chain| {
            fill(&mut chain.writable).map_err(|source| DeviceError::Host {
                device: NAME,
                source,
            })
        })
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        self.requests.close(sources);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Harness;
    use proptest::prelude::{prop, proptest};

    fn active() -> Harness<Rng> {
        let mut harness = Harness::new(Rng::new());
        let features = harness.device.features();
        harness.activate(features);
        harness
    }

    #[test]
    fn a_request_is_filled_with_random_bytes() {
        let mut rng = active();
        let a = rng.alloc(4096);
        rng.queues[0].add(&[(a, 100, true), (a + 200, 100, true)]);
        rng.run();
        assert_eq!(rng.queues[0].used()[0].1, 200);
        let first = rng.read(a, 300);
        assert_ne!(first[..100], [0; 100]);
        assert_eq!(first[100..200], [0; 100], "between the buffers");
        assert_ne!(first[200..], [0; 100]);
        rng.queues[0].add(&[(a, 100, true)]);
        rng.run();
        assert_ne!(rng.read(a, 100), first[..100], "the same bytes twice");
    }

    #[test]
    fn a_large_request_is_cut() {
        let mut rng = active();
        let a = rng.alloc(1 << 20);
        rng.queues[0].add(&[(a, 1 << 20, true)]);
        rng.run();
        assert_eq!(rng.queues[0].used()[0].1, 64 * 1024);
    }

    #[test]
    fn more_requests_than_one_event_serves_are_all_served() {
        let mut rng = active();
        let a = rng.alloc(4096);
        for _ in 0..16 {
            rng.queues[0].add(&[(a, 16, true)]);
        }
        rng.run();
        assert_eq!(rng.queues[0].used().len(), 16);
    }

    #[test]
    fn readable_memory_is_not_written() {
        let mut rng = active();
        let a = rng.alloc(4096);
        rng.queues[0].add(&[(a, 64, false), (a + 64, 8, true)]);
        rng.run();
        assert_eq!(rng.queues[0].used()[0].1, 8);
        assert_eq!(rng.read(a, 64), [0; 64]);
    }

    #[test]
    fn a_reset_device_waits_for_nothing_and_can_be_activated_again() {
        let mut rng = active();
        rng.deactivate();
        rng.queues[0].kick();
        assert_eq!(rng.step(0).unwrap(), 0);
        rng.activate(0);
        let a = rng.alloc(4096);
        rng.queues[0].add(&[(a, 64, true)]);
        rng.run();
        assert_eq!(rng.queues[0].used().len(), 1);
        assert_eq!(rng.interrupts.of(0), 1);
    }

    proptest! {
        #[test]
        fn any_descriptors_are_survived(
            table in prop::collection::vec(crate::virtio::testing::any_descriptor(18), 1..8),
            heads in prop::collection::vec(0u16..20, 1..6),
        ) {
            let mut rng = active();
            rng.raw_chains(0, &table, &heads);
            let _ = rng.try_run();
        }
    }
}
