//! The network device whose queue pairs the node's kernel serves: frames pass between tap and guest memory without this
//! process. It has the control queue alone.
//!
//! What is in a frame's header the tap checks, as it does for any program; here nobody looks at it before (docs/threat-model.md).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::control::{open_control, serve_control};
use super::offer::{configuration, offered, pairs_set_up, queue_sizes, set_up};
use super::tap::{NetError, Tap};
use super::vhost::Vhost;
use crate::event::borrow_event;
use crate::virtio::ring::{Ring, take_queue};
use crate::virtio::{
    Activation, ActiveQueue, ConfigSpace, DeviceError, GuestMemory, Interrupt, Sources,
    VirtioDevice,
};

const NAME: &str = "vhost-net";
/// Device id (§5.1.1).
const DEVICE_TYPE: u16 = 1;

const CONTROL: u32 = 0;
const TROUBLE: u32 = 1;

struct Lane {
    tap: Tap,
    vhost: Vhost,
    /// The kernel knows the queues of this activation, and where it is in them.
    prepared: bool,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
    /// By pair: host to guest, guest to host.
    pairs: Vec<[ActiveQueue; 2]>,
    control: Option<Ring>,
    /// The guest has broken the rules of a queue.
    trouble: EventFd,
}

/// A network interface on a tap, by the node's kernel.
pub struct VhostNet {
    lanes: Vec<Lane>,
    config: Arc<Vec<u8>>,
    active: Option<Active>,
}

fn host(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> DeviceError {
    DeviceError::Host {
        device: NAME,
        source: std::io::Error::other(source),
    }
}

impl VhostNet {
    /// As [`super::Net::new`], with a descriptor of `/dev/vhost-net` for each tap, whose features have been asked for.
    ///
    /// # Errors
    /// As of [`super::Net::new`]; if there are not as many of the others.
    pub fn new(
        taps: Vec<OwnedFd>,
        vhosts: Vec<OwnedFd>,
        memory: &GuestMemory,
        mac: [u8; 6],
        mtu: u16,
    ) -> Result<Self, NetError> {
        let taps = set_up(taps)?;
        if taps.len() != vhosts.len() {
            return Err(NetError::Vhosts(vhosts.len(), taps.len()));
        }
        let lanes = taps.into_iter().zip(vhosts).map(|(tap, vhost)| Lane {
            tap,
            vhost: Vhost::new(vhost, memory.clone()),
            prepared: false,
        });
        let lanes: Vec<_> = lanes.collect();
        Ok(Self {
            config: Arc::new(configuration(mac, lanes.len(), mtu)),
            lanes,
            active: None,
        })
    }

    /// The driver uses so many pairs.
    fn use_pairs(&mut self, count: usize) -> Result<(), DeviceError> {
        let Some(active) = &self.active else {
            return Ok(());
        };
        let several = self.lanes.len() > 1;
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            let Some([receive, transmit]) = active.pairs.get(index).filter(|_| index < count)
            else {
                lane.vhost.disconnect();
                if several {
                    lane.tap.set_in_use(false).map_err(host)?;
                }
                continue;
            };
            if several {
                lane.tap.set_in_use(true).map_err(host)?;
            }
            if !std::mem::replace(&mut lane.prepared, true) {
                let queues = [receive, transmit];
                let interrupt = &*active.interrupt;
                lane.vhost
                    .prepare(active.features, queues, interrupt, &active.trouble)
                    .map_err(host)?;
            }
            lane.vhost.connect(&lane.tap).map_err(host)?;
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
        let (memory, pairs) = (active.memory.memory(), active.pairs.len());
        let (asked, _) = serve_control(ring, &memory, &*active.interrupt, pairs)?;
        asked.map_or(Ok(()), |count| self.use_pairs(count))
    }

    fn open(
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
        let count = pairs_set_up(features, self.lanes.len());
        let mut pairs = Vec::new();
        // At most MAX_PAIRS.
        for index in (0..u16::MAX).step_by(2).take(count) {
            pairs.push([
                take_queue(&mut queues, NAME, index)?,
                take_queue(&mut queues, NAME, index + 1)?,
            ]);
        }
        let trouble = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host)?;
        sources
            .add(borrow_event(&trouble), TROUBLE, EventSet::IN)
            .map_err(host)?;
        let active = self.active.insert(Active {
            memory,
            interrupt,
            features,
            pairs,
            control: None,
            trouble,
        });
        active.control = open_control(NAME, &mut queues, count, features, CONTROL, sources)?;
        for lane in &self.lanes {
            lane.tap.set_offloads(features).map_err(host)?;
        }
        self.use_pairs(1)
    }
}

impl VirtioDevice for VhostNet {
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

    fn follows_memory(&self) -> bool {
        true
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let opened = self.open(activation, sources);
        if opened.is_err() {
            self.deactivate(sources);
        }
        opened
    }

    fn process(
        &mut self,
        token: u32,
        _events: EventSet,
        _sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        match token {
            CONTROL => self.control(),
            TROUBLE if self.active.as_ref().is_some_and(has_trouble) => Err(DeviceError::Guest {
                device: NAME,
                reason: "the node's kernel cannot read a queue".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn refresh(&mut self) -> Result<(), DeviceError> {
        let mut lanes = self.lanes.iter();
        lanes.try_for_each(|lane| lane.vhost.follow_memory().map_err(host))
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        for lane in &mut self.lanes {
            lane.vhost.disconnect();
            lane.prepared = false;
        }
        let Some(active) = self.active.take() else {
            return;
        };
        if let Some(control) = active.control {
            control.release(sources);
        }
        let _ = sources.remove(borrow_event(&active.trouble));
    }
}

fn has_trouble(active: &Active) -> bool {
    active.trouble.read().is_ok()
}
