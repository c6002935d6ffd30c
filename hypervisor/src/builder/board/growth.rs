//! Memory that comes while the machine runs, and goes. The device for it ([`crate::virtio::mem`]) is there from the
//! first time that a guest is to have more, so one whose memory never changes has neither it nor a slot for it.
//!
//! What the guest may touch grows with what it is to have, by whole sections, and never shrinks: the host's memory of
//! a block that the guest gives back is gone, but not the address.

use std::ops::Range;
use std::sync::Arc;

use slog::info;
use vm_memory::{GuestAddressSpace as _, GuestMemory as _, GuestMemoryRegion as _};

use super::Board;
use super::followers::Slow;
use super::plug::Place;
use crate::arch::x86_64::layout::memory_section;
use crate::builder::error::StartError;
use crate::memory::{self, MemoryError};
use crate::vfio::bars::MemorySlots as _;
use crate::virtio::mem::{BLOCK, Mem, MemHandle};
use crate::virtio::net::MAX_VHOST_REGIONS;
use crate::virtio::pci::interrupt::VirtioInterrupt;
use crate::virtio::{GuestMemory, Interrupt as _};

/// The region for more memory.
pub(super) struct Growth {
    /// Bytes that the machine was built with.
    built: u64,
    region: Range<u64>,
    /// Bytes of the region that the guest may touch.
    mapped: u64,
    device: Option<Device>,
}

struct Device {
    function: u8,
    handle: MemHandle,
    interrupt: Arc<VirtioInterrupt>,
}

impl Growth {
    pub(super) fn new(memory: &GuestMemory, region: Range<u64>) -> Self {
        Self {
            built: memory.memory().iter().map(|part| part.len()).sum(),
            region,
            mapped: 0,
            device: None,
        }
    }

    /// Bytes that the guest may have in all.
    fn most(&self) -> u64 {
        self.built + (self.region.end - self.region.start)
    }

    /// Bytes that it has.
    fn bytes(&self) -> u64 {
        let device = self.device.as_ref();
        self.built + device.map_or(0, |device| device.handle.plugged())
    }

    /// What of the region is the guest's. To be asked while memory is pinned: else it is over as soon as it is told.
    pub(super) fn plugged(&self) -> Plugged {
        Plugged {
            region: self.region.clone(),
            handle: self.device.as_ref().map(|device| device.handle.clone()),
        }
    }
}

/// What of a machine's memory the guest has: all that it was built with, and what is plugged.
pub(super) struct Plugged {
    region: Range<u64>,
    handle: Option<MemHandle>,
}

impl Plugged {
    /// The parts of `part` of the guest's memory that it has.
    pub(super) fn within(&self, part: &Range<u64>) -> Vec<Range<u64>> {
        if !self.region.contains(&part.start) {
            return vec![part.clone()];
        }
        let runs = self.handle.as_ref().map_or_else(Vec::new, MemHandle::runs);
        let cut = |run: Range<u64>| run.start.max(part.start)..run.end.min(part.end);
        runs.into_iter()
            .map(cut)
            .filter(|run| !run.is_empty())
            .collect()
    }
}

impl Board {
    /// Says how much memory the guest is to have; the function of the device by which it changes, if there is one, and
    /// what the guest has.
    ///
    /// # Errors
    /// [`StartError`], with the numbers.
    pub fn resize(&mut self, bytes: u64) -> Result<(Option<u8>, u64), StartError> {
        let (built, most, has) = (self.growth.built, self.growth.most(), self.growth.bytes());
        let wanted = bytes.saturating_sub(built).checked_next_multiple_of(BLOCK);
        let wanted = wanted
            .filter(|wanted| *wanted <= most - built)
            .ok_or_else(|| {
                StartError::Limit(format!(
                    "{bytes} bytes of memory were asked for, and this VM may have {built} to {most}"
                ))
            })?;
        if self.growth.device.is_none() && wanted == 0 {
            return Ok((None, has));
        }
        if !self.reclaim.is_allowed() {
            return Err(StartError::State(format!(
                "{bytes} bytes of memory were asked for, but a device of the node has the VM's {has} bytes pinned: they \
                 can change when no container of the pod has one"
            )));
        }
        let section = memory_section(built);
        let mapped = wanted.next_multiple_of(section).min(most - built);
        self.map_more(mapped)?;
        let device = match self.growth.device.take() {
            Some(device) => device,
            None => self.plug_growth()?,
        };
        device.handle.request(wanted, mapped);
        // A driver that is not there yet reads it when it comes.
        let told = device.interrupt.config();
        let function = device.function;
        self.growth.device = Some(device);
        told.map_err(|error| StartError::Device {
            device: "mem",
            reason: format!("the guest cannot be told: {error}"),
        })?;
        info!(self.log, "the guest's memory is to change"; "bytes" => built + wanted, "has" => has);
        Ok((Some(function), has))
    }

    fn plug_growth(&mut self) -> Result<Device, StartError> {
        let (device, handle) = Mem::new(self.growth.region.clone(), Arc::clone(&self.reclaim));
        let (function, interrupt) = self.plug_virtio(Box::new(device), Place::Quiet)?;
        Ok(Device {
            function,
            handle,
            interrupt,
        })
    }

    /// Lets the guest touch the first `bytes` of the region.
    fn map_more(&mut self, bytes: u64) -> Result<(), StartError> {
        let growth = &mut self.growth;
        if bytes <= growth.mapped {
            // Whom it was too slow for the last time has heard of it by now, or has to yet.
            return self.followers.wait().map_err(slow);
        }
        let pieces = self.memory.memory().num_regions();
        if !self.followers.is_empty() && pieces >= MAX_VHOST_REGIONS {
            return Err(StartError::Limit(format!(
                "the VM's memory has grown in {pieces} pieces, and vhost-net takes no more"
            )));
        }
        let (start, length) = (growth.region.start + growth.mapped, bytes - growth.mapped);
        let part = memory::more(start, length)?;
        let host = part.as_ptr() as u64;
        let grown = self.memory.memory().insert_region(Arc::new(part));
        let grown = grown.map_err(MemoryError::Layout)?;
        // SAFETY: guest memory stays mapped for the life of the process, and nothing else is in the region.
        unsafe { self.slots.set(start, length, host) }.map_err(|source| {
            StartError::Memory(MemoryError::Map {
                bytes: length,
                source,
            })
        })?;
        self.replace_memory(grown);
        self.growth.mapped = bytes;
        self.tell_followers()
    }

    /// Before the guest may put anything of theirs into new memory, and before memory that has gone is anything else.
    pub(super) fn tell_followers(&mut self) -> Result<(), StartError> {
        self.followers.tell().map_err(slow)
    }
}

fn slow(_: Slow) -> StartError {
    let what = "the VM's interfaces are slow to hear of more memory; try again";
    StartError::State(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout::MEMORY_SECTION;
    use crate::reclaim::Reclaim;

    #[test]
    fn devices_of_the_node_see_what_was_built_and_what_is_plugged() {
        let region = 4 << 30..8 << 30;
        let none = Plugged {
            region: region.clone(),
            handle: None,
        };
        let built = 0..1 << 20;
        assert_eq!(none.within(&built), std::slice::from_ref(&built));
        assert!(none.within(&(4 << 30..5 << 30)).is_empty());
        let (_device, handle) = Mem::new(region.clone(), Arc::<Reclaim>::default());
        handle.request(8 * BLOCK, MEMORY_SECTION);
        let some = Plugged {
            region,
            handle: Some(handle),
        };
        assert!(some.within(&(4 << 30..5 << 30)).is_empty());
    }
}
