//! The main routing table, as the agent's messages.

use std::net::IpAddr;

use brig_agent_protocol::agent;
use netlink_packet_core::Emitable as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType, RouteVia,
};

use crate::node::network::error::NetworkError;
use crate::node::network::interface::{Link, Prefix, link_local};

/// Routing tables, `linux/rtnetlink.h`.
const MAIN: u32 = 254;
const LOCAL: u32 = 255;

/// The routes of the main table, those that others depend on first, and what is left out.
pub fn of(
    messages: &[RouteMessage],
    links: &[Link],
) -> Result<(Vec<agent::Route>, Vec<String>), NetworkError> {
    let mut routes = Vec::new();
    let mut left_out = Vec::new();
    for message in messages {
        match judge(message, links) {
            Judgement::Take(route) => routes.push(*route),
            Judgement::Known => {}
            Judgement::LeaveOut(why) => left_out.push(why),
            Judgement::Refuse(why) => return Err(NetworkError::Unsupported(why)),
        }
    }
    // Stable: the kernel's order otherwise.
    routes.sort_by_key(|route| !route.gateway.is_empty());
    Ok((routes, left_out))
}

enum Judgement {
    Take(Box<agent::Route>),
    /// The guest's kernel knows it by itself.
    Known,
    LeaveOut(String),
    Refuse(String),
}

/// What the attributes of a route say.
#[derive(Default)]
struct Parts {
    destination: Option<IpAddr>,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    interface: Option<u32>,
    metric: u32,
    metrics: Vec<u8>,
    table: Option<u32>,
    several_hops: bool,
    encapsulated: bool,
}

impl Parts {
    fn of(message: &RouteMessage) -> Self {
        let mut parts = Self::default();
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => parts.destination = ip(address),
                RouteAttribute::Gateway(address) => parts.gateway = ip(address),
                RouteAttribute::Via(RouteVia::Inet(address)) => {
                    parts.gateway = Some((*address).into());
                }
                RouteAttribute::Via(RouteVia::Inet6(address)) => {
                    parts.gateway = Some((*address).into());
                }
                RouteAttribute::PrefSource(address) => parts.source = ip(address),
                RouteAttribute::Oif(index) => parts.interface = Some(*index),
                RouteAttribute::Priority(metric) => parts.metric = *metric,
                RouteAttribute::Table(table) => parts.table = Some(*table),
                RouteAttribute::MultiPath(_) => parts.several_hops = true,
                RouteAttribute::Encap(_) => parts.encapsulated = true,
                RouteAttribute::Metrics(metrics) => {
                    let metrics = metrics.as_slice();
                    parts.metrics = vec![0; metrics.buffer_len()];
                    metrics.emit(&mut parts.metrics);
                }
                _ => {}
            }
        }
        parts
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn judge(message: &RouteMessage, links: &[Link]) -> Judgement {
    let header = &message.header;
    let parts = Parts::of(message);
    let table = parts.table.unwrap_or(header.table.into());
    if table == LOCAL
        || header.flags.contains(RouteFlags::Cloned)
        || matches!(
            header.protocol,
            RouteProtocol::Ra | RouteProtocol::IcmpRedirect
        )
    {
        return Judgement::Known;
    }
    let destination = destination(header, &parts);
    if table != MAIN {
        return Judgement::LeaveOut(format!(
            "the route to {destination} in routing table {table}: a VM gets the main table only"
        ));
    }
    match header.kind {
        RouteType::Unicast => {}
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit => {
            return if header.protocol == RouteProtocol::Kernel {
                Judgement::Known
            } else {
                Judgement::Refuse(format!(
                    "its route to {destination} is of type {:?}",
                    header.kind
                ))
            };
        }
        _ => return Judgement::Known,
    }
    if parts.several_hops {
        return Judgement::Refuse(format!("its route to {destination} has several next hops"));
    }
    if parts.encapsulated {
        return Judgement::Refuse(format!("its route to {destination} encapsulates"));
    }
    if header.tos != 0 || header.source_prefix_length != 0 {
        return Judgement::LeaveOut(format!(
            "the route to {destination} for one type of service or source"
        ));
    }
    let Some(link) = links
        .iter()
        .find(|link| Some(link.index) == parts.interface)
    else {
        // Of the loopback interface, or of one that is no part of the guest's network.
        return Judgement::Known;
    };
    if is_own_link_local(header, &parts, link) {
        return Judgement::Known;
    }
    Judgement::Take(Box::new(agent::Route {
        destination: destination_field(header, &parts),
        gateway: parts.gateway.map_or_else(String::new, |g| g.to_string()),
        interface: link.name.clone(),
        source: parts.source.map_or_else(String::new, |s| s.to_string()),
        scope: match header.address_family {
            // IPv6 knows no scopes.
            AddressFamily::Inet => u8::from(header.scope).into(),
            _ => u8::from(RouteScope::Universe).into(),
        },
        metric: parts.metric,
        onlink: header.flags.contains(RouteFlags::Onlink),
        family: if header.address_family == AddressFamily::Inet6 {
            6
        } else {
            4
        },
        metrics: parts.metrics,
        protocol: u8::from(header.protocol).into(),
        ..agent::Route::default()
    }))
}

/// The route that a kernel makes with an interface's link-local address.
fn is_own_link_local(header: &RouteHeader, parts: &Parts, link: &Link) -> bool {
    let network = link_local(link.mac).segments()[0];
    header.protocol == RouteProtocol::Kernel
        && header.destination_prefix_length == 64
        && matches!(parts.destination, Some(IpAddr::V6(address)) if address.segments()[..4] == [network, 0, 0, 0])
}

fn destination_field(header: &RouteHeader, parts: &Parts) -> String {
    if header.destination_prefix_length == 0 {
        return String::new();
    }
    parts.destination.map_or_else(String::new, |address| {
        let length = header.destination_prefix_length;
        Prefix { address, length }.to_string()
    })
}

/// For messages.
fn destination(header: &RouteHeader, parts: &Parts) -> String {
    let field = destination_field(header, parts);
    if field.is_empty() {
        "everywhere".to_owned()
    } else {
        field
    }
}
