//! Any descriptor table, direct and indirect, and any sequence of the operations that devices do on
//! what it parses to.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::input::Input;
use crate::virtio::chain::{Buffers, Chain, MAX_SEGMENTS};
use crate::virtio::testing::RAM;

const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x4000;
const DATA: u64 = 0x5000;
const SIZE: u16 = 16;
/// Bytes that one copying operation touches at most, so that inputs stay quick.
const STEP: usize = 8192;

/// A descriptor that is right now and then.
pub(super) fn descriptor(input: &mut Input<'_>) -> (u64, u32, u16, u16) {
    let address = match input.below(8) {
        0..=2 => DATA + u64::from(input.short()),
        3 => (RAM / 2 - 128) + u64::from(input.byte()),
        4 => (RAM - 128) + u64::from(input.byte()),
        5 => INDIRECT + u64::from(input.byte()),
        6 => u64::MAX - u64::from(input.byte()),
        _ => input.long(),
    };
    let length = match input.below(4) {
        0 => u32::from(input.byte()),
        1 => u32::from(input.byte()) * 16,
        2 => u32::from(input.short()),
        _ => input.word(),
    };
    let flags = u16::from(input.byte());
    (
        address,
        length,
        flags & 7,
        u16::from(input.byte()) % (SIZE + 2),
    )
}

/// Two regions that touch, so that a buffer may cross from one to the other.
pub fn descriptor_chain(data: &[u8]) {
    let mut input = Input::new(data);
    let half = usize::try_from(RAM / 2).unwrap();
    let ranges = [(GuestAddress(0), half), (GuestAddress(RAM / 2), half)];
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    for table in [TABLE, INDIRECT] {
        for entry in 0..u64::try_from(input.below(17)).unwrap() {
            let (address, length, flags, next) = descriptor(&mut input);
            let at = table + entry * 16;
            memory.write_obj(address, GuestAddress(at)).unwrap();
            memory.write_obj(length, GuestAddress(at + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(next, GuestAddress(at + 14)).unwrap();
        }
    }
    memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
    let head = u16::from(input.byte()) % (SIZE + 1);
    memory.write_obj(head, GuestAddress(AVAILABLE + 4)).unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(0x1000), None);
    queue.set_avail_ring_address(Some(0x2000), None);
    queue.set_used_ring_address(Some(u32::try_from(USED).unwrap()), None);
    queue.set_ready(true);
    let Some(descriptors) = queue.iter(&memory).unwrap().next() else {
        return;
    };
    let Ok(chain) = Chain::parse(descriptors, &memory) else {
        return;
    };
    let segments = chain.readable.slices().count() + chain.writable.slices().count();
    assert!(segments <= MAX_SEGMENTS, "{segments} segments");
    for part in [chain.readable, chain.writable] {
        operate(part, &mut input);
    }
}

/// What a device may do, against the number of bytes that must be left.
fn operate(mut buffers: Buffers<'_>, input: &mut Input<'_>) {
    let total: usize = buffers.slices().map(vm_memory::VolatileSlice::len).sum();
    assert_eq!(buffers.len(), total);
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap();
    let fd = std::os::fd::AsFd::as_fd(&null);
    for _ in 0..24 {
        if input.is_empty() {
            break;
        }
        let before = buffers.len();
        let count = usize::from(input.short());
        let step = count.min(STEP);
        let gone = match input.below(9) {
            0 => {
                buffers.skip(count);
                count
            }
            1 => buffers.copy_to(&mut vec![0; step]),
            2 => buffers.copy_from(&vec![0xa5; step]),
            3 => {
                let front = buffers.split_to(count);
                assert_eq!(front.len(), count.min(before));
                assert_eq!(
                    front
                        .slices()
                        .map(vm_memory::VolatileSlice::len)
                        .sum::<usize>(),
                    front.len()
                );
                count
            }
            4 => {
                let array = buffers.copy_array::<44>();
                assert_eq!(array.is_some(), before >= 44);
                if array.is_some() { 44 } else { 0 }
            }
            5 => buffers.read_from(fd, step).unwrap(),
            6 => buffers.write_to(fd, step).unwrap(),
            7 => {
                let mut front = buffers.split_to(step);
                front.fill_zero();
                assert!(front.is_empty());
                step
            }
            _ => buffers.read_at(fd, step, i64::from(input.word())).unwrap(),
        };
        assert_eq!(buffers.len(), before - gone.min(before));
        assert_eq!(
            buffers
                .slices()
                .map(vm_memory::VolatileSlice::len)
                .sum::<usize>(),
            buffers.len()
        );
    }
}
