//! What CNI set up in a network namespace: interfaces, addresses, routes and permanent neighbours.
//!
//! The guest gets a copy, so that its main table and addresses are those of the namespace:
//! - Addresses are set in the guest without the kernel's own prefix routes, and those routes are passed like any
//!   other, because a plug-in may have removed or replaced them.
//! - The IPv6 link-local address that the kernel derives from the MAC, and its route, are left to the guest, which
//!   derives the same. What router advertisements brought is left to the guest too: it hears them itself.
//! - What a copy would falsify silently (several next hops, a blackhole, an interface stacked on another one) is
//!   refused; what a pod hardly misses (other routing tables) is left out and said.

mod routes;

use std::net::IpAddr;

use brig_agent_protocol::agent;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::error::{MAX_INTERFACES, NetworkError, failed};
use super::interface::{Link, Prefix, link_local, mac_text};
use super::netlink::Netlink;
use super::tap;

/// Everything the guest is to have.
#[derive(Debug, Default)]
pub struct Layout {
    /// By name, so that `eth0` is the guest's first one.
    pub links: Vec<Link>,
    /// Ordered by what they depend on.
    pub routes: Vec<agent::Route>,
    /// Permanent neighbours.
    pub neighbours: Vec<agent::Neighbour>,
    /// One sentence for each thing that is left out.
    pub left_out: Vec<String>,
}

impl Layout {
    /// Reads the namespace of the calling thread.
    pub fn read(netlink: &mut Netlink) -> Result<Self, NetworkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.kind = RouteType::Unicast;
            let found = netlink.list(&RouteNetlinkMessage::GetRoute(message));
            for found in found.map_err(|error| failed("list routes", error))? {
                if let RouteNetlinkMessage::NewRoute(route) = found {
                    routes.push(route);
                }
            }
        }
        let found = netlink
            .list(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))
            .map_err(|error| failed("list addresses", error))?;
        let addresses: Vec<_> = found
            .into_iter()
            .filter_map(|found| match found {
                RouteNetlinkMessage::NewAddress(address) => Some(address),
                _ => None,
            })
            .collect();
        let found = netlink
            .list(&RouteNetlinkMessage::GetNeighbour(
                NeighbourMessage::default(),
            ))
            .map_err(|error| failed("list neighbours", error))?;
        let neighbours: Vec<_> = found
            .into_iter()
            .filter_map(|found| match found {
                RouteNetlinkMessage::NewNeighbour(neighbour) => Some(neighbour),
                _ => None,
            })
            .collect();
        Self::of(&list_links(netlink)?, &addresses, &routes, &neighbours)
    }

    fn of(
        all_links: &[LinkMessage],
        addresses: &[AddressMessage],
        all_routes: &[RouteMessage],
        neighbours: &[NeighbourMessage],
    ) -> Result<Self, NetworkError> {
        let mut links = Vec::new();
        for message in all_links {
            let addresses = addresses
                .iter()
                .filter(|address| address.header.index == message.header.index);
            if let Some(link) = link(message, addresses, all_links)? {
                links.push(link);
            }
        }
        if links.len() > MAX_INTERFACES {
            return Err(NetworkError::TooMany(links.len()));
        }
        links.sort_by(|a, b| a.name.cmp(&b.name));
        for (position, link) in links.iter().enumerate() {
            if let Some(other) = links.iter().skip(position + 1).find(|l| l.mac == link.mac) {
                return Err(NetworkError::Unsupported(format!(
                    "its interfaces {} and {} have the same Ethernet address {}",
                    link.name,
                    other.name,
                    mac_text(&link.mac)
                )));
            }
        }
        let (routes, left_out) = routes::of(all_routes, &links)?;
        let neighbours = neighbours
            .iter()
            .filter_map(|message| neighbour(message, &links))
            .collect();
        Ok(Self {
            links,
            routes,
            neighbours,
            left_out,
        })
    }
}

impl Layout {
    /// Keeps what is new beside the interfaces with these Ethernet addresses.
    pub fn leave_out_known(&mut self, known: &[[u8; 6]]) {
        self.links.retain(|link| !known.contains(&link.mac));
        let links = &self.links;
        let is_new = |name: &str| links.iter().any(|link| link.name == name);
        self.routes.retain(|route| is_new(&route.interface));
        self.neighbours
            .retain(|neighbour| is_new(&neighbour.interface));
    }
}

/// The indexes of all interfaces.
pub fn indexes(netlink: &mut Netlink) -> Result<Vec<u32>, NetworkError> {
    let links = list_links(netlink)?;
    Ok(links.iter().map(|link| link.header.index).collect())
}

/// The index of the interface of this name.
pub fn index_of(netlink: &mut Netlink, name: &str) -> Result<u32, NetworkError> {
    let links = list_links(netlink)?;
    let found = links.iter().find(|link| name_of(link) == name);
    found
        .map(|link| link.header.index)
        .ok_or_else(|| failed(format!("find {name}"), std::io::ErrorKind::NotFound.into()))
}

fn list_links(netlink: &mut Netlink) -> Result<Vec<LinkMessage>, NetworkError> {
    let found = netlink
        .list(&RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .map_err(|error| failed("list interfaces", error))?;
    let links = found.into_iter().filter_map(|found| match found {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    });
    Ok(links.collect())
}

fn name_of(message: &LinkMessage) -> &str {
    let name = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
    name.unwrap_or("")
}

fn kind_of(message: &LinkMessage) -> Option<&InfoKind> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
                LinkInfo::Kind(kind) => Some(kind),
                _ => None,
            }),
            _ => None,
        })
}

/// The interface, if it is one for the guest: up, and nobody's part. The tunnels that the kernel adds to every
/// namespace are down; a bond's parts belong to the bond.
fn link<'a>(
    message: &LinkMessage,
    addresses: impl Iterator<Item = &'a AddressMessage>,
    all: &[LinkMessage],
) -> Result<Option<Link>, NetworkError> {
    let name = name_of(message).to_owned();
    let mut mac = None;
    let mut mtu = 0;
    let mut below = None;
    let mut elsewhere = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Controller(index) if *index != 0 => return Ok(None),
            LinkAttribute::Link(index) => below = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            _ => {}
        }
    }
    let flags = message.header.flags;
    let ours = tap::is_our_name(&name) && matches!(kind_of(message), Some(InfoKind::Tun));
    if ours || flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) {
        return Ok(None);
    }
    let unsupported = |what: &str| {
        Err(NetworkError::Unsupported(format!(
            "interface {name} {what}"
        )))
    };
    if message.header.link_layer_type != LinkLayerType::Ether {
        return unsupported("is no Ethernet interface");
    }
    let Some(mac) = mac.filter(|mac| *mac != [0; 6] && mac[0] & 1 == 0) else {
        return unsupported("has no Ethernet address");
    };
    let stacked = matches!(
        kind_of(message),
        Some(
            InfoKind::Vlan
                | InfoKind::MacVlan
                | InfoKind::MacVtap
                | InfoKind::IpVlan
                | InfoKind::IpVtap
        )
    );
    if stacked && !elsewhere && all.iter().any(|other| Some(other.header.index) == below) {
        return unsupported("is stacked on another interface of the pod");
    }
    let Ok(mtu) = u16::try_from(mtu) else {
        return unsupported("has an MTU over 65535");
    };
    Ok(Some(Link {
        index: message.header.index,
        name,
        mac,
        mtu,
        addresses: addresses
            .filter_map(|message| address(message, mac))
            .collect(),
    }))
}

/// An address that the guest does not find by itself.
fn address(message: &AddressMessage, mac: [u8; 6]) -> Option<Prefix> {
    let mut local = None;
    let mut peer = None;
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let address = local.or(peer)?;
    if let IpAddr::V6(address) = address
        && (!flags.contains(AddressFlags::Permanent) || address == link_local(mac))
    {
        return None;
    }
    Some(Prefix {
        address,
        length: message.header.prefix_len,
    })
}

fn neighbour(message: &NeighbourMessage, links: &[Link]) -> Option<agent::Neighbour> {
    let link = links
        .iter()
        .find(|link| link.index == message.header.ifindex)?;
    if message.header.state != NeighbourState::Permanent
        || message.header.flags.contains(NeighbourFlags::Proxy)
    {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                address = Some(IpAddr::V4(*v4));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                address = Some(IpAddr::V6(*v6));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
            }
            _ => {}
        }
    }
    Some(agent::Neighbour {
        address: address?.to_string(),
        mac: mac_text(&mac?),
        interface: link.name.clone(),
        ..agent::Neighbour::default()
    })
}

#[cfg(test)]
mod tests;
