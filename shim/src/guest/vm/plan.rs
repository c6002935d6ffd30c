//! What a VM is to be, and how long is waited for it.

use std::time::Duration;

use crate::asked::config::Config;
use crate::asked::pod_name::PodName;
use crate::asked::spec::Network;
use crate::node::cgroup::Cgroup;
use crate::node::pod_resources::Assigned;
use crate::node::templates::Machine;

/// Bytes of a GiB.
const GIB: u64 = 1 << 30;
/// Seconds for each GiB that is pinned. The kernel makes and zeroes every page of it and enters it into the IOMMU's tables, which
/// takes 0.2 to 0.3 s a GiB on a node with nothing else to do; this is what a node takes that has pages of 4 KiB alone, memory of
/// another socket, or other pods that pin theirs.
const PIN: u32 = 1;

/// What a VM is to be.
#[derive(Debug)]
pub struct Plan {
    /// Files, sizes and time-outs.
    pub config: Config,
    /// Guest memory in bytes.
    pub memory: u64,
    /// As much as it may become.
    pub max_memory: u64,
    /// The machine of the template that it may go on from.
    pub template: Option<Machine>,
    /// The pod, where somebody has named it.
    pub pod: Option<PodName>,
    /// What kubelet has assigned to its containers.
    pub assigned: Vec<Assigned>,
    /// The network namespace the VMM lives in.
    pub network: Network,
    /// The pod's cgroup as the spec names it.
    pub cgroup_path: Option<String>,
    /// And once it is made.
    pub cgroup: Option<Cgroup>,
    /// The VMM's OOM score adjustment.
    pub oom_score_adj: i32,
}

impl Plan {
    /// A VM of the size that is configured, which does not grow, for nobody's pod.
    #[must_use]
    pub fn of(config: Config, network: Network) -> Self {
        Self {
            memory: config.memory,
            max_memory: config.memory,
            template: None,
            pod: None,
            assigned: Vec::new(),
            network,
            cgroup_path: None,
            cgroup: None,
            oom_score_adj: 0,
            config,
        }
    }
}

/// Time-outs of one VM.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// From the start of the VMM until the agent has called.
    pub boot: Duration,
    /// One call of the agent.
    pub call: Duration,
    /// A call that makes or starts a process: longer than the agent itself gives its helpers, so that
    /// a failure here means that nothing was made.
    pub setup: Duration,
    /// An orderly power-off.
    pub stop: Duration,
    /// Between two signs of life of the agent, and from SIGKILL to the end of an init process.
    pub ping: Duration,
    /// From the end of a process to that of its output, which another one may keep open.
    pub left_behind: Duration,
    /// What containerd is kept waiting at most, where it asks one pod after another.
    pub word: Duration,
    /// For each GiB of memory that is pinned for devices of the node, beside what is waited for anyway.
    pub pin: Duration,
}

impl Timeouts {
    /// The time-outs of a configuration.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self {
            boot: config.timeout(20),
            call: config.timeout(60),
            setup: config.timeout(150),
            stop: config.timeout(10),
            ping: config.timeout(30),
            left_behind: config.timeout(2),
            word: config.timeout(1),
            pin: config.timeout(PIN),
        }
    }

    /// What pinning so many bytes of memory may take.
    #[must_use]
    pub fn pinning(&self, bytes: u64) -> Duration {
        let gib = u32::try_from(bytes.div_ceil(GIB)).unwrap_or(u32::MAX);
        self.pin.saturating_mul(gib)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn pinning_is_given_time_by_the_memory_and_by_the_machine() {
        let config = Config {
            time_scale: 3.0,
            ..Config::defaults(Path::new("/nonexistent"))
        };
        let timeouts = Timeouts::of(&config);
        let pinning = |bytes| timeouts.pinning(bytes).as_secs();
        assert_eq!((pinning(0), pinning(1), pinning(GIB)), (0, 3, 3));
        assert_eq!(pinning(2048 * GIB), 3 * 2048);
        assert!(timeouts.pinning(u64::MAX) > timeouts.pinning(2048 * GIB));
    }
}
