//! Guest memory as the devices of a VM see it: all of it, at its guest-physical addresses, pinned.
//!
//! It is pinned before a device is on the bus. From then on no page may leave ([`crate::reclaim`]).

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Address, GuestAddressSpace as _, GuestMemory as _, GuestMemoryRegion};

use super::peers::Peers;
use crate::memory::is_writable_region;
use crate::reclaim::{Pinned, Reclaim};
use crate::virtio::GuestMemory;

/// The address space of devices. Implemented over VFIO, and by tests.
pub trait Dma: Send + Sync {
    /// Lets devices reach `size` bytes at `host` of this process by `iova`, and pins them.
    ///
    /// # Errors
    /// What the kernel says; `ENOMEM` at a limit.
    fn map(&self, iova: u64, host: u64, size: u64) -> io::Result<()>;
    /// Takes that back.
    ///
    /// # Errors
    /// What the kernel says.
    fn unmap(&self, iova: u64, size: u64) -> io::Result<()>;
}

/// Guest memory could not be given to a device.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// A limit.
    #[error(
        "a device needs all {} MiB of the VM's memory pinned, and {} MiB are missing: {}",
        mebibytes(*needed), mebibytes(needed.saturating_sub(*pinned)), fix(*lockable)
    )]
    Limit {
        /// Bytes that have to be.
        needed: u64,
        /// Bytes that were.
        pinned: u64,
        /// Bytes that the VMM may lock, if that is what limits it.
        lockable: Option<u64>,
    },
    /// Something else.
    #[error(
        "the node's IOMMU takes no mapping of the VM's memory at {iova:#x} ({size} bytes): {source}"
    )]
    Map {
        /// Guest-physical address.
        iova: u64,
        /// Bytes.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Rounded up.
fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn fix(lockable: Option<u64>) -> String {
    match lockable {
        Some(bytes) => format!(
            "RLIMIT_MEMLOCK lets the VMM lock {} MiB; raise it for containerd (LimitMEMLOCK=infinity)",
            bytes >> 20
        ),
        None => "the node has no memory left, or the pod's limit is below the VM's size".to_owned(),
    }
}

/// The memory of a VM, mapped for devices. Dropping it takes it from them.
pub struct GuestDma {
    dma: Arc<dyn Dma>,
    mapped: Vec<(u64, u64)>,
    /// BARs of the devices, beside it.
    peers: Peers,
    /// No page leaves while this is there.
    _pinned: Pinned,
}

impl GuestDma {
    /// Maps all of guest memory, as far as the guest has it: `has` tells the parts of a region that it has. Takes its
    /// time: every page is made and pinned. `lockable` is what the process may lock, for the error.
    ///
    /// # Errors
    /// [`DmaError`]; nothing is mapped then.
    pub fn new(
        dma: Arc<dyn Dma>,
        memory: &GuestMemory,
        reclaim: &Arc<Reclaim>,
        lockable: Option<u64>,
        has: impl Fn(Range<u64>) -> Vec<Range<u64>>,
    ) -> Result<Self, DmaError> {
        let mut guest = Self {
            peers: Peers::new(Arc::clone(&dma)),
            dma,
            mapped: Vec::new(),
            // First, so that nothing is given up between.
            _pinned: reclaim.pin(),
        };
        let memory = memory.memory();
        let mut parts = Vec::new();
        // Files that are read are not the device's: each page of them would be pinned.
        for region in memory.iter().filter(|region| is_writable_region(region)) {
            let start = region.start_addr().raw_value();
            let host = region.as_ptr() as u64;
            let within = has(start..start + region.len()).into_iter();
            parts.extend(within.map(|part| {
                (
                    part.start,
                    host + (part.start - start),
                    part.end - part.start,
                )
            }));
        }
        let needed = parts.iter().map(|(_, _, size)| size).sum();
        for (iova, host, size) in parts {
            if let Err(source) = guest.dma.map(iova, host, size) {
                let pinned = guest.mapped.iter().map(|(_, size)| size).sum();
                return Err(match source.raw_os_error() {
                    Some(libc::ENOMEM) => DmaError::Limit {
                        needed,
                        pinned,
                        lockable,
                    },
                    _ => DmaError::Map { iova, size, source },
                });
            }
            guest.mapped.push((iova, size));
        }
        Ok(guest)
    }

    /// The BARs of the devices that are in it.
    #[must_use]
    pub fn peers(&self) -> &Peers {
        &self.peers
    }
}

impl Drop for GuestDma {
    fn drop(&mut self) {
        for (iova, size) in &self.mapped {
            // The end of the descriptor does the same.
            let _ = self.dma.unmap(*iova, *size);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::sync::lock;

    #[derive(Default)]
    struct Seen {
        mapped: Mutex<Vec<(u64, u64)>>,
        limit: u64,
    }

    struct Fake(Arc<Seen>);

    impl Dma for Fake {
        fn map(&self, iova: u64, host: u64, size: u64) -> io::Result<()> {
            assert_eq!(host % 4096, 0);
            let mut mapped = lock(&self.0.mapped);
            let all: u64 = mapped.iter().map(|(_, size)| size).sum();
            if all + size > self.0.limit {
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            mapped.push((iova, size));
            Ok(())
        }
        fn unmap(&self, iova: u64, size: u64) -> io::Result<()> {
            lock(&self.0.mapped).retain(|other| *other != (iova, size));
            Ok(())
        }
    }

    fn memory() -> GuestMemory {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 2 << 20)];
        GuestMemory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    #[test]
    fn all_of_memory_is_mapped_at_its_address_and_unmapped_at_the_end() {
        let seen = Arc::new(Seen {
            limit: 4 << 20,
            ..Seen::default()
        });
        let reclaim = Arc::new(Reclaim::default());
        let guest = GuestDma::new(
            Arc::new(Fake(Arc::clone(&seen))),
            &memory(),
            &reclaim,
            Some(5 << 20),
            |part| vec![part],
        )
        .unwrap();
        assert_eq!(*lock(&seen.mapped), [(0, 1 << 20), (1 << 32, 2 << 20)]);
        assert!(!reclaim.is_allowed());
        drop(guest);
        assert!(lock(&seen.mapped).is_empty());
        assert!(reclaim.is_allowed());
    }

    #[test]
    fn only_what_the_guest_has_is_mapped() {
        let seen = Arc::new(Seen {
            limit: 4 << 20,
            ..Seen::default()
        });
        let reclaim = Arc::new(Reclaim::default());
        let fake = Arc::new(Fake(Arc::clone(&seen)));
        let has = |part: Range<u64>| match part.start {
            0 => vec![part],
            start => vec![
                start + 4096..start + 8192,
                start + (1 << 20)..start + (1 << 20) + 4096,
            ],
        };
        let guest = GuestDma::new(fake, &memory(), &reclaim, None, has).unwrap();
        assert_eq!(
            *lock(&seen.mapped),
            [
                (0, 1 << 20),
                ((1 << 32) + 4096, 4096),
                ((1 << 32) + (1 << 20), 4096)
            ]
        );
        drop(guest);
    }

    #[test]
    fn a_limit_is_told_with_what_is_needed_and_what_there_was_and_nothing_stays_mapped() {
        let seen = Arc::new(Seen {
            limit: 2 << 20,
            ..Seen::default()
        });
        let reclaim = Arc::new(Reclaim::default());
        let error = GuestDma::new(
            Arc::new(Fake(Arc::clone(&seen))),
            &memory(),
            &reclaim,
            Some(5 << 20),
            |part| vec![part],
        )
        .err()
        .unwrap()
        .to_string();
        // One of three was pinned.
        assert!(
            error.contains("all 3 MiB") && error.contains("2 MiB are missing"),
            "{error}"
        );
        assert!(
            error.contains("RLIMIT_MEMLOCK lets the VMM lock 5 MiB"),
            "{error}"
        );
        assert!(lock(&seen.mapped).is_empty() && reclaim.is_allowed());
    }
}
