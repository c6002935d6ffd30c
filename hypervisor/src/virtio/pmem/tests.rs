//! The device against drivers that follow the rules and drivers that do not.

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::{Harness, any_descriptor};

const RANGE: Range<u64> = 1 << 36..(1 << 36) + (6 << 20);

fn active() -> Harness<Pmem> {
    let mut harness = Harness::new(Pmem::new(RANGE));
    let features = harness.device.features();
    harness.activate(features);
    harness
}

/// Sends bytes, with so much room for an answer; what was said to be written, and that room.
fn ask(harness: &mut Harness<Pmem>, request: &[u8], room: u32) -> (u32, Vec<u8>) {
    let at = harness.alloc(4096);
    harness.write(at, request);
    harness.write(at + 2048, &[0xee; 16]);
    let length = u32::try_from(request.len()).unwrap();
    harness.queues[0].add(&[(at, length, false), (at + 2048, room, true)]);
    harness.run();
    let written = harness.queues[0].used().last().unwrap().1;
    (written, harness.read(at + 2048, 16))
}

#[test]
fn configuration_space_says_where_the_memory_is_and_ends_there() {
    let harness = active();
    let mut bytes = [9; 24];
    harness.device.config().read(0, &mut bytes);
    assert_eq!(bytes[..8], RANGE.start.to_le_bytes());
    assert_eq!(bytes[8..16], (6u64 << 20).to_le_bytes());
    assert_eq!(bytes[16..], [0; 8]);
    harness.device.config().write(0, &[7; 16]);
    harness.device.config().read(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 24]);
    assert_eq!(
        harness.device.features() & 1,
        0,
        "the range is in configuration space, not in a BAR"
    );
}

#[test]
fn a_flush_is_done_and_anything_else_has_failed() {
    let mut harness = active();
    let (written, answer) = ask(&mut harness, &FLUSH.to_le_bytes(), 4);
    assert_eq!((written, &answer[..4]), (4, &DONE.to_le_bytes()[..]));
    assert_eq!(answer[4..], [0xee; 12]);
    for request in [&1u32.to_le_bytes()[..], &[0; 3], &u32::MAX.to_le_bytes()] {
        let (written, answer) = ask(&mut harness, request, 4);
        assert_eq!((written, &answer[..4]), (4, &FAILED.to_le_bytes()[..]));
    }
    // A driver without room for the answer has none.
    let (written, answer) = ask(&mut harness, &FLUSH.to_le_bytes(), 2);
    assert_eq!((written, &answer[2..4]), (2, &[0xee; 2][..]));
}

proptest! {
    #[test]
    fn any_descriptors_are_survived(
        table in prop::collection::vec(any_descriptor(18), 1..8),
        heads in prop::collection::vec(0u16..20, 1..6),
    ) {
        let mut harness = active();
        harness.raw_chains(0, &table, &heads);
        let _ = harness.try_run();
        harness.deactivate();
        harness.activate(0);
        let (written, answer) = ask(&mut harness, &FLUSH.to_le_bytes(), 4);
        prop_assert_eq!((written, &answer[..4]), (4, &DONE.to_le_bytes()[..]));
    }
}
