//! The queues of the socket device (virtio 1.3 §5.10.2) and its place on a worker.
//!
//! Any event ends with an attempt to fill the guest's receive buffers. Work per event is bounded;
//! what is left over is continued by an event that the device sends to itself.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::connection::Origin;
use super::handle::{Command, VsockEvent, VsockHandle};
use super::mux::Mux;
use super::packet::{HEADER, Header};
use crate::event::borrow_event;
use crate::virtio::ring::Ring;
use crate::virtio::{
    Activation, ConfigSpace, DeviceError, GuestMemory, Interrupt, Sources, VirtioDevice,
};

const NAME: &str = "vsock";
/// Device id (§5.10.1).
const DEVICE_TYPE: u16 = 19;
/// `VIRTIO_VSOCK_F_STREAM` (§5.10.3).
const F_STREAM: u64 = 1;
/// The driver keeps the receive queue full of 4 KiB buffers, so its size is guest memory.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
const WAKE: u32 = 3;
const FIRST_ENDPOINT: u32 = 4;

/// Packets of one direction per event.
const BUDGET: usize = 256;
/// The guest is told of received packets at least this often, so that it works while we do.
const NOTIFY_EVERY: usize = 64;

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    receive: Ring,
    transmit: Ring,
    event: Option<Ring>,
}

/// The socket device.
pub struct Vsock {
    config: Arc<Vec<u8>>,
    mux: Mux,
    commands: Receiver<Command>,
    /// None with the reason if the host had no event for us; activation then fails.
    wake: Option<Arc<EventFd>>,
    wake_error: Option<io::Error>,
    active: Option<Active>,
}

impl Vsock {
    /// A device for the guest with this context id. `agent` is a connected stream socket, spliced
    /// with the one connection that the guest may open. `events` is called on the worker thread
    /// and must not block.
    #[must_use]
    pub fn new(
        guest_cid: u32,
        agent: OwnedFd,
        events: Box<dyn Fn(VsockEvent) + Send>,
    ) -> (Self, VsockHandle) {
        let (wake, error) = match EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC) {
            Ok(event) => (Some(Arc::new(event)), None),
            Err(error) => (None, Some(error)),
        };
        let (handle, commands, live) = VsockHandle::new(wake.clone());
        let device = Self {
            config: Arc::new(u64::from(guest_cid).to_le_bytes().to_vec()),
            mux: Mux::new(guest_cid, agent, FIRST_ENDPOINT, live, events),
            commands,
            wake,
            wake_error: error,
            active: None,
        };
        (device, handle)
    }

    fn host(source: io::Error) -> DeviceError {
        DeviceError::Host {
            device: NAME,
            source,
        }
    }

    /// Asks the worker to come back.
    fn call_again(&self) -> Result<(), DeviceError> {
        match &self.wake {
            Some(wake) => wake.write(1).map_err(Self::host),
            None => Ok(()),
        }
    }

    fn run_commands(&mut self, sources: &mut Sources<'_>) {
        if let Some(wake) = &self.wake {
            // The only error is that nobody has woken us.
            let _ = wake.read();
        }
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Open(params) => self.mux.open(params, sources),
                Command::Close(stream) => self.mux.close(stream, sources),
            }
        }
    }

    /// Takes the packets that the guest has sent.
    fn drain_transmit(&mut self, sources: &mut Sources<'_>) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut() else {
            return Ok(());
        };
        let ring = &mut active.transmit;
        ring.acknowledge();
        let memory = active.memory.memory();
        ring.disable_kick(&memory)?;
        let mut count = 0;
        loop {
            if count == BUDGET {
                ring.call_again()?;
                break;
            }
            count += 1;
            match ring.pop(&memory)? {
                Some(mut chain) => {
                    let Some(header) = chain.readable.copy_array::<HEADER>() else {
                        return Err(ring.guest("a packet is shorter than its header"));
                    };
                    let header = Header::from_bytes(&header);
                    self.mux.receive(&header, chain.readable, sources);
                    ring.push(&memory, chain.head, 0)?;
                    if count.is_multiple_of(NOTIFY_EVERY) {
                        ring.notify(&memory, &*active.interrupt)?;
                    }
                }
                None if ring.enable_kick(&memory)? => {}
                None => break,
            }
        }
        ring.notify(&memory, &*active.interrupt)
    }

    /// Fills the guest's receive buffers while there are some and something to send.
    fn fill_receive(&mut self, sources: &mut Sources<'_>) -> Result<(), DeviceError> {
        if !self.mux.wants_buffer() {
            return Ok(());
        }
        let Some(active) = self.active.as_mut() else {
            return Ok(());
        };
        let ring = &mut active.receive;
        let memory = active.memory.memory();
        let mut count = 0;
        let mut again = false;
        while self.mux.wants_buffer() {
            if count == BUDGET {
                again = true;
                break;
            }
            count += 1;
            match ring.pop(&memory)? {
                Some(chain) => {
                    if chain.writable.len() <= HEADER {
                        return Err(ring.guest("a receive buffer has no room for payload"));
                    }
                    match self.mux.transmit(chain.writable, sources) {
                        Some(written) => ring.push(&memory, chain.head, written)?,
                        None => ring.undo_pop(),
                    }
                    if count.is_multiple_of(NOTIFY_EVERY) {
                        ring.notify(&memory, &*active.interrupt)?;
                    }
                }
                None if ring.enable_kick(&memory)? => {}
                None => break,
            }
        }
        ring.notify(&memory, &*active.interrupt)?;
        if again {
            self.call_again()?;
        }
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_STREAM | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        self.config.clone()
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let Some(wake) = self.wake.clone() else {
            let error = self.wake_error.take();
            return Err(Self::host(error.unwrap_or_else(|| {
                io::Error::other("there is no event to wait for")
            })));
        };
        let opened = activation.open(NAME, sources)?;
        let [receive, transmit] = opened.rings;
        // We never send an event, but its kicks must not stay pending.
        let event = opened.others.into_iter().next();
        let event =
            event.and_then(|queue| Ring::new(queue, NAME, opened.features, EVENT, sources).ok());
        self.active = Some(Active {
            memory: opened.memory,
            interrupt: opened.interrupt,
            receive,
            transmit,
            event,
        });
        if let Err(error) = sources.add(borrow_event(&wake), WAKE, EventSet::IN) {
            self.deactivate(sources);
            return Err(Self::host(error));
        }
        Ok(())
    }

    fn process(
        &mut self,
        token: u32,
        _events: EventSet,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        if self.active.is_none() {
            return Ok(());
        }
        match token {
            RX => {
                if let Some(active) = &self.active {
                    active.receive.acknowledge();
                }
            }
            TX => self.drain_transmit(sources)?,
            EVENT => {
                if let Some(event) = self.active.as_ref().and_then(|a| a.event.as_ref()) {
                    event.acknowledge();
                }
            }
            WAKE => self.run_commands(sources),
            token => self
                .mux
                .endpoint_ready(token.saturating_sub(FIRST_ENDPOINT), sources),
        }
        self.fill_receive(sources)
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        let Some(active) = self.active.take() else {
            return;
        };
        active.receive.release(sources);
        active.transmit.release(sources);
        if let Some(event) = active.event {
            event.release(sources);
        }
        if let Some(wake) = &self.wake {
            // It may not have been added, if activation failed.
            let _ = sources.remove(borrow_event(wake));
        }
        self.mux.reset(sources);
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Open(params) = command {
                self.mux.report_closed(Origin::Stream(params.stream), true);
            }
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Vsock {
    /// Connections, and packets of no connection.
    pub(crate) fn counts(&self) -> (usize, usize) {
        self.mux.counts()
    }
}
