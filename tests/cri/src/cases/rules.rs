//! What plug-ins put into a pod's network namespace beside interfaces: packet filter rules and kernel parameters.
//! The plug-in here is a script that runs last in the chain, in the namespace.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::rc::Rc;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;

use super::network::{fetch, run, server};
use crate::client::Cri;
use crate::container::eventually;
use crate::node::{Configured, Directory, TOOLS};
use crate::suite::{Case, SLEEP, Suite, case, refused};

pub const CASES: &[Case] = &[
    case(
        "network",
        "rules of the pod's namespace hold: a redirect, a reject, and one by owner",
        rules,
    ),
    case(
        "network",
        "rules that come into the pod's namespace later hold, and end when they go",
        later,
    ),
    case(
        "network",
        "rules that a container has made stay, whatever comes into the pod's namespace later",
        owned,
    ),
    case(
        "network",
        "rules of legacy iptables in the pod's namespace are refused by name, or hold",
        legacy,
    ),
    case(
        "network",
        "kernel parameters of the pod's namespace are its containers', and the pod's own win",
        parameters,
    ),
];

const PLUGIN: &str = "/usr/lib/cni/brig-cri-last";
const CONFIGURATION: &str = "/etc/cni/net.d/10-brig-node.conflist";

/// A chain of plug-ins whose last one runs a script in the namespace, until the end of its scope.
pub(super) struct Chain {
    _configured: Configured,
    _networks: Directory,
}

impl Chain {
    pub(super) fn with(cri: &Rc<Cri>, script: &str) -> Result<Self> {
        let networks = Directory::new("chain")?;
        let script = networks.file("script", script)?;
        let plugin = format!(
            "#!/bin/sh\nconfiguration=$(cat)\ncase $CNI_COMMAND in\nADD)\n  nsenter --net=\"$CNI_NETNS\" sh -e {} >&2 || \
             exit 1\n  printf '%s' \"$configuration\" | jq .prevResult ;;\nVERSION)\n  echo '{{\"cniVersion\":\"1.0.0\",\
             \"supportedVersions\":[\"1.0.0\"]}}' ;;\nesac\n",
            script.display()
        );
        std::fs::write(PLUGIN, plugin)?;
        std::fs::set_permissions(PLUGIN, std::fs::Permissions::from_mode(0o755))?;
        let first = std::fs::read_to_string(CONFIGURATION)?;
        let last = r#"{ "type": "portmap", "capabilities": { "portMappings": true } }"#;
        let both = format!(r#"{last}, {{ "type": "brig-cri-last" }}"#);
        contains("the node's network", last, &first)?;
        networks.file("10-chain.conflist", &first.replace(last, &both))?;
        let directory = networks.path.display().to_string();
        let configured = Configured::lines(cri, |line| {
            match line.trim_start().starts_with("conf_dir") {
                true => format!("conf_dir = \"{directory}\""),
                false => line.to_owned(),
            }
        })?;
        Ok(Self {
            _configured: configured,
            _networks: networks,
        })
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(PLUGIN);
    }
}

fn rules(suite: &mut Suite) -> Result<()> {
    let _chain = Chain::with(
        &suite.cri,
        "iptables-nft -t nat -A PREROUTING -p tcp -m multiport --dports 81,82 -j REDIRECT --to-ports 8080\n\
         iptables-nft -A INPUT ! -i lo -p tcp --dport 9090 -j REJECT --reject-with tcp-reset\n\
         nft add table inet brig-cri\n\
         nft 'add chain inet brig-cri out { type filter hook output priority 0; }'\n\
         nft add rule inet brig-cri out oif != lo meta skuid 1000 ip daddr 10.88.0.1 reject\n",
    )?;
    let pod = suite.run("rules")?;
    let web = server(&pod)?;
    let _other = pod
        .container("other", &["httpd", "-f", "-p", "9090", "-h", "/etc"])
        .start()?;
    let address = pod.ipv4()?;
    for port in [8080, 81, 82] {
        equal("page", "rules", fetch(&address, port)?).with_context(|| format!("port {port}"))?;
    }
    web.sh("timeout 60 wget -qO- http://127.0.0.1:9090/hostname")
        .context("within the pod the port is open")?;
    let target: SocketAddr = format!("{address}:9090").parse()?;
    let outcome = TcpStream::connect_timeout(&target, clock::seconds(3));
    that(
        "port 9090 is rejected from outside",
        outcome.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused),
    )?;
    let ssh = "nc -w 60 10.88.0.1 22 </dev/null | head -c 3";
    equal("as root", "SSH", web.sh(ssh)?)?;
    let owner = format!("su -s /bin/sh app -c '{ssh}' 2>/dev/null || true");
    equal("as the rejected user", "", web.sh(&owner)?)
}

/// Whether a connection to a port comes about.
fn is_open(address: &str, port: u16) -> Result<bool> {
    let target: SocketAddr = format!("{address}:{port}").parse()?;
    Ok(TcpStream::connect_timeout(&target, clock::seconds(1)).is_ok())
}

/// Waits until a connection comes about, or does not any more.
fn until_port_is(open: bool, address: &str, port: u16) -> Result<()> {
    eventually("the rule's effect", clock::seconds(6), || {
        Ok((is_open(address, port)? == open).then_some(()))
    })
}

/// The network namespace of the pod with this address, as `nsenter` wants it.
pub(super) fn namespace_of(address: &str) -> Result<String> {
    let look = format!(
        "for n in /run/netns/*; do nsenter --net=$n ip -o address | grep -q ' {address}/' && echo $n; done; true"
    );
    let found = run(&look)?;
    let first = found.lines().next();
    first
        .map(str::to_owned)
        .context("no namespace has the pod's address")
}

const REDIRECT: &str =
    "iptables-nft -t nat -A PREROUTING -p tcp --dport 81 -j REDIRECT --to-ports 8080";

fn later(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("later-rules")?;
    let _web = server(&pod)?;
    let address = pod.ipv4()?;
    let namespace = namespace_of(&address)?;
    let within = |command: &str| run(&format!("nsenter --net={namespace} {command}"));
    fetch(&address, 8080)?;
    that("port 81 is closed", !is_open(&address, 81)?)?;
    // A pod that starts with it is refused; rules are not its business.
    within("ip route add blackhole 203.0.113.0/24")?;
    within(REDIRECT)?;
    until_port_is(true, &address, 81).context("a rule that has come")?;
    equal("page", "later-rules", fetch(&address, 81)?)?;
    within("nft flush ruleset")?;
    until_port_is(false, &address, 81).context("a rule that has gone")?;
    // And once more, with another rule in the same transaction.
    within("nft add table inet other")?;
    within(REDIRECT)?;
    until_port_is(true, &address, 81).context("a rule that has come again")?;
    fetch(&address, 8080).map(drop)
}

fn owned(suite: &mut Suite) -> Result<()> {
    suite.image(TOOLS)?;
    let pod = suite
        .pod("own-rules")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let _web = server(&pod)?;
    let admin = pod
        .container("admin", SLEEP)
        .image(TOOLS.0)
        .security(|security| security.privileged = true)
        .start()?;
    let address = pod.ipv4()?;
    let namespace = namespace_of(&address)?;
    let within = |command: &str| run(&format!("nsenter --net={namespace} {command}"));
    fetch(&address, 8080)?;
    within(REDIRECT)?;
    until_port_is(true, &address, 81)?;
    admin.sh("nft add table ip mine")?;
    within("nft add table ip theirs")?;
    std::thread::sleep(clock::seconds(1));
    let rules = admin.sh("nft list ruleset")?;
    contains("the container's table", "table ip mine", &rules)?;
    contains("what it had before", "redirect", &rules.to_lowercase())?;
    that("port 81 is open", is_open(&address, 81)?)
}

fn legacy(suite: &mut Suite) -> Result<()> {
    let _chain = Chain::with(
        &suite.cri,
        "iptables-legacy -t nat -A PREROUTING -p tcp --dport 81 -j REDIRECT --to-ports 8080\n",
    )?;
    let pod = suite.run("legacy");
    if suite.is_brig() {
        return refused("a namespace with legacy rules", pod, &["legacy iptables"]);
    }
    let pod = pod?;
    let _web = server(&pod)?;
    equal("page", "legacy", fetch(&pod.ipv4()?, 81)?)
}

/// Everything below `/proc/sys` that belongs to a network namespace, as `grep` tells it.
const TOLD: &str =
    "cd /proc/sys && grep -rs . net/core net/ipv4 net/ipv6 net/netfilter net/unix || true";

/// What is not a value of the namespace: what counts or is derived, secrets, what is another interface's, and
/// what of a whole kernel only its first namespace may change.
fn is_compared(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or(name);
    !name.contains("nf_log")
        && !last.ends_with("_entries")
        && ![
            "mtu",
            "stable_secret",
            "tcp_fastopen_key",
            "nf_conntrack_count",
            "nf_conntrack_buckets",
            "tcp_available_congestion_control",
            "tcp_allowed_congestion_control",
            "tcp_available_ulp",
        ]
        .contains(&last)
}

fn values(text: &str) -> BTreeMap<&str, String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| is_compared(name))
        .map(|(name, value)| {
            let columns: Vec<&str> = value.split_whitespace().collect();
            (name, columns.join(" "))
        })
        .collect()
}

fn parameters(suite: &mut Suite) -> Result<()> {
    let told = "/run/brig-cri-parameters";
    let _chain = Chain::with(
        &suite.cri,
        &format!(
            "cd /proc/sys/net\n\
             echo 1234 >core/somaxconn\n\
             echo 31 >ipv4/tcp_fin_timeout\n\
             echo '10 2000' >ipv4/ping_group_range\n\
             echo 500 >ipv4/ip_unprivileged_port_start\n\
             echo '600 700' >ipv4/ip_local_port_range\n\
             echo 1 >ipv4/ip_forward\n\
             echo 1 >ipv4/conf/all/accept_redirects\n\
             echo 2 >ipv4/conf/eth0/rp_filter\n\
             echo 1 >ipv4/conf/default/arp_ignore\n\
             echo 0 >ipv6/conf/eth0/accept_redirects\n\
             echo 1 >ipv6/conf/lo/disable_ipv6\n\
             echo 45 >ipv4/neigh/eth0/gc_stale_time\n\
             {{ {TOLD}; }} >{told}\n"
        ),
    )?;
    let pod = suite
        .pod("parameters")
        .sysctl("net.ipv4.tcp_fin_timeout", "17")
        .run(&suite.cri)?;
    let container = pod.container("main", SLEEP).start()?;
    let (wanted, found) = (std::fs::read_to_string(told)?, container.sh(TOLD)?);
    let _ = std::fs::remove_file(told);
    let (mut wanted, found) = (values(&wanted), values(&found));
    wanted.insert("net/ipv4/tcp_fin_timeout", "17".to_owned());
    if !suite.containerd.starts_with("1.") {
        // Its CRI sets these for every pod, after the plug-ins.
        wanted.insert("net/ipv4/ip_unprivileged_port_start", "0".to_owned());
        wanted.insert("net/ipv4/ping_group_range", "0 2147483647".to_owned());
    }
    let both = wanted.iter().filter(|(name, _)| found.contains_key(*name));
    that("most parameters are there", both.clone().count() > 300)?;
    let different: Vec<String> = both
        .filter(|(name, value)| found.get(*name) != Some(value))
        .map(|(name, value)| format!("{name}: {value} in the namespace, {} here", found[name]))
        .collect();
    equal("parameters that differ", Vec::<String>::new(), different)?;
    equal("one of them", "1234", &found["net/core/somaxconn"])?;
    // A listener on a port that is no longer a privileged one, by somebody who is not root.
    let listening = "su -s /bin/sh app -c 'timeout 2 nc -l -p 501 </dev/null 2>&1' || true";
    let said = container.sh(listening)?;
    that(
        &format!("port 501 is free for anybody: '{said}'"),
        !said.contains("ermission"),
    )
}
