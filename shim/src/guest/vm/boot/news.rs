//! What a boot tells the pod, while it goes on and afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use brig_agent_protocol::agent::Event;

use crate::guest::vm::Vm;
use crate::node::cgroup::Cgroup;

/// The moment from which the pod can be used.
pub const SANDBOX_STARTED: &str = "sandbox.started";
/// What a boot tells the pod.
#[derive(Debug)]
pub enum News {
    /// The pod's cgroup was made.
    Cgroup(Cgroup),
    /// The VMM's process exists.
    Launched(Arc<Vm>),
    /// A moment for the timeline.
    Mark(String, SystemTime),
    /// VM exits by reason up to now.
    Exits(BTreeMap<String, u64>),
    /// The agent reported something.
    Agent(Box<Event>),
}
