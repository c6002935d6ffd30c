//! What a pod asks of its VM, whoever says it: the spec of its first container, or the Sandbox API.

use std::collections::BTreeMap;
use std::path::Path;

use crate::asked::config::{Config, MAX_VCPUS, MIB};
use crate::asked::spec::{Network, Role, Spec, check_hostname};
use crate::error::Result;
use crate::guest::vm::Plan;
use crate::guest::vm::boot::Sandbox;
use crate::node::cgroup;

/// Guest memory on top of what the containers may use, for kernel and agent, in bytes (docs/overhead.md).
const GUEST_OVERHEAD: u64 = 64 * MIB;
/// What the agent keeps free of huge pages (`agent/src/huge_pages.rs`), and what the guest's kernel holds already.
const BESIDE_HUGE_PAGES: u64 = 160 * MIB;
/// The guest's kernel describes each page of 4096 bytes with 64 bytes.
const PAGE_DESCRIPTORS: u64 = 64;

/// A pod's wishes.
pub(super) struct Wanted {
    /// Its host name.
    pub(super) hostname: String,
    /// Kernel parameters, by name.
    pub(super) sysctls: BTreeMap<String, String>,
    /// Its network namespace on the node.
    pub(super) network: Network,
    /// What its containers may use of memory, in bytes.
    pub(super) memory: Option<u64>,
    /// And of huge pages beside it, in bytes.
    pub(super) huge_pages: u64,
    /// And of CPUs.
    pub(super) cpus: Option<u64>,
    /// Size of its `/dev/shm` in bytes; 0 for the usual.
    pub(super) shm_size: u64,
    /// Its cgroup.
    pub(super) cgroup_path: Option<String>,
    /// Of the VMM.
    pub(super) oom_score_adj: i32,
    /// The handler's configuration.
    pub(super) config: Config,
}

impl Wanted {
    /// What the first container of a pod says.
    ///
    /// # Errors
    /// `InvalidArgument` for the node's own network and for a host name that Linux does not take.
    pub(super) fn of(spec: &Spec, role: &Role, config: Config) -> Result<Self> {
        let sandbox = *role == Role::Sandbox;
        check_hostname(spec.hostname())?;
        Ok(Self {
            hostname: spec.hostname().to_owned(),
            sysctls: if sandbox {
                spec.sysctls()
            } else {
                BTreeMap::new()
            },
            network: spec.network()?,
            memory: if sandbox {
                spec.sandbox_memory()
            } else {
                spec.memory_limit()
            },
            huge_pages: if sandbox {
                huge_pages_of_pod(spec.cgroups_path())
            } else {
                spec.huge_pages()
            },
            cpus: spec.sandbox_cpus(),
            shm_size: spec.sandbox_shm().map_or(0, file_system_size),
            cgroup_path: spec.cgroups_path().map(str::to_owned),
            oom_score_adj: spec.oom_score_adj().unwrap_or(0),
            config,
        })
    }

    /// The VM of the pod `id`, and what its agent is told.
    pub(super) fn plan(self, id: &str) -> (Plan, Sandbox) {
        let mut config = self.config;
        let limits = (self.memory, self.huge_pages);
        let memory = guest_memory(limits, config.memory, node_memory());
        config.vcpus = guest_cpus(self.cpus, config.vcpus);
        let sandbox = Sandbox {
            id: id.to_owned(),
            hostname: own_or_nodes(self.hostname),
            sysctls: self.sysctls,
            shm_size: self.shm_size,
            ..Sandbox::default()
        };
        let plan = Plan {
            memory,
            network: self.network,
            cgroup: None,
            cgroup_path: self.cgroup_path,
            oom_score_adj: self.oom_score_adj,
            config,
        };
        (plan, sandbox)
    }
}

/// Guest memory in bytes for a pod whose containers may use `limit`, and huge pages beside it: never less
/// than the handler's, because a container without a limit is not counted in it, and never more than the
/// node's.
fn guest_memory((limit, huge_pages): (Option<u64>, u64), configured: u64, node: u64) -> u64 {
    let wanted = limit.map_or(0, |limit| described(limit).saturating_add(GUEST_OVERHEAD));
    let beside = if huge_pages == 0 {
        0
    } else {
        BESIDE_HUGE_PAGES
    };
    let beside = configured.max(wanted).max(beside);
    let wanted = beside.saturating_add(described(huge_pages));
    configured.max(wanted.min(node))
}

/// With the descriptors of its pages: of all the guest's memory they are one part in 64, so 63 remain.
fn described(memory: u64) -> u64 {
    memory.saturating_add(memory.div_ceil(PAGE_DESCRIPTORS - 1))
}

/// A pod that names no host has the node's name, as a new UTS namespace has.
fn own_or_nodes(hostname: String) -> String {
    if !hostname.is_empty() {
        return hostname;
    }
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

/// Bytes of huge pages that kubelet lets a pod have: containerd does not say it, kubelet's cgroup does.
pub(super) fn huge_pages_of_pod(cgroups_path: Option<&str>) -> u64 {
    cgroups_path
        .and_then(cgroup::huge_pages_of_parent)
        .unwrap_or(0)
}

/// Guest CPUs for a pod whose containers may use `limit`: never fewer than the handler's, never more
/// than the node has.
fn guest_cpus(limit: Option<u64>, configured: u8) -> u8 {
    let node = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let most = u8::try_from(node).unwrap_or(MAX_VCPUS).min(MAX_VCPUS);
    let wanted = limit.map_or(0, |limit| u8::try_from(limit).unwrap_or(MAX_VCPUS));
    configured.max(wanted.min(most))
}

/// The size of the file system here in bytes; 0 when that cannot be known.
fn file_system_size(path: &Path) -> u64 {
    let size = |fs: rustix::fs::StatVfs| fs.f_blocks.saturating_mul(fs.f_frsize);
    rustix::fs::statvfs(path).map_or(0, size)
}

/// The node's memory in bytes: more than it has is no use to a VM.
fn node_memory() -> u64 {
    let info = nix::sys::sysinfo::sysinfo();
    info.map_or(u64::MAX, |info| info.ram_total())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_host_name_has_the_nodes() {
        let node = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(own_or_nodes(String::new()), node.trim());
        assert_eq!(own_or_nodes("web-0".into()), "web-0");
    }

    #[test]
    fn a_pods_limits_make_its_vm_larger_but_never_smaller_than_the_handlers() {
        let (default, node) = (256 * MIB, 4096 * MIB);
        for (limit, expected) in [
            (None, 256),
            (Some(16 * MIB), 256),
            (Some(63 * MIB), 256),
            (Some(1008 * MIB), 1008 + 16 + 64),
            (Some(3024 * MIB), 3024 + 48 + 64),
            (Some(u64::MAX), 4096),
        ] {
            assert_eq!(guest_memory((limit, 0), default, node), expected * MIB);
        }
        for (limit, huge_pages, expected) in [
            (None, 126, 256 + 128),
            (Some(3024 * MIB), 126, 3024 + 48 + 64 + 128),
            (None, u64::MAX >> 20, 4096),
        ] {
            let limits = (limit, huge_pages * MIB);
            assert_eq!(guest_memory(limits, default, node), expected * MIB);
        }
        assert_eq!(
            guest_memory((None, 63 * MIB), 64 * MIB, node),
            (160 + 64) * MIB
        );
        assert_eq!(guest_cpus(None, 1), 1);
        assert_eq!(guest_cpus(Some(1), 2), 2);
        assert!(guest_cpus(Some(u64::MAX), 1) <= MAX_VCPUS);
    }
}
