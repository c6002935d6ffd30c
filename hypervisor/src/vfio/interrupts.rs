//! The interrupts of a passed-through function: the guest's table, kept here; the device's events, straight into the
//! guest.
//!
//! A vector that the guest has unmasked has an event that the node's kernel signals and KVM takes. One that is masked
//! has none: the device then keeps what is pending, as it does on a real machine. The table is the guest's and may hold
//! anything: a message can only interrupt the guest's own CPUs.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use super::device::{Kind, Vectors};
use super::owner::Owner;
use crate::pci::msix::{ENTRY_SIZE, Message, Route, Routes};
use crate::sync::lock;

const MASKED: u32 = 1;

#[derive(Default)]
struct Vector {
    address: u64,
    data: u32,
    control: u32,
    route: Option<Route>,
    routed: Option<Message>,
    /// The device signals its event.
    live: bool,
}

struct State {
    enabled: bool,
    masked: bool,
    vectors: Vec<Vector>,
    /// Vectors that the device has enabled, from 0.
    given: u16,
}

/// The interrupts of one kind.
pub struct Interrupts {
    kind: Kind,
    resizable: bool,
    owner: Owner,
    routes: Arc<dyn Routes>,
    state: Mutex<State>,
}

impl Interrupts {
    /// All off.
    #[must_use]
    pub fn new(kind: Kind, vectors: Vectors, owner: Owner, routes: Arc<dyn Routes>) -> Self {
        let vector = || Vector {
            control: control_at_first(kind),
            ..Vector::default()
        };
        Self {
            kind,
            resizable: vectors.resizable,
            owner,
            routes,
            state: Mutex::new(State {
                enabled: false,
                masked: false,
                vectors: (0..vectors.count).map(|_| vector()).collect(),
                given: 0,
            }),
        }
    }

    /// The guest wrote the MSI-X control.
    ///
    /// # Errors
    /// If the kernel refuses; the interrupts are then off.
    pub fn control(&self, enabled: bool, masked: bool) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.enabled = enabled;
        state.masked = masked;
        self.follow(&mut state)
    }

    /// The guest wrote MSI: none is off, else how many, where, and the first's data.
    ///
    /// # Errors
    /// As of [`Self::control`].
    pub fn messages(&self, messages: Option<(u16, u64, u32)>) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.enabled = messages.is_some();
        let (count, address, data) = messages.unwrap_or_default();
        for (number, vector) in (0u16..).zip(&mut state.vectors) {
            vector.control = if number < count { 0 } else { MASKED };
            vector.address = address;
            // The device replaces the low bits (PCI 3.0 §6.8.1.6).
            vector.data = data & !u32::from(count.saturating_sub(1)) | u32::from(number);
        }
        self.follow(&mut state)
    }

    /// All is off and the table as it was at first: the bus was reset.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        (state.enabled, state.masked) = (false, false);
        self.off(&mut state);
        for vector in &mut state.vectors {
            (vector.address, vector.data) = (0, 0);
            vector.control = control_at_first(self.kind);
        }
    }

    /// Reads the table; `offset` from its start.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = lock(&self.state);
        if let Some((vector, within)) = place(&state, offset, data.len()) {
            data.copy_from_slice(&bytes_of(&state.vectors[vector])[within..within + data.len()]);
        }
    }

    /// Writes the table.
    ///
    /// # Errors
    /// As of [`Self::control`].
    pub fn table_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        let Some((index, within)) = place(&state, offset, data.len()) else {
            return Ok(());
        };
        let vector = &mut state.vectors[index];
        let mut bytes = bytes_of(vector);
        bytes[within..within + data.len()].copy_from_slice(data);
        let [mut address, mut value, mut control] = [[0; 8], [0; 8], [0; 8]];
        address.copy_from_slice(&bytes[..8]);
        value[..4].copy_from_slice(&bytes[8..12]);
        control[..4].copy_from_slice(&bytes[12..]);
        vector.address = u64::from_le_bytes(address);
        vector.data = u32::try_from(u64::from_le_bytes(value)).unwrap_or(0);
        vector.control = u32::try_from(u64::from_le_bytes(control)).unwrap_or(0) & MASKED;
        if state.enabled {
            self.follow(&mut state)
        } else {
            Ok(())
        }
    }

    /// Brings routes and device up to date with the table.
    fn follow(&self, state: &mut State) -> io::Result<()> {
        let result = self.try_follow(state);
        if result.is_err() {
            self.off(state);
        }
        result
    }

    fn try_follow(&self, state: &mut State) -> io::Result<()> {
        if !state.enabled {
            self.off(state);
            return Ok(());
        }
        self.route(state)?;
        let wanted: Vec<bool> = state
            .vectors
            .iter()
            .map(|vector| !state.masked && vector.control & MASKED == 0)
            .collect();
        let last = wanted.iter().rposition(|wanted| *wanted);
        // Enabled with nothing unmasked, the device is in that mode all the same.
        let needed = u16::try_from(last.map_or(1, |last| last + 1)).unwrap_or(u16::MAX);
        if needed > state.given && (state.given == 0 || !self.resizable) {
            return self.enable(state, &wanted, needed);
        }
        for (index, wanted) in (0u16..).zip(wanted) {
            let vector = &mut state.vectors[usize::from(index)];
            if vector.live != wanted {
                let event = vector.event().filter(|_| wanted);
                let kind = self.kind;
                self.owner
                    .try_ask(move |device| device.set_triggers(kind, index, &[event]))?;
                vector.live = wanted;
                state.given = state.given.max(index + 1);
            }
        }
        Ok(())
    }

    /// Enables vectors up to `needed` at once. Where the kernel cannot add to those that are enabled, they are off for a
    /// moment, so each is signalled once: an interrupt too many is harmless, one too few is not.
    fn enable(&self, state: &mut State, wanted: &[bool], needed: u16) -> io::Result<()> {
        let again = state.given > 0;
        let pairs = state.vectors.iter().zip(wanted);
        let events: Vec<_> = pairs
            .take(needed.into())
            .map(|(vector, wanted)| vector.event().filter(|_| *wanted))
            .collect();
        let kind = self.kind;
        self.owner.try_ask(move |device| {
            if again {
                device.disable(kind)?;
            }
            device.set_triggers(kind, 0, &events)
        })?;
        state.given = needed;
        for (vector, wanted) in state.vectors.iter_mut().zip(wanted) {
            if again
                && vector.live
                && *wanted
                && let Some(route) = &vector.route
            {
                let _ = route.trigger.write(1);
            }
            vector.live = *wanted;
        }
        Ok(())
    }

    /// Routes what is unmasked as the table says, in one call.
    fn route(&self, state: &mut State) -> io::Result<()> {
        if state.masked {
            return Ok(());
        }
        let mut changed = Vec::new();
        for vector in &mut state.vectors {
            let message = vector.message();
            if vector.control & MASKED == 0 && vector.routed != Some(message) {
                let gsi = match &vector.route {
                    Some(route) => route.gsi,
                    None => vector.route.insert(self.routes.allocate()?).gsi,
                };
                changed.push((gsi, message));
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        self.routes.update(&changed)?;
        for vector in &mut state.vectors {
            if vector.control & MASKED == 0 {
                vector.routed = Some(vector.message());
            }
        }
        Ok(())
    }

    fn off(&self, state: &mut State) {
        if std::mem::take(&mut state.given) > 0 {
            let kind = self.kind;
            let _ = self.owner.ask(move |device| device.disable(kind));
        }
        for vector in &mut state.vectors {
            vector.live = false;
        }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        for vector in &mut lock(&self.state).vectors {
            if let Some(route) = vector.route.take() {
                self.routes.release(route);
            }
        }
    }
}

/// Every vector is masked; MSI has no masks.
fn control_at_first(kind: Kind) -> u32 {
    match kind {
        Kind::Msix => MASKED,
        Kind::Msi => 0,
    }
}

impl Vector {
    fn message(&self) -> Message {
        Message {
            address: self.address,
            data: self.data,
        }
    }

    fn event(&self) -> Option<i32> {
        self.route.as_ref().map(|route| route.trigger.as_raw_fd())
    }
}

/// Vector and byte within its entry; none if outside or across entries.
fn place(state: &State, offset: u64, length: usize) -> Option<(usize, usize)> {
    let index = usize::try_from(offset / ENTRY_SIZE).ok()?;
    let within = usize::try_from(offset % ENTRY_SIZE).ok()?;
    (index < state.vectors.len() && within + length <= 16).then_some((index, within))
}

fn bytes_of(vector: &Vector) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&vector.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&vector.data.to_le_bytes());
    bytes[12..].copy_from_slice(&vector.control.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Mock, Record};
    use super::*;
    use crate::pci::msix::fake::FakeRoutes;

    struct Setup {
        interrupts: Interrupts,
        record: Arc<Record>,
        routes: Arc<FakeRoutes>,
    }

    fn setup(kind: Kind, count: u16, resizable: bool) -> Setup {
        let record = Arc::new(Record::default());
        let mock = Mock::nvme(Arc::clone(&record));
        let (owner, orders) = super::super::owner::pair();
        std::thread::spawn(move || orders.serve(Box::new(mock), ()));
        let routes = Arc::new(FakeRoutes::default());
        let vectors = Vectors { count, resizable };
        Setup {
            interrupts: Interrupts::new(kind, vectors, owner, Arc::<FakeRoutes>::clone(&routes)),
            record,
            routes,
        }
    }

    fn entry(interrupts: &Interrupts, index: u64, data: u32, masked: bool) {
        let base = index * ENTRY_SIZE;
        let address = 0xfee0_0000u64.to_le_bytes();
        interrupts.table_write(base, &address).unwrap();
        interrupts
            .table_write(base + 8, &data.to_le_bytes())
            .unwrap();
        let control = u32::from(masked).to_le_bytes();
        interrupts.table_write(base + 12, &control).unwrap();
    }

    #[test]
    fn what_the_guest_writes_before_it_enables_costs_nothing_and_then_all_is_one_call() {
        let Setup {
            interrupts,
            record,
            routes,
        } = setup(Kind::Msix, 4, true);
        entry(&interrupts, 0, 0x31, false);
        entry(&interrupts, 2, 0x32, false);
        assert!(record.all().is_empty() && lock(&routes.updates).is_empty());
        interrupts.control(true, false).unwrap();
        assert_eq!(record.all(), ["triggers 0: on off on"]);
        assert_eq!(lock(&routes.updates).len(), 1);
        assert_eq!(lock(&routes.updates)[0].len(), 2);
        interrupts.control(false, false).unwrap();
        assert_eq!(record.all()[1], "disable");
        drop(interrupts);
        assert_eq!(*lock(&routes.released), [24, 25]);
    }

    #[test]
    fn linux_enables_masked_and_unmasks_one_by_one() {
        let setup = setup(Kind::Msix, 4, true);
        let interrupts = &setup.interrupts;
        interrupts.control(true, true).unwrap();
        assert_eq!(setup.record.all(), ["triggers 0: off"]);
        interrupts.control(true, false).unwrap();
        entry(interrupts, 0, 0x31, false);
        entry(interrupts, 1, 0x32, false);
        assert_eq!(
            setup.record.all()[1..],
            ["triggers 0: on", "triggers 1: on"]
        );
        // Moved to another CPU: a route, and nothing for the device.
        interrupts
            .table_write(16 + 8, &0x55u32.to_le_bytes())
            .unwrap();
        assert_eq!(setup.record.all().len(), 3);
        assert_eq!(lock(&setup.routes.updates).last().unwrap()[0].1.data, 0x55);
        entry(interrupts, 1, 0x55, true);
        assert_eq!(setup.record.all()[3], "triggers 1: off");
    }

    #[test]
    fn where_vectors_cannot_be_added_all_are_enabled_again_and_signalled_once() {
        let setup = setup(Kind::Msix, 4, false);
        setup.interrupts.control(true, false).unwrap();
        entry(&setup.interrupts, 0, 0x31, false);
        entry(&setup.interrupts, 3, 0x32, false);
        assert_eq!(
            setup.record.all(),
            [
                "triggers 0: off",
                "triggers 0: on",
                "disable",
                "triggers 0: on off off on"
            ]
        );
        assert_eq!(lock(&setup.routes.triggers)[0].read().unwrap(), 1);
    }

    #[test]
    fn messages_of_msi_have_the_number_in_their_low_bits() {
        let setup = setup(Kind::Msi, 4, true);
        setup
            .interrupts
            .messages(Some((4, 0xfee0_0000, 0x40)))
            .unwrap();
        assert_eq!(setup.record.all(), ["triggers 0: on on on on"]);
        let updates = lock(&setup.routes.updates);
        let data: Vec<u32> = updates[0].iter().map(|(_, message)| message.data).collect();
        assert_eq!(data, [0x40, 0x41, 0x42, 0x43]);
        drop(updates);
        setup.interrupts.messages(None).unwrap();
        assert_eq!(setup.record.all()[1], "disable");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_device_signals_exactly_what_is_enabled_and_unmasked(
            resizable: bool,
            steps in prop::collection::vec((0u64..5, any::<bool>(), 0u8..4), 0..30)
        ) {
            let setup = setup(Kind::Msix, 4, resizable);
            let (mut enabled, mut masked, mut unmasked) = (false, false, [false; 4]);
            for (index, flag, what) in steps {
                match what {
                    0 => enabled = flag,
                    1 => masked = flag,
                    _ => {
                        entry(&setup.interrupts, index, 0x30, flag);
                        if let Some(vector) = unmasked.get_mut(usize::try_from(index).unwrap()) {
                            *vector = !flag;
                        }
                    }
                }
                if what < 2 {
                    setup.interrupts.control(enabled, masked).unwrap();
                }
                let live = setup.record.live(4);
                for (vector, live) in unmasked.iter().zip(live) {
                    prop_assert_eq!(live, enabled && !masked && *vector);
                }
            }
        }
    }
}
