//! A device's side of one split queue (virtio 1.3 §2.7): take chains, return them, tell the driver.
//!
//! Wraps rust-vmm's queue so that a broken ring or chain is an error of the guest
//! ([`DeviceError::Guest`]) instead of a silent end, and so that each device suppresses
//! notifications in the same way.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, ChainError};
use super::{Activation, ActiveQueue, DeviceError, GuestMemory, Interrupt, Sources};
use crate::event::borrow_event;

/// A chain that nobody has read, with the memory that it is in.
pub type Descriptors = virtio_queue::DescriptorChain<Arc<GuestMemoryMmap>>;

/// One active queue of a device.
pub struct Ring {
    active: ActiveQueue,
    device: &'static str,
    unannounced: bool,
}

impl Ring {
    /// Takes a queue over and waits for its kicks under `token`.
    ///
    /// # Errors
    /// If its event cannot be waited for.
    pub fn new(
        mut active: ActiveQueue,
        device: &'static str,
        features: u64,
        token: u32,
        sources: &mut Sources<'_>,
    ) -> Result<Self, DeviceError> {
        active
            .queue
            .set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        sources
            .add(borrow_event(&active.kick), token, EventSet::IN)
            .map_err(|source| DeviceError::Host { device, source })?;
        Ok(Self {
            active,
            device,
            unannounced: false,
        })
    }

    /// Waits for each kick by itself from now on: nobody has to [`Self::acknowledge`] it, which is a system call.
    ///
    /// # Errors
    /// If its event cannot be waited for.
    pub fn wait_for_edges(&self, token: u32, sources: &mut Sources<'_>) -> Result<(), DeviceError> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        sources
            .modify(borrow_event(&self.active.kick), token, events)
            .map_err(|source| self.host(source))
    }

    /// The event of its kicks, for a thread that is to wait for it.
    ///
    /// # Errors
    /// If there is no copy of it.
    pub fn copy_of_kick(&self) -> io::Result<EventFd> {
        self.active.kick.try_clone()
    }

    /// Leaves its kicks to whoever waits for them elsewhere.
    ///
    /// # Errors
    /// If they were not waited for here.
    pub fn leave_kicks(&self, sources: &mut Sources<'_>) -> io::Result<()> {
        sources.remove(borrow_event(&self.active.kick))
    }

    /// Waits for its kicks again, under `token`; one that has come meanwhile counts.
    ///
    /// # Errors
    /// If its event cannot be waited for.
    pub fn take_kicks_back(
        &self,
        token: u32,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        sources
            .add(borrow_event(&self.active.kick), token, EventSet::IN)
            .map_err(|source| self.host(source))
    }

    /// Stops waiting for kicks.
    pub fn release(self, sources: &mut Sources<'_>) {
        // It was added in `new`; if the epoll set is gone there is nothing to remove.
        let _ = sources.remove(borrow_event(&self.active.kick));
    }

    /// Clears the kick event; call it before looking at the queue.
    pub fn acknowledge(&self) {
        // The only error is that there was no kick.
        let _ = self.active.kick.read();
    }

    /// Kicks itself: the device has met its bound of work and wants to be called again.
    ///
    /// # Errors
    /// If the event cannot be written.
    pub fn call_again(&self) -> Result<(), DeviceError> {
        self.active
            .kick
            .write(1)
            .map_err(|source| self.host(source))
    }

    /// The next available chain.
    ///
    /// # Errors
    /// If the ring or the chain breaks the rules.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Chain<'m>>, DeviceError> {
        let next = match self.active.queue.iter(memory) {
            Ok(mut available) => available.next(),
            Err(_) => return Err(self.guest(ChainError::AvailableIndex)),
        };
        match next {
            None => Ok(None),
            Some(descriptors) => Chain::parse(descriptors, memory)
                .map(Some)
                .map_err(|error| self.guest(error)),
        }
    }

    /// The next available chain as virtio-queue has it, unchecked: for who reads it elsewhere, or more than once.
    ///
    /// # Errors
    /// If the ring breaks the rules.
    pub fn pop_descriptors(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
    ) -> Result<Option<Descriptors>, DeviceError> {
        match self.active.queue.iter(Arc::clone(memory)) {
            Ok(mut available) => Ok(available.next()),
            Err(_) => Err(self.guest(ChainError::AvailableIndex)),
        }
    }

    /// How many chains are available, as far as the ring says.
    ///
    /// # Errors
    /// If the ring is not in RAM.
    pub fn pending(&self, memory: &GuestMemoryMmap) -> Result<u16, DeviceError> {
        let queue = &self.active.queue;
        let available = queue
            .avail_idx(memory, Ordering::Acquire)
            .map_err(|error| self.guest(error))?;
        Ok(available.0.wrapping_sub(queue.next_avail()))
    }

    /// Puts the chain that was popped last back.
    pub fn undo_pop(&mut self) {
        self.active.queue.go_to_previous_position();
    }

    /// Serves a kick: chain after chain until none is left, at most `budget` of them, then interrupts
    /// the driver if it wants to know. `serve` answers the head of its chain and the bytes it wrote.
    /// True when none is left; else the device is called again.
    ///
    /// # Errors
    /// Those of `serve`; if the ring or a chain breaks the rules, or an event cannot be sent.
    pub fn drain<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        interrupt: &dyn Interrupt,
        budget: usize,
        mut serve: impl FnMut(Chain<'m>) -> Result<(u16, u32), DeviceError>,
    ) -> Result<bool, DeviceError> {
        self.acknowledge();
        for _ in 0..budget {
            match self.pop(memory)? {
                Some(chain) => {
                    let (head, written) = serve(chain)?;
                    self.push(memory, head, written)?;
                }
                None if self.enable_kick(memory)? => {}
                None => return self.notify(memory, interrupt).map(|()| true),
            }
        }
        self.call_again()?;
        self.notify(memory, interrupt).map(|()| false)
    }

    /// Returns a chain into which `written` bytes were put.
    ///
    /// # Errors
    /// If the used ring is not in RAM.
    pub fn push(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), DeviceError> {
        self.active
            .queue
            .add_used(memory, head, written)
            .map_err(|error| self.guest(error))?;
        self.unannounced = true;
        self.active.counts.chains.raise();
        Ok(())
    }

    /// Interrupts the driver if chains were returned since the last call and it wants to know.
    ///
    /// # Errors
    /// If the ring is not in RAM or the interrupt cannot be sent.
    pub fn notify(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> Result<(), DeviceError> {
        if !std::mem::take(&mut self.unannounced) {
            return Ok(());
        }
        let wanted = self
            .active
            .queue
            .needs_notification(memory)
            .map_err(|error| self.guest(error))?;
        if wanted {
            self.active.counts.interrupts.raise();
            interrupt
                .queue(self.active.index)
                .map_err(|source| self.host(source))?;
        }
        Ok(())
    }

    /// Asks the driver for a kick when it adds chains; true if some came in between.
    ///
    /// # Errors
    /// If the ring is not in RAM.
    pub fn enable_kick(&mut self, memory: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        self.active
            .queue
            .enable_notification(memory)
            .map_err(|error| self.guest(error))
    }

    /// Tells the driver that kicks are not needed for now (a hint).
    ///
    /// # Errors
    /// If the ring is not in RAM.
    pub fn disable_kick(&mut self, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
        self.active
            .queue
            .disable_notification(memory)
            .map_err(|error| self.guest(error))
    }

    /// Entries of the queue.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.active.queue.size()
    }

    /// An error of the driver on this device.
    #[must_use]
    pub fn guest(&self, reason: impl ToString) -> DeviceError {
        DeviceError::Guest {
            device: self.device,
            reason: reason.to_string(),
        }
    }

    fn host(&self, source: io::Error) -> DeviceError {
        DeviceError::Host {
            device: self.device,
            source,
        }
    }
}

/// An activation taken apart, with the queues that the device cannot do without.
pub struct Opened<const N: usize> {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// Features both sides accepted.
    pub features: u64,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Queues 0 to N - 1, each waited for under its index.
    pub rings: [Ring; N],
    /// What else the driver enabled, by index; nobody waits for it yet.
    pub others: Vec<ActiveQueue>,
}

impl Activation {
    /// Opens queues 0 to N - 1.
    ///
    /// # Errors
    /// If the driver did not enable one of them, or its event cannot be waited for. Nothing is waited for then.
    pub fn open<const N: usize>(
        self,
        device: &'static str,
        sources: &mut Sources<'_>,
    ) -> Result<Opened<N>, DeviceError> {
        let Self {
            memory,
            features,
            mut queues,
            interrupt,
        } = self;
        // All before one is registered: a driver may have enabled one alone.
        let wanted = (0..).take(N);
        let wanted = wanted
            .map(|index| take_queue(&mut queues, device, index))
            .collect::<Result<Vec<_>, _>>()?;
        let mut rings = Vec::with_capacity(N);
        for queue in wanted {
            let token = u32::from(queue.index);
            match Ring::new(queue, device, features, token, sources) {
                Ok(ring) => rings.push(ring),
                Err(error) => {
                    rings
                        .into_iter()
                        .for_each(|ring: Ring| ring.release(sources));
                    return Err(error);
                }
            }
        }
        queues.sort_by_key(|queue| queue.index);
        Ok(Opened {
            memory,
            features,
            interrupt,
            rings: rings.try_into().map_err(|_| DeviceError::Guest {
                device,
                reason: format!("it has not the {N} queues it needs"),
            })?,
            others: queues,
        })
    }
}

/// Takes queue `index` out of an activation.
///
/// # Errors
/// If the driver did not enable it.
pub fn take_queue(
    queues: &mut Vec<ActiveQueue>,
    device: &'static str,
    index: u16,
) -> Result<ActiveQueue, DeviceError> {
    match queues.iter().position(|queue| queue.index == index) {
        Some(position) => Ok(queues.swap_remove(position)),
        None => Err(DeviceError::Guest {
            device,
            reason: format!("queue {index} is not enabled"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use libc::EFD_NONBLOCK;
    use virtio_queue::Queue;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::epoll::Epoll;

    use super::*;
    use crate::virtio::testing::Interrupts;

    /// The rings lie over each other, so that asking for kicks, which clears the used ring's flags, moves the
    /// available index from 65535 to 0: in no other way does a chain come at just this moment.
    #[test]
    fn a_chain_that_comes_between_the_last_look_and_the_wait_is_served() {
        const TABLE: u32 = 0x1000;
        const AVAILABLE: u32 = 0x2002;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = Queue::new(4).unwrap();
        queue.set_desc_table_address(Some(TABLE), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE), Some(0));
        queue.set_used_ring_address(Some(AVAILABLE + 2), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&memory));
        queue.set_next_avail(u16::MAX);
        let index = GuestAddress(u64::from(AVAILABLE) + 2);
        memory.write_obj(u16::MAX, index).unwrap();
        // The chain: a buffer of 8 bytes to be written. Entry 3 of the available ring names it, being zero.
        let table = u64::from(TABLE);
        memory.write_obj(0x3000_u64, GuestAddress(table)).unwrap();
        memory
            .write_obj(8 | 2_u64 << 32, GuestAddress(table + 8))
            .unwrap();

        let epoll = Epoll::new().unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let active = ActiveQueue {
            index: 0,
            queue,
            kick,
            counts: Arc::default(),
        };
        let mut ring = Ring::new(active, "test", 0, 0, &mut Sources::new(&epoll, 0)).unwrap();
        let mut served = 0;
        let serve = |_: Chain<'_>| {
            served += 1;
            Ok((0, 0))
        };
        let interrupts = Interrupts::default();
        assert!(ring.drain(&memory, &interrupts, 8, serve).unwrap());
        assert_eq!(served, 1);
        assert_eq!(interrupts.of(0), 1);
        let counts = &ring.active.counts;
        assert_eq!((counts.chains.get(), counts.interrupts.get()), (1, 1));
    }
}
