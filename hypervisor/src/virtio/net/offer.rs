//! What a network device offers its driver, however its frames are moved: taps, features, configuration and queues (virtio
//! 1.3 §5.1.2 to §5.1.4).

use std::os::fd::OwnedFd;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use super::header::feature;
use super::tap::{NetError, Tap};

const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// The most queue pairs; a tap allows 256, the interrupt budget far fewer.
pub(super) const MAX_PAIRS: usize = 16;
/// The smallest maximum transmission unit, §5.1.4.1.
pub(super) const MIN_MTU: u16 = 68;

/// The taps of an interface, one for each queue pair.
///
/// # Errors
/// If there are none or too many, or one refuses to be set up.
pub(super) fn set_up(taps: Vec<OwnedFd>) -> Result<Vec<Tap>, NetError> {
    if taps.is_empty() || taps.len() > MAX_PAIRS {
        return Err(NetError::Taps(taps.len(), MAX_PAIRS));
    }
    taps.into_iter().map(Tap::new).collect()
}

/// `struct virtio_net_config` up to `mtu`, which is in bytes.
pub(super) fn configuration(mac: [u8; 6], pairs: usize, mtu: u16) -> Vec<u8> {
    let mut config = mac.to_vec();
    // `status` is not offered, so it stays zero.
    config.extend([0, 0]);
    // At most MAX_PAIRS.
    config.extend(u16::try_from(pairs).unwrap_or(1).to_le_bytes());
    config.extend(mtu.max(MIN_MTU).to_le_bytes());
    config
}

/// What an interface with a queue pair for each of these taps offers.
pub(super) fn offered<'t>(mut taps: impl ExactSizeIterator<Item = &'t Tap>) -> u64 {
    let multiple = if taps.len() > 1 {
        feature::CTRL_VQ | feature::MQ
    } else {
        0
    };
    let datagrams = if taps.all(Tap::cuts_datagrams) {
        feature::GUEST_USO4 | feature::GUEST_USO6 | feature::HOST_USO
    } else {
        0
    };
    feature::CSUM
        | feature::GUEST_CSUM
        | feature::MTU
        | feature::MAC
        | feature::GUEST_TSO4
        | feature::GUEST_TSO6
        | feature::GUEST_ECN
        | feature::HOST_TSO4
        | feature::HOST_TSO6
        | feature::HOST_ECN
        | feature::MRG_RXBUF
        | multiple
        | datagrams
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
}

/// The queues of an interface with so many pairs.
pub(super) fn queue_sizes(pairs: usize) -> Vec<u16> {
    let mut sizes = vec![QUEUE_SIZE; 2 * pairs];
    if pairs > 1 {
        sizes.push(CONTROL_SIZE);
    }
    sizes
}

/// How many of the pairs that there are a driver with these features sets up.
pub(super) fn pairs_set_up(features: u64, pairs: usize) -> usize {
    if features & feature::MQ == 0 {
        1
    } else {
        pairs
    }
}
