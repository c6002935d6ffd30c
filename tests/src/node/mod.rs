//! The side of the tests that runs on the worker node: containerd through `ctr`, its events, the
//! shim's own socket, terminals, and what is left on the host afterwards.
//!
//! It trusts the node and containerd; it does not trust what a runtime says of itself where the node
//! can be asked instead.

pub mod agent;
pub mod calls;
pub mod check;
pub mod clock;
pub mod containerd;
pub mod ctr;
pub mod daemon;
pub mod events;
pub mod given;
pub mod hanging;
pub mod kvm;
pub mod leaks;
pub mod machine;
pub mod memory;
pub mod process;
pub mod scribbler;
pub mod strace;
pub mod tap;
pub mod task;
pub mod template;
pub mod terminal;
