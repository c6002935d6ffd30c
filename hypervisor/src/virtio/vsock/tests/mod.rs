//! The rules of the socket device, one test each, through real queues and descriptors.

mod addresses;
mod credit;
mod endings;
mod exhaustive;
mod hostile;
mod streams;

use std::io::Read;
use std::os::fd::OwnedFd;

use super::packet::op;
use super::testing::{Guest, PORT};
use super::{StreamParams, VsockEvent};

fn pipe() -> (std::fs::File, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    (reader.into(), writer)
}

/// Reads a pipe to its end while the device goes on filling it.
fn read_to_end(guest: &mut Guest, mut reader: std::fs::File) -> Vec<u8> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let mut all = Vec::new();
    loop {
        match reader.read_to_end(&mut all) {
            Ok(_) => return all,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        assert!(
            guest.harness.step(1000).unwrap() > 0,
            "stuck at {} bytes",
            all.len()
        );
    }
}

fn closed(stream: u64, reset: bool) -> Vec<VsockEvent> {
    vec![VsockEvent::StreamClosed { stream, reset }]
}

fn connect_agent(guest: &mut Guest, port: u32) {
    guest.send(1024, port, op::REQUEST, 0);
    assert_eq!(guest.received_ops(), [op::RESPONSE]);
    assert_eq!(guest.reported(), [VsockEvent::AgentConnected]);
}

impl Guest {
    /// Opens a stream while another's packets may be under way.
    fn open_again(&mut self, stream: u64, output: Option<OwnedFd>) -> u32 {
        self.handle
            .open(StreamParams {
                stream,
                port: PORT,
                header: vec![],
                input: None,
                output,
            })
            .unwrap();
        let packets = self.received();
        let (header, _) = packets
            .iter()
            .find(|(header, _)| header.op == op::REQUEST)
            .unwrap();
        let port = header.src_port;
        self.send(port, PORT, op::RESPONSE, 0);
        port
    }
}
