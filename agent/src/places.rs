//! Where the agent keeps things.
use std::path::PathBuf;

/// Where the guest's share is mounted.
pub const SHARE: &str = "/run/brig/share";

/// The directories, and whose machine it is; differs between the guest and component tests.
#[derive(Clone, Debug)]
pub struct Places {
    /// The agent's own directory, invisible to containers.
    pub run: PathBuf,
    /// Where the share is, or is mounted.
    pub share: PathBuf,
    /// The cgroup v2 mount.
    pub cgroup_root: PathBuf,
    /// The parent of container cgroups, below it.
    pub cgroup_base: PathBuf,
    /// In a guest: mounts, clock, and power belong to the agent.
    pub owns_machine: bool,
}
