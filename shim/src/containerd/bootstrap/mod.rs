//! How containerd runs the shim's binary: `start`, `delete`, `-info`, `-v`, and the server that
//! `start` leaves behind.
//!
//! The contract differs by containerd's version (research/peers.md section 4.2); what differs is in
//! [`reply`]. containerd is trusted.

pub mod args;
pub mod delete;
pub mod info;
pub mod options;
mod orderly;
pub mod reply;
pub mod root_mounts;
pub mod start;
