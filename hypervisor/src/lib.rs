//! Brig's VMM as a library.
//!
//! The shim uses [`control`] and [`launch`]; the `brig-vmm` binary uses the rest. The VMM faces the
//! guest and knows nothing of containers.

pub mod control;
pub mod virtio;
