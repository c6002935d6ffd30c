//! What a sandbox takes over from the pod's network namespace: packet filter rules and kernel parameters.
#![allow(clippy::unwrap_used)]
mod guest;

use brig_agent_protocol::agent::*;
use guest::*;

const MAC: &str = "02:00:00:0a:0b:0d";
const TABLE: u32 = 0;
const CHAIN: u32 = 3;
const RULE: u32 = 6;

/// A netlink attribute.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap();
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn expression(name: &[u8], data: &[u8]) -> Vec<u8> {
    attribute(1, &[attribute(1, name), attribute(2, data)].concat())
}

fn object(kind: u32, attributes: Vec<u8>) -> NetfilterObject {
    NetfilterObject {
        kind,
        family: 2,
        attributes,
        ..Default::default()
    }
}

/// `table ip t`, `chain c`, a rule `iif "eth0" drop`, and one with an expression that no kernel has.
fn filter(with_unknown: bool) -> Netfilter {
    let hook = [number(1, 1), number(2, 0)].concat();
    let chain = [
        attribute(1, b"t\0"),
        attribute(3, b"c\0"),
        attribute(4, &hook),
        attribute(7, b"filter\0"),
    ];
    let compared = attribute(3, &attribute(1, &0xdead_beef_u32.to_ne_bytes()));
    let verdict = attribute(2, &attribute(2, &number(1, 0)));
    let expressions = [
        expression(b"meta\0", &[number(1, 1), number(2, 4)].concat()),
        expression(b"cmp\0", &[number(1, 1), number(2, 0), compared].concat()),
        expression(b"immediate\0", &[number(1, 0), verdict].concat()),
    ];
    let rule = |expressions: &[u8]| {
        let parts = [
            attribute(1, b"t\0"),
            attribute(2, b"c\0"),
            attribute(4, expressions),
        ];
        object(RULE, parts.concat())
    };
    let mut dropping = rule(&expressions.concat());
    let placeholder = 0xdead_beef_u32.to_ne_bytes();
    let offset = dropping
        .attributes
        .windows(4)
        .position(|four| four == placeholder);
    dropping.indexes.push(InterfaceIndex {
        offset: u32::try_from(offset.unwrap()).unwrap(),
        interface: "eth0".into(),
        ..Default::default()
    });
    let mut objects = vec![
        object(TABLE, attribute(1, b"t\0")),
        object(CHAIN, chain.concat()),
    ];
    if with_unknown {
        objects.push(rule(&expression(b"nosuchthing\0", &[])));
    }
    objects.push(dropping);
    Netfilter {
        objects,
        ..Default::default()
    }
}

fn request(netfilter: Netfilter) -> StartSandboxRequest {
    let sysctl = |name: &str, value: &str| Sysctl {
        name: name.into(),
        value: value.into(),
        ..Default::default()
    };
    StartSandboxRequest {
        id: "sandbox".into(),
        interfaces: vec![Interface {
            name: "eth0".into(),
            mac: MAC.into(),
            addresses: vec![address("10.88.0.7/24")],
            sysctls: vec![sysctl("net/ipv4/conf/eth0/rp_filter", "2")],
            ..Default::default()
        }],
        inherited: vec![
            // Below what is a privileged port as long as the next is not set.
            sysctl("net/ipv4/ip_local_port_range", "600 700"),
            sysctl("net/ipv4/ip_unprivileged_port_start", "500"),
            sysctl("net/ipv4/no_such_parameter", "1"),
            sysctl("net/ipv4/tcp_fin_timeout", "31"),
        ],
        sysctls: [("net.ipv4.tcp_fin_timeout".to_owned(), "17".to_owned())].into(),
        netfilter: Some(netfilter).into(),
        ..Default::default()
    }
}

async fn guest() -> Guest {
    let guest = Guest::boot().await;
    guest.in_network(&format!(
        "ip link add v0 type veth peer name v1 && ip link set v0 address {MAC} && ip link set v1 up"
    ));
    guest
}

#[tokio::test]
async fn rules_and_parameters_are_loaded_and_a_pods_own_parameters_win() {
    let mut guest = guest().await;
    let started = guest
        .client
        .start_sandbox(ctx(), &request(filter(false)))
        .await;
    assert!(started.unwrap().netfilter_refused.is_empty());
    let rules = guest.in_network("nft list ruleset");
    assert!(rules.contains("iif \"eth0\" drop"), "{rules}");
    guest.rootfs("c1");
    let inside = spec(
        "cd /proc/sys/net/ipv4; cat ip_local_port_range ip_unprivileged_port_start tcp_fin_timeout conf/eth0/rp_filter",
    );
    assert_eq!(
        guest.whole("c1", &inside).await.stdout,
        "600\t700\n500\n17\n2\n"
    );
    guest.stop().await;
}

#[tokio::test]
async fn a_ruleset_with_something_unknown_is_not_loaded_and_the_interface_stays_down() {
    let guest = guest().await;
    let started = guest
        .client
        .start_sandbox(ctx(), &request(filter(true)))
        .await;
    let refused = started.unwrap().netfilter_refused;
    let of: Vec<_> = refused.iter().map(|r| (r.object, r.errno)).collect();
    assert_eq!(of, [(2, 2)], "{refused:?}");
    assert_eq!(guest.in_network("nft list ruleset"), "");
    let link = guest.in_network("ip -o link show eth0");
    assert!(!link.contains("UP"), "{link}");
    guest.stop().await;
}

#[tokio::test]
async fn with_the_best_effort_everything_else_is_loaded() {
    let guest = guest().await;
    let mut wanted = request(filter(true));
    wanted.netfilter.as_mut().unwrap().best_effort = true;
    let refused = guest
        .client
        .start_sandbox(ctx(), &wanted)
        .await
        .unwrap()
        .netfilter_refused;
    assert_eq!(refused.len(), 1);
    let rules = guest.in_network("nft list ruleset");
    assert!(rules.contains("iif \"eth0\" drop"), "{rules}");
    assert!(guest.in_network("ip -o link show eth0").contains("UP"));
    guest.stop().await;
}

#[tokio::test]
async fn what_is_no_ruleset_or_parameter_is_refused() {
    for (mut bad, expected) in [
        (filter(false), "no interface \"eth9\""),
        (filter(false), "not something that is made"),
    ] {
        if expected.contains("eth9") {
            bad.objects[2].indexes[0].interface = "eth9".into();
        } else {
            bad.objects[0].kind = 2;
        }
        let guest = guest().await;
        let (_, text) = refusal(guest.client.start_sandbox(ctx(), &request(bad)).await);
        assert!(text.contains(expected), "{text}");
        guest.stop().await;
    }
    let guest = guest().await;
    let mut bad = request(filter(false));
    bad.inherited[0].name = "net/../kernel/core_pattern".into();
    let (_, text) = refusal(guest.client.start_sandbox(ctx(), &bad).await);
    assert!(text.contains("core_pattern"), "{text}");
    guest.stop().await;
}

#[tokio::test]
async fn rules_take_the_place_of_those_that_nobody_has_changed() {
    let guest = guest().await;
    let started = guest
        .client
        .start_sandbox(ctx(), &request(filter(false)))
        .await
        .unwrap();
    let replace = async |objects: Vec<NetfilterObject>, replaces: u32| {
        let netfilter = Netfilter {
            objects,
            replaces,
            ..Default::default()
        };
        let request = AddNetworkRequest {
            netfilter: Some(netfilter).into(),
            ..Default::default()
        };
        guest.client.add_network(ctx(), &request).await
    };
    let other = || vec![object(TABLE, attribute(1, b"other\0"))];
    let first = started.netfilter_generation;
    let second = replace(other(), first).await.unwrap();
    assert!(second.netfilter_refused.is_empty());
    assert_eq!(
        guest.in_network("nft list ruleset").trim(),
        "table ip other {\n}"
    );
    // What the kernel refuses leaves all as it is.
    let refused = replace(filter(true).objects, second.netfilter_generation)
        .await
        .unwrap();
    assert_eq!(refused.netfilter_refused.len(), 1);
    assert_eq!(refused.netfilter_generation, second.netfilter_generation);
    assert!(guest.in_network("nft list ruleset").contains("other"));
    // All of it may go.
    let third = replace(vec![], refused.netfilter_generation).await.unwrap();
    assert_eq!(guest.in_network("nft list ruleset"), "");
    // And to replace nothing by nothing is no change.
    let fourth = replace(vec![], third.netfilter_generation).await.unwrap();
    assert_eq!(fourth.netfilter_generation, third.netfilter_generation);

    guest.in_network("nft add table ip mine");
    let (code, text) = refusal(replace(other(), fourth.netfilter_generation).await);
    assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
    assert!(text.contains("changed in the guest"), "{text}");
    assert_eq!(
        guest.in_network("nft list ruleset").trim(),
        "table ip mine {\n}"
    );
    guest.stop().await;
}
