//! A guest that owns a device's configuration space, its BARs and its table of interrupts, and keeps to no rule: what it
//! may reach, in any order of accesses. Against stand-ins for two devices, the second behind a root port.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use slog::{Discard, Logger, o};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::bars::MemorySlots;
use super::dma::GuestDma;
use super::function::{PassedThrough, Prepared};
use super::owner::{self, Owner};
use super::testing::{MappedSpace, Mock, Record};
use crate::pci::Function;
use crate::pci::bus::Bus;
use crate::pci::msix::fake::FakeRoutes;
use crate::pci::root_port::RootPort;
use crate::reclaim::Reclaim;
use crate::sync::lock;
use crate::virtio::GuestMemory;

const LOW: std::ops::Range<u64> = 0xc000_0000..0xe000_0000;
const HIGH: std::ops::Range<u64> = 0x10_0000_0000..0x10_0010_0000;
/// The table of the stand-in is here in its BAR 0, one page of it.
const TABLE: std::ops::Range<u64> = 0x2000..0x3000;
const BAR_SIZE: u64 = 0x4000;

/// KVM's: none over another.
#[derive(Default)]
struct Slots(Mutex<Vec<(u32, u64, u64)>>);

impl MemorySlots for Slots {
    unsafe fn set(&self, guest: u64, size: u64, _: u64) -> std::io::Result<u32> {
        let mut slots = lock(&self.0);
        let meets = |(_, at, length): &(u32, u64, u64)| *at < guest + size && guest < at + length;
        if slots.iter().any(meets) {
            return Err(std::io::Error::from_raw_os_error(libc::EEXIST));
        }
        let free = |slot: &u32| slots.iter().all(|(other, ..)| other != slot);
        let slot = (7..).find(free).unwrap_or(u32::MAX);
        slots.push((slot, guest, size));
        Ok(slot)
    }
    fn clear(&self, slot: u32) {
        lock(&self.0).retain(|(other, ..)| *other != slot);
    }
}

/// Bytes of the guest's memory, from 0.
const RAM: u64 = 1 << 20;

fn guest_dma(space: &Arc<MappedSpace>) -> Arc<GuestDma> {
    let ranges = [(GuestAddress(0), usize::try_from(RAM).unwrap())];
    let memory = GuestMemory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let dma = GuestDma::new(
        space.clone(),
        &memory,
        &Arc::new(Reclaim::default()),
        None,
        |part| vec![part],
    );
    Arc::new(dma.unwrap())
}

struct Machine {
    bus: Bus,
    /// The number of the port, and of the bus behind it until the guest gives it another.
    port: (u8, u8),
    slots: Arc<Slots>,
    space: Arc<MappedSpace>,
    devices: Vec<(Arc<Record>, Owner)>,
}

impl Machine {
    fn new() -> Self {
        let bus = Bus::new(vec![LOW, HIGH]);
        let slots = Arc::<Slots>::default();
        let space = Arc::<MappedSpace>::default();
        let dma = guest_dma(&space);
        let mut devices = Vec::new();
        let devfn = bus.reserve().unwrap();
        let port = (devfn, devfn >> 3);
        for number in 0..2u64 {
            let record = Arc::new(Record::default());
            let mock = Mock::nvme(Arc::clone(&record));
            let mut prepared = Prepared::new(&mock, Arc::<Slots>::clone(&slots)).unwrap();
            let bar = prepared.bars()[0];
            prepared.place(bar, HIGH.start + number * BAR_SIZE);
            let (owner, orders) = owner::pair();
            let held = Arc::clone(&dma);
            std::thread::spawn(move || orders.serve(Box::new(mock), held));
            let function = PassedThrough::new(
                format!("0000:0{number}:00.0"),
                prepared,
                owner.clone(),
                Arc::new(FakeRoutes::default()),
                Logger::root(Discard, o!()),
            )
            .beside(Arc::downgrade(&dma));
            let function: Arc<dyn Function> = Arc::new(function);
            if number == 0 {
                bus.add(function).unwrap();
            } else {
                bus.fill(port.0, Arc::new(RootPort::above(function, port.1)));
            }
            devices.push((record, owner));
        }
        Self {
            bus,
            port,
            slots,
            space,
            devices,
        }
    }

    /// A write to the configuration of a device, or of the port (2).
    fn configure(&self, function: u64, at: u64, data: &[u8]) {
        self.bus.ecam_write(self.place(function) | at, data);
    }

    /// Where in ECAM its configuration is.
    fn place(&self, function: u64) -> u64 {
        match function {
            0 => 0,
            1 => u64::from(self.port.1) << 20,
            _ => u64::from(self.port.0) << 12,
        }
    }

    /// Takes a device from the bus, the second with its port.
    fn take(&self, device: u8) {
        let devfn = if device == 0 { 0 } else { self.port.0 };
        drop(self.bus.remove(devfn));
        self.devices[usize::from(device)].1.retire(Box::new(|| ()));
    }

    /// What must hold after every access.
    fn check(&self) -> Result<(), TestCaseError> {
        for (_, at, size) in lock(&self.slots.0).iter() {
            let inside =
                |window: &std::ops::Range<u64>| window.start <= *at && at + size <= window.end;
            prop_assert!(inside(&LOW) || inside(&HIGH), "a slot at {at:#x}");
            // The guest's table is never the device's.
            prop_assert!(*size == TABLE.start || *size == BAR_SIZE - TABLE.end);
        }
        // What devices reach: the guest's memory, and no more of each other than the guest does.
        for (_, owner) in &self.devices {
            owner.ask(|_| ());
        }
        for (at, size) in self.space.all() {
            if at == 0 {
                prop_assert_eq!(size, RAM);
                continue;
            }
            let inside =
                |window: &std::ops::Range<u64>| window.start <= at && at + size <= window.end;
            prop_assert!(inside(&LOW) || inside(&HIGH), "a mapping at {at:#x}");
            prop_assert!(size == TABLE.start || size == BAR_SIZE - TABLE.end);
        }
        for (record, _) in &self.devices {
            for entry in record.all() {
                let Some((region, at, bytes)) = written(&entry) else {
                    continue;
                };
                match region {
                    0 => prop_assert!(
                        !(TABLE.start..TABLE.start + 65 * 16).contains(&at),
                        "{entry}"
                    ),
                    7 => prop_assert!(may_reach(at, &bytes), "{entry}"),
                    _ => prop_assert!(false, "{entry}"),
                }
            }
        }
        Ok(())
    }
}

/// Region, place and bytes of an entry of the record that is a write.
fn written(entry: &str) -> Option<(u32, u64, Vec<u8>)> {
    let rest = entry.strip_prefix("write ")?;
    let (region, rest) = rest.split_once(' ')?;
    let (at, bytes) = rest.split_once(' ')?;
    let bytes = bytes.trim_matches(['[', ']']).split(", ");
    Some((
        region.parse().ok()?,
        u64::from_str_radix(at.strip_prefix("0x")?, 16).ok()?,
        bytes
            .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
            .collect(),
    ))
}

/// Whether a write may reach the configuration space of the stand-in.
fn may_reach(at: u64, bytes: &[u8]) -> bool {
    if at == 4 && bytes.len() == 2 {
        // It always decodes memory and never uses INTx.
        return bytes[0] & 0b11 == 0b10 && bytes[1] & 0b100 != 0;
    }
    let end = at + bytes.len() as u64;
    let ours = [
        (0x04, 0x06), // the command, but as above
        (0x0e, 0x28), // the header's type and the BARs
        (0x30, 0x35), // the ROM and the list's start
        (0x3c, 0x3e), // the line and the pin
        (0x40, 0x4c), // MSI-X
        (0x63, 0x66), // power
        (0x70, 0x7e), // MSI
    ];
    ours.iter()
        .all(|(start, stop)| end <= *start || *stop <= at)
}

/// One access.
#[derive(Clone, Debug)]
enum Access {
    Config {
        function: u64,
        at: u64,
        data: Vec<u8>,
    },
    Memory {
        address: u64,
        data: Vec<u8>,
    },
    Gone(u8),
}

fn addresses() -> impl Strategy<Value = u64> {
    prop_oneof![
        // RAM, the table of interrupt messages, ECAM, the ends of the windows, each other.
        Just(0u64),
        Just(0xfee0_0000),
        Just(0xe000_0000),
        Just(LOW.end - 0x1000),
        Just(HIGH.end - 0x1000),
        Just(u64::MAX),
        (0u64..64).prop_map(|page| HIGH.start + page * 0x1000),
        (0u64..64).prop_map(|page| LOW.start + page * 0x1000),
        any::<u64>(),
    ]
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    let any = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)]
        .prop_flat_map(|length| prop::collection::vec(any::<u8>(), length));
    prop_oneof![
        any,
        addresses().prop_map(|address| address.to_le_bytes()[..4].to_vec())
    ]
}

fn access() -> impl Strategy<Value = Access> {
    let config = (0u64..3, 0u64..256, data()).prop_map(|(function, at, data)| Access::Config {
        function,
        at,
        data,
    });
    // Whole BARs and commands, which chance alone seldom writes.
    let moved = (0u64..2, addresses(), any::<bool>()).prop_map(|(function, address, high)| {
        let bytes = address.to_le_bytes();
        Access::Config {
            function,
            at: if high { 0x14 } else { 0x10 },
            data: if high { &bytes[4..] } else { &bytes[..4] }.to_vec(),
        }
    });
    let command = (0u64..2, any::<u8>()).prop_map(|(function, byte)| Access::Config {
        function,
        at: 4,
        data: vec![byte, 0xff],
    });
    let interrupts = (
        0u64..2,
        prop_oneof![Just(0x42u64), Just(0x43), Just(0x72)],
        data(),
    )
        .prop_map(|(function, at, data)| Access::Config { function, at, data });
    // Bridge control, with the reset of what is behind.
    let reset = any::<u8>().prop_map(|byte| Access::Config {
        function: 2,
        at: 0x3e,
        data: vec![byte],
    });
    let memory = (0u64..2 * BAR_SIZE, data()).prop_map(|(offset, data)| Access::Memory {
        address: HIGH.start + offset,
        data,
    });
    prop_oneof![
        4 => config,
        4 => moved,
        3 => command,
        2 => interrupts,
        2 => reset,
        4 => memory,
        1 => addresses().prop_map(|address| Access::Memory { address, data: vec![0xff; 4] }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn nothing_but_the_device_is_reached_and_it_serves_a_driver_that_keeps_to_the_rules(
        accesses in prop::collection::vec(access(), 1..80), gone in prop::option::weighted(0.2, 0u8..2)
    ) {
        let machine = Machine::new();
        let accesses = accesses.into_iter().chain(gone.map(Access::Gone));
        for access in accesses {
            match access {
                Access::Config { function, at, data } => machine.configure(function, at, &data),
                Access::Memory { address, data } => {
                    machine.bus.memory_write(address, &data);
                    let mut read = vec![0; data.len()];
                    machine.bus.memory_read(address, &mut read);
                }
                Access::Gone(device) => machine.take(device),
            }
            machine.check()?;
        }
        machine.configure(2, 0x19, &[machine.port.1]);
        for device in (0..2u64).filter(|device| Some(*device) != gone.map(u64::from)) {
            let place = HIGH.start + 0x8_0000 + device * BAR_SIZE;
            let write = |at: u64, data: &[u8]| machine.configure(device, at, data);
            write(4, &[0, 0]);
            write(0x10, &place.to_le_bytes()[..4]);
            write(0x14, &place.to_le_bytes()[4..]);
            write(0x43, &[0]);
            machine.bus.memory_write(place + TABLE.start + 12, &[1, 0, 0, 0]);
        }
        // The other one's place is its own only once both are where they should be.
        for device in (0..2u64).filter(|device| Some(*device) != gone.map(u64::from)) {
            let place = HIGH.start + 0x8_0000 + device * BAR_SIZE;
            machine.configure(device, 4, &[6, 0]);
            let mut read = [0; 4];
            machine.bus.memory_read(place + 0x2800, &mut read);
            prop_assert_eq!(read, [0xdd; 4]);
            let mut id = [0; 4];
            machine.bus.ecam_read(machine.place(device), &mut id);
            prop_assert_eq!(id, [0x36, 0x1b, 0x10, 0]);
            let slots = lock(&machine.slots.0);
            prop_assert!(slots.iter().any(|(_, at, _)| *at == place), "it is mapped");
        }
        machine.check()?;
        // Each reaches the other where the guest has put it; one that is alone has nobody to reach it.
        let of_devices = machine.space.all().into_iter().filter(|(at, _)| *at != 0).count();
        prop_assert_eq!(of_devices, if gone.is_some() { 0 } else { 4 });
    }
}
