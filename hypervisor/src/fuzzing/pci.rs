//! Registers: configuration space and BARs of functions on a bus.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use slog::{Discard, Logger, o};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::input::Input;
use crate::pci::bus::Bus;
use crate::pci::config::SIZE;
use crate::pci::mirror::Mirror;
use crate::pci::msix::Msix;
use crate::pci::msix::fake::FakeRoutes;
use crate::sync::lock;
use crate::virtio::pci::interrupt::VirtioInterrupt;
use crate::virtio::pci::{Description, IoEventFds, Services, VERSION_1, VirtioPci};
use crate::virtio::worker::{self, Slot};
use crate::virtio::{Activation, ConfigSpace, DeviceError, GuestMemory, Sources, VirtioDevice};

const WINDOW: std::ops::Range<u64> = 0xc000_0000..0xc010_0000;
const STEPS: usize = 200;

/// Hands on what it was given.
struct Fake(Sender<Activation>);

impl VirtioDevice for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn device_type(&self) -> u16 {
        4
    }
    fn features(&self) -> u64 {
        1
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 16]
    }
    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(vec![0xaa, 0xbb])
    }
    fn activate(&mut self, given: Activation, _: &mut Sources<'_>) -> Result<(), DeviceError> {
        let _ = self.0.send(given);
        Ok(())
    }
    fn process(&mut self, _: u32, _: EventSet, _: &mut Sources<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn deactivate(&mut self, _: &mut Sources<'_>) {}
}

/// What is attached, and that nothing is detached that was not or attached twice.
#[derive(Default)]
struct Attached(Mutex<Vec<u64>>);

impl IoEventFds for Attached {
    fn attach(&self, address: u64, _: &EventFd) -> io::Result<()> {
        let mut attached = lock(&self.0);
        if attached.contains(&address) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        attached.push(address);
        Ok(())
    }
    fn detach(&self, address: u64, _: &EventFd) -> io::Result<()> {
        lock(&self.0).retain(|other| *other != address);
        Ok(())
    }
}

#[derive(Default)]
struct Image(Arc<Mutex<(Vec<[u8; SIZE]>, bool)>>);

impl Mirror for Image {
    fn store(&self, devfn: u8, image: &[u8; SIZE]) {
        let images = &mut lock(&self.0).0;
        let index = usize::from(devfn);
        images.resize(images.len().max(index + 1), [0xff; SIZE]);
        images[index] = *image;
    }
    fn disable(&self) {
        lock(&self.0).1 = true;
    }
}

/// Two functions on a bus, driven by any accesses. What a device is given is valid, the mirror says
/// what a read says, and notifications are attached inside the windows alone.
pub fn pci_config(data: &[u8]) {
    let mut input = Input::new(data);
    let log = Logger::root(Discard, o!());
    let attached = Arc::new(Attached::default());
    let mut given: Vec<Receiver<Activation>> = Vec::new();
    let mut slots = Vec::new();
    let mut parts = Vec::new();
    for _ in 0..2 {
        let (sender, receiver) = channel();
        let device = Fake(sender);
        let description = Description::of(&device);
        let msix = Msix::new(description.vectors(), Arc::new(FakeRoutes::default()));
        let interrupt = Arc::new(VirtioInterrupt::new(msix, description.queues()));
        let failed = Arc::clone(&interrupt);
        slots.push(Slot {
            device: Box::new(device),
            on_failure: Box::new(move || failed.fail()),
            counts: Arc::default(),
        });
        parts.push((description, interrupt));
        given.push(receiver);
    }
    let (_worker, handles) = worker::spawn(
        "fuzz",
        slots,
        Box::new(|| Ok(())),
        Box::new(|reason| panic!("{reason}")),
        log.clone(),
    )
    .unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let memory = GuestMemory::new(memory);
    let bus = Bus::new(vec![WINDOW]);
    for (number, ((description, interrupt), handle)) in (0u64..).zip(parts.into_iter().zip(handles))
    {
        let services = Services {
            memory: memory.clone(),
            ioeventfds: Arc::clone(&attached) as Arc<dyn IoEventFds>,
            resuming: Arc::default(),
            log: log.clone(),
        };
        let base = WINDOW.start + number * 0x8000;
        let function =
            VirtioPci::new(&description, handle, interrupt, services, base, number == 0).unwrap();
        bus.add(Arc::new(function)).unwrap();
    }
    let image = Image::default();
    let seen = Arc::clone(&image.0);
    bus.set_mirror(Box::new(image));
    for devfn in 0..2 {
        bus.ecam_write((devfn << 12) + 4, &[6, 0]);
    }
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let devfn = u64::from(input.byte() & 1);
        let length = input.pick(&[1usize, 2, 4, 8, 3]);
        let write = input.flag();
        let value = input.long().to_le_bytes();
        let mut bytes = [0; 8];
        if input.flag() {
            let register = u64::from(input.byte()) + (devfn << 12);
            if write {
                bus.ecam_write(register, &value[..length]);
            } else {
                bus.ecam_read(register, &mut bytes[..length]);
            }
        } else {
            // Where the registers of the function first were, or any address near the windows.
            let address = match input.below(4) {
                0 => WINDOW.start + u64::from(input.word() & 0x1f_ffff),
                1 => WINDOW.start + devfn * 0x8000 + 0x3000 + u64::from(input.byte()),
                2 => WINDOW.start + devfn * 0x8000 + 0x4000 + u64::from(input.byte()),
                _ => WINDOW.start + devfn * 0x8000 + u64::from(input.byte()) % 0x40,
            };
            if write {
                bus.memory_write(address, &value[..length]);
            } else {
                bus.memory_read(address, &mut bytes[..length]);
            }
        }
    }
    if !lock(&seen).1 {
        for devfn in 0..2u64 {
            let mut registers = [0; SIZE];
            for (at, byte) in (devfn << 12..).zip(&mut registers) {
                bus.ecam_read(at, std::slice::from_mut(byte));
            }
            let index = usize::try_from(devfn).unwrap();
            assert_eq!(lock(&seen).0[index], registers, "the mirror");
        }
    }
    let windows = |address: &u64| WINDOW.contains(address);
    assert!(lock(&attached.0).iter().all(windows), "outside the windows");
    for receiver in &given {
        while let Ok(activation) = receiver.try_recv() {
            let memory = activation.memory.memory();
            assert_eq!(activation.features & !(VERSION_1 | 1 | 1 << 29), 0);
            for queue in &activation.queues {
                assert!(queue.queue.is_valid(&*memory));
                assert!(queue.queue.size() <= [64, 16][usize::from(queue.index)]);
            }
        }
    }
}
