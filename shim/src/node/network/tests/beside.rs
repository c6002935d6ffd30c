//! Who else is in a pod's namespace: another VM, programs of the node, and those beside the pod on its wire.

use std::net::Ipv4Addr;
use std::num::NonZeroU32;
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, socket_with};

use super::*;

#[test]
fn a_second_vm_in_a_namespace_is_refused_and_its_end_leaves_the_first_alone() {
    if !can_run() {
        return;
    }
    let node = Node::new("second");
    node.add_interface("eth0", 0);
    let network = set_up(&node.pod, ONE).unwrap();
    let interface = &network.interfaces[0];
    let guest = Guest::new(&interface.taps[0], interface.mac);
    let error = set_up(&node.pod, ONE).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("eth0") && text.contains("vethbrig0"),
        "{text}"
    );
    assert!(text.contains(node.pod.to_str().unwrap()), "{text}");
    assert_eq!(Error::from(error).kind, Kind::FailedPrecondition);
    undo(&node.pod).unwrap();
    guest.serve(|| assert!(node.ping("10.77.0.2")));
    // One that is ending is waited for.
    std::thread::scope(|scope| {
        let next = scope.spawn(|| set_up(&node.pod, ONE).unwrap());
        sleep(Duration::from_millis(100));
        drop(network);
        let next = next.join().unwrap();
        let interface = &next.interfaces[0];
        Guest::new(&interface.taps[0], interface.mac).serve(|| assert!(node.ping("10.77.0.2")));
    });
}

/// What a program hears that listens in the pod's namespace as CNI's dhcp daemon does: for one protocol, after ingress.
struct Listener(OwnedFd);

impl Listener {
    fn new(node: &Node, protocol: i32) -> Self {
        let protocol = u16::try_from(protocol).unwrap().to_be();
        let protocol = Protocol::from_raw(NonZeroU32::new(protocol.into()).unwrap());
        let open = || {
            let (kind, flags) = (SocketType::DGRAM, SocketFlags::NONBLOCK);
            Ok(socket_with(AddressFamily::PACKET, kind, flags, Some(protocol)).unwrap())
        };
        Self(Namespace::open(&node.pod).unwrap().run(open).unwrap())
    }

    /// The ports of UDP that it has heard, behind a header of this length.
    fn ports(&self, header: usize) -> Vec<u16> {
        let mut ports = Vec::new();
        let mut packet = [0; 256];
        loop {
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(200_u8)).unwrap() == 0 {
                return ports;
            }
            nix::unistd::read(&self.0, &mut packet).unwrap();
            ports.push(u16::from_be_bytes([packet[header + 2], packet[header + 3]]));
        }
    }
}

#[test]
fn answers_of_a_dhcp_server_reach_the_node_and_the_guest_and_nothing_else_does() {
    if !can_run() {
        return;
    }
    let node = Node::new("dhcp");
    node.add_interface("eth0", 0);
    let network = set_up(&node.pod, ONE).unwrap();
    let interface = &network.interfaces[0];
    let v4 = Listener::new(&node, libc::ETH_P_IP);
    let v6 = Listener::new(&node, libc::ETH_P_IPV6);
    Guest::new(&interface.taps[0], interface.mac).serve(|| {
        for port in [67, 68, 546] {
            assert!(node.ping_port(("10.77.0.2", port), 64), "{port}");
            assert!(node.ping_port(("fd77:0::2", port), 64), "{port}");
        }
    });
    assert_eq!(v4.ports(20), [68]);
    assert_eq!(v6.ports(40), [546]);
}

#[test]
fn a_device_that_filters_multicast_receives_all_of_it_as_long_as_the_vm_lives() {
    if !can_run() {
        return;
    }
    let node = Node::new("multicast");
    if !brig_fixtures::needs::needs(node.add_macvlan("net1"), "macvlan in the kernel") {
        return;
    }
    let mut network = set_up(&node.pod, ONE).unwrap();
    assert!(network.left_out.is_empty(), "{:?}", network.left_out);
    let kept = network.keep();
    let interface = &network.interfaces[0];
    assert_eq!(kept.interfaces, [(interface.index, "net1".to_owned())]);
    let guest = Guest::new(&interface.taps[0], interface.mac);
    // One of them would pass by a filter of 256 bits by chance.
    for last in 1..8 {
        node.send_to_group(Ipv4Addr::new(239, 1, 2, last));
        assert!(guest.hears([1, 0, 0x5e, 1, 2, last]), "239.1.2.{last}");
    }
    drop(kept);
    let link = node.in_pod(&["ip", "-d", "link", "show", "net1"]);
    assert!(!link.contains("allmulti 1"), "{link}");
    let misses = (100..104).any(|last| {
        node.send_to_group(Ipv4Addr::new(239, 1, 2, last));
        !guest.hears([1, 0, 0x5e, 1, 2, last])
    });
    assert!(misses, "the device does not filter, so nothing was shown");
    // And the usual pod has nothing to keep.
    let node = Node::new("unfiltered");
    node.add_interface("eth0", 0);
    assert!(set_up(&node.pod, ONE).unwrap().keep().multicast.is_none());
}

#[test]
fn a_later_change_of_the_rules_is_found_whatever_else_has_come() {
    if !can_run() {
        return;
    }
    let node = Node::new("rules");
    node.add_interface("eth0", 0);
    let mut network = set_up(&node.pod, ONE).unwrap();
    let kept = network.keep();
    node.in_pod(&["ip", "route", "add", "blackhole", "203.0.113.0/24"]);
    for command in [
        "add table ip t",
        "add chain ip t c",
        "add rule ip t c iif eth0 drop",
    ] {
        node.in_pod(&["nft", command]);
    }
    let given = Some(network.filter.generation);
    let changed = changed_filter(&node.pod, &kept.interfaces, Netfilter::Require, given);
    let (filter, left_out) = changed.unwrap().unwrap();
    assert_eq!(filter.objects.len(), 3);
    assert!(left_out.is_empty(), "{left_out:?}");
}
