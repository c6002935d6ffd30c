//! The whole module against real namespaces, as root: the tests play the guest on the taps.

mod beside;
mod guest;
pub(crate) mod node;

use std::path::Path;

use super::*;
use crate::error::{Error, Kind};
use guest::Guest;
use node::Node;

const ONE: Wanted = wanted(1);

const fn wanted(queues: usize) -> Wanted {
    Wanted {
        queues,
        netfilter: Netfilter::Require,
        vhost: false,
    }
}

/// CI without root or without taps has nothing to test here.
pub(crate) fn can_run() -> bool {
    let tun = Path::new("/dev/net/tun").exists();
    brig_fixtures::needs::root() && brig_fixtures::needs::needs(tun, "/dev/net/tun")
}

#[test]
fn queue_pairs_stay_within_the_budget() {
    assert_eq!(queue_pairs(0, 1), 1);
    assert_eq!(queue_pairs(4, 2), 4);
    assert_eq!(queue_pairs(64, 1), 16);
    assert_eq!(queue_pairs(64, 8), 4);
    assert_eq!(queue_pairs(64, 0), 16);
}

#[test]
fn descriptors_are_numbered_behind_those_that_are_there() {
    let fd = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let interface = |name: &str, taps, vhosts| TapInterface {
        index: 2,
        name: name.to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1400,
        taps,
        vhosts,
        noarp: false,
        addresses: vec![],
    };
    let network = PodNetwork {
        interfaces: vec![
            interface("eth0", vec![fd(), fd()], vec![fd(), fd()]),
            interface("net1", vec![fd()], vec![]),
        ],
        ..PodNetwork::default()
    };
    assert_eq!(network.guest().interfaces[0].mac, "02:00:00:00:00:01");
    let mut fds = vec![fd()];
    let devices = network.devices(&mut fds);
    assert_eq!(
        (&*devices[0].taps, &*devices[0].vhosts),
        (&[1, 2][..], &[3, 4][..])
    );
    assert_eq!(
        (&*devices[1].taps, &*devices[1].vhosts),
        (&[5][..], &[][..])
    );
    assert!(devices[0].by_vhost() && !devices[1].by_vhost());
    assert_eq!(fds.len(), 6);
}

#[test]
fn the_guest_alone_answers_and_reaches_the_node_over_ipv4_and_ipv6() {
    if !can_run() {
        return;
    }
    let node = Node::new("both");
    node.add_interface("eth0", 0);
    let network = set_up(&node.pod, ONE).unwrap();
    let interface = &network.interfaces[0];
    let guest = Guest::new(&interface.taps[0], interface.mac);
    // Nobody answers while the guest is silent, although the namespace has the address.
    assert!(!node.ping("10.77.0.2"));
    guest.serve(|| {
        assert!(node.ping("10.77.0.2"));
        assert!(node.ping("fd77:0::2"));
        // Full-sized frames of the interface's MTU, unfragmented.
        assert!(node.ping_size("10.77.0.2", 1400 - 28));
        assert!(!node.ping_size("10.77.0.2", 1401 - 28));
    });
}

#[test]
fn interfaces_that_come_later_are_found_beside_those_that_are_there() {
    if !can_run() {
        return;
    }
    let node = Node::new("late");
    let none = find_new(&node.pod, ONE, &Known::default()).unwrap();
    assert!(none.interfaces.is_empty());
    node.add_interface("eth0", 0);
    let first = find_new(&node.pod, ONE, &Known::default()).unwrap();
    let known = Known {
        interfaces: vec![first.interfaces[0].mac],
        filter: None,
    };
    let nothing = find_new(&node.pod, ONE, &known).unwrap();
    assert!(nothing.interfaces.is_empty(), "our own tap is none");
    assert!(nothing.routes.is_empty());
    node.add_interface("net1", 1);
    let second = find_new(&node.pod, ONE, &known).unwrap();
    assert_eq!(second.interfaces.len(), 1);
    assert_eq!(second.interfaces[0].name, "net1");
    assert!(!second.routes.is_empty());
    assert!(second.routes.iter().all(|route| route.interface == "net1"));
    // And the first one goes on.
    let interface = &first.interfaces[0];
    let guest = Guest::new(&interface.taps[0], interface.mac);
    guest.serve(|| assert!(node.ping("10.77.0.2")));
}

#[test]
fn interfaces_addresses_routes_and_neighbours_are_as_cni_made_them() {
    if !can_run() {
        return;
    }
    let node = Node::new("layout");
    node.add_interface("eth0", 0);
    node.add_interface("net1", 1);
    node.in_pod(&["ip", "route", "add", "default", "via", "10.77.0.1"]);
    node.in_pod(&[
        "ip",
        "route",
        "add",
        "192.0.2.1/32",
        "dev",
        "net1",
        "scope",
        "link",
    ]);
    node.in_pod(&[
        "ip",
        "route",
        "add",
        "198.51.100.0/24",
        "via",
        "192.0.2.1",
        "dev",
        "net1",
        "onlink",
        "metric",
        "9",
        "mtu",
        "1300",
    ]);
    node.in_pod(&["ip", "-6", "route", "add", "default", "via", "fd77:0::1"]);
    node.in_pod(&[
        "ip",
        "neigh",
        "add",
        "10.77.0.9",
        "lladdr",
        "02:00:00:00:00:99",
        "dev",
        "eth0",
        "nud",
        "permanent",
    ]);
    for arguments in [
        "address add fd77:0::9/64 dev eth0 nodad preferred_lft 0",
        "address add 10.77.1.3/32 dev net1 scope link",
        "address add 192.0.2.7/32 dev lo",
        "address add 2001:db8::7/128 dev lo",
        "link set net1 arp off",
    ] {
        let mut command = vec!["ip"];
        command.extend(arguments.split(' '));
        node.in_pod(&command);
    }
    let network = set_up(&node.pod, wanted(2)).unwrap();
    let names: Vec<_> = network.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["eth0", "net1"]);
    for interface in &network.interfaces {
        assert_eq!((interface.mtu, interface.taps.len()), (1400, 2));
    }
    let guest = network.guest();
    assert_eq!(guest.interface_names(), names);
    let addresses = |number: usize| -> Vec<String> {
        let addresses = guest.interfaces[number].addresses.iter();
        addresses
            .map(|one| format!("{} {} {}", one.prefix, one.scope, one.deprecated))
            .collect()
    };
    assert_eq!(
        addresses(0),
        [
            "10.77.0.2/24 0 false",
            "fd77::9/64 0 true",
            "fd77::2/64 0 false"
        ]
    );
    assert_eq!(
        addresses(1),
        [
            "10.77.1.3/32 253 false",
            "10.77.1.2/24 0 false",
            "fd77:1::2/64 0 false"
        ]
    );
    assert_eq!(guest.interfaces[2].name, "lo");
    assert_eq!(
        addresses(2),
        ["192.0.2.7/32 0 false", "2001:db8::7/128 0 false"]
    );
    let noarp: Vec<_> = guest.interfaces.iter().map(|one| one.noarp).collect();
    assert_eq!(noarp, [false, true, false]);
    let routes: Vec<_> = guest
        .routes
        .iter()
        .map(|r| {
            format!(
                "{} via {} dev {} metric {} metrics {:?} onlink {} scope {} proto {}",
                r.destination,
                r.gateway,
                r.interface,
                r.metric,
                r.metrics,
                r.onlink,
                r.scope,
                r.protocol
            )
        })
        .collect();
    for expected in [
        "10.77.0.0/24 via  dev eth0 metric 0 metrics [] onlink false scope 253 proto 2",
        "192.0.2.1/32 via  dev net1 metric 0 metrics [] onlink false scope 253 proto 3",
        " via 10.77.0.1 dev eth0 metric 0 metrics [] onlink false scope 0 proto 3",
        "198.51.100.0/24 via 192.0.2.1 dev net1 metric 9 metrics [8, 0, 2, 0, 20, 5, 0, 0] onlink true scope 0 proto 3",
        "fd77::/64 via  dev eth0 metric 256 metrics [] onlink false scope 0 proto 2",
        " via fd77::1 dev eth0 metric 1024 metrics [] onlink false scope 0 proto 3",
    ] {
        assert!(
            routes.iter().any(|r| r == expected),
            "{expected:?} is not in {routes:#?}"
        );
    }
    assert!(!routes.iter().any(|r| r.starts_with("fe80")), "{routes:#?}");
    let gateways = routes
        .iter()
        .skip_while(|r| r.contains("via  "))
        .all(|r| !r.contains("via  "));
    assert!(
        gateways,
        "a direct route follows one with a gateway: {routes:#?}"
    );
    assert_eq!(guest.neighbours.len(), 1);
    assert_eq!(guest.neighbours[0].mac, "02:00:00:00:00:99");
    assert!(network.left_out.is_empty(), "{:?}", network.left_out);
}

#[test]
fn taps_die_with_their_descriptors_and_undo_leaves_what_cni_made() {
    if !can_run() {
        return;
    }
    let node = Node::new("undo");
    node.add_interface("eth0", 0);
    let before = node.in_pod(&["tc", "qdisc", "show"]);
    let network = set_up(&node.pod, wanted(2)).unwrap();
    let links = node.in_pod(&["ip", "-o", "link"]);
    assert!(
        links.contains("vethbrig0") && links.contains("mtu 1400"),
        "{links}"
    );
    // A tap must not speak: no address of its own.
    let addresses = node.in_pod(&["ip", "-o", "address", "show", "dev", "vethbrig0"]);
    assert_eq!(addresses, "");
    drop(network);
    node.wait_until(|| !node.in_pod(&["ip", "-o", "link"]).contains("vethbrig0"));
    assert!(node.in_pod(&["tc", "qdisc", "show"]).contains("ingress"));
    undo(&node.pod).unwrap();
    undo(&node.pod).unwrap();
    assert_eq!(node.in_pod(&["tc", "qdisc", "show"]), before);
}

#[test]
fn what_a_killed_run_left_behind_is_replaced() {
    if !can_run() {
        return;
    }
    let node = Node::new("again");
    node.add_interface("eth0", 0);
    drop(set_up(&node.pod, ONE).unwrap());
    node.wait_until(|| !node.in_pod(&["ip", "-o", "link"]).contains("vethbrig0"));
    let network = set_up(&node.pod, ONE).unwrap();
    let interface = &network.interfaces[0];
    Guest::new(&interface.taps[0], interface.mac).serve(|| assert!(node.ping("10.77.0.2")));
    let filters = node.in_pod(&["tc", "filter", "show", "dev", "eth0", "ingress"]);
    assert_eq!(filters.matches("Redirect").count(), 1, "{filters}");
    assert_eq!(filters.matches("Mirror").count(), 2, "{filters}");
}

#[test]
fn filters_of_the_node_survive_ours() {
    if !can_run() {
        return;
    }
    let node = Node::new("foreign");
    node.add_interface("eth0", 0);
    node.in_pod(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
    node.in_pod(&[
        "tc",
        "filter",
        "add",
        "dev",
        "eth0",
        "ingress",
        "pref",
        "5",
        "protocol",
        "ip",
        "u32",
        "match",
        "ip",
        "dst",
        "10.99.0.9/32",
        "action",
        "mirred",
        "egress",
        "mirror",
        "dev",
        "lo",
    ]);
    let network = set_up(&node.pod, ONE).unwrap();
    let interface = &network.interfaces[0];
    Guest::new(&interface.taps[0], interface.mac).serve(|| assert!(node.ping("10.77.0.2")));
    drop(network);
    node.wait_until(|| !node.in_pod(&["ip", "-o", "link"]).contains("vethbrig0"));
    undo(&node.pod).unwrap();
    let filters = node.in_pod(&["tc", "filter", "show", "dev", "eth0", "ingress"]);
    assert!(
        filters.contains("pref 5") && !filters.contains("pref 46"),
        "{filters}"
    );
}

#[test]
fn the_hosts_network_is_refused_before_anything_is_touched() {
    if !can_run() {
        return;
    }
    for path in ["/proc/self/ns/net", "/proc/1/ns/net"] {
        if std::fs::File::open(path).is_err() {
            continue;
        }
        let error = set_up(Path::new(path), ONE).unwrap_err();
        assert!(matches!(error, NetworkError::HostNetwork { .. }), "{error}");
        assert_eq!(Error::from(error).kind, Kind::InvalidArgument);
    }
    let qdiscs = node::run(&["tc", "qdisc", "show"]);
    assert!(!qdiscs.contains("ingress"), "{qdiscs}");
    assert!(matches!(
        undo(Path::new("/proc/self/ns/net")),
        Err(NetworkError::HostNetwork { .. })
    ));
}

#[test]
fn what_is_no_network_namespace_is_refused() {
    let missing = set_up(Path::new("/nonexistent/netns"), ONE).unwrap_err();
    assert_eq!(Error::from(missing).kind, Kind::NotFound);
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [
        Path::new("/proc/self/ns/mnt"),
        Path::new("/dev/null"),
        dir.path(),
        &fifo,
    ] {
        let error = set_up(path, ONE).unwrap_err();
        assert!(
            matches!(error, NetworkError::NotANamespace { .. }),
            "{error}"
        );
    }
    undo(Path::new("/nonexistent/netns")).unwrap();
}

#[test]
fn an_empty_namespace_gives_an_empty_network() {
    if !can_run() {
        return;
    }
    let node = Node::new("empty");
    let network = set_up(&node.pod, ONE).unwrap();
    assert!(network.interfaces.is_empty() && network.routes.is_empty());
}

#[test]
fn a_failure_half_way_undoes_what_was_done() {
    if !can_run() {
        return;
    }
    let node = Node::new("halfway");
    node.add_interface("eth0", 0);
    node.add_interface("net1", 1);
    // More than a tap takes, so that net1 fails after eth0 is done.
    node.in_pod(&["ip", "link", "set", "net1", "mtu", "65535"]);
    let before = node.in_pod(&["tc", "qdisc", "show"]);
    let error = set_up(&node.pod, ONE).unwrap_err();
    assert!(error.to_string().contains("65535"), "{error}");
    node.wait_until(|| !node.in_pod(&["ip", "-o", "link"]).contains(": brig"));
    assert_eq!(node.in_pod(&["tc", "qdisc", "show"]), before);
}
