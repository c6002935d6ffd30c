//! Everything that is done to the node for a pod: its cgroup, network namespace, hooks and files, and the
//! journal of what must be undone. Knows what was asked for, and neither the guest nor containerd.

pub mod cdi;
pub mod cgroup;
pub mod collector;
pub mod daemon;
pub mod direct_volumes;
pub mod disk;
pub mod grpc;
pub mod heap;
pub mod hooks;
pub mod identity;
pub mod image;
pub mod journal;
pub mod limits;
pub mod network;
pub mod pod_resources;
pub mod release;
pub mod remains;
pub mod sandbox_files;
pub mod stand_in;
pub mod templates;
pub mod verity;
pub mod vfio;
pub(crate) mod watched;
