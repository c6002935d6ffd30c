//! Brig's shim: what containerd runs as `containerd-shim-brig-v2`, and `brig`, the operator's command.
//!
//! The shim speaks for the pod. It trusts containerd and the node's operators, distrusts what the
//! guest's agent answers, and never parses what a guest device writes (DESIGN sections 1 and 6).

pub mod bootstrap;
pub mod cgroup;
pub mod check;
pub mod config;
pub mod container;
pub mod error;
pub mod events;
#[cfg(test)]
mod fakes;
pub mod forward;
pub mod hooks;
pub mod identity;
pub mod journal;
pub mod log;
pub mod logger;
pub mod network;
pub mod pod;
pub mod pod_stats;
pub mod process;
pub mod sandbox_config;
pub mod sandbox_files;
pub mod sandbox_service;
pub mod server;
pub mod service;
pub mod spec;
pub mod stand_in;
pub mod stats;
pub mod stdio;
pub mod streaming;
pub mod timeline;
pub mod vm;
pub mod volume;
mod watched;
