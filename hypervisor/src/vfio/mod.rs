//! Devices of the node in a guest (VFIO): their registers, their interrupts, their DMA.
//!
//! The shim opens everything: the address space of the devices (a container with its IOMMU set, or an I/O address space of
//! iommufd), and the device. Here the device is read, filtered and
//! put on the guest's bus. [`device::Device`] is the device as its kernel interface shows it, so that everything above
//! it also runs against a stand-in. Its descriptors belong to one thread ([`owner`]) whose filter alone has VFIO's
//! calls; CPU threads ask it for what reaches the device, which is no part of a data path: BARs are mapped, and
//! interrupts go from the kernel to the guest.
//!
//! What the guest writes is hostile. What the device answers is not trusted with more than itself: its lists are
//! walked with bounds.

pub mod bars;
pub mod coherence;
pub mod config;
pub mod device;
pub mod dma;
pub mod function;
#[cfg(test)]
mod hostile;
pub mod interrupts;
pub mod kernel;
#[cfg(test)]
mod many;
pub mod owner;
pub mod peers;
pub mod space;
#[cfg(test)]
pub(crate) mod testing;
pub mod words;
