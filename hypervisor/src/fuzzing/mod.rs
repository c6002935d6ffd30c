//! Fuzz targets: what a guest or the shim's peer can say to this crate, as functions of bytes.
//!
//! `fuzz/` runs them under coverage guidance; the inputs that it kept (`fuzz/corpus`) are replayed by
//! the tests of this crate. A target does more than survive: it compares with a model, or shows
//! afterwards that the device still works. Each panics where that fails.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a broken assumption is a finding, and a target says by its name what it feeds"
)]

mod chains;
mod common_config;
mod input;
mod messages;
mod msix;
mod packets;
mod pci;
mod queues;
mod session;

pub use chains::descriptor_chain;
pub use common_config::virtio_common_config;
pub use messages::{control_message, share_path};
pub use msix::msix_table;
pub use packets::vsock_packets;
pub use pci::pci_config;
pub use queues::{
    balloon_queue, block_queue, fs_queue, mem_queue, net_queue, pmem_queue, rng_queue, vsock_queue,
};
pub use session::fuse_session;

/// A target by the name of its corpus.
pub type Target = (&'static str, fn(&[u8]));

/// All of this crate.
pub const TARGETS: &[Target] = &[
    ("descriptor_chain", descriptor_chain),
    ("rng_queue", rng_queue),
    ("pmem_queue", pmem_queue),
    ("balloon_queue", balloon_queue),
    ("mem_queue", mem_queue),
    ("block_queue", block_queue),
    ("net_queue", net_queue),
    ("vsock_queue", vsock_queue),
    ("fs_queue", fs_queue),
    ("vsock_packets", vsock_packets),
    ("fuse_session", fuse_session),
    ("pci_config", pci_config),
    ("msix_table", msix_table),
    ("virtio_common_config", virtio_common_config),
    ("control_message", control_message),
    ("share_path", share_path),
];

/// Calls `each` with every sequence of `depth` elements of `alphabet`; returns their number.
#[cfg(test)]
pub(crate) fn sequences<T: Copy>(alphabet: &[T], depth: u32, mut each: impl FnMut(&[T])) -> usize {
    let total = alphabet.len().pow(depth);
    let mut steps = Vec::new();
    for number in 0..total {
        let mut rest = number;
        steps.clear();
        for _ in 0..depth {
            steps.push(alphabet[rest % alphabet.len()]);
            rest /= alphabet.len();
        }
        each(&steps);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_that_a_fuzzer_kept_is_survived() {
        brig_fixtures::corpus::replay(TARGETS).unwrap();
    }
}
