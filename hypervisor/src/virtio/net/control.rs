//! The control queue of a network device, by which its driver says how many queue pairs it uses (virtio 1.3 §5.1.6.5.5).
//!
//! Hostile: the commands.

use vm_memory::GuestMemoryMmap;

use super::header::feature;
use crate::virtio::chain::Chain;
use crate::virtio::ring::{Ring, take_queue};
use crate::virtio::{ActiveQueue, DeviceError, Interrupt, Sources};

/// Control commands per event.
const CONTROL_BUDGET: usize = 16;

/// `VIRTIO_NET_CTRL_MQ`, `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET` (§5.1.6.5.5).
const SET_PAIRS: [u8; 2] = [4, 0];
const ACK: u8 = 0;
const REFUSED: u8 = 1;

/// The control queue, which comes after those of so many pairs, if the driver knows of it.
///
/// # Errors
/// If it has not enabled it, or its kicks cannot be waited for.
pub(super) fn open_control(
    device: &'static str,
    queues: &mut Vec<ActiveQueue>,
    pairs: usize,
    features: u64,
    token: u32,
    sources: &mut Sources<'_>,
) -> Result<Option<Ring>, DeviceError> {
    if features & feature::CTRL_VQ == 0 {
        return Ok(None);
    }
    let index = u16::try_from(2 * pairs).unwrap_or(u16::MAX);
    let queue = take_queue(queues, device, index)?;
    Ring::new(queue, device, features, token, sources).map(Some)
}

/// Serves the control queue, with so many pairs to be had; what the driver has asked for last, if anything, and whether
/// nothing is left in the queue.
pub(super) fn serve_control(
    ring: &mut Ring,
    memory: &GuestMemoryMmap,
    interrupt: &dyn Interrupt,
    pairs: usize,
) -> Result<(Option<usize>, bool), DeviceError> {
    let mut asked = None;
    let done = ring.drain(memory, interrupt, CONTROL_BUDGET, |mut chain| {
        let answer = match asked_pairs(&mut chain) {
            Some(count) if (1..=pairs).contains(&count) => {
                asked = Some(count);
                ACK
            }
            _ => REFUSED,
        };
        let written = chain.writable.copy_from(&[answer]);
        Ok((chain.head, u32::from(written > 0)))
    })?;
    Ok((asked, done))
}

/// The number of pairs a control command asks for, if that is what it asks.
fn asked_pairs(chain: &mut Chain<'_>) -> Option<usize> {
    if chain.readable.copy_array::<2>()? != SET_PAIRS {
        return None;
    }
    let count = chain.readable.copy_array::<2>()?;
    Some(usize::from(u16::from_le_bytes(count)))
}
