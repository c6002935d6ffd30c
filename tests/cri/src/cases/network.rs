//! The pod's network: addresses, names, and packets in every direction.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::{clock, process};
use k8s_cri::v1::{DnsConfig, Int64Value, Protocol};

use crate::container::{Container, eventually};
use crate::node::Directory;
use crate::pod::Pod;
use crate::suite::{Case, SLEEP, Shared, Suite, case, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "network",
        "the addresses that the CRI shows are on eth0",
        addresses,
    ),
    case(
        "network",
        "MAC address and MTU are those of the node's end",
        link,
    ),
    smoke("network", "node to pod, IPv4 and IPv6", node_to_pod),
    case("network", "pod to node, IPv4 and IPv6", pod_to_node),
    smoke("network", "pod to pod, IPv4 and IPv6", pod_to_pod),
    case("network", "UDP: a pod's query is answered by the node", udp),
    case("network", "a large transfer arrives whole", transfer),
    case("network", "hostPort reaches the pod", host_port),
    case(
        "network",
        "a service address (DNAT) reaches the pod",
        service,
    ),
    case("network", "resolv.conf is the pod's DNS configuration", dns),
    case(
        "network",
        "what a container writes to resolv.conf, hosts and hostname is there for the next",
        written,
    ),
    case(
        "network",
        "ports below 1024 and ping need no privilege since containerd 2.0",
        unprivileged,
    ),
    case(
        "network",
        "the loopback interfaces of two pods are apart",
        loopback_apart,
    ),
    case(
        "network",
        "a removed pod gives its address and its netns back",
        given_back,
    ),
];

const PORT: u16 = 8080;

/// containerd sets these for every pod unless its operator says otherwise.
fn unprivileged(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let user = shared
        .pod
        .container("user", SLEEP)
        .security(|security| security.run_as_user = Some(Int64Value { value: 1000 }))
        .start()?;
    // One that cannot listen says so at once.
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range | xargs
        if timeout 1 httpd -f -p 127.0.0.1:81 2>&1 | grep -q denied; then echo denied; else echo listens; fi";
    let expected = match suite.containerd.starts_with("1.") {
        true => "1024 1 0\ndenied",
        false => "0 0 2147483647\nlistens",
    };
    equal(
        "limits, and port 81 of an ordinary user",
        expected,
        user.sh(script)?,
    )
}

/// A web server that gives the pod's host name.
pub fn server(pod: &Pod) -> Result<Container> {
    pod.container("server", &["httpd", "-f", "-p", "8080", "-h", "/etc"])
        .start()
}

/// Reads a page over HTTP from the node; returns head and body.
pub fn fetch_page(address: &str, port: u16, page: &str) -> Result<String> {
    use std::io::Write;
    let target: SocketAddr = format!("{}:{port}", bracketed(address)).parse()?;
    let mut stream = eventually("a connection", clock::seconds(3), || {
        // Refused as long as the server does not listen.
        Ok(TcpStream::connect_timeout(&target, clock::seconds(1)).ok())
    })
    .with_context(|| format!("to {target}"))?;
    stream.set_read_timeout(Some(clock::seconds(3)))?;
    stream.write_all(format!("GET {page} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Reads `/hostname` over HTTP from the node.
pub fn fetch(address: &str, port: u16) -> Result<String> {
    let answer = fetch_page(address, port, "/hostname")?;
    let (_, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("no HTTP answer: '{answer}'"))?;
    Ok(body.trim().to_owned())
}

/// A script that reads a URL, and tries again while nobody listens. (`wget -T` of a static busybox
/// dies.)
fn reading(url: &str) -> String {
    format!(
        "for i in 1 2 3 4 5 6 7 8; do timeout 20 wget -qO- '{url}' && exit 0; sleep 1; done; exit 1"
    )
}

pub fn bracketed(address: &str) -> String {
    match address.contains(':') {
        true => format!("[{address}]"),
        false => address.to_owned(),
    }
}

fn addresses(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let listing = shared.container.sh("ip -o address show dev eth0")?;
    for address in [shared.pod.ipv4()?, shared.pod.ipv6()?] {
        contains("eth0", &format!(" {address}/"), &listing)?;
    }
    that("no address is tentative", !listing.contains("tentative"))?;
    let routes = shared.container.sh("ip route; ip -6 route")?;
    contains("routes", "default via 10.88.0.1 dev eth0", &routes)?;
    contains("routes", "default via fd00:88::1 dev eth0", &routes)?;
    contains(
        "loopback",
        "127.0.0.1/8",
        &shared.container.sh("ip -o address show dev lo")?,
    )
}

pub fn run(command: &str) -> Result<String> {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]);
    Ok(process::run(shell, clock::seconds(5))?.success()?.text())
}

/// The MAC address of the pod's other neighbours' view: what the node learned for its address.
fn link(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let address = shared.pod.ipv4()?;
    let mac = shared.container.sh("cat /sys/class/net/eth0/address")?;
    shared.container.sh("ping -c 1 -W 20 10.88.0.1")?;
    let neighbours = run(&format!("ip neigh show {address} dev cni0"))?;
    contains("the node's neighbour entry", &mac, &neighbours)?;
    let bridge = run("cat /sys/class/net/cni0/mtu")?;
    equal(
        "MTU",
        bridge.trim().to_owned(),
        shared.container.sh("cat /sys/class/net/eth0/mtu")?,
    )
}

fn node_to_pod(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("node-to-pod")?;
    let _server = server(&pod)?;
    for address in [pod.ipv4()?, pod.ipv6()?] {
        equal("page", "node-to-pod", fetch(&address, PORT)?)
            .with_context(|| format!("from {address}"))?;
    }
    Ok(())
}

/// Serves one line on the node's bridge to whoever connects.
fn answer_on(address: &str) -> Result<u16> {
    use std::io::Write;
    let listener = TcpListener::bind(format!("{}:0", bracketed(address)))
        .with_context(|| format!("cannot listen on {address}"))?;
    let port = listener.local_addr()?.port();
    // Ends with the process: a case does not wait for a caller that never came.
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut request = [0; 512];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nnode");
        }
    });
    Ok(port)
}

fn pod_to_node(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    for gateway in ["10.88.0.1", "fd00:88::1"] {
        let port = answer_on(gateway)?;
        let url = format!("http://{}:{port}/", bracketed(gateway));
        equal("answer", "node", shared.container.sh(&reading(&url))?)
            .with_context(|| format!("from {url}"))?;
    }
    Ok(())
}

fn pod_to_pod(suite: &mut Suite) -> Result<()> {
    let shared: Rc<Shared> = suite.shared()?;
    let pod = suite.run("other-pod")?;
    let _server = server(&pod)?;
    for address in [pod.ipv4()?, pod.ipv6()?] {
        let url = format!("http://{}:{PORT}/hostname", bracketed(&address));
        equal("page", "other-pod", shared.container.sh(&reading(&url))?)
            .with_context(|| format!("from {url}"))?;
    }
    Ok(())
}

/// The name service in busybox is the one UDP client that it has.
fn udp(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let socket = std::net::UdpSocket::bind("10.88.0.1:53")?;
    socket.set_read_timeout(Some(clock::seconds(5)))?;
    let reader = std::thread::spawn(move || -> Result<usize> {
        let mut data = [0; 512];
        let (length, from) = socket.recv_from(&mut data).context("no datagram came")?;
        // The query sent back as an answer with "no such name".
        let mut answer = data.get(..length).context("length")?.to_vec();
        if let [_, _, high, low, ..] = answer.as_mut_slice() {
            *high |= 0x84;
            *low = 3;
        }
        socket.send_to(&answer, from)?;
        Ok(length)
    });
    let said = shared
        .container
        .sh("nslookup brig.test 10.88.0.1 2>&1 || true")?;
    let length = reader
        .join()
        .map_err(|_| anyhow::anyhow!("the server died"))??;
    ensure!(length > 12, "a datagram of {length} bytes came");
    contains("the answer", "NXDOMAIN", &said)
}

fn transfer(suite: &mut Suite) -> Result<()> {
    const MIB: usize = 1 << 20;
    let pod = suite.run("transfer")?;
    let size = 16 * MIB;
    let script = format!("head -c {size} /dev/zero | tr '\\0' 'b' | nc -l -p 9000");
    let _server = pod.container("server", &["sh", "-c", &script]).start()?;
    let target: SocketAddr = format!("{}:9000", pod.ipv4()?).parse()?;
    let mut stream = eventually("a connection", clock::seconds(3), || {
        Ok(TcpStream::connect_timeout(&target, clock::seconds(1)).ok())
    })?;
    stream.set_read_timeout(Some(clock::seconds(5)))?;
    let mut data = Vec::new();
    stream.read_to_end(&mut data)?;
    equal("bytes that came", size, data.len())?;
    that(
        "each of them is right",
        data.iter().all(|byte| *byte == b'b'),
    )
}

fn host_port(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("host-port")
        .host_port(Protocol::Tcp, 18080, 8080)
        .run(&suite.cri)?;
    let _server = server(&pod)?;
    equal(
        "page through the node's port",
        "host-port",
        fetch("10.0.2.15", 18080)?,
    )
}

/// A rule as kube-proxy writes it.
fn service(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let pod = suite.run("service")?;
    let _server = server(&pod)?;
    let rule = format!(
        "-d 10.96.0.10/32 -p tcp --dport 80 -j DNAT --to-destination {}:8080",
        pod.ipv4()?
    );
    run(&format!("iptables -t nat -I PREROUTING {rule}"))?;
    let page = shared.container.sh(&reading("http://10.96.0.10/hostname"));
    run(&format!("iptables -t nat -D PREROUTING {rule}"))?;
    equal("page", "service", page?)
}

fn dns(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("dns")
        .dns(DnsConfig {
            servers: vec!["10.96.0.53".to_owned(), "fd00::53".to_owned()],
            searches: vec![
                "brig.svc.cluster.local".to_owned(),
                "cluster.local".to_owned(),
            ],
            options: vec!["ndots:5".to_owned()],
        })
        .run(&suite.cri)?;
    let container = pod.container("main", SLEEP).start()?;
    equal(
        "/etc/resolv.conf",
        "search brig.svc.cluster.local cluster.local\nnameserver 10.96.0.53\nnameserver fd00::53\noptions ndots:5",
        container.sh("cat /etc/resolv.conf")?.as_str(),
    )?;
    equal("/etc/hostname", "dns", container.sh("cat /etc/hostname")?)?;
    let hosts = Directory::new("hosts")?;
    let file = hosts.file("hosts", "127.0.0.1 localhost\n10.1.2.3 alias.example\n")?;
    // Kubelet brings its own /etc/hosts, as a mount.
    let second = pod
        .container("second", SLEEP)
        .mount(&file, "/etc/hosts")
        .start()?;
    contains("/etc/hosts", "alias.example", &second.sh("cat /etc/hosts")?)
}

fn written(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("written")
        .dns(DnsConfig {
            servers: vec!["10.96.0.53".to_owned()],
            ..DnsConfig::default()
        })
        .run(&suite.cri)?;
    let files = ["/etc/resolv.conf", "/etc/hosts", "/etc/hostname"];
    let first = pod.container("first", SLEEP).start()?;
    for file in files {
        first.sh(&format!("echo '# first' >> {file}"))?;
    }
    first.stop(0)?;
    first.remove()?;
    let second = pod.container("second", SLEEP).start()?;
    for file in files {
        let text = second.sh(&format!("cat {file}"))?;
        contains(file, "# first", &text)?;
    }
    contains(
        "what it had before",
        "nameserver 10.96.0.53",
        &second.sh("cat /etc/resolv.conf")?,
    )
}

fn loopback_apart(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let pod = suite.run("apart")?;
    let _server = server(&pod)?;
    fetch(&pod.ipv4()?, PORT)?;
    shared
        .container
        .sh_fails("timeout 10 wget -qO- http://127.0.0.1:8080/hostname")
        .map(drop)
}

fn given_back(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("given-back")?;
    let address = pod.ipv4()?;
    let lease = std::path::Path::new("/var/lib/cni/networks/brig-node").join(&address);
    that("the address is leased", lease.exists())?;
    let before = run("ls /run/netns /var/run/netns 2>/dev/null | sort -u | wc -l")?;
    pod.stop()?;
    pod.remove()?;
    that("the lease is gone", !lease.exists())?;
    let after = run("ls /run/netns /var/run/netns 2>/dev/null | sort -u | wc -l")?;
    that(
        "its netns is gone",
        after.trim().parse::<u32>()? < before.trim().parse::<u32>()?,
    )
}
