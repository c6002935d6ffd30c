//! Streams of the shim: header, input, output, and every kind of descriptor.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::*;
use crate::virtio::vsock::handle::MAX_STREAMS;
use crate::virtio::vsock::packet::{op, shutdown};
use crate::virtio::vsock::testing::{GUEST, Guest, PORT, payload};
use crate::virtio::vsock::{StreamParams, VsockError};

#[test]
fn a_stream_sends_its_header_then_input_then_a_shutdown() {
    let mut guest = Guest::new();
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    theirs.write_all(b"input").unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    let port = guest.request(16, b"HEADER", Some(ours.into()), None);
    guest.send(port, PORT, op::RESPONSE, 0);
    let packets = guest.received();
    assert_eq!(payload(&packets), b"HEADERinput");
    let (last, _) = packets.last().unwrap();
    assert_eq!((last.op, last.flags), (op::SHUTDOWN, shutdown::SEND));
    assert!(guest.reported().is_empty(), "the guest may still send");
    guest.send(port, PORT, op::SHUTDOWN, shutdown::BOTH);
    assert_eq!(guest.received_ops(), [op::RST]);
    assert_eq!(guest.reported(), closed(16, false));
}

#[test]
fn without_input_sending_ends_right_after_the_header() {
    let mut guest = Guest::new();
    let port = guest.request(16, b"12345678", None, None);
    guest.send(port, PORT, op::RESPONSE, 0);
    let packets = guest.received();
    assert_eq!(packets[0].1, b"12345678");
    assert_eq!(packets[1].0.op, op::SHUTDOWN);
    assert_eq!(packets[1].0.flags, shutdown::SEND);
    assert_eq!(packets.len(), 2);
}

#[test]
fn a_large_input_arrives_whole_and_in_order() {
    let mut guest = Guest::new();
    let sent: Vec<u8> = (0..3_000_000u32)
        .map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&sent).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    // A regular file, for which epoll cannot wait.
    let port = guest.open(16, Some(file.into()), None);
    let mut got = Vec::new();
    loop {
        let packets = guest.received();
        got.extend(payload(&packets));
        if packets.iter().any(|(header, _)| header.op == op::SHUTDOWN) {
            break;
        }
        let mut update = Guest::header(port, PORT, op::CREDIT_UPDATE);
        update.fwd_cnt = u32::try_from(got.len()).unwrap();
        guest.send_raw(&update, &[]);
    }
    assert!(got == sent);
}

#[test]
fn output_to_a_regular_file_and_to_dev_null_works() {
    let mut guest = Guest::new();
    let mut file = tempfile::tempfile().unwrap();
    let null = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .unwrap();
    let first = guest.open(16, None, Some(file.try_clone().unwrap().into()));
    let second = guest.open_again(17, Some(null.into()));
    guest.received();
    guest.send_data(first, PORT, b"to the file");
    guest.send_data(second, PORT, b"to nowhere");
    guest.send(first, PORT, op::SHUTDOWN, shutdown::BOTH);
    guest.send(second, PORT, op::SHUTDOWN, shutdown::BOTH);
    assert_eq!(guest.reported().len(), 2);
    let mut got = String::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut got).unwrap();
    assert_eq!(got, "to the file");
}

#[test]
fn the_same_socket_serves_both_directions() {
    let mut guest = Guest::new();
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    let copy = ours.try_clone().unwrap();
    let port = guest.open(16, Some(ours.into()), Some(copy.into()));
    theirs.write_all(b"ping").unwrap();
    assert_eq!(payload(&guest.received()), b"ping");
    guest.send_data(port, PORT, b"pong");
    guest.send(port, PORT, op::SHUTDOWN, shutdown::SEND);
    let mut got = String::new();
    theirs.read_to_string(&mut got).unwrap();
    assert_eq!(
        got, "pong",
        "the guest's end of sending is the socket's end of file"
    );
    theirs.write_all(b"still here").unwrap();
    assert_eq!(payload(&guest.received()), b"still here");
}

#[test]
fn a_fifo_that_no_writer_has_opened_is_not_at_its_end() {
    use nix::fcntl::{OFlag, open};
    use nix::sys::stat::Mode;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stdin");
    nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let reader = open(&path, OFlag::O_RDONLY | OFlag::O_NONBLOCK, Mode::empty()).unwrap();
    let mut guest = Guest::new();
    guest.open(16, Some(reader), None);
    assert!(guest.received().is_empty());
    let mut writer = std::fs::File::options().write(true).open(&path).unwrap();
    assert!(guest.received().is_empty());
    writer.write_all(b"now").unwrap();
    drop(writer);
    let packets = guest.received();
    assert_eq!(payload(&packets), b"now");
    assert_eq!(packets.last().unwrap().0.op, op::SHUTDOWN);
}

#[test]
fn a_number_in_use_and_a_stream_over_the_limit_are_refused() {
    let guest = Guest::bare();
    let params = |stream| StreamParams {
        stream,
        port: PORT,
        header: vec![],
        input: None,
        output: None,
    };
    for stream in 0..MAX_STREAMS as u64 {
        guest.handle.open(params(stream)).unwrap();
    }
    assert_eq!(guest.handle.open(params(5)), Err(VsockError::InUse(5)));
    assert_eq!(guest.handle.open(params(1 << 40)), Err(VsockError::Limit));
    let mut guest = guest;
    guest.handle.close(5);
    guest.harness.run();
    assert_eq!(guest.reported(), closed(5, true));
    guest.handle.open(params(5)).unwrap();
    guest.harness.run();
    assert_eq!(guest.harness.device.counts().0, MAX_STREAMS);
}

#[test]
fn a_stream_opened_before_the_driver_is_up_waits_for_it() {
    let (_shim, agent) = UnixStream::pair().unwrap();
    let (device, handle) = crate::virtio::vsock::Vsock::new(GUEST, agent.into(), Box::new(|_| {}));
    handle
        .open(StreamParams {
            stream: 16,
            port: PORT,
            header: vec![],
            input: None,
            output: None,
        })
        .unwrap();
    let mut harness = crate::virtio::testing::Harness::new(device);
    harness.activate(0);
    let buffer = harness.alloc(4096);
    harness.queues[0].add(&[(buffer, 4096, true)]);
    harness.run();
    assert_eq!(harness.queues[0].used().len(), 1);
}

#[test]
fn an_event_of_an_ended_stream_is_not_taken_for_its_successor() {
    use nix::fcntl::{OFlag, open};
    use nix::sys::stat::Mode;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stdin");
    nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let reader = open(&path, OFlag::O_RDONLY | OFlag::O_NONBLOCK, Mode::empty()).unwrap();
    let mut guest = Guest::new();
    let (_theirs, ours) = UnixStream::pair().unwrap();
    guest.open(16, Some(ours.into()), None);
    let tokens: Vec<u32> = (4..4 + 4096).collect();
    guest.handle.close(16);
    guest.received();
    // The successor's input would read as ended if it were read without an event of its own.
    guest.open(17, Some(reader), None);
    for token in tokens {
        guest.harness.deliver(token, EventSet::IN);
    }
    assert!(guest.received().is_empty());
}
