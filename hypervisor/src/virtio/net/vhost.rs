//! One queue pair that the node's kernel serves (`linux/vhost.h`, `drivers/vhost/net.c`).
//!
//! The kernel translates what is in descriptors by the memory table, and reaches the rings by addresses of this process
//! without asking it: so a ring must lie in one piece of guest memory, whatever the guest has said.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Address, GuestAddress, GuestAddressSpace, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::EventFd;

use super::header::feature;
use super::tap::Tap;
use crate::virtio::pci::VERSION_1;
use crate::virtio::{ActiveQueue, GuestMemory, Interrupt};

/// `linux/vhost.h`.
mod requests {
    /// `struct vhost_vring_state`.
    #[repr(C)]
    pub struct State {
        pub index: u32,
        pub number: u32,
    }

    /// `struct vhost_vring_file`.
    #[repr(C)]
    pub struct File {
        pub index: u32,
        /// -1: none.
        pub fd: i32,
    }

    /// `struct vhost_vring_addr`. Addresses are this process's.
    #[repr(C)]
    pub struct Addresses {
        pub index: u32,
        pub flags: u32,
        pub descriptors: u64,
        pub used: u64,
        pub available: u64,
        pub log: u64,
    }

    /// `struct vhost_memory_region`.
    #[repr(C)]
    #[derive(Default)]
    pub struct Region {
        pub guest: u64,
        pub size: u64,
        pub host: u64,
        pub padding: u64,
    }

    /// The head of `struct vhost_memory`; regions follow.
    #[repr(C)]
    pub struct MemoryHead {
        pub regions: u32,
        pub padding: u32,
    }

    nix::ioctl_write_ptr!(set_features, 0xaf, 0x00, u64);
    nix::ioctl_none!(set_owner, 0xaf, 0x01);
    nix::ioctl_write_ptr!(set_memory, 0xaf, 0x03, MemoryHead);
    nix::ioctl_write_ptr!(set_size, 0xaf, 0x10, State);
    nix::ioctl_write_ptr!(set_addresses, 0xaf, 0x11, Addresses);
    nix::ioctl_write_ptr!(set_base, 0xaf, 0x12, State);
    nix::ioctl_write_ptr!(set_kick, 0xaf, 0x20, File);
    nix::ioctl_write_ptr!(set_call, 0xaf, 0x21, File);
    nix::ioctl_write_ptr!(set_error, 0xaf, 0x22, File);
    nix::ioctl_write_ptr!(set_backend, 0xaf, 0x30, File);
}

/// The most pieces of guest memory that the kernel takes by default (`max_mem_regions`).
pub const MAX_REGIONS: usize = 64;

/// Features of rings and frames that the kernel must know of; the others are the tap's.
pub const FEATURES: u64 = VERSION_1
    | feature::MRG_RXBUF
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Rings of a pair: host to guest, guest to host.
const RINGS: [u32; 2] = [0, 1];

/// A descriptor of `/dev/vhost-net`.
pub struct Vhost {
    /// None: what it did could not be stopped otherwise.
    fd: Option<OwnedFd>,
    memory: GuestMemory,
    /// The kernel has a thread for it, with this process's memory.
    owned: bool,
    connected: bool,
}

/// Where in this process a ring of so many bytes is; none if it is not in one piece of guest memory.
fn place(memory: &GuestMemoryMmap, address: u64, length: usize) -> io::Result<u64> {
    let slice = memory.get_slice(GuestAddress(address), length);
    let slice = slice.map_err(|_| io::Error::other("a ring is not in one piece of memory"))?;
    Ok(slice.ptr_guard().as_ptr() as u64)
}

/// Where the parts of a queue are (virtio 1.3 §2.7, event fields included).
fn places(memory: &GuestMemoryMmap, index: u32, queue: &Queue) -> io::Result<requests::Addresses> {
    let size = usize::from(queue.size());
    Ok(requests::Addresses {
        index,
        flags: 0,
        descriptors: place(memory, queue.desc_table(), 16 * size)?,
        available: place(memory, queue.avail_ring(), 6 + 2 * size)?,
        used: place(memory, queue.used_ring(), 6 + 8 * size)?,
        log: 0,
    })
}

impl Vhost {
    /// Over guest memory. The kernel does nothing for it before the driver has queues.
    pub fn new(fd: OwnedFd, memory: GuestMemory) -> Self {
        Self {
            fd: Some(fd),
            memory,
            owned: false,
            connected: false,
        }
    }

    /// Tells the kernel of a driver that has accepted `features`, and of its queues, host to guest first. `trouble` is
    /// signalled when the guest breaks the rules of one.
    ///
    /// # Errors
    /// What the kernel says; a ring that lies in several pieces of memory.
    pub fn prepare(
        &mut self,
        features: u64,
        queues: [&ActiveQueue; 2],
        interrupt: &dyn Interrupt,
        trouble: &EventFd,
    ) -> io::Result<()> {
        let fd = self.fd()?;
        if !self.owned {
            // SAFETY: the request has no argument.
            unsafe { requests::set_owner(fd) }?;
            self.owned = true;
        }
        let features = features & FEATURES;
        // SAFETY: the request reads one number, which lives during the call.
        unsafe { requests::set_features(fd, &raw const features) }?;
        self.follow_memory()?;
        let memory = self.memory.memory();
        for (index, active) in RINGS.into_iter().zip(queues) {
            // A driver that wants no interrupt has an event that nobody hears.
            let silent = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
            let call = interrupt.event(active.index)?.map_or_else(silent, Ok)?;
            let state = |number: u16| requests::State {
                index,
                number: number.into(),
            };
            let file = |event: &EventFd| requests::File {
                index,
                fd: event.as_raw_fd(),
            };
            let (size, base) = (state(active.queue.size()), state(active.queue.next_avail()));
            let addresses = places(&memory, index, &active.queue)?;
            let (error, call, kick) = (file(trouble), file(&call), file(&active.kick));
            // SAFETY: each request reads one structure of its own, which lives during the call. The addresses are those of
            // guest memory, which stays mapped for the life of the process; the kernel takes the events for its own.
            unsafe {
                requests::set_size(fd, &raw const size)?;
                requests::set_base(fd, &raw const base)?;
                requests::set_addresses(fd, &raw const addresses)?;
                requests::set_error(fd, &raw const error)?;
                requests::set_call(fd, &raw const call)?;
                requests::set_kick(fd, &raw const kick)?;
            }
        }
        Ok(())
    }

    /// Lets the kernel see the guest's memory as it is now.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn follow_memory(&self) -> io::Result<()> {
        #[repr(C)]
        struct Table {
            head: requests::MemoryHead,
            regions: [requests::Region; MAX_REGIONS],
        }
        if !self.owned {
            return Ok(());
        }
        let memory = self.memory.memory();
        if memory.num_regions() > MAX_REGIONS {
            return Err(io::Error::other("guest memory is in too many pieces"));
        }
        let mut count = 0;
        let mut regions = memory.iter();
        let regions = std::array::from_fn(|_| match regions.next() {
            Some(region) => {
                count += 1;
                requests::Region {
                    guest: region.start_addr().raw_value(),
                    size: region.len(),
                    host: region.as_ptr() as u64,
                    padding: 0,
                }
            }
            None => requests::Region::default(),
        });
        let table = Table {
            head: requests::MemoryHead {
                regions: count,
                padding: 0,
            },
            regions,
        };
        // SAFETY: the request reads the head and as many regions as it says, all of which live during the call; they are guest
        // memory, which stays mapped for the life of the process.
        unsafe { requests::set_memory(self.fd()?, (&raw const table).cast()) }?;
        Ok(())
    }

    /// Moves frames between the tap and the rings from now on.
    ///
    /// # Errors
    /// What the kernel says; nothing is moved then.
    pub fn connect(&mut self, tap: &Tap) -> io::Result<()> {
        if self.connected {
            return Ok(());
        }
        // Before it may touch memory.
        self.connected = true;
        let tap = tap.as_fd().as_raw_fd();
        let connected = RINGS.iter().try_for_each(|ring| self.set_tap(*ring, tap));
        connected.inspect_err(|_| self.disconnect())
    }

    /// Ends that. When this returns the kernel does not touch the guest's memory for it.
    pub fn disconnect(&mut self) {
        if !std::mem::take(&mut self.connected) {
            return;
        }
        for ring in RINGS {
            if self.set_tap(ring, -1).is_err() {
                // With the descriptor goes all that the kernel does for it.
                self.fd = None;
            }
        }
    }

    fn set_tap(&self, index: u32, fd: RawFd) -> io::Result<()> {
        let backend = requests::File { index, fd };
        // SAFETY: the request reads two numbers, which live during the call.
        unsafe { requests::set_backend(self.fd()?, &raw const backend) }?;
        Ok(())
    }

    fn fd(&self) -> io::Result<RawFd> {
        let fd = self.fd.as_ref().map(AsRawFd::as_raw_fd);
        fd.ok_or_else(|| io::Error::other("vhost-net has failed before"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_at_the_end_of_a_piece_is_good_and_one_across_two_is_not() {
        // Neighbours for the guest, not for this process.
        let pieces = [(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)];
        let memory = GuestMemoryMmap::from_ranges(&pieces).unwrap();
        let placed = |table: u64, available: u64, used: u64| {
            let mut queue = Queue::new(256).unwrap();
            let address = |address| Some(u32::try_from(address).unwrap());
            queue.set_desc_table_address(address(table), Some(0));
            queue.set_avail_ring_address(address(available), Some(0));
            queue.set_used_ring_address(address(used), Some(0));
            places(&memory, 1, &queue)
        };
        let (table, available, used) = (0xf000, 0x1_0000 - 518, 0x2_0000 - 2056);
        let good = placed(table, available, used).unwrap();
        let first = memory.iter().next().unwrap().as_ptr() as u64;
        assert_eq!((good.index, good.descriptors), (1, first + table));
        assert_eq!(good.available, first + available);
        for (one, two, three) in [(16, 0, 0), (0, 2, 0), (0, 0, 4), (0x2_0000, 0, 0)] {
            assert!(placed(table + one, available + two, used + three).is_err());
        }
    }
}
