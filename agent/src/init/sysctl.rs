//! `linux.sysctl`: those that belong to a namespace of the sandbox or the container.
use std::collections::BTreeMap;

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat2},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

use super::{Context as _, Result};

const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Refuses what would change the guest for every container.
///
/// # Errors
/// A sentence naming the key.
pub fn check(sysctls: &BTreeMap<String, String>) -> std::result::Result<(), String> {
    for key in sysctls.keys() {
        let key = key.replace('/', ".");
        let namespaced =
            key.starts_with("net.") || key.starts_with("fs.mqueue.") || IPC.contains(&key.as_str());
        if !namespaced || key.split('.').any(str::is_empty) {
            return Err(format!(
                "linux.sysctl {key} is not in a namespace of the container; set it for the sandbox instead"
            ));
        }
    }
    Ok(())
}

/// Writes them through a private, detached /proc: nothing that the image mounted is in the way
/// (CVE-2025-52881).
pub fn apply(sysctls: &BTreeMap<String, String>) -> Result<()> {
    if sysctls.is_empty() {
        return Ok(());
    }
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC).during("proc for sysctl")?;
    fsconfig_create(&context).during("proc for sysctl")?;
    let proc = fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .during("proc for sysctl")?;
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
        rustix::io::write(&file, value.as_bytes()).during(&what)?;
    }
    Ok(())
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
        check(&BTreeMap::from([(key.to_owned(), "1".to_owned())])).is_ok()
    }

    #[test]
    fn only_namespaced_keys_pass() {
        assert!(checked("net.ipv4.ip_unprivileged_port_start"));
        assert!(checked("kernel.shmmax"));
        assert!(checked("net/ipv4/conf/eth0.1/forwarding"));
        assert!(!checked("kernel.core_pattern"));
        assert!(!checked("vm.overcommit_memory"));
        assert!(!checked("net..x"));
        assert!(!checked("net/../kernel/core_pattern"));
    }
}
