//! What differs between architectures: address map, firmware tables, CPU state.
//!
//! One sibling module an architecture; the rest of the VMM has no `cfg`. Trusts the host's KVM and
//! the shim's configuration; no guest-controlled byte is read here.

pub mod x86_64;
