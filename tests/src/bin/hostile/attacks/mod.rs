//! The attacks, each followed by the device's own work (`health`): what it cannot do any more was the
//! attack's success.

mod balloon;
mod bars;
mod block;
mod files;
mod health;
mod mem;
mod net;
mod platform;
mod pmem;
mod rings;
mod share;
mod transport;
mod vsock;

use std::cell::Cell;

use anyhow::{Context, Result};

use crate::pci::Function;

/// Virtio device ids (virtio 1.3 §5).
pub const NET: u16 = 1;
/// Block device.
pub const BLOCK: u16 = 2;
/// Entropy.
pub const RNG: u16 = 4;
/// Balloon.
pub const BALLOON: u16 = 5;
/// Socket device.
pub const VSOCK: u16 = 19;
/// Memory.
pub const MEM: u16 = 24;
/// File system.
pub const FS: u16 = 26;
/// Memory that is files.
pub const PMEM: u16 = 27;

/// A group of attacks. An error means that one could not be tried, or that a device did not survive it.
pub struct Attack {
    /// What is done.
    pub name: &'static str,
    /// Does it.
    pub run: fn(&Guest) -> Result<()>,
}

/// The devices, and how often one was attacked and seen to work afterwards.
pub struct Guest {
    /// All of them, in the order of the bus.
    pub functions: Vec<Function>,
    /// Attacks so far.
    pub count: Cell<u32>,
}

impl Guest {
    /// The first function of a kind.
    pub fn all_of_kind(&self, kind: u16) -> Vec<&Function> {
        let all = self.functions.iter();
        all.filter(|function| function.kind == kind).collect()
    }

    pub fn of_kind(&self, kind: u16) -> Result<&Function> {
        self.functions
            .iter()
            .find(|function| function.kind == kind)
            .with_context(|| format!("no device of kind {kind}"))
    }

    /// One attack has been made on this device; it does its work all the same.
    pub fn done(&self, function: &Function) -> Result<()> {
        health::works(function)
            .with_context(|| format!("device {} after the attack", function.kind))?;
        self.count.set(self.count.get() + 1);
        Ok(())
    }

    /// Makes an attack on each device.
    pub fn each(&self, mut attack: impl FnMut(&Function) -> Result<()>) -> Result<()> {
        for function in &self.functions {
            attack(function).with_context(|| format!("device {}", function.kind))?;
            self.done(function)?;
        }
        Ok(())
    }
}

/// All of them: those that a VMM might not survive come last.
pub const ALL: &[Attack] = &[
    Attack {
        name: "none: an honest driver is served by every device",
        run: |guest| guest.each(|_| Ok(())),
    },
    Attack {
        name: "queue size and addresses changed after DRIVER_OK",
        run: transport::change_active_queue,
    },
    Attack {
        name: "queues that do not exist",
        run: transport::absent_queues,
    },
    Attack {
        name: "queue sizes that are zero, odd or huge",
        run: transport::bad_sizes,
    },
    Attack {
        name: "queue addresses outside RAM",
        run: transport::addresses_outside,
    },
    Attack {
        name: "features that were not offered",
        run: transport::bad_features,
    },
    Attack {
        name: "status bits in any order",
        run: transport::status_storm,
    },
    Attack {
        name: "accesses of every size at every offset",
        run: transport::odd_accesses,
    },
    Attack {
        name: "notifications of queues that do not exist",
        run: transport::stray_kicks,
    },
    Attack {
        name: "resets during traffic",
        run: transport::resets_in_traffic,
    },
    Attack {
        name: "MSI-X vectors and table entries of any value",
        run: transport::msix,
    },
    Attack {
        name: "descriptor loops",
        run: rings::loops,
    },
    Attack {
        name: "lengths that wrap",
        run: rings::lengths,
    },
    Attack {
        name: "buffers outside RAM and in BARs",
        run: rings::buffers_outside,
    },
    Attack {
        name: "a file that is memory: requests that there are not, and flushes",
        run: pmem::requests,
    },
    Attack {
        name: "a file that is memory: devices are told to write into it",
        run: pmem::written_by_devices,
    },
    Attack {
        name: "a file that is memory: sectors and rings in it",
        run: pmem::disk_and_rings,
    },
    Attack {
        name: "a file that is memory: a disk is written from it",
        run: pmem::read_by_devices,
    },
    Attack {
        name: "descriptor indexes out of range",
        run: rings::indexes,
    },
    Attack {
        name: "a ring position far ahead",
        run: rings::position,
    },
    Attack {
        name: "indirect tables that are wrong",
        run: rings::indirect,
    },
    Attack {
        name: "buffers of the wrong direction and without length",
        run: rings::directions,
    },
    Attack {
        name: "rings that overlap their own buffers",
        run: rings::self_reference,
    },
    Attack {
        name: "vsock packets of foreign CIDs",
        run: vsock::foreign_cids,
    },
    Attack {
        name: "vsock operations and types that do not exist",
        run: vsock::bogus_operations,
    },
    Attack {
        name: "vsock lengths that lie",
        run: vsock::lengths,
    },
    Attack {
        name: "vsock connections to every port",
        run: vsock::connections,
    },
    Attack {
        name: "vsock data beyond the credit",
        run: vsock::credit,
    },
    Attack {
        name: "vsock answers to nothing",
        run: vsock::strays,
    },
    Attack {
        name: "file requests that are garbage",
        run: rings::file_requests,
    },
    Attack {
        name: "file requests before INIT",
        run: share::before_init,
    },
    Attack {
        name: "file sessions",
        run: share::sessions,
    },
    Attack {
        name: "frames with headers that promise too much",
        run: net::headers,
    },
    Attack {
        name: "frames of every length",
        run: net::frames,
    },
    Attack {
        name: "buffers to receive into that are too short",
        run: net::receive_buffers,
    },
    Attack {
        name: "commands to the network device",
        run: net::control,
    },
    Attack {
        name: "sectors beyond the disk",
        run: block::sectors,
    },
    Attack {
        name: "lengths that are no sectors",
        run: block::lengths,
    },
    Attack {
        name: "disk requests of every kind",
        run: block::kinds,
    },
    Attack {
        name: "discarded ranges that leave the disk",
        run: block::ranges,
    },
    Attack {
        name: "writes to a read-only disk",
        run: block::readonly,
    },
    Attack {
        name: "disk requests without their parts",
        run: block::shapes,
    },
    Attack {
        name: "balloon pages that are not the guest's",
        run: balloon::foreign_pages,
    },
    Attack {
        name: "balloon lists of any length",
        run: balloon::lists,
    },
    Attack {
        name: "reports of parts of pages",
        run: balloon::reports,
    },
    Attack {
        name: "memory blocks that are not there",
        run: mem::ranges,
    },
    Attack {
        name: "more memory than was asked for",
        run: mem::greed,
    },
    Attack {
        name: "memory requests of any shape",
        run: mem::shapes,
    },
    Attack {
        name: "BARs moved onto RAM, to 0 and onto each other",
        run: bars::moved,
    },
    Attack {
        name: "decoding switched off under a live queue",
        run: bars::decode_off,
    },
    Attack {
        name: "configuration space written everywhere",
        run: bars::config_fuzz,
    },
    Attack {
        name: "ports that nothing answers",
        run: platform::ports,
    },
];
