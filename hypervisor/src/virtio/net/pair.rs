//! One receive and one transmit queue (virtio 1.3 §5.1.6): frames between a tap and the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use vm_memory::GuestMemoryMmap;

use super::header::{HEADER, NUM_BUFFERS, acceptable, feature};
use super::tap::Tap;
use crate::virtio::chain::{Buffers, Chain, MAX_SEGMENTS, Vectors};
use crate::virtio::ring::Ring;
use crate::virtio::{DeviceError, Interrupt};

/// Frames of one direction per event.
const BUDGET: usize = 256;
/// The largest frame with segmentation offload, header included.
const MAX_LARGE: usize = 65_562;
/// Ethernet header and one VLAN tag.
const ETHERNET: usize = 18;

/// The two queues of a pair.
pub struct Pair {
    /// Tap to guest.
    pub receive: Ring,
    /// Guest to tap.
    pub transmit: Ring,
}

/// What the driver negotiated that frames depend on.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    features: u64,
    /// Bytes the largest frame may have, header included.
    largest: usize,
}

impl Rules {
    /// Rules under `features`, for frames of `mtu` bytes without offload.
    pub fn new(features: u64, mtu: u16) -> Self {
        let large = features
            & (feature::GUEST_TSO4
                | feature::GUEST_TSO6
                | feature::GUEST_USO4
                | feature::GUEST_USO6)
            != 0;
        let largest = if large {
            MAX_LARGE
        } else {
            HEADER + ETHERNET + usize::from(mtu)
        };
        Self { features, largest }
    }

    fn mergeable(self) -> bool {
        self.features & feature::MRG_RXBUF != 0
    }
}

/// Why a direction stopped.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop {
    /// The tap has no frame, or takes none; an event will tell.
    Tap,
    /// The driver has offered no (more) buffers; a kick will tell.
    Queue,
    /// The bound of work was met.
    Budget,
}

impl Pair {
    /// Moves frames from the tap to the guest.
    ///
    /// Buffers are taken ahead of a frame, since its size is known only when it has been read;
    /// what a frame leaves is used for the next one, and goes back in the end.
    pub fn receive(
        &mut self,
        tap: &Tap,
        rules: Rules,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> Result<Stop, DeviceError> {
        let mut pool = Pool::default();
        let mut frames = 0;
        let stop = loop {
            if frames == BUDGET {
                break Ok(Stop::Budget);
            }
            match pool.fill(&mut self.receive, rules, memory) {
                Ok(true) => {}
                Ok(false) => break Ok(Stop::Queue),
                Err(error) => break Err(error),
            }
            frames += 1;
            match pool.read_frame(tap, rules) {
                Ok(Some(used)) => {
                    for (head, length) in used {
                        self.receive.push(memory, head, length)?;
                    }
                }
                // A frame that cannot be delivered was dropped.
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(Stop::Tap),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The tap is down or gone (the pod's network namespace is being removed): no
                // frames until an event says otherwise.
                Err(_) => break Ok(Stop::Tap),
            }
        };
        for _ in &pool.chains {
            self.receive.undo_pop();
        }
        self.receive.notify(memory, interrupt)?;
        stop
    }

    /// Moves frames from the guest to the tap.
    pub fn transmit(
        &mut self,
        tap: &Tap,
        rules: Rules,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> Result<Stop, DeviceError> {
        let ring = &mut self.transmit;
        ring.disable_kick(memory)?;
        let mut stop = Stop::Budget;
        for _ in 0..BUDGET {
            match ring.pop(memory)? {
                Some(chain) => {
                    if send_frame(chain.readable, tap, rules) == Sent::Blocked {
                        ring.undo_pop();
                        stop = Stop::Tap;
                        break;
                    }
                    ring.push(memory, chain.head, 0)?;
                }
                None if ring.enable_kick(memory)? => {}
                None => {
                    stop = Stop::Queue;
                    break;
                }
            }
        }
        ring.notify(memory, interrupt)?;
        Ok(stop)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Sent {
    /// Sent, or dropped as a wire would.
    Done,
    Blocked,
}

fn send_frame(mut frame: Buffers<'_>, tap: &Tap, rules: Rules) -> Sent {
    // The header is checked and sent from our copy, which the guest cannot change in between.
    let Some(header) = frame.copy_array::<HEADER>() else {
        return Sent::Done;
    };
    let fits = HEADER + frame.len() <= MAX_LARGE && frame.slices().count() < MAX_SEGMENTS;
    if frame.is_empty() || !fits || !acceptable(&header, frame.len(), rules.features) {
        return Sent::Done;
    }
    loop {
        match frame.write_behind(&header, tap.as_fd()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::Blocked,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The tap refuses the frame, or is down: it is lost, as on a wire.
            Ok(_) | Err(_) => return Sent::Done,
        }
    }
}

/// Receive buffers taken from the ring, in order, and their vector.
#[derive(Default)]
struct Pool<'m> {
    chains: VecDeque<Chain<'m>>,
    vectors: Vectors<'m>,
}

impl<'m> Pool<'m> {
    /// Takes buffers until the largest frame fits. False: the driver has not offered enough.
    fn fill(
        &mut self,
        ring: &mut Ring,
        rules: Rules,
        memory: &'m GuestMemoryMmap,
    ) -> Result<bool, DeviceError> {
        // A driver that flips its index is not waited for.
        let mut promised = false;
        while !self.enough(rules) {
            match ring.pop(memory)? {
                Some(chain) => {
                    promised = false;
                    if chain.writable.len() < HEADER {
                        return Err(ring.guest("a receive buffer is shorter than its header"));
                    }
                    self.vectors.push(&chain.writable);
                    self.chains.push_back(chain);
                }
                // All that the queue can hold is all that will ever come.
                None if self.chains.len() >= usize::from(ring.size()) => return Ok(true),
                None if promised || !ring.enable_kick(memory)? => return Ok(false),
                None => promised = true,
            }
        }
        Ok(true)
    }

    fn enough(&self, rules: Rules) -> bool {
        if rules.mergeable() {
            self.vectors.len() >= rules.largest || self.vectors.slices() >= MAX_SEGMENTS / 2
        } else {
            !self.chains.is_empty()
        }
    }

    /// Reads one frame; the chains it took and the bytes in each. `None`: it did not fit.
    fn read_frame(&mut self, tap: &Tap, rules: Rules) -> io::Result<Option<Vec<(u16, u32)>>> {
        let segments = if rules.mergeable() {
            self.vectors.slices()
        } else {
            let first = self.chains.front();
            first.map_or(0, |chain| chain.writable.slices().count())
        };
        let (room, count) = self.vectors.read(tap.as_fd(), segments)?;
        // A tap cuts a frame that is too long for the vector without a word; only the largest
        // frame of all fills it by right.
        if count < HEADER || (count == room && room != rules.largest) {
            return Ok(None);
        }
        // The first buffer holds the header (`fill`).
        let mut count_field = Buffers::default();
        if let Some(chain) = self.chains.front() {
            chain
                .writable
                .slices()
                .for_each(|slice| count_field.push(*slice));
        }
        count_field.skip(NUM_BUFFERS);
        let mut left = count;
        let mut used = Vec::new();
        while left > 0 {
            let Some(chain) = self.chains.pop_front() else {
                break;
            };
            let length = chain.writable.len();
            self.vectors.skip(chain.writable.slices().count());
            let taken = length.min(left);
            left -= taken;
            // A frame is shorter than 2^32.
            used.push((chain.head, u32::try_from(taken).unwrap_or(0)));
        }
        let buffers = u16::try_from(used.len()).unwrap_or(u16::MAX);
        count_field.copy_from(&buffers.to_le_bytes());
        Ok(Some(used))
    }
}
