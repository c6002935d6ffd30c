//! Brig's VMM as a library.
//!
//! The shim uses [`control`] and [`launch`]; the `brig-vmm` binary uses the rest. The VMM faces the
//! guest and knows nothing of containers.

pub mod arch;
pub mod benchmark;
pub mod builder;
mod console;
pub mod control;
mod debugger;
mod event;
mod exits;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod jail;
mod kernel;
pub mod kvm;
pub mod launch;
pub mod log;
mod memory;
mod mount_attr;
pub mod notice;
pub mod pci;
mod reclaim;
pub mod server;
mod settle;
pub mod share;
mod sync;
pub mod template;
mod vcpu;
mod vfio;
pub mod virtio;

pub use vfio::config::wants_port;
