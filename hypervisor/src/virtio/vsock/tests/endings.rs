//! How streams end: complete output, half-closed directions, resets.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::vsock::packet::{op, shutdown};
use crate::virtio::vsock::testing::{Guest, PORT, payload};
use crate::virtio::vsock::{StreamParams, VsockEvent};

#[test]
fn a_refused_stream_closes_its_output_and_is_reported_as_reset() {
    let mut guest = Guest::new();
    let (mut reader, writer) = pipe();
    let port = guest.request(16, b"", None, Some(writer));
    guest.send(port, PORT, op::RST, 0);
    assert_eq!(guest.reported(), closed(16, true));
    assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
    assert!(guest.received().is_empty());
}

#[test]
fn output_is_complete_and_closed_before_the_end_is_reported() {
    let mut guest = Guest::new();
    let (reader, writer) = pipe();
    let port = guest.open(16, None, Some(writer));
    guest.received();
    // More than the pipe holds, so that a part stays with us.
    let sent: Vec<u8> = (0..200_000u32)
        .map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1])
        .collect();
    for chunk in sent.chunks(60_000) {
        guest.send_data(port, PORT, chunk);
    }
    guest.send(port, PORT, op::SHUTDOWN, shutdown::BOTH);
    assert!(
        guest.received_ops().contains(&op::RST),
        "the guest need not wait"
    );
    assert!(guest.reported().is_empty(), "the reader has not got it all");
    let got = read_to_end(&mut guest, reader);
    assert!(got == sent, "{} bytes of {}", got.len(), sent.len());
    assert_eq!(guest.reported(), closed(16, false));
}

#[test]
fn data_before_a_reset_is_still_delivered() {
    let mut guest = Guest::new();
    let (reader, writer) = pipe();
    let port = guest.open(16, None, Some(writer));
    guest.received();
    for _ in 0..3 {
        guest.send_data(port, PORT, &[7; 40_000]);
    }
    guest.send(port, PORT, op::RST, 0);
    assert!(guest.reported().is_empty());
    assert_eq!(read_to_end(&mut guest, reader).len(), 120_000);
    assert_eq!(guest.reported(), closed(16, true));
}

#[test]
fn the_guests_end_of_output_closes_it_while_input_goes_on() {
    let mut guest = Guest::new();
    let (mut reader, writer) = pipe();
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    let port = guest.open(16, Some(ours.into()), Some(writer));
    guest.send_data(port, PORT, b"bye");
    guest.send(port, PORT, op::SHUTDOWN, shutdown::SEND);
    let mut got = String::new();
    reader.read_to_string(&mut got).unwrap();
    assert_eq!(got, "bye");
    theirs.write_all(b"more").unwrap();
    assert_eq!(payload(&guest.received()), b"more");
    drop(theirs);
    let packets = guest.received();
    let (last, _) = packets.last().unwrap();
    assert_eq!((last.op, last.flags), (op::SHUTDOWN, shutdown::BOTH));
    assert_eq!(guest.reported(), closed(16, false));
    // The answer of Linux to that is no connection's packet, and is not answered.
    guest.send(port, PORT, op::RST, 0);
    assert!(guest.received().is_empty());
}

#[test]
fn a_guest_that_stops_receiving_ends_the_input() {
    let mut guest = Guest::new();
    let (theirs, ours) = UnixStream::pair().unwrap();
    let port = guest.open(16, Some(ours.into()), None);
    guest.send(port, PORT, op::SHUTDOWN, shutdown::RECEIVE);
    guest.harness.run();
    let error = (&theirs).write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_reader_that_goes_away_is_told_to_the_guest_and_output_is_discarded() {
    let mut guest = Guest::new();
    let (reader, writer) = pipe();
    let (_theirs, ours) = UnixStream::pair().unwrap();
    let port = guest.open(16, Some(ours.into()), Some(writer));
    drop(reader);
    guest.send_data(port, PORT, b"into the void");
    let packets = guest.received();
    let (last, _) = packets.last().unwrap();
    assert_eq!((last.op, last.flags), (op::SHUTDOWN, shutdown::RECEIVE));
    for _ in 0..20 {
        guest.send_data(port, PORT, &[0; 60_000]);
        let ops = guest.received_ops();
        assert!(
            !ops.contains(&op::RST),
            "what is discarded gives credit back"
        );
    }
    guest.send(port, PORT, op::SHUTDOWN, shutdown::BOTH);
    assert_eq!(guest.reported(), closed(16, false));
}

#[test]
fn what_waits_for_a_reader_that_goes_away_gives_credit_back() {
    let mut guest = Guest::new();
    let (reader, writer) = pipe();
    let (_theirs, ours) = UnixStream::pair().unwrap();
    let port = guest.open(16, Some(ours.into()), Some(writer));
    for _ in 0..4 {
        guest.send_data(port, PORT, &[0; 65_536]);
    }
    assert!(!guest.received_ops().contains(&op::SHUTDOWN));
    drop(reader);
    assert!(guest.received_ops().contains(&op::SHUTDOWN));
    for _ in 0..4 {
        guest.send_data(port, PORT, &[0; 65_536]);
    }
    assert!(!guest.received_ops().contains(&op::RST));
}

#[test]
fn closing_a_stream_resets_it_at_once() {
    let mut guest = Guest::new();
    let (mut reader, writer) = pipe();
    let port = guest.open(16, None, Some(writer));
    guest.received();
    guest.handle.close(16);
    guest.handle.close(16);
    guest.handle.close(4711);
    let packets = guest.received();
    assert_eq!(packets.len(), 1);
    assert_eq!((packets[0].0.op, packets[0].0.src_port), (op::RST, port));
    assert_eq!(guest.reported(), closed(16, true));
    assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_reset_of_the_device_closes_all_streams_as_reset() {
    let mut guest = Guest::new();
    connect_agent(&mut guest, 77);
    let (mut reader, writer) = pipe();
    guest.open(16, None, Some(writer));
    guest
        .handle
        .open(StreamParams {
            stream: 17,
            port: PORT,
            header: vec![],
            input: None,
            output: None,
        })
        .unwrap();
    guest.harness.deactivate();
    let mut events = guest.reported();
    events.sort_by_key(|event| match event {
        VsockEvent::StreamClosed { stream, .. } => *stream,
        VsockEvent::AgentConnected => 0,
    });
    assert_eq!(events, [closed(16, true), closed(17, true)].concat());
    assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(guest.shim.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(guest.harness.step(0).unwrap(), 0, "nothing is waited for");
    // And it can be activated again, but the agent's connection is spent.
    let features = guest.harness.device.features();
    guest.harness.activate(features);
    assert_eq!(guest.harness.device.counts(), (0, 0));
}
