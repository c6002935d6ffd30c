//! Brig's shim: what containerd runs as `containerd-shim-brig-v2`, and `brig`, the operator's command.
//!
//! The shim speaks for the pod. It trusts containerd and the node's operators, distrusts what the
//! guest's agent answers, and never parses what a guest device writes (DESIGN sections 1 and 6).
//!
//! Five rooms, each using only those below it; a test of the gate (`tests/tests/arrows`) keeps it so.

pub mod asked;
pub mod containerd;
pub mod guest;
pub mod node;
pub mod pod;

pub mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod log;
