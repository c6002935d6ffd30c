use std::net::Ipv4Addr;

use netlink_packet_route::address::AddressHeaderFlags;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteNextHop, RouteProtocol, RouteScope,
};

use super::*;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

fn interface(index: u32, name: &str, mac: [u8; 6]) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.link_layer_type = LinkLayerType::Ether;
    message.header.flags = LinkFlags::Up;
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(1500),
        LinkAttribute::Address(mac.to_vec()),
    ];
    message
}

fn mac(last: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, last]
}

fn inet(index: u32, address: &str, length: u8, flags: AddressFlags) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = length;
    message.header.flags = AddressHeaderFlags::empty();
    message.attributes = vec![
        AddressAttribute::Address(address.parse().unwrap()),
        AddressAttribute::Flags(flags),
    ];
    message
}

fn route(destination: Option<(Ipv4Addr, u8)>, gateway: Option<Ipv4Addr>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = 254;
    message.header.kind = RouteType::Unicast;
    message.header.scope = if gateway.is_some() {
        RouteScope::Universe
    } else {
        RouteScope::Link
    };
    if let Some((address, length)) = destination {
        message.header.destination_prefix_length = length;
        message
            .attributes
            .push(RouteAttribute::Destination(RouteAddress::Inet(address)));
    }
    if let Some(gateway) = gateway {
        message
            .attributes
            .push(RouteAttribute::Gateway(RouteAddress::Inet(gateway)));
    }
    message.attributes.push(RouteAttribute::Oif(2));
    message
}

fn layout(links: &[LinkMessage], routes: &[RouteMessage]) -> Result<Layout, NetworkError> {
    Layout::of(links, &[], routes, &[])
}

fn refusal(result: Result<Layout, NetworkError>) -> String {
    match result {
        Err(NetworkError::Unsupported(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn interfaces_are_ordered_by_name_and_those_that_are_down_or_a_part_are_skipped() {
    let mut down = interface(3, "dummy0", mac(3));
    down.header.flags = LinkFlags::empty();
    let mut part = interface(4, "bonded", mac(4));
    part.attributes.push(LinkAttribute::Controller(9));
    let mut lo = interface(1, "lo", [0; 6]);
    lo.header.flags |= LinkFlags::Loopback;
    let links = [
        lo,
        interface(7, "eth1", mac(1)),
        down,
        part,
        interface(9, "eth0", mac(2)),
    ];
    let names: Vec<_> = layout(&links, &[])
        .unwrap()
        .links
        .into_iter()
        .map(|link| link.name)
        .collect();
    assert_eq!(names, ["eth0", "eth1"]);
}

#[test]
fn the_link_local_address_of_the_mac_and_what_routers_advertised_are_the_guests_own_business() {
    assert_eq!(link_local(MAC).to_string(), "fe80::5054:ff:fe12:3456");
    let permanent = AddressFlags::Permanent;
    let addresses = [
        inet(2, "10.1.0.2", 16, AddressFlags::empty()),
        inet(2, "fe80::5054:ff:fe12:3456", 64, permanent),
        inet(2, "fe80::1234", 64, permanent),
        inet(2, "fd00::2", 64, permanent),
        inet(2, "2001:db8::1", 64, AddressFlags::Managetempaddr),
        inet(9, "10.9.0.2", 16, permanent),
    ];
    let layout = Layout::of(&[interface(2, "eth0", MAC)], &addresses, &[], &[]).unwrap();
    let found: Vec<_> = layout.links[0]
        .addresses
        .iter()
        .map(Prefix::to_string)
        .collect();
    assert_eq!(found, ["10.1.0.2/16", "fe80::1234/64", "fd00::2/64"]);
}

#[test]
fn a_point_to_point_address_is_the_local_one() {
    let mut message = inet(2, "10.0.0.1", 32, AddressFlags::Permanent);
    message
        .attributes
        .push(AddressAttribute::Local("10.0.0.2".parse().unwrap()));
    assert_eq!(address(&message, MAC).unwrap().to_string(), "10.0.0.2/32");
}

#[test]
fn what_cannot_be_copied_is_refused_by_name() {
    let same = [interface(2, "eth0", MAC), interface(3, "net1", MAC)];
    assert!(refusal(layout(&same, &[])).contains("eth0 and net1"));
    let mut tunnel = interface(2, "wg0", MAC);
    tunnel.header.link_layer_type = LinkLayerType::None;
    assert!(refusal(layout(&[tunnel], &[])).contains("wg0 is no Ethernet"));
    assert!(refusal(layout(&[interface(2, "eth0", [0; 6])], &[])).contains("no Ethernet address"));
    let mut vlan = interface(3, "eth0.5", mac(3));
    vlan.attributes
        .push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(
            InfoKind::Vlan,
        )]));
    vlan.attributes.push(LinkAttribute::Link(2));
    let stacked = [interface(2, "eth0", MAC), vlan.clone()];
    assert!(refusal(layout(&stacked, &[])).contains("eth0.5 is stacked"));
    // The same index in another namespace is another interface.
    vlan.attributes.push(LinkAttribute::LinkNetNsId(0));
    assert!(layout(&[interface(2, "eth0", MAC), vlan], &[]).is_ok());
    let many: Vec<_> = (0..9)
        .map(|n| interface(n + 2, &format!("net{n}"), mac(u8::try_from(n).unwrap())))
        .collect();
    assert!(matches!(layout(&many, &[]), Err(NetworkError::TooMany(9))));
    assert!(layout(&many[..8], &[]).is_ok());
}

#[test]
fn routes_that_others_need_come_first_and_keep_their_fields() {
    let gateway = Ipv4Addr::new(10, 1, 0, 1);
    let mut via = route(None, Some(gateway));
    via.header.flags = netlink_packet_route::route::RouteFlags::Onlink;
    via.attributes.push(RouteAttribute::Priority(7));
    via.attributes
        .push(RouteAttribute::PrefSource(RouteAddress::Inet(
            Ipv4Addr::new(10, 1, 0, 2),
        )));
    via.attributes.push(RouteAttribute::Metrics(vec![
        netlink_packet_route::route::RouteMetric::Mtu(1400),
    ]));
    let mut connected = route(Some((gateway, 32)), None);
    connected.header.protocol = RouteProtocol::Kernel;
    let routes = layout(&[interface(2, "eth0", MAC)], &[via, connected])
        .unwrap()
        .routes;
    assert_eq!(routes.len(), 2);
    assert_eq!(
        (routes[0].destination.as_str(), routes[0].scope),
        ("10.1.0.1/32", 253)
    );
    let default = &routes[1];
    assert_eq!(
        (default.destination.as_str(), default.gateway.as_str()),
        ("", "10.1.0.1")
    );
    assert_eq!((default.metric, default.mtu, default.family), (7, 1400, 4));
    assert!(default.onlink);
    assert_eq!(default.source, "10.1.0.2");
}

#[test]
fn routes_that_a_copy_would_falsify_are_refused_or_told() {
    let links = [interface(2, "eth0", MAC)];
    let mut several = route(None, None);
    several
        .attributes
        .push(RouteAttribute::MultiPath(vec![RouteNextHop::default()]));
    assert!(refusal(layout(&links, &[several])).contains("several next hops"));
    let mut blackhole = route(Some((Ipv4Addr::new(10, 9, 0, 0), 16)), None);
    blackhole.header.kind = RouteType::BlackHole;
    assert!(refusal(layout(&links, &[blackhole])).contains("10.9.0.0/16"));
    let mut other_table = route(None, Some(Ipv4Addr::new(10, 1, 0, 1)));
    other_table.attributes.push(RouteAttribute::Table(100));
    let layout = layout(&links, &[other_table]).unwrap();
    assert!(layout.routes.is_empty());
    assert!(layout.left_out[0].contains("table 100"));
}
