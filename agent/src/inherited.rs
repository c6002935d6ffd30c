//! Kernel parameters that the guest takes over from the node, because containers would see the node's there.
//!
//! Each is set as far as this kernel has it and takes it; what a pod must have is `sysctls` of its request.
use std::{fs, path::Path};

use brig_agent_protocol::agent::Sysctl;

use crate::error::{Error, Result};

/// Of which parts of `/proc/sys` they may be.
const PARTS: [&str; 5] = ["fs", "kernel", "net", "user", "vm"];
/// One bucket takes eight bytes, and the table of connections at most this part of the memory.
const BUCKET: u64 = 8;
const TABLE_SHARE: u64 = 256;
const CONNTRACK_MAX: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
const CONNTRACK_BUCKETS: &str = "/proc/sys/net/netfilter/nf_conntrack_buckets";

/// Sets them in their order.
///
/// # Errors
/// `InvalidArgument` for what is no parameter's name.
pub fn apply(sysctls: &[Sysctl], logger: &slog::Logger) -> Result<()> {
    for sysctl in sysctls {
        check(&sysctl.name)?;
    }
    let refused = |sysctl: &&Sysctl| {
        let path = Path::new("/proc/sys").join(&sysctl.name);
        fs::write(path, &sysctl.value).is_err()
    };
    let left: Vec<&Sysctl> = sysctls.iter().filter(refused).collect();
    // Some can only be set when another one is.
    for sysctl in left.into_iter().filter(refused) {
        slog::debug!(logger, "this kernel does not take a parameter of the node's"; "name" => &sysctl.name);
    }
    Ok(())
}

fn check(name: &str) -> Result<()> {
    let mut parts = name.split('/');
    let known = parts.next().is_some_and(|part| PARTS.contains(&part));
    if known && parts.all(|part| !matches!(part, "" | "." | "..")) {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!(
            "sysctl {name:?} is not a name"
        )))
    }
}

/// Makes the table of tracked connections as large as their number may become, as a node's is. A kernel makes it by
/// its memory, and drops connections when its chains are long. Called when there are rules that may track, or
/// somebody who may make some: nobody else pays for it.
pub fn grow_connection_table(logger: &slog::Logger) {
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let (Some(most), Some(now)) = (number(CONNTRACK_MAX), number(CONNTRACK_BUCKETS)) else {
        return;
    };
    let memory = nix::sys::sysinfo::sysinfo().map_or(0, |info| info.ram_total());
    let buckets = buckets(most, memory);
    if buckets > now
        && let Err(error) = fs::write(CONNTRACK_BUCKETS, buckets.to_string())
    {
        slog::warn!(logger, "the table of tracked connections stays small"; "buckets" => now, "error" => %error);
    }
}

fn buckets(most: u64, memory: u64) -> u64 {
    most.min(memory / TABLE_SHARE / BUCKET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_parameters_pass() {
        assert!(check("net/ipv4/conf/eth0.1/rp_filter").is_ok());
        assert!(check("user/max_user_namespaces").is_ok());
        for bad in [
            "",
            "debug/x",
            "net/../kernel/core_pattern",
            "net//x",
            "/proc/sys/net/x",
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_table_is_a_nodes_or_a_small_part_of_the_memory() {
        let mib = 1 << 20;
        assert_eq!(buckets(262_144, 512 * mib), 262_144);
        assert_eq!(buckets(262_144, 256 * mib), 131_072);
        assert_eq!(buckets(65_536, 4096 * mib), 65_536);
    }
}
