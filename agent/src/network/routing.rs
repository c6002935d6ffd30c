//! The kernel's routing socket (rtnetlink(7)): links, addresses, routes and neighbours.
//!
//! The kernel has done what a message asks for when it takes it, so nothing here waits for anybody.
use std::{io, net::IpAddr};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::netlink::{ACK, Answer, DUMP, answers, attribute, message};

/// A message for the socket: its kind (`RTM_*`), flags, the header of its family, and attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    kind: u16,
    flags: u16,
    general: Vec<u8>,
    attributes: Vec<u8>,
}

impl Request {
    /// Without attributes yet.
    pub(super) fn new(kind: u16, flags: u16, general: &[u8]) -> Self {
        Self {
            kind,
            flags,
            general: general.to_vec(),
            attributes: Vec::new(),
        }
    }

    /// With one attribute more, whose value may be 64 KiB less 4 bytes at most.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> io::Result<Self> {
        attribute(&mut self.attributes, kind, value)?;
        Ok(self)
    }

    /// With a number as an attribute.
    pub(super) fn with_number(self, kind: u16, value: u32) -> io::Result<Self> {
        self.with(kind, &value.to_ne_bytes())
    }

    /// With an address as an attribute.
    pub(super) fn with_address(self, kind: u16, address: IpAddr) -> io::Result<Self> {
        self.with(kind, &octets(address))
    }

    /// The header of its family.
    #[cfg(test)]
    pub(super) fn general(&self) -> &[u8] {
        &self.general
    }

    /// An attribute's value.
    #[cfg(test)]
    pub(super) fn value(&self, kind: u16) -> Option<&[u8]> {
        crate::netlink::attributes(&self.attributes)
            .find(|(number, _)| *number == kind)
            .map(|(_, value)| value)
    }
}

/// The number of an address's family, as the kernel has it.
pub(super) fn family(address: IpAddr) -> u8 {
    // AF_INET and AF_INET6.
    if address.is_ipv4() { 2 } else { 10 }
}

/// An address as the kernel has it.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The socket.
pub(super) struct Routing {
    socket: Socket,
    sequence: u32,
}

impl Routing {
    /// Of the network namespace that the caller is in.
    ///
    /// # Errors
    /// Those of the system calls.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // An answer need not repeat what it is the answer to.
        socket.set_cap_ack(true)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Has the kernel do what is asked for.
    ///
    /// # Errors
    /// The kernel's, by its number.
    pub(super) fn change(&mut self, request: &Request) -> io::Result<()> {
        self.ask(request, ACK, |_| ())
    }

    /// The bodies of what the kernel lists: the header of the family and attributes.
    ///
    /// # Errors
    /// The kernel's, by its number.
    pub(super) fn list(&mut self, request: &Request) -> io::Result<Vec<Vec<u8>>> {
        let mut listed = Vec::new();
        self.ask(request, DUMP, |body| listed.push(body.to_vec()))?;
        Ok(listed)
    }

    fn ask(
        &mut self,
        request: &Request,
        flags: u16,
        mut listed: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let Request {
            kind,
            general,
            attributes,
            ..
        } = request;
        let mut bytes = Vec::new();
        let flags = request.flags | flags;
        message(&mut bytes, *kind, flags, self.sequence, general, attributes)?;
        self.socket.send(&bytes, 0)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for answer in answers(&bytes) {
                match answer? {
                    // What is left of a question whose answer was not read to its end.
                    (sequence, _) if sequence != self.sequence => {}
                    (_, Answer::Done) => return Ok(()),
                    (_, Answer::Refused(code)) => return Err(io::Error::from_raw_os_error(code)),
                    (_, Answer::Listed(body)) => listed(body),
                }
            }
        }
    }
}
