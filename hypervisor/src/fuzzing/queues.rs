//! Each device behind queues that a hostile driver fills: descriptors, indexes and event fields at
//! will, resets in between. Whatever came before, the device works for a driver that resets it and
//! keeps to the rules.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;

use super::input::Input;
use crate::reclaim::Reclaim;
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::fs::Fs;
use crate::virtio::mem::{BLOCK, Mem};
use crate::virtio::net::Net;
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Harness, RAM};
use crate::virtio::vsock::Vsock;
use crate::virtio::vsock::packet::{HEADER, Header, op};
use crate::virtio::vsock::testing::{GUEST, Guest};

/// Steps of one input, and bytes of guest memory that a driver writes at once.
const STEPS: usize = 48;
const PAGE: usize = 4096;

/// Does what the input says to a device's queues. `outside` is what else may happen to the device.
fn drive<D: VirtioDevice>(
    harness: &mut Harness<D>,
    input: &mut Input<'_>,
    mut outside: impl FnMut(&mut Input<'_>),
) {
    let offered = harness.device.features();
    let features = if input.flag() {
        offered
    } else {
        offered & input.long()
    };
    if harness.try_activate(features).is_err() {
        // The device refused and is inactive, which the worker does as well.
        harness.deactivate();
        return;
    }
    let pages = harness.alloc(4 * 0x1000);
    let mut resets = 0;
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let mut result = Ok(());
        let queue = input.below(harness.queues.len());
        match input.below(10) {
            0 | 1 => {
                let at = pages + u64::from(input.byte()) * 16;
                let length = usize::from(input.byte());
                harness.write(at, input.take(length.min(PAGE)));
            }
            2..=4 => {
                let index = u16::from(input.byte()) % harness.queues[queue].size();
                let (address, length, flags, next) = near(input, pages);
                harness.queues[queue].raw_descriptor(index, address, length, flags, next);
            }
            5 | 6 => {
                let head = u16::from(input.byte());
                harness.queues[queue].make_available(head);
                harness.queues[queue].kick();
            }
            7 => match input.below(4) {
                0 => harness.queues[queue].set_available_index(input.short()),
                1 => harness.queues[queue].interrupt_after(input.short()),
                2 => result = harness.try_deliver(u32::from(input.byte())),
                _ => harness.queues[queue].kick(),
            },
            8 => outside(input),
            _ if resets < 8 => {
                resets += 1;
                harness.deactivate();
                harness.try_activate(features).unwrap();
            }
            _ => {}
        }
        if result.and_then(|()| harness.try_run()).is_err() {
            // As the worker does with a device that fails.
            harness.deactivate();
            harness.try_activate(features).unwrap();
        }
    }
    harness.deactivate();
}

/// A descriptor near the pages that the driver writes.
fn near(input: &mut Input<'_>, pages: u64) -> (u64, u32, u16, u16) {
    let address = match input.below(8) {
        0..=4 => pages + u64::from(input.byte()) * 16,
        5 => pages + u64::from(input.short()) % 0x4000,
        6 => RAM - u64::from(input.byte()),
        _ => input.long(),
    };
    let length = match input.below(6) {
        0 | 1 => u32::from(input.byte()),
        2 => 16,
        3 => u32::from(input.byte()) * 512,
        4 => u32::from(input.short()),
        _ => input.word(),
    };
    (
        address,
        length,
        u16::from(input.byte()) & 7,
        u16::from(input.byte()),
    )
}

fn fresh<D: VirtioDevice>(harness: &mut Harness<D>) -> u64 {
    let features = harness.device.features();
    harness.activate(features);
    harness.alloc(0x2000)
}

pub fn rng_queue(data: &[u8]) {
    let mut harness = Harness::new(Rng::new());
    drive(&mut harness, &mut Input::new(data), |_| {});
    let page = fresh(&mut harness);
    harness.queues[0].add(&[(page, 64, true)]);
    harness.run();
    assert_eq!(harness.queues[0].used()[0].1, 64);
    assert_ne!(harness.read(page, 64), [0; 64]);
}

pub fn pmem_queue(data: &[u8]) {
    const RANGE: std::ops::Range<u64> = 1 << 36..(1 << 36) + (2 << 20);
    let mut harness = Harness::new(Pmem::new(RANGE));
    drive(&mut harness, &mut Input::new(data), |_| {});
    let page = fresh(&mut harness);
    // A flush.
    harness.write(page, &[0, 0, 0, 0, 7, 7, 7, 7, 7]);
    harness.queues[0].add(&[(page, 4, false), (page + 4, 4, true)]);
    harness.run();
    assert_eq!(harness.queues[0].used()[0].1, 4);
    assert_eq!(harness.read(page, 9), [0, 0, 0, 0, 0, 0, 0, 0, 7]);
}

pub fn balloon_queue(data: &[u8]) {
    let mut harness = Harness::new(Balloon::default());
    drive(&mut harness, &mut Input::new(data), |_| {});
    let page = fresh(&mut harness);
    harness.write(page, &[7; 0x2000]);
    harness.queues[2].add(&[(page, 4096, true)]);
    harness.run();
    assert_eq!(harness.queues[2].used().len(), 1);
    assert_eq!(harness.read(page, 4096), [0; 4096], "given up");
    assert_eq!(harness.read(page + 4096, 4096), [7; 4096], "kept");
}

/// The region lies in what the harness has as memory, above all that a driver is given of it.
pub fn mem_queue(data: &[u8]) {
    const REGION: std::ops::Range<u64> = 12 << 20..4 << 30;
    const THERE: u64 = RAM - REGION.start;
    let reclaim = Arc::new(Reclaim::default());
    let (device, handle) = Mem::new(REGION, Arc::clone(&reclaim));
    let mut harness = Harness::new(device);
    handle.request(THERE, THERE);
    let mut most = THERE;
    let mut pinned = None;
    drive(&mut harness, &mut Input::new(data), |input| {
        match input.below(3) {
            0 => pinned = Some(reclaim.pin()),
            1 => pinned = None,
            // What is asked back stays until the driver gives it.
            _ => {
                let bytes = u64::from(input.byte() % 4) * BLOCK;
                most = handle.plugged().max(bytes);
                handle.request(bytes, THERE);
            }
        }
        assert!(handle.plugged() <= most, "more than was requested");
    });
    drop(pinned);
    let runs = handle.runs();
    let sum: u64 = runs.iter().map(|run| run.end - run.start).sum();
    assert_eq!(sum, handle.plugged());
    for run in runs {
        assert!(REGION.start <= run.start && run.end <= RAM, "{run:x?}");
    }
    handle.request(BLOCK, THERE);
    let page = fresh(&mut harness);
    // All back, then a block, and that back.
    for (kind, plugged) in [(2, 0), (0, BLOCK), (1, 0)] {
        let mut request = [0; 24];
        request[0] = kind;
        request[8..16].copy_from_slice(&REGION.start.to_le_bytes());
        request[16] = 1;
        harness.write(page, &request);
        harness.write(page + 256, &[0xee; 11]);
        harness.queues[0].add(&[(page, 24, false), (page + 256, 10, true)]);
        harness.run();
        assert_eq!(
            harness.read(page + 256, 11),
            [&[0; 10][..], &[0xee]].concat()
        );
        assert_eq!(handle.plugged(), plugged);
        harness.write(REGION.start, &[7; 16]);
    }
    harness.write(page, &[2]);
    harness.queues[0].add(&[(page, 24, false), (page + 256, 10, true)]);
    harness.run();
    assert_eq!(harness.read(REGION.start, 16), [0; 16], "given back");
}

/// A file without a name on no disk.
fn file(content: &[u8]) -> OwnedFd {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = std::fs::File::from(fd);
    file.write_all(content).unwrap();
    file.into()
}

pub fn block_queue(data: &[u8]) {
    let mut input = Input::new(data);
    // Two of its bits.
    let choice = input.byte();
    let (readonly, queues) = (choice & 1 == 1, u16::from(choice >> 1 & 1) + 1);
    let disk = file(&[0x5a; 64 * 512]);
    let copy = std::fs::File::from(disk.try_clone().unwrap());
    let mut harness = Harness::new(Block::new(disk, readonly, "disk", 512, queues).unwrap());
    drive(&mut harness, &mut input, |_| {});
    let length = copy.metadata().unwrap().len();
    assert_eq!(length, 64 * 512, "the disk has another size");
    let mut content = vec![0; 64 * 512];
    std::os::unix::fs::FileExt::read_exact_at(&copy, &mut content, 0).unwrap();
    if readonly {
        assert!(content.iter().all(|byte| *byte == 0x5a), "written");
    }
    let page = fresh(&mut harness);
    let header = [[0u8; 8], 3u64.to_le_bytes()].concat();
    harness.write(page, &header);
    harness.queues[0].add(&[
        (page, 16, false),
        (page + 512, 512, true),
        (page + 16, 1, true),
    ]);
    harness.run();
    assert_eq!(harness.queues[0].used().len(), 1);
    assert_eq!(harness.read(page + 16, 1), [0]);
    assert_eq!(harness.read(page + 512, 512), content[3 * 512..4 * 512]);
}

pub fn net_queue(data: &[u8]) {
    let (wire, tap) = UnixDatagram::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    let device = Net::on_stand_in(tap.into(), [2, 0, 0, 0, 0, 1], 1500);
    let mut harness = Harness::new(device);
    drive(&mut harness, &mut Input::new(data), |input| {
        let length = usize::from(input.short()).min(9000);
        let mut frame = vec![0; length];
        frame[..length.min(8)].copy_from_slice(&input.long().to_le_bytes()[..length.min(8)]);
        // A wire that is full drops it.
        let _ = wire.send(&frame);
        let mut sent = vec![0; 1 << 17];
        while let Ok(count) = wire.recv(&mut sent) {
            assert!((13..=65_562).contains(&count), "a frame of {count} bytes");
        }
    });
    let page = fresh(&mut harness);
    let mut sent = [0; 2000];
    while wire.recv(&mut sent).is_ok() {}
    harness.write(page, &[[0u8; 12].as_slice(), &[0xab; 60]].concat());
    harness.queues[1].add(&[(page, 72, false)]);
    harness.run();
    assert_eq!(wire.recv(&mut sent).unwrap(), 72);
    assert_eq!(sent[12..72], [0xab; 60]);
}

pub fn vsock_queue(data: &[u8]) {
    let (_shim, agent) = UnixStream::pair().unwrap();
    let (device, handle) = Vsock::new(GUEST, OwnedFd::from(agent), Box::new(|_| {}));
    let mut harness = Harness::new(device);
    drive(&mut harness, &mut Input::new(data), |input| {
        handle.close(u64::from(input.byte()));
    });
    let page = fresh(&mut harness);
    let stray = Guest::header(77, 7, op::REQUEST);
    harness.write(page, &stray.to_bytes());
    harness.queues[0].add(&[(page + 0x1000, 256, true)]);
    harness.queues[1].add(&[(page, 44, false)]);
    harness.run();
    let answer: [u8; HEADER] = harness.read(page + 0x1000, HEADER).try_into().unwrap();
    assert_eq!(Header::from_bytes(&answer).op, op::RST);
}

pub fn fs_queue(data: &[u8]) {
    let share = super::session::Share::new();
    let (device, _handle) = Fs::with_root("share", &share.served()).unwrap();
    let mut harness = Harness::new(device);
    drive(&mut harness, &mut Input::new(data), |_| {});
    share.check();
    let page = fresh(&mut harness);
    // INIT: 7.31.
    let mut request = Vec::new();
    for word in [56u32, 26, 1, 0, 0, 0, 0, 0, 0, 0, 7, 31, 0x2_0000, 0] {
        request.extend(word.to_le_bytes());
    }
    harness.write(page, &request);
    harness.queues[1].add(&[(page, 56, false), (page + 0x1000, 256, true)]);
    harness.run();
    assert!(harness.queues[1].used()[0].1 >= 16 + 24);
    assert_eq!(harness.read(page + 0x1000 + 4, 4), [0; 4], "INIT failed");
}
