//! The socket device (virtio 1.3 §5.10): the only channel between host and guest.
//!
//! The host end of each stream is a descriptor that the shim handed over; there is no socket file
//! and no listener. The guest may open exactly one stream, the agent's; every other is opened by
//! the host. Everything in a packet is hostile: addresses, lengths, credit, order. What the device
//! holds for a stream is bounded by [`credit::BUFFER`] bytes, for all of them together by a [`credit::Pool`].

mod connection;
mod credit;
mod device;
mod endpoint;
mod handle;
mod mux;
pub(crate) mod packet;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use device::Vsock;
pub use handle::{MAX_STREAMS, StreamParams, VsockError, VsockEvent, VsockHandle};
