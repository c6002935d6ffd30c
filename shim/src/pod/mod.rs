//! The pod: the actor that owns its VM and routes to its containers, the containers with their processes,
//! stdio and volumes, and the timeline of its start. Trusts what containerd asked for as far as it was
//! checked, and nothing that the guest answers.

pub mod account;
pub mod actor;
pub mod container;
pub mod doomed;
pub mod events;
pub mod node_limits;
pub mod process;
pub mod size;
pub mod spans;
pub mod starts;
pub mod stdio;
pub mod timeline;
pub mod volume;
