//! A blocking rtnetlink socket: one request at a time, in the namespace of the thread that opened it.
//!
//! Trusted: the kernel.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// `NLM_F_DUMP_INTR`: what was listed changed meanwhile.
const INTERRUPTED: u16 = 0x10;
/// How often a list that changes while it is read is read again.
const ATTEMPTS: usize = 16;

/// A connection to the kernel's network configuration.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens one in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Asks for a change and waits until it is made.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.receive(|_| {}).map(drop)
    }

    /// Lists what `message` asks for.
    pub fn list(&mut self, message: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..ATTEMPTS {
            self.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            let mut found = Vec::new();
            let complete = self.receive(|answer| found.push(answer))?;
            if complete {
                return Ok(found);
            }
        }
        Err(io::Error::other("the list changed each time it was read"))
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// Reads the answers to the last request up to its end; false if a list was interrupted.
    fn receive(&mut self, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<bool> {
        let mut complete = true;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
                // Messages are aligned to four bytes.
                let length = length
                    .max(1)
                    .checked_next_multiple_of(4)
                    .unwrap_or(usize::MAX);
                rest = rest.get(length..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                complete &= message.header.flags & INTERRUPTED == 0;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(complete),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(complete),
                            Some(_) => Err(error.to_io()),
                        };
                    }
                    NetlinkPayload::InnerMessage(answer) => each(answer),
                    _ => {}
                }
            }
        }
    }
}
