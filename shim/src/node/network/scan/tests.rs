use std::net::Ipv4Addr;

use netlink_packet_route::address::{AddressHeaderFlags, AddressScope};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMetric, RouteNextHop, RouteProtocol, RouteScope,
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
        .map(|address| address.prefix.to_string())
        .collect();
    assert_eq!(found, ["10.1.0.2/16", "fe80::1234/64", "fd00::2/64"]);
}

#[test]
fn a_point_to_point_address_is_the_local_one() {
    let mut message = inet(2, "10.0.0.1", 32, AddressFlags::Permanent);
    message
        .attributes
        .push(AddressAttribute::Local("10.0.0.2".parse().unwrap()));
    let found = address(&message, MAC).unwrap();
    assert_eq!(found.prefix.to_string(), "10.0.0.2/32");
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
        RouteMetric::Lock(4),
        RouteMetric::Mtu(1400),
        RouteMetric::Advmss(1200),
        RouteMetric::CcAlgo("reno".to_owned()),
    ]));
    via.header.protocol = RouteProtocol::Dhcp;
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
    assert_eq!((default.metric, default.family), (7, 4));
    assert_eq!((routes[0].protocol, default.protocol), (2, 16));
    let mut metrics = Vec::new();
    for (kind, value) in [(1, 4), (2, 1400), (8, 1200_u32)] {
        metrics.extend([8, 0, kind, 0]);
        metrics.extend(value.to_ne_bytes());
    }
    metrics.extend(b"\x09\0\x10\0reno\0\0\0\0");
    assert_eq!(default.metrics, metrics);
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

/// An interface of a kind, that stands on another one.
fn on(index: u32, name: &str, kind: InfoKind, below: Option<u32>) -> LinkMessage {
    let mut message = interface(index, name, mac(u8::try_from(index).unwrap()));
    message
        .attributes
        .push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
    message.attributes.extend(below.map(LinkAttribute::Link));
    message
}

#[test]
fn whatever_stands_on_an_interface_of_the_pod_is_refused() {
    let eth0 = || on(2, "eth0", InfoKind::Veth, Some(7));
    for kind in [
        InfoKind::Vxlan,
        InfoKind::MacSec,
        InfoKind::MacVlan,
        InfoKind::Other("new".into()),
    ] {
        let stacked = [eth0(), on(3, "upper0", kind, Some(2))];
        let why = refusal(layout(&stacked, &[]));
        assert!(
            why.contains("upper0 is stacked") && why.contains("eth0"),
            "{why}"
        );
    }
    for kind in [InfoKind::Geneve, InfoKind::GreTap, InfoKind::Vxlan] {
        let mut tunnel = on(3, "upper0", kind, None);
        let why = refusal(layout(&[eth0(), tunnel.clone()], &[]));
        assert!(why.contains("upper0 is a tunnel"), "{why}");
        // The node's, that a plug-in has moved into the pod.
        tunnel.attributes.push(LinkAttribute::LinkNetNsId(0));
        assert!(layout(&[eth0(), tunnel], &[]).is_ok());
    }
    // A part of a bridge of the pod that stands on another interface of it.
    let mut vlan = on(3, "eth0.5", InfoKind::Vlan, Some(2));
    vlan.attributes.push(LinkAttribute::Controller(4));
    let bridge = on(4, "br0", InfoKind::Bridge, None);
    let why = refusal(layout(&[eth0(), vlan, bridge.clone()], &[]));
    assert!(why.contains("eth0.5 is stacked"), "{why}");
    // A part whose packets the bridge has is nobody's loss.
    let mut part = eth0();
    part.attributes.push(LinkAttribute::Controller(4));
    assert_eq!(layout(&[part, bridge], &[]).unwrap().links.len(), 1);
    // Both ends of a pair stand on nothing.
    let ends = [eth0(), on(7, "eth1", InfoKind::Veth, Some(2))];
    assert_eq!(layout(&ends, &[]).unwrap().links.len(), 2);
}

#[test]
fn a_vrf_and_an_ipvlan_whose_packets_pass_by_elsewhere_are_refused_by_name() {
    let vrf = on(3, "red", InfoKind::Vrf, None);
    let why = refusal(layout(&[interface(2, "eth0", MAC), vrf], &[]));
    assert!(why.contains("red is a VRF"), "{why}");
    let ipvlan = |mode| {
        let mut message = interface(2, "net1", MAC);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::IpVlan),
            LinkInfo::Data(InfoData::IpVlan(vec![InfoIpVlan::Mode(mode)])),
        ]));
        message.header.flags |= LinkFlags::Noarp;
        layout(&[message], &[])
    };
    assert!(refusal(ipvlan(IpVlanMode::L3S)).contains("l3s"));
    let links = ipvlan(IpVlanMode::L3).unwrap().links;
    assert!(links[0].noarp && links[0].filters_multicast);
    let veth = [on(2, "eth0", InfoKind::Veth, Some(7))];
    let links = layout(&veth, &[]).unwrap().links;
    assert!(!links[0].noarp && !links[0].filters_multicast);
}

#[test]
fn addresses_keep_scope_and_age_and_those_added_to_the_loopback_interface_are_taken() {
    let mut lo = interface(1, "lo", [0; 6]);
    lo.header.flags |= LinkFlags::Loopback;
    let permanent = AddressFlags::Permanent;
    let mut scoped = inet(2, "10.1.0.2", 16, permanent);
    scoped.header.scope = AddressScope::Link;
    let addresses = [
        inet(1, "127.0.0.1", 8, permanent),
        inet(1, "127.0.0.53", 32, permanent),
        inet(1, "192.0.2.7", 32, permanent),
        inet(1, "::1", 128, permanent),
        inet(1, "2001:db8::7", 128, permanent),
        scoped,
        inet(2, "fd00::9", 64, permanent | AddressFlags::Deprecated),
    ];
    let links = [lo, interface(2, "eth0", MAC)];
    let layout = Layout::of(&links, &addresses, &[], &[]).unwrap();
    let loopback: Vec<_> = layout
        .loopback
        .iter()
        .map(|address| address.prefix.to_string())
        .collect();
    assert_eq!(loopback, ["192.0.2.7/32", "2001:db8::7/128"]);
    let found: Vec<_> = layout.links[0]
        .addresses
        .iter()
        .map(|address| (address.scope, address.deprecated))
        .collect();
    assert_eq!(found, [(253, false), (0, true)]);
}
