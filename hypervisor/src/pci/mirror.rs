//! A read-only image of configuration space in guest memory, so that reads cost no exit.
//!
//! Enumerating functions is most of the exits of a boot: Linux reads some 180 registers of each. A
//! read-only memory slot over ECAM answers them from RAM; writes still exit, and the image follows
//! them. Registers whose read has an effect do not fit an image: as soon as a guest arms one (only
//! the virtio configuration access window is such), the image is taken away for good.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use slog::{Logger, info, warn};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::config::SIZE;
use crate::arch::x86_64::layout::{self, PAGE};
use crate::memory::MemoryError;

/// Where the bus puts images of its functions.
pub trait Mirror: Send + Sync {
    /// The registers of a function have changed.
    fn store(&self, devfn: u8, image: &[u8; SIZE]);
    /// Reads must reach the functions from now on.
    fn disable(&self);
}

/// The image as a memory slot of KVM.
pub struct KvmMirror {
    vm: Arc<VmFd>,
    slot: u32,
    memory: GuestMemoryMmap,
    /// Functions from 0 that have a page.
    functions: u64,
    active: AtomicBool,
    log: Logger,
}

impl KvmMirror {
    /// An image of the first `functions` functions, rounded up to whole slots of eight, all absent.
    /// `slot` is the number of a free memory slot.
    ///
    /// # Errors
    /// If the host gives no memory or KVM refuses the slot.
    pub fn new(vm: Arc<VmFd>, slot: u32, functions: u8, log: Logger) -> Result<Self, MemoryError> {
        let functions = u64::from(functions).next_multiple_of(8);
        let bytes = functions * PAGE;
        let size = usize::try_from(bytes).map_err(|_| MemoryError::Size(bytes))?;
        let start = GuestAddress(layout::ECAM.start);
        let map_error = |error: &dyn std::fmt::Display| MemoryError::Map {
            bytes,
            source: std::io::Error::other(error.to_string()),
        };
        let memory =
            GuestMemoryMmap::from_ranges(&[(start, size)]).map_err(|error| map_error(&error))?;
        memory
            .write_slice(&vec![0xff; size], start)
            .map_err(|error| map_error(&error))?;
        let mirror = Self {
            vm,
            slot,
            memory,
            functions,
            active: AtomicBool::new(true),
            log,
        };
        mirror.register(bytes).map_err(MemoryError::Slot)?;
        Ok(mirror)
    }

    /// Sets the slot's size; zero removes it.
    fn register(&self, bytes: u64) -> Result<(), kvm_ioctls::Error> {
        let host = self
            .memory
            .get_host_address(GuestAddress(layout::ECAM.start))
            .map_err(|_| kvm_ioctls::Error::new(libc::EFAULT))?;
        let region = kvm_userspace_memory_region {
            slot: self.slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::ECAM.start,
            memory_size: bytes,
            userspace_addr: host as u64,
        };
        // SAFETY: the memory is ours and lives as long as the VM, which we hold; the range overlaps
        // no other slot because ECAM is not RAM.
        unsafe { self.vm.set_user_memory_region(region) }
    }
}

impl Mirror for KvmMirror {
    fn store(&self, devfn: u8, image: &[u8; SIZE]) {
        let devfn = u64::from(devfn);
        if devfn < self.functions && self.active.load(Ordering::Acquire) {
            let address = GuestAddress(layout::ECAM.start + devfn * PAGE);
            if self.memory.write_slice(image, address).is_err() {
                self.disable();
            }
        }
    }

    fn disable(&self) {
        if self.active.swap(false, Ordering::AcqRel) {
            match self.register(0) {
                Ok(()) => info!(self.log, "configuration space is no longer mirrored"),
                Err(error) => {
                    warn!(self.log, "configuration mirror stays"; "error" => %error);
                }
            }
        }
    }
}
