//! Rulesets as nft and iptables make them, taken from one namespace and loaded into another: the two must be told
//! alike. As root, with the kernel's own nf_tables; the loader stands for the agent.

use std::process::Command;

use brig_agent_protocol::agent;
use brig_fixtures::needs::needs;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::*;
use crate::asked::config::Netfilter;
use crate::error::{Error, Kind};
use crate::node::network::namespace::Namespace;
use crate::node::network::tests::can_run;
use crate::node::network::tests::node::Node;

/// What is not installed cannot be asked.
fn can_filter() -> bool {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    let programs = ["nft", "iptables-nft", "iptables-legacy"];
    can_run() && programs.iter().all(|program| needs(has(program), program))
}

/// Tells the namespace's rules without what counts or expires.
fn told(node: &Node) -> String {
    node.in_pod(&["nft", "-s", "list", "ruleset"])
}

fn apply(node: &Node, rules: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), rules).unwrap();
    node.in_pod(&["nft", "-f", file.path().to_str().unwrap()]);
}

fn taken(node: &Node, interfaces: &[(u32, &str)]) -> Ruleset {
    let namespace = Namespace::open(&node.pod).unwrap();
    namespace.run(|| read(interfaces)).unwrap()
}

/// Loads a ruleset as the agent does; returns the kernel's refusals: sequence numbers and error numbers.
fn load(node: &Node, ruleset: &Ruleset) -> Vec<(u32, i32)> {
    fn message(kind: u16, flags: u16, sequence: u32, general: [u8; 4], rest: &[u8]) -> Vec<u8> {
        let length = u32::try_from(20 + rest.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | 1).to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&general);
        bytes.extend_from_slice(rest);
        bytes
    }
    let namespace = Namespace::open(&node.pod).unwrap();
    let work = || {
        let mut batch = message(0x10, 0, 0, [0, 0, 0, 10], &[]);
        for (sequence, object) in (1..).zip(&ruleset.objects) {
            let mut attributes = object.message.attributes.clone();
            for index in &object.message.indexes {
                let name = index.interface.as_str();
                let number = nix::net::if_::if_nametoindex(name).unwrap();
                let at = usize::try_from(index.offset).unwrap();
                attributes[at..at + 4].copy_from_slice(&number.to_ne_bytes());
            }
            let kind = u16::try_from(object.message.kind).unwrap();
            let family = u8::try_from(object.message.family).unwrap();
            let kind = uapi::SUBSYSTEM << 8 | kind;
            batch.extend(message(
                kind,
                0xc00,
                sequence,
                [family, 0, 0, 0],
                &attributes,
            ));
        }
        batch.extend(message(0x11, 0, 0, [0, 0, 0, 10], &[]));
        let mut socket = Socket::new(NETLINK_NETFILTER).unwrap();
        socket.bind_auto().unwrap();
        socket.connect(&SocketAddr::new(0, 0)).unwrap();
        socket.send(&batch, 0).unwrap();
        let mut refused = Vec::new();
        loop {
            let mut answer = Vec::with_capacity(64 << 10);
            if socket.recv(&mut answer, libc::MSG_DONTWAIT).is_err() {
                return Ok(refused);
            }
            let word = |at: usize| u32::from_ne_bytes(answer[at..at + 4].try_into().unwrap());
            refused.push((word(8), word(16).cast_signed()));
        }
    };
    namespace.run(work).unwrap()
}

/// A pair of namespaces: the pod's, and one that stands for the guest. In the guest interfaces have other numbers.
fn pair(name: &str) -> (Node, Node) {
    let (pod, guest) = (
        Node::new(&format!("{name}-p")),
        Node::new(&format!("{name}-g")),
    );
    pod.add_interface("eth0", 0);
    guest.add_interface("eth1", 1);
    guest.add_interface("eth0", 0);
    (pod, guest)
}

fn index_in(node: &Node, interface: &str) -> u32 {
    let text = node.in_pod(&["cat", &format!("/sys/class/net/{interface}/ifindex")]);
    text.trim().parse().unwrap()
}

const FIREWALL: &str = r#"
table inet firewall {
    counter dropped { }
    quota monthly { 10 mbytes }
    limit slow { rate 10/second }
    set blocked { type ipv4_addr; flags interval; elements = { 192.0.2.0/24, 198.51.100.7, 203.0.113.5-203.0.113.9 }; }
    set seen { type ipv4_addr; size 1024; flags dynamic,timeout; timeout 1m; }
    set pairs { type ipv4_addr . inet_service; elements = { 10.0.0.1 . 80, 10.0.0.2 . 443 }; }
    set ranges { type ipv4_addr . inet_service; flags interval; elements = { 10.0.0.0/8 . 80-90 }; }
    map ports { type inet_service : verdict; elements = { 22 : drop, 80 : accept, 443 : goto web }; }
    map bound { type inet_service : counter; elements = { 80 : "dropped" }; }
    chain web { tcp flags syn limit rate 5/second accept; return; }
    chain input {
        type filter hook input priority filter; policy drop;
        iif "lo" accept
        iifname "eth0" ct state established,related accept
        ip saddr @blocked counter name dropped drop
        ip saddr . tcp dport @pairs accept
        ip saddr . tcp dport @ranges accept
        tcp dport { 8080, 8443, 9000-9010 } accept comment "an anonymous set"
        tcp dport vmap @ports
        meta skuid 1337 accept
        add @seen { ip saddr timeout 30s }
        counter name tcp dport map @bound
        fib saddr . iif oif missing drop
        log prefix "dropped " group 2
        ct mark set meta mark or 0x10
        reject with icmpx type port-unreachable
    }
    chain output {
        type filter hook output priority filter; policy accept;
        oif != "lo" meta skuid != 0 tcp dport 25 jump { counter; drop; }
        meta mark set numgen inc mod 4
        quota name "monthly" drop
    }
}
table ip redirected {
    chain out {
        type nat hook output priority -100;
        tcp dport 80 meta skuid != 1337 redirect to :15001
        ip daddr 10.96.0.1 tcp dport 443 dnat to 10.0.0.7:443
    }
    chain post {
        type nat hook postrouting priority srcnat;
        oifname "eth0" masquerade random
    }
}
table netdev early {
    chain in { type filter hook ingress device "eth0" priority 0; tcp dport 9 drop; }
}
"#;

#[test]
fn a_ruleset_of_nft_is_the_same_in_the_guest() {
    if !can_filter() {
        return;
    }
    let (pod, guest) = pair("nft");
    apply(&pod, FIREWALL);
    let index = index_in(&pod, "eth0");
    assert_ne!(index, index_in(&guest, "eth0"));
    let ruleset = taken(&pod, &[(index, "eth0"), (1, "lo")]);
    assert_eq!(ruleset.refused, Vec::<String>::new());
    let refused = load(&guest, &ruleset);
    let named = |(sequence, _): &(u32, i32)| {
        let position = usize::try_from(*sequence).unwrap();
        position
            .checked_sub(1)
            .map(|at| ruleset.objects[at].name.clone())
    };
    let names: Vec<_> = refused.iter().map(named).collect();
    assert!(refused.is_empty(), "{refused:?} {names:?}");
    let there = told(&pod);
    // A chain within a rule has got a name.
    let here = told(&guest);
    assert!(here.contains("tcp dport 25 jump __chain"), "{here}");
    let jump = there.find("oif != \"lo\" meta skuid != 0").unwrap();
    let after = there.find("meta mark set numgen").unwrap();
    let there = format!("{}{}", &there[..jump], &there[after..]);
    for line in there.lines().map(str::trim).filter(|line| !line.is_empty()) {
        assert!(here.contains(line), "{line:?} is not in\n{here}");
    }
}

#[test]
fn rules_of_iptables_nft_are_the_same_in_the_guest() {
    if !can_filter() {
        return;
    }
    let (pod, guest) = pair("ipt");
    for rule in [
        // As istio-cni and linkerd-cni write them.
        "iptables -t nat -N ISTIO_OUTPUT",
        "iptables -t nat -A OUTPUT -p tcp -j ISTIO_OUTPUT",
        "iptables -t nat -A ISTIO_OUTPUT -o lo ! -d 127.0.0.1/32 -m owner ! --uid-owner 1337 -j RETURN",
        "iptables -t nat -A ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN",
        "iptables -t nat -A ISTIO_OUTPUT -p tcp -m multiport --dports 80,443 -j REDIRECT --to-ports 15001",
        "iptables -t nat -A OUTPUT -p udp --dport 53 -m owner ! --uid-owner 0 -j DNAT --to-destination 10.0.0.53:5353",
        "iptables -A INPUT -m conntrack --ctstate INVALID -j DROP",
        "iptables -A INPUT -p tcp ! --syn -m state --state NEW -j DROP",
        "iptables -A INPUT -p tcp --tcp-flags SYN,RST SYN -m tcpmss --mss 1:500 -j DROP",
        "iptables -A INPUT -s 192.0.2.0/24 -m comment --comment why -j REJECT --reject-with icmp-host-prohibited",
        "iptables -A INPUT -m addrtype --dst-type LOCAL -m limit --limit 3/min -j ACCEPT",
        "iptables -t mangle -A PREROUTING -p tcp -m socket --transparent -j MARK --set-mark 1",
        "iptables -t mangle -A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 15006 --tproxy-mark 1",
        "iptables -t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
        "iptables -P FORWARD DROP",
        "ip6tables -A INPUT -p tcp -m multiport --dports 22,23 -j DROP",
        "ip6tables -t nat -A OUTPUT -p tcp -m owner --uid-owner 7 -j REDIRECT --to-ports 7",
        "ip6tables -A INPUT -p ipv6-icmp -j ACCEPT",
    ] {
        let command = rule.replacen("tables", "tables-nft", 1);
        pod.in_pod(&command.split(' ').collect::<Vec<_>>());
    }
    let ruleset = taken(&pod, &[]);
    assert_eq!(ruleset.refused, Vec::<String>::new());
    assert!(
        ruleset.objects.iter().any(|object| object.name
            == "rule 1 of chain ISTIO_OUTPUT in table ip nat (iptables: owner)"),
        "{:?}",
        ruleset
            .objects
            .iter()
            .map(|object| &object.name)
            .collect::<Vec<_>>()
    );
    let refused = load(&guest, &ruleset);
    let names: Vec<_> = refused
        .iter()
        .map(|(sequence, errno)| {
            let position = usize::try_from(*sequence).unwrap();
            (
                position
                    .checked_sub(1)
                    .map(|at| ruleset.objects[at].name.clone()),
                errno,
            )
        })
        .collect();
    assert!(refused.is_empty(), "{names:?}");
    for program in ["iptables-nft-save", "ip6tables-nft-save"] {
        let saved = |node: &Node| {
            let text = node.in_pod(&[program]);
            text.lines()
                .filter(|line| !line.starts_with('#'))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(saved(&guest), saved(&pod));
    }
}

#[test]
fn a_namespace_without_rules_has_nothing_to_hand_on() {
    if !can_filter() {
        return;
    }
    let pod = Node::new("norules");
    let ruleset = taken(&pod, &[]);
    assert_eq!(ruleset.request(Netfilter::Require), None);
    assert_eq!((ruleset.given(), ruleset.refused.len()), (None, 0));
    // Rules that are no more leave none.
    apply(
        &pod,
        "add table ip gone\nadd chain ip gone in { type filter hook input priority 0; }\n",
    );
    pod.in_pod(&["nft", "flush", "ruleset"]);
    let ruleset = taken(&pod, &[]);
    assert_eq!(ruleset.request(Netfilter::Require), None);
    // Somebody has looked at a legacy table, and left it as it was.
    pod.in_pod(&["iptables-legacy", "-t", "nat", "-L"]);
    pod.in_pod(&["ip6tables-legacy", "-L"]);
    assert_eq!(taken(&pod, &[]).refused, Vec::<String>::new());
}

#[test]
fn what_no_guest_can_have_is_refused_by_name_and_left_out_where_the_operator_says_so() {
    if !can_filter() {
        return;
    }
    for (rules, expected) in [
        (
            "iptables-legacy -t nat -A OUTPUT -p tcp -j REDIRECT --to-ports 15001",
            "table nat of the legacy iptables",
        ),
        (
            "ip6tables-legacy -P INPUT DROP",
            "table filter of the legacy ip6tables",
        ),
        (
            "nft add table ip t; nft add chain ip t c; nft add rule ip t c iif 77 drop",
            "rule 1 of chain c in table ip t matches interface number 77",
        ),
    ] {
        let pod = Node::new("refused");
        pod.in_pod(&["sh", "-ec", rules]);
        let ruleset = taken(&pod, &[]);
        assert_eq!(ruleset.refused.len(), 1, "{rules}: {:?}", ruleset.refused);
        let error = ruleset.decide(Netfilter::Require).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("netfilter = \"warn\""), "{text}");
        assert_eq!(Error::from(error).kind, Kind::Unimplemented);
        assert!(ruleset.decide(Netfilter::Warn).is_ok());
        let made = ruleset.objects.iter().map(|object| object.message.kind);
        assert!(
            made.into_iter()
                .all(|kind| kind != u32::from(uapi::NEW_RULE))
        );
    }
}

#[test]
fn an_agent_may_only_speak_of_what_it_was_sent() {
    let object = ruleset::Object {
        message: agent::NetfilterObject::default(),
        name: "table ip nat".to_owned(),
    };
    let ruleset = Ruleset {
        objects: vec![object],
        ..Ruleset::default()
    };
    let refusal = |object, errno| agent::NetfilterRefusal {
        object,
        errno,
        ..agent::NetfilterRefusal::default()
    };
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    let judged = |refused: &[_], policy| ruleset.accept(refused, policy, &logger);
    let far = [refusal(1, 2), refusal(u32::MAX, u32::MAX)];
    assert!(judged(&far, Netfilter::Require).is_ok());
    let own = [refusal(0, 2)];
    let text = judged(&own, Netfilter::Require).unwrap_err().to_string();
    assert!(
        text.contains("table ip nat: the guest's kernel has no such thing"),
        "{text}"
    );
    assert!(judged(&own, Netfilter::Warn).is_ok());
}

#[test]
fn a_ruleset_without_end_is_refused() {
    if !can_filter() {
        return;
    }
    let pod = Node::new("endless");
    let addresses: Vec<String> = (0..90_000_u32)
        .map(|n| std::net::Ipv4Addr::from(n * 3).to_string())
        .collect();
    let set = addresses.join(", ");
    apply(
        &pod,
        &format!("add table ip t\nadd set ip t s {{ type ipv4_addr; elements = {{ {set} }}; }}\n"),
    );
    let namespace = Namespace::open(&pod.pod).unwrap();
    let error = namespace.run(|| read(&[])).unwrap_err().to_string();
    assert!(error.contains("larger than 1024 KiB"), "{error}");
}

#[test]
fn a_change_is_heard_and_nothing_else() {
    if !can_filter() {
        return;
    }
    let (pod, other) = (Node::new("heard"), Node::new("unheard"));
    let namespace = Namespace::open(&pod.pod).unwrap();
    let socket = namespace.run(|| Ok(watch().unwrap())).unwrap();
    if !needs(socket.is_some(), "nf_tables in the kernel") {
        return;
    }
    let socket = socket.unwrap();
    let state = || namespace.run(|| Ok(read(&[]).unwrap().generation)).unwrap();
    let is_as = |given| namespace.run(|| Ok(is_as(given))).unwrap();
    assert!(is_as(None));
    assert!(!heard(&socket).unwrap());
    apply(&pod, "add table ip t\nadd chain ip t c\n");
    assert!(heard(&socket).unwrap());
    assert!(!heard(&socket).unwrap(), "once");
    assert!(!is_as(None));
    let now = state();
    assert!(is_as(Some(now)));

    // Neither who looks nor who changes another namespace.
    told(&pod);
    taken(&pod, &[]);
    apply(&other, "add table ip t\n");
    assert!(!heard(&socket).unwrap());
    // More than the socket has room for is heard as well.
    let many: Vec<String> = (0..500).map(|n| format!("add chain ip t c{n}\n")).collect();
    apply(&pod, &many.concat());
    assert!(heard(&socket).unwrap());
    assert!(!heard(&socket).unwrap());
    assert!(!is_as(Some(now)));
}

#[test]
fn a_replacement_is_sent_even_if_it_is_empty() {
    let none = Ruleset::default().replacement(Netfilter::Warn, 7);
    assert_eq!((none.replaces, none.objects.len()), (7, 0));
    assert!(none.best_effort);
    let required = Ruleset::default().replacement(Netfilter::Require, 1);
    assert!(!required.best_effort);
}
