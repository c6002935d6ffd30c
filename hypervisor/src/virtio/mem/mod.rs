//! The memory device (virtio 1.3 §5.15): memory that the guest takes and gives back, block by block, while it runs.
//!
//! The guest names the blocks, and can lie about them only to its own harm: it has the usable part of the region, which
//! the host has mapped for it, and no more of it counts as plugged than was requested. A block that is given back is
//! the host's again at once. While a device of the node pins the guest's memory nothing comes and nothing goes.

mod blocks;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

pub use self::blocks::BLOCK;
use self::blocks::{Blocks, RangeState, Refusal};
use super::chain::Buffers;
use super::request_queue::RequestQueue;
use super::{Activation, ConfigSpace, DeviceError, Sources, VirtioDevice};
use crate::reclaim::Reclaim;
use crate::sync::lock;

const NAME: &str = "mem";
/// Device id (§5.15.1).
const DEVICE_TYPE: u16 = 24;
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` (§5.15.3): the guest leaves alone what it has not plugged.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// Linux sends one request at a time.
const QUEUE_SIZE: u16 = 16;
/// Requests per event.
const BUDGET: usize = 16;

/// Requests (§5.15.6): a type, and but for the third an address and a number of blocks.
mod request {
    pub(super) const SIZE: usize = 24;
    pub(super) const PLUG: u16 = 0;
    pub(super) const UNPLUG: u16 = 1;
    pub(super) const UNPLUG_ALL: u16 = 2;
    pub(super) const STATE: u16 = 3;
}

/// Answers: a type, padding, and a state.
mod response {
    pub(super) const ACK: u16 = 0;
    pub(super) const NACK: u16 = 1;
    pub(super) const BUSY: u16 = 2;
    pub(super) const ERROR: u16 = 3;
}

/// What the device, its configuration space and the main thread share.
#[derive(Debug)]
struct Shared {
    blocks: Mutex<Blocks>,
}

/// The main thread's end of the device.
#[derive(Clone, Debug)]
pub struct MemHandle(Arc<Shared>);

impl MemHandle {
    /// What the guest should have of the region, in bytes, and how much of it is there for it to plug. Both are
    /// multiples of [`BLOCK`]. The driver is to be told of the change.
    pub fn request(&self, bytes: u64, usable: u64) {
        lock(&self.0.blocks).request(bytes, usable);
    }

    /// Bytes that the guest has.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        lock(&self.0.blocks).plugged()
    }

    /// Where they are.
    #[must_use]
    pub fn runs(&self) -> Vec<Range<u64>> {
        lock(&self.0.blocks).runs()
    }
}

/// The device.
pub struct Mem {
    shared: Arc<Shared>,
    reclaim: Arc<Reclaim>,
    requests: RequestQueue,
}

impl Mem {
    /// A device for `region`, of which nothing is usable yet.
    #[must_use]
    pub fn new(region: Range<u64>, reclaim: Arc<Reclaim>) -> (Self, MemHandle) {
        let shared = Arc::new(Shared {
            blocks: Mutex::new(Blocks::new(region)),
        });
        let device = Self {
            shared: Arc::clone(&shared),
            reclaim,
            requests: RequestQueue::default(),
        };
        (device, MemHandle(shared))
    }
}

/// Carries one request out.
fn answer(
    shared: &Shared,
    reclaim: &Reclaim,
    memory: &GuestMemoryMmap,
    asked: &mut Buffers<'_>,
) -> [u8; 10] {
    let mut answer = [0; 10];
    let (kind, state) = match asked.copy_array::<{ request::SIZE }>() {
        Some(bytes) => carry_out(shared, reclaim, memory, &bytes),
        None => (response::ERROR, 0),
    };
    answer[..2].copy_from_slice(&kind.to_le_bytes());
    answer[8..].copy_from_slice(&state.to_le_bytes());
    answer
}

fn carry_out(
    shared: &Shared,
    reclaim: &Reclaim,
    memory: &GuestMemoryMmap,
    asked: &[u8; request::SIZE],
) -> (u16, u16) {
    let [t0, t1, _, _, _, _, _, _, a @ .., c0, c1, _, _, _, _, _, _] = asked;
    let (kind, count) = (
        u16::from_le_bytes([*t0, *t1]),
        u16::from_le_bytes([*c0, *c1]),
    );
    let address = u64::from_le_bytes(*a);
    let change = |work: &dyn Fn(&mut Blocks) -> Result<Range<u64>, Refusal>| {
        // Over the whole of it: what is pinned meanwhile would be neither there for the device nor gone.
        let changed = reclaim.give_up(|discarded| {
            let gone = work(&mut lock(&shared.blocks))?;
            let length = usize::try_from(gone.end - gone.start).unwrap_or(0);
            for slice in memory
                .get_slices(GuestAddress(gone.start), length)
                .flatten()
            {
                discarded.discard(&slice);
            }
            Ok(())
        });
        match changed {
            None => response::BUSY,
            Some(Ok(())) => response::ACK,
            Some(Err(Refusal::TooMuch)) => response::NACK,
            Some(Err(Refusal::Wrong)) => response::ERROR,
        }
    };
    match kind {
        request::PLUG => (
            change(&|blocks| blocks.plug(address, count).map(|()| 0..0)),
            0,
        ),
        request::UNPLUG => (change(&|blocks| blocks.unplug(address, count)), 0),
        request::UNPLUG_ALL => (change(&|blocks| Ok(blocks.unplug_all())), 0),
        request::STATE => match lock(&shared.blocks).state(address, count) {
            Ok(RangeState::Plugged) => (response::ACK, 0),
            Ok(RangeState::Unplugged) => (response::ACK, 1),
            Ok(RangeState::Mixed) => (response::ACK, 2),
            Err(_) => (response::ERROR, 0),
        },
        _ => (response::ERROR, 0),
    }
}

/// §5.15.4.
impl ConfigSpace for Shared {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0u8; 56];
        {
            let blocks = lock(&self.blocks);
            let region = blocks.region();
            // `node_id` counts with a feature that is not offered.
            for (at, value) in [
                (0, BLOCK),
                (16, region.start),
                (24, region.end - region.start),
                (32, blocks.usable()),
                (40, blocks.plugged()),
                (48, blocks.requested()),
            ] {
                space[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        space.to_vec().read(offset, data);
    }

    fn generation(&self) -> u8 {
        lock(&self.blocks).changes()
    }
}

impl VirtioDevice for Mem {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        self.shared.clone()
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
        let (shared, reclaim) = (&self.shared, &self.reclaim);
        self.requests.serve(token, BUDGET, |memory, mut chain| {
            let answer = answer(shared, reclaim, memory, &mut chain.readable);
            let written = chain.writable.copy_from(&answer);
            Ok(u32::try_from(written).unwrap_or(0))
        })
    }

    /// What is plugged stays so (§5.15.6.2).
    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        self.requests.close(sources);
    }
}

#[cfg(test)]
mod tests;
