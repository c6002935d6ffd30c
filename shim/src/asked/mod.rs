//! What was asked for: the OCI specification of a container, CRI's configuration of a sandbox, and Brig's own
//! configuration with its annotations. Pure parsing and checking of bytes; touches nothing of the node
//! but the files it reads. Annotations are untrusted unless the operator allows them.

pub mod config;
mod ping_groups;
pub mod pod_name;
pub mod rootfs;
pub mod sandbox_config;
pub mod spec;
pub(crate) mod wire;
