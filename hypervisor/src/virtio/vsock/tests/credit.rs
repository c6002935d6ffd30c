//! Flow control, receive buffers and notifications.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::virtio::vsock::credit::BUFFER;
use crate::virtio::vsock::packet::op;
use crate::virtio::vsock::testing::{Guest, PORT, payload};
use crate::virtio::vsock::{MAX_STREAMS, StreamParams};

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::new();
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    theirs.write_all(&[1; 5000]).unwrap();
    let port = guest.request(16, b"", Some(ours.into()), None);
    let mut response = Guest::header(port, PORT, op::RESPONSE);
    response.buf_alloc = 1500;
    guest.send_raw(&response, &[]);
    let packets = guest.received();
    assert_eq!(payload(&packets).len(), 1500);
    assert_eq!(packets.last().unwrap().0.op, op::CREDIT_REQUEST);
    assert!(guest.received().is_empty(), "it asks once");
    let mut update = Guest::header(port, PORT, op::CREDIT_UPDATE);
    update.buf_alloc = 1500;
    update.fwd_cnt = 1000;
    guest.send_raw(&update, &[]);
    assert_eq!(payload(&guest.received()).len(), 1000);
    update.fwd_cnt = 2500;
    update.buf_alloc = 1 << 20;
    guest.send_raw(&update, &[]);
    assert_eq!(payload(&guest.received()).len(), 2500);
}

#[test]
fn a_guest_that_ignores_its_credit_is_reset() {
    let mut guest = Guest::new();
    let (_reader, writer) = pipe();
    let port = guest.open(16, None, Some(writer));
    guest.received();
    // The pipe takes 64 KiB, we hold 256 KiB; one byte more is too much.
    for _ in 0..5 {
        guest.send_data(port, PORT, &[0; 65_536]);
    }
    assert!(!guest.received_ops().contains(&op::RST));
    guest.send_data(port, PORT, &[0; 1]);
    assert_eq!(guest.received_ops(), [op::RST]);
    assert_eq!(guest.reported(), closed(16, true));
}

#[test]
fn credit_comes_back_as_the_reader_reads() {
    let mut guest = Guest::new();
    let (mut reader, writer) = pipe();
    let port = guest.open(16, None, Some(writer));
    guest.received();
    let mut sent = 0u32;
    let mut forwarded = 0;
    for _ in 0..40 {
        // A sender as the specification wants it.
        while sent - forwarded + 65_536 <= BUFFER {
            guest.send_data(port, PORT, &[0; 65_536]);
            sent += 65_536;
        }
        let mut buffer = vec![0; 65_536];
        reader.read_exact(&mut buffer).unwrap();
        for (header, _) in guest.received() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            forwarded = header.fwd_cnt;
        }
    }
    assert!(sent > 2 << 20, "stuck at {sent} bytes");
}

#[test]
fn a_request_for_credit_is_answered() {
    let mut guest = Guest::new();
    let (_theirs, ours) = UnixStream::pair().unwrap();
    let port = guest.open(16, Some(ours.into()), None);
    guest.send_data(port, PORT, b"123");
    guest.send(port, PORT, op::CREDIT_REQUEST, 0);
    let packets = guest.received();
    assert_eq!(packets.len(), 1);
    let header = packets[0].0;
    assert_eq!(
        (header.op, header.buf_alloc, header.fwd_cnt),
        (op::CREDIT_UPDATE, BUFFER, 3)
    );
}

#[test]
fn sending_resumes_when_receive_buffers_come() {
    let mut guest = Guest::bare();
    guest.refill = false;
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    theirs.write_all(&[5; 10_000]).unwrap();
    drop(theirs);
    guest
        .handle
        .open(StreamParams {
            stream: 16,
            port: PORT,
            header: vec![],
            input: Some(ours.into()),
            output: None,
        })
        .unwrap();
    guest.harness.run();
    assert!(guest.take().is_empty());
    guest.post(1);
    guest.harness.run();
    let packets = guest.take();
    assert_eq!(packets[0].0.op, op::REQUEST);
    guest.send(packets[0].0.src_port, PORT, op::RESPONSE, 0);
    let mut all = Vec::new();
    for _ in 0..4 {
        guest.post(1);
        guest.harness.run();
        all.append(&mut guest.take());
    }
    assert_eq!(payload(&all).len(), 10_000);
    assert_eq!(all.last().unwrap().0.op, op::SHUTDOWN);
}

#[test]
fn interrupts_are_suppressed_as_the_driver_asks() {
    let mut guest = Guest::new();
    guest.harness.queues[0].interrupt_after(50);
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    guest.open(16, Some(ours.into()), None);
    theirs.write_all(&[0; 40_000]).unwrap();
    guest.refill = false;
    guest.received();
    assert_eq!(guest.harness.interrupts.of(0), 0);
    guest.harness.queues[0].interrupt_after(11);
    theirs.write_all(&[0; 8_000]).unwrap();
    guest.received();
    assert_eq!(guest.harness.interrupts.of(0), 1);
}

#[test]
fn a_device_without_event_index_interrupts() {
    let mut guest = Guest::with_features(1);
    guest.post(4);
    guest.send(22, 1, op::REQUEST, 0);
    assert_eq!(guest.received_ops(), [op::RST]);
    assert!(guest.harness.interrupts.of(0) >= 1);
}

#[test]
fn the_buffers_of_all_streams_together_are_bounded() {
    let mut guest = Guest::new();
    let mut readers = Vec::new();
    let mut announced = 0;
    for stream in 0..MAX_STREAMS as u64 {
        let (reader, writer) = pipe();
        readers.push(reader);
        guest
            .handle
            .open(StreamParams {
                stream,
                port: PORT,
                header: vec![],
                input: None,
                output: Some(writer),
            })
            .unwrap();
        let packets = guest.received();
        let header = packets[0].0;
        assert_eq!(header.op, op::REQUEST);
        assert!(header.buf_alloc >= 16 << 10, "stream {stream}");
        announced += u64::from(header.buf_alloc);
        guest.send(header.src_port, PORT, op::RESPONSE, 0);
        guest.received();
        if stream == 1000 {
            // What was announced is what counts, not what another stream has.
            let window = header.buf_alloc;
            for _ in 0..4 {
                // Into the pipe.
                guest.send_data(header.src_port, PORT, &[0; 16_384]);
            }
            guest.send_data(header.src_port, PORT, &vec![0; window as usize]);
            assert!(!guest.received_ops().contains(&op::RST));
            guest.send_data(header.src_port, PORT, &[0]);
            assert_eq!(guest.received_ops(), [op::RST]);
        }
    }
    assert!(announced < 25 << 20, "{announced}");
    for stream in 0..MAX_STREAMS as u64 {
        guest.handle.close(stream);
    }
    guest.received();
    let (_reader, writer) = pipe();
    guest
        .handle
        .open(StreamParams {
            stream: 5000,
            port: PORT,
            header: vec![],
            input: None,
            output: Some(writer),
        })
        .unwrap();
    let packets = guest.received();
    assert_eq!(packets.last().unwrap().0.buf_alloc, BUFFER, "and come back");
}
