//! Every short sequence of what the guest, the reader and the shim can do to one stream.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::super::packet::op;
use super::super::testing::{Guest, PORT};
use super::super::{StreamParams, VsockEvent};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// A packet without payload: operation and flags.
    Packet(u16, u32),
    /// A byte from the guest.
    Data,
    /// Its buffer, in bytes.
    Credit(u32),
    /// A byte for the guest.
    Write,
    /// The host's end goes.
    End,
    /// The shim closes the stream.
    Close,
}

const ALPHABET: [Step; 12] = [
    Step::Packet(op::RESPONSE, 0),
    Step::Packet(op::REQUEST, 0),
    Step::Packet(op::RST, 0),
    Step::Packet(op::SHUTDOWN, 1),
    Step::Packet(op::SHUTDOWN, 2),
    Step::Packet(op::SHUTDOWN, 3),
    Step::Packet(op::CREDIT_REQUEST, 0),
    Step::Data,
    Step::Credit(1),
    Step::Write,
    Step::End,
    Step::Close,
];

/// No payload before the guest has accepted, nor over its credit, nor after it said that it reads no
/// more; nothing at all after a reset by either side; the end is told once.
#[test]
fn no_short_sequence_breaks_the_order_of_a_stream() {
    let depth = 3;
    let mut guest = Guest::new();
    let mut stream = 0;
    let total = crate::fuzzing::sequences(&ALPHABET, depth, |steps| {
        stream += 1;
        run(&mut guest, stream, steps);
    });
    assert_eq!(total, ALPHABET.len().pow(depth));
}

fn run(guest: &mut Guest, stream: u64, steps: &[Step]) {
    let (mut end, theirs) = UnixStream::pair().unwrap();
    end.set_nonblocking(true).unwrap();
    let copy = theirs.try_clone().unwrap();
    let params = StreamParams {
        stream,
        port: PORT,
        header: b"h".to_vec(),
        input: Some(theirs.into()),
        output: Some(copy.into()),
    };
    guest.handle.open(params).unwrap();
    let opening = guest.received();
    assert_eq!(opening.len(), 1);
    let port = opening[0].0.src_port;
    let mut end = Some(&mut end);
    let (mut accepted, mut reading, mut over) = (false, true, false);
    let (mut sent, mut alloc) = (0u32, 0u32);
    for step in steps {
        match *step {
            Step::Packet(op, flags) => {
                let mut header = Guest::header(port, PORT, op);
                header.flags = flags;
                header.buf_alloc = 2;
                alloc = 2;
                // A second acceptance, and a request for what is open, are answered with a reset.
                accepted |= op == super::super::packet::op::RESPONSE;
                reading &= !(op == super::super::packet::op::SHUTDOWN && flags & 1 != 0);
                guest.send_raw(&header, &[]);
                over |= op == super::super::packet::op::RST;
            }
            Step::Data => {
                let mut header = Guest::header(port, PORT, op::RW);
                header.length = 1;
                header.buf_alloc = alloc;
                guest.send_raw(&header, b"g");
            }
            Step::Credit(bytes) => {
                let mut header = Guest::header(port, PORT, op::CREDIT_UPDATE);
                header.buf_alloc = bytes;
                alloc = bytes;
                guest.send_raw(&header, &[]);
            }
            Step::Write => {
                if let Some(end) = &mut end {
                    let _ = end.write(b"w");
                    let _ = end.read(&mut [0; 8]);
                }
            }
            Step::End => {
                if let Some(end) = end.take() {
                    let _ = end.shutdown(std::net::Shutdown::Both);
                }
            }
            Step::Close => guest.handle.close(stream),
        }
        for (header, payload) in guest.received() {
            assert_eq!(header.src_port, port, "{steps:?}");
            match header.op {
                op::RST => over = true,
                op::RW => {
                    assert!(!over, "data after the end: {steps:?}");
                    assert!(accepted, "data before the answer: {steps:?}");
                    assert!(reading, "data for a guest that reads no more: {steps:?}");
                    sent += u32::try_from(payload.len()).unwrap();
                    assert!(sent <= alloc, "{sent} bytes of {alloc}: {steps:?}");
                }
                _ => assert!(payload.is_empty(), "{steps:?}"),
            }
        }
    }
    // Whatever is left ends with the shim's word, and is told once.
    guest.handle.close(stream);
    guest.received();
    let ends = guest.reported();
    let ours = ends.iter().filter(
        |event| matches!(event, VsockEvent::StreamClosed { stream: of, .. } if *of == stream),
    );
    assert_eq!(ours.count(), 1, "{steps:?}: {ends:?}");
    assert_eq!(guest.harness.device.counts().0, 0, "{steps:?}");
}
