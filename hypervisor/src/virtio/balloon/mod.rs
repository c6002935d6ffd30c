//! The memory balloon (virtio 1.3 §5.5), above all for free-page reporting: memory that the guest
//! has freed goes back to the host.
//!
//! The guest names the pages; only whole host pages inside its own RAM are ever given up, so all
//! it can lose is its own data. While a device pins guest memory, nothing is given up ([`Reclaim`]).

use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory as _, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::chain::Buffers;
use super::ring::Ring;
use super::{Activation, ConfigSpace, DeviceError, GuestMemory, Interrupt, Sources, VirtioDevice};
use crate::memory::is_writable;
use crate::reclaim::Reclaim;
use crate::reclaim::discard::Discarded;

const NAME: &str = "balloon";
/// Device id (§5.5.1).
const DEVICE_TYPE: u16 = 5;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM` (§5.5.3).
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const F_PAGE_REPORTING: u64 = 1 << 5;
/// Bytes of the configuration space: `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`.
const CONFIG: usize = 16;
/// A balloon page, whatever the host's page size is (§5.5.6).
const PAGE_SHIFT: u32 = 12;
/// Inflate, deflate, and where reporting may be: queue 4 by the specification (§5.5.2), queue 2 as
/// Linux counts, without those whose feature is not negotiated. Linux reports 32 ranges at a time
/// and refuses a shorter queue.
const QUEUE_SIZES: [u16; 5] = [128, 128, 32, 32, 32];
/// Chains per event.
const BUDGET: usize = 64;

const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    /// By token.
    rings: Vec<Ring>,
}

/// The balloon.
#[derive(Default)]
pub struct Balloon {
    active: Option<Active>,
    reclaim: Arc<Reclaim>,
}

impl Balloon {
    /// A balloon whose target is to stay empty: the guest inflates nothing unasked, and reports
    /// free pages.
    #[must_use]
    pub fn new(reclaim: Arc<Reclaim>) -> Self {
        Self {
            active: None,
            reclaim,
        }
    }

    fn serve(&mut self, token: u32) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut() else {
            return Ok(());
        };
        let Some(ring) = active.rings.get_mut(token as usize) else {
            return Ok(());
        };
        let memory = active.memory.memory();
        let reclaim = &self.reclaim;
        ring.drain(&memory, &*active.interrupt, BUDGET, |chain| {
            reclaim.give_up(|discarded| match token {
                INFLATE => inflate(&memory, discarded, chain.readable),
                // A page that left the balloon is filled when the guest touches it.
                DEFLATE => {}
                // Neither statistics nor hinting is offered: it is reporting.
                _ => chain
                    .writable
                    .slices()
                    .for_each(|slice| discarded.discard(slice)),
            });
            Ok((chain.head, 0))
        })
        .map(drop)
    }
}

/// Page numbers taken from one request; Linux sends 256.
const MAX_PAGES: usize = 4096;

/// Gives up the pages that a request names by number, runs of neighbours in one call. Numbers past
/// [`MAX_PAGES`] are left in place: a chain can name the same memory often enough to take hours.
fn inflate(memory: &GuestMemoryMmap, discarded: &mut Discarded, mut pages: Buffers<'_>) {
    let mut pages = pages.split_to(4 * MAX_PAGES);
    let mut run: Option<(u64, u64)> = None;
    while let Some(number) = pages.copy_array::<4>() {
        let page = u64::from(u32::from_le_bytes(number));
        match &mut run {
            Some((_, end)) if *end == page => *end += 1,
            _ => {
                if let Some(run) = run.replace((page, page + 1)) {
                    discard_pages(memory, discarded, run);
                }
            }
        }
    }
    if let Some(run) = run {
        discard_pages(memory, discarded, run);
    }
}

fn discard_pages(memory: &GuestMemoryMmap, discarded: &mut Discarded, (start, end): (u64, u64)) {
    // A page number has 32 bits, so neither can overflow.
    let length = usize::try_from((end - start) << PAGE_SHIFT).unwrap_or(0);
    // What is files of the node is not the guest's to give up.
    if !is_writable(memory, start << PAGE_SHIFT, length as u64) {
        return;
    }
    for slice in memory.get_slices(GuestAddress(start << PAGE_SHIFT), length) {
        match slice {
            Ok(slice) => discarded.discard(&slice),
            // Outside RAM; what was inside has been given up.
            Err(_) => return,
        }
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM
            | F_PAGE_REPORTING
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        // `num_pages` is 0; the driver's writes to `actual` tell us nothing we use.
        Arc::new(vec![0; CONFIG])
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let opened = activation.open::<2>(NAME, sources)?;
        let active = self.active.insert(Active {
            memory: opened.memory,
            interrupt: opened.interrupt,
            rings: opened.rings.into(),
        });
        for (token, queue) in (2u32..).zip(opened.others) {
            match Ring::new(queue, NAME, opened.features, token, sources) {
                Ok(ring) => active.rings.push(ring),
                Err(error) => {
                    self.deactivate(sources);
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
        _sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        self.serve(token)
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        if let Some(active) = self.active.take() {
            active
                .rings
                .into_iter()
                .for_each(|ring| ring.release(sources));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::pmem::files;
    use crate::virtio::testing::{Harness, RAM};
    use proptest::prelude::*;

    fn active() -> Harness<Balloon> {
        let mut harness = Harness::new(Balloon::default());
        let features = harness.device.features();
        harness.activate(features);
        harness
    }

    #[test]
    fn reported_pages_are_given_up_and_their_neighbours_kept() {
        for queue in [2, 4] {
            let mut balloon = active();
            let a = balloon.alloc(8 * 4096);
            balloon.write(a, &[7; 8 * 4096]);
            balloon.queues[queue].add(&[(a + 4096, 2 * 4096, true), (a + 5 * 4096, 4096, true)]);
            balloon.run();
            assert_eq!(balloon.queues[queue].used().len(), 1);
            let bytes = balloon.read(a, 8 * 4096);
            let kept: Vec<bool> = bytes.chunks(4096).map(|page| page[0] == 7).collect();
            let all_or_nothing = bytes
                .chunks(4096)
                .all(|page| page.iter().all(|byte| *byte == page[0]));
            assert!(all_or_nothing);
            assert_eq!(kept, [true, false, false, true, true, false, true, true]);
            assert_eq!(balloon.device.reclaim.given_up(), 3 * 4096);
        }
    }

    #[test]
    fn files_that_are_memory_are_not_given_up() {
        const FILES: u64 = 1 << 32;
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let (region, _files) = files::map(FILES, vec![(file.into(), 4096)]).unwrap();
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        let memory = ram.insert_region(Arc::new(region)).unwrap();
        let mut discarded = Discarded::default();
        let first = FILES >> PAGE_SHIFT;
        for pages in [(first, first + 1), (first + 2, first + 3), (0, first + 3)] {
            discard_pages(&memory, &mut discarded, pages);
            assert_eq!(discarded.bytes(), 0, "{pages:?}");
        }
        discard_pages(&memory, &mut discarded, (1, 3));
        assert_eq!(discarded.bytes(), 2 * 4096);
    }

    #[test]
    fn a_request_of_more_numbers_than_the_limit_is_cut_there() {
        let mut balloon = active();
        let a = balloon.alloc(2 * 4096);
        balloon.write(a, &[7; 2 * 4096]);
        let bytes = 4 * (MAX_PAGES + 1);
        let list = balloon.alloc(u64::try_from(bytes).unwrap());
        let (first, last) = (u32::try_from(a >> 12).unwrap(), 4 * MAX_PAGES);
        let mut numbers = vec![0xff; bytes];
        numbers[..4].copy_from_slice(&first.to_le_bytes());
        numbers[last..].copy_from_slice(&(first + 1).to_le_bytes());
        balloon.write(list, &numbers);
        balloon.queues[0].add(&[(list, u32::try_from(bytes).unwrap(), false)]);
        balloon.run();
        assert_eq!(balloon.queues[0].used().len(), 1);
        assert_eq!(balloon.read(a, 1), [0]);
        assert_eq!(balloon.read(a + 4096, 1), [7]);
    }

    #[test]
    fn linux_can_report_a_full_list() {
        for queue in [2, 4] {
            let mut balloon = active();
            let a = balloon.alloc(32 * 8192);
            balloon.write(a, &[7; 32 * 8192]);
            let parts: Vec<_> = (0..32).map(|i| (a + i * 8192, 4096, true)).collect();
            balloon.queues[queue].add(&parts);
            balloon.run();
            let bytes = balloon.read(a, 32 * 8192);
            let kept = bytes.chunks(4096).filter(|page| page[0] == 7).count();
            assert_eq!(kept, 32);
        }
    }

    #[test]
    fn parts_of_a_page_are_kept() {
        let mut balloon = active();
        let a = balloon.alloc(3 * 4096);
        balloon.write(a, &[7; 3 * 4096]);
        balloon.queues[4].add(&[(a + 1, 2 * 4096, true), (a + 8200, 100, true)]);
        balloon.run();
        let bytes = balloon.read(a, 3 * 4096);
        assert_eq!(bytes[..4096], [7; 4096]);
        assert_eq!(bytes[4096..8192], [0; 4096]);
        assert_eq!(bytes[8192..], [7; 4096]);
    }

    #[test]
    fn inflated_pages_are_given_up_and_usable_after_deflation() {
        let mut balloon = active();
        let a = balloon.alloc(8 * 4096);
        let list = balloon.alloc(4096);
        balloon.write(a, &[7; 8 * 4096]);
        let first = u32::try_from(a >> 12).unwrap();
        let outside = u32::try_from(RAM >> 12).unwrap();
        let mut numbers = Vec::new();
        for page in [first, first + 1, first + 4, outside, u32::MAX, first + 7] {
            numbers.extend(page.to_le_bytes());
        }
        balloon.write(list, &numbers);
        balloon.queues[0].add(&[(list, 10, false), (list + 10, 15, false)]);
        balloon.run();
        let kept = |balloon: &Harness<Balloon>| -> Vec<bool> {
            let bytes = balloon.read(a, 8 * 4096);
            bytes.chunks(4096).map(|page| page[0] == 7).collect()
        };
        // Numbers may span descriptors, and the byte that is too many is no number.
        assert_eq!(
            kept(&balloon),
            [false, false, true, true, false, true, true, false]
        );
        balloon.queues[1].add(&[(list, 24, false)]);
        balloon.run();
        assert_eq!(balloon.queues[1].used().len(), 1);
        balloon.write(a, &[7; 8 * 4096]);
        assert_eq!(kept(&balloon), [true; 8]);
    }

    #[test]
    fn readable_buffers_are_not_given_up_by_a_report() {
        let mut balloon = active();
        let a = balloon.alloc(4096);
        balloon.write(a, &[7; 4096]);
        balloon.queues[4].add(&[(a, 4096, false)]);
        balloon.run();
        assert_eq!(balloon.read(a, 4096), [7; 4096]);
    }

    proptest! {
        #[test]
        fn any_descriptors_are_survived(
            queue in 0usize..5,
            table in prop::collection::vec(crate::virtio::testing::any_descriptor(20), 1..8),
            heads in prop::collection::vec(0u16..20, 1..6),
        ) {
            let mut balloon = active();
            balloon.raw_chains(queue, &table, &heads);
            let _ = balloon.try_run();
        }
    }
}
