//! The network of a sandbox where a copy is more than a list: order, preference, and what two interfaces have in common.
#![allow(clippy::unwrap_used)]
mod guest;

use brig_agent_protocol::agent::*;
use guest::*;

const MACS: [&str; 2] = ["02:00:00:0a:0c:01", "02:00:00:0a:0c:02"];

/// Two interfaces, as the bus would bring them.
async fn guest() -> Guest {
    let guest = Guest::boot().await;
    for (number, mac) in MACS.iter().enumerate() {
        guest.in_network(&format!(
            "ip link add v{number} type veth peer name w{number} && ip link set v{number} address {mac} && ip link set w{number} up"
        ));
    }
    guest
}

fn interface(number: usize, addresses: Vec<Address>) -> Interface {
    Interface {
        name: format!("net{number}"),
        mac: MACS[number].into(),
        addresses,
        ..Default::default()
    }
}

fn prefix_route(number: usize, destination: &str, source: &str, metric: u32) -> Route {
    Route {
        destination: destination.into(),
        interface: format!("net{number}"),
        source: source.into(),
        scope: if destination.contains(':') { 0 } else { 253 },
        protocol: 2,
        metric,
        ..Default::default()
    }
}

async fn started(guest: &Guest, request: StartSandboxRequest) {
    guest.client.start_sandbox(ctx(), &request).await.unwrap();
}

fn lines(guest: &Guest, command: &str) -> Vec<String> {
    let text = guest.in_network(command);
    text.lines().map(|line| line.trim().to_owned()).collect()
}

#[tokio::test]
async fn two_interfaces_in_one_network_keep_a_route_each() {
    let guest = guest().await;
    let routes = vec![
        prefix_route(0, "10.99.0.0/24", "10.99.0.2", 0),
        prefix_route(1, "10.99.0.0/24", "10.99.0.3", 0),
        prefix_route(0, "fd99::/64", "", 256),
        prefix_route(1, "fd99::/64", "", 256),
    ];
    let both = |number: usize, last: u8| {
        let addresses = vec![
            address(&format!("10.99.0.{last}/24")),
            address(&format!("fd99::{last}/64")),
        ];
        interface(number, addresses)
    };
    let request = StartSandboxRequest {
        id: "sandbox".into(),
        interfaces: vec![both(0, 2), both(1, 3)],
        routes: routes.clone(),
        ..Default::default()
    };
    started(&guest, request).await;
    // What is told again is there already.
    let again = AddNetworkRequest {
        routes,
        ..Default::default()
    };
    guest.client.add_network(ctx(), &again).await.unwrap();
    let v4 = lines(&guest, "ip route show 10.99.0.0/24");
    assert!(
        v4.len() == 2
            && v4[0].contains("dev net0 proto kernel scope link src 10.99.0.2")
            && v4[1].contains("dev net1 proto kernel scope link src 10.99.0.3"),
        "{v4:?}"
    );
    let v6 = lines(&guest, "ip -6 route show fd99::/64");
    assert!(
        v6.len() == 2 && v6[0].contains("dev net0") && v6[1].contains("dev net1"),
        "{v6:?}"
    );
    guest.stop().await;
}

#[tokio::test]
async fn addresses_are_listed_and_chosen_as_the_host_does() {
    let guest = guest().await;
    let vip = Address {
        deprecated: true,
        ..address("fd99::9/64")
    };
    let link_scoped = Address {
        scope: 253,
        ..address("10.99.0.2/24")
    };
    let addresses = vec![
        link_scoped,
        vip,
        address("fd99::2/64"),
        address("fd99::3/64"),
    ];
    let loopback = Interface {
        name: "lo".into(),
        addresses: vec![address("192.0.2.7/32"), address("2001:db8::7/128")],
        ..Default::default()
    };
    let from_loopback = Route {
        source: "192.0.2.7".into(),
        ..prefix_route(0, "10.98.0.0/16", "", 0)
    };
    let request = StartSandboxRequest {
        id: "sandbox".into(),
        interfaces: vec![interface(0, addresses), loopback],
        routes: vec![prefix_route(0, "fd99::/64", "", 256), from_loopback],
        ..Default::default()
    };
    started(&guest, request).await;
    let listed = lines(&guest, "ip -o -6 addr show dev net0 scope global");
    assert_eq!(listed.len(), 3, "{listed:?}");
    for (line, last) in listed.iter().zip(["9", "2", "3"]) {
        assert!(line.contains(&format!("fd99::{last}/64")), "{listed:?}");
        assert_eq!(line.contains("deprecated"), last == "9", "{listed:?}");
    }
    let chosen = guest.in_network("ip -6 route get fd99::1");
    assert!(chosen.contains("src fd99::2"), "{chosen}");
    let v4 = guest.in_network("ip -o -4 addr show dev net0");
    assert!(v4.contains("scope link"), "{v4}");
    let v4 = guest.in_network("ip route show 10.98.0.0/16");
    assert!(v4.contains("src 192.0.2.7"), "{v4}");
    let lo = guest.in_network("ip -o addr show dev lo");
    for address in ["127.0.0.1/8", "192.0.2.7/32", "2001:db8::7/128"] {
        assert!(lo.contains(address), "{lo}");
    }
    guest.stop().await;
}

#[tokio::test]
async fn an_interface_without_neighbours_sends_to_itself_and_unknown_metrics_cost_no_route() {
    let guest = guest().await;
    let number = |kind: u8, value: u32| {
        let mut bytes = vec![8, 0, kind, 0];
        bytes.extend(value.to_ne_bytes());
        bytes
    };
    // RTAX_ADVMSS.
    let known = Route {
        metrics: [number(2, 1300), number(8, 1200)].concat(),
        ..prefix_route(0, "10.97.0.0/16", "", 0)
    };
    // RTAX_CC_ALGO of an algorithm that no kernel has.
    let unknown = Route {
        metrics: [number(2, 1300), b"\x0a\0\x10\0nosuc\0\0\0".to_vec()].concat(),
        ..prefix_route(0, "10.96.0.0/16", "", 0)
    };
    let request = StartSandboxRequest {
        id: "sandbox".into(),
        interfaces: vec![Interface {
            noarp: true,
            ..interface(0, vec![address("10.99.0.2/24")])
        }],
        routes: vec![known, unknown],
        ..Default::default()
    };
    started(&guest, request).await;
    let link = guest.in_network("ip -o link show net0");
    assert!(link.contains("NOARP") && link.contains("UP"), "{link}");
    let known = guest.in_network("ip route show 10.97.0.0/16");
    assert!(
        known.contains("mtu 1300") && known.contains("advmss 1200"),
        "{known}"
    );
    let unknown = guest.in_network("ip route show 10.96.0.0/16");
    assert!(
        unknown.contains("mtu 1300") && !unknown.contains("congctl"),
        "{unknown}"
    );
    guest.stop().await;
}
