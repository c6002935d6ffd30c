//! What device tests need: guest memory, the driver's side of a split queue, an interrupt that
//! counts, and a device on an epoll set.
//!
//! The driver's side follows virtio 1.3 §2.7.13, and also lets a test write any descriptor at all.

#![allow(
    clippy::unwrap_used,
    reason = "of tests and fuzz targets, where a broken assumption is a finding"
)]
#![cfg_attr(not(test), allow(dead_code, reason = "targets use a part of it"))]

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(test)]
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, DeviceError, GuestMemory, Interrupt, Sources, VirtioDevice};

/// Descriptor flag: another follows in `next`.
pub const NEXT: u16 = 1;
/// Descriptor flag: device-writable.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table.
pub const INDIRECT: u16 = 4;

/// Size of the fake RAM in bytes, beginning at address 0.
pub const RAM: u64 = 16 << 20;

/// Counts interrupts.
#[derive(Default)]
pub struct Interrupts {
    queues: [AtomicU64; 16],
    config: AtomicU64,
}

impl Interrupts {
    /// Interrupts of a queue so far.
    pub fn of(&self, index: u16) -> u64 {
        self.queues[usize::from(index)].load(Ordering::SeqCst)
    }

    /// Interrupts for another configuration so far.
    pub fn changes(&self) -> u64 {
        self.config.load(Ordering::SeqCst)
    }
}

impl Interrupt for Interrupts {
    fn queue(&self, index: u16) -> io::Result<()> {
        self.queues[usize::from(index)].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn event(&self, _index: u16) -> io::Result<Option<EventFd>> {
        EventFd::new(EFD_NONBLOCK).map(Some)
    }

    fn config(&self) -> io::Result<()> {
        self.config.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// The driver's side of one queue.
pub struct DriverQueue {
    memory: GuestMemory,
    size: u16,
    table: u64,
    available: u64,
    used: u64,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    next_available: u16,
    next_used: u16,
    kick: EventFd,
}

/// A buffer of a chain: address, length, whether the device writes it.
pub type Part = (u64, u32, bool);

impl DriverQueue {
    fn write_descriptor(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        let memory = self.memory.memory();
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Writes entry `index` of the descriptor table, whatever it says.
    pub fn raw_descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.write_descriptor(
            self.table + u64::from(index) * 16,
            address,
            length,
            flags,
            next,
        );
    }

    /// Makes the chain that begins at `head` available without a kick.
    pub fn make_available(&mut self, head: u16) {
        let memory = self.memory.memory();
        let slot = u64::from(self.next_available % self.size);
        memory
            .write_obj(head, GuestAddress(self.available + 4 + slot * 2))
            .unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    /// Writes the available index, whatever it is.
    pub fn set_available_index(&self, index: u16) {
        self.memory
            .memory()
            .store(index, GuestAddress(self.available + 2), Ordering::Release)
            .unwrap();
    }

    /// Sets `used_event`: interrupt when the used index passes it (event index only).
    pub fn interrupt_after(&self, used: u16) {
        self.memory
            .memory()
            .write_obj(
                used,
                GuestAddress(self.available + 4 + u64::from(self.size) * 2),
            )
            .unwrap();
    }

    /// Whether the device asks to be told of the next chain, whenever it comes (event index only).
    pub fn wants_next_kick(&self) -> bool {
        let at = self.used + 4 + u64::from(self.size) * 8;
        let event: u16 = self
            .memory
            .memory()
            .load(GuestAddress(at), Ordering::Acquire)
            .unwrap();
        event == self.next_available
    }

    /// Head of the chain that was made available last.
    pub fn last_head(&self) -> u16 {
        let slot = u64::from(self.next_available.wrapping_sub(1) % self.size);
        let at = GuestAddress(self.available + 4 + slot * 2);
        self.memory.memory().read_obj(at).unwrap()
    }

    /// Entries of its table.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Descriptors that are free.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Adds a chain of direct descriptors and kicks; returns its head.
    pub fn add(&mut self, parts: &[Part]) -> u16 {
        let ids: Vec<u16> = parts.iter().map(|_| self.free.pop().unwrap()).collect();
        for (i, (address, length, write)) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let next = if last { 0 } else { ids[i + 1] };
            self.raw_descriptor(ids[i], *address, *length, flags, next);
        }
        let head = ids[0];
        self.chains.insert(head, ids);
        self.make_available(head);
        self.kick();
        head
    }

    /// Adds a chain in an indirect table at `table` and kicks; returns its head.
    pub fn add_indirect(&mut self, table: u64, parts: &[Part]) -> u16 {
        for (i, (address, length, write)) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let i = u16::try_from(i).unwrap();
            self.write_descriptor(table + u64::from(i) * 16, *address, *length, flags, i + 1);
        }
        let head = self.free.pop().unwrap();
        let length = u32::try_from(parts.len() * 16).unwrap();
        self.raw_descriptor(head, table, length, INDIRECT, 0);
        self.chains.insert(head, vec![head]);
        self.make_available(head);
        self.kick();
        head
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Takes what the device returned: (head, bytes written), oldest first.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let memory = self.memory.memory();
        let index: u16 = memory
            .load(GuestAddress(self.used + 2), Ordering::Acquire)
            .unwrap();
        let mut done = Vec::new();
        while self.next_used != index {
            let at = self.used + 4 + u64::from(self.next_used % self.size) * 8;
            let id: u32 = memory.read_obj(GuestAddress(at)).unwrap();
            let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
            let head = u16::try_from(id).unwrap();
            if let Some(ids) = self.chains.remove(&head) {
                self.free.extend(ids);
            }
            done.push((head, length));
            self.next_used = self.next_used.wrapping_add(1);
        }
        done
    }
}

/// A device, activated on its own epoll set, with the driver that uses it.
pub struct Harness<D: VirtioDevice> {
    /// The device.
    pub device: D,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// What it interrupted.
    pub interrupts: Arc<Interrupts>,
    /// The driver's queues, by index.
    pub queues: Vec<DriverQueue>,
    epoll: Epoll,
    next_page: u64,
    active: bool,
}

impl<D: VirtioDevice> Harness<D> {
    /// Fake RAM of [`RAM`] bytes, and a device that is not active yet.
    pub fn new(device: D) -> Self {
        let size = usize::try_from(RAM).unwrap();
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        Self {
            device,
            memory: GuestMemory::new(ram),
            interrupts: Arc::new(Interrupts::default()),
            queues: Vec::new(),
            epoll: Epoll::new().unwrap(),
            next_page: 0x1000,
            active: false,
        }
    }

    /// Activates the device with `features` and all its queues at their largest size.
    pub fn activate(&mut self, features: u64) {
        self.try_activate(features).unwrap();
    }

    /// As [`Self::activate`], with the device's answer.
    pub fn try_activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.try_activate_some(features, |_| true)
    }

    /// As [`Self::try_activate`], by a driver that enables some of the queues alone.
    pub fn try_activate_some(
        &mut self,
        features: u64,
        enabled: impl Fn(u16) -> bool,
    ) -> Result<(), DeviceError> {
        self.queues.clear();
        let mut active = Vec::new();
        for (index, size) in self.device.queue_sizes().into_iter().enumerate() {
            let index = u16::try_from(index).unwrap();
            let table = self.alloc(u64::from(size) * 16);
            let available = self.alloc(6 + u64::from(size) * 2);
            let used = self.alloc(6 + u64::from(size) * 8);
            let mut queue = Queue::new(size).unwrap();
            queue.set_desc_table_address(Some(u32::try_from(table).unwrap()), Some(0));
            queue.set_avail_ring_address(Some(u32::try_from(available).unwrap()), Some(0));
            queue.set_used_ring_address(Some(u32::try_from(used).unwrap()), Some(0));
            queue.set_ready(true);
            assert!(queue.is_valid(&*self.memory.memory()));
            let kick = EventFd::new(EFD_NONBLOCK).unwrap();
            self.queues.push(DriverQueue {
                memory: self.memory.clone(),
                size,
                table,
                available,
                used,
                free: (0..size).rev().collect(),
                chains: HashMap::new(),
                next_available: 0,
                next_used: 0,
                kick: kick.try_clone().unwrap(),
            });
            if enabled(index) {
                active.push(ActiveQueue {
                    index,
                    queue,
                    kick,
                    counts: Arc::default(),
                });
            }
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues: active,
            interrupt: self.interrupts.clone(),
        };
        self.active = true;
        self.device
            .activate(activation, &mut Sources::new(&self.epoll, 0))
    }

    /// Deactivates the device.
    pub fn deactivate(&mut self) {
        self.device.deactivate(&mut Sources::new(&self.epoll, 0));
        self.active = false;
    }

    /// Fresh zeroed guest memory, page aligned; returns its address.
    pub fn alloc(&mut self, length: u64) -> u64 {
        let address = self.next_page;
        self.next_page = (address + length).next_multiple_of(0x1000);
        assert!(self.next_page <= RAM, "the fake RAM is used up");
        address
    }

    /// Writes guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .memory()
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    /// Reads guest memory.
    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .memory()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Writes descriptors from index 0 on, whatever they say, and makes `heads` available. Even
    /// addresses point into one valid page.
    pub fn raw_chains(&mut self, queue: usize, table: &[(u64, u32, u16, u16)], heads: &[u16]) {
        let page = self.alloc(0x1000);
        for (index, (address, length, flags, next)) in (0u16..).zip(table) {
            let address = if address % 2 == 0 {
                page + address % 0xf00
            } else {
                *address
            };
            self.queues[queue].raw_descriptor(index, address, *length, *flags, *next);
        }
        for head in heads {
            self.queues[queue].make_available(*head);
        }
        self.queues[queue].kick();
    }

    /// Runs the device until nothing is ready.
    ///
    /// # Panics
    /// If it fails or does not come to rest.
    pub fn run(&mut self) {
        self.try_run().unwrap();
    }

    /// As [`Self::run`], with the device's error.
    pub fn try_run(&mut self) -> Result<(), DeviceError> {
        for _ in 0..10_000 {
            if self.step(0)? == 0 {
                return Ok(());
            }
        }
        panic!("the device does not come to rest");
    }

    /// Hands the device an event that may be stale.
    pub fn deliver(&mut self, token: u32, events: EventSet) {
        self.device
            .process(token, events, &mut Sources::new(&self.epoll, 0))
            .unwrap();
    }

    /// As [`Self::deliver`], any token and with the device's error.
    pub fn try_deliver(&mut self, token: u32) -> Result<(), DeviceError> {
        self.device
            .process(token, EventSet::IN, &mut Sources::new(&self.epoll, 0))
    }

    /// Waits up to `milliseconds` for events and hands them to the device; returns their number.
    pub fn step(&mut self, milliseconds: i32) -> Result<usize, DeviceError> {
        let mut events = vec![EpollEvent::default(); 16];
        let count = self.epoll.wait(milliseconds, &mut events).unwrap();
        for event in &events[..count] {
            let token = u32::try_from(event.data() & 0xffff_ffff).unwrap();
            let set = EventSet::from_bits_truncate(event.events());
            self.device
                .process(token, set, &mut Sources::new(&self.epoll, 0))?;
        }
        Ok(count)
    }
}

/// A descriptor that is right now and then: address, length, flags, next.
#[cfg(test)]
pub fn any_descriptor(size: u16) -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let length = prop_oneof![6 => 0u32..200, 1 => any::<u32>(), 1 => Just(u32::MAX)];
    let address = prop_oneof![
        6 => (0u64..0x1000).prop_map(|address| address & !1),
        1 => any::<u64>(),
        1 => (RAM - 100..RAM + 100).prop_map(|address| address | 1),
        1 => (u64::MAX - 100..=u64::MAX).prop_map(|address| address | 1),
    ];
    (address, length, 0u16..8, 0..size)
}
