//! What containerd sees of a pod: the commands it executes, the services on the pod's socket, the events
//! that go to its own. containerd is trusted to mean well; the pod behind these calls lives in
//! [`crate::pod`], and nothing below this room knows containerd's services.

pub mod bootstrap;
pub mod debug_service;
pub mod events;
mod inspected;
pub mod pod_stats;
pub mod sandbox_service;
pub mod server;
pub mod stats;
pub mod task_service;
