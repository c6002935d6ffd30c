//! A root file system on disks, in the agent's words.

use brig_agent_protocol::agent::{RootDisk, RootMount};

/// What the agent is told of a root file system.
#[derive(Debug, Default)]
pub struct RootGiven {
    /// Its mounts in order.
    pub mounts: Vec<RootMount>,
    /// What they are on.
    pub disks: Vec<RootDisk>,
}
