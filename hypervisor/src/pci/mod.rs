//! PCI: one segment, one bus and those behind root ports, functions with type-0 headers, MSI-X and nothing else.
//!
//! Configuration space is reached through ECAM alone: `0xCF8`/`0xCFC` is not implemented, so that
//! each access is one exit and there is less to attack. Everything written here comes from the
//! guest and is hostile.

mod bar;
pub mod bus;
pub mod config;
mod function;
pub mod host_bridge;
pub mod mirror;
pub mod msix;
pub mod root_port;
pub mod window;

pub use bar::BarRange;
pub use function::Function;
