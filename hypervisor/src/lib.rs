//! Brig's VMM as a library.
//!
//! The shim uses [`control`] and [`launch`]; the `brig-vmm` binary uses the rest. The VMM faces the
//! guest and knows nothing of containers.

pub mod arch;
pub mod benchmark;
pub mod builder;
pub mod console;
pub mod control;
pub mod debugger;
mod event;
pub mod exits;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod jail;
pub mod kernel;
pub mod kvm;
pub mod launch;
pub mod log;
pub mod memory;
mod mount_attr;
pub mod notice;
pub mod pci;
pub mod reclaim;
pub mod server;
mod settle;
pub mod share;
mod sync;
pub mod template;
pub mod vcpu;
pub mod vfio;
pub mod virtio;
