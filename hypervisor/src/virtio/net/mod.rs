//! The network device (virtio 1.3 §5.1) on taps: one tap descriptor and one queue pair for each
//! lane, frames moved between tap and guest memory without a copy of ours.
//!
//! The tap checks what is in a frame, as it does for any program; we check the virtio header, so
//! that the host's segmentation code sees only what was negotiated. CNI's rules apply to the tap. [`VhostNet`] leaves the
//! frames to the node's kernel, where the operator allows that.

mod control;
mod device;
mod header;
mod offer;
mod pair;
mod pair_thread;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;
mod vhost_device;

pub use device::Net;
pub use tap::NetError;
pub use vhost::{FEATURES as VHOST_FEATURES, MAX_REGIONS as MAX_VHOST_REGIONS};
pub use vhost_device::VhostNet;
