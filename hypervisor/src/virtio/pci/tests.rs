//! The whole transport against a device on a real worker thread, driven as Linux drives it.

use std::sync::mpsc;

use proptest::prelude::*;
use slog::{Discard, o};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::*;
use crate::arch::x86_64::layout;
use crate::pci::bus::Bus;
use crate::pci::msix::fake::FakeRoutes;
use crate::pci::msix::{ENTRY_SIZE, Msix};
use crate::template::registers;
use crate::virtio::worker::{self, Slot, Worker};
use crate::virtio::{DeviceError, Sources};

const BASE: u64 = 0xc000_8000;
const PATIENCE: Duration = Duration::from_secs(10);

/// Tells what it was given; fails or blocks on request.
struct Fake {
    given: mpsc::Sender<Activation>,
    fails: bool,
    /// Deactivation waits for this.
    gate: Option<Receiver<()>>,
}

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
        vec![64, 64]
    }
    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::new(vec![0xaa, 0xbb])
    }
    fn activate(&mut self, a: Activation, _: &mut Sources<'_>) -> Result<(), DeviceError> {
        self.given.send(a).unwrap();
        if self.fails {
            return Err(DeviceError::Guest {
                device: "fake",
                reason: "test".to_owned(),
            });
        }
        Ok(())
    }
    fn process(&mut self, _: u32, _: EventSet, _: &mut Sources<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn deactivate(&mut self, _: &mut Sources<'_>) {
        if let Some(gate) = &self.gate {
            gate.recv().unwrap();
        }
    }
}

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

struct Setup {
    function: VirtioPci,
    given: Receiver<Activation>,
    routes: Arc<FakeRoutes>,
    attached: Arc<Attached>,
    _worker: Worker,
}

fn setup(fails: bool, gate: Option<Receiver<()>>) -> Setup {
    let (sender, given) = mpsc::channel();
    let device = Fake {
        given: sender,
        fails,
        gate,
    };
    let description = Description::of(&device);
    let routes = Arc::new(FakeRoutes::default());
    let attached = Arc::new(Attached::default());
    let msix = Msix::new(description.vectors(), routes.clone());
    let interrupt = Arc::new(VirtioInterrupt::new(msix, description.queues()));
    let failed = Arc::clone(&interrupt);
    let log = Logger::root(Discard, o!());
    let (worker, mut handles) = worker::spawn(
        "test",
        vec![Slot {
            device: Box::new(device),
            on_failure: Box::new(move || failed.fail()),
            counts: Arc::clone(interrupt.counts()),
        }],
        Box::new(|| Ok(())),
        Box::new(|reason| panic!("{reason}")),
        log.clone(),
    )
    .unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let services = Services {
        memory: GuestMemoryAtomic::new(memory),
        ioeventfds: attached.clone(),
        resuming: Arc::default(),
        log,
    };
    let handle = handles.remove(0);
    let function = VirtioPci::new(&description, handle, interrupt, services, BASE, false).unwrap();
    Setup {
        function,
        given,
        routes,
        attached,
        _worker: worker,
    }
}

fn status(function: &VirtioPci) -> u8 {
    let mut status = [0u8];
    function.bar_read(0, 0x14, &mut status);
    status[0]
}

fn put(function: &VirtioPci, offset: u64, bytes: &[u8]) {
    function.bar_write(0, offset, bytes);
}

/// Enables MSI-X with every vector unmasked, negotiates and sets DRIVER_OK.
fn drive(function: &VirtioPci) {
    let msix = function.layout.msix;
    for vector in 0..3u64 {
        let entry = capability::TABLE + vector * ENTRY_SIZE;
        put(function, entry, &0xfee0_0000u64.to_le_bytes());
        put(function, entry + 8, &(0x30 + vector).to_le_bytes());
    }
    function.config_write(msix + 2, &0x8000u16.to_le_bytes());
    put(function, 0x14, &[1]);
    put(function, 0x14, &[3]);
    put(function, 0x08, &1u32.to_le_bytes());
    put(function, 0x0c, &1u32.to_le_bytes());
    put(function, 0x14, &[11]);
    put(function, 0x10, &0u16.to_le_bytes());
    for queue in 0..2u16 {
        put(function, 0x16, &queue.to_le_bytes());
        put(function, 0x1a, &(queue + 1).to_le_bytes());
        for (register, address) in [(0x20, 0x1000u64), (0x28, 0x2000), (0x30, 0x3000)] {
            let address = address + u64::from(queue) * 0x4000;
            put(function, register, &address.to_le_bytes());
        }
        put(function, 0x1c, &1u16.to_le_bytes());
    }
    put(function, 0x14, &[15]);
}

#[test]
fn a_driven_device_gets_its_queues_and_interrupts_through_the_right_vectors() {
    let setup = setup(false, None);
    drive(&setup.function);
    let given = setup.given.recv_timeout(PATIENCE).unwrap();
    assert_eq!(given.queues.len(), 2);
    assert_eq!(given.features, VERSION_1);
    assert_eq!(status(&setup.function), 15);
    given.interrupt.queue(1).unwrap();
    given.interrupt.config().unwrap();
    let counts: Vec<bool> = lock(&setup.routes.triggers)
        .iter()
        .map(|trigger| trigger.read().is_ok())
        .collect();
    assert_eq!(
        counts,
        [true, false, true],
        "configuration, queue 0, queue 1"
    );
    let mut isr = [0u8];
    setup.function.bar_read(0, capability::ISR, &mut isr);
    assert_eq!(isr, [2]);
    setup.function.bar_read(0, capability::ISR, &mut isr);
    assert_eq!(isr, [0]);
    // A notification that no ioeventfd took reaches the queue's event.
    put(&setup.function, capability::NOTIFY + 4, &1u16.to_le_bytes());
    assert_eq!(given.queues[1].kick.read().unwrap(), 1);
    put(&setup.function, capability::NOTIFY + 0xff0, &[0; 2]);
}

#[test]
fn a_device_that_fails_shows_needs_reset_and_works_after_a_reset() {
    let setup = setup(true, None);
    drive(&setup.function);
    setup.given.recv_timeout(PATIENCE).unwrap();
    // The interrupt for the change follows the status.
    let deadline = std::time::Instant::now() + PATIENCE;
    let interrupted = || {
        lock(&setup.routes.triggers)
            .first()
            .is_some_and(|trigger| trigger.read().is_ok())
    };
    while !interrupted() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert_eq!(status(&setup.function), 15 | 0x40);
    put(&setup.function, 0x14, &[0]);
    assert_eq!(status(&setup.function), 0);
    drive(&setup.function);
    setup.given.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn queues_outside_memory_need_a_reset_and_never_reach_the_device() {
    let setup = setup(false, None);
    let function = &setup.function;
    put(function, 0x08, &1u32.to_le_bytes());
    put(function, 0x0c, &1u32.to_le_bytes());
    put(function, 0x14, &[11]);
    put(function, 0x20, &0x10_0000u64.to_le_bytes());
    put(function, 0x1c, &1u16.to_le_bytes());
    put(function, 0x14, &[15]);
    assert_eq!(status(function), 15 | 0x40);
    assert!(setup.given.try_recv().is_err());
}

#[test]
fn a_device_that_is_slow_to_reset_keeps_the_status_until_it_is_done() {
    let (open, gate) = mpsc::channel();
    let setup = setup(false, Some(gate));
    drive(&setup.function);
    setup.given.recv_timeout(PATIENCE).unwrap();
    put(&setup.function, 0x14, &[0]);
    assert_ne!(status(&setup.function), 0);
    // Nothing is taken meanwhile, not even another DRIVER_OK.
    drive(&setup.function);
    assert!(setup.given.try_recv().is_err());
    open.send(()).unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    while status(&setup.function) != 0 {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    // Lets the worker stop at the end.
    open.send(()).unwrap();
}

#[test]
fn ioeventfds_follow_the_bar() {
    let setup = setup(false, None);
    let at = |base: u64| vec![base + capability::NOTIFY, base + capability::NOTIFY + 4];
    setup.function.bar_moved(0, None, Some(BASE));
    assert_eq!(*lock(&setup.attached.0), at(BASE));
    setup.function.bar_moved(0, Some(BASE), Some(BASE * 2));
    assert_eq!(*lock(&setup.attached.0), at(BASE * 2));
    setup.function.bar_moved(0, Some(BASE * 2), None);
    assert!(lock(&setup.attached.0).is_empty());
}

#[test]
fn registers_are_reachable_through_configuration_space() {
    let setup = setup(false, None);
    let window = setup.function.layout.window;
    let select = |offset: u64, length: u32| {
        let offset = u32::try_from(offset).unwrap();
        setup
            .function
            .config_write(window + 8, &offset.to_le_bytes());
        setup
            .function
            .config_write(window + 12, &length.to_le_bytes());
    };
    select(capability::DEVICE, 2);
    let mut data = [0u8; 4];
    setup.function.config_read(window + 16, &mut data);
    assert_eq!(data[..2], [0xaa, 0xbb]);
    select(0x14, 1);
    setup.function.config_write(window + 16, &[1, 0, 0, 0]);
    assert_eq!(status(&setup.function), 1);
    // A length that is no register's is ignored.
    select(0x14, 3);
    setup.function.config_write(window + 16, &[3, 0, 0, 0]);
    assert_eq!(status(&setup.function), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_accesses_by_a_guest_are_harmless(
        accesses in prop::collection::vec(
            (any::<bool>(), any::<bool>(), any::<u16>(), 1usize..9, any::<u64>()), 0..200)
    ) {
        let setup = setup(false, None);
        for (config, write, offset, length, value) in accesses {
            let bytes = value.to_le_bytes();
            if config {
                let offset = offset % 248;
                if write {
                    setup.function.config_write(offset, &bytes[..length]);
                } else {
                    setup.function.config_read(offset, &mut [0; 8][..length]);
                }
                prop_assert!(setup.function.decoded().len() <= 1);
            } else {
                // Mostly where the registers are.
                let offset = if value & 1 == 0 { offset % 0x40 } else { offset % 0x8000 };
                if write {
                    setup.function.bar_write(0, offset.into(), &bytes[..length]);
                } else {
                    setup.function.bar_read(0, offset.into(), &mut [0; 8][..length]);
                }
            }
        }
        while let Ok(given) = setup.given.try_recv() {
            let memory = vm_memory::GuestAddressSpace::memory(&given.memory);
            for queue in given.queues {
                prop_assert!(QueueT::is_valid(&queue.queue, &*memory));
            }
        }
    }
}

/// The function behind a bus of its own, which reaches it at [`BASE`].
struct OnBus {
    bus: Bus,
    given: Receiver<Activation>,
    memory: GuestMemory,
    resuming: Arc<AtomicBool>,
    _worker: Worker,
}

fn on_bus() -> OnBus {
    let Setup {
        function,
        given,
        _worker,
        ..
    } = setup(false, None);
    let memory = function.services.memory.clone();
    let resuming = Arc::clone(&function.services.resuming);
    let bus = Bus::new(vec![layout::MMIO32]);
    bus.add(Arc::new(function)).unwrap();
    OnBus {
        bus,
        given,
        memory,
        resuming,
        _worker,
    }
}

impl OnBus {
    fn put(&self, offset: u64, bytes: &[u8]) {
        assert!(self.bus.memory_write(BASE + offset, bytes));
    }

    /// As [`drive`], through the bus.
    fn drive(&self) {
        self.bus.ecam_write(4, &6u16.to_le_bytes());
        for vector in 0..3u64 {
            let entry = capability::TABLE + vector * ENTRY_SIZE;
            self.put(entry, &0xfee0_0000u64.to_le_bytes());
            self.put(entry + 8, &(0x30 + vector).to_le_bytes());
        }
        self.put(0x14, &[1]);
        self.put(0x14, &[3]);
        self.put(0x08, &1u32.to_le_bytes());
        self.put(0x0c, &1u32.to_le_bytes());
        self.put(0x14, &[11]);
        self.put(0x10, &2u16.to_le_bytes());
        self.put(0x16, &1u16.to_le_bytes());
        self.put(0x18, &16u16.to_le_bytes());
        self.put(0x1a, &1u16.to_le_bytes());
        for (register, address) in [(0x20, 0x1000u64), (0x28, 0x2000), (0x30, 0x3000)] {
            self.put(register, &address.to_le_bytes());
        }
        self.put(0x1c, &1u16.to_le_bytes());
        self.put(0x14, &[15]);
    }

    /// The ring indices that driver and device have left in memory.
    fn rings(&self, available: u16, used: u16) {
        use vm_memory::{Bytes as _, GuestAddressSpace as _};
        let memory = self.memory.memory();
        memory.write_obj(available, GuestAddress(0x2002)).unwrap();
        memory.write_obj(used, GuestAddress(0x3002)).unwrap();
    }
}

#[test]
fn what_is_recorded_of_a_function_in_use_brings_a_fresh_one_there_and_its_queue_goes_on() {
    let captured = on_bus();
    captured.drive();
    captured.given.recv_timeout(PATIENCE).unwrap();
    let writes = registers::record(&captured.bus, 1).unwrap();
    assert_eq!(writes, registers::record(&captured.bus, 1).unwrap());

    for waiting in [0, 3] {
        let clone = on_bus();
        clone.rings(0xfffe_u16.wrapping_add(waiting), 0xfffe);
        clone.resuming.store(true, Ordering::Release);
        registers::replay(&clone.bus, 1, &writes).unwrap();
        let mut given = clone.given.recv_timeout(PATIENCE).unwrap();
        let queue = given.queues.pop().unwrap();
        assert!(given.queues.is_empty());
        assert_eq!((queue.index, queue.queue.size()), (1, 16));
        assert_eq!(queue.queue.next_avail(), 0xfffe);
        assert_eq!(queue.queue.next_used(), 0xfffe);
        assert_eq!(queue.kick.read().is_ok(), waiting > 0, "{waiting} wait");
        assert_eq!(registers::record(&clone.bus, 1).unwrap(), writes);
    }
}

#[test]
fn a_driver_that_starts_anew_starts_at_the_beginning_whatever_lies_in_its_rings() {
    let fresh = on_bus();
    fresh.rings(9, 7);
    fresh.drive();
    let given = fresh.given.recv_timeout(PATIENCE).unwrap();
    assert_eq!(given.queues[0].queue.next_avail(), 0);
    assert_eq!(given.queues[0].queue.next_used(), 0);
}

#[test]
fn functions_that_are_not_at_rest_or_not_the_same_are_refused() {
    let half = on_bus();
    half.bus.ecam_write(4, &6u16.to_le_bytes());
    half.put(0x14, &[3]);
    let error = registers::record(&half.bus, 1).unwrap_err().to_string();
    assert!(error.contains("come to rest"), "{error}");

    let captured = on_bus();
    captured.drive();
    captured.given.recv_timeout(PATIENCE).unwrap();
    let writes = registers::record(&captured.bus, 1).unwrap();
    let empty = Bus::new(vec![layout::MMIO32]);
    assert!(registers::replay(&empty, 1, &writes).is_err());
    registers::reset(&captured.bus, 1);
    assert_ne!(registers::record(&captured.bus, 1).unwrap(), writes);
}
