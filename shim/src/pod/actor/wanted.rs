//! What a pod asks of its VM, whoever says it: the spec of its first container, or the Sandbox API.

use std::collections::BTreeMap;
use std::path::Path;

use crate::asked::config::{Config, IdleFiles, Origin};
use crate::asked::spec::{Limits, Network, Role, Spec, check_hostname};
use crate::error::Result;
use crate::guest::vm::Plan;
use crate::guest::vm::boot::Sandbox;
use crate::node::cgroup;
use crate::node::templates::Machine;
use crate::pod::size::{
    PodSize, guest_cpus, guest_memory, most_memory, node_cpus, node_memory, template_machine,
};

/// A pod's wishes.
pub(super) struct Wanted {
    /// Its host name.
    pub(super) hostname: String,
    /// Kernel parameters, by name.
    pub(super) sysctls: BTreeMap<String, String>,
    /// Its network namespace on the node.
    pub(super) network: Network,
    /// What its containers may use.
    pub(super) limits: Limits,
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
                spec.sysctls()?
            } else {
                BTreeMap::new()
            },
            network: spec.network()?,
            limits: if sandbox {
                Limits {
                    memory: spec.sandbox_memory(),
                    huge_pages: huge_pages_of_pod(spec.cgroups_path()),
                    cpu_millis: spec.sandbox_cpu_millis(),
                    ..Limits::default()
                }
            } else {
                spec.limits()
            },
            shm_size: spec.sandbox_shm().map_or(0, file_system_size),
            cgroup_path: spec.cgroups_path().map(str::to_owned),
            oom_score_adj: spec.oom_score_adj().unwrap_or(0),
            config,
        })
    }

    /// The VM of the pod `id`, what its agent is told, and what it should grow by.
    pub(super) fn plan(self, id: &str) -> (Plan, Sandbox, PodSize) {
        let mut config = self.config;
        let size = PodSize::new(
            config.memory,
            config.vcpus,
            self.limits,
            self.cgroup_path.clone(),
        );
        let memory = guest_memory(&self.limits, config.memory, node_memory());
        let vcpus = guest_cpus(&self.limits, config.vcpus, node_cpus());
        let template = template(&config, memory, vcpus);
        let more = [
            ("memory", memory > config.memory),
            ("vcpus", vcpus > config.vcpus),
        ];
        for (key, _) in more.into_iter().filter(|(_, more)| *more) {
            config.origins.insert(key.to_owned(), Origin::Limits);
        }
        config.vcpus = vcpus;
        let sandbox = Sandbox {
            id: id.to_owned(),
            hostname: own_or_nodes(self.hostname),
            sysctls: self.sysctls,
            shm_size: self.shm_size,
            return_files: config.idle_files == IdleFiles::Return,
            max_pids: pids_of_pod(self.cgroup_path.as_deref()),
            ..Sandbox::default()
        };
        let plan = Plan {
            memory,
            max_memory: most_memory(&config, memory),
            template,
            pod: None,
            assigned: Vec::new(),
            network: self.network,
            cgroup: None,
            cgroup_path: self.cgroup_path,
            oom_score_adj: self.oom_score_adj,
            config,
        };
        (plan, sandbox, size)
    }
}

/// The machine of the handler's template, if a pod of this size can go on from it: what it has beyond that comes while it runs. One that has set
/// a size for itself boots, so that pods cannot fill the node with templates.
fn template(config: &Config, memory: u64, vcpus: u8) -> Option<Machine> {
    let own = |key: &str| config.origins.get(key) == Some(&Origin::Annotation);
    let machine = template_machine(config);
    let fits = memory <= machine.max_memory && vcpus <= machine.most_cpus;
    let like_all =
        !config.debug_console && config.devices.is_empty() && !own("memory") && !own("vcpus");
    (config.template && fits && like_all).then_some(machine)
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

/// Processes that kubelet lets a pod have (`podPidsLimit`), by its cgroup as well; 0 without a limit.
fn pids_of_pod(cgroups_path: Option<&str>) -> u64 {
    cgroups_path.and_then(cgroup::pids_of_parent).unwrap_or(0)
}

/// The size of the file system here in bytes; 0 when that cannot be known.
fn file_system_size(path: &Path) -> u64 {
    let size = |fs: rustix::fs::StatVfs| fs.f_blocks.saturating_mul(fs.f_frsize);
    rustix::fs::statvfs(path).map_or(0, size)
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
}
