//! What CNI set up in a network namespace: interfaces, addresses, routes and permanent neighbours.
//!
//! The guest gets a copy, so that its main table and addresses are those of the namespace:
//! - Addresses are set in the guest without the kernel's own prefix routes, and those routes are passed like any
//!   other, because a plug-in may have removed or replaced them.
//! - The IPv6 link-local address that the kernel derives from the MAC, and its route, are left to the guest, which
//!   derives the same. What router advertisements brought is left to the guest too: it hears them itself.
//! - What a copy would falsify silently (several next hops, a blackhole, an interface stacked on another one) is
//!   refused; what a pod hardly misses (other routing tables) is left out and said.
//! - The guest has a loopback interface of its own, and gets what addresses were added to the namespace's.

mod links;
mod routes;
mod stacked;

use std::net::{IpAddr, Ipv6Addr};

use brig_agent_protocol::agent;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoIpVlan, InfoKind, IpVlanMode, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
    LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::error::{MAX_INTERFACES, NetworkError, failed};
use super::interface::{Address, Link, Prefix, link_local, mac_text};
use super::netlink::Netlink;
use super::tap;
use links::{kind_of, list_links, name_of};

/// Everything the guest is to have.
#[derive(Debug, Default)]
pub struct Layout {
    /// By name, so that `eth0` is the guest's first one.
    pub links: Vec<Link>,
    /// Addresses of the loopback interface that no kernel gives it by itself.
    pub loopback: Vec<Address>,
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
        let mut loopback = Vec::new();
        for message in all_links {
            let addresses = addresses
                .iter()
                .filter(|address| address.header.index == message.header.index);
            if message.header.flags.contains(LinkFlags::Loopback) {
                loopback.extend(addresses.filter_map(of_loopback));
            } else if let Some(link) = link(message, addresses)? {
                links.push(link);
            }
        }
        stacked::refuse(all_links, &links)?;
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
            loopback,
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

/// The name of an interface; its number, if it is gone.
pub fn name_of_index(netlink: &mut Netlink, index: u32) -> Result<String, NetworkError> {
    let links = list_links(netlink)?;
    let found = links.iter().find(|link| link.header.index == index);
    Ok(found.map_or_else(|| index.to_string(), |link| name_of(link).to_owned()))
}

/// The interface, if it is one for the guest: up, and nobody's part. The tunnels that the kernel adds to every
/// namespace are down; a bond's parts belong to the bond.
fn link<'a>(
    message: &LinkMessage,
    addresses: impl Iterator<Item = &'a AddressMessage>,
) -> Result<Option<Link>, NetworkError> {
    let name = name_of(message).to_owned();
    let mut mac = None;
    let mut mtu = 0;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Controller(index) if *index != 0 => return Ok(None),
            _ => {}
        }
    }
    let flags = message.header.flags;
    let kind = kind_of(message);
    let ours = tap::is_our_name(&name) && matches!(kind, Some(InfoKind::Tun));
    if ours || !flags.contains(LinkFlags::Up) {
        return Ok(None);
    }
    let unsupported = |what: &str| {
        Err(NetworkError::Unsupported(format!(
            "interface {name} {what}"
        )))
    };
    if matches!(kind, Some(InfoKind::Vrf)) {
        return unsupported("is a VRF: a VM gets the main routing table only");
    }
    if is_l3s(message) {
        return unsupported(
            "is an ipvlan of mode l3s, whose packets never pass by the interface itself; use mode l2 or l3",
        );
    }
    if message.header.link_layer_type != LinkLayerType::Ether {
        return unsupported("is no Ethernet interface");
    }
    let Some(mac) = mac.filter(|mac| *mac != [0; 6] && mac[0] & 1 == 0) else {
        return unsupported("has no Ethernet address");
    };
    let Ok(mtu) = u16::try_from(mtu) else {
        return unsupported("has an MTU over 65535");
    };
    Ok(Some(Link {
        index: message.header.index,
        name,
        mac,
        mtu,
        noarp: flags.contains(LinkFlags::Noarp),
        // A pair of ends has no hardware in between that could.
        filters_multicast: !matches!(kind, Some(InfoKind::Veth | InfoKind::Netkit)),
        addresses: addresses
            .filter_map(|message| address(message, mac))
            .collect(),
    }))
}

/// Such an ipvlan's packets come by its master, and are the namespace's before any ingress is asked.
fn is_l3s(message: &LinkMessage) -> bool {
    message.attributes.iter().any(|attribute| {
        let LinkAttribute::LinkInfo(infos) = attribute else {
            return false;
        };
        infos.iter().any(|info| {
            let LinkInfo::Data(InfoData::IpVlan(data)) = info else {
                return false;
            };
            data.contains(&InfoIpVlan::Mode(IpVlanMode::L3S))
        })
    })
}

/// An address of the loopback interface that somebody has added.
fn of_loopback(message: &AddressMessage) -> Option<Address> {
    let found = address(message, [0; 6])?;
    let own = match found.prefix.address {
        IpAddr::V4(address) => address.is_loopback(),
        IpAddr::V6(address) => address == Ipv6Addr::LOCALHOST,
    };
    (!own).then_some(found)
}

/// An address that the guest does not find by itself.
fn address(message: &AddressMessage, mac: [u8; 6]) -> Option<Address> {
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
    Some(Address {
        prefix: Prefix {
            address,
            length: message.header.prefix_len,
        },
        scope: message.header.scope.into(),
        deprecated: flags.contains(AddressFlags::Deprecated),
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
