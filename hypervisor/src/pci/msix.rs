//! MSI-X (PCI 3.0 §6.8.2): the table and pending bits of one function, delivered by irqfd.
//!
//! The table is the guest's and may hold anything: a message can only interrupt the guest's own
//! CPUs. Each change of a route costs KVM the whole routing table and a grace period, so routes are
//! made when a function first interrupts, for all its vectors at once: what the guest writes before,
//! masked or twice, costs nothing, nor do vectors of a device that is never used. A vector may be lent: somebody else, the
//! node's kernel, then signals its event, and the route follows what the guest writes at once.

use std::io;
use std::sync::{Arc, Mutex};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use vmm_sys_util::eventfd::EventFd;

use crate::event::borrow_event;
use crate::sync::lock;

mod routes;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use routes::fake;
pub use routes::{Message, Route, Routes};

/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// The most vectors a function of ours may have.
pub const MAX_VECTORS: u16 = 128;
const MASKED: u32 = 1;

#[derive(Default)]
struct Vector {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
    route: Option<Route>,
    routed: Option<Message>,
    lent: Option<Lent>,
}

/// A vector whose event somebody else signals.
struct Lent {
    /// What is signalled interrupts the guest.
    connected: bool,
}

impl Vector {
    fn message(&self) -> Message {
        Message {
            address: self.address,
            data: self.data,
        }
    }
}

struct State {
    enabled: bool,
    function_masked: bool,
    vectors: Vec<Vector>,
}

/// The MSI-X state of one function.
pub struct Msix {
    routes: Arc<dyn Routes>,
    state: Mutex<State>,
}

impl Msix {
    /// `count` vectors, all masked, MSI-X disabled.
    #[must_use]
    pub fn new(count: u16, routes: Arc<dyn Routes>) -> Self {
        let vectors = (0..count.min(MAX_VECTORS))
            .map(|_| Vector {
                control: MASKED,
                ..Vector::default()
            })
            .collect();
        Self {
            routes,
            state: Mutex::new(State {
                enabled: false,
                function_masked: false,
                vectors,
            }),
        }
    }

    /// The guest wrote the message control register.
    ///
    /// # Errors
    /// If what was pending could not be delivered.
    pub fn control(&self, enabled: bool, function_masked: bool) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.enabled = enabled;
        state.function_masked = function_masked;
        self.follow(&mut state)?;
        self.deliver_pending(&mut state)
    }

    /// Reads the table; `offset` from its start.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = lock(&self.state);
        let Some((vector, within)) = position(&state, offset, data.len()) else {
            return;
        };
        data.copy_from_slice(&entry_bytes(&state.vectors[vector])[within..within + data.len()]);
    }

    /// Writes the table.
    ///
    /// # Errors
    /// If what was pending could not be delivered.
    pub fn table_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        let Some((index, within)) = position(&state, offset, data.len()) else {
            return Ok(());
        };
        let mut bytes = entry_bytes(&state.vectors[index]);
        bytes[within..within + data.len()].copy_from_slice(data);
        let vector = &mut state.vectors[index];
        let part = |range: std::ops::Range<usize>| {
            let mut word = [0u8; 8];
            word[..range.len()].copy_from_slice(&bytes[range]);
            u64::from_le_bytes(word)
        };
        vector.address = part(0..8);
        vector.data = u32::try_from(part(8..12)).unwrap_or(0);
        vector.control = u32::try_from(part(12..16)).unwrap_or(0) & MASKED;
        if vector.lent.is_some() {
            self.follow(&mut state)?;
        }
        self.deliver_pending(&mut state)
    }

    /// The event of a vector, for somebody who signals it without asking here; none if there is no such vector. What the
    /// guest masks is kept in the event until it is unmasked.
    ///
    /// # Errors
    /// If the route could not be made.
    pub fn lend(&self, index: u16) -> io::Result<Option<EventFd>> {
        let mut state = lock(&self.state);
        let Some(vector) = state.vectors.get_mut(usize::from(index)) else {
            return Ok(None);
        };
        if vector.route.is_none() {
            vector.route = Some(self.routes.allocate()?);
        }
        let route = vector.route.as_ref();
        let event = route.map(|route| route.trigger.try_clone()).transpose()?;
        // A source is connected when it is allocated.
        vector.lent.get_or_insert(Lent { connected: true });
        self.follow(&mut state)?;
        Ok(event)
    }

    /// Takes back all that was lent. Nobody signals it any more.
    pub fn take_back(&self) {
        for vector in &mut lock(&self.state).vectors {
            if vector.lent.take().is_some()
                && let Some(route) = vector.route.take()
            {
                vector.routed = None;
                self.routes.release(route);
            }
        }
    }

    /// Reads the pending bits; `offset` from their start.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        for (at, byte) in (offset..).zip(data) {
            *byte = 0;
            for bit in 0..8u64 {
                let pending = at
                    .checked_mul(8)
                    .and_then(|first| usize::try_from(first + bit).ok())
                    .and_then(|index| state.vectors.get(index))
                    .is_some_and(Vector::is_pending);
                *byte |= u8::from(pending) << bit;
            }
        }
    }

    /// Interrupts the guest, or notes the interrupt while it is masked. A vector that does not
    /// exist is ignored, as is everything while MSI-X is off.
    ///
    /// # Errors
    /// If the route could not be made or the event not be signalled.
    pub fn trigger(&self, index: u16) -> io::Result<()> {
        let mut state = lock(&self.state);
        if !state.enabled {
            return Ok(());
        }
        let masked = state.function_masked;
        let Some(vector) = state.vectors.get_mut(usize::from(index)) else {
            return Ok(());
        };
        if vector.lent.is_some() {
            return vector.signal();
        }
        if masked || vector.masked() {
            vector.pending = true;
            return Ok(());
        }
        if !vector.is_routed() {
            self.route(&mut state)?;
        }
        state.vectors[usize::from(index)].signal()
    }

    /// Brings the sources of lent vectors up to date with the table.
    fn follow(&self, state: &mut State) -> io::Result<()> {
        let open = state.enabled && !state.function_masked;
        let unrouted = |vector: &Vector| {
            open && vector.lent.is_some() && !vector.masked() && !vector.is_routed()
        };
        if state.vectors.iter().any(unrouted) {
            self.route(state)?;
        }
        for vector in &mut state.vectors {
            let wanted = open && !vector.masked();
            let (Some(lent), Some(route)) = (&mut vector.lent, &vector.route) else {
                continue;
            };
            if lent.connected != wanted {
                if wanted {
                    self.routes.connect(route)?;
                } else {
                    self.routes.disconnect(route)?;
                }
                lent.connected = wanted;
            }
        }
        Ok(())
    }

    /// Delivers what became deliverable.
    fn deliver_pending(&self, state: &mut State) -> io::Result<()> {
        if !state.enabled || state.function_masked {
            return Ok(());
        }
        for index in 0..state.vectors.len() {
            let vector = &mut state.vectors[index];
            if vector.pending && !vector.masked() {
                vector.pending = false;
                if !vector.is_routed() {
                    self.route(state)?;
                }
                state.vectors[index].signal()?;
            }
        }
        Ok(())
    }

    /// Routes all vectors that are unmasked and not routed as the table says, in one call.
    fn route(&self, state: &mut State) -> io::Result<()> {
        let mut changed = Vec::new();
        for vector in &mut state.vectors {
            if !vector.masked() && !vector.is_routed() {
                let gsi = match &vector.route {
                    Some(route) => route.gsi,
                    None => vector.route.insert(self.routes.allocate()?).gsi,
                };
                changed.push((gsi, vector.message()));
            }
        }
        self.routes.update(&changed)?;
        for vector in &mut state.vectors {
            if !vector.masked() {
                vector.routed = Some(vector.message());
            }
        }
        Ok(())
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        for vector in &mut lock(&self.state).vectors {
            if let Some(route) = vector.route.take() {
                self.routes.release(route);
            }
        }
    }
}

impl Vector {
    fn masked(&self) -> bool {
        self.control & MASKED != 0
    }

    fn is_routed(&self) -> bool {
        self.route.is_some() && self.routed == Some(self.message())
    }

    /// Of one that is lent it is in its event, which is read by whoever takes the interrupt.
    fn is_pending(&self) -> bool {
        match (&self.lent, &self.route) {
            (Some(Lent { connected: false }), Some(route)) => {
                let mut event = [PollFd::new(borrow_event(&route.trigger), PollFlags::POLLIN)];
                ppoll(&mut event, Some(TimeSpec::new(0, 0)), None).is_ok_and(|ready| ready > 0)
            }
            _ => self.pending,
        }
    }

    fn signal(&self) -> io::Result<()> {
        match &self.route {
            Some(route) => route.trigger.write(1),
            None => Ok(()),
        }
    }
}

/// Vector index and byte within its entry; none if outside or across entries.
fn position(state: &State, offset: u64, length: usize) -> Option<(usize, usize)> {
    let index = usize::try_from(offset / ENTRY_SIZE).ok()?;
    let within = usize::try_from(offset % ENTRY_SIZE).ok()?;
    (index < state.vectors.len() && within + length <= 16).then_some((index, within))
}

fn entry_bytes(vector: &Vector) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&vector.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&vector.data.to_le_bytes());
    bytes[12..].copy_from_slice(&vector.control.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::fake::FakeRoutes;
    use super::*;

    fn write_entry(msix: &Msix, index: u64, message: Message, masked: bool) {
        let base = index * ENTRY_SIZE;
        msix.table_write(base, &message.address.to_le_bytes())
            .unwrap();
        msix.table_write(base + 8, &message.data.to_le_bytes())
            .unwrap();
        msix.table_write(base + 12, &u32::from(masked).to_le_bytes())
            .unwrap();
    }

    const ONE: Message = Message {
        address: 0xfee0_0000,
        data: 0x31,
    };
    const TWO: Message = Message {
        address: 0xfee0_1000,
        data: 0x32,
    };

    #[test]
    fn routes_are_made_at_the_first_interrupt_for_all_vectors_and_again_only_after_a_change() {
        let routes = Arc::new(FakeRoutes::default());
        let msix = Msix::new(3, Arc::<FakeRoutes>::clone(&routes));
        write_entry(&msix, 0, ONE, false);
        write_entry(&msix, 1, TWO, false);
        msix.control(true, false).unwrap();
        assert!(lock(&routes.updates).is_empty());
        msix.trigger(1).unwrap();
        assert_eq!(*lock(&routes.updates), [vec![(24, ONE), (25, TWO)]]);
        msix.trigger(0).unwrap();
        // Masking and unmasking with the same message costs nothing.
        write_entry(&msix, 0, ONE, true);
        write_entry(&msix, 0, ONE, false);
        msix.trigger(0).unwrap();
        assert_eq!(lock(&routes.updates).len(), 1);
        // The guest moves the interrupt to another CPU.
        write_entry(&msix, 0, TWO, false);
        assert_eq!(lock(&routes.updates).len(), 1);
        msix.trigger(0).unwrap();
        assert_eq!(lock(&routes.updates)[1], [(24, TWO)]);
        // The masked vector has no source.
        assert_eq!(lock(&routes.triggers).len(), 2);
        assert_eq!(lock(&routes.triggers)[0].read().unwrap(), 3);
        assert_eq!(lock(&routes.triggers)[1].read().unwrap(), 1);
    }

    #[test]
    fn an_interrupt_while_masked_is_pending_and_delivered_on_unmask() {
        let routes = Arc::new(FakeRoutes::default());
        let msix = Msix::new(2, Arc::<FakeRoutes>::clone(&routes));
        msix.control(true, false).unwrap();
        write_entry(&msix, 1, ONE, true);
        msix.trigger(1).unwrap();
        let mut pending = [0u8; 8];
        msix.pending_read(0, &mut pending);
        assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
        write_entry(&msix, 1, ONE, false);
        msix.pending_read(0, &mut pending);
        assert_eq!(pending, [0; 8]);
        assert_eq!(lock(&routes.triggers)[0].read().unwrap(), 1);
    }

    #[test]
    fn nothing_is_delivered_while_disabled_or_to_a_vector_that_does_not_exist() {
        let routes = Arc::new(FakeRoutes::default());
        let msix = Msix::new(1, Arc::<FakeRoutes>::clone(&routes));
        write_entry(&msix, 0, ONE, false);
        msix.trigger(0).unwrap();
        msix.trigger(0xffff).unwrap();
        assert!(lock(&routes.triggers).is_empty());
    }

    #[test]
    fn a_function_that_leaves_gives_back_the_sources_it_had() {
        let routes = Arc::new(FakeRoutes::default());
        let msix = Msix::new(3, Arc::<FakeRoutes>::clone(&routes));
        write_entry(&msix, 0, ONE, false);
        write_entry(&msix, 2, TWO, false);
        msix.control(true, false).unwrap();
        msix.trigger(0).unwrap();
        drop(msix);
        assert_eq!(*lock(&routes.released), [24, 25]);
    }

    #[test]
    fn a_lent_vector_is_routed_at_once_and_follows_every_mask() {
        let routes = Arc::new(FakeRoutes::default());
        let msix = Msix::new(3, Arc::<FakeRoutes>::clone(&routes));
        let silent = || !lock(&routes.disconnected).is_empty();
        write_entry(&msix, 1, ONE, false);
        msix.control(true, false).unwrap();
        let event = msix.lend(1).unwrap().unwrap();
        assert_eq!(*lock(&routes.updates), [vec![(24, ONE)]]);
        assert!(!silent());
        // Another CPU: the message changes while the vector is masked.
        write_entry(&msix, 1, ONE, true);
        assert!(silent());
        event.write(1).unwrap();
        let mut pending = [0u8; 8];
        msix.pending_read(0, &mut pending);
        assert_eq!(pending[0], 2);
        write_entry(&msix, 1, TWO, false);
        assert!(!silent());
        assert_eq!(lock(&routes.updates)[1], [(24, TWO)]);
        for (enabled, masked) in [(true, true), (false, false)] {
            msix.control(enabled, masked).unwrap();
            assert!(silent());
            msix.control(true, false).unwrap();
            assert!(!silent());
        }
        assert_eq!(lock(&routes.updates).len(), 2);
        // Our own say goes the same way.
        event.read().unwrap();
        msix.trigger(1).unwrap();
        assert_eq!(event.read().unwrap(), 1);
        assert!(msix.lend(3).unwrap().is_none());
    }

    #[test]
    fn a_vector_that_is_lent_while_it_is_masked_interrupts_once_it_is_not() {
        let routes = Arc::new(FakeRoutes::default());
        let msix = Msix::new(1, Arc::<FakeRoutes>::clone(&routes));
        msix.lend(0).unwrap();
        assert_eq!(*lock(&routes.disconnected), [24]);
        msix.control(true, false).unwrap();
        assert_eq!(*lock(&routes.disconnected), [24]);
        assert!(lock(&routes.updates).is_empty());
        write_entry(&msix, 0, ONE, false);
        assert!(lock(&routes.disconnected).is_empty());
        assert_eq!(*lock(&routes.updates), [vec![(24, ONE)]]);
        msix.take_back();
        assert_eq!(*lock(&routes.released), [24]);
        // It is ours again, with a source of its own.
        msix.trigger(0).unwrap();
        assert_eq!(lock(&routes.updates)[1], [(25, ONE)]);
    }

    proptest! {
        /// Whatever a guest writes: what is signalled reaches it exactly while its vector may interrupt, by the message that
        /// the table holds.
        #[test]
        fn lent_vectors_follow_the_table(
            steps in prop::collection::vec((0u64..2, any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()), 1..40)
        ) {
            let routes = Arc::new(FakeRoutes::default());
            let msix = Msix::new(2, Arc::<FakeRoutes>::clone(&routes));
            for index in 0..2 {
                msix.lend(index).unwrap();
            }
            let mut table = [(Message { address: 0, data: 0 }, true); 2];
            for (index, first, masked, enabled, all_masked) in steps {
                let message = if first { ONE } else { TWO };
                write_entry(&msix, index, message, masked);
                table[usize::try_from(index).unwrap()] = (message, masked);
                msix.control(enabled, all_masked).unwrap();
                for (gsi, (message, masked)) in (24..).zip(&table) {
                    let open = enabled && !all_masked && !masked;
                    prop_assert_eq!(!lock(&routes.disconnected).contains(&gsi), open);
                    let updates = lock(&routes.updates);
                    let by = updates.iter().flatten().rev().find(|(of, _)| *of == gsi);
                    if open {
                        prop_assert_eq!(by.map(|(_, by)| *by), Some(*message));
                    }
                }
            }
        }

        #[test]
        fn any_table_accesses_end_without_a_panic(
            accesses in prop::collection::vec((0u64..200, 1usize..9, any::<u64>(), any::<bool>()), 0..60)
        ) {
            let routes = Arc::new(FakeRoutes::default());
            let msix = Msix::new(4, Arc::<FakeRoutes>::clone(&routes));
            for (offset, length, value, flag) in accesses {
                msix.table_write(offset, &value.to_le_bytes()[..length]).unwrap();
                msix.table_read(offset, &mut [0; 8][..length]);
                msix.pending_read(value, &mut [0; 8][..length]);
                msix.control(flag, value & 1 == 1).unwrap();
                msix.trigger(u16::try_from(offset).unwrap()).unwrap();
                if value & 6 == 6 {
                    msix.lend(u16::try_from(offset).unwrap()).unwrap();
                }
            }
            prop_assert!(lock(&routes.triggers).len() <= 4);
            msix.take_back();
            prop_assert!(lock(&routes.disconnected).is_empty());
        }
    }
}
