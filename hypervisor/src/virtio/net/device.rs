//! The network device's queues and configuration (virtio 1.3 §5.1.2, §5.1.4, §5.1.6.5).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::header::feature;
use super::pair::{Pair, Rules, Stop};
use super::tap::{NetError, Tap};
use crate::virtio::chain::Chain;
use crate::virtio::ring::{Ring, take_queue};
use crate::virtio::{
    Activation, ActiveQueue, ConfigSpace, DeviceError, GuestMemory, Interrupt, Sources,
    VirtioDevice,
};

const NAME: &str = "net";
/// Device id (§5.1.1).
const DEVICE_TYPE: u16 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// The most queue pairs; a tap allows 256, the interrupt budget far fewer.
pub const MAX_PAIRS: usize = 16;
/// The smallest maximum transmission unit, §5.1.4.1.
const MIN_MTU: u16 = 68;

const CONTROL: u32 = 0x100;
const TAP: u32 = 0x200;
/// Control commands per event.
const CONTROL_BUDGET: usize = 16;

/// `VIRTIO_NET_CTRL_MQ`, `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET` (§5.1.6.5.5).
const SET_PAIRS: [u8; 2] = [4, 0];
const ACK: u8 = 0;
const REFUSED: u8 = 1;

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    rules: Rules,
    pairs: Vec<Pair>,
    control: Option<Ring>,
    /// Pairs that the driver uses; the host's frames go to these.
    in_use: usize,
}

/// A tap and whether it is known to have nothing to read, or to take nothing.
struct Lane {
    tap: Tap,
    readable: bool,
}

/// A network interface on a tap.
pub struct Net {
    lanes: Vec<Lane>,
    mtu: u16,
    config: Arc<Vec<u8>>,
    active: Option<Active>,
}

impl Net {
    /// An interface with one queue pair for each descriptor of a tap that was opened with
    /// `IFF_VNET_HDR | IFF_NO_PI`. `mtu` is in bytes.
    ///
    /// # Errors
    /// If there are no or too many taps, or one refuses to be set up.
    pub fn new(taps: Vec<OwnedFd>, mac: [u8; 6], mtu: u16) -> Result<Self, NetError> {
        Ok(Self::with_taps(set_up(taps)?, mac, mtu))
    }

    /// As [`Self::new`], with taps that are set up.
    pub(super) fn with_taps(taps: Vec<Tap>, mac: [u8; 6], mtu: u16) -> Self {
        let mtu = mtu.max(MIN_MTU);
        let config = configuration(mac, taps.len(), mtu);
        let lanes = taps
            .into_iter()
            .map(|tap| Lane {
                tap,
                readable: false,
            })
            .collect();
        Self {
            lanes,
            mtu,
            config: Arc::new(config),
            active: None,
        }
    }

    /// An interface on a datagram socket instead of a tap.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn on_stand_in(fd: OwnedFd, mac: [u8; 6], mtu: u16) -> Self {
        Self::with_taps(vec![Tap::fake(fd)], mac, mtu)
    }

    /// Host to guest, from one tap. With fewer pairs in use than taps, several taps share a pair.
    fn receive(&mut self, lane: usize) -> Result<(), DeviceError> {
        let (Some(active), Some(lane_state)) = (self.active.as_mut(), self.lanes.get_mut(lane))
        else {
            return Ok(());
        };
        if !lane_state.readable {
            return Ok(());
        }
        let memory = active.memory.memory();
        let Some(pair) = active.pairs.get_mut(lane % active.in_use) else {
            return Ok(());
        };
        match pair.receive(&lane_state.tap, active.rules, &memory, &*active.interrupt)? {
            Stop::Tap => lane_state.readable = false,
            Stop::Queue => {}
            Stop::Budget => pair.receive.call_again()?,
        }
        Ok(())
    }

    /// Guest to host, from one pair.
    fn transmit(&mut self, index: usize) -> Result<(), DeviceError> {
        let (Some(active), Some(lane)) = (self.active.as_mut(), self.lanes.get(index)) else {
            return Ok(());
        };
        let Some(pair) = active.pairs.get_mut(index) else {
            return Ok(());
        };
        let memory = active.memory.memory();
        match pair.transmit(&lane.tap, active.rules, &memory, &*active.interrupt)? {
            // The tap's event, or the driver's kick, brings us back.
            Stop::Tap | Stop::Queue => Ok(()),
            Stop::Budget => pair.transmit.call_again(),
        }
    }

    /// Receives from every tap that delivers to this pair.
    fn receive_into(&mut self, pair: usize) -> Result<(), DeviceError> {
        let Some(in_use) = self.active.as_ref().map(|active| active.in_use) else {
            return Ok(());
        };
        for lane in (pair..self.lanes.len()).step_by(in_use) {
            if pair < in_use {
                self.receive(lane)?;
            }
        }
        Ok(())
    }

    fn control(&mut self) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut() else {
            return Ok(());
        };
        let Some(ring) = active.control.as_mut() else {
            return Ok(());
        };
        let memory = active.memory.memory();
        let pairs = active.pairs.len();
        let (asked, done) = serve_control(ring, &memory, &*active.interrupt, pairs)?;
        active.in_use = asked.unwrap_or(active.in_use);
        if done {
            // Frames may be waiting for a pair that is now in use.
            for pair in 0..self.lanes.len() {
                self.receive_into(pair)?;
            }
        }
        Ok(())
    }
}

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

/// Where a queue pair's kick arrives: 2n for receive, 2n + 1 for transmit, like the queue's index.
fn queue_token(index: usize) -> u32 {
    // At most 2 * MAX_PAIRS.
    u32::try_from(index).unwrap_or(CONTROL - 1)
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        offered(self.lanes.iter().map(|lane| &lane.tap))
    }

    fn queue_sizes(&self) -> Vec<u16> {
        queue_sizes(self.lanes.len())
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        self.config.clone()
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let Activation {
            memory,
            features,
            mut queues,
            interrupt,
        } = activation;
        // Left for `deactivate` to take apart if anything fails.
        let active = self.active.insert(Active {
            memory,
            interrupt,
            rules: Rules::new(features, self.mtu),
            pairs: Vec::new(),
            control: None,
            in_use: 1,
        });
        let mut result = Ok(());
        let pairs = pairs_set_up(features, self.lanes.len());
        for pair in 0..pairs {
            result = result.and_then(|()| {
                active
                    .pairs
                    .push(open_pair(pair, &mut queues, features, sources)?);
                Ok(())
            });
        }
        result = result.and_then(|()| {
            active.control = open_control(NAME, &mut queues, pairs, features, CONTROL, sources)?;
            Ok(())
        });
        for (token, lane) in (TAP..).zip(&mut self.lanes) {
            result = result.and_then(|()| {
                lane.readable = true;
                lane.tap
                    .set_offloads(features)
                    .map_err(|error| DeviceError::Host {
                        device: NAME,
                        source: std::io::Error::other(error),
                    })?;
                sources
                    .add(
                        lane.tap.as_fd(),
                        token,
                        EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED,
                    )
                    .map_err(|source| DeviceError::Host {
                        device: NAME,
                        source,
                    })
            });
        }
        if result.is_err() {
            self.deactivate(sources);
        }
        result
    }

    fn process(
        &mut self,
        token: u32,
        events: EventSet,
        _sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        if token == CONTROL {
            return self.control();
        }
        if token >= TAP {
            let lane = (token - TAP) as usize;
            if events.contains(EventSet::IN)
                && let Some(lane) = self.lanes.get_mut(lane)
            {
                lane.readable = true;
            }
            self.receive(lane)?;
            return self.transmit(lane);
        }
        let pair = (token / 2) as usize;
        let Some(queues) = self.active.as_ref().and_then(|a| a.pairs.get(pair)) else {
            return Ok(());
        };
        if token.is_multiple_of(2) {
            queues.receive.acknowledge();
            self.receive_into(pair)
        } else {
            queues.transmit.acknowledge();
            self.transmit(pair)
        }
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        let Some(active) = self.active.take() else {
            return;
        };
        for pair in active.pairs {
            pair.receive.release(sources);
            pair.transmit.release(sources);
        }
        if let Some(control) = active.control {
            control.release(sources);
        }
        for lane in &self.lanes {
            // It was not added if activation failed before.
            let _ = sources.remove(lane.tap.as_fd());
        }
    }
}

fn open_pair(
    pair: usize,
    queues: &mut Vec<ActiveQueue>,
    features: u64,
    sources: &mut Sources<'_>,
) -> Result<Pair, DeviceError> {
    let index = u16::try_from(2 * pair).unwrap_or(u16::MAX - 1);
    let receive = take_queue(queues, NAME, index)?;
    let transmit = take_queue(queues, NAME, index + 1)?;
    let receive = Ring::new(receive, NAME, features, queue_token(2 * pair), sources)?;
    match Ring::new(transmit, NAME, features, queue_token(2 * pair + 1), sources) {
        Ok(transmit) => Ok(Pair { receive, transmit }),
        Err(error) => {
            receive.release(sources);
            Err(error)
        }
    }
}
