//! Files that the guest has as memory ([`crate::virtio::pmem`]): their place at the end of the guest-physical space, KVM's slot for them, and the device
//! that tells the guest of them. All of it comes with the device and goes with it.
//!
//! They are part of what devices take for the guest's memory, because a program may write to a disk or a socket straight
//! from a file that it has mapped; what a device would write there is refused ([`crate::memory::is_writable`]). Devices of the
//! node do not reach them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use slog::{error, info};
use vm_memory::{
    GuestAddress, GuestAddressSpace as _, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use super::plug::Place;
use super::{Board, MAX_DEVICES};
use crate::builder::descriptors::Descriptors;
use crate::builder::error::StartError;
use crate::control::PmemConfig;
use crate::memory::{MemoryError, is_writable_region};
use crate::pci::window::Window;
use crate::virtio::net::MAX_VHOST_REGIONS;
use crate::virtio::pmem::Pmem;
use crate::virtio::pmem::files::{self, MappedFiles, Shortened};

/// What of the guest's memory is files.
pub(super) struct FileMemory {
    /// Places for them.
    window: Window,
    /// By the function of their device.
    placed: BTreeMap<u8, Placed>,
}

struct Placed {
    slot: u32,
    base: u64,
    length: u64,
    files: MappedFiles,
}

impl FileMemory {
    /// None yet; there is room for them in `range`.
    pub(super) fn new(range: Range<u64>) -> Self {
        Self {
            window: Window::new(range),
            placed: BTreeMap::new(),
        }
    }
}

impl Board {
    /// Maps files and puts the device for them on the bus; its function.
    ///
    /// # Errors
    /// [`StartError`]; nothing of it is left then.
    pub(super) fn plug_pmem(
        &mut self,
        config: &PmemConfig,
        fds: &mut Descriptors,
    ) -> Result<u8, StartError> {
        let mut opened = Vec::new();
        for piece in &config.pieces {
            let length = piece.length.ok_or_else(|| {
                StartError::Invalid("a file that is memory of the guest has a length".to_owned())
            })?;
            opened.push((fds.take(piece.file, "pmem")?, length));
        }
        let lengths: Vec<u64> = opened.iter().map(|(_, length)| *length).collect();
        let length = files::region_size(&lengths);
        let size = length.and_then(u64::checked_next_power_of_two);
        let (Some(length), Some(size)) = (length, size) else {
            let reason = "files of so many bytes are no memory".to_owned();
            return Err(StartError::Invalid(reason));
        };
        self.may_map_files(length)?;
        let base = self.file_memory.window.allocate(size)?;
        let plugged = self.place_files(base, opened);
        if plugged.is_err() {
            self.file_memory.window.free(base);
        }
        plugged
    }

    /// The guest has 64 bytes of page descriptors for each page of files, whether or not it reads it: no more than a 64th of its memory.
    fn may_map_files(&self, length: u64) -> Result<(), StartError> {
        if self.file_memory.placed.len() >= MAX_DEVICES {
            return Err(StartError::Limit(format!(
                "at most {MAX_DEVICES} disks that are memory are possible"
            )));
        }
        let memory = self.memory.memory();
        let ram = memory.iter().filter(|region| is_writable_region(region));
        let ram: u64 = ram.map(GuestMemoryRegion::len).sum();
        let placed = self.file_memory.placed.values();
        let files = placed.fold(length, |sum, placed| sum.saturating_add(placed.length));
        if files > ram {
            return Err(StartError::Limit(format!(
                "files of {} MiB are more than the VM's memory, {} MiB, of which its kernel would describe them in a 64th",
                files >> 20,
                ram >> 20
            )));
        }
        let pieces = memory.num_regions();
        if !self.followers.is_empty() && pieces >= MAX_VHOST_REGIONS {
            return Err(StartError::Limit(format!(
                "the VM's memory is in {pieces} pieces, and vhost-net takes no more"
            )));
        }
        Ok(())
    }

    fn place_files(&mut self, base: u64, opened: Vec<(OwnedFd, u64)>) -> Result<u8, StartError> {
        let (region, files) = files::map(base, opened)?;
        let (host, length) = (region.as_ptr() as u64, region.len());
        let region = Arc::new(region);
        let grown = self.memory.memory().insert_region(Arc::clone(&region));
        let grown = grown.map_err(MemoryError::Layout)?;
        // SAFETY: the region stays mapped until `take_files` has cleared the slot, and nothing else is in the window's range
        // but what the guest puts there itself, which KVM refuses or keeps.
        let slot = unsafe { self.slots.set_readonly(base, length, host) };
        let slot = slot.map_err(|source| MemoryError::Map {
            bytes: length,
            source,
        })?;
        let placed = Placed {
            slot,
            base,
            length,
            files,
        };
        self.replace_memory(grown);
        let plugged = self.tell_followers().and_then(|()| {
            let device = Pmem::new(base..base + length);
            self.plug_virtio(Box::new(device), Place::Quiet)
        });
        match plugged {
            Ok((function, _)) => {
                info!(self.log, "files are memory of the guest"; "function" => function, "bytes" => length);
                self.file_memory.placed.insert(function, placed);
                Ok(function)
            }
            Err(error) => {
                self.take_files(&placed);
                Err(error)
            }
        }
    }

    /// To be called when a device has gone: if files were behind it, the guest has them no more.
    pub(super) fn unmap_files(&mut self, function: u8) {
        if let Some(placed) = self.file_memory.placed.remove(&function) {
            self.take_files(&placed);
            self.file_memory.window.free(placed.base);
        }
    }

    fn take_files(&mut self, placed: &Placed) {
        use crate::vfio::bars::MemorySlots as _;
        self.slots.clear(placed.slot);
        let memory = self.memory.memory();
        let removed = memory.remove_region(GuestAddress(placed.base), placed.length);
        let Ok((left, region)) = removed else {
            return;
        };
        self.replace_memory(left);
        if let Err(error) = self.tell_followers() {
            // The node's kernel may still read there for an interface: the addresses must not become anything else's.
            error!(self.log, "files stay mapped"; "reason" => error.reply("vhost-net").message);
            std::mem::forget::<Arc<GuestRegionMmap>>(region);
        }
    }

    pub(super) fn replace_memory(&self, with: GuestMemoryMmap) {
        match self.memory.lock() {
            Ok(memory) => memory.replace(with),
            Err(poisoned) => poisoned.into_inner().replace(with),
        }
    }

    /// The first file that the guest has as memory and that is shorter than it was.
    pub fn shortened(&self) -> Option<Shortened> {
        let mut placed = self.file_memory.placed.values();
        placed.find_map(|placed| placed.files.shortened())
    }
}
