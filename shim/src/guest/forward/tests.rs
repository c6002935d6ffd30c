//! The whole module against real namespaces, as root, with a fake VMM and a fake agent.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::time::Duration;

use tokio::sync::mpsc;

use super::*;
use crate::asked::config::Config;
use crate::asked::spec::Network;
use crate::guest::fakes::{Behaviour, FakeHost, Record};
use crate::guest::vm::Plan;
use crate::guest::vm::boot::{Boot, Sandbox};
use crate::node::network::NetworkError;
use crate::node::network::tests::can_run;
use crate::node::network::tests::node::Node;
use std::io;

const PATIENCE: Duration = Duration::from_secs(10);

fn inside<T: Send>(node: &Node, work: impl FnOnce() -> T + Send) -> T {
    let namespace = Namespace::open(&node.pod).unwrap();
    namespace.run(|| Ok(work())).unwrap()
}

/// Connects from within the pod.
fn dial(node: &Node, address: &str) -> io::Result<StdStream> {
    let address: SocketAddr = address.parse().unwrap();
    let stream = inside(node, || StdStream::connect_timeout(&address, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn refused<T>(result: io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == ErrorKind::ConnectionRefused)
}

/// What a listener of ours accepted: whether IPv4 or IPv6, and the address that was dialled.
fn accepted(localhost: &Localhost, family: usize) -> SocketAddr {
    let listener = localhost.listeners[family].try_clone().unwrap();
    listener.set_nonblocking(false).unwrap();
    let (stream, peer) = listener.accept().unwrap();
    assert!(peer.ip().is_loopback());
    stream.local_addr().unwrap()
}

#[test]
fn every_port_of_localhost_is_ours_and_nothing_else() {
    if !can_run() {
        return;
    }
    let node = Node::new("localhost");
    node.add_interface("eth0", 0);
    assert!(refused(dial(&node, "127.0.0.1:80")));
    let localhost = Localhost::take_over(&node.pod).unwrap();
    for address in ["127.0.0.1:1", "127.0.0.1:80", "127.0.0.1:65535"] {
        let _client = dial(&node, address).unwrap();
        assert_eq!(accepted(&localhost, 0).to_string(), address);
    }
    for address in ["[::1]:1", "[::1]:443", "[::1]:65535"] {
        let _client = dial(&node, address).unwrap();
        assert_eq!(accepted(&localhost, 1).to_string(), address);
    }
    let own = localhost.listeners[0].local_addr().unwrap().to_string();
    let _client = dial(&node, &own).unwrap();
    assert_eq!(accepted(&localhost, 0).to_string(), own);
    // The pod's other addresses, and other loopback ones.
    for other in ["10.77.0.2", "[fd77:0::2]", "127.0.0.2"] {
        assert!(refused(dial(&node, &format!("{other}:80"))), "{other}");
    }
    drop(localhost);
    for address in ["127.0.0.1:80", "[::1]:80"] {
        node.wait_until(|| refused(dial(&node, address)));
    }
}

#[test]
fn connections_of_the_namespace_to_elsewhere_are_left_alone() {
    if !can_run() {
        return;
    }
    let node = Node::new("elsewhere");
    node.add_interface("eth0", 0);
    let _localhost = Localhost::take_over(&node.pod).unwrap();
    for address in ["10.77.0.2:8080", "[fd77:0::2]:8080"] {
        let server = inside(&node, || StdListener::bind(address)).unwrap();
        let mut client = dial(&node, address).unwrap();
        let (mut stream, _) = server.accept().unwrap();
        stream.write_all(b"mine").unwrap();
        drop(stream);
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "mine");
    }
}

#[test]
fn the_nodes_and_other_pods_localhost_stay_theirs() {
    if !can_run() {
        return;
    }
    let (node, other) = (Node::new("ours"), Node::new("theirs"));
    let localhost = Localhost::take_over(&node.pod).unwrap();
    assert!(refused(dial(&other, "127.0.0.1:80")));
    let server = StdListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let client = StdStream::connect_timeout(&address, PATIENCE).unwrap();
    assert_eq!(server.accept().unwrap().1, client.local_addr().unwrap());
    let listener = &localhost.listeners[0];
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_namespace_whose_loopback_comes_up_later_or_that_lacks_ipv6_is_served() {
    if !can_run() {
        return;
    }
    let node = Node::new("late");
    node.in_pod(&["ip", "link", "set", "lo", "down"]);
    let localhost = Localhost::take_over(&node.pod).unwrap();
    node.in_pod(&["ip", "link", "set", "lo", "up"]);
    let _client = dial(&node, "127.0.0.1:7000").unwrap();
    assert_eq!(accepted(&localhost, 0).port(), 7000);
    let node = Node::new("without6");
    node.in_pod(&[
        "sh",
        "-c",
        "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6",
    ]);
    let localhost = Localhost::take_over(&node.pod).unwrap();
    let _client = dial(&node, "127.0.0.1:7001").unwrap();
    assert_eq!(accepted(&localhost, 0).port(), 7001);
}

#[test]
fn who_may_not_use_bpf_gets_a_sentence() {
    if !can_run() {
        return;
    }
    let node = Node::new("unable");
    let listeners = inside(&node, listen::listeners).unwrap();
    let namespace = Namespace::open(&node.pod).unwrap();
    let error = std::thread::spawn(move || {
        use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
        let none = CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, none).unwrap();
        program::attach(&namespace, &listeners).unwrap_err()
    });
    let error = error.join().unwrap();
    assert!(matches!(error, ForwardError::Kernel { .. }), "{error}");
    assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}");
    let missing = Localhost::take_over(Path::new("/nonexistent/netns")).unwrap_err();
    assert!(
        missing.to_string().contains("/nonexistent/netns"),
        "{missing}"
    );
    let hosts = Localhost::take_over(Path::new("/proc/self/ns/net")).unwrap_err();
    assert!(matches!(
        hosts,
        ForwardError::Network(NetworkError::HostNetwork { .. })
    ));
}

/// A fake VM in the node's pod.
async fn boot(node: &Node) -> (Arc<Vm>, Record) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    std::fs::write(&file, "time_scale = 0.1").unwrap();
    let config = Config::load(Some(&file)).unwrap();
    let host = FakeHost::new(Behaviour::default());
    let record = host.record.clone();
    let plan = Plan::of(config, Network::Path(node.pod.clone()));
    let (news, mut told) = mpsc::channel(64);
    tokio::spawn(async move { while told.recv().await.is_some() {} });
    let logger = Logger::root(slog::Discard, slog::o!());
    let boot = Boot::start(host, plan, Sandbox::default(), news, logger);
    (boot.ready().await.unwrap(), record)
}

async fn until(record: &Record, entry: impl Fn(&str) -> bool) -> String {
    let seen = async {
        loop {
            if let Some(found) = record.all().into_iter().find(|seen| entry(seen)) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, seen).await.unwrap()
}

#[tokio::test]
async fn a_connection_is_the_vmms_once_the_guest_has_taken_it() {
    if !can_run() {
        return;
    }
    let node = Node::new("whole");
    let (vm, record) = boot(&node).await;
    let mut client = dial(&node, "127.0.0.1:8080").unwrap();
    // The agent's log is stream 1.
    let opened = until(&record, |entry| {
        entry.starts_with("stream ") && entry != "stream 1"
    })
    .await;
    assert!(record.in_order("connect 8080", &opened));
    let number: u64 = opened["stream ".len()..].parse().unwrap();
    // The fake VMM closes both descriptors: the client's end shows that the shim holds none.
    vm.close_stream(number).await;
    let read = tokio::task::spawn_blocking(move || client.read(&mut [0; 4]));
    assert_eq!(read.await.unwrap().unwrap(), 0);
    vm.kill();
}

#[tokio::test]
async fn a_port_without_a_server_is_reset_and_a_dead_vm_leaves_localhost() {
    if !can_run() {
        return;
    }
    let node = Node::new("reset");
    let (vm, record) = boot(&node).await;
    for address in ["127.0.0.1:9", "[::1]:9"] {
        let mut client = dial(&node, address).unwrap();
        let read = tokio::task::spawn_blocking(move || client.read(&mut [0; 4]));
        let error = read.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    assert!(record.has("connect 9"));
    vm.kill();
    vm.ended().await;
    for _ in 0..200 {
        if refused(dial(&node, "127.0.0.1:80")) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("localhost is still taken over");
}

#[tokio::test]
async fn connections_beyond_the_limit_are_reset_and_the_others_stay() {
    if !can_run() {
        return;
    }
    let node = Node::new("limit");
    let (vm, record) = boot(&node).await;
    let mut clients = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        clients.push(dial(&node, "127.0.0.1:80").unwrap());
        // One at a time: the backlog is no larger.
        let count = clients.len() + 1;
        let opened = |record: &Record| {
            let all = record.all();
            all.iter()
                .filter(|entry| entry.starts_with("stream "))
                .count()
        };
        while opened(&record) < count {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    let mut late = dial(&node, "127.0.0.1:80").unwrap();
    let read = tokio::task::spawn_blocking(move || late.read(&mut [0; 4]));
    let error = read.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    clients[0].set_nonblocking(true).unwrap();
    let alive = clients[0].read(&mut [0; 4]).unwrap_err();
    assert_eq!(alive.kind(), ErrorKind::WouldBlock);
    vm.kill();
}
