//! Second networks that are not like the first: one in the same subnet, a macvlan, an ipvlan without neighbours; and addresses whose
//! order and age say where connections come from.

use std::net::{Ipv4Addr, UdpSocket};

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;

use super::network::{fetch, run, server};
use super::rules::{Chain, namespace_of};
use crate::container::eventually;
use crate::node::{Configured, DEBIAN, Directory, TOOLS};
use crate::pod::{Pod, PodSpec};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "network",
        "two interfaces in one network: each has its route, and sends by it",
        one_network,
    ),
    case(
        "network",
        "order, age and scope of addresses, those of lo and metrics of routes are the namespace's",
        preferences,
    ),
    case(
        "network",
        "a macvlan receives the multicast groups that a container joins",
        multicast,
    ),
    case(
        "network",
        "an ipvlan of mode l3, which resolves no addresses, reaches its neighbours",
        without_neighbours,
    ),
];

const FIRST: &str = "/etc/cni/net.d/10-brig-node.conflist";

/// A pod in the node's network and in another one, while `look` looks at it.
fn in_second(
    suite: &Suite,
    plugin: &str,
    pod: PodSpec,
    look: impl FnOnce(&Pod) -> Result<()>,
) -> Result<()> {
    let networks = Directory::new("second-networks")?;
    networks.file("10-first.conflist", &std::fs::read_to_string(FIRST)?)?;
    let second =
        format!(r#"{{ "cniVersion": "1.0.0", "name": "brig-beside", "plugins": [{plugin}] }}"#);
    networks.file("20-second.conflist", &second)?;
    let directory = networks.path.display().to_string();
    let _configured = Configured::lines(&suite.cri, |line| {
        match line.trim_start().starts_with("conf_dir") {
            true => format!("conf_dir = \"{directory}\"\nmax_conf_num = 2"),
            false => line.to_owned(),
        }
    })?;
    let pod = pod.run(&suite.cri)?;
    look(&pod)?;
    // While both networks are configured, so that both end.
    pod.stop()?;
    pod.remove()
}

fn one_network(suite: &mut Suite) -> Result<()> {
    let plugin = r#"{ "type": "bridge", "bridge": "cni0", "ipam": { "type": "host-local", "ranges": [
        [{ "subnet": "10.88.0.0/16", "rangeStart": "10.88.200.1", "rangeEnd": "10.88.200.200" }],
        [{ "subnet": "fd00:88::/64", "rangeStart": "fd00:88::c800", "rangeEnd": "fd00:88::c8ff" }]] } }"#;
    in_second(suite, plugin, suite.pod("one-network"), |pod| {
        let web = server(pod)?;
        for (table, destination) in [("-4", "10.88.0.0/16"), ("-6", "fd00:88::/64")] {
            let count = format!("ip {table} route | grep -c '^{destination} '");
            equal("routes to the network", "2", web.sh(&count)?).context(destination)?;
        }
        for interface in ["eth0", "eth1"] {
            for gateway in ["10.88.0.1", "fd00:88::1"] {
                web.sh(&format!("ping -c 1 -W 20 -I {interface} {gateway}"))
                    .with_context(|| format!("from {interface} to {gateway}"))?;
            }
        }
        equal("page", "one-network", fetch(&pod.ipv4()?, 8080)?)
    })
}

/// What says where a connection comes from, and how.
const TOLD: &str = "ip -o -6 address show dev eth0 scope global | grep -o 'fd00[^ ]*\\|deprecated'; \
     ip -6 route get fd00:88::1 | grep -o 'src [^ ]*'; \
     ip -o -4 address show dev eth0 | grep -o 'inet [^ ]*\\|scope [a-z]*'; \
     ip -o address show dev lo | grep -o '192.0.2.7/32\\|2001:db8::7/128'; \
     ip -o route show 203.0.113.0/24; ip -o route show proto kernel";

fn preferences(suite: &mut Suite) -> Result<()> {
    suite.image(TOOLS)?;
    let _chain = Chain::with(
        &suite.cri,
        "ip -6 address add fd00:88::aa02/64 dev eth0 nodad\n\
         ip -6 address add fd00:88::aa03/64 dev eth0 nodad preferred_lft 0\n\
         ip address add 10.88.170.4/32 dev eth0 scope link\n\
         ip address add 192.0.2.7/32 dev lo\n\
         ip address add 2001:db8::7/128 dev lo\n\
         ip route add 203.0.113.0/24 via 10.88.0.1 src 192.0.2.7 proto bird mtu lock 1300 advmss 1200 initcwnd 20\n",
    )?;
    let pod = suite.run("preferences")?;
    let container = pod.container("main", SLEEP).image(TOOLS.0).start()?;
    let namespace = namespace_of(&pod.ipv4()?)?;
    let wanted = run(&format!(
        "nsenter --net={namespace} sh -c \"{}\"",
        TOLD.replace('\\', "\\\\")
    ))?;
    for part in [
        "deprecated",
        "192.0.2.7/32",
        "advmss 1200",
        "src 192.0.2.7",
        "mtu lock 1300",
    ] {
        contains("the namespace", part, &wanted)?;
    }
    equal("in the pod", wanted.trim(), container.sh(TOLD)?.trim())
}

/// A wire of the node's that pods' interfaces stand on, and the node's own interface beside them.
struct Wire;

const WIRE: &str = "brigwire0";
const BESIDE: &str = "brigbeside";

impl Wire {
    fn new(kind: &str, address: &str) -> Result<Self> {
        let _ = run(&format!("ip link delete {WIRE}"));
        run(&format!(
            "ip link add {WIRE} type veth peer name brigwire1 && ip link set {WIRE} up && ip link set brigwire1 up"
        ))?;
        let wire = Self;
        run(&format!(
            "ip link add {BESIDE} link {WIRE} type {kind} && ip address add {address} dev {BESIDE} && ip link set {BESIDE} up"
        ))?;
        Ok(wire)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // And with it what stands on it.
        let _ = run(&format!("ip link delete {WIRE}"));
    }
}

/// Joins a group on eth1 and says what comes.
const HEAR: &str = "import socket, sys\n\
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
    s.bind(('', 5007))\n\
    own = sys.argv[2]\n\
    s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(sys.argv[1]) + socket.inet_aton(own))\n\
    print('ready', flush=True)\n\
    print(s.recv(64).decode(), flush=True)\n";

fn multicast(suite: &mut Suite) -> Result<()> {
    suite.image(DEBIAN)?;
    let _wire = Wire::new("macvlan mode bridge", "10.90.0.250/24")?;
    let plugin = format!(
        r#"{{ "type": "macvlan", "master": "{WIRE}", "mode": "bridge",
             "ipam": {{ "type": "host-local", "ranges": [[{{ "subnet": "10.90.0.0/24" }}]] }} }}"#
    );
    in_second(suite, &plugin, suite.pod("multicast"), |pod| {
        let look = pod.container("look", SLEEP).start()?;
        let own = "ip -o -4 address show dev eth1 | grep -o '10\\.90\\.[0-9.]*' | head -n 1";
        let own = look.sh(own)?;
        run(&format!("ip route replace 239.1.0.0/16 dev {BESIDE}"))?;
        // One of them would pass by the device's filter by chance.
        for last in [3, 77, 201] {
            hears(pod, Ipv4Addr::new(239, 1, 2, last), own.trim())
                .with_context(|| format!("239.1.2.{last}"))?;
        }
        Ok(())
    })
}

fn hears(pod: &Pod, group: Ipv4Addr, own: &str) -> Result<()> {
    let (name, text) = (format!("hear-{}", group.octets()[3]), group.to_string());
    let hears = pod
        .container(&name, &["python3", "-c", HEAR, &text, own])
        .image(DEBIAN.0)
        .start()?;
    hears.wait_line("ready")?;
    let socket = UdpSocket::bind("10.90.0.250:0")?;
    let word = format!("to {group}");
    eventually("the group's datagram", clock::seconds(8), || {
        socket.send_to(word.as_bytes(), (group, 5007))?;
        let lines = hears.lines()?;
        Ok(lines
            .iter()
            .any(|line| line.text.contains(&word))
            .then_some(()))
    })
}

fn without_neighbours(suite: &mut Suite) -> Result<()> {
    let _wire = Wire::new("ipvlan mode l3", "10.91.0.250/24")?;
    let plugin = format!(
        r#"{{ "type": "ipvlan", "master": "{WIRE}", "mode": "l3",
             "ipam": {{ "type": "host-local", "ranges": [[{{ "subnet": "10.91.0.0/24" }}]] }} }}"#
    );
    in_second(suite, &plugin, suite.pod("without-neighbours"), |pod| {
        let container = pod.container("main", SLEEP).start()?;
        let link = container.sh("ip link show dev eth1")?;
        that(
            &format!("eth1 resolves no addresses: {link}"),
            link.contains("NOARP"),
        )?;
        container
            .sh("ping -c 1 -W 20 10.91.0.250")
            .map(drop)
            .context("from the pod to the interface beside it")
    })
}
