//! A guest's vsock driver for tests: sends any packet, keeps receive buffers posted, and plays the
//! peer of a connection.

#![allow(
    clippy::unwrap_used,
    reason = "of tests and fuzz targets, where a broken assumption is a finding"
)]
#![cfg_attr(not(test), allow(dead_code, reason = "targets use a part of it"))]

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use super::credit::BUFFER;
use super::packet::{HEADER, Header, TYPE_STREAM, op};
use super::{StreamParams, Vsock, VsockEvent, VsockHandle};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Harness;

/// The guest's context id in tests.
pub const GUEST: u32 = 3;
/// The guest port that tests open.
pub const PORT: u32 = 1025;
/// Size of a receive buffer, header included; Linux uses as much.
pub const RX_BUFFER: u32 = 4096;

/// A vsock device and its guest.
pub struct Guest {
    pub harness: Harness<Vsock>,
    pub handle: VsockHandle,
    pub events: Receiver<VsockEvent>,
    /// The shim's end of the agent's socket.
    pub shim: UnixStream,
    buffers: HashMap<u16, u64>,
    spare: Vec<u64>,
    tx: u64,
    /// Whether [`Self::received`] puts buffers back.
    pub refill: bool,
}

impl Guest {
    /// An active device whose guest has posted no receive buffers yet.
    pub fn bare() -> Self {
        Self::with_features(u64::MAX)
    }

    /// As [`Self::bare`], with these features at most.
    pub fn with_features(mask: u64) -> Self {
        let (shim, agent) = UnixStream::pair().unwrap();
        shim.set_nonblocking(true).unwrap();
        let (sender, events) = channel();
        let (device, handle) = Vsock::new(
            GUEST,
            OwnedFd::from(agent),
            Box::new(move |event| {
                let _ = sender.send(event);
            }),
        );
        let mut harness = Harness::new(device);
        let features = harness.device.features() & mask;
        harness.activate(features);
        let tx = harness.alloc(0x20000);
        Self {
            harness,
            handle,
            events,
            shim,
            buffers: HashMap::new(),
            spare: Vec::new(),
            tx,
            refill: true,
        }
    }

    /// An active device whose guest has filled the receive queue.
    pub fn new() -> Self {
        let mut guest = Self::bare();
        guest.post(128);
        guest
    }

    /// Posts receive buffers.
    pub fn post(&mut self, count: usize) {
        for _ in 0..count {
            let address = match self.spare.pop() {
                Some(address) => address,
                None => self.harness.alloc(u64::from(RX_BUFFER)),
            };
            let head = self.harness.queues[0].add(&[(address, RX_BUFFER, true)]);
            self.buffers.insert(head, address);
        }
    }

    /// What the device has sent, without running it.
    pub fn take(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.harness.queues[0].used();
        let mut packets = Vec::new();
        for (head, length) in used {
            let address = self.buffers.remove(&head).unwrap();
            let bytes = self.harness.read(address, length as usize);
            let (header, payload) = bytes.split_at(HEADER);
            let header = Header::from_bytes(header.try_into().unwrap());
            assert_eq!(header.length as usize, payload.len());
            assert_eq!((header.src_cid, header.dst_cid), (2, u64::from(GUEST)));
            packets.push((header, payload.to_vec()));
            self.spare.push(address);
        }
        if self.refill {
            self.post(packets.len());
        }
        packets
    }

    /// Runs the device and takes all it sends.
    pub fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            self.harness.run();
            let mut packets = self.take();
            if packets.is_empty() {
                return all;
            }
            all.append(&mut packets);
        }
    }

    /// The operations of what is received.
    pub fn received_ops(&mut self) -> Vec<u16> {
        self.received()
            .iter()
            .map(|(header, _)| header.op)
            .collect()
    }

    /// A header from the guest to the host.
    pub fn header(host_port: u32, guest_port: u32, op: u16) -> Header {
        Header {
            src_cid: u64::from(GUEST),
            dst_cid: 2,
            src_port: guest_port,
            dst_port: host_port,
            length: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: BUFFER,
            fwd_cnt: 0,
        }
    }

    /// Sends a packet as it is, header and payload in descriptors of their own, and runs the
    /// device.
    pub fn send_raw(&mut self, header: &Header, payload: &[u8]) {
        self.queue_raw(header, payload);
        self.harness.run();
        self.harness.queues[1].used();
    }

    /// As [`Self::send_raw`], without running the device.
    pub fn queue_raw(&mut self, header: &Header, payload: &[u8]) {
        self.harness.write(self.tx, &header.to_bytes());
        self.harness.write(self.tx + 0x1000, payload);
        let mut parts = vec![(self.tx, 44, false)];
        if !payload.is_empty() {
            let length = u32::try_from(payload.len()).unwrap();
            parts.push((self.tx + 0x1000, length, false));
        }
        self.harness.queues[1].add(&parts);
    }

    /// Sends an operation without payload.
    pub fn send(&mut self, host_port: u32, guest_port: u32, op: u16, flags: u32) {
        let mut header = Self::header(host_port, guest_port, op);
        header.flags = flags;
        self.send_raw(&header, &[]);
    }

    /// Sends payload.
    pub fn send_data(&mut self, host_port: u32, guest_port: u32, payload: &[u8]) {
        let mut header = Self::header(host_port, guest_port, op::RW);
        header.length = u32::try_from(payload.len()).unwrap();
        self.send_raw(&header, payload);
    }

    /// Opens a stream and returns the host port of its request.
    pub fn request(
        &mut self,
        stream: u64,
        header: &[u8],
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> u32 {
        self.handle
            .open(StreamParams {
                stream,
                port: PORT,
                header: header.to_vec(),
                input,
                output,
            })
            .unwrap();
        let packets = self.received();
        assert_eq!(packets.len(), 1, "{packets:?}");
        assert_eq!(packets[0].0.op, op::REQUEST);
        assert_eq!(packets[0].0.dst_port, PORT);
        assert_eq!(packets[0].0.buf_alloc, BUFFER);
        packets[0].0.src_port
    }

    /// Opens a stream that the guest accepts.
    pub fn open(&mut self, stream: u64, input: Option<OwnedFd>, output: Option<OwnedFd>) -> u32 {
        let port = self.request(stream, &[], input, output);
        self.send(port, PORT, op::RESPONSE, 0);
        port
    }

    /// All events so far.
    pub fn reported(&self) -> Vec<VsockEvent> {
        self.events.try_iter().collect()
    }
}

/// The payload of data packets, put together.
pub fn payload(packets: &[(Header, Vec<u8>)]) -> Vec<u8> {
    packets
        .iter()
        .filter(|(header, _)| header.op == op::RW)
        .flat_map(|(_, payload)| payload.clone())
        .collect()
}
