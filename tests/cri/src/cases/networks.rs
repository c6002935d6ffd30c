//! A pod in more than one network, and ports of the node by UDP and IPv6.

use std::net::UdpSocket;
use std::path::Path;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::Protocol;

use super::network::{bracketed, fetch, server};
use crate::container::{Container, eventually};
use crate::node::{self, Configured, Directory, PROBE};
use crate::pod::{Pod, PodSpec};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "network",
        "two networks: both interfaces work, both addresses are given back",
        two_networks,
    ),
    case(
        "network",
        "hostPort over UDP and over IPv6 reaches the pod",
        host_ports,
    ),
];

const FIRST: &str = "/etc/cni/net.d/10-brig-node.conflist";
/// Another bridge, with a smaller MTU and routes of its own.
const SECOND: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "brig-second",
  "plugins": [{
    "type": "bridge", "bridge": "brig-cni1", "isGateway": true, "mtu": 1400,
    "ipam": {
      "type": "host-local",
      "ranges": [[{ "subnet": "10.89.0.0/16" }], [{ "subnet": "fd00:89::/64" }]],
      "routes": [{ "dst": "192.0.2.0/24" }, { "dst": "2001:db8::/32" }]
    }
  }]
}
"#;

/// The bridge stays when the last pod leaves it.
struct Bridge;

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = node::run("ip", &["link", "delete", "brig-cni1"]);
    }
}

fn two_networks(suite: &mut Suite) -> Result<()> {
    let pod = suite.pod("two-networks");
    in_both(suite, pod, |_| Ok(()))
}

/// What a pod has in two networks; `look` sees it at work.
pub(super) fn in_both(
    suite: &Suite,
    pod: PodSpec,
    look: impl FnOnce(&Pod) -> Result<()>,
) -> Result<()> {
    let networks = Directory::new("networks")?;
    networks.file("10-first.conflist", &std::fs::read_to_string(FIRST)?)?;
    networks.file("20-second.conflist", SECOND)?;
    let _bridge = Bridge;
    let directory = networks.path.display().to_string();
    let _configured = Configured::lines(&suite.cri, |line| {
        match line.trim_start().starts_with("conf_dir") {
            true => format!("conf_dir = \"{directory}\"\nmax_conf_num = 2"),
            false => line.to_owned(),
        }
    })?;
    let pod = pod.run(&suite.cri)?;
    let web = server(&pod)?;
    let second = [
        address(&web, "inet", "eth1")?,
        address(&web, "inet6", "eth1")?,
    ];
    that(
        &format!("the second network's addresses: {second:?}"),
        second[0].starts_with("10.89.") && second[1].starts_with("fd00:89::"),
    )?;
    equal("IPv4 of eth0", pod.ipv4()?, address(&web, "inet", "eth0")?)?;
    equal("IPv6 of eth0", pod.ipv6()?, address(&web, "inet6", "eth0")?)?;
    equal("MTU", "1400", web.sh("cat /sys/class/net/eth1/mtu")?)?;
    equal(
        "interfaces",
        "eth0 eth1",
        web.sh("cd /sys/class/net && echo eth*")?,
    )?;
    let routes = web.sh("ip route; ip -6 route")?;
    for route in [
        "default via 10.88.0.1 dev eth0",
        "default via fd00:88::1 dev eth0",
        "192.0.2.0/24 via 10.89.0.1 dev eth1",
        "2001:db8::/32 via fd00:89::1 dev eth1",
    ] {
        contains("routes", route, &routes)?;
    }
    for address in pod.addresses()?.iter().chain(&second) {
        equal("page", "two-networks", fetch(address, 8080)?)
            .with_context(|| format!("from {address}"))?;
    }
    for gateway in ["10.88.0.1", "10.89.0.1", "fd00:88::1", "fd00:89::1"] {
        web.sh(&format!("ping -c 1 -W 20 {gateway}"))
            .with_context(|| format!("from the pod to {gateway}"))?;
    }
    look(&pod)?;
    let mut leases = Vec::new();
    for (network, addresses) in [
        ("brig-node", pod.addresses()?),
        ("brig-second", second.to_vec()),
    ] {
        leases.extend(addresses.iter().map(|address| {
            Path::new("/var/lib/cni/networks")
                .join(network)
                .join(address)
        }));
    }
    for lease in &leases {
        that(&format!("{} is leased", lease.display()), lease.exists())?;
    }
    drop(web);
    pod.stop()?;
    pod.remove()?;
    for lease in &leases {
        that(&format!("{} is free", lease.display()), !lease.exists())?;
    }
    Ok(())
}

/// The global address of an interface, as the container sees it.
fn address(container: &Container, family: &str, interface: &str) -> Result<String> {
    let listing = container.sh(&format!("ip -o address show dev {interface} scope global"))?;
    let line = listing
        .lines()
        .find(|line| line.contains(&format!(" {family} ")))
        .with_context(|| format!("no {family} address on {interface}: {listing}"))?;
    let address = line
        .split_whitespace()
        .skip_while(|word| *word != family)
        .nth(1)
        .and_then(|cidr| cidr.split('/').next());
    Ok(address.context("no address in the line")?.to_owned())
}

/// What the datagram's sender is told by the pod behind a port of the node.
fn ask_udp(node: &str, port: u16) -> Result<String> {
    let any = if node.contains(':') {
        "[::]:0"
    } else {
        "0.0.0.0:0"
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(clock::seconds(1)))?;
    socket.connect(format!("{}:{port}", bracketed(node)))?;
    eventually("an answer", clock::seconds(3), || {
        let mut data = [0; 64];
        // Refused as long as nobody listens.
        let asked = socket.send(b"hello").and_then(|_| socket.recv(&mut data));
        Ok(asked
            .ok()
            .map(|length| String::from_utf8_lossy(&data[..length]).into_owned()))
    })
    .with_context(|| format!("from {node}, port {port}, UDP"))
}

fn host_ports(suite: &mut Suite) -> Result<()> {
    suite.image(PROBE)?;
    let shared = suite.shared()?;
    let pod = suite
        .pod("host-ports")
        .host_port(Protocol::Udp, 18053, 5353)
        .host_port(Protocol::Tcp, 18081, 8080)
        .run(&suite.cri)?;
    let udp = pod
        .container("udp", &["/bin/brig-probe", "serve-udp", "5353", "datagram"])
        .image(PROBE.0)
        .start()?;
    udp.wait_line("ready")?;
    let _web = server(&pod)?;
    // The node's own address, and its end of the bridge, which is its only IPv6 address.
    for node in ["10.0.2.15", "fd00:88::1"] {
        equal("answer", "datagram", ask_udp(node, 18053)?)?;
        equal("page", "host-ports", fetch(node, 18081)?).with_context(|| format!("from {node}"))?;
    }
    // Another pod is a client from outside the node.
    let _client = pod.container("client", SLEEP).start()?;
    let page = shared
        .container
        .sh("timeout 60 wget -qO- http://[fd00:88::1]:18081/hostname")?;
    equal("page for another pod", "host-ports", page)
}
