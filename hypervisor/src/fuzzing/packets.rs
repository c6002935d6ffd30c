//! The socket device over packet sequences: streams that the host opens, data both ways, the guest's
//! packets with any operation, flags, ports and credit. A model of the credit says what may be sent.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::input::Input;
use crate::virtio::vsock::packet::{Header, op};
use crate::virtio::vsock::testing::{GUEST, Guest, PORT};
use crate::virtio::vsock::{StreamParams, VsockEvent};

const STEPS: usize = 64;
/// Streams of one input.
const STREAMS: usize = 6;

/// The credit of one connection as the guest granted it.
#[derive(Default, Clone, Copy)]
struct Granted {
    alloc: u32,
    forwarded: u32,
    sent: u32,
    window: u32,
}

struct Model {
    by_port: HashMap<(u32, u32), Granted>,
}

impl Model {
    /// The guest sends `header`: what counts is the last figure of a packet that the device takes for
    /// the connection, and a reset ends it.
    fn told(&mut self, header: &Header) {
        if header.src_cid == u64::from(GUEST) && header.dst_cid == 2 {
            let entry = self
                .by_port
                .entry((header.dst_port, header.src_port))
                .or_default();
            entry.alloc = header.buf_alloc;
            entry.forwarded = header.fwd_cnt;
        }
    }

    fn sent(&mut self, header: &Header, payload: &[u8]) {
        let entry = self
            .by_port
            .entry((header.src_port, header.dst_port))
            .or_default();
        match header.op {
            op::RW => {
                let length = u32::try_from(payload.len()).unwrap();
                assert!(length > 0, "an empty packet");
                let in_flight = entry.sent.wrapping_sub(entry.forwarded);
                assert!(
                    in_flight
                        .checked_add(length)
                        .is_some_and(|sum| sum <= entry.alloc),
                    "{length} bytes over a credit of {} with {in_flight} in flight",
                    entry.alloc
                );
                entry.sent = entry.sent.wrapping_add(length);
            }
            _ => assert!(payload.is_empty(), "operation {} with payload", header.op),
        }
        if matches!(header.op, op::REQUEST | op::RESPONSE) {
            assert!((16 << 10..=256 << 10).contains(&header.buf_alloc));
            entry.window = header.buf_alloc;
        } else if header.op != op::RST && entry.window != 0 {
            assert_eq!(header.buf_alloc, entry.window, "a window changed");
        }
    }
}

pub fn vsock_packets(data: &[u8]) {
    let mut input = Input::new(data);
    let mask = if input.flag() { u64::MAX } else { input.long() };
    let mut guest = Guest::with_features(mask);
    guest.refill = input.flag();
    guest.post(64);
    let mut model = Model {
        by_port: HashMap::new(),
    };
    let mut ports = vec![1024, 22];
    let mut ends: Vec<UnixStream> = Vec::new();
    let mut opened = Vec::new();
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        match input.below(8) {
            0 if opened.len() < STREAMS => {
                let (end, theirs) = UnixStream::pair().unwrap();
                end.set_nonblocking(true).unwrap();
                let copy = theirs.try_clone().unwrap();
                let stream = 16 + u64::try_from(opened.len()).unwrap();
                let kind = input.byte();
                let params = StreamParams {
                    stream,
                    port: PORT,
                    header: vec![b'h'; usize::from(kind >> 2) * 8],
                    input: (kind & 1 == 0).then(|| theirs.into()),
                    output: (kind & 2 == 0).then(|| copy.into()),
                };
                guest.handle.open(params).unwrap();
                opened.push(stream);
                ends.push(end);
            }
            1 if !ends.is_empty() => {
                let which = input.below(ends.len());
                let length = usize::from(input.short());
                let _ = (&ends[which]).write(&vec![1; length]);
            }
            2 if !ends.is_empty() => {
                let which = input.below(ends.len());
                let length = usize::from(input.short());
                let _ = (&ends[which]).read(&mut vec![0; length]);
            }
            3 if !ends.is_empty() => match input.below(6) {
                0 => guest.handle.close(16 + u64::from(input.byte()) % 8),
                1 => {
                    let which = input.below(ends.len());
                    let _ = ends[which].shutdown(std::net::Shutdown::Both);
                }
                2 => {
                    let which = input.below(ends.len());
                    let _ = ends[which].shutdown(std::net::Shutdown::Write);
                }
                3 => {
                    let room = guest.harness.queues[0].room();
                    guest.post((usize::from(input.byte()) % 8).min(room));
                }
                4 => {
                    let mut bytes = [0; 4096];
                    let _ = guest.shim.read(&mut bytes);
                }
                _ => {
                    let length = usize::from(input.byte()) * 64;
                    let _ = guest.shim.write(&vec![2; length]);
                }
            },
            _ => {
                let port = input.pick(&ports);
                let guest_port = input.pick(&[PORT, PORT, PORT, 5, 6]);
                let mut header = Guest::header(port, guest_port, u16::from(input.byte()) % 9);
                header.flags = u32::from(input.byte());
                let length = match input.below(4) {
                    0 => usize::from(input.byte()),
                    1 => usize::from(input.short()),
                    2 => 65_536,
                    _ => 0,
                };
                header.length = u32::try_from(length).unwrap();
                match input.byte() {
                    0 => header.length = input.word(),
                    1 => header.kind = input.short(),
                    2 => header.src_cid = input.long(),
                    3 => header.dst_cid = input.long(),
                    4..=60 => {
                        header.buf_alloc = input.word();
                        header.fwd_cnt = input.word();
                    }
                    61..=100 => header.buf_alloc = u32::from(input.short()),
                    101..=160 => {
                        header.fwd_cnt = model
                            .by_port
                            .get(&(port, guest_port))
                            .map_or(0, |granted| granted.sent);
                    }
                    _ => {}
                }
                model.told(&header);
                guest.send_raw(&header, &vec![3; length]);
            }
        }
        for (header, payload) in guest.received() {
            if header.op == op::REQUEST {
                ports.push(header.src_port);
            }
            model.sent(&header, &payload);
        }
        let (connections, packets) = guest.harness.device.counts();
        assert!(connections <= opened.len() + 1, "{connections} connections");
        assert!(packets <= 256 + 2048, "{packets} packets");
    }
    guest.harness.deactivate();
    let mut ended: Vec<u64> = guest
        .reported()
        .iter()
        .filter_map(|event| match event {
            VsockEvent::StreamClosed { stream, .. } => Some(*stream),
            VsockEvent::AgentConnected => None,
        })
        .collect();
    ended.sort_unstable();
    assert_eq!(ended, opened, "each stream ends once");
}
