//! As many functions as a bus has room for, of the VM's own devices and of the node's, that come and go while the others
//! work. Against stand-ins.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use slog::{Discard, Logger, o};

use super::bars::MemorySlots;
use super::config::Bar;
use super::function::{PassedThrough, Prepared};
use super::owner::{self, Owner};
use super::testing::{Mock, Record};
use crate::pci::bus::{Bus, FUNCTIONS};
use crate::pci::msix::fake::FakeRoutes;
use crate::pci::window::Window;
use crate::pci::{BarRange, Function};
use crate::sync::lock;

const WINDOW: std::ops::Range<u64> = 0x10_0000_0000..0x10_1000_0000;
/// Slots for devices of the node, and functions beside them.
const SLOTS: usize = 24;
const OTHERS: usize = FUNCTIONS - SLOTS * 8;

#[derive(Default)]
struct Slots(Mutex<BTreeMap<u32, u64>>);

impl MemorySlots for Slots {
    unsafe fn set(&self, guest: u64, _: u64, _: u64) -> io::Result<u32> {
        let mut slots = lock(&self.0);
        let free = (0..).find(|slot| !slots.contains_key(slot)).unwrap();
        slots.insert(free, guest);
        Ok(free)
    }
    fn clear(&self, slot: u32) {
        lock(&self.0).remove(&slot).unwrap();
    }
}

/// A function of the VM's own: one register.
struct Own(AtomicU64);

impl Function for Own {
    fn config_read(&self, _: u16, data: &mut [u8]) {
        data.copy_from_slice(&self.0.load(Ordering::Relaxed).to_le_bytes()[..data.len()]);
    }
    fn config_write(&self, _: u16, data: &[u8]) {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        self.0.store(u64::from_le_bytes(value), Ordering::Relaxed);
    }
    fn config_image(&self) -> [u8; 256] {
        [0; 256]
    }
    fn decoded(&self) -> Vec<BarRange> {
        Vec::new()
    }
    fn bar_read(&self, _: u8, _: u64, _: &mut [u8]) {}
    fn bar_write(&self, _: u8, _: u64, _: &[u8]) {}
    fn bar_moved(&self, _: u8, _: Option<u64>, _: Option<u64>) {}
}

/// Where its BAR is, what was asked of it, and its thread.
type Given = (u64, Arc<Record>, Owner);

struct Machine {
    bus: Bus,
    slots: Arc<Slots>,
    window: Mutex<Window>,
    /// Devices of the node, by function.
    given: Mutex<BTreeMap<u8, Given>>,
}

impl Machine {
    fn new() -> Self {
        Self {
            bus: Bus::new(vec![WINDOW]),
            slots: Arc::default(),
            window: Mutex::new(Window::new(WINDOW)),
            given: Mutex::default(),
        }
    }

    /// As the board does it: the slot first, then the device, then its place.
    fn give(&self) -> Result<u8, String> {
        let devfn = self.bus.reserve().map_err(|error| error.to_string())?;
        let record = Arc::new(Record::default());
        let mock = Mock::nvme(Arc::clone(&record));
        let slots: Arc<dyn MemorySlots> = self.slots.clone();
        let mut prepared = Prepared::new(&mock, slots).unwrap();
        let bar: Bar = prepared.bars()[0];
        let base = lock(&self.window).allocate(bar.size).unwrap();
        prepared.place(bar, base);
        let (owner, orders) = owner::pair();
        thread::spawn(move || orders.serve(Box::new(mock), ()));
        let routes = Arc::new(FakeRoutes::default());
        let log = Logger::root(Discard, o!());
        let function = PassedThrough::new(format!("{devfn}"), prepared, owner.clone(), routes, log);
        self.bus.fill(devfn, Arc::new(function));
        lock(&self.given).insert(devfn, (base, record, owner));
        // The guest's driver: memory is decoded, one vector is unmasked, interrupts are on.
        self.bus.ecam_write(u64::from(devfn) << 12 | 4, &[6, 0]);
        self.bus.memory_write(base + 0x200c, &[0; 4]);
        self.bus.ecam_write(u64::from(devfn) << 12 | 0x43, &[0x80]);
        Ok(devfn)
    }

    fn take(&self, devfn: u8) -> Arc<Record> {
        let (base, record, owner) = lock(&self.given).remove(&devfn).unwrap();
        drop(self.bus.remove(devfn).unwrap());
        let (told, gone) = std::sync::mpsc::channel();
        owner.retire(Box::new(move || told.send(()).unwrap()));
        gone.recv().unwrap();
        lock(&self.window).free(base);
        self.bus.release(devfn);
        record
    }

    /// Registers of a device that works: its own, by configuration space and by a page that is not mapped.
    fn works(&self, devfn: u8, base: u64) -> bool {
        let (mut id, mut register) = ([0; 4], [0; 4]);
        self.bus.ecam_read(u64::from(devfn) << 12, &mut id);
        self.bus.memory_read(base + 0x2800, &mut register);
        id == [0x36, 0x1b, 0x10, 0] && register == [0xdd; 4]
    }
}

#[test]
fn functions_come_until_slots_run_out_and_go_while_the_others_work() {
    let machine = Machine::new();
    for number in 0..OTHERS {
        let own = Own(AtomicU64::new(number as u64));
        assert_eq!(usize::from(machine.bus.add(Arc::new(own)).unwrap()), number);
    }
    let all: Vec<u8> = (0..SLOTS).map(|_| machine.give().unwrap()).collect();
    let refused = machine.give().unwrap_err();
    assert!(
        refused.contains("of the 24 for them none is free"),
        "{refused}"
    );
    let more = machine
        .bus
        .add(Arc::new(Own(AtomicU64::new(0))))
        .unwrap_err();
    assert!(more.to_string().contains("all 256 functions"), "{more}");
    // Two mapped parts each.
    assert_eq!(lock(&machine.slots.0).len(), 2 * SLOTS);

    let places: Vec<(u8, u64)> = all
        .iter()
        .map(|devfn| (*devfn, lock(&machine.given)[devfn].0))
        .collect();
    let (stay, go): (Vec<_>, Vec<_>) = places.iter().partition(|(devfn, _)| devfn >> 3 & 1 == 0);
    let ended = AtomicBool::new(false);
    let accesses = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                for (devfn, base) in &stay {
                    assert!(machine.works(*devfn, *base), "{devfn}");
                    // It masks and unmasks, as a driver does all the time.
                    machine.bus.memory_write(base + 0x200c, &[1, 0, 0, 0]);
                    machine.bus.memory_write(base + 0x200c, &[0; 4]);
                    accesses.fetch_add(1, Ordering::Relaxed);
                }
                for own in 0..OTHERS as u64 {
                    let mut value = [0; 8];
                    machine.bus.ecam_write(own << 12, &own.to_le_bytes());
                    machine.bus.ecam_read(own << 12, &mut value);
                    assert_eq!(u64::from_le_bytes(value), own);
                }
            }
        });
        let mut going: Vec<u8> = go.iter().map(|(devfn, _)| *devfn).collect();
        for _ in 0..8 {
            for devfn in going.drain(..) {
                let record = machine.take(devfn).all();
                // Reset on its way out, and closed after what was mapped of it.
                assert_eq!(
                    record.last().map(String::as_str),
                    Some("closed"),
                    "{record:?}"
                );
                assert_eq!(
                    record
                        .iter()
                        .filter(|entry| entry.starts_with("unmapped"))
                        .count(),
                    2
                );
                assert_eq!(record.iter().filter(|entry| *entry == "reset").count(), 2);
            }
            assert_eq!(lock(&machine.slots.0).len(), 2 * stay.len());
            going.extend((0..go.len()).map(|_| machine.give().unwrap()));
            assert!(machine.give().is_err());
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert!(accesses.load(Ordering::Relaxed) > 0);
    for (devfn, (base, ..)) in &*lock(&machine.given) {
        assert!(machine.works(*devfn, *base), "{devfn}");
    }
    let last: Vec<u8> = lock(&machine.given).keys().copied().collect();
    for devfn in last {
        machine.take(devfn);
    }
    assert!(lock(&machine.slots.0).is_empty());
    // The whole window is free again.
    assert_eq!(
        lock(&machine.window).allocate(WINDOW.end - WINDOW.start),
        Ok(WINDOW.start)
    );
}
