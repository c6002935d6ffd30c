//! An interface of a pod as CNI made it: its name, its addresses, and how they are written.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use brig_agent_protocol::agent;

/// An address with the length of its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// The address, host bits included.
    pub address: IpAddr,
    /// Bits of the prefix.
    pub length: u8,
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// An address as an interface has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// With the length of its prefix.
    pub prefix: Prefix,
    /// How far it is known, `RT_SCOPE_*`.
    pub scope: u8,
    /// Nothing begins from there by itself.
    pub deprecated: bool,
}

impl Address {
    /// What the agent is told.
    pub(super) fn message(&self) -> agent::Address {
        agent::Address {
            prefix: self.prefix.to_string(),
            scope: self.scope.into(),
            deprecated: self.deprecated,
            ..agent::Address::default()
        }
    }
}

/// An interface that the guest is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u16,
    /// Nobody answers for addresses there (`IFF_NOARP`).
    pub noarp: bool,
    /// It receives the multicast groups alone that the namespace has joined.
    pub filters_multicast: bool,
    /// Its addresses in the kernel's order.
    pub addresses: Vec<Address>,
}

/// An Ethernet address as the agent reads it.
pub(super) fn mac_text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The link-local address that a kernel derives from a MAC (RFC 4291, appendix A).
pub(super) fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}
