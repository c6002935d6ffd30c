//! The block device (virtio 1.3 §5.2) over a raw file or a block device of the host.
//!
//! No image format is ever parsed. [`request`] turns a hostile chain into an operation within the
//! disk, [`backend`] runs operations on the file, [`device`] owns the queue. Operations run on the
//! device's worker; a thread pool or io_uring would take the place of `backend` alone.

mod backend;
mod device;
mod request;
#[cfg(test)]
mod tests;

pub use device::{Block, BlockError};
