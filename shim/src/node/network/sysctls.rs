//! Kernel parameters that a container finds under `/proc/sys` on a node, for the guest that has its own: those of
//! the pod's network namespace, which plug-ins tune and the node's defaults shape, and those limits of the whole
//! node that a guest would derive from its small memory.
//!
//! Only what differs from a guest as it boots is handed on (`guest_defaults.txt`, which a case of the CRI suite
//! holds against a guest). What is memory is not among it: it stays bounded by the pod's cgroup.
//!
//! Trusted: the node. The guest takes each value as far as its kernel does.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use brig_agent_protocol::agent;
use rustix::fs::{Mode, OFlags};

/// What a guest of 256 MiB has, one `name value` a line; `*` stands for any interface, `all` and `default`.
const GUEST_DEFAULTS: &str = include_str!("guest_defaults.txt");
const ROOT: &str = "/proc/sys";
/// The longest value that is handed on, in bytes. The longest of the kernel's is a list of ports.
const MAX_VALUE: usize = 16 << 10;

/// The parts of a network namespace.
const PARTS: [&str; 6] = [
    "net/core",
    "net/ipv4",
    "net/ipv6",
    "net/mptcp",
    "net/netfilter",
    "net/unix",
];

/// Names in a network namespace, or last parts of names, that are not for the guest.
const NOT_THE_GUESTS: [&str; 9] = [
    // Secrets.
    "tcp_fastopen_key",
    "stable_secret",
    // Set with the interface.
    "mtu",
    // Of namespaces made later.
    "tcp_child_ehash_entries",
    "udp_child_hash_entries",
    // Whatever else says the same: in milliseconds, or as ip_forward.
    "base_reachable_time",
    "retrans_time",
    "conf/all/forwarding",
    // Where packets are logged is the node's matter.
    "nf_log",
];

/// Limits and rules of the whole node.
const LIMITS: [&str; 54] = [
    "fs/aio-max-nr",
    "fs/epoll/max_user_watches",
    "fs/fanotify/max_queued_events",
    "fs/fanotify/max_user_groups",
    "fs/fanotify/max_user_marks",
    "fs/file-max",
    "fs/inotify/max_queued_events",
    "fs/inotify/max_user_instances",
    "fs/inotify/max_user_watches",
    "fs/mount-max",
    "fs/nr_open",
    "fs/pipe-max-size",
    "fs/pipe-user-pages-hard",
    "fs/pipe-user-pages-soft",
    "fs/protected_fifos",
    "fs/protected_hardlinks",
    "fs/protected_regular",
    "fs/protected_symlinks",
    "kernel/keys/maxbytes",
    "kernel/keys/maxkeys",
    "kernel/keys/persistent_keyring_expiry",
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/pid_max",
    "kernel/pty/max",
    "kernel/threads-max",
    "kernel/yama/ptrace_scope",
    "net/core/netdev_max_backlog",
    "net/core/rmem_default",
    "net/core/rmem_max",
    "net/core/wmem_default",
    "net/core/wmem_max",
    "net/ipv4/neigh/default/gc_thresh1",
    "net/ipv4/neigh/default/gc_thresh2",
    "net/ipv4/neigh/default/gc_thresh3",
    "net/ipv4/tcp_max_orphans",
    "net/ipv6/neigh/default/gc_thresh1",
    "net/ipv6/neigh/default/gc_thresh2",
    "net/ipv6/neigh/default/gc_thresh3",
    "net/netfilter/nf_conntrack_expect_max",
    CONNTRACK_MAX,
    "user/max_cgroup_namespaces",
    "user/max_ipc_namespaces",
    "user/max_mnt_namespaces",
    "user/max_net_namespaces",
    "user/max_pid_namespaces",
    "user/max_time_namespaces",
    "user/max_user_namespaces",
    "user/max_uts_namespaces",
    "vm/max_map_count",
    "vm/mmap_rnd_bits",
    "vm/mmap_rnd_compat_bits",
    OVERCOMMIT,
    "vm/overcommit_ratio",
];
const CONNTRACK_MAX: &str = "net/netfilter/nf_conntrack_max";
/// What a node of more than 4 GiB has; one whose kernel tracks no connections yet does not say.
const USUAL_CONNTRACK_MAX: &str = "262144";
/// Never 2 in a guest: what a node may promise of its memory and swap, a guest of a few MiB could not.
const OVERCOMMIT: &str = "vm/overcommit_memory";

/// Parameters for a guest.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inherited {
    /// In the order in which they are set.
    pub general: Vec<agent::Sysctl>,
    /// Of each interface, by its name.
    pub interfaces: HashMap<String, Vec<agent::Sysctl>>,
}

/// The node's own limits, read in the node's network namespace.
#[must_use]
pub fn of_node() -> Vec<agent::Sysctl> {
    let defaults = Defaults::parse();
    let limits = LIMITS.iter().filter_map(|name| {
        let value = match read(&Path::new(ROOT).join(name)) {
            None if *name == CONNTRACK_MAX => USUAL_CONNTRACK_MAX.to_owned(),
            value => value?,
        };
        let promised = *name == OVERCOMMIT && value == "2";
        (!promised && defaults.differs(name, &value)).then(|| sysctl(name, value))
    });
    limits.collect()
}

/// Those of the calling thread's network namespace, for a guest with these interfaces.
#[must_use]
pub fn of_namespace(interfaces: &[&str]) -> Inherited {
    let mut found = Vec::new();
    for part in PARTS {
        walk(part, interfaces, &mut found);
    }
    select(found, &Defaults::parse(), interfaces)
}

fn sysctl(name: &str, value: String) -> agent::Sysctl {
    agent::Sysctl {
        name: name.to_owned(),
        value,
        ..agent::Sysctl::default()
    }
}

/// A value that can be written, its columns parted by single spaces. What a namespace may only see, or only
/// trigger, is none: the kernel goes by the file's mode, for root too.
fn read(path: &Path) -> Option<String> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    // In one call, as the kernel hands parameters out.
    let mut bytes = vec![0; MAX_VALUE];
    let length = rustix::io::read(&file, &mut bytes).ok()?;
    let text = std::str::from_utf8(bytes.get(..length)?).ok()?;
    let columns: Vec<&str> = text.split_whitespace().collect();
    Some(columns.join(" ")).filter(|value| !value.is_empty() && length < MAX_VALUE)
}

/// Everything below `name` that can be written: (name, value).
fn walk(name: &str, interfaces: &[&str], found: &mut Vec<(String, String)>) {
    let Ok(entries) = fs::read_dir(PathBuf::from(ROOT).join(name)) else {
        return;
    };
    for entry in entries.flatten() {
        let Some(last) = entry.file_name().to_str().map(str::to_owned) else {
            continue;
        };
        let name = format!("{name}/{last}");
        if NOT_THE_GUESTS.iter().any(|other| ends_with(&name, other)) {
            continue;
        }
        if let Some(interface) = interface_of(&name)
            && !is_general(interface)
            && !interfaces.contains(&interface)
        {
            continue;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&name, interfaces, found),
            Ok(_) => found.extend(read(&entry.path()).map(|value| (name, value))),
            Err(_) => {}
        }
    }
}

fn ends_with(name: &str, last: &str) -> bool {
    name.strip_suffix(last)
        .is_some_and(|rest| rest.ends_with('/'))
}

/// What stands for an interface in the name of a parameter.
fn interface_of(name: &str) -> Option<&str> {
    let rest = name
        .strip_prefix("net/ipv4/")
        .or_else(|| name.strip_prefix("net/ipv6/"))?;
    let rest = rest
        .strip_prefix("conf/")
        .or_else(|| rest.strip_prefix("neigh/"))?;
    rest.split('/').next()
}

/// Of no interface that the guest has to set up first.
fn is_general(interface: &str) -> bool {
    ["all", "default", "lo"].contains(&interface)
}

/// The name with another word for its interface.
fn with_interface(name: &str, interface: &str, other: &str) -> String {
    name.replacen(&format!("/{interface}/"), &format!("/{other}/"), 1)
}

/// What differs, in the order in which it is set: what changes others goes before them.
fn select(
    mut found: Vec<(String, String)>,
    defaults: &Defaults<'_>,
    interfaces: &[&str],
) -> Inherited {
    found.sort_by_cached_key(|(name, _)| {
        let rank = match interface_of(name) {
            _ if name == FORWARD => 0,
            None => 1,
            Some("all") => 2,
            Some("default") => 3,
            Some(_) => 4,
        };
        (rank, name.clone())
    });
    let mut inherited = Inherited::default();
    let mut changed = std::collections::HashSet::new();
    for (name, value) in found {
        let interface = interface_of(&name);
        // What was set for all may have changed each, and so may the default, of those without an address yet.
        let follows = interface.is_some_and(|interface| {
            let general = match interface {
                "all" => &[][..],
                "default" => &["all"],
                _ => &["all", "default"],
            };
            let mut general = general.iter();
            general.any(|other| changed.contains(&with_interface(&name, interface, other)))
        });
        let redirects = name == REDIRECTS && changed.contains(FORWARD);
        if !follows && !redirects && !defaults.differs(&name, &value) {
            continue;
        }
        changed.insert(name.clone());
        match interface {
            Some(interface) if !is_general(interface) => {
                if let Some(known) = interfaces.iter().find(|known| **known == interface) {
                    let of = inherited.interfaces.entry((*known).to_owned());
                    of.or_default().push(sysctl(&name, value));
                }
            }
            _ => inherited.general.push(sysctl(&name, value)),
        }
    }
    inherited
}

const FORWARD: &str = "net/ipv4/ip_forward";
/// A router's default is another one than a host's: the kernel sets it with [`FORWARD`].
const REDIRECTS: &str = "net/ipv4/conf/all/accept_redirects";

/// What a guest has of itself.
struct Defaults<'a>(HashMap<&'a str, &'a str>);

impl Defaults<'static> {
    fn parse() -> Self {
        let lines = GUEST_DEFAULTS.lines();
        Self(lines.filter_map(|line| line.split_once(' ')).collect())
    }
}

impl Defaults<'_> {
    fn differs(&self, name: &str, value: &str) -> bool {
        let own = self.0.get(name).copied();
        let general = || {
            let any = with_interface(name, interface_of(name)?, "*");
            self.0.get(any.as_str()).copied()
        };
        own.or_else(general) != Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[agent::Sysctl]) -> Vec<&str> {
        list.iter().map(|sysctl| sysctl.name.as_str()).collect()
    }

    fn selected(found: &[(&str, &str)]) -> Inherited {
        let defaults = Defaults(HashMap::from([
            ("net/ipv4/ip_forward", "0"),
            ("net/core/somaxconn", "4096"),
            ("net/ipv4/conf/*/rp_filter", "0"),
            ("net/ipv4/conf/*/accept_redirects", "1"),
            ("net/ipv6/conf/*/disable_ipv6", "0"),
            ("net/ipv6/conf/*/accept_dad", "1"),
            ("net/ipv6/conf/lo/accept_dad", "-1"),
        ]));
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        select(found.iter().map(owned).collect(), &defaults, &["eth0"])
    }

    #[test]
    fn what_a_guest_has_anyway_is_not_sent() {
        let untouched = selected(&[
            ("net/ipv4/ip_forward", "0"),
            ("net/core/somaxconn", "4096"),
            ("net/ipv4/conf/eth0/rp_filter", "0"),
            ("net/ipv6/conf/lo/accept_dad", "-1"),
            ("net/ipv6/conf/eth0/accept_dad", "1"),
        ]);
        assert_eq!(untouched, Inherited::default());
    }

    #[test]
    fn what_changes_others_goes_first_and_the_others_follow() {
        let tuned = selected(&[
            ("net/ipv6/conf/eth0/disable_ipv6", "0"),
            ("net/ipv6/conf/all/disable_ipv6", "1"),
            ("net/ipv6/conf/default/disable_ipv6", "1"),
            ("net/ipv6/conf/lo/disable_ipv6", "1"),
            ("net/ipv4/conf/all/accept_redirects", "1"),
            ("net/ipv4/ip_forward", "1"),
            ("net/core/somaxconn", "1024"),
        ]);
        assert_eq!(
            names(&tuned.general),
            [
                "net/ipv4/ip_forward",
                "net/core/somaxconn",
                "net/ipv4/conf/all/accept_redirects",
                "net/ipv6/conf/all/disable_ipv6",
                "net/ipv6/conf/default/disable_ipv6",
                "net/ipv6/conf/lo/disable_ipv6",
            ]
        );
        // The same as a guest's, but no longer when all have been changed, or the default has.
        let eth0 = &tuned.interfaces["eth0"];
        assert_eq!(names(eth0), ["net/ipv6/conf/eth0/disable_ipv6"]);
        assert_eq!(eth0[0].value, "0");
        let default = selected(&[
            ("net/ipv4/conf/eth0/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "1"),
        ]);
        let eth0 = &default.interfaces["eth0"];
        assert_eq!(names(eth0), ["net/ipv4/conf/eth0/rp_filter"]);
    }

    #[test]
    fn interfaces_with_dots_are_told_apart() {
        assert_eq!(
            interface_of("net/ipv4/conf/eth0.1/rp_filter"),
            Some("eth0.1")
        );
        assert_eq!(
            interface_of("net/ipv4/neigh/eth0/ucast_solicit"),
            Some("eth0")
        );
        assert_eq!(interface_of("net/ipv4/tcp_fin_timeout"), None);
        assert!(ends_with("net/ipv6/conf/eth0/mtu", "mtu"));
        assert!(!ends_with("net/ipv6/route/min_pmtu", "mtu"));
    }

    #[test]
    fn the_table_of_defaults_has_each_name_once() {
        let lines: Vec<&str> = GUEST_DEFAULTS.lines().collect();
        assert!(lines.len() > 100);
        assert_eq!(
            Defaults::parse().0.len(),
            lines.len(),
            "a name twice, or no value"
        );
        assert!(lines.is_sorted());
        assert!(lines.iter().all(|line| !line.contains('\t')));
    }

    #[test]
    fn a_nodes_limits_are_read() {
        let limits = of_node();
        assert!(names(&limits).contains(&CONNTRACK_MAX), "{limits:?}");
        assert!(limits.iter().all(|limit| !limit.value.is_empty()));
    }
}
