//! The network device against a stand-in for a tap that keeps packets apart, and a real tap where
//! the host has one.

mod pairs;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use brig_fixtures::needs::needs;
use proptest::prelude::*;

use super::header::{HEADER, feature};
use super::tap::Tap;
use super::{Net, NetError};
use crate::virtio::testing::{Harness, any_descriptor};
use crate::virtio::{DeviceError, VirtioDevice};

struct Setup {
    /// They are gone first, so that nobody waits for them.
    wires: Vec<UnixDatagram>,
    /// The device's ends.
    taps: Vec<UnixDatagram>,
    harness: Harness<Net>,
    buffers: std::collections::HashMap<(usize, u16), u64>,
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

impl Setup {
    fn new(lanes: usize, features: u64) -> Self {
        Self::with(lanes, features, |device| device)
    }

    /// Of a device that something has been done to.
    fn with(lanes: usize, features: u64, made: impl FnOnce(Net) -> Net) -> Self {
        let mut wires = Vec::new();
        let mut taps = Vec::new();
        for _ in 0..lanes {
            let (wire, tap) = UnixDatagram::pair().unwrap();
            wire.set_nonblocking(true).unwrap();
            wires.push(wire);
            taps.push(tap);
        }
        let fakes = taps.iter().map(|tap| tap.try_clone().unwrap());
        let fakes = fakes.map(|tap| Tap::fake(tap.into())).collect();
        let mut harness = Harness::new(made(Net::with_taps(fakes, MAC, 1500)));
        let features = harness.device.features() & features;
        harness.activate(features);
        Self {
            wires,
            taps,
            harness,
            buffers: std::collections::HashMap::new(),
        }
    }

    /// Posts receive buffers on a pair.
    fn post(&mut self, pair: usize, count: usize, size: u32) {
        for _ in 0..count {
            let address = self.harness.alloc(u64::from(size));
            let head = self.harness.queues[2 * pair].add(&[(address, size, true)]);
            self.buffers.insert((pair, head), address);
        }
    }

    /// Frames the guest has received on a pair: (`num_buffers`, bytes behind the header).
    fn received(&mut self, pair: usize) -> Vec<(u16, Vec<u8>)> {
        self.harness.run();
        let mut frames: Vec<(u16, Vec<u8>)> = Vec::new();
        let mut missing = 0;
        for (head, length) in self.harness.queues[2 * pair].used() {
            let address = self.buffers.remove(&(pair, head)).unwrap();
            let bytes = self.harness.read(address, length as usize);
            if missing > 0 {
                missing -= 1;
                frames.last_mut().unwrap().1.extend(bytes);
            } else {
                let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
                missing = buffers - 1;
                frames.push((buffers, bytes[HEADER..].to_vec()));
            }
        }
        assert_eq!(missing, 0, "a frame lacks buffers");
        frames
    }

    fn arrive(&self, lane: usize, frame: &[u8]) {
        let mut bytes = vec![0; HEADER];
        bytes.extend(frame);
        self.wires[lane].send(&bytes).unwrap();
    }

    /// Sends a frame from the guest in two descriptors.
    fn send(&mut self, pair: usize, header: [u8; HEADER], frame: &[u8]) {
        self.offer(pair, header, frame);
        self.harness.run();
    }

    /// As [`Self::send`], but nobody looks yet.
    fn offer(&mut self, pair: usize, header: [u8; HEADER], frame: &[u8]) {
        let address = self
            .harness
            .alloc(0x800 + u64::try_from(frame.len()).unwrap());
        self.harness.write(address, &header);
        self.harness.write(address + 0x800, frame);
        let length = u32::try_from(frame.len()).unwrap();
        self.harness.queues[2 * pair + 1]
            .add(&[(address, 12, false), (address + 0x800, length, false)]);
    }

    /// Asks for so many pairs; the device's answer.
    fn set_pairs(&mut self, count: u16) -> u8 {
        let command = self.harness.alloc(4096);
        self.harness.write(command, &[4, 0]);
        self.harness.write(command + 2, &count.to_le_bytes());
        self.harness.write(command + 8, &[9]);
        let control = self.harness.queues.len() - 1;
        self.harness.queues[control].add(&[
            (command, 2, false),
            (command + 2, 2, false),
            (command + 8, 1, true),
        ]);
        self.harness.run();
        assert_eq!(self.harness.queues[control].used()[0].1, 1);
        self.harness.read(command + 8, 1)[0]
    }

    fn sent(&self, lane: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        let count = self.wires[lane].recv(&mut bytes).ok()?;
        bytes.truncate(count);
        Some(bytes)
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect()
}

#[test]
fn frames_from_the_tap_reach_the_guest_in_order() {
    let mut net = Setup::new(1, u64::MAX);
    net.post(0, 60, 1536);
    for length in [60, 1514, 200] {
        net.arrive(0, &pattern(length));
    }
    let frames = net.received(0);
    assert_eq!(frames.len(), 3);
    for ((buffers, frame), length) in frames.into_iter().zip([60, 1514, 200]) {
        assert_eq!(buffers, 1);
        assert_eq!(frame, pattern(length));
    }
}

#[test]
fn a_large_segment_spans_buffers_and_says_how_many() {
    let mut net = Setup::new(1, u64::MAX);
    net.post(0, 100, 1536);
    net.arrive(0, &pattern(9000));
    net.arrive(0, &pattern(64));
    let frames = net.received(0);
    assert_eq!(frames[0], (6, pattern(9000)));
    assert_eq!(frames[1], (1, pattern(64)));
    // The buffers that were taken ahead are still the driver's to be used.
    for _ in 0..30 {
        net.arrive(0, &pattern(1000));
        assert_eq!(net.received(0).len(), 1);
    }
}

#[test]
fn frames_wait_while_the_driver_has_no_buffers_for_the_largest() {
    let mut net = Setup::new(1, u64::MAX);
    net.post(0, 3, 1536);
    net.arrive(0, &pattern(9000));
    assert!(net.received(0).is_empty());
    net.post(0, 50, 1536);
    assert_eq!(net.received(0), [(6, pattern(9000))]);
}

#[test]
fn without_merging_a_frame_takes_one_buffer_and_a_longer_one_is_dropped() {
    let mut net = Setup::new(
        1,
        !(feature::MRG_RXBUF
            | feature::GUEST_TSO4
            | feature::GUEST_TSO6
            | feature::GUEST_USO4
            | feature::GUEST_USO6),
    );
    net.post(0, 4, 1536);
    net.arrive(0, &pattern(1514));
    net.arrive(0, &pattern(5000));
    net.arrive(0, &pattern(100));
    let frames = net.received(0);
    assert_eq!(frames, [(1, pattern(1514)), (1, pattern(100))]);
}

#[test]
fn frames_from_the_guest_reach_the_tap() {
    let mut net = Setup::new(1, u64::MAX);
    net.send(0, [0; HEADER], &pattern(1514));
    let sent = net.sent(0).unwrap();
    assert_eq!(sent[..HEADER], [0; HEADER]);
    assert_eq!(sent[HEADER..], pattern(1514));
    assert_eq!(net.harness.queues[1].used().len(), 1);
}

#[test]
fn frames_with_an_unacceptable_header_are_dropped_and_returned() {
    let mut net = Setup::new(1, !feature::HOST_TSO4);
    let mut header = [0; HEADER];
    header[..6].copy_from_slice(&[1, 1, 0, 0, 100, 0]);
    net.send(0, header, &pattern(100));
    assert!(net.sent(0).is_none());
    assert_eq!(net.harness.queues[1].used().len(), 1);
    net.send(0, [0; HEADER], &pattern(100));
    assert!(net.sent(0).is_some());
}

#[test]
fn a_tap_that_takes_no_more_is_waited_for_without_loss() {
    let mut net = Setup::new(1, u64::MAX);
    let address = net.harness.alloc(0x1000);
    for _ in 0..100 {
        net.harness.queues[1].add(&[(address, 112, false)]);
    }
    net.harness.run();
    let mut got = 0;
    loop {
        while net.sent(0).is_some() {
            got += 1;
        }
        if net.harness.step(0).unwrap() == 0 {
            break;
        }
    }
    assert_eq!(got, 100);
    assert_eq!(net.harness.queues[1].used().len(), 100);
}

#[test]
fn the_driver_chooses_how_many_pairs_take_frames() {
    let mut net = Setup::new(2, u64::MAX);
    net.post(0, 100, 1536);
    net.post(1, 100, 1536);
    net.arrive(1, &pattern(60));
    assert_eq!(net.received(0).len(), 1, "one pair is in use at first");
    assert_eq!(net.set_pairs(0), 1);
    assert_eq!(net.set_pairs(3), 1);
    assert_eq!(net.set_pairs(2), 0);
    net.arrive(1, &pattern(60));
    assert_eq!(net.received(1).len(), 1);
    net.send(1, [0; HEADER], &pattern(70));
    assert!(net.sent(1).is_some());
    assert_eq!(net.set_pairs(1), 0);
    net.arrive(1, &pattern(60));
    assert_eq!(net.received(0).len(), 1);
}

#[test]
fn an_unknown_control_command_is_refused() {
    let mut net = Setup::new(2, u64::MAX);
    let command = net.harness.alloc(4096);
    net.harness.write(command, &[0, 0, 1]);
    net.harness.queues[4].add(&[(command, 3, false), (command + 8, 1, true)]);
    net.harness.run();
    assert_eq!(net.harness.read(command + 8, 1), [1]);
}

#[test]
fn the_configuration_has_mac_pairs_and_mtu() {
    let net = Setup::new(2, u64::MAX);
    let mut config = [0xff; 16];
    net.harness.device.config().read(0, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..12], [0, 0, 2, 0, 0xdc, 5]);
    assert_eq!(config[12..], [0; 4]);
}

#[test]
fn a_receive_buffer_shorter_than_a_header_stops_the_device() {
    let mut net = Setup::new(1, u64::MAX);
    net.harness.queues[0].add(&[(0x1000, 11, true)]);
    assert!(matches!(
        net.harness.try_run(),
        Err(DeviceError::Guest { .. })
    ));
}

#[test]
fn a_reset_device_waits_for_nothing_and_can_be_activated_again() {
    let mut net = Setup::new(2, u64::MAX);
    net.harness.deactivate();
    net.arrive(0, &pattern(60));
    assert_eq!(net.harness.step(0).unwrap(), 0);
    let features = net.harness.device.features();
    net.harness.activate(features);
    net.buffers.clear();
    net.post(0, 60, 1536);
    assert_eq!(net.received(0).len(), 1, "it had waited in the tap");
}

#[test]
fn a_descriptor_that_is_no_tap_is_refused() {
    let (a, _b) = UnixDatagram::pair().unwrap();
    assert!(matches!(
        Net::new(vec![a.into()], MAC, 1500),
        Err(NetError::Tap { .. })
    ));
    assert!(matches!(
        Net::new(vec![], MAC, 1500),
        Err(NetError::Taps(0, _))
    ));
}

/// A tap of this host, if it has any to give.
fn real_tap() -> Option<OwnedFd> {
    use std::os::fd::AsRawFd;
    nix::ioctl_write_ptr_bad!(set_interface, 0x4004_54ca, [u8; 40]);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .ok()?;
    let mut request = [0u8; 40];
    // IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
    request[16..18].copy_from_slice(&0x5002u16.to_ne_bytes());
    // SAFETY: the request is a whole `ifreq`.
    unsafe { set_interface(file.as_raw_fd(), &request) }.ok()?;
    Some(file.into())
}

#[test]
fn a_real_tap_can_be_set_up_with_and_without_offloads() {
    let tap = real_tap();
    if !needs(tap.is_some(), "a tap (/dev/net/tun, as root)") {
        return;
    }
    let tap = tap.unwrap();
    let mut harness = Harness::new(Net::new(vec![tap], MAC, 1500).unwrap());
    let features = harness.device.features();
    harness.activate(features);
    harness.deactivate();
    harness.activate(0);
    harness.run();
}

proptest! {
    #[test]
    fn any_descriptors_are_survived(
        queue in 0usize..5,
        mergeable in any::<bool>(),
        table in prop::collection::vec(any_descriptor(20), 1..8),
        heads in prop::collection::vec(0u16..20, 1..6),
        frames in prop::collection::vec(1usize..3000, 0..4),
    ) {
        let mut net = Setup::new(2, if mergeable { u64::MAX } else { !feature::MRG_RXBUF });
        for length in frames {
            net.arrive(0, &pattern(length));
        }
        net.harness.raw_chains(queue, &table, &heads);
        let _ = net.harness.try_run();
    }
}
