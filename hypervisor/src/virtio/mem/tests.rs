//! The memory device against drivers that follow the rules and drivers that do not.

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddressSpace as _};

use super::*;
use crate::virtio::testing::Harness;

/// Above all that the harness uses for rings and requests.
const REGION: Range<u64> = 12 << 20..4 << 30;
/// What of it is memory.
const THERE: u64 = 4 << 20;

struct Driver {
    harness: Harness<Mem>,
    handle: MemHandle,
    reclaim: Arc<Reclaim>,
}

impl Driver {
    fn new(requested: u64) -> Self {
        let reclaim = Arc::new(Reclaim::default());
        let (device, handle) = Mem::new(REGION, Arc::clone(&reclaim));
        let mut harness = Harness::new(device);
        let features = harness.device.features();
        harness.activate(features);
        handle.request(requested * BLOCK, THERE);
        Self {
            harness,
            handle,
            reclaim,
        }
    }

    fn send(&mut self, bytes: &[u8]) -> (u16, u16) {
        let at = self.harness.alloc(4096);
        self.harness.write(at, bytes);
        let length = u32::try_from(bytes.len()).unwrap();
        self.harness.queues[0].add(&[(at, length, false), (at + 2048, 10, true)]);
        self.harness.run();
        assert_eq!(self.harness.queues[0].used()[0].1, 10);
        let answer = self.harness.read(at + 2048, 10);
        (
            u16::from_le_bytes([answer[0], answer[1]]),
            u16::from_le_bytes([answer[8], answer[9]]),
        )
    }

    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let mut bytes = [0xee; request::SIZE];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        self.send(&bytes)
    }

    fn config(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.harness.device.config().read(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

#[test]
fn a_driver_takes_blocks_and_what_it_gives_back_is_zero_when_it_takes_it_again() {
    let mut driver = Driver::new(2);
    assert_eq!(
        [0, 16, 24, 32, 40, 48].map(|at| driver.config(at)),
        [
            BLOCK,
            REGION.start,
            REGION.end - REGION.start,
            THERE,
            0,
            2 * BLOCK
        ]
    );
    assert_eq!(
        driver.ask(request::STATE, REGION.start, 2),
        (response::ACK, 1)
    );
    assert_eq!(driver.ask(request::PLUG, REGION.start, 2).0, response::ACK);
    assert_eq!(
        driver.ask(request::STATE, REGION.start, 2),
        (response::ACK, 0)
    );
    assert_eq!(
        (driver.handle.plugged(), driver.config(40)),
        (2 * BLOCK, 2 * BLOCK)
    );
    driver.harness.write(REGION.start, &[7; 100]);
    driver.harness.write(REGION.start + BLOCK, &[8; 100]);
    assert_eq!(
        driver.ask(request::UNPLUG, REGION.start, 1).0,
        response::ACK
    );
    assert_eq!(
        driver.ask(request::STATE, REGION.start, 2),
        (response::ACK, 2)
    );
    assert_eq!(driver.harness.read(REGION.start, 100), [0; 100]);
    assert_eq!(driver.harness.read(REGION.start + BLOCK, 100), [8; 100]);
    assert_eq!(
        driver.ask(request::UNPLUG_ALL, u64::MAX, 9).0,
        response::ACK
    );
    assert_eq!(driver.harness.read(REGION.start + BLOCK, 100), [0; 100]);
    assert_eq!(driver.handle.plugged(), 0);
}

#[test]
fn what_breaks_the_rules_is_answered_and_changes_nothing() {
    let mut driver = Driver::new(1);
    let wrong = response::ERROR;
    for (kind, address, count, expected) in [
        (request::PLUG, REGION.start, 2, response::NACK),
        (request::PLUG, REGION.start + 1, 1, wrong),
        (request::PLUG, REGION.start + THERE, 1, wrong),
        (request::PLUG, !(BLOCK - 1), u16::MAX, wrong),
        (request::PLUG, 2 << 20, 1, wrong),
        (request::UNPLUG, REGION.start, 1, wrong),
        (request::STATE, REGION.start, 0, wrong),
        (9, REGION.start, 1, wrong),
    ] {
        assert_eq!(
            driver.ask(kind, address, count).0,
            expected,
            "{kind} {address:#x} {count}"
        );
    }
    assert_eq!(driver.send(&[0; 23]), (wrong, 0));
    assert_eq!(driver.handle.plugged(), 0);
}

#[test]
fn while_memory_is_pinned_nothing_comes_or_goes() {
    let mut driver = Driver::new(2);
    assert_eq!(driver.ask(request::PLUG, REGION.start, 1).0, response::ACK);
    driver.harness.write(REGION.start, &[7; 100]);
    let pinned = driver.reclaim.pin();
    for kind in [request::PLUG, request::UNPLUG, request::UNPLUG_ALL] {
        let at = REGION.start + if kind == request::PLUG { BLOCK } else { 0 };
        assert_eq!(driver.ask(kind, at, 1).0, response::BUSY);
    }
    assert_eq!(driver.harness.read(REGION.start, 100), [7; 100]);
    drop(pinned);
    assert_eq!(
        driver.ask(request::UNPLUG, REGION.start, 1).0,
        response::ACK
    );
}

#[test]
fn a_reset_takes_nothing_from_the_guest() {
    let mut driver = Driver::new(2);
    assert_eq!(driver.ask(request::PLUG, REGION.start, 2).0, response::ACK);
    driver.harness.deactivate();
    driver.harness.activate(0);
    assert_eq!(
        driver.ask(request::STATE, REGION.start, 2),
        (response::ACK, 0)
    );
}

#[test]
fn configuration_space_ends_where_it_ends() {
    let driver = Driver::new(1);
    let mut bytes = [9; 16];
    driver.harness.device.config().read(52, &mut bytes);
    assert_eq!(bytes[4..], [0; 12]);
    driver.harness.device.config().read(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 16]);
}

proptest! {
    #[test]
    fn no_request_reaches_memory_outside_the_region(
        requests in prop::collection::vec(
            (0u16..5, prop_oneof![any::<u64>(), (0u64..4).prop_map(|n| REGION.start + n * BLOCK)], any::<u16>()), 1..12
        )
    ) {
        let mut driver = Driver::new(2);
        let guard = driver.harness.alloc(4096);
        driver.harness.write(guard, &[5; 4096]);
        for (kind, address, count) in requests {
            driver.ask(kind, address, count % 4);
        }
        prop_assert_eq!(driver.harness.read(guard, 4096), vec![5; 4096]);
        prop_assert!(driver.handle.plugged() <= 2 * BLOCK);
    }

    #[test]
    fn any_descriptors_are_survived(
        table in prop::collection::vec(crate::virtio::testing::any_descriptor(18), 1..8),
        heads in prop::collection::vec(0u16..20, 1..6),
    ) {
        let mut driver = Driver::new(2);
        driver.harness.raw_chains(0, &table, &heads);
        let _ = driver.harness.try_run();
        prop_assert!(driver.handle.plugged() <= 2 * BLOCK);
        // The rings still are memory.
        let _ = driver.harness.memory.memory().read_obj::<u64>(GuestAddress(0));
    }
}
