//! The virtio-PCI transport (virtio 1.3 §4.1): one function with one BAR and MSI-X.
//!
//! It negotiates with the driver and hands a device its queues; it never looks into guest memory.
//! All register accesses come from the guest. After DRIVER_OK nothing here changes a queue until
//! the device has given its queues back.

pub mod capability;
pub mod common;
pub mod interrupt;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use slog::{Logger, warn};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::capability::Layout;
pub use self::common::VERSION_1;
use self::common::{Action, CommonConfig, QueueError};
use self::interrupt::VirtioInterrupt;
use super::worker::DeviceHandle;
use super::{Activation, ActiveQueue, ConfigSpace as DeviceConfig, GuestMemory, VirtioDevice};
use crate::pci::config::{ConfigError, ConfigSpace, Identity, SIZE};
use crate::pci::{BarRange, Function};
use crate::sync::lock;

/// How long a CPU waits for a device to give up its queues; then the driver keeps polling the
/// status, which stays non-zero.
const RESET_TIMEOUT: Duration = Duration::from_secs(1);

/// `config_generation`, the one register of the common structure that is the device's.
const GENERATION: u64 = 0x15;
const VENDOR: u16 = 0x1af4;
/// Device ids of modern virtio functions start here.
const DEVICE_BASE: u16 = 0x1040;

/// Signals an event when the guest writes to an address (ioeventfd). Implemented over KVM.
pub trait IoEventFds: Send + Sync {
    /// Starts.
    ///
    /// # Errors
    /// If the hypervisor refuses; the write then reaches the transport as an exit.
    fn attach(&self, address: u64, kick: &EventFd) -> io::Result<()>;
    /// Stops.
    ///
    /// # Errors
    /// If it was not attached.
    fn detach(&self, address: u64, kick: &EventFd) -> io::Result<()>;
}

/// What the transport must know of a device, read before the device moves to its worker.
pub struct Description {
    name: &'static str,
    device_type: u16,
    features: u64,
    queue_sizes: Vec<u16>,
    config: Arc<dyn DeviceConfig>,
    follows_memory: bool,
}

impl Description {
    /// Asks the device.
    #[must_use]
    pub fn of(device: &dyn VirtioDevice) -> Self {
        Self {
            name: device.name(),
            device_type: device.device_type(),
            features: device.features(),
            queue_sizes: device.queue_sizes(),
            config: device.config(),
            follows_memory: device.follows_memory(),
        }
    }

    /// As [`VirtioDevice::follows_memory`].
    #[must_use]
    pub fn follows_memory(&self) -> bool {
        self.follows_memory
    }

    /// As [`VirtioDevice::name`].
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// MSI-X vectors: one a queue and one for configuration changes.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.queue_sizes.len() + 1).unwrap_or(u16::MAX)
    }

    /// Number of queues.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.queue_sizes.len()
    }
}

/// What the rest of the VMM gives a transport.
pub struct Services {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// ioeventfds.
    pub ioeventfds: Arc<dyn IoEventFds>,
    /// While it is set, a device that is given queues takes up where their used rings are: the driver's writes are being made again
    /// for a clone of a guest.
    pub resuming: Arc<AtomicBool>,
    /// For the log.
    pub log: Logger,
}

/// A transport could not be made. These are the VMM's or the host's mistakes.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Configuration space.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Event descriptors.
    #[error("eventfd: {0}")]
    Event(#[from] io::Error),
    /// The device has an impossible number or size of queues.
    #[error("virtio device {0} has impossible queues")]
    Queues(&'static str),
}

/// One virtio function.
pub struct VirtioPci {
    name: &'static str,
    config: Mutex<ConfigSpace>,
    layout: Layout,
    common: Mutex<CommonConfig>,
    device_config: Arc<dyn DeviceConfig>,
    interrupt: Arc<VirtioInterrupt>,
    kicks: Vec<EventFd>,
    device: DeviceHandle,
    /// A reset the device has not acknowledged yet.
    resetting: Mutex<Option<Receiver<()>>>,
    services: Services,
}

impl VirtioPci {
    /// Makes the function for a device that runs behind `device`, its BAR at `base`.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn new(
        description: &Description,
        device: DeviceHandle,
        interrupt: Arc<VirtioInterrupt>,
        services: Services,
        base: u64,
        multi_function: bool,
    ) -> Result<Self, TransportError> {
        let queues = description.queue_sizes.as_slice();
        let common = CommonConfig::new(
            description.features | VERSION_1,
            queues,
            description.vectors(),
        )
        .ok_or(TransportError::Queues(description.name))?;
        let mut config = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + description.device_type,
            revision: 1,
            class: class(description.device_type),
            subsystem: (VENDOR, DEVICE_BASE),
        });
        if multi_function {
            config.set_multi_function();
        }
        let layout = capability::add(&mut config, description.vectors(), base)?;
        let kicks = queues
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            name: description.name,
            config: Mutex::new(config),
            layout,
            common: Mutex::new(common),
            device_config: Arc::clone(&description.config),
            interrupt,
            kicks,
            device,
            resetting: Mutex::new(None),
            services,
        })
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        if let (GENERATION, [generation]) = (offset, &mut *data) {
            *generation = self.device_config.generation();
            return;
        }
        let mut common = lock(&self.common);
        self.finish_reset(&mut common);
        common.read(offset, data, self.interrupt.needs_reset());
    }

    fn common_write(&self, offset: u64, data: &[u8]) {
        let mut common = lock(&self.common);
        self.finish_reset(&mut common);
        match common.write(offset, data) {
            Action::None => {}
            Action::Activate => self.activate(&mut common),
            Action::Reset => self.reset(&mut common),
        }
    }

    fn activate(&self, common: &mut CommonConfig) {
        let memory = self.services.memory.clone();
        let snapshot = memory.memory_snapshot();
        let queues = common.queues(&snapshot).and_then(|mut queues| {
            if self.services.resuming.load(Ordering::Acquire) {
                self.take_up(&mut queues, &snapshot)?;
            }
            Ok(queues)
        });
        let queues = match queues {
            Ok(queues) => queues,
            Err(error) => {
                warn!(self.services.log, "device not activated"; "device" => self.name, "error" => %error);
                self.interrupt.fail();
                return;
            }
        };
        for (index, queue) in common.vectors().iter().enumerate() {
            self.interrupt.set_queue_vector(index, *queue);
        }
        self.interrupt.set_config_vector(common.config_vector());
        let queues: io::Result<Vec<ActiveQueue>> = queues
            .into_iter()
            .map(|(index, queue)| {
                Ok(ActiveQueue {
                    index,
                    queue,
                    kick: self.kicks[usize::from(index)].try_clone()?,
                    counts: self.interrupt.counts().queue(index),
                })
            })
            .collect();
        match queues {
            Ok(queues) => self.device.activate(Activation {
                memory,
                features: common.accepted(),
                queues,
                interrupt: self.interrupt.clone(),
            }),
            Err(error) => {
                warn!(self.services.log, "device not activated"; "device" => self.name, "error" => %error);
                self.interrupt.fail();
            }
        }
    }

    /// Goes on with queues where another device has left them, at rest: what it had taken it had given back. What was not taken yet is
    /// looked at as after a notification.
    fn take_up(
        &self,
        queues: &mut [(u16, Queue)],
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        for (index, queue) in queues {
            let unusable = |_| QueueError {
                index: *index,
                reason: "its rings cannot be read",
            };
            let used = queue
                .used_idx(memory, Ordering::Acquire)
                .map_err(unusable)?;
            queue.set_next_used(used.0);
            queue.set_next_avail(used.0);
            let available = queue
                .avail_idx(memory, Ordering::Acquire)
                .map_err(unusable)?;
            if available != used
                && let Some(kick) = self.kicks.get(usize::from(*index))
            {
                // A full counter is already ready.
                let _ = kick.write(1);
            }
        }
        Ok(())
    }

    /// Takes the queues back. The CPU waits for a bounded time; afterwards the driver polls.
    fn reset(&self, common: &mut CommonConfig) {
        let done = self.device.deactivate();
        if done.recv_timeout(RESET_TIMEOUT).is_ok() {
            self.was_reset(common);
        } else {
            warn!(self.services.log, "device is slow to reset"; "device" => self.name);
            *lock(&self.resetting) = Some(done);
        }
    }

    fn finish_reset(&self, common: &mut CommonConfig) {
        let mut resetting = lock(&self.resetting);
        if resetting
            .as_ref()
            .is_some_and(|done| done.try_recv().is_ok())
        {
            *resetting = None;
            drop(resetting);
            self.was_reset(common);
        }
    }

    fn was_reset(&self, common: &mut CommonConfig) {
        common.was_reset();
        self.interrupt.reset();
    }

    fn msix_control(&self, config: &ConfigSpace) {
        let [_, high] = config.get::<2>(self.layout.msix + 2);
        let result = self
            .interrupt
            .msix()
            .control(high & 0x80 != 0, high & 0x40 != 0);
        self.report(result);
    }

    fn report(&self, result: io::Result<()>) {
        if let Err(error) = result {
            warn!(self.services.log, "interrupt route refused"; "device" => self.name, "error" => %error);
        }
    }

    /// The register window that a driver reaches through configuration space (§4.1.4.9).
    fn window(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let [bar] = config.get(self.layout.window + 4);
        let offset = u32::from_le_bytes(config.get(self.layout.window + 8));
        let length = u32::from_le_bytes(config.get(self.layout.window + 12));
        let length = usize::try_from(length).ok()?;
        (bar == 0 && matches!(length, 1 | 2 | 4)).then_some((u64::from(offset), length))
    }
}

/// PCI class, for those who list devices.
fn class(device_type: u16) -> [u8; 3] {
    match device_type {
        1 => [0x02, 0x00, 0x00],
        2 | 26 => [0x01, 0x80, 0x00],
        19 => [0x07, 0x80, 0x00],
        27 => [0x05, 0x80, 0x00],
        _ => [0xff, 0x00, 0x00],
    }
}

fn overlaps(offset: u16, length: usize, start: u16, end: u16) -> bool {
    usize::from(start) < usize::from(offset) + length && offset < end
}

impl Function for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut config = lock(&self.config);
        let window = self.layout.window + 16;
        if overlaps(offset, data.len(), window, window + 4)
            && let Some((at, length)) = self.window(&config)
        {
            drop(config);
            let mut value = [0u8; 4];
            self.bar_read(0, at, &mut value[..length]);
            config = lock(&self.config);
            config.write(window, &value[..length]);
        }
        config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut config = lock(&self.config);
        config.write(offset, data);
        let msix = self.layout.msix;
        if overlaps(offset, data.len(), msix + 2, msix + 4) {
            self.msix_control(&config);
        }
        let window = self.layout.window + 16;
        if overlaps(offset, data.len(), window, window + 4)
            && let Some((at, length)) = self.window(&config)
        {
            let value: [u8; 4] = config.get(window);
            drop(config);
            self.bar_write(0, at, &value[..length]);
        }
    }

    fn config_image(&self) -> [u8; SIZE] {
        lock(&self.config).get(0)
    }

    fn reads_have_effects(&self) -> bool {
        self.window(&lock(&self.config)).is_some()
    }

    fn decoded(&self) -> Vec<BarRange> {
        lock(&self.config).decoded()
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        match capability::region(offset) {
            (capability::COMMON, at) => self.common_read(at, data),
            (capability::ISR, at) => {
                data.fill(0);
                if let (0, Some(first)) = (at, data.first_mut()) {
                    *first = self.interrupt.take_isr();
                }
            }
            (capability::DEVICE, at) => self.device_config.read(at, data),
            (capability::TABLE, at) => self.interrupt.msix().table_read(at, data),
            (capability::PENDING, at) => self.interrupt.msix().pending_read(at, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        match capability::region(offset) {
            (capability::COMMON, at) => self.common_write(at, data),
            (capability::DEVICE, at) => self.device_config.write(at, data),
            (capability::NOTIFY, at) => {
                // Only what the ioeventfd did not take: an odd size, or no ioeventfd.
                let queue = usize::try_from(at / capability::NOTIFY_STRIDE).ok();
                if let Some(kick) = queue.and_then(|queue| self.kicks.get(queue)) {
                    // A full counter is already ready: nothing is lost.
                    let _ = kick.write(1);
                }
            }
            (capability::TABLE, at) => self.report(self.interrupt.msix().table_write(at, data)),
            _ => {}
        }
    }

    /// Linux resets a device that it removes, and waits without end for a status of zero.
    fn reads_when_gone(&self) -> u8 {
        0
    }

    fn bar_moved(&self, _bar: u8, old: Option<u64>, new: Option<u64>) {
        let address = |base: u64, stride: u64| base + capability::NOTIFY + stride;
        for (kick, index) in self.kicks.iter().zip(0u64..) {
            let stride = index * capability::NOTIFY_STRIDE;
            if let Some(base) = old {
                // It may never have been attached (an address another function had).
                let _ = self.services.ioeventfds.detach(address(base, stride), kick);
            }
            if let Some(base) = new
                && let Err(error) = self.services.ioeventfds.attach(address(base, stride), kick)
            {
                warn!(self.services.log, "queue notifications will exit"; "device" => self.name, "error" => %error);
            }
        }
    }
}

/// A snapshot of guest RAM as a plain reference-counted map.
trait Snapshot {
    fn memory_snapshot(&self) -> Arc<GuestMemoryMmap>;
}

impl Snapshot for GuestMemory {
    fn memory_snapshot(&self) -> Arc<GuestMemoryMmap> {
        use vm_memory::GuestAddressSpace;
        self.memory().into_inner()
    }
}

#[cfg(test)]
mod tests;
