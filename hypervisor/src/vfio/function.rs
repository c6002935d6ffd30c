//! A passed-through device on the guest's bus.
//!
//! All accesses come from the guest. What is not answered here goes to the device through its own thread.

use std::io;
use std::sync::{Arc, Mutex, Weak};

use slog::{Logger, info, warn};

use super::bars::{MappedBars, MemorySlots};
use super::config::{self, Bar, FilteredConfig, MsixCapability, Written};
use super::device::{CONFIG_REGION, Device, Kind, Region, Vectors};
use super::dma::GuestDma;
use super::interrupts::Interrupts;
use super::owner::Owner;
use crate::pci::config::{COMMAND, SIZE};
use crate::pci::msix::{ENTRY_SIZE, Routes};
use crate::pci::{BarRange, Function};
use crate::sync::lock;

/// What is known of a device once it has been reset and read; made on its own thread.
pub struct Prepared {
    config: FilteredConfig,
    bars: MappedBars,
    /// The interrupts that the guest may use.
    kind: Option<(Kind, Vectors)>,
    wants_port: bool,
}

impl Prepared {
    /// Resets the device, reads it and maps its BARs.
    ///
    /// # Errors
    /// If it cannot be passed through, or the kernel refuses.
    pub fn new(device: &dyn Device, slots: Arc<dyn MemorySlots>) -> io::Result<Self> {
        // One without a reset of its own was reset by the kernel when the shim opened it, if it can be.
        let _ = device.reset();
        let mut space = [0; SIZE];
        device.read(CONFIG_REGION, 0, &mut space)?;
        let mut regions: [Region; 6] = Default::default();
        for (index, region) in (0u32..).zip(&mut regions) {
            *region = device.region(index)?;
        }
        let mut config = FilteredConfig::new(&space, &regions)?;
        let kind = interrupts(device, &mut config)?;
        let command = config.device_command().to_le_bytes();
        device.write(CONFIG_REGION, COMMAND.into(), &command)?;
        let bars = MappedBars::new(device, &config.bars, &regions, config.msix, slots)?;
        Ok(Self {
            config,
            bars,
            kind,
            wants_port: config::wants_port(&space),
        })
    }

    /// Its BARs, each to be put somewhere.
    #[must_use]
    pub fn bars(&self) -> &[Bar] {
        &self.config.bars
    }

    /// Interrupt vectors that a driver may ask for.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.kind.map_or(0, |(_, vectors)| vectors.count)
    }

    /// It is to be behind a root port.
    #[must_use]
    pub fn wants_port(&self) -> bool {
        self.wants_port
    }

    /// Puts a BAR at an address.
    pub fn place(&mut self, bar: Bar, base: u64) {
        self.config.place(bar, base);
    }
}

/// MSI-X where there is any, else MSI: one of them is shown.
fn interrupts(
    device: &dyn Device,
    config: &mut FilteredConfig,
) -> io::Result<Option<(Kind, Vectors)>> {
    if let Some(msix) = config.msix {
        let mut vectors = device.vectors(Kind::Msix)?;
        vectors.count = vectors.count.min(msix.count);
        return Ok(Some((Kind::Msix, vectors)));
    }
    if let Some(msi) = config.msi {
        let mut vectors = device.vectors(Kind::Msi)?;
        vectors.count = vectors.count.min(msi.count);
        return Ok(Some((Kind::Msi, vectors)));
    }
    Ok(None)
}

/// The function.
pub struct PassedThrough {
    /// Where it is on the node, for the log.
    name: String,
    config: Mutex<FilteredConfig>,
    bars: MappedBars,
    kind: Option<Kind>,
    interrupts: Option<Interrupts>,
    msix: Option<MsixCapability>,
    owner: Owner,
    /// Where the VM's other devices reach its BARs.
    dma: Weak<GuestDma>,
    log: Logger,
}

impl PassedThrough {
    /// The function of a prepared device that `owner` has.
    #[must_use]
    pub fn new(
        name: String,
        prepared: Prepared,
        owner: Owner,
        routes: Arc<dyn Routes>,
        log: Logger,
    ) -> Self {
        let Prepared {
            config, bars, kind, ..
        } = prepared;
        let made =
            kind.map(|(kind, vectors)| Interrupts::new(kind, vectors, owner.clone(), routes));
        Self {
            name,
            msix: config.msix,
            config: Mutex::new(config),
            bars,
            kind: kind.map(|(kind, _)| kind),
            interrupts: made,
            owner,
            dma: Weak::new(),
            log,
        }
    }

    /// It is in the address space of the VM's devices.
    #[must_use]
    pub fn beside(mut self, dma: Weak<GuestDma>) -> Self {
        self.dma = dma;
        self
    }

    /// Takes a BAR from the VM's other devices. It is not mapped for them any more when this returns, so that what was
    /// behind it can be somebody else's.
    fn hide(&self, bar: u8) {
        let (dma, name) = (Weak::clone(&self.dma), self.name.clone());
        self.owner.ask(move |_| {
            let dma = dma.upgrade();
            // Nothing is mapped, so nothing is refused.
            dma.map(|dma| dma.peers().moved(&name, bar, &[]))
        });
    }

    /// Lets the VM's other devices reach a BAR at `base`. Nobody waits: a large one takes its time.
    fn show(&self, bar: u8, base: u64) {
        let placed = self.bars.placed(bar, base);
        let (dma, name, log) = (Weak::clone(&self.dma), self.name.clone(), self.log.clone());
        self.owner.tell(move |_| {
            let Some(dma) = dma.upgrade() else { return };
            if let Err(error) = dma.peers().moved(&name, bar, &placed) {
                info!(log, "the pod's devices do not reach each other's memory"; "device" => name, "error" => %error);
            }
        });
    }

    fn report(&self, what: &str, result: io::Result<()>) {
        if let Err(error) = result {
            warn!(self.log, "the device refused"; "device" => &self.name, "what" => what, "error" => %error);
        }
    }

    fn follow(&self, config: &FilteredConfig, written: Written) {
        if let Some(command) = written.command {
            self.write_command(command);
        }
        let Some(interrupts) = &self.interrupts else {
            return;
        };
        let result = match self.kind {
            Some(Kind::Msix) if written.msix => {
                let (enabled, masked) = config.msix_control();
                interrupts.control(enabled, masked)
            }
            Some(Kind::Msi) if written.msi => interrupts.messages(config.msi_messages()),
            _ => Ok(()),
        };
        self.report("interrupts", result);
    }

    fn write_command(&self, command: u16) {
        self.write_device(CONFIG_REGION, COMMAND.into(), &command.to_le_bytes());
    }

    fn write_device(&self, region: u32, offset: u64, data: &[u8]) {
        let data = data.to_vec();
        let result = self
            .owner
            .try_ask(move |device| device.write(region, offset, &data));
        self.report("a write", result);
    }

    /// A device that does not answer reads as all ones, as on any bus.
    fn read_device(&self, region: u32, offset: u64, data: &mut [u8]) {
        let length = data.len();
        let read = self.owner.try_ask(move |device| {
            let mut bytes = vec![0; length];
            device.read(region, offset, &mut bytes)?;
            Ok(bytes)
        });
        match read {
            Ok(bytes) => data.copy_from_slice(&bytes),
            Err(_) => data.fill(0xff),
        }
    }

    /// Where in the MSI-X table an access is; whether it is one to it at all.
    fn in_table(&self, bar: u8, offset: u64) -> Option<u64> {
        let msix = self.msix.filter(|msix| msix.table.0 == bar)?;
        let within = offset.checked_sub(msix.table.1)?;
        (within < u64::from(msix.count) * ENTRY_SIZE).then_some(within)
    }
}

impl Function for PassedThrough {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let config = lock(&self.config);
        config.read(offset, data, |data| {
            self.read_device(CONFIG_REGION, offset.into(), data);
        });
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut config = lock(&self.config);
        let written = config.write(offset, data, |at, bytes| {
            self.write_device(CONFIG_REGION, at.into(), bytes);
        });
        self.follow(&config, written);
    }

    fn config_image(&self) -> [u8; SIZE] {
        lock(&self.config).image()
    }

    fn decoded(&self) -> Vec<BarRange> {
        lock(&self.config).decoded()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        match (self.in_table(bar, offset), &self.interrupts) {
            (Some(within), Some(interrupts)) => interrupts.table_read(within, data),
            _ => self.read_device(bar.into(), offset, data),
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        match (self.in_table(bar, offset), &self.interrupts) {
            (Some(within), Some(interrupts)) => {
                self.report("interrupts", interrupts.table_write(within, data));
            }
            _ => self.write_device(bar.into(), offset, data),
        }
    }

    fn bus_reset(&self) {
        let mut config = lock(&self.config);
        config.reset();
        // It neither interrupts nor reaches memory when the node resets it, which is the state that the node's kernel
        // gives it again after that.
        if let Some(interrupts) = &self.interrupts {
            interrupts.reset();
        }
        self.write_command(config.device_command());
        let result = self.owner.try_ask(|device| device.reset());
        self.report("the reset of its bus", result);
    }

    fn bar_moved(&self, bar: u8, old: Option<u64>, new: Option<u64>) {
        let has_dma = self.dma.strong_count() != 0;
        if has_dma && old.is_some() {
            self.hide(bar);
        }
        self.bars.moved(bar, new);
        if let Some(base) = new.filter(|_| has_dma) {
            self.show(bar, base);
        }
    }
}

#[cfg(test)]
mod tests {
    use slog::{Discard, o};

    use super::super::testing::{Mock, Record};
    use super::*;
    use crate::pci::bus::Bus;
    use crate::pci::msix::fake::FakeRoutes;
    use crate::pci::root_port::RootPort;

    #[derive(Default)]
    struct Slots(Mutex<Vec<u64>>);

    impl MemorySlots for Slots {
        unsafe fn set(&self, guest: u64, _: u64, _: u64) -> io::Result<u32> {
            lock(&self.0).push(guest);
            Ok(u32::try_from(guest >> 12).unwrap())
        }
        fn clear(&self, slot: u32) {
            lock(&self.0).retain(|guest| guest >> 12 != u64::from(slot));
        }
    }

    const BASE: u64 = 0x10_0000_0000;

    struct Setup {
        bus: Bus,
        slots: Arc<Slots>,
        record: Arc<Record>,
        owner: Owner,
        /// The number of the function on bus 0.
        port: u8,
    }

    /// An NVMe on a bus, its BAR at `BASE`.
    fn setup() -> Setup {
        setup_on(|bus, function| bus.add(function).unwrap())
    }

    /// The same, behind a root port.
    fn setup_behind_a_port() -> Setup {
        setup_on(|bus, function| {
            let port = bus.reserve().unwrap();
            bus.fill(port, Arc::new(RootPort::above(function, port >> 3)));
            port
        })
    }

    fn setup_on(put: impl FnOnce(&Bus, Arc<dyn Function>) -> u8) -> Setup {
        let record = Arc::new(Record::default());
        let slots = Arc::new(Slots::default());
        let mock = Mock::nvme(Arc::clone(&record));
        let mut prepared = Prepared::new(&mock, Arc::<Slots>::clone(&slots)).unwrap();
        assert_eq!(prepared.vectors(), 65);
        let bar = prepared.bars()[0];
        prepared.place(bar, BASE);
        let (owner, orders) = super::super::owner::pair();
        std::thread::spawn(move || orders.serve(Box::new(mock), ()));
        let routes = Arc::new(FakeRoutes::default());
        let log = Logger::root(Discard, o!());
        let function =
            PassedThrough::new("0000:03:00.0".into(), prepared, owner.clone(), routes, log);
        let window = BASE..BASE + (1 << 30);
        let bus = Bus::new(vec![window]);
        let port = put(&bus, Arc::new(function));
        Setup {
            port,
            bus,
            slots,
            record,
            owner,
        }
    }

    #[test]
    fn a_device_is_reset_and_decodes_memory_before_a_guest_sees_it() {
        let setup = setup();
        assert_eq!(setup.record.all(), ["reset", "write 7 0x4 [2, 4]"]);
    }

    #[test]
    fn registers_of_the_device_are_reached_and_those_that_place_and_route_are_not() {
        let Setup {
            bus, slots, record, ..
        } = setup();
        let mut id = [0; 4];
        bus.ecam_read(0, &mut id);
        assert_eq!(id, [0x36, 0x1b, 0x10, 0]);
        bus.ecam_write(4, &[6, 0]);
        assert_eq!(record.all()[2], "write 7 0x4 [6, 4]");
        assert_eq!(*lock(&slots.0), [BASE, BASE + 0x3000]);
        // The doorbells of an unmapped page would be the device's; the table is ours.
        bus.memory_write(BASE + 0x2000, &[1, 2, 3, 4]);
        let mut entry = [0; 4];
        bus.memory_read(BASE + 0x2000, &mut entry);
        assert_eq!(entry, [1, 2, 3, 4]);
        bus.memory_read(BASE + 0x2800, &mut entry);
        assert_eq!(entry, [0xdd; 4]);
        assert_eq!(record.all().len(), 3);
        // Device control: the device's, where a function is reset.
        bus.ecam_write(0x88, &[0, 0x80]);
        assert_eq!(record.all()[3], "write 7 0x88 [0, 80]");
    }

    #[test]
    fn a_guest_that_moves_a_bar_anywhere_moves_slots_within_the_windows_only() {
        let Setup { bus, slots, .. } = setup();
        bus.ecam_write(4, &[2, 0]);
        for place in [0u64, 0xfee0_0000, BASE + (1 << 30), BASE + 0x8000, u64::MAX] {
            bus.ecam_write(0x10, &place.to_le_bytes()[..4]);
            bus.ecam_write(0x14, &place.to_le_bytes()[4..]);
            for slot in lock(&slots.0).iter() {
                assert!((BASE..BASE + (1 << 30)).contains(slot));
            }
        }
        assert!(bus.remove(0).is_some());
        assert!(lock(&slots.0).is_empty());
    }

    #[test]
    fn a_device_whose_bus_the_guest_resets_is_reset_and_does_nothing_until_it_is_set_up_again() {
        let Setup {
            bus,
            slots,
            record,
            port,
            ..
        } = setup_behind_a_port();
        let at = u64::from(port >> 3) << 20;
        let control = u64::from(port) << 12 | 0x3e;
        bus.ecam_write(at | 4, &[6, 0]);
        // A vector that is enabled and unmasked.
        for (place, value) in [(0, 0xfee0_0000u32), (4, 0), (8, 0x31), (12, 0)] {
            bus.memory_write(BASE + 0x2000 + place, &value.to_le_bytes());
        }
        bus.ecam_write(at | 0x43, &[0x80]);
        assert_eq!(record.live(1), [true]);
        let before = record.all().len();
        // Errors are not a reset, the end of one is none, and its middle is no other.
        bus.ecam_write(control, &[3]);
        assert_eq!(record.all().len(), before);
        for bits in [0x43, 0x41, 0x01] {
            bus.ecam_write(control, &[bits]);
        }
        // It neither interrupts nor masters the bus when it is reset.
        assert_eq!(
            record.all()[before..],
            ["disable", "write 7 0x4 [2, 4]", "reset"]
        );
        assert!(lock(&slots.0).is_empty());
        assert!(!bus.memory_read(BASE, &mut [0; 4]));
        let mut registers = [0; 0x18];
        bus.ecam_read(at | 0x10, &mut registers);
        assert_eq!(registers[..8], [4, 0, 0, 0, 0, 0, 0, 0]);
        bus.ecam_read(at | 0x43, &mut registers[..1]);
        assert_eq!(registers[0] & 0xc0, 0);
        // A driver that sets it up as before finds it as before, and its table masked.
        bus.ecam_write(at | 0x10, &BASE.to_le_bytes()[..4]);
        bus.ecam_write(at | 0x14, &BASE.to_le_bytes()[4..]);
        bus.ecam_write(at | 4, &[6, 0]);
        assert_eq!(*lock(&slots.0), [BASE, BASE + 0x3000]);
        let mut entry = [0; 16];
        for (place, part) in (0..).zip(entry.chunks_mut(4)) {
            bus.memory_read(BASE + 0x2000 + place * 4, part);
        }
        assert_eq!(entry, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn a_device_that_is_gone_reads_as_all_ones_and_takes_writes_without_a_word() {
        let Setup { bus, owner, .. } = setup();
        let mut value = [0; 4];
        bus.ecam_write(4, &[2, 0]);
        bus.memory_read(BASE + 0x2800, &mut value);
        assert_eq!(value, [0xdd; 4]);
        owner.retire(Box::new(|| ()));
        bus.memory_read(BASE + 0x2800, &mut value);
        assert_eq!(value, [0xff; 4]);
        bus.ecam_write(0x43, &[0x80]);
        bus.memory_write(BASE + 0x2800, &[1]);
    }
}
