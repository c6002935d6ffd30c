//! What Brig's tests share: the drivers that run on the node, and the few things that the programs
//! in the guest must agree on with them.
//!
//! Guest programs build this with no features, statically; everything that drives containerd or the
//! VMM is behind `node`.

pub mod cpio;
pub mod pattern;
pub mod sequence;

#[cfg(feature = "node")]
pub mod node;
