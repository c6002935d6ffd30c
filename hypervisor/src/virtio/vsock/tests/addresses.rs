//! Who may talk to whom: addresses, the agent's one connection, packets of no connection.

use std::io::{Read, Write};

use super::*;
use crate::virtio::vsock::packet::{op, shutdown};
use crate::virtio::vsock::testing::{GUEST, Guest, payload};

#[test]
fn packets_with_a_foreign_address_are_dropped_without_an_answer() {
    let mut guest = Guest::new();
    let mut foreign = Guest::header(1024, 7, op::REQUEST);
    foreign.src_cid = 9;
    guest.send_raw(&foreign, &[]);
    foreign.src_cid = u64::from(GUEST);
    for cid in [0, 1, 3, 1 << 32 | 2] {
        foreign.dst_cid = cid;
        guest.send_raw(&foreign, &[]);
    }
    assert!(guest.received().is_empty());
    assert!(guest.reported().is_empty());
}

#[test]
fn the_agents_connection_is_spliced_with_its_socket() {
    let mut guest = Guest::new();
    connect_agent(&mut guest, 77);
    guest.shim.write_all(b"hello agent").unwrap();
    assert_eq!(payload(&guest.received()), b"hello agent");
    guest.send_data(1024, 77, b"hello shim");
    let mut buffer = [0; 32];
    let count = guest.shim.read(&mut buffer).unwrap();
    assert_eq!(&buffer[..count], b"hello shim");
}

#[test]
fn what_the_shim_wrote_before_the_agent_connected_is_delivered() {
    let mut guest = Guest::new();
    guest.shim.write_all(b"early").unwrap();
    guest.send(1024, 77, op::REQUEST, 0);
    let packets = guest.received();
    assert_eq!(packets[0].0.op, op::RESPONSE);
    assert_eq!(payload(&packets), b"early");
}

#[test]
fn a_second_connection_to_the_agents_port_is_refused_for_ever() {
    let mut guest = Guest::new();
    connect_agent(&mut guest, 77);
    guest.send(1024, 78, op::REQUEST, 0);
    assert_eq!(guest.received_ops(), [op::RST]);
    // The first one is not disturbed, and its end frees nothing.
    guest.shim.write_all(b"x").unwrap();
    assert_eq!(payload(&guest.received()), b"x");
    guest.send(1024, 77, op::SHUTDOWN, shutdown::BOTH);
    guest.received();
    guest.send(1024, 79, op::REQUEST, 0);
    let packets = guest.received();
    assert_eq!(packets.len(), 1);
    assert_eq!((packets[0].0.op, packets[0].0.dst_port), (op::RST, 79));
    assert!(guest.reported().is_empty());
}

#[test]
fn the_end_of_the_agents_connection_is_end_of_file_for_the_shim() {
    let mut guest = Guest::new();
    connect_agent(&mut guest, 77);
    guest.send(1024, 77, op::RST, 0);
    guest.harness.run();
    assert_eq!(guest.shim.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(guest.harness.device.counts(), (0, 0));
}

#[test]
fn other_requests_and_packets_of_no_connection_are_answered_with_a_reset() {
    let mut guest = Guest::new();
    for op in [op::REQUEST, op::RW, op::SHUTDOWN, op::CREDIT_REQUEST, 99] {
        guest.send(22, 5, op, 0);
        let packets = guest.received();
        assert_eq!(packets.len(), 1);
        let header = packets[0].0;
        assert_eq!(
            (header.op, header.src_port, header.dst_port),
            (op::RST, 22, 5)
        );
    }
    guest.send(22, 5, op::RST, 0);
    assert!(guest.received().is_empty(), "a reset is not answered");
    let mut seqpacket = Guest::header(1024, 5, op::REQUEST);
    seqpacket.kind = 2;
    guest.send_raw(&seqpacket, &[]);
    assert_eq!(guest.received_ops(), [op::RST]);
}
