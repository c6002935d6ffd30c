//! The guest as the shim holds it: its VM, from launch to death, and the way to ports inside. What the
//! agent answers and the VMM says is distrusted here.

#[cfg(test)]
pub(crate) mod fakes;
pub mod forward;
pub mod vm;
