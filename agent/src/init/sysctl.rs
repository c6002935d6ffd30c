//! `linux.sysctl`: those that belong to a namespace of the sandbox or the container.
use std::collections::BTreeMap;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::{
    failure::{Context as _, Result},
    idmap::Ids,
};
use crate::detached;

/// Of the ipc namespace, and the one of the uts namespace (the host name has a field of its own).
const NAMESPACED: [&str; 9] = [
    "kernel.domainname",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Refuses what is no namespace's own, as other runtimes do: what a pod may ask for does not depend on
/// its runtime.
///
/// # Errors
/// A sentence naming the key.
pub fn check<'a>(keys: impl IntoIterator<Item = &'a String>) -> std::result::Result<(), String> {
    for key in keys {
        let key = key.replace('/', ".");
        let namespaced = key.starts_with("net.")
            || key.starts_with("fs.mqueue.")
            || NAMESPACED.contains(&key.as_str());
        if !namespaced || key.split('.').any(str::is_empty) {
            return Err(format!(
                "sysctl {key} is not in a separate kernel namespace: only net.*, fs.mqueue.* and those of \
                 System V IPC can be set for a pod"
            ));
        }
    }
    Ok(())
}

/// Writes them through a private, detached /proc: nothing that the image mounted is in the way
/// (CVE-2025-52881).
pub fn apply(sysctls: &BTreeMap<String, String>, ids: &Ids) -> Result<()> {
    if sysctls.is_empty() {
        return Ok(());
    }
    let proc = detached::procfs().during("proc for sysctl")?;
    for (key, value) in sysctls {
        let what = format_args!("linux.sysctl {key}").to_string();
        let path = format!("sys/{}", path_of(key));
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let file = openat2(
            &proc,
            path,
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )
        .during(&what)?;
        let value = outside(&path_of(key), value, ids)?;
        rustix::io::write(&file, value.as_bytes()).during(&what)?;
    }
    Ok(())
}

/// The one that names ids: the container's, and it is the guest's root that writes it.
const PING_GROUPS: &str = "net/ipv4/ping_group_range";

/// What the guest's root is to write for a value of the container's.
fn outside(path: &str, value: &str, ids: &Ids) -> Result<String> {
    let groups: Vec<_> = value.split_ascii_whitespace().map(str::parse).collect();
    match groups.as_slice() {
        &[Ok(first), Ok(last)] if path == PING_GROUPS && first <= last => {
            Ok(format!("{} {}", ids.gid(first)?, ids.gid(last)?))
        }
        _ => Ok(value.to_owned()),
    }
}

/// `net.ipv4.ip_forward` is `net/ipv4/ip_forward`; a key written with slashes keeps its dots
/// (interface names have some).
pub fn path_of(key: &str) -> String {
    if key.contains('/') {
        key.to_owned()
    } else {
        key.replace('.', "/")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(key: &str) -> bool {
        check([&key.to_owned()]).is_ok()
    }

    #[test]
    fn only_namespaced_keys_pass() {
        assert!(checked("net.ipv4.ip_unprivileged_port_start"));
        assert!(checked("kernel.shmmax") && checked("kernel.domainname"));
        assert!(checked("net/ipv4/conf/eth0.1/forwarding"));
        assert!(!checked("kernel.core_pattern"));
        assert!(!checked("vm.overcommit_memory"));
        assert!(!checked("net..x"));
        assert!(!checked("net/../kernel/core_pattern"));
    }

    #[test]
    fn groups_of_a_parameter_are_those_of_the_containers_user_namespace() {
        let line = crate::spec::IdMapping {
            container_id: 0,
            host_id: 100_000,
            size: 1000,
        };
        let ids = Ids::new(&[], &[line]);
        let written = |path, value| outside(path, value, &ids);
        assert_eq!(written(PING_GROUPS, "0 999").unwrap(), "100000 100999");
        assert_eq!(written(PING_GROUPS, "1 0").unwrap(), "1 0");
        assert_eq!(
            written("net/ipv4/ip_local_port_range", "5 6").unwrap(),
            "5 6"
        );
        assert!(written(PING_GROUPS, "0 1000").is_err());
        assert_eq!(outside(PING_GROUPS, "0 7", &Ids::default()).unwrap(), "0 7");
    }
}
