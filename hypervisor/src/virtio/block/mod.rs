//! The block device (virtio 1.3 §5.2) over a raw file or a block device of the host.
//!
//! No image format is ever parsed. [`request`] turns a hostile chain into an operation within the
//! disk, [`backend`] runs operations on the file, [`service`] has the queue and the threads that serve it, [`device`]
//! is what the transport sees.

mod backend;
mod device;
mod request;
mod service;
#[cfg(test)]
mod tests;

pub use device::{Block, BlockError};
