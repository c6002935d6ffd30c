//! A node and a pod's namespace with veth pairs between them, as CNI makes them.

use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::node::network::namespace::Namespace;

/// A port on which the guest echoes; any will do.
const PORT: u16 = 4242;
/// How long an echo may take; the guest is a thread beside us.
const PATIENCE: Duration = Duration::from_secs(2);
const MTU: &str = "1400";

/// Runs a program that must succeed; returns what it prints.
pub fn run(command: &[&str]) -> String {
    let output = Command::new(command[0])
        .args(&command[1..])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Two namespaces, gone when dropped.
pub struct Node {
    name: String,
    /// The path of the pod's namespace.
    pub pod: PathBuf,
}

impl Node {
    pub fn new(name: &str) -> Self {
        let name = format!("brig-test-{}-{name}", std::process::id());
        for side in ["node", "pod"] {
            let namespace = format!("{name}-{side}");
            run(&["ip", "netns", "add", &namespace]);
            run(&["ip", "-n", &namespace, "link", "set", "lo", "up"]);
        }
        let pod = Path::new("/run/netns").join(format!("{name}-pod"));
        Self { name, pod }
    }

    /// A veth pair: 10.77.N.1 and fd77:N::1 on the node, .2 and ::2 in the pod.
    pub fn add_interface(&self, interface: &str, number: u8) {
        let (node, pod) = (format!("{}-node", self.name), format!("{}-pod", self.name));
        let outer = format!("veth{number}");
        run(&[
            "ip", "-n", &node, "link", "add", "name", &outer, "mtu", MTU, "type", "veth", "peer",
            "name", interface, "mtu", MTU, "netns", &pod,
        ]);
        for (namespace, link, host) in [(&node, outer.as_str(), 1), (&pod, interface, 2)] {
            run(&["ip", "-n", namespace, "link", "set", link, "up"]);
            let v4 = format!("10.77.{number}.{host}/24");
            run(&["ip", "-n", namespace, "address", "add", &v4, "dev", link]);
            let v6 = format!("fd77:{number}::{host}/64");
            run(&[
                "ip", "-n", namespace, "address", "add", &v6, "dev", link, "nodad",
            ]);
        }
        // The kernel makes the route to an IPv6 address of its own later, from a worker.
        for (namespace, host) in [(&node, 1), (&pod, 2)] {
            let own = Ipv6Addr::new(0xfd77, number.into(), 0, 0, 0, 0, 0, host);
            let route = format!("local {own} ");
            let local = [
                "ip", "-n", namespace, "-6", "route", "show", "table", "local",
            ];
            self.wait_until(|| run(&local).contains(&route));
        }
    }

    /// A macvlan on a wire of the node's: 10.78.0.2 in the pod, 10.78.0.1 on another macvlan of the node's. False: the kernel
    /// has none.
    pub fn add_macvlan(&self, interface: &str) -> bool {
        let (node, pod) = (format!("{}-node", self.name), format!("{}-pod", self.name));
        let wire = [
            "ip", "-n", &node, "link", "add", "wire0", "type", "veth", "peer", "name", "wire1",
        ];
        run(&wire);
        for end in ["wire0", "wire1"] {
            run(&["ip", "-n", &node, "link", "set", end, "up"]);
        }
        for (namespace, name, host) in [(&node, "beside", 1), (&pod, interface, 2)] {
            let add = [
                "-n", &node, "link", "add", "link", "wire0", "name", name, "netns", namespace,
                "type", "macvlan", "mode", "bridge",
            ];
            if !Command::new("ip").args(add).status().unwrap().success() {
                return false;
            }
            let address = format!("10.78.0.{host}/24");
            run(&[
                "ip", "-n", namespace, "address", "add", &address, "dev", name,
            ]);
            run(&["ip", "-n", namespace, "link", "set", name, "up"]);
        }
        true
    }

    /// Sends a datagram to a multicast group from 10.78.0.1.
    pub fn send_to_group(&self, group: Ipv4Addr) {
        let path = Path::new("/run/netns").join(format!("{}-node", self.name));
        let send = || {
            let socket = UdpSocket::bind("10.78.0.1:0").unwrap();
            let interface = libc::in_addr {
                s_addr: u32::from(Ipv4Addr::new(10, 78, 0, 1)).to_be(),
            };
            // SAFETY: the option is an in_addr, which lives during the call.
            let set = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::IPPROTO_IP,
                    libc::IP_MULTICAST_IF,
                    (&raw const interface).cast(),
                    4,
                )
            };
            assert_eq!(set, 0);
            socket.send_to(b"to all", (group, PORT)).unwrap();
            Ok(())
        };
        Namespace::open(&path).unwrap().run(send).unwrap();
    }

    pub fn in_pod(&self, command: &[&str]) -> String {
        let namespace = format!("{}-pod", self.name);
        let mut full = vec!["ip", "netns", "exec", &namespace];
        full.extend(command);
        run(&full)
    }

    /// Whether something is answered from there.
    pub fn ping(&self, address: &str) -> bool {
        self.ping_size(address, 64)
    }

    /// As [`Self::ping`], with this many bytes of payload in one datagram that must not be fragmented.
    pub fn ping_size(&self, address: &str, size: usize) -> bool {
        self.ping_port((address, PORT), size)
    }

    /// As [`Self::ping`], from another port.
    pub fn ping_port(&self, (address, port): (&str, u16), size: usize) -> bool {
        let path = Path::new("/run/netns").join(format!("{}-node", self.name));
        let v4 = !address.contains(':');
        let echo = || {
            let socket = UdpSocket::bind(if v4 { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            if v4 {
                let always = libc::IP_PMTUDISC_DO;
                // SAFETY: the option is an int, which lives during the call.
                let set = unsafe {
                    libc::setsockopt(
                        socket.as_raw_fd(),
                        libc::IPPROTO_IP,
                        libc::IP_MTU_DISCOVER,
                        (&raw const always).cast(),
                        4,
                    )
                };
                assert_eq!(set, 0);
            }
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let payload = vec![7; size];
            let mut answer = vec![0; 2048];
            let there = socket.send_to(&payload, (address, port)).is_ok();
            Ok(there && matches!(socket.recv(&mut answer), Ok(n) if answer[..n] == payload))
        };
        Namespace::open(&path).unwrap().run(echo).unwrap()
    }

    /// Devices vanish shortly after their last descriptor, and that may be one of a child that a test beside
    /// this one has made and that runs its program next.
    pub fn wait_until(&self, reached: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !reached() {
            assert!(Instant::now() < deadline, "{}: not reached", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for side in ["node", "pod"] {
            let namespace = format!("{}-{side}", self.name);
            let _ = Command::new("ip")
                .args(["netns", "del", &namespace])
                .status();
        }
    }
}
