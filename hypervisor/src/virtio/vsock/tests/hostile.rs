//! What a hostile guest may send, and that it changes nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;
use crate::virtio::DeviceError;
use crate::virtio::vsock::VsockEvent;
use crate::virtio::vsock::packet::{Header, TYPE_STREAM, op, shutdown};
use crate::virtio::vsock::testing::{GUEST, Guest, PORT};

#[test]
fn packets_out_of_turn_reset_the_connection() {
    for hostile in [op::REQUEST, op::RESPONSE, 0, 8, u16::MAX] {
        let mut guest = Guest::new();
        let port = guest.open(16, None, None);
        guest.received();
        guest.send(port, PORT, hostile, 0);
        assert_eq!(guest.received_ops(), [op::RST], "operation {hostile}");
        assert_eq!(guest.reported(), closed(16, true));
    }
    let mut guest = Guest::new();
    let port = guest.request(16, b"", None, None);
    guest.send_data(port, PORT, b"before the response");
    assert_eq!(guest.received_ops(), [op::RST]);
    let port = guest.open(17, None, None);
    guest.received();
    guest.send(port, PORT, op::SHUTDOWN, shutdown::SEND);
    guest.received();
    guest.send_data(port, PORT, b"after the end");
    assert_eq!(guest.received_ops(), [op::RST]);
}

#[test]
fn a_length_beyond_the_chain_or_the_maximum_resets_the_connection() {
    for length in [11, 65_537, u32::MAX] {
        let mut guest = Guest::new();
        let port = guest.open(16, None, None);
        guest.received();
        let mut header = Guest::header(port, PORT, op::RW);
        header.length = length;
        guest.send_raw(&header, b"ten bytes!");
        assert_eq!(guest.received_ops(), [op::RST], "length {length}");
    }
}

#[test]
fn a_packet_may_be_spread_over_descriptors_in_an_indirect_table() {
    let mut guest = Guest::new();
    let (mut reader, writer) = pipe();
    let port = guest.open(16, None, Some(writer));
    guest.received();
    let mut header = Guest::header(port, PORT, op::RW);
    header.length = 300;
    let base = guest.harness.alloc(0x3000);
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend((0..300u32).map(|i| i.to_le_bytes()[0]));
    guest.harness.write(base, &bytes);
    let parts: Vec<_> = (0..172).map(|i| (base + i * 2, 2, false)).collect();
    guest.harness.queues[1].add_indirect(base + 0x1000, &parts);
    guest.harness.run();
    let mut got = vec![0; 300];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(got, bytes[44..]);
}

#[test]
fn a_chain_shorter_than_a_header_stops_the_device() {
    let mut guest = Guest::new();
    guest.harness.queues[1].add(&[(0x1000, 43, false)]);
    assert!(matches!(
        guest.harness.try_run(),
        Err(DeviceError::Guest {
            device: "vsock",
            ..
        })
    ));
    let mut guest = Guest::bare();
    guest.handle.close(1);
    guest.harness.queues[0].add(&[(0x1000, 44, true)]);
    guest.harness.run();
    guest.queue_raw(&Guest::header(9, 9, op::REQUEST), &[]);
    assert!(matches!(
        guest.harness.try_run(),
        Err(DeviceError::Guest { .. })
    ));
}

#[test]
fn a_guest_without_receive_buffers_cannot_pile_up_answers() {
    let mut guest = Guest::bare();
    for port in 0..1000 {
        guest.send(22, port, op::REQUEST, 0);
    }
    let (_, pending) = guest.harness.device.counts();
    assert!((1..=256).contains(&pending), "{pending} packets are held");
}

fn any_op() -> impl Strategy<Value = u16> {
    prop_oneof![8 => 1u16..=7, 1 => any::<u16>()]
}

proptest! {
    /// Whatever packets come, nothing panics, what is held is bounded, and each stream ends once.
    #[test]
    fn any_packets_leave_the_device_bounded(
        steps in prop::collection::vec(
            (0usize..6, any_op(), any::<u32>(), 0usize..70_000, any::<u32>(), any::<u32>(), any::<u8>()),
            1..120,
        )
    ) {
        let mut guest = Guest::new();
        let mut ports = vec![1024, 22];
        let mut theirs = Vec::new();
        for stream in 16..20 {
            let (a, b) = UnixStream::pair().unwrap();
            a.set_nonblocking(true).unwrap();
            let copy = b.try_clone().unwrap();
            ports.push(guest.request(stream, b"h", Some(b.into()), Some(copy.into())));
            theirs.push(a);
        }
        for (which, op, flags, length, alloc, forwarded, lie) in steps {
            let mut header = Guest::header(ports[which], PORT, op);
            header.flags = flags & 3;
            header.length = u32::try_from(length).unwrap();
            if lie == 0 { header.length = alloc; }
            if lie == 1 { header.kind = TYPE_STREAM + 1; }
            if lie < 64 { header.buf_alloc = alloc; header.fwd_cnt = forwarded; }
            guest.send_raw(&header, &vec![0; length]);
            guest.received();
            let _ = (&theirs[which % 4]).write(&vec![0; length / 2]);
            if lie > 128 {
                let _ = (&theirs[which % 4]).read(&mut vec![0; length]);
            }
            let (connections, packets) = guest.harness.device.counts();
            prop_assert!(connections <= 5 && packets <= 256 + 2048);
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
        prop_assert_eq!(ended, [16, 17, 18, 19]);
    }

    /// Whatever bytes are a header, and whatever the descriptors say, the device errs or goes on.
    #[test]
    fn any_descriptors_are_survived(
        table in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), 0u16..130), 1..12),
        queue in 0usize..2,
        heads in prop::collection::vec(0u16..200, 1..8),
        bytes in prop::collection::vec(any::<u8>(), 44..200),
    ) {
        let mut guest = Guest::bare();
        let at = guest.harness.alloc(0x1000);
        guest.harness.write(at, &bytes);
        for (index, (address, length, flags, next)) in table.iter().enumerate() {
            // Half of them point at real memory.
            let address = if address % 2 == 0 { at + address % 64 } else { *address };
            let length = if length % 2 == 0 { length % 200 } else { *length };
            let index = u16::try_from(index).unwrap();
            guest.harness.queues[queue].raw_descriptor(index, address, length, flags & 7, *next);
        }
        guest.handle.close(0);
        for head in heads {
            guest.harness.queues[queue].make_available(head);
        }
        guest.harness.queues[queue].kick();
        let _ = guest.harness.try_run();
    }

    /// Any header at all.
    #[test]
    fn any_header_is_survived(bytes in prop::collection::vec(any::<u8>(), 44), length in 0usize..100) {
        let mut guest = Guest::new();
        let mut header = Header::from_bytes(bytes.as_slice().try_into().unwrap());
        header.src_cid = u64::from(GUEST);
        header.dst_cid = 2;
        guest.send_raw(&header, &vec![0; length]);
        guest.received();
    }
}
