//! The block device (virtio 1.3 §5.2) over a raw file or a block device of the host.
//!
//! No image format is ever parsed. [`request`] turns a hostile chain into an operation within the
//! disk, [`backend`] runs operations on the file, [`service`] serves the queues, [`queue_thread`] has
//! threads for those that keep each other waiting, [`device`] is what the transport sees.

mod backend;
mod device;
mod queue_thread;
mod request;
mod service;
#[cfg(test)]
mod tests;

pub use device::{Block, BlockError, MAX_QUEUES};
